"""Verdicts on dimensions, and how they travel through products, sums and derivations.

A product is infinite exactly when a factor is, a sum when a part is, a derived dimension when its source is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mupass._dims.facts import Facts
from mupass._dims.space import Members, Space


@dataclass(frozen=True)
class Verdict:
    """What was decided for one class of dimensions.

    Attributes:
        infinite: Whether it grows with width.
        why: The deciding evidence.
        policy: Whether one model could not settle it, so that a policy did.
    """

    infinite: bool
    why: str
    policy: bool = False


class Verdicts:
    """Verdicts by class, filled by propagation to a fixed point."""

    def __init__(self, space: Space, facts: Facts):
        self.space, self.facts = space, facts
        self._known: dict[int, Verdict] = {}
        self._imposed: set[int] = set()
        self._terms: list[tuple[int, Members]] = [
            (w, m) for k in ("product", "groups", "sum") for w, m in space.terms(k)
        ]
        self._terms += [(space.find(a), (space.find(b),)) for a, b in space.derived]
        self._of: dict[int, list[int]] = defaultdict(list)
        for index, (whole, members) in enumerate(self._terms):
            for dim in {whole, *members}:
                self._of[dim].append(index)
        self.conflicts: list[str] = []

    def get(self, dim: int) -> Verdict | None:
        """Return the verdict of a dimension's class, or None while it is open."""
        return self._known.get(self.space.find(dim))

    def grows(self, dim: int) -> bool:
        """Whether a dimension is settled as infinite."""
        verdict = self.get(dim)
        return verdict is not None and verdict.infinite

    def is_firm(self, dim: int) -> bool:
        """Whether a dimension grows, and not by a policy."""
        verdict = self.get(dim)
        return verdict is not None and verdict.infinite and not verdict.policy

    def is_open(self, dim: int) -> bool:
        """Whether nothing is decided yet; sizes of 1 are never open."""
        return self.space.size(dim) > 1 and self.space.find(dim) not in self._known

    def impose(self, verdicts: Mapping[int, Verdict]) -> None:
        """Decide dimensions by the caller's authority, all before any consequence is drawn."""
        for dim, verdict in verdicts.items():
            known = self._known.setdefault(self.space.find(dim), verdict)
            if known.infinite != verdict.infinite:
                self.conflicts.append(f"{verdict.why} contradicts {known.why}")
        self._spread([self.space.find(d) for d in verdicts])
        self._imposed = set(self._known)

    def settle(self, dims: Iterable[int], verdict: Verdict) -> None:
        """Decide open dimensions and follow the consequences."""
        todo = [self.space.find(d) for d in dims if self.is_open(d)]
        for dim in todo:
            self._known.setdefault(dim, verdict)
        self._spread(todo)

    def _spread(self, todo: list[int]) -> None:
        while todo:
            for index in self._of[todo.pop()]:
                todo += self._follow(*self._terms[index])

    def _follow(self, whole: int, members: Members) -> list[int]:
        top = self._known.get(whole)
        below = [self._known.get(m) for m in members]
        open_ = [m for m in dict.fromkeys(members) if self.is_open(m)]
        grown = [v for v in below if v and v.infinite]
        if top is None and grown:
            return self._set([whole], Verdict(True, grown[0].why, grown[0].policy))
        if top is None and not open_ and self.space.size(whole) > 1:
            known = [v for v in below if v]
            why = known[0].why if known else "all its members are of size 1"
            return self._set([whole], Verdict(False, why, any(v.policy for v in known)))
        if top is not None and not top.infinite and open_:
            return self._set(open_, top)
        if top is not None and top.infinite and not grown and len(open_) == 1:
            return self._set(open_, Verdict(True, top.why, top.policy))
        return []

    def _set(self, dims: list[int], verdict: Verdict) -> list[int]:
        for dim in dims:
            self._known[dim] = verdict
        return dims

    def question(self, dim: int, why: str) -> None:
        """Mark a verdict as settled by a policy only, unless the caller gave it; an open one is finite."""
        if self.space.find(dim) not in self._imposed:
            self._known[self.space.find(dim)] = Verdict(self.grows(dim), why, True)

    def relatives(self, dims: Iterable[int]) -> set[int]:
        """Return the classes reached from dimensions through products, sums and derivations."""
        return self._reach(dims, lambda dim, whole, members: (whole, *members))

    def reached(self, dims: Iterable[int]) -> set[int]:
        """Return the classes that are made where some dimensions are.

        What is made as a whole is made in all its parts and factors; a whole is reached by any of its
        members, but the others are not made by that.
        """
        whole_made = {d for d in map(self.space.find, dims) if not self._is_certain(d)}
        touched, todo = set(whole_made), list(whole_made)
        while todo:
            for index in self._of[todo.pop()]:
                whole, members = self._terms[index]
                if self._is_certain(whole):
                    continue
                open_ = {m for m in members if self.space.size(m) > 1 and not self._is_certain(m)}
                made = set(open_) if whole in whole_made else set()
                if open_ and open_ <= whole_made:
                    made.add(whole)
                news = made - whole_made
                if open_ & touched:
                    news |= {whole} - touched
                whole_made |= made
                touched |= news
                todo += news
        return touched

    def kin(self, dims: Iterable[int]) -> set[int]:
        """Return what dimensions are part of and what is part of them, but not what only shares a part."""
        dims = tuple(dims)
        up = self._reach(dims, lambda dim, whole, members: (whole,))
        return up | self._reach(dims, lambda dim, whole, members: members if whole == dim else ())

    def _reach(self, dims: Iterable[int], step: Callable[[int, int, Members], Iterable[int]]) -> set[int]:
        """Return the classes reached from dimensions by steps within terms.

        Nothing is reached through what is fixed: the factors beside data are not data.
        """
        todo = [d for d in map(self.space.find, dims) if not self._is_certain(d)]
        seen = set(todo)
        while todo:
            dim = todo.pop()
            for index in self._of[dim]:
                for other in step(dim, *self._terms[index]):
                    if other not in seen and self.space.size(other) > 1 and not self._is_certain(other):
                        seen.add(other)
                        todo.append(other)
        return seen

    def _is_certain(self, dim: int) -> bool:
        verdict = self._known.get(dim)
        return verdict is not None and not verdict.infinite and not verdict.policy

    def open_terms(self) -> list[tuple[int, Members]]:
        """Return products and sums that must grow but do not say through which member."""
        found = []
        for whole, members in self._terms:
            top = self._known.get(whole)
            below = [self._known.get(m) for m in members]
            if top and top.infinite and not any(v and v.infinite for v in below):
                found.append((whole, members))
        return found
