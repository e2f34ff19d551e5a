"""Pairs of Kronecker factors A and B: which matrices share a slot of a stack, and when its root is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mupass._optim.kronecker.damping import Sides
from mupass._optim.kronecker.factor_stack import Bank
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

    @property
    def repeats(self) -> int:
        """How many rows a group takes where factors are lined up: one for each block of the longer side."""
        return max(self.blocks)

    def rows(self) -> Iterator[tuple[int, int]]:
        """Yield for every row its number within A's slot, and within B's."""
        a, b = self.blocks
        for group in range(self.groups):
            for i in range(self.repeats):
                yield group * a + min(i, a - 1), group * b + min(i, b - 1)


def in_blocks(pair: Pair, shapes: Sequence[tuple[int, ...]], size: int, geometry: Geometry) -> Pair:
    """Return a pair with the numbers of blocks on the diagonals of its factors.

    Args:
        pair: The pair.
        shapes: Shapes of all of its A and of all of its B; empty where there is none.
        size: Largest block; 0 for whole factors.
        geometry: Of the parameter.
    """
    matrices, blocks, grown = pair.block.matrices, [1, 1], [1.0, 1.0]
    sides = ((pair.inputs, matrices.in_axes), (pair.outputs, matrices.out_axes))
    for i, ((n, axes), shape) in enumerate(zip(sides, shapes, strict=True)):
        if len(shape) == 3 and shape[1] < n:
            blocks[i] = shape[0] // pair.groups
            grown[i] = growth(n, size, geometry, matrices, axes)
    return replace(pair, blocks=(blocks[0], blocks[1]), growth=(grown[0], grown[1]))


@dataclass(frozen=True)
class Kind:
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

    def sides(self, traces: Tensor, dampings: Mapping[str, float | Tensor] | None) -> Sides:
        """Return what damping is made of; a side without a factor counts as the identity.

        Args:
            traces: Of all slots of the banks.
            dampings: Damping of each parameter; None where only traces are of interest.
        """
        dampings = dampings or {pair.block.parameter: 0.0 for pair in self.pairs}
        values = [dampings[pair.block.parameter] for pair in self.pairs for _ in pair.rows()]
        # Hypergradients differentiate by them.
        tensors = any(isinstance(v, Tensor) for v in values)
        damping = [torch.as_tensor(v).to(traces) for v in values] if tensors else []
        return Sides(
            trace_a=torch.where(self.at_a >= 0, traces[self.at_a], self.dim_a),
            trace_b=torch.where(self.at_b >= 0, traces[self.at_b], self.dim_b),
            dim_a=self.dim_a,
            dim_b=self.dim_b,
            scale_a=self.scale_a,
            scale_b=self.scale_b,
            damping=torch.stack(damping) if tensors else traces.new_tensor(values),
        )


def line_up(
    pairs: Sequence[Pair],
    banks: Sequence[Bank],
    parameters: Mapping[str, Tensor],
    scales: Mapping[str, Scales],
) -> list[Kind]:
    """Line up what damping needs, for the pairs of each precision and device.

    Args:
        pairs: All pairs.
        banks: All banks.
        parameters: Parameters by name.
        scales: Width factors of each parameter.
    """
    kinds: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        weight = parameters[pair.block.parameter]
        kinds[factor_dtype(weight), weight.device].append(pair)
    found = []
    for (dtype, device), alike in kinds.items():
        own = [i for i, b in enumerate(banks) if (b.dtype, b.device) == (dtype, device)]
        slots = {key: n for n, key in enumerate(key for i in own for key in banks[i].keys)}
        rows = [(pair, *at) for pair in alike for at in pair.rows()]
        at_a, at_b = (
            [slots.get((p.a, i), -1) for p, i, _ in rows],
            [slots.get((p.b, i), -1) for p, _, i in rows],
        )
        row = {slot: i for i, slot in enumerate(at_a + at_b) if slot >= 0}
        of = [(scales[pair.block.parameter], pair.growth) for pair, _, _ in rows]
        like = torch.zeros((), dtype=dtype, device=device)
        found.append(
            Kind(
                banks=tuple(own),
                pairs=tuple(alike),
                at_a=torch.tensor(at_a, device=device),
                at_b=torch.tensor(at_b, device=device),
                row=torch.tensor([row[i] for i in range(len(slots))], device=device),
                dim_a=like.new_tensor([p.inputs for p, _, _ in rows]),
                dim_b=like.new_tensor([p.outputs for p, _, _ in rows]),
                scale_a=like.new_tensor([s.damping_in / more[0] for s, more in of]),
                scale_b=like.new_tensor([s.damping_out / more[1] for s, more in of]),
            )
        )
    return found


def phases(banks: Sequence[Bank], remote: Sequence[Bank], stagger: bool) -> list[list[int]]:
    """Deal slots out to the steps of a period, so that each has about the same work (n^3 a slot).

    Those of other ranks are dealt out with them: a slot's turn does not depend on the number of ranks.

    Args:
        banks: Banks of this rank.
        remote: What other ranks keep.
        stagger: Whether slots have turns of their own.
    """
    slots = [(-(bank.size**3), *key) for bank in (*banks, *remote) for key in bank.keys]
    turns = {(name, group): turn for turn, (_, name, group) in enumerate(sorted(slots))}
    return [[turns[key] if stagger else 0 for key in bank.keys] for bank in banks]


def slot_name(block: Block, factor: Factor, piece: int | None) -> str:
    """Name a slot by its taps; with a piece, by the matrix that has it for itself."""
    places = "+".join(p.module if p.module is not None else f"{p.parameter}#{p.key}" for p in factor.places)
    own = f"@{block.parameter}.{piece}" if piece is not None else ""
    tied = f"&{block.parameter}" if block.tied and factor in (*block.a, *block.b) else ""
    scale = f"*{factor.scale!r}" if factor.scale != 1 else ""
    return f"{factor.side}:{places}:{factor.piece}{scale}{tied}{own}"
