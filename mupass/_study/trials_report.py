"""How a sweep is shown: as text, as a page and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mupass._page import Table, note, section
from mupass._study.page import Page, drawing, logarithmic, new_figure
from mupass._study.trials import Point, Sweep, mean, searched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 1.0  # octaves beyond which a page says in red that an optimum moves
TICKS = 6  # of a grid, at most


def text(sweep: Sweep) -> str:
    """Return the verdict, the optima and the table of losses.

    Args:
        sweep: The sweep.
    """
    facts = [f"{name}: {value}" for name, value in facts_of(sweep).items()]
    return "\n".join([sweep.verdict(), "", *facts, "", optima(sweep).text(), "", losses(sweep).text()])


def page(sweep: Sweep) -> Page:
    """Return what is shown on a page.

    Args:
        sweep: The sweep.
    """
    mark = "good"
    if sweep.open_ends():
        mark = "doubt"
    elif moved(sweep):
        mark = "bad"
    return Page("Sweep", mark, sweep.verdict(), facts_of(sweep), sections(sweep))


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
        narrow = sweep.optimum(sweep.widths[0], name)
        wide = sweep.optimum(sweep.widths[-1], name)
        apart = narrow.high < wide.low or wide.high < narrow.low
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
            best = sweep.optimum(width, name)
            interval = f"{best.low:.3g} to {best.high:.3g}"
            # What no tried value brackets is no optimum yet: the reader must see that first.
            bracketed, mark = ("yes", "") if best.bracketed else ("NO", "doubt")
            tried, loss = f"{best.best:.4g}", show(best.loss)
            rows.append([name, str(width), f"{best.value:.4g}", interval, tried, loss, bracketed])
            marks.append(mark)
    heads = ["hyperparameter", "width", "best", "interval", "tried", "loss", "bracketed"]
    return Table(heads, rows, marks)


def losses(sweep: Sweep) -> Table:
    """Return the mean loss of every point, one column for each width.

    Args:
        sweep: The sweep.
    """
    tables = []
    points: set[Point] = set()
    for width in sweep.widths:
        table = {point: mean(seeds) for point, seeds in sweep.losses(width).items()}
        tables.append(table)
        points.update(table)
    rows = []
    for point in sorted(points):
        row = [f"{value:.4g}" for _, value in point]
        row += [_loss_cell(table.get(point), min(table.values())) for table in tables]
        rows.append(row)
    heads = [*sweep.names, *(f"width {width}" for width in sweep.widths)]
    return Table(heads, rows, [""] * len(rows), numbers=0)


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
        if all(trial.loss > 0 for trial in sweep.trials):
            logarithmic(axis)
        axis.minorticks_off()
        axis.set_xlabel(f"{name} at the base width {sweep.widths[0]}")
        axis.set_ylabel(sweep.score)
        axis.legend(
            frameon=False, fontsize=8, loc="upper center", title="star: optimum; bar: interval",
            title_fontsize=7,
        )  # fmt: skip
    return drawn


def _draw_curves(axis: Any, sweep: Sweep, name: str) -> None:
    """Draw the curve of every width, with its optimum and the interval of that."""
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"]
    # Points of a search do not lie on one curve, so only a grid is joined by lines.
    style = "-" if sweep.driver == "grid" else ""
    for number, width in enumerate(sweep.widths):
        color = shades(0.12 + 0.88 * number / max(len(sweep.widths) - 1, 1))
        curve = _finite(sweep.curve(width, name))
        axis.plot(list(curve), list(curve.values()), style, marker=".", color=color, label=f"width {width}")
        if curve:
            best = sweep.optimum(width, name)
            axis.plot(best.value, best.loss, marker="*", ms=13, color=color, mec="white", ls="none", zorder=3)
            axis.hlines(best.loss, best.low, best.high, color=color, alpha=0.5, lw=3)


def _finite(curve: Mapping[float, Sequence[float]]) -> dict[float, float]:
    """Return the mean losses of a curve that did not diverge."""
    means = {value: mean(seeds) for value, seeds in curve.items()}
    return {value: loss for value, loss in means.items() if math.isfinite(loss)}


def _ticks(sweep: Sweep, name: str) -> list[float]:
    """Return the values that are marked: some of a grid, the ends of a search."""
    tried = sorted({value for width in sweep.widths for value in sweep.curve(width, name)})
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
