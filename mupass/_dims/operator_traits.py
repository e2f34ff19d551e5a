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


# By name, without namespace, overload and the underscore of operators that work in place.
TRAITS: dict[str, Trait] = {
    # The same values, in another type or place.
    "to": Trait.COPIES | Trait.HOMOGENEOUS,
    "_to_copy": Trait.COPIES | Trait.HOMOGENEOUS,
    "type_as": Trait.COPIES | Trait.HOMOGENEOUS,
    "contiguous": Trait.COPIES | Trait.HOMOGENEOUS,
    "clone": Trait.COPIES | Trait.HOMOGENEOUS,
    "alias": Trait.COPIES | Trait.HOMOGENEOUS,
    "lift_fresh_copy": Trait.COPIES | Trait.HOMOGENEOUS,
    "float": Trait.COPIES,
    "_assert_tensor_metadata": Trait.COPIES,
    # The same values, cut off from gradients.
    "detach": Trait.DETACHES | Trait.HOMOGENEOUS,
    # The same values in other axes.
    "view": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "_unsafe_view": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "view_as": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "reshape": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "reshape_as": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "flatten": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "unflatten": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "squeeze": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "unsqueeze": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "transpose": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "permute": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "t": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "numpy_T": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "movedim": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "moveaxis": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "swapaxes": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "swapdims": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "expand": Trait.RESHAPES | Trait.HOMOGENEOUS,
    "expand_as": Trait.RESHAPES | Trait.HOMOGENEOUS,
    # Some of the values, or each several times.
    "slice": Trait.HOMOGENEOUS,
    "select": Trait.HOMOGENEOUS,
    "narrow": Trait.HOMOGENEOUS,
    "diagonal": Trait.HOMOGENEOUS,
    "index": Trait.HOMOGENEOUS,
    "index_select": Trait.HOMOGENEOUS,
    "gather": Trait.HOMOGENEOUS,
    "take_along_dim": Trait.HOMOGENEOUS,
    "flip": Trait.HOMOGENEOUS,
    "roll": Trait.HOMOGENEOUS,
    "tril": Trait.HOMOGENEOUS,
    "triu": Trait.HOMOGENEOUS,
    "repeat": Trait.HOMOGENEOUS,
    "repeat_interleave": Trait.HOMOGENEOUS,
    "tile": Trait.HOMOGENEOUS,
    "pixel_shuffle": Trait.HOMOGENEOUS,
    "pixel_unshuffle": Trait.HOMOGENEOUS,
    # Several results.
    "getitem": Trait.SAME_ORDER,
    "chunk": Trait.SAME_ORDER,
    "split": Trait.SAME_ORDER,
    "split_with_sizes": Trait.SAME_ORDER,
    "unbind": Trait.SAME_ORDER,
    # Dropout.
    "dropout": Trait.DROPS_OUT | Trait.HOMOGENEOUS,
    "feature_dropout": Trait.DROPS_OUT | Trait.HOMOGENEOUS,
    "native_dropout": Trait.DROPS_OUT | Trait.HOMOGENEOUS,
    # Sums, signs and choices.
    "add": Trait.ADDS | Trait.LINEAR,
    "sub": Trait.LINEAR,
    "rsub": Trait.LINEAR,
    "neg": Trait.LINEAR | Trait.HOMOGENEOUS,
    "negative": Trait.LINEAR | Trait.HOMOGENEOUS,
    "where": Trait.LINEAR,
    "lerp": Trait.LINEAR,
    "masked_fill": Trait.LINEAR,
    "maximum": Trait.LARGER | Trait.SAME_ORDER,
    "clamp": Trait.LIMITS | Trait.SAME_ORDER,
    "clamp_min": Trait.LIMITS | Trait.SAME_ORDER,
    # Products of entries.
    "mul": Trait.LINEAR | Trait.MULTIPLIES,
    "multiply": Trait.LINEAR | Trait.MULTIPLIES,
    "div": Trait.LINEAR | Trait.DIVIDES,
    "divide": Trait.LINEAR | Trait.DIVIDES,
    "true_divide": Trait.LINEAR | Trait.DIVIDES,
    # Products summed over axes.
    "einsum": Trait.MATRIX_PRODUCT,
    "matmul": Trait.MATRIX_PRODUCT,
    "mm": Trait.MATRIX_PRODUCT,
    "bmm": Trait.MATRIX_PRODUCT,
    "dot": Trait.INNER_PRODUCT,
    "vdot": Trait.INNER_PRODUCT,
    "inner": Trait.INNER_PRODUCT,
    "linalg_vecdot": Trait.INNER_PRODUCT,
    "linear": Trait.AFFINE,
    "addmm": Trait.AFFINE,
    "baddbmm": Trait.AFFINE,
    "addbmm": Trait.AFFINE,
    # Reductions and pooling.
    "sum": Trait.HOMOGENEOUS,
    "mean": Trait.HOMOGENEOUS,
    "cumsum": Trait.HOMOGENEOUS,
    "amax": Trait.HOMOGENEOUS,
    "std": Trait.SAME_ORDER,
    "norm": Trait.LENGTH | Trait.SAME_ORDER,
    "linalg_norm": Trait.LENGTH | Trait.SAME_ORDER,
    "linalg_vector_norm": Trait.LENGTH | Trait.SAME_ORDER,
    "frobenius_norm": Trait.LENGTH | Trait.SAME_ORDER,
    "max_pool1d": Trait.HOMOGENEOUS,
    "max_pool2d": Trait.HOMOGENEOUS,
    "max_pool3d": Trait.HOMOGENEOUS,
    "max_pool2d_with_indices": Trait.HOMOGENEOUS,
    "avg_pool1d": Trait.HOMOGENEOUS,
    "avg_pool2d": Trait.HOMOGENEOUS,
    "avg_pool3d": Trait.HOMOGENEOUS,
    "adaptive_avg_pool1d": Trait.HOMOGENEOUS,
    "adaptive_avg_pool2d": Trait.HOMOGENEOUS,
    "adaptive_avg_pool3d": Trait.HOMOGENEOUS,
    "_adaptive_avg_pool2d": Trait.HOMOGENEOUS,
    "upsample_nearest2d": Trait.HOMOGENEOUS,
    "upsample_bilinear2d": Trait.HOMOGENEOUS,
    "upsample_bicubic2d": Trait.HOMOGENEOUS,
    # Functions of one entry.
    "relu": Trait.HOMOGENEOUS,
    "leaky_relu": Trait.HOMOGENEOUS,
    "abs": Trait.HOMOGENEOUS,
    "tanh": Trait.LINEAR_AT_ZERO,
    "gelu": Trait.LINEAR_AT_ZERO,
    "silu": Trait.LINEAR_AT_ZERO,
    "sin": Trait.LINEAR_AT_ZERO,
    "erf": Trait.LINEAR_AT_ZERO,
    "elu": Trait.LINEAR_AT_ZERO,
    "mish": Trait.LINEAR_AT_ZERO,
    "asinh": Trait.LINEAR_AT_ZERO,
    "selu": Trait.LINEAR_AT_ZERO | Trait.BENDS,
    "hardtanh": Trait.LINEAR_AT_ZERO | Trait.BENDS,
    "prelu": Trait.LINEAR_AT_ZERO | Trait.BENDS,
    "hardswish": Trait.BENDS,
    "relu6": Trait.BENDS,
    # Functions of several entries.
    "glu": Trait.BENDS,
    "softmax": Trait.BENDS,
    "_softmax": Trait.BENDS,
    "log_softmax": Trait.BENDS,
    # Normalizations.
    "layer_norm": Trait.NORMALIZES,
    "native_layer_norm": Trait.NORMALIZES,
    "group_norm": Trait.NORMALIZES | Trait.BENDS,
    "native_group_norm": Trait.NORMALIZES,
    "instance_norm": Trait.NORMALIZES | Trait.BENDS,
    "batch_norm": Trait.NORMALIZES | Trait.BENDS,
    "native_batch_norm": Trait.NORMALIZES | Trait.BENDS,
    "_native_batch_norm_legit": Trait.NORMALIZES | Trait.BENDS,
    "_batch_norm_impl_index": Trait.NORMALIZES,
    "rms_norm": Trait.DIVIDES_BY_SIZE,
    "_fused_rms_norm": Trait.DIVIDES_BY_SIZE,
    "cosine_similarity": Trait.DIVIDES_BY_SIZE,
    # Recurrent cells.
    "lstm": Trait.BENDS,
    "gru": Trait.BENDS,
    "rnn_tanh": Trait.BENDS,
    "rnn_relu": Trait.BENDS,
    "lstm_cell": Trait.BENDS,
    "gru_cell": Trait.BENDS,
    "rnn_tanh_cell": Trait.BENDS,
    "rnn_relu_cell": Trait.BENDS,
}
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
