"""The result of a sweep: where the optimum is at every width, as records, text, page and picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupass._runs.tabular import Tabular
from mupass._study.page import Page, Table, drawing, logarithmic, new_figure, note, section, write
from mupass._study.slopes import student
from mupass._study.trials import Optimum, Trial, mean, vertex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 1.0  # octaves beyond which a page says in red that an optimum moves


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
        return [optima(self).html(), losses(self).html()]

    def __str__(self) -> str:
        """Return the report as text."""
        return text(self)

    def _page(self) -> Page:
        """Return what a page of several studies shows of this one."""
        return page(self)

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.png`` or ``.svg`` for the curves
                (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.
        """
        return write(path, lambda: str(self), self._page, lambda: figure(self))


def _open_end(sweep: Sweep, optimum: Optimum) -> str:
    values = list(sweep.curve(optimum.width, optimum.name))
    if math.isinf(optimum.loss):
        return f"NOT BRACKETED: every run diverged at width {optimum.width}; try a smaller {optimum.name}"
    side = "below" if optimum.best == values[0] else "above"
    return (
        f"NOT BRACKETED: at width {optimum.width} the lowest loss is at the end of the grid, "
        f"{optimum.name} = {optimum.best:.3g}; extend it {side}"
    )


def text(sweep: Sweep) -> str:
    """Return the verdict, the optima and the table of losses.

    Args:
        sweep: The sweep.
    """
    facts = [f"{k}: {v}" for k, v in facts_of(sweep).items()]
    return "\n".join([sweep.verdict(), "", *facts, "", optima(sweep).text(), "", losses(sweep).text()])


def page(sweep: Sweep) -> Page:
    """Return what is shown.

    Args:
        sweep: The sweep.
    """
    mark = "doubt" if sweep.open_ends() else "bad" if moved(sweep) else "good"
    return Page("Sweep", mark, sweep.verdict(), facts_of(sweep), sections(sweep))


def sections(sweep: Sweep) -> list[str]:
    """Return the parts of a page.

    Args:
        sweep: The sweep.
    """
    return [
        section("Loss against hyperparameters", drawing(lambda: figure(sweep))),
        section("Optimum by width", optima(sweep).html(), note(_how(sweep))),
        section(
            "All losses", losses(sweep).html(), note("Geometric mean over seeds; * lowest of its width.")
        ),
    ]


def moved(sweep: Sweep) -> bool:
    """Return whether an optimum moves by more than an octave, and its intervals do not meet.

    Args:
        sweep: The sweep.
    """
    for name in sweep.names:
        first, last = (sweep.optimum(w, name) for w in (sweep.widths[0], sweep.widths[-1]))
        if abs(sweep.moves(name)) > WIDE and (first.high < last.low or last.high < first.low):
            return True
    return False


def optima(sweep: Sweep) -> Table:
    """Return the best value of every hyperparameter at every width.

    Args:
        sweep: The sweep.
    """
    heads = ["hyperparameter", "width", "best", "interval", "tried", "loss", "bracketed"]
    found = [sweep.optimum(width, name) for name in sweep.names for width in sweep.widths]
    rows = [
        [o.name, str(o.width), f"{o.value:.4g}", f"{o.low:.3g} to {o.high:.3g}", f"{o.best:.4g}",
         show(o.loss), "yes" if o.bracketed else "NO"]
        for o in found
    ]  # fmt: skip
    return Table(heads, rows, ["" if o.bracketed else "doubt" for o in found])


def losses(sweep: Sweep) -> Table:
    """Return the mean loss of every point, one column for each width.

    Args:
        sweep: The sweep.
    """
    tables = {w: {p: mean(v) for p, v in sweep.losses(w).items()} for w in sweep.widths}
    points = sorted({p for table in tables.values() for p in table})
    lowest = {w: min(table.values()) for w, table in tables.items()}
    rows = []
    for point in points:
        cells = []
        for width, table in tables.items():
            value = table.get(point)
            star = "*" if value == lowest[width] and value < math.inf else " "
            cells.append("-" if value is None else show(value) + star)
        rows.append([*(f"{value:.4g}" for _, value in point), *cells])
    heads = [*sweep.names, *(f"width {w}" for w in sweep.widths)]
    return Table(heads, rows, [""] * len(rows), numbers=0)


def figure(sweep: Sweep) -> Figure:
    """Draw loss against every hyperparameter, one line for each width, the optima as stars.

    Args:
        sweep: The sweep.
    """
    names = [n for n in sweep.names if len(sweep.curve(sweep.widths[0], n)) > 1] or list(sweep.names)
    drawn, axes = new_figure(len(names))
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    for axis, name in zip(axes, names, strict=True):
        for i, width in enumerate(sweep.widths):
            color = shades(0.12 + 0.88 * i / max(len(sweep.widths) - 1, 1))
            curve = {v: mean(row) for v, row in sweep.curve(width, name).items()}
            kept = {v: y for v, y in curve.items() if math.isfinite(y)}
            style = "-" if sweep.driver == "grid" else ""
            axis.plot(list(kept), list(kept.values()), style, marker=".", color=color, label=f"width {width}")
            if kept:
                best = sweep.optimum(width, name)
                axis.plot(
                    best.value, best.loss, marker="*", ms=13, color=color, mec="white", ls="none", zorder=3
                )
                axis.hlines(best.loss, best.low, best.high, color=color, alpha=0.5, lw=3)
        axis.set_xscale("log")
        tried = sorted({value for width in sweep.widths for value in sweep.curve(width, name)})
        marked = (
            tried[:: max(1, math.ceil(len(tried) / 6))] if sweep.driver == "grid" else [tried[0], tried[-1]]
        )
        axis.set_xticks(marked, [f"{value:.3g}" for value in marked])
        if all(t.loss > 0 for t in sweep.trials):
            logarithmic(axis)
        axis.minorticks_off()
        axis.set_xlabel(f"{name} at the base width {sweep.widths[0]}")
        axis.set_ylabel(sweep.score)
        axis.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            title="star: optimum; bar: interval",
            title_fontsize=7,
        )
    return drawn


def facts_of(sweep: Sweep) -> dict[str, str]:
    """Return what was done.

    Args:
        sweep: The sweep.
    """
    diverged = sum(math.isinf(t.loss) for t in sweep.trials)
    return {
        "trained": f"{sweep.optimizer}, {sweep.parameterization}, {sweep.steps} steps, {sweep.seeds} seeds",
        "widths": ", ".join(map(str, sweep.widths)) + "; hyperparameters are those of the first",
        "runs": f"{len(sweep.trials)} ({sweep.driver}), {diverged} diverged",
        "score": sweep.score,
        **{f"note {i}" if i else "note": text for i, text in enumerate(sweep.notes)},
    }


def show(loss: float) -> str:
    """Return a loss for the reader.

    Args:
        loss: The loss.
    """
    return "diverged" if math.isinf(loss) else f"{loss:.4g}"


def _how(sweep: Sweep) -> str:
    if sweep.driver != "grid":
        return "Best: the best that was tried; interval: the next values that were tried."
    seeds = "t interval (95 %) over the seeds" if sweep.seeds > 1 else "the neighbors in the grid"
    return (
        "Best: vertex of a parabola through the lowest loss and its neighbors, in logarithms. "
        f"Interval: {seeds}."
    )
