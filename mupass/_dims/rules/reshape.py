"""Rules for operators that only move, regroup or repeat axes."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import mul

from mupass._dims.call import Call, Result
from mupass._dims.facts import NOWHERE, Axis, Origin, Value
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast


def split_axis(call: Call, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Split one axis into factors, row-major."""
    factors = [call.new(size) for size in sizes]
    call.space.product(axis.dim, tuple(factor.dim for factor in factors))
    return [Axis(factor.dim, factor.size, _origin_of_factor(call, axis, factor)) for factor in factors]


def _origin_of_factor(call: Call, axis: Axis, factor: Axis) -> Origin:
    """Return the parameter axes that a factor is, where an axis was merged and is cut as before."""
    find = call.space.find
    parameter_axes = set()
    # view(b, h, d) of what was merged from h and d: each factor is the parameter's axis again.
    for parameter_axis in axis.origin:
        if find(call.facts.carried[parameter_axis]) == find(factor.dim):
            parameter_axes.add(parameter_axis)
    return frozenset(parameter_axes) or axis.origin


def merge_axes(call: Call, axes: Sequence[Axis]) -> Axis:
    """Merge several axes into one, row-major."""
    axes = [axis for axis in axes if axis.size != 1] or axes[:1]
    if len(axes) == 1:
        return axes[0]
    size = prod(axis.size for axis in axes)
    merged = call.space.new(size)
    call.space.product(merged, tuple(axis.dim for axis in axes))
    return Axis(merged, size, NOWHERE.union(*(axis.origin for axis in axes)))


