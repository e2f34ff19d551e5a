"""Small questions to graph nodes: names, shapes, subgraphs, whether they are linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from sympy import Integer, nextprime
from torch.fx import Node

from mupass._dims.facts import Value

# They compute nothing and let gradients through; which of them a graph has may differ from device to device.
MOVES = (
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.contiguous",
    "aten.clone",
    "aten.alias",
    "aten._assert_tensor_metadata",
)
# Pointwise operators that keep a linear map linear, and others that do not.
LINEAR = {
    f"aten.{n}"
    for n in (
        *("add", "sub", "rsub", "mul", "div", "neg", "where", "lerp", "masked_fill", "dropout"),
        *("to", "_to_copy", "clone", "contiguous", "float", "detach", "detach_", "alias", "lift_fresh_copy"),
    )
}
PRODUCTS = {"aten.mul", "aten.div"}  # linear in one tensor only
BENDING = {
    f"aten.{n}"
    for n in (
        *("batch_norm", "instance_norm", "group_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *("softmax", "_softmax", "log_softmax", "glu", "prelu", "hardtanh", "hardswish", "relu6", "selu"),
    )
}


def operator_name(target: Any) -> str:
    """Return ``aten.linear`` for ``aten.linear.default``; other callables give their own name."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a shape; every size that depends on data gets a number that no other size is likely to have."""
    return tuple(s if isinstance(s, int) else _stand_in(s) for s in tensor.shape)


def _stand_in(size: Any) -> int:
    """Evaluate a symbolic size, with a large prime for each symbol."""
    return int(size.node.expr.xreplace({s: _prime_for(str(s)) for s in size.node.expr.free_symbols}))


@cache
def _prime_for(symbol: str) -> Integer:
    return Integer(nextprime(17389 + 100 * int("".join(filter(str.isdigit, symbol)) or 0)))


def written(node: Node) -> Node | None:
    """Return the tensor that an operator writes into."""
    return _aliased(node, write=True)


def viewed(node: Node) -> Node | None:
    """Return the tensor that an operator's result is a view of."""
    return _aliased(node, write=False)


def _aliased(node: Node, write: bool) -> Node | None:
    schema = getattr(node.target, "_schema", None)
    for argument, value in zip(schema.arguments, node.args, strict=False) if schema else ():
        if isinstance(value, Node) and argument.alias_info and argument.alias_info.is_write >= write:
            return value
    return None


def is_graph(node: Node, argument: Any) -> bool:
    return isinstance(argument, Node) and argument.op == "get_attr" and _attribute(node, argument) is not None


def _attribute(node: Node, argument: Node) -> torch.fx.GraphModule | None:
    found = getattr(node.graph.owning_module, str(argument.target), None)
    return found if isinstance(found, torch.fx.GraphModule) else None


def subgraphs(node: Node) -> list[torch.fx.GraphModule]:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    found = [_attribute(node, a) for a in node.args if isinstance(a, Node) and a.op == "get_attr"]
    return [g for g in found if g is not None]


def is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and not hasattr(node.target, "_schema")


def is_filled(node: Any) -> bool:
    """Return whether a tensor is made of one number."""
    return isinstance(node, Node) and operator_name(node.target).startswith(
        ("aten.zeros", "aten.ones", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full")
    )


def broadcasts(small: tuple[int, ...], big: tuple[int, ...]) -> bool:
    return len(small) <= len(big) and all(s in (1, b) for s, b in zip(small[::-1], big[::-1], strict=False))


def flatten(items: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for item in items:
        if isinstance(item, (tuple, list)):
            flat += flatten(item)
        elif isinstance(item, dict):
            flat += flatten(item.values())
        else:
            flat.append(item)
    return flat


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
    name = operator.removesuffix("_")
    if name in BENDING:
        return False
    if not pointwise and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return True
    shapes = [shape_of(t) for t in flatten([node.meta.get("val")]) if isinstance(t, torch.Tensor)]
    full = sum(not v.static and tuple(a.size for a in v.axes) in shapes for v in values)
    return name in LINEAR and not (full > 1 and name in PRODUCTS)
