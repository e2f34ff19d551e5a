"""The nearest orthogonal matrix by a composition of odd quintic polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

Quintic = tuple[float, float, float]  # a x + b x^3 + c x^5

LOWER = 3e-3  # singular values below this part of the norm are not brought up all the way
WIDE = 3  # from this ratio of sides on it pays to iterate on the Gram matrix
ENOUGH = 2**16  # entries of Gram matrices from which on a CPU gains by bfloat16
MARGIN = 1.01  # in half precision a singular value may come out above 1


@cache
def quintics(steps: int, lower: float = LOWER) -> tuple[Quintic, ...]:
    """Return the polynomials that take ``[lower, 1]`` closest to 1, one after the other.

    Each is the minimax approximation of 1 on the interval that the ones before leave, which is also the
    best composition (Amsel et al., arXiv 2505.16932). Found by Remez' exchange: the error of an odd quintic
    on ``[l, u]`` takes its largest value with alternating signs at ``l``, two extrema, and ``u``.

    Args:
        steps: Number of polynomials.
        lower: Smallest singular value to be brought up to 1.
    """
    # After each polynomial all singular values lie in [1 - error, 1 + error].
    low, high, polynomials = lower, 1.0, []
    for _ in range(steps):
        polynomial, error = _minimax(low, high)
        polynomials.append(polynomial)
        low, high = 1 - error, 1 + error
    return tuple(polynomials)


def _minimax(low: float, high: float) -> tuple[Quintic, float]:
    """Return the odd quintic closest to 1 on an interval, and its largest error."""
    if high - low < 1e-3 * high:  # what Remez tends to, where its equations become singular
        middle = (low + high) / 2
        taylor = (15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5)
        return taylor, (high - low) ** 3 / middle**3
    # A first guess for the two inner extrema of the error.
    inner, outer = low + (high - low) / 4, low + 3 * (high - low) / 4
    for _ in range(100):
        points = torch.tensor([low, inner, outer, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        # a x + b x^3 + c x^5 + sign error = 1 at the four points.
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        # Where the derivative a + 3 b x^2 + 5 c x^4 is zero.
        root = sqrt(9 * b * b - 20 * a * c)
        extrema = sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c))
        if max(abs(extrema[0] - inner), abs(extrema[1] - outer)) < 1e-14:
            break
        inner, outer = extrema
    return (a, b, c), abs(error)


def orthogonalize(x: Tensor, epsilon: Tensor, polynomials: tuple[Quintic, ...], dtype: torch.dtype) -> Tensor:
    """Replace the singular values of every matrix of a bank by 1, nearly.

    Matrices are divided by their Schatten 4-norm, the root of the Frobenius norm of the Gram matrix that the
    first polynomial needs anyway. It bounds the largest singular value, and is much closer to it than the
    Frobenius norm where many are of the same size: then fewer polynomials do.

    Args:
        x: ``[K, rows, columns]``.
        epsilon: ``[K]``, added to the norm that matrices are divided by; matrices much smaller stay small.
        polynomials: Result of `quintics`.
        dtype: Precision of the products.

    Returns:
        The same shape and precision as ``x``.
    """
    tiny = torch.finfo(x.dtype).tiny
    tall = x.shape[-2] > x.shape[-1]
    # First to Frobenius norm 1.
    frobenius = torch.linalg.vector_norm(x.flatten(1), dim=1)
    # In range for a Gram matrix: the squares of small gradients are not.
    y = (x / frobenius.clamp(min=tiny)[:, None, None]).to(dtype)
    y = y.mT if tall else y
    gram = _product(y, y.mT)
    # |Y Y^T|_F^(1/2) is the Schatten 4-norm of Y.
    norm = torch.linalg.vector_norm(gram.flatten(1), dim=1, dtype=x.dtype).sqrt()
    factor = (frobenius / (frobenius * norm + epsilon).clamp(min=tiny))[:, None, None]
    y, gram = y * factor.to(dtype), gram * factor.square().to(dtype)
    # Not the last polynomial: it is to end at 1, not beside it.
    half_precision = dtype in {torch.bfloat16, torch.float16}
    safe = [
        shrink(polynomial, MARGIN) if half_precision else polynomial for polynomial in polynomials[:-1]
    ] + [*polynomials[-1:]]
    # The first alone, no more than two in one: a Gram matrix holds squares, and small ones drown in rounding.
    length = 2 if y.shape[-1] >= WIDE * y.shape[-2] else 1
    groups = [safe[:1], *(safe[start : start + length] for start in range(1, len(safe), length))]
    y = _apply(groups[0], gram, y)
    for group in groups[1:]:
        y = _apply(group, _product(y, y.mT), y)
    return (y.mT if tall else y).to(x.dtype)


def product_dtype(dtype: torch.dtype, device: torch.device, entries: int) -> torch.dtype:
    """Return the precision of products that a device is fastest in and that is precise enough here.

    On CUDA that is bfloat16, and so it is on a CPU with instructions for it (AVX512-BF16 or AMX) where there
    is enough to multiply.

    Args:
        dtype: Precision of the factors; float64 stays.
        device: Where they are.
        entries: Of the matrices that are multiplied together.
    """
    # For few entries the conversions cost more than bfloat16 gains.
    if device.type == "cpu" and entries < ENOUGH:
        return dtype
    return _fast_dtype(dtype, device)


@cache
def _fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision of large products."""
    if dtype != torch.float32:
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    if device.type != "cpu":
        return dtype
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # Versions of torch differ in what they tell of a CPU: Linux is asked as well.
    fast = capability.get("amx_bf16") or capability.get("avx512_bf16") or _cpu_flags()
    return torch.bfloat16 if fast else dtype


def _cpu_flags() -> bool:
    """Return whether Linux tells of instructions for bfloat16."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def shrink(polynomial: Quintic, margin: float) -> Quintic:
    """Return the polynomial of ``x / margin``.

    Args:
        polynomial: Its coefficients.
        margin: A number above 1.
    """
    a, b, c = polynomial
    return a / margin, b / margin**3, c / margin**5


def _apply(group: Sequence[Quintic], gram: Tensor, y: Tensor) -> Tensor:
    """Return one polynomial of y, or the composition of two by one Gram matrix, small where y is wide."""
    if len(group) == 1:
        # a Y + (b G + c G^2) Y with G = Y Y^T.
        a, b, c = group[0]
        return _add_product(y, _add_product(gram, gram, gram, b, c), y, a, 1.0)
    # p_2(p_1(Y)): the Gram matrix of p_1(Y) = E Y is E G E, with E even in Y and symmetric.
    inner = _even(group[0], gram)
    outer = _even(group[1], _product(_product(inner, gram), inner))
    return _product(_product(outer, inner), y)


def _even(polynomial: Quintic, gram: Tensor) -> Tensor:
    """Return ``a I + b G + c G^2``, by which an odd polynomial multiplies y."""
    a, b, c = polynomial
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return _add_product(gram, gram, gram, b, c) + a * eye


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x y`` of two stacks; a stack of one is multiplied faster as a matrix."""
    if len(x) == 1:
        return (x[0] @ y[0])[None]
    return x @ y


def _add_product(base: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float) -> Tensor:
    """Return ``beta base + alpha x y`` of stacks."""
    if len(x) == 1:
        return torch.addmm(base[0], x[0], y[0], beta=beta, alpha=alpha)[None]
    return torch.baddbmm(base, x, y, beta=beta, alpha=alpha)
