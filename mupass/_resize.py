"""resize: the same architecture at another width, from one model."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from mupass._capture import Capture, capture
from mupass._dims.engine import Value, operator_name
from mupass._errors import MupassError
from mupass._infer import Inference, infer
from mupass._inputs import as_call, find_inputs
from mupass._names import DimNames, name_dims
from mupass._redraw import redraw


# Attribute names that seldom hold a width; used to order guesses, never to decide.
FIXED_NAMES = re.compile(
    r"head_dim|d_kv|image|img|patch|grid|vocab|labels|classes|position|length|groups|kernel|stride|window|bucket|"
    r"state|layers|depth|_id|padding|num_embeddings|rank|rope|expert"
)


MOVES = ("aten.to", "aten._assert_tensor_metadata", "aten.contiguous", "aten.clone", "aten.detach")


class ResizeError(MupassError):
    """The model cannot be built at the width asked for; the message names the dimensions."""


def resize(
    model: nn.Module,
    width: int | Mapping[str, int] | None = None,
    *,
    scale: float | None = None,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a narrower or wider copy of a model: same class, same parameter names, new sizes.

    Every growing dimension keeps its ratio to the width unless it is named. Parameters and buffers are
    drawn afresh by the model's own initialization law at the new sizes (at unchanged width they are
    copied). Integer attributes and configuration entries that hold a size are rewritten, and the result is
    captured again: each operator must have exactly the shape that the dimension terms predict, or the
    resize is refused.

    Args:
        model: The module; not changed. A meta-device model gives a real copy of any width.
        width: New size of the model's width, or new sizes by dimension name (`Analysis.names`).
        scale: Alternatively, the factor on every growing dimension.
        example_inputs: As for `mupass.analyze`.
        device: Device of the copy; by default that of the model, or the CPU for a meta-device model.
        seed: Seed of the new parameters; the global random state is left alone when given.

    Returns:
        The resized copy.

    Raises:
        ResizeError: A dimension would not be a whole number, names are unknown, or the architecture
            computes a size that the pass cannot find.
    """
    inputs = find_inputs(model) if example_inputs is None else as_call(example_inputs)
    captured = capture(model, *inputs)
    solved = infer(captured, {})
    sizes = NewSizes.of(solved, name_dims(model, solved), width, scale)
    device = device or next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    expected = [_shapes(captured, solved, sizes, n) for n in _operators(captured)]
    failures = []
    for fixed in _guesses(model, captured, solved, sizes):
        candidate = _skeleton(model)
        _set_tensors(candidate, captured, solved, sizes)
        _set_attributes(candidate, captured, solved, sizes, fixed)
        failure = _mismatch(candidate, inputs, expected)
        if failure is None:
            _materialize(candidate, model, torch.device(device), seed)
            return candidate
        failures.append(failure)
    raise ResizeError(f"{type(model).__name__} cannot be resized: {failures[0]}")


def _guesses(
    model: nn.Module, captured: Capture, solved: Inference, sizes: NewSizes
) -> Iterator[frozenset[str]]:
    """Yield sets of attribute names to leave alone where a size is both a width and something fixed.

    The names only order the guesses: a wrong guess fails the comparison of shapes and the next is tried.
    """
    keys = _set_attributes(_skeleton(model), captured, solved, sizes, frozenset())
    likely = frozenset(k for k in keys if FIXED_NAMES.search(k))
    yield likely
    yield from (likely ^ {k} for k in sorted(keys))
    yield from (frozenset(), frozenset(keys))


@dataclass(frozen=True)
class NewSizes:
    """New size of every dimension.

    Attributes:
        solved: The inference.
        names: Names of dimensions.
        given: Representative -> factor that the caller fixed.
        factor: Factor on every other growing dimension.
    """

    solved: Inference
    names: DimNames
    given: Mapping[int, float]
    factor: float

    @staticmethod
    def of(
        solved: Inference, names: DimNames, width: int | Mapping[str, int] | None, scale: float | None
    ) -> NewSizes:
        """Read the caller's wish.

        Args:
            solved: The inference.
            names: Names of dimensions.
            width: New width, or sizes by name.
            scale: Factor instead.

        Raises:
            ResizeError: Neither or both are given, or a name is unknown.
        """
        if (width is None) == (scale is None):
            raise ResizeError("give either width= or scale=")
        if scale is not None:
            if not math.isfinite(scale) or scale <= 0:
                raise ResizeError(f"scale must be positive, not {scale!r}")
            return NewSizes(solved, names, {}, scale)
        if not isinstance(width, Mapping):
            return NewSizes(solved, names, {}, width / model_width(solved))  # type: ignore[operator]
        given: dict[int, float] = {}
        for name, size in width.items():
            found = names.find(name)
            if not found:
                raise ResizeError(f"no dimension {name!r}; known are {sorted(names.all())}")
            given.update({d: size / solved.engine.space.size(d) for d in found})
        factors = set(given.values())
        if len(factors) > 1:
            open_ = sorted({n for d, n in names.table.items() if d not in given and _grows(solved, d)})
            if open_:
                raise ResizeError(f"the sizes given differ in ratio, so name these too: {open_}")
        return NewSizes(solved, names, given, factors.pop())

    def of_dim(self, dim: int) -> int:
        """Return the new size of a dimension.

        Args:
            dim: Handle.

        Raises:
            ResizeError: It would not be a whole number.
        """
        exact = self._exact(dim)
        size = round(exact)
        if abs(size - exact) > 1e-6 or size < 1:
            raise ResizeError(
                f"dimension {self.names.term(dim)} of size {self.solved.engine.space.size(dim)} would become {exact:g}"
            )
        return size

    def _exact(self, dim: int) -> float:
        space = self.solved.engine.space
        root, size = space.find(dim), space.size(dim)
        if root in self.given:
            return size * self.given[root]
        if not _grows(self.solved, dim):
            return size
        for kind, combine in (("product", math.prod), ("sum", sum)):
            for members in space.terms_of(root, kind):
                if any(_grows(self.solved, m) for m in members):
                    return float(combine([self.of_dim(m) for m in members]))
        return size * self.factor


