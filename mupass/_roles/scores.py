"""Attention scores whose head_dim grows: which modules put out the queries, so that a factor can go there.

Queries and keys align in training, so that ``q @ k`` grows like head_dim then, and not like its root (Yang et
al., arXiv 2203.03466). Code divides by the root. The missing ``sqrt(base / head_dim)`` is the same factor on
scores and on queries, and queries are what some module puts out: alone, or as a part (one layer for queries,
keys and values). Whether a factor on them is one on the scores, and whether it reaches anything else, is
tried on random numbers, with the operators between the module and the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import flatten, is_getitem, operator_name, shape_of
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait
from mupass._records import Geometry, Ranges, ScoreScale
from mupass._roles.carriers import carriers
from mupass._roles.forward_scales_search import PASS_ONE, PRODUCTS, Constant
from mupass._roles.nodes import is_inside, is_parametric, leaves, made_of, place_of, tensors_among, traits_of
from mupass._walks import walk

Growth = Callable[[int], float]
LARGEST = 2**26  # numbers of a tensor that is tried out
# Operators that put entries elsewhere, or take some of them.
MOVES = {"slice", "select", "narrow", "index_select", "chunk", "split", "split_with_sizes", "unbind"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Unreachable(Exception):
    """No module can hold the factor; the text says why."""


@dataclass(frozen=True)
class _Place:
    """Scores that are to be multiplied.

    Attributes:
        where: Operator and module.
        growth: head_dim relative to its base size.
        reader: The operator that computes the scores.
        queries: One of its factors; a factor on it is one on the scores.
    """

    where: str
    growth: float
    reader: Node
    queries: Node


@dataclass(frozen=True)
class _Feed:
    """What a module puts out that becomes queries.

    Attributes:
        node: The module's output.
        module: Its name.
        parts: As in `ScoreScale`.
        axis: As in `ScoreScale`.
    """

    node: Node
    module: str
    parts: Ranges = ()
    axis: int = -1


_Fed = tuple[_Place, list[_Feed]]  # scores, and what becomes their queries


def find_scores(
    model: nn.Module,
    captured: Capture,
    solved: Inference,
    geometries: Sequence[Geometry],
    constants: Iterable[Constant],
    growth: Growth,
) -> tuple[tuple[ScoreScale, ...], dict[str, str]]:
    """Find where scores whose head_dim grows get their factor.

    Args:
        model: The model.
        captured: Its graph.
        solved: Its inference.
        geometries: Its parameters.
        constants: Numbers in the forward pass that are powers of a width.
        growth: Size of a dimension relative to its base size.

    Returns:
        The factors, and for scores that no module can give one: operator and module -> why.
    """
    search = _Search(model, captured, solved)
    found: list[_Fed] = []
    whole: dict[str, _Place] = {}
    reasons: dict[str, str] = {}
    for place in search.places(constants, growth):
        owner = captured.owners.get(place.reader, "")
        # nn.MultiheadAttention projects and compares inside of one function.
        if _is_attention(search.modules.get(owner)):
            whole[owner] = place
            continue
        try:
            found.append((place, search.feeds(place)))
        except _Unreachable as reason:
            reasons[place.where] = str(reason)
    found = search.without_shared(found, reasons)
    by_name = {geometry.name: geometry for geometry in geometries}
    scales = [_of_attention(model, name, place, by_name) for name, place in whole.items()]
    scales += _of_modules(model, captured, found, by_name)
    return tuple(replace(scale, follows=_follows(scale, model, by_name)) for scale in scales), reasons


def settled_places(scores: Iterable[ScoreScale]) -> set[str]:
    """Return the places, operator and module, whose scores get a factor.

    Args:
        scores: The factors.
    """
    places: set[str] = set()
    for scale in scores:
        places.update(scale.where)
    return places


def without_settled(constants: Iterable[Constant], scores: Iterable[ScoreScale]) -> list[Constant]:
    """Return the numbers in a forward pass that are still to be told of.

    Args:
        constants: Powers of a width.
        scores: Factors that make up for some of them.
    """
    settled = settled_places(scores)
    return [constant for constant in constants if constant.where not in settled]


def _is_attention(module: nn.Module | None) -> bool:
    """Return whether a module is `nn.MultiheadAttention` with the forward that it comes with."""
    return isinstance(module, nn.MultiheadAttention) and (
        type(module).forward is nn.MultiheadAttention.forward
    )


def _of_attention(
    model: nn.Module, name: str, place: _Place, geometries: Mapping[str, Geometry]
) -> ScoreScale:
    """Return the factor of an `nn.MultiheadAttention`."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.MultiheadAttention)
    width, prefix = module.embed_dim, f"{name}." if name else ""
    # The first rows of packed weights and biases make the queries.
    names = [f"{prefix}{own}" for own in ("in_proj_weight", "in_proj_bias", "q_proj_weight")]
    rows = tuple((own, 0) for own in names if own in geometries)
    if any(geometries[own].aliases for own, _ in rows):  # another module reads them too
        rows = ()
    return ScoreScale(name, place.growth, (place.where,), ((0, width),), attention=True, rows=rows)


