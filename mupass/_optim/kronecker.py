"""Kronecker preconditioner: averages and inverse roots of the factors of many blocks, in banks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from mupass._optim.banks import Bank, times
from mupass._optim.curvature import nearest_product, observed
from mupass._optim.damping import damp
from mupass._optim.eigen import EigenBank, Moments, not_rescaled
from mupass._optim.pairs import Pair, in_blocks, line_up, phases, slot_name
from mupass._scales.plan import Entry
from mupass._taps.blocks import Block, Factor, Place
from mupass._taps.factors import Layer, factor_dtype
from mupass._taps.leaves import Sums

Count = Callable[[str, str], None]
NO_GRADIENT = "{} receives no gradient (is the readout zero?); its update is 0"


class Kronecker:
    """Factors and roots of all blocks.

    Slots are named by what is summed in them, so that weights that share a factor share its average and its
    root. Under pi-damping each matrix has a damping of its own on either side, and so slots of its own.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        layers: Mapping[Place, Layer],
        parameters: Mapping[str, Tensor],
        powers: tuple[float, float],
        mode: str,
        entries: Mapping[str, Entry],
        stagger: bool,
        floor: float,
        ekfac: bool = False,
        block: int = 0,
        together: tuple[tuple[Place, ...], ...] = (),
    ) -> None:
        self.ekfac, self.block = ekfac, block
        self.geometries = {name: entry.geometry for name, entry in entries.items()}
        self.powers, self.mode, self.floor = powers, mode, floor
        self.parameters = parameters
        self.sources: dict[str, tuple[Block, Factor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.blocks = [(block, self._pairs(block, layers)) for block in blocks]
        self.pairs = [pair for _, pairs in self.blocks for pair in pairs]
        self.banks = {side: self._make_banks(side) for side in "ab"}
        self.at = {
            name: (bank, bank.slot[name, 0], self._shapes[name][0])
            for bank in self._all
            for name, _ in bank.keys
        }
        self._expect_copies(together)
        # Pairs that EKFAC rescales; none without it.
        taken = {b.parameter for b, _ in self.blocks if ekfac and not not_rescaled(b, layers)}
        self.moments = Moments([p for p in self.pairs if p.block.parameter in taken], self.at)
        self.phase = phases(self._all, stagger)
        self.kinds = line_up(self.pairs, self._all, parameters, {n: e.scales for n, e in entries.items()})
        # Dampings of the number 1, the input factor of vectors.
        self.unit_rho = {
            f"{p.block.parameter}.{p.piece}": like.dim_a.new_zeros(p.groups)
            for like in self.kinds
            for p in like.pairs
            if not p.block.a
        }
        self.rooted = False
        self.moved = True  # whether averages have changed since roots were last looked over

    def _pairs(self, block: Block, layers: Mapping[Place, Layer]) -> list[Pair]:
        pairs = []
        stacks = block.matrices.split(torch.empty(block.matrices.shape, device="meta"))
        for piece, stack in enumerate(stacks):
            slots: dict[str, str] = {}
            for side, factors in (("a", block.a), ("b", block.b)):
                if factors and self.powers[side == "b"] > 0:
                    factor = factors[piece]
                    layer = layers[factor.places[0]]
                    name = slots[side] = slot_name(block, factor, piece if self.mode == "pi" else None)
                    self.sources.setdefault(name, (block, factor))
                    self._shapes[name] = (
                        layer.input_shape() if side == "a" else layer.output_shapes()[factor.piece]
                    )
            groups, outputs, inputs = stack.shape
            pair = Pair(block, piece, slots.get("a"), slots.get("b"), groups, inputs, outputs)
            shapes = [self._shapes.get(slot or "", ()) for slot in (pair.a, pair.b)]
            pairs.append(in_blocks(pair, shapes, self.block, self.geometries[block.parameter]))
        return pairs

    def _make_banks(self, side: str) -> list[Bank]:
        """Put factors of equal shape, precision and device together."""
        alike: dict[Any, list[tuple[str, int]]] = defaultdict(list)
        for name, shape in self._shapes.items():
            block, factor = self.sources[name]
            if factor.side == side:
                weight = self.parameters[block.parameter]
                slots = [(name, g) for g in range(shape[0])]
                alike[shape[1:], factor_dtype(weight), weight.device] += slots
        full = EigenBank if self.ekfac else Bank
        return [(full if len(kind[0]) > 1 else Bank)(slots, *kind) for kind, slots in alike.items()]

    def _expect_copies(self, together: tuple[tuple[Place, ...], ...]) -> None:
        """Tell banks of slots that have the same factor as long as their weights take part together."""
        names = {f.places: name for name, (_, f) in self.sources.items() if f.side == "a"}
        for group in together:
            first, *others = [names[(place,)] for place in group if (place,) in names] or [""]
            for name in others:
                (bank, at, count), (other, start, _) = self.at[name], self.at[first]
                if bank is other:
                    bank.likely.update({at + i: start + i for i in range(count)})

    def average(self, taken: Mapping[Place, Sums], decay: float, count: Count) -> None:
        """Add the factors of one step to the averages.

        Args:
            taken: Result of `Curvature.take`.
            decay: Weight of the past.
            count: Called with (incident, place) for factors that overflowed.
        """
        self.moved = True
        new: dict[str, Tensor] = {}
        tied: dict[str, tuple[Tensor, Tensor] | None] = {}
        for name, (block, factor) in self.sources.items():
            if block.tied and factor in (*block.a, *block.b):
                if block.parameter not in tied:
                    tied[block.parameter] = nearest_product(block.tied, taken)
                found = tied[block.parameter]
                value = None if found is None else found[factor.side == "b"]
            else:
                value = observed(factor, taken)
            if value is not None:
                new[name] = value
        for bank in self._all:
            seen = {(name, 0): value for name, value in new.items() if self.at[name][0] is bank}
            for name, _ in bank.average(seen, decay):
                count("overflowed_factors", self._place(name))
        self.moments.average(taken, decay, count)

    @property
    def _all(self) -> list[Bank]:
        return [*self.banks["a"], *self.banks["b"]]

    def _place(self, name: str) -> str:
        block, factor = self.sources[name]
        return f"factor {factor.side.upper()} of {block.parameter}"

    def unseen(self) -> list[str]:
        """Return parameters that have a factor which was never observed."""
        missing = set()
        for bank in self._all:
            for i in (bank.weight == 0).nonzero().flatten().tolist():
                missing.add(bank.keys[i][0])
        return list(dict.fromkeys(p.block.parameter for p in self.pairs if missing & {p.a, p.b}))

    def due(self, step: int, period: int, drift: float, spare: bool) -> dict[int, Tensor]:
        """Return the slots of every bank whose roots are to be computed anew.

        Roots of large factors are spread over the steps of a period. One whose factor has changed its size
        since is stale at once, whenever that is: in the first steps of training they grow by orders.

        Args:
            step: Number of steps taken.
            period: Steps between recomputations of a root.
            drift: Ratio of traces beyond which a root is stale.
            spare: Leave out the first step of a period, on which factors are collected.

        Returns:
            Index of the bank -> slots, without banks that have none.
        """
        found = {}
        for i, (bank, own) in enumerate(zip(self._all, self.phase, strict=True)):
            at = (phase % (period - 1) + 1 if spare else phase for phase in own)
            turn = {slot for slot, phase in enumerate(at) if (phase - step) % period == 0 or not self.rooted}
            if self.moved:
                turn.update(bank.drifted(drift).nonzero().flatten().tolist())
            if turn:
                found[i] = torch.tensor(sorted(turn), device=bank.weight.device)
        self.moved = False
        return found

    def refresh(
        self, dampings: Mapping[str, float | Tensor], count: Count, ranks: int, due: Mapping[int, Tensor]
    ) -> None:
        """Recompute inverse roots, those of a bank together.

        Args:
            dampings: Damping of each parameter.
            count: Called with (incident, place) for factorizations that failed.
            ranks: Number of ranks that the roots are divided over.
            due: Result of `due`.
        """
        rho = self._damp(dampings)
        for i, slots in due.items():
            bank = self._all[i]
            power = self.powers[i >= len(self.banks["a"])]
            copies = bank.copies(rho[i], slots)
            own = slots[[at not in copies for at in slots.tolist()]] if copies else slots
            failed = bank.refresh(rho[i], power, own, self.mode == "eigen", ranks)
            for at in own[failed].tolist():
                count("failed_roots", self._place(bank.keys[at][0]))
                copies = {slot: other for slot, other in copies.items() if other != at}
            if copies:
                bank.copy(*torch.tensor(list(copies.items()), device=slots.device).T)
        self.moments.follow()
        self.rooted = True
        seen = set()  # under pi-damping a bias has a copy of its weight's factor
        for bank in self.banks["b"]:
            for i in ((bank.traces() <= 0) & (bank.weight > 0)).nonzero().flatten().tolist():
                block, factor = self.sources[bank.keys[i][0]]
                if factor in seen:
                    continue
                seen.add(factor)
                count("zero_traces", NO_GRADIENT.format(block.parameter))

    def _damp(self, dampings: Mapping[str, float | Tensor]) -> list[Tensor]:
        """Return the damping of every slot of every bank, and keep that of the vectors' input side."""
        rho: list[Tensor] = [bank.weight for bank in self._all]
        for kind in self.kinds:
            traces = torch.cat([self._all[i].traces() for i in kind.banks])
            rho_a, rho_b = damp(self.mode, kind.sides(traces, dampings), self.floor)
            both = torch.cat([rho_a, rho_b])[kind.row]
            counts = [len(self._all[i].keys) for i in kind.banks]
            for i, part in zip(kind.banks, torch.split(both, counts), strict=True):
                rho[i] = part
            first = 0
            for pair in kind.pairs:
                if not pair.block.a:
                    own = rho_a[first : first + pair.groups * pair.repeats : pair.repeats]
                    self.unit_rho[f"{pair.block.parameter}.{pair.piece}"] = own
                first += pair.groups * pair.repeats
        return rho

    def directions(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the preconditioned gradient of every block.

        Args:
            grads: Gradient of each parameter that has one.
        """
        found: dict[str, Tensor] = {}
        for block, pairs in self.blocks:
            grad = grads.get(block.parameter)
            if grad is not None:
                stacks = block.matrices.split(grad)
                parts = [self._apply(pair, stack) for pair, stack in zip(pairs, stacks, strict=True)]
                found[block.parameter] = block.matrices.join(parts, grad).reshape(grad.shape).to(grad.dtype)
        return found

    def quadratic(self, moves: Mapping[str, Tensor]) -> Tensor:
        """Return ``d^T F d``, with the averages of the factors or second moments for F and no damping.

        Args:
            moves: Change of each parameter.
        """
        values = {i: bank.value() for i, bank in enumerate(self._all)}
        total = []
        for block, pairs in self.blocks:
            if block.parameter in moves:
                for pair, d in zip(pairs, block.matrices.split(moves[block.parameter]), strict=True):
                    if pair in self.moments:
                        turned = self.moments.turn(pair, d)
                        total.append((turned.square() * self.moments.value(pair)).sum())
                        continue
                    f = d
                    for slot, left in ((pair.b, True), (pair.a, False)):
                        if slot:
                            bank, first, count = self.at[slot]
                            m = values[self._all.index(bank)][first : first + count]
                            f = times(f.to(m.dtype), m, left)
                    total.append((d * f).sum())
        return torch.stack(total).sum() if total else torch.zeros(())

    def _apply(self, pair: Pair, stack: Tensor) -> Tensor:
        sides = [(*self.at[slot], slot == pair.b) for slot in (pair.b, pair.a) if slot]
        stack = stack.to(sides[0][0].factors.dtype) if sides else stack
        if pair in self.moments:
            return self.moments.direction(pair, stack)
        for bank, first, groups, left in sides:
            stack = bank.apply(stack, first, groups, left)
        if not pair.block.a and self.powers[0] > 0:
            rho = self.unit_rho[f"{pair.block.parameter}.{pair.piece}"]
            stack = stack / (1 + rho.view(-1, 1, 1)) ** self.powers[0]
        shrink = prod(more**power for more, power in zip(pair.growth, self.powers, strict=True))
        return stack if shrink == 1 else stack / shrink

    def layout(self) -> Any:
        """Return what a saved state must agree in."""
        layout: dict[str, Any] = {side: [b.layout() for b in banks] for side, banks in self.banks.items()}
        return {**layout, "ekfac": list(self.moments.pairs)} if self.ekfac else layout

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        banks = {side: [bank.state_dict() for bank in banks] for side, banks in self.banks.items()}
        moments = {"moments": self.moments.state_dict()} if self.ekfac else {}
        return {"banks": banks, "unit_rho": dict(self.unit_rho), "rooted": self.rooted, **moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        for side, banks in self.banks.items():
            for bank, saved in zip(banks, state["banks"][side], strict=True):
                bank.load_state_dict(saved)
        self.unit_rho = {name: rho.clone() for name, rho in state["unit_rho"].items()}
        self.rooted, self.moved = state["rooted"], True
        if self.ekfac:
            self.moments.load_state_dict(state["moments"])
