"""Inverse p-th roots by matrix products alone, for devices where eigendecompositions are slow."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 8  # p beyond this takes too many products
ITERATIONS = 30  # always all of them: to look at the residual is to wait for the device
PRECISE = 8  # iterations in double precision: they bring a condition number of 1e4 to 40 or less
CONVERGED = 1e-3  # quadratic from here on: the next iterations reach the rounding errors
POWER_ITERATIONS = 30


def root_index(power: float) -> int | None:
    """Return p for ``power = 1/p``, or None when there is no such small whole number.

    Args:
        power: Power of the inverse.
    """
    # 0.25 is 1/4, and 1/3 is taken for it up to rounding.
    p = round(1 / power) if power > 0 else 0
    return p if 1 <= p <= LARGEST and abs(p * power - 1) < 1e-12 else None


def largest_eigenvalues(bank: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of every matrix by power iteration, from below.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
    """
    # The largest column is never orthogonal to the leading eigenvector by accident of its axes.
    largest = bank.diagonal(dim1=-2, dim2=-1).argmax(-1)
    x = bank.gather(-1, largest[:, None, None].expand(-1, bank.shape[-1], 1))
    tiny = torch.finfo(bank.dtype).tiny
    for _ in range(POWER_ITERATIONS):
        x = bank @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=tiny))
    return torch.linalg.vector_norm(x, dim=1)[:, 0]


def newton_roots(bank: Tensor, rho: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Compute ``(M + rho I)^(-1/p)`` by the coupled Newton iteration (Guo & Higham, 2006).

    ``X <- X T``, ``M <- T^p M`` with ``T = ((p + 1) I - M) / p`` keeps ``X^-p M`` equal to the matrix and
    takes M to the identity. Small eigenvalues grow by ``((p + 1) / p)^p`` each time, so a condition number
    of 1e6 takes 16 iterations at p = 4. Where rounding errors are larger than the smallest eigenvalue it
    diverges; the mask says so. The rounding errors of the first iterations weigh most: those run in double
    precision, where a device has it.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
        rho: ``[K]``.
        p: Index of the root.

    Returns:
        The roots ``[K, n, n]`` and a mask ``[K]`` of those that converged.
    """
    dtype = bank.dtype
    if bank.device.type != "mps":  # it has no double precision
        bank, rho = bank.double(), rho.double()
    eye = torch.eye(bank.shape[-1], dtype=bank.dtype, device=bank.device)
    # M_0 = scale (A + rho I), X_0 = scale^(1/p) I.
    damped = bank + rho[:, None, None] * eye
    # The largest sum of a row bounds the eigenvalues, and M starts in (0, (p + 1) / 2].
    scale = (p + 1) / (2 * damped.abs().sum(-1).amax(-1))
    m = damped * scale[:, None, None]
    x = eye * scale.pow(1 / p)[:, None, None]
    for number in range(ITERATIONS):
        # From here on the matrices are well conditioned.
        if number == PRECISE:
            eye, m, x = (tensor.to(dtype) for tensor in (eye, m, x))
        m, x = _iterate(m, x, eye, p)
    return x.to(dtype), _residual(m, eye) < CONVERGED


def _residual(m: Tensor, eye: Tensor) -> Tensor:
    return (m - eye).abs().amax((1, 2))


def _iterate(m: Tensor, x: Tensor, eye: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return the next pair; converged matrices stay where they are."""
    # T = ((p + 1) I - M) / p
    t = ((p + 1) * eye - m) / p
    updated = torch.linalg.matrix_power(t, p) @ m
    # Rounding errors grow once M is the identity: what gets no better stays.
    better = (_residual(updated, eye) <= _residual(m, eye).clamp(min=CONVERGED))[:, None, None]
    # Symmetric but for rounding errors, which would grow.
    updated = (updated + updated.mT) / 2
    return torch.where(better, updated, m), torch.where(better, x @ t, x)
