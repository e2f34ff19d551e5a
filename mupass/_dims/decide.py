"""Decides which dimensions grow with width.

Three kinds of knowledge, in falling order of authority: what is certain (data, kernels, table lengths,
classes; what the caller overrides), what is a policy (heads grow at a fixed head_dim, the number of groups
is fixed), and the default (an axis along which weights are contracted or made, and that nothing certain
touches, is a width). Last come doubts: a default that what is around it speaks against stands, but marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mupass._dims import policies
from mupass._dims.doubts import raise_doubts
from mupass._dims.facts import Facts
from mupass._dims.space import Space
from mupass._dims.verdicts import Verdict, Verdicts


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
    verdicts, outputs, made = Verdicts(space, facts), tuple(outputs), tuple(made)
    verdicts.impose({dim: Verdict(infinite, why) for dim, (infinite, why) in overrides.items()})
    for dim, why in inputs:
        verdicts.settle([dim], Verdict(False, why))
    for dim, why in facts.finite.items():
        verdicts.settle([dim], Verdict(False, why))
    hidden = policies.settle_outputs(verdicts, outputs)
    policies.settle_heads(verdicts)
    policies.settle_blocks(verdicts)
    policies.settle_groups(verdicts)
    policies.settle_alternatives(verdicts)
    policies.settle_mixtures(verdicts)
    policies.settle_routers(verdicts)
    policies.settle_adapters(verdicts)
    policies.settle_rests(verdicts)
    unmade = policies.unmade(verdicts, made)
    policies.settle_fans(verdicts, unmade, made)
    policies.settle_unmade(verdicts, unmade)
    for dim, where in facts.basis.items():
        verdicts.settle(
            [dim], Verdict(False, f"policy: two parameters are contracted along it ({where})", True)
        )
    policies.settle_joined(verdicts)
    policies.settle_scores(verdicts)
    policies.settle_products(verdicts)
    policies.settle_cuts(verdicts)
    for dim, why in hidden.items():
        if verdicts.grows(dim):
            verdicts.question(dim, f"policy: hidden state, since weights read it again ({why})")
    raise_doubts(verdicts, outputs)
    return verdicts
