"""Fused parameters: one tensor that holds several matrices (qkv, gate and up, LSTM gates, experts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mupass._dims.infer import Inference
from mupass._dims.space import Members
from mupass._records import Fusion

LIMIT = 64  # more pieces than this are positions or entries, not matrices


@dataclass(frozen=True)
class _Finder:
    """Looks for the enumerated factor, or the concatenation, inside a dimension term."""

    solved: Inference
    enumerated: frozenset[int]
    contracted: frozenset[int]

    def find(self, dim: int) -> tuple[tuple[int, ...], int, tuple[int, ...]] | None:
        """Return (view, along, sizes) of a fusion of this dimension, or None."""
        space = self.solved.engine.space
        if space.find(dim) in self.enumerated and 1 < space.size(dim) <= LIMIT:
            return (space.size(dim),), 0, (1,) * space.size(dim)
        for members in space.terms_of(dim, "product"):
            found = self._in_product(members)
            if found:
                return found
        verdict = self.solved.verdicts.get(dim)
        open_ended = verdict is not None and (verdict.infinite or verdict.policy)
        for members in space.terms_of(dim, "sum"):  # a head_dim that attention contracts whole is one matrix
            if open_ended and space.find(dim) not in self.contracted and len(members) <= LIMIT:
                return (space.size(dim),), 0, tuple(space.size(m) for m in members)
        return None

    def _in_product(self, members: Members) -> tuple[tuple[int, ...], int, tuple[int, ...]] | None:
        space = self.solved.engine.space
        for at, member in enumerate(members):
            inner = self.find(member)
            if inner:
                view, along, sizes = inner
                before = tuple(space.size(m) for m in members[:at])
                after = tuple(space.size(m) for m in members[at + 1 :])
                return (*before, *view, *after), len(before) + along, sizes
        return None


def find_fusions(solved: Inference, parameter: str, axes: Sequence[int]) -> tuple[Fusion, ...]:
    """Find out which of a parameter's output axes hold several matrices.

    Args:
        solved: The inference.
        parameter: Name of the parameter.
        axes: Its fan_out axes.

    Returns:
        One record for each fused axis.
    """
    space = solved.engine.space
    facts = solved.engine.facts
    enumerated = frozenset(space.find(d) for d in facts.enumerated)
    finder = _Finder(solved, enumerated, frozenset(space.find(d) for b in facts.bilinear for d in b.inner))
    competing = {space.find(d) for d in facts.alternatives}
    found = []
    for axis in axes:
        dim = solved.dims[parameter][axis]
        fusion = finder.find(dim)
        size, verdict = space.size(dim), solved.verdicts.get(dim)
        apart = space.find(dim) in competing and verdict is not None and not verdict.infinite
        if fusion:
            found.append(Fusion(axis, *fusion))
        elif apart and len(axes) > 1 and 1 < size <= LIMIT:  # experts that all read one activation
            found.append(Fusion(axis, (size,), 0, (1,) * size))
    return tuple(found)


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
        pieces = [part for piece in pieces for part in _split_axis(piece, fusion)]
    return pieces


def join(pieces: Sequence[Tensor], fusions: Sequence[Fusion]) -> Tensor:
    """Put the pieces of `split` together again.

    Args:
        pieces: Tensors of the shapes that `split` gives.
        fusions: The same records.

    Returns:
        A tensor of the fused shape.
    """
    for fusion in reversed(fusions):
        count = len(fusion.sizes)
        pieces = [_join_axis(pieces[i : i + count], fusion) for i in range(0, len(pieces), count)]
    return pieces[0]


def _split_axis(tensor: Tensor, fusion: Fusion) -> list[Tensor]:
    opened = tensor.reshape(_opened(tensor, fusion, fusion.view))
    parts = torch.split(opened, list(fusion.sizes), fusion.axis + fusion.along)
    last = fusion.axis + len(fusion.view) - 1
    return [p.flatten(fusion.axis, last) for p in parts]


def _join_axis(pieces: Sequence[Tensor], fusion: Fusion) -> Tensor:
    opened = []
    for piece, size in zip(pieces, fusion.sizes, strict=True):
        view = (*fusion.view[: fusion.along], size, *fusion.view[fusion.along + 1 :])
        opened.append(piece.reshape(_opened(piece, fusion, view)))
    return torch.cat(opened, fusion.axis + fusion.along).flatten(
        fusion.axis, fusion.axis + len(fusion.view) - 1
    )


def _opened(tensor: Tensor, fusion: Fusion, view: tuple[int, ...]) -> tuple[int, ...]:
    return (*tensor.shape[: fusion.axis], *view, *tensor.shape[fusion.axis + 1 :])
