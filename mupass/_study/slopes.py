"""Slopes: a power of width with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, geometric_mean, linear_regression, pvariance


@dataclass(frozen=True)
class Slope:
    """Least-squares slope in logarithms.

    Attributes:
        power: The estimate.
        error: Half width of its confidence interval.
        values: Geometric mean over seeds, one for each width.
    """

    power: float
    error: float
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.power - self.error

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.power + self.error


def fit(widths: Sequence[float], values: Sequence[Sequence[float]], confidence: float = 0.95) -> Slope:
    """Fit ``log value = constant + power * log width``.

    Args:
        widths: At least two different ones.
        values: For each width the positive values of all seeds.
        confidence: Coverage of the interval, by Student's t. A bend (a power law that does not hold) counts
            as scatter, so it widens the interval.

    Returns:
        The slope. The interval is infinite with fewer than three points.
    """
    # In logarithms a power law is a straight line.
    xs: list[float] = []
    ys: list[float] = []
    for width, seeds in zip(widths, values, strict=True):
        xs += [math.log(width)] * len(seeds)
        ys += map(math.log, seeds)
    power, height = linear_regression(xs, ys)
    # Two numbers are fitted: the slope and the height of the line.
    freedom = len(xs) - 2
    error = math.inf
    if freedom > 0:
        # The variance of a least-squares slope is residual / freedom / sum((x - mean x)^2).
        residual = math.fsum((y - height - power * x) ** 2 for x, y in zip(xs, ys, strict=True))
        spread = pvariance(xs) * len(xs)
        error = student(freedom, confidence) * math.sqrt(residual / freedom / spread)
    return Slope(power, error, tuple(map(geometric_mean, values)))


def student(freedom: int, confidence: float) -> float:
    """Two-sided quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom, else the expansion in powers of ``1/freedom`` (Abramowitz & Stegun,
    26.7.5), which is good to 1 % at 95 % confidence.

    Args:
        freedom: Degrees of freedom, at least 1.
        confidence: Probability of the interval.
    """
    quantile = (1 + confidence) / 2  # both tails count
    if freedom == 1:
        return math.tan(math.pi * (quantile - 0.5))
    if freedom == 2:
        return (2 * quantile - 1) * math.sqrt(2 / (4 * quantile * (1 - quantile)))
    z = NormalDist().inv_cdf(quantile)
    # Coefficients of 1/freedom, 1/freedom^2 and so on.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))
