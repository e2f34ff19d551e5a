"""Verdicts on dimensions, and how they travel through products, sums and derivations.

A product is infinite exactly when a factor is, a sum when a part is, a derived dimension when its source is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        self.conflicts: list[str] = []
        self._known: dict[int, Verdict] = {}
        self._imposed: set[int] = set()
        self._terms: list[tuple[int, Members]] = []
        for kind in ("product", "groups", "sum"):
            self._terms += space.terms(kind)
        # A derived dimension is a term with one member: it grows exactly when its source does.
        for derived, source in space.derived:
            self._terms.append((space.find(derived), (space.find(source),)))
        self._terms_with: dict[int, list[int]] = defaultdict(list)  # class -> places in the list of terms
        for position, (whole, members) in enumerate(self._terms):
            for dim in {whole, *members}:
                self._terms_with[dim].append(position)

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

    def by_policy(self, dim: int) -> bool:
        """Whether a policy fixed a dimension."""
        verdict = self.get(dim)
        return verdict is not None and verdict.policy and not verdict.infinite

    def _is_certain(self, dim: int) -> bool:
        """Whether a class is fixed, and not by a policy."""
        verdict = self._known.get(dim)
        return verdict is not None and not verdict.infinite and not verdict.policy

    def impose(self, verdicts: Mapping[int, Verdict]) -> None:
        """Decide dimensions by the caller's authority, all before any consequence is drawn."""
        for dim, verdict in verdicts.items():
            # The caller's first word stands; one that contradicts it is a conflict.
            earlier = self._known.setdefault(self.space.find(dim), verdict)
            if earlier.infinite != verdict.infinite:
                self.conflicts.append(f"{verdict.why} contradicts {earlier.why}")
        self._spread(list(map(self.space.find, verdicts)))
        self._imposed = set(self._known)

    def settle(self, dims: Iterable[int], verdict: Verdict) -> None:
        """Decide open dimensions and follow the consequences."""
        # What is settled already is left alone: an earlier policy outranks this one.
        frontier = [self.space.find(dim) for dim in dims if self.is_open(dim)]
        for dim in frontier:
            self._known.setdefault(dim, verdict)
        self._spread(frontier)

    def _spread(self, frontier: list[int]) -> None:
        """Draw all consequences of verdicts on some classes."""
        while frontier:
            for position in self._terms_with[frontier.pop()]:
                frontier += self._follow(*self._terms[position])

    def _follow(self, whole: int, members: Members) -> list[int]:
        """Draw the consequences within one term; return the classes that it settles."""
        of_whole = self._known.get(whole)
        still_open = [dim for dim in dict.fromkeys(members) if self.is_open(dim)]
        if of_whole is None:
            return self._follow_up(whole, members, still_open)
        if not of_whole.infinite:  # nothing in it can grow
            return self._set(still_open, of_whole)
        if len(still_open) == 1 and not any(map(self.grows, members)):  # the only one left to grow
            return self._set(still_open, Verdict(True, of_whole.why, of_whole.policy))
        return []

    def _follow_up(self, whole: int, members: Members, still_open: Sequence[int]) -> list[int]:
        """Settle a whole by its members, if they do."""
        of_members = [verdict for verdict in map(self._known.get, members) if verdict]
        for verdict in of_members:
            if verdict.infinite:  # one member that grows is enough
                return self._set([whole], Verdict(True, verdict.why, verdict.policy))
        if still_open or self.space.size(whole) <= 1:
            return []
        # A whole is as certain as its least certain member.
        reason = of_members[0].why if of_members else "all its members are of size 1"
        return self._set([whole], Verdict(False, reason, any(verdict.policy for verdict in of_members)))

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
        return self._reach(dims, _all_of_term)

    def reached(self, dims: Iterable[int]) -> set[int]:
        """Return the classes that are made where some dimensions are.

        What is made as a whole is made in all its parts and factors; a whole is reached by any of its
        members, but the others are not made by that.
        """
        reached = {dim for dim in map(self.space.find, dims) if not self._is_certain(dim)}
        touched = set(reached)
        frontier = list(reached)
        while frontier:
            for position in self._terms_with[frontier.pop()]:
                whole, members = self._terms[position]
                if self._is_certain(whole):
                    continue
                may_grow = {dim for dim in members if self.space.size(dim) > 1 and not self._is_certain(dim)}
                newly_reached: set[int] = set()
                # heads and head_dim are made where heads * head_dim is.
                if whole in reached:
                    newly_reached |= may_grow - reached
                # heads * head_dim is made where both are.
                if may_grow and may_grow <= reached:
                    newly_reached |= {whole} - reached
                reached |= newly_reached
                # A concatenation of which one part is made is touched by that.
                if not may_grow.isdisjoint(touched):
                    newly_reached |= {whole} - touched
                touched |= newly_reached
                frontier += newly_reached
        return touched

    def kin(self, dims: Iterable[int]) -> set[int]:
        """Return what dimensions are part of and what is part of them, but not what only shares a part."""
        dims = tuple(dims)
        return self._reach(dims, _whole_of_term) | self._reach(dims, _parts_below)

    def parts_of(self, dims: Iterable[int]) -> set[int]:
        """Return dimensions with all that is part of them."""
        return self._reach(dims, _parts_below)

    def _reach(self, dims: Iterable[int], step: Callable[[int, int, Members], Iterable[int]]) -> set[int]:
        """Return the classes reached from dimensions by steps within terms.

        Nothing is reached through what is fixed: the factors beside data are not data.
        """
        frontier = [dim for dim in map(self.space.find, dims) if not self._is_certain(dim)]
        reached = set(frontier)
        while frontier:
            dim = frontier.pop()
            for position in self._terms_with[dim]:
                for other in step(dim, *self._terms[position]):
                    if other not in reached and self.space.size(other) > 1 and not self._is_certain(other):
                        reached.add(other)
                        frontier.append(other)
        return reached

    def open_terms(self) -> list[tuple[int, Members]]:
        """Return products and sums that must grow but do not say through which member."""
        undecided = []
        for whole, members in self._terms:
            if self.grows(whole) and not any(map(self.grows, members)):
                undecided.append((whole, members))
        return undecided


def _all_of_term(dim: int, whole: int, members: Members) -> Members:
    return (whole, *members)


def _whole_of_term(dim: int, whole: int, members: Members) -> Members:
    return (whole,)


def _parts_below(dim: int, whole: int, members: Members) -> Members:
    return members if whole == dim else ()
