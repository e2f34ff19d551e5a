"""Rules for operators that only move, split, join or repeat axes."""

from collections.abc import Sequence

from mupass._dims.elementwise import broadcast
from mupass._dims.engine import NOWHERE, Axis, Call, Result, product_of, rule


def split_axis(call: Call, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Split one axis into factors, row-major."""
    factors = [Axis(call.space.new(s), s, axis.origin) for s in sizes]
    call.space.product(axis.dim, tuple(f.dim for f in factors))
    return factors


def merge_axes(call: Call, axes: Sequence[Axis]) -> Axis:
    """Merge several axes into one, row-major."""
    axes = [a for a in axes if a.size != 1] or list(axes[:1])
    if len(axes) == 1:
        return axes[0]
    whole = Axis(call.space.new(product_of(axes)), product_of(axes), NOWHERE.union(*(a.origin for a in axes)))
    call.space.product(whole.dim, tuple(a.dim for a in axes))
    return whole


def regroup(call: Call, source: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Line up the axes of a view with those of its source in the smallest groups of equal size."""
    left = [a for a in source if a.size != 1]
    right = [(i, s) for i, s in enumerate(sizes) if s != 1]
    result: dict[int, Axis] = {}
    at = 0
    while right:
        group, outs = [left[at]], [right.pop(0)]
        at += 1
        have, want = group[0].size, outs[0][1]
        while have != want:
            if have < want:
                group.append(left[at])
                have, at = have * left[at].size, at + 1
            else:
                outs.append(right.pop(0))
                want *= outs[-1][1]
        whole = merge_axes(call, group)
        parts = [whole] if len(outs) == 1 else split_axis(call, whole, [s for _, s in outs])
        result.update(zip((i for i, _ in outs), parts, strict=True))
    return [result.get(i) or call.new(1) for i in range(len(sizes))]


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
        for axis, size in zip(axes, literals, strict=True):
            if size != -1:
                call.literal(axis, "written as a number in a view whose other factor is left open")
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
    call.space.sum(axes[dim].dim, tuple(v.axes[dim].dim for v in values))
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
        call.space.sum(whole.dim, tuple(p.dim for p in parts))
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
    call.enumerate(source.axes[dim], "its positions are taken one by one")
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


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.channel_shuffle", "aten.native_channel_shuffle")
def pixel_shuffle(call: Call) -> Result:
    """Trade channels for positions by a literal factor."""
    source = call.values[0]
    *batch, c, h, w = source.axes
    if call.operator.endswith("channel_shuffle"):
        groups = call["groups"]
        outer, inner = split_axis(call, c, [groups, c.size // groups])
        call.literal(outer, "the number of groups of a channel shuffle")
        return call.value([*batch, merge_axes(call, [inner, outer]), h, w])
    shuffle = call.operator == "aten.pixel_shuffle"
    factor = call["upscale_factor"] if shuffle else call["downscale_factor"]
    if shuffle:
        small, a, b = split_axis(call, c, [c.size // factor**2, factor, factor])
    else:
        a, b = call.new(factor), call.new(factor)
        small = merge_axes(call, [c, a, b])
    for axis in (a, b):
        call.finite(axis, "the factor of a pixel shuffle")
    return call.value([*batch, small, call.derive(h, call.shape[-2]), call.derive(w, call.shape[-1])])


@rule("aten.im2col", "aten.col2im")
def im2col(call: Call) -> Result:
    """Trade positions for channels x kernel, or back."""
    source = call.values[0]
    taps = product_of([call.new(k) for k in call["kernel_size"]])
    batch = source.axes[:1]
    if call.operator == "aten.im2col":
        kernel = call.new(taps)
        call.finite(kernel, "kernel positions")
        return call.value(
            [*batch, merge_axes(call, [source.axes[1], kernel]), call.derive(source.axes[2], call.shape[2])]
        )
    channels, kernel = split_axis(call, source.axes[1], [source.axes[1].size // taps, taps])
    call.finite(kernel, "kernel positions")
    return call.value([*batch, channels, *(call.derive(source.axes[2], s) for s in call.shape[2:])])


@rule("aten.meshgrid", "aten.broadcast_tensors", "aten.cartesian_prod")
def meshgrid(call: Call) -> Result:
    """Spread tensors over a common grid."""
    values = call.values
    if call.operator == "aten.broadcast_tensors":
        axes = broadcast(call, values, max(len(v.axes) for v in values))
        return [call.value(axes) for _ in values]
    if call.operator == "aten.cartesian_prod":
        return call.value([call.new(s) for s in call.shape])
    axes = [v.axes[0] if v.axes else call.new(1) for v in values]
    if call.get("indexing") == "xy":
        axes[:2] = axes[1::-1]
    return [call.value(axes) for _ in values]


@rule("aten.view_as_real", "aten.view_as_complex")
def complex_view(call: Call) -> Result:
    """Complex numbers as a last axis of two, or back."""
    source = call.values[0]
    if call.operator.endswith("complex"):
        call.finite(source.axes[-1], "real and imaginary part")
        return call.value(source.axes[:-1])
    pair = call.new(2)
    call.finite(pair, "real and imaginary part")
    return call.value([*source.axes, pair])


@rule(
    "aten.fft_fft",
    "aten.fft_ifft",
    "aten.fft_rfft",
    "aten.fft_irfft",
    "aten.fft_fft2",
    "aten.fft_ifft2",
    "aten.fft_rfft2",
    "aten.fft_irfft2",
    "aten.fft_fftn",
    "aten.fft_ifftn",
    "aten.fft_rfftn",
    "aten.fft_irfftn",
    "aten.fft_fftshift",
    "aten.fft_ifftshift",
    "aten.fft_hfft",
)
def fft(call: Call) -> Result:
    """Transform along axes; an axis of another length grows when the source did."""
    source = call.values[0]
    return call.value(
        [a if a.size == s else call.derive(a, s) for a, s in zip(source.axes, call.shape, strict=True)]
    )


@rule("aten.stft", "aten.istft")
def stft(call: Call) -> Result:
    """Short-time transforms live on data axes of literal length."""
    source = call.values[0]
    return call.value(
        [
            *(source.axes[:1] if len(call.shape) == 3 else ()),
            *(call.derive(source.axes[-1], s) for s in call.shape[-2:]),
        ]
    )
