"""Wiring: which widths the weights join, as doubts look at it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from mupass._dims.verdicts import Verdicts


class Wiring:
    """Which widths the weights join: for a dimension, what it is made of and what is made of it."""

    def __init__(self, verdicts: Verdicts):
        self.verdicts, self.space = verdicts, verdicts.space
        find, facts = self.space.find, verdicts.facts
        self._parts: dict[str, dict[int, set[int]]] = {k: defaultdict(set) for k in ("product", "sum")}
        self._wholes: dict[int, set[int]] = defaultdict(set)
        self.alternatives = {find(d) for d in facts.alternatives}
        self._straight = {find(d) for d in facts.straight} - {find(d) for d in facts.bent}
        self._ranked = {find(d) for d in facts.ranked}
        self._positions = {find(d) for d in facts.positions}
        self._looked_up = {find(d) for d in facts.rows}
        self.fans = {find(d) for d in (*facts.fan_in, *facts.fan_out)}
        for kind in ("product", "sum"):
            for whole, members in self.space.terms(kind):
                self._parts[kind][whole].update(members)
                for member in members:
                    self._wholes[member].add(whole)
        self.sides: list[tuple[int, ...]] = []
        self._made_of: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self._read_into: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        for into, out in facts.weights:
            ins, outs = (tuple(sorted({find(d) for d in side})) for side in (into, out))
            self.sides += [outs, tuple(d for d in ins if verdicts.get(d) is None or verdicts.grows(d))]
            for dim in outs:
                self._made_of[dim].add(ins)
            for dim in ins:
                self._read_into[dim].add(outs)
        self._joint = {d for s in self.sides if sum(self.space.size(d) > 1 for d in s) > 1 for d in s}

    @property
    def widths(self) -> list[int]:
        """Whole dimensions of weights that grow and that nothing speaks against so far."""
        return [d for d in sorted(self.fans - self._joint) if self.verdicts.is_firm(d)]

    def sources(self, dim: int) -> set[tuple[int, ...]]:
        """Return, for each weight that makes the dimension, what it is joined into or of, what it contracts.

        The rows of a codebook stand in for what was made; they are no source.
        """
        made = {s for d in self.wholes(dim) | self._parts["sum"][dim] for s in self._made_of[d]}
        return {s for s in made if not self._ranked & set(s)} or made

    def readers(self, dim: int) -> set[tuple[int, ...]]:
        """Return, for each weight that contracts the dimension, a whole or a part of it, what it makes."""
        return {r for d in self.around(dim) for r in self._read_into[d]}

    def grown(self, dims: Iterable[int]) -> list[int]:
        """Return those of some dimensions that grow."""
        return [d for d in dims if self.verdicts.grows(d)]

    def source(self, dim: int) -> int | None:
        """Return the one width that a dimension is made of: 0 for data, None where there are several.

        A residual stream is made of several, and no bottleneck.
        """
        grown = {tuple(self.grown(s)) for s in self.sources(dim)}
        if len(grown) != 1:
            return None
        (dims,) = grown
        return self.space.size(dims[0]) if dims else 0

    def results(self, dim: int) -> list[int]:
        """Return the sizes of the widths that are made of a dimension; separate matrices count apart."""
        return [self._one(d) for r in self.readers(dim) for d in self.grown(r)]

    def before(self, dim: int, by: float) -> int | None:
        """Return the first source wider by a factor, back along weights that follow each other straight."""
        wide, seen, source = by * self.space.size(dim), {dim}, self.source(dim)
        while source and source < wide:
            back = {d for s in self.sources(dim) for d in self.grown(s)} - seen
            if len(back) != 1 or not self.straight(dim := back.pop()):
                break
            seen.add(dim)
            source = self.source(dim)
        return source

    def after(self, dim: int, by: float) -> list[int]:
        """Return the first results wider by a factor, on along weights that follow each other straight."""
        wide, seen, results = by * self.space.size(dim), {dim}, self.results(dim)
        while results and min(results) < wide:
            on = {d for r in self.readers(dim) for d in self.grown(r)} - seen
            if len(on) != 1 or not self.straight(dim := on.pop()):
                break
            seen.add(dim)
            results = self.results(dim)
        return results

    def _one(self, dim: int) -> int:
        """Return the size of one matrix: the largest part, and without counts such as gates or branches."""
        for parts in self.space.terms_of(dim, "sum"):
            return max(map(self.space.size, parts))
        size = self.space.size(dim)
        for members in self.space.terms_of(dim, "product")[:1]:
            for member in members:
                verdict = self.verdicts.get(member)
                per_head = verdict and verdict.policy and member not in self.alternatives
                if not (verdict and verdict.infinite or per_head):
                    size //= self.space.size(member)
        return size

    def returns(self, dim: int) -> bool:
        """Whether it is made of a width and read into the same one: the inside of a block, or of a gate."""
        left = {d for s in self.sources(dim) for d in self.grown(s)}
        return bool(left & {d for r in self.readers(dim) for d in self.grown(r)})

    def straight(self, dim: int) -> bool:
        """Whether weights read it with no nonlinearity after the weight that made it."""
        return bool(self._straight & self.around(dim))

    def wholes(self, dim: int) -> set[int]:
        """Return a dimension with the products and sums that it is part of."""
        found, todo = {dim}, [dim]
        while todo:
            wholes = self._wholes[todo.pop()] - found
            found |= wholes
            todo += wholes
        return found

    def around(self, dim: int) -> set[int]:
        """Return a dimension with what it is part of, and its own parts and factors."""
        return self.wholes(dim) | self.parts(dim)

    def parts(self, dim: int) -> set[int]:
        """Return the parts and factors of a dimension."""
        return self._parts["sum"][dim] | self._parts["product"][dim]

    def is_made(self, dim: int) -> bool:
        """Whether a weight makes the dimension itself."""
        return dim in self._made_of

    def codebook(self, dim: int) -> bool:
        """Whether it is the width of a table of which the nearest row is picked."""
        return any(self._ranked & set(s) for s in self._made_of[dim])

    def is_position(self, dim: int) -> bool:
        """Whether a convolution slides along it."""
        return dim in self._positions

    def looked_up(self, dim: int) -> bool:
        """Whether it is the width of a lookup table."""
        return dim in self._looked_up

    def is_read(self, dim: int) -> bool:
        """Whether a weight contracts the dimension itself, not a concatenation or a product around it."""
        return dim in self._read_into

    def as_many_as_data(self, dim: int) -> bool:
        """Whether an axis of the data that it is made of has its size."""
        data = [d for s in self.sources(dim) for d in s]
        parts = {m for d in data for members in self.space.terms_of(d, "sum") for m in members}
        return self.space.size(dim) in map(self.space.size, (*data, *parts))
