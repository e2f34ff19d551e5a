"""Large sides of matrices in equal pieces, for factors that keep the blocks on their diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch.nn.functional as F
from torch import Tensor

from mupass._records import Geometry
from mupass._roles.matrices import Matrices


def pieces(n: float, size: int) -> tuple[int, int]:
    """Return into how many pieces a side is cut, and how long these are; the last may be shorter.

    Args:
        n: Size of the side; at the base width not always a whole number.
        size: Largest piece; 0 leaves sides whole.
    """
    count = 1
    if size:
        count = max(1, ceil(n / size))
    # Pieces of one length, 3 of 34 for a side of 100 in pieces of at most 40, not 40, 40 and 20.
    return count, ceil(n / count)


def cut(x: Tensor, count: int, side: int) -> Tensor:
    """Cut ``[groups, rows, n]`` into ``[groups * count, rows, side]``; zeros fill the last piece up.

    Args:
        x: The tensor.
        count: Number of pieces.
        side: Their length.
    """
    if count == 1:
        return x
    # Zeros at the end add nothing to a product of rows.
    padded = F.pad(x, (0, count * side - x.shape[-1]))
    return padded.unflatten(2, (count, side)).movedim(2, 1).flatten(0, 1)  # type: ignore[no-untyped-call, no-any-return]


def paste(x: Tensor, count: int, n: int) -> Tensor:
    """Undo `cut`.

    Args:
        x: ``[groups * count, rows, side]``.
        count: Number of pieces.
        n: Size of the side.
    """
    if count == 1:
        return x
    return x.unflatten(0, (-1, count)).movedim(1, 2).flatten(2)[..., :n]  # type: ignore[no-untyped-call, no-any-return]


def growth(n: int, size: int, geometry: Geometry, matrices: Matrices, axes: Sequence[int]) -> float:
    """Return by what the number of pieces of a side has grown since the base width.

    A block has that much less trace than a whole factor of the same order in width.

    Args:
        n: Size of the side.
        size: Largest piece; 0 leaves sides whole.
        geometry: Of the parameter.
        matrices: How it splits into matrices.
        axes: Axes of ``matrices`` that make up the side.
    """
    if matrices.shape != geometry.shape:  # vectors are flattened
        axes = range(len(geometry.shape))
    base_size = n * prod(geometry.base_shape[axis] / geometry.shape[axis] for axis in axes)
    return pieces(n, size)[0] / pieces(base_size, size)[0]
