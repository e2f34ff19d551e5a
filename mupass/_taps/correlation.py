"""Input factors of convolutions from correlations of the input, without forming patches.

``A[(c, k), (c', k')]`` sums ``x[c, i] x[c', i + d]`` over the positions i that tap k meets, where d is the
distance from tap k to tap k'. At stride 1, pairs of taps at equal distance sum the same products and differ
at the borders only. So along each axis positions are cut where one of the pairs starts or stops to meet the
input, every piece is multiplied once, and each pair adds up its pieces. A 3 x 3 kernel takes about a fifth of
the arithmetic of ``x^T x`` over patches (itself done by halves), and a ninth of the memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One position axis of a convolution of stride 1.

    Attributes:
        size: Number of input positions.
        kernel: Number of taps.
        dilation: Step between taps.
        before: Zeros put before the input.
        after: Zeros put behind it.
    """

    size: int
    kernel: int
    dilation: int
    before: int
    after: int

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return self.size + self.before + self.after - self.dilation * (self.kernel - 1)


@dataclass(frozen=True)
class Piece:
    """A range of positions along one axis; their products with those at a distance are in the same sums.

    Attributes:
        start: The first position.
        length: Number of positions.
        distance: From a position to its partner.
        pairs: The pairs of taps whose sums have these products.
    """

    start: int
    length: int
    distance: int
    pairs: tuple[tuple[int, int], ...]


def pieces(axis: Axis) -> list[Piece]:
    """Cut an axis where a pair of taps starts or stops to meet the input; products with padding are zero.

    Args:
        axis: The axis.
    """
    windows: dict[int, list[tuple[int, int, tuple[int, int]]]] = defaultdict(list)
    for one, other in product(range(axis.kernel), range(axis.kernel)):
        first, distance = axis.dilation * one - axis.before, axis.dilation * (other - one)
        start, stop = max(first, 0, -distance), min(first + axis.outputs, axis.size, axis.size - distance)
        if start < stop:
            windows[distance].append((start, stop, (one, other)))
    found = []
    for distance, alike in windows.items():
        cuts = sorted({cut for start, stop, _ in alike for cut in (start, stop)})
        for start, stop in pairwise(cuts):
            pairs = tuple(pair for first, end, pair in alike if first <= start and stop <= end)
            if pairs:
                found.append(Piece(start, stop - start, distance, pairs))
    return found


def _boxes(
    left: Tensor, right: Tensor, cuts: Sequence[Sequence[Piece]], box: tuple[Piece, ...] = ()
) -> Iterator[tuple[tuple[Piece, ...], Tensor, Tensor]]:
    """Yield pieces of all axes together, and both sides cut to them; of opposite distances only one.

    The last axis is cut first: what is left to be cut then lies in one run of memory.
    """
    if len(box) == len(cuts):
        yield box, left, right
        return
    at = len(cuts) - len(box)  # axis 0 counts groups
    ahead = any(piece.distance for piece in box)
    for piece in cuts[at - 1]:
        if ahead or piece.distance >= 0:
            here = left.narrow(at, piece.start, piece.length)
            there = right.narrow(at, piece.start + piece.distance, piece.length)
            if at > 1:
                here, there = here.contiguous(), there.contiguous()
            yield from _boxes(here, there, cuts, (piece, *box))


@torch.library.custom_op("mupass::patch_gram", mutates_args=())
def patch_gram(x: Tensor, kernel: list[int], dilation: list[int], padding: list[int]) -> Tensor:
    """Return ``sum p p^T`` over all patches p of a convolution of stride 1, padded with zeros.

    One operator, so that graphs stay small.

    Args:
        x: ``[groups, channels, batch, *positions]``, not padded.
        kernel: Kernel sizes.
        dilation: Dilations.
        padding: Zeros before and after each axis, last axis first, as `F.pad` takes them.

    Returns:
        ``[groups, channels * taps, channels * taps]``.
    """
    (groups, channels), sizes = x.shape[:2], x.shape[3:]
    ends = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
    axes = [Axis(n, k, gap, *end) for n, k, gap, end in zip(sizes, kernel, dilation, ends, strict=True)]
    x = x.movedim((2, 1), (-2, -1)).contiguous()  # [groups, *positions, batch, channels]
    taps = list(product(*map(range, kernel)))
    zero = x.new_zeros(groups, channels, channels)
    sums = {pair: zero for pair in product(taps, repeat=2)}
    for box, left, right in _boxes(x, x, [pieces(axis) for axis in axes]):
        block = left.reshape(groups, -1, channels).mT @ right.reshape(groups, -1, channels)
        ahead = any(piece.distance for piece in box)
        for pairs in product(*(piece.pairs for piece in box)):
            one, other = zip(*pairs, strict=True)
            sums[one, other] = block if sums[one, other] is zero else sums[one, other] + block
            if ahead:
                sums[other, one] = sums[one, other].mT
    whole = torch.stack(list(sums.values())).unflatten(0, (len(taps), -1))  # type: ignore[no-untyped-call]
    return whole.permute(2, 3, 0, 4, 1).flatten(3).flatten(1, 2)


@patch_gram.register_fake
def _(x: Tensor, kernel: list[int], dilation: list[int], padding: list[int]) -> Tensor:
    side = x.shape[1] * prod(kernel)
    return x.new_empty(x.shape[0], side, side)
