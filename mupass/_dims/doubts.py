"""Doubts: defaults that stand but that the sizes or the wiring around them speak against.

A width of its own (a latent, a rank, a codebook, a head with a number of channels from the code) looks like
any hidden width to the constraints. What gives it away is its surroundings. A doubt never changes a verdict:
it marks it as settled by a policy, with the reason, so that the report asks and the caller can answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import prod

from mupass._dims.policies import mixed
from mupass._dims.verdicts import Verdict, Verdicts
from mupass._dims.wiring import Wiring

Found = Iterator[tuple[int, str]]

STRAIGHT = 1.5  # a linear bottleneck is one when it is narrower than its neighbours by this factor
STEM = 2.5  # the same for one that is computed from data: first layers often start narrow
NARROW = 8  # a bottleneck behind a nonlinearity
WIDE = 4  # a last layer that widens before the readout
BROAD = 16  # a first layer far above all that read it


def raise_doubts(verdicts: Verdicts, outputs: Iterable[tuple[int, str]]) -> None:
    """Mark verdicts that one model cannot settle.

    Args:
        verdicts: All verdicts, made.
        outputs: Axes of the outputs that a loss may see.
    """
    wiring = Wiring(verdicts)
    for dim, why in list(_factors(wiring)):
        verdicts.question(dim, why)
    _follow(verdicts)
    rules: tuple[Callable[[Wiring], Found], ...] = (
        _linear_bottlenecks,
        _bottlenecks,
        _wide_heads,
        _broad_starts,
        _repeated_sizes,
        _unread,
        _competing,
        _mixing,
        _mixed_weights,
    )
    for rule in rules:
        for dim, why in list(rule(wiring)):
            verdicts.question(dim, f"policy: a width like the others, though {why}")
        _follow(verdicts)
    for dim, why in list(_wide_outputs(wiring, outputs)):
        verdicts.question(dim, why)


def _linear_bottlenecks(wiring: Wiring) -> Found:
    """Ranks, latents, codes: two weights in a row that would be one matrix but for a narrow middle."""
    for dim in wiring.widths:
        if wiring.codebook(dim) and wiring.source(dim):
            yield dim, "it is the width of a codebook"
        if not wiring.straight(dim) or not wiring.readers(dim):
            continue
        source, results = wiring.before(dim, STRAIGHT), wiring.after(dim, STRAIGHT)
        if source is None:
            continue
        narrowest = min(results, default=0)
        if not source:
            narrow = wiring.space.size(dim) * (STRAIGHT if wiring.looked_up(dim) else STEM) <= narrowest
        elif results:
            narrow = wiring.space.size(dim) * STRAIGHT <= min(source, narrowest)
        else:
            narrow = wiring.space.size(dim) * STRAIGHT <= source and wiring.is_read(dim)
        if narrow or not source and wiring.as_many_as_data(dim):
            yield dim, f"no nonlinearity parts the weights around it ({_of(source, results)})"


def _bottlenecks(wiring: Wiring) -> Found:
    """A width far below those around it, unless it is a branch that returns to where it left."""
    for dim in wiring.widths:
        size, source, results = wiring.space.size(dim), wiring.source(dim), wiring.results(dim)
        if not source or not results or source < NARROW * size or min(results) < NARROW * size:
            continue
        if not wiring.returns(dim):
            yield dim, f"it is far narrower than the widths around it ({_of(source, results)})"


def _wide_heads(wiring: Wiring) -> Found:
    """A last width far above the one before it, which only readouts see."""
    for dim in wiring.widths:
        source = wiring.source(dim)
        if not source or wiring.space.size(dim) < WIDE * source or not wiring.is_made(dim):
            continue
        narrow = [d for s in wiring.sources(dim) for d in wiring.grown(s) if not wiring.verdicts.is_firm(d)]
        if narrow and wiring.space.size(dim) <= (
            wiring.before(narrow[0], STRAIGHT) or wiring.space.size(dim)
        ):
            continue  # wide only beside something narrow
        region = _plateau(wiring, dim)
        for member in region:
            yield member, f"only readouts see it and the width before it has {source}"


def _plateau(wiring: Wiring, start: int) -> set[int]:
    """Return what is made of a width, and again of that, if all of it has its size."""
    if not wiring.readers(start):
        return set()
    region, todo = {start}, [start]
    while todo:
        for out in {d for r in wiring.readers(todo.pop()) for d in wiring.grown(r)} - region:
            factors = {f for term in wiring.space.terms_of(out, "product") for f in wiring.grown(term)}
            if wiring.space.size(start) not in map(wiring.space.size, factors or {out}):
                return set()
            region |= {out, *factors}
            todo.append(out)
    return region


def _broad_starts(wiring: Wiring) -> Found:
    """A side network on data (coordinates, say) whose inner width is far above what it computes."""
    for dim in wiring.widths:
        results = wiring.results(dim)
        if wiring.source(dim) == 0 and results and wiring.space.size(dim) >= BROAD * max(results):
            yield dim, f"it is far wider than what is made of it ({_of(0, results)})"


def _repeated_sizes(wiring: Wiring) -> Found:
    """A size that stays the same at places where all widths around it are larger by one factor."""
    places: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for dim in wiring.widths:
        source, results = wiring.source(dim), wiring.results(dim)
        if source is not None and results and not wiring.returns(dim):
            places[wiring.space.size(dim)].append((dim, (source, *sorted(set(results)))))
    for size, found in places.items():
        apart = sorted({around for _, around in found if size not in around})
        if any(_proportional(a, b) for a, b in zip(apart, apart[1:], strict=False)):
            like = [dim for dim, around in found if _proportional(around, apart[0])]
            for dim in like:
                yield dim, f"it is {size} at several places whose widths differ"


def _proportional(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and all(x * b[-1] == y * a[-1] for x, y in zip(a, b, strict=True))


def _unread(wiring: Wiring) -> Found:
    """What weights make and none reads: it ends in a reduction, a comparison, or unused."""
    verdicts, space = wiring.verdicts, wiring.space
    read, made = verdicts.relatives(verdicts.facts.fan_in), set(map(space.find, verdicts.facts.fan_out))
    for dim in filter(verdicts.is_firm, sorted(made)):
        if dim not in read:
            yield dim, "no weight reads it again"
        elif not wiring.readers(dim) and _own_heads(wiring, dim):
            yield dim, "weights meet only its number of heads, and that at another size per head"


def _own_heads(wiring: Wiring, dim: int) -> bool:
    """Whether a width of heads has another size per head than all of the same heads that weights read."""
    space = wiring.space
    for term in space.terms_of(dim, "product"):
        inner = {p for m in term if not wiring.verdicts.grows(m) for p in (m, *wiring.parts(m))}
        read = [w for m in wiring.grown(term) for w in wiring.around(m) if wiring.readers(w)]
        sizes = {space.size(m) for w in read for t in space.terms_of(w, "product") for m in t}
        if sizes and not sizes & set(map(space.size, inner)):
            return True
    return False


def _competing(wiring: Wiring) -> Found:
    """Memory slots or units: entries that compete in a softmax and that a weight then reads."""
    competing = {wiring.space.find(d): why for d, why in wiring.verdicts.facts.alternatives.items()}
    for dim in wiring.widths:
        if dim in competing and wiring.source(dim) is not None:
            yield dim, competing[dim]


def _mixing(wiring: Wiring) -> Found:
    """Units that mix the positions of data and give them back: a number of their own, or of the positions."""
    for dim in wiring.widths:
        ends = [{d for side in ends for d in side} for ends in (wiring.sources(dim), wiring.readers(dim))]
        if ends[0] and ends[0] == ends[1] and not wiring.grown(ends[0]):
            yield dim, "it only mixes positions of data"


def _mixed_weights(wiring: Wiring) -> Found:
    """What a weight a sample is made of: a number of experts, or the width of a net that makes weights."""
    verdicts, space = wiring.verdicts, wiring.space
    for dim in mixed(space, verdicts.facts, verdicts.grows):
        if verdicts.is_firm(dim):
            yield dim, "what it is read into is a weight itself, so it may count weights that are mixed"
    for sides in verdicts.facts.between:
        sizes = [prod(map(space.size, side)) for side in sides]
        for side in sides:
            if prod(map(space.size, side)) < max(sizes):
                for dim in filter(verdicts.is_firm, map(space.find, side)):
                    yield dim, "a weight stands between it and a wider one, so it may count matrices"


def _factors(wiring: Wiring) -> Found:
    """Where a width is a product of which no fact fixes one factor, that the other grows is a policy too."""
    verdicts, space = wiring.verdicts, wiring.space
    for side in wiring.sides:
        fixed = [d for d in side if (v := verdicts.get(d)) and v.policy and not v.infinite]
        if any(d not in wiring.alternatives for d in fixed):
            for dim in wiring.grown(side):
                yield dim, "policy: of several axes that are one width together, this one grows"
    for kind in ("product", "groups"):
        for whole, members in space.terms(kind):
            grown, rest = wiring.grown(members), [m for m in members if not verdicts.grows(m)]
            open_ = [m for m in rest if (v := verdicts.get(m)) and v.policy]
            if kind == "product":
                open_ += [m for m in rest if verdicts.get(m) is None and not wiring.is_position(m)]
            if whole in wiring.fans and open_:
                sizes = " x ".join(str(space.size(m)) for m in members)
                for member in grown:
                    yield member, f"policy: of the factors {sizes} of a width, this one grows"
                for member in open_ if grown else ():
                    if verdicts.get(member) is None:
                        yield member, f"policy: of the factors {sizes} of a width, another grows"


def _follow(verdicts: Verdicts) -> None:
    """Carry doubts up and down terms, where nothing else speaks for growth."""
    changed = True
    while changed:
        changed = False
        for kind in ("product", "sum"):
            for whole, members in verdicts.space.terms(kind):
                changed |= _doubt_whole(verdicts, whole, members) or (
                    kind == "sum" and _doubt_parts(verdicts, whole, members)
                )


def _doubt_whole(verdicts: Verdicts, whole: int, members: Iterable[int]) -> bool:
    known = [verdicts.get(m) for m in members]
    grown = [v for v in known if v and v.infinite]
    rest_is_fixed = all(v and (v.infinite or not v.policy) for v in known)
    if not verdicts.is_firm(whole) or not grown or not rest_is_fixed or not all(v.policy for v in grown):
        return False
    verdicts.question(whole, grown[0].why)
    return True


def _doubt_parts(verdicts: Verdicts, whole: int, members: Iterable[int]) -> bool:
    top = verdicts.get(whole)
    firm = [m for m in members if verdicts.is_firm(m)]
    if top is None or not top.infinite or not top.policy or not firm:
        return False
    for member in firm:
        verdicts.question(member, top.why)
    return True


def _wide_outputs(wiring: Wiring, outputs: Iterable[tuple[int, str]]) -> Found:
    """An output as wide as the width that it is made of: classes, or hidden state for another model."""
    for dim, what in outputs:
        root = wiring.space.find(dim)
        verdict: Verdict | None = wiring.verdicts.get(root)
        sources = [d for s in wiring.sources(root) for d in wiring.grown(s)]
        if verdict and not verdict.infinite and wiring.space.size(root) in map(wiring.space.size, sources):
            yield root, f"policy: fixed like data, though as many as the width it is made of ({what})"


def _of(source: int, results: list[int]) -> str:
    made = f"made of {source or 'data'}"
    return f"{made}, read into {', '.join(map(str, sorted(set(results)))) or 'a readout'}"
