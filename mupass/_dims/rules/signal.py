"""Rules for grids and signals: pixel shuffle, patches, complex numbers, Fourier transforms."""

from mupass._dims.call import Call, Result
from mupass._dims.facts import product_of
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast
from mupass._dims.rules.reshape import merge_axes, split_axis


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
