"""The unknowns of width inference: dimensions, their equalities, products and sums.

A dimension is an integer handle. Two axes share a dimension only when an operator says that they must
agree, never because their sizes happen to be equal. Sizes are used for one thing: to line up the factors
(or parts) of one and the same dimension that is split in two places.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from operator import add, mul

from mupass._errors import InferenceError

Sizes = tuple[int, ...]
Members = tuple[int, ...]
Span = tuple[int, int]  # of a slice: start, stop


class SizeConflict(InferenceError):
    """Two dimensions of different sizes were to be one: the graph misstates a size that depends on data."""


class Space:
    """Union-find over dimensions, closed under congruence of products and sums."""

    def __init__(self) -> None:
        self._parent: list[int] = []  # a representative is its own parent
        self._sizes: list[int] = []
        # kind -> whole -> sizes of the members -> members; one entry a way to split the whole
        self._terms: dict[str, dict[int, dict[Sizes, Members]]] = {"product": {}, "groups": {}, "sum": {}}
        self._slices: dict[int, dict[Span, int]] = {}  # whole -> span -> part
        self.derived: list[tuple[int, int]] = []  # (dimension, what it grows with)
        self.cuts: list[tuple[int, Members]] = []  # wholes that were there before their parts
        self.counts: dict[int, str] = {}  # factors that count equal parts -> where
        self.rests: set[int] = set()  # what slices leave uncovered, so that nothing ever reads it
        self.where = "input"  # the operator whose rule runs, for messages

    def new(self, size: int) -> int:
        """Return a fresh dimension of the given size."""
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        return len(self._parent) - 1

    def find(self, dim: int) -> int:
        """Return the representative of a dimension's class."""
        root = dim
        # Walk up to the root, then point all on the way to it (path compression).
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

    def find_all(self, dims: Iterable[int]) -> set[int]:
        """Return the representatives of several dimensions."""
        return set(map(self.find, dims))

    def by_class(self, found: Mapping[int, str]) -> dict[int, str]:
        """Return what was found of dimensions, by their representatives."""
        return {self.find(dim): what for dim, what in found.items()}

    def unify(self, first: int, second: int) -> None:
        """Make two dimensions one; sizes of 1 broadcast and stay apart from everything else."""
        pending = [(first, second)]
        while pending:
            first, second = pending.pop()
            if self._sizes[first] != self._sizes[second]:
                raise SizeConflict(
                    f"{self.where}: sizes {self._sizes[first]} and {self._sizes[second]} unified"
                )
            root, other = self.find(first), self.find(second)
            if root == other:
                continue
            # Union by weight: the class with fewer terms is moved.
            if self._weight(root) < self._weight(other):
                root, other = other, root
            pending += self._merge(root, other)
            self._join_terms(root)

    def _weight(self, root: int) -> int:
        """Return how much a class has to hand over when it joins another."""
        weight = len(self._slices.get(root, ()))
        for table in self._terms.values():
            weight += len(table.get(root, ()))
        return weight

    def _merge(self, root: int, other: int) -> list[tuple[int, int]]:
        """Hand terms and slices of one class over to another; return the equalities that follow."""
        self._parent[other] = root
        equalities: list[tuple[int, int]] = []
        for kind, table in self._terms.items():
            for members in table.pop(other, {}).values():
                equalities += self._add(kind, root, members)
        # Slices of one span are one dimension, whichever name of their class they were taken from.
        for span, part in self._slices.pop(other, {}).items():
            its_part = self._slices.setdefault(root, {}).setdefault(span, part)
            equalities.append((its_part, part))
        return equalities

    def product(self, whole: int, factors: Members) -> None:
        """State whole = product of factors, in this order (row-major)."""
        self._state("product", whole, self._wide(factors))

    def groups(self, whole: int, factors: Members) -> None:
        """State whole = groups x channels of a group; kept apart from products, for groups are not heads."""
        self._state("groups", whole, self._wide(factors))

    def _wide(self, factors: Members) -> Members:
        # Axes of size 1 add no factor: [4, 1, 8] is 4 x 8.
        return tuple(factor for factor in factors if self._sizes[factor] != 1)

    def sum(self, whole: int, parts: Members) -> None:
        """State whole = concatenation of parts, in this order."""
        self._state("sum", whole, tuple(part for part in parts if self._sizes[part] != 0))

    def cut(self, whole: int, parts: Members) -> None:
        """State that a dimension is cut into parts, in this order: unlike those of a sum, they come of it."""
        self.cuts.append((whole, parts))
        self.sum(whole, parts)

    def part(self, whole: int, start: int, stop: int) -> int:
        """Return the dimension of ``whole[start:stop]``; the same span gives the same dimension."""
        # x[:, 0:] is x itself.
        if (start, stop) == (0, self._sizes[whole]):
            return whole
        # The same slice in two places of the code is one dimension.
        spans = self._slices.setdefault(self.find(whole), {})
        if (start, stop) not in spans:
            spans[start, stop] = self.new(stop - start)
        return spans[start, stop]

    def others(self, whole: int, index: int) -> int | None:
        """Return the dimension of the slice that takes all of ``whole`` but its first or last position."""
        size = self._sizes[whole]
        if index == 0:
            span = (1, size)
        elif index == size - 1:
            span = (0, size - 1)
        else:
            return None
        part = self._slices.get(self.find(whole), {}).get(span)
        if part is None:
            return None
        return self.find(part)

    def between(self, whole: int, positions: Iterable[int]) -> set[int]:
        """Return the slices of a dimension where they and single positions make up all of it, else none."""
        spans = self._slices.get(self.find(whole), {})
        ordered = sorted([*spans, *[(position, position + 1) for position in positions]])
        covered = 0
        for start, stop in ordered:
            if start != covered:
                return set()
            covered = stop
        return self.find_all(spans.values()) if covered == self._sizes[whole] else set()

    def derive(self, source: int, size: int) -> int:
        """Return a dimension of another size that grows exactly when ``source`` grows."""
        if size == self._sizes[source] == 1:
            return source
        dim = self.new(size)
        if size > 1:  # a single position carries no width
            self.derived.append((dim, source))
        return dim

    def close_slices(self) -> None:
        """Turn the collected slices into sums, with the uncovered rest as parts of their own."""
        for whole, spans in list(self._slices.items()):
            root = self.find(whole)
            ordered = sorted(spans)
            # x[:, :3] and x[:, 2:5] overlap: they are parts of no one cut, so each has a rest of its own.
            overlap = any(left[1] > right[0] for left, right in pairwise(ordered))
            if overlap:  # each span with its own complement
                for span in ordered:
                    self.cut(root, self._tile(root, spans, [span]))
            else:
                self.cut(root, self._tile(root, spans, ordered))
        self._slices.clear()

    def _tile(self, whole: int, spans: Mapping[Span, int], ordered: Iterable[Span]) -> Members:
        """Return spans of a dimension in a row, and between them what they leave uncovered."""
        members: list[int] = []
        position = 0
        for start, stop in ordered:
            if start > position:
                members.append(self._rest(start - position))
            members.append(spans[start, stop])
            position = stop
        if position < self._sizes[whole]:
            members.append(self._rest(self._sizes[whole] - position))
        return tuple(members)

    def _rest(self, size: int) -> int:
        rest = self.new(size)
        self.rests.add(rest)
        return rest

    def terms(self, kind: str) -> Iterator[tuple[int, Members]]:
        """Yield (whole, members) of every product or sum, as representatives."""
        for whole, table in self._terms[kind].items():
            for members in table.values():
                yield whole, tuple(map(self.find, members))

    def terms_of(self, dim: int, kind: str) -> list[Members]:
        """Return the known products or sums that a dimension equals."""
        table = self._terms[kind].get(self.find(dim), {})
        return [tuple(map(self.find, members)) for members in table.values()]

    def members_of(self, dim: int, *kinds: str) -> list[int]:
        """Return the members of all known terms of some kinds that a dimension equals."""
        members: list[int] = []
        for kind in kinds:
            for term in self.terms_of(dim, kind):
                members += term
        return members

    def _state(self, kind: str, whole: int, members: Members) -> None:
        """Record that a dimension is a product or sum of others, and what follows."""
        if not members:
            return
        for first, second in self._add(kind, self.find(whole), members):
            self.unify(first, second)
        if kind in ("sum", "product"):
            self._join_terms(self.find(whole))

    def _join_terms(self, whole: int) -> None:
        """Equal parts of a product whose first factor counts them: each of them is the other factors.

        ``q, k, v = split(3 * heads * head_dim)`` makes ``q = heads * head_dim``. Where parts are joined and
        not cut, ``cat(v, w)`` viewed as two heads, they may be as many as the heads by chance.
        """
        # A dimension that was there before its parts is cut; one that is joined of them is made.
        if all(self.find(cut) != whole for cut, _ in self.cuts):
            return
        for parts in list(self._terms["sum"].get(whole, {}).values()):
            sizes = set(map(self.size, parts))
            for count, *factors in list(self._terms["product"].get(whole, {}).values()):
                if len(sizes) == 1 and self._sizes[count] == len(parts):
                    self.counts[count] = self.where
                    for part in parts:
                        self._state("product", part, tuple(factors))

    def _add(self, kind: str, whole: int, members: Members) -> list[tuple[int, int]]:
        """Store a term and return the equalities that follow from the terms already known."""
        # A term of one member says that both are one dimension.
        if len(members) == 1:
            return [(whole, members[0])]
        # Terms of the same sizes, in the same order, are one term: its members agree one by one.
        table = self._terms[kind].setdefault(whole, {})
        sizes = tuple(map(self.size, members))
        if sizes in table:
            return list(zip(table[sizes], members, strict=True))
        equalities: list[tuple[int, int]] = []
        if table:  # all known terms are aligned with the first one already
            equalities = self._align(kind, next(iter(table.values())), members)
        table[sizes] = members
        return equalities

    def _align(self, kind: str, left: Members, right: Members) -> list[tuple[int, int]]:
        """Match two splittings of one dimension between the boundaries that they share."""
        combine = add if kind == "sum" else mul
        left_ends = list(accumulate(map(self.size, left), combine))
        right_ends = list(accumulate(map(self.size, right), combine))
        equalities: list[tuple[int, int]] = []
        left_start = right_start = 0
        # 12 = (3 * 4) = (3 * 2 * 2): the boundary after 3 is shared, so 3 is 3, and 4 is 2 * 2.
        for end in sorted(set(left_ends) & set(right_ends)):
            left_stop, right_stop = left_ends.index(end) + 1, right_ends.index(end) + 1
            left_run, right_run = left[left_start:left_stop], right[right_start:right_stop]
            left_start, right_start = left_stop, right_stop
            # 4 here and 2 * 2 there, between the same borders: 4 is their product.
            if len(left_run) == 1 and right_run:
                equalities += self._add(kind, self.find(left_run[0]), right_run)
            elif len(right_run) == 1 and left_run:
                equalities += self._add(kind, self.find(right_run[0]), left_run)
        return equalities
