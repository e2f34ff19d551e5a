"""Policies and defaults, one function each: what decides where the graph alone does not.

Every policy marks what it decides, so that a report can say so and the caller overrule it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import permutations

from mupass._dims.facts import Facts, ParameterUse
from mupass._dims.space import Space
from mupass._dims.verdicts import Verdict, Verdicts

# What the verdicts on fixed ones say first.
CODE_FEATURES = "policy: features of the code"
CODE_NUMBER = "policy: a size of its own, since the code of"
# What the reasons of widths say first that may not grow at all, and of those that their sizes speak against.
DOUBTED = "policy: a width like the others, though"
REPEATED = "at several places whose widths differ"
FAR_WIDER = "it is far wider than what is made of it"


def settle_outputs(verdicts: Verdicts, outputs: Sequence[tuple[int, str]]) -> dict[int, str]:
    """Classes or data are output axes that no weight reads; return the others, which may be hidden state."""
    # What a weight reads, or is a part or a whole of that, may be hidden state.
    hidden = verdicts.kin(verdicts.facts.fan_in)
    read_again: dict[int, str] = {}
    for dim, description in outputs:
        if verdicts.space.find(dim) not in hidden:
            verdicts.settle([dim], Verdict(False, description))
        elif verdicts.is_open(dim):
            read_again.setdefault(dim, description)
    # mean, deviation = y[..., :1], y[..., 1:]: parts of one entry settle nothing, and make up all of y
    described = verdicts.space.by_class(dict(outputs))
    for whole, parts in verdicts.space.terms("sum"):
        single = all(verdicts.space.size(part) == 1 and part in described for part in parts)
        if single and whole not in hidden:
            verdicts.settle([whole], Verdict(False, described[parts[0]]))
    return read_again


def settle_heads(verdicts: Verdicts) -> None:
    """Policy: in a batched product of two activations the batch grows (heads), the rest is fixed."""
    # scores[b, h, l, s] = sum_e q[b, h, l, e] k[b, h, s, e]: h is in both and in the result, e is not.
    for product in verdicts.facts.bilinear:
        heads = list(filter(verdicts.is_open, product.batch))
        inner = list(filter(verdicts.is_open, product.inner))
        if heads and inner:
            fixed = Verdict(False, f"policy: fixed size per head ({product.where})", True)
            verdicts.settle([*inner, *_beside(verdicts, heads)], fixed)
    _settle_shared_keys(verdicts)


def _settle_shared_keys(verdicts: Verdicts) -> None:
    """The same where keys are without heads: one key a position, that all heads of the queries meet."""
    space, facts = verdicts.space, verdicts.facts
    made = space.find_all(facts.fan_out)
    read = verdicts.kin(facts.fan_in)
    # What a weight makes as queries is heads x head_dim, and what it makes as keys is head_dim alone.
    queries: list[tuple[int, set[int]]] = []
    for whole, members in space.terms("product"):
        if whole in made and len(members) == 2:
            for head, size_per_head in (members, members[::-1]):
                queries.append((head, _rejoined(space, size_per_head)))
    for product in facts.bilinear:
        # Keys have positions of their own. What meets x[b, e] alone is a matrix w[b, e, o] that data picked.
        if len(product.inner) < 3:
            continue
        inner = space.find_all(filter(verdicts.is_open, product.inner))
        # scores[b, l, h, s] = sum_e q[b, l, h, e] k[b, s, e], of which no weight reads e
        for head, sizes in queries:
            is_key = not sizes.isdisjoint(made) and sizes.isdisjoint(read) and head not in sizes
            if head in inner and is_key and not sizes.isdisjoint(inner):
                reason = f"policy: fixed size per head, whose keys all heads share ({product.where})"
                verdicts.settle(sizes, Verdict(False, reason, True))


def compared(verdicts: Verdicts) -> set[int]:
    """Return what products of activations contract and no weight, neither a part of it nor a whole."""
    inner: set[int] = set()
    for product in verdicts.facts.bilinear:
        inner |= verdicts.space.find_all(product.inner)
    return inner - verdicts.kin(verdicts.facts.fan_in)


def numbers_among(space: Space, places: Sequence[tuple[int, int, set[int]]]) -> list[int]:
    """Return the dimensions whose sizes look like numbers of their own, and not like the widths around them.

    Args:
        space: The solved constraints.
        places: Dimension, the size of what it is made of, and other sizes around it.

    Returns:
        Those that are as long as nothing around them, and all others of the same size: what stays where the
        widths differ follows none of them. None at all where sizes show one ratio to several widths.
    """
    pairs = {(space.size(dim), source) for dim, source, _ in places}
    if len(pairs) > 1 and len({Fraction(*pair) for pair in pairs}) == 1:
        return []
    numbers = {space.size(dim) for dim, source, around in places if space.size(dim) not in {source, *around}}
    return [dim for dim, _, _ in places if space.size(dim) in numbers]


def settle_keys(verdicts: Verdicts) -> None:
    """Policy: queries and keys of one head that are cut out of one width with the values are of fixed size.

    A depthwise convolution on them makes no width of them. Not where they are as long as the values or as
    what that width is made of, or in one proportion to it at several widths.
    """
    space, facts = verdicts.space, verdicts.facts
    sources: dict[int, set[int]] = defaultdict(set)  # what a weight makes -> sizes of what it reads
    for fan_in, fan_out in facts.weights:
        for dim in space.find_all(fan_out):
            sources[dim].update(map(space.size, filter(verdicts.is_open, fan_in)))
    keys, read = compared(verdicts) & space.find_all(facts.fan_out), verdicts.kin(facts.fan_in)
    places: list[tuple[int, int, set[int]]] = []
    for whole, parts in space.terms("sum"):
        values = {space.size(part) for part in parts if part in read}
        # q, k, v = qkv(x).split([key, key, value]), then scores depthwise(q) k^T
        for key in sorted(keys.intersection(parts)):
            if parts.count(key) == 2 and values and sources[whole]:
                places.append((key, max(sources[whole]), values))
    reason = "policy: fixed size of the queries and keys of one head, which scores alone contract"
    verdicts.settle(numbers_among(space, places), Verdict(False, reason, True))


def numbers_written(verdicts: Verdicts, shared: bool = False) -> dict[int, str]:
    """Return the widths whose sizes the code writes out, where most follow an argument; each with the class.

    Args:
        verdicts: What all other policies and defaults decide. What is in doubt already is asked about anyway,
            but that a size repeats or is far above its surroundings speaks for a number, too.
        shared: Whether those are wanted whose size other widths have too, which may be written somewhere
            that was not understood; else the others, which are numbers of their own.
    """
    space, facts = verdicts.space, verdicts.facts
    written = space.by_class(facts.written)
    carried = list(map(space.find, facts.carried.values()))
    widths = list(filter(verdicts.is_firm, carried))
    if not shared:
        widths += [dim for dim in carried if _is_odd(verdicts, dim)]
    numbers = [dim for dim in widths if dim in written]
    # Where most of a model is numbers, they say nothing of what its author would widen.
    if 2 * len(numbers) > len(widths):
        return {}
    others = {space.size(dim) for dim in widths if dim not in written}
    fans = space.find_all((*facts.fan_in, *facts.fan_out))
    chosen = sorted(fans.intersection(numbers))
    return {dim: written[dim] for dim in chosen if (space.size(dim) in others) == shared}


def _is_odd(verdicts: Verdicts, dim: int) -> bool:
    """Whether a dimension grows, though its size is not that of a width where it stands."""
    verdict = verdicts.get(dim)
    if verdict is None or not verdict.infinite:
        return False
    return REPEATED in verdict.why or FAR_WIDER in verdict.why


def settle_numbers(verdicts: Verdicts, numbers: Mapping[int, str]) -> None:
    """Policy: a number that the code writes out for a layer stays, where most widths follow an argument.

    Args:
        verdicts: What is settled so far.
        numbers: Result of `numbers_written`.
    """
    for dim, where in numbers.items():
        reason = f"{CODE_NUMBER} {where} writes the number {verdicts.space.size(dim)}"
        verdicts.settle([dim], Verdict(False, reason, True))


def _rejoined(space: Space, dim: int) -> set[int]:
    """Return a dimension with all that have the same parts: what is cut and joined again.

    A part may be laid out otherwise in between, as pairs that rotary positions turn into halves: by a view
    or by slices with a step.
    """
    rejoined = {dim}
    own_terms = space.terms_of(dim, "sum")
    for whole, members in space.terms("sum"):
        if any(_same_parts(space, members, own) for own in own_terms):
            rejoined.add(whole)
    return rejoined


def _same_parts(space: Space, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sums have the same parts one by one, or parts as long that are made of the same."""

    def pieces(dim: int) -> set[int]:
        return {dim, *space.members_of(dim, "product", "sum")}

    pairs = list(zip(first, second, strict=False))
    as_long = len(first) == len(second) and all(space.size(a) == space.size(b) for a, b in pairs)
    return as_long and all(pieces(a) & pieces(b) for a, b in pairs)


