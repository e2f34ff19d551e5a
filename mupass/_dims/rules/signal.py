"""Rules for grids and signals: pixel shuffle, patches, complex numbers, Fourier transforms."""

from math import prod

from mupass._dims.call import Call, Result
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast
from mupass._dims.rules.reshape import merge_axes, split_axis


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(call: Call) -> Result:
    """Trade channels for positions by a literal factor."""
    *batch, channels, height, width = call.values[0].axes
    # [c r r, h, w] -> [c, h r, w r], or back
    if call.operator == "aten.pixel_shuffle":
        factor = call["upscale_factor"]
        # The first factor stays channels, the other two become steps within a position.
        made_channels, *step_axes = split_axis(call, channels, [channels.size // factor**2, factor, factor])
    else:
        step_axes = [call.new(call["downscale_factor"]), call.new(call["downscale_factor"])]
        made_channels = merge_axes(call, [channels, *step_axes])
    for axis in step_axes:
        call.finite(axis, "the factor of a pixel shuffle")
    rows, columns = call.shape[-2:]
    return call.value([*batch, made_channels, call.derive(height, rows), call.derive(width, columns)])


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call) -> Result:
    """Groups x channels become channels x groups."""
    *batch, channels, height, width = call.values[0].axes
    groups = call["groups"]
    outer, inner = split_axis(call, channels, [groups, channels.size // groups])
    call.literal(outer, "the number of groups of a channel shuffle")
    return call.value([*batch, merge_axes(call, [inner, outer]), height, width])


@rule("aten.im2col")
def im2col(call: Call) -> Result:
    """Trade positions for channels x kernel."""
    batch, channels, height = call.values[0].axes[:3]
    # [b, c, h, w] -> [b, c k k, positions]
    kernel = call.new(prod(call["kernel_size"]))
    call.finite(kernel, "kernel positions")
    return call.value([batch, merge_axes(call, [channels, kernel]), call.derive(height, call.shape[2])])


@rule("aten.col2im")
def col2im(call: Call) -> Result:
    """Trade channels x kernel for positions."""
    batch, columns, positions = call.values[0].axes
    taps = prod(call["kernel_size"])
    channels, kernel = split_axis(call, columns, [columns.size // taps, taps])
    call.finite(kernel, "kernel positions")
    return call.value([batch, channels, *(call.derive(positions, size) for size in call.shape[2:])])


@rule("aten.meshgrid")
def meshgrid(call: Call) -> Result:
    """Spread vectors over a common grid."""
    axes = [value.axes[0] if value.axes else call.new(1) for value in call.values]
    if call.get("indexing") == "xy":  # the first two are swapped, as in numpy
        axes[:2] = axes[1::-1]
    return [call.value(axes) for _ in call.values]


@rule("aten.broadcast_tensors")
def broadcast_tensors(call: Call) -> Result:
    """Expand tensors to a common shape."""
    values = call.values
    axes = broadcast(call, values, max(len(value.axes) for value in values))
    return [call.value(axes) for _ in values]


@rule("aten.gradient")
def gradient(call: Call) -> Result:
    """Differences along one axis or several, each as large as the tensor."""
    return [call.value(call["self"].axes) for _ in call.shapes]


@rule("aten.cartesian_prod", "aten.combinations")
def cartesian_product(call: Call) -> Result:
    """All combinations of entries, one a row."""
    return call.unknown(call.shape)


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
    "aten.fft_ihfft",
    "aten.fft_hfft2",
    "aten.fft_ihfft2",
    "aten.fft_hfftn",
    "aten.fft_ihfftn",
)
def fft(call: Call) -> Result:
    """Transform along axes; an axis of another length grows when the source did."""
    return call.value(map(call.resized, call.values[0].axes, call.shape))


@rule("aten.stft", "aten.istft")
def stft(call: Call) -> Result:
    """Short-time transforms live on data axes of literal length."""
    # Frequencies and frames both come of the samples of data.
    *batch, samples = call.values[0].axes
    frequency_and_time = [call.derive(samples, size) for size in call.shape[-2:]]
    if len(call.shape) == 3:
        return call.value([*batch[:1], *frequency_and_time])
    return call.value(frequency_and_time)
