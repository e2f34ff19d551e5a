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
    # Distance -> for every pair of taps, the positions at which both meet the input, and the pair.
    windows: dict[int, list[tuple[int, int, tuple[int, int]]]] = defaultdict(list)
    for earlier, later in product(range(axis.kernel), repeat=2):
        # Where the earlier tap meets the input at output position 0, and how far from it the later one does.
        position = axis.dilation * earlier - axis.before
        distance = axis.dilation * (later - earlier)
        start = max(position, 0, -distance)
        stop = min(position + axis.outputs, axis.size, axis.size - distance)
        if start < stop:
            windows[distance].append((start, stop, (earlier, later)))
    cut_pieces = []
    for distance, window in windows.items():
        borders: set[int] = set()
        for start, stop, _ in window:
            borders |= {start, stop}
        # Between two borders no pair starts or stops: the same pairs sum all that lies there.
        for left, right in pairwise(sorted(borders)):
            pairs = tuple(pair for start, stop, pair in window if start <= left and right <= stop)
            if pairs:
                cut_pieces.append(Piece(left, right - left, distance, pairs))
    return cut_pieces


def _boxes(
    left: Tensor, right: Tensor, cuts: Sequence[Sequence[Piece]], box: tuple[Piece, ...] = ()
) -> Iterator[tuple[tuple[Piece, ...], Tensor, Tensor]]:
    """Yield pieces of all axes together, and both sides cut to them; of opposite distances only one.

    The last axis is cut first: what is left to be cut then lies in one run of memory.
    """
    if len(box) == len(cuts):
        yield box, left, right
        return
    current = len(cuts) - len(box)  # axis 0 counts groups
    # The sums at the opposite distances are transposes of these.
    forward = any(piece.distance for piece in box)
    for piece in cuts[current - 1]:
        if forward or piece.distance >= 0:
            narrowed = left.narrow(current, piece.start, piece.length)
            partner = right.narrow(current, piece.start + piece.distance, piece.length)
            if current > 1:
                narrowed, partner = narrowed.contiguous(), partner.contiguous()
            yield from _boxes(narrowed, partner, cuts, (piece, *box))


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
    paddings = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
    axis_pieces = []
    for size, taps, tap_distance, (before, after) in zip(sizes, kernel, dilation, paddings, strict=True):
        axis_pieces.append(pieces(Axis(size, taps, tap_distance, before, after)))
    inputs = x.movedim((2, 1), (-2, -1)).contiguous()  # [groups, *positions, batch, channels]
    offsets = list(product(*map(range, kernel)))
    zero = x.new_zeros(groups, channels, channels)
    blocks = {pair: zero for pair in product(offsets, repeat=2)}
    # One product for each box of pieces, which every pair of taps that meets there adds up.
    for box, left, right in _boxes(inputs, inputs, axis_pieces):
        summed = left.reshape(groups, -1, channels).mT @ right.reshape(groups, -1, channels)
        forward = any(piece.distance for piece in box)
        for pairs in product(*(piece.pairs for piece in box)):
            earlier, later = zip(*pairs, strict=True)
            block = blocks[earlier, later]
            # The first sum takes the place of the zeros: nothing is added to them.
            blocks[earlier, later] = summed if block is zero else block + summed
            if forward:
                blocks[later, earlier] = blocks[earlier, later].mT
    # [taps, taps, groups, channels, channels] -> [groups, channels * taps, channels * taps]
    stacked = torch.stack(list(blocks.values())).unflatten(0, (len(offsets), -1))  # type: ignore[no-untyped-call]
    return stacked.permute(2, 3, 0, 4, 1).flatten(3).flatten(1, 2)


@patch_gram.register_fake
def _(x: Tensor, kernel: list[int], dilation: list[int], padding: list[int]) -> Tensor:
    side = x.shape[1] * prod(kernel)
    return x.new_empty(x.shape[0], side, side)
