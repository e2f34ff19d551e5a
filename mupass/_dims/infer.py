"""Width inference on a captured graph: runs the rules, gathers the seeds, decides."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mupass._capture.capture import Capture
from mupass._dims.decide import decide
from mupass._dims.engine import Engine
from mupass._dims.facts import NOWHERE, Origin, Value
from mupass._dims.graph import shape_of
from mupass._dims.policies import mixed
from mupass._dims.space import SizeConflict
from mupass._dims.verdicts import Verdict, Verdicts
from mupass._errors import InferenceError
from mupass._roles.geometry import Use

IN_TRANSFORMS = (
    "The forward pass runs transforms of torch.func (vmap, grad, jvp), which this operator comes from: "
    "analyse a module that returns the function's value, and take the derivative outside of it, in the loss"
)
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
    """

    engine: Engine
    verdicts: Verdicts
    dims: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, tuple[Use, ...]]
    overlooked: tuple[str, ...]
    settled: Mapping[tuple[str, int], tuple[bool, str]]

    def verdict(self, parameter: str, axis: int) -> Verdict:
        """Return the verdict on one axis of one parameter."""
        if (parameter, axis) in self.settled:
            return Verdict(*self.settled[parameter, axis])
        found = self.verdicts.get(self.dims[parameter][axis])
        if (
            found is None
            and parameter in self.overlooked
            and self.engine.space.size(self.dims[parameter][axis]) > 1
        ):
            return self._by_analogy(parameter, axis)
        return found or Verdict(False, "no weight is contracted along it")

    def _by_analogy(self, parameter: str, axis: int) -> Verdict:
        """Judge a parameter that nothing reads by its twin in another block, else by its neighbours."""
        space = self.engine.space
        shape = [space.size(d) for d in self.dims[parameter]]
        read = {n: row for n, row in self.dims.items() if n not in self.overlooked}
        for name, row in read.items():
            if _numberless(name) == _numberless(parameter) and [space.size(d) for d in row] == shape:
                twin = self.verdict(name, axis)
                return Verdict(twin.infinite, f"policy: nothing reads it; as in {name}", True)
        prefix, back = parameter, axis - len(shape)
        while prefix:
            prefix = prefix.rpartition(".")[0]
            near = [
                (n, r)
                for n, r in read.items()
                if n.startswith(f"{prefix}." if prefix else "") and len(r) >= -back
            ]
            seen = [
                (n, v)
                for n, r in near
                if space.size(r[back]) == shape[axis] and (v := self.verdicts.get(r[back]))
            ]
            if seen:
                name, verdict = max(seen, key=lambda pair: pair[1].infinite)
                why = f"policy: nothing reads it; {name} beside it has an axis of that size"
                return Verdict(verdict.infinite, why, True)
        if shape[axis] in self._unread_widths:
            return Verdict(True, "policy: nothing reads it; others that nothing reads have that size", True)
        return Verdict(False, "policy: nothing reads it", True)

    @cached_property
    def _unread_widths(self) -> frozenset[int]:
        """Sizes at which parameters that nothing reads fit together: of norms, of what several contract."""
        shapes = {n: [self.engine.space.size(d) for d in self.dims[n]] for n in self.overlooked}
        gains = {s[0] for n, s in shapes.items() if len(s) == 1 and n.endswith(".weight")}
        matrices = [s for s in shapes.values() if len(s) == 2]
        made, read = {m[0] for m in matrices}, Counter(m[1] for m in matrices)
        return frozenset(gains | {size for size, count in read.items() if count > 1 or size in made} - {1})


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
    counting = {d for d, apart in mixed(engine.space, engine.facts).items() if apart}
    if counting:  # known only at the end: the weights that are mixed are then seen as the weights they are
        axes = frozenset(o for o, d in engine.facts.carried.items() if engine.space.find(d) in counting)
        engine, dims, inputs = _run(captured, strict, axes)
    uses: dict[str, list[Use]] = defaultdict(list)
    for found in engine.facts.uses:
        uses[found.parameter].append(found.use)
    read = {p: {i for u in uses.get(p, ()) for i in u.fan_in} for p in dims}
    made = [dim for p, row in dims.items() for i, dim in enumerate(row) if i not in read[p]]
    settled = {dims[p][i]: v for (p, i), v in overrides.items()} | dict(by_dim or {})
    verdicts = decide(engine.space, engine.facts, inputs, _outputs(captured, engine), made, settled)
    seen = {name for node, name in captured.parameters.items() if node.users}
    overlooked = tuple(name for name in dims if name not in seen)
    return Inference(engine, verdicts, dims, {k: tuple(v) for k, v in uses.items()}, overlooked, overrides)


def _run(
    captured: Capture, strict: bool, mixed_axes: Origin = NOWHERE
) -> tuple[Engine, dict[str, tuple[int, ...]], list[tuple[int, str]]]:
    """Interpret a graph; return the engine, the dimensions of every parameter, and those of the inputs."""
    engine = Engine(lambda node: captured.owners.get(node, ""), strict, mixed_axes, captured.derivatives)
    dims: dict[str, tuple[int, ...]] = {}
    inputs: list[tuple[int, str]] = []
    for node, name in captured.parameters.items():
        value = engine.placeholder(node, shape_of(node.meta["val"]), name, static=True)
        if name in dims:
            for a, b in zip(dims[name], value.axes, strict=True):
                engine.space.unify(a, b.dim)
        dims.setdefault(name, tuple(a.dim for a in value.axes))
    for node in captured.states:
        if isinstance(node.meta.get("val"), torch.Tensor):
            engine.placeholder(node, shape_of(node.meta["val"]), None, static=True)
    for node, name in captured.inputs.items():
        if isinstance(node.meta.get("val"), torch.Tensor):
            value = engine.placeholder(node, shape_of(node.meta["val"]), None, static=False)
            inputs += [(a.dim, f"axis {i} of input {name}") for i, a in enumerate(value.axes)]
    try:
        engine.run(captured.nodes)
    except SizeConflict:
        raise
    except InferenceError as error:
        raise InferenceError(f"{error}. {IN_TRANSFORMS}" if captured.transformed else str(error)) from error
    return engine, dims, inputs


def _outputs(captured: Capture, engine: Engine) -> list[tuple[int, str]]:
    found = []
    for path, node in captured.outputs:
        value = engine.env.get(node)
        if isinstance(value, Value) and not HIDDEN_OUTPUTS.search(path):
            found += [(a.dim, f"axis {i} of output {path}") for i, a in enumerate(value.axes)]
    return found