def regroup(call: Call, source: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Carry the axes of a tensor over to a view of it."""
    result: dict[int, Axis] = {}
    # [2, 12] as [2, 3, 4]: 2 stays 2, and 12 becomes 3 x 4.
    for before, after in line_up([axis.size for axis in source], sizes):
        run = [source[position] for position in before]
        if len(before) > 1 and len(after) > 1:
            run = _cut_at(call, run, [sizes[position] for position in after])
        merged = merge_axes(call, run)
        parts = [merged]
        if len(after) > 1:
            parts = split_axis(call, merged, [sizes[position] for position in after])
        result.update(zip(after, parts, strict=True))
    return [result.get(position) or call.new(1) for position in range(len(sizes))]


def _cut_at(call: Call, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Cut axes where a view of them has a border inside of one, where each border lies on a whole number.

    [9, 2, 12] as [72, 3], as in ``weights.view(time * batch * heads, -1)``: the 12 is 4 x 3.

    Args:
        call: The view.
        axes: Axes of its source, in their order.
        sizes: Sizes of the view's axes, of the same product.
    """
    borders = sorted({*accumulate([axis.size for axis in axes], mul), *accumulate(sizes, mul)})
    if any(after % before for before, after in pairwise(borders)):
        return list(axes)
    cut_axes = []
    start = 1  # entries of one step along all axes so far
    for axis in axes:
        stop = start * axis.size
        inside = [start, *[border for border in borders if start < border < stop], stop]
        factors = [after // before for before, after in pairwise(inside)]
        cut_axes += split_axis(call, axis, factors) if len(factors) > 1 else [axis]
        start = stop
    return cut_axes


def line_up(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the axes of a view with those of its source, in the smallest groups of equal size.

    Args:
        before: Sizes of the source's axes.
        after: Sizes of the view's axes, of the same product.

    Returns:
        Pairs of axis numbers, of the source and of the view; axes of length 1 are in none.
    """
    source_axes = [position for position, size in enumerate(before) if size != 1]
    view_axes = [position for position, size in enumerate(after) if size != 1]
    groups = []
    while view_axes:
        # Both groups grow until they have the same number of entries.
        of_source, of_view = [source_axes.pop(0)], [view_axes.pop(0)]
        source_count, view_count = before[of_source[0]], after[of_view[0]]
        while source_count != view_count:
            # (12) -> (3, 4) takes another axis of the view, (3, 4) -> (12) another of the source.
            if source_count < view_count:
                of_source.append(source_axes.pop(0))
                source_count *= before[of_source[-1]]
            else:
                of_view.append(view_axes.pop(0))
                view_count *= after[of_view[-1]]
        groups.append((of_source, of_view))
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
    axes = regroup(call, call.values[0].axes, call.shape)
    _keep_counted(call, axes)
    _note_literals(call, axes)
    return call.value(axes)


def _keep_counted(call: Call, axes: Sequence[Axis]) -> None:
    """A size that values tell stays one where it is 1 by chance, and so looks like an axis of its own."""
    # A single token of an expert, x[None, idx].reshape(-1, d): another time there are more.
    counted = call.space.find_all(call.facts.counted)
    if any(axis.size == 1 and call.space.find(axis.dim) in counted for axis in call.values[0].axes):
        call.facts.counted.update(axis.dim for axis in axes if axis.size == 1)


def _note_literals(call: Call, axes: Sequence[Axis]) -> None:
    """Record the sizes that the code gives beside one that it leaves open."""
    # view(b, -1, 64): the sizes as the code gives them, with -1 for what is left open.
    sizes = call.get("size") or call.get("shape") or call.get("sizes") or ()
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(axes) or -1 not in sizes:
        return
    open_place = sizes.index(-1)
    for _, group in line_up([axis.size for axis in call.values[0].axes], call.shape):
        if open_place not in group:
            continue
        for position in group:
            if sizes[position] != -1:  # view(..., -1, 64): heads are left open, head_dim is written
                call.literal(axes[position], "written as a number in a view whose other factor is left open")


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
    axes = call.values[0].axes
    return call.value([axes[position] for position in _order(call, len(axes))])


def _order(call: Call, rank: int) -> list[int]:
    """Return which axis comes where."""
    name = call.operator.removesuffix("_").removesuffix("_copy")
    if name == "aten.permute":
        return [dim % rank for dim in call["dims"]]
    if name in ("aten.movedim", "aten.moveaxis"):
        return _moved_order(call["source"], call["destination"], rank)
    axis_order = list(range(rank))
    if name in ("aten.T", "aten.numpy_T"):
        return axis_order[::-1]
    # t() swaps the axes of a matrix; mT, adjoint and mH swap the last two.
    defaults = (0, 1) if name == "aten.t" else (-1, -2)
    first = call.get("dim0", call.get("axis0", defaults[0]))
    second = call.get("dim1", call.get("axis1", defaults[1]))
    if rank > 1:
        axis_order[first], axis_order[second] = axis_order[second], axis_order[first]
    return axis_order


def _moved_order(source: int | Sequence[int], target: int | Sequence[int], rank: int) -> list[int]:
    """Return the order of axes after some are moved; the others keep theirs."""
    sources = [source] if isinstance(source, int) else source
    targets = [target] if isinstance(target, int) else target
    source_of = {
        target_axis % rank: source_axis % rank
        for source_axis, target_axis in zip(sources, targets, strict=True)
    }
    # What is not moved keeps its order; the others are put in where they belong.
    axis_order = [axis for axis in range(rank) if axis not in source_of.values()]
    for position in sorted(source_of):
        axis_order.insert(position, source_of[position])
    return axis_order


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
    # Axes longer than 1 keep their order; those of 1 come and go.
    wide_axes = iter([axis for axis in call.values[0].axes if axis.size != 1])
    return call.value([call.new(1) if size == 1 else next(wide_axes) for size in call.shape])


@rule("aten.expand", "aten.broadcast_to", "aten.expand_as", "aten.expand_copy")
def expand(call: Call) -> Result:
    """Repeat axes of size 1; the count is a number from the code, or the other tensor's axis."""
    values = call.values
    if len(values) > 1:  # expand_as
        return call.value(broadcast(call, values, len(call.shape)))
    axes = []
    for axis, size in zip(_with_leading_ones(call, values[0]), call.shape, strict=True):
        axes.append(_repeat_count(call, size) if axis.size == 1 != size else axis)
    return call.value(axes)


def _with_leading_ones(call: Call, source: Value) -> list[Axis]:
    """Return the axes of a tensor behind as many of length 1 as the result has more."""
    return [call.new(1)] * (len(call.shape) - len(source.axes)) + list(source.axes)


def _repeat_count(call: Call, count: int) -> Axis:
    axis = call.new(count)
    call.literal(axis, "a repeat count")
    call.facts.repeated.setdefault(axis.dim, call.where)
    return axis


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Result:
    """Repeat whole axes: each becomes count x axis."""
    axes = []
    for axis, size in zip(_with_leading_ones(call, call.values[0]), call.shape, strict=True):
        if size != axis.size:
            # tile(x, 3) is [x, x, x]: the count stands ahead.
            axis = merge_axes(call, [_repeat_count(call, size // axis.size), axis])
        axes.append(axis)
    return call.value(axes)


@rule("aten.repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Repeat entries along one axis: axis x count."""
    axes, dim, count = list(call.values[0].axes), call.get("dim"), call.get("repeats")
    if dim is None:
        return call.unknown(call.shape)
    dim %= len(axes)
    if len(call.values) > 1 or not isinstance(count, int):  # another count for each entry
        axes[dim] = call.new(call.shape[dim])
    elif count > 1:
        # repeat_interleave(x, 3) has every entry three times in a row: the count stands behind.
        axes[dim] = merge_axes(call, [axes[dim], _repeat_count(call, count)])
    return call.value(axes)
