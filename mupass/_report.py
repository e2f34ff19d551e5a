"""The result of an analysis, and its report: the user's own module tree with a verdict on every axis."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mupass._errors import PlanError
from mupass._page import aligned, column_widths, document, note
from mupass._records import Branch, Carrier, Geometry, ScoreScale
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.scales import Scales, scales
from mupass._walks import ancestors

if TYPE_CHECKING:
    import networkx

COLUMNS, NAMES = 100, 48  # widest table, widest name in it
SHAPE = 1  # the column of shapes, which is wrapped where the table is too wide


@dataclass(frozen=True)
class Line:
    """One line of the module tree.

    Attributes:
        label: Name of the parameter, or name and class of the module.
        geometry: The parameter; None for a module.
        depth: How deep it lies in the tree.
    """

    label: str
    geometry: Geometry | None
    depth: int

    @property
    def name(self) -> str:
        """Name of the module without its class: the number of a repeated block."""
        return self.label.partition(" ")[0]

    @property
    def kind(self) -> str:
        """Class of the module, in brackets."""
        return self.label.partition(" ")[2]


@dataclass(frozen=True)
class Analysis:
    """Result of width inference on one model.

    Attributes:
        geometries: One record for each parameter, in the order of ``named_parameters()``.
        width: Size of the dimension that names the model's width (d_model in a transformer).
        base_width: Width at which the plan equals standard parameterization.
        capture: How the graph was obtained: ``export`` or ``recorded run``.
        warnings: What the reader must know: policies applied, operators treated by shape.
        modules: (qualified name, class name) of every module, in the model's own order.
        branches: Residual branches, in the order of execution.
        carriers: For every tied readout, what can hold its multiplier in the place of a hook.
        notes: Those of the warnings that change no result; only the report shows them.
        scores: Factors on attention scores whose head_dim grows.
        open_output: Whether what the model puts out first grows with its width.
    """

    geometries: tuple[Geometry, ...]
    width: int
    base_width: float
    capture: str
    warnings: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    branches: tuple[Branch, ...] = ()
    carriers: tuple[Carrier, ...] = ()
    notes: tuple[str, ...] = ()
    scores: tuple[ScoreScale, ...] = ()
    open_output: bool = False

    def __getitem__(self, name: str) -> Geometry:
        """Return the geometry of a parameter, by any of its names.

        Args:
            name: Qualified name; a tied parameter answers to all of its names.

        Raises:
            PlanError: No parameter has that name.
        """
        for geometry in self.geometries:
            if name in geometry.names:
                return geometry
        raise PlanError(f"no parameter {name!r} in this analysis")

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over names, in the order of ``named_parameters()``; aliases left out."""
        return (geometry.name for geometry in self.geometries)

    def __len__(self) -> int:
        """Return the number of distinct parameters."""
        return len(self.geometries)

    def __contains__(self, name: object) -> bool:
        """Return whether a parameter goes by that name."""
        return any(name in geometry.names for geometry in self.geometries)

    def report(self, optimizer: str = "adamw", parameterization: str = "mup") -> Report:
        """Return the readable report: text, HTML, or a networkx graph.

        Args:
            optimizer: Whose scales the report shows.
            parameterization: Under which parameterization.
        """
        return Report(self, optimizer, parameterization)


