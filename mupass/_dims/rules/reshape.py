"""Rules for operators that only move, regroup or repeat axes."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result
from mupass._dims.facts import NOWHERE, Axis, Origin, product_of
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast


def split_axis(call: Call, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Split one axis into factors, row-major."""
    factors = [call.new(s) for s in sizes]
    call.space.product(axis.dim, tuple(f.dim for f in factors))
    return [Axis(f.dim, f.size, _own_origin(call, axis, f)) for f in factors]


def _own_origin(call: Call, axis: Axis, factor: Axis) -> Origin:
    """Return the parameter axes that a factor is, where an axis was merged and is cut as before."""
    find, carried = call.space.find, call.facts.carried
    own = frozenset(o for o in axis.origin if find(carried[o]) == find(factor.dim))
    return own or axis.origin


def merge_axes(call: Call, axes: Sequence[Axis]) -> Axis:
    """Merge several axes into one, row-major."""
    axes = [a for a in axes if a.size != 1] or list(axes[:1])
    if len(axes) == 1:
        return axes[0]
    whole = Axis(call.space.new(product_of(axes)), product_of(axes), NOWHERE.union(*(a.origin for a in axes)))
    call.space.product(whole.dim, tuple(a.dim for a in axes))
    return whole


def regroup(call: Call, source: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Carry the axes of a tensor over to a view of it."""
    result: dict[int, Axis] = {}
    for left, right in line_up([a.size for a in source], sizes):
        whole = merge_axes(call, [source[i] for i in left])
        parts = [whole] if len(right) == 1 else split_axis(call, whole, [sizes[i] for i in right])
        result.update(zip(right, parts, strict=True))
    return [result.get(i) or call.new(1) for i in range(len(sizes))]


def line_up(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the axes of a view with those of its source, in the smallest groups of equal size."""
    left, right = ([i for i, s in enumerate(side) if s != 1] for side in (before, after))
    groups = []
    while right:
        a, b = [left.pop(0)], [right.pop(0)]
        have, want = before[a[0]], after[b[0]]
        while have != want:
            if have < want:
                a.append(left.pop(0))
                have *= before[a[-1]]
            else:
                b.append(right.pop(0))
                want *= after[b[-1]]
        groups.append((a, b))
    return groups


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten._reshape_alias",
    "aten.view_as",
    "aten.reshape_as",
    "aten.ravel",
    "aten._reshape_copy",
    "aten.view_copy",
    "aten.flatten_",
)
def view(call: Call) -> Result:
    """Reshape; literal sizes in the code are remembered as hints."""
    source = call.values[0]
    axes = regroup(call, source.axes, call.shape)
    literals = call.get("size") or call.get("shape") or call.get("sizes") or ()
    if isinstance(literals, (list, tuple)) and len(literals) == len(axes) and -1 in literals:
        for _, group in line_up([a.size for a in source.axes], call.shape):
            for i in group:
                if literals.index(-1) in group and literals[i] != -1:
                    call.literal(axes[i], "written as a number in a view whose other factor is left open")
    return call.value(axes)


@rule(
    "aten.permute",
    "aten.transpose",
    "aten.t",
    "aten.movedim",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.mT",
    "aten.T",
    "aten.numpy_T",
    "aten.moveaxis",
    "aten.adjoint",
    "aten.matrix_H",
    "aten.permute_copy",
    "aten.transpose_",
    "aten.t_",
    "aten.mH",
)
def permute(call: Call) -> Result:
    """Move axes."""
    axes = list(call.values[0].axes)
    rank = len(axes)
    name = call.operator.removesuffix("_").removesuffix("_copy")
    if name == "aten.permute":
        order = [d % rank for d in call["dims"]]
    elif name in ("aten.movedim", "aten.moveaxis"):
        source, target = ([d] if isinstance(d, int) else d for d in (call["source"], call["destination"]))
        order = [i for i in range(rank) if i not in {s % rank for s in source}]
        for t, s in sorted((t % rank, s % rank) for s, t in zip(source, target, strict=True)):
            order.insert(t, s)
    elif name in ("aten.T", "aten.numpy_T"):
        order = list(range(rank))[::-1]
    else:
        first = call.get("dim0", call.get("axis0", 0 if name == "aten.t" else -1))
        second = call.get("dim1", call.get("axis1", 1 if name == "aten.t" else -2))
        order = list(range(rank))
        if rank > 1:
            a, b = first % rank, second % rank
            order[a], order[b] = order[b], order[a]
    return call.value([axes[i] for i in order])


@rule(
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.atleast_1d",
    "aten.atleast_2d",
    "aten.atleast_3d",
    "aten.unsqueeze_",
    "aten.squeeze_",
)
def squeeze(call: Call) -> Result:
    """Add or drop axes of size 1."""
    return call.value(regroup_ones(call, call.values[0].axes, call.shape))


def regroup_ones(call: Call, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Carry the axes wider than 1 over to a shape that differs only in ones."""
    wide = iter([a for a in axes if a.size != 1])
    return [call.new(1) if s == 1 else next(wide) for s in shape]


@rule("aten.expand", "aten.broadcast_to", "aten.expand_as", "aten.expand_copy")
def expand(call: Call) -> Result:
    """Repeat axes of size 1; the count is a number from the code, or the other tensor's axis."""
    source, values = call.values[0], call.values
    if len(values) > 1:
        return call.value(broadcast(call, values, len(call.shape)))
    axes = [call.new(1)] * (len(call.shape) - len(source.axes)) + list(source.axes)
    return call.value(
        [_repeated(call, s) if a.size == 1 != s else a for a, s in zip(axes, call.shape, strict=True)]
    )


def _repeated(call: Call, size: int) -> Axis:
    axis = call.new(size)
    call.literal(axis, "a repeat count")
    return axis


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Result:
    """Repeat whole axes: each becomes count x axis."""
    source = call.values[0]
    axes = [call.new(1)] * (len(call.shape) - len(source.axes)) + list(source.axes)
    result = []
    for axis, size in zip(axes, call.shape, strict=True):
        count = size // axis.size
        result.append(axis if count == 1 else merge_axes(call, [_repeated(call, count), axis]))
    return call.value(result)


@rule("aten.repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Repeat entries along one axis: axis x count."""
    source, dim = call.values[0], call.get("dim")
    if len(call.values) > 1 or dim is None or not isinstance(call.get("repeats"), int):
        return call.value(
            [
                call.new(s) if dim is None or i == dim % len(call.shape) else a
                for i, (s, a) in enumerate(zip(call.shape, source.axes, strict=False))
            ]
        )
    axes = list(source.axes)
    dim %= len(axes)
    if call["repeats"] > 1:
        axes[dim] = merge_axes(call, [axes[dim], _repeated(call, call["repeats"])])
    return call.value(axes)
