"""Rules for operators that reduce, rank, normalize or compare along axes."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result
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
    if len(call.shapes) == 2 and call.operator in ("aten.max", "aten.min") and _places_are_read(call):
        _rank(call, source.axes[call["dim"] % len(source.axes)])
    kept, held = _left(call, source, -1 if "trap" in call.operator else None)
    outputs = [
        call.value(kept if len(s) == len(kept) and not call.get("keepdim") else held) for s in call.shapes
    ]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _places_are_read(call: Call) -> bool:
    """Whether something reads where the extremes are, as `argmax` would tell."""
    return any(is_getitem(user) and user.args[1] == 1 and user.users for user in call.node.users)


def _rank(call: Call, axis: Axis) -> None:
    call.finite(axis, "its entries are ranked")
    call.facts.ranked.append(axis.dim)


def _left(call: Call, source: Value, default: int | None = None) -> tuple[list[Axis], list[Axis]]:
    """Return the axes that a reduction leaves, and all axes with those that go of length 1."""
    gone = wrap(call.get("dim", default), len(source.axes))
    kept = [a for i, a in enumerate(source.axes) if i not in gone]
    return kept, [call.new(1) if i in gone else a for i, a in enumerate(source.axes)]


@rule("aten.linalg_matrix_norm", "aten.linalg_cond")
def matrix_norm(call: Call) -> Result:
    """Two axes go, by default the last."""
    call.arguments.setdefault("dim", [-2, -1])
    return reduce(call)


@rule("aten.dist")
def distance(call: Call) -> Result:
    """One number for two tensors that agree."""
    left, right = call.values[:2]
    broadcast(call, [left, right], max(len(left.axes), len(right.axes)))
    return call.value(())


@rule("aten.quantile", "aten.nanquantile")
def quantile(call: Call) -> Result:
    """As `reduce`; several quantiles are a new first axis."""
    kept, held = _left(call, call.values[0])
    axes = held if call.get("keepdim") else kept
    return call.value([*(call.new(s) for s in call.shape[: len(call.shape) - len(axes)]), *axes])


@rule("aten.argmax", "aten.argmin", "aten.topk", "aten.sort", "aten.argsort", "aten.kthvalue", "aten.msort")
def select_by_value(call: Call) -> Result:
    """Positions along the axis are told apart, so it is a set of alternatives and does not grow."""
    source = call.values[0]
    dim = call.get("dim", -1)
    axis = dim % max(len(source.axes), 1)
    if source.axes:
        _rank(call, source.axes[axis])
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
    axes: list[Axis] = []
    if call.shape:  # reduction="none"
        axes = [next((a for a in source.axes if a.size == s), call.new(s)) for s in call.shape]
    return call.value(axes)
