"""Small questions to graph nodes: names, shapes, subgraphs, whether they are linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from sympy import Integer, nextprime
from torch.fx import Node

from mupass._dims.facts import Value
from mupass._dims.operator_traits import Trait, traits

# Operators that are linear in each tensor; products of entries only where one tensor depends on the inputs.
KEEP_LINEAR = Trait.COPIES | Trait.DETACHES | Trait.DROPS_OUT | Trait.LINEAR


def operator_name(target: Any) -> str:
    """Return ``aten.linear`` for ``aten.linear.default``; other callables give their own name."""
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet)
    return str(getattr(target, "__name__", target))


def computing(nodes: Iterable[Node]) -> list[Node]:
    """Return the operators that compute; which others there are may differ from device to device.

    Args:
        nodes: Operators of a graph.
    """
    idle = Trait.COPIES | Trait.DETACHES
    return [node for node in nodes if not traits(operator_name(node.target)) & idle]


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a shape; every size that depends on data gets a number that no other size is likely to have."""
    return tuple(size if isinstance(size, int) else _stand_in(size) for size in tensor.shape)


def output_shapes(node: Node) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors that an operator returns."""
    outputs = flatten([node.meta.get("val")])
    return [shape_of(output) for output in outputs if isinstance(output, torch.Tensor)]


def _stand_in(size: Any) -> int:
    """Evaluate a symbolic size, with a large prime for each symbol."""
    # Sizes that depend on different data must not agree by chance.
    expression = size.node.expr
    return int(expression.xreplace({symbol: _prime_for(str(symbol)) for symbol in expression.free_symbols}))


@cache
def _prime_for(symbol: str) -> Integer:
    number = "".join(filter(str.isdigit, symbol))  # torch calls them s0, u1...
    return Integer(nextprime(17389 + 100 * int(number or 0)))


def written(node: Node) -> Node | None:
    """Return the tensor that an operator writes into."""
    return _aliased(node, write=True)


def viewed(node: Node) -> Node | None:
    """Return the tensor that an operator's result is a view of."""
    return _aliased(node, write=False)


def _aliased(node: Node, write: bool) -> Node | None:
    """Return the first argument that an operator's schema marks as shared with its result."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        # Tensor(a!) in the schema: the argument is written into, or the result is a view of it.
        if isinstance(value, Node) and argument.alias_info and argument.alias_info.is_write >= write:
            return value
    return None


def graph_of(node: Node, argument: Any) -> torch.fx.GraphModule | None:
    """Return the graph that an argument of a higher-order operator names, if it names one."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    attribute = getattr(node.graph.owning_module, str(argument.target), None)
    return attribute if isinstance(attribute, torch.fx.GraphModule) else None


def subgraphs(node: Node) -> list[torch.fx.GraphModule]:
    """Return the graphs that a higher-order operator runs."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    graphs = [graph_of(node, argument) for argument in node.args]
    return [graph for graph in graphs if graph is not None]


def is_getitem(node: Node) -> bool:
    """Whether a node picks one of several results."""
    return getattr(node.target, "__name__", "") == "getitem" and not hasattr(node.target, "_schema")


def summed_axes(product: Node) -> set[int]:
    """Return the axes of an operator's result that a sum runs over next, counted from the last one (-1).

    Casts and dropout may stand in between. Where several sums read the result, those of the first.

    Args:
        product: The operator.
    """
    rank = len(output_shapes(product)[0])
    waiting = list(product.users)
    while waiting:
        reader = waiting.pop(0)
        name = operator_name(reader.target)
        if traits(name) & (Trait.COPIES | Trait.DROPS_OUT):
            waiting += reader.users
        # torch.sum(x) over all axes, x.sum(-1), x.sum((1, 2))
        if name == "aten.sum":
            given: Any = reader.args[1:2]
            dims = list(flatten(given)) or list(range(rank))
            return {axis % rank - rank for axis in dims if rank}
    return set()


def is_filled(node: Any) -> bool:
    """Return whether a tensor is made of one number."""
    return isinstance(node, Node) and operator_name(node.target).startswith(
        ("aten.zeros", "aten.ones", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full")
    )


def broadcasts(small: tuple[int, ...], big: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    if len(small) > len(big):
        return False
    # From the last axis backwards, as broadcasting lines up shapes.
    return all(size in (1, other) for size, other in zip(small[::-1], big[::-1], strict=False))


def flatten(items: Iterable[Any]) -> list[Any]:
    """Return the leaves of nested tuples, lists and dicts."""
    leaves: list[Any] = []
    for item in items:
        if isinstance(item, (tuple, list)):
            leaves += flatten(item)
        elif isinstance(item, dict):
            leaves += flatten(item.values())
        else:
            leaves.append(item)
    return leaves


def keeps_straight(node: Node, operator: str, values: Sequence[Value], pointwise: bool) -> bool:
    """Tell whether an operator is linear in its operands.

    Args:
        node: The call.
        operator: Its name without overload.
        values: Its tensor arguments.
        pointwise: Whether its dimension rule is that of pointwise operators.

    Returns:
        False for nonlinearities, for products of two activations, and for pointwise operators not known.
    """
    operator_traits = traits(operator)
    if operator_traits & Trait.BENDS:
        return False
    # Matrix products, sums and views are linear in each operand, and no elementwise operators.
    if not pointwise and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return True
    shapes = output_shapes(node)
    activations = [value for value in values if not value.static and value.sizes in shapes]
    # u * v of two activations is of second order.
    if operator_traits & (Trait.MULTIPLIES | Trait.DIVIDES) and len(activations) > 1:
        return False
    return bool(operator_traits & KEEP_LINEAR)
