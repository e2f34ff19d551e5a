"""Rules for operators that work elementwise or create."""

from collections.abc import Iterable, Sequence

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import NOWHERE, Axis, Value, bare
from mupass._dims.registry import rule


def broadcast(call: Call, values: Sequence[Value], rank: int) -> list[Axis]:
    """Unify the axes of several tensors under broadcasting and return the result's axes."""
    result = []
    for from_end in range(rank, 0, -1):
        axes = [value.axes[-from_end] for value in values if len(value.axes) >= from_end]
        # Axes of size 1 are broadcast, and say nothing about the others.
        wide_axes = [axis for axis in axes if axis.size != 1] or axes[:1]
        if not wide_axes:
            result.append(call.new(1))
            continue
        first, *others = wide_axes
        for other in others:
            call.unify(first, other)
        origin = NOWHERE.union(*(axis.origin for axis in wide_axes))
        result.append(Axis(first.dim, first.size, origin))
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
    return pointwise_of(call, call.values)


def pointwise_of(call: Call, values: Sequence[Value]) -> Result:
    """Return the result of an operator that works entry by entry.

    Args:
        call: The operator call.
        values: Its operands, as they are broadcast against each other.
    """
    moving = [value for value in values if not value.static]
    # mul(w, s): a matrix times one number of the data, or one a sample or a matrix, is still that matrix.
    if moving and any(value.parametric and is_matrix(value, moving) for value in values):
        return call.value(broadcast(call, values, len(call.shape)), static=True)
    for value in values:
        if value.parametric and moving:
            call.pointwise_use("pointwise", value)
            axis = _outer_axis(value, moving)
            if axis is not None:
                call.facts.spread.add(axis.dim)
    widest = max(len(value.axes) for value in values)
    outputs = []
    for shape in call.shapes:
        rank = len(shape)
        axes = broadcast(call, values, max(rank, widest))
        outputs.append(call.value(axes[len(axes) - rank :]))
    return one_or_all(outputs)


def _partners(back: int, moving: Iterable[Value]) -> list[Axis]:
    """Return the axes of other operands that broadcast against one axis, counted from the last."""
    return [value.axes[-1 - back] for value in moving if back < len(value.axes)]


def is_matrix(parameter: Value, moving: Sequence[Value]) -> bool:
    """Whether a parameter has two axes along which all that it meets has single entries.

    Args:
        parameter: The parameter.
        moving: What it is multiplied with.
    """
    axes_alone = 0
    for from_end, axis in enumerate(parameter.axes[::-1]):
        if axis.size > 1 and all(other.size == 1 for other in _partners(from_end, moving)):
            axes_alone += 1
    return axes_alone > 1


def _outer_axis(vector: Value, moving: Sequence[Value]) -> Axis | None:
    """Return the one axis of a parameter that what it meets has as a single entry.

    Frequencies times a position, ``sin(t[..., None] * w)``, are the pattern: an outer product.
    """
    long_axes = [(from_end, axis) for from_end, axis in enumerate(vector.axes[::-1]) if axis.size > 1]
    if len(long_axes) != 1:
        return None
    from_end, axis = long_axes[0]
    partners = _partners(from_end, moving)
    if partners and all(other.size == 1 for other in partners):
        return axis
    return None


@rule("aten.where")
def where(call: Call) -> Result:
    """Choose entry by entry; with the condition alone, the indices where it holds."""
    if "other" in call.arguments:
        return pointwise(call)
    return count(call)


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
    "aten.bartlett_window",
    "aten.blackman_window",
    "aten.kaiser_window",
    "aten.range",
    "aten.fft_fftfreq",
    "aten.fft_rfftfreq",
    "aten._assert_tensor_metadata",
    "aten.tensor",
    "aten.bincount",
    "aten.logspace",
    "aten.empty_strided",
    "aten.new_empty_strided",
    "aten.histc",
    "aten.searchsorted",
    "aten.bucketize_",
)
def create(call: Call) -> Result:
    """New axes of literal size: nothing is known of them until they meet another tensor."""
    outputs = []
    for shape in call.shapes:
        axes = [call.new(size) for size in shape]
        outputs.append(call.value(axes, static=True))
    return one_or_all(outputs)


@rule("aten.nonzero", "aten.unique", "aten._unique2", "aten.unique_consecutive")
def count(call: Call) -> Result:
    """As many rows as the values say: tokens of an expert."""
    outputs = []
    for shape in call.shapes:
        axes = [call.new(size) for size in shape]
        call.facts.counted.update(axis.dim for axis in axes[:1])
        outputs.append(call.value(axes, static=True))
    return one_or_all(outputs)


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
    rows, columns = map(call.new, call.shape)
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
    return Value(bare(call.values[0].axes), static=call.static)