@dataclass(frozen=True)
class Report:
    """An analysis made readable.

    Attributes:
        analysis: The analysis.
        optimizer: Optimizer whose learning-rate factors are shown.
        parameterization: Parameterization that they belong to.

    Example:
        >>> import mupass, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> report = mupass.analyze(model, base=8).report("sgd")
        >>> print(report.text().splitlines()[5])
            weight    [0.out=32*, 6]  input   1     4
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
        rows = [self._headings()]
        for line in _folded(list(self._lines()), self._likeness):
            cells = ["", "", "", ""]
            if line.geometry is not None:
                cells = self._cells(line.geometry)
            rows.append([_cut("  " * line.depth + line.label, NAMES), *cells])
        widths = column_widths(rows)
        # Two blanks between the columns; what is too much for the page is taken from the shapes.
        others = sum(widths) - widths[SHAPE] + 2 * (len(widths) - 1)
        widths[SHAPE] = min(widths[SHAPE], COLUMNS - others)
        head, *lines = [aligned(_wrapped_row(row, widths[SHAPE]), widths) for row in rows]
        rule = "-" * (others + widths[SHAPE])
        return "\n".join([*textwrap.wrap(self._headline(), COLUMNS), head, rule, *lines, *self._notes()])

    def _headings(self) -> list[str]:
        return ["parameter", "shape", "role", "init", f"lr ({self.optimizer})"]

    def _notes(self) -> list[str]:
        """Return the footer, wrapped."""
        wrapped = []
        for line in self._footer():
            wrapped += _wrapped_note(line)
        return wrapped

    def record(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        analysis = self.analysis
        return {
            "model": self._model(),
            "width": analysis.width,
            "base_width": analysis.base_width,
            "parameterization": self.parameterization,
            "optimizer": self.optimizer,
            "capture": analysis.capture,
            "warnings": list(analysis.warnings),
            "questions": [vars(question) for question in self.questions()],
            "parameters": [self._parameter(geometry) for geometry in analysis.geometries],
        }

    def _model(self) -> str:
        """Return the class of the model; the first module is the root."""
        modules = self.analysis.modules
        return modules[0][1] if modules else "model"

    def _parameter(self, geometry: Geometry) -> dict[str, Any]:
        factors = asdict(self.scales(geometry))
        del factors["lr_powers"]
        return {
            "name": geometry.name,
            "aliases": list(geometry.aliases),
            "shape": list(geometry.shape),
            "base_shape": list(geometry.base_shape),
            "dims": list(geometry.dims),
            "grows": list(geometry.infinite),
            "ambiguous": list(geometry.ambiguous),
            "role": geometry.role,
            **factors,
        }

    def _likeness(self, geometry: Geometry) -> tuple[Hashable, ...]:
        """Return what parameters of repeated blocks have in common."""
        factors = self.scales(geometry)
        own_name = geometry.name if geometry.aliases else ""  # a tie is of this block alone
        verdicts = geometry.shape, geometry.role, geometry.infinite, geometry.ambiguous
        return *verdicts, factors.init, factors.lr, own_name

    def html(self) -> str:
        """Return one self-contained HTML page; hovering over an axis shows the evidence."""
        body = []
        for line in self._lines():
            indent = f' style="padding-left:{1.2 * line.depth:.1f}rem"'
            if line.geometry is None:
                label = html.escape(line.label)
                body.append(f'<tr class="module"><td colspan="5"{indent}>{label}</td></tr>')
            else:
                body.append(self._html_row(line.label, line.geometry, indent))
        notes = [f'<li class="warn">{html.escape(line)}</li>' for line in self._footer()]
        return document(
            "mupass report",
            f"<h1>Width analysis</h1>{note(self._headline())}"
            f"{note('Blue axes grow with width; dotted ones were settled by a policy.')}"
            f"<table><tr><th>{'</th><th>'.join(self._headings())}</th></tr>{''.join(body)}</table>"
            f"<ul>{''.join(notes)}</ul>",
        )

    def graph(self) -> networkx.DiGraph:
        """Return parameters and dimensions as a bipartite graph.

        A parameter points to the dimensions that it makes (fan_out); the dimensions that it contracts
        (fan_in) point to it. Nodes have ``kind`` (``parameter`` or ``dimension``) and ``infinite`` or
        ``role``.
        """
        import networkx

        graph = networkx.DiGraph()
        for geometry in self.analysis.geometries:
            name = geometry.name
            graph.add_node(name, kind="parameter", role=geometry.role)
            for axis, (term, grows) in enumerate(zip(geometry.dims, geometry.infinite, strict=True)):
                graph.add_node(term, kind="dimension", infinite=grows)
                if axis in geometry.fan_in_axes:
                    graph.add_edge(term, name, axis=axis)
                else:
                    graph.add_edge(name, term, axis=axis)
        return graph

    def _lines(self) -> Iterator[Line]:
        """Yield modules and their parameters in the model's own order."""
        owned: dict[str, list[Geometry]] = {}
        for geometry in self.analysis.geometries:
            owned.setdefault(geometry.name.rpartition(".")[0], []).append(geometry)
        # A module without parameters in it has no line.
        used: set[str] = set()
        for owner in owned:
            used.update(ancestors(owner))
        modules = self.analysis.modules or [(path, "") for path in owned]
        for path, kind in modules:
            if path not in used:
                continue
            if path:
                depth = path.count(".") + 1
                yield Line(f"{path.rpartition('.')[2]} ({kind})", None, depth)
            else:
                depth = 0
                yield Line(kind, None, depth)
            for geometry in owned.get(path, ()):
                yield Line(geometry.name.rpartition(".")[2], geometry, depth + 1)

    def _cells(self, geometry: Geometry) -> list[str]:
        """Return shape, role, and factors of a parameter."""
        axes = []
        for label, grows, policy in zip(
            _axis_labels(geometry), geometry.infinite, geometry.ambiguous, strict=True
        ):
            # The marks are explained in the headline: grows with width, decided by a policy.
            axes.append(label + "*" * grows + "?" * policy)
        shape = f"[{', '.join(axes)}]"
        if geometry.aliases:
            shape += f" (tied: {', '.join(geometry.aliases)})"
        factors = self.scales(geometry)
        return [shape, geometry.role, f"{factors.init:.4g}", f"{factors.lr:.4g}"]

    def _html_row(self, label: str, geometry: Geometry, indent: str) -> str:
        axes = []
        for axis, text in enumerate(_axis_labels(geometry)):
            kind = "inf" if geometry.infinite[axis] else "fix"
            if geometry.ambiguous[axis]:
                kind += " maybe"
            reason = html.escape(geometry.evidence[axis])
            axes.append(f'<span class="{kind}" title="{reason}">{html.escape(text)}</span>')
        shape = " × ".join(axes)
        if geometry.aliases:
            shape += f" <span class='fix'>tied: {html.escape(', '.join(geometry.aliases))}</span>"
        factors = self.scales(geometry)
        return (
            f'<tr><td class="name"{indent}>{html.escape(label)}</td><td>{shape}</td>'
            f'<td class="role-{geometry.role}">{geometry.role}</td>'
            f"<td>{factors.init:.4g}</td><td>{factors.lr:.4g}</td></tr>"
        )

    def _headline(self) -> str:
        analysis = self.analysis
        return (
            f"{self._model()}: width {analysis.width}, base width {analysis.base_width:g}, "
            f"{self.parameterization}, captured by {analysis.capture}; * grows with width, ? by policy"
        )

    def questions(self) -> list[Question]:
        """Return what one model could not settle, repeated blocks taken together."""
        groups: dict[tuple[str, bool], list[tuple[Geometry, int]]] = {}
        for geometry in self.analysis.geometries:
            for axis, policy in enumerate(geometry.ambiguous):
                if policy:
                    groups.setdefault(_reason(geometry, axis), []).append((geometry, axis))
        return list(map(Question.of, groups.values()))

    def _footer(self) -> list[str]:
        lines = [f"note: {warning}" for warning in self.analysis.warnings]
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
        geometry, axis = found[0]
        grows = geometry.infinite[axis]
        path = f"{geometry.name}:{axis}"
        pattern = re.escape(path)
        if len(found) > 1:
            # Any number in the place of a block's own: blocks.0.weight -> blocks\.\d+\.weight
            pattern = re.sub(r"(?:(?<=\.)|^)\d+(?=\\\.)", r"\\d+", pattern)
        opposite = "finite" if grows else "infinite"
        reason = geometry.evidence[axis].partition(": ")[2].removeprefix("policy: ")
        override = f"{{{pattern!r}: {opposite!r}}}"
        return cls(path, geometry.shape[axis], len(found), grows, reason, override)

    def __str__(self) -> str:
        """Return one line with the verdict, the reason and the override."""
        remainder = f" and {self.count - 1} more" if self.count > 1 else ""
        verdict = "grows" if self.infinite else "is fixed"
        return f"{self.axis}{remainder} (size {self.size}) {verdict}: {self.why}  {self.override}"


