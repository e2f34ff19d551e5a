"""Records of single runs and of an optimum among them, and how losses are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

# Hyperparameters by name, in one order.
Point = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        width: Width of the model.
        point: Hyperparameters by name.
        seed: Number of the initialization.
        loss: Its score; infinite when it diverged.
    """

    width: int
    point: Point
    seed: int
    loss: float


@dataclass(frozen=True)
class Optimum:
    """Best value of one hyperparameter at one width.

    Attributes:
        width: Width of the model.
        name: The hyperparameter.
        value: Vertex of the parabola through the lowest mean log loss and its neighbors, over the log of the
            hyperparameter; the tried value itself where a neighbor diverged or is missing.
        low: Lower end of its interval: Student's t, 95 %, over the vertices of the single seeds; with one
            seed the next lower value that was tried.
        high: Upper end.
        best: Tried value of the lowest mean loss, the others at their best.
        loss: That loss (geometric mean over seeds).
        bracketed: Whether values on both sides were tried and are worse.
    """

    width: int
    name: str
    value: float
    low: float
    high: float
    best: float
    loss: float
    bracketed: bool

    def __str__(self) -> str:
        """Return the value with its interval and the width."""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] at width {self.width}"


def mean(losses: Sequence[float]) -> float:
    """Geometric mean of positive losses, arithmetic mean of others; infinite when one is.

    Args:
        losses: Of all seeds.
    """
    if not all(map(math.isfinite, losses)):
        return math.inf
    # Losses differ by factors, so that their logarithms are averaged.
    if all(loss > 0 for loss in losses):
        return geometric_mean(losses)
    return fmean(losses)


def vertex(values: Sequence[float], losses: Sequence[float], at: int) -> float:
    """Vertex of the parabola through a minimum and its two neighbors.

    Args:
        values: Positive values in order; the parabola is over their logarithm.
        losses: Of each value; their logarithm is taken where the three are positive.
        at: Index of the minimum, an inner one.

    Returns:
        The vertex, between the neighbors; the value at the minimum where a neighbor is infinite.
    """
    x = [math.log(value) for value in values[at - 1 : at + 2]]
    y = list(losses[at - 1 : at + 2])
    if not all(map(math.isfinite, y)):
        return values[at]
    # Near a minimum the logarithm of a loss is closer to a parabola.
    if min(y) > 0:
        y = list(map(math.log, y))
    # Slopes of the two chords: their difference is the bend.
    left_slope = (y[0] - y[1]) / (x[0] - x[1])
    right_slope = (y[2] - y[1]) / (x[2] - x[1])
    # Second divided difference: half of the second derivative.
    bend = (right_slope - left_slope) / (x[2] - x[0])
    if bend <= 0:  # three equal losses
        return values[at]
    # The slope at the middle of the first interval is `left_slope`; it is zero at the vertex.
    return math.exp((x[0] + x[1]) / 2 - left_slope / (2 * bend))
