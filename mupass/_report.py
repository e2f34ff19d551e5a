"""The report: the user's own module tree with a verdict on every axis, as text, HTML or a graph."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mupass._records import Analysis, Geometry
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.scales import Scales, scales

if TYPE_CHECKING:
    import networkx

COLUMNS, NAMES = 100, 48  # widest table, widest name in it
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem;color:#1b1f24;background:#fff}
h1{font-size:1.25rem;margin:0 0 .25rem} p.note{margin:.15rem 0;color:#59636e}
table{border-collapse:collapse;margin-top:1rem} th{font-weight:600;text-align:left;color:#59636e}
th,td{padding:.2rem .8rem .2rem 0;border-bottom:1px solid #eaeef2;white-space:nowrap}
tr.module td{font-weight:600;background:#f6f8fa} td.name{font-family:ui-monospace,monospace}
.inf{color:#0550ae;font-weight:600} .fix{color:#59636e} .maybe{border-bottom:2px dotted #bf8700}
.role-hidden{color:#0550ae}.role-input{color:#1a7f37}.role-output{color:#cf222e}.role-vector{color:#8250df}
li.warn{color:#9a6700}
"""


@dataclass(frozen=True)
class Report:
    """An analysis made readable.

    Attributes:
        analysis: The analysis.
        optimizer: Optimizer whose learning-rate factors are shown.
        parameterization: Parameterization that they belong to.
    """

    analysis: Analysis
    optimizer: str = "adamw"
    parameterization: str = "mup"

    def scales(self, geometry: Geometry) -> Scales:
        """Return the width factors of one parameter.

        Args:
            geometry: Geometry of the parameter.
        """
        return scales(geometry, OptimizerSpec.of(self.optimizer), self.parameterization)

    def __str__(self) -> str:
        """Return the report as text."""
        return self.text()

    def text(self) -> str:
        """Return the module tree, one line a parameter, in at most 100 columns.

        Growing axes carry ``*``, axes that a policy decided ``?``. Of blocks that are alike one is shown.
        """
        rows: list[tuple[str, ...]] = [("parameter", "shape", "role", "init", f"lr ({self.optimizer})")]
        for label, g, depth in _folded(list(self._lines()), self._likeness):
            name, *cells = self._cells(g) if g else (label, "", "", "", "")
            rows.append((_cut("  " * depth + name, NAMES), *cells))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        widths[1] = min(widths[1], COLUMNS - sum(widths) + widths[1] - 8)
        lines = [line for row in rows for line in _row(row, widths)]
        lines.insert(1, "-" * (sum(widths) + 8))
        head = textwrap.wrap(self._headline(), COLUMNS)
        return "\n".join([*head, *lines, *_wrapped(self._footer())])

    def record(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        a = self.analysis
        return {
            "model": a.modules[0][1] if a.modules else "model",
            "width": a.width,
            "base_width": a.base_width,
            "parameterization": self.parameterization,
            "optimizer": self.optimizer,
            "capture": a.capture,
            "warnings": list(a.warnings),
            "questions": [vars(question) for question in self.questions()],
            "parameters": [self._parameter(g) for g in a.geometries],
        }

    def _parameter(self, g: Geometry) -> dict[str, Any]:
        factors = {k: v for k, v in asdict(self.scales(g)).items() if k != "lr_powers"}
        return {
            "name": g.name,
            "aliases": list(g.aliases),
            "shape": list(g.shape),
            "base_shape": list(g.base_shape),
            "dims": list(g.dims),
            "grows": list(g.infinite),
            "ambiguous": list(g.ambiguous),
            "role": g.role,
            **factors,
        }

    def _likeness(self, g: Geometry) -> tuple[Any, ...]:
        """Return what parameters of repeated blocks have in common."""
        found = self.scales(g)
        aliases = bool(g.aliases)  # a tie is of this block alone
        return g.shape, g.role, g.infinite, g.ambiguous, found.init, found.lr, g.name if aliases else ""

    def html(self) -> str:
        """Return one self-contained HTML page; hovering over an axis shows the evidence."""
        body = []
        for label, geometry, depth in self._lines():
            pad = f' style="padding-left:{1.2 * depth:.1f}rem"'
            if geometry is None:
                body.append(f'<tr class="module"><td colspan="5"{pad}>{html.escape(label)}</td></tr>')
            else:
                body.append(self._html_row(label, geometry, pad))
        notes = "".join(f'<li class="warn">{html.escape(line)}</li>' for line in self._footer())
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>mupass report</title>'
            f"<style>{STYLE}</style><h1>Width analysis</h1>"
            f"<p class='note'>{html.escape(self._headline())}</p>"
            "<p class='note'>Blue axes grow with width; dotted ones were settled by a policy.</p>"
            "<table><tr><th>parameter</th><th>shape</th><th>role</th><th>init</th>"
            f"<th>lr ({self.optimizer})</th></tr>"
            f"{''.join(body)}</table><ul>{notes}</ul></html>"
        )

    def graph(self) -> networkx.DiGraph:
        """Return parameters and dimensions as a bipartite graph.

        A parameter points to the dimensions that it makes (fan_out); the dimensions that it contracts
        (fan_in) point to it. Nodes have ``kind`` (``parameter`` or ``dimension``) and ``infinite`` or
        ``role``.
        """
        import networkx

        graph = networkx.DiGraph()
        for g in self.analysis.geometries:
            graph.add_node(g.name, kind="parameter", role=g.role)
            for i, (term, infinite) in enumerate(zip(g.dims, g.infinite, strict=True)):
                graph.add_node(term, kind="dimension", infinite=infinite)
                edge = (term, g.name) if i in g.fan_in_axes else (g.name, term)
                graph.add_edge(*edge, axis=i)
        return graph

    def _lines(self) -> Iterator[tuple[str, Geometry | None, int]]:
        """Yield (label, parameter or None for a module, depth) in the model's own order."""
        owned: dict[str, list[Geometry]] = {}
        for g in self.analysis.geometries:
            owned.setdefault(g.name.rpartition(".")[0], []).append(g)
        used = {prefix for owner in owned for prefix in _prefixes(owner)}
        for path, kind in self.analysis.modules or tuple((p, "") for p in owned):
            if path not in used:
                continue
            depth = path.count(".") + 1 if path else 0
            yield f"{path.rpartition('.')[2]} ({kind})" if path else kind, None, depth
            for g in owned.get(path, ()):
                yield g.name.rpartition(".")[2], g, depth + 1

    def _cells(self, g: Geometry) -> tuple[str, str, str, str, str]:
        found = self.scales(g)
        axes = []
        for size, term, infinite, policy in zip(g.shape, g.dims, g.infinite, g.ambiguous, strict=True):
            label = str(size) if term == str(size) else f"{term}={size}"
            axes.append(label + ("*" if infinite else "") + ("?" if policy else ""))
        tied = f" (tied: {', '.join(g.aliases)})" if g.aliases else ""
        name = g.name.rpartition(".")[2]
        return name, "[" + ", ".join(axes) + "]" + tied, g.role, f"{found.init:.4g}", f"{found.lr:.4g}"

    def _html_row(self, label: str, g: Geometry, pad: str) -> str:
        axes = []
        for size, term, infinite, policy, why in zip(
            g.shape, g.dims, g.infinite, g.ambiguous, g.evidence, strict=True
        ):
            kind = ("inf" if infinite else "fix") + (" maybe" if policy else "")
            text = str(size) if term == str(size) else f"{term}={size}"
            axes.append(f'<span class="{kind}" title="{html.escape(why)}">{html.escape(text)}</span>')
        found = self.scales(g)
        tied = f" <span class='fix'>tied: {html.escape(', '.join(g.aliases))}</span>" if g.aliases else ""
        return (
            f'<tr><td class="name"{pad}>{html.escape(label)}</td><td>{" × ".join(axes)}{tied}</td>'
            f'<td class="role-{g.role}">{g.role}</td><td>{found.init:.4g}</td><td>{found.lr:.4g}</td></tr>'
        )

    def _headline(self) -> str:
        a = self.analysis
        name = a.modules[0][1] if a.modules else "model"
        return (
            f"{name}: width {a.width}, base width {a.base_width:g}, {self.parameterization}, "
            f"captured by {a.capture}; * grows with width, ? by policy"
        )

    def questions(self) -> list[Question]:
        """Return what one model could not settle, repeated blocks taken together."""
        groups: dict[tuple[str, ...], list[tuple[Geometry, int]]] = {}
        for g in self.analysis.geometries:
            for axis, policy in enumerate(g.ambiguous):
                if policy:
                    groups.setdefault(_alike(g, axis), []).append((g, axis))
        return [Question.of(found) for found in groups.values()]

    def _footer(self) -> list[str]:
        lines = [f"note: {w}" for w in self.analysis.warnings]
        questions = self.questions()
        if questions:
            lines.append(
                "note: one model cannot settle the axes marked ?; pass base= a second instance at another "
                "width, or dims= what is in braces where a verdict is not what you mean"
            )
        return lines + [f"  ? {question}" for question in questions]


