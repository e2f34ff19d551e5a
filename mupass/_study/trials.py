"""Records of a sweep: what was tried, and where the optimum is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupass._study.slopes import student
from mupass._study.tabular import Tabular


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        width: Width of the model.
        point: Hyperparameters by name.
        seed: Number of the initialization.
        loss: Its score; infinite when it diverged.
    """

    width: int
    point: tuple[tuple[str, float], ...]
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
        return tuple(sorted({t.width for t in self.trials}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        return tuple(name for name, _ in self.trials[0].point)

    @property
    def seeds(self) -> int:
        """Number of initializations."""
        return len({t.seed for t in self.trials})

    def losses(self, width: int) -> dict[tuple[tuple[str, float], ...], list[float]]:
        """Return the losses of all seeds, by hyperparameters.

        Args:
            width: One of the widths.
        """
        table: dict[tuple[tuple[str, float], ...], list[float]] = {}
        for trial in sorted(self.trials, key=lambda t: (t.point, t.seed)):
            if trial.width == width:
                table.setdefault(trial.point, []).append(trial.loss)
        return table

    def best(self, width: int | None = None) -> dict[str, float]:
        """Return the tried hyperparameters of the lowest mean loss.

        Args:
            width: One of the widths; the narrowest if left out.
        """
        table = self.losses(self.widths[0] if width is None else width)
        return dict(min(table.items(), key=lambda item: mean(item[1]))[0])

    def curve(self, width: int, name: str) -> dict[float, list[float]]:
        """Return the losses of all seeds by one hyperparameter, the others at their best for its value.

        Args:
            width: One of the widths.
            name: The hyperparameter.
        """
        found: dict[float, list[float]] = {}
        for point, losses in self.losses(width).items():
            value = dict(point)[name]
            if value not in found or mean(losses) < mean(found[value]):
                found[value] = losses
        return dict(sorted(found.items()))

    def optimum(self, width: int, name: str = "lr") -> Optimum:
        """Return where the loss is lowest.

        Args:
            width: One of the widths.
            name: The hyperparameter.
        """
        curve = self.curve(width, name)
        values, means = list(curve), [mean(losses) for losses in curve.values()]
        at = min(range(len(values)), key=means.__getitem__)
        inside = 0 < at < len(values) - 1 and math.isfinite(means[at])
        best, low, high = values[at], values[max(at - 1, 0)], values[min(at + 1, len(values) - 1)]
        value = best
        if inside and self.driver == "grid":
            value = vertex(values, means, at)
            seeds = [[losses[s] for losses in curve.values()] for s in range(len(curve[best]))]
            spots = [min(range(len(values)), key=row.__getitem__) for row in seeds]
            if len(seeds) > 1 and all(0 < s < len(values) - 1 for s in spots):
                logs = [math.log(vertex(values, row, s)) for row, s in zip(seeds, spots, strict=True)]
                center = math.fsum(logs) / len(logs)
                spread = math.sqrt(math.fsum((x - center) ** 2 for x in logs) / (len(logs) - 1))
                half = student(len(logs) - 1, 0.95) * spread / math.sqrt(len(logs))
                half = min(half, math.log(values[-1] / values[0]))  # two seeds can tell next to nothing
                low = max(values[0], min(value, math.exp(center - half)))
                high = min(values[-1], max(value, math.exp(center + half)))
        return Optimum(width, name, value, low, high, best, means[at], inside)

    def moves(self, name: str = "lr") -> float:
        """Return by how many octaves the optimum moves from the narrowest to the widest model.

        Args:
            name: The hyperparameter.
        """
        first, last = (self.optimum(w, name).value for w in (self.widths[0], self.widths[-1]))
        return math.log2(last / first)

    def open_ends(self) -> tuple[Optimum, ...]:
        """Return the optima that the tried values do not bracket."""
        several = [n for n in self.names if len(self.curve(self.widths[0], n)) > 1]
        found = [self.optimum(width, name) for name in several for width in self.widths]
        return tuple(o for o in found if not o.bracketed)

    def verdict(self) -> str:
        """Return where the optima are and how far they move; first of all what is not bracketed."""
        parts = [_open_end(self, optimum) for optimum in self.open_ends()]
        for name in self.names:
            if len(self.widths) > 1:
                first, last = self.optimum(self.widths[0], name), self.optimum(self.widths[-1], name)
                parts.append(f"best {name} {first}, {last}: it moves by {self.moves(name):+.2f} octaves")
            else:
                parts.append(f"best {name} {self.optimum(self.widths[0], name)}")
        return "; ".join(parts)

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each run."""
        return [{"width": t.width, **dict(t.point), "seed": t.seed, "loss": t.loss} for t in self.trials]

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


def mean(losses: Sequence[float]) -> float:
    """Geometric mean of positive losses, arithmetic mean of others; infinite when one is.

    Args:
        losses: Of all seeds.
    """
    if not all(map(math.isfinite, losses)):
        return math.inf
    if all(x > 0 for x in losses):
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
    x = [math.log(v) for v in values[at - 1 : at + 2]]
    y = list(losses[at - 1 : at + 2])
    if not all(map(math.isfinite, y)):
        return values[at]
    if min(y) > 0:
        y = [math.log(v) for v in y]
    left, right = (y[0] - y[1]) / (x[0] - x[1]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend <= 0:  # three equal losses
        return values[at]
    # The slope at the middle of the first interval is `left`; it is zero at the vertex.
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend))


def _open_end(sweep: Sweep, optimum: Optimum) -> str:
    values = list(sweep.curve(optimum.width, optimum.name))
    if math.isinf(optimum.loss):
        return f"NOT BRACKETED: every run diverged at width {optimum.width}; try a smaller {optimum.name}"
    side = "below" if optimum.best == values[0] else "above"
    return (
        f"NOT BRACKETED: at width {optimum.width} the lowest loss is at the end of the grid, "
        f"{optimum.name} = {optimum.best:.3g}; extend it {side}"
    )