def _beside(verdicts: Verdicts, heads: Iterable[int]) -> list[int]:
    """Return the other factor of every width that is heads times something."""
    space = verdicts.space
    widths = space.find_all((*verdicts.facts.fan_in, *verdicts.facts.fan_out))
    counts = space.find_all(heads)
    for head in tuple(counts):  # the heads of keys, where several queries share them
        counts.update(filter(verdicts.is_open, space.members_of(head, "product")))
    beside: list[int] = []
    for whole, members in space.terms("product"):
        # width = heads x head_dim: the factor beside the heads is the fixed size of a head.
        if whole in widths and len(members) == 2 and len(counts.intersection(members)) == 1:
            beside += [member for member in members if member not in counts]
    return beside


def settle_blocks(verdicts: Verdicts) -> None:
    """Policy: a width cut into blocks, each with a weight of its own, gets more blocks, not larger ones."""
    space = verdicts.space
    pairs: set[tuple[int, int]] = set()  # factors of one width
    for _, members in space.terms("product"):
        pairs.update(permutations(set(members), 2))
    # y[b, g, o] = sum_i x[b, g, i] W[g, i, o], where the width is g x i.
    for product in verdicts.facts.blocks:
        counts = space.find_all(filter(verdicts.is_open, product.batch))
        # Capsules: blocks of the channels at every position, (count x positions) matrices.
        for count in tuple(counts):
            counts.update(filter(verdicts.is_open, space.members_of(count, "product")))
        reason = f"policy: fixed size per block ({product.where})"
        block_sizes = []
        for dim in filter(verdicts.is_open, product.inner):
            # count x inner is a width: so inner is the size of a block that is cut out of it.
            if any((count, space.find(dim)) in pairs for count in counts):
                block_sizes.append(dim)
        verdicts.settle(block_sizes, Verdict(False, reason, True))


