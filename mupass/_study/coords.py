"""The result of a coordinate check: what was measured, as records, text, page and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupass._page import Table, folded, note, section
from mupass._runs.tabular import Tabular
from mupass._study.page import Page, drawing, logarithmic, new_figure, write
from mupass._study.recorder import OUTPUT, Site
from mupass._study.slopes import Slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "activation": "activation at the start",
    "reach": "attention score of a query along a key",
    "update": "update dW h",
    "share": "update dW h relative to the output that is normalized",
    "aligned": "update dW h along the gradient",
    "change": "change",
}
MARKS = {"FAIL": "bad", "unclear": "doubt"}
VERDICTS = ("", "ok", "unclear", "FAIL")  # from the best to the worst; the first is of what is not judged
START = ("activation", "reach")
MOVED = ("aligned", "update")  # how a parameter moves its operator's output; the first is shown
MANY = 40  # lines of text beyond which only what does not pass is listed
SIGNS = {"FAIL": "!", "unclear": "?"}
MARKERS = "osv^DP"  # of the first places that fail, which the legend names; a dot for all others


@dataclass(frozen=True)
class Coordinate:
    """One measured quantity of one operator.

    Attributes:
        site: Where: module, operator, parameter.
        quantity: ``activation`` (RMS of the operator's output before the first step), ``reach`` (score of a
            query and a key that point the same way, as training makes them), ``update`` (RMS of
            dW h: what the parameter's update does to that output, at the activations of the start), ``share``
            (the same relative to the output, for a readout that is normalized afterwards),
            ``aligned`` (RMS of the part of it along the gradient of the loss at the start) or ``change``
            (RMS of all that moved the output since the start).
        step: Number of optimizer steps taken.
        slope: Power of width, its interval and the values.
        rule: ``flat`` when any power but 0 is a fault, ``bounded`` when only growth is, ``shown`` when the
            quantity is not judged, ``relative`` when it was divided by what the size of the gradient explains
            (`dimmed`) and should be flat then.
        verdict: ``ok``, ``FAIL``, ``unclear`` (the estimate lies beyond the tolerance, but not all of its
            interval) or ``""``.
    """

    site: Site
    quantity: str
    step: int
    slope: Slope
    rule: str
    verdict: str


@dataclass(frozen=True)
class CoordCheck(Tabular):
    """Result of a coordinate check; prints as a report.

    Attributes:
        widths: Widths that were trained.
        optimizer: What trained them.
        parameterization: Under which parameterization.
        steps: Number of steps.
        seeds: Number of initializations.
        tolerance: Largest power that counts as flat.
        rows: All quantities; of one step in the order in which the operators ran.
        silent: Places whose parameter did not move its operator's output at some width.
        dimmed: Places below a readout in the middle of the model, where the gradient starts near zero.
        blame: Likely cause of the first fault; empty when there is none.
        notes: What was made of the model given.
    """

    widths: tuple[int, ...]
    optimizer: str
    parameterization: str
    steps: int
    seeds: int
    tolerance: float
    rows: tuple[Coordinate, ...]
    silent: tuple[Site, ...]
    dimmed: tuple[Site, ...]
    blame: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Coordinate, ...]:
        """What failed: the earliest step first, then in the order in which the operators ran."""
        failures = [row for row in self.rows if row.verdict == "FAIL"]
        return tuple(sorted(failures, key=lambda row: row.step))

    @property
    def first(self) -> Coordinate | None:
        """The first offender, or None."""
        return next(iter(self.failures), None)

    def modules(self) -> dict[str, str]:
        """Return the verdict on every module that calls an operator: the worst of its quantities."""
        worst: dict[str, str] = {}
        for row in self.rows:
            name = OUTPUT if row.site.operator == OUTPUT else row.site.module
            worst[name] = max(worst.get(name, ""), row.verdict, key=VERDICTS.index)
        return worst

    def verdict(self) -> str:
        """Return one sentence: pass, or the first offending operator with the likely cause."""
        judged = sum(bool(row.verdict) for row in self.rows)
        unclear = sum(row.verdict == "unclear" for row in self.rows)
        doubt = f"; {unclear} unclear, which more seeds or larger widths would settle" if unclear else ""
        row = self.first
        if row is None:
            return f"PASS: none of {judged} quantities scales with width{doubt}"
        return (
            f"FAIL at {row.site}: {NAMES[row.quantity]} scales like width^{row.slope.power:+.2f} "
            f"(+- {row.slope.error:.2f}) at step {row.step}. {len(self.failures)} of {judged} quantities "
            f"fail{doubt}. Likely cause: {self.blame}"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each quantity."""
        columns = [f"width {width}" for width in self.widths]
        return [
            {
                "module": row.site.module,
                "operator": row.site.operator,
                "parameter": row.site.parameter,
                "quantity": row.quantity,
                "step": row.step,
                "power": row.slope.power,
                "error": row.slope.error,
                "rule": row.rule,
                "verdict": row.verdict,
                **dict(zip(columns, row.slope.values, strict=True)),
            }
            for row in self.rows
        ]

    def _tables(self) -> list[str]:
        return [table_of(self).html()]

    def __str__(self) -> str:
        """Return the verdict and one line for each place."""
        every = table_of(self)
        table = every
        # A large model has hundreds of places: the text lists those that do not pass.
        if len(every.rows) > MANY:
            table = every.only_marked()
        lines = [self.verdict(), ""]
        lines += [f"{name}: {value}" for name, value in _facts(self).items()]
        lines.append("")
        if table.rows:
            lines.append(table.text())
        left_out = len(every.rows) - len(table.rows)
        if left_out:
            lines.append(f"and {left_out} more places that pass")
        return "\n".join(lines + _remarks(self))

    def _page(self) -> Page:
        """Return what a page of several studies shows of this one."""
        table = table_of(self)
        marked = table.only_marked()
        parts = [section("Sizes against width", drawing(lambda: figure(self)))]
        # With all or none marked one table is enough.
        if 0 < len(marked.rows) < len(table.rows):
            parts += [section("What does not pass", marked.html()), folded("All places", table.html())]
        else:
            parts.append(section("Powers of width", table.html()))
        parts += map(note, _remarks(self))
        mark = "good"
        if not self.ok:
            mark = "bad"
        elif marked.rows:
            mark = "doubt"
        title = f"Coordinate self: {self.optimizer}, {self.parameterization}"
        return Page(title, mark, self.verdict(), _facts(self), parts)

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.png`` or ``.svg`` for the picture
                (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.

        Raises:
            StudyError: A picture without matplotlib.
        """
        return write(path, lambda: str(self), self._page, lambda: figure(self))


# (quantity, step) -> what was measured at one place.
Measured = dict[tuple[str, int], Coordinate]


def figure(check: CoordCheck) -> Figure:
    """Draw the values against width, one line for each place: at the start, and after the last step.

    Args:
        check: The check.
    """
    picture, (start, end) = new_figure(2)
    _draw_panel(start, check, START, 0)
    start.set_title("RMS of activations at the start", fontsize=10)
    _draw_panel(end, check, MOVED, check.steps)
    end.set_title(f"RMS of dW h along the gradient, step {check.steps}", fontsize=10)
    return picture


def _draw_panel(axis: Any, check: CoordCheck, quantities: Sequence[str], step: int) -> None:
    """Draw what was measured at one step; what fails is thick, red and named."""
    failures = passes = 0
    for measured in _places(check).values():
        row = _chosen(measured, quantities, step)
        if row is None or row.rule == "shown":
            continue
        if row.verdict != "FAIL":
            # One entry of the legend stands for all of them.
            legend_entry = {} if passes else {"label": "each line a place; blue does not fail"}
            _draw_line(axis, check, row, color="#0969da", lw=0.9, zorder=2, **legend_entry)
            passes += 1
        # Only the first failures have markers and names: a legend of all would hide the picture.
        elif failures < len(MARKERS):
            legend_entry = {"marker": MARKERS[failures], "label": _short(row.site)}
            _draw_line(axis, check, row, color="#cf222e", lw=1.8, zorder=3, **legend_entry)
            failures += 1
        else:
            _draw_line(axis, check, row, color="#cf222e", lw=1.8, zorder=3)
            failures += 1
    axis.set_xscale("log", base=2)
    logarithmic(axis)
    axis.set_xticks(check.widths, list(map(str, check.widths)))
    axis.minorticks_off()
    axis.set_xlabel("width")
    title = ""
    if failures:
        title = "red fails" if failures <= len(MARKERS) else f"red: {failures} fail, first of all"
    if failures or passes:
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
        quantities = MOVED if site.parameter else ("change",)
        cells = [_cell(_chosen(measured, START, 0))]
        cells += [_cell(_chosen(measured, quantities, step)) for step in steps]
        verdict = _worst(measured)
        rows.append([str(site), *cells, verdict])
        marks.append(MARKS.get(verdict, ""))
    headings = ["place", "start", *(f"step {step}" for step in steps), "verdict"]
    return Table(headings, rows, marks)


def _worst(measured: Measured) -> str:
    """Return the worst verdict on a place."""
    return max((row.verdict for row in measured.values()), key=VERDICTS.index)


def _places(check: CoordCheck) -> dict[Site, Measured]:
    places: dict[Site, Measured] = {}
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
    ellipsis = " ..." if len(sites) > 4 else ""
    return f"{len(sites)} places ({', '.join(map(_short, sites[:4]))}{ellipsis})"


def _short(site: Site) -> str:
    return site.parameter or str(site)
