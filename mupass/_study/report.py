"""One page of several studies, to attach to a pull request."""

from __future__ import annotations

import html
from functools import partial
from os import PathLike
from pathlib import Path

from mupass._errors import StudyError
from mupass._files import write_text
from mupass._page import document, listing, section
from mupass._scales.plan import Plan
from mupass._study.coords import CoordCheck
from mupass._study.page import HTML, Page, drawing
from mupass._study.sweep_result import Sweep, comparable, overlaid
from mupass._study.transfer import Transfer

Reported = CoordCheck | Sweep | Transfer | Plan


def report(path: str | Path, *studies: Reported, title: str = "mupass") -> str:
    """Write one self-contained HTML page of several studies, their verdicts first.

    Args:
        path: File to write, ``.html``.
        *studies: What `mupass.coord_check`, `mupass.sweep` and `mupass.transfer` returned, or a plan, in the
            order to be shown.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        StudyError: No study, something that is none, or a file of another kind.

    Example:
        >>> import mupass, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.Linear(64, 3))
        >>> plan = mupass.transform(model).mupass_plan
        >>> path = mupass.report(f"{tempfile.mkdtemp()}/plan.html", plan)
    """
    if not isinstance(path, (str, PathLike)):
        raise StudyError(
            f"the first argument is the path of the page, such as 'study.html', not {path!r:.60}"
        )
    if Path(path).suffix not in HTML:
        raise StudyError(f"{path}: a page of several studies is written as .html")
    if not studies:
        raise StudyError("a report needs at least one study, such as the result of mupass.coord_check")
    links, articles = [], []
    for number, study in enumerate(studies):
        page = page_of(study)
        verdict = f'<p class="verdict {page.mark}">{html.escape(page.verdict)}</p>'
        links.append(f'<li><a href="#study{number}">{html.escape(page.title)}</a>{verdict}</li>')
        articles.append(f'<article id="study{number}">{page.html()}</article>')
    summary = f"<nav><ol>{''.join(links)}</ol></nav>"
    # Sweeps of one hyperparameter are drawn side by side, on the same axes.
    for sweeps in comparable(studies):
        summary += section("Sweeps side by side", drawing(partial(overlaid, sweeps)))
    body = f"<h1>{html.escape(title)}</h1>{summary}{''.join(articles)}"
    write_text(path, document(title, body), StudyError)
    return str(path)


def page_of(study: Reported) -> Page:
    """Return what one study has to show.

    Args:
        study: The study.

    Raises:
        StudyError: It is none.
    """
    if isinstance(study, (CoordCheck, Sweep, Transfer)):
        return study._page()
    if isinstance(study, Plan):
        return _plan(study)
    raise StudyError(
        f"a report has no page for {type(study).__name__}; give what mupass.coord_check, mupass.sweep or "
        "mupass.transfer returned, or a plan"
    )


def _plan(plan: Plan) -> Page:
    mark = "doubt" if plan.warnings else "good"
    verdict = "; ".join(plan.warnings) or f"scales of {len(plan)} parameters, no warnings"
    facts = {
        "optimizer": str(plan.optimizer),
        "parameterization": plan.parameterization,
        "widths": f"{plan.width}, base width {plan.base_width:g}",
    }
    return Page("Plan", mark, verdict, facts, (listing(str(plan)),))
