"""Width inference on a captured graph: runs the rules, gathers the seeds, decides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import mupass._dims.contract
import mupass._dims.elementwise
import mupass._dims.lookup
import mupass._dims.shape  # noqa: F401  (rules register on import)
from mupass._capture import Capture
from mupass._dims.decide import Verdict, Verdicts, decide
from mupass._dims.engine import Engine, Value
from mupass._geometry import Use

HIDDEN_OUTPUTS = re.compile(
    r"past_key_values|hidden_state|pooler_output|attentions|cache_params|mems|features|embeds\b",
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
    """

    engine: Engine
    verdicts: Verdicts
    dims: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, tuple[Use, ...]]
    overlooked: tuple[str, ...]

    def verdict(self, parameter: str, axis: int) -> Verdict:
        """Return the verdict on one axis of one parameter."""
        found = self.verdicts.get(self.dims[parameter][axis])
        return found or Verdict(False, "no weight is contracted along it")


def infer(
    captured: Capture, overrides: Mapping[tuple[str, int], tuple[bool, str]], strict: bool = True
) -> Inference:
    """Infer dimensions and verdicts.

    Args:
        captured: The graph.
        overrides: (parameter, axis) -> verdict that the caller settles, and by what authority.
        strict: Whether an operator without a rule is an error.

    Returns:
        The solved dimensions.
    """
    engine = Engine(lambda node: captured.owners.get(node, ""), strict)
    dims: dict[str, tuple[int, ...]] = {}
    inputs: list[tuple[int, str]] = []
    for node, name in captured.parameters.items():
        value = engine.placeholder(node, node.meta["val"].shape, name, static=True)
        if name in dims:
            for a, b in zip(dims[name], value.axes, strict=True):
                engine.space.unify(a, b.dim)
        dims.setdefault(name, tuple(a.dim for a in value.axes))
    for node in captured.states:
        if isinstance(node.meta.get("val"), torch.Tensor):
            engine.placeholder(node, node.meta["val"].shape, None, static=True)
    for node, name in captured.inputs.items():
        if isinstance(node.meta.get("val"), torch.Tensor):
            value = engine.placeholder(node, node.meta["val"].shape, None, static=False)
            inputs += [(a.dim, f"axis {i} of input {name}") for i, a in enumerate(value.axes)]
    engine.run(captured.nodes)
    uses: dict[str, list[Use]] = defaultdict(list)
    for found in engine.facts.uses:
        uses[found.parameter].append(found.use)
    settled = {dims[p][i]: v for (p, i), v in overrides.items()}
    verdicts = decide(engine.space, engine.facts, inputs, _outputs(captured, engine), settled)
    read = {n for n in captured.parameters if n.users}
    overlooked = tuple(dict.fromkeys(captured.parameters[n] for n in captured.parameters if n not in read))
    overlooked = tuple(n for n in overlooked if n not in {captured.parameters[r] for r in read})
    return Inference(engine, verdicts, dims, {k: tuple(v) for k, v in uses.items()}, overlooked)


def _outputs(captured: Capture, engine: Engine) -> list[tuple[int, str]]:
    found = []
    for path, node in captured.outputs:
        value = engine.env.get(node)
        if isinstance(value, Value) and not HIDDEN_OUTPUTS.search(path):
            found += [(a.dim, f"axis {i} of output {path}") for i, a in enumerate(value.axes)]
    return found
