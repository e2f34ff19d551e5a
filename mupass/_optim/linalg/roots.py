"""Inverse roots of banks of symmetric matrices, safe in the middle of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mupass._optim.linalg.newton import largest_eigenvalues, newton_roots, root_index

# Condition numbers between which an eigendecomposition in single precision is refined. Below it is good to
# 1e-5; above, the rounding of the matrix itself moves small eigenvalues by more than a refinement mends.
REFINED = (1e2, 2e4)
TILE = 64


def symmetric(matrices: Tensor) -> Tensor:
    """Return whole matrices from their lower triangles.

    Args:
        matrices: ``[..., n, n]``.
    """
    mirrored, n = matrices.clone(), matrices.shape[-1]
    for start in range(0, n, TILE):  # copies of tiles, where a mask over all entries costs several times more
        tile = matrices[..., start : start + TILE, start : start + TILE]
        mirrored[..., start : start + TILE, start : start + TILE] = tile.tril() + tile.tril(-1).mT
        if start + TILE < n:
            mirrored[..., start : start + TILE, start + TILE :] = matrices[
                ..., start + TILE :, start : start + TILE
            ].mT
    return mirrored


def inverse_roots(
    bank: Tensor, damping: Tensor, power: float, relative: bool = False, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute ``(M + damping I)^-power`` for every matrix of a bank.

    Power 1 with absolute damping is a Cholesky factorization. Other powers are an eigendecomposition on CPU,
    refined in double precision where that brings the relative error below 1e-5 (up to condition number 1e4);
    on other devices coupled Newton iterations where the power is 1/p. Nothing but the CPU's own results is
    looked at, so that no device is waited for.

    The root of a matrix whose factorization fails, or whose result is not finite, is zero. So is that of a
    zero matrix with zero damping (the layers under a zero-initialized readout), where it is right: its
    gradient is zero too, and nothing is 0/0.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
        damping: ``[K]``.
        power: Positive power.
        relative: Whether damping is relative to each matrix' largest eigenvalue.
        method: ``auto``, or ``eigh`` or ``newton`` on any device.

    Returns:
        The roots ``[K, n, n]`` and a mask ``[K]`` of failures.
    """
    trace = bank.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Semi-definite: no entry is larger than the trace, and NaN or infinity is on the diagonal.
    finite = trace.isfinite() & damping.isfinite()
    # A zero matrix with zero damping has the root zero, which is no failure.
    empty = finite & (trace <= 0) & ((damping <= 0) | relative)
    usable = finite & ~empty
    root, solved = _solve(bank, torch.where(usable, damping, 1.0), usable, power, relative, method)
    solved = solved & usable & root.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return _only(root, solved), ~(solved | empty)


def _only(matrices: Tensor, chosen: Tensor) -> Tensor:
    """Return matrices ``[K, n, n]``, those that are not chosen zero; NaN among these does no harm."""
    # On a CPU this takes half of the time of `torch.where`.
    return matrices.nan_to_num(0.0, 0.0, 0.0) * chosen[:, None, None]


Solved = tuple[Tensor, Tensor]  # roots, and which of them were found


def _solve(bank: Tensor, rho: Tensor, usable: Tensor, power: float, relative: bool, method: str) -> Solved:
    """Solve for the matrices that can be used; the roots of the others may be anything."""
    # Newton iterations have products only, which accelerators are fast at.
    p = root_index(power)
    if power == 1 and not relative and method == "auto":
        return _cholesky(bank, rho)
    # What cannot be solved is replaced by the identity, so that it does no harm to the others of its batch.
    bank = _only(bank, usable)
    bank.diagonal(dim1=-2, dim2=-1).add_((~usable)[:, None])
    if p and (method == "newton" or (method == "auto" and bank.device.type != "cpu")):
        return _newton(bank, rho, p, relative)
    return _eigh(bank, rho, power, relative)


