"""The report: the user's own module tree with a verdict on every axis, as text, HTML or a graph."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mupass._roles.geometry import Analysis, Geometry
from mupass._scales.scales import Scales, scales
from mupass._scales.spec import OptimizerSpec

if TYPE_CHECKING:
    import networkx

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
        """Return the module tree, one line a parameter.

        Growing axes carry ``*``, axes that a policy decided ``?``.
        """
        rows = [
            (*self._cells(g), depth) if g else (label, "", "", "", "", depth)
            for label, g, depth in self._lines()
        ]
        names = ["  " * depth + name for name, *_, depth in rows]
        columns: list[list[str]] = [names, *([str(r[i]) for r in rows] for i in range(1, 5))]
        heads = ("parameter", "shape", "role", "init", f"lr ({self.optimizer})")
        widths = [max(len(cell) for cell in (h, *c)) for h, c in zip(heads, columns, strict=True)]
        table: list[tuple[str, ...]] = [heads, *zip(*columns, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
        return "\n".join([self._headline(), *lines, *self._footer()])

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
            f"captured by {a.capture}; * grows with width, ? settled by a policy"
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


def _prefixes(path: str) -> Iterator[str]:
    """Yield the path and all its ancestors, the root included."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
