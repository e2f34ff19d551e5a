"""Doubts: defaults that stand but that the sizes or the wiring around them speak against.

A width of its own (a latent, a rank, a codebook, a head with a number of channels from the code) looks like
any hidden width to the constraints. What gives it away is its surroundings. A doubt never changes a verdict:
it marks it as settled by a policy, with the reason, so that the report asks and the caller can answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, combinations
from math import gcd, prod

from mupass._dims.policies import (
    DOUBTED,
    FAR_WIDER,
    REPEATED,
    compared,
    mixed,
    numbers_among,
    numbers_written,
)
from mupass._dims.verdicts import Verdicts
from mupass._dims.wiring import Wiring

Found = Iterator[tuple[int, str]]  # dimension, what speaks against it

# Starts the reasons of hidden states, which may not grow at all either.
HIDDEN = "policy: hidden state, since weights read it again"
STRAIGHT = 1.25  # a linear bottleneck is one when it is narrower than its neighbours by this factor
TABLE = 1.5  # the same for the rows of a lookup table
STEM = 2.5  # the same for one that is computed from data: first layers often start narrow
NARROW = 8  # a bottleneck behind a nonlinearity
WIDE = 4  # a last layer that widens before the readout
SHORT = 2  # steps of ordinary convolutions, whatever widths there are
BROAD = 16  # a first layer far above all that read it
STEM_OVER = 2  # the same for a first convolution: mobile networks keep its channels, or scale them
ODD = 32  # smaller widths may be odd numbers of an author's own
SEVERAL = 3  # widths that cannot be odd by chance


def raise_doubts(verdicts: Verdicts, outputs: Iterable[tuple[int, str]]) -> None:
    """Mark verdicts that one model cannot settle.

    Args:
        verdicts: All verdicts, made.
        outputs: Axes of the outputs that a loss may see.
    """
    wiring = Wiring(verdicts)
    # First where a choice among several axes made a width: the rules below look at firm widths only.
    for dim, reason in [*_several_axes(wiring), *_several_factors(wiring), *_uneven_products(wiring)]:
        verdicts.question(dim, reason)
    _follow(verdicts)
    rules: tuple[Callable[[Wiring], Found], ...] = (
        _linear_bottlenecks,
        _bottlenecks,
        _learned_codes,
        _drawn_codes,
        _as_many,
        _combinations,
        _filters,
        _narrow_ends,
        _wide_heads,
        _broad_starts,
        _repeated_sizes,
        _rounded,
        _uneven,
        _unread,
        _single_keys,
        _competing,
        _categorical,
        _mixing,
        _mixed_weights,
        _written,
    )
    for rule in rules:
        for dim, reason in list(rule(wiring)):
            verdicts.question(dim, f"{DOUBTED} {reason}")
        _follow(verdicts)
    for dim, reason in [*_wide_outputs(wiring, outputs), *_wide_windows(wiring), *_picked_widths(wiring)]:
        verdicts.question(dim, reason)
    for dim, reason in list(_rests(wiring)):
        verdicts.question(dim, reason)
    _doubt_sizes(verdicts)


def _linear_bottlenecks(wiring: Wiring) -> Found:
    """Ranks, latents, codes: two weights in a row that would be one matrix but for a narrow middle."""
    for dim in wiring.widths:
        # The nearest row of a table: vector quantization.
        if wiring.codebook(dim) and wiring.source(dim):
            yield dim, "it is the width of a codebook"
        if not wiring.straight(dim) or not wiring.readers(dim):
            continue
        source, results = wiring.before(dim, STRAIGHT), wiring.after(dim, STRAIGHT)
        if source is None:
            continue
        if _is_narrow(wiring, dim, source, results) or source == 0 and wiring.as_many_as_data(dim):
            yield dim, f"no nonlinearity parts the weights around it ({_of(source, results)})"


def _is_narrow(wiring: Wiring, dim: int, source: int, results: Sequence[int]) -> bool:
    """Whether a dimension is narrower than what it is made of and what is made of it, none in a row apart."""
    size = wiring.space.size(dim)
    # First layers often start narrow, and embeddings do not: it takes more to doubt the former.
    if source == 0:  # made of data
        factor = TABLE if wiring.looked_up(dim) else STEM
        return size * factor <= min(results, default=0)
    return size * STRAIGHT <= min([source, *results])


def _bottlenecks(wiring: Wiring) -> Found:
    """A width far below those around it, unless it is a gate or a branch that returns to where it left.

    Gates of whole samples (squeeze and excitation) are narrow by a ratio that people keep. What a weight
    makes at every position anew is a rank more often than not: adapters, the mixes and decays of RWKV.
    """
    for dim in wiring.widths:
        source, results = wiring.source(dim), wiring.results(dim)
        if not source or not results:
            continue
        # x + up(relu(down(x))) returns to where it left.
        if min([source, *results]) < NARROW * wiring.space.size(dim):
            continue
        if not wiring.returns(dim) or wiring.at_positions(dim):
            yield dim, f"it is far narrower than the widths around it ({_of(source, results)})"


def _learned_codes(wiring: Wiring) -> Found:
    """Codes that are parameters themselves, as rows of a table are: narrower than what is made of them."""
    for dim in wiring.widths:
        # nn.Parameter(torch.randn(layers, 6)), which a weight reads: nothing makes that size, of nothing else
        if wiring.sources(dim) or wiring.around(dim) != {dim}:
            continue
        results = wiring.results(dim)
        if results and wiring.space.size(dim) * TABLE <= min(results):
            yield dim, f"only parameters hold it ({_of(0, results)})"


def _drawn_codes(wiring: Wiring) -> Found:
    """Latents: drawn at random by a mean and a deviation, and narrower than all that these are made of.

    Several nets may make them, as the prior and the posterior of a state.
    """
    for dim in filter(wiring.verdicts.is_firm, sorted(wiring.space.find_all(wiring.verdicts.facts.drawn))):
        sources = list(map(wiring.space.size, wiring.grown_sources(dim)))
        if sources and wiring.space.size(dim) * STRAIGHT <= min(sources):
            yield dim, f"it is drawn at random, and narrower than the {min(sources)} that it is made of"


def _as_many(wiring: Wiring) -> Found:
    """Narrow layers with as many units as the outputs that are made of them, or as the data they are made of.

    So are the inner layers of DiffPool's assignments, and ``Linear(3, 3)`` on offsets of points.
    """
    for dim in wiring.widths:
        size, source, results = wiring.space.size(dim), wiring.source(dim), wiring.results(dim)
        outputs = set(chain.from_iterable(wiring.readers(dim)))
        if source and size * STRAIGHT <= source and not wiring.grown(outputs):
            if size in map(wiring.space.size, outputs):
                yield dim, f"it is narrower than the {source} before it, and has as many units as its readout"
        elif source == 0 and size * STEM <= min(results, default=0) and not wiring.by_kernel(dim):
            if wiring.as_many_as_data(dim):
                yield dim, f"it has as many units as the data that it is made of ({_of(0, results)})"


def _combinations(wiring: Wiring) -> Found:
    """Products over another axis: of the leaves of a decision tree of four levels there are 2^4."""
    multiplied = wiring.space.by_class(wiring.verdicts.facts.multiplied)
    for dim in filter(multiplied.__contains__, wiring.widths):
        yield dim, f"its entries are products ({multiplied[dim]}), so it may count cases"


def _filters(wiring: Wiring) -> Found:
    """Filters that the code computes, each from numbers of its own: band-pass filters of two frequencies."""
    filters = wiring.space.by_class(wiring.verdicts.facts.filters)
    for dim in filter(filters.__contains__, wiring.widths):
        yield dim, f"the code computes the weight that makes it ({filters[dim]}), so it may count filters"


def _narrow_ends(wiring: Wiring) -> Found:
    """Channels that a convolution narrows to, of which every position is read by itself.

    Heads of policies and values (AlphaZero) have a few channels at any width of what they read.
    """
    for dim in wiring.widths:
        source = wiring.source(dim)
        if source and wiring.space.size(dim) * STRAIGHT <= source and wiring.laid_out(dim):
            yield dim, f"it is narrower than the {source} before it, and its positions are read one by one"


def _wide_heads(wiring: Wiring) -> Found:
    """A last width far above the one before it, which only readouts see."""
    for dim in wiring.widths:
        size, source = wiring.space.size(dim), wiring.source(dim)
        # features -> WIDE x features -> classes, as in MobileNet. A pointwise convolution at the end is there
        # to widen, and its channels are a number of their own at any factor.
        widened = False
        if source:
            # Of a gated convolution one half is what it makes.
            widened = wiring.matrix_size(dim) > source and wiring.by_pointwise(dim)
        if not source or size < WIDE * source and not widened:
            continue
        doubtful = [
            source_dim for source_dim in wiring.grown_sources(dim) if not wiring.verdicts.is_firm(source_dim)
        ]
        if doubtful and size <= (wiring.before(doubtful[0], STRAIGHT) or size):
            continue  # wide only beside something narrow
        for member in _plateau(wiring, dim):
            yield member, f"only readouts see it and the width before it has {source}"


def _plateau(wiring: Wiring, start: int) -> set[int]:
    """Return what is made of a width, and again of that, if all of it has its size."""
    if not wiring.readers(start):
        return set()
    space = wiring.space
    region, frontier = {start}, [start]
    while frontier:
        # What is made of it must have its size as well, down to the readouts.
        for result in set(wiring.grown_results(frontier.pop())) - region:
            factors = set(wiring.grown(space.members_of(result, "product")))
            if space.size(start) not in map(space.size, factors or {result}):
                return set()
            region |= {result, *factors}
            frontier.append(result)
    return region


def _broad_starts(wiring: Wiring) -> Found:
    """A side network on data (coordinates, say) whose inner width is far above what it computes."""
    for dim in wiring.widths:
        results = wiring.results(dim)
        if wiring.source(dim) != 0 or not results:
            continue
        if wiring.space.size(dim) >= BROAD * max(results):
            yield dim, f"{FAR_WIDER} ({_of(0, results)})"
        elif wiring.by_kernel(dim) and wiring.space.size(dim) >= STEM_OVER * max(results):
            # Generators start wide too, but what they make only gets narrower.
            made = wiring.grown_results(dim)
            later = chain.from_iterable(map(wiring.results, made))
            # A narrow code is in doubt itself, and the convolution before it is not.
            if max(later, default=0) > max(results) and all(map(wiring.verdicts.is_firm, made)):
                yield dim, f"it is a first convolution, and wider than what is made of it ({_of(0, results)})"


def _repeated_sizes(wiring: Wiring) -> Found:
    """A size that stays the same at places where all widths around it are larger by one factor."""
    places: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)  # size -> (dim, sizes around)
    holders: dict[int, int] = {}
    for dim in wiring.widths:
        source, results = wiring.source(dim), wiring.results(dim)
        # heads x head_dim, which is made with two others as 3 x heads x head_dim
        holder = wiring.holder(dim)
        if source is None and holder is not None:
            holders[dim] = holder
            source = wiring.source(holder)
        if source is not None and results:
            places[wiring.space.size(dim)].append((dim, (source, *sorted(set(results)))))
    for size, places_of_size in places.items():
        # The sizes around each place, where they are not just this number again.
        others = sorted({around for _, around in places_of_size if size not in around})
        differing: list[tuple[int, ...]] = []  # those that are others' times one factor
        for first, second in combinations(others, 2):
            if _proportional(first, second):
                differing += [first, second]
        for dim, around in places_of_size:
            if any(_proportional(around, other) for other in differing):
                holder = holders.get(dim, dim)
                for repeated in filter(wiring.verdicts.is_firm, (dim, holder, *_made_beside(wiring, holder))):
                    yield repeated, f"it is {size} {REPEATED}"


def _made_beside(wiring: Wiring, dim: int) -> list[int]:
    """Return what is made as several parts as long as a dimension and holds it: q, k and v of one weight."""
    wholes = []
    for whole, parts in wiring.space.terms("sum"):
        sizes = set(map(wiring.space.size, parts))
        if dim in parts and sizes == {wiring.space.size(dim)} and whole in wiring.fans:
            wholes.append(whole)
    return wholes


def _proportional(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two rows of sizes are the same but for one factor."""
    if len(first) != len(second):
        return False
    # Ratios are compared as products, which are exact.
    return all(left * second[-1] == right * first[-1] for left, right in zip(first, second, strict=True))


