"""Sizes that modules and configurations hold as plain numbers, rewritten for another width."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mupass._capture import Capture
from mupass._dims.engine import Value
from mupass._infer import Inference
from mupass._sizes import NewSizes

# Attribute names that seldom hold a width; used to order guesses, never to decide.
FIXED_NAMES = re.compile(
    r"head_dim|d_kv|image|img|patch|grid|vocab|labels|classes|position|length|groups|kernel|stride|window|bucket|"
    r"state|layers|depth|_id|padding|num_embeddings|rank|rope|expert"
)


def set_attributes(
    candidate: nn.Module, captured: Capture, solved: Inference, sizes: NewSizes, fixed: frozenset[str]
) -> set[str]:
    """Rewrite every attribute that holds a size, module by module, from the dims that the module handles.

    Returns:
        Names of attributes whose size is also that of something fixed.
    """
    local = _dims_by_module(captured, solved)
    done: set[int] = set()
    doubtful: set[str] = set()
    for path, module in candidate.named_modules():
        writer = _Writer(*_translation(local, path, solved, sizes), fixed, done, doubtful)
        for key, value in vars(module).items():
            if key not in ("training", "_parameters", "_buffers", "_modules", "_backward_hooks"):
                vars(module)[key] = writer.translated(key, value)
        flatten_recurrent(module)
    return doubtful


def flatten_recurrent(module: nn.Module) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def _dims_by_module(captured: Capture, solved: Inference) -> dict[str, set[int]]:
    """Dimensions of the operators that a module or its descendants call, and of their parameters."""
    local: dict[str, set[int]] = defaultdict(set)

    def note(path: str, dims: set[int]) -> None:
        while path:
            local[path] |= dims
            path = path.rpartition(".")[0]
        local[""] |= dims

    find = solved.engine.space.find
    for node in captured.nodes:
        values = [solved.engine.env.get(n) for n in (node, *node.all_input_nodes)]
        dims = {find(a.dim) for v in tree_leaves(values) if isinstance(v, Value) for a in v.axes}
        note(captured.owners.get(node, ""), dims)
    for name, axes in solved.dims.items():
        note(name.rpartition(".")[0], {find(d) for d in axes})
    return local


def _translation(
    local: Mapping[str, set[int]], path: str, solved: Inference, sizes: NewSizes
) -> tuple[dict[int, int], set[int]]:
    """Return old size -> new size for what this module handles, and the sizes that are also fixed ones."""
    options: dict[int, set[int]] = defaultdict(set)
    while path and path not in local:
        path = path.rpartition(".")[0]
    for dim in local.get(path, ()):
        options[solved.engine.space.size(dim)].add(sizes.of_dim(dim))
    changed = {old: sorted(new - {old}) for old, new in options.items() if old > 1}
    table = {old: new[0] for old, new in changed.items() if len(new) == 1}
    return table, {old for old in table if old in options[old]}


@dataclass(frozen=True)
class _Writer:
    """Rewrites sizes in the attributes of one module."""

    table: Mapping[int, int]
    also_fixed: set[int]
    fixed: frozenset[str]
    done: set[int]
    doubtful: set[str]

    def translated(self, key: str, value: Any) -> Any:
        """Return an attribute's value at the new width."""
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            if value in self.also_fixed:
                self.doubtful.add(key)
                return value if key in self.fixed else self.table[value]
            return self.table.get(value, value)
        if isinstance(value, float):  # such as sqrt(d_model), by which embeddings are multiplied
            return self._power(value)
        if type(value) in (tuple, list):
            return type(value)(self.translated(key, v) for v in value)
        if _is_config(value) and id(value) not in self.done:
            self.done.add(id(value))
            for name, entry in list(vars(value).items()):
                if type(entry) in (int, float, tuple, list):
                    value.__dict__[name] = self.translated(name, entry)
        return value

    def _power(self, value: float) -> float:
        for old, new in self.table.items():
            for power in (0.5, -0.5):
                if old not in self.also_fixed and math.isclose(value, old**power, rel_tol=1e-12):
                    return float(new**power)
        return value


def _is_config(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type))
        and not callable(value)
    )
