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
    placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(placeholders, node.args[at + 1 :], strict=True))
    with module.graph.inserting_before(node):
        for inner_node in inner.graph.nodes:
            if inner_node.op in ("call_function", "get_attr"):
                copies[inner_node] = module.graph.node_copy(inner_node, lambda n: copies[n])
            if inner_node.op == "get_attr":  # a branch of a condition, say: under a name that is free here
                name = f"inlined_{node.name}_{inner_node.name}"
                setattr(module, name, getattr(inner, inner_node.target))
                copies[inner_node].target = name
        (results,) = next(node.args for node in inner.graph.nodes if node.op == "output")
    # getitem(context(graph, ...), i): the i-th result of the graph
    for reader in list(node.users):
        if reader.target is operator.getitem:
            result = results[reader.args[1]]
            reader.replace_all_uses_with(copies[result])
            module.graph.erase_node(reader)
    module.graph.erase_node(node)
    # The inner graph may be run from several places.
    if not source.users:
        module.graph.erase_node(source)
