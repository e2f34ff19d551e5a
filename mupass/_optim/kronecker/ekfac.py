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
from mupass._optim.kronecker.factor_stack import FactorStack, Slots
from mupass._optim.kronecker.update import Root, by_eigenbasis, inverse, times
from mupass._optim.linalg.packed import packed_size
from mupass._optim.linalg.roots import eigenbases
from mupass._optim.vocabulary import MatrixTensors, State
from mupass._taps.blocks import Block, Place
from mupass._taps.factors import Layer
from mupass._taps.leaves import Sums

Side = tuple[FactorStack, int, int]  # bank, first of the matrices there, and their number
At = Mapping[str, Side]


class EigenStack(FactorStack):
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

    def _matrices(self) -> State:
        return {
            "factor": self._zeros(packed_size(self.size)),
            "vectors": self._zeros(self.size, self.size),
            "values": self._zeros(self.size),
        }

    def refresh(self, damping: Tensor, power: float, slots: Sequence[int], relative: bool = False) -> None:
        """Decompose factors; those whose decomposition fails keep what they had.

        Args:
            damping: ``[K]``.
            power: Of the inverse; decides nothing here.
            slots: Those to decompose.
            relative: Whether damping is relative to each factor's largest eigenvalue.
        """
        state, indices = self.state, self._begin(slots)
        factors = self.value(indices)
        # A factor with NaN would stop the decomposition of all: it counts as zero, and its result is dropped.
        finite = factors.isfinite().flatten(1).all(1)
        values, vectors, found = eigenbases(torch.where(finite[:, None, None], factors, 0.0))
        succeeded = found & finite
        self.failed[indices] += ~succeeded
        old_vectors = state["vectors"][indices]
        vectors = torch.where(succeeded[:, None, None], vectors, old_vectors)
        values = torch.where(succeeded[:, None], values.clamp(min=0), state["values"][indices])
        rho = damping[indices]
        if relative:
            rho = rho * values.amax(-1)
        state["vectors"][indices], state["values"][indices] = vectors, values
        state["rho"][indices] = torch.where(succeeded, rho, state["rho"][indices])
        # Entry ij: the part of the old axis j in the new axis i. A basis that stays turns nothing.
        mixing = (vectors.mT @ old_vectors).square()
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        mixing = torch.where(succeeded[:, None, None], mixing, eye)
        self.turned = dict(zip(slots, mixing, strict=True))

    def root(self, at: Slots, grown: Tensor, power: float) -> Root:
        """Return the damped inverses of some slots, see `FactorStack`."""
        damped = self.state["values"][at] + self.state["rho"][at][:, None]
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
    if block.standardized:
        return "not rescaled: the rows of its kernel keep their length, which takes the inverse factors"
    # Both bases must be full, and the taps must sum moments for all rows together.
    for factor in (*block.a, *block.b):
        for place in factor.places:
            layer = layers[place]
            if (factor.side == "a" and layer.diagonal_in) or (factor.side == "b" and layer.diagonal_out):
                return "not rescaled: one of its factors is a diagonal"
            if layer.kind == "grouped":
                return "not rescaled: its rows come group by group"
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
        self.pairs = {pair.name: pair for pair in pairs}
        self.state: dict[tuple[str, int], State] = {}
        self.overflowed: MatrixTensors = {}
        for name, pair in self.pairs.items():
            # Precision and device of the factors.
            like = self._sides(pair)[0][0].state["weight"]
            self.state[name] = {
                "sum": like.new_zeros(pair.groups, pair.outputs, pair.inputs),
                "weight": like.new_zeros(pair.groups),
            }
            self.overflowed[name] = like.new_zeros(())

    def _sides(self, pair: Pair) -> list[tuple[EigenStack, int, int]]:
        """Return (bank, first slot, number of slots) of the output and of the input factor."""
        return [self.at[slot] for slot in (pair.b, pair.a) if slot]  # type: ignore[misc]

    def _decomposed(self, pair: Pair, name: str) -> list[Tensor]:
        """Return ``vectors``, ``values`` or ``rho`` of the output and of the input factor."""
        sides = self._sides(pair)
        return [eigen_stack.state[name][first : first + count] for eigen_stack, first, count in sides]

    def bases(self) -> dict[Place, tuple[Tensor, ...]]:
        """Return the bases that every tap needs, views into the banks: the input's, then every output's."""
        bases_of: dict[Place, tuple[Tensor, ...]] = {}
        # A tap's outputs are in the order of their pieces.
        for pair in sorted(self.pairs.values(), key=lambda pair: pair.block.b[pair.piece].piece):
            basis_b, basis_a = self._decomposed(pair, "vectors")
            for place in pair.block.b[pair.piece].places:
                bases_of[place] = (*bases_of.get(place, (basis_a,)), basis_b)
        return bases_of

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
            moment, rows = observation
            total, weight = self.state[name]["sum"], self.state[name]["weight"]
            # They are not negative: what is not finite is so in the sum.
            finite = moment.sum((1, 2)).isfinite()
            was_observed = (rows.reshape(()) > 0) & ok
            self.overflowed[name] += (~finite & was_observed).any()
            # A moment starts in `follow`, when both bases are there.
            counts = finite & was_observed
            new_weight = torch.where(counts & (weight > 0), 1 - decay, 0.0).to(weight.dtype)
            total.lerp_(
                torch.where(counts[:, None, None], moment, 0.0).to(total.dtype), new_weight[:, None, None]
            )
            weight.lerp_(torch.ones_like(weight), new_weight)

    def follow(self) -> None:
        """Go over to the bases that the banks have turned to, and start what has both bases now."""
        for name, pair in self.pairs.items():
            total, weight = self.state[name]["sum"], self.state[name]["weight"]
            side_b, side_a = self._sides(pair)
            _turn(total, side_b, left=True)
            _turn(total, side_a, left=False)
            values_b, values_a = self._decomposed(pair, "values")
            # Start as S_ij = b_i a_j, with the weight of the average of B.
            stack_b, first, count = side_b
            start = (weight == 0) & (values_b[:, -1] > 0) & (values_a[:, -1] > 0)
            weight_b = torch.where(start, stack_b.state["weight"][first : first + count], weight)
            product = values_b[:, :, None] * values_a[:, None, :] * weight_b[:, None, None]
            total.copy_(torch.where(start[:, None, None], product, total))
            weight.copy_(weight_b)
        for any_bank, _, _ in self.at.values():
            if isinstance(any_bank, EigenStack):
                any_bank.turned = {}

    def __contains__(self, pair: Pair) -> bool:
        """Return whether a pair is one of them."""
        return pair.name in self.pairs

    def value(self, pair: Pair) -> Tensor:
        """Return the averages of a pair, corrected for their start.

        Args:
            pair: One of them.
        """
        total, weight = self.state[pair.name]["sum"], self.state[pair.name]["weight"]
        return total / torch.where(weight > 0, weight, 1.0)[:, None, None]

    def turn(self, pair: Pair, stack: Tensor, back: bool = False) -> Tensor:
        """Return ``U_B^T stack U_A``, or ``U_B stack U_A^T``.

        Args:
            pair: One of the pairs.
            stack: ``[groups, out, in]``.
            back: Which of the two.
        """
        basis_b, basis_a = self._decomposed(pair, "vectors")
        if back:
            return basis_b @ stack @ basis_a.mT
        return basis_b.mT @ stack @ basis_a

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
        # S + rho_A b + rho_B a + rho_A rho_B
        return self.value(pair) + rho_a * values_b + rho_b * (values_a + rho_a)

    def output_change(self, pair: Pair, direction: Tensor) -> Tensor:
        """Return ``tr(D A D^T)`` of every group, the squared change of outputs that a direction makes.

        Args:
            pair: One of the pairs.
            direction: ``[groups, out, in]``.
        """
        _, (stack_a, first, count) = self._sides(pair)
        if not stack_a.is_fresh(first, count):
            # A has changed since it was decomposed: multiply by it.
            product = times(direction, stack_a.value(slice(first, first + count)), False)
            return (direction * product).sum((1, 2)).clamp(min=0.0)
        # In the basis of A, A is the diagonal of its eigenvalues.
        _, vectors = self._decomposed(pair, "vectors")
        _, values = self._decomposed(pair, "values")
        return ((direction @ vectors).square() * values[:, None, :]).sum((1, 2))


def _turn(total: Tensor, side: tuple[EigenStack, int, int], left: bool) -> None:
    """Mix the averages of every group by the turn of the basis on one side, in place."""
    eigen_stack, first, count = side
    for group in range(count):
        mixing = eigen_stack.turned.get(first + group)
        if mixing is None:
            continue
        # The turn acts on outputs from the left, and on inputs from the right.
        total[group] = mixing @ total[group] if left else total[group] @ mixing.mT
