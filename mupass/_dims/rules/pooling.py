"""Rules for operators that pool, resample or warp positions; channels stay."""

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import bare
from mupass._dims.registry import rule


@rule(
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.max_pool3d",
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten.adaptive_avg_pool3d",
    "aten.adaptive_max_pool1d",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.max_pool2d_with_indices",
    "aten.max_pool1d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.fractional_max_pool2d",
    "aten.lp_pool2d",
    "aten.max_unpool2d",
    "aten.max_unpool3d",
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d",
    "aten._upsample_nearest_exact1d",
    "aten._upsample_nearest_exact2d",
    "aten._upsample_nearest_exact3d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
)
def pool(call: Call) -> Result:
    """Positions derive from positions; channels stay."""
    axes = call.values[0].axes
    return one_or_all([call.value(map(call.resized, axes, shape)) for shape in call.shapes])


@rule("aten.affine_grid_generator")
def affine_grid(call: Call) -> Result:
    """Coordinates of a grid under affine maps."""
    batch, *affine = call["theta"].axes
    for axis in affine:
        call.finite(axis, "an affine map of coordinates")
    return call.value([*bare([batch]), *map(call.new, call.shape[1:])])


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(call: Call) -> Result:
    """Channels of the input, positions of the grid."""
    source, grid = call["input"], call["grid"]
    call.unify(source.axes[0], grid.axes[0])
    call.finite(grid.axes[-1], "coordinates of a sampling grid")
    return call.value([*source.axes[:2], *bare(grid.axes[1:-1])])


@rule("aten.roi_align", "torchvision.roi_align", "torchvision.ps_roi_align")
def roi_align(call: Call) -> Result:
    """Boxes x channels x literal bins."""
    source = call.values[0]
    bins = list(map(call.new, call.shape[2:]))
    for axis in bins:
        call.finite(axis, "bins of a region pooling")
    return call.value([call.new(call.shape[0]), source.axes[1], *bins])
