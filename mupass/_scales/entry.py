"""One entry of a plan: a parameter with its geometry, its initialization and its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mupass._records import Geometry
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.scales import Scales, scales


@dataclass(frozen=True)
class Entry:
    """All that is planned for one parameter.

    Attributes:
        geometry: Fans, role and evidence.
        init_law: What the user's initialization was taken to be, and how that was decided.
        init_std: Standard deviation after the transform; None for zeros and constants.
        init_factor: What the transform multiplies the tensor by.
        scales: Width factors.
    """

    geometry: Geometry
    init_law: str
    init_std: float | None
    init_factor: float
    scales: Scales


def entry_scales(
    geometry: Geometry, optimizer: OptimizerSpec, parameterization: str, trained: bool
) -> Scales:
    """Width factors of one parameter of a plan.

    Args:
        geometry: Its fans.
        optimizer: Family and powers.
        parameterization: ``mup``, ``standard``, ``ntk`` or ``mean_field``.
        trained: Whether the outputs of a trained model must stay: a tied readout then has no multiplier, and
            follows the row of a readout.
    """
    # A trained tied table has values for both of its uses: a multiplier on one of them would change outputs.
    if trained and geometry.readout_uses:
        readout_fan_in, readout_fan_out = geometry.fan_out_axes, geometry.fan_in_axes
        geometry = replace(
            geometry, role="output", fan_in_axes=readout_fan_in, fan_out_axes=readout_fan_out, readout_uses=()
        )
    return scales(geometry, optimizer, parameterization)