def _of_modules(
    model: nn.Module,
    captured: Capture,
    found: Iterable[_Fed],
    geometries: Mapping[str, Geometry],
) -> list[ScoreScale]:
    """Return one factor for each module that puts out queries."""
    places: dict[str, list[str]] = {}
    feed_of: dict[str, tuple[_Feed, float]] = {}
    for place, feeds in found:
        for feed in feeds:
            places.setdefault(feed.module, []).append(place.where)
            feed_of[feed.module] = feed, place.growth
    held = carriers(captured, [(feed.node, tuple(feed.node.users)) for feed, _ in feed_of.values()])
    scales = []
    for (feed, growth), carrier in zip(feed_of.values(), held, strict=True):
        where = tuple(dict.fromkeys(places[feed.module]))
        if feed.parts:
            rows = _rows(model, feed, geometries)
            scales.append(ScoreScale(feed.module, growth, where, feed.parts, feed.axis, rows=rows))
        else:
            scales.append(ScoreScale(feed.module, growth, where, carrier=carrier))
    return scales


def _rows(model: nn.Module, feed: _Feed, geometries: Mapping[str, Geometry]) -> tuple[tuple[str, int], ...]:
    """Return the parameters of a layer, with the axis of each that its features are along; none if tied."""
    module = model.get_submodule(feed.module)
    rows = []
    for own, parameter in module.named_parameters(recurse=False):
        name = f"{feed.module}.{own}"
        geometry = geometries.get(name)
        if geometry is None or geometry.aliases:  # another module reads it too
            return ()
        # A weight has its features on an axis that it makes; of a bias they are all that there is.
        rows.append((name, 0 if parameter.dim() == 1 else geometry.fan_out_axes[0]))
    return tuple(rows)


def _follows(scale: ScoreScale, model: nn.Module, geometries: Mapping[str, Geometry]) -> str:
    """Return a parameter that makes the queries and whose fan_out grows as head_dim does."""
    module, prefix = model.get_submodule(scale.module), f"{scale.module}." if scale.module else ""
    own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
    for name in (*own, *scale.carrier.parameters):
        if name in geometries and isclose(geometries[name].m_out, scale.growth, rel_tol=1e-9):
            return name
    return ""


