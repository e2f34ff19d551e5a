"""Rules for operators that work elementwise, reduce, normalize or create."""

from collections.abc import Sequence

from mupass._dims.engine import NOWHERE, Axis, Call, Result, Value, rule


def broadcast(call: Call, values: Sequence[Value], rank: int) -> list[Axis]:
    """Unify the axes of several tensors under broadcasting and return the result's axes."""
    result = []
    for back in range(rank, 0, -1):
        axes = [v.axes[-back] for v in values if len(v.axes) >= back]
        wide = [a for a in axes if a.size != 1] or axes[:1]
        if not wide:
            result.append(call.new(1))
            continue
        for other in wide[1:]:
            call.unify(wide[0], other)
        origin = NOWHERE.union(*(a.origin for a in wide))
        result.append(Axis(wide[0].dim, wide[0].size, origin))
    return result


@rule(
    "pointwise",
    "aten.dropout",
    "aten.to",
    "aten.type_as",
    "aten.float",
    "aten.contiguous",
    "aten.alias",
    "aten.detach",
    "aten.detach_",
    "aten.copy_",
    "aten.prelu",
    "aten.complex",
    "aten.polar",
    "aten.real",
    "aten.imag",
    "aten.native_dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten._to_copy",
    "aten.feature_alpha_dropout",
    "aten.floor_divide",
    "aten.bernoulli",
    "aten.lift_fresh_copy",
    "aten.softmax",
    "aten._softmax",
    "aten.log_softmax",
    "aten._log_softmax",
    "aten.cumsum",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.tril",
    "aten.triu",
    "aten.flip",
    "aten.roll",
    "aten.fill_",
    "aten.fill",
    "aten.true_divide",
    "aten.divide",
    "aten.multiply",
    "aten.subtract",
    "aten.logical_not",
    "aten.conj",
    "aten._conj",
    "aten.resolve_conj",
    "aten.resolve_neg",
    "aten.positive",
    "aten.softmin",
    "aten.square_",
    "aten.zero_",
    "aten.normal_",
    "aten.uniform_",
    "aten.bernoulli_",
    "aten.hardswish",
    "aten.hardtanh",
    "aten.clip",
    "aten.greater",
    "aten.greater_equal",
    "aten.less",
    "aten.less_equal",
    "aten.not_equal",
    "aten.absolute",
    "aten.arctan2",
    "aten.isfinite",
    "aten.isreal",
    "aten.isneginf",
    "aten.isposinf",
    "aten.selu",
    "aten.relu6",
    "aten.celu",
    "aten.rrelu",
    "aten.embedding_renorm_",
    "aten.normal",
    "aten.masked_scatter",
    "aten.renorm",
    "aten.poisson",
    "aten.exponential_",
    "aten.special_erf",
    "aten.special_expit",
    "aten.float_power",
    "aten.xlogy",
    "aten.addcmul_",
    "aten.lift",
    "aten.lift_fresh",
    "aten.fix",
    "aten.isclose",
    "aten.cummax",
    "aten.cummin",
    "aten.dropout_",
    "aten.broadcast_tensors_",
    "aten.renorm_",
    "aten._neg_view",
    "aten.neg_",
    "aten.result_type",
    "aten.fake_quantize_per_tensor_affine",
    "prims.convert_element_type",
    "aten.cauchy_",
    "aten.random_",
    "aten.where",
    "aten.__and__",
    "aten.__or__",
    "aten.__xor__",
    "aten.__lshift__",
    "aten.__rshift__",
    "aten.__iand__",
    "aten.__ior__",
    "aten.and_",
)
def pointwise(call: Call) -> Result:
    """Every axis is kept; operands broadcast against each other."""
    values = [v for v in call.values if v is not None]
    moving = [v for v in values if not v.static]
    for value in values:
        if value.parametric and moving:
            call.pointwise_use("pointwise", value)
    outputs = []
    for shape in call.shapes:
        axes = broadcast(call, values, max(len(shape), max(len(v.axes) for v in values)))[
            -len(shape) or None :
        ]
        outputs.append(call.value(axes if shape else ()))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@rule(
    "create",
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.arange",
    "aten.linspace",
    "aten.rand",
    "aten.randn",
    "aten.randint",
    "aten.eye",
    "aten.scalar_tensor",
    "aten.randperm",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.tril_indices",
    "aten.triu_indices",
    "aten.hann_window",
    "aten.hamming_window",
    "aten._assert_tensor_metadata",
    "aten.nonzero",
    "aten.tensor",
    "aten.bincount",
    "aten.unique",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.logspace",
    "aten.empty_strided",
    "aten.new_empty_strided",
    "aten.histc",
    "aten.searchsorted",
    "aten.bucketize_",
)
def create(call: Call) -> Result:
    """New axes of literal size: nothing is known of them until they meet another tensor."""
    outputs = [call.value([call.new(s) for s in shape], static=True) for shape in call.shapes]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@rule(
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.rand_like",
    "aten.randn_like",
    "aten.randint_like",
)
def create_like(call: Call) -> Result:
    """The axes of the model, none of its values."""
    return Value(tuple(Axis(a.dim, a.size) for a in call.values[0].axes), static=call.static)


