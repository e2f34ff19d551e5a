"""Rules for operators that look up, gather or scatter."""

from collections.abc import Sequence

import torch

from mupass._dims.call import Call, Result
from mupass._dims.facts import Axis, Value, bare
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast


def _record_table(call: Call, table: Value) -> None:
    """Record a lookup table: its length never grows, its rows are what a weight makes."""
    call.finite(table.axes[0], "the length of a lookup table")
    if table.parametric:
        rows = table.axes[1:]
        call.facts.rows += [axis.dim for axis in rows]
        call.use("embedding", table.axes[:1], rows, table)


@rule("aten.embedding")
def embedding(call: Call) -> Result:
    """One row of the table for each index: the table length never grows, the row does."""
    table, indices = call["weight"], call["indices"]
    _record_table(call, table)
    return call.value([*bare(indices.axes), *table.axes[1:]])


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Result:
    """Pooled rows of a lookup table."""
    table = call["weight"]
    _record_table(call, table)
    bags, *others = call.shapes
    pooled = call.value([call.new(bags[0]), *table.axes[1:]])
    return (pooled, *map(call.unknown, others))


@rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Result:
    """Advanced indexing: the indexed axes go, the broadcast index axes come."""
    source: Value = call["self"]
    indices = {position: item for position, item in enumerate(call["indices"]) if isinstance(item, Value)}
    if any(_is_mask(call, position) for position in indices):
        return _masked(call, source, call["indices"])
    # x[i, j]: both indices broadcast to one shape.
    common = bare(broadcast(call, list(indices.values()), max(len(i.axes) for i in indices.values())))
    for position, picked in indices.items():
        _pick_by_index(call, source, source.axes[position], picked)
    kept_axes = [axis for position, axis in enumerate(source.axes) if position not in indices]
    indexed = list(indices)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if adjacent else 0  # x[i, :, j]: what is picked comes first
    return call.value([*kept_axes[:start], *common, *kept_axes[start:]])


def _is_mask(call: Call, position: int) -> bool:
    """Whether an index is a boolean mask."""
    node = call.node.args[1][position]  # type: ignore[index]
    value = getattr(node, "meta", {}).get("val")
    return value is not None and value.dtype in (torch.bool, torch.uint8)


def _masked(call: Call, source: Value, indices: Sequence[Value | None]) -> Value:
    """A boolean mask merges the axes that it covers into one of data-dependent length."""
    # x[mask] with a mask over two axes: both give way to one, of as many entries as are true.
    remaining = list(source.axes)
    axes: list[Axis] = []
    was_picked = False
    for mask in indices:
        if not remaining:
            break
        if mask is None:
            axes.append(remaining.pop(0))
            continue
        # Several masks pick together: one axis comes out for all of them.
        if not was_picked:
            axes.append(call.new(call.shape[len(axes)]))
        was_picked = True
        del remaining[: len(mask.axes)]
    return call.value([*axes, *remaining])


def _pick_by_index(call: Call, source: Value, axis: Axis, index: Value) -> None:
    """Rows that are picked by index are told apart; for a bare table that means it does not grow."""
    call.alternative(axis, "its positions are picked by index")
    # table[index], such as relative positions: as with a lookup, the length of the table is no width.
    if source.parametric:
        call.finite(axis, "the length of an indexed table")
        # w[permutation]: a fixed index may as well put the units of a weight in another order.
        if index.static and len(index.axes) == 1:
            call.facts.reordered.append((axis.dim, index.axes[0].dim))
        other_axes = [other for other in source.axes if other.dim != axis.dim]
        call.use("embedding", [axis], other_axes, source)
    elif not source.static and index.static and len(index.axes) == 1:
        # x[:, permutation] is as long as x; of x[:, chosen] as many are chosen as x has for a fixed index.
        if index.sizes == (axis.size,):
            call.unify(index.axes[0], axis)
        elif index.axes[0].size > 1 and axis.size > 1:
            call.space.derived.append((index.axes[0].dim, axis.dim))


@rule("aten.index_select")
def index_select(call: Call) -> Result:
    """Pick positions along one axis by index."""
    source: Value = call["self"]
    picked: Value = call["index"]
    dim = call["dim"] % max(len(source.axes), 1)
    _pick_by_index(call, source, source.axes[dim], picked)
    axes = list(source.axes)
    axes[dim] = Axis(picked.axes[0].dim, call.shape[dim]) if picked.axes else call.new(1)
    return call.value(axes)


