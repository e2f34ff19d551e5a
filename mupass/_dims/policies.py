"""Policies and defaults, one function each: what decides where the graph alone does not.

Every policy marks what it decides, so that a report can say so and the caller overrule it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mupass._dims.facts import Facts
from mupass._dims.space import Space
from mupass._dims.verdicts import Verdict, Verdicts


def settle_outputs(verdicts: Verdicts, outputs: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Classes or data are output axes that no weight reads; return the others, which may be hidden state."""
    hidden = verdicts.kin(verdicts.facts.fan_in)
    read: dict[int, str] = {}
    for dim, why in outputs:
        if verdicts.space.find(dim) not in hidden:
            verdicts.settle([dim], Verdict(False, why))
        elif verdicts.is_open(dim):
            read.setdefault(dim, why)
    return read


def settle_heads(verdicts: Verdicts) -> None:
    """Policy: in a batched product of two activations the batch grows (heads), the rest is fixed."""
    for product in verdicts.facts.bilinear:
        heads = [d for d in product.batch if verdicts.is_open(d)]
        inner = [d for d in product.inner if verdicts.is_open(d)]
        if heads and inner:
            fixed = Verdict(False, f"policy: fixed size per head ({product.where})", True)
            verdicts.settle([*inner, *_beside(verdicts, heads)], fixed)


def _beside(verdicts: Verdicts, heads: Iterable[int]) -> list[int]:
    """Return the other factor of every width that is heads times something."""
    space, facts = verdicts.space, verdicts.facts
    widths = {space.find(d) for d in (*facts.fan_in, *facts.fan_out)}
    roots = {space.find(d) for d in heads}
    roots |= {m for d in roots for term in space.terms_of(d, "product") for m in term if verdicts.is_open(m)}
    pairs = [members for whole, members in space.terms("product") if whole in widths and len(members) == 2]
    return [m for pair in pairs if len(roots & set(pair)) == 1 for m in pair if m not in roots]


def settle_blocks(verdicts: Verdicts) -> None:
    """Policy: a width cut into blocks, each with a weight of its own, gets more blocks, not larger ones."""
    together = {
        (a, b) for _, members in verdicts.space.terms("product") for a in members for b in members if a != b
    }
    for product in verdicts.facts.blocks:
        count = {verdicts.space.find(d) for d in product.batch if verdicts.is_open(d)}
        inner = [d for d in product.inner if verdicts.is_open(d)]
        cut = [d for d in inner if any((c, verdicts.space.find(d)) in together for c in count)]
        verdicts.settle(cut, Verdict(False, f"policy: fixed size per block ({product.where})", True))


def unmade(verdicts: Verdicts, made: Iterable[int]) -> dict[int, str]:
    """Return the open dimensions that weights read and none makes: features that the code computes."""
    space, facts = verdicts.space, verdicts.facts
    spread = set(map(space.find, facts.spread))  # frequencies: a vector times a number
    reached = verdicts.reached([*(d for d in made if space.find(d) not in spread), *facts.fan_out])
    found = {space.find(d): where for d, where in facts.fan_in.items() if verdicts.is_open(d)}
    return {d: where for d, where in found.items() if d not in reached}


def settle_unmade(verdicts: Verdicts, unmade: Mapping[int, str]) -> None:
    """Policy: features that the code computes are fixed, unless as many as the first layer has units.

    Sinusoids of positions come in d_model, those of a time step often in a number of their own. Nothing but
    the size tells them apart, so the verdict is marked as a policy.
    """
    space = verdicts.space
    weights = verdicts.facts.weights
    # What is made of these features is no input of a first layer, also where the caller fixes its size.
    behind = {
        space.find(d) for into, out in weights if unmade.keys() & set(map(space.find, into)) for d in out
    }
    widths = {
        space.size(dim)
        for into, out in weights
        if not any(verdicts.is_open(d) or verdicts.grows(d) or space.find(d) in behind for d in into)
        for dim in out
        if verdicts.grows(dim)
    }
    for dim, where in sorted(unmade.items(), key=lambda item: bool(space.terms_of(item[0], "product"))):
        grown = space.size(dim) in widths
        why = "as many features of the code as the first layer has units" if grown else "features of the code"
        verdicts.settle([dim], Verdict(grown, f"policy: {why} ({where})", True))


def settle_alternatives(verdicts: Verdicts) -> None:
    """Policy: alternatives (experts, slots, bins) are fixed, unless weights read them as features.

    A weight between two activations may count matrices along one of them: experts under a softmax.

    What is read flattened, so many features for each of those that a softmax weighs, are the features.
    """
    space = verdicts.space
    read = verdicts.relatives(verdicts.facts.fan_in)
    sides = {space.find(d) for between in verdicts.facts.between for side in between for d in side}
    counts: dict[int, bool] = {}  # factor -> whether it stands beside an open one wherever it is a part
    for kind in ("product", "sum"):
        for _, term in space.terms(kind):
            for dim in term:
                beside = kind == "product" and any(m != dim and verdicts.is_open(m) for m in term)
                counts[dim] = counts.get(dim, True) and beside
    direct = set(map(space.find, verdicts.facts.fan_in))
    for dim, why in verdicts.facts.alternatives.items():
        root = space.find(dim)
        flat = dim in verdicts.facts.softmaxed and root not in direct and counts.get(root, False)
        if root not in read or root in sides or flat:
            verdicts.settle([dim], Verdict(False, f"policy: {why}", True))


