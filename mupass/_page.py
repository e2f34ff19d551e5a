"""Tables and pages that every report of the package is made of: aligned text and self-contained HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

# The one style sheet. Its last part is for the width analysis: what each axis and role looks like.
STYLE = """
:root{color-scheme:light}
body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1.5rem;max-width:70rem}
body{color:#1b1f24;background:#fff}
h1{font-size:1.35rem;margin:0 0 .5rem} h2{font-size:1.05rem;margin:1.8rem 0 .4rem}
p{margin:.4rem 0;max-width:60rem} .note{color:#59636e}
.verdict{padding:.6rem .9rem;border-left:4px solid;border-radius:3px;overflow-wrap:anywhere}
.good{border-color:#1a7f37;background:#f0f8f2} .bad{border-color:#cf222e;background:#fdf2f2}
.doubt{border-color:#bf8700;background:#fdf8ec}
.scroll{overflow-x:auto} table{border-collapse:collapse;margin:.4rem 0;font-variant-numeric:tabular-nums}
th{font-weight:600;color:#59636e;text-align:left}
th,td{padding:.2rem 1rem .2rem 0;border-bottom:1px solid #eaeef2}
td{white-space:nowrap} td.number,th.number{text-align:right}
td:first-child{font-family:ui-monospace,monospace;font-size:.92em}
tr.bad td{color:#cf222e} tr.doubt td{color:#9a6700} tr.best td{font-weight:600}
svg{max-width:100%;height:auto} details summary{cursor:pointer;color:#0550ae;margin:.6rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1.2rem;margin:.5rem 0}
dt{color:#59636e} dd{margin:0} pre{overflow-x:auto;font-size:.85em;line-height:1.35}
article{border-top:1px solid #d1d9e0;margin-top:2rem;padding-top:1.2rem} nav ol{padding-left:1.4rem}
tr.module td{font-weight:600;background:#f6f8fa}
.inf{color:#0550ae;font-weight:600} .fix{color:#59636e} .maybe{border-bottom:2px dotted #bf8700}
.role-hidden{color:#0550ae}.role-input{color:#1a7f37}.role-output{color:#cf222e}.role-vector{color:#8250df}
li.warn{color:#9a6700}
"""


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of every column of a table of text.

    Args:
        rows: Cells of each row, as many in all of them.
    """
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def aligned(rows: Sequence[Sequence[str]], widths: Sequence[int], first_number: int | None = None) -> str:
    """Return a table of text, two blanks between columns, and none at the end of a line.

    Args:
        rows: Cells of each row.
        widths: Width of each column.
        first_number: Index of the first column that is set to the right; None for no such column.
    """
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if first_number is not None:
            numbers = zip(row[first_number:], widths[first_number:], strict=True)
            cells[first_number:] = [cell.rjust(width) for cell, width in numbers]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A table that can be printed or shown on a page.

    Attributes:
        heads: One for each column.
        rows: Cells of each row.
        marks: For each row ``good``, ``bad``, ``doubt``, ``best`` or ``""``.
        numbers: Index of the first column of numbers, which are set to the right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Sequence[str]
    numbers: int = 1

    def text(self) -> str:
        """Return aligned columns."""
        rows = [self.heads, *self.rows]
        return aligned(rows, column_widths(rows), self.numbers)

    def html(self) -> str:
        """Return the table as HTML."""
        lines = [f"<tr>{self._cells('th', self.heads)}</tr>"]
        for row, mark in zip(self.rows, self.marks, strict=True):
            lines.append(f'<tr class="{mark}">{self._cells("td", row)}</tr>')
        return f'<div class="scroll"><table>{"".join(lines)}</table></div>'

    def _cells(self, tag: str, row: Sequence[str]) -> str:
        """Return the cells of one row as HTML."""
        cells = []
        for column, text in enumerate(row):
            kind = ' class="number"' if column >= self.numbers else ""
            cells.append(f"<{tag}{kind}>{html.escape(text)}</{tag}>")
        return "".join(cells)

    def only_marked(self) -> Table:
        """Return the table without the rows that have no mark."""
        rows = list(compress(self.rows, self.marks))
        return Table(self.heads, rows, list(filter(None, self.marks)), self.numbers)


def document(title: str, body: str) -> str:
    """Return one self-contained HTML file.

    Args:
        title: Of its window.
        body: HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def section(title: str, *parts: str) -> str:
    """Return a section of a page.

    Args:
        title: Its heading.
        *parts: HTML.
    """
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def note(text: str) -> str:
    """Return a paragraph in the second voice.

    Args:
        text: Plain text.
    """
    return f'<p class="note">{html.escape(text)}</p>'


def folded(title: str, content: str) -> str:
    """Return what is shown on a click only.

    Args:
        title: What to click on.
        content: HTML.
    """
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def listing(text: str) -> str:
    """Return text whose columns stay aligned.

    Args:
        text: Plain text.
    """
    return f"<pre>{html.escape(text)}</pre>"
