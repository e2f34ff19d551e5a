"""Sizes that modules and configurations hold as plain numbers, rewritten for another width.

A number says nothing of the dimension it stands for. So each attribute gets options, best first: the new
sizes of those dimensions that its module handles and that have this size now, and the number as it is. Which
option is right is decided by running the result, in `mupass._resize.rebuild`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.infer import Inference
from mupass._resize.sizes import NewSizes

# Names of attributes that seldom hold a width, that often do, and that scale with one; they order options.
FIXED_NAMES = re.compile(
    r"^num_(?!\w*(heads|features|channels|filters)|(hidden|units)$)|head_dim|d_kv|image|img|patch|tubelet|frame|grid|vocab|labels|classes|position|length|distance|groups|kernel|stride|window|bucket|"
    r"state|layers|depth|_id|padding|num_embeddings|rank|rope|expert"
)
SIZE_NAMES = re.compile(
    r"dim|size|shape|features|channels|hidden|heads?\b|width|embd|embed|planes|filters|units|inner|model|"
    r"^d$|^c$|^h$|^d_|_d$|^n_head"
)
SCALE_NAMES = re.compile(r"scal|sqrt|norm_factor|inv_norm|mult|temperature")
DRAW_NAMES = re.compile(r"init|std")
SIMPLE = 20  # largest number in the square of a gain
# Tables of torch itself, in which no number is a width.
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
        doubts: (module path, attribute) -> value that may be the root of a width or of data as long.
    """

    sizes: NewSizes
    handled: Mapping[str, set[int]]
    slots: dict[Slot, set[str]] = field(default_factory=lambda: defaultdict(set))
    hints: dict[tuple[str, Number], Number] = field(default_factory=dict)
    known: Mapping[tuple[str, str], float] = field(default_factory=dict)
    doubts: dict[tuple[str, str], str] = field(default_factory=dict)
    _tables: dict[str, dict[int, Counter[int]]] = field(default_factory=dict)

    def slot(self, path: str, holder: str, name: str, value: Number) -> Slot | None:
        """Return the slot of an attribute, or None where its value is no size."""
        # A number that follows the fan_in of its weight has one value, and needs no search.
        if (path, name) in self.known:
            return Slot(holder, name, value, (self.known[path, name],))
        # An attribute belongs to the nearest module around it that handles dimensions.
        while path and path not in self.handled:
            path = path.rpartition(".")[0]
        options: list[Number] = []
        # A whole number may be a size; a float may be a root of one.
        if isinstance(value, int):
            # The configuration belongs to the root, which handles every dimension: modules know better.
            if (name, value) in self.hints and not path:
                options.append(self.hints[name, value])
            options += self._sizes(path, name, value)
        else:
            options.append(self._root(path, name, value))
        # Where every option is the present value there is nothing to choose.
        if all(option == value for option in options):
            return None
        return Slot(holder, name, value, tuple(dict.fromkeys(options)))

    def take_hints(self, model: nn.Module) -> None:
        """Let modules tell what entries of the configuration mean: they know which dimensions they handle.

        Args:
            model: The module that has the configuration.
        """
        # The root holds the configuration itself, and says nothing of its own.
        for path, module in model.named_modules():
            if not path:
                continue
            for name, value in vars(module).items():
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
            # The first option is the likeliest.
            return slot.options[choice.get(slot, 0)]

        return picked

    def _table(self, path: str) -> dict[int, Counter[int]]:
        """Return old size -> how many dimensions that a module handles get which new size."""
        if path not in self._tables:
            table: dict[int, Counter[int]] = defaultdict(Counter)
            # Several dimensions of one size may get different new sizes.
            for dim in self.handled.get(path, ()):
                new_size = self.sizes.maybe(dim)
                if new_size is not None:
                    table[self.sizes.solved.engine.space.size(dim)][new_size] += 1
            self._tables[path] = table
        return self._tables[path]

    def _sizes(self, path: str, name: str, value: int) -> list[int]:
        # Sizes below 2 are no widths: they count nothing, or one thing.
        if value < 2:
            return [value]
        # Near: what this module handles. Far: anything in the model.
        counts_of_path = self._table(path).get(value, Counter())
        counts_of_model = self._table("").get(value, Counter())
        changed, elsewhere = _other_sizes(counts_of_path, value), _other_sizes(counts_of_model, value)
        likely = [value]
        if SIZE_NAMES.search(name) and not FIXED_NAMES.search(name):
            # Where all dimensions of this size near it stay, it is one of them.
            if changed or value not in counts_of_path:
                likely = [*changed, *elsewhere]
        elif not FIXED_NAMES.search(name) and value >= 16 and value not in counts_of_path:
            likely = changed  # a number below 16 is hardly a size
        options = [*likely, value, *changed, *elsewhere]
        # Sizes that no dimension has, such as 3 * width in the code, still scale with the width.
        scaled = value * self.sizes.factor  # where the graph splits no dimension of this size off
        if abs(scaled - round(scaled)) < 1e-6 and scaled >= 1:
            options.append(round(scaled))
        return list(dict.fromkeys(options))

    def _root(self, path: str, name: str, value: float) -> float:
        """Return the new value of a number such as sqrt(d_model); no shape tells, so there is only one."""
        if DRAW_NAMES.search(name) and round(value, 6) != value:
            return self._deviation(path, value)
        # sqrt(d_model), or one over it, of a dimension that gets another size.
        for size, new_sizes in self._table(path).items():
            changed = _other_sizes(new_sizes, size)
            for power in (0.5, -0.5):
                if changed and math.isclose(value, size**power, rel_tol=1e-12):
                    # 8.0 may be sqrt(64), or just 8: only its name tells.
                    if float(size**0.5).is_integer() and not SCALE_NAMES.search(name):
                        return value
                    # As many tokens as units: it is the root of what the module has a parameter for.
                    own_sizes = self._own_sizes(path, size) or set(new_sizes)
                    if size not in own_sizes:
                        return float(changed[0] ** power)
                    if own_sizes != {size} and SCALE_NAMES.search(name) and self._is_data(path, size):
                        self.doubts.setdefault((path, name), f"{value:.6g} (the root of {size})")
                    return value
        return value

    def _deviation(self, path: str, value: float) -> float:
        """Return the new value of a deviation such as sqrt(2 / (5 d_model)), by which weights are drawn."""
        for size, new_sizes in self._table(path).items():
            square = value**2 * size
            simple = Fraction(square).limit_denominator(SIMPLE)
            is_gain = 0 < simple.numerator <= SIMPLE and math.isclose(square, simple, rel_tol=1e-12)
            if is_gain and self.sizes.factor * size in _other_sizes(new_sizes, size):
                return value / math.sqrt(self.sizes.factor)
        return value

    def _own_sizes(self, path: str, size: int) -> set[int]:
        """Return the new sizes of those axes of a module's own parameters that have some size now.

        Of a number of heads there is no root: it is of the size per head beside it, which may be as large.
        """
        new_sizes: set[int] = set()
        find = self.sizes.solved.engine.space.find
        for parameter, dims in self.sizes.solved.dims.items():
            if parameter.rpartition(".")[0] == path:
                own = [dim for dim in dims if self._size(dim) == size and find(dim) not in self._heads]
                new_sizes.update(map(self.sizes.of_dim, own))
        return new_sizes

    @cached_property
    def _heads(self) -> set[int]:
        """Dimensions along which products of activations are batches."""
        solved = self.sizes.solved
        batches = [product.batch for product in solved.engine.facts.bilinear]
        return solved.engine.space.find_all(chain.from_iterable(batches))

    def _is_data(self, path: str, size: int) -> bool:
        """Whether all that keeps some size in a module is data, and no size per head, which has roots too."""
        kept = [dim for dim in self.handled[path] if self._size(dim) == size == self.sizes.maybe(dim)]
        verdicts = map(self.sizes.solved.verdicts.get, kept)
        return all(verdict is None or not verdict.policy for verdict in verdicts)

    def _size(self, dim: int) -> int:
        return self.sizes.solved.engine.space.size(dim)


