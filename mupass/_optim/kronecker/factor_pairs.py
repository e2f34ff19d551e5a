"""Pairs of Kronecker factors A and B: which matrices share a slot of a stack, and when its root is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mupass._optim.kronecker.damping import Sides, few_rows
from mupass._optim.kronecker.factor_stack import FactorStack
from mupass._optim.vocabulary import Tensors
from mupass._records import Geometry
from mupass._scales.scales import Scales
from mupass._taps.blocks import Block, Factor
from mupass._taps.factors import factor_dtype
from mupass._taps.pieces import growth


@dataclass(frozen=True)
class Pair:
    """One matrix of a block, or as many as it has groups.

    Attributes:
        block: The block.
        piece: Which of its matrices.
        a: Slot of its input factor; None for vectors and where A is left out.
        b: Slot of its output factor; None where B is left out.
        groups: Number of separate matrices of equal shape.
        inputs: Size of the input side.
        outputs: Size of the output side.
        blocks: Number of blocks on the diagonals of A and B.
        growth: By what these numbers have grown since the base width.
        by_rows: Whether the damping of A, and of B, grows where a step has few rows, see `few_rows`.
    """

    block: Block
    piece: int
    a: str | None
    b: str | None
    groups: int
    inputs: int
    outputs: int
    blocks: tuple[int, int] = (1, 1)
    growth: tuple[float, float] = (1.0, 1.0)
    by_rows: tuple[bool, bool] = (False, False)

    @property
    def repeats(self) -> int:
        """How many rows a group takes where factors are lined up: one for each block of the longer side."""
        return max(self.blocks)

    @property
    def name(self) -> tuple[str, int]:
        """Parameter and number of the matrix."""
        return self.block.parameter, self.piece

    def rows(self) -> Iterator[tuple[int, int]]:
        """Yield, group by group and block by block, which of A's matrices goes with which of B's.

        Where one side is whole and the other is cut, all blocks of the other go with the one matrix.
        """
        blocks_a, blocks_b = self.blocks
        for group in range(self.groups):
            for block in range(self.repeats):
                in_a, in_b = min(block, blocks_a - 1), min(block, blocks_b - 1)
                yield group * blocks_a + in_a, group * blocks_b + in_b


def in_blocks(pair: Pair, shapes: Sequence[tuple[int, ...]], size: int, geometry: Geometry) -> Pair:
    """Return a pair with the numbers of blocks on the diagonals of its factors.

    Args:
        pair: The pair.
        shapes: Shapes of all of its A and of all of its B; empty where there is none.
        size: Largest block; 0 for whole factors.
        geometry: Of the parameter.
    """
    matrices = pair.block.matrices
    # A side in blocks has as many of them as its factor says.
    sides = ((pair.inputs, matrices.in_axes), (pair.outputs, matrices.out_axes))
    blocks, growths = [1, 1], [1.0, 1.0]
    for number, (width, axes) in enumerate(sides):
        shape = shapes[number]
        # [groups * blocks, n, n] with n below the width: a factor in blocks.
        if len(shape) == 3 and shape[1] < width:
            blocks[number] = shape[0] // pair.groups
            growths[number] = growth(width, size, geometry, matrices, axes)
    return replace(pair, blocks=(blocks[0], blocks[1]), growth=(growths[0], growths[1]))


@dataclass(frozen=True)
class Lineup:
    """Pairs of one precision and device, lined up group by group and block by block.

    Attributes:
        banks: Indices of their banks.
        pairs: The pairs.
        at_a: Slot of each row's input factor, counted through the banks; -1 for none.
        at_b: The same for output factors.
        row: Row of each slot, those of B counted on after those of A: where its damping is found.
        dim_a: Sizes of the input sides.
        dim_b: Sizes of the output sides.
        scale_a: Width factors of absolute damping of A.
        scale_b: Width factors of absolute damping of B.
        by_rows_a: Whether damping of A grows where a step has few rows.
        by_rows_b: The same for B.
        looks_at_rows: Whether any damping does.
    """

    banks: tuple[int, ...]
    pairs: tuple[Pair, ...]
    at_a: Tensor
    at_b: Tensor
    row: Tensor
    dim_a: Tensor
    dim_b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    by_rows_a: Tensor
    by_rows_b: Tensor
    looks_at_rows: bool

    def sides(
        self, traces: Tensor, dampings: Mapping[str, float | Tensor] | None, rows: Tensor | None = None
    ) -> Sides:
        """Return what damping is made of; a side without a factor counts as the identity.

        Args:
            traces: Of all slots of the banks.
            dampings: Damping of each parameter; None where only traces are of interest.
            rows: In how many rows each of the slots was observed; None where damping does not look at them.
        """
        # One damping for each row of the line-up: groups times blocks of the longer side.
        values: list[float | Tensor] = []
        for pair in self.pairs:
            damping = dampings[pair.block.parameter] if dampings else 0.0
            values += [damping] * (pair.groups * pair.repeats)
        if any(isinstance(value, Tensor) for value in values):
            # Hypergradients differentiate by them.
            damping_of_rows = torch.stack([torch.as_tensor(value).to(traces) for value in values])
        else:
            damping_of_rows = traces.new_tensor(values)
        damping_a = damping_b = damping_of_rows
        if rows is not None:
            grown_a, grown_b = self.grown(rows)
            damping_a, damping_b = damping_of_rows * grown_a, damping_of_rows * grown_b
        return Sides(
            trace_a=torch.where(self.at_a >= 0, traces[self.at_a], self.dim_a),
            trace_b=torch.where(self.at_b >= 0, traces[self.at_b], self.dim_b),
            dim_a=self.dim_a,
            dim_b=self.dim_b,
            scale_a=self.scale_a,
            scale_b=self.scale_b,
            damping_a=damping_a,
            damping_b=damping_b,
        )

    def by_pair(self, numbers: Tensor) -> Iterator[tuple[Pair, Tensor]]:
        """Yield every pair with its part of the numbers of all rows, an entry a group.

        Args:
            numbers: One for each row; the blocks of a group have the same, and the first stands for all.
        """
        first = 0
        for pair in self.pairs:
            end = first + pair.groups * pair.repeats
            yield pair, numbers[first : end : pair.repeats]
            first = end

    def grown(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much the dampings of A and of B have grown because a step has few rows.

        Args:
            rows: In how many rows each of the slots was observed.
        """
        # Both factors of a pair are of the same rows; one of the two may be missing.
        rows_a = torch.where(self.at_a >= 0, rows[self.at_a], 0.0)
        rows_b = torch.where(self.at_b >= 0, rows[self.at_b], 0.0)
        grown = few_rows(torch.maximum(rows_a, rows_b))
        return torch.where(self.by_rows_a, grown, 1.0), torch.where(self.by_rows_b, grown, 1.0)


