"""Inverse roots of banks of symmetric matrices, safe in the middle of training."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_roots(
    bank: Tensor, damping: Tensor, power: float, previous: Tensor, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute ``(M + damping I)^-power`` for every matrix of a bank.

    Power 1 is a Cholesky factorization, other powers (and relative damping) an eigendecomposition. A matrix
    whose factorization fails, or whose result is not finite, keeps its previous root. A zero matrix with
    zero damping (the layers under a zero-initialized readout) has the root zero: its gradient is zero too,
    and nothing is 0/0.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
        damping: ``[K]``.
        power: Positive power.
        previous: ``[K, n, n]`` roots to fall back on.
        relative: Whether damping is relative to each matrix' largest eigenvalue.

    Returns:
        The roots ``[K, n, n]`` and a mask ``[K]`` of failures.
    """
    if power == 1 and not relative and bool(_regular(bank, damping)):
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
    if power == 1 and not relative:
        root, solved = _cholesky(safe, rho)
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


def _eigh(bank: Tensor, rho: Tensor, power: float, relative: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues below zero are rounding errors of a semi-definite matrix."""
    try:
        values, vectors = torch.linalg.eigh(bank)
    # Raised for the whole batch: find out which one it was.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _one_by_one(bank, rho, power, relative)
    rho = rho * values[:, -1] if relative else rho
    damped = values.clamp(min=0) + rho[:, None]
    solved = (damped > 0).all(1)
    scaled = vectors * damped.clamp(min=torch.finfo(bank.dtype).tiny).pow(-power)[:, None, :]
    return scaled @ vectors.mT, solved


def _one_by_one(bank: Tensor, rho: Tensor, power: float, relative: bool) -> tuple[Tensor, Tensor]:
    if len(bank) == 1:
        return torch.zeros_like(bank), torch.zeros(1, dtype=torch.bool, device=bank.device)
    parts = [_eigh(bank[i : i + 1], rho[i : i + 1], power, relative) for i in range(len(bank))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def diagonal_roots(bank: Tensor, damping: Tensor, power: float) -> Tensor:
    """Compute the same for diagonal matrices, ``[K, n]``; entries of a zero matrix with no damping are zero.

    Args:
        bank: ``[K, n]`` diagonals.
        damping: ``[K]``.
        power: Positive power.
    """
    damped = bank.clamp(min=0) + damping[:, None]
    return torch.where(damped > 0, damped.pow(-power), torch.zeros_like(damped))