def unmade(verdicts: Verdicts, made: Iterable[int]) -> dict[int, str]:
    """Return the open dimensions that weights read and none makes: features that the code computes."""
    space, facts = verdicts.space, verdicts.facts
    spread = space.find_all(facts.spread)  # frequencies: a vector times a number
    # Made is what weights make and what parameters bring along.
    parameters = [dim for dim in made if space.find(dim) not in spread]
    reached = verdicts.reached([*parameters, *facts.fan_out])
    features: dict[int, str] = {}
    for dim, where in facts.fan_in.items():
        if verdicts.is_open(dim) and space.find(dim) not in reached:
            features[space.find(dim)] = where
    return features


def settle_unmade(verdicts: Verdicts, features: Mapping[int, str]) -> None:
    """Policy: features that the code computes are fixed, unless as many as the first layer has units.

    Sinusoids of positions come in d_model, those of a time step often in a number of their own. Nothing but
    the size tells them apart, so the verdict is marked as a policy.

    Args:
        verdicts: What is decided so far.
        features: What `unmade` returned.
    """
    space = verdicts.space
    widths = _first_widths(verdicts, features)
    # Atoms first: a product of features follows from them.
    atoms_first = sorted(features, key=lambda dim: bool(space.terms_of(dim, "product")))
    for dim in atoms_first:
        grows = space.size(dim) in widths
        reason = CODE_FEATURES
        if grows:
            reason = "policy: as many features of the code as the first layer has units"
        verdicts.settle([dim], Verdict(grows, f"{reason} ({features[dim]})", True))


