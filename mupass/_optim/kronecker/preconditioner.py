"""Kronecker preconditioner: averages and inverse roots of the factors of many blocks, in banks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupass._optim.kronecker.curvature import Observation, nearest_product, observed
from mupass._optim.kronecker.damping import damp, lengthening
from mupass._optim.kronecker.ekfac import EigenStack, Moments, not_rescaled
from mupass._optim.kronecker.factor_pairs import Lineup, Pair, in_blocks, line_up, phases, slot_name
from mupass._optim.kronecker.factor_stack import IN_CACHE, FactorStack, Slots, joined
from mupass._optim.kronecker.settings import Roots
from mupass._optim.kronecker.update import Average, Compiled, Root, tangent, times, update
from mupass._optim.vocabulary import MatrixTensors, State, Tensors
from mupass._parallel import deal, largest_over_ranks
from mupass._roles.standardized import standardized
from mupass._scales.plan import Entry
from mupass._taps.blocks import Block, Cover, Factor
from mupass._taps.factors import factor_dtype
from mupass._taps.leaves import Sums

BlockPairs = list[tuple[Block, list[Pair]]]


class Ranks(NamedTuple):
    """Which of how many ranks this one is.

    Attributes:
        size: Number of ranks that share the work.
        own: Number of this one.
        alike: Number of ranks that see the same batch, so that its rows are counted as often.
    """

    size: int
    own: int
    alike: int = 1


class Kernel(NamedTuple):
    """Rows of a standardized kernel: of the parameter ``V = diag(lengths) U + means`` it sees U alone.

    K-FAC's step is one of U: at any scale of V its entries have a plain weight's order, 1/sqrt(fan_in),
    and its factors, damping and bounds those of a plain layer, so that the row of the scale table holds. The
    gradient by U is ``lengths`` times that by V, and V moves by ``lengths`` times as much as U.

    Attributes:
        rows: U, ``[groups, out, in]``, of mean 0 and length 1.
        lengths: ``[groups, out, 1]``.
    """

    rows: Tensor
    lengths: Tensor

    def turned(self, move: Tensor) -> Tensor:
        """Return what a change of V does to U: its mean and its length change nothing.

        Args:
            move: ``[groups, out, in]``.
        """
        smallest = torch.finfo(self.rows.dtype).tiny
        change = (move - move.mean(-1, keepdim=True)) / self.lengths.clamp(min=smallest)
        return change - (change * self.rows).sum(-1, keepdim=True) * self.rows


Kernels = dict[tuple[str, int], Kernel]  # by parameter and number of the matrix


# (id of a stack, whether single observations count) -> growth of each of its factors since its root.
Growths = dict[tuple[int, bool], Tensor]
Places = tuple[FactorStack, Slots]  # a stack, and some of its slots
# Directions of a matrix, and the sum of what they do to outputs; None where A is not known.
Applied = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Slot:
    """Place of one factor, as many matrices as it has groups and blocks.

    Attributes:
        block: The first block that uses it: its state is kept at that block's parameter.
        factor: Where it is summed.
        key: Of its state at the parameter.
        shape: ``(matrices, n, n)``, or ``(matrices, n)`` for diagonals.
    """

    block: Block
    factor: Factor
    key: str
    shape: tuple[int, ...]

    @property
    def tied(self) -> bool:
        """Whether it holds a factor of the product nearest to the curvature of two transposed uses."""
        return self.block.tied is not None and self.factor in (*self.block.a, *self.block.b)


class Kronecker:
    """Factors and roots of all blocks.

    Slots are named by what is summed in them, so that weights that share a factor share its average and its
    root. Under pi-damping each matrix has a damping of its own on either side, and so slots of its own.

    With several ranks each block belongs to one of them, which alone keeps its factors and roots; blocks that
    share a factor stay together.

    Attributes:
        owner: Parameter -> the rank that keeps its block.
        slots: Slots of all ranks by name.
        banks: Banks of this rank, by side.
        blocks: Blocks of this rank with their pairs.
        at: Slot of this rank -> its bank, the first of its matrices there, and their number.
    """

    def __init__(
        self,
        cover: Cover,
        parameters: Tensors,
        roots: Roots,
        entries: Mapping[str, Entry],
        ranks: Ranks,
        bank: type[FactorStack],
        compiled: Compiled,
        by_rows: Container[str],
    ) -> None:
        self.roots, self.ranks, self._bank_type, self.compiled = roots, ranks, bank, compiled
        self._by_rows = by_rows
        self.parameters = parameters
        self.slots: dict[str, Slot] = {}
        # Blocks of all ranks are named, so that all agree on who keeps what.
        all_blocks = [(block, self._pairs(block, cover, entries[block.parameter])) for block in cover.blocks]
        self.owner = _divide(all_blocks, self.slots, ranks.size)
        if roots.ekfac:  # its taps need all bases on every rank
            self.owner = dict.fromkeys(self.owner, ranks.own)
        self.blocks: BlockPairs = []
        self.pairs: list[Pair] = []
        for block, pairs in all_blocks:
            if self.owner[block.parameter] == ranks.own:
                self.blocks.append((block, pairs))
                self.pairs += pairs
        self._stack_factors()
        rescaled = []
        if roots.ekfac:
            rescaled = [pair for pair in self.pairs if not not_rescaled(pair.block, cover.layers)]
        self.moments = Moments(rescaled, self.at)
        scales = {name: entry.scales for name, entry in entries.items()}
        self.phase = phases(self._all, self._remote, roots.stagger)
        self.lineups = line_up(self.pairs, self._all, parameters, scales)
        self._damp_units(all_blocks)
        self._longer: MatrixTensors | None = None  # since rows were counted last
        self._indices: dict[Any, Tensor] = {}  # slots that do not stand together, on their device
        self.seen: set[str] = set()  # slots with an observation
        self.largest: Tensor | None = None  # trace of B at the base width, over all ranks
        self.rooted = False
        self.moved = True  # whether averages have changed since roots were last looked over

    def _pairs(self, block: Block, cover: Cover, entry: Entry) -> list[Pair]:
        """Name the slots of a block's matrices."""
        pairs = []
        by_rows = self._looks_at_rows(block, cover, entry)
        # The matrices without their numbers: only shapes are needed here.
        stacks = block.matrices.split(torch.empty(block.matrices.shape, device="meta"))
        for piece, stack in enumerate(stacks):
            names: dict[str, str] = {}
            for side, factors in (("a", block.a), ("b", block.b)):
                # e_a = 0 or e_b = 0 leaves a side out.
                if factors and self.roots.power(side) > 0:
                    names[side] = self._slot(side, block, factors[piece], piece, cover)
            groups, outputs, inputs = stack.shape
            slots = names.get("a"), names.get("b")
            pair = Pair(block, piece, *slots, groups, inputs, outputs, by_rows=by_rows)
            shapes = [self.slots[names[side]].shape if side in names else () for side in "ab"]
            pairs.append(in_blocks(pair, shapes, self.roots.block_size or 0, entry.geometry))
        return pairs

    def _looks_at_rows(self, block: Block, cover: Cover, entry: Entry) -> tuple[bool, bool]:
        """Return whether the damping of a block's A, and of its B, grows where a step has few rows."""
        if block.parameter not in self._by_rows:
            return False, False
        for factor in block.factors:
            # A look-up of positions is one for all samples, so its rows say little.
            if any(cover.layers[place].kind in ("embedding", "table") for place in factor.places):
                return False, False
        # A single number, which has no axis, is taken as a vector.
        infinite, matrices = entry.geometry.infinite or (False,), block.matrices
        grows_a = any(infinite[axis] for axis in matrices.in_axes)
        grows_b = any(infinite[axis] for axis in matrices.out_axes)
        return grows_a, grows_b

    def _slot(self, side: str, block: Block, factor: Factor, piece: int, cover: Cover) -> str:
        """Return the name of the slot of one factor, which is new or that of an earlier block."""
        # Under pi-damping a factor has a root for each matrix that it goes with.
        name = slot_name(block, factor, piece if self.roots.damping_mode == "pi" else None)
        if name not in self.slots:
            layer = cover.layers[factor.places[0]]
            shape = layer.input_shape() if side == "a" else layer.output_shapes()[factor.piece]
            self.slots[name] = Slot(block, factor, f"{side}{piece}", shape)
        return name

    def _stack_factors(self) -> None:
        """Make the banks of this rank, and the shapes of those of others."""
        own_slots = _slots_of(self.pairs)
        self.banks = {side: self._make_banks(side, own_slots) for side in "ab"}
        self._all = [*self.banks["a"], *self.banks["b"]]
        self.at: dict[str, tuple[FactorStack, int, int]] = {}
        for factor_stack in self._all:
            for name, _ in factor_stack.keys:
                self.at[name] = (factor_stack, factor_stack.slot[name, 0], self.slots[name].shape[0])
        other_slots, meta = self.slots.keys() - own_slots, torch.device("meta")
        self._remote = [*self._make_banks("a", other_slots, meta), *self._make_banks("b", other_slots, meta)]

    def _make_banks(
        self, side: str, names: set[str], device: torch.device | None = None
    ) -> list[FactorStack]:
        """Put factors of equal shape, precision and device together."""
        keys_of: dict[Any, list[tuple[str, int]]] = defaultdict(list)
        for name, slot in self.slots.items():
            if slot.factor.side == side and name in names:
                weight = self.parameters[slot.block.parameter]
                stack_kind = (slot.shape[1:], factor_dtype(weight), device or weight.device)
                # A slot is as many matrices as it has groups and blocks.
                keys_of[stack_kind] += [(name, number) for number in range(slot.shape[0])]
        banks = []
        for stack_kind, keys in keys_of.items():
            stack_type = self._bank_type
            if self.roots.ekfac and len(stack_kind[0]) > 1:  # diagonals need no eigenvectors
                stack_type = EigenStack
            banks.append(stack_type(keys, *stack_kind))
        return banks

    def _damp_units(self, every: BlockPairs) -> None:
        """Make room for the dampings of the number 1, the input factor of vectors."""
        self.unit_rho: MatrixTensors = {}
        self._remote_units: MatrixTensors = {}
        for lineup in self.lineups:
            for pair in lineup.pairs:
                if not pair.block.a:
                    self.unit_rho[pair.name] = lineup.dim_a.new_zeros(pair.groups)
        for block, pairs in every:
            if block.a or self.owner[block.parameter] == self.ranks.own:
                continue
            dtype = factor_dtype(self.parameters[block.parameter])
            for pair in pairs:
                # What another rank keeps has a shape here, for the saved state, and no memory.
                self._remote_units[pair.name] = torch.zeros(pair.groups, dtype=dtype, device="meta")

    def average(self, taken: Mapping[Any, Sums], decay: float, memory: float, ok: Tensor) -> None:
        """Add the factors of one step to the averages.

        Args:
            taken: Result of `Curvature.take`.
            decay: Weight of the past.
            memory: What is left of the largest trace seen so far.
            ok: 1, or 0 where the observations do not count.
        """
        self.moved, self._longer = True, None
        observations = self._observations(taken)
        self.seen.update(observations)
        by_bank: dict[int, dict[Any, Observation]] = defaultdict(dict)
        for name, observation in observations.items():
            by_bank[id(self.at[name][0])][name, 0] = observation
        counts = ok > 0
        for factor_stack in self._all:
            factor_stack.average(by_bank[id(factor_stack)], decay, memory, counts.to(factor_stack.device))
        self.moments.average(taken, decay, counts)
        self._find_largest()

    def _observations(self, taken: Mapping[Any, Sums]) -> dict[str, Observation]:
        """Return the factors of one step by slot, without those that no tap has seen."""
        observations: dict[str, Observation] = {}
        products: dict[str, tuple[tuple[Tensor, Tensor], Tensor] | None] = {}
        for name in self.at:
            slot = self.slots[name]
            block, observation = slot.block, None
            if slot.tied:
                assert block.tied is not None
                if block.parameter not in products:  # once for both factors
                    products[block.parameter] = nearest_product(block.tied, taken)
                product = products[block.parameter]
                if product is not None:
                    factors, rows = product
                    observation = factors["ab".index(slot.factor.side)], rows
            else:
                observation = observed(slot.factor, taken)
            if observation is not None:
                observations[name] = observation
        return observations

    def _find_largest(self) -> None:
        """Find the largest trace of B, where damping has a floor relative to it."""
        if self.roots.has_floor:
            # Over all ranks: with floors of their own they would take different steps.
            largest = [self._largest(lineup) for lineup in self.lineups]
            self.largest = largest_over_ranks(largest, self.ranks.size)

    def unseen(self) -> list[str]:
        """Return parameters of this rank that have a factor which was never observed."""
        missing = self.at.keys() - self.seen
        return list(dict.fromkeys(pair.block.parameter for pair in self.pairs if missing & {pair.a, pair.b}))

    def incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """Return what may have gone wrong where, and for each how often since the last call.

        The counts stay on the device. They start anew from here.
        """
        incidents: list[tuple[str, str]] = []
        counts: list[Tensor] = []
        for factor_stack in self._all:
            places = []
            for name, _ in factor_stack.keys:
                slot = self.slots[name]
                places.append(f"factor {slot.factor.side.upper()} of {slot.block.parameter}")
            for kind, numbers in (
                ("failed_roots", factor_stack.failed),
                ("overflowed_factors", factor_stack.overflowed),
            ):
                incidents += [(kind, place) for place in places]
                counts.append(_taken(numbers))
        self._vanished(incidents, counts)
        for (name, _), numbers in self.moments.overflowed.items():
            incidents.append(("overflowed_factors", f"the second moments of {name}"))
            counts.append(_taken(numbers)[None])
        return incidents, counts

    def excuse_vanished(self) -> None:
        """Count no factor B that has been zero so far as an incident."""
        for factor_stack in self.banks["b"]:
            factor_stack.vanished.zero_()

    def _vanished(self, incidents: list[tuple[str, str]], counts: list[Tensor]) -> None:
        """Add factors B that were zero in every observation."""
        # Under pi-damping a bias has a copy of its weight's factor: it is named once.
        named: set[tuple[Factor, int]] = set()
        numbers_of: dict[str, list[Tensor]] = {}
        for factor_stack in self.banks["b"]:
            numbers = torch.split(_taken(factor_stack.vanished), 1)
            for (name, group), number in zip(factor_stack.keys, numbers, strict=True):
                slot = self.slots[name]
                if (slot.factor, group) not in named:
                    named.add((slot.factor, group))
                    numbers_of.setdefault(slot.block.parameter, []).append(number)
        for parameter, parts in numbers_of.items():
            for place, number in enumerate(parts, 1):
                text = f"{parameter} receives no gradient (is the readout zero?); its update is 0"
                if len(parts) > 1:  # as the gates of a recurrent layer
                    part = f"part {place} of {len(parts)} of the outputs of {parameter}"
                    text = f"{part} receives no gradient; the update of these rows is 0"
                incidents.append(("zero_traces", text))
                counts.append(number)

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
        early = self.moved and step < period and step & (step - 1) == 0  # a power of two
        every_root = early or not self.rooted
        self.moved = False
        due_slots: dict[int, list[int]] = {}
        for number, turns in enumerate(self.phase):
            for slot, turn in enumerate(turns):
                # The first step of a period is left free: turns are dealt to the others.
                if spare:
                    turn = turn % (period - 1) + 1
                if every_root or (turn - step) % period == 0:
                    due_slots.setdefault(number, []).append(slot)
        return due_slots

    def refresh(self, dampings: Mapping[str, float | Tensor], due: Mapping[int, Sequence[int]]) -> None:
        """Recompute inverse roots, those of a bank together.

        Args:
            dampings: Damping of each parameter.
            due: Result of `due`.
        """
        rho = self._damp(dampings)
        relative = self.roots.damping_mode == "eigen"
        for number, slots in due.items():
            power = self.roots.power("b" if self._is_output(number) else "a")
            self._all[number].refresh(rho[number], power, slots, relative)
        self.moments.follow()
        self.rooted = True

    def _is_output(self, number: int) -> bool:
        """Return whether a bank has factors B."""
        return number >= len(self.banks["a"])

    def _traces(self, lineup: Lineup, remembered: bool) -> Tensor:
        """Return the traces of all slots of a lineup; if remembered, of B the largest seen, which fades."""
        traces = []
        for number in lineup.banks:
            factor_stack = self._all[number]
            # The memory is for B, which falls with the gradient; A does not.
            fades = remembered and self.roots.damping_memory > 0 and self._is_output(number)
            traces.append(factor_stack.remembered() if fades else factor_stack.traces())
        return torch.cat(traces)

    def _largest(self, lineup: Lineup) -> Tensor:
        """Return the largest trace of B, each over its width factor: as if at the base width."""
        sides = lineup.sides(self._traces(lineup, remembered=True), None)
        return (sides.trace_b / sides.scale_b).amax()

    def _damp(self, dampings: Mapping[str, float | Tensor]) -> list[Tensor]:
        """Return the damping of every slot of every bank, and keep that of the vectors' input side."""
        settings = self.roots
        rho: list[Tensor] = [factor_stack.state["weight"] for factor_stack in self._all]
        for lineup in self.lineups:
            traces = self._traces(lineup, remembered=settings.damping_mode in {"trace", "eigen"})
            largest = None
            if self.largest is not None:
                largest = self.largest.to(traces)
            rows = self._rows(lineup) if lineup.looks_at_rows else None
            sides = lineup.sides(traces, dampings, rows)
            rho_a, rho_b = damp(settings.damping_mode, sides, settings.damping_floor, largest)
            # Rows of the line-up may share a slot: each slot takes the damping of its row.
            by_slot = torch.cat([rho_a, rho_b])[lineup.row]
            lengths = [len(self._all[number].keys) for number in lineup.banks]
            for number, part in zip(lineup.banks, torch.split(by_slot, lengths), strict=True):
                # Relative to the largest eigenvalue seen, as traces are elsewhere.
                fades = settings.damping_memory > 0 and self._is_output(number)
                if settings.damping_mode == "eigen" and fades:
                    part = part * self._all[number].memory()
                rho[number] = part
            self._keep_unit_damping(lineup, rho_a)
        return rho

    def _keep_unit_damping(self, lineup: Lineup, rho_a: Tensor) -> None:
        """Keep the damping of the number 1 for every group of a vector."""
        for pair, damping in lineup.by_pair(rho_a):
            if not pair.block.a:
                self.unit_rho[pair.name].copy_(damping)

    def _rows(self, lineup: Lineup) -> Tensor:
        """Return in how many rows each slot of a lineup was observed, those of a batch counted once."""
        counted = torch.cat([self._all[number].state["rows"] for number in lineup.banks])
        # Under tensor parallelism as many ranks have summed the same rows.
        return counted / self.ranks.alike

    def _lengthenings(self) -> MatrixTensors:
        """Return what directions are multiplied by, an entry a group; nothing for those that stay."""
        if self._longer is not None:
            return self._longer
        found = self._longer = {}
        for lineup in self.lineups:
            if not lineup.looks_at_rows:
                continue
            longer = lengthening(*lineup.grown(self._rows(lineup)))
            for pair, numbers in lineup.by_pair(longer):
                if any(pair.by_rows):
                    found[pair.name] = numbers
        return found

    def directions(self, grads: Tensors) -> tuple[Tensors, Tensors]:
        """Return the preconditioned gradient of every block of this rank, and what it does to outputs.

        Args:
            grads: Gradient of each parameter that has one.

        Returns:
            Directions ``D``, and for each the mean over outputs of ``D A D^T``, the mean square of the change
            that it makes to an output; nothing for blocks that keep no A.
        """
        stacks, kernels = self._matrices_of(grads)
        applied = self._apply_all(stacks, kernels)
        for name, kernel in kernels.items():
            direction, change = applied[name]
            applied[name] = direction * kernel.lengths, change
        directions, changes = {}, {}
        for block, pairs in self.blocks:
            gradient = grads.get(block.parameter)
            if gradient is None:
                continue
            parts = [applied[pair.name][0] for pair in pairs]
            joined = block.matrices.join(parts, gradient)
            directions[block.parameter] = joined.reshape(gradient.shape).to(gradient.dtype)
            squares = [applied[pair.name][1] for pair in pairs]
            known = [square for square in squares if square is not None]
            # Without an A of each piece the change of outputs is not known.
            if len(known) == len(squares):
                # A mean over all outputs of the parameter, whatever its pieces.
                outputs = sum(pair.groups * pair.outputs for pair in pairs)
                changes[block.parameter] = sum(known[1:], start=known[0]) / outputs
        return directions, changes

    def _matrices_of(self, grads: Tensors) -> tuple[MatrixTensors, Kernels]:
        """Return the gradients of all matrices, by the rows of standardized kernels where these are some."""
        stacks: MatrixTensors = {}
        kernels: Kernels = {}
        for block, pairs in self.blocks:
            gradient = grads.get(block.parameter)
            if gradient is None:
                continue
            for pair, stack in zip(pairs, block.matrices.split(gradient), strict=True):
                # In the precision of the factors; a vector may have none.
                slot = pair.b or pair.a
                stacks[pair.name] = stack.to(self.at[slot][0].dtype) if slot else stack
            if block.standardized:
                kernels.update(self._kernels(block, pairs))
        for name, kernel in kernels.items():
            stacks[name] = stacks[name] * kernel.lengths
        return stacks, kernels

    def _kernels(self, block: Block, pairs: Sequence[Pair]) -> Kernels:
        """Return the rows of a block's standardized kernel as they are now."""
        parameter = self.parameters[block.parameter].detach()
        kernels = {}
        for pair, stack in zip(pairs, block.matrices.split(parameter), strict=True):
            kernels[pair.name] = Kernel(*standardized(stack.to(factor_dtype(parameter))))
        return kernels

    def quadratic(self, moves: Tensors) -> Tensor:
        """Return ``d^T F d``, with the averages of the factors or second moments for F and no damping.

        Args:
            moves: Change of each parameter.
        """
        terms = []
        for block, pairs in self.blocks:
            if block.parameter not in moves:
                continue
            for pair, move in zip(pairs, block.matrices.split(moves[block.parameter]), strict=True):
                if block.standardized:
                    move = self._kernels(block, pairs)[pair.name].turned(move)
                if pair in self.moments:
                    turned = self.moments.turn(pair, move)
                    terms.append((turned.square() * self.moments.value(pair)).sum())
                else:
                    # <D, B D A>
                    left = self._times_factor(pair, move, "b")
                    terms.append((move * self._times_factor(pair, left, "a")).sum())
        if not terms:
            return torch.zeros(())
        return torch.stack(terms).sum()

    def _times_factor(self, pair: Pair, stack: Tensor, side: str) -> Tensor:
        """Multiply by the average of a factor itself; a side without a factor is the identity."""
        slot = pair.a if side == "a" else pair.b
        if not slot:
            return stack
        factor_stack, first, count = self.at[slot]
        factor = factor_stack.value(slice(first, first + count))
        return times(stack.to(factor.dtype), factor, side == "b")

    def _apply_all(self, stacks: MatrixTensors, kernels: Kernels) -> dict[tuple[str, int], Applied]:
        """Return the directions of all matrices, and ``tr(D A D^T)`` of each, summed over its groups.

        Args:
            stacks: Gradients ``[groups, out, in]``, in the precision of the factors.
            kernels: Those of the parameters that are standardized.
        """
        applied: dict[tuple[str, int], Applied] = {}
        pairs_of: dict[Any, list[Pair]] = defaultdict(list)
        longer = self._lengthenings()
        for pair in self.pairs:
            stack = stacks.get(pair.name)
            if stack is None:
                continue
            if pair in self.moments:
                direction = self.moments.direction(pair, stack)
                if pair.name in longer:
                    direction = direction * longer[pair.name].view(-1, 1, 1)
                applied[pair.name] = direction, self.moments.output_change(pair, direction).sum()
            else:
                pairs_of[self._kind(pair, stack)].append(pair)
        growths: Growths = {}
        for pairs in pairs_of.values():
            first = pairs[0]
            entries = first.groups * max(first.inputs, first.outputs) ** 2
            # As many matrices together as stay in a cache.
            at_once = max(1, IN_CACHE // entries)
            for start in range(0, len(pairs), at_once):
                some = pairs[start : start + at_once]
                applied.update(self._apply(some, stacks, kernels, growths, longer))
        return applied

    def _kind(self, pair: Pair, stack: Tensor) -> Any:
        """Return what matrices must have in common to be multiplied together."""
        banks = [id(self.at[slot][0]) if slot else 0 for slot in (pair.a, pair.b)]
        vector = not pair.block.a
        shape = (tuple(stack.shape), stack.dtype, stack.device)
        kinds = (vector, pair.block.standardized, any(pair.by_rows), self._multiplies(pair))
        return (*shape, *banks, *kinds, pair.blocks, pair.growth)

    def _apply(
        self,
        pairs: Sequence[Pair],
        stacks: MatrixTensors,
        kernels: Kernels,
        growths: Growths,
        longer: MatrixTensors,
    ) -> dict[tuple[str, int], Applied]:
        """Return the directions of matrices of one kind, and ``tr(D A D^T)`` where A is known."""
        power_a, power_b = self.roots.powers
        pair, groups = pairs[0], pairs[0].groups
        stack = joined([stacks[member.name] for member in pairs])
        places_b = self._places([member.b for member in pairs])
        places_a = self._places([member.a for member in pairs])
        # A gradient that jumps would be divided by what B was before: only B's roots follow jumps.
        root_b = self._root(places_b, power_b, self.roots.damping_memory > 0, growths)
        root_a = self._root(places_a, power_a, False, growths)
        if pair.block.standardized:
            rows = joined([kernels[member.name].rows for member in pairs])
            stack = self.compiled(tangent, stack, rows, root_b, root_a)
        factor, rho = self._known_of_a(pair, places_a)
        numbers = self._sizes(pairs, longer)
        direction, change = self.compiled(update, stack, root_b, root_a, factor, rho, *numbers)
        directions = direction.split(groups)
        sums: Iterable[Tensor | None] = change.view(-1, groups).sum(1).unbind()
        # A block without A has an unknown change of its outputs.
        if pair.block.a and not pair.a:
            sums = [None for _ in pairs]
        applied = zip(directions, sums, strict=True)
        return {member.name: result for member, result in zip(pairs, applied, strict=True)}

    def _sizes(
        self, pairs: Sequence[Pair], longer: MatrixTensors
    ) -> tuple[Tensor | None, float, float, Tensor | None]:
        """Return what the lengths of directions depend on besides roots, the last arguments of `update`."""
        pair, power_a = pairs[0], self.roots.powers[0]
        unit = lengths = None
        if not pair.block.a and power_a > 0:
            unit = joined([self.unit_rho[member.name] for member in pairs])
        if pair.name in longer:
            lengths = joined([longer[member.name] for member in pairs])
        # Blocks make a step larger than a whole factor would: divided by their growth since the base width.
        shrink = prod(more**power for more, power in zip(pair.growth, self.roots.powers, strict=True))
        return unit, power_a, shrink, lengths

    def _known_of_a(self, pair: Pair, places: Places | None) -> tuple[Average | None, Tensor | None]:
        """Return what tells the change of outputs: A, where it must be multiplied by, or else its damping."""
        if places is None:
            return None, None
        factor_stack, at = places
        if self._multiplies(pair):
            return factor_stack.mean(at), None
        return None, factor_stack.state["rho"][at]

    def _places(self, slots: Sequence[str | None]) -> Places | None:
        """Return the stack of slots of one size, and their places there; None for a side without factors."""
        located = [self.at[slot] for slot in slots if slot]
        if not located:
            return None
        factor_stack, first, count = located[0]
        starts = [start for _, start, _ in located]
        end = first + count * len(starts)
        if starts == list(range(first, end, count)):  # they stand together
            return factor_stack, slice(first, end)
        return factor_stack, self._index(factor_stack, starts, count)

    def _index(self, bank: FactorStack, starts: Sequence[int], count: int) -> Tensor:
        """Return the numbers of runs of slots on the device of their stack, made once for each such set."""
        key = (id(bank), count, tuple(starts))
        if key not in self._indices:
            numbers: list[int] = []
            for start in starts:
                numbers += range(start, start + count)
            self._indices[key] = torch.tensor(numbers, device=bank.device)
        return self._indices[key]

    def _root(self, places: Places | None, power: float, jumps: bool, growths: Growths) -> Root | None:
        """Return the roots of slots, and by how much their factors have grown since."""
        if places is None:
            return None
        factor_stack, at = places
        # One computation for all slots of a stack.
        key = id(factor_stack), jumps
        if key not in growths:
            growths[key] = factor_stack.grown(jumps)
        return factor_stack.root(at, growths[key], power)

    def _multiplies(self, pair: Pair) -> bool:
        """Return whether a product with A tells what D does to outputs, or else the damping of A does.

        Compiled code is of one kind for every step, and so always multiplies by A.
        """
        if not pair.a:
            return False
        factor_stack, first, count = self.at[pair.a]
        # D A = H - rho D holds for the inverse of the whole present A with a damping that is a number.
        plain = self.roots.powers[0] == 1 and self.roots.damping_mode != "eigen"
        uncut = pair.blocks[0] == 1 and pair.growth[0] == 1
        return not (plain and uncut and factor_stack.is_fresh(first, count)) or self.compiled.on(
            factor_stack.device
        )

    def entries(self, parameter: str) -> State:
        """Return the state that is kept at a parameter, as views; on meta where another rank has it.

        Args:
            parameter: Its name.
        """
        state_of = {}
        for factor_stack in (*self._all, *self._remote):
            for name in dict.fromkeys(name for name, _ in factor_stack.keys):
                slot, first = self.slots[name], factor_stack.slot[name, 0]
                if slot.block.parameter != parameter:
                    continue
                for what, tensor in factor_stack.state.items():
                    state_of[f"{slot.key}.{what}"] = tensor[first : first + slot.shape[0]]
        for (name, piece), averages in self.moments.state.items():
            if name == parameter:
                state_of.update({f"moments{piece}.{what}": tensor for what, tensor in averages.items()})
        for (name, piece), rho in (*self.unit_rho.items(), *self._remote_units.items()):
            if name == parameter:
                state_of[f"unit{piece}.rho"] = rho
        return state_of

    def state(self) -> dict[str, State]:
        """Return all that changes from step to step, without second moments: tensors by part and name."""
        parts = {f"bank{number}": dict(factor_stack.state) for number, factor_stack in enumerate(self._all)}
        parts["units"] = {f"{name}.{piece}": rho for (name, piece), rho in self.unit_rho.items()}
        parts["largest"] = {}
        if self.largest is not None:
            parts["largest"]["trace"] = self.largest
        return parts

    def take_state(self, state: Mapping[str, State], steps: int) -> None:
        """Go on from a state, whose tensors are not written to if the banks write to none.

        Args:
            state: Result of `state`.
            steps: Number of steps it has seen.
        """
        for number, factor_stack in enumerate(self._all):
            factor_stack.state = dict(state[f"bank{number}"])
            factor_stack.changed()
        for name, piece in self.unit_rho:
            self.unit_rho[name, piece] = state["units"][f"{name}.{piece}"].clone()
        self.largest = state["largest"].get("trace")
        self.rooted, self.moved, self._longer = steps > 0, False, None

    def loaded(self, steps: int) -> None:
        """Take notice that the state was written from outside.

        Args:
            steps: Number of steps it has seen.
        """
        for factor_stack in self._all:
            factor_stack.forget()
        # Roots were looked over in every step that averaged factors, unless none has yet.
        self.rooted, self.moved, self._longer = steps > 0, steps == 0, None
        self.seen = set()
        if steps:
            self.seen.update(self.at)
            self._find_largest()


def _taken(counts: Tensor) -> Tensor:
    """Return counts, which start anew."""
    taken = counts.clone()
    counts.zero_()
    return taken


def _divide(blocks: BlockPairs, slots: Mapping[str, Slot], ranks: int) -> dict[str, int]:
    """Return the rank that keeps each parameter's block: about the same work for all.

    Blocks that share a factor go to one rank.
    """
    set_of: dict[str, int] = {}  # slot -> number of the set of blocks that it belongs to
    members: dict[int, list[str]] = {}
    costs: dict[int, int] = {}
    for number, (block, pairs) in enumerate(blocks):
        names = _slots_of(pairs)
        # Sets of blocks that share a factor with this one become one with it.
        joined = {set_of[name] for name in names if name in set_of}
        members[number] = [block.parameter]
        # A root of an n x n matrix takes n^3.
        shapes = [slots[name].shape for name in names if name not in set_of]
        costs[number] = sum(shape[0] * shape[-1] ** 3 for shape in shapes)
        for name in names:
            set_of[name] = number
        for other_set in joined:
            members[number] += members.pop(other_set)
            costs[number] += costs.pop(other_set)
            set_of.update({name: number for name, set_number in set_of.items() if set_number == other_set})
    rank = deal({number: costs[number] for number in sorted(members)}, ranks)
    owner = {}
    for number, parameters in members.items():
        owner.update(dict.fromkeys(parameters, rank[number]))
    return owner


def _slots_of(pairs: Iterable[Pair]) -> set[str]:
    """Return the names of the slots of pairs."""
    names: set[str] = set()
    for pair in pairs:
        names.update(name for name in (pair.a, pair.b) if name)
    return names
