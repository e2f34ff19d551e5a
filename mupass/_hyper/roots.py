"""Damped inverse roots of symmetric matrices that can be differentiated where eigenvalues coincide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mupass._optim.linalg.roots import divided_differences, eigenbases


def damped_root(bank: Tensor, damping: Tensor, power: float, relative: bool) -> Tensor:
    """Return ``(M + rho I)^-power`` of every matrix, as `mupass._optim.linalg.roots.inverse_roots` does.

    ``eigh`` of torch divides by differences of eigenvalues, and gradients of one batch always leave many that
    are zero. The derivative of the root itself has divided differences of ``x^-power`` instead (Daleckii and
    Krein), which stay finite.

    Args:
        bank: ``[K, n, n]`` symmetric positive semi-definite.
        damping: ``[K]``.
        power: Positive power.
        relative: Whether damping is relative to each matrix' largest eigenvalue.
    """
    root: Tensor = _DampedRoot.apply(bank, damping, power, relative)  # type: ignore[no-untyped-call]
    return root


class _DampedRoot(torch.autograd.Function):
    """``root = Q x^-power Q^T`` with ``x = eigenvalues + rho``; differentiable once, both ways."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, damping: Tensor, power: float, relative: bool) -> Tensor:
        values, vectors, converged = eigenbases(bank)
        values = values.clamp(min=0)
        unit = values[:, -1] if relative else torch.ones_like(damping)
        x = values + (damping * unit)[:, None]
        # A zero matrix with nothing added has the root zero: its gradient is zero too.
        alive = (converged & (x > 0).all(1))[:, None]
        # 1 instead of 0, which has no inverse; masked below.
        x = torch.where(alive, x, torch.ones_like(x))
        slope = -power * x.pow(-power - 1) * alive
        divided = divided_differences(x, power) * alive[:, :, None]
        saved = (vectors, divided, slope, damping, unit)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.relative = relative
        return (vectors * (x.pow(-power) * alive)[:, None, :]) @ vectors.mT

    @staticmethod
    def jvp(ctx: Any, d_bank: Tensor | None, d_damping: Tensor | None, *_: Any) -> Tensor:
        vectors, divided, slope, damping, unit = ctx.saved_tensors
        inner, d_rho = torch.zeros_like(divided), torch.zeros_like(damping)
        if d_bank is not None:
            # d root = Q (divided * Q^T dM Q) Q^T + d rho part on the diagonal
            turned = vectors.mT @ d_bank @ vectors
            inner = divided * turned
            # The largest eigenvalue moves damping where it is relative to it: its eigenvector is the last.
            d_rho = damping * turned[:, -1, -1] if ctx.relative else d_rho
        if d_damping is not None:
            d_rho = d_rho + d_damping * unit
        inner = inner + torch.diag_embed(slope * d_rho[:, None])
        return vectors @ inner @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors, divided, slope, damping, unit = ctx.saved_tensors
        # The transpose of the same map.
        turned = vectors.mT @ (gradient + gradient.mT) @ vectors / 2
        by_rho = (slope * turned.diagonal(dim1=-2, dim2=-1)).sum(1)
        inner = divided * turned
        if ctx.relative:
            inner[:, -1, -1] += by_rho * damping
        return vectors @ inner @ vectors.mT, by_rho * unit, None, None
