"""Symmetric matrices kept once: the lower triangle, as bands of rows in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

BANDS = 16  # of a large matrix: the tiles on the diagonal, which are kept whole, add a sixteenth
NARROWEST = 16  # rows; narrower bands cost more in overhead than they save


def _edges(n: int) -> list[tuple[int, int]]:
    """Return the first row of every band, and the row after its last."""
    # A band has the rows of a square tile on the diagonal, and all columns left of it.
    rows = max(NARROWEST, ceil(n / BANDS))
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def packed_size(n: int) -> int:
    """Return how many numbers an ``n x n`` matrix takes when packed.

    Args:
        n: Size of the matrix.
    """
    return sum((end - start) * end for start, end in _edges(n))


def bands(packed: Tensor, n: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, row after the last, ``[K, rows, row after the last]``) of every band, as views.

    Args:
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    at = 0
    for start, end in _edges(n):
        size = (end - start) * end
        yield start, end, packed[:, at : at + size].view(len(packed), end - start, end)
        at += size


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return whole matrices, ``[K, n, n]``.

    Args:
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    whole = packed.new_empty(len(packed), n, n)
    for start, end, band in bands(packed, n):
        whole[:, start:end, :end] = band
        # What is left of the tile is mirrored above it.
        whole[:, :start, start:end] = band[:, :, :start].mT
    return whole


def pack(whole: Tensor) -> Tensor:
    """Return packed matrices, ``[K, packed_size(n)]``; what is above the diagonal tiles is left out.

    Args:
        whole: ``[K, n, n]``, symmetric.
    """
    n = whole.shape[-1]
    packed = whole.new_empty(len(whole), packed_size(n))
    for start, end, band in bands(packed, n):
        band.copy_(whole[:, start:end, :end])
    return packed


def packed_diagonal(packed: Tensor, n: int) -> Tensor:
    """Return the diagonals, ``[K, n]``.

    Args:
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    parts = [band[:, :, start:].diagonal(dim1=-2, dim2=-1) for start, _, band in bands(packed, n)]
    return torch.cat(parts, 1)


def add_gram(packed: Tensor, rows: Tensor, fresh: float) -> None:
    """Add ``fresh * rows rows^T`` to packed matrices, in place.

    Only what is kept is computed, little more than half of the product.

    Args:
        packed: ``[K, packed_size(n)]``.
        rows: ``[K, n, m]``.
        fresh: Factor on the product.
    """
    for start, end, band in bands(packed, rows.shape[1]):
        band.baddbmm_(rows[:, start:end], rows[:, :end].mT, alpha=fresh)
