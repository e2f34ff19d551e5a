"""The result of a sweep: where the optimum is at every width, as records, text, page and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mupass._page import Table, note, section
from mupass._runs.tabular import Tabular
from mupass._study.page import Page, drawing, logarithmic, new_figure, write
from mupass._study.slopes import student
from mupass._study.trials import Optimum, Point, Trial, mean, vertex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 1.0  # octaves beyond which a page says in red that an optimum moves
TICKS = 6  # of a grid, at most


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

    def losses(self, width: int) -> dict[Point, list[float]]:
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
            # Of several points with one value the best counts: the others are at their optimum.
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
        # An optimum at the end of the grid may lie beyond it.
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
        narrow, wide = self._ends(name)
        return math.log2(wide.value / narrow.value)

    def _ends(self, name: str) -> tuple[Optimum, Optimum]:
        """Return the optimum of the narrowest model and that of the widest."""
        return self.optimum(self.widths[0], name), self.optimum(self.widths[-1], name)

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
            narrow, wide = self._ends(name)
            if len(self.widths) > 1:
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
        return [optima(self).html(), losses(self).html()]

    def __str__(self) -> str:
        """Return the verdict, the optima and the table of losses."""
        facts = [f"{name}: {value}" for name, value in facts_of(self).items()]
        return "\n".join([self.verdict(), "", *facts, "", optima(self).text(), "", losses(self).text()])

    def _page(self) -> Page:
        """Return what a page of several studies shows of this one."""
        mark = "good"
        if self.open_ends():
            # What is not bracketed is in doubt, however far it moves.
            mark = "doubt"
        elif moved(self):
            mark = "bad"
        return Page(f"Sweep: {case(self)}", mark, self.verdict(), facts_of(self), sections(self))

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.png`` or ``.svg`` for the curves
                (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.
        """
        return write(path, lambda: str(self), self._page, lambda: figure(self))


def searched(sweep: Sweep) -> list[str]:
    """Return the hyperparameters of which more than one value was tried.

    Args:
        sweep: The sweep.
    """
    return [name for name in sweep.names if len(sweep.curve(sweep.widths[0], name)) > 1]


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
        # The minimum of this seed lies at an end, and has no vertex.
        if not 0 < lowest < len(values) - 1:
            return None
        logs.append(math.log(vertex(values, losses, lowest)))
    count = len(logs)
    if count < 2:
        return None
    center = fmean(logs)
    # The spread of the vertices over seeds, of whose mean there is a t interval.
    half_width = student(count - 1, 0.95) * stdev(logs) / math.sqrt(count)
    half_width = min(half_width, math.log(values[-1] / values[0]))  # two seeds can tell next to nothing
    low = max(values[0], min(value, math.exp(center - half_width)))
    high = min(values[-1], max(value, math.exp(center + half_width)))
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


def case(sweep: Sweep) -> str:
    """Return what was swept, in two words.

    Args:
        sweep: The sweep.
    """
    return f"{sweep.optimizer}, {sweep.parameterization}"


def sections(sweep: Sweep) -> list[str]:
    """Return the parts of a page.

    Args:
        sweep: The sweep.
    """
    how = note(_how(sweep))
    legend = note("Geometric mean over seeds; * lowest of its width.")
    return [
        section("Loss against hyperparameters", drawing(lambda: figure(sweep))),
        section("Optimum by width", optima(sweep).html(), how),
        section("All losses", losses(sweep).html(), legend),
    ]


def moved(sweep: Sweep) -> bool:
    """Return whether an optimum moves by more than an octave, and its intervals do not meet.

    Args:
        sweep: The sweep.
    """
    for name in sweep.names:
        at_narrow, at_wide = sweep._ends(name)
        # Intervals that overlap may hold one optimum.
        apart = at_narrow.high < at_wide.low or at_wide.high < at_narrow.low
        if apart and abs(sweep.moves(name)) > WIDE:
            return True
    return False


def optima(sweep: Sweep) -> Table:
    """Return the best value of every hyperparameter at every width.

    Args:
        sweep: The sweep.
    """
    rows, marks = [], []
    for name in sweep.names:
        for width in sweep.widths:
            optimum = sweep.optimum(width, name)
            interval = f"{optimum.low:.3g} to {optimum.high:.3g}"
            # What no tried value brackets is no optimum yet: the reader must see that first.
            bracketed, mark = ("yes", "") if optimum.bracketed else ("NO", "doubt")
            tried, loss = f"{optimum.best:.4g}", show(optimum.loss)
            rows.append([name, str(width), f"{optimum.value:.4g}", interval, tried, loss, bracketed])
            marks.append(mark)
    headings = ["hyperparameter", "width", "best", "interval", "tried", "loss", "bracketed"]
    return Table(headings, rows, marks)


def losses(sweep: Sweep) -> Table:
    """Return the mean loss of every point, one column for each width.

    Args:
        sweep: The sweep.
    """
    tables = []
    points: set[Point] = set()
    # Widths may have tried different points: every point gets a row.
    for width in sweep.widths:
        table = {point: mean(seeds) for point, seeds in sweep.losses(width).items()}
        tables.append(table)
        points.update(table)
    rows = []
    for point in sorted(points):
        row = [f"{value:.4g}" for _, value in point]
        row += [_loss_cell(table.get(point), min(table.values())) for table in tables]
        rows.append(row)
    headings = [*sweep.names, *(f"width {width}" for width in sweep.widths)]
    return Table(headings, rows, [""] * len(rows), numbers=0)


