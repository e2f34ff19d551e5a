"""Matrices of a parameter: fused ones split, groups stacked, axes ordered (fan_out, fan_in)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from torch import Tensor

from mupass._records import Fusion
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

    shape: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    groups: int = 1
    sides: tuple[tuple[int, ...], ...] = ()

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return one stack ``[groups, fan_out, fan_in]`` (or ``[groups, *sides]``) for every fused matrix.

        Args:
            tensor: The parameter, or a tensor of its shape.
        """
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
        order = self._order
        inverse = sorted(range(len(order)), key=lambda i: order[i])
        pieces = []
        for piece, stack in zip(split(self._opened(like), self._shifted), stacks, strict=True):
            pieces.append(stack.reshape([piece.shape[i] for i in order]).permute(inverse))
        return join(pieces, self._shifted).reshape(self.shape)

    def _opened(self, tensor: Tensor) -> Tensor:
        """Give groups along the first axis an axis of their own."""
        tensor = tensor.reshape(self.shape)
        return tensor.unflatten(0, (self.groups, -1)) if self.groups > 1 else tensor  # type: ignore[no-untyped-call, no-any-return]

    @cached_property
    def _single(self) -> bool:
        """Whether the parameter is one matrix, or one vector, in the order of its axes."""
        in_order = self._order == tuple(range(len(self.shape)))
        return in_order and not self.fusions and self.groups == 1

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Sizes of the stack of an unfused parameter."""
        sides = self.sides or (self.out_axes, self.in_axes)
        return (-1, *(prod(self.shape[i] for i in axes) for axes in sides))

    @property
    def _shift(self) -> int:
        return int(self.groups > 1)

    @cached_property
    def _shifted(self) -> tuple[Fusion, ...]:
        return tuple(replace(f, axis=f.axis + self._shift) for f in self.fusions)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        out, into = ([i + self._shift for i in axes] for axes in (self.out_axes, self.in_axes))
        rest = [i for i in range(len(self.shape) + self._shift) if i not in (*out, *into)]
        return (*rest, *out, *into)

    def _stack(self, piece: Tensor) -> Tensor:
        sides = self.sides or (self.out_axes, self.in_axes)
        sizes = [prod(piece.shape[i + self._shift] for i in axes) for axes in sides]
        return piece.permute(self._order).reshape(-1, *sizes)
