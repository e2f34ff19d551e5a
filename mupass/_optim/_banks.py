"""Banks: factors of equal shape in one tensor, averaged and inverted together."""

from __future__ import annotations

from collections.abc import Mapping
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
        weight: ``[K]``, see `value`.
    """

    def __init__(
        self, keys: list[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = keys
        self.slot = {key: i for i, key in enumerate(keys)}
        self.factors = torch.zeros(len(keys), *shape, dtype=dtype, device=device)
        self.roots = torch.zeros_like(self.factors)
        # Total weight of what was averaged, for each factor; divides out the start from zero.
        self.weight = torch.zeros(len(keys), dtype=dtype, device=device)

    @property
    def diagonal(self) -> bool:
        """Whether the factors are diagonal."""
        return self.factors.dim() == 2

    def average(self, new: Mapping[Any, Tensor], decay: float) -> list[Any]:
        """Add one observation of each factor to the moving averages.

        A factor with no observation, or with one that is not finite (an overflow), keeps its average: one bad
        batch must not stay in it for good.

        Args:
            new: Key -> observed factor.
            decay: Weight of the past; 0 keeps only the new ones, 1 sums without forgetting.

        Returns:
            Keys whose observation was not finite.
        """
        nothing = torch.zeros_like(self.factors[0])
        seen = torch.stack([new.get(key, nothing) for key in self.keys])
        finite = seen.isfinite().flatten(1).all(1)
        given = torch.tensor([key in new for key in self.keys], device=finite.device)
        fresh = 1.0 if decay == 1 else 1 - decay
        summed = decay * self.factors + fresh * seen
        weight = torch.ones_like(self.weight) if decay == 1 else decay * self.weight + fresh
        keep = given & finite
        self.factors.copy_(torch.where(keep.view(-1, *[1] * nothing.dim()), summed, self.factors))
        self.weight.copy_(torch.where(keep, weight, self.weight))
        return [self.keys[i] for i in (given & ~finite).nonzero().flatten().tolist()]

    def value(self) -> Tensor:
        """Return the averages, corrected for the start from zero; zeros for what was never observed."""
        weight = torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))
        return self.factors / weight.view(-1, *[1] * (self.factors.dim() - 1))

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

    def layout(self) -> list[Any]:
        """Return what a saved state must agree in: shape of the factors, and whose they are."""
        return [*self.factors.shape[1:], *self.keys]

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
        self.weight.copy_(state["weight"])
