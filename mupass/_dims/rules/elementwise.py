"""Rules for operators that work elementwise or create."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result
from mupass._dims.facts import NOWHERE, Axis, Value
from mupass._dims.registry import rule


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
    "aten.masked_fill",
    "aten.log_sigmoid",
    "aten._weight_norm",
    "aten._is_all_true",
    "aten.cumsum",
    "aten.cumprod",
    "aten.logcumsumexp",
    "aten.tril",
    "aten.triu",
    "aten.flip",
    "aten.fliplr",
    "aten.flipud",
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
    # mul(w, s): a matrix times one number of the data, or one a sample or a matrix, is still that matrix.
    if moving and any(v.parametric and _is_matrix(v, moving) for v in values):
        return call.value(broadcast(call, values, len(call.shape)), static=True)
    for value in values:
        if value.parametric and moving:
            call.pointwise_use("pointwise", value)
            call.facts.spread.update(_spread(value, moving))
    outputs = []
    for shape in call.shapes:
        axes = broadcast(call, values, max(len(shape), max(len(v.axes) for v in values)))[
            -len(shape) or None :
        ]
        outputs.append(call.value(axes if shape else ()))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _is_matrix(parameter: Value, moving: Sequence[Value]) -> bool:
    """Whether a parameter has two axes along which all that it meets has single entries."""
    long = [back for back, a in enumerate(parameter.axes[::-1]) if a.size > 1]
    alone = [b for b in long if all(b >= len(v.axes) or v.axes[-1 - b].size == 1 for v in moving)]
    return len(alone) > 1


def _spread(vector: Value, moving: Sequence[Value]) -> list[int]:
    """Return the one axis of a parameter that what it meets has as a single entry."""
    long = [(back, a) for back, a in enumerate(vector.axes[::-1]) if a.size > 1]
    met = [v.axes[-1 - back] for back, _ in long for v in moving if back < len(v.axes)]
    return [long[0][1].dim] if len(long) == 1 and met and all(a.size == 1 for a in met) else []


@rule("aten.where")
def where(call: Call) -> Result:
    """Choose entry by entry; with the condition alone, the indices where it holds."""
    return pointwise(call) if "other" in call.arguments else create(call)


@rule("aten.copy", "aten.copy_")
def keep(call: Call) -> Result:
    """The axes of the first tensor; the second broadcasts into it."""
    broadcast(call, call.values, len(call.shape))
    return call.value(call.values[0].axes)


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


@rule("aten.rot90")
def rotate(call: Call) -> Result:
    """Turn a plane by right angles: an odd number of them swaps its axes."""
    axes = list(call.values[0].axes)
    i, j = call["dims"]
    if call.get("k", 1) % 2:
        axes[i], axes[j] = axes[j], axes[i]
    return call.value(axes)


@rule("aten.eye")
def eye(call: Call) -> Result:
    """The axes of an identity matrix are one."""
    rows, columns = (call.new(s) for s in call.shape)
    call.unify(rows, columns)
    return call.value([rows, columns], static=True)


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
