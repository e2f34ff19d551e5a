"""The parameterizations: how the readout starts, and whether anything is scaled at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mupass._errors import PlanError, check_choice


@dataclass(frozen=True)
class Parameterization:
    """One family of rows.

    Attributes:
        name: Key of the table.
        readout_power: ``beta``: the readout starts at ``1/fan_in**beta``. None: nothing is scaled.
        source: Where the row is from, and in which gauge.
    """

    name: str
    readout_power: float | None
    source: str


PARAMETERIZATIONS: Mapping[str, Parameterization] = MappingProxyType(
    {
        row.name: row
        for row in (
            Parameterization(
                "mup",
                1.0,
                "maximal update: Ishikawa & Karakida, arXiv 2312.12226, conditions 11-13; SGD and Adam "
                "as Yang et al., arXiv 2203.03466, table 3; no forward multipliers",
            ),
            Parameterization(
                "standard",
                None,
                "PyTorch as it is: the user's initialization and one learning rate for all",
            ),
            Parameterization(
                "ntk",
                0.5,
                "lazy limit: every layer moves the output, none moves the features; readout at "
                "1/sqrt(fan_in); no forward multipliers",
            ),
            # Mean field is written with multipliers a = (0, 1/2, 1) and unit init b = 0 (Everett et al.,
            # arXiv 2407.05872, table 1). The shift (a, b) -> (a - k, b + k) leaves the function alone,
            # and the learning rate by n^(2k) for SGD, n^k for Adam. Taken to a = 0 it has
            # b = (0, 1/2, 1): readout_power 1, hence the numbers of the mup row, epsilon and damping
            # included, because those follow the size of the gradient in this gauge. In its own gauge
            # gradients are m^a times smaller, and a constant epsilon would act differently there.
            Parameterization(
                "mean_field",
                1.0,
                "mean field: Everett et al., arXiv 2407.05872, moved to the gauge without multipliers, "
                "where it has the numbers of mup; only a constant Adam epsilon, kept in its own gauge, "
                "would tell them apart",
            ),
        )
    }
)


def row(parameterization: str) -> Parameterization:
    """The row of that name.

    Args:
        parameterization: Key of `PARAMETERIZATIONS`.

    Returns:
        The row.

    Raises:
        PlanError: Unknown name.
    """
    check_choice(PlanError, "parameterization", parameterization, PARAMETERIZATIONS)
    return PARAMETERIZATIONS[parameterization]