def _other_sizes(new_sizes: Counter[int], size: int) -> list[int]:
    """Return the new sizes that dimensions of one size get, but for that size; the commonest first."""
    return [candidate for candidate, _ in new_sizes.most_common() if candidate != size]


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

    # What a module's operators read and make is what its numbers may be about.
    for node in captured.nodes:
        values = [solved.engine.env.get(read) for read in (node, *node.all_input_nodes)]
        dims: set[int] = set()
        for value in tree_leaves(values):
            if isinstance(value, Value):
                dims.update(find(axis.dim) for axis in value.axes)
        note(captured.owners.get(node, ""), dims)
    for name, axes in solved.dims.items():
        note(name.rpartition(".")[0], set(map(find, axes)))
    # Factors and parts that no operator of a module shows, such as the number of heads.
    for kind in ("product", "sum"):
        for _, members in solved.engine.space.terms(kind):
            handled[""].update(map(find, members))
    return handled


def rewrite_modules(model: nn.Module, pick: Pick) -> None:
    """Rewrite the numbers that modules and their configurations hold, in place.

    Args:
        model: The module.
        pick: Gives the new numbers.
    """
    visited: set[int] = set()
    one_channel_groups = _norms_of_one_channel_groups(model)
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name not in MODULE_TABLES and not name.endswith("_hooks") and not _is_factor(module, value):
                rewritten = _rewritten(value, path, type(module).__name__, name, pick, visited)
                if rewritten is not value:
                    vars(module)[name] = rewritten
        # GroupNorm(channels, channels) at any width: its number of groups is the width.
        if isinstance(module, nn.GroupNorm) and module in one_channel_groups:
            module.num_groups = module.num_channels  # no shape shows the number of groups
        # Its axes may have equal sizes, of which some grow: [channels, height, width].
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        if isinstance(module, nn.RNNBase):  # they keep a second list of their weights
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _is_factor(module: nn.Module, value: Any) -> bool:
    """Whether it is a float of a module of torch itself (``Upsample.scale_factor``): no root of a width."""
    is_float = any(type(entry) is float for entry in tree_leaves(value))
    return is_float and type(module).__module__.startswith("torch.nn.")


