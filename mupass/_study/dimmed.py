"""Places whose gradient starts near zero, for a readout in the middle of the model hides the loss from them.

A readout starts at ``1/m``, so what comes out of it is near zero, and so is the gradient that a later readout
sends back through the weights between them: a sum of ``m`` terms without correlation, ``1/sqrt(m)`` below the
order that it has once both have learned. No scale of a parameter is to blame. What one step does there can
be judged relative to the gradient; over several steps it follows no power of the width.
"""

from __future__ import annotations

from collections.abc import Sequence

from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.parameterizations import row
from mupass._scales.plan import Plan
from mupass._scales.scales import scales
from mupass._study.causes import is_readout
from mupass._study.probe import Probe
from mupass._study.recorder import Site


def dimmed_places(probe: Probe, plan: Plan) -> set[Site]:
    """Return the places below a readout whose output goes on to other weights, the readout included.

    Args:
        probe: Of one copy.
        plan: Its plan.
    """
    if row(plan.parameterization).readout_power != 1:  # readouts do not start near zero
        return set()
    readouts, weights = set(), set()
    for site in probe.start:
        if site.parameter in plan:
            geometry = plan[site.parameter].geometry
            # A readout hides the loss from what lies below it, where its output goes on to other weights.
            if is_readout(site, geometry):
                readouts.add(site)
            if geometry.role in ("input", "hidden", "output"):
                weights.add(site)
    return probe.dimmed(readouts, weights)


def relative(
    table: Sequence[Sequence[float]],
    gradients: Sequence[Sequence[float]],
    parameter: str,
    plans: Sequence[Plan],
    power: float,
) -> list[list[float]]:
    """Return the sizes that updates would have if the gradient had the order that the plan counts on.

    Args:
        table: For each width the size of the update of every seed.
        gradients: The same of the parameter's gradient.
        parameter: The parameter.
        plans: Plans of all widths.
        power: Of the gradient's size in the size of one step.
    """
    relative_sizes = []
    for plan, updates, slopes in zip(plans, table, gradients, strict=True):
        # Adam's epsilon is added to the gradient's size, so it has the order that this should have.
        order = scales(plan[parameter].geometry, OptimizerSpec("adam"), plan.parameterization).epsilon
        pairs = zip(updates, slopes, strict=True)
        # The size of the update if the gradient had its planned order.
        relative_sizes.append([update / (gradient / order) ** power for update, gradient in pairs])
    return relative_sizes


def gradient_power(spec: OptimizerSpec | None) -> float | None:
    """Return the power of the gradient's size in the size of one step, at damping relative to the factors.

    None where there is no one power: K-FAC divides by the square of the gradient down to its damping floor.

    Args:
        spec: Row of the optimizer, or None where it is not known.
    """
    if spec is None or spec.row.cause_if_dimmed:
        return None
    return spec.step.gradient_power
