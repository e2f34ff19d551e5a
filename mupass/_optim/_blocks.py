"""Matrices of a parameter: fused ones split, axes ordered (fan_out, fan_in), large ones cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from mupass._fused import join, split
from mupass._geometry import Geometry


@dataclass(frozen=True)
class Blocking:
    """How a parameter becomes a list of blocks, and back.

    Attributes:
        geometry: Which axes are fan_out and fan_in, and what is fused; all other axes count matrices.
        size: Largest side of a block. It must not follow the width: the exponents of the scale table would
            change with the number of blocks.
    """

    geometry: Geometry
    size: int

    @property
    def _order(self) -> tuple[int, ...]:
        g = self.geometry
        rest = [i for i in range(len(g.shape)) if i not in (*g.fan_out_axes, *g.fan_in_axes)]
        return (*rest, *g.fan_out_axes, *g.fan_in_axes)

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """Return the blocks, each ``[rows, columns]`` of one matrix.

        Args:
            tensor: The parameter, or its gradient.
        """
        blocks = []
        for piece in split(tensor, self.geometry.fusions):
            for matrix in self._matrices(piece):
                for rows in matrix.split(self.size, 0):
                    blocks += rows.split(self.size, 1)
        return blocks

    def _matrices(self, piece: Tensor) -> Tensor:
        moved = piece.permute(self._order)
        inputs = prod(piece.shape[i] for i in self.geometry.fan_in_axes)
        outputs = prod(piece.shape[i] for i in self.geometry.fan_out_axes)
        return moved.reshape(-1, outputs, inputs)

    def paste(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put blocks together again.

        Args:
            blocks: Tensors of the shapes that `cut` gives.
            like: The parameter.
        """
        rest, pieces = list(blocks), []
        for piece in split(like, self.geometry.fusions):
            matrices = []
            for matrix in self._matrices(piece):
                down, across = ceil(matrix.shape[0] / self.size), ceil(matrix.shape[1] / self.size)
                bands = [torch.cat(rest[i * across : (i + 1) * across], 1) for i in range(down)]
                matrices.append(torch.cat(bands))
                rest = rest[down * across :]
            moved = piece.permute(self._order)
            inverse = sorted(range(len(self._order)), key=lambda i: self._order[i])
            pieces.append(torch.stack(matrices).reshape(moved.shape).permute(inverse))
        return join(pieces, self.geometry.fusions)

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
        sides = [
            prod(shape[i] for i in axes) for axes in (self.geometry.fan_out_axes, self.geometry.fan_in_axes)
        ]
        return prod(ceil(side / self.size) for side in sides)