def _rounded(wiring: Wiring) -> Found:
    """Narrow places that keep one ratio to their widths only up to multiples of a number: builders round."""
    places: list[tuple[int, int, int]] = []  # dim, its size, the width that it leaves and returns to
    for dim in wiring.widths:
        source, size = wiring.source(dim), wiring.space.size(dim)
        if source and size < source and wiring.returns(dim):
            places.append((dim, size, source))
    step = gcd(*[size for _, size, _ in places])
    if step == 1:
        return
    for _, size, source in places:
        ratio = Fraction(size, source)
        uneven = [place for place in places if ratio * place[2] != place[1]]
        # 24 of 96 and 16 of 48: a quarter each, to the next multiple of 8
        to_multiples = [abs(ratio * place[2] - place[1]) < step for place in places]
        if uneven and all(to_multiples) and all(ratio * place[2] % step for place in uneven):
            for dim, own_size, own_source in places:
                reason = f"it is {own_size} of {own_source}, and all such places are {ratio} of their widths "
                yield dim, f"{reason}only to multiples of {step}, so its builder may round it"
            return


def _uneven(wiring: Wiring) -> Found:
    """Widths of odd sizes that share no factor: a builder rounds them to whole numbers, at any width anew."""
    space = wiring.space
    atoms = [dim for dim in wiring.widths if not space.members_of(dim, "product", "sum")]
    odd = sorted({space.size(dim) for dim in atoms if space.size(dim) > ODD and space.size(dim) % 2})
    if len(odd) >= SEVERAL and gcd(*odd) == 1:
        reason = f"{', '.join(map(str, odd[:SEVERAL]))} share no factor, so its builder may round widths"
        for dim in sorted(filter(wiring.verdicts.is_firm, wiring.fans)):
            yield dim, reason


