"""Fused parameters: one tensor that holds several matrices (qkv, gate and up, LSTM gates, experts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mupass._dims.infer import Inference
from mupass._dims.space import Members
from mupass._records import Fusion, Shape
from mupass._roles.nodes import inner_dims

LIMIT = 64  # more pieces than this are positions or entries, not matrices
# What makes an axis a fused one: sizes that it splits into, which of them counts the matrices, the length of
# every matrix along it; and for the sizes and the lengths, which of them grow.
Split = tuple[Shape, int, Shape, tuple[bool, ...], tuple[bool, ...]]


@dataclass(frozen=True)
class _Finder:
    """Looks for the enumerated factor, or the concatenation, inside a dimension term."""

    solved: Inference
    enumerated: frozenset[int]
    contracted: frozenset[int]

    def find(self, dim: int) -> Split | None:
        """Return how a dimension is fused, or None."""
        space = self.solved.engine.space
        size = space.size(dim)
        # w.view(3, heads, -1).unbind(0): an axis whose positions are told apart.
        if space.find(dim) in self.enumerated and 1 < size <= LIMIT:
            return _stack(size)
        # The same inside of a larger axis, that of F.linear(x, w).view(batch, 3, width).unbind(1).
        for members in space.terms_of(dim, "product"):
            inner_split = self._in_product(members)
            if inner_split:
                return inner_split
        verdict = self.solved.verdicts.get(dim)
        open_ended = verdict is not None and (verdict.infinite or verdict.policy)
        # A head_dim that attention contracts whole is one matrix.
        if not open_ended or space.find(dim) in self.contracted:
            return None
        # F.linear(x, w).split([width, width, 2 * width], -1)
        for parts in space.terms_of(dim, "sum"):
            if len(parts) <= LIMIT:
                grows = (self.solved.verdicts.grows(dim),)
                return (size,), 0, tuple(map(space.size, parts)), grows, self._which_grow(parts)
        return None

    def _which_grow(self, parts: Members) -> tuple[bool, ...]:
        """Return which parts grow; nothing where one grows in a part of its own only."""
        space, grows = self.solved.engine.space, self.solved.verdicts.grows
        for part in filter(grows, parts):
            for members in space.terms_of(part, "sum"):
                if not all(map(grows, members)):
                    return ()
        return tuple(map(grows, parts))

    def _in_product(self, members: Members) -> Split | None:
        sizes = tuple(map(self.solved.engine.space.size, members))
        grows_around = tuple(map(self.solved.verdicts.grows, members))
        for position, member in enumerate(members):
            # A dimension inside of a product, heads in heads * 3 * width: sizes around it frame the split.
            inner_split = self.find(member)
            if inner_split:
                view, along, lengths, grows, part_grows = inner_split
                view = (*sizes[:position], *view, *sizes[position + 1 :])
                grows = (*grows_around[:position], *grows, *grows_around[position + 1 :])
                return view, position + along, lengths, grows, part_grows
        return None


def _stack(count: int) -> Split:
    """Return the split of an axis that counts matrices."""
    return (count,), 0, (1,) * count, (False,), (False,) * count


def find_fusions(solved: Inference, parameter: str, axes: Sequence[int]) -> tuple[Fusion, ...]:
    """Find out which of a parameter's output axes hold several matrices.

    Args:
        solved: The inference.
        parameter: Name of the parameter.
        axes: Its fan_out axes.

    Returns:
        One record for each fused axis.
    """
    space, facts = solved.engine.space, solved.engine.facts
    enumerated = frozenset(space.find_all(facts.enumerated))
    finder = _Finder(solved, enumerated, inner_dims(solved))
    alternatives = space.find_all(facts.alternatives)
    fusions = []
    for axis in axes:
        dim = solved.dims[parameter][axis]
        fusion_split = finder.find(dim)
        if fusion_split:
            fusions.append(Fusion(axis, *fusion_split))
            continue
        size, verdict = space.size(dim), solved.verdicts.get(dim)
        # einsum("bi,eio->beo", x, w): experts that all read one activation, of which a gate picks some.
        alternative = space.find(dim) in alternatives and verdict is not None and not verdict.infinite
        if alternative and len(axes) > 1 and 1 < size <= LIMIT:
            fusions.append(Fusion(axis, *_stack(size)))
    return tuple(fusions)


def split(tensor: Tensor, fusions: Sequence[Fusion]) -> list[Tensor]:
    """Split a parameter (or its gradient) into its matrices.

    Args:
        tensor: The fused tensor.
        fusions: Records of `Geometry.fusions`, applied one after the other.

    Returns:
        The pieces, views where strides allow; each keeps the tensor's axes, the fused one shorter.
    """
    pieces = [tensor]
    for fusion in fusions:
        # Each record cuts all pieces that the ones before it have made.
        finer: list[Tensor] = []
        for piece in pieces:
            finer += _split_axis(piece, fusion)
        pieces = finer
    return pieces


def join(pieces: Sequence[Tensor], fusions: Sequence[Fusion]) -> Tensor:
    """Put the pieces of `split` together again.

    Args:
        pieces: Tensors of the shapes that `split` gives.
        fusions: The same records.

    Returns:
        A tensor of the fused shape.
    """
    # Backwards, since the last record cut finest.
    for fusion in reversed(fusions):
        count = len(fusion.sizes)
        starts = range(0, len(pieces), count)
        pieces = [_join_axis(pieces[start : start + count], fusion) for start in starts]
    return pieces[0]


def _split_axis(tensor: Tensor, fusion: Fusion) -> list[Tensor]:
    # [3 * width, n] -> [3, width, n] -> three of [1, width, n] -> three of [width, n]
    opened = tensor.reshape(_opened(tensor, fusion, fusion.view))
    parts = torch.split(opened, list(fusion.sizes), fusion.axis + fusion.along)
    return [part.flatten(fusion.axis, _last(fusion)) for part in parts]


def _join_axis(pieces: Sequence[Tensor], fusion: Fusion) -> Tensor:
    opened = []
    for piece, size in zip(pieces, fusion.sizes, strict=True):
        view = (*fusion.view[: fusion.along], size, *fusion.view[fusion.along + 1 :])
        opened.append(piece.reshape(_opened(piece, fusion, view)))
    return torch.cat(opened, fusion.axis + fusion.along).flatten(fusion.axis, _last(fusion))


def _last(fusion: Fusion) -> int:
    """Return the last of the axes that a fused axis splits into."""
    return fusion.axis + len(fusion.view) - 1


def _opened(tensor: Tensor, fusion: Fusion, view: Shape) -> Shape:
    """Return the shape of a tensor with its fused axis split into several."""
    return (*tensor.shape[: fusion.axis], *view, *tensor.shape[fusion.axis + 1 :])
