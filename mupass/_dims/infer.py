"""Width inference on a captured graph: runs the rules, gathers the seeds, decides which dimensions grow.

Three kinds of knowledge, in falling order of authority: what is certain (data, kernels, table lengths,
classes; what the caller overrides), what is a policy (heads grow at a fixed head_dim, the number of groups
is fixed), and the default (an axis along which weights are contracted or made, and that nothing certain
touches, is a width). Last come doubts: a default that what is around it speaks against stands, but marked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims import policies
from mupass._dims.doubts import HIDDEN, raise_doubts
from mupass._dims.engine import Engine
from mupass._dims.facts import NOWHERE, Facts, Origin, Value
from mupass._dims.graph import operator_name, shape_of
from mupass._dims.operator_traits import Trait, traits
from mupass._dims.remainders import Remainder, find_remainders
from mupass._dims.space import SizeConflict, Space
from mupass._dims.verdicts import Verdict, Verdicts
from mupass._errors import InferenceError
from mupass._records import Use

IN_TRANSFORMS = (
    "The forward pass runs transforms of torch.func (vmap, grad, jvp), which this operator comes from: "
    "analyse a module that returns the function's value, and take the derivative outside of it, in the loss"
)
NORMAL_DRAWS = ("aten.randn", "aten.randn_like", "aten.normal", "aten.normal_", "aten.normal_functional")
# One head in the first stage and two in the second: the verdict on an axis of length 1 says this first.
ONE_ENTRY = "policy: one entry, which tells nothing"
# Names of outputs in Hugging Face and timm that no loss looks at.
HIDDEN_OUTPUTS = re.compile(
    r"past_key_values|hidden_state|projected|pool(er|ed)_output|attentions|cache_params|mems|features|embeds\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Inference:
    """Solved dimensions of a model.

    Attributes:
        engine: The interpreted graph: its space and facts.
        verdicts: The decision for every dimension.
        dims: Parameter name -> dimension of every axis.
        uses: Parameter name -> operators that read it.
        overlooked: Parameters that the captured forward pass never reads.
        settled: Verdicts that the caller gave, which stand whatever the graph says.
        remainders: Dimensions that are a fixed number less than a width.
        output: Dimensions of the first output that a loss may see.
    """

    engine: Engine
    verdicts: Verdicts
    dims: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, tuple[Use, ...]]
    overlooked: tuple[str, ...]
    settled: Mapping[tuple[str, int], tuple[bool, str]]
    remainders: Mapping[int, Remainder]
    output: tuple[int, ...]

    def grows(self, dim: int) -> bool:
        """Return whether a dimension grows with the width.

        Args:
            dim: Any dimension.
        """
        verdict = self.verdicts.get(dim)
        return verdict is not None and verdict.infinite

    def verdict(self, parameter: str, axis: int) -> Verdict:
        """Return the verdict on one axis of one parameter."""
        # What the caller says of an axis stands, whatever the graph says.
        if (parameter, axis) in self.settled:
            return Verdict(*self.settled[parameter, axis])
        dim = self.dims[parameter][axis]
        verdict = self.verdicts.get(dim)
        if verdict is not None:
            return verdict
        if parameter in self.overlooked and self.engine.space.size(dim) > 1:
            return self._by_analogy(parameter, axis)
        counterpart = self._growing.get(_place(parameter, axis))
        if counterpart is not None and self.engine.space.size(dim) == 1 and self._is_made(parameter, axis):
            return Verdict(False, f"{ONE_ENTRY}, and in {counterpart} they grow", True)
        return Verdict(False, "no weight is contracted along it")

    def _sizes(self, parameter: str) -> list[int]:
        return list(map(self.engine.space.size, self.dims[parameter]))

    def _by_analogy(self, parameter: str, axis: int) -> Verdict:
        """Judge a parameter that nothing reads by its twin in another block, else by its neighbours."""
        # blocks.3.mlp.weight, which nothing reads, has a twin in blocks.0.mlp.weight.
        counterpart = self._twin(parameter)
        if counterpart is not None:
            infinite = self.verdict(counterpart, axis).infinite
            return Verdict(infinite, f"policy: nothing reads it; as in {counterpart}", True)
        beside = self._beside(parameter, axis)
        if beside is not None:
            neighbour, infinite = beside
            reason = f"policy: nothing reads it; {neighbour} beside it has an axis of that size"
            return Verdict(infinite, reason, True)
        if self._sizes(parameter)[axis] in self._unread_widths:
            return Verdict(True, "policy: nothing reads it; others that nothing reads have that size", True)
        return Verdict(False, "policy: nothing reads it", True)

    @cached_property
    def _growing(self) -> dict[tuple[str, ...], str]:
        """Place of an axis that grows -> its parameter, for those in numbered blocks."""
        growing: dict[tuple[str, ...], str] = {}
        for name, dims in self.dims.items():
            for axis, dim in enumerate(dims):
                if self.engine.space.size(dim) > 1 and self.verdicts.grows(dim):
                    growing.setdefault(_place(name, axis), name)
        return growing

    def _is_made(self, parameter: str, axis: int) -> bool:
        """Whether no use of a parameter contracts one of its axes."""
        return axis not in _contracted(self.uses.get(parameter, ()))

    @cached_property
    def _read(self) -> list[str]:
        """Parameters that the forward pass reads."""
        return [name for name in self.dims if name not in self.overlooked]

    def _twin(self, parameter: str) -> str | None:
        """Return the parameter of that name and shape in another block, where blocks differ by number."""
        for name in self._read:
            same_name = _numberless(name) == _numberless(parameter)
            if same_name and self._sizes(name) == self._sizes(parameter):
                return name
        return None

    def _beside(self, parameter: str, axis: int) -> tuple[str, bool] | None:
        """Return the nearest parameter that has an axis of that size at the same position, and if it grows.

        The nearest are those of the same module, then of the module around it. Of several that are as near
        one that grows is taken.
        """
        sizes = self._sizes(parameter)
        from_end = axis - len(sizes)  # counted from the last axis
        prefix = parameter
        while prefix:
            prefix = prefix.rpartition(".")[0]
            inside = f"{prefix}." if prefix else ""
            candidates: list[tuple[str, bool]] = []
            for name in self._read:
                dims = self.dims[name]
                if not name.startswith(inside) or len(dims) < -from_end:
                    continue
                verdict = self.verdicts.get(dims[from_end])
                if verdict is not None and self.engine.space.size(dims[from_end]) == sizes[axis]:
                    candidates.append((name, verdict.infinite))
            if candidates:
                return max(candidates, key=lambda pair: pair[1])
        return None

    @cached_property
    def _unread_widths(self) -> frozenset[int]:
        """Sizes at which parameters that nothing reads fit together: of norms, of what several contract."""
        widths: set[int] = set()
        made_sizes: set[int] = set()
        contracted_sizes: Counter[int] = Counter()
        for name in self.overlooked:
            sizes = self._sizes(name)
            if len(sizes) == 1 and name.endswith(".weight"):
                widths.add(sizes[0])  # of a norm
            elif len(sizes) == 2:
                made_sizes.add(sizes[0])
                contracted_sizes[sizes[1]] += 1
        # Sizes that two weights contract, or that one makes and another contracts.
        widths.update(
            size
            for size, count in contracted_sizes.items()
            if size != 1 and (count > 1 or size in made_sizes)
        )
        return frozenset(widths)


def _place(parameter: str, axis: int) -> tuple[str, ...]:
    """Return what an axis has in common with its twins in other blocks: names and position, not numbers.

    A layer that is itself one of a numbered list has no twin there: ``net.0`` and ``net.2`` differ in kind.
    """
    *modules, leaf = parameter.split(".")
    last = len(modules) - 1
    names = [name if place == last or not name.isdigit() else "#" for place, name in enumerate(modules)]
    return (*names, leaf, str(axis))


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def infer(
    captured: Capture,
    overrides: Mapping[tuple[str, int], tuple[bool, str]],
    strict: bool = True,
    by_dim: Mapping[int, tuple[bool, str]] | None = None,
) -> Inference:
    """Infer dimensions and verdicts.

    Args:
        captured: The graph.
        overrides: (parameter, axis) -> verdict that the caller settles, and by what authority.
        strict: Whether an operator without a rule is an error.
        by_dim: The same by dimension; every run over one capture numbers dimensions alike.

    Returns:
        The solved dimensions.
    """
    engine, dims, inputs = _run(captured, strict)
    counting = {
        dim for dim, counts_matrices in policies.mixed(engine.space, engine.facts).items() if counts_matrices
    }
    if counting:  # known only at the end: the weights that are mixed are then seen as the weights they are
        carried = engine.facts.carried.items()
        axes = frozenset(axis for axis, dim in carried if engine.space.find(dim) in counting)
        engine, dims, inputs = _run(captured, strict, axes)
    uses: dict[str, tuple[Use, ...]] = {}
    for parameter_use in engine.facts.uses:
        uses[parameter_use.parameter] = (*uses.get(parameter_use.parameter, ()), parameter_use.use)
    _note_written(captured, engine, dims, uses)
    _note_drawn(captured, engine)
    # What the caller says of an axis holds for all that is the same dimension.
    settled = {dims[parameter][axis]: verdict for (parameter, axis), verdict in overrides.items()}
    settled.update(by_dim or {})
    outputs = _outputs(captured, engine)
    verdicts = decide(engine.space, engine.facts, inputs, outputs, _made(dims, uses), settled)
    # An unused placeholder: nothing in the graph reads that parameter.
    read_parameters = {name for node, name in captured.parameters.items() if node.users}
    overlooked = tuple(name for name in dims if name not in read_parameters)
    remainders = find_remainders(verdicts)
    _doubt_remainders(verdicts, remainders)
    return Inference(
        engine, verdicts, dims, uses, overlooked, overrides, remainders, _first_output(captured, engine)
    )


def _contracted(uses: Iterable[Use]) -> set[int]:
    """Return the axes of a parameter that its uses contract."""
    contracted: set[int] = set()
    for use in uses:
        contracted.update(use.fan_in)
    return contracted


def _note_written(
    captured: Capture, engine: Engine, dims: Mapping[str, Iterable[int]], uses: Mapping[str, Iterable[Use]]
) -> None:
    """Record the dimensions whose sizes the code writes out, as what a layer makes."""
    for name, sizes in captured.written.items():
        contracted = _contracted(uses.get(name, ()))
        for axis, dim in enumerate(dims[name]):
            size = engine.space.size(dim)
            if size in sizes and axis not in contracted:
                engine.facts.written.setdefault(dim, sizes[size])


def _note_drawn(captured: Capture, engine: Engine) -> None:
    """Record the axes of what is drawn by a deviation that the model computes: mean + std * noise."""
    for node in captured.nodes:
        if not traits(operator_name(node.target)) & Trait.MULTIPLIES:
            continue
        factors = node.all_input_nodes
        deviations = [factor for factor in factors if operator_name(factor.target) not in NORMAL_DRAWS]
        values = map(engine.env.get, deviations if len(deviations) < len(factors) else ())
        for value in values:
            if isinstance(value, Value) and not value.static:
                engine.facts.drawn.update(axis.dim for axis in value.axes)


def _doubt_remainders(verdicts: Verdicts, remainders: Mapping[int, Remainder]) -> None:
    """Mark dimensions of which the size alone tells that they are less than a width."""
    size = verdicts.space.size
    for dim, remainder in remainders.items():
        if not remainder.certain:
            fixed = sum(map(size, remainder.fixed))
            reason = (
                f"policy: taken for a width of {size(remainder.width)} less {fixed}, since the {fixed} fixed "
                "features that it is joined to make it as wide as others are"
            )
            verdicts.question(dim, reason)


def _made(dims: Mapping[str, Iterable[int]], uses: Mapping[str, Iterable[Use]]) -> list[int]:
    """Return the axes that parameters bring into the computation: all but those that they contract."""
    made: list[int] = []
    for parameter, parameter_dims in dims.items():
        # A dimension that one use contracts may be made by another: F.linear(x, w.T) beside F.linear(x, w).
        contracted = _contracted(uses.get(parameter, ()))
        made += [dim for axis, dim in enumerate(parameter_dims) if axis not in contracted]
    return made


def decide(
    space: Space,
    facts: Facts,
    inputs: Iterable[tuple[int, str]],
    outputs: Iterable[tuple[int, str]],
    made: Iterable[int],
    overrides: Mapping[int, tuple[bool, str]],
) -> Verdicts:
    """Decide every dimension.

    Args:
        space: The solved constraints.
        facts: What the rules recorded.
        inputs: Axes of the model's inputs, each with its description.
        outputs: Axes of the outputs that a loss may see.
        made: Axes that parameters bring into the computation.
        overrides: Dimensions that the caller settles: infinite or not, and by what authority.

    Returns:
        The verdicts; `Verdicts.get` is None for dimensions that no parameter and no weight touches.

    """
    inputs, outputs, made = tuple(inputs), tuple(outputs), tuple(made)

    def settled(numbers: Mapping[int, str]) -> Verdicts:
        verdicts = Verdicts(space, facts)
        # The order is that of authority: the caller, the data, facts of the graph.
        verdicts.impose({dim: Verdict(infinite, reason) for dim, (infinite, reason) in overrides.items()})
        for dim, reason in inputs:
            verdicts.settle([dim], Verdict(False, reason))
        for dim, reason in facts.finite.items():
            verdicts.settle([dim], Verdict(False, reason))
        hidden = policies.settle_outputs(verdicts, outputs)
        _settle_rest(verdicts, made, numbers)
        for dim, reason in hidden.items():
            if verdicts.grows(dim):
                verdicts.question(dim, f"{HIDDEN} ({reason})")
        raise_doubts(verdicts, outputs)
        return verdicts

    numbers: dict[int, str] = {}
    while True:
        verdicts = settled(numbers)
        # Which numbers of the code would grow undoubted is known at the end only; all is then settled anew.
        found = policies.numbers_written(verdicts)
        if found.keys() <= numbers.keys():
            return verdicts
        numbers |= found


def _settle_rest(verdicts: Verdicts, made: Sequence[int], numbers: Mapping[int, str]) -> None:
    """Decide by policies, then by defaults. The order is a ranking: what is settled first is not asked again.

    Args:
        verdicts: What the caller, the data and the graph settle.
        made: Axes that parameters bring into the computation.
        numbers: Result of `policies.numbers_written`.
    """
    policies.settle_heads(verdicts)
    policies.settle_blocks(verdicts)
    policies.settle_groups(verdicts)
    policies.settle_alternatives(verdicts)
    policies.settle_mixtures(verdicts)
    policies.settle_experts(verdicts)
    policies.settle_routers(verdicts)
    policies.settle_copies(verdicts)
    policies.settle_adapters(verdicts)
    policies.settle_inserted(verdicts)
    policies.settle_rests(verdicts)
    policies.settle_keys(verdicts)
    policies.settle_numbers(verdicts, numbers)
    unmade = policies.unmade(verdicts, made)
    policies.settle_fans(verdicts, unmade, made)
    policies.settle_unmade(verdicts, unmade)
    policies.settle_basis(verdicts)
    # Last, what only members and wholes of settled widths tell.
    policies.settle_joined(verdicts)
    policies.settle_scores(verdicts)
    policies.settle_products(verdicts)
    policies.settle_cuts(verdicts)


def _run(
    captured: Capture, strict: bool, mixed_axes: Origin = NOWHERE
) -> tuple[Engine, dict[str, tuple[int, ...]], list[tuple[int, str]]]:
    """Interpret a graph; return the engine, the dimensions of every parameter, and those of the inputs."""
    engine = Engine(lambda node: captured.owners.get(node, ""), strict, mixed_axes, captured.derivatives)
    engine.facts.frozen = captured.frozen
    dims: dict[str, tuple[int, ...]] = {}
    inputs: list[tuple[int, str]] = []
    for node, name in captured.parameters.items():
        value = engine.placeholder(node, shape_of(node.meta["val"]), name, static=True)
        own_dims = tuple(axis.dim for axis in value.axes)
        # A tied parameter has several placeholders, all of one parameter.
        for first, second in zip(dims.setdefault(name, own_dims), own_dims, strict=True):
            engine.space.unify(first, second)
    for node in filter(_is_tensor, captured.states):
        value = engine.placeholder(node, shape_of(node.meta["val"]), None, static=True)
        # The axes of an identity or of another permutation are one.
        if node in captured.permutations:
            engine.space.unify(*(axis.dim for axis in value.axes))
    for node, name in captured.inputs.items():
        if _is_tensor(node):
            value = engine.placeholder(node, shape_of(node.meta["val"]), None, static=False)
            inputs += _described(value, f"input {name}")
    try:
        engine.run(captured.nodes)
    except SizeConflict:
        raise
    except InferenceError as error:
        if captured.transformed:
            raise InferenceError(f"{error}. {IN_TRANSFORMS}") from error
        raise
    return engine, dims, inputs


def _outputs(captured: Capture, engine: Engine) -> list[tuple[int, str]]:
    """Return the axes of the outputs that a loss may see, each with its description."""
    outputs: list[tuple[int, str]] = []
    for path, value in _seen(captured, engine):
        outputs += _described(value, f"output {path}")
    return outputs


def _first_output(captured: Capture, engine: Engine) -> tuple[int, ...]:
    """Return the dimensions of the first output that a loss may see."""
    for _, value in _seen(captured, engine):
        return tuple(axis.dim for axis in value.axes)
    return ()


def _seen(captured: Capture, engine: Engine) -> Iterator[tuple[str, Value]]:
    """Yield the outputs that a loss may see, each with its path."""
    for path, node in captured.outputs:
        value = engine.env.get(node)
        if isinstance(value, Value) and not HIDDEN_OUTPUTS.search(path):
            yield path, value


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _described(value: Value, what: str) -> list[tuple[int, str]]:
    """Return the dimensions of a tensor, each with its description."""
    return [(axis.dim, f"axis {position} of {what}") for position, axis in enumerate(value.axes)]
