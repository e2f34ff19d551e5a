"""EKFAC: second moments of gradients in the eigenbases of the factors, for the products of eigenvalues.

George et al., arXiv 1806.03884. In the eigenbases ``A = U_A diag(a) U_A^T``, ``B = U_B diag(b) U_B^T`` K-FAC
divides entry ij of the gradient by ``(b_i + rho_B)(a_j + rho_A)``. Its curvature there is ``b_i a_j``, which
assumes that inputs and gradients are independent. EKFAC has the mean square ``S_ij`` of the gradient's entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupass._optim.kronecker.curvature import observed_moments
from mupass._optim.kronecker.factor_pairs import Pair
from mupass._optim.kronecker.factor_stack import Bank
from mupass._optim.kronecker.update import Root, by_eigenbasis, inverse, times
from mupass._optim.linalg.packed import packed_size
from mupass._optim.linalg.roots import eigenbases
from mupass._taps.blocks import Block, Place
from mupass._taps.factors import Layer
from mupass._taps.leaves import Sums

At = Mapping[str, tuple[Bank, int, int]]


class EigenBank(Bank):
    """A bank that holds eigenvectors where others hold roots; a factor never observed has eigenvalues zero.

    Its state has ``vectors``, ``[K, n, n]``, and ``values``, ``[K, n]``, in place of ``root``; ``rho`` is the
    absolute damping at the time.

    Attributes:
        turned: Slots that were decomposed last -> squares of the turn of their basis, ``(U_new^T U_old)^2``.
    """

    def __init__(
        self, keys: list[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(keys, shape, dtype, device)
        self.turned: dict[int, Tensor] = {}

    def _matrices(self) -> dict[str, Tensor]:
        n = self.size
        return {
            "factor": self._zeros(packed_size(n)),
            "vectors": self._zeros(n, n),
            "values": self._zeros(n),
        }

    def refresh(self, damping: Tensor, power: float, slots: Sequence[int], relative: bool = False) -> None:
        """Decompose factors; those whose decomposition fails keep what they had.

        Args:
            damping: ``[K]``.
            power: Of the inverse; decides nothing here.
            slots: Those to decompose.
            relative: Whether damping is relative to each factor's largest eigenvalue.
        """
        state, at = self.state, self._begin(slots)
        whole = self.value(at)
        finite = whole.isfinite().flatten(1).all(1)
        values, vectors, found = eigenbases(torch.where(finite[:, None, None], whole, 0.0))
        done = found & finite
        self.failed[at] += ~done
        old, old_values, old_rho = (state[name][at] for name in ("vectors", "values", "rho"))
        vectors = torch.where(done[:, None, None], vectors, old)
        values = torch.where(done[:, None], values.clamp(min=0), old_values)
        rho = damping[at] * values.amax(-1) if relative else damping[at]
        state["vectors"][at], state["values"][at] = vectors, values
        state["rho"][at] = torch.where(done, rho, old_rho)
        mixing = (vectors.mT @ old).square()
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        mixing = torch.where(done[:, None, None], mixing, eye)
        self.turned = dict(zip(slots, mixing, strict=True))

    def root(self, first: int, count: int, grown: Tensor, power: float) -> Root:
        """Return the damped inverses of some slots, see `Bank`."""
        at = slice(first, first + count)
        damped = self.state["values"][at] + self.state["rho"][at, None]
        return Root(by_eigenbasis, (self.state["vectors"][at], damped), 0, grown[at], power)


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

    Attributes:
        pairs: The pairs, by parameter and number of the matrix.
        state: Of every pair, ``sum``: the averages, not corrected for their start, and ``weight``.
    """

    def __init__(self, pairs: Sequence[Pair], at: At) -> None:
        self.at = at
        self.pairs = {(p.block.parameter, p.piece): p for p in pairs}
        self.state: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.overflowed: dict[tuple[str, int], Tensor] = {}
        for name, pair in self.pairs.items():
            like = self._sides(pair)[0][0].state["weight"]
            self.state[name] = {
                "sum": like.new_zeros(pair.groups, pair.outputs, pair.inputs),
                "weight": like.new_zeros(pair.groups),
            }
            self.overflowed[name] = like.new_zeros(())

    def _sides(self, pair: Pair) -> list[tuple[EigenBank, int, int]]:
        """Return (bank, first slot, number of slots) of the output and of the input factor."""
        return [self.at[slot] for slot in (pair.b, pair.a) if slot]  # type: ignore[misc]

    def _decomposed(self, pair: Pair, name: str) -> list[Tensor]:
        """Return ``vectors``, ``values`` or ``rho`` of the output and of the input factor."""
        sides = self._sides(pair)
        return [bank.state[name][first : first + count] for bank, first, count in sides]

    def bases(self) -> dict[Place, tuple[Tensor, ...]]:
        """Return the bases that every tap needs, views into the banks: the input's, then every output's."""
        found: dict[Place, tuple[Tensor, ...]] = {}
        for pair in sorted(self.pairs.values(), key=lambda p: p.block.b[p.piece].piece):
            b, a = self._decomposed(pair, "vectors")
            for place in pair.block.b[pair.piece].places:
                found[place] = (*found.get(place, (a,)), b)
        return found

    def average(self, taken: Mapping[Place, Sums], decay: float, ok: Tensor) -> None:
        """Add the moments of one step; those of pairs that have no basis yet mean nothing.

        Args:
            taken: Result of `Curvature.take`.
            decay: Weight of the past.
            ok: Whether the observations count at all.
        """
        for name, pair in self.pairs.items():
            observation = observed_moments(pair.block.b[pair.piece], taken)
            if observation is None:
                continue
            new, seen = observation
            total, weight = self.state[name]["sum"], self.state[name]["weight"]
            # They are not negative: what is not finite is so in the sum.
            finite = new.sum((1, 2)).isfinite()
            there = seen.reshape(()) & ok
            self.overflowed[name] += (~finite & there).any()
            counts = finite & there
            fresh = torch.where(counts & (weight > 0), 1 - decay, 0.0).to(weight.dtype)
            total.lerp_(torch.where(counts[:, None, None], new, 0.0).to(total.dtype), fresh[:, None, None])
            weight.lerp_(torch.ones_like(weight), fresh)

    def follow(self) -> None:
        """Go over to the bases that the banks have turned to, and start what has both bases now."""
        for name, pair in self.pairs.items():
            total, own = self.state[name]["sum"], self.state[name]["weight"]
            for left, (bank, first, count) in zip((True, False), self._sides(pair), strict=True):
                for g in range(count):
                    mixing = bank.turned.get(first + g)
                    if mixing is not None:
                        total[g] = mixing @ total[g] if left else total[g] @ mixing.mT
            values_b, values_a = self._decomposed(pair, "values")
            (bank_b, first_b, n), _ = self._sides(pair)
            start = (own == 0) & (values_b[:, -1] > 0) & (values_a[:, -1] > 0)
            weight = torch.where(start, bank_b.state["weight"][first_b : first_b + n], own)
            product = values_b[:, :, None] * values_a[:, None, :] * weight[:, None, None]
            total.copy_(torch.where(start[:, None, None], product, total))
            own.copy_(weight)
        for some, _, _ in self.at.values():
            if isinstance(some, EigenBank):
                some.turned = {}

    def __contains__(self, pair: Pair) -> bool:
        """Return whether a pair is one of them."""
        return (pair.block.parameter, pair.piece) in self.pairs

    def value(self, pair: Pair) -> Tensor:
        """Return the averages of a pair, corrected for their start.

        Args:
            pair: One of them.
        """
        own = self.state[pair.block.parameter, pair.piece]
        return own["sum"] / torch.where(own["weight"] > 0, own["weight"], 1.0)[:, None, None]

    def turn(self, pair: Pair, stack: Tensor, back: bool = False) -> Tensor:
        """Return ``U_B^T stack U_A``, or ``U_B stack U_A^T``.

        Args:
            pair: One of the pairs.
            stack: ``[groups, out, in]``.
            back: Which of the two.
        """
        b, a = self._decomposed(pair, "vectors")
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
        turned = self.turn(pair, stack) * inverse(self.damped(pair))
        return self.turn(pair, turned, back=True)

    def damped(self, pair: Pair) -> Tensor:
        """Return what the gradient is divided by in the bases, ``[groups, out, in]``.

        Args:
            pair: One of the pairs.
        """
        values_b, values_a = self._decomposed(pair, "values")
        rho_b, rho_a = (rho[:, None, None] for rho in self._decomposed(pair, "rho"))
        values_b, values_a = values_b[:, :, None], values_a[:, None, :]
        return self.value(pair) + rho_a * values_b + rho_b * (values_a + rho_a)

    def output_change(self, pair: Pair, direction: Tensor) -> Tensor:
        """Return ``tr(D A D^T)`` of every group, the squared change of outputs that a direction makes.

        Args:
            pair: One of the pairs.
            direction: ``[groups, out, in]``.
        """
        _, (bank, first, count) = self._sides(pair)
        if not bank.is_fresh(first, count):
            product = times(direction, bank.value(slice(first, first + count)), False)
            return (direction * product).sum((1, 2)).clamp(min=0.0)
        _, vectors = self._decomposed(pair, "vectors")
        _, values = self._decomposed(pair, "values")
        return ((direction @ vectors).square() * values[:, None, :]).sum((1, 2))
