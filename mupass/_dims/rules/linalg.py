"""Rules for linear algebra: determinants, inverses, factorizations, solutions, chains of products."""

from __future__ import annotations

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import Axis, Value
from mupass._dims.registry import rule
from mupass._dims.rules.contract import contract, letters
from mupass._dims.rules.elementwise import broadcast


def _square(call: Call, matrix: Value) -> list[Axis]:
    """State that rows and columns are the same things; return the batch axes."""
    *batch, rows, columns = matrix.axes
    call.unify(rows, columns)
    return batch


@rule(
    "aten.inverse",
    "aten.linalg_inv",
    "aten.matrix_exp",
    "aten.linalg_matrix_exp",
    "aten.matrix_power",
    "aten.linalg_matrix_power",
    "aten.cholesky",
    "aten.cholesky_inverse",
    "aten.linalg_cholesky",
)
def of_square(call: Call) -> Result:
    """A function of a square matrix: a matrix along the same axes."""
    matrix = call.values[0]
    _square(call, matrix)
    return call.value(matrix.axes)


@rule("aten.linalg_inv_ex", "aten.linalg_cholesky_ex")
def of_square_with_info(call: Call) -> Result:
    """The same, and an error code for each matrix of the batch."""
    matrix = call.values[0]
    return call.value(matrix.axes), call.value(_square(call, matrix))


@rule("aten.linalg_matrix_rank")
def rank(call: Call) -> Result:
    """One number for each matrix of the batch."""
    return call.value(call.values[0].axes[:-2])


@rule("aten.pinverse", "aten.linalg_pinv")
def pseudo_inverse(call: Call) -> Result:
    """The axes of the transpose."""
    *batch, rows, columns = call.values[0].axes
    return call.value([*batch, columns, rows])


@rule("aten.det", "aten.linalg_det", "aten.logdet", "aten.slogdet", "aten.linalg_slogdet")
def determinant(call: Call) -> Result:
    """One number, or sign and logarithm, for each matrix of the batch."""
    batch = _square(call, call.values[0])
    return one_or_all([call.value(batch) for _ in call.shapes])


@rule(
    "aten.linalg_eigh",
    "aten.linalg_eigvalsh",
    "aten.linalg_eig",
    "aten.linalg_eigvals",
    "aten.linalg_svd",
    "aten.linalg_svdvals",
    "aten.svd",
    "aten.linalg_qr",
    "aten.qr",
)
def factorize(call: Call) -> Result:
    """Eigenvectors and singular vectors are as many as the shorter axis is long, and grow with it."""
    *batch, rows, columns = call.values[0].axes
    eigen = "eig" in call.operator
    if eigen:
        _square(call, call.values[0])
    # U S V of a matrix [m, n] has min(m, n) singular values.
    shorter = min(columns, rows, key=lambda axis: axis.size)
    axis_by_size = {rows.size: rows, columns.size: columns, shorter.size: shorter}
    outputs = []
    for number, shape in enumerate(call.shapes):
        axes = [axis_by_size[size] for size in shape[len(batch) :]]
        if len(axes) == 2 and not eigen:
            # Q and U have the rows, R and V the columns; full ones are square.
            if number == 0:
                axes[0] = rows
            elif call.operator == "aten.svd":  # V itself, not its transpose
                axes[0] = columns
            else:
                axes[1] = columns
        outputs.append(call.value([*batch, *axes]))
    return one_or_all(outputs)


@rule(
    "aten.linalg_lu",
    "aten.linalg_lu_factor",
    "aten.linalg_lu_factor_ex",
    "aten.lu_unpack",
    "aten.geqrf",
)
def factorize_in_place(call: Call) -> Result:
    """P, L and U, or both in one matrix: as many columns of L as the shorter axis is long."""
    *batch, rows, columns = call.values[0].axes
    shorter = min(rows, columns, key=lambda axis: axis.size)
    if call.operator in ("aten.linalg_lu", "aten.lu_unpack"):
        axes: list[list[Axis]] = [[rows, rows], [rows, shorter], [shorter, columns]]
    else:
        # The factors in the place of the matrix, a pivot or a number for each of them, an error code.
        axes = [[rows, columns], [shorter], []]
    outputs = []
    for shape, own_axes in zip(call.shapes, axes, strict=False):
        # What is not asked for, as P without pivoting, is empty.
        fits = len(shape) == len(batch) + len(own_axes)
        outputs.append(call.value([*batch, *own_axes]) if fits else call.unknown(shape))
    return tuple(outputs)


