"""Matrices of a parameter: fused ones split, axes ordered (fan_out, fan_in), large ones cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from mupass._fused import split
from mupass._geometry import Geometry
from mupass._matrices import Matrices

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

    @property
    def _sides(self) -> tuple[tuple[int, ...], ...]:
        """Return the axes that make up each side of a matrix."""
        g = self.geometry
        single = [(i,) for i in (*g.fan_out_axes, *g.fan_in_axes) if g.shape[i] > 1]
        return tuple(single) if self.modes and len(single) > 2 else (g.fan_out_axes, g.fan_in_axes)

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """Return the blocks, each ``[rows, columns]`` of one matrix (or one axis for each mode).

        Args:
            tensor: The parameter, or its gradient.
        """
        stacks = self._whole.split(tensor)
        return [tile for stack in stacks for matrix in stack for tile in _tiles(matrix, self.size)]

    @property
    def _whole(self) -> Matrices:
        g = self.geometry
        return Matrices(g.shape, g.fan_out_axes, g.fan_in_axes, g.fusions, sides=self._sides)

    def paste(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put blocks together again.

        Args:
            blocks: Tensors of the shapes that `cut` gives.
            like: The parameter.
        """
        rest, stacks = iter(blocks), []
        for stack in self._whole.split(like):
            matrices = [_untile(rest, stack.shape[1:], self.size) for _ in range(stack.shape[0])]
            stacks.append(matrices[0] if len(matrices) == 1 else torch.stack(matrices))
        return self._whole.join(stacks, like)

    def growth(self) -> float:
        """Return the number of blocks relative to that at the base width."""
        g = self.geometry
        now = base = 0
        for piece in split(torch.empty(g.shape, device="meta"), g.fusions):
            # A fused axis holds as many matrices at any width, so its pieces shrink as the whole does.
            sizes = [n * b / s for n, b, s in zip(piece.shape, g.base_shape, g.shape, strict=True)]
            now += self._count(piece.shape)
            base += self._count(sizes)
        return now / base

    def _count(self, shape: Sequence[float]) -> int:
        """Return the number of blocks of one matrix."""
        return prod(ceil(prod(shape[i] for i in axes) / self.size) for axes in self._sides)


def _tiles(tensor: Tensor, size: int, axis: int = 0) -> list[Tensor]:
    """Return blocks of a tensor, the first axis outermost."""
    if axis == tensor.dim():
        return [tensor]
    parts = torch.split(tensor, size, axis) if tensor.shape[axis] > size else (tensor,)
    return [tile for part in parts for tile in _tiles(part, size, axis + 1)]


def _untile(tiles: Iterator[Tensor], shape: Sequence[int], size: int, axis: int = 0) -> Tensor:
    """Undo `_tiles`."""
    if axis == len(shape):
        return next(tiles)
    parts = [_untile(tiles, shape, size, axis + 1) for _ in range(ceil(shape[axis] / size))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
