"""EKFAC: second moments of gradients in the eigenbases of the factors, for the products of eigenvalues.

George et al., arXiv 1806.03884. In the eigenbases ``A = U_A diag(a) U_A^T``, ``B = U_B diag(b) U_B^T`` K-FAC
divides entry ij of the gradient by ``(b_i + rho_B)(a_j + rho_A)``. Its curvature there is ``b_i a_j``, which
assumes that inputs and gradients are independent. EKFAC has the mean square ``S_ij`` of the gradient's entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupass._optim.banks import Bank, times
from mupass._optim.curvature import observed_moments
from mupass._optim.pairs import Pair
from mupass._optim.parallel import divided
from mupass._optim.roots import eigenbases
from mupass._taps.blocks import Block, Place
from mupass._taps.factors import Layer
from mupass._taps.leaves import Sums

At = Mapping[str, tuple[Bank, int, int]]


class EigenBank(Bank):
    """A bank that holds eigenvectors where others hold roots; a factor never observed has eigenvalues zero.

    Attributes:
        values: ``[K, n]`` eigenvalues of the factors when they were decomposed.
        rho: ``[K]`` damping then, absolute.
        turned: Slots that were decomposed last -> squares of the turn of their basis, ``(U_new^T U_old)^2``.
    """

    def __init__(
        self, keys: list[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(keys, shape, dtype, device)
        self.values = torch.zeros(len(keys), shape[-1], dtype=dtype, device=device)
        self.rho = torch.zeros_like(self.weight)
        self.turned: dict[int, Tensor] = {}

    def refresh(
        self, damping: Tensor, power: float, at: Tensor, relative: bool = False, ranks: int = 1
    ) -> Tensor:
        """Decompose factors.

        Args:
            damping: ``[K]``.
            power: Of the inverse; decides nothing here.
            at: Slots to decompose.
            relative: Whether damping is relative to each factor's largest eigenvalue.
            ranks: Number of ranks that hold the same factors; each computes its share, and all get all.

        Returns:
            Mask of failures among those decomposed; these keep what they had.
        """
        self.rooted[at] = self.traces()[at]
        values, vectors, success = divided(at, ranks, self._decompose, symmetric=False)
        found = success > 0
        done, old = at[found], self.roots[at[found]]
        values, vectors = values[found].clamp(min=0), vectors[found]
        self.values[done], self.roots[done] = values, vectors
        self.rho[done] = damping[done] * values.amax(-1) if relative else damping[done]
        self.turned = dict(zip(done.tolist(), (vectors.mT @ old).square(), strict=True))
        return ~found

    def copy(self, slots: Tensor, others: Tensor) -> None:
        """Take over bases and eigenvalues, see `Bank.copy`."""
        old = self.roots[slots]
        super().copy(slots, others)
        self.values[slots], self.rho[slots] = self.values[others], self.rho[others]
        self.turned |= dict(zip(slots.tolist(), (self.roots[slots].mT @ old).square(), strict=True))

    def _decompose(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return eigenvalues, eigenvectors and successes (1 or 0) of some slots."""
        bank = self.value(at)
        finite = bank.isfinite().flatten(1).all(1)
        values, vectors, found = eigenbases(torch.where(finite[:, None, None], bank, torch.zeros_like(bank)))
        return values, vectors, (found & finite).to(self.weight.dtype)

    def apply(self, stack: Tensor, first: int, count: int, left: bool) -> Tensor:
        """Multiply as `Bank.apply` does, by the damped inverses ``U (diag(values) + rho)^-1 U^T``."""
        basis = self.roots[first : first + count]
        damped = self.values[first : first + count] + self.rho[first : first + count, None]
        turned = times(stack, basis.mT if left else basis, left)
        return times(times(turned, _inverse(damped), left), basis if left else basis.mT, left)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {**super().state_dict(), "values": self.values, "rho": self.rho}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        super().load_state_dict(state)
        self.values.copy_(state["values"])
        self.rho.copy_(state["rho"])


def _inverse(damped: Tensor) -> Tensor:
    """Where nothing was ever seen and nothing is added (under a zero readout), the inverse is zero."""
    return torch.where(damped > 0, 1 / damped.clamp(min=torch.finfo(damped.dtype).tiny), 0.0)


def not_rescaled(block: Block, layers: Mapping[Place, Layer]) -> str:
    """Return why the rescaling does not take a block, or nothing.

    Args:
        block: A block of K-FAC.
        layers: Shapes of all taps.
    """
    if not block.a:
        return "not rescaled: its input factor is the number 1"
    if block.tied:
        return "not rescaled: its two transposed uses have no common eigenbasis"
    used = [(f, layers[p]) for f in (*block.a, *block.b) for p in f.places]
    if any(layer.diagonal_in if f.side == "a" else layer.diagonal_out for f, layer in used):
        return "not rescaled: one of its factors is a diagonal"
    return ""


