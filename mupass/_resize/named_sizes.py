"""Sizes that a caller gives by name, and those that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mupass._dims.infer import Inference
from mupass._dims.names import DimNames
from mupass._errors import ResizeError

Implied = tuple[int, int]  # dimension, size


def checked_size(name: str, size: object) -> int:
    """Return a size that is a positive whole number.

    Args:
        name: What it is the size of, for the error.
        size: The size.

    Raises:
        ResizeError: It is something else.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ResizeError(f"{name} must be a positive whole number, not {size!r}")
    return size


def named_sizes(solved: Inference, names: DimNames, width: Mapping[str, int]) -> dict[int, int]:
    """Return the sizes given by name, and those of products that they determine.

    Args:
        solved: The inference.
        names: Names of dimensions.
        width: Sizes by name.

    Raises:
        ResizeError: An unknown name, no whole number, or what follows would be none.
    """
    new_sizes: dict[int, int] = {}
    for name, size in width.items():
        dims = names.find(name)
        if not dims:
            raise ResizeError(f"no dimension {name!r}; known are {sorted(names.all())}")
        new_sizes.update(dict.fromkeys(dims, checked_size(name, size)))
    if not new_sizes:
        raise ResizeError("width names no dimension")
    size_of = solved.engine.space.size
    rules = _Consequences(solved, names, new_sizes)
    # One size at a time, since each may determine others.
    while implied := rules.next():
        dim, size = implied
        new_sizes[dim] = size
        # The head_dim of queries is no other than that of values.
        for twin in names.find(names.of(dim) or ""):
            if twin not in new_sizes and size_of(twin) == size_of(dim):
                new_sizes[twin] = size
    return new_sizes


class _Consequences:
    """What follows from sizes that are given: of products, of their factors, and of equal parts.

    Args:
        solved: The inference.
        names: Names of dimensions.
        given: Sizes known so far, to which the caller adds.
    """

    def __init__(self, solved: Inference, names: DimNames, given: Mapping[int, int]) -> None:
        self.solved, self.names, self.given = solved, names, given
        self.space = solved.engine.space

    def next(self) -> Implied | None:
        """Return one more size that follows from those given, or None.

        Raises:
            ResizeError: The last factor or the parts would not be whole numbers.
        """
        for kind, rule in self._rules():
            for result, members in self.space.terms(kind):
                # One at a time: each new size may make another one follow.
                implied = rule(result, members)
                if implied is not None:
                    return implied
        return None

    def _rules(self) -> Sequence[tuple[str, Callable[[int, Sequence[int]], Implied | None]]]:
        return (("product", self._of_product), ("groups", self._of_groups), ("sum", self._of_sum))

    def _is_open(self, dim: int) -> bool:
        """Whether a size is neither given nor fixed."""
        verdict = self.solved.verdicts.get(dim)
        if dim in self.given or verdict is None:
            return False
        return verdict.infinite or verdict.policy

    def _of_product(self, whole: int, members: Sequence[int]) -> Implied | None:
        """Whole = factor * factor: the whole from all its factors, or the last factor from the rest."""
        # A whole that grows says nothing of a factor that may be fixed, unless another factor is given.
        determined = self._any_given(members) or not self.solved.verdicts.grows(whole)
        return self._of_factors(whole, members, determined)

    def _of_groups(self, whole: int, members: Sequence[int]) -> Implied | None:
        """Whole = groups * members of a group, of a grouped convolution: the same, and always told."""
        return self._of_factors(whole, members, True)

    def _of_factors(self, whole: int, members: Sequence[int], told: bool) -> Implied | None:
        open_factors = [factor for factor in members if self._is_open(factor)]
        # Fixed factors keep their size, given ones have their new one.
        sizes = [
            self.given.get(factor, self.space.size(factor))
            for factor in members
            if factor not in open_factors
        ]
        product = math.prod(sizes)
        # All factors are known: so is the whole.
        if whole not in self.given and not open_factors and self._any_given(members):
            return whole, product
        # The whole and all but one factor are known: so is that factor.
        if whole not in self.given or len(open_factors) != 1:
            return None
        last = open_factors[0]
        if not told and not self.solved.verdicts.grows(last):
            return None
        size = self.given[whole]
        if size % product:
            raise ResizeError(
                f"{self.names.term(whole)} = {size} is not divisible by {product}, so there is no "
                f"whole {self.names.of(last) or 'factor'}"
            )
        return last, size // product

    def _of_sum(self, whole: int, members: Sequence[int]) -> Implied | None:
        """Whole = part + part: parts that are equal now stay equal."""
        sizes = {self.space.size(part) for part in members}
        # Parts that a slice leaves over have no size of their own to keep.
        equal = len(sizes) == 1 and not self.space.rests & set(members)
        if whole not in self.given or not equal or not all(map(self._is_open, members)):
            return None
        size, count = self.given[whole], len(members)
        if size % count:
            raise ResizeError(f"{self.names.term(whole)} = {size} is cut into {count} equal parts")
        return members[0], size // count

    def _any_given(self, members: Sequence[int]) -> bool:
        return any(member in self.given for member in members)
