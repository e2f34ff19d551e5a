"""analyze: from a model to the width geometry of its parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from mupass._capture.capture import Capture, parameter_names
from mupass._capture.inputs import as_call, find_inputs
from mupass._dims.constants import constant_notes, find_constants
from mupass._dims.given import account, settle
from mupass._dims.infer import Inference
from mupass._dims.names import DimNames
from mupass._dims.scaled import Scaled
from mupass._dims.second import Second, disagreements
from mupass._dims.solve import solve
from mupass._errors import InferenceError
from mupass._roles.branches import find_branches
from mupass._roles.carriers import readout_carriers
from mupass._roles.feeds import with_feeds
from mupass._roles.fused import find_fusions
from mupass._roles.geometry import Analysis, Geometry
from mupass._roles.normalized import find_normalized
from mupass._roles.roles import main_use, readout_uses, role_of, separate
from mupass._roles.sites import find_sites
from mupass._roles.weight_norm import self_divided, with_lengths

Base = int | float | Mapping[str, float] | nn.Module | None
BASE = 256  # of wider models, unless stated
NARROWEST, WIDEST = 1e-3, 1e9  # base sizes need not be whole, but a width is a number of units


def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    base: Base = None,
    dims: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Analysis:
    """Infer which dimensions of a model are widths.

    Args:
        model: Any module, on any device (meta included), in train or eval mode; it is not changed.
        example_inputs: A batch: a tensor, a tuple of positional inputs, a dict of keyword inputs, or
            ``(args, kwargs)``. May be left out where the model tells its input: by
            ``dummy_inputs``, ``pretrained_cfg`` or its first layer.
        base: The reference width, at which the plan equals standard parameterization. A number is the base
            size of the model's width (every other width keeps its ratio to it); a mapping gives base sizes
            by dimension name; a second instance of the architecture at another width (meta device
            suffices) gives them all and settles the verdict on every parameter axis. If left out 256, or
            the model's own width where that is less, so that a narrow model is not scaled at all.
        dims: Verdicts that you settle: ``{"pattern": "finite"}`` or ``"infinite"``. A pattern is a
            dimension name, or a regular expression that must match all of ``parameter:axis``.
        strict: Refuse operators without a rule; otherwise what depends on them is reported as ambiguous.

    Returns:
        The geometry of every parameter.

    Raises:
        CaptureError: The model has no parameters, or fails on the example inputs.
        InferenceError: No dimension grows, an operator is unknown, or ``base`` or ``dims`` fit nothing.
    """
    _check_base(base)
    parameter_names(model)  # refuses what cannot be analysed on any input
    args, kwargs = find_inputs(model) if example_inputs is None else as_call(example_inputs)
    other = base if isinstance(base, nn.Module) else None
    found = solve(model, args, kwargs, other, dims or {}, strict)
    # A second instance is the truth: what it settles, and otherwise than one model would, is for the report.
    settled = (*found.second.notes, *disagreements(found.alone, found.second.axes))
    notes = (*found.conflicts, *settled)
    analysis = _assemble(model, found.captured, found.solved, found.names, base, found.second, notes)
    return replace(analysis, notes=(*analysis.notes, *settled))


def _check_base(base: Base) -> None:
    """Refuse what is no reference width.

    Raises:
        InferenceError: A size is no positive number that a width may have, or a name is no text.
    """
    if base is None or isinstance(base, nn.Module):
        return
    sizes = dict(base) if isinstance(base, Mapping) else {"base": base}
    for name, size in sizes.items():
        number = isinstance(size, (int, float)) and not isinstance(size, bool)
        if not number or not NARROWEST <= size <= WIDEST:
            raise InferenceError(f"base sizes must be positive numbers up to {WIDEST:g}, not {size!r}")
        if not isinstance(name, str):
            raise InferenceError(f"base names dimensions by text, not {name!r}")


def _assemble(
    model: nn.Module,
    captured: Capture,
    solved: Inference,
    names: DimNames,
    base: Base,
    second: Second,
    notes: tuple[str, ...],
) -> Analysis:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    infinite = {n: tuple(solved.verdict(n, i).infinite for i in range(len(s))) for n, s in shapes.items()}
    if not any(any(row) for row in infinite.values()):
        raise InferenceError(
            f"no dimension of {type(model).__name__} grows: every axis is data, classes, a kernel or a "
            "table. If it has a width, name it: dims={'PARAMETER:AXIS': 'infinite'}"
        )
    width = _width(solved, shapes, infinite)
    base = min(BASE, width) if base is None else base
    sizes = _BaseSizes(solved, names, base, second, width)
    geometries, divided = [], dict[str, str]()
    sites = find_sites(captured)
    for name, shape in shapes.items():
        if isinstance(base, nn.Module):
            base_shape: tuple[float, ...] = tuple(base.get_parameter(name).shape)
        else:
            base_shape = tuple(sizes.of(d, f) for d, f in zip(solved.dims[name], infinite[name], strict=True))
        geometry = geometry_of(name, shape, base_shape, infinite[name], captured, solved, names)
        normalized = find_normalized(captured, solved, name) if geometry.role == "output" else ""
        if geometry.role in ("input", "output") and (where := self_divided(captured, solved, name)):
            divided[name] = where
            normalized = normalized or (where if geometry.role == "output" else "")
        geometries.append(replace(geometry, sites=sites.get(name, ()), normalized=normalized))
    geometries = with_lengths(geometries, captured)
    warnings = (*captured.warnings, *notes, *dict.fromkeys(solved.engine.facts.warnings))
    unread = tuple(f"{n} is not read by the captured forward pass" for n in solved.overlooked)
    # A recorded run saw one branch of the code. Where it met all parameters nothing asks for an answer.
    noted = (*unread, *captured.warnings) if captured.method == "export" or not unread else ()
    warnings += unread
    warnings += _attention_notes(solved)
    certain, doubtful = settle(find_constants(captured, solved), second)
    geometries, left = account(
        geometries, certain, captured, lambda d: solved.engine.space.size(d) / sizes.of_any(d)
    )
    warnings += constant_notes([*left, *doubtful], names.term, sizes.of_any)
    ratios = [
        w / b for g in geometries for w, b, f in zip(g.shape, g.base_shape, g.infinite, strict=True) if f
    ]
    base_width = width / ratios[0] if isinstance(base, nn.Module) else sizes.base_width
    warnings += tuple(_normalized_note(g) for g in geometries if g.normalized and g.name not in divided)
    warnings += tuple(_divided_note(name, where) for name, where in divided.items())
    branches = find_branches(captured)
    modules = tuple((name, type(module).__name__) for name, module in model.named_modules())
    geometries = [with_feeds(g, captured) for g in geometries]
    held = readout_carriers(captured, geometries)
    return Analysis(
        tuple(geometries), width, base_width, captured.method, warnings, modules, branches, held, noted
    )


def _width(
    solved: Inference, shapes: Mapping[str, tuple[int, ...]], infinite: Mapping[str, tuple[bool, ...]]
) -> int:
    """The width of a model is the growing dimension that most parameter axes carry (ties: the widest)."""
    read: Counter[int] = Counter()
    unread: Counter[int] = Counter()
    space = solved.engine.space
    for name, dims in solved.dims.items():
        grown = [d for d, f in zip(dims, infinite[name], strict=True) if f]
        (unread if name in solved.overlooked else read).update({space.find(d): 1 for d in grown})
    carried = read or unread
    return max((count, space.size(dim)) for dim, count in carried.items())[1]


class _BaseSizes:
    """Sizes at the base width: growing dimensions shrink by one common factor, terms follow their members."""

    def __init__(self, solved: Inference, names: DimNames, base: Base, second: Second, width: int):
        self.solved, self.space = solved, solved.engine.space
        self.given: dict[int, float] = dict(second.sizes)
        self.base_width: float = base if isinstance(base, (int, float)) else width
        if isinstance(base, Mapping):
            for name, size in base.items():
                found = names.find(name)
                if not found:
                    raise InferenceError(f"base names no dimension {name!r}; known are {sorted(names.all())}")
                self.given.update(dict.fromkeys(found, float(size)))
            factors = {s / self.space.size(d) for d, s in self.given.items()}
            self.base_width = width * next(iter(factors)) if len(factors) == 1 else width
        self.factor = self.base_width / width

    @cached_property
    def _scaled(self) -> Scaled:
        return Scaled(self.solved, self.given, self.factor)

    def of_any(self, dim: int) -> float:
        return self._scaled.exact(dim)

    def of(self, dim: int, infinite: bool) -> float:
        """Return the base size of an axis, whose verdict may be settled apart from its equals'."""
        if infinite == self.solved.verdicts.grows(dim) or self.space.find(dim) in self.given:
            return self._scaled.exact(dim)
        return self.space.size(dim) * self.factor if infinite else self.space.size(dim)


