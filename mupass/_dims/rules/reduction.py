"""Rules for operators that reduce, rank, normalize or compare along axes."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import Axis, Value
from mupass._dims.graph import is_getitem
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast, pointwise


@rule(
    "aten.softmax",
    "aten._softmax",
    "aten._safe_softmax",
    "aten.log_softmax",
    "aten._log_softmax",
    "aten.softmin",
    "aten.special_softmax",
    "aten.special_log_softmax",
)
def softmax(call: Call) -> Result:
    """Entries along the axis compete: they are alternatives."""
    source = call.values[0]
    if source.axes:
        axis = source.axes[call["dim"] % len(source.axes)]
        call.alternative(axis, "its entries compete in a softmax")
        call.facts.softmaxed.add(axis.dim)
    return call.value(source.axes)


def wrap(dims: int | Sequence[int] | None, rank: int) -> set[int]:
    """Return non-negative axis numbers; None and () mean all axes."""
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        return set(range(rank))
    return {dim % max(rank, 1) for dim in dims}


@rule(
    "aten.sum",
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.max",
    "aten.min",
    "aten.var",
    "aten.std",
    "aten.var_mean",
    "aten.std_mean",
    "aten.prod",
    "aten.all",
    "aten.any",
    "aten.logsumexp",
    "aten.norm",
    "aten.linalg_vector_norm",
    "aten.nansum",
    "aten.nanmean",
    "aten.median",
    "aten.nanmedian",
    "aten.mode",
    "aten.count_nonzero",
    "aten.aminmax",
    "aten.frobenius_norm",
    "aten.special_logsumexp",
    "aten.linalg_norm",
    "aten.native_norm",
    "aten.nuclear_norm",
    "aten.trapezoid",
    "aten.trapz",
)
def reduce(call: Call) -> Result:
    """The reduced axes go, the others stay."""
    values = call.values
    if len(values) == 2:  # max.other, min.other
        return pointwise(call)
    (source,) = values
    # values, places = x.max(1): where places are read, entries are told apart as by argmax.
    if call.operator in ("aten.max", "aten.min") and len(call.shapes) == 2 and _places_are_read(call):
        _rank(call, source.axes[call["dim"] % len(source.axes)])
    default = -1 if call.operator.startswith("aten.trap") else None
    remaining, kept_as_ones = _left(call, source, default)
    if call.operator == "aten.prod" and not source.static:
        call.facts.multiplied.update({axis.dim: call.where for axis in remaining})
    outputs = []
    for shape in call.shapes:
        # Of several outputs (values, indices) each has lost the axes, or has them of length 1.
        dropped = len(shape) == len(remaining) and not call.get("keepdim")
        outputs.append(call.value(remaining if dropped else kept_as_ones))
    return one_or_all(outputs)


def _places_are_read(call: Call) -> bool:
    """Whether something reads where the extremes are, as `argmax` would tell."""
    # getitem(max, 1), the second result, holds the places.
    position_getters = [reader for reader in call.node.users if is_getitem(reader) and reader.args[1] == 1]
    return any(reader.users for reader in position_getters)


def _rank(call: Call, axis: Axis) -> None:
    call.finite(axis, "its entries are ranked")
    call.facts.ranked.append(axis.dim)


def _left(call: Call, source: Value, default: int | None = None) -> tuple[list[Axis], list[Axis]]:
    """Return the axes that a reduction leaves, and all axes with those that go of length 1."""
    reduced = wrap(call.get("dim", default), len(source.axes))
    remaining, kept_as_ones = [], []
    for position, axis in enumerate(source.axes):
        if position in reduced:
            kept_as_ones.append(call.new(1))
        else:
            kept_as_ones.append(axis)
            remaining.append(axis)
    return remaining, kept_as_ones


@rule("aten.linalg_matrix_norm", "aten.linalg_cond")
def matrix_norm(call: Call) -> Result:
    """Two axes go, by default the last."""
    call.arguments.setdefault("dim", [-2, -1])
    return reduce(call)


@rule("aten.segment_reduce")
def segment_reduce(call: Call) -> Result:
    """Rows of a segment become one row."""
    axes = list(call["data"].axes)
    axes[call["axis"]] = call.new(call.shape[call["axis"]])
    return call.value(axes)


@rule("aten.dist")
def distance(call: Call) -> Result:
    """One number for two tensors that agree."""
    left, right = call.values[:2]
    broadcast(call, [left, right], max(len(left.axes), len(right.axes)))
    return call.value(())


@rule("aten.quantile", "aten.nanquantile")
def quantile(call: Call) -> Result:
    """As `reduce`; several quantiles are a new first axis."""
    remaining, kept_as_ones = _left(call, call.values[0])
    axes = kept_as_ones if call.get("keepdim") else remaining
    quantile_axes = call.shape[: len(call.shape) - len(axes)]
    return call.value([*map(call.new, quantile_axes), *axes])


@rule("aten.argmax", "aten.argmin", "aten.topk", "aten.sort", "aten.argsort", "aten.kthvalue", "aten.msort")
def select_by_value(call: Call) -> Result:
    """Positions along the axis are told apart, so it is a set of alternatives and does not grow."""
    source = call.values[0]
    if not source.axes:
        return one_or_all([call.value(()) for _ in call.shapes])
    last = 0 if call.operator == "aten.msort" else -1
    dim = call.get("dim", last) % len(source.axes)
    ranked = source.axes[dim]
    _rank(call, ranked)
    outputs = []
    for shape in call.shapes:
        axes = list(source.axes)
        if not shape:
            axes = []
        elif len(shape) < len(axes):
            del axes[dim]
        elif shape[dim] != ranked.size:  # topk
            axes[dim] = call.new(shape[dim])
        outputs.append(call.value(axes))
    return one_or_all(outputs)


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """Normalizes the last axes; gain and bias lie along them."""
    source: Value = call["input"]
    # F.layer_norm(x, x.shape[-2:]): gain and bias have the last two axes.
    normalized = source.axes[len(source.axes) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        _affine(call, call.get(name), normalized)
    outputs = [call.value(source.axes)]
    for shape in call.shapes[1:]:  # mean and deviation
        axes = zip(source.axes, shape, strict=True)
        outputs.append(call.value([axis if axis.size == size else call.new(size) for axis, size in axes]))
    return one_or_all(outputs)


@rule(
    "aten.batch_norm",
    "aten.instance_norm",
    "aten.native_batch_norm",
    "aten.group_norm",
    "aten.native_group_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten.cudnn_batch_norm",
    "aten._batch_norm_with_update",
)
def channel_norm(call: Call) -> Result:
    """Normalizes per channel (axis 1); gain, bias and running statistics lie along it."""
    source: Value = call["input"]
    channels = source.axes[1:2]
    for name in ("weight", "bias", "running_mean", "running_var"):
        _affine(call, call.get(name), channels)
    outputs = [call.value(source.axes)]
    for shape in call.shapes[1:]:  # mean and deviation
        # A mean and a deviation for each channel, or shapes that only a backward pass reads.
        per_channel = shape == (channels[0].size,)
        outputs.append(call.value(channels) if per_channel else call.unknown(shape))
    return one_or_all(outputs)


def _affine(call: Call, parameter: Value | None, axes: Sequence[Axis]) -> None:
    """Tie a gain, a bias or a statistic to the axes that it lies along."""
    if not isinstance(parameter, Value):
        return
    for parameter_axis, axis in zip(parameter.axes, axes, strict=True):
        call.unify(parameter_axis, axis)
    if parameter.parametric:
        call.pointwise_use("norm", parameter)


@rule("aten.cosine_similarity", "aten.pairwise_distance")
def similarity(call: Call) -> Result:
    """Compares two tensors along one axis, which goes."""
    left, right = call.values[:2]
    rank = max(len(left.axes), len(right.axes))
    axes = broadcast(call, [left, right], rank)
    default = {"aten.cosine_similarity": 1}.get(call.operator, -1)
    del axes[call.get("dim", default) % rank]
    return call.value(axes)


@rule(
    "aten.mse_loss",
    "aten.l1_loss",
    "aten.smooth_l1_loss",
    "aten.huber_loss",
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
    "aten.soft_margin_loss",
    "aten.poisson_nll_loss",
    "aten.kl_div",
)
def comparison(call: Call) -> Result:
    """Compares entry by entry: both sides agree, and are as fixed as the data on either of them."""
    source, target = call.values[:2]
    # The axes of a target are data, and those of the prediction agree with them.
    axes = broadcast(call, [source, target], max(len(source.axes), len(target.axes)))
    return call.value(axes if call.shape else ())


@rule(
    "aten.cross_entropy_loss",
    "aten.nll_loss",
    "aten.nll_loss_nd",
    "aten.cosine_embedding_loss",
    "aten.margin_ranking_loss",
    "aten.ctc_loss",
    "aten.nll_loss2d",
    "aten.multilabel_soft_margin_loss",
    "aten.hinge_embedding_loss",
    "aten.triplet_margin_loss",
    "aten.gaussian_nll_loss",
    "aten.multi_margin_loss",
)
def loss(call: Call) -> Result:
    """What a loss sees is compared with data, so its axes do not grow."""
    source = call.values[0]
    for axis in source.axes:
        call.finite(axis, "the loss compares it with data")
    axes = []  # none, but for reduction="none"
    for size in call.shape:
        same_size = [axis for axis in source.axes if axis.size == size]
        axes.append(same_size[0] if same_size else call.new(size))
    return call.value(axes)
