"""Kronecker preconditioner: averages and inverse roots of the factors of many blocks, in banks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mupass._optim.kronecker.curvature import nearest_product, observed
from mupass._optim.kronecker.damping import damp
from mupass._optim.kronecker.ekfac import EigenBank, Moments, not_rescaled
from mupass._optim.kronecker.factor_pairs import Pair, in_blocks, line_up, phases, slot_name
from mupass._optim.kronecker.factor_stack import Bank
from mupass._optim.kronecker.update import Average, Compiled, Root, times, update
from mupass._parallel import deal, largest_over_ranks
from mupass._scales.plan import Entry
from mupass._taps.blocks import Block, Factor, Place
from mupass._taps.factors import Layer, factor_dtype
from mupass._taps.leaves import Sums


@dataclass(frozen=True)
class Rules:
    """How factors become roots.

    Attributes:
        powers: Powers of A and of B.
        mode: Mode of damping, see `mupass._optim.kronecker.damping.damp`.
        floor: Smallest trace of B that damping reckons with, relative to the largest one.
        memory: What a step leaves of the largest trace of B seen so far, to which damping is relative.
        stagger: Whether roots are spread over the steps of a period.
        ekfac: Whether gradients are scaled by their second moments in the eigenbases.
        block: Largest block of a factor; 0 for whole ones.
    """

    powers: tuple[float, float]
    mode: str
    floor: float
    memory: float
    stagger: bool
    ekfac: bool
    block: int


class Kronecker:
    """Factors and roots of all blocks.

    Slots are named by what is summed in them, so that weights that share a factor share its average and its
    root. Under pi-damping each matrix has a damping of its own on either side, and so slots of its own.

    With several ranks each block belongs to one of them, which alone keeps its factors and roots; blocks that
    share a factor stay together.

    Attributes:
        owner: Parameter -> the rank that keeps its block.
        banks: Banks of this rank, by side.
        blocks: Blocks of this rank with their pairs.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        layers: Mapping[Place, Layer],
        parameters: Mapping[str, Tensor],
        rules: Rules,
        entries: Mapping[str, Entry],
        ranks: int = 1,
        rank: int = 0,
        bank: type[Bank] = Bank,
        compiled: Compiled | None = None,
    ) -> None:
        self.compiled = compiled or Compiled(False)
        self.rules, self.ranks, self._kind = rules, ranks, bank
        self.geometries = {name: entry.geometry for name, entry in entries.items()}
        self.parameters = parameters
        self.sources: dict[str, tuple[Block, Factor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Where the state of every slot is kept: the first parameter that uses it, and a key there.
        self.home: dict[str, tuple[str, str]] = {}
        everything = [(block, self._pairs(block, layers)) for block in blocks]
        self.owner = _divide(everything, self._shapes, ranks)
        # EKFAC's taps need all bases on every rank.
        mine = [(b, p) for b, p in everything if rules.ekfac or self.owner[b.parameter] == rank]
        if rules.ekfac:
            self.owner = dict.fromkeys(self.owner, rank)
        self.blocks = mine
        self.pairs = [pair for _, pairs in mine for pair in pairs]
        own = {slot for pair in self.pairs for slot in (pair.a, pair.b) if slot}
        self.banks = {side: self._make_banks(side, own) for side in "ab"}
        self.at = {
            name: (bank, bank.slot[name, 0], self._shapes[name][0])
            for bank in self._all
            for name, _ in bank.keys
        }
        # The shapes of what other ranks keep.
        others = set(self._shapes) - own
        self._remote = [b for side in "ab" for b in self._make_banks(side, others, torch.device("meta"))]
        # Pairs that EKFAC rescales; none without it.
        taken = {b.parameter for b, _ in mine if rules.ekfac and not not_rescaled(b, layers)}
        self.moments = Moments([p for p in self.pairs if p.block.parameter in taken], self.at)
        self.phase = phases(self._all, self._remote, rules.stagger)
        self.kinds = line_up(self.pairs, self._all, parameters, {n: e.scales for n, e in entries.items()})
        # Dampings of the number 1, the input factor of vectors.
        self.unit_rho = {
            (p.block.parameter, p.piece): like.dim_a.new_zeros(p.groups)
            for like in self.kinds
            for p in like.pairs
            if not p.block.a
        }
        self._remote_units = {
            (p.block.parameter, p.piece): torch.zeros(
                p.groups, dtype=factor_dtype(parameters[p.block.parameter]), device="meta"
            )
            for block, pairs in everything
            for p in pairs
            if not block.a and (p.block.parameter, p.piece) not in self.unit_rho
        }
        self.seen: set[str] = set()  # slots with an observation
        self.largest: Tensor | None = None  # trace of B at the base width, over all ranks
        self.rooted = False
        self.moved = True  # whether averages have changed since roots were last looked over

    def _pairs(self, block: Block, layers: Mapping[Place, Layer]) -> list[Pair]:
        pairs = []
        stacks = block.matrices.split(torch.empty(block.matrices.shape, device="meta"))
        for piece, stack in enumerate(stacks):
            slots: dict[str, str] = {}
            for side, factors in (("a", block.a), ("b", block.b)):
                if factors and self.rules.powers[side == "b"] > 0:
                    factor = factors[piece]
                    layer = layers[factor.places[0]]
                    name = slots[side] = slot_name(block, factor, piece if self.rules.mode == "pi" else None)
                    self.sources.setdefault(name, (block, factor))
                    self.home.setdefault(name, (block.parameter, f"{side}{piece}"))
                    self._shapes[name] = (
                        layer.input_shape() if side == "a" else layer.output_shapes()[factor.piece]
                    )
            groups, outputs, inputs = stack.shape
            pair = Pair(block, piece, slots.get("a"), slots.get("b"), groups, inputs, outputs)
            shapes = [self._shapes.get(slot or "", ()) for slot in (pair.a, pair.b)]
            pairs.append(in_blocks(pair, shapes, self.rules.block, self.geometries[block.parameter]))
        return pairs

    def _make_banks(self, side: str, names: set[str], device: torch.device | None = None) -> list[Bank]:
        """Put factors of equal shape, precision and device together."""
        alike: dict[Any, list[tuple[str, int]]] = defaultdict(list)
        for name, shape in self._shapes.items():
            block, factor = self.sources[name]
            if factor.side == side and name in names:
                weight = self.parameters[block.parameter]
                slots = [(name, g) for g in range(shape[0])]
                alike[shape[1:], factor_dtype(weight), device or weight.device] += slots
        full = EigenBank if self.rules.ekfac else self._kind
        return [(full if len(kind[0]) > 1 else self._kind)(slots, *kind) for kind, slots in alike.items()]

    def average(self, taken: Mapping[Place, Sums], decay: float, memory: float, ok: Tensor) -> None:
        """Add the factors of one step to the averages.

        Args:
            taken: Result of `Curvature.take`.
            decay: Weight of the past.
            memory: What is left of the largest trace seen so far.
            ok: 1, or 0 where the observations do not count.
        """
        self.moved = True
        new: dict[str, tuple[Tensor, Tensor]] = {}
        tied: dict[str, tuple[tuple[Tensor, Tensor], Tensor] | None] = {}
        for name in self.at:
            block, factor = self.sources[name]
            if block.tied and factor in (*block.a, *block.b):
                if block.parameter not in tied:
                    tied[block.parameter] = nearest_product(block.tied, taken)
                found = tied[block.parameter]
                value = None if found is None else (found[0][factor.side == "b"], found[1])
            else:
                value = observed(factor, taken)
            if value is not None:
                new[name] = value
        self.seen.update(new)
        counts = ok > 0
        for bank in self._all:
            seen = {(name, 0): value for name, value in new.items() if self.at[name][0] is bank}
            bank.average(seen, decay, memory, counts.to(bank.device))
        self.moments.average(taken, decay, counts)
        if self.rules.mode == "trace" and self.rules.floor:
            self.largest = largest_over_ranks([self._largest(kind) for kind in self.kinds], self.ranks)

    @property
    def _all(self) -> list[Bank]:
        return [*self.banks["a"], *self.banks["b"]]

    def _place(self, name: str) -> str:
        block, factor = self.sources[name]
        return f"factor {factor.side.upper()} of {block.parameter}"

    def unseen(self) -> list[str]:
        """Return parameters of this rank that have a factor which was never observed."""
        missing = set(self.at) - self.seen
        return list(dict.fromkeys(p.block.parameter for p in self.pairs if missing & {p.a, p.b}))

    def incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """Return what may have gone wrong where, and for each how often since the last call.

        The counts stay on the device. They start anew from here.
        """
        told: list[tuple[str, str]] = []
        counts: list[Tensor] = []
        traced: set[tuple[Factor, int]] = set()
        for bank in self._all:
            owners = [bank.keys[i][0] for i in range(len(bank.keys))]
            told += [("failed_roots", self._place(name)) for name in owners]
            told += [("overflowed_factors", self._place(name)) for name in owners]
            counts += [bank.failed.clone(), bank.overflowed.clone()]
            bank.failed.zero_()
            bank.overflowed.zero_()
        for bank in self.banks["b"]:
            vanished = torch.split(bank.vanished.clone(), 1)
            for (name, group), count in zip(bank.keys, vanished, strict=True):
                block, factor = self.sources[name]
                # Under pi-damping a bias has a copy of its weight's factor: it is named once.
                if (factor, group) not in traced:
                    traced.add((factor, group))
                    what = f"{block.parameter} receives no gradient (is the readout zero?); its update is 0"
                    told.append(("zero_traces", what))
                    counts.append(count)
            bank.vanished.zero_()
        for (name, _), count in self.moments.overflowed.items():
            told.append(("overflowed_factors", f"the second moments of {name}"))
            counts.append(count.clone()[None])
            count.zero_()
        return told, counts

    def due(self, step: int, period: int, spare: bool) -> dict[int, list[int]]:
        """Return the slots of every bank whose roots are to be computed anew.

        Roots of large factors are spread over the steps of a period. In the first period, when factors grow
        by orders, all of them are computed at steps 1, 2, 4, 8 and so on besides.

        Args:
            step: Number of steps taken.
            period: Steps between recomputations of a root.
            spare: Leave out the first step of a period, on which factors are collected.

        Returns:
            Index of the bank -> slots, without banks that have none.
        """
        early = self.moved and step < period and step & (step - 1) == 0
        found = {}
        for i, own in enumerate(self.phase):
            at = [phase % (period - 1) + 1 if spare else phase for phase in own]
            turn = [s for s, p in enumerate(at) if (p - step) % period == 0 or early or not self.rooted]
            if turn:
                found[i] = turn
        self.moved = False
        return found

    def refresh(self, dampings: Mapping[str, float | Tensor], due: Mapping[int, Sequence[int]]) -> None:
        """Recompute inverse roots, those of a bank together.

        Args:
            dampings: Damping of each parameter.
            due: Result of `due`.
        """
        rho = self._damp(dampings)
        for i, slots in due.items():
            power = self.rules.powers[i >= len(self.banks["a"])]
            self._all[i].refresh(rho[i], power, slots, self.rules.mode == "eigen")
        self.moments.follow()
        self.rooted = True

    def _remembered(self, bank: Bank) -> Tensor:
        """Return the traces that damping is relative to: of B, the largest seen, which fades."""
        traces = bank.traces()
        if self.rules.memory == 0 or all(bank is not b for b in self.banks["b"]):
            return traces
        return torch.maximum(traces, bank.state["peak"])

    def _largest(self, kind: Any) -> Tensor:
        sides = kind.sides(torch.cat([self._remembered(self._all[i]) for i in kind.banks]), None)
        return (sides.trace_b / sides.scale_b).amax()  # type: ignore[no-any-return]

    def _damp(self, dampings: Mapping[str, float | Tensor]) -> list[Tensor]:
        """Return the damping of every slot of every bank, and keep that of the vectors' input side."""
        rho: list[Tensor] = [bank.state["weight"] for bank in self._all]
        traced = self.rules.mode in {"trace", "eigen"}
        for kind in self.kinds:
            banks = [self._all[i] for i in kind.banks]
            traces = torch.cat([self._remembered(b) if traced else b.traces() for b in banks])
            largest = None if self.largest is None else self.largest.to(traces)
            rho_a, rho_b = damp(self.rules.mode, kind.sides(traces, dampings), self.rules.floor, largest)
            both = torch.cat([rho_a, rho_b])[kind.row]
            counts = [len(bank.keys) for bank in banks]
            for i, part in zip(kind.banks, torch.split(both, counts), strict=True):
                eigen = self.rules.mode == "eigen" and i >= len(self.banks["a"]) and self.rules.memory > 0
                rho[i] = part * self._all[i].memory() if eigen else part
            first = 0
            for pair in kind.pairs:
                if not pair.block.a:
                    own = rho_a[first : first + pair.groups * pair.repeats : pair.repeats]
                    self.unit_rho[pair.block.parameter, pair.piece].copy_(own)
                first += pair.groups * pair.repeats
        return rho

    def directions(self, grads: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the preconditioned gradient of every block of this rank, and what it does to outputs.

        Args:
            grads: Gradient of each parameter that has one.

        Returns:
            Directions ``D``, and for each the mean over outputs of ``D A D^T``, the mean square of the change
            that it makes to an output; nothing for blocks that keep no A.
        """
        found, changes = {}, {}
        for block, pairs in self.blocks:
            grad = grads.get(block.parameter)
            if grad is None:
                continue
            stacks = block.matrices.split(grad)
            parts = [self._apply(pair, stack) for pair, stack in zip(pairs, stacks, strict=True)]
            directions = [direction for direction, _ in parts]
            joined = block.matrices.join(directions, grad)
            found[block.parameter] = joined.reshape(grad.shape).to(grad.dtype)
            squares = [change for _, change in parts if change is not None]
            if len(squares) == len(parts):
                outputs = sum(pair.groups * pair.outputs for pair in pairs)
                changes[block.parameter] = torch.stack([s.sum() for s in squares]).sum() / outputs
        return found, changes

    def quadratic(self, moves: Mapping[str, Tensor]) -> Tensor:
        """Return ``d^T F d``, with the averages of the factors or second moments for F and no damping.

        Args:
            moves: Change of each parameter.
        """
        total = []
        for block, pairs in self.blocks:
            if block.parameter in moves:
                for pair, d in zip(pairs, block.matrices.split(moves[block.parameter]), strict=True):
                    if pair in self.moments:
                        turned = self.moments.turn(pair, d)
                        total.append((turned.square() * self.moments.value(pair)).sum())
                    else:
                        left = self._times_factor(pair, d, "b")
                        total.append((d * self._times_factor(pair, left, "a")).sum())
        return torch.stack(total).sum() if total else torch.zeros(())

    def _times_factor(self, pair: Pair, stack: Tensor, side: str) -> Tensor:
        """Multiply by the average of a factor itself; a side without a factor is the identity."""
        slot = pair.a if side == "a" else pair.b
        if not slot:
            return stack
        bank, first, count = self.at[slot]
        factor = bank.value(slice(first, first + count))
        return times(stack.to(factor.dtype), factor, side == "b")

    def _apply(self, pair: Pair, stack: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the directions of one matrix, and ``tr(D A D^T)`` of every group where A is known."""
        slot = pair.b or pair.a
        stack = stack.to(self.at[slot][0].dtype) if slot else stack
        if pair in self.moments:
            direction = self.moments.direction(pair, stack)
            return direction, self.moments.output_change(pair, direction)
        powers = self.rules.powers
        unit = None
        if not pair.block.a and powers[0] > 0:
            unit = self.unit_rho[pair.block.parameter, pair.piece]
        shrink = prod(more**power for more, power in zip(pair.growth, powers, strict=True))
        b, a = self._root(pair.b, powers[1], self.rules.memory > 0), self._root(pair.a, powers[0], False)
        mean, rho = self._input_factor(pair)
        direction, change = self.compiled(update, stack, b, a, mean, rho, unit, powers[0], shrink)
        return direction, None if pair.block.a and not pair.a else change

    def _root(self, slot: str | None, power: float, jumps: bool) -> Root | None:
        """Return the root of a slot, and by how much its factor has grown since."""
        if not slot:
            return None
        bank, first, count = self.at[slot]
        return bank.root(first, count, bank.grown(jumps), power)

    def _input_factor(self, pair: Pair) -> tuple[Average | None, Tensor | None]:
        """Return A, or its damping where that is enough to tell what D does to outputs.

        Compiled code is of one kind for every step, and so always multiplies by A.
        """
        if not pair.a:
            return None, None
        bank, first, count = self.at[pair.a]
        plain = self.rules.powers[0] == 1 and self.rules.mode != "eigen"
        uncut = pair.blocks[0] == 1 and pair.growth[0] == 1
        if plain and uncut and bank.is_fresh(first, count) and not self.compiled.on(bank.device):
            return None, bank.state["rho"][first : first + count]
        return bank.mean(first, count), None

    def entries(self, parameter: str) -> dict[str, Tensor]:
        """Return the state that is kept at a parameter, as views; on meta where another rank has it.

        Args:
            parameter: Its name.
        """
        found = {}
        for bank in (*self._all, *self._remote):
            counts = Counter(name for name, _ in bank.keys)
            for name, count in counts.items():
                home, key = self.home[name]
                if home == parameter:
                    at = slice(bank.slot[name, 0], bank.slot[name, 0] + count)
                    found.update({f"{key}.{what}": tensor[at] for what, tensor in bank.state.items()})
        for (name, piece), own in self.moments.state.items():
            if name == parameter:
                found.update({f"moments{piece}.{what}": tensor for what, tensor in own.items()})
        for (name, piece), rho in (*self.unit_rho.items(), *self._remote_units.items()):
            if name == parameter:
                found[f"unit{piece}.rho"] = rho
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all that changes from step to step, without second moments: tensors by part and name."""
        found = {f"bank{i}": dict(bank.state) for i, bank in enumerate(self._all)}
        found["units"] = {f"{name}.{piece}": rho for (name, piece), rho in self.unit_rho.items()}
        found["largest"] = {} if self.largest is None else {"trace": self.largest}
        return found

    def take_state(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Go on from a state, whose tensors are not written to if the banks write to none.

        Args:
            state: Result of `state`.
            steps: Number of steps it has seen.
        """
        for i, bank in enumerate(self._all):
            bank.state = dict(state[f"bank{i}"])
            bank._traces = None
        self.unit_rho = {(n, piece): state["units"][f"{n}.{piece}"].clone() for n, piece in self.unit_rho}
        self.largest = state["largest"].get("trace")
        self.rooted, self.moved = steps > 0, False

    def loaded(self, steps: int) -> None:
        """Take notice that the state was written from outside.

        Args:
            steps: Number of steps it has seen.
        """
        for bank in self._all:
            bank.forget()
        # Roots were looked over in every step that averaged factors, unless none has yet.
        self.rooted, self.moved = steps > 0, steps == 0
        self.seen = {name for bank in self._all for name, _ in bank.keys} if steps else set()
        if steps and self.rules.mode == "trace" and self.rules.floor:
            self.largest = largest_over_ranks([self._largest(kind) for kind in self.kinds], self.ranks)


def _divide(
    blocks: Sequence[tuple[Block, Sequence[Pair]]], shapes: Mapping[str, tuple[int, ...]], ranks: int
) -> dict[str, int]:
    """Return the rank that keeps each parameter's block: about the same work for all.

    Blocks that share a factor go to one rank.
    """
    group: dict[str, int] = {}  # slot -> number of the set of blocks that it belongs to
    members: dict[int, list[str]] = {}
    costs: dict[int, int] = {}
    for number, (block, pairs) in enumerate(blocks):
        slots = {slot for pair in pairs for slot in (pair.a, pair.b) if slot}
        joined = {group[slot] for slot in slots if slot in group}
        members[number] = [block.parameter]
        costs[number] = sum(shapes[s][0] * shapes[s][-1] ** 3 for s in slots if s not in group)
        for old in joined:
            members[number] += members.pop(old)
            costs[number] += costs.pop(old)
        group.update(dict.fromkeys(slots, number))
        if joined:
            group = {slot: number if g in joined else g for slot, g in group.items()}
    rank = deal({number: costs[number] for number in sorted(members)}, ranks)
    return {name: rank[number] for number, names in members.items() for name in names}
