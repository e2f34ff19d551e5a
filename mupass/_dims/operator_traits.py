"""What an operator does to its operands: one table, read wherever a graph is followed from node to node.

Dimension rules (`mupass._dims.rules`) say how axes of an operator belong together. This table says what
becomes of values: whether a factor passes, whether the result is linear, which operators are products.
"""

from __future__ import annotations

from enum import Flag, auto


class Trait(Flag):
    """What an operator does; ``x`` is its first operand, or every one where that makes sense.

    Attributes:
        COPIES: ``x`` as it is, in another type or place, and gradients pass. Which of these a graph has may
            differ from device to device.
        DETACHES: ``x`` as it is, and no gradient passes.
        RESHAPES: The entries of ``x`` in other axes.
        PICKS: Entries of ``x`` in other places: some of them, or some several times.
        SPREADS: All entries of ``x`` several times.
        SHAPE_OF_SECOND: Nothing but the shape, or the type, is read of the second operand.
        KEEPS_ORDER: The entries of ``x`` in their row-major order, under another shape.
        DROPS_OUT: ``x`` with some entries zero and the others larger.
        LIMITS: ``x`` within bounds that keep it from zero or from infinity.
        LARGER: The larger of two operands, entry by entry.
        ADDS: A plain sum of two operands.
        LINEAR: Elementwise, and linear in each tensor.
        MULTIPLIES: The product of two operands, entry by entry.
        DIVIDES: The quotient of two operands, entry by entry.
        MATRIX_PRODUCT: The product of two operands, summed over shared axes as `matmul` or an equation says.
        INNER_PRODUCT: The same over the last axis of both.
        AFFINE: A matrix product plus a bias.
        LENGTH: The length of ``x`` along axes.
        HOMOGENEOUS: ``f(c x) = c f(x)`` for ``c > 0``: a factor on ``x`` is a factor on the result.
        SAME_ORDER: Not quite so, or with several results, but of the order of ``x``.
        LINEAR_AT_ZERO: Near zero a multiple of ``x``.
        NORMALIZES: Subtracts a mean and divides by a deviation: a constant that was added drops out too.
        DIVIDES_BY_SIZE: Divides by a size of ``x`` and subtracts nothing.
        BENDS: Not linear, though it is not marked as an elementwise operator or not known as one.
    """

    NONE = 0
    COPIES = auto()
    DETACHES = auto()
    RESHAPES = auto()
    PICKS = auto()
    SPREADS = auto()
    SHAPE_OF_SECOND = auto()
    KEEPS_ORDER = auto()
    DROPS_OUT = auto()
    LIMITS = auto()
    LARGER = auto()
    ADDS = auto()
    LINEAR = auto()
    MULTIPLIES = auto()
    DIVIDES = auto()
    MATRIX_PRODUCT = auto()
    INNER_PRODUCT = auto()
    AFFINE = auto()
    LENGTH = auto()
    HOMOGENEOUS = auto()
    SAME_ORDER = auto()
    LINEAR_AT_ZERO = auto()
    NORMALIZES = auto()
    DIVIDES_BY_SIZE = auto()
    BENDS = auto()


