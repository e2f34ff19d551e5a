"""Rules for operators that join tensors, cut them, pad them or slide along them."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result
from mupass._dims.facts import NOWHERE, Axis, Origin
from mupass._dims.graph import is_filled
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast
from mupass._dims.rules.reshape import split_axis


def _joined_axis(call: Call, parts: Sequence[Axis], size: int, origin: Origin = NOWHERE) -> Axis:
    """Return an axis that is the concatenation of others."""
    joined = Axis(call.space.new(size), size, origin)
    dims = [part.dim for part in parts]
    call.space.sum(joined.dim, tuple(dims))
    call.facts.parts += dims
    return joined


def _with_axis(axes: Sequence[Axis], dim: int, axis: Axis) -> list[Axis]:
    """Return axes with one of them replaced."""
    return [*axes[:dim], axis, *axes[dim + 1 :]]


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call) -> Result:
    """Join along one axis, which becomes the sum of the parts."""
    values = [value for value in call.values if len(value.axes) == len(call.shape)]
    dim = call.get("dim", 0) % len(call.shape)
    axes = []
    for position, size in enumerate(call.shape):
        parts = [value.axes[position] for value in values]
        first, *others = parts
        origin = NOWHERE.union(*(part.origin for part in parts))
        # Axes that are not joined agree; a lone tensor is joined to nothing.
        if position != dim or not others:
            for other in others:
                call.unify(first, other)
            axes.append(Axis(first.dim, size, origin))
            continue
        joined = _joined_axis(call, parts, size, origin)
        axes.append(joined)
        # cat([W_q, W_k]) of parameters: one weight, whose parts are weights.
        if call.static and all(part.origin for part in parts):
            call.facts.joined.append(joined.dim)
        # Single positions that are joined are as many as the code has written.
        if all(part.size == 1 for part in parts):
            call.finite(joined, "a concatenation of single positions")
    return call.value(axes)


@rule("aten.block_diag")
def block_diag(call: Call) -> Result:
    """Join matrices along both axes: rows become the sum of their rows, columns that of their columns."""
    rows, columns = [], []
    for block in call.values:
        # A vector is a block of one row, a number one of one entry.
        missing = [call.new(1) for _ in range(2 - len(block.axes))]
        row, column = [*missing, *block.axes]
        rows.append(row)
        columns.append(column)
    joined = []
    for size, parts in zip(call.shape, (rows, columns), strict=True):
        if len(parts) == 1:  # a lone matrix is joined to nothing
            joined.append(parts[0])
            continue
        origin = NOWHERE.union(*(part.origin for part in parts))
        joined.append(_joined_axis(call, parts, size, origin))
        # block_diag(w_1, w_2) of parameters: one weight, whose parts are weights.
        if call.static and all(part.origin for part in parts):
            call.facts.joined.append(joined[-1].dim)
    return call.value(joined)


@rule("aten.stack")
def stack(call: Call) -> Result:
    """Join along a new axis."""
    values = call.values
    rank = len(values[0].axes)
    axes = broadcast(call, values, rank)
    count = call.new(len(values))
    call.finite(count, "a stack of separate tensors")
    call.facts.stacked.add(count.dim)
    axes.insert(call.get("dim", 0) % (rank + 1), count)
    return call.value(axes)


@rule("aten.pad_sequence")
def pad_sequence(call: Call) -> Result:
    """Join sequences of any lengths along a new axis; the longest tells how many positions there are."""
    sequences = call.values
    longest = max(sequences, key=lambda sequence: sequence.axes[0].size)
    for sequence in sequences:
        for features, others in zip(longest.axes[1:], sequence.axes[1:], strict=True):
            call.unify(features, others)
    count = call.new(len(sequences))
    call.finite(count, "a stack of separate tensors")
    axes = [longest.axes[0], count, *longest.axes[1:]]
    if call.get("batch_first"):
        axes[:2] = axes[1::-1]
    return call.value(axes)


@rule("aten.hstack", "aten.vstack", "aten.row_stack", "aten.dstack", "aten.column_stack")
def numpy_stack(call: Call) -> Result:
    """Join along an old axis, as numpy does, or along a new one where tensors have too few."""
    values = call.values
    rank = len(values[0].axes)
    if rank != len(call.shape):
        return call.unknown(call.shape)
    dim = {"aten.vstack": 0, "aten.row_stack": 0, "aten.dstack": 2}.get(call.operator, min(1, rank - 1))
    axes = list(values[0].axes)
    for value in values[1:]:
        for position in range(rank):
            if position != dim:
                call.unify(axes[position], value.axes[position])
    axes[dim] = _joined_axis(call, [value.axes[dim] for value in values], call.shape[dim])
    return call.value(axes)


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unsafe_split",
    "aten.unsafe_chunk",
    "aten.split_copy",
    "aten.hsplit",
    "aten.vsplit",
    "aten.dsplit",
    "aten.unsafe_split_with_sizes",
    "aten.split_with_sizes_copy",
)
def split(call: Call) -> Result:
    """Cut one axis into parts."""
    source = call.values[0]
    fixed_dim = {"aten.hsplit": min(1, len(source.axes) - 1), "aten.vsplit": 0, "aten.dsplit": 2}
    dim = fixed_dim.get(call.operator, call.get("dim", 0)) % len(source.axes)
    whole = source.axes[dim]
    parts = []
    for shape in call.shapes:
        size = shape[dim]
        parts.append(whole if size == whole.size else Axis(call.space.new(size), size, whole.origin))
    if len(parts) > 1:
        # q, k, v = qkv.chunk(3, -1): the parts stand in a row and cover the whole.
        call.space.cut(whole.dim, tuple(part.dim for part in parts))
        if all(part.size == 1 for part in parts):
            call.enumerate(whole, "its positions are split off one by one")
    return [call.value(_with_axis(source.axes, dim, part)) for part in parts]


@rule("aten.slice", "aten.narrow", "aten.slice_copy")
def slice_(call: Call) -> Result:
    """Take a span of one axis: a part of it, or with a step one of two factors."""
    source = call.values[0]
    dim = call.get("dim", 0) % len(source.axes)
    axis, size = source.axes[dim], call.shape[dim]
    start, step = call.get("start", 0), call.get("step", 1)
    if not isinstance(start, int):  # it depends on data
        sliced = call.derive(axis, size)
    elif step == 1 or size == axis.size:
        # x[:, -3:] counts from the end.
        if start < 0:
            start = max(start + axis.size, 0)
        sliced = Axis(call.space.part(axis.dim, start, start + size), size, axis.origin)
    elif axis.size % step == 0 and size * step == axis.size:
        # x[::step]: every position is a pair of one that is taken and a phase.
        sliced, phase = split_axis(call, axis, [size, step])
        call.finite(phase, "a stride")
    else:
        sliced = call.derive(axis, size)
    return call.value(_with_axis(source.axes, dim, sliced))


@rule("aten.select", "aten.unbind", "aten.select_copy", "aten.unbind_copy")
def select(call: Call) -> Result:
    """Take single positions of one axis; they mean different things, so it does not grow."""
    source = call.values[0]
    dim = call.get("dim", 0) % len(source.axes)
    if not is_filled(call.node.args[0]):  # all its entries are alike: the pick is made for its shape
        call.pick(source.axes[dim], call.get("index"))
    remaining = call.value(source.axes[:dim] + source.axes[dim + 1 :])
    if call.operator.startswith("aten.select"):
        return remaining
    return [remaining] * len(call.shapes)


@rule(
    "aten.diagonal",
    "aten.diag_embed",
    "aten.diag",
    "aten.diagflat",
    "aten.linalg_diagonal",
    "aten.trace",
)
def diagonal(call: Call) -> Result:
    """Read or write a diagonal: the two axes are one."""
    source = call.values[0]
    if len(call.shape) > len(source.axes):  # a vector onto a diagonal
        return call.value([*source.axes, call.resized(source.axes[-1], call.shape[-1])])
    first = call.get("dim1", 0) % len(source.axes)
    second = call.get("dim2", 1) % len(source.axes)
    remaining = [axis for position, axis in enumerate(source.axes) if position not in (first, second)]
    if len(call.shape) == len(remaining):  # a trace
        return call.value(remaining)
    return call.value([*remaining, call.resized(source.axes[first], call.shape[-1])])


@rule(
    "aten.pad",
    "aten.constant_pad_nd",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
    "aten.replication_pad3d",
    "aten.reflection_pad3d",
    "aten._pad_circular",
    "aten._pad_enum",
    "aten.diff",
    "aten.cumulative_trapezoid",
)
def pad(call: Call) -> Result:
    """Pad, or leave an entry out: the axis grows when it did before."""
    return call.value(map(call.resized, call.values[0].axes, call.shape))


@rule("aten.as_strided", "aten.as_strided_copy")
def as_strided(call: Call) -> Result:
    """Axes are recognized by their strides; one of another length slides along its source."""
    source = call.values[0]
    of_source = call.node.args[0].meta["val"].stride()  # type: ignore[union-attr]
    by_stride = dict(zip(of_source, source.axes, strict=True))
    axes = []
    for size, stride in zip(call.shape, call["stride"], strict=True):
        # An axis of the view with the stride of a source axis goes along that axis.
        axis = by_stride.pop(stride, None)
        if axis is None:
            axes.append(call.new(size))
        else:
            axes.append(call.resized(axis, size))
    return call.value(axes)


@rule("aten.unfold", "aten.unfold_copy")
def unfold(call: Call) -> Result:
    """Slide a window along an axis: count in place, window last."""
    # [b, l] -> [b, windows, k]
    source = call.values[0]
    dim = call["dimension"] % len(source.axes)
    axes = list(source.axes)
    window = call.new(call.shape[-1])
    call.finite(window, "a window of literal size")
    call.facts.windows.append((window.dim, call["step"]))
    axes[dim] = call.derive(axes[dim], call.shape[dim])
    return call.value([*axes, window])
