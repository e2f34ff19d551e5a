"""A coordinate check as text, page and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mupass._study.coords import CoordCheck, Coordinate
from mupass._study.page import Page, Table, drawing, folded, logarithmic, new_figure, note, section
from mupass._study.recorder import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"FAIL": "bad", "unclear": "doubt"}
START = ("activation", "reach")
MOVED = ("aligned", "update")  # how a parameter moves its operator's output; the first is shown
MANY = 40  # lines of text beyond which only what does not pass is listed


def text(check: CoordCheck) -> str:
    """Return the verdict and one line for each place.

    Args:
        check: The check.
    """
    table = table_of(check)
    keep = list(range(len(table.rows)))
    if len(keep) > MANY:
        keep = [i for i in keep if table.marks[i]]
    left = len(table.rows) - len(keep)
    chosen = Table(table.heads, [table.rows[i] for i in keep], [table.marks[i] for i in keep])
    lines = [check.verdict(), "", *(f"{k}: {v}" for k, v in _facts(check).items()), ""]
    lines += [chosen.text()] if keep else []
    lines += [f"and {left} more places that pass"] if left else []
    return "\n".join(lines + _remarks(check))


def page(check: CoordCheck) -> Page:
    """Return what is shown.

    Args:
        check: The check.
    """
    table = table_of(check)
    bad = [i for i, mark in enumerate(table.marks) if mark]
    parts = [section("Sizes against width", drawing(lambda: figure(check)))]
    every = table.html()
    if bad and len(bad) < len(table.rows):
        some = Table(table.heads, [table.rows[i] for i in bad], [table.marks[i] for i in bad])
        parts += [section("What does not pass", some.html()), folded("All places", every)]
    else:
        parts += [section("Powers of width", every)]
    parts += [note(remark) for remark in _remarks(check)]
    mark = "bad" if not check.ok else "doubt" if any(table.marks) else "good"
    return Page("Coordinate check", mark, check.verdict(), _facts(check), parts)


def figure(check: CoordCheck) -> Figure:
    """Draw the values against width, one line for each place.

    Args:
        check: The check.
    """
    panels = {0: START, check.steps: MOVED}
    drawn, axes = new_figure(2)
    for axis, (step, quantities) in zip(axes, panels.items(), strict=True):
        labels = 0
        for found in _places(check).values():
            row = _chosen(found, quantities, step)
            if row is None or row.rule == "shown":
                continue
            bad = row.verdict == "FAIL"
            name = _short(row.site) if bad and labels < 6 else None
            labels += bad
            marker = "osv^DP"[labels - 1] if name else "."
            axis.plot(
                check.widths, row.slope.values, marker=marker, ms=4, alpha=0.85, label=name,
                color="#cf222e" if bad else "#0969da", lw=1.8 if bad else 0.9, zorder=3 if bad else 2,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        logarithmic(axis)
        axis.set_xticks(check.widths, [str(w) for w in check.widths])
        axis.minorticks_off()
        axis.set_xlabel("width")
        axis.set_title(
            "RMS of activations at the start"
            if step == 0
            else f"RMS of dW h along the gradient, step {step}",
            fontsize=10,
        )
        if labels:
            title = "fails" if labels <= 6 else f"{labels} fail, first of all"
            axis.legend(
                frameon=False, fontsize=7, title=title, title_fontsize=7, alignment="left",
                loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0,
            )  # fmt: skip
    return drawn


def table_of(check: CoordCheck) -> Table:
    places = _places(check)
    heads = ["place", "start", *(f"step {s}" for s in range(1, check.steps + 1)), "verdict"]
    rows, marks = [], []
    for site, found in places.items():
        moved = MOVED if site.parameter else ("change",)
        cells = [_chosen(found, START, 0)]
        cells += [_chosen(found, moved, s) for s in range(1, check.steps + 1)]
        verdicts = {r.verdict for r in found.values()}
        verdict = next((v for v in ("FAIL", "unclear", "ok") if v in verdicts), "")
        rows.append([str(site), *map(_cell, cells), verdict])
        marks.append(MARKS.get(verdict, ""))
    return Table(heads, rows, marks)


def _places(check: CoordCheck) -> dict[Site, dict[tuple[str, int], Coordinate]]:
    places: dict[Site, dict[tuple[str, int], Coordinate]] = {}
    for row in check.rows:
        places.setdefault(row.site, {})[row.quantity, row.step] = row
    return places


def _chosen(
    found: dict[tuple[str, int], Coordinate], quantities: tuple[str, ...], step: int
) -> Coordinate | None:
    """Return the first of some quantities, but one that fails before others."""
    rows = [found[q, step] for q in quantities if (q, step) in found]
    return next((r for r in rows if r.verdict == "FAIL"), rows[0] if rows else None)


def _cell(row: Coordinate | None) -> str:
    if row is None:
        return "-"
    sign = {"FAIL": "!", "unclear": "?", "ok": ""}.get(row.verdict, "")
    body = f"{row.slope.power:+.2f} ± {row.slope.error:.2f}"
    return f"({body})" if row.rule == "shown" else body + sign


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
        remarks += [f"{_some(check.silent)} hardly move at some width and are not judged"]
    if check.dimmed:
        remarks += [
            f"{_some(check.dimmed)} are below a readout in the middle of the model, which starts near zero "
            "and hides the loss: their first step is judged relative to their gradient, later ones only for "
            "growth"
        ]
    return remarks


def _some(sites: Sequence[Site]) -> str:
    more = " ..." if len(sites) > 4 else ""
    return f"{len(sites)} places ({', '.join(map(_short, sites[:4]))}{more})"


def _short(site: Site) -> str:
    return site.parameter or str(site)
