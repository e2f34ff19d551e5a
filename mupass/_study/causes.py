"""Causes: which fault gives the power of width that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from mupass._optim.base import PlannedOptimizer
from mupass._records import Geometry
from mupass._scales.optimizers import OPTIMIZERS, OptimizerSpec
from mupass._scales.plan import Plan
from mupass._scales.scales import init_powers, powers
from mupass._study.coords import Coordinate
from mupass._study.recorder import SCORES, Site

NEAR = 0.3  # powers come in halves
UNMULTIPLIED = "a tied embedding is the readout here and lacks its multiplier 1/m"
NORMALIZED = (
    "{where} divides what the readout {name} puts out by its own size, which undoes its start; normalize "
    "what it reads instead"
)
GIVEN = (
    "what the operator is given scales like width^{power:+.2f} already: look for a normalization to unit "
    "length, or a multiplication by a power of the width, before it"
)


def spec_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter | None) -> OptimizerSpec | None:
    """Return the row of the scale table by which an optimizer treats a parameter, or None.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters; a planned optimizer may have left it to its fallback.
    """
    if isinstance(optimizer, PlannedOptimizer):
        # A planned optimizer leaves some parameters to its fallback, which has a row of its own.
        for group in optimizer.param_groups:
            held = any(other is parameter for other in group["params"])
            if held and group["algorithm"] != optimizer.spec.name:
                return OptimizerSpec(group["algorithm"])
        return optimizer.spec
    # Optimizers of torch are known by the name of their class.
    for algorithm in OPTIMIZERS.values():
        if algorithm.torch_class == type(optimizer).__name__:
            return OptimizerSpec(algorithm.name)
    return None


def is_readout(site: Site, geometry: Geometry) -> bool:
    """Return whether an operator reads a parameter as a readout: it contracts all axes that grow.

    Args:
        site: Where the parameter is read.
        geometry: The parameter.
    """
    return geometry.role == "output" or is_tied_readout(site, geometry)


def is_tied_readout(site: Site, geometry: Geometry) -> bool:
    """Return whether an operator is the readout of a parameter that is an embedding elsewhere.

    Args:
        site: Where the parameter is read.
        geometry: The parameter.
    """
    in_this_module = any(use.module == site.module for use in geometry.readout_uses)
    return in_this_module and not site.operator.startswith("embedding")


def cause(
    row: Coordinate,
    measured: Mapping[str, float],
    plan: Plan,
    spec: OptimizerSpec | None,
    head_dims: tuple[int, ...],
    dimmed: bool,
) -> str:
    """Return the likely cause of a quantity that scales with width.

    Args:
        row: The quantity.
        measured: Powers of width measured at its place: ``input`` and ``weight`` before the first step, and
            ``rate``, the learning rate of its parameter.
        plan: Plan of the widest copy.
        spec: Row of the optimizer.
        head_dims: Size of one head at each width, where the place is attention and tells it; else ().
        dimmed: Whether the place lies below a readout in the middle of the model.
    """
    site, power = row.site, row.slope.power
    if plan.parameterization == "standard":
        return (
            "standard parameterization: PyTorch's initialization and one learning rate at all widths; "
            "mup is made for this"
        )
    # A normalized readout spoils what every parameter below it learns.
    for entry in plan.entries:
        if entry.geometry.normalized and row.step:
            return NORMALIZED.format(where=entry.geometry.normalized, name=entry.geometry.name)
    # Attention scores have no parameter: head_dim or the layers below are at fault.
    if site.operator in SCORES:
        return _of_scores(head_dims)
    if not site.parameter:
        return "what the layers above add up to; look at the first of them that fails"
    if site.parameter not in plan:
        return "the parameters that it is computed from move too much or too little"
    geometry = plan[site.parameter].geometry
    # Below a readout in the middle K-FAC divides by the square of a gradient near zero.
    if dimmed and power > 0 and spec is not None and spec.row.cause_if_dimmed:
        return spec.row.cause_if_dimmed
    if row.quantity == "activation":
        causes = list(_of_activation(site, geometry, power, measured, plan.parameterization))
    else:
        causes = list(_of_input(site, geometry, measured.get("input")))
        if spec is not None:
            causes += _of_rate(geometry, power, measured.get("rate"), plan, spec)
    return "; or ".join(causes) or (
        "its learning rate is as planned, so the gradient that reaches it scales differently: a multiplier "
        "above it, or sums over an axis that grows"
    )


def _of_scores(head_dims: tuple[int, ...]) -> str:
    if len(set(head_dims)) > 1:
        return (
            f"head_dim grows ({head_dims[0]} to {head_dims[-1]}) while the attention scale stays "
            "1/sqrt(head_dim): scale the scores by 1/head_dim (Yang et al., arXiv 2203.03466), or widen by "
            "heads"
        )
    return "queries and keys grow, or learn too fast, by that power of width"


def _of_activation(
    site: Site, geometry: Geometry, power: float, measured: Mapping[str, float], parameterization: str
) -> Iterator[str]:
    input_power, weight_power = measured.get("input", 0.0), measured.get("weight", 0.0)
    if is_tied_readout(site, geometry):
        yield UNMULTIPLIED
        return
    # What the operator is given scales by itself, and its output just follows.
    if abs(input_power - geometry.given) > NEAR and abs(input_power - power) < NEAR:
        yield GIVEN.format(power=input_power)
        return
    p_in, p_out = init_powers(geometry, parameterization)
    # m_in^p m_out^q, of which each factor is the width where its fan grows and 1 where not.
    planned = p_in * geometry.grows_in + p_out * geometry.grows_out
    if abs(weight_power - planned) > NEAR / 2:
        yield (
            f"initialization: its entries scale like width^{weight_power:+.2f} instead of width^{planned:+g}"
        )


def _of_input(site: Site, geometry: Geometry, input_power: float | None) -> Iterator[str]:
    """Yield what is wrong with the inputs of a use, whose power in width was measured."""
    if input_power is None:
        return
    if is_tied_readout(site, geometry):
        if input_power > NEAR - 1:  # T5's code itself has brought it down to -1/2
            yield UNMULTIPLIED
    elif abs(input_power - geometry.given) > NEAR:
        yield GIVEN.format(power=input_power)


def _of_rate(
    geometry: Geometry, power: float, rate_power: float | None, plan: Plan, spec: OptimizerSpec
) -> Iterator[str]:
    """Yield what is wrong with a learning rate, or what else makes updates of this power in width."""
    grows_in, grows_out = geometry.grows_in, geometry.grows_out
    fan_in_power, fan_out_power = powers(geometry, spec, plan.parameterization)["lr"]
    planned = fan_in_power * grows_in + fan_out_power * grows_out
    # What the rate would be if fan_in and fan_out were swapped, as with a transposed weight.
    swapped = fan_in_power * grows_out + fan_out_power * grows_in
    if rate_power is not None and abs(rate_power - planned) > NEAR:
        mixed = ", as if fan_in were fan_out" if abs(rate_power - swapped) < NEAR else ""
        yield (
            f"its learning rate scales like width^{rate_power:+.2f}{mixed}; {spec.name} needs "
            f"width^{planned:+g} here"
        )
    # The rate is as planned: a setting of the optimizer makes updates grow, or shrink.
    elif power > 0 and spec.row.cause_if_growing and not spec.grafted:
        yield spec.row.cause_if_growing
    elif power <= 0 and spec.row.cause_if_shrinking and not spec.grafted:
        yield spec.row.cause_if_shrinking