def geometry_of(
    name: str,
    shape: tuple[int, ...],
    base_shape: tuple[float, ...],
    infinite: tuple[bool, ...],
    captured: Capture,
    solved: Inference,
    names: DimNames,
) -> Geometry:
    """Describe one parameter.

    Args:
        name: Its name.
        shape: Its shape.
        base_shape: The shape at the width that multipliers are relative to.
        infinite: Verdict of each axis.
        captured: The graph.
        solved: The inference.
        names: Names of dimensions.

    Returns:
        Its geometry.
    """
    uses = tuple(dict.fromkeys(solved.uses.get(name, ())))
    use = main_use(uses, infinite)
    role = role_of(use, infinite)
    grown = tuple(i for i, f in enumerate(infinite) if f)
    if use is None or role == "vector":  # what grows is neither contracted nor made: it is fan_out of 1 input
        fans: tuple[tuple[int, ...], tuple[int, ...]] = (), grown or tuple(range(len(shape)))
    else:
        fans = separate(use.fan_in, use.fan_out)
    verdicts = [solved.verdict(name, i) for i in range(len(shape))]
    terms = tuple(names.term(d) for d in solved.dims[name])
    evidence = tuple(
        f"axis {i} ({term}) {'grows' if v.infinite else 'is fixed'}: {v.why}"
        for i, (term, v) in enumerate(zip(terms, verdicts, strict=True))
    )
    return Geometry(
        name=name,
        shape=shape,
        base_shape=base_shape,
        infinite=infinite,
        dims=terms,
        role=role,
        fan_in_axes=fans[0],
        fan_out_axes=fans[1],
        readout_uses=readout_uses(uses, role, infinite),
        uses=uses,
        evidence=evidence,
        ambiguous=tuple(v.policy for v in verdicts),
        aliases=tuple(captured.aliases.get(name, ())),
        fusions=find_fusions(solved, name, use.fan_out if use else ()),
    )


