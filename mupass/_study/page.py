"""Pages: self-contained HTML of tables, sentences and pictures, and files of all kinds."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupass._errors import StudyError
from mupass._files import write_text, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HTML = (".html", ".htm")
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
"""


@dataclass(frozen=True)
class Table:
    """A table.

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
        lines = [list(self.heads), *map(list, self.rows)]
        sizes = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i < self.numbers else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, sizes, strict=True))
            ).rstrip()
            for line in lines
        )

    def html(self) -> str:
        """Return the table as HTML."""

        def cell(tag: str, i: int, text: str) -> str:
            kind = ' class="number"' if i >= self.numbers else ""
            return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

        head = "".join(cell("th", i, h) for i, h in enumerate(self.heads))
        body = "".join(
            f'<tr class="{mark}">{"".join(cell("td", i, c) for i, c in enumerate(row))}</tr>'
            for row, mark in zip(self.rows, self.marks, strict=True)
        )
        return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


@dataclass(frozen=True)
class Page:
    """What a study has to show.

    Attributes:
        title: Its heading.
        mark: ``good``, ``bad`` or ``doubt``: the color of the verdict.
        verdict: One sentence.
        facts: What was done, by name.
        parts: HTML of the sections.
    """

    title: str
    mark: str
    verdict: str
    facts: Mapping[str, str]
    parts: Sequence[str]

    def html(self) -> str:
        """Return everything as HTML, the heading first."""
        rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.facts.items())
        verdict = f'<p class="verdict {self.mark}">{html.escape(self.verdict)}</p>'
        return f"<h1>{html.escape(self.title)}</h1>{verdict}<dl>{rows}</dl>{''.join(self.parts)}"


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
    """Return a section.

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


def drawing(make: Callable[[], Figure]) -> str:
    """Return a figure as inline SVG; without matplotlib a sentence that says so.

    Args:
        make: Function that draws it.
    """
    try:
        figure = make()
    except StudyError as error:
        return note(str(error))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"^.*?(?=<svg)", "", svg, count=1, flags=re.S)


def new_figure(columns: int) -> tuple[Figure, Any]:
    """Return an empty figure with axes side by side, and the axes.

    Args:
        columns: Number of axes.

    Raises:
        StudyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StudyError("pictures need matplotlib: pip install 'mupass[plots]'") from error
    figure = Figure(figsize=(4.8 * columns, 3.8), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def logarithmic(axis: Any) -> None:
    """Make the vertical axis logarithmic, with readable numbers also where it spans less than a decade.

    Args:
        axis: Axes of a figure.
    """
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def write(
    path: str | Path | None, text: Callable[[], str], page: Callable[[], Page], figure: Callable[[], Figure]
) -> str:
    """Return the text of a report, or write a file whose ending tells what.

    Args:
        path: File, or None for the text.
        text: Makes the text.
        page: Makes the page.
        figure: Draws the picture.

    Returns:
        The text, or the path.
    """
    if path is None:
        return text()
    path = Path(path)
    if path.suffix in (".png", ".svg", ".pdf"):
        drawn = figure()
        write_whole(path, lambda beside: drawn.savefig(beside, dpi=150), StudyError)
    elif path.suffix in HTML:
        shown = page()
        write_text(path, document(shown.title, shown.html()), StudyError)
    else:
        write_text(path, text() + "\n", StudyError)
    return str(path)
