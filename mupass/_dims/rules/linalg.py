"""Rules for linear algebra: determinants, inverses, factorizations, solutions, chains of products."""

from __future__ import annotations

from mupass._dims.call import Call, Result
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


@rule("aten.pinverse", "aten.linalg_pinv")
def pseudo_inverse(call: Call) -> Result:
    """The axes of the transpose."""
    *batch, rows, columns = call.values[0].axes
    return call.value([*batch, columns, rows])


@rule("aten.det", "aten.linalg_det", "aten.logdet", "aten.slogdet", "aten.linalg_slogdet")
def determinant(call: Call) -> Result:
    """One number, or sign and logarithm, for each matrix of the batch."""
    batch = _square(call, call.values[0])
    outputs = [call.value(batch) for _ in call.shapes]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


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
    if "eig" in call.operator:
        _square(call, call.values[0])
    short = rows if rows.size < columns.size else columns
    known = {rows.size: rows, columns.size: columns, short.size: short}
    outputs = []
    for i, shape in enumerate(call.shapes):
        tail: list[Axis] = [known[size] for size in shape[len(batch) :]]
        if len(tail) == 2 and "eig" not in call.operator:
            left = i == 0  # Q and U have the rows, R and V the columns; full ones are square
            if left or call.operator == "aten.svd":
                tail[0] = rows if left else columns
            else:
                tail[1] = columns
        outputs.append(call.value([*batch, *tail]))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@rule(
    "aten.linalg_solve",
    "aten.linalg_solve_triangular",
    "aten.cholesky_solve",
    "aten.linalg_lstsq",
)
def solve(call: Call) -> Result:
    """Return X of A X = B: like the product of an inverse, which contracts the rows of A."""
    first, second = call.values[:2]
    matrix, right = (second, first) if call.operator == "aten.cholesky_solve" else (first, second)
    if call.get("left") is False:  # X A = B
        names = [["i", "j"], ["k", "j"]], ["k", "i"]
    elif len(right.axes) == 1 or len(right.axes) == len(matrix.axes) - 1:
        names = [["i", "j"], ["i"]], ["j"]
    else:
        names = [["i", "j"], ["i", "k"]], ["j", "k"]
    (of_matrix, of_right), out = names
    if not call.operator.endswith("lstsq"):
        _square(call, matrix)
    count = max(len(matrix.axes) - 2, len(right.axes) - len(of_right))
    batch = letters(count)
    labels = [
        [*batch[count - len(v.axes) + len(own) :], *own]
        for v, own in ((matrix, of_matrix), (right, of_right))
    ]
    result = contract(call, "solve", [matrix, right], labels, [*batch, *out])
    more = [call.value([call.new(s) for s in shape]) for shape in call.shapes[1:]]
    return (result, *more) if more else result


@rule("aten.linalg_multi_dot", "aten.chain_matmul")
def multi_dot(call: Call) -> Result:
    """Product of several matrices, from left to right; the outer two may be vectors."""
    product, *rest = call.values
    for factor in rest:
        left = ["i", "k"][-len(product.axes) :]
        right = ["k", "j"][: len(factor.axes)]
        out = [n for n in (*left, *right) if n != "k"]
        product = contract(call, "matmul", [product, factor], [left, right], out)
    return product


@rule("aten.tensordot")
def tensordot(call: Call) -> Result:
    """Contract pairs of axes."""
    a, b = call.values[:2]
    left, right = letters(len(a.axes)), letters(len(b.axes), len(a.axes))
    for i, j in zip(call["dims_self"], call["dims_other"], strict=True):
        right[j] = left[i]
    out = [n for n in (*left, *right) if (n in left) != (n in right)]
    return contract(call, "matmul", [a, b], [left, right], out)


@rule("aten.linalg_vecdot")
def vecdot(call: Call) -> Result:
    """Sum of products along one axis, the others broadcast."""
    a, b = call.values[:2]
    rank = max(len(a.axes), len(b.axes))
    names = letters(rank)
    gone = names[call.get("dim", -1) % rank]
    labels = [names[rank - len(v.axes) :] for v in (a, b)]
    return contract(call, "matmul", [a, b], labels, [n for n in names if n != gone])


@rule("aten.cross", "aten.linalg_cross")
def cross(call: Call) -> Result:
    """Products of vectors in space."""
    axes = broadcast(call, call.values[:2], len(call.shape))
    dim = call.get("dim", -1 if call.operator.startswith("aten.linalg") else None)
    if dim is None:
        dim = next(i for i, a in enumerate(axes) if a.size == 3)
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
    axes = call.values[0].axes
    return call.value([axes[0], axes[0]] if call.shape else ())