def _first_widths(verdicts: Verdicts, features: Mapping[int, str]) -> set[int]:
    """Return the sizes of growing dimensions that weights make of data."""
    space, weights = verdicts.space, verdicts.facts.weights
    # What is made of these features is no input of a first layer, also where the caller fixes its size.
    behind: set[int] = set()
    for fan_in, fan_out in weights:
        if not space.find_all(fan_in).isdisjoint(features):
            behind |= space.find_all(fan_out)

    def is_data(dim: int) -> bool:
        return not (verdicts.is_open(dim) or verdicts.grows(dim) or space.find(dim) in behind)

    sizes: set[int] = set()
    for fan_in, fan_out in weights:
        if all(map(is_data, fan_in)):
            sizes.update(map(space.size, filter(verdicts.grows, fan_out)))
    return sizes


def settle_alternatives(verdicts: Verdicts) -> None:
    """Policy: alternatives (experts, slots, bins) are fixed, unless weights read them as features.

    A weight between two activations may count matrices along one of them: experts under a softmax.

    What is read flattened, so many features for each of those that a softmax weighs, are the features.
    What trained weights make and frozen ones alone read are bins, each with a value of its own.
    """
    space, facts = verdicts.space, verdicts.facts
    read_by_weights = verdicts.relatives(facts.fan_in)
    valued = _read_by_frozen_alone(verdicts)
    direct = space.find_all(facts.fan_in)
    between: set[int] = set()
    for weight in facts.between:
        for side in weight.sides:
            between |= space.find_all(side)
    counts = _counts(verdicts)  # sum_s a_s f_s, read as (s f): the weights read slots x features
    for dim, reason in facts.alternatives.items():
        root = space.find(dim)
        flattened = dim in facts.softmaxed and root not in direct and root in counts
        if root not in read_by_weights or root in between or root in valued or flattened:
            verdicts.settle([dim], Verdict(False, f"policy: {reason}", True))


def _read_by_frozen_alone(verdicts: Verdicts) -> set[int]:
    """Return what trained weights make and none of them reads, though frozen ones do."""
    facts = verdicts.facts
    trained = [use for use in facts.uses if use.parameter not in facts.frozen]
    frozen = [use for use in facts.uses if use.parameter in facts.frozen]
    # sum_k softmax(x)_k v_k with v frozen: the expected value over bins, as distribution focal loss has it
    read_by_frozen = verdicts.relatives(_dims_of(facts, frozen, "fan_in"))
    made_by_trained = verdicts.relatives(_dims_of(facts, trained, "fan_out"))
    return read_by_frozen & made_by_trained - verdicts.relatives(_dims_of(facts, trained, "fan_in"))


def _dims_of(facts: Facts, uses: Iterable[ParameterUse], side: str) -> list[int]:
    """Return the dims that parameters contract (``fan_in``) or make (``fan_out``) in some uses."""
    dims: list[int] = []
    for parameter_use in uses:
        axes = parameter_use.use.fan_in if side == "fan_in" else parameter_use.use.fan_out
        dims += [facts.carried[parameter_use.parameter, axis] for axis in axes]
    return dims


def _counts(verdicts: Verdicts) -> set[int]:
    """Return the factors that stand beside an open one wherever they are part of something."""
    counts: dict[int, bool] = {}
    for kind in ("product", "sum"):
        for _, term in verdicts.space.terms(kind):
            for dim in term:
                others = [other for other in term if other != dim]
                # In a sum a dimension has neighbours, and none of them multiplies it.
                beside_open = kind == "product" and any(map(verdicts.is_open, others))
                counts[dim] = counts.get(dim, True) and beside_open
    return {dim for dim, always in counts.items() if always}


def settle_routers(verdicts: Verdicts) -> None:
    """Policy: what is read only into coefficients of as many separate tensors is one for each of them.

    Routers of AltUp (arXiv 2301.13310): a score for each copy of the hidden state, and weights that make of
    the scores how the copies are mixed.
    """
    space, facts = verdicts.space, verdicts.facts
    separate = space.find_all((*facts.stacked, *facts.enumerated))
    made_of: dict[int, list[set[int]]] = defaultdict(list)  # what a weight reads -> atoms of what it makes
    for fan_in, fan_out in facts.weights:
        # Of a product its factors count, and not the product beside them.
        atoms = {dim for dim in _factors_of(space, fan_out) if not space.terms_of(dim, "product")}
        for dim in map(space.find, fan_in):
            made_of[dim].append(atoms)
    for dim, results in made_of.items():
        coefficients = all(atoms and atoms <= separate for atoms in results)
        # As many scores as separate tensors: a coefficient for each of them.
        if coefficients and all(space.size(dim) in map(space.size, atoms) for atoms in results):
            reason = "policy: as many as the separate tensors whose coefficients are made of it"
            verdicts.settle([dim], Verdict(False, reason, True))