# By name, without namespace, overload and the underscore of operators that work in place. A name has the
# traits of all rows that it is in.
_TABLE: tuple[tuple[Trait, str], ...] = (
    # The same values, in another type or place.
    (Trait.COPIES | Trait.HOMOGENEOUS, "to _to_copy type_as contiguous clone alias lift_fresh_copy"),
    (Trait.COPIES, "float _assert_tensor_metadata"),
    # The same values, cut off from gradients.
    (Trait.DETACHES | Trait.HOMOGENEOUS, "detach"),
    # The same values in other axes: cut anew, or in another order.
    (
        Trait.RESHAPES | Trait.KEEPS_ORDER | Trait.HOMOGENEOUS,
        "view _unsafe_view view_as reshape reshape_as flatten unflatten squeeze unsqueeze",
    ),
    (
        Trait.RESHAPES | Trait.HOMOGENEOUS,
        "transpose permute t numpy_T movedim moveaxis swapaxes swapdims expand expand_as",
    ),
    # Some of the values, or each several times.
    (
        Trait.HOMOGENEOUS,
        "slice select narrow diagonal index index_select gather take_along_dim flip roll tril triu "
        "repeat repeat_interleave tile pixel_shuffle pixel_unshuffle",
    ),
    (
        Trait.PICKS,
        "getitem slice select narrow index index_select gather take_along_dim broadcast_to repeat tile "
        "repeat_interleave mT adjoint flip roll split split_with_sizes chunk tensor_split unbind",
    ),
    (Trait.SPREADS, "expand expand_as broadcast_to repeat tile"),
    # The shape of another one, or its type.
    (Trait.SHAPE_OF_SECOND, "reshape_as view_as expand_as type_as"),
    # Several results.
    (Trait.SAME_ORDER, "getitem chunk split split_with_sizes unbind"),
    # Dropout.
    (Trait.DROPS_OUT | Trait.HOMOGENEOUS, "dropout feature_dropout native_dropout"),
    # Sums, signs and choices.
    (Trait.ADDS | Trait.LINEAR, "add"),
    (Trait.LINEAR, "sub rsub where lerp masked_fill"),
    (Trait.LINEAR | Trait.HOMOGENEOUS, "neg negative"),
    (Trait.LARGER | Trait.SAME_ORDER, "maximum"),
    (Trait.LIMITS | Trait.SAME_ORDER, "clamp clamp_min"),
    # Products of entries.
    (Trait.LINEAR | Trait.MULTIPLIES, "mul multiply"),
    (Trait.LINEAR | Trait.DIVIDES, "div divide true_divide"),
    # Products summed over axes.
    (Trait.MATRIX_PRODUCT, "einsum matmul mm bmm"),
    (Trait.INNER_PRODUCT, "dot vdot inner linalg_vecdot"),
    (Trait.AFFINE, "linear addmm baddbmm addbmm"),
    # Reductions and pooling.
    (
        Trait.HOMOGENEOUS,
        "sum mean cumsum amax max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d "
        "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d",
    ),
    (Trait.SAME_ORDER, "std"),
    (Trait.LENGTH | Trait.SAME_ORDER, "norm linalg_norm linalg_vector_norm frobenius_norm"),
    # Functions of one entry.
    (Trait.HOMOGENEOUS, "relu leaky_relu abs"),
    (Trait.LINEAR_AT_ZERO, "tanh gelu silu sin erf elu mish asinh"),
    (Trait.LINEAR_AT_ZERO | Trait.BENDS, "selu hardtanh prelu"),
    (Trait.BENDS, "hardswish relu6"),
    # Functions of several entries.
    (Trait.BENDS, "glu softmax _softmax log_softmax"),
    # Normalizations.
    (
        Trait.NORMALIZES,
        "layer_norm native_layer_norm native_group_norm _batch_norm_impl_index",
    ),
    (
        Trait.NORMALIZES | Trait.BENDS,
        "group_norm instance_norm batch_norm native_batch_norm _native_batch_norm_legit",
    ),
    (Trait.DIVIDES_BY_SIZE, "rms_norm _fused_rms_norm cosine_similarity"),
    # Recurrent cells.
    (
        Trait.BENDS,
        "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    ),
)
TRAITS: dict[str, Trait] = {}
for _traits, _names in _TABLE:
    for _name in _names.split():
        TRAITS[_name] = TRAITS.get(_name, Trait.NONE) | _traits
# Products by the same names: the positions of their two factors, and of what is added to the product.
PRODUCT_ARGUMENTS: dict[str, tuple[int, int, int | None]] = {
    "linear": (0, 1, 2),
    "conv1d": (0, 1, 2),
    "conv2d": (0, 1, 2),
    "conv3d": (0, 1, 2),
    "conv_transpose1d": (0, 1, 2),
    "conv_transpose2d": (0, 1, 2),
    "conv_transpose3d": (0, 1, 2),
    "convolution": (0, 1, 2),
    "addmm": (1, 2, 0),
    "baddbmm": (1, 2, 0),
    "addmv": (1, 2, 0),
    "mul": (0, 1, None),
    "multiply": (0, 1, None),
    "matmul": (0, 1, None),
    "mm": (0, 1, None),
    "bmm": (0, 1, None),
    "mv": (0, 1, None),
    "_grouped_mm": (0, 1, None),
}


def having(trait: Trait) -> list[str]:
    """Return the names of the operators that have a trait, or one of several.

    Args:
        trait: The trait.
    """
    return [name for name, found in TRAITS.items() if found & trait]


def traits(operator: str) -> Trait:
    """Return what an operator does.

    Args:
        operator: Its name as `mupass._dims.graph.operator_name` gives it, such as ``aten.add_``.

    Returns:
        ``Trait.NONE`` for those that are not in the table, and for arithmetic on sizes (``operator.mul``).
    """
    if operator == "getitem":
        return TRAITS[operator]
    if not operator.startswith("aten."):
        return Trait.NONE
    return TRAITS.get(operator.removeprefix("aten.").removesuffix("_"), Trait.NONE)
