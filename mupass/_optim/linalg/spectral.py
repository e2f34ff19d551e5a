"""Updates of spectral norm 1, or of the norm of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ITERATIONS = 6  # a step; the vector of the step before is close already


def with_unit_norm(top: Tensor, update: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return the directions of an update, each divided by its spectral norm; zeros stay zero.

    The norm is estimated by power iteration, from below, and the vector is kept from step to step.

    Args:
        top: ``[K, columns]``, leading right singular vectors of the step before, changed in place; zeros at
            the start.
        update: Returns directions ``[K, *shape]``, whose first axis of shape counts rows.
        arguments: Its arguments.
    """
    direction = update(*arguments)
    matrices = direction.flatten(2)
    tiny = torch.finfo(matrices.dtype).tiny
    # The longest row to start from: it is never orthogonal to all of the matrix.
    longest = torch.linalg.vector_norm(matrices, dim=2).argmax(1)[:, None, None]
    row = matrices.gather(1, longest.expand(-1, 1, matrices.shape[2]))[:, 0]
    x = torch.where(torch.linalg.vector_norm(top, dim=1, keepdim=True) > 0, top, row)
    # Should the old one be orthogonal to the new.
    x = x + 1e-3 * row * (_norm(x) / _norm(row).clamp(min=tiny))
    for _ in range(ITERATIONS):
        # x <- M^T M x
        x = x / _norm(x).clamp(min=tiny)
        image = (matrices @ x[:, :, None])[:, :, 0]
        x = (image[:, None, :] @ matrices)[:, 0]
    # |M x| of a unit vector x close to the leading one.
    norm = torch.linalg.vector_norm(image, dim=1)
    top.copy_(x / _norm(x).clamp(min=tiny))
    factor = torch.where(norm > 0, 1 / norm.clamp(min=tiny), torch.zeros_like(norm))
    return direction * factor.view(-1, *[1] * (direction.dim() - 1))


def with_norm_of(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Return directions with the norm of other blocks, one by one; a zero direction stays zero.

    Args:
        magnitude: ``[K, *shape]``, whose norms are wanted.
        direction: ``[K, *shape]``.
    """
    target_norm = torch.linalg.vector_norm(magnitude.flatten(1), dim=1)
    norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    factor = torch.where(norm > 0, target_norm / norm, torch.zeros_like(norm))
    return direction * factor.view(-1, *[1] * (direction.dim() - 1))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)
