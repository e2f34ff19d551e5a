"""Group norms of which each group is a head: their number of groups follows the number of heads.

No shape of the graph depends on it, so that a run of the resized model cannot tell a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import operator_name
from mupass._resize.gains import Place
from mupass._resize.sizes import NewSizes

GROUP_NORMS = ("aten.group_norm", "aten.native_group_norm")


def follow_heads(model: nn.Module, captured: Capture, sizes: NewSizes) -> dict[Place, float]:
    """Return the new number of groups of every group norm whose groups are heads.

    Args:
        model: The source.
        captured: Its graph.
        sizes: The new sizes.
    """
    values: dict[Place, float] = {}
    for path, node in _group_norms(model, captured):
        groups = model.get_submodule(path).num_groups
        for heads in _first_factors(node, sizes):
            # channels = heads x head_dim, where the norm has as many groups as there are heads
            if sizes.solved.engine.space.size(heads) == groups and sizes.solved.verdicts.grows(heads):
                values[path, "num_groups"] = sizes.of_dim(heads)
    return values


def _group_norms(model: nn.Module, captured: Capture) -> Iterator[tuple[str, Node]]:
    """Yield the group norms that modules of their own compute, with the paths of these."""
    modules = dict(model.named_modules())
    for node in captured.nodes:
        path = captured.owners.get(node, "")
        if operator_name(node.target) in GROUP_NORMS and isinstance(modules.get(path), nn.GroupNorm):
            yield path, node


def _first_factors(node: Node, sizes: NewSizes) -> list[int]:
    """Return the first factor of every product that the channels of a norm are known to be."""
    value = sizes.solved.engine.env.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(value, Value):
        return []
    terms = sizes.terms(value.axes[1].dim, "product")
    return [factors[0] for factors in terms if len(factors) == 2]
