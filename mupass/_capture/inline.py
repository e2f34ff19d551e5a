"""Inlines what an exported graph runs under another grad mode or autocast: the operators, in their place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

# Operator -> which argument is the graph that it runs; what follows are the graph's inputs. Blocks under
# reentrant checkpointing are such graphs, and feature extractors under no_grad.
CONTEXTS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


def inline_contexts(module: GraphModule) -> None:
    """Put operators that run in a graph of their own, for a change of context alone, into the one around.

    Args:
        module: An exported graph; changed in place.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in CONTEXTS:
            _inline(module, node, CONTEXTS[node.target])


def _inline(module: GraphModule, node: Node, at: int) -> None:
    source: Any = node.args[at]
    inner: GraphModule = getattr(module, source.target)
    # Contexts may be nested: no_grad inside of autocast.
    inline_contexts(inner)
    # Placeholders of the inner graph stand for the arguments behind it.
    holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(holes, node.args[at + 1 :], strict=True))
    with module.graph.inserting_before(node):
        for own in inner.graph.nodes:
            if own.op in ("call_function", "get_attr"):
                copies[own] = module.graph.node_copy(own, lambda n: copies[n])
            if own.op == "get_attr":  # a branch of a condition, say: under a name that is free here
                name = f"inlined_{node.name}_{own.name}"
                setattr(module, name, getattr(inner, own.target))
                copies[own].target = name
        (results,) = next(n.args for n in inner.graph.nodes if n.op == "output")
    # getitem(context(graph, ...), i): the i-th result of the graph
    for user in list(node.users):
        if user.target is operator.getitem:
            result = results[user.args[1]]
            user.replace_all_uses_with(copies[result])
            module.graph.erase_node(user)
    module.graph.erase_node(node)
    # The inner graph may be run from several places.
    if not source.users:
        module.graph.erase_node(source)
