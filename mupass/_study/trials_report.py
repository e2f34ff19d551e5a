"""A sweep as text, page and picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mupass._study.page import Page, Table, drawing, logarithmic, new_figure, note, section
from mupass._study.trials import Sweep, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 1.0  # octaves beyond which a page says in red that an optimum moves


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
