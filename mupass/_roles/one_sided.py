"""Weights that a function makes one-sided, as in ``softplus(W) @ x``: their sums have a mean that grows.

A sum of n products with weights of mean zero and size ``1/sqrt(n)`` keeps its order. Entries of
``softplus(W)``, ``exp(W)`` or ``|W|`` have a mean, and n of them add up to n times that mean, which grows.
The mean of ``W ** 2`` falls like 1/n, so that n of them keep their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from mupass._capture.graph import Capture
from mupass._dims.graph import operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait, traits
from mupass._roles.nodes import all_static, placeholders_of, traits_of

COUNT = 1024  # entries that are tried out
WIDER = 4  # by how much more terms in a second trial
GROWTH = 1.5  # of the sum of means between the two, beyond which it grows
LARGEST = 0.1  # mean over deviation, beyond which a sum of entries is led by the mean
SAME_ENTRIES = Trait.COPIES | Trait.DETACHES | Trait.RESHAPES | Trait.PICKS | Trait.DROPS_OUT
SUMS = Trait.MATRIX_PRODUCT | Trait.INNER_PRODUCT | Trait.AFFINE


def find_one_sided(captured: Capture, solved: Inference, parameter: str, fan_in: int) -> Node | None:
    """Return the function that makes the entries of a weight one-sided before they are summed, or None.

    Functions are tried out on entries of a symmetric law.

    Args:
        captured: The graph.
        solved: Its inference.
        parameter: The weight.
        fan_in: Number of entries that a sum has.
    """
    quantiles = torch.linspace(0, 1, COUNT + 2, dtype=torch.float64)[1:-1]
    normal = torch.special.ndtri(quantiles).float() / sqrt(fan_in)
    # A row of entries at this width, and one at a larger width.
    entries = torch.stack([normal, normal / sqrt(WIDER)])
    # What the entries are in each tensor that is made of the weight, and the function that gave them a mean.
    followed: dict[Node, tuple[Tensor, Node | None]] = {}
    waiting: set[Node] = set()
    for placeholder in placeholders_of(captured, parameter):
        followed[placeholder] = entries, None
        waiting.update(placeholder.users)
    while waiting:
        operator = min(waiting)  # in the order of the graph
        waiting.remove(operator)
        sources = [source for source in _operands(operator) if source in followed]
        if not sources or operator not in solved.engine.env:
            continue
        if not all_static([solved.engine.env[operator]]):
            # It meets an activation: a sum of products, or anything else.
            culprit = followed[sources[0]][1]
            if culprit is not None and _sums_products(operator):
                return culprit
            continue
        became = _entries_of(operator, {source: followed[source][0] for source in sources})
        if became is not None:
            culprit = None
            if _is_one_sided(became):
                culprit = followed[sources[0]][1] or operator
            followed[operator] = became, culprit
            waiting.update(operator.users)
    return None


def _operands(operator: Node) -> list[Node]:
    """Return the tensors whose entries an operator takes."""
    # norm.expand_as(W) takes nothing but the shape of W.
    if traits_of(operator) & Trait.SHAPE_OF_SECOND:
        return operator.all_input_nodes[:1]
    return operator.all_input_nodes


def _entries_of(operator: Node, known: Mapping[Node, Tensor]) -> Tensor | None:
    """Return the entries of a tensor made of others whose entries are known; None where they are not."""
    operator_traits, first = traits_of(operator), next(iter(known.values()))
    if operator_traits & SAME_ENTRIES:
        return first
    if torch.Tag.pointwise not in getattr(operator.target, "tags", ()):
        return None
    # With a mask, a gain or the noise of another tensor the entries keep their signs. What they are divided
    # by may be their own sum, which takes out that it grows.
    if len(known) < len(operator.all_input_nodes):
        return first if operator_traits & Trait.LINEAR and not operator_traits & Trait.DIVIDES else None

    def entries_of(node: Node) -> Tensor:
        return known[node]

    arguments: Any = map_arg(operator.args, entries_of)
    settings: Any = map_arg(operator.kwargs, entries_of)
    try:
        result = operator.target(*arguments, **settings)  # type: ignore[operator]
    except Exception:  # an operator that wants more than numbers and entries
        return None
    return result if isinstance(result, Tensor) and result.shape == first.shape else None


def _is_one_sided(entries: Tensor) -> bool:
    """Return whether the mean of entries leads their sums, and sums of more entries are larger."""
    if not entries.is_floating_point():
        return False
    narrow, wide = entries.mean(1).abs().tolist()
    return WIDER * wide > GROWTH * narrow and wide > LARGEST * entries[1].std().item()


def _sums_products(operator: Node) -> bool:
    """Return whether an operator is a sum of products, a convolution among them."""
    name = operator_name(operator.target)
    return bool(traits(name) & SUMS) or "conv" in name