class _Search:
    """Looks for modules behind the factors of scores."""

    def __init__(self, model: nn.Module, captured: Capture, solved: Inference):
        self.modules, self.owners = dict(model.named_modules()), captured.owners
        self.solved, self.space = solved, solved.engine.space
        self.weighted = made_of(captured.parameters, captured)

    def places(self, constants: Iterable[Constant], growth: Growth) -> list[_Place]:
        """Return the scores whose head_dim grows while they are divided by its root.

        Args:
            constants: Numbers in the forward pass that are powers of a width.
            growth: Size of a dimension relative to its base size.
        """
        places = []
        for kernel in self.solved.engine.facts.attention:
            root = self.space.size(kernel.dim) ** -0.5
            by_root = kernel.scale is None or isclose(kernel.scale, root, rel_tol=1e-5)
            if by_root and self.solved.verdicts.grows(kernel.dim) and growth(kernel.dim) != 1:
                queries = tensors_among(kernel.node.args)[0]
                places.append(_Place(kernel.where, growth(kernel.dim), kernel.node, queries))
        for constant in constants:
            if constant.what == "multiplies attention by" and constant.power == -0.5:
                ratio = prod(map(growth, constant.dims))
                if ratio != 1:
                    reader, queries = self._compared(constant.node)
                    places.append(_Place(constant.where, ratio, reader, queries))
        return places

    def _compared(self, multiplier: Node) -> tuple[Node, Node]:
        """Return the product of queries and keys that a multiplication belongs to, and one factor of it."""
        # (q @ k.mT) * d**-0.5: back from the multiplication to the product.
        product = multiplier
        while product.op == "call_function":
            known = traits_of(product)
            factors = tensors_among(flatten(product.args))
            # A product with a weight is what makes the queries themselves.
            if known & PRODUCTS and not any(is_parametric(factor, self.solved) for factor in factors):
                # torch.baddbmm(bias, q, k, alpha=d**-0.5) has its factors last.
                return product, factors[-2]
            if not factors or known & PRODUCTS or not (product is multiplier or known & PASS_ONE):
                break
            product = factors[0]
        # (q * d**-0.5) @ k.mT: what is multiplied is the factor.
        return next(iter(multiplier.users)), multiplier

    def feeds(self, place: _Place) -> list[_Feed]:
        """Return what modules put out that becomes the queries of some scores.

        Args:
            place: The scores.

        Raises:
            _Unreachable: A factor on no module's output is one on these scores alone.
        """
        entered: set[Node] = set()
        first_reason = ""
        # The nearest module is asked first; where it does not fit, what it computes from is looked at.
        while True:
            sources = self._sources(place, entered)
            if not sources:
                raise _Unreachable(first_reason or "no module puts out its queries")
            try:
                return self._tried(place, sources)
            except _Unreachable as reason:
                first_reason = first_reason or str(reason)
            except Exception as error:  # any operator may fail on numbers that it was not written for
                failed = f"its queries cannot be computed apart ({type(error).__name__})"
                first_reason = first_reason or failed
            entered.update(sources)

    def _sources(self, place: _Place, entered: set[Node]) -> dict[Node, str]:
        """Return the outputs of modules that queries are made of: node -> module."""
        sources: dict[Node, str] = {}
        visited, waiting = set(), [(place.queries, place.reader)]
        while waiting:
            node, reader = waiting.pop()
            # Tables of positions are made of no parameter: no factor can be theirs.
            if node in visited or node not in self.weighted or node.op != "call_function":
                continue
            visited.add(node)
            module = self.owners.get(node, "")
            # The value leaves a module that the reader's module calls.
            if is_inside(module, self.owners.get(reader, "")) and node not in entered:
                sources[node] = module
            else:
                waiting += [(source, node) for source in node.all_input_nodes]
        return sources

    def _tried(self, place: _Place, sources: Mapping[Node, str]) -> list[_Feed]:
        """Return the modules' outputs as feeds.

        Raises:
            _Unreachable: A factor on them is none on the scores, or reaches other values.
        """
        if flatten(place.reader.args).count(place.queries) > 1:
            raise _Unreachable("queries and keys are one tensor")
        inner = _between(sources, place.queries)
        trial = _Trial(sources, inner)
        made, again = trial.value(place.queries, 1.0), trial.value(place.queries, 0.5)
        # f(x / 2) = f(x) / 2 is exact in floating point where f is linear.
        if not torch.allclose(again, 0.5 * made, rtol=1e-3, atol=0.0) or not bool(made.any()):
            names = ", ".join(dict.fromkeys(sources.values()))
            raise _Unreachable(f"a factor on what {names} puts out is none on the scores")
        own_nodes = {*inner, *sources, place.queries}
        feeds = []
        for node, module in sources.items():
            reached = trial.entries(place.queries, node)
            foreign = torch.zeros_like(reached)
            for value, reader in _escapes(node, own_nodes, place):
                taken = trial.entries(value, node)
                foreign |= taken
                if bool((taken & reached).any()):
                    raise _Unreachable(f"{place_of(reader, self.owners)} reads the queries too")
            feeds.append(self._feed(node, module, reached, foreign))
        return feeds

    def _feed(self, node: Node, module: str, reached: Tensor, foreign: Tensor) -> _Feed:
        """Return what part of a module's output becomes queries.

        Raises:
            _Unreachable: Queries and other values are not told apart by features.
        """
        if not bool(foreign.any()):
            return _Feed(node, module)
        layer = self.modules[module]
        axis = 1 if isinstance(layer, CONVOLUTIONS) else -1
        queries, others = _along(reached, axis), _along(foreign, axis)
        if bool((queries & others).any()):
            raise _Unreachable(f"{module} puts out queries and other values in the same features")
        # One layer for queries, keys and values; heads may alternate.
        return _Feed(node, module, _runs(queries), axis)

    def without_shared(self, found: Iterable[_Fed], reasons: dict[str, str]) -> list[_Fed]:
        """Return the places but for those whose modules run elsewhere as well, or would need two factors.

        Args:
            found: Places with their feeds.
            reasons: Gets the reasons of those left out.
        """
        claimed: dict[str, set[Node]] = {}
        wanted: dict[str, set[Any]] = {}
        for place, feeds in found:
            for feed in feeds:
                claimed.setdefault(feed.module, set()).add(feed.node)
                wanted.setdefault(feed.module, set()).add((place.growth, feed.parts, feed.axis))
        others = {name: self._other_output(name, nodes) for name, nodes in claimed.items()}
        for name, forms in wanted.items():
            if len(forms) > 1:
                others[name] = "its calls put out different things"
        kept = []
        for place, feeds in found:
            shared = [feed.module for feed in feeds if others[feed.module]]
            if shared:
                reasons[place.where] = f"{shared[-1]} puts out other values as well: {others[shared[-1]]}"
            else:
                kept.append((place, feeds))
        return kept

    def _other_output(self, module: str, nodes: set[Node]) -> str:
        """Return another value that leaves a module, if there is one."""
        for node, owner in self.owners.items():
            inside = f"{owner}.".startswith(f"{module}.")
            if inside and node not in nodes and leaves(node, module, self.owners):
                return str(node)
        return ""