def _norms_of_one_channel_groups(model: nn.Module) -> set[nn.Module]:
    """Return the group norms with a group for each channel, at any width.

    Not those whose number of groups other norms of the model have too with more channels: it is a constant.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    # GroupNorm(32, channels) elsewhere in the model: 32 is a constant there.
    constant = {norm.num_groups for norm in norms if norm.num_groups < norm.num_channels}
    equal = [norm for norm in norms if norm.num_groups == norm.num_channels]
    return {norm for norm in equal if norm.num_groups not in constant}


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
    # (3, 3), torch.Size and the like: entry by entry, in the same type.
    if isinstance(value, (tuple, list)) and type(value).__module__ in ("builtins", "torch"):
        entries = [_rewritten(entry, path, holder, name, pick, done) for entry in value]
        # What does not change stays the same object: others may hold it too.
        unchanged = all(after is before for after, before in zip(entries, value, strict=True))
        return value if unchanged else type(value)(entries)
    # A configuration may be held by many modules: it is rewritten once.
    if _is_config(value) and id(value) not in done:
        done.add(id(value))
        for key, entry in list(vars(value).items()):
            # A multiplier that the class gives for any width is no root of one, though it may equal it.
            if type(entry) is float and entry == _default(type(value), key):
                continue
            new_entry = _rewritten(entry, path, type(value).__name__, key, pick, done)
            if new_entry is not entry:
                vars(value)[key] = new_entry
    return value


def _default(kind: type, name: str) -> Any:
    """Return the value that a class of configurations gives to an entry; None where it gives none."""
    if name in vars(kind):  # a dataclass
        return vars(kind)[name]
    try:
        parameter = inspect.signature(kind).parameters.get(name)
    except (TypeError, ValueError):  # a class of C, which tells no arguments
        return None
    return None if parameter is None else parameter.default


def _is_config(value: Any) -> bool:
    # Objects of torch and of the standard library hold no sizes of the model.
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
        holders = slots[slot]
        # Modules around the blamed one come first, the nearest of them ahead.
        ancestors = [len(holder) for holder in holders if f"{path}.".startswith(f"{holder}.") or not holder]
        if ancestors:
            return 0, -max(ancestors)  # the longest path is the nearest
        inside = any(holder.startswith(f"{path}.") for holder in holders)
        return (1, 0) if inside else (2, 0)

    return sorted(slots, key=lambda s: (*distance(s), s))
