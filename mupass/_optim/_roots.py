"""Inverse roots of banks of symmetric matrices, safe in the middle of training."""

from __future__ import annotations

import torch
from torch import Tensor

from mupass._optim._newton import largest_eigenvalues, newton_roots, root_index

# Condition numbers between which an eigendecomposition in single precision is refined. Below it is good to
# 1e-5; above, the rounding of the matrix itself moves small eigenvalues by more than a refinement mends.
REFINED = (1e2, 2e4)


def symmetric(matrices: Tensor) -> Tensor:
    """Return whole matrices from their lower triangles.

    Args:
        matrices: ``[..., n, n]``.
    """
    return matrices.tril() + matrices.tril(-1).mT


def inverse_roots(
    bank: Tensor,
    damping: Tensor,
    power: float,
    previous: Tensor,
    relative: bool = False,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``(M + damping I)^-power`` for every matrix of a bank.

    Power 1 with absolute damping is a Cholesky factorization. Other powers are an eigendecomposition on CPU,
    refined in double precision where that brings the relative error below 1e-5 (up to condition number 1e4);
    on other devices coupled Newton iterations where the power is 1/p, and an eigendecomposition for what
    these do not solve. A matrix whose factorization fails, or whose result is not finite, keeps its
    previous root. A zero matrix with zero damping (the layers under a zero-initialized readout) has the root
    zero: its gradient is zero too, and nothing is 0/0.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
        damping: ``[K]``.
        power: Positive power.
        previous: ``[K, n, n]`` roots to fall back on.
        relative: Whether damping is relative to each matrix' largest eigenvalue.
        method: ``auto``, or ``eigh`` or ``newton`` on any device.

    Returns:
        The roots ``[K, n, n]`` and a mask ``[K]`` of failures.
    """
    if power == 1 and not relative and method == "auto" and bool(_regular(bank, damping)):
        root, solved = _cholesky(bank, damping)
        if bool(solved.all()):
            return root, ~solved
    finite = bank.isfinite().flatten(1).all(1) & damping.isfinite()
    vanishing = bank.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0
    empty = finite & vanishing & ((damping <= 0) | relative)
    eye = torch.eye(bank.shape[-1], dtype=bank.dtype, device=bank.device)
    usable = (finite & ~empty)[:, None, None]
    safe = torch.where(usable, bank, eye)
    rho = torch.where(finite & ~empty, damping, torch.ones_like(damping))
    p = root_index(power)
    if power == 1 and not relative and method == "auto":
        root, solved = _cholesky(safe, rho)
    elif p and (method == "newton" or (method == "auto" and bank.device.type != "cpu")):
        root, solved = _newton(safe, rho, p, relative)
    else:
        root, solved = _eigh(safe, rho, power, relative)
    solved &= root.isfinite().flatten(1).all(1)
    root = torch.where(empty[:, None, None], torch.zeros_like(root), root)
    failed = ~(finite & (solved | empty))
    return torch.where(failed[:, None, None], previous, root), failed


def _regular(bank: Tensor, rho: Tensor) -> Tensor:
    """Return whether no matrix is zero or holds NaN or infinity; semi-definite, they show it in the trace."""
    traces = bank.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((traces > 0) & traces.isfinite() & rho.isfinite()).all()


def _cholesky(bank: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    damped = bank.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(rho[:, None])
    factor, info = torch.linalg.cholesky_ex(damped)
    solved = info == 0
    if not bool(solved.all()):
        eye = torch.eye(bank.shape[-1], dtype=bank.dtype, device=bank.device)
        factor = torch.where(solved[:, None, None], factor, eye)
    root = torch.cholesky_inverse(factor)
    return root, solved & _trace_is_finite(root)


def _trace_is_finite(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()


def _newton(bank: Tensor, rho: Tensor, p: int, relative: bool) -> tuple[Tensor, Tensor]:
    root, solved = newton_roots(bank, rho * largest_eigenvalues(bank) if relative else rho, p)
    if not bool(solved.all()):
        rest = ~solved
        root[rest], solved[rest] = _eigh(bank[rest], rho[rest], 1 / p, relative)
    return root, solved


def _eigh(bank: Tensor, rho: Tensor, power: float, relative: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues below zero are rounding errors of a semi-definite matrix."""
    values, vectors, found = eigenbases(bank)
    rho = rho * values[:, -1] if relative else rho
    damped = values.clamp(min=0) + rho[:, None]
    solved = found & (damped > 0).all(1)
    scaled = vectors * damped.clamp(min=torch.finfo(bank.dtype).tiny).pow(-power)[:, None, :]
    root = scaled @ vectors.mT
    condition = damped[:, -1] / damped[:, 0]
    rough = solved & (condition > REFINED[0]) & (condition < REFINED[1])
    if bank.dtype == torch.float32 and bool(rough.any()):
        root[rough] = _refined(bank[rough], rho[rough], vectors[rough], power)
    return root, solved


def _refined(bank: Tensor, rho: Tensor, vectors: Tensor, power: float) -> Tensor:
    """Correct a root to first order for what is left of the matrix off the diagonal of its eigenbasis.

    Rounding errors of the decomposition are of the order of the largest eigenvalue, and the root is made of
    the smallest ones. One product in double precision shows them. The derivative of a function of a matrix
    is, in its eigenbasis, a product entry by entry with divided differences (Daleckii and Krein).
    """
    product = (bank.double() @ vectors.double()).to(bank.dtype)
    turned = symmetric(vectors.mT @ product).double()  # rows of large eigenvalues lose more digits
    values = turned.diagonal(dim1=-2, dim2=-1) + rho.double()[:, None]
    values = values.clamp(min=torch.finfo(bank.dtype).tiny)
    turned *= divided_differences(values, power)
    turned.diagonal(dim1=-2, dim2=-1).copy_(values.pow(-power))
    return vectors @ turned.to(bank.dtype) @ vectors.mT


def divided_differences(x: Tensor, power: float) -> Tensor:
    """Return ``(x_i^-power - x_j^-power) / (x_i - x_j)``, the derivative where both are equal.

    Args:
        x: ``[K, n]``, positive.
        power: Positive power.

    Returns:
        ``[K, n, n]``, exact for values as close as may be.
    """
    gap = x.log()[:, :, None] - x.log()[:, None, :]  # x_j = x_i e^-gap
    ratio = torch.where(gap == 0, -power, torch.expm1(power * gap) / torch.expm1(-gap))
    return x.pow(-power - 1)[:, :, None] * ratio


def eigenbases(bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of every matrix of a bank.

    Args:
        bank: ``[K, n, n]`` symmetric and finite.

    Returns:
        Values ``[K, n]``, vectors ``[K, n, n]`` and a mask ``[K]`` of successes; zeros where it failed.
    """
    try:
        values, vectors = torch.linalg.eigh(bank)
    # Raised for the whole batch: find out which one it was.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(bank) == 1:
            return torch.zeros_like(bank[:, 0]), torch.zeros_like(bank), torch.zeros_like(bank[:, 0, 0]) > 0
        parts = [eigenbases(matrix[None]) for matrix in bank]
        values, vectors, found = (torch.cat(part) for part in zip(*parts, strict=True))
        return values, vectors, found
    return values, vectors, torch.ones_like(values[:, 0]) > 0


def diagonal_roots(bank: Tensor, damping: Tensor, power: float) -> Tensor:
    """Compute the same for diagonal matrices, ``[K, n]``; entries of a zero matrix with no damping are zero.

    Args:
        bank: ``[K, n]`` diagonals.
        damping: ``[K]``.
        power: Positive power.
    """
    damped = bank.clamp(min=0) + damping[:, None]
    return torch.where(damped > 0, damped.pow(-power), torch.zeros_like(damped))
