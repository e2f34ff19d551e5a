"""Rules for operators that join tensors, cut them, pad them or slide along them."""

from mupass._dims.call import Call, Result, rule
from mupass._dims.elementwise import broadcast
from mupass._dims.facts import NOWHERE, Axis
from mupass._dims.graph import is_filled
from mupass._dims.shape import split_axis


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: Call) -> Result:
    """Join along one axis, which becomes the sum of the parts."""
    values = [v for v in call.values if len(v.axes) == len(call.shape)]
    dim = call.get("dim", 0) % len(call.shape)
    axes = []
    for i, size in enumerate(call.shape):
        column = [v.axes[i] for v in values]
        origin = NOWHERE.union(*(a.origin for a in column))
        if i != dim or len(column) == 1:
            for other in column[1:]:
                call.unify(column[0], other)
            axes.append(Axis(column[0].dim, size, origin))
        else:
            axes.append(Axis(call.space.new(size), size, origin))
            parts = [a.dim for a in column]
            call.space.sum(axes[-1].dim, tuple(parts))
            call.facts.parts += parts
            if call.static and all(a.origin for a in column):
                call.facts.joined.append(axes[-1].dim)
            if all(a.size == 1 for a in column):
                call.finite(axes[-1], "a concatenation of single positions")
    return call.value(axes)


@rule("aten.stack", "aten.hstack", "aten.vstack", "aten.dstack", "aten.column_stack")
def stack(call: Call) -> Result:
    """Join along a new axis (or, for the numpy-like forms, an old one)."""
    values, name = call.values, call.operator
    rank = len(values[0].axes)
    if name == "aten.stack":
        dim = call.get("dim", 0) % (rank + 1)
        axes = broadcast(call, values, rank)
        axes.insert(dim, call.new(len(values)))
        call.finite(axes[dim], "a stack of separate tensors")
        call.facts.stacked.add(axes[dim].dim)
        return call.value(axes)
    dim = {"aten.hstack": 1 if rank > 1 else 0, "aten.column_stack": 1, "aten.vstack": 0, "aten.dstack": 2}[
        name
    ]
    if rank != len(call.shape):
        axes = [call.new(s) for s in call.shape]
        return call.value(axes)
    axes = [
        a if i != dim else call.new(s)
        for i, (a, s) in enumerate(zip(values[0].axes, call.shape, strict=True))
    ]
    for value in values[1:]:
        for i in range(rank):
            if i != dim:
                call.unify(axes[i], value.axes[i])
    parts = [v.axes[dim].dim for v in values]
    call.space.sum(axes[dim].dim, tuple(parts))
    call.facts.parts += parts
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
    "aten.unsafe_split_with_sizes",
    "aten.split_with_sizes_copy",
)
def split(call: Call) -> Result:
    """Cut one axis into parts."""
    source = call.values[0]
    fixed = {"aten.hsplit": min(1, len(source.axes) - 1), "aten.vsplit": 0}
    dim = fixed.get(call.operator, call.get("dim", 0)) % len(source.axes)
    whole = source.axes[dim]
    parts = [
        whole if s[dim] == whole.size else Axis(call.space.new(s[dim]), s[dim], whole.origin)
        for s in call.shapes
    ]
    if len(parts) > 1:
        call.space.cut(whole.dim, tuple(p.dim for p in parts))
        if all(p.size == 1 for p in parts):
            call.enumerate(whole, "its positions are split off one by one")
    return [call.value(source.axes[:dim] + (p,) + source.axes[dim + 1 :]) for p in parts]


@rule("aten.slice", "aten.narrow", "aten.slice_copy")
def slice_(call: Call) -> Result:
    """Take a span of one axis: a part of it, or with a step one of two factors."""
    source = call.values[0]
    dim = call.get("dim", 0) % len(source.axes)
    axis, size = source.axes[dim], call.shape[dim]
    start = call.get("start", 0)
    if not isinstance(start, int):
        return call.value(
            [
                call.derive(a, s) if i == dim else a
                for i, (a, s) in enumerate(zip(source.axes, call.shape, strict=True))
            ]
        )
    start = max(start + axis.size, 0) if start < 0 else start
    step = call.get("step", 1)
    if step == 1 or size == axis.size:
        taken = Axis(call.space.part(axis.dim, start, start + size), size, axis.origin)
    elif axis.size % step == 0 and size * step == axis.size:
        taken, phase = split_axis(call, axis, [size, step])
        call.finite(phase, "a stride")
    else:
        taken = call.derive(axis, size)
    return call.value(source.axes[:dim] + (taken,) + source.axes[dim + 1 :])


@rule("aten.select", "aten.unbind", "aten.select_copy", "aten.unbind_copy")
def select(call: Call) -> Result:
    """Take single positions of one axis; they mean different things, so it does not grow."""
    source = call.values[0]
    dim = call.get("dim", 0) % len(source.axes)
    if not is_filled(call.node.args[0]):  # all its entries are alike: the pick is made for its shape
        call.pick(source.axes[dim], call.get("index"))
    rest = call.value(source.axes[:dim] + source.axes[dim + 1 :])
    return rest if call.operator.startswith("aten.select") else [rest] * len(call.shapes)


@rule("aten.diagonal", "aten.diag_embed", "aten.diag", "aten.linalg_diagonal", "aten.trace")
def diagonal(call: Call) -> Result:
    """Read or write a diagonal: the two axes are one."""
    source = call.values[0]
    if len(call.shape) > len(source.axes):
        return call.value([*source.axes, call.derive(source.axes[-1], call.shape[-1])])
    first, second = (call.get(n, d) % len(source.axes) for n, d in (("dim1", 0), ("dim2", 1)))
    kept = [a for i, a in enumerate(source.axes) if i not in (first, second)]
    if len(call.shape) == len(kept):
        return call.value(kept)
    return call.value([*kept, call.derive(source.axes[first], call.shape[-1])])


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
)
def pad(call: Call) -> Result:
    """Pad: a padded axis grows when the axis did."""
    source = call.values[0]
    return call.value(
        [a if a.size == s else call.derive(a, s) for a, s in zip(source.axes, call.shape, strict=True)]
    )


@rule("aten.as_strided", "aten.as_strided_copy")
def as_strided(call: Call) -> Result:
    """Axes are recognized by their strides; one of another length slides along its source."""
    source = call.values[0]
    strides = dict(zip(call.node.args[0].meta["val"].stride(), source.axes, strict=True))  # type: ignore[union-attr]
    axes = []
    for size, stride in zip(call.shape, call["stride"], strict=True):
        found = strides.pop(stride, None)
        axes.append(
            call.new(size) if found is None else found if found.size == size else call.derive(found, size)
        )
    return call.value(axes)


@rule("aten.unfold", "aten.unfold_copy")
def unfold(call: Call) -> Result:
    """Slide a window along an axis: count in place, window last."""
    source = call.values[0]
    dim = call["dimension"] % len(source.axes)
    axes = list(source.axes)
    window = call.new(call.shape[-1])
    call.finite(window, "a window of literal size")
    axes[dim] = call.derive(axes[dim], call.shape[dim])
    return call.value([*axes, window])
