"""analyze: from a model to the width geometry of its parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from mupass._capture.graph import Capture, parameter_names
from mupass._capture.inputs import as_call, find_inputs
from mupass._dims.base_shapes import BaseShapes
from mupass._dims.infer import Inference
from mupass._dims.names import DimNames
from mupass._dims.scaled import Scaled
from mupass._dims.second_instance import Second, disagreements
from mupass._dims.solve import solve
from mupass._errors import InferenceError, is_number
from mupass._records import Axes, Geometry, ScoreScale, Shape, Site
from mupass._report import Analysis
from mupass._roles.branches import find_branches
from mupass._roles.carriers import readout_carriers
from mupass._roles.feeds import with_feeds
from mupass._roles.forward_scales import account, settle
from mupass._roles.forward_scales_search import constant_notes, find_constants
from mupass._roles.fused import find_fusions
from mupass._roles.nodes import place_of
from mupass._roles.normalized import find_normalized
from mupass._roles.one_sided import find_one_sided
from mupass._roles.roles import main_use, readout_uses, role_of, separate
from mupass._roles.scores import find_scores, settled_places, without_settled
from mupass._roles.sites import find_sites
from mupass._roles.weight_norm import self_divided, with_lengths
from mupass._scales.checks import MATRICES, as_used

Base = int | float | Mapping[str, float] | nn.Module | str | PathLike[str] | BaseShapes | None
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
            suffices) gives them all and settles the verdict on every parameter axis, and so does a file of
            base shapes that microsoft/mup wrote (its path). If left out 256, or the model's own width where
            that is less, so that a narrow model is not scaled at all.
        dims: Verdicts that you settle: ``{"pattern": "finite"}`` or ``"infinite"``. A pattern is a
            dimension name, or a regular expression that must match all of ``parameter:axis``.
        strict: Refuse operators without a rule; otherwise what depends on them is reported as ambiguous.

    Returns:
        The geometry of every parameter.

    Raises:
        CaptureError: The model has no parameters, or fails on the example inputs.
        InferenceError: No dimension grows, an operator is unknown, or ``base`` or ``dims`` fit nothing.

    Example:
        >>> import mupass, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> mupass.analyze(model)["2.weight"].role
        'output'
    """
    # A path is read before the model is captured, so that a bad file is told at once.
    if isinstance(base, (str, PathLike)):
        base = BaseShapes.read(Path(base))
    _check_base(base)
    parameter_names(model)  # refuses what cannot be analysed on any input
    args, kwargs = find_inputs(model) if example_inputs is None else as_call(example_inputs)
    # A number and a mapping say nothing about verdicts; a second instance and its file do.
    second_instance = base if isinstance(base, (nn.Module, BaseShapes)) else None
    solution = solve(model, args, kwargs, second_instance, dims or {}, strict)
    solved = solution.solved
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    infinite = {}
    for name, shape in shapes.items():
        infinite[name] = tuple(solved.verdict(name, axis).infinite for axis in range(len(shape)))
    inferred = _Inferred(model, solution.captured, solved, solution.names, solution.second, shapes, infinite)
    # A second instance is the truth: what it settles, and otherwise than one model would, is for the report.
    settled = (*solution.second.notes, *disagreements(solution.alone, solution.second.axes))
    analysis = _assemble(inferred, base, (*solution.conflicts, *settled))
    return replace(analysis, notes=(*analysis.notes, *settled))


def _check_base(base: Any) -> None:
    """Refuse what is no reference width.

    Raises:
        InferenceError: A size is no positive number that a width may have, or a name is no text.
    """
    if base is None or isinstance(base, (nn.Module, BaseShapes)):
        return
    sizes = dict(base) if isinstance(base, Mapping) else {"base": base}
    if not sizes:
        raise InferenceError("base={} names no dimension; leave it out, or give a width")
    for name, size in sizes.items():
        if not is_number(size) or not NARROWEST <= size <= WIDEST:
            raise InferenceError(f"base sizes must be positive numbers up to {WIDEST:g}, not {size!r}")
        if not isinstance(name, str):
            raise InferenceError(f"base names dimensions by text, not {name!r}")