def _unread(wiring: Wiring) -> Found:
    """What weights make and none reads: it ends in a reduction, a comparison, or unused."""
    verdicts, facts = wiring.verdicts, wiring.verdicts.facts
    # Read as a whole, as a part or as a factor: all of that is read.
    read_by_weights = verdicts.relatives(facts.fan_in)
    for dim in filter(verdicts.is_firm, sorted(wiring.space.find_all(facts.fan_out))):
        if dim not in read_by_weights:
            yield dim, "no weight reads it again"
        elif not wiring.read_whole(dim):
            related = _other_heads(wiring, dim)
            if related:
                yield dim, "weights meet only its number of heads, and that at another size per head"
            # Queries, keys and values have one number of heads: none of them says that it grows.
            for width in sorted(filter(verdicts.is_firm, related)):
                yield width, "it has the heads of queries and keys that are of another size per head"


def _single_keys(wiring: Wiring) -> Found:
    """Queries and keys of one head that are as long as no width around them, or as long as such ones."""
    size = wiring.space.size
    places: list[tuple[int, int, set[int]]] = []
    for dim in filter(wiring.verdicts.is_firm, sorted(compared(wiring.verdicts) & wiring.fans)):
        sources = set(map(size, wiring.grown_sources(dim)))
        # k, v = kv(x).split([key, value]): the values are beside the keys
        beside = set().union(*map(wiring.parts, wiring.wholes(dim))) - {dim}
        if sources:
            places.append((dim, max(sources), sources.union(map(size, beside))))
    for dim in numbers_among(wiring.space, places):
        yield dim, "only scores contract it"