def settle_copies(verdicts: Verdicts) -> None:
    """Policy: copies that the code makes of a width stay as many, though weights make a coefficient for each.

    Streams of hyper-connections (arXiv 2409.19606): the hidden state several times, read side by side.
    """
    space, facts = verdicts.space, verdicts.facts
    made, read = space.find_all(facts.fan_out), space.find_all(facts.fan_in)
    for dim, operator in facts.repeated.items():
        root = space.find(dim)
        if root not in made or root in read:
            continue
        # x[:, :, None].expand(-1, -1, n, -1).flatten(2), which weights read: n x width
        beside: set[int] = set()
        for whole, members in space.terms("product"):
            if root in members and whole in read:
                beside.update(member for member in members if member != root)
        if beside & (made | read):
            verdicts.settle([dim], Verdict(False, f"policy: it counts copies of a width ({operator})", True))


def settle_adapters(verdicts: Verdicts) -> None:
    """Policy: the rank of an adapter is fixed: two weights in a row, beside one that joins the same widths.

    Between a width and itself (cross networks) the two need be no correction of the one, nor with a product
    of activations in between (values of attention).
    """
    space, facts = verdicts.space, verdicts.facts
    weights = []
    for fan_in, fan_out in facts.weights:
        weights.append((frozenset(space.find_all(fan_in)), frozenset(space.find_all(fan_out))))
    straight = space.find_all(facts.straight) - space.find_all(facts.bent)
    # Queries and keys follow their weights straight too, but meet each other in a product.
    for product in facts.bilinear:
        straight -= space.find_all((*product.batch, *product.inner))
    for rank in sorted(filter(verdicts.is_open, straight)):
        # y = (A B + W) x
        sources = [fan_in for fan_in, fan_out in weights if fan_out == {rank}]
        results = [fan_out for fan_in, fan_out in weights if fan_in == {rank}]
        if len(sources) != 1 or len(results) != 1 or sources == results:
            continue
        if (sources[0], results[0]) in weights:
            reason = "policy: the rank of two weights in a row, beside one that joins the same widths"
            verdicts.settle([rank], Verdict(False, reason, True))


def settle_inserted(verdicts: Verdicts) -> None:
    """Policy: a narrow place that only trained weights make and read, among frozen ones, is fixed.

    Ranks of adapters and bottlenecks that are put into a trained model: they lead back into its own widths.
    A new readout on top of it does not.
    """
    space = verdicts.space
    frozen = _frozen_dims(verdicts)
    made_of, read_into = _around_trained(verdicts)

    def may_grow(dim: int) -> bool:
        return verdicts.is_open(dim) or verdicts.grows(dim)

    # y = W x + B (A x) with W frozen: a rank is made of what W reads, and read into what W makes.
    for rank in sorted(filter(verdicts.is_open, made_of.keys() & read_into.keys() - frozen)):
        sources = set(filter(may_grow, made_of[rank]))
        around = sources | set(filter(may_grow, read_into[rank]))
        narrow = around and space.size(rank) < min(map(space.size, around))
        if narrow and sources | read_into[rank] <= frozen:
            reason = "policy: narrower than the frozen weights around it, which alone it leads from and to"
            verdicts.settle([rank], Verdict(False, reason, True))


def _frozen_dims(verdicts: Verdicts) -> set[int]:
    """Return the dims that frozen parameters have."""
    space, facts = verdicts.space, verdicts.facts
    frozen = set()
    for (parameter, _), dim in facts.carried.items():
        if parameter in facts.frozen:
            frozen.add(space.find(dim))
    return frozen


