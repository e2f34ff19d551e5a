"""Decides which dimensions grow with width.

Three kinds of knowledge, in falling order of authority: what is certain (data, kernels, table lengths,
classes; what the caller overrides), what is a policy (heads grow at a fixed head_dim, the number of groups
is fixed), and the default (an axis along which weights are contracted or made, and that nothing certain
touches, is a width). Products and sums carry verdicts up and down: a product is infinite exactly when a
factor is, a sum when a part is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
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
        """Mark a width as settled by a policy only."""
        if self.grows(dim):
            self._known[self.space.find(dim)] = Verdict(True, why, True)

    def relatives(self, dims: Iterable[int]) -> set[int]:
        """Return the classes reached from dimensions through products, sums and derivations."""
        todo = [self.space.find(d) for d in dims]
        seen = set(todo)
        while todo:
            for index in self._of[todo.pop()]:
                whole, members = self._terms[index]
                for other in (whole, *members):
                    if other not in seen and self.space.size(other) > 1:
                        seen.add(other)
                        todo.append(other)
        return seen

    def open_terms(self) -> list[tuple[int, Members]]:
        """Return products and sums that must grow but do not say through which member."""
        found = []
        for whole, members in self._terms:
            top = self._known.get(whole)
            below = [self._known.get(m) for m in members]
            if top and top.infinite and not any(v and v.infinite for v in below):
                found.append((whole, members))
        return found


def decide(
    space: Space,
    facts: Facts,
    inputs: Iterable[tuple[int, str]],
    outputs: Iterable[tuple[int, str]],
    made: Iterable[int],
    overrides: Mapping[int, tuple[bool, str]],
) -> Verdicts:
    """Decide every dimension.

    Args:
        space: The solved constraints.
        facts: What the rules recorded.
        inputs: Axes of the model's inputs, each with its description.
        outputs: Axes of the outputs that a loss may see.
        made: Axes that parameters bring into the computation.
        overrides: Dimensions that the caller settles: infinite or not, and by what authority.

    Returns:
        The verdicts; `Verdicts.get` is None for dimensions that no parameter and no weight touches.

    """
    verdicts = Verdicts(space, facts)
    verdicts.impose({dim: Verdict(infinite, why) for dim, (infinite, why) in overrides.items()})
    for dim, why in inputs:
        verdicts.settle([dim], Verdict(False, why))
    for dim, why in facts.finite.items():
        verdicts.settle([dim], Verdict(False, why))
    hidden = _settle_outputs(verdicts, outputs)
    _settle_heads(verdicts)
    _settle_blocks(verdicts)
    _settle_groups(verdicts)
    _settle_alternatives(verdicts)
    _settle_rests(verdicts)
    unmade = _unmade(verdicts, made)
    _settle_fans(verdicts, unmade)
    _settle_unmade(verdicts, unmade)
    for dim, where in facts.basis.items():
        verdicts.settle(
            [dim], Verdict(False, f"policy: two parameters are contracted along it ({where})", True)
        )
    _settle_joined(verdicts)
    _settle_products(verdicts)
    for dim, why in hidden.items():
        verdicts.question(dim, f"policy: hidden state, since weights read it again ({why})")
    return verdicts


def _settle_outputs(verdicts: Verdicts, outputs: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Classes or data are output axes that no weight reads; return the others, which may be hidden state."""
    hidden = verdicts.relatives(verdicts.facts.fan_in)
    read: dict[int, str] = {}
    for dim, why in outputs:
        if verdicts.space.find(dim) not in hidden:
            verdicts.settle([dim], Verdict(False, why))
        elif verdicts.is_open(dim):
            read.setdefault(dim, why)
    return read


def _settle_heads(verdicts: Verdicts) -> None:
    """Policy: in a batched product of two activations the batch grows (heads), the rest is fixed."""
    for product in verdicts.facts.bilinear:
        heads = [d for d in product.batch if verdicts.is_open(d)]
        inner = [d for d in product.inner if verdicts.is_open(d)]
        if heads and inner:
            verdicts.settle(inner, Verdict(False, f"policy: fixed size per head ({product.where})", True))


def _settle_blocks(verdicts: Verdicts) -> None:
    """Policy: a width cut into blocks, each with a weight of its own, gets more blocks, not larger ones."""
    together = {
        (a, b) for _, members in verdicts.space.terms("product") for a in members for b in members if a != b
    }
    for product in verdicts.facts.blocks:
        count = {verdicts.space.find(d) for d in product.batch if verdicts.is_open(d)}
        inner = [d for d in product.inner if verdicts.is_open(d)]
        cut = [d for d in inner if any((c, verdicts.space.find(d)) in together for c in count)]
        verdicts.settle(cut, Verdict(False, f"policy: fixed size per block ({product.where})", True))