class Moments:
    """Moving averages of second moments in the eigenbases, ``[groups, out, in]`` for every pair of factors.

    They start as the products of the eigenvalues, with the weight of the factors' own averages. When a basis
    changes they are mixed by the squares of its turn, as if the gradients had no correlations in the old one.
    """

    def __init__(self, pairs: Sequence[Pair], at: At) -> None:
        self.at = at
        self.pairs = {f"{p.block.parameter}.{p.piece}": p for p in pairs}
        self.sums, self.weight = {}, {}
        for name, pair in self.pairs.items():
            like = self._sides(pair)[0][0].values
            self.sums[name] = like.new_zeros(pair.groups, pair.outputs, pair.inputs)
            self.weight[name] = like.new_zeros(pair.groups)

    def _sides(self, pair: Pair) -> list[tuple[EigenBank, int, int]]:
        """Return (bank, first slot, number of slots) of the output and of the input factor."""
        return [self.at[slot] for slot in (pair.b, pair.a) if slot]  # type: ignore[misc]

    def bases(self) -> dict[Place, tuple[Tensor, ...]]:
        """Return the bases that every tap needs, views into the banks: the input's, then every output's."""
        found: dict[Place, tuple[Tensor, ...]] = {}
        for pair in sorted(self.pairs.values(), key=lambda p: p.block.b[p.piece].piece):
            b, a = (bank.roots[first : first + count] for bank, first, count in self._sides(pair))
            for place in pair.block.b[pair.piece].places:
                found[place] = (*found.get(place, (a,)), b)
        return found

    def average(self, taken: Mapping[Place, Sums], decay: float, count: Callable[[str, str], None]) -> None:
        """Add the moments of one step; those of pairs that have no basis yet mean nothing.

        Args:
            taken: Result of `Curvature.take`.
            decay: Weight of the past.
            count: Called with (incident, place) for moments that overflowed.
        """
        for name, pair in self.pairs.items():
            new = observed_moments(pair.block.b[pair.piece], taken)
            if new is None:
                continue
            total, weight = self.sums[name], self.weight[name]
            # They are not negative: what is not finite is so in the sum.
            finite = new.sum((1, 2)).isfinite()
            if not bool(finite.all()):
                count("overflowed_factors", f"the second moments of {pair.block.parameter}")
            fresh = torch.where(finite & (weight > 0), 1 - decay, 0.0).to(weight.dtype)
            total.lerp_(torch.where(finite[:, None, None], new, 0.0).to(total.dtype), fresh[:, None, None])
            weight.lerp_(torch.ones_like(weight), fresh)

    def follow(self) -> None:
        """Go over to the bases that the banks have turned to, and start what has both bases now."""
        for name, pair in self.pairs.items():
            total = self.sums[name]
            for left, (bank, first, count) in zip((True, False), self._sides(pair), strict=True):
                for g in range(count):
                    mixing = bank.turned.get(first + g)
                    if mixing is not None:
                        total[g] = mixing @ total[g] if left else total[g] @ mixing.mT
            (b, first_b, n), (a, first_a, _) = self._sides(pair)
            values_b, values_a = b.values[first_b : first_b + n], a.values[first_a : first_a + n]
            start = (self.weight[name] == 0) & (values_b[:, -1] > 0) & (values_a[:, -1] > 0)
            weight = torch.where(start, b.weight[first_b : first_b + n], self.weight[name])
            product = values_b[:, :, None] * values_a[:, None, :] * weight[:, None, None]
            self.sums[name].copy_(torch.where(start[:, None, None], product, total))
            self.weight[name].copy_(weight)
        for some, _, _ in self.at.values():
            if isinstance(some, EigenBank):
                some.turned = {}

    def __contains__(self, pair: Pair) -> bool:
        """Return whether a pair is one of them."""
        return f"{pair.block.parameter}.{pair.piece}" in self.pairs

    def value(self, pair: Pair) -> Tensor:
        """Return the averages of a pair, corrected for their start.

        Args:
            pair: One of them.
        """
        name = f"{pair.block.parameter}.{pair.piece}"
        weight = self.weight[name]
        return self.sums[name] / torch.where(weight > 0, weight, 1.0)[:, None, None]

    def turn(self, pair: Pair, stack: Tensor, back: bool = False) -> Tensor:
        """Return ``U_B^T stack U_A``, or ``U_B stack U_A^T``.

        Args:
            pair: One of the pairs.
            stack: ``[groups, out, in]``.
            back: Which of the two.
        """
        b, a = (bank.roots[first : first + count] for bank, first, count in self._sides(pair))
        return b @ stack @ a.mT if back else b.mT @ stack @ a

    def direction(self, pair: Pair, stack: Tensor) -> Tensor:
        """Return the preconditioned gradient, ``U_B [ U_B^T G U_A / (S + damping) ] U_A^T``.

        The damping of entry ij is ``rho_A b_i + rho_B a_j + rho_A rho_B``, what damping each factor adds to
        the product of the eigenvalues: with ``S_ij = b_i a_j`` this is K-FAC's own step, and a damping tuned
        for one serves the other. Each of its terms has the order in width that S has.

        Args:
            pair: One of the pairs.
            stack: Gradient, ``[groups, out, in]``.
        """
        (b, first_b, n), (a, first_a, _) = self._sides(pair)
        values_b, values_a = b.values[first_b : first_b + n, :, None], a.values[first_a : first_a + n, None]
        rho_b, rho_a = b.rho[first_b : first_b + n, None, None], a.rho[first_a : first_a + n, None, None]
        damped = self.value(pair) + rho_a * values_b + rho_b * (values_a + rho_a)
        return self.turn(pair, self.turn(pair, stack) * _inverse(damped), back=True)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"sums": dict(self.sums), "weight": dict(self.weight)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        for own, saved in ((self.sums, state["sums"]), (self.weight, state["weight"])):
            for name, tensor in own.items():
                tensor.copy_(saved[name])
