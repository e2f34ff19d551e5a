"""Symmetric matrices kept once: the lower triangle, as bands of rows in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import ceil

import torch
from torch import Tensor

BANDS = 16  # of a large matrix: the tiles on the diagonal, which are kept whole, add a sixteenth
NARROWEST = 16  # rows; narrower bands cost more in overhead than they save
# Up to this size one lookup is faster than a copy for every band; beyond, its table of places would be large.
LOOKED_UP = 512
# Up to this size a product of so many rows, added to several bands, is faster than a thin one for each.
TILED, TILE = 256, 64
# Up to so many entries of whole matrices, one product and one lookup are faster than thin products by bands.
FEW = 2**17


def _band_height(n: int) -> int:
    """Return the rows of a band: of a square tile on the diagonal, and of all columns left of it."""
    return max(NARROWEST, ceil(n / BANDS))


def _edges(n: int) -> list[tuple[int, int]]:
    """Return the first row of every band, and the row after its last."""
    height = _band_height(n)
    return [(start, min(start + height, n)) for start in range(0, n, height)]


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
    edges, count = _edges(n), packed.shape[0]
    parts = torch.split_with_sizes(packed, [(end - start) * end for start, end in edges], 1)
    for (start, end), part in zip(edges, parts, strict=True):
        yield start, end, part.view(count, end - start, end)


def _looks_up(tensor: Tensor, n: int) -> bool:
    """Whether entries are taken by a table of places; a compiled graph computes places as it goes.

    Tables stay for later calls, so none is made of tensors without numbers.
    """
    return n <= LOOKED_UP and type(tensor) is Tensor and not torch.compiler.is_compiling()


def _places_of_entries(n: int, device: torch.device) -> Tensor:
    """Return the place in the packed form of every entry of an ``n x n`` matrix, ``[n, n]``."""
    height = _band_height(n)
    numbers = torch.arange(n, device=device)
    rows, columns = numbers[:, None], numbers[None, :]
    # An entry right of its row's tile is kept as its mirror image.
    kept = columns // height <= rows // height
    rows, columns = torch.where(kept, rows, columns), torch.where(kept, columns, rows)
    band = rows // height
    start = band * height
    # Bands above have 1, 2, ... tiles; only the last may have fewer rows.
    above = height**2 * (band * (band + 1) // 2)
    return above + (rows - start) * (start + height).clamp(max=n) + columns


@cache
def _places(n: int, device: torch.device) -> Tensor:
    """Return these places row by row, as a table that stays."""
    with torch.inference_mode(False):
        return _places_of_entries(n, device).flatten().to(torch.int32)


@cache
def _kept_places(n: int, device: torch.device) -> Tensor:
    """Return the place in an ``n x n`` matrix, row by row, of every number of the packed form."""
    with torch.inference_mode(False):
        numbers = torch.arange(n * n, dtype=torch.int32, device=device)
        return _pack_bands(numbers.view(1, n, n)).flatten()


@cache
def _diagonal_places(n: int, device: torch.device) -> Tensor:
    """Return the place in the packed form of every entry of the diagonal."""
    with torch.inference_mode(False):
        return _places(n, device).view(n, n).diagonal().contiguous()


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return whole matrices, ``[K, n, n]``.

    Args:
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    if _looks_up(packed, n):
        return packed.index_select(1, _places(n, packed.device)).view(len(packed), n, n)
    if torch.compiler.is_compiling():
        # Copies of bands would be one condition each in the kernel, which takes minutes to compile.
        return packed[:, _places_of_entries(n, packed.device)]
    matrices = packed.new_empty(len(packed), n, n)
    for start, end, band in bands(packed, n):
        matrices[:, start:end, :end] = band
        # What is left of the tile is mirrored above it.
        matrices[:, :start, start:end] = band[:, :, :start].mT
    return matrices


def squared_lengths(rows: Tensor, packed: Tensor, n: int) -> Tensor:
    """Return ``tr(X A X^T)``, the sum over rows x of ``x A x^T``, for every matrix A, ``[K]``.

    Large matrices are not unpacked: what is kept is little more than half of the product.

    Args:
        rows: X, ``[K, m, n]``.
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    if _looks_up(packed, n) or torch.compiler.is_compiling():
        return (rows * (rows @ unpack(packed, n))).sum((1, 2))
    products = torch.zeros_like(rows)
    for start, end, band in bands(packed, n):
        columns = rows[:, :, start:end]
        # What is left of the tile stands for what is above it too, and so counts twice.
        if start:
            products[:, :, :start].baddbmm_(columns, band[:, :, :start], alpha=2)
        products[:, :, start:end].baddbmm_(columns, band[:, :, start:])
    return (rows * products).sum((1, 2))