class _Trial:
    """Computes what lies between modules and queries, on random numbers in the place of everything else."""

    def __init__(self, sources: Iterable[Node], inner: Sequence[Node]):
        self.sources, self.inner = list(sources), list(inner)
        self.generator = torch.Generator().manual_seed(0)
        self.given: dict[Node, Any] = {}

    def _given(self, node: Node) -> Any:
        """Return the numbers that stand for a tensor, the same every time."""
        if node not in self.given:
            self.given[node] = _numbers(node, self.generator)
        return self.given[node]

    def _run(self, factor: float, nodes: Iterable[Node]) -> dict[Node, Any]:
        """Return all values, with the outputs of modules multiplied."""
        # A product of its own for each: operators may work in place on it.
        values = {source: self._given(source) * factor for source in self.sources}

        def value_of(node: Node) -> Any:
            return values[node] if node in values else self._given(node)

        # Dropout draws the same zeros every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for node in nodes:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values

    def value(self, node: Node, factor: float) -> Tensor:
        """Return a value.

        Args:
            node: Between the modules and the queries.
            factor: On what the modules put out.
        """
        with torch.no_grad():
            value = self._run(factor, self.inner)[node]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _Unreachable("its queries are no real numbers")
        return value

    def entries(self, end: Node, source: Node) -> Tensor:
        """Return which entries of a module's output a value depends on, as booleans.

        Args:
            end: The value; it may be no part of the queries.
            source: The module's output.
        """
        nodes = dict.fromkeys([*self.inner, *_between([source], end)])
        leaf = self._given(source)
        leaf.requires_grad_(True)
        try:
            with torch.enable_grad():
                value = self._run(1.0, nodes)[end]
                parts = [part for part in flatten([value]) if isinstance(part, Tensor) and part.requires_grad]
                total = leaf.new_zeros(())
                for part in parts:
                    numbers = torch.view_as_real(part) if part.is_complex() else part
                    total = total + (numbers * torch.randn_like(numbers)).sum()
            # Of what is cut off from gradients, or is no number, nothing is told apart: all counts.
            if not parts:
                return torch.ones_like(leaf, dtype=torch.bool)
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        finally:
            leaf.requires_grad_(False)
        return torch.zeros_like(leaf, dtype=torch.bool) if gradient is None else gradient != 0