@rule("aten.linalg_vander", "aten.vander")
def vander(call: Call) -> Result:
    """Powers of every entry: as many as the entries, or as many as the code asks for."""
    entries = call.values[0].axes[-1]
    powers = call.derive(entries, call.shape[-1])
    if call.get("N") is not None:
        powers = call.new(call.shape[-1])
        call.enumerate(powers, "powers")
    return call.value([*call.values[0].axes, powers])


@rule(
    "aten.linalg_solve",
    "aten.linalg_solve_triangular",
    "aten.cholesky_solve",
    "aten.linalg_lstsq",
    "aten.linalg_lu_solve",
)
def solve(call: Call) -> Result:
    """Return X of A X = B: like the product of an inverse, which contracts the rows of A."""
    matrix, right_side = call.values[0], call.values[-1]
    # cholesky_solve(B, L) takes the right-hand side first.
    if call.operator == "aten.cholesky_solve":
        right_side, matrix = matrix, right_side
    rank = len(matrix.axes)
    if call.get("left") is False:  # X A = B
        of_matrix, of_right, of_result = "ij", "kj", "ki"
    elif len(right_side.axes) in (1, rank - 1):  # A x = b
        of_matrix, of_right, of_result = "ij", "i", "j"
    else:
        of_matrix, of_right, of_result = "ij", "ik", "jk"
    if call.operator != "aten.linalg_lstsq":
        _square(call, matrix)
    batch = letters(max(rank - 2, len(right_side.axes) - len(of_right)))
    labels = [[*batch, *of_matrix][-rank:], [*batch, *of_right][-len(right_side.axes) :]]
    result = contract(call, "solve", [matrix, right_side], labels, [*batch, *of_result])
    return one_or_all([result, *map(call.unknown, call.shapes[1:])])


@rule("aten.linalg_multi_dot", "aten.chain_matmul")
def multi_dot(call: Call) -> Result:
    """Product of several matrices, from left to right; the outer two may be vectors."""
    product, *rest = call.values
    for factor in rest:
        left = ["i", "k"][-len(product.axes) :]
        right = ["k", "j"][: len(factor.axes)]
        out = [label for label in (*left, *right) if label != "k"]
        product = contract(call, "matmul", [product, factor], [left, right], out)
    return product


@rule("aten.tensordot")
def tensordot(call: Call) -> Result:
    """Contract pairs of axes."""
    first, second = call.values[:2]
    left, right = letters(len(first.axes)), letters(len(second.axes), len(first.axes))
    # An axis of one and an axis of the other that are contracted get one label.
    for left_position, right_position in zip(call["dims_self"], call["dims_other"], strict=True):
        right[right_position] = left[left_position]
    out = [label for label in (*left, *right) if (label in left) != (label in right)]
    return contract(call, "matmul", [first, second], [left, right], out)


@rule("aten.linalg_vecdot")
def vecdot(call: Call) -> Result:
    """Sum of products along one axis, the others broadcast."""
    first, second = call.values[:2]
    rank = max(len(first.axes), len(second.axes))
    names = letters(rank)
    labels = [names[rank - len(first.axes) :], names[rank - len(second.axes) :]]
    out = list(names)
    del out[call.get("dim", -1) % rank]
    return contract(call, "matmul", [first, second], labels, out)


@rule("aten.cross", "aten.linalg_cross")
def cross(call: Call) -> Result:
    """Products of vectors in space."""
    axes = broadcast(call, call.values[:2], len(call.shape))
    dim = call.get("dim")
    if dim is None and call.operator == "aten.linalg_cross":
        dim = -1
    elif dim is None:
        dim = [axis.size for axis in axes].index(3)
    call.finite(axes[dim], "coordinates in space")
    return call.value(axes)


@rule("aten.pdist")
def pdist(call: Call) -> Result:
    """Distances of all pairs of rows."""
    rows, _ = call.values[0].axes
    return call.value([call.derive(rows, call.shape[0])])


@rule("aten.cov", "aten.corrcoef")
def covariance(call: Call) -> Result:
    """Rows against rows."""
    rows = call.values[0].axes[:1]
    return call.value(rows * len(call.shape))
