"""New sizes of a model's dimensions, from one width, one factor, or sizes by name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mupass._errors import MupassError
from mupass._infer import Inference
from mupass._names import DimNames


class ResizeError(MupassError):
    """The model cannot be built at the width asked for; the message names the dimensions."""


@dataclass(frozen=True)
class NewSizes:
    """New size of every dimension.

    Attributes:
        solved: The inference.
        names: Names of dimensions.
        given: Representative -> factor that the caller fixed.
        factor: Factor on every other growing dimension.
    """

    solved: Inference
    names: DimNames
    given: Mapping[int, float]
    factor: float

    @staticmethod
    def of(
        solved: Inference, names: DimNames, width: int | Mapping[str, int] | None, scale: float | None
    ) -> NewSizes:
        """Read the caller's wish.

        Args:
            solved: The inference.
            names: Names of dimensions.
            width: New width, or sizes by name.
            scale: Factor instead.

        Raises:
            ResizeError: Neither or both are given, or a name is unknown.
        """
        if (width is None) == (scale is None):
            raise ResizeError("give either width= or scale=")
        if scale is not None:
            if not math.isfinite(scale) or scale <= 0:
                raise ResizeError(f"scale must be positive, not {scale!r}")
            return NewSizes(solved, names, {}, scale)
        if not isinstance(width, Mapping):
            return NewSizes(solved, names, {}, width / model_width(solved))  # type: ignore[operator]
        given: dict[int, float] = {}
        for name, size in width.items():
            found = names.find(name)
            if not found:
                raise ResizeError(f"no dimension {name!r}; known are {sorted(names.all())}")
            given.update({d: size / solved.engine.space.size(d) for d in found})
        factors = set(given.values())
        if len(factors) > 1:
            open_ = sorted({n for d, n in names.table.items() if d not in given and grows(solved, d)})
            if open_:
                raise ResizeError(f"the sizes given differ in ratio, so name these too: {open_}")
        return NewSizes(solved, names, given, factors.pop())

    def of_dim(self, dim: int) -> int:
        """Return the new size of a dimension.

        Args:
            dim: Handle.

        Raises:
            ResizeError: It would not be a whole number.
        """
        exact = self._exact(dim)
        size = round(exact)
        if abs(size - exact) > 1e-6 or size < min(1, self.solved.engine.space.size(dim)):
            raise ResizeError(
                f"dimension {self.names.term(dim)} of size {self.solved.engine.space.size(dim)} "
                f"would become {exact:g}"
            )
        return size

    def _exact(self, dim: int) -> float:
        space = self.solved.engine.space
        root, size = space.find(dim), space.size(dim)
        if root in self.given:
            return size * self.given[root]
        if not grows(self.solved, dim):
            return size
        for kind, combine in (("product", math.prod), ("sum", sum)):
            for members in space.terms_of(root, kind):
                if any(grows(self.solved, m) for m in members):
                    return float(combine([self.of_dim(m) for m in members]))
        return size * self.factor


def model_width(solved: Inference) -> int:
    """Return the size of the growing dimension that most parameter axes carry (ties: the widest)."""
    space = solved.engine.space
    carried: dict[int, int] = defaultdict(int)
    for dims in solved.dims.values():
        for dim in {space.find(d) for d in dims if grows(solved, d)}:
            carried[dim] += 1
    return max((count, space.size(dim)) for dim, count in carried.items())[1]


def grows(solved: Inference, dim: int) -> bool:
    verdict = solved.verdicts.get(dim)
    return verdict is not None and verdict.infinite