def _other_heads(wiring: Wiring, dim: int) -> set[int]:
    """Return all that has the heads of a width, where what weights read of them has another size per head.

    Heads that weights make of these heads are among it.
    """
    space = wiring.space
    for term in space.terms_of(dim, "product"):
        # heads x head_dim, and not 3 gates x width
        if not any(map(wiring.is_per_head, term)):
            continue
        sizes_per_head: set[int] = set()
        of_read: set[int] = set()
        related: set[int] = set()
        for member in term:
            if not wiring.verdicts.grows(member):
                sizes_per_head.update(map(space.size, (member, *wiring.parts(member))))
                continue
            heads = _talking_heads(wiring, member)
            for width in set(chain.from_iterable(map(wiring.around, heads))) - heads:
                if width in wiring.fans:
                    related |= {width, *heads}
                if wiring.read_whole(width):
                    of_read.update(map(space.size, space.members_of(width, "product")))
        if of_read and of_read.isdisjoint(sizes_per_head):
            return related
    return set()


def _talking_heads(wiring: Wiring, heads: int) -> set[int]:
    """Return heads with those that weights make of them, as many, before they meet the values."""
    reached, frontier = {heads}, [heads]
    while frontier:
        for made in wiring.grown_results(frontier.pop()):
            if made not in reached and wiring.space.size(made) == wiring.space.size(heads):
                reached.add(made)
                frontier.append(made)
    return reached