def wrap(dims: int | Sequence[int] | None, rank: int) -> set[int]:
    """Return non-negative axis numbers; None and () mean all axes."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}


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
)
def reduce(call: Call) -> Result:
    """The reduced axes go, the others stay."""
    values = call.values
    if len(values) == 2:  # max.other, min.other
        return pointwise(call)
    (source,) = values
    gone = wrap(call.get("dim"), len(source.axes))
    kept = [a for i, a in enumerate(source.axes) if i not in gone]
    held = [call.new(1) if i in gone else a for i, a in enumerate(source.axes)]
    outputs = [
        call.value(kept if len(s) == len(kept) and not call.get("keepdim") else held) for s in call.shapes
    ]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@rule("aten.argmax", "aten.argmin", "aten.topk", "aten.sort", "aten.argsort", "aten.kthvalue", "aten.msort")
def select_by_value(call: Call) -> Result:
    """Positions along the axis are told apart, so it is a set of alternatives and does not grow."""
    source = call.values[0]
    dim = call.get("dim", -1)
    axis = dim % max(len(source.axes), 1)
    if source.axes:
        call.finite(source.axes[axis], "its entries are ranked")
    outputs = []
    for shape in call.shapes:
        if len(shape) < len(source.axes):
            axes = [a for i, a in enumerate(source.axes) if i != axis]
            outputs.append(call.value(axes if shape else ()))
        else:
            held = list(source.axes)
            if held and shape[axis] != held[axis].size:
                held[axis] = call.new(shape[axis])
            outputs.append(call.value(held))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """Normalizes the last axes; gain and bias lie along them."""
    source: Value = call["input"]
    for name in ("weight", "bias"):
        _affine(call, call.get(name), source.axes[len(source.axes) - len(call["normalized_shape"]) :])
    first = call.value(source.axes)
    if len(call.shapes) == 1:
        return first
    extra = [
        call.value([a if a.size == s else call.new(s) for a, s in zip(source.axes, shape, strict=True)])
        for shape in call.shapes[1:]
    ]
    return (first, *extra)


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
    for name in ("weight", "bias", "running_mean", "running_var"):
        _affine(call, call.get(name), source.axes[1:2])
    first = call.value(source.axes)
    if len(call.shapes) == 1:
        return first
    rest = [
        call.value([source.axes[1]] if s == (source.axes[1].size,) else [call.new(n) for n in s])
        for s in call.shapes[1:]
    ]
    return (first, *rest)


def _affine(call: Call, parameter: Value | None, axes: Sequence[Axis]) -> None:
    if not isinstance(parameter, Value):
        return
    for a, b in zip(parameter.axes, axes, strict=True):
        call.unify(a, b)
    if parameter.parametric:
        call.pointwise_use("norm", parameter)


@rule("aten.cosine_similarity", "aten.pairwise_distance")
def similarity(call: Call) -> Result:
    """Compares two tensors along one axis, which goes."""
    left, right = call.values[:2]
    rank = max(len(left.axes), len(right.axes))
    axes = broadcast(call, [left, right], rank)
    gone = call.get("dim", 1 if call.operator.endswith("similarity") else -1) % rank
    return call.value([a for i, a in enumerate(axes) if i != gone])


@rule(
    "aten.cross_entropy_loss",
    "aten.nll_loss",
    "aten.nll_loss_nd",
    "aten.mse_loss",
    "aten.l1_loss",
    "aten.smooth_l1_loss",
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
    "aten.huber_loss",
    "aten.kl_div",
    "aten.cosine_embedding_loss",
    "aten.margin_ranking_loss",
    "aten.ctc_loss",
    "aten.nll_loss2d",
    "aten.multilabel_soft_margin_loss",
    "aten.hinge_embedding_loss",
    "aten.soft_margin_loss",
    "aten.triplet_margin_loss",
    "aten.gaussian_nll_loss",
    "aten.poisson_nll_loss",
    "aten.multi_margin_loss",
)
def loss(call: Call) -> Result:
    """What a loss sees is compared with data, so its axes do not grow."""
    source = call.values[0]
    for axis in source.axes:
        call.finite(axis, "the loss compares it with data")
    axes: list[Axis] = []
    if call.shape:  # reduction="none"
        axes = [next((a for a in source.axes if a.size == s), call.new(s)) for s in call.shape]
    return call.value(axes)
