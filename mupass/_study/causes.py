"""Causes: which fault gives the power of width that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mupass._geometry import Geometry
from mupass._optim._base import PlannedOptimizer
from mupass._plan import Plan
from mupass._scales import OptimizerSpec, powers
from mupass._study.coords import Coordinate
from mupass._study.probe import SCORES, Site

NEAR = 0.3  # powers come in halves: a cause fits when its power is this near to the one measured


def spec_of(optimizer: torch.optim.Optimizer) -> OptimizerSpec | None:
    """Return the row of the scale table that an optimizer belongs to, or None.

    Args:
        optimizer: Any optimizer.
    """
    if isinstance(optimizer, PlannedOptimizer):
        return optimizer.spec
    name = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}.get(type(optimizer).__name__)
    return OptimizerSpec(name) if name else None


def is_readout(site: Site, geometry: Geometry) -> bool:
    """Return whether an operator reads a parameter as a readout: it contracts all axes that grow.

    Args:
        site: Where the parameter is read.
        geometry: The parameter.
    """
    tied = any(use.module == site.module for use in geometry.readout_uses)
    return geometry.role == "output" or (tied and not site.operator.startswith("embedding"))


def cause(
    row: Coordinate,
    measured: Mapping[str, float],
    plan: Plan,
    spec: OptimizerSpec | None,
    head_dims: tuple[int, ...],
) -> str:
    """Return the likely cause of a quantity that scales with width.

    Args:
        row: The quantity.
        measured: Powers of width measured at its place: ``input`` and ``weight`` before the first step, and
            the quantity itself.
        plan: Plan of the widest copy.
        spec: Row of the optimizer.
        head_dims: Size of one head at each width, where the place is attention and tells it; else ().
    """
    site, power = row.site, row.slope.power
    if plan.parameterization == "standard":
        return (
            "standard parameterization: PyTorch's initialization and one learning rate at all widths; "
            "parameterization='mup' is made for this"
        )
    if site.operator in SCORES:
        return _of_scores(head_dims)
    if not site.parameter:
        return "what the layers above add up to; look at the first of them that fails"
    if site.parameter not in plan:
        return "the parameters that it is computed from move too much or too little"
    geometry = plan[site.parameter].geometry
    if row.quantity == "activation":
        found = list(_of_activation(site, geometry, measured))
    else:
        found = list(_of_update(site, geometry, power, plan, spec))
    much = "large" if power > 0 else "small"
    return "; or ".join(found) or f"its learning rate or multiplier is too {much} by that power of width"


def _of_scores(head_dims: tuple[int, ...]) -> str:
    if len(set(head_dims)) > 1:
        return (
            f"head_dim grows ({head_dims[0]} to {head_dims[-1]}) while the attention scale stays "
            "1/sqrt(head_dim): scale the scores by 1/head_dim (Yang et al., arXiv 2203.03466), or widen by heads"
        )
    return "queries and keys grow, or learn too fast, by that power of width"


def _of_activation(site: Site, geometry: Geometry, measured: Mapping[str, float]) -> Iterator[str]:
    power, given, drawn = (measured.get(k, 0.0) for k in ("activation", "input", "weight"))
    if is_readout(site, geometry) and geometry.role != "output":
        yield "a tied embedding is the readout here and lacks its multiplier 1/m"
        return
    if abs(given) > NEAR and abs(given - power) < NEAR:
        yield (
            f"what the operator is given scales like width^{given:+.2f} already: look for a normalization to "
            "unit length, or a multiplication by a power of the width, before it"
        )
        return
    grows_in = any(geometry.infinite[i] for i in geometry.fan_in_axes)
    right = (-1.0 if geometry.role == "output" else -0.5) if grows_in else 0.0
    if abs(drawn - right) > NEAR / 2:
        yield f"initialization: its entries scale like width^{drawn:+.2f} instead of width^{right:+.2f}"


def _of_update(
    site: Site, geometry: Geometry, power: float, plan: Plan, spec: OptimizerSpec | None
) -> Iterator[str]:
    if spec is None:
        return
    grows_in = any(geometry.infinite[i] for i in geometry.fan_in_axes)
    grows_out = any(geometry.infinite[i] for i in geometry.fan_out_axes)
    p_in, p_out = powers(geometry, spec, plan.parameterization)["lr"]
    planned = p_in * grows_in + p_out * grows_out
    swapped = p_in * grows_out + p_out * grows_in
    if is_readout(site, geometry) and geometry.role != "output" and power > 0:
        yield "a tied embedding is the readout here and lacks its multiplier 1/m"
    if planned and abs(-planned - power) < NEAR:
        yield f"its learning rate lacks the width factor width^{planned:+g} of {spec.name}"
    if swapped != planned and abs(swapped - planned - power) < NEAR:
        yield "the learning rate takes fan_in for fan_out"
    if spec.name in ("kfac", "foof", "shampoo") and power < 0:
        yield "its damping is too large for the wider layers (absolute instead of relative damping does this)"
