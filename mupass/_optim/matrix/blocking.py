"""Matrices of a parameter: fused ones split, axes ordered (fan_out, fan_in), large ones cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

import torch
from torch import Tensor

from mupass._records import Geometry
from mupass._roles.fused import split
from mupass._roles.matrices import Matrices

WHOLE = 1 << 62  # a block size that no matrix reaches
SHORTEST = 32  # blocks of a narrow base width; smaller ones cost more in overhead than in arithmetic


@dataclass(frozen=True)
class Blocking:
    """How a parameter becomes a list of blocks, and back.

    Attributes:
        geometry: Which axes are fan_out and fan_in, and what is fused; all other axes count matrices.
        size: Largest side of a block. It must not follow the width: the exponents of the scale table would
            change with the number of blocks.
        modes: Whether every axis is a side of its own, instead of two sides fan_out and fan_in; axes of
            length 1 are left out. For kernels of convolutions.
        as_at_base: Whether sides are no longer than at the base width, either. Those that are longer than
            ``size`` there are cut into equal parts.
    """

    geometry: Geometry
    size: int = WHOLE
    modes: bool = False
    as_at_base: bool = False

    @cached_property
    def _sides(self) -> tuple[tuple[int, ...], ...]:
        """Return the axes that make up each side of a matrix."""
        fan_out_axes, fan_in_axes = self.geometry.fan_out_axes, self.geometry.fan_in_axes
        # An axis of length 1 makes no side.
        single = [(axis,) for axis in (*fan_out_axes, *fan_in_axes) if self.geometry.shape[axis] > 1]
        if self.modes and len(single) > 2:
            return tuple(single)
        return fan_out_axes, fan_in_axes

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """Return the blocks, each ``[rows, columns]`` of one matrix (or one axis for each mode).

        Args:
            tensor: The parameter, or its gradient.
        """
        return self._cut(self._whole.split(tensor))

    @cached_property
    def _whole(self) -> Matrices:
        """Return how the parameter becomes stacks of matrices, before these are cut."""
        geometry = self.geometry
        return Matrices(
            geometry.shape,
            geometry.fan_out_axes,
            geometry.fan_in_axes,
            geometry.fusions,
            sides=self._sides,
        )

    @torch.no_grad()
    def paste(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put blocks together again.

        Args:
            blocks: Tensors of the shapes that `cut` gives.
            like: The parameter.
        """
        stacks = [
            torch.empty(stack.shape, dtype=blocks[0].dtype, device=like.device)
            for stack in self._empty_stacks
        ]
        # The blocks of the stacks are views into them.
        torch._foreach_copy_(self._cut(stacks), list(blocks))
        return self._whole.join(stacks, like)

    @cached_property
    def _empty_stacks(self) -> list[Tensor]:
        """Return every stack of matrices on the meta device, for its shape."""
        return self._whole.split(torch.empty(self.geometry.shape, device="meta"))

    def shapes(self) -> list[torch.Size]:
        """Return the shape of every block, in the order of `cut`."""
        return [block.shape for block in self._cut(self._empty_stacks)]

    def _cut(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return the blocks of all matrices, as views."""
        blocks: list[Tensor] = []
        for stack, longest in zip(stacks, self._longest, strict=True):
            for matrix in stack:
                blocks += _tiles(matrix, longest)
        return blocks

    @cached_property
    def _lengths(self) -> list[tuple[list[float], list[float]]]:
        """Return the sides of the matrices of every fused piece, here and at the base width."""
        geometry = self.geometry
        # A fused axis holds as many matrices at any width, so its pieces shrink as the whole does.
        axes = list(zip(geometry.base_shape, geometry.shape, strict=True))
        lengths = []
        for piece in split(torch.empty(geometry.shape, device="meta"), geometry.fusions):
            # The same model at the base width has the same pieces, each smaller.
            at_base = [
                length * base_size / size for length, (base_size, size) in zip(piece.shape, axes, strict=True)
            ]
            lengths.append((self._side_lengths(piece.shape), self._side_lengths(at_base)))
        return lengths

    def _side_lengths(self, shape: Sequence[float]) -> list[float]:
        return [prod(shape[axis] for axis in axes) for axes in self._sides]

    @cached_property
    def _longest(self) -> list[list[int]]:
        """Return the longest side of a block, for every fused piece and every side of its matrices."""
        longest = []
        for _, at_base in self._lengths:
            longest.append([self._longest_at(length) for length in at_base])
        return longest

    def _longest_at(self, base_length: float) -> int:
        if not self.as_at_base:
            return self.size
        whole = max(SHORTEST, round(base_length))
        # Equal parts, so that the same ones fit into sides that grow.
        return ceil(whole / ceil(whole / self.size))

    def growth(self) -> float:
        """Return the number of blocks relative to that at the base width."""
        count = at_base = 0
        for (here, there), longest in zip(self._lengths, self._longest, strict=True):
            count += _count(here, longest)
            at_base += _count(there, longest)
        return count / at_base


def _count(lengths: Sequence[float], longest: Sequence[int]) -> int:
    """Return the number of blocks of a matrix, given its sides and the longest side of a block."""
    return prod(ceil(length / most) for length, most in zip(lengths, longest, strict=True))


def _tiles(tensor: Tensor, longest: Sequence[int], axis: int = 0) -> list[Tensor]:
    """Return blocks of a tensor, the first axis outermost."""
    if axis == tensor.dim():
        return [tensor]
    # The last block of a side may be smaller than the others.
    parts = torch.split(tensor, longest[axis], axis) if tensor.shape[axis] > longest[axis] else (tensor,)
    tiles = []
    for part in parts:
        tiles += _tiles(part, longest, axis + 1)
    return tiles