def _loss_cell(loss: float | None, lowest: float) -> str:
    """Return a loss with a star if it is the lowest of its width; a blank keeps the column aligned."""
    if loss is None:
        return "-"
    star = "*" if loss == lowest and loss < math.inf else " "
    return show(loss) + star


def figure(sweep: Sweep) -> Figure:
    """Draw loss against every hyperparameter, one line for each width, the optima as stars.

    Args:
        sweep: The sweep.
    """
    names = searched(sweep) or sweep.names
    drawn, axes = new_figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        _draw_curves(axis, sweep, name)
        axis.set_xscale("log")
        ticks = _ticks(sweep, name)
        axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
        if _is_positive(sweep):
            logarithmic(axis)
        axis.set_ylabel(sweep.score)
        _explain(axis, sweep, name)
    return drawn


def overlaid(sweeps: Sequence[Sweep]) -> Figure:
    """Draw several sweeps of one hyperparameter side by side, on the same axes of loss and of values.

    Args:
        sweeps: The sweeps.
    """
    drawn, axes = new_figure(len(sweeps))
    name = sweeps[0].names[0]
    for axis, sweep in zip(axes, sweeps, strict=True):
        axis.sharex(axes[0])
        axis.sharey(axes[0])
        _draw_curves(axis, sweep, name)
        axis.set_title(case(sweep), fontsize=10)
    axes[0].set_xscale("log")
    axes[0].set_ylabel(sweeps[0].score)
    if all(map(_is_positive, sweeps)):
        logarithmic(axes[0])
    for axis, sweep in zip(axes, sweeps, strict=True):
        _explain(axis, sweep, name)
    return drawn


def _is_positive(sweep: Sweep) -> bool:
    """Whether all losses are above zero, so that a logarithmic axis shows them."""
    return all(trial.loss > 0 for trial in sweep.trials)


def _explain(axis: Any, sweep: Sweep, name: str) -> None:
    """Say what an axis, its curves and their marks are."""
    axis.minorticks_off()
    axis.set_xlabel(f"{name} at the base width {sweep.widths[0]}")
    axis.legend(
        frameon=False, fontsize=8, loc="upper center", title="star: optimum; bar: interval",
        title_fontsize=7,
    )  # fmt: skip


def comparable(studies: Sequence[Any]) -> list[list[Sweep]]:
    """Return the sweeps among studies that can be drawn on the same axes, in sets of several.

    They are over one and the same hyperparameter, and have the same score.

    Args:
        studies: Studies of any kind.
    """
    alike: dict[tuple[str, str], list[Sweep]] = {}
    for study in studies:
        if isinstance(study, Sweep) and len(study.names) == 1:
            alike.setdefault((study.names[0], study.score), []).append(study)
    return [sweeps for sweeps in alike.values() if len(sweeps) > 1]


def _draw_curves(axis: Any, sweep: Sweep, name: str) -> None:
    """Draw the curve of every width, with its optimum and the interval of that."""
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    # Points of a search do not lie on one curve, so only a grid is joined by lines.
    style = "-" if sweep.driver == "grid" else ""
    for number, width in enumerate(sweep.widths):
        color = shades(0.12 + 0.88 * number / max(len(sweep.widths) - 1, 1))
        means = {value: mean(seeds) for value, seeds in sweep.curve(width, name).items()}
        # Points that diverged have no place on the axes.
        curve = {value: loss for value, loss in means.items() if math.isfinite(loss)}
        axis.plot(list(curve), list(curve.values()), style, marker=".", color=color, label=f"width {width}")
        if curve:
            best = sweep.optimum(width, name)
            axis.plot(best.value, best.loss, marker="*", ms=13, color=color, mec="white", ls="none", zorder=3)
            axis.hlines(best.loss, best.low, best.high, color=color, alpha=0.5, lw=3)


def _ticks(sweep: Sweep, name: str) -> list[float]:
    """Return the values that are marked: some of a grid, the ends of a search."""
    values: set[float] = set()
    for width in sweep.widths:
        values.update(sweep.curve(width, name))
    tried = sorted(values)
    if sweep.driver == "grid":
        return tried[:: math.ceil(len(tried) / TICKS)]
    return [tried[0], tried[-1]]


def facts_of(sweep: Sweep) -> dict[str, str]:
    """Return what was done.

    Args:
        sweep: The sweep.
    """
    diverged = sum(math.isinf(trial.loss) for trial in sweep.trials)
    facts = {
        "trained": f"{sweep.optimizer}, {sweep.parameterization}, {sweep.steps} steps, {sweep.seeds} seeds",
        "widths": ", ".join(map(str, sweep.widths)) + "; hyperparameters are those of the first",
        "runs": f"{len(sweep.trials)} ({sweep.driver}), {diverged} diverged",
        "score": sweep.score,
    }
    for number, remark in enumerate(sweep.notes):
        facts[f"note {number}" if number else "note"] = remark
    return facts


def show(loss: float) -> str:
    """Return a loss for the reader.

    Args:
        loss: The loss.
    """
    return "diverged" if math.isinf(loss) else f"{loss:.4g}"


def _how(sweep: Sweep) -> str:
    """Say what an optimum and its interval are."""
    if sweep.driver != "grid":
        return "Best: the best that was tried; interval: the next values that were tried."
    interval = "t interval (95 %) over the seeds" if sweep.seeds > 1 else "the neighbors in the grid"
    return (
        "Best: vertex of a parabola through the lowest loss and its neighbors, in logarithms. "
        f"Interval: {interval}."
    )
