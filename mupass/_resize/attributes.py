"""Sizes that modules and configurations hold as plain numbers, rewritten for another width.

A number says nothing of the dimension it stands for. So each attribute gets options, best first: the new
sizes of those dimensions that its module handles and that have this size now, and the number as it is. Which
option is right is decided by running the result, in `mupass._resize.rebuild`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.infer import Inference
from mupass._resize.sizes import NewSizes

# Names of attributes that seldom hold a width, that often do, and that scale with one; they order options.
FIXED_NAMES = re.compile(
    r"^num_(?!\w*(heads|features|channels|filters))|head_dim|d_kv|image|img|patch|grid|vocab|labels|classes|position|length|distance|groups|kernel|stride|window|bucket|"
    r"state|layers|depth|_id|padding|num_embeddings|rank|rope|expert"
)
SIZE_NAMES = re.compile(
    r"dim|size|shape|features|channels|hidden|heads?\b|width|embd|embed|planes|filters|units|inner|model|"
    r"^d$|^c$|^h$|^d_|_d$|^n_head"
)
SCALE_NAMES = re.compile(r"scal|sqrt|norm_factor|inv_norm|mult|temperature")
MODULE_TABLES = ("training", "_parameters", "_buffers", "_modules", "_flat_weights")

Number = int | float
Pick = Callable[[str, str, str, Number], Number]  # path, class of the holder, attribute, value -> new value


@dataclass(frozen=True, order=True)
class Slot:
    """An attribute, the same in all modules of a class that offer the same options.

    Attributes:
        holder: Class of the module or configuration.
        name: The attribute.
        value: Its present value.
        options: New values, the likeliest first.
    """

    holder: str
    name: str
    value: Number
    options: tuple[Number, ...]


@dataclass
class Attributes:
    """Options for every attribute of a model.

    Attributes:
        sizes: The new sizes.
        handled: Module path -> dimensions that the module or its descendants handle.
        slots: What was met so far, and in which modules.
        hints: (name, value) of a configuration's entry -> what modules that hold the same take for likely.
        known: (module path, attribute) -> new value, where it is known.
    """

    sizes: NewSizes
    handled: Mapping[str, set[int]]
    slots: dict[Slot, set[str]] = field(default_factory=lambda: defaultdict(set))
    hints: dict[tuple[str, Number], Number] = field(default_factory=dict)
    known: Mapping[tuple[str, str], float] = field(default_factory=dict)
    _tables: dict[str, dict[int, Counter[int]]] = field(default_factory=dict)

    def slot(self, path: str, holder: str, name: str, value: Number) -> Slot | None:
        """Return the slot of an attribute, or None where its value is no size."""
        if (path, name) in self.known:
            return Slot(holder, name, value, (self.known[path, name],))
        while path and path not in self.handled:
            path = path.rpartition(".")[0]
        options: tuple[Number, ...]
        if isinstance(value, int):
            hint = [self.hints[name, value]] if (name, value) in self.hints and not path else []
            options = tuple(dict.fromkeys([*hint, *self._sizes(path, name, value)]))
        else:
            options = tuple(self._roots(path, name, value))
        return Slot(holder, name, value, options) if any(o != value for o in options) else None

    def take_hints(self, model: nn.Module) -> None:
        """Let modules tell what entries of the configuration mean: they know which dimensions they handle.

        Args:
            model: The module that has the configuration.
        """
        for path, module in model.named_modules():
            for name, value in vars(module).items() if path else ():
                if type(value) is int and name != "training":
                    slot = self.slot(path, type(module).__name__, name, value)
                    self.hints.setdefault((name, value), value if slot is None else slot.options[0])

    def pick(self, choice: Mapping[Slot, int]) -> Pick:
        """Return the function that rewrites a number by the option chosen for its slot, else the first."""

        def picked(path: str, holder: str, name: str, value: Number) -> Number:
            slot = self.slot(path, holder, name, value)
            if slot is None:
                return value
            self.slots[slot].add(path)
            return slot.options[choice.get(slot, 0)]

        return picked

    def _table(self, path: str) -> dict[int, Counter[int]]:
        """Return old size -> how many dimensions that a module handles get which new size."""
        if path not in self._tables:
            table: dict[int, Counter[int]] = defaultdict(Counter)
            for dim in self.handled.get(path, ()):
                new = self.sizes.maybe(dim)
                if new is not None:
                    table[self.sizes.solved.engine.space.size(dim)][new] += 1
            self._tables[path] = table
        return self._tables[path]

    def _sizes(self, path: str, name: str, value: int) -> list[int]:
        if value < 2:
            return [value]
        near, far = (self._table(p).get(value, Counter()) for p in (path, ""))
        changed = [n for n, _ in near.most_common() if n != value]
        elsewhere = [n for n, _ in far.most_common() if n != value]
        if FIXED_NAMES.search(name):
            likely = [value]
        elif SIZE_NAMES.search(name):
            likely = [value] if not changed and value in near else [*changed, *elsewhere]
        else:  # a small number is hardly a size
            likely = changed if value >= 16 and value not in near else [value]
        scaled = value * self.sizes.factor  # where the graph splits no dimension of this size off
        last = [round(scaled)] if abs(scaled - round(scaled)) < 1e-6 and scaled >= 1 else []
        return list(dict.fromkeys([*likely, value, *changed, *elsewhere, *last]))

    def _roots(self, path: str, name: str, value: float) -> list[float]:
        """Return options for a number such as sqrt(d_model); no shape tells, so there is only one."""
        for old, news in self._table(path).items():
            changed = [n for n, _ in news.most_common() if n != old]
            for power in (0.5, -0.5):
                if changed and math.isclose(value, old**power, rel_tol=1e-12):
                    coincidence = float(old**0.5).is_integer() and not SCALE_NAMES.search(name)
                    return [value] if coincidence or old in news else [float(changed[0] ** power)]
        return [value]


def handled_dims(captured: Capture, solved: Inference) -> dict[str, set[int]]:
    """Return module path -> dimensions of the operators that it or its descendants call, and of parameters.

    Args:
        captured: The graph.
        solved: The inference.
    """
    handled: dict[str, set[int]] = defaultdict(set)
    find = solved.engine.space.find

    def note(path: str, dims: set[int]) -> None:
        while path:
            handled[path] |= dims
            path = path.rpartition(".")[0]
        handled[""] |= dims

    for node in captured.nodes:
        values = [solved.engine.env.get(n) for n in (node, *node.all_input_nodes)]
        dims = {find(a.dim) for v in tree_leaves(values) if isinstance(v, Value) for a in v.axes}
        note(captured.owners.get(node, ""), dims)
    for name, axes in solved.dims.items():
        note(name.rpartition(".")[0], {find(d) for d in axes})
    inner = {m for kind in ("product", "sum") for _, ms in solved.engine.space.terms(kind) for m in ms}
    handled[""] |= {find(m) for m in inner}
    return handled


def rewrite_modules(model: nn.Module, pick: Pick) -> None:
    """Rewrite the numbers that modules and their configurations hold, in place.

    Args:
        model: The module.
        pick: Gives the new numbers.
    """
    done: set[int] = set()
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    # A group a channel, unless that is the number of groups where channels are more.
    constant = {m.num_groups for m in norms if m.num_groups < m.num_channels}
    alone = {m for m in norms if m.num_groups == m.num_channels and m.num_groups not in constant}
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name not in MODULE_TABLES and not name.endswith("_hooks"):
                new = _rewritten(value, path, type(module).__name__, name, pick, done)
                if new is not value:
                    vars(module)[name] = new
        if isinstance(module, nn.GroupNorm) and module in alone:  # no shape shows the number of groups
            module.num_groups = module.num_channels
        if isinstance(module, nn.RNNBase):  # they keep a second list of their weights
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def rewrite_config(config: Any, pick: Pick) -> Any:
    """Rewrite the numbers of a configuration object, in place.

    Args:
        config: The configuration.
        pick: Gives the new numbers.
    """
    return _rewritten(config, "", type(config).__name__, "config", pick, set())


def _rewritten(value: Any, path: str, holder: str, name: str, pick: Pick, done: set[int]) -> Any:
    if isinstance(value, bool):
        return value
    if type(value) in (int, float):
        return pick(path, holder, name, value)
    if isinstance(value, (tuple, list)) and type(value).__module__ in ("builtins", "torch"):
        new = [_rewritten(v, path, holder, name, pick, done) for v in value]
        return type(value)(new) if any(a is not b for a, b in zip(new, value, strict=True)) else value
    if _is_config(value) and id(value) not in done:
        done.add(id(value))
        for key, entry in list(vars(value).items()):
            new_entry = _rewritten(entry, path, type(value).__name__, key, pick, done)
            if new_entry is not entry:
                vars(value)[key] = new_entry
    return value


def _is_config(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type))
        and not callable(value)
        and type(value).__module__.partition(".")[0] not in ("torch", "weakref", "collections")
    )


def nearest(slots: Mapping[Slot, Iterable[str]], path: str) -> list[Slot]:
    """Order slots by how near the modules that hold them are to one module: itself, ancestors, the rest.

    Args:
        slots: Slots with the paths of their modules.
        path: Path of the module.
    """

    def distance(slot: Slot) -> tuple[int, int]:
        above = [len(p) for p in slots[slot] if not p or path == p or path.startswith(f"{p}.")]
        below = any(p.startswith(f"{path}.") for p in slots[slot])
        return (0, -max(above)) if above else (1 if below else 2, 0)

    return sorted(slots, key=lambda s: (*distance(s), s))