@dataclass(frozen=True)
class Question:
    """What a policy decided, for one dimension or for the same one in repeated blocks.

    Attributes:
        axis: The first axis that has it, as ``parameter:axis``.
        size: Its size there.
        count: How many axes of parameters have it.
        infinite: The verdict.
        why: The policy and its evidence.
        override: The entry of ``dims=`` that states the opposite.
    """

    axis: str
    size: int
    count: int
    infinite: bool
    why: str
    override: str

    @classmethod
    def of(cls, found: Sequence[tuple[Geometry, int]]) -> Question:
        """Describe axes that are settled for the same reason.

        Args:
            found: Parameters and axes, at least one.
        """
        g, axis = found[0]
        path = f"{g.name}:{axis}"
        pattern = (
            re.sub(r"(?:(?<=\.)|^)\d+(?=\\\.)", r"\\d+", re.escape(path))
            if len(found) > 1
            else re.escape(path)
        )
        opposite = "finite" if g.infinite[axis] else "infinite"
        why = g.evidence[axis].partition(": ")[2].removeprefix("policy: ")
        override = f"{{{pattern!r}: {opposite!r}}}"
        return cls(path, g.shape[axis], len(found), g.infinite[axis], why, override)

    def __str__(self) -> str:
        """Return one line with the verdict, the reason and the override."""
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        verdict = "grows" if self.infinite else "is fixed"
        return f"{self.axis}{more} (size {self.size}) {verdict}: {self.why}  {self.override}"


