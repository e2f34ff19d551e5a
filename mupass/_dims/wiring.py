"""Wiring: which widths the weights join, as doubts look at it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

from mupass._dims.verdicts import Verdicts

Side = tuple[int, ...]  # of a weight: the classes that it contracts, or those that it makes


class Wiring:
    """Which widths the weights join: for a dimension, what it is made of and what is made of it.

    Dimensions are representatives of their classes throughout.
    """

    def __init__(self, verdicts: Verdicts):
        self.verdicts, self.space = verdicts, verdicts.space
        facts, find_all = verdicts.facts, self.space.find_all
        self.alternatives = find_all(facts.alternatives)
        self.fans = find_all((*facts.fan_in, *facts.fan_out))
        self._straight = find_all(facts.straight) - find_all(facts.bent)
        self._ranked = find_all(facts.ranked)
        self._positions = find_all(facts.positions)
        self._at_positions = find_all(facts.at_positions)
        self._looked_up = find_all(facts.rows)
        self._parts: dict[str, dict[int, set[int]]] = {"product": defaultdict(set), "sum": defaultdict(set)}
        self._wholes: dict[int, set[int]] = defaultdict(set)
        self.sides: list[Side] = []
        self._made_of: dict[int, set[Side]] = defaultdict(set)
        self._read_into: dict[int, set[Side]] = defaultdict(set)
        self._index_terms()
        self._index_weights()
        self._joint = self._find_joint()

    def _index_terms(self) -> None:
        for kind, parts in self._parts.items():
            for whole, members in self.space.terms(kind):
                parts[whole].update(members)
                for member in members:
                    self._wholes[member].add(whole)

    def _index_weights(self) -> None:
        for fan_in, fan_out in self.verdicts.facts.weights:
            contracted = tuple(sorted(self.space.find_all(fan_in)))
            produced = tuple(sorted(self.space.find_all(fan_out)))
            # Data and kernels beside a width do not make it one of several.
            open_or_grown = [d for d in contracted if self.verdicts.get(d) is None or self.verdicts.grows(d)]
            self.sides += [produced, tuple(open_or_grown)]
            for dim in produced:
                self._made_of[dim].add(contracted)
            for dim in contracted:
                self._read_into[dim].add(produced)

    def _find_joint(self) -> set[int]:
        """Return the dimensions that are a fan only together with others, as channels x kernel."""
        joint: set[int] = set()
        for side in self.sides:
            wide_axes = [dim for dim in side if self.space.size(dim) > 1]
            if len(wide_axes) > 1:
                joint.update(side)
        return joint

    @property
    def widths(self) -> list[int]:
        """Whole dimensions of weights that grow and that nothing speaks against so far."""
        return list(filter(self.verdicts.is_firm, sorted(self.fans - self._joint)))

    def sources(self, dim: int) -> set[Side]:
        """Return, for each weight that makes the dimension, what it is joined into or of, what it contracts.

        The rows of a codebook stand in for what was made; they are no source.
        """
        contracted: set[Side] = set()
        for relative in self.wholes(dim) | self._parts["sum"][dim]:
            contracted |= self._made_of[relative]
        return {side for side in contracted if self._ranked.isdisjoint(side)} or contracted

    def readers(self, dim: int) -> set[Side]:
        """Return, for each weight that contracts the dimension, a whole or a part of it, what it makes."""
        produced: set[Side] = set()
        for relative in self.around(dim):
            produced |= self._read_into[relative]
        return produced

    def read_whole(self, dim: int) -> bool:
        """Whether a weight contracts the dimension, a whole or a part of it, and not a factor alone."""
        relatives = self.wholes(dim) | self._parts["sum"][dim]
        return any(self._read_into[relative] for relative in relatives)

    def grown(self, dims: Iterable[int]) -> list[int]:
        """Return those of some dimensions that grow."""
        return list(filter(self.verdicts.grows, dims))

    def grown_sources(self, dim: int) -> list[int]:
        """Return the growing dimensions that a dimension is made of, again for every weight."""
        return self.grown(chain.from_iterable(self.sources(dim)))

    def grown_results(self, dim: int) -> list[int]:
        """Return the growing dimensions that are made of a dimension, again for every weight."""
        return self.grown(chain.from_iterable(self.readers(dim)))

    def source(self, dim: int) -> int | None:
        """Return the one width that a dimension is made of: 0 for data, None where there are several.

        A residual stream is made of several, and no bottleneck.
        """
        grown = {tuple(self.grown(side)) for side in self.sources(dim)}
        if len(grown) != 1:
            return None
        (dims,) = grown
        return self.space.size(dims[0]) if dims else 0

    def laid_out(self, dim: int) -> bool:
        """Whether weights read it with positions only: channels x height x width as one axis."""
        if self._read_into[dim]:
            return False
        read = [whole for whole in self.wholes(dim) if self._read_into[whole]]
        beside = set(chain.from_iterable(self._parts["product"][whole] for whole in read)) - {dim}
        return bool(beside) and all(map(self.is_position, beside))

    def holder(self, dim: int) -> int | None:
        """Return the one product that weights make and that holds all factors of a dimension.

        So 3 x heads x head_dim holds heads x head_dim: queries, keys and values in one.
        """
        holders: set[int] = set()
        for factors in self.space.terms_of(dim, "product"):
            of_all = [self._wholes[factor] for factor in factors]
            holders |= set.intersection(*of_all) - {dim}
        made = list(filter(self.sources, holders))
        return made[0] if len(made) == 1 else None

    def results(self, dim: int) -> list[int]:
        """Return the sizes of the widths that are made of a dimension; separate matrices count apart."""
        return list(map(self.matrix_size, self.grown_results(dim)))

    def before(self, dim: int, factor: float) -> int | None:
        """Return the first source wider by a factor, back along weights that follow each other straight."""
        # x W1 W2 W3: W1 W2 is one linear map, so its width counts and not that between the two.
        wide_enough, visited, source = factor * self.space.size(dim), {dim}, self.source(dim)
        while source and source < wide_enough:
            sources = set(self.grown_sources(dim)) - visited
            if len(sources) != 1:
                break
            (dim,) = sources
            if not self.straight(dim):
                break
            visited.add(dim)
            source = self.source(dim)
        return source

    def after(self, dim: int, factor: float) -> list[int]:
        """Return the first results wider by a factor, on along weights that follow each other straight."""
        wide_enough, visited, results = factor * self.space.size(dim), {dim}, self.results(dim)
        while results and min(results) < wide_enough:
            onward = set(self.grown_results(dim)) - visited
            if len(onward) != 1:
                break
            (dim,) = onward
            if not self.straight(dim):
                break
            visited.add(dim)
            results = self.results(dim)
        return results

    def matrix_size(self, dim: int) -> int:
        """Return the size of one matrix: the largest part, and without counts such as gates or branches."""
        # q, k and v, or gate and up, in one weight: the largest of them is one matrix.
        sums = self.space.terms_of(dim, "sum")
        if sums:
            return max(map(self.space.size, sums[0]))
        size = self.space.size(dim)
        # 4 gates x width: the width; heads x head_dim: all of it.
        for members in self.space.terms_of(dim, "product")[:1]:
            for member in members:
                if not self.verdicts.grows(member) and not self.is_per_head(member):
                    size //= self.space.size(member)
        return size

    def is_per_head(self, dim: int) -> bool:
        """Whether it is a factor that a policy fixed, and counts nothing that competes."""
        return self.verdicts.by_policy(dim) and dim not in self.alternatives

    def returns(self, dim: int) -> bool:
        """Whether it is made of a width and read into the same one: the inside of a block, or of a gate."""
        return not set(self.grown_sources(dim)).isdisjoint(self.grown_results(dim))

    def straight(self, dim: int) -> bool:
        """Whether weights read it with no nonlinearity after the weight that made it."""
        return bool(self._straight & self.around(dim))

    def wholes(self, dim: int) -> set[int]:
        """Return a dimension with the products and sums that it is part of."""
        reached, frontier = {dim}, [dim]
        while frontier:
            unseen = self._wholes[frontier.pop()] - reached
            reached |= unseen
            frontier += unseen
        return reached

    def around(self, dim: int) -> set[int]:
        """Return a dimension with what it is part of, and its own parts and factors."""
        return self.wholes(dim) | self.parts(dim)

    def parts(self, dim: int) -> set[int]:
        """Return the parts and factors of a dimension."""
        return self._parts["sum"][dim] | self._parts["product"][dim]

    def codebook(self, dim: int) -> bool:
        """Whether it is the width of a table of which the nearest row is picked."""
        return any(not self._ranked.isdisjoint(side) for side in self._made_of[dim])

    def is_position(self, dim: int) -> bool:
        """Whether a convolution slides along it."""
        return dim in self._positions

    def at_positions(self, dim: int) -> bool:
        """Whether a weight makes it at every position of a sample, and not once for the sample."""
        return not self._at_positions.isdisjoint(self.wholes(dim))

    def by_kernel(self, dim: int) -> bool:
        """Whether a convolution with a kernel of several entries makes it."""
        windows = self.space.find_all(dim for dim, _ in self.verdicts.facts.windows)
        kernels = {window for window in windows if self.space.size(window) > 1}
        return any(not kernels.isdisjoint(side) for side in self.sources(dim))

    def by_pointwise(self, dim: int) -> bool:
        """Whether a convolution with a kernel of one entry makes it."""
        windows = self.space.find_all(dim for dim, _ in self.verdicts.facts.windows)
        return not self.by_kernel(dim) and any(not windows.isdisjoint(side) for side in self.sources(dim))

    def looked_up(self, dim: int) -> bool:
        """Whether it is the width of a lookup table."""
        return dim in self._looked_up

    def as_many_as_data(self, dim: int) -> bool:
        """Whether an axis of the data that it is made of has its size."""
        data = set(chain.from_iterable(self.sources(dim)))
        # cat([x, time]) of data: its parts are data as well.
        for side_dim in tuple(data):
            data.update(self.space.members_of(side_dim, "sum"))
        return self.space.size(dim) in map(self.space.size, data)