def pack(whole: Tensor) -> Tensor:
    """Return packed matrices, ``[K, packed_size(n)]``; what is above the diagonal tiles is left out.

    Args:
        whole: ``[K, n, n]``, symmetric.
    """
    n = whole.shape[-1]
    if _looks_up(whole, n):
        return whole.reshape(len(whole), n * n).index_select(1, _kept_places(n, whole.device))
    return _pack_bands(whole)


def _pack_bands(whole: Tensor) -> Tensor:
    n = whole.shape[-1]
    packed = whole.new_empty(len(whole), packed_size(n))
    for start, end, band in bands(packed, n):
        band.copy_(whole[:, start:end, :end])
    return packed


def blend(packed: Tensor, whole: Tensor, weight: Tensor) -> None:
    """Move packed matrices towards others, ``packed <- packed + weight (whole - packed)``, in place.

    Args:
        packed: ``[K, packed_size(n)]``.
        whole: ``[K, n, n]``, symmetric; anything, NaN too, where the weight is 0.
        weight: ``[K]``.
    """
    n = whole.shape[-1]
    # A weight of 0 leaves all as it is but for NaN and infinity; to mask them takes twice as long.
    if _looks_up(whole, n):
        packed.lerp_(pack(whole).nan_to_num_(0.0, 0.0, 0.0), weight[:, None])
        return
    for start, end, band in bands(packed, n):
        band.lerp_(whole[:, start:end, :end].nan_to_num(0.0, 0.0, 0.0), weight[:, None, None])


def packed_diagonal(packed: Tensor, n: int) -> Tensor:
    """Return the diagonals, ``[K, n]``.

    Args:
        packed: ``[K, packed_size(n)]``.
        n: Size of the matrices.
    """
    if _looks_up(packed, n):
        return packed.index_select(1, _diagonal_places(n, packed.device))
    parts = [band[:, :, start:].diagonal(dim1=-2, dim2=-1) for start, _, band in bands(packed, n)]
    return torch.cat(parts, 1)


def add_gram(packed: Tensor, rows: Tensor, fresh: float) -> None:
    """Add ``fresh * rows rows^T`` to packed matrices, in place.

    Of large matrices only what is kept is computed, little more than half of the product.

    Args:
        packed: ``[K, packed_size(n)]``.
        rows: ``[K, n, m]``.
        fresh: Factor on the product.
    """
    n = rows.shape[1]
    if _looks_up(rows, n) and len(rows) * n * n <= FEW:
        packed.add_(pack(rows @ rows.mT), alpha=fresh)
        return
    if n > TILED:
        for start, end, band in bands(packed, n):
            band.baddbmm_(rows[:, start:end], rows[:, :end].mT, alpha=fresh)
        return
    product, first, last = rows, 0, 0
    for start, end, band in bands(packed, n):
        if start == last:  # behind the last product
            first, last = start, min(start + TILE, n)
            product = rows[:, first:last] @ rows[:, :last].mT
        band.add_(product[:, start - first : end - first, :end], alpha=fresh)
