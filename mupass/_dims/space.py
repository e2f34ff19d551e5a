"""The unknowns of width inference: dimensions, their equalities, products and sums.

A dimension is an integer handle. Two axes share a dimension only when an operator says that they must
agree, never because their sizes happen to be equal. Sizes are used for one thing: to line up the factors
(or parts) of one and the same dimension that is split in two places.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import add, mul

from mupass._errors import InferenceError

Sizes = tuple[int, ...]
Members = tuple[int, ...]


class SizeConflict(InferenceError):
    """Two dimensions of different sizes were to be one: the graph misstates a size that depends on data."""


@dataclass(frozen=True)
class Link:
    """One constraint as it was met in the graph; links are the edges that explanations walk.

    Attributes:
        dims: The dimensions tied together.
        kind: ``equal``, ``product``, ``sum`` or ``derived``.
        where: The operator and module that imposed it.
    """

    dims: Members
    kind: str
    where: str


class Space:
    """Union-find over dimensions, closed under congruence of products and sums."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._sizes: list[int] = []
        self._terms: dict[str, dict[int, dict[Sizes, Members]]] = {"product": {}, "groups": {}, "sum": {}}
        self._slices: dict[int, dict[tuple[int, int], int]] = {}
        self.derived: list[tuple[int, int]] = []
        self.cuts: list[tuple[int, Members]] = []  # wholes that were there before their parts
        self.counts: dict[int, str] = {}  # factors that count equal parts -> where
        self.rests: set[int] = set()  # what slices leave uncovered, so that nothing ever reads it
        self.links: list[Link] = []
        self.where = "input"

    def new(self, size: int) -> int:
        """Return a fresh dimension of the given size."""
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        return len(self._parent) - 1

    def find(self, dim: int) -> int:
        """Return the representative of a dimension's class."""
        root = dim
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[dim] != root:
            self._parent[dim], dim = root, self._parent[dim]
        return root

    def size(self, dim: int) -> int:
        """Return the size of a dimension."""
        return self._sizes[dim]

    def __len__(self) -> int:
        return len(self._parent)

    def roots(self) -> Iterator[int]:
        """Yield the representative of every class."""
        return (dim for dim, parent in enumerate(self._parent) if dim == parent)

    def unify(self, a: int, b: int) -> None:
        """Make two dimensions one; sizes of 1 broadcast and stay apart from everything else."""
        todo = [(a, b)]
        while todo:
            a, b = todo.pop()
            if self._sizes[a] != self._sizes[b]:
                raise SizeConflict(f"{self.where}: sizes {self._sizes[a]} and {self._sizes[b]} unified")
            ra, rb = self.find(a), self.find(b)
            if ra == rb:
                continue
            self.links.append(Link((a, b), "equal", self.where))
            if self._weight(ra) < self._weight(rb):
                ra, rb = rb, ra
            self._parent[rb] = ra
            for kind, terms in self._terms.items():
                for members in terms.pop(rb, {}).values():
                    todo += self._add(kind, ra, members)
            for span, part in self._slices.pop(rb, {}).items():
                known = self._slices.setdefault(ra, {}).setdefault(span, part)
                todo.append((known, part))
            self._join_terms(ra)

    def _weight(self, root: int) -> int:
        terms = sum(len(table.get(root, ())) for table in self._terms.values())
        return terms + len(self._slices.get(root, ()))

    def product(self, whole: int, factors: Members) -> None:
        """State whole = product of factors, in this order (row-major)."""
        self._state("product", whole, tuple(f for f in factors if self._sizes[f] != 1))

    def groups(self, whole: int, factors: Members) -> None:
        """State whole = groups x channels of a group; kept apart from products, for groups are not heads."""
        self._state("groups", whole, tuple(f for f in factors if self._sizes[f] != 1))

    def sum(self, whole: int, parts: Members) -> None:
        """State whole = concatenation of parts, in this order."""
        self._state("sum", whole, tuple(p for p in parts if self._sizes[p] != 0))

    def cut(self, whole: int, parts: Members) -> None:
        """State that a dimension is cut into parts, in this order: unlike those of a sum, they come of it."""
        self.cuts.append((whole, parts))
        self.sum(whole, parts)

    def part(self, whole: int, start: int, stop: int) -> int:
        """Return the dimension of ``whole[start:stop]``; the same span gives the same dimension."""
        if (start, stop) == (0, self._sizes[whole]):
            return whole
        spans = self._slices.setdefault(self.find(whole), {})
        if (start, stop) not in spans:
            spans[start, stop] = self.new(stop - start)
        return spans[start, stop]

    def others(self, whole: int, index: int) -> int | None:
        """Return the dimension of the slice that takes all of ``whole`` but its first or last position."""
        size = self._sizes[whole]
        span = {0: (1, size), size - 1: (0, size - 1)}.get(index)
        part = self._slices.get(self.find(whole), {}).get(span) if span else None
        return None if part is None else self.find(part)

    def derive(self, source: int, size: int) -> int:
        """Return a dimension of another size that grows exactly when ``source`` grows."""
        if size == self._sizes[source] and size == 1:
            return source
        dim = self.new(size)
        if size > 1:  # a single position carries no width
            self.derived.append((dim, source))
            self.links.append(Link((dim, source), "derived", self.where))
        return dim

    def close_slices(self) -> None:
        """Turn the collected slices into sums, with the uncovered rest as parts of their own."""
        for whole, spans in list(self._slices.items()):
            root = self.find(whole)
            ordered = sorted(spans)
            if all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False)):
                self.cut(root, self._tile(root, [(span, spans[span]) for span in ordered]))
            else:  # overlapping spans: each with its own complement
                for span in ordered:
                    self.cut(root, self._tile(root, [(span, spans[span])]))
        self._slices.clear()

    def _tile(self, whole: int, pieces: list[tuple[tuple[int, int], int]]) -> Members:
        members, at = [], 0
        for (start, stop), part in pieces:
            if start > at:
                members.append(self._rest(start - at))
            members.append(part)
            at = stop
        if at < self._sizes[whole]:
            members.append(self._rest(self._sizes[whole] - at))
        return tuple(members)

    def _rest(self, size: int) -> int:
        self.rests.add(self.new(size))
        return len(self._parent) - 1

    def terms(self, kind: str) -> Iterator[tuple[int, Members]]:
        """Yield (whole, members) of every product or sum, as representatives."""
        for whole, table in self._terms[kind].items():
            for members in table.values():
                yield whole, tuple(self.find(m) for m in members)

    def terms_of(self, dim: int, kind: str) -> list[Members]:
        """Return the known products or sums that a dimension equals."""
        return [tuple(map(self.find, m)) for m in self._terms[kind].get(self.find(dim), {}).values()]

    def _state(self, kind: str, whole: int, members: Members) -> None:
        if not members:
            return
        self.links.append(Link((whole, *members), kind if len(members) > 1 else "equal", self.where))
        for a, b in self._add(kind, self.find(whole), members):
            self.unify(a, b)
        if kind in ("sum", "product"):
            self._join_terms(self.find(whole))

    def _join_terms(self, whole: int) -> None:
        """Equal parts of a product whose first factor counts them: each of them is the other factors."""
        for parts in list(self._terms["sum"].get(whole, {}).values()):
            sizes = {self._sizes[p] for p in parts}
            for count, *rest in list(self._terms["product"].get(whole, {}).values()):
                if len(sizes) == 1 and self._sizes[count] == len(parts):
                    self.counts[count] = self.where
                    for part in parts:
                        self._state("product", part, tuple(rest))

    def _add(self, kind: str, whole: int, members: Members) -> list[tuple[int, int]]:
        """Store a term and return the equalities that follow from the terms already known."""
        if len(members) == 1:
            return [(whole, members[0])]
        table = self._terms[kind].setdefault(whole, {})
        sizes = tuple(self._sizes[m] for m in members)
        if sizes in table:
            return list(zip(table[sizes], members, strict=True))
        equal: list[tuple[int, int]] = []
        if table:  # all known terms are aligned with the first one already
            equal = self._align(kind, next(iter(table.values())), members)
        table[sizes] = members
        return equal

    def _align(self, kind: str, left: Members, right: Members) -> list[tuple[int, int]]:
        """Match two splittings of one dimension between the boundaries that they share."""
        op = add if kind == "sum" else mul
        ends = [list(accumulate((self._sizes[m] for m in side), op)) for side in (left, right)]
        equal: list[tuple[int, int]] = []
        begin = [0, 0]
        for end in sorted(set(ends[0]) & set(ends[1])):
            stop = [ends[0].index(end) + 1, ends[1].index(end) + 1]
            a, b = left[begin[0] : stop[0]], right[begin[1] : stop[1]]
            begin = stop
            if a and b and len(a) == 1:
                equal += self._add(kind, self.find(a[0]), b)
            elif a and b and len(b) == 1:
                equal += self._add(kind, self.find(b[0]), a)
        return equal