def _cholesky(bank: Tensor, rho: Tensor) -> Solved:
    damped = bank.clone()
    # M + rho I = L L^T.
    damped.diagonal(dim1=-2, dim2=-1).add_(rho[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    solved = info == 0
    # A half-finished factor may have a zero on its diagonal, which cannot be inverted.
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(solved[:, None], diagonal, 1.0))
    return torch.cholesky_inverse(factor), solved


def _newton(bank: Tensor, rho: Tensor, p: int, relative: bool) -> Solved:
    rho = rho * largest_eigenvalues(bank) if relative else rho
    root, solved = newton_roots(bank, rho, p)
    if bank.device.type == "cpu" and not all(solved.tolist()):
        # On the CPU a look at the mask costs nothing.
        diverged = ~solved
        root[diverged], solved[diverged] = _eigh(bank[diverged], rho[diverged], 1 / p, False)
    return root, solved


def _eigh(bank: Tensor, rho: Tensor, power: float, relative: bool) -> Solved:
    """Eigenvalues below zero are rounding errors of a semi-definite matrix."""
    values, vectors, converged = eigenbases(bank)
    rho = rho * values[:, -1] if relative else rho
    # V (values + rho)^-power V^T, in two steps.
    damped = values.clamp(min=0) + rho[:, None]
    solved = converged & (damped > 0).all(1)
    scaled = vectors * damped.clamp(min=torch.finfo(bank.dtype).tiny).pow(-power)[:, None, :]
    if bank.device.type == "cpu" and bank.dtype == torch.float32:
        # Eigenvalues ascend.
        condition = damped[:, -1] / damped[:, 0]
        rough = solved & (condition > REFINED[0]) & (condition < REFINED[1])
        # One by one: what is made on the way stays in the cache.
        for number in (number for number, refine in enumerate(rough.tolist()) if refine):
            torch.mm(
                vectors[number],
                _refined(bank[number], rho[number], values[number], vectors[number], power),
                out=scaled[number],
            )
    return scaled @ vectors.mT, solved


def _refined(matrix: Tensor, rho: Tensor, values: Tensor, vectors: Tensor, power: float) -> Tensor:
    """Return a root in the eigenbasis, to first order in what is left of the matrix off its diagonal there.

    Rounding errors of the decomposition are of the order of the largest eigenvalue, and the root is made of
    the smallest ones. A product with their vectors in double precision shows them. The derivative of a
    function of a matrix is, in its eigenbasis, a product entry by entry with divided differences (Daleckii
    and Krein).
    """
    # The small eigenvalues come first: their columns are those with large errors.
    small = (values + rho < (values[-1] + rho) / REFINED[0]).tolist().count(True)
    turned = values.diag()
    # The lower triangle only: rows of large eigenvalues lose more digits.
    product = (matrix.double() @ vectors[:, :small].double()).to(matrix.dtype)
    torch.mm(vectors.mT, product, out=turned[:, :small])
    turned = symmetric(turned)
    values = (turned.diagonal() + rho).clamp(min=torch.finfo(matrix.dtype).tiny)
    # Of values near 1, which may have any power in single precision.
    unit = values[-1]
    values = values / unit
    turned.div_(unit).mul_(divided_differences(values, power)).diagonal().copy_(values.pow(-power))
    return turned.mul_(unit.pow(-power))


def divided_differences(x: Tensor, power: float) -> Tensor:
    """Return ``(x_i^-power - x_j^-power) / (x_i - x_j)``, the derivative where both are equal.

    Args:
        x: ``[..., n]``, positive.
        power: Positive power.

    Returns:
        ``[..., n, n]``, exact for values as close as may be.
    """
    gap = x.log()[..., :, None] - x.log()[..., None, :]  # x_j = x_i e^-gap
    # expm1 keeps differences of close values exact.
    ratio = torch.where(gap == 0, -power, torch.expm1(power * gap) / torch.expm1(-gap))
    return x.pow(-power - 1)[..., :, None] * ratio


def eigenbases(bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of every matrix of a bank.

    In single precision LAPACK fails now and then on matrices of low rank, and at times returns NaN without a
    word. These are decomposed again in double precision.

    Args:
        bank: ``[K, n, n]`` symmetric and finite.

    Returns:
        Values ``[K, n]``, vectors ``[K, n, n]`` and a mask ``[K]`` of successes; zeros where it failed.
    """
    values, vectors = _decomposed(bank)
    found = _finite(values, vectors)
    # Only the CPU's own results are looked at, so that no device is waited for.
    on_cpu = bank.device.type == "cpu"
    if on_cpu and all(found.tolist()):
        return values, vectors, found
    if on_cpu and bank.dtype == torch.float32:
        again = ~found
        in_double = _decomposed(bank[again].double())
        values[again], vectors[again] = (part.to(bank.dtype) for part in in_double)
        found = _finite(values, vectors)
    return torch.where(found[:, None], values, 0.0), _only(vectors, found), found


def _decomposed(bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, NaN for a matrix of which LAPACK says that it failed."""
    try:
        values, vectors = torch.linalg.eigh(bank)
    # Raised for the whole batch: find out which one it was.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(bank) == 1:
            return torch.full_like(bank[:, 0], math.nan), torch.full_like(bank, math.nan)
        parts = [_decomposed(matrix[None]) for matrix in bank]
        values, vectors = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, vectors


def _finite(values: Tensor, vectors: Tensor) -> Tensor:
    """Return a mask ``[K]`` of the decompositions without NaN."""
    # A NaN in a column of vectors is one in the sum of all.
    return values.sum(1).isfinite() & vectors.sum((1, 2)).isfinite()


def diagonal_roots(bank: Tensor, damping: Tensor, power: float) -> Tensor:
    """Compute the same for diagonal matrices, ``[K, n]``; entries of a zero matrix with no damping are zero.

    Args:
        bank: ``[K, n]`` diagonals.
        damping: ``[K]``.
        power: Positive power.
    """
    damped = bank.clamp(min=0) + damping[:, None]
    alive = damped > 0
    # Twice, so that the derivative is zero where the result is.
    safe = torch.where(alive, damped, torch.ones_like(damped))
    return torch.where(alive, safe.pow(-power), torch.zeros_like(damped))