def _unmade(verdicts: Verdicts, made: Iterable[int]) -> dict[int, str]:
    """Return the open dimensions that weights read and none makes: features that the code computes."""
    space, facts = verdicts.space, verdicts.facts
    reached = verdicts.relatives([*made, *facts.fan_out])
    found = {space.find(d): where for d, where in facts.fan_in.items() if verdicts.is_open(d)}
    return {d: where for d, where in found.items() if d not in reached}


def _settle_unmade(verdicts: Verdicts, unmade: Mapping[int, str]) -> None:
    """Policy: features that the code computes are fixed, unless as many as the first layer has units.

    Sinusoids of positions come in d_model, those of a time step often in a number of their own. Nothing but
    the size tells them apart, so the verdict is marked as a policy.
    """
    space = verdicts.space
    widths = {
        space.size(dim)
        for into, out in verdicts.facts.weights
        if not any(verdicts.is_open(d) or verdicts.grows(d) for d in into)
        for dim in out
        if verdicts.grows(dim)
    }
    for dim, where in unmade.items():
        grown = space.size(dim) in widths
        why = "as many features of the code as the first layer has units" if grown else "features of the code"
        verdicts.settle([dim], Verdict(grown, f"policy: {why} ({where})", True))


def _settle_alternatives(verdicts: Verdicts) -> None:
    """Policy: alternatives (experts, slots, bins) are fixed, unless weights read them as features."""
    read = verdicts.relatives(verdicts.facts.fan_in)
    for dim, why in verdicts.facts.alternatives.items():
        if verdicts.space.find(dim) not in read:
            verdicts.settle([dim], Verdict(False, f"policy: {why}", True))


def _settle_rests(verdicts: Verdicts) -> None:
    """Policy: an axis of which only fixed parts are ever read is fixed; what no slice covers says nothing."""
    space = verdicts.space
    rests = {space.find(d) for d in space.rests}
    cuts = [(whole, parts) for whole, parts in space.terms("sum") if rests & set(parts)]
    progress = True
    while progress:
        progress = False
        for whole, parts in cuts:
            known = [verdicts.get(p) for p in parts if p not in rests]
            if verdicts.is_open(whole) and known and all(v and not v.infinite for v in known):
                verdicts.settle([whole], Verdict(False, "policy: only fixed parts of it are read", True))
                progress = True


def _settle_groups(verdicts: Verdicts) -> None:
    """Policy: a grouped convolution keeps its number of groups."""
    for dim, where in verdicts.facts.groups.items():
        verdicts.settle([dim], Verdict(False, f"policy: the number of groups is fixed ({where})", True))


def _settle_fans(verdicts: Verdicts, unmade: Mapping[int, str]) -> None:
    """Default: what weights contract or make, and nothing certain touches, is a width.

    Wholes first would hide which of their members grow, so members with evidence of their own go first.
    """
    facts, space = verdicts.facts, verdicts.space
    fans = {space.find(d): w for d, w in [*facts.fan_out.items(), *facts.fan_in.items()]}
    fans = {d: w for d, w in fans.items() if d not in unmade}
    atoms = [d for d in fans if not space.terms_of(d, "product") and not space.terms_of(d, "sum")]
    for dim in [*atoms, *fans]:
        verdicts.settle(
            [dim], Verdict(True, f"a width: no data, kernel or class axis touches it ({fans[dim]})")
        )


def _settle_joined(verdicts: Verdicts) -> None:
    """Default: parameters joined into one growing weight all grow, except for data among them."""
    joined = {verdicts.space.find(d) for d in verdicts.facts.joined}
    for whole, parts in verdicts.space.terms("sum"):
        if whole in joined and verdicts.grows(whole):
            why = f"a part of a growing weight ({verdicts.get(whole).why})"  # type: ignore[union-attr]
            verdicts.settle(parts, Verdict(True, why))


def _settle_products(verdicts: Verdicts) -> None:
    """Where a whole must grow and several members could, prefer those that the code does not spell out."""
    literal = {verdicts.space.find(d) for d in verdicts.facts.literal}
    while open_terms := verdicts.open_terms():
        progress = False
        for whole, members in open_terms:
            open_ = [m for m in members if verdicts.is_open(m)]
            top = verdicts.get(whole)
            if not open_ or top is None or any((v := verdicts.get(m)) and v.infinite for m in members):
                continue
            free = [m for m in open_ if m not in literal] or open_
            choice = len(free) > 1 and members in verdicts.space.terms_of(whole, "product")
            why = f"policy: it grows with its whole ({top.why})"
            verdicts.settle(free[:1] if choice else free, Verdict(True, why, choice))
            progress = True
        if not progress:
            break
