"""Sizes at another width: one solution of all terms, for base shapes and for resized models alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mupass._dims.infer import Inference
from mupass._dims.space import Members

COMBINE: dict[str, Callable[[list[Any]], Any]] = {"product": math.prod, "groups": math.prod, "sum": sum}


@dataclass(frozen=True)
class Scaled:
    """Another size of every dimension: given, or fixed, or made of other dimensions, or scaled by one factor.

    Attributes:
        solved: The inference.
        given: Representative -> size, for dimensions that are settled beforehand.
        factor: Factor on every other growing dimension.
    """

    solved: Inference
    given: Mapping[int, float]
    factor: float
    _cache: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    def exact(self, dim: int) -> float:
        """Return the size of a dimension at the other width; not always a whole number.

        Args:
            dim: Handle.
        """
        root = self.solved.engine.space.find(dim)
        if root not in self._cache:
            self._cache[root] = self.factor * self.solved.engine.space.size(dim)  # ends circular terms
            self._cache[root] = self._computed(root)
        return self._cache[root]

    def _computed(self, root: int) -> float:
        space, grows = self.solved.engine.space, self.solved.verdicts.grows
        size = space.size(root)
        if root in self.given:  # the caller's word
            return self.given[root]
        if not grows(root):
            return size
        remainder = self.solved.remainders.get(root)
        if remainder is not None:  # d - 3, beside 3 coordinates
            rest = self.exact(remainder.width) - sum(map(self.exact, remainder.fixed))
            return rest if rest > 0 else size * self.factor
        # What is made of others follows from them: d_model = heads x head_dim.
        for kind in ("product", "sum"):
            for members in self.terms(root, kind):
                if self._leaves_remainder(root, members):
                    continue
                if any(grows(member) or member in self.given for member in members):
                    return float(COMBINE[kind]([self.exact(member) for member in members]))
        source = self._sources.get(root)
        if source is None:
            return size * self.factor
        source_size, other_size = space.size(source), self.exact(source)
        if size % source_size == 0 or source_size % size == 0:  # pooled: by ratio
            return size * other_size / source_size
        return size + other_size - source_size  # padded: by difference

    def _leaves_remainder(self, root: int, members: Members) -> bool:
        """Whether a member follows from the whole, and so the whole not from its members."""
        remainders = [self.solved.remainders[dim] for dim in members if dim in self.solved.remainders]
        return any(self.solved.engine.space.find(remainder.width) == root for remainder in remainders)

    @cached_property
    def _sources(self) -> dict[int, int]:
        """Derived dimension -> what it was first derived from."""
        space = self.solved.engine.space
        sources: dict[int, int] = {}
        for derived, source in space.derived:
            if space.find(derived) != space.find(source):
                sources.setdefault(space.find(derived), source)
        return sources

    def terms(self, root: int, kind: str) -> list[Members]:
        """Return what a dimension is made of; what slices leave uncovered makes nothing.

        Args:
            root: Handle.
            kind: ``product``, ``groups`` or ``sum``.
        """
        space = self.solved.engine.space
        rests = space.find_all(space.rests)
        return [members for members in space.terms_of(root, kind) if rests.isdisjoint(members)]
