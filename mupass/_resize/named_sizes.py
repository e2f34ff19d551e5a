"""Sizes that a caller gives by name, and those that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mupass._dims.infer import Inference
from mupass._dims.names import DimNames
from mupass._errors import ResizeError


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
    given: dict[int, int] = {}
    for name, size in width.items():
        found = names.find(name)
        if not found:
            raise ResizeError(f"no dimension {name!r}; known are {sorted(names.all())}")
        given.update(dict.fromkeys(found, checked_size(name, size)))
    if not given:
        raise ResizeError("width names no dimension")
    size_of = solved.engine.space.size
    while implied := dict(_implied(solved, names, given)):
        for dim, size in implied.items():  # the head_dim of queries is no other than that of values
            twins = names.find(names.of(dim) or "")
            given |= {t: size for t in (dim, *twins) if t not in given and size_of(t) == size_of(dim)}
    return given


def _implied(solved: Inference, names: DimNames, given: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Yield one size that follows from those given: a product of them, its last factor, or its equal parts.

    Raises:
        ResizeError: The last factor or the parts would not be whole numbers.
    """
    space = solved.engine.space

    def certain(dim: int) -> bool:
        verdict = solved.verdicts.get(dim)
        return dim in given or verdict is None or not (verdict.infinite or verdict.policy)

    for kind in ("product", "groups"):
        for whole, members in space.terms(kind):
            open_ = [m for m in members if not certain(m)]
            rest = math.prod(given.get(m, space.size(m)) for m in members if m not in open_)
            if whole not in given and not open_ and given.keys() & set(members):
                yield whole, rest
                return
            told = kind == "groups" or given.keys() & set(members) or not solved.verdicts.grows(whole)
            if whole in given and len(open_) == 1 and (told or solved.verdicts.grows(open_[0])):
                if given[whole] % rest:
                    raise ResizeError(
                        f"{names.term(whole)} = {given[whole]} is not divisible by {rest}, so there is no "
                        f"whole {names.of(open_[0]) or 'factor'}"
                    )
                yield open_[0], given[whole] // rest
                return
    for whole, members in space.terms("sum"):
        halves = len({space.size(m) for m in members}) == 1 and not space.rests & set(members)
        if whole in given and halves and not any(map(certain, members)):
            if given[whole] % len(members):
                raise ResizeError(
                    f"{names.term(whole)} = {given[whole]} is cut into {len(members)} equal parts"
                )
            yield members[0], given[whole] // len(members)
            return