def _axis_labels(geometry: Geometry) -> list[str]:
    """Return the axes as ``name=size``, or the size alone where there is no name."""
    labels = []
    for size, term in zip(geometry.shape, geometry.dims, strict=True):
        labels.append(str(size) if term == str(size) else f"{term}={size}")
    return labels


def _reason(geometry: Geometry, axis: int) -> tuple[str, bool]:
    """Return what axes have in common that one reason settles; block numbers do not count."""
    # "axis 0 (name) grows: why", without the first two words.
    decision = geometry.evidence[axis].split(" ", 2)[-1]
    return re.sub(r"\d+", "#", decision), geometry.infinite[axis]


Likeness = Callable[[Geometry], tuple[Hashable, ...]]


def _folded(lines: list[Line], likeness: Likeness) -> Iterator[Line]:
    """Yield the lines of a module tree, of neighboring numbered modules that are alike the first alone."""
    start = 0
    while start < len(lines):
        line, end = lines[start], _end(lines, start)
        # A digit as its name makes a module one of a list: blocks.0, blocks.1.
        blocks, next_line = _repetitions(lines, start, likeness)
        if len(blocks) > 1:
            kind = line.kind.strip("()")
            yield Line(f"{blocks[0]} to {blocks[-1]} ({len(blocks)} x {kind})", None, line.depth)
            yield from _folded(lines[start + 1 : end], likeness)
            start = next_line
        else:
            yield line
            start += 1


