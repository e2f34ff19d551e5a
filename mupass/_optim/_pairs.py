"""Pairs of factors, lined up: which matrices share a slot of a bank, and at which step its root is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mupass._blocks import Block, Factor
from mupass._factors import factor_dtype
from mupass._optim._banks import Bank
from mupass._optim._damping import Sides
from mupass._scales import Scales


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
    """

    block: Block
    piece: int
    a: str | None
    b: str | None
    groups: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Kind:
    """Pairs of one precision and device, lined up group by group.

    Attributes:
        banks: Indices of their banks.
        pairs: The pairs.
        at_a: Slot of each row's input factor, counted through the banks; -1 for none.
        at_b: The same for output factors.
        dim_a: Sizes of the input sides.
        dim_b: Sizes of the output sides.
        scale_a: Width factors of absolute damping of A.
        scale_b: Width factors of absolute damping of B.
    """

    banks: tuple[int, ...]
    pairs: tuple[Pair, ...]
    at_a: Tensor
    at_b: Tensor
    dim_a: Tensor
    dim_b: Tensor
    scale_a: Tensor
    scale_b: Tensor

    def sides(self, traces: Tensor, dampings: Mapping[str, float]) -> Sides:
        """Return what damping is made of; a side without a factor counts as the identity.

        Args:
            traces: Of all slots of the banks.
            dampings: Damping of each parameter.
        """
        values = [dampings[pair.block.parameter] for pair in self.pairs for _ in range(pair.groups)]
        return Sides(
            trace_a=torch.where(self.at_a >= 0, traces[self.at_a], self.dim_a),
            trace_b=torch.where(self.at_b >= 0, traces[self.at_b], self.dim_b),
            dim_a=self.dim_a,
            dim_b=self.dim_b,
            scale_a=self.scale_a,
            scale_b=self.scale_b,
            damping=traces.new_tensor(values),
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
        own = [i for i, b in enumerate(banks) if (b.factors.dtype, b.factors.device) == (dtype, device)]
        slots = {key: n for n, key in enumerate(key for i in own for key in banks[i].keys)}
        rows = [(pair, g) for pair in alike for g in range(pair.groups)]
        of = [scales[pair.block.parameter] for pair, _ in rows]
        like = torch.zeros((), dtype=dtype, device=device)
        found.append(
            Kind(
                banks=tuple(own),
                pairs=tuple(alike),
                at_a=torch.tensor([slots.get((p.a, g), -1) for p, g in rows], device=device),
                at_b=torch.tensor([slots.get((p.b, g), -1) for p, g in rows], device=device),
                dim_a=like.new_tensor([p.inputs for p, _ in rows]),
                dim_b=like.new_tensor([p.outputs for p, _ in rows]),
                scale_a=like.new_tensor([s.damping_in for s in of]),
                scale_b=like.new_tensor([s.damping_out for s in of]),
            )
        )
    return found


def phases(banks: Sequence[Bank], stagger: bool) -> list[list[int]]:
    """Deal slots out to the steps of a period, so that each has about the same work (n^3 a slot)."""
    slots = [
        (bank.factors.shape[-1] ** 3, i, at) for i, bank in enumerate(banks) for at in range(len(bank.keys))
    ]
    phases = [[0] * len(bank.keys) for bank in banks]
    for turn, (_, i, at) in enumerate(sorted(slots, reverse=True) if stagger else ()):
        phases[i][at] = turn
    return phases


def slot_name(block: Block, factor: Factor, piece: int | None) -> str:
    """Name a slot by its taps; with a piece, by the matrix that has it for itself."""
    places = "+".join(p.module if p.module is not None else f"{p.parameter}#{p.key}" for p in factor.places)
    own = f"@{block.parameter}.{piece}" if piece is not None else ""
    tied = f"&{block.parameter}" if block.tied and factor in (*block.a, *block.b) else ""
    return f"{factor.side}:{places}:{factor.piece}{tied}{own}"
