"""resize: the same architecture at another width, from one model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from mupass._analyze import geometry_of
from mupass._attributes import FIXED_NAMES, flatten_recurrent, set_attributes
from mupass._capture import Capture, capture
from mupass._dims.engine import Value, operator_name
from mupass._errors import MupassError
from mupass._geometry import Geometry
from mupass._infer import Inference, infer
from mupass._init import Draw, draws
from mupass._inputs import as_call, find_inputs
from mupass._names import name_dims
from mupass._sizes import NewSizes, ResizeError, grows

MOVES = ("aten.to", "aten._assert_tensor_metadata", "aten.contiguous", "aten.clone", "aten.detach")


def resize(
    model: nn.Module,
    width: int | Mapping[str, int] | None = None,
    *,
    scale: float | None = None,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
    fresh: bool = False,
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
        fresh: Draw all parameters anew, those of unchanged size too.
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
        set_attributes(candidate, captured, solved, sizes, fixed)
        failure = _mismatch(candidate, inputs, expected)
        if failure is None:
            geometries = _geometries(model, captured, solved, sizes)
            _materialize(candidate, model, geometries, torch.device(device), seed, fresh)
            return candidate
        failures.append(failure)
    raise ResizeError(f"{type(model).__name__} cannot be resized: {failures[0]}")


def _geometries(model: nn.Module, captured: Capture, solved: Inference, sizes: NewSizes) -> list[Geometry]:
    """Describe every parameter, with the new shape in the place of the base shape."""
    found = []
    for name, parameter in model.named_parameters():
        dims = solved.dims[name]
        infinite = tuple(grows(solved, d) for d in dims)
        new = tuple(float(sizes.of_dim(d)) for d in dims)
        found.append(geometry_of(name, tuple(parameter.shape), new, infinite, captured, solved, sizes.names))
    return found


def _guesses(
    model: nn.Module, captured: Capture, solved: Inference, sizes: NewSizes
) -> Iterator[frozenset[str]]:
    """Yield sets of attribute names to leave alone where a size is both a width and something fixed.

    The names only order the guesses: a wrong guess fails the comparison of shapes and the next is tried.
    """
    keys = set_attributes(_skeleton(model), captured, solved, sizes, frozenset())
    likely = frozenset(k for k in keys if FIXED_NAMES.search(k))
    yield likely
    yield from (likely ^ {k} for k in sorted(keys))
    yield from (frozenset(), frozenset(keys))


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


def _operators(captured: Capture) -> list[Node]:
    """Operators that compute; moves between devices and layouts differ on the meta device."""
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


def _materialize(
    candidate: nn.Module,
    model: nn.Module,
    geometries: Sequence[Geometry],
    device: torch.device,
    seed: int | None,
    fresh: bool,
) -> None:
    """Allocate and fill: copies at unchanged size, draws of the model's own law elsewhere."""
    if any(p.is_meta for p in model.parameters()):
        _initialize(candidate, device, seed)
        return
    source = {n: p.detach() for n, p in model.named_parameters()}
    odd = [n for n, p in source.items() if not p.is_floating_point()]
    if odd:
        raise ResizeError(f"{odd[0]} is {source[odd[0]].dtype}: only the laws of real parameters can be told")
    laws = draws(source, geometries)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in candidate.named_parameters():
        old = source[name]
        kept = old.shape == parameter.shape and not fresh
        new = old.clone() if kept else _sample(laws[name], parameter.shape, generator)
        made[id(parameter)] = nn.Parameter(new.to(device, parameter.dtype), parameter.requires_grad)
    for module in candidate.modules():  # a meta tensor cannot take data of another device, so it is replaced
        module._parameters.update({k: made[id(p)] for k, p in module._parameters.items() if p is not None})
        flatten_recurrent(module)
    buffers = dict(model.named_buffers())
    for path, leaf, shape in list(_meta_buffers(candidate)):
        name = f"{path}.{leaf}".strip(".")
        candidate.get_submodule(path)._buffers[leaf] = _rebuild_buffer(name, buffers[name], shape).to(device)


def _sample(law: Draw, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Draw a tensor by its law."""
    if law.constant is not None:
        return torch.full(shape, law.constant)
    assert law.std is not None
    if law.uniform:
        bound = math.sqrt(3) * law.std
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0, law.std, generator=generator)


def _initialize(candidate: nn.Module, device: torch.device, seed: int | None) -> None:
    """Initialize a copy of a meta-device model by its own modules' code.

    Raises:
        ResizeError: A parameter belongs to a module without ``reset_parameters``, or a buffer has no values.
    """
    buffers = [f"{p}.{n}".strip(".") for p, n, _ in _meta_buffers(candidate)]
    owners = {id(p): m for m in candidate.modules() for p in m._parameters.values() if p is not None}
    hugging_face = hasattr(candidate, "init_weights") and hasattr(candidate, "_init_weights")
    orphans = [
        n
        for n, p in candidate.named_parameters()
        if not hugging_face and not hasattr(owners[id(p)], "reset_parameters")
    ]
    norms = (nn.modules.batchnorm._NormBase,)
    kept = {
        f"{p}.{n}".strip(".")
        for p, m in candidate.named_modules()
        if isinstance(m, norms)
        for n in m._buffers
    }
    lost = [n for n in buffers if n not in kept]
    if orphans or lost:
        raise ResizeError(
            f"the model is on the meta device and {(orphans or lost)[0]} has no code to initialize it; "
            "build it on cpu"
        )
    candidate.to_empty(device=device)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in candidate.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if hugging_face:
            candidate.init_weights()  # type: ignore[operator]


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
