"""Banks: factors of equal shape in one tensor, averaged and inverted together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mupass._optim._roots import diagonal_roots, inverse_roots


class Bank:
    """Moving averages of equally shaped factors, and their inverse roots.

    Attributes:
        keys: What each slot belongs to.
        factors: ``[K, n, n]`` averages, or ``[K, n]`` for diagonal factors; not corrected for bias.
        roots: Inverse roots of the same shape.
    """

    def __init__(
        self, keys: list[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = keys
        self.slot = {key: i for i, key in enumerate(keys)}
        self.factors = torch.zeros(len(keys), *shape, dtype=dtype, device=device)
        self.roots = torch.zeros_like(self.factors)
        self.weight = 0.0  # total weight of what was averaged; divides out the start from zero

    @property
    def diagonal(self) -> bool:
        """Whether the factors are diagonal."""
        return self.factors.dim() == 2

    def average(self, new: Tensor, decay: float) -> None:
        """Add one observation of every factor to the moving averages.

        Args:
            new: Stacked factors.
            decay: Weight of the past; 0 keeps only the new ones, 1 sums without forgetting.
        """
        fresh = 1.0 if decay == 1 else 1 - decay
        self.factors.mul_(decay).add_(new, alpha=fresh)
        self.weight = decay * self.weight + fresh if decay != 1 else 1.0

    def value(self) -> Tensor:
        """Return the averages, corrected for the start from zero."""
        return self.factors / self.weight

    def traces(self) -> Tensor:
        """Return the trace of every factor, ``[K]``."""
        diagonal = self.value() if self.diagonal else self.value().diagonal(dim1=-2, dim2=-1)
        return diagonal.sum(-1)

    def refresh(
        self, damping: Tensor, power: float, only: Tensor | None = None, relative: bool = False
    ) -> Tensor:
        """Recompute inverse roots.

        Args:
            damping: ``[K]``.
            power: Power of the inverse.
            only: Slots to recompute; all when None.
            relative: Whether damping is relative to each factor's largest eigenvalue.

        Returns:
            Mask of failures among those recomputed.
        """
        at = slice(None) if only is None else only
        if self.diagonal:
            self.roots[at] = diagonal_roots(self.value()[at], damping[at], power)
            return torch.zeros(len(damping[at]), dtype=torch.bool)
        self.roots[at], failed = inverse_roots(self.value()[at], damping[at], power, self.roots[at], relative)
        return failed

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"factors": self.factors, "roots": self.roots, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        self.factors.copy_(state["factors"])
        self.roots.copy_(state["roots"])
        self.weight = state["weight"]