def _around_trained(verdicts: Verdicts) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Return, for every dim, what trained weights make it of, and what they make of it."""
    space, facts = verdicts.space, verdicts.facts
    made_of: dict[int, set[int]] = defaultdict(set)
    read_into: dict[int, set[int]] = defaultdict(set)
    for parameter_use in facts.uses:
        if parameter_use.parameter in facts.frozen:
            continue
        fan_in = space.find_all(_dims_of(facts, [parameter_use], "fan_in"))
        fan_out = space.find_all(_dims_of(facts, [parameter_use], "fan_out"))
        for dim in fan_out:
            made_of[dim] |= fan_in
        for dim in fan_in:
            read_into[dim] |= fan_out
    return made_of, read_into


def settle_rests(verdicts: Verdicts) -> None:
    """Policy: an axis of which only fixed parts are ever read is fixed; what no slice covers says nothing."""
    space = verdicts.space
    # x[:, :3] where the rest of x is never read
    rests = space.find_all(space.rests)
    cuts = [(whole, parts) for whole, parts in space.terms("sum") if not rests.isdisjoint(parts)]
    progress = True
    while progress:
        progress = False
        for whole, parts in cuts:
            of_parts = [verdicts.get(part) for part in parts if part not in rests]
            if (
                verdicts.is_open(whole)
                and of_parts
                and all(verdict and not verdict.infinite for verdict in of_parts)
            ):
                verdicts.settle([whole], Verdict(False, "policy: only fixed parts of it are read", True))
                progress = True


def _fixed_heads(verdicts: Verdicts) -> set[int]:
    """Return what the policy of heads fixed: the sizes per head."""
    inner: set[int] = set()
    for product in verdicts.facts.bilinear:
        inner |= verdicts.space.find_all(product.inner)
    return set(filter(verdicts.by_policy, inner))


def settle_groups(verdicts: Verdicts) -> None:
    """Policy: a grouped convolution keeps its number of groups, unless the size of a group is fixed.

    It is fixed too where the channels are cut into heads of just that size: a group is a head then.
    """
    space = verdicts.space
    heads = _fixed_heads(verdicts)
    free_groups = set()
    for whole, members in space.terms("groups"):
        if len(members) != 2:
            continue
        group, channels = members
        # A convolution with groups=heads on channels = heads x head_dim: a group is a head.
        heads_of_size = {head for head in heads if space.size(head) == space.size(channels)}
        if heads_of_size and not heads_of_size.isdisjoint(verdicts.relatives([whole])):
            verdicts.settle([channels], Verdict(False, "policy: a group is a head of fixed size", True))
        if not verdicts.is_open(channels) and not verdicts.grows(channels) and space.size(channels) > 1:
            free_groups.add(group)
    for dim, operator in verdicts.facts.groups.items():
        if space.find(dim) not in free_groups:
            verdicts.settle(
                [dim], Verdict(False, f"policy: the number of groups is fixed ({operator})", True)
            )


def settle_fans(verdicts: Verdicts, unmade: Mapping[int, str], made: Iterable[int]) -> None:
    """Default: what weights contract or make, and nothing certain touches, is a width.

    So is a part of a concatenation that a weight contracts, where parameters bring that part along. Wholes
    first would hide which of their members grow, so members with evidence of their own go first.

    Args:
        verdicts: What is decided so far.
        unmade: Features that the code computes.
        made: Axes that parameters bring into the computation.
    """
    facts, space = verdicts.facts, verdicts.space
    brought = space.find_all(made)
    fans: dict[int, str] = {}  # class -> where
    for dim, operator in reversed(facts.fan_in.items()):  # those that are read last come first
        # cat([h, x]) is read as one: the part h is a width if parameters bring it along.
        parts = brought.intersection(space.members_of(dim, "sum"))
        fans.update(dict.fromkeys(sorted(parts), operator))
    for dim, operator in (*facts.fan_out.items(), *facts.fan_in.items()):
        fans[space.find(dim)] = operator
    read_or_made = [dim for dim in fans if dim not in unmade]
    # Atoms before what is made of them: a width of known factors follows from these.
    atoms = [dim for dim in read_or_made if not space.members_of(dim, "product", "sum")]
    for dim in [*atoms, *read_or_made]:
        reason = f"a width: no data, kernel or class axis touches it ({fans[dim]})"
        verdicts.settle([dim], Verdict(True, reason))


def settle_scores(verdicts: Verdicts) -> None:
    """Policy: a part of a growing width that only scores of positions contract is one head of that width.

    A state of fixed size is contracted with positions as well, but it also meets the width, or is made twice:
    once to write and once to read.
    """
    space = verdicts.space
    single: set[int] = set()  # parts that are there once
    for whole, parts in space.terms("sum"):
        if verdicts.grows(whole):
            # q and k of one split are two equal parts; what is scored by itself is there once.
            single.update(part for part in parts if parts.count(part) == 1)
    meets_width: dict[int, bool] = {}
    operator_of: dict[int, str] = {}
    for product in verdicts.facts.bilinear:
        inner, batch = space.find_all(product.inner), space.find_all(product.batch)
        for dim in inner & single:
            others = inner - {dim} | batch
            meets_width[dim] = meets_width.get(dim, False) or any(map(verdicts.grows, others))
            operator_of[dim] = product.where
    for dim in sorted(meets_width):
        if not meets_width[dim]:
            reason = (
                f"policy: one head of a width that grows, compared between positions ({operator_of[dim]})"
            )
            verdicts.settle([dim], Verdict(True, reason, True))


def settle_joined(verdicts: Verdicts) -> None:
    """Default: parameters joined into one growing weight all grow, except for data among them."""
    # linear(x, cat([W_q, W_k, W_v]))
    joined = verdicts.space.find_all(verdicts.facts.joined)
    for whole, parts in verdicts.space.terms("sum"):
        of_whole = verdicts.get(whole)
        if whole in joined and of_whole is not None and of_whole.infinite:
            verdicts.settle(parts, Verdict(True, f"a part of a growing weight ({of_whole.why})"))


def settle_products(verdicts: Verdicts) -> None:
    """Where a whole must grow and several members could, prefer those that the code does not spell out."""
    literal = verdicts.space.find_all(verdicts.facts.literal)
    progress = True
    while progress:
        progress = False
        for whole, members in verdicts.open_terms():
            still_open = list(filter(verdicts.is_open, members))
            of_whole = verdicts.get(whole)
            if not still_open or of_whole is None or any(map(verdicts.grows, members)):
                continue
            # view(batch, -1, 64): the number in the code stays, and what was left open grows.
            candidates = [member for member in still_open if member not in literal] or still_open
            # The parts of a sum may all grow; of the factors of a product one does.
            choice = len(candidates) > 1 and members in verdicts.space.terms_of(whole, "product")
            if choice:
                # flatten(w, 0, 1): the first axes of a parameter count matrices
                if _one_parameter(verdicts, candidates):
                    candidates = candidates[::-1]
                candidates = candidates[:1]
            verdicts.settle(
                candidates, Verdict(True, f"policy: it grows with its whole ({of_whole.why})", choice)
            )
            progress = True


def _one_parameter(verdicts: Verdicts, dims: Iterable[int]) -> bool:
    """Whether one parameter has all of some dimensions as axes of its own, beside another axis of some size.

    So does a stack of matrices ``[3, d, d]``, and the vectors ``[1, heads, head_dim]`` of attention over
    graphs do not.
    """
    space, required = verdicts.space, set(dims)
    axes: dict[str, list[int]] = defaultdict(list)
    for (parameter, _), dim in verdicts.facts.carried.items():
        if space.size(dim) > 1:
            axes[parameter].append(space.find(dim))
    return any(
        required <= set(parameter_dims) and len(parameter_dims) > len(required)
        for parameter_dims in axes.values()
    )


def settle_cuts(verdicts: Verdicts) -> None:
    """Default: where a width is cut, what no weight reads of it and what is joined again grows with the rest.

    Partial convolutions keep most channels as they are. Policy: what other activations meet instead, such as
    the state of a scan, is fixed; as many as a part that grows are the other half of it.
    """
    space, facts = verdicts.space, verdicts.facts
    rests = space.find_all(space.rests)
    joined = _wholes(verdicts, facts.parts)
    carried = space.find_all(facts.carried.values())
    settled = True
    while settled:  # a part may be cut again
        settled = False
        for whole, parts in space.cuts:
            of_whole = verdicts.get(whole)
            still_open = space.find_all(filter(verdicts.is_open, parts)) - rests
            if not still_open or of_whole is None or not of_whole.infinite:
                continue
            halves = set(map(space.size, filter(verdicts.grows, parts)))
            reason = f"a part of a width that is cut ({of_whole.why})"
            for part in sorted(still_open):
                if part in joined:
                    verdicts.settle([part], Verdict(True, reason))
                elif part not in carried and space.size(part) in halves:
                    # Only its size says that it is a half.
                    verdicts.settle([part], Verdict(True, f"policy: {reason}, as long as another", True))
                else:
                    verdicts.settle([part], Verdict(False, f"policy: {reason}", True))
            settled = True


def _wholes(verdicts: Verdicts, members: Iterable[int]) -> set[int]:
    """Return dimensions, and all that is cut or viewed into them."""
    space = verdicts.space
    terms = [*space.cuts, *space.terms("product")]
    reached = space.find_all(members)
    reached_before = -1
    # To a fixed point, since a whole may be a part of something else.
    while reached_before < len(reached):
        reached_before = len(reached)
        for whole, parts in terms:
            if not reached.isdisjoint(map(space.find, parts)):
                reached.add(space.find(whole))
    return reached


def mixed(space: Space, facts: Facts, grows: Callable[[int], bool] | None = None) -> dict[int, bool]:
    """Return the dimensions along which whole weights are mixed into one weight a sample.

    Experts under a gate: ``w = sum_e g_e W_e``, then ``w h``. Nothing else contracts such a dimension.

    Args:
        space: The solved constraints.
        facts: What the rules recorded.
        grows: What the weight must contract to count, where verdicts are there already.

    Returns:
        Dimension -> whether the parameter holds it beside two axes of its own, so that it counts matrices.
    """
    weight_sides = []
    for weight in facts.made_weights:
        # Where verdicts are there, only weights that contract a width count.
        if grows is None or any(map(grows, weight.summed)):
            weight_sides.append((_factors_of(space, weight.summed), _factors_of(space, weight.kept)))
    mixed_dims: dict[int, bool] = {}
    contracted_otherwise: set[int] = set()
    for fan_in, fan_out in facts.weights:
        parts = _factors_of(space, fan_out)
        # The weight makes a weight: an activation whose axes another product sums and keeps.
        if any(parts & summed and (parts - summed) & kept for summed, kept in weight_sides):
            mixed_dims.update(dict.fromkeys(map(space.find, fan_in), len(fan_out) > 1))
        else:
            contracted_otherwise |= space.find_all(fan_in)
    return {dim: apart for dim, apart in mixed_dims.items() if dim not in contracted_otherwise}


def _factors_of(space: Space, dims: Iterable[int]) -> set[int]:
    """Return dimensions with all factors that they are viewed as."""
    factors: set[int] = set()
    frontier = list(map(space.find, dims))
    while frontier:
        dim = frontier.pop()
        factors.add(dim)
        frontier += set(space.members_of(dim, "product", "groups")) - factors
    return factors


def settle_mixtures(verdicts: Verdicts) -> None:
    """Policy: the number of matrices that are mixed into one weight a sample is fixed, whatever the gate."""
    for dim, operator in verdicts.facts.mixtures.items():
        reason = f"policy: it counts weights that are mixed into one ({operator})"
        verdicts.settle([dim], Verdict(False, reason, True))


def settle_experts(verdicts: Verdicts) -> None:
    """Policy: the number of matrices that read the same, whose results meet a matrix each again, is fixed.

    Experts that all run: ``einsum("bd,edf->bef", x, w1)``, then ``einsum("bef,efd->bed", h, w2)`` and a sum
    over e. Heads that such weights make are contracted with the rest of the width.
    """
    space, facts = verdicts.space, verdicts.facts
    contracted = verdicts.kin(facts.fan_in)
    one_each: dict[int, str] = {}  # dims that count matrices, one for each entry -> where
    for product in facts.blocks:
        one_each.update(dict.fromkeys(map(space.find, product.batch), product.where))
    for _, fan_out in facts.weights:
        made = space.find_all(fan_out)
        if len(made) < 2:
            continue
        for dim in sorted(made & one_each.keys() - contracted):
            reason = f"policy: it counts matrices that read the same and are not read again ({one_each[dim]})"
            verdicts.settle([dim], Verdict(False, reason, True))


def settle_basis(verdicts: Verdicts) -> None:
    """Policy: what is summed between parameters alone is fixed."""
    for dim, operator in verdicts.facts.basis.items():
        reason = f"policy: two parameters are contracted along it ({operator})"
        verdicts.settle([dim], Verdict(False, reason, True))