def _repetitions(lines: list[Line], start: int, likeness: Likeness) -> tuple[list[str], int]:
    """Return the names of a module and of those after it that are alike, and where the last one ends."""
    line, end = lines[start], _end(lines, start)
    blocks = [line.name]
    if line.geometry is not None or not line.name.isdigit():
        return blocks, end
    first_block = _block(lines, start, end, likeness)
    # blocks.3 after blocks.2, with the same parameters, shapes and verdicts.
    while end < len(lines) and _is_next(lines[end], line.depth, int(blocks[-1])):
        next_end = _end(lines, end)
        if _block(lines, end, next_end, likeness) != first_block:
            break
        blocks.append(lines[end].name)
        end = next_end
    return blocks, end


def _end(lines: list[Line], start: int) -> int:
    """Return where the module that starts at a line ends."""
    end = start + 1
    while end < len(lines) and lines[end].depth > lines[start].depth:
        end += 1
    return end


def _is_next(line: Line, depth: int, number: int) -> bool:
    return line.geometry is None and line.depth == depth and line.name == str(number + 1)


def _block(lines: list[Line], start: int, end: int, likeness: Likeness) -> list[Any]:
    """Return what a module has in common with its repetitions: all but its own number."""
    block: list[Any] = [lines[start].kind]
    for line in lines[start + 1 : end]:
        common = likeness(line.geometry) if line.geometry else None
        block.append((line.label, line.depth, common))
    return block


def _wrapped_row(row: Sequence[str], width: int) -> list[list[str]]:
    """Return one row of a table; a shape that is too wide goes on in further rows."""
    first, *more = textwrap.wrap(row[SHAPE], width, subsequent_indent=" ") or [""]
    rows = [[row[0], first, *row[2:]]]
    return rows + [["", shape, "", "", ""] for shape in more]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _wrapped_note(line: str) -> list[str]:
    """Wrap a note; the entry of ``dims=`` at its end stays whole, on a line of its own if need be."""
    text, brace, entry = line.partition("  {")
    wrapped = textwrap.wrap(text, COLUMNS, subsequent_indent="    ")
    if brace and len(wrapped[-1]) + len(entry) + 3 <= COLUMNS:
        wrapped[-1] += brace + entry
    elif brace:
        wrapped.append(f"    {{{entry}")
    return wrapped
