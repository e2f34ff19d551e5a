"""What a study has to show as a page, its pictures, and the files that reports are written to."""

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
from mupass._page import document, note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HTML = (".html", ".htm")
PICTURES = (".png", ".svg", ".pdf")


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
        facts = [
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in self.facts.items()
        ]
        verdict = f'<p class="verdict {self.mark}">{html.escape(self.verdict)}</p>'
        return f"<h1>{html.escape(self.title)}</h1>{verdict}<dl>{''.join(facts)}</dl>{''.join(self.parts)}"


def drawing(draw: Callable[[], Figure]) -> str:
    """Return a figure as inline SVG; without matplotlib a sentence that says so.

    Args:
        draw: Function that draws it.
    """
    try:
        figure = draw()
    except StudyError as error:
        return note(str(error))
    buffer = io.StringIO()
    # Without a date the same study gives the same bytes.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # What stands before <svg (an XML declaration, a doctype) must not be inside of HTML.
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.S)


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
    # Marks at 1, 2 and 5, since many axes span less than a decade.
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
    if path.suffix in PICTURES:
        drawn = figure()
        write_whole(path, lambda beside: drawn.savefig(beside, dpi=150), StudyError)
    elif path.suffix in HTML:
        shown = page()
        write_text(path, document(shown.title, shown.html()), StudyError)
    else:
        write_text(path, text() + "\n", StudyError)
    return str(path)