def _numbers(node: Node, generator: torch.Generator) -> Any:
    """Return numbers in the place of a tensor: large ones, so that limits show."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    shape = shape_of(value)
    if prod(shape) > LARGEST:
        raise _Unreachable("its queries are too large to be tried out")
    if value.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if not (value.is_floating_point() or value.is_complex()):
        return torch.zeros(shape, dtype=value.dtype)
    numbers = 1e3 * torch.randn(shape, generator=generator)
    return torch.complex(numbers, numbers) if value.is_complex() else numbers


def _between(sources: Collection[Node], end: Node) -> list[Node]:
    """Return the operators on the way from some values to another, that one included, in order."""
    ahead = set(sources)
    # Behind the sources nothing can be on the way: in a deep network that is most of the graph.
    behind = set(walk([end], lambda node: [] if node in sources else node.all_input_nodes))
    found = []
    for node in sorted(behind - ahead):  # in the order of the graph
        if not ahead.isdisjoint(node.all_input_nodes):
            ahead.add(node)
            found.append(node)
    return found


def _escapes(source: Node, own_nodes: set[Node], place: _Place) -> list[tuple[Node, Node]]:
    """Return values made of a module's output that go elsewhere than into the queries, with their readers."""
    escapes, visited = [], set()
    waiting = [source]
    while waiting:
        node = waiting.pop()
        if node in visited:
            continue
        visited.add(node)
        for reader in node.users:
            # k, v = qkv.chunk(2): what is taken out counts, not what it is taken from.
            if reader in own_nodes or _moves(reader):
                waiting.append(reader)
            elif node is place.queries and reader is place.reader or _reads_shape(reader):
                continue
            else:
                escapes.append((node, reader))
    return escapes


def _moves(node: Node) -> bool:
    """Return whether an operator only puts entries elsewhere, or takes some of them."""
    name = operator_name(node.target).removeprefix("aten.")
    known = traits_of(node)
    return is_getitem(node) or name in MOVES or bool(known & (Trait.RESHAPES | Trait.COPIES))


def _reads_shape(reader: Node) -> bool:
    """Return whether an operator asks for a size alone."""
    value = reader.meta.get("val")
    return reader.op == "call_function" and not isinstance(value, (Tensor, list, tuple))


def _along(entries: Tensor, axis: int) -> Tensor:
    """Return which features have an entry that counts."""
    return entries.movedim(axis, -1).flatten(0, -2).any(0)


def _runs(features: Tensor) -> Ranges:
    """Return the runs of True as (first, behind the last)."""
    # With a False on either side every run begins with a step up and ends with a step down.
    steps = nn.functional.pad(features.int(), (1, 1)).diff()
    starts, ends = (torch.where(steps == step)[0].tolist() for step in (1, -1))
    return tuple(zip(starts, ends, strict=True))