def settle_routers(verdicts: Verdicts) -> None:
    """Policy: what is read only into coefficients of as many separate tensors is one for each of them.

    Routers of AltUp (arXiv 2301.13310): a score for each copy of the hidden state, and weights that make of
    the scores how the copies are mixed.
    """
    space, facts = verdicts.space, verdicts.facts
    apart = {space.find(d) for d in (*facts.stacked, *facts.enumerated)}
    made: dict[int, list[set[int]]] = {}
    for into, out in facts.weights:
        factors = {d for d in _factors_of(space, out) if not space.terms_of(d, "product")}
        for dim in map(space.find, into):
            made.setdefault(dim, []).append(factors)
    for dim, outs in made.items():
        coefficients = all(factors and factors <= apart for factors in outs)
        if coefficients and all(space.size(dim) in map(space.size, factors) for factors in outs):
            why = "policy: as many as the separate tensors whose coefficients are made of it"
            verdicts.settle([dim], Verdict(False, why, True))


def settle_adapters(verdicts: Verdicts) -> None:
    """Policy: the rank of an adapter is fixed: two weights in a row, beside one that joins the same widths.

    Between a width and itself (cross networks) the two need be no correction of the one, nor with a product
    of activations in between (values of attention).
    """
    space, facts = verdicts.space, verdicts.facts
    weights = [tuple(frozenset(map(space.find, side)) for side in weight) for weight in facts.weights]
    joined = set(weights)
    straight = set(map(space.find, facts.straight)) - set(map(space.find, facts.bent))
    straight -= {space.find(d) for product in facts.bilinear for d in (*product.batch, *product.inner)}
    for rank in sorted(filter(verdicts.is_open, straight)):
        makers = [into for into, out in weights if out == {rank}]
        readers = [out for into, out in weights if into == {rank}]
        pair = (*makers, *readers)
        if len(makers) == len(readers) == 1 and pair in joined and makers != readers:
            why = "policy: the rank of two weights in a row, beside one that joins the same widths"
            verdicts.settle([rank], Verdict(False, why, True))


def settle_rests(verdicts: Verdicts) -> None:
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


def _fixed_heads(verdicts: Verdicts) -> set[int]:
    """Return what the policy of heads fixed: the sizes per head."""
    inner = {verdicts.space.find(d) for product in verdicts.facts.bilinear for d in product.inner}
    return {d for d in inner if (v := verdicts.get(d)) and v.policy and not v.infinite}


def settle_groups(verdicts: Verdicts) -> None:
    """Policy: a grouped convolution keeps its number of groups, unless the size of a group is fixed.

    It is fixed too where the channels are cut into heads of just that size: a group is a head then.
    """
    space = verdicts.space
    heads, free = _fixed_heads(verdicts), set()
    for whole, (group, channels) in ((w, m) for w, m in space.terms("groups") if len(m) == 2):
        alike = {head for head in heads if space.size(head) == space.size(channels)}
        if alike and alike & verdicts.relatives([whole]):
            verdicts.settle([channels], Verdict(False, "policy: a group is a head of fixed size", True))
        if not verdicts.is_open(channels) and not verdicts.grows(channels) and space.size(channels) > 1:
            free.add(group)
    for dim, where in verdicts.facts.groups.items():
        if space.find(dim) not in free:
            verdicts.settle([dim], Verdict(False, f"policy: the number of groups is fixed ({where})", True))


def settle_fans(verdicts: Verdicts, unmade: Mapping[int, str], made: Iterable[int]) -> None:
    """Default: what weights contract or make, and nothing certain touches, is a width.

    So is a part of a concatenation that a weight contracts, where parameters bring that part along. Wholes
    first would hide which of their members grow, so members with evidence of their own go first.
    """
    facts, space = verdicts.facts, verdicts.space
    fans = {space.find(d): w for d, w in [*facts.fan_out.items(), *facts.fan_in.items()]}
    brought = set(map(space.find, made))
    parted: dict[int, str] = {}  # those that are read last come first
    for dim, where in reversed(facts.fan_in.items()):
        parts = {p for term in space.terms_of(dim, "sum") for p in term}
        parted.update(dict.fromkeys(sorted(parts & brought), where))
    fans = {d: w for d, w in (parted | fans).items() if d not in unmade}
    atoms = [d for d in fans if not space.terms_of(d, "product") and not space.terms_of(d, "sum")]
    for dim in [*atoms, *fans]:
        verdicts.settle(
            [dim], Verdict(True, f"a width: no data, kernel or class axis touches it ({fans[dim]})")
        )


