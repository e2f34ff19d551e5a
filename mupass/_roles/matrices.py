"""Matrices of a parameter: fused ones split, groups stacked, axes ordered (fan_out, fan_in)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from torch import Tensor

from mupass._records import Axes, Fusion, Shape
from mupass._roles.fused import join, split


@dataclass(frozen=True)
class Matrices:
    """How a parameter becomes stacks of matrices, and back.

    Attributes:
        shape: Its shape.
        out_axes: Axes that the operator makes.
        in_axes: Axes that the operator sums over; none for vectors. All further axes count matrices.
        fusions: What is fused along the output axes.
        groups: Number of separate weights along the first axis (grouped convolutions).
        sides: Axes of every side, where a stack has other sides than fan_out and fan_in.
    """

    shape: Shape
    out_axes: Axes
    in_axes: Axes = ()
    fusions: tuple[Fusion, ...] = ()
    groups: int = 1
    sides: tuple[Axes, ...] = ()

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return one stack ``[groups, fan_out, fan_in]`` (or ``[groups, *sides]``) for every fused matrix.

        Args:
            tensor: The parameter, or a tensor of its shape.
        """
        # Most parameters: no copy is made, and little Python runs.
        if self._single:
            return [tensor.reshape(self._sizes)]
        return [self._stack(piece) for piece in split(self._opened(tensor), self._shifted)]

    def join(self, stacks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put stacks together again.

        Args:
            stacks: Of the shapes that `split` gives.
            like: The parameter.
        """
        if self._single:
            return stacks[0].reshape(self.shape)
        # Where each axis went, to send it back.
        axis_order = self._order
        inverse = sorted(range(len(axis_order)), key=axis_order.__getitem__)
        pieces = []
        for piece, stack in zip(split(self._opened(like), self._shifted), stacks, strict=True):
            pieces.append(stack.reshape([piece.shape[axis] for axis in axis_order]).permute(inverse))
        return join(pieces, self._shifted).reshape(self.shape)

    def _opened(self, tensor: Tensor) -> Tensor:
        """Give groups along the first axis an axis of their own."""
        tensor = tensor.reshape(self.shape)
        # The kernel of a grouped convolution is [groups * channels out, channels in of a group, *positions].
        if self.groups > 1:
            tensor = tensor.unflatten(0, (self.groups, -1))  # type: ignore[no-untyped-call]
        return tensor

    @cached_property
    def _single(self) -> bool:
        """Whether the parameter is one matrix, or one vector, in the order of its axes."""
        in_order = self._order == tuple(range(len(self.shape)))
        return in_order and not self.fusions and self.groups == 1

    @cached_property
    def _sizes(self) -> Shape:
        """Sizes of the stack of an unfused parameter."""
        return (-1, *self._side_sizes(self.shape))

    @property
    def _shift(self) -> int:
        """By how much axes move up where groups have an axis of their own ahead of them."""
        return int(self.groups > 1)

    @cached_property
    def _shifted(self) -> tuple[Fusion, ...]:
        return tuple(replace(fusion, axis=fusion.axis + self._shift) for fusion in self.fusions)

    @cached_property
    def _order(self) -> Axes:
        """The axes with those first that count matrices, then those of fan_out, then those of fan_in."""
        sides = [axis + self._shift for axis in (*self.out_axes, *self.in_axes)]
        counting = [axis for axis in range(len(self.shape) + self._shift) if axis not in sides]
        return (*counting, *sides)

    def _stack(self, piece: Tensor) -> Tensor:
        sizes = self._side_sizes(piece.shape[self._shift :])
        return piece.permute(self._order).reshape(-1, *sizes)

    def _side_sizes(self, shape: Sequence[int]) -> list[int]:
        """Return the sizes of the sides of matrices, given those of the parameter's axes or of a piece's."""
        sizes = []
        for axes in self.sides or (self.out_axes, self.in_axes):
            sizes.append(prod([shape[axis] for axis in axes]))
        return sizes