def _attention_notes(solved: Inference) -> tuple[str, ...]:
    """Attention whose head_dim grows needs logits scaled by 1/d, which no parameter can give."""
    notes = {}
    for dim, scale, where in solved.engine.facts.attention:
        size = solved.engine.space.size(dim)
        if solved.verdicts.grows(dim) and not (scale and math.isclose(scale, 1 / size, rel_tol=1e-5)):
            usual = scale is None or math.isclose(scale, size**-0.5, rel_tol=1e-5)
            instead = ", not 1/sqrt(head_dim)" if usual else f"; see that the scale given, {scale:.6g}, does"
            notes[where] = f"{where}: head_dim grows, so logits must scale as 1/head_dim{instead}"
    return tuple(notes.values())


def _normalized_note(geometry: Geometry) -> str:
    """Say of a readout that is normalized what that does, and what to write instead."""
    axes = ", ".join(f"'{geometry.name}:{i}': 'infinite'" for i in geometry.fan_out_axes)
    return (
        f"{geometry.name}: {geometry.normalized} divides what this readout puts out by its own size. That "
        "undoes its start at 1/sqrt(fan_in), and no scale keeps both its first step and the layers below it "
        "independent of the width. Normalize what it reads instead, put a fixed number in place of the "
        f"normalizer, or widen its output with the rest: dims={{{axes}}}"
    )


def _divided_note(name: str, where: str) -> str:
    """Say of an input or output weight that is divided by its own size what that does."""
    return (
        f"{name}: {where} divides this weight by its own size, which undoes its start: of an input layer "
        "that size is sqrt(fan_out), of a readout it should shrink like 1/sqrt(fan_in) and cannot. Leave it "
        "undivided, or give it a learned length by torch.nn.utils.parametrizations.weight_norm"
    )