def settle_scores(verdicts: Verdicts) -> None:
    """Policy: a part of a growing width that only scores of positions contract is one head of that width.

    A state of fixed size is contracted with positions as well, but it also meets the width, or is made twice:
    once to write and once to read.
    """
    space = verdicts.space
    sums = [list(map(space.find, term)) for whole, term in space.terms("sum") if verdicts.grows(whole)]
    apart = {p for parts in sums for p in parts if parts.count(p) == 1}
    met: dict[int, bool] = {}
    where: dict[int, str] = {}
    for product in verdicts.facts.bilinear:
        inner = {space.find(d) for d in product.inner}
        for dim in inner & apart:
            others = inner - {dim} | {space.find(d) for d in product.batch}
            met[dim] = met.get(dim, False) or any(map(verdicts.grows, others))
            where[dim] = product.where
    for dim in sorted(d for d, grown in met.items() if not grown):
        why = f"policy: one head of a width that grows, compared between positions ({where[dim]})"
        verdicts.settle([dim], Verdict(True, why, True))


def settle_joined(verdicts: Verdicts) -> None:
    """Default: parameters joined into one growing weight all grow, except for data among them."""
    joined = {verdicts.space.find(d) for d in verdicts.facts.joined}
    for whole, parts in verdicts.space.terms("sum"):
        if whole in joined and verdicts.grows(whole):
            why = f"a part of a growing weight ({verdicts.get(whole).why})"  # type: ignore[union-attr]
            verdicts.settle(parts, Verdict(True, why))


def settle_products(verdicts: Verdicts) -> None:
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
            if choice and _one_parameter(verdicts, free):  # flatten(w, 0, 1): its first axes count matrices
                free = free[::-1]
            why = f"policy: it grows with its whole ({top.why})"
            verdicts.settle(free[:1] if choice else free, Verdict(True, why, choice))
            progress = True
        if not progress:
            break


def _one_parameter(verdicts: Verdicts, dims: Iterable[int]) -> bool:
    """Whether one parameter has all of some dimensions as axes of its own."""
    carried = verdicts.facts.carried.items()
    owners = [{name for (name, _), d in carried if verdicts.space.find(d) == dim} for dim in dims]
    return bool(set.intersection(*owners))


def settle_cuts(verdicts: Verdicts) -> None:
    """Default: where a width is cut, what no weight reads of it and what is joined again grows with the rest.

    Partial convolutions keep most channels as they are. Policy: what other activations meet instead, such as
    the state of a scan, is fixed; as many as a part that grows are the other half of it.
    """
    space = verdicts.space
    rests = set(map(space.find, space.rests))
    joined = _wholes(verdicts, map(space.find, verdicts.facts.parts))
    carried = set(map(space.find, verdicts.facts.carried.values()))
    settled = True
    while settled:  # a part may be cut again
        settled = False
        for whole, parts in space.cuts:
            top = verdicts.get(whole)
            open_ = {p for p in map(space.find, parts) if verdicts.is_open(p)} - rests
            if not open_ or top is None or not top.infinite:
                continue
            halves = {space.size(p) for p in parts if verdicts.grows(p)}
            for part in sorted(open_):
                grows = part in joined or part not in carried and space.size(part) in halves
                why = f"a part of a width that is cut ({top.why})"
                verdicts.settle([part], Verdict(grows, why if grows else f"policy: {why}", not grows))
            settled = True


def _wholes(verdicts: Verdicts, members: Iterable[int]) -> set[int]:
    """Return dimensions, and all that is cut or viewed into them."""
    space = verdicts.space
    found, terms = set(members), [*space.cuts, *space.terms("product")]
    while True:
        more = {space.find(w) for w, parts in terms if not found.isdisjoint(map(space.find, parts))} - found
        if not more:
            return found
        found |= more


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
    made = [
        (_factors_of(space, m.summed), _factors_of(space, m.kept))
        for m in facts.made_weights
        if grows is None or any(map(grows, m.summed))
    ]
    found: dict[int, bool] = {}
    plain: set[int] = set()
    for into, out in facts.weights:
        parts = _factors_of(space, out)
        if any(parts & summed and (parts - summed) & kept for summed, kept in made):
            found.update({space.find(d): len(out) > 1 for d in into})
        else:
            plain.update(map(space.find, into))
    return {dim: apart for dim, apart in found.items() if dim not in plain}


def _factors_of(space: Space, dims: Iterable[int]) -> set[int]:
    """Return dimensions with all factors that they are viewed as."""
    found, todo = set[int](), list(map(space.find, dims))
    while todo:
        dim = todo.pop()
        found.add(dim)
        factors = {f for kind in ("product", "groups") for term in space.terms_of(dim, kind) for f in term}
        todo += factors - found
    return found


def settle_mixtures(verdicts: Verdicts) -> None:
    """Policy: the number of matrices that are mixed into one weight a sample is fixed, whatever the gate."""
    for dim, where in verdicts.facts.mixtures.items():
        verdicts.settle(
            [dim], Verdict(False, f"policy: it counts weights that are mixed into one ({where})", True)
        )