@rule("aten.gather", "aten.take_along_dim", "aten.gather_nd")
def gather(call: Call) -> Result:
    """Pick along one axis; the other axes agree with the index where sizes do."""
    source: Value = call["self"]
    indices: Value = call.get("index", call.get("indices"))
    dim = call.get("dim")
    if dim is None:
        return call.unknown(call.shape)
    dim %= max(len(source.axes), 1)
    axes = []
    for position, (axis, index_axis) in enumerate(zip(source.axes, indices.axes, strict=True)):
        result = Axis(index_axis.dim, index_axis.size)
        if position == dim:
            call.alternative(axis, "its positions are picked by index")
        elif axis.size == index_axis.size or index_axis.size == 1:
            call.unify(axis, index_axis)
            result = axis if axis.size == call.shape[position] else index_axis
        axes.append(result)
    return call.value(axes)


@rule(
    "aten.scatter",
    "aten.scatter_add",
    "aten.scatter_reduce",
    "aten.index_add",
    "aten.index_copy",
    "aten.index_put",
    "aten.select_scatter",
    "aten.slice_scatter",
    "aten.index_fill",
    "aten.diagonal_scatter",
    "aten.index_reduce",
    "aten._index_put_impl",
)
def scatter(call: Call) -> Result:
    """Write into a tensor: the target's axes come out, and what is written agrees with them."""
    target: Value = call["self"]
    source = call.get("src", call.get("source", call.get("values", call.get("value"))))
    if isinstance(source, Value) and source.axes:
        _match_written(call, target, source)
        _match_index(call, source)
    return call.value(target.axes)


def _match_index(call: Call, source: Value) -> None:
    """An index of every entry that is written has the axes of what is written: a scatter over edges."""
    index = call.get("index")
    if call.operator.startswith("aten.scatter") and isinstance(index, Value):
        for axis, index_axis in zip(source.axes, index.axes, strict=False):
            call.unify(axis, index_axis)


def _match_written(call: Call, target: Value, source: Value) -> None:
    """Axes of what is written agree with those of the target, but the one along which it is written."""
    name = call.operator.removesuffix("_")
    if name == "aten.index_put":
        _match_put(call, target, source)
        return
    axes = list(source.axes)
    dim = call.get("dim", -1) % len(target.axes)
    if name == "aten.select_scatter":  # x.select(dim, index) = source, which lacks that axis
        axes.insert(dim, target.axes[dim])
    if len(axes) != len(target.axes):
        return
    for position, (axis, written_axis) in enumerate(zip(target.axes, axes, strict=True)):
        if position != dim:
            call.unify(axis, written_axis)


def _match_put(call: Call, target: Value, source: Value) -> None:
    """The trailing axes that no index touches agree with those of the values."""
    touched = 0
    for position, item in enumerate(call["indices"]):
        if isinstance(item, Value) and _is_mask(call, position):
            touched += max(len(item.axes), 1)
        else:
            touched += 1
    # x[i, j] = v: axes behind the indexed ones are written as a whole.
    for axis, other in zip(target.axes[touched:][::-1], source.axes[::-1], strict=False):
        call.unify(axis, other)


@rule("aten.multinomial")
def multinomial(call: Call) -> Result:
    """Draws from alternatives, row by row."""
    source = call.values[0]
    call.alternative(source.axes[-1], "its entries are drawn from")
    return call.value([*source.axes[:-1], call.new(call.shape[-1])])


@rule("aten.masked_select", "aten.take", "aten.argwhere")
def flat_pick(call: Call) -> Result:
    """A flat pick of entries: the result has an axis of its own."""
    return call.unknown(call.shape)


@rule("aten.one_hot")
def one_hot(call: Call) -> Result:
    """A new axis of alternatives."""
    classes = call.new(call.shape[-1])
    call.finite(classes, "the classes of a one-hot code")
    return call.value([*call.values[0].axes, classes])


@rule("aten.bucketize", "aten.isin")
def bucketize(call: Call) -> Result:
    """Keeps the axes of the values that are looked up."""
    axes = call.values[0].axes
    if len(axes) == len(call.shape):
        return call.value(axes)
    return call.unknown(call.shape)
