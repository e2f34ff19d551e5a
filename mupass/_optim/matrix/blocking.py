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


@dataclass(frozen=True)
class Blocking:
    """How a parameter becomes a list of blocks, and back.

    Attributes:
        geometry: Which axes are fan_out and fan_in, and what is fused; all other axes count matrices.
        size: Largest side of a block. It must not follow the width: the exponents of the scale table would
            change with the number of blocks.
        modes: Whether every axis is a side of its own, instead of two sides fan_out and fan_in; axes of
            length 1 are left out. For kernels of convolutions.
    """

    geometry: Geometry
    size: int = WHOLE
    modes: bool = False

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
        for stack in stacks:
            for matrix in stack:
                blocks += _tiles(matrix, self.size)
        return blocks

    def growth(self) -> float:
        """Return the number of blocks relative to that at the base width."""
        geometry = self.geometry
        # A fused axis holds as many matrices at any width, so its pieces shrink as the whole does.
        axes = list(zip(geometry.base_shape, geometry.shape, strict=True))
        count = at_base = 0
        for piece in split(torch.empty(geometry.shape, device="meta"), geometry.fusions):
            # The same model at the base width has the same pieces, each smaller.
            count += self._count(piece.shape)
            at_base += self._count(
                [
                    length * base_size / size
                    for length, (base_size, size) in zip(piece.shape, axes, strict=True)
                ]
            )
        return count / at_base

    def _count(self, shape: Sequence[float]) -> int:
        """Return the number of blocks of one matrix."""
        return prod(ceil(prod(shape[i] for i in axes) / self.size) for axes in self._sides)


def _tiles(tensor: Tensor, size: int, axis: int = 0) -> list[Tensor]:
    """Return blocks of a tensor, the first axis outermost."""
    if axis == tensor.dim():
        return [tensor]
    # The last block of a side may be smaller than the others.
    parts = torch.split(tensor, size, axis) if tensor.shape[axis] > size else (tensor,)
    tiles = []
    for part in parts:
        tiles += _tiles(part, size, axis + 1)
    return tiles
