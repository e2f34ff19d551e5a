"""Banks: factors of equal shape in one tensor, averaged and inverted together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mupass._optim.parallel import divided
from mupass._optim.roots import diagonal_roots, inverse_roots
from mupass._taps.pieces import cut, paste

# Entries of the matrices that are inverted together: large ones gain nothing from company, and each needs
# room for several copies of itself.
AT_ONCE = 2**21


class Bank:
    """Moving averages of equally shaped factors, and their inverse roots.

    Attributes:
        keys: What each slot belongs to.
        factors: ``[K, n, n]`` averages, or ``[K, n]`` for diagonal factors; not corrected for bias.
        roots: Inverse roots of the same shape.
        weight: ``[K]``, see `value`.
        rooted: ``[K]``, trace of every factor when its root was computed.
        likely: Slot -> another slot whose factor is often the same: of weights that read one activation.
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
        self.rooted = torch.zeros_like(self.weight)
        self._traces: Tensor | None = None  # until the averages change
        self.likely: dict[int, int] = {}

    @property
    def diagonal(self) -> bool:
        """Whether the factors are diagonal."""
        return self.factors.dim() == 2

    def average(self, new: Mapping[Any, Tensor], decay: float) -> list[Any]:
        """Add one observation of each factor to the moving averages.

        A factor with no observation, or with one that is not finite (an overflow), keeps its average: one bad
        batch must not stay in it for good.

        Args:
            new: Key -> observed factor, or several stacked, for the slots from that key on.
            decay: Weight of the past; 0 keeps only the new ones, 1 sums without forgetting.

        Returns:
            Keys whose observation was not finite.
        """
        self._traces = None
        firsts = [self.slot[key] for key in new]
        stacks = [m if m.dim() == self.factors.dim() else m[None] for m in new.values()]
        if not stacks:
            return []
        at = torch.tensor([first + i for first, m in zip(firsts, stacks, strict=True) for i in range(len(m))])
        at = at.to(self.weight.device)
        # A factor is semi-definite: no entry is larger than the trace, and NaN or inf is on the diagonal too.
        finite = torch.cat([_trace(m) for m in stacks]).isfinite()
        fresh = 1.0 if decay == 1 else 1 - decay
        if bool(finite.all()):
            views = [self.factors[first : first + len(m)] for first, m in zip(firsts, stacks, strict=True)]
            stacks = [m.to(self.factors.dtype) for m in stacks]
            if decay == 1:
                torch._foreach_add_(views, stacks)
            else:
                torch._foreach_lerp_(views, stacks, fresh)
        else:
            seen = torch.cat(stacks)[finite].to(self.factors.dtype)
            self.factors[at[finite]] = decay * self.factors[at[finite]] + fresh * seen
        kept = at[finite]
        self.weight[kept] = 1.0 if decay == 1 else decay * self.weight[kept] + fresh
        return [self.keys[i] for i in at[~finite].tolist()]

    def value(self, at: Tensor | slice = slice(None)) -> Tensor:
        """Return the averages, corrected for the start from zero; zeros for what was never observed.

        Args:
            at: Slots; all by default.
        """
        factors, weight = self.factors[at], self.weight[at]
        weight = torch.where(weight > 0, weight, torch.ones_like(weight))
        return factors / weight.view(-1, *[1] * (factors.dim() - 1))

    def traces(self) -> Tensor:
        """Return the trace of every factor, ``[K]``."""
        if self._traces is None:
            weight = torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))
            self._traces = _trace(self.factors) / weight
        return self._traces

    def drifted(self, ratio: float) -> Tensor:
        """Return which factors have grown or shrunk so much since their root was computed that it is stale.

        Args:
            ratio: Of the traces, above 1.
        """
        now, then = self.traces(), self.rooted
        return (now > ratio * then) | (now * ratio < then) | ((then == 0) & (now > 0))

    def copies(self, damping: Tensor, at: Tensor) -> dict[int, int]:
        """Return slots that have the same factor and damping as another one: slot -> the other one.

        Args:
            damping: ``[K]``.
            at: Slots to look for, and at.
        """
        own = set(at.tolist()) if self.likely else set()
        pairs = [(slot, other) for slot, other in self.likely.items() if {slot, other} <= own]
        if not pairs:
            return {}
        ours, others = torch.tensor(pairs, device=at.device).T
        same = (damping[ours] == damping[others]) & (self.weight[ours] == self.weight[others])
        same &= (self.factors[ours] == self.factors[others]).flatten(1).all(1)
        return dict(pair for pair, equal in zip(pairs, same.tolist(), strict=True) if equal)

    def copy(self, slots: Tensor, others: Tensor) -> None:
        """Take over the roots of other slots.

        Args:
            slots: Where to.
            others: Where from.
        """
        self.rooted[slots], self.roots[slots] = self.rooted[others], self.roots[others]

    def refresh(
        self,
        damping: Tensor,
        power: float,
        at: Tensor,
        relative: bool = False,
        ranks: int = 1,
    ) -> Tensor:
        """Recompute inverse roots.

        Args:
            damping: ``[K]``.
            power: Power of the inverse.
            at: Slots to recompute.
            relative: Whether damping is relative to each factor's largest eigenvalue.
            ranks: Number of ranks that hold the same factors; each computes its share, and all get all.

        Returns:
            Mask of failures among those recomputed.
        """
        self.rooted[at] = self.traces()[at]
        if self.diagonal:
            value = self.value(at)
            rho = damping[at] * value.amax(-1) if relative else damping[at]
            self.roots[at] = diagonal_roots(value, rho, power)
            return torch.zeros(len(at), dtype=torch.bool)

        def compute(slots: Tensor) -> tuple[Tensor, Tensor]:
            mine = _run(slots)
            root, failed = inverse_roots(self.value(mine), damping[mine], power, self.roots[mine], relative)
            return root.to(self.roots.dtype), failed.to(self.weight.dtype)

        failed = []
        for part in torch.split(at, max(1, AT_ONCE // self.factors[0].numel()) * ranks):
            self.roots[part], fails = divided(part, ranks, compute)
            failed.append(fails > 0)
        return torch.cat(failed)

    def apply(self, stack: Tensor, first: int, count: int, left: bool) -> Tensor:
        """Multiply with the roots of some slots.

        Args:
            stack: ``[count, out, in]``.
            first: First slot.
            count: Number of slots.
            left: From which side.
        """
        return times(stack, self.roots[first : first + count], left)

    def layout(self) -> list[Any]:
        """Return what a saved state must agree in: shape of the factors, and whose they are."""
        return [*self.factors.shape[1:], *self.keys]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"factors": self.factors, "roots": self.roots, "weight": self.weight, "rooted": self.rooted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        self.factors.copy_(state["factors"])
        self.roots.copy_(state["roots"])
        self.weight.copy_(state["weight"])
        self.rooted.copy_(state["rooted"])
        self._traces = None


def _run(slots: Tensor) -> Tensor | slice:
    """Return slots that stand together as a slice, which takes views where indices take copies."""
    ends = slots[[0, -1]].tolist() if len(slots) else [0, -1]
    return slice(ends[0], ends[1] + 1) if ends[1] - ends[0] + 1 == len(slots) else slots


def times(stack: Tensor, factor: Tensor, left: bool) -> Tensor:
    """Multiply ``[groups, out, in]`` from one side by ``[groups * blocks, n, n]`` or by ``[groups, n]``."""
    if factor.dim() == 2:
        return factor[..., None] * stack if left else stack * factor[:, None]
    count = len(factor) // len(stack)
    if count > 1:
        rows = stack.mT if left else stack
        found = paste(cut(rows, count, factor.shape[-1]) @ factor, count, rows.shape[-1])  # symmetric
        return found.mT if left else found
    return factor @ stack if left else stack @ factor


def _trace(factors: Tensor) -> Tensor:
    """Return the traces of ``[K, n, n]`` matrices or ``[K, n]`` diagonals."""
    return (factors if factors.dim() == 2 else factors.diagonal(dim1=-2, dim2=-1)).sum(-1)