def _alike(g: Geometry, axis: int) -> tuple[str, ...]:
    """Return what axes have in common that one reason settles; block numbers do not count."""
    return (re.sub(r"\d+", "#", g.evidence[axis].partition(" ")[2].partition(" ")[2]), str(g.infinite[axis]))


Line = tuple[str, "Geometry | None", int]


def _folded(lines: list[Line], likeness: Callable[[Geometry], tuple[Any, ...]]) -> Iterator[Line]:
    """Yield the lines of a module tree, of neighboring numbered modules that are alike the first alone."""
    at = 0
    while at < len(lines):
        label, geometry, depth = lines[at]
        end = _end(lines, at)
        same = [label.partition(" ")[0]]
        if geometry is None and same[0].isdigit():
            first, next_ = _alike_block(lines, at, end, likeness), end
            while next_ < len(lines) and _is_next(lines, next_, depth, int(same[-1])):
                last = _end(lines, next_)
                if _alike_block(lines, next_, last, likeness) != first:
                    break
                same.append(lines[next_][0].partition(" ")[0])
                next_ = last
            if len(same) > 1:
                kind = label.partition(" ")[2].strip("()")
                yield f"{same[0]} to {same[-1]} ({len(same)} x {kind})", None, depth
                yield from _folded(lines[at + 1 : end], likeness)
                at = next_
                continue
        yield lines[at]
        at += 1


def _end(lines: list[Line], at: int) -> int:
    """Return where the module that starts at a line ends."""
    end = at + 1
    while end < len(lines) and lines[end][2] > lines[at][2]:
        end += 1
    return end


def _is_next(lines: list[Line], at: int, depth: int, number: int) -> bool:
    label, geometry, own = lines[at]
    return geometry is None and own == depth and label.partition(" ")[0] == str(number + 1)


def _alike_block(
    lines: list[Line], at: int, end: int, likeness: Callable[[Geometry], tuple[Any, ...]]
) -> list[Any]:
    """Return what a module has in common with its repetitions: all but its own number."""
    kind = lines[at][0].partition(" ")[2]
    inside = [(label, depth, likeness(g) if g else None) for label, g, depth in lines[at + 1 : end]]
    return [kind, *inside]


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return one row of a table; a shape that is too wide goes on in further lines."""
    shapes = textwrap.wrap(cells[1], widths[1], subsequent_indent=" ") or [""]
    first = [cells[0], shapes[0], *cells[2:]]
    lines = ["  ".join(c.ljust(w) for c, w in zip(first, widths, strict=True)).rstrip()]
    return lines + [" " * (widths[0] + 2) + shape for shape in shapes[1:]]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Wrap notes; the entry of ``dims=`` at the end of one stays whole, on a line of its own."""
    wrapped = []
    for line in lines:
        text, brace, entry = line.partition("  {")
        wrapped += textwrap.wrap(text, COLUMNS, subsequent_indent="    ")
        if brace:
            fits = len(wrapped[-1]) + len(entry) + 3 <= COLUMNS
            wrapped[-1:] = [f"{wrapped[-1]}  {{{entry}"] if fits else [wrapped[-1], f"    {{{entry}"]
    return wrapped


def _prefixes(path: str) -> Iterator[str]:
    """Yield the path and all its ancestors, the root included."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