def line_up(
    pairs: Sequence[Pair],
    banks: Sequence[FactorStack],
    parameters: Tensors,
    scales: Mapping[str, Scales],
) -> list[Lineup]:
    """Line up what damping needs, for the pairs of each precision and device.

    Args:
        pairs: All pairs.
        banks: All banks.
        parameters: Parameters by name.
        scales: Width factors of each parameter.
    """
    pairs_of: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        weight = parameters[pair.block.parameter]
        pairs_of[factor_dtype(weight), weight.device].append(pair)
    lineups = []
    for (dtype, device), own_pairs in pairs_of.items():
        numbers = [i for i, bank in enumerate(banks) if (bank.dtype, bank.device) == (dtype, device)]
        like = torch.zeros((), dtype=dtype, device=device)
        slots: dict[Any, int] = {}
        for number in numbers:
            for key in banks[number].keys:
                slots[key] = len(slots)
        lineups.append(_line_up_alike(own_pairs, numbers, slots, scales, like))
    return lineups


def _line_up_alike(
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    slots: Mapping[Any, int],
    scales: Mapping[str, Scales],
    like: Tensor,
) -> Lineup:
    """Line up pairs of one precision and device, whose banks have the given numbers and slots."""
    at_a, at_b, dims_a, dims_b, scales_a, scales_b = [], [], [], [], [], []
    by_rows_a, by_rows_b = [], []
    for pair in pairs:
        scale = scales[pair.block.parameter]
        for in_a, in_b in pair.rows():
            at_a.append(slots.get((pair.a, in_a), -1))
            at_b.append(slots.get((pair.b, in_b), -1))
            dims_a.append(pair.inputs)
            dims_b.append(pair.outputs)
            # A block's trace is smaller by the number of blocks.
            scales_a.append(scale.damping_in / pair.growth[0])
            scales_b.append(scale.damping_out / pair.growth[1])
            by_rows_a.append(pair.by_rows[0])
            by_rows_b.append(pair.by_rows[1])
    row_of = dict.fromkeys(range(len(slots)), 0)
    for row, slot in enumerate(at_a + at_b):
        row_of[slot] = row
    return Lineup(
        banks=tuple(numbers),
        pairs=tuple(pairs),
        at_a=torch.tensor(at_a, device=like.device),
        at_b=torch.tensor(at_b, device=like.device),
        row=torch.tensor([row_of[slot] for slot in range(len(slots))], device=like.device),
        dim_a=like.new_tensor(dims_a),
        dim_b=like.new_tensor(dims_b),
        scale_a=like.new_tensor(scales_a),
        scale_b=like.new_tensor(scales_b),
        by_rows_a=torch.tensor(by_rows_a, device=like.device),
        by_rows_b=torch.tensor(by_rows_b, device=like.device),
        looks_at_rows=any(by_rows_a) or any(by_rows_b),
    )


def phases(banks: Sequence[FactorStack], remote: Sequence[FactorStack], stagger: bool) -> list[list[int]]:
    """Deal slots out to the steps of a period, so that each has about the same work (n^3 a slot).

    Those of other ranks are dealt out with them: a slot's turn does not depend on the number of ranks.

    Args:
        banks: Banks of this rank.
        remote: What other ranks keep.
        stagger: Whether slots have turns of their own.
    """
    if not stagger:
        return [[0] * len(bank.keys) for bank in banks]
    slots: list[tuple[int, str, int]] = []
    for bank in (*banks, *remote):
        # The largest first, so that every turn of a period gets its share of them.
        slots += [(-(bank.size**3), *key) for key in bank.keys]
    turns = {(name, group): turn for turn, (_, name, group) in enumerate(sorted(slots))}
    return [[turns[key] for key in bank.keys] for bank in banks]


def slot_name(block: Block, factor: Factor, piece: int | None) -> str:
    """Name a slot by its taps; with a piece, by the matrix that has it for itself."""
    places = []
    for place in factor.places:
        # A tap of a module, or one inside a parameter.
        places.append(f"{place.parameter}#{place.key}" if place.module is None else place.module)
    name = f"{factor.side}:{'+'.join(places)}:{factor.piece}"
    if factor.scale != 1:
        name += f"*{factor.scale!r}"
    if block.tied and factor in (*block.a, *block.b):  # holds the nearest product's factor
        name += f"&{block.parameter}"
    if piece is not None:
        name += f"@{block.parameter}.{piece}"
    return name