@dataclass(frozen=True)
class _Inferred:
    """What was inferred of a model, and how its axes are judged.

    Attributes:
        model: The model.
        captured: Its graph.
        solved: The inference.
        names: Names of dimensions.
        second: A second instance, where there is one.
        shapes: Parameter -> shape.
        infinite: Parameter -> for every axis, whether it grows.
    """

    model: nn.Module
    captured: Capture
    solved: Inference
    names: DimNames
    second: Second
    shapes: Mapping[str, Shape]
    infinite: Mapping[str, tuple[bool, ...]]

    def geometries(self, base: Base, sizes: _BaseSizes) -> tuple[list[Geometry], dict[str, str]]:
        """Describe every parameter.

        Args:
            base: The reference width, or a second instance at it.
            sizes: Sizes at that width.

        Returns:
            The geometries, and the input and output weights that an operator divides by their own size: name
            -> operator.
        """
        captured, solved = self.captured, self.solved
        sites = find_sites(captured)
        geometries, divided = [], dict[str, str]()
        for name, shape in self.shapes.items():
            infinite = self.infinite[name]
            # Base sizes by authority: a second instance, a file, or sizes scaled by one factor.
            if isinstance(base, nn.Module):
                base_shape: tuple[float, ...] = tuple(base.get_parameter(name).shape)
            elif isinstance(base, BaseShapes):
                base_shape = base.of(name, shape)
            else:
                base_shape = tuple(map(sizes.of, solved.dims[name], infinite))
            geometry = geometry_of(name, shape, base_shape, infinite, captured, solved, self.names)
            normalized = ""
            if geometry.role == "output":
                normalized = find_normalized(captured, solved, name)
            # Spectral norm and weights of unit length: w / |w|, with w of an input or output layer.
            if geometry.role in ("input", "output"):
                operator = self_divided(captured, solved, name)
                if operator:
                    divided[name] = operator
                    # Of a readout both may be found; the division of its output comes first.
                    if geometry.role == "output":
                        normalized = normalized or operator
            own_sites = tuple(_with_form(site, geometry) for site in sites.get(name, ()))
            geometries.append(replace(geometry, sites=own_sites, normalized=normalized))
        return with_lengths(geometries, captured), divided


def _with_form(site: Site, geometry: Geometry) -> Site:
    """Return a site, without its form where no use of the parameter contracts the same axes.

    Of two parameters that are multiplied, as the shares and the matrices of ``shares @ basis``, the inference
    takes one for the weight.
    """
    if site.kind not in MATRICES or as_used(site, geometry):
        return site
    reason = f"{site.operator} multiplies it with another parameter, which is taken for the weight"
    return Site("", site.operator, site.module, sources=site.sources, reason=reason)


def _assemble(inferred: _Inferred, base: Base, notes: tuple[str, ...]) -> Analysis:
    """Put geometries, branches and warnings of a model into one record.

    Args:
        inferred: What was inferred.
        base: The reference width.
        notes: What the inference has to say.

    Raises:
        InferenceError: Nothing grows.
    """
    captured, solved, names = inferred.captured, inferred.solved, inferred.names
    if not any(map(any, inferred.infinite.values())):
        raise InferenceError(
            f"no dimension of {type(inferred.model).__name__} grows: every axis is data, classes, a kernel "
            "or a table. If it has a width, name it: dims={'PARAMETER:AXIS': 'infinite'}"
        )
    width = _width(solved, inferred.infinite)
    # A model narrower than 256 is its own base: nothing is scaled.
    if base is None:
        base = min(BASE, width)
    sizes = _BaseSizes(solved, names, base, inferred.second, width)
    geometries, divided = inferred.geometries(base, sizes)

    # Factors that the code puts on activations, such as 1/sqrt(d_model): they act like multipliers.
    certain, doubtful = settle(find_constants(captured, solved), inferred.second)

    def growth(dim: int) -> float:
        return solved.engine.space.size(dim) / sizes.of_any(dim)

    geometries, unaccounted = account(geometries, certain, captured, growth)
    geometries = [with_feeds(geometry, captured) for geometry in geometries]
    named = [*unaccounted, *doubtful]
    scores, reasons = find_scores(inferred.model, captured, solved, geometries, named, growth)

    unread = tuple(f"{name} is not read by the captured forward pass" for name in solved.overlooked)
    warnings = (
        *captured.warnings,
        *notes,
        *dict.fromkeys(solved.engine.facts.warnings),
        *unread,
        *_attention_notes(solved, scores, reasons),
        *constant_notes(without_settled(named, scores), names.term, sizes.of_any),
        *_one_sided_notes(captured, solved, geometries),
        *(
            _normalized_note(geometry)
            for geometry in geometries
            if geometry.normalized and geometry.name not in divided
        ),
        *(_divided_note(name, operator) for name, operator in divided.items()),
    )
    # A recorded run saw one branch of the code. Where it met all parameters nothing asks for an answer.
    report_only: tuple[str, ...] = ()
    if captured.method == "export" or not unread:
        report_only = (*unread, *captured.warnings)
    base_width = sizes.base_width
    # A second instance has base sizes and no base width: the ratio of an axis tells it.
    if isinstance(base, (nn.Module, BaseShapes)):
        base_width = _ratio_to_base(geometries, width)
    return Analysis(
        geometries=tuple(geometries),
        width=width,
        base_width=base_width,
        capture=captured.method,
        warnings=warnings,
        modules=tuple((name, type(module).__name__) for name, module in inferred.model.named_modules()),
        branches=find_branches(captured),
        carriers=readout_carriers(captured, geometries),
        notes=report_only,
        scores=scores,
        open_output=any(solved.grows(dim) for dim in solved.output),
    )