def model_width(solved: Inference) -> int:
    """Return the size of the growing dimension that most parameter axes carry (ties: the widest)."""
    space = solved.engine.space
    carried: dict[int, int] = defaultdict(int)
    for dims in solved.dims.values():
        for dim in {space.find(d) for d in dims if _grows(solved, d)}:
            carried[dim] += 1
    return max((count, space.size(dim)) for dim, count in carried.items())[1]


def _grows(solved: Inference, dim: int) -> bool:
    verdict = solved.verdicts.get(dim)
    return verdict is not None and verdict.infinite


def _shapes(captured: Capture, solved: Inference, sizes: NewSizes, node: Any) -> list[tuple[int, ...]]:
    values = [v for v in tree_leaves(solved.engine.env.get(node)) if isinstance(v, Value)]
    return [tuple(sizes.of_dim(a.dim) for a in v.axes) for v in values]


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy everything but tensors, which are put on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        )
    return copy.deepcopy(model, memo)


def _set_tensors(candidate: nn.Module, captured: Capture, solved: Inference, sizes: NewSizes) -> None:
    """Give parameters and buffers their new shapes, on the meta device."""
    for name, parameter in candidate.named_parameters():
        shape = [sizes.of_dim(d) for d in solved.dims[name]]
        parameter.data = torch.empty(shape, dtype=parameter.dtype, device="meta")
    for node, name in captured.buffers.items():
        value = solved.engine.env.get(node)
        if isinstance(value, Value) and name in dict(candidate.named_buffers()):
            path, _, leaf = name.rpartition(".")
            owner = candidate.get_submodule(path)
            shape = [sizes.of_dim(a.dim) for a in value.axes]
            owner._buffers[leaf] = torch.empty(shape, dtype=owner._buffers[leaf].dtype, device="meta")  # type: ignore[union-attr]


def _set_attributes(
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
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
    return doubtful


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


def _operators(captured: Capture) -> list[Node]:
    """Operators that compute; moves between devices and layouts differ between a real model and one on meta."""
    return [n for n in captured.nodes if operator_name(n.target) not in MOVES]


def _mismatch(candidate: nn.Module, inputs: Any, expected: list[list[tuple[int, ...]]]) -> str | None:
    """Capture the candidate and compare every operator's shapes with those predicted."""
    args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)
    try:
        again = capture(candidate, args, kwargs)
    except MupassError as error:
        return str(error)
    nodes = _operators(again)
    got = [
        [tuple(int(s) for s in t.shape) for t in tree_leaves(n.meta.get("val")) if isinstance(t, Tensor)]
        for n in nodes
    ]
    if len(got) != len(expected):
        return f"it runs {len(got)} operators instead of {len(expected)} at the new width"
    for node, have, want in zip(nodes, got, expected, strict=True):
        if want and have != want:
            return f"{node.target} in {again.owners.get(node)} gives {have}, not {want}"
    return None


def _materialize(candidate: nn.Module, model: nn.Module, device: torch.device, seed: int | None) -> None:
    """Allocate and fill: copies at unchanged size, draws of the model's own law elsewhere."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    source = dict(model.named_parameters())
    for name, parameter in candidate.named_parameters():
        new = redraw(model, name, source[name], parameter.shape, generator)
        parameter.data = new.to(device=device, dtype=parameter.dtype)
    buffers = dict(model.named_buffers())
    for path, leaf, shape in list(_meta_buffers(candidate)):
        name = f"{path}.{leaf}".strip(".")
        owner = candidate.get_submodule(path)
        owner._buffers[leaf] = _rebuild_buffer(name, buffers[name], shape).to(device)


def _meta_buffers(module: nn.Module) -> Iterator[tuple[str, str, torch.Size]]:
    for path, child in module.named_modules():
        for leaf, buffer in child._buffers.items():
            if buffer is not None:
                yield path, leaf, buffer.shape


def _rebuild_buffer(name: str, old: Tensor, shape: torch.Size) -> Tensor:
    if old.shape == shape and not old.is_meta:
        return old.detach().clone()
    if old.is_meta:
        raise ResizeError(
            f"buffer {name} is on the meta device, so its values are unknown; build the model on cpu"
        )
    if old.numel() and bool(
        (old == old.flatten()[0]).all()
    ):  # running statistics, counters, masks of one value
        return torch.full(shape, old.flatten()[0].item(), dtype=old.dtype)
    raise ResizeError(f"buffer {name} grows with width and is not constant; its new values cannot be known")