def _competing(wiring: Wiring) -> Found:
    """Memory slots or units: entries that compete in a softmax and that a weight then reads."""
    competing = wiring.space.by_class(wiring.verdicts.facts.alternatives)
    for dim in wiring.widths:
        if dim in competing and wiring.source(dim) is not None:
            yield dim, competing[dim]


def _categorical(wiring: Wiring) -> Found:
    """Codes: a width that is so many draws from so many classes, which compete in a softmax."""
    verdicts, space = wiring.verdicts, wiring.space
    competing = space.find_all(verdicts.facts.softmaxed)
    # Sizes per head compete in some forms of linear attention, and are summed there.
    for product in verdicts.facts.bilinear:
        competing -= space.find_all(product.inner)
    made = space.find_all(verdicts.facts.fan_out)
    products = list(space.terms("product"))
    # logits = draws x classes, as one weight makes them
    codes = {members for whole, members in products if whole in made and competing.intersection(members)}
    for whole, members in products:
        draws = wiring.grown(members)
        # Another weight reads the draws side by side.
        if members in codes and any(map(wiring.readers, draws)) and competing.isdisjoint(draws):
            sizes = " x ".join(str(space.size(member)) for member in members)
            reason = f"it may count codes ({sizes}), since a softmax weighs one of the factors"
            for dim in filter(verdicts.is_firm, (whole, *draws)):
                yield dim, reason


def _mixing(wiring: Wiring) -> Found:
    """Units that mix the positions of data and give them back: a number of their own, or of the positions."""
    for dim in wiring.widths:
        sources = set(chain.from_iterable(wiring.sources(dim)))
        results = set(chain.from_iterable(wiring.readers(dim)))
        if sources and sources == results and not wiring.grown(sources):
            yield dim, "it only mixes positions of data"


def _mixed_weights(wiring: Wiring) -> Found:
    """What a weight a sample is made of: a number of experts, or the width of a net that makes weights."""
    verdicts, space = wiring.verdicts, wiring.space
    # einsum("be,eio->bio", gate, w): e counts matrices that a gate mixes into one for each sample.
    for dim in filter(verdicts.is_firm, mixed(space, verdicts.facts, verdicts.grows)):
        yield dim, "what it is read into is a weight itself, so it may count weights that are mixed"
    # y_o = sum_ij a_i W_oij b_j: the wider of both sides is a width, the other may count matrices.
    for weight in verdicts.facts.between:
        sizes = [prod(map(space.size, side)) for side in weight.sides]
        for side, size in zip(weight.sides, sizes, strict=True):
            if size == max(sizes):
                continue
            for dim in filter(verdicts.is_firm, map(space.find, side)):
                yield dim, "a weight stands between it and a wider one, so it may count matrices"
        # y_o = a W_o b has a matrix for each o, and as many as people find enough.
        for dim in filter(verdicts.is_firm, map(space.find, weight.made)):
            if space.size(dim) * STRAIGHT <= min(sizes):
                yield dim, "each of its entries has a matrix between two wider ones, so it may count matrices"


def _written(wiring: Wiring) -> Found:
    """A number that the code writes out for a layer, and that other widths have as well."""
    for dim, where in numbers_written(wiring.verdicts, shared=True).items():
        yield dim, f"the code of {where} writes the number {wiring.space.size(dim)}"


def _several_axes(wiring: Wiring) -> Found:
    """Where several axes are one side of a weight and a policy fixed one, that another grows is a policy."""
    for side in wiring.sides:
        if any(map(wiring.is_per_head, side)):
            for dim in wiring.grown(side):
                yield dim, "policy: of several axes that are one width together, this one grows"