def _one_sided_notes(captured: Capture, solved: Inference, geometries: Iterable[Geometry]) -> list[str]:
    """Name weights that sum over a side that grows after a function has given their entries a mean."""
    notes = []
    for geometry in geometries:
        if not geometry.sums_change:
            continue
        function = find_one_sided(captured, solved, geometry.name, geometry.fan_in)
        if function is not None:
            notes.append(
                f"{place_of(function, captured.owners)}: gives the entries of {geometry.name} a mean, so "
                "sums over them grow with the width, whatever the size of the weight; divide the product by "
                "the number of its terms, or take a function with f(-w) = -f(w), such as tanh"
            )
    return notes


def _ratio_to_base(geometries: Iterable[Geometry], width: int) -> float:
    """Return the width of a base model: the first axis that grows tells the ratio."""
    geometry = next(geometry for geometry in geometries if any(geometry.infinite))
    axis = geometry.infinite.index(True)
    return width / (geometry.shape[axis] / geometry.base_shape[axis])


def _width(solved: Inference, infinite: Mapping[str, tuple[bool, ...]]) -> int:
    """The width of a model is the growing dimension that most parameter axes carry (ties: the widest).

    An axis of equal blocks that no weight reads as a whole (the gates of a recurrent cell, a gate with its
    value) carries the dimension of one block as well: the width of an LSTM is its hidden size.
    """
    carriers: Counter[int] = Counter()
    unread_carriers: Counter[int] = Counter()
    space, contracted = solved.engine.space, _contracted(solved)
    for name, dims in solved.dims.items():
        # An axis counts once for each parameter that carries it.
        grown = {space.find(dim) for dim, grows in zip(dims, infinite[name], strict=True) if grows}
        for dim in grown - contracted:
            grown |= _block_of(solved, dim)
        counts = unread_carriers if name in solved.overlooked else carriers
        counts.update(grown)
    # Parameters that nothing reads speak only where there are no others.
    carried = carriers or unread_carriers
    _, size = max((count, space.size(dim)) for dim, count in carried.items())
    return size


def _contracted(solved: Inference) -> set[int]:
    """Return the dimensions that some weight sums over."""
    contracted: set[int] = set()
    for name, uses in solved.uses.items():
        for use in uses:
            contracted.update(solved.engine.space.find(solved.dims[name][axis]) for axis in use.fan_in)
    return contracted


def _block_of(solved: Inference, dim: int) -> set[int]:
    """Return the growing dimension of which a dimension is a fixed number of blocks, if it is."""
    space = solved.engine.space
    # product(number of blocks, block), as a view that splits the axis makes it
    counting = set(map(space.find, solved.engine.facts.enumerated))
    products = [members for members in space.terms_of(dim, "product") if len(members) == 2]
    blocks = {block for count, block in products if count in counting}
    # sum(block, block, ...), as chunk makes it
    blocks |= {parts[0] for parts in space.terms_of(dim, "sum") if len(set(parts)) == 1}
    return set(filter(solved.verdicts.grows, blocks))


