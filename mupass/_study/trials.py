"""Records of a sweep: what was tried, and where the optimum is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupass._study.slopes import student
from mupass._study.tabular import Tabular

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


@dataclass(frozen=True)
class Sweep(Tabular):
    """Result of a sweep; prints as a report.

    Attributes:
        trials: All runs, by width, hyperparameters and seed.
        optimizer: What trained them.
        parameterization: Under which parameterization.
        steps: Number of steps of each run.
        score: What the loss is: ``training loss`` or the name of the function that evaluated.
        driver: ``grid``, ``optuna`` or ``gradient``.
        notes: What was made of the model given.

    Example:
        >>> from mupass import Sweep, Trial
        >>> losses = {0.01: 2.0, 0.1: 1.0, 1.0: 4.0}
        >>> trials = [Trial(64, (("lr", lr),), 0, loss) for lr, loss in losses.items()]
        >>> found = Sweep(tuple(trials), "adam", "mup", steps=100)
        >>> found.best()
        {'lr': 0.1}
        >>> print(found.optimum(64))  # vertex of a parabola, between the values that were tried
        0.0681 [0.01, 1] at width 64
    """

    trials: tuple[Trial, ...]
    optimizer: str
    parameterization: str
    steps: int
    score: str = "training loss"
    driver: str = "grid"
    notes: tuple[str, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths, the narrowest first, which is the base width."""
        return tuple(sorted({trial.width for trial in self.trials}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        return tuple(name for name, _ in self.trials[0].point)

    @property
    def seeds(self) -> int:
        """Number of initializations."""
        return len({trial.seed for trial in self.trials})

    def losses(self, width: int) -> dict[tuple[tuple[str, float], ...], list[float]]:
        """Return the losses of all seeds, by hyperparameters.

        Args:
            width: One of the widths.
        """
        table: dict[Point, list[float]] = {}
        for trial in sorted(self.trials, key=lambda trial: (trial.point, trial.seed)):
            if trial.width == width:
                table.setdefault(trial.point, []).append(trial.loss)
        return table

    def best(self, width: int | None = None) -> dict[str, float]:
        """Return the tried hyperparameters of the lowest mean loss.

        Args:
            width: One of the widths; the narrowest if left out.
        """
        table = self.losses(self.widths[0] if width is None else width)
        point, _ = min(table.items(), key=lambda item: mean(item[1]))
        return dict(point)

    def curve(self, width: int, name: str) -> dict[float, list[float]]:
        """Return the losses of all seeds by one hyperparameter, the others at their best for its value.

        Args:
            width: One of the widths.
            name: The hyperparameter.
        """
        lowest: dict[float, list[float]] = {}
        for point, losses in self.losses(width).items():
            value = dict(point)[name]
            if value not in lowest or mean(losses) < mean(lowest[value]):
                lowest[value] = losses
        return dict(sorted(lowest.items()))

    def optimum(self, width: int, name: str = "lr") -> Optimum:
        """Return where the loss is lowest.

        Args:
            width: One of the widths.
            name: The hyperparameter.
        """
        curve = self.curve(width, name)
        values = list(curve)
        means = [mean(losses) for losses in curve.values()]
        lowest = _index_of_lowest(means)
        last = len(values) - 1
        bracketed = 0 < lowest < last and math.isfinite(means[lowest])
        best, low, high = values[lowest], values[max(lowest - 1, 0)], values[min(lowest + 1, last)]
        value = best
        # Points of a search lie too unevenly for a parabola: there the best tried value stands.
        if bracketed and self.driver == "grid":
            value = vertex(values, means, lowest)
            low, high = _interval(values, list(curve.values()), value) or (low, high)
        return Optimum(width, name, value, low, high, best, means[lowest], bracketed)

    def moves(self, name: str = "lr") -> float:
        """Return by how many octaves the optimum moves from the narrowest to the widest model.

        Args:
            name: The hyperparameter.
        """
        narrow, wide = self.optimum(self.widths[0], name), self.optimum(self.widths[-1], name)
        return math.log2(wide.value / narrow.value)

    def open_ends(self) -> tuple[Optimum, ...]:
        """Return the optima that the tried values do not bracket."""
        optima = []
        for name in searched(self):
            optima += [self.optimum(width, name) for width in self.widths]
        return tuple(optimum for optimum in optima if not optimum.bracketed)

    def verdict(self) -> str:
        """Return where the optima are and how far they move; first of all what is not bracketed."""
        parts = [_open_end(self, optimum) for optimum in self.open_ends()]
        for name in self.names:
            narrow = self.optimum(self.widths[0], name)
            if len(self.widths) > 1:
                wide = self.optimum(self.widths[-1], name)
                parts.append(f"best {name} {narrow}, {wide}: it moves by {self.moves(name):+.2f} octaves")
            else:
                parts.append(f"best {name} {narrow}")
        return "; ".join(parts)

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each run."""
        return [
            {"width": trial.width, **dict(trial.point), "seed": trial.seed, "loss": trial.loss}
            for trial in self.trials
        ]

    def _tables(self) -> list[str]:
        from mupass._study.trials_report import losses, optima

        return [optima(self).html(), losses(self).html()]

    def __str__(self) -> str:
        """Return the report as text."""
        from mupass._study.trials_report import text

        return text(self)

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.png`` or ``.svg`` for the curves
                (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.
        """
        from mupass._study.page import write
        from mupass._study.trials_report import figure, page

        return write(path, lambda: str(self), lambda: page(self), lambda: figure(self))


def searched(sweep: Sweep) -> list[str]:
    """Return the hyperparameters of which more than one value was tried.

    Args:
        sweep: The sweep.
    """
    return [name for name in sweep.names if len(sweep.curve(sweep.widths[0], name)) > 1]


def mean(losses: Sequence[float]) -> float:
    """Geometric mean of positive losses, arithmetic mean of others; infinite when one is.

    Args:
        losses: Of all seeds.
    """
    if not all(map(math.isfinite, losses)):
        return math.inf
    if all(loss > 0 for loss in losses):
        return math.exp(math.fsum(map(math.log, losses)) / len(losses))
    return math.fsum(losses) / len(losses)


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
    if min(y) > 0:
        y = list(map(math.log, y))
    left_slope = (y[0] - y[1]) / (x[0] - x[1])
    right_slope = (y[2] - y[1]) / (x[2] - x[1])
    # Second divided difference: half of the second derivative.
    bend = (right_slope - left_slope) / (x[2] - x[0])
    if bend <= 0:  # three equal losses
        return values[at]
    # The slope at the middle of the first interval is `left_slope`; it is zero at the vertex.
    return math.exp((x[0] + x[1]) / 2 - left_slope / (2 * bend))


def _index_of_lowest(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


def _interval(
    values: Sequence[float], curve: Sequence[Sequence[float]], value: float
) -> tuple[float, float] | None:
    """Return Student's t interval (95 %) of the vertices of single seeds, in logarithms.

    Args:
        values: The values that were tried, in order.
        curve: Of each value the losses of all seeds.
        value: Vertex of the mean losses, which the interval is made to hold.

    Returns:
        Its ends, kept within the tried values; None with one seed, or where the minimum of a seed lies at an
        end of the grid and so has no vertex.
    """
    logs = []
    for losses in zip(*curve, strict=False):
        lowest = _index_of_lowest(losses)
        if not 0 < lowest < len(values) - 1:
            return None
        logs.append(math.log(vertex(values, losses, lowest)))
    count = len(logs)
    if count < 2:
        return None
    center = math.fsum(logs) / count
    spread = math.sqrt(math.fsum((x - center) ** 2 for x in logs) / (count - 1))
    half = student(count - 1, 0.95) * spread / math.sqrt(count)
    half = min(half, math.log(values[-1] / values[0]))  # two seeds can tell next to nothing
    low = max(values[0], min(value, math.exp(center - half)))
    high = min(values[-1], max(value, math.exp(center + half)))
    return low, high


def _open_end(sweep: Sweep, optimum: Optimum) -> str:
    """Say of an optimum that is not bracketed where to look further."""
    if math.isinf(optimum.loss):
        return f"NOT BRACKETED: every run diverged at width {optimum.width}; try a smaller {optimum.name}"
    smallest = min(sweep.curve(optimum.width, optimum.name))
    side = "below" if optimum.best == smallest else "above"
    return (
        f"NOT BRACKETED: at width {optimum.width} the lowest loss is at the end of the grid, "
        f"{optimum.name} = {optimum.best:.3g}; extend it {side}"
    )