def _several_factors(wiring: Wiring) -> Found:
    """Where a width is a product of which no fact fixes one factor, that the other grows is a policy too."""
    verdicts, space = wiring.verdicts, wiring.space
    for kind in ("product", "groups"):
        # width = heads x head_dim with no evidence for either: which of them grows is a choice.
        for whole, members in space.terms(kind):
            growing = wiring.grown(members)
            undecided = []
            if kind == "product":  # groups of a convolution are settled by their own policy
                without = [member for member in members if verdicts.get(member) is None]
                undecided = [member for member in without if not wiring.is_position(member)]
            is_free = undecided or any(map(verdicts.by_policy, members))
            if whole not in wiring.fans or not growing or not is_free:
                continue
            sizes = " x ".join(str(space.size(member)) for member in members)
            for member in growing:
                yield member, f"policy: of the factors {sizes} of a width, this one grows"
            for member in undecided:
                yield member, f"policy: of the factors {sizes} of a width, another grows"


def _uneven_products(wiring: Wiring) -> Found:
    """A product that holds one factor of a width more often than the other: which grows tells its power."""
    verdicts, space = wiring.verdicts, wiring.space
    products = [(whole, members) for whole, members in space.terms("product") if len(members) > 1]
    others: dict[int, set[int]] = defaultdict(set)  # of two factors of a width: one that grows -> the other
    for whole, members in products:
        if whole in wiring.fans and len(members) == 2:
            for grown, fixed in (members, members[::-1]):
                if verdicts.grows(grown) and verdicts.by_policy(fixed):
                    others[grown].add(fixed)
    for whole, members in products:
        for grown in wiring.grown(members):
            beside = [member for member in members if member in others[grown]]
            # heads x head_dim x head_dim, a matrix for each head: by 2 with the heads, by 4 with head_dim
            if len(beside) > members.count(grown):
                sizes = " x ".join(str(space.size(member)) for member in members)
                yield whole, f"policy: of its factors {sizes} the {space.size(grown)} grows, and no other"


def _follow(verdicts: Verdicts) -> None:
    """Carry doubts up and down terms, where nothing else speaks for growth."""
    # Doubts travel along terms in both directions until nothing changes any more.
    changed = True
    while changed:
        changed = False
        for kind in ("product", "sum"):
            for whole, members in verdicts.space.terms(kind):
                if _doubt_whole(verdicts, kind, whole, members):
                    changed = True
                elif kind == "sum" and _doubt_parts(verdicts, whole, members):
                    changed = True


def _rests(wiring: Wiring) -> Found:
    """What a part in doubt makes as wide as others are: cat([h, code]), and nothing else is as wide as h."""
    space = wiring.space
    sizes = Counter(map(space.size, wiring.widths))
    for whole, members in space.terms("sum"):
        in_doubt = [dim for dim in wiring.grown(members) if not wiring.verdicts.is_firm(dim)]
        own_size = sizes[space.size(whole)] - (whole in wiring.widths)
        for dim in filter(wiring.verdicts.is_firm, members if in_doubt and own_size > 0 else ()):
            # An even share, as half of a joined skip connection, is a width by itself.
            if sizes[space.size(dim)] == 1 and space.size(whole) % space.size(dim):
                yield dim, f"policy: a width, which may be {space.size(whole)} less a part in doubt"


def _doubt_sizes(verdicts: Verdicts) -> None:
    """Doubt what grows for certain, but by how much only its members tell: cat([features, latent])."""
    terms = [*verdicts.space.terms("sum"), *verdicts.space.terms("product")]
    changed = True
    while changed:
        changed = False
        for whole, members in filter(lambda term: verdicts.is_firm(term[0]), terms):
            reasons = [verdict.why for verdict in map(verdicts.get, members) if verdict and verdict.infinite]
            doubted = [reason for reason in reasons if reason.startswith((DOUBTED, HIDDEN))]
            if doubted:
                verdicts.question(whole, doubted[0])
                changed = True


