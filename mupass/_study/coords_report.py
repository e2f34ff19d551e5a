"""How a coordinate check is shown: as text, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mupass._page import Table, folded, note, section
from mupass._study.coords import CoordCheck, Coordinate
from mupass._study.page import Page, drawing, logarithmic, new_figure
from mupass._study.recorder import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"FAIL": "bad", "unclear": "doubt"}
SIGNS = {"FAIL": "!", "unclear": "?"}
START = ("activation", "reach")
MOVED = ("aligned", "update")  # how a parameter moves its operator's output; the first is shown
MANY = 40  # lines of text beyond which only what does not pass is listed
MARKERS = "osv^DP"  # of the first places that fail, which the legend names; a dot for all others

# (quantity, step) -> what was measured at one place.
Measured = Mapping[tuple[str, int], Coordinate]


def text(check: CoordCheck) -> str:
    """Return the verdict and one line for each place.

    Args:
        check: The check.
    """
    every = table_of(check)
    table = every
    if len(every.rows) > MANY:
        table = every.only_marked()
    lines = [check.verdict(), ""]
    lines += [f"{name}: {value}" for name, value in _facts(check).items()]
    lines.append("")
    if table.rows:
        lines.append(table.text())
    left_out = len(every.rows) - len(table.rows)
    if left_out:
        lines.append(f"and {left_out} more places that pass")
    return "\n".join(lines + _remarks(check))


def page(check: CoordCheck) -> Page:
    """Return what is shown on a page.

    Args:
        check: The check.
    """
    table = table_of(check)
    marked = table.only_marked()
    parts = [section("Sizes against width", drawing(lambda: figure(check)))]
    if 0 < len(marked.rows) < len(table.rows):
        parts += [section("What does not pass", marked.html()), folded("All places", table.html())]
    else:
        parts.append(section("Powers of width", table.html()))
    parts += map(note, _remarks(check))
    mark = "good"
    if not check.ok:
        mark = "bad"
    elif marked.rows:
        mark = "doubt"
    return Page("Coordinate check", mark, check.verdict(), _facts(check), parts)


def figure(check: CoordCheck) -> Figure:
    """Draw the values against width, one line for each place: at the start, and after the last step.

    Args:
        check: The check.
    """
    drawn, (start, end) = new_figure(2)
    _draw_panel(start, check, START, 0)
    start.set_title("RMS of activations at the start", fontsize=10)
    _draw_panel(end, check, MOVED, check.steps)
    end.set_title(f"RMS of dW h along the gradient, step {check.steps}", fontsize=10)
    return drawn


def _draw_panel(axis: Any, check: CoordCheck, quantities: Sequence[str], step: int) -> None:
    """Draw what was measured at one step; what fails is thick, red and named."""
    failures = 0
    for measured in _places(check).values():
        row = _chosen(measured, quantities, step)
        if row is None or row.rule == "shown":
            continue
        if row.verdict != "FAIL":
            _draw_line(axis, check, row, color="#0969da", lw=0.9, zorder=2)
        elif failures < len(MARKERS):
            named = {"marker": MARKERS[failures], "label": _short(row.site)}
            _draw_line(axis, check, row, color="#cf222e", lw=1.8, zorder=3, **named)
            failures += 1
        else:
            _draw_line(axis, check, row, color="#cf222e", lw=1.8, zorder=3)
            failures += 1
    axis.set_xscale("log", base=2)
    logarithmic(axis)
    axis.set_xticks(check.widths, list(map(str, check.widths)))
    axis.minorticks_off()
    axis.set_xlabel("width")
    if failures:
        title = "fails" if failures <= len(MARKERS) else f"{failures} fail, first of all"
        axis.legend(
            frameon=False, fontsize=7, title=title, title_fontsize=7, alignment="left",
            loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0,
        )  # fmt: skip


def _draw_line(axis: Any, check: CoordCheck, row: Coordinate, marker: str = ".", **style: Any) -> None:
    axis.plot(check.widths, row.slope.values, marker=marker, ms=4, alpha=0.85, **style)


def table_of(check: CoordCheck) -> Table:
    """Return the powers of width of every place: before the first step, and after each.

    Args:
        check: The check.
    """
    steps = range(1, check.steps + 1)
    rows, marks = [], []
    for site, measured in _places(check).items():
        moved = MOVED if site.parameter else ("change",)
        cells = [_cell(_chosen(measured, START, 0))]
        cells += [_cell(_chosen(measured, moved, step)) for step in steps]
        verdict = _worst(measured)
        rows.append([str(site), *cells, verdict])
        marks.append(MARKS.get(verdict, ""))
    heads = ["place", "start", *(f"step {step}" for step in steps), "verdict"]
    return Table(heads, rows, marks)


def _worst(measured: Measured) -> str:
    """Return the worst verdict on a place."""
    verdicts = {row.verdict for row in measured.values()}
    for verdict in ("FAIL", "unclear", "ok"):
        if verdict in verdicts:
            return verdict
    return ""


def _places(check: CoordCheck) -> dict[Site, dict[tuple[str, int], Coordinate]]:
    places: dict[Site, dict[tuple[str, int], Coordinate]] = {}
    for row in check.rows:
        places.setdefault(row.site, {})[row.quantity, row.step] = row
    return places


def _chosen(measured: Measured, quantities: Sequence[str], step: int) -> Coordinate | None:
    """Return the first of some quantities, but one that fails before others."""
    rows = [measured[quantity, step] for quantity in quantities if (quantity, step) in measured]
    for row in rows:
        if row.verdict == "FAIL":
            return row
    return next(iter(rows), None)


def _cell(row: Coordinate | None) -> str:
    if row is None:
        return "-"
    power = f"{row.slope.power:+.2f} ± {row.slope.error:.2f}"
    if row.rule == "shown":
        return f"({power})"
    return power + SIGNS.get(row.verdict, "")


def _facts(check: CoordCheck) -> dict[str, str]:
    return {
        "widths": ", ".join(map(str, check.widths)),
        "trained": f"{check.optimizer}, {check.parameterization}, {check.steps} steps, {check.seeds} seeds",
        "flat": f"a power within ± {check.tolerance:g}; it fails when its whole 99 % interval is beyond",
        "columns": (
            "powers of width of the activation at the start and of dW h along the gradient (all of dW h "
            "where that fails; scores and output: of their change) after each step; in brackets: not judged"
        ),
    }


def _remarks(check: CoordCheck) -> list[str]:
    remarks = list(check.notes)
    if check.silent:
        remarks.append(f"{_count(check.silent)} hardly move at some width and are not judged")
    if check.dimmed:
        remarks.append(
            f"{_count(check.dimmed)} are below a readout in the middle of the model, which starts near zero "
            "and hides the loss: their first step is judged relative to their gradient, later ones only for "
            "growth"
        )
    return remarks


def _count(sites: Sequence[Site]) -> str:
    """Say how many places there are, and name the first."""
    more = " ..." if len(sites) > 4 else ""
    return f"{len(sites)} places ({', '.join(map(_short, sites[:4]))}{more})"


def _short(site: Site) -> str:
    return site.parameter or str(site)