class _BaseSizes:
    """Sizes at the base width: growing dimensions shrink by one common factor, terms follow their members."""

    def __init__(self, solved: Inference, names: DimNames, base: Base, second: Second, width: int):
        self.solved, self.space = solved, solved.engine.space
        self.given: dict[int, float] = dict(second.sizes)
        self.base_width: float = base if isinstance(base, (int, float)) else width
        if isinstance(base, Mapping):
            for name, size in base.items():
                of_that_name = names.find(name)
                if not of_that_name:
                    raise InferenceError(f"base names no dimension {name!r}; known are {sorted(names.all())}")
                self.given.update(dict.fromkeys(of_that_name, float(size)))
            # {"d_model": 64, "d_ff": 256}: where all sizes are in one ratio, so is the width.
            factors = {size / self.space.size(dim) for dim, size in self.given.items()}
            # Sizes of one ratio give the width that ratio too.
            if len(factors) == 1:
                self.base_width = width * factors.pop()
        self.factor = self.base_width / width

    @cached_property
    def _scaled(self) -> Scaled:
        return Scaled(self.solved, self.given, self.factor)

    def of_any(self, dim: int) -> float:
        return self._scaled.exact(dim)

    def of(self, dim: int, infinite: bool) -> float:
        """Return the base size of an axis, whose verdict may be settled apart from its equals'."""
        # The caller may settle an axis differently from its dimension, in dims= of parameter:axis.
        if infinite == self.solved.verdicts.grows(dim) or self.space.find(dim) in self.given:
            return self._scaled.exact(dim)
        return self.space.size(dim) * self.factor if infinite else self.space.size(dim)


def geometry_of(
    name: str,
    shape: Shape,
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
    fan_in_axes: Axes = ()
    if use is None or role == "vector":  # what grows is neither contracted nor made: it is fan_out of 1 input
        growing_axes = tuple(axis for axis, grows in enumerate(infinite) if grows)
        fan_out_axes = growing_axes or tuple(range(len(shape)))
    else:
        fan_in_axes, fan_out_axes = separate(use.fan_in, use.fan_out)
    terms = tuple(map(names.term, solved.dims[name]))
    verdicts = [solved.verdict(name, axis) for axis in range(len(shape))]
    evidence = []
    for axis, verdict in enumerate(verdicts):
        decision = "grows" if verdict.infinite else "is fixed"
        evidence.append(f"axis {axis} ({terms[axis]}) {decision}: {verdict.why}")
    return Geometry(
        name=name,
        shape=shape,
        base_shape=base_shape,
        infinite=infinite,
        dims=terms,
        role=role,
        fan_in_axes=fan_in_axes,
        fan_out_axes=fan_out_axes,
        readout_uses=readout_uses(uses, role, infinite),
        uses=uses,
        evidence=tuple(evidence),
        ambiguous=tuple(verdict.policy for verdict in verdicts),
        aliases=tuple(captured.aliases.get(name, ())),
        fusions=find_fusions(solved, name, use.fan_out if use else ()),
    )


def _attention_notes(
    solved: Inference, scores: Iterable[ScoreScale], reasons: Mapping[str, str]
) -> tuple[str, ...]:
    """Say of attention whose head_dim grows that logits must scale as 1/head_dim.

    Args:
        solved: The inference.
        scores: Those that get a factor.
        reasons: Why others get none.
    """
    notes = {}
    settled = settled_places(scores)
    for kernel in solved.engine.facts.attention:
        size, scale, where = solved.engine.space.size(kernel.dim), kernel.scale, kernel.where
        # q and k align in training, so that logits grow like head_dim (arXiv 2203.03466).
        by_size = scale is not None and math.isclose(scale, 1 / size, rel_tol=1e-5)
        if where in settled or by_size or not solved.verdicts.grows(kernel.dim):
            continue
        instead = ", not 1/sqrt(head_dim)"
        if scale is not None and not math.isclose(scale, size**-0.5, rel_tol=1e-5):
            instead = f"; see that the scale given, {scale:.6g}, does"
        why = f" (mupass cannot put that there: {reasons[where]})" if where in reasons else ""
        notes[where] = f"{where}: head_dim grows, so logits must scale as 1/head_dim{instead}{why}"
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