def _doubt_whole(verdicts: Verdicts, kind: str, whole: int, members: Iterable[int]) -> bool:
    """Doubt what grows by its members only, if all that grow do so by a policy and the rest is certain."""
    of_members = list(map(verdicts.get, members))
    growing = [verdict for verdict in of_members if verdict and verdict.infinite]
    if not growing or not all(verdict.policy for verdict in growing) or not verdicts.is_firm(whole):
        return False
    fixed_for_certain = all(verdict and (verdict.infinite or not verdict.policy) for verdict in of_members)
    # What a weight makes as a whole is a width, whichever of its factors it grows by. By how much a sum grows
    # depends on which of its parts do.
    if kind == "product" and not fixed_for_certain and _made_whole(verdicts, whole, members):
        return False
    verdicts.question(whole, growing[0].why)
    return True


def _made_whole(verdicts: Verdicts, whole: int, members: Iterable[int]) -> bool:
    """Whether a weight makes a product as one axis, or one that holds all of its members."""
    space = verdicts.space
    made = verdicts.parts_of(verdicts.facts.fan_out)
    if whole in made:
        return True
    factors = set(members)
    return any(other in made and factors <= set(others) for other, others in space.terms("product"))


def _doubt_parts(verdicts: Verdicts, whole: int, members: Iterable[int]) -> bool:
    """Doubt the parts of what grows by a policy only."""
    of_whole = verdicts.get(whole)
    if of_whole is None or not of_whole.infinite or not of_whole.policy:
        return False
    firm = list(filter(verdicts.is_firm, members))
    for member in firm:
        verdicts.question(member, of_whole.why)
    return bool(firm)


def _wide_outputs(wiring: Wiring, outputs: Iterable[tuple[int, str]]) -> Found:
    """An output as wide as the width that it is made of: classes, or hidden state for another model."""
    space = wiring.space
    for dim, what in outputs:
        root = space.find(dim)
        verdict = wiring.verdicts.get(root)
        if verdict is None or verdict.infinite:
            continue
        # As many outputs as the width has units: classes or a hidden state, which the size cannot tell.
        if space.size(root) in map(space.size, wiring.grown_sources(root)):
            yield root, f"policy: fixed like data, though as many as the width it is made of ({what})"


def _wide_windows(wiring: Wiring) -> Found:
    """A kernel of a whole number of steps, each as long as some width: it may grow with that width."""
    space = wiring.space
    widths = {space.size(dim) for dim in wiring.fans if wiring.verdicts.grows(dim)}
    for dim, step in wiring.verdicts.facts.windows:
        # Conv1d(1, d, 3 * d, stride=d) on tokens of d features that are laid end to end
        if step > SHORT and step in widths and space.size(dim) % step == 0:
            yield dim, f"policy: a kernel is fixed, though it moves by {step}, which is the size of a width"


def _picked_widths(wiring: Wiring) -> Found:
    """Entries that are told apart, though weights read them as features, or only put in another order."""
    verdicts, space = wiring.verdicts, wiring.space
    contracted: set[int] = set()
    for parameter_use in verdicts.facts.uses:
        # A lookup contracts the rows of its table, which are told apart by their nature.
        if parameter_use.use.kind != "embedding":
            axes = [(parameter_use.parameter, axis) for axis in parameter_use.use.fan_in]
            contracted |= {space.find(verdicts.facts.carried[axis]) for axis in axes}
    # h * (h >= h.topk(k).values[:, -1:]), then a weight that reads all of it
    for dim in sorted(contracted & space.find_all(verdicts.facts.ranked)):
        yield dim, "policy: fixed, since its entries are ranked, though a weight reads it as features"
    for dim, index in verdicts.facts.reordered:
        of_index = verdicts.get(index)
        # The index is no axis of data, and a weight makes or reads what it picks.
        is_free = of_index is not None and (of_index.infinite or of_index.policy)
        if is_free and space.find(index) in wiring.fans:
            yield (
                dim,
                "policy: fixed like a table, though a fixed index may only reorder units of a weight",
            )


def _of(source: int, results: Iterable[int]) -> str:
    """Return what a width is made of and read into, in words."""
    read_into = ", ".join(map(str, sorted(set(results))))
    return f"made of {source or 'data'}, read into {read_into or 'a readout'}"
