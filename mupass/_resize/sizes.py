"""New sizes of a model's dimensions, from one width, one factor, or sizes by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mupass._dims.infer import Inference
from mupass._dims.names import DimNames
from mupass._dims.scaled import COMBINE, Scaled
from mupass._dims.space import Members
from mupass._errors import ResizeError
from mupass._resize.named_sizes import checked_size, named_sizes


@dataclass(frozen=True)
class NewSizes:
    """New size of every dimension: given, or fixed, or made of other dimensions, or scaled by one factor.

    Attributes:
        solved: The inference.
        names: Names of dimensions.
        given: Representative -> new size, for dimensions that the caller named and what follows from these.
        factor: Factor on every other growing dimension.
    """

    solved: Inference
    names: DimNames
    given: Mapping[int, int]
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
            ResizeError: Neither or both are given, a name is unknown, or the sizes contradict each other.
        """
        if (width is None) == (scale is None):
            raise ResizeError("give either width= or scale=")
        present = model_width(solved)
        if isinstance(width, Mapping):
            new_sizes = named_sizes(solved, names, width)
            sizes = NewSizes(solved, names, new_sizes, _common_factor(solved, names, new_sizes))
        elif width is not None:
            # One width: every growing dimension is scaled by its ratio.
            sizes = NewSizes(
                solved, names, {}, checked_size("width", width) / solved.engine.space.size(present)
            )
        elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ResizeError(f"scale must be a positive number, not {scale!r}")
        else:
            sizes = NewSizes(solved, names, {}, scale)
        sizes.check()
        return sizes

    @property
    def changes(self) -> bool:
        """Whether any dimension gets another size."""
        space = self.solved.engine.space
        return self.factor != 1 or any(size != space.size(dim) for dim, size in self.given.items())

    def of_dim(self, dim: int) -> int:
        """Return the new size of a dimension.

        Args:
            dim: Handle.

        Raises:
            ResizeError: It would not be a whole number.
        """
        return self._whole(dim, self.exact(dim))

    def _whole(self, dim: int, exact: float) -> int:
        size = round(exact)
        # A size may not vanish, unless it was zero.
        if abs(size - exact) > 1e-6 or size < min(1, self.solved.engine.space.size(dim)):
            raise ResizeError(
                f"dimension {self.names.term(dim)} of size {self.solved.engine.space.size(dim)} "
                f"would become {exact:g}, which is no whole number; give it a size by its name, or ask for "
                "another width"
            )
        return size

    def maybe(self, dim: int) -> int | None:
        """Return the new size of a dimension, or None where it would be no whole number.

        Args:
            dim: Handle.
        """
        exact = self.exact(dim)
        return round(exact) if abs(round(exact) - exact) <= 1e-6 else None

    def predicted(self, dim: int) -> int | None:
        """Return the size that an operator's result must have; None where nothing certain is known of it.

        Args:
            dim: Handle.
        """
        return None if self.solved.engine.space.find(dim) in self._unpredicted else self.maybe(dim)

    def of_axis(self, parameter: str, axis: int) -> int:
        """Return the new size of a parameter's axis, also where the forward pass never reads it.

        Args:
            parameter: Its name.
            axis: The axis.
        """
        dim = self.solved.dims[parameter][axis]
        # A parameter that nothing reads has the size of those that are read, whatever was given by name.
        if parameter in self.solved.overlooked and self.solved.verdict(parameter, axis).infinite:
            return NewSizes(self.solved, self.names, {}, self.factor)._as_its_equals(dim)
        return self.of_dim(dim)

    def _as_its_equals(self, dim: int) -> int:
        """Return the new size of a dimension that nothing reads: that of one of its size that grows."""
        space = self.solved.engine.space
        for dims in self.solved.dims.values():
            for twin in dims:
                if space.size(twin) == space.size(dim) and self.solved.verdicts.grows(twin):
                    return self.of_dim(twin)
        return self._whole(dim, self.factor * space.size(dim))

    @cached_property
    def _carried(self) -> frozenset[int]:
        """Dimensions of parameters; those without a verdict are fixed: no weight is contracted along them."""
        space = self.solved.engine.space
        carried: set[int] = set()
        for dims in self.solved.dims.values():
            carried.update(map(space.find, dims))
        return frozenset(carried)

    @cached_property
    def _unpredicted(self) -> frozenset[int]:
        """Factors of a growing product of which one has no verdict, and what only values tell the size of.

        Any of the former may be the one that grows.
        """
        verdicts, space = self.solved.verdicts, self.solved.engine.space
        contested: set[int] = set()
        for product, factors in space.terms("product"):
            if verdicts.grows(product) and any(map(verdicts.is_open, factors)):
                contested.update(factors)
        contested |= space.find_all(self.solved.engine.facts.counted)
        return frozenset(contested) - self._carried

    def exact(self, dim: int) -> float:
        """Return the new size of a dimension before it is asked to be a whole number.

        Args:
            dim: Handle.
        """
        return self._scaled.exact(dim)

    def terms(self, root: int, kind: str) -> list[Members]:
        """Return what a dimension is made of.

        Args:
            root: Handle.
            kind: ``product`` or ``sum``.
        """
        return self._scaled.terms(root, kind)

    @cached_property
    def _scaled(self) -> Scaled:
        return Scaled(self.solved, self.given, self.factor)

    def check(self) -> None:
        """Compare every product and sum of dimensions that parameters carry with its members.

        Raises:
            ResizeError: They differ, or a dimension would not be a whole number.
        """
        for kind, combine in COMBINE.items():
            # Terms that no parameter carries are checked by running the model.
            for result in self._carried:
                for members in self.terms(result, kind):
                    parts = [self.of_dim(member) for member in members]
                    if self.of_dim(result) != combine(parts):
                        sign = " + " if kind == "sum" else " * "
                        named = zip(members, parts, strict=True)
                        text = sign.join(f"{self.names.of(dim) or 'fixed'} = {size}" for dim, size in named)
                        raise ResizeError(
                            f"dimension {self.names.term(result)} would become {self.of_dim(result)}, "
                            f"but it is made of {text}"
                        )


def model_width(solved: Inference) -> int:
    """Return the growing dimension that most parameters carry (ties: the widest)."""
    space = solved.engine.space
    carried: Counter[int] = Counter()
    for dims in solved.dims.values():
        carried.update(set(map(space.find, dims)))  # once for a parameter, though two axes may have it
    grown = [dim for dim in carried if solved.verdicts.grows(dim)]
    if not grown:
        raise ResizeError(
            "no dimension of the model grows, so it has no width; name one: "
            "dims={'PARAMETER:AXIS': 'infinite'}"
        )
    return max(grown, key=lambda dim: (carried[dim], space.size(dim)))


def _common_factor(solved: Inference, names: DimNames, given: Mapping[int, int]) -> float:
    """Return the factor on what was not named: the width's own, where it is given.

    Raises:
        ResizeError: The sizes given differ in ratio, and the width is not among them.
    """
    space = solved.engine.space
    width = model_width(solved)
    exact_sizes = NewSizes(solved, names, given, math.nan).exact(width)  # nan wherever the factor is needed
    if not math.isnan(exact_sizes):
        return exact_sizes / space.size(width)
    factors = {size / space.size(dim) for dim, size in given.items()}
    if len(factors) > 1:
        missing = set()
        for dim, name in names.table.items():
            if dim not in given and solved.verdicts.grows(dim):
                missing.add(name)
        if missing:
            raise ResizeError(
                f"the sizes given differ in ratio, so name the width ({names.term(width)}) or these too: "
                f"{sorted(missing)}"
            )
    return factors.pop()
