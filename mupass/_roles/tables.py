"""Tables: parameters of which entries are copied to where activations are, and joined with them there.

Learned positions, tokens that stand before a sequence, biases that an index picks for pairs of positions.
Which entries are copied where is found by copying their numbers instead: the operators between the parameter
and the one that reads it are run on ``0, 1, 2, ...`` in its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from mupass._dims.graph import operator_name, shape_of
from mupass._dims.operator_traits import Trait
from mupass._records import Axes
from mupass._roles.nodes import traits_of

# 1 + w, w * c, -w: the gradient of w is that of the result times a number.
AFFINE = ("aten.add", "aten.sub", "aten.rsub", "aten.mul", "aten.div", "aten.neg")
# Operators that join tensors entry by entry, each of them copied to the shape of the result.
JOINING = ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.where", "aten.addcmul", "aten.lerp")


def copies_entries(operator: Node, operand: Node) -> bool:
    """Return whether the result of an operator is made of copies of entries of its operand.

    Args:
        operator: The operator.
        operand: What it reads.
    """
    moves = traits_of(operator) & (Trait.RESHAPES | Trait.PICKS)
    return bool(moves) and operator.args[:1] == (operand,)


def is_affine(operator: Node, operand: Node) -> bool:
    """Return whether an operator joins its operand to nothing but numbers, as ``1 + w`` does.

    Args:
        operator: The operator.
        operand: What it reads.
    """
    if operator_name(operator.target) not in AFFINE or operator.all_input_nodes != [operand]:
        return False
    # w + w reads it twice; c / w is no multiple of it.
    places = [place for place, argument in enumerate(operator.args) if argument is operand]
    return len(places) == 1 and (places == [0] or operator_name(operator.target) != "aten.div")


def shifted_by(operator: Node, operand: Node) -> Node | None:
    """Return the one tensor that an operator adds to its operand or takes from it; None for other operators.

    Args:
        operator: The operator.
        operand: What it reads.
    """
    if operator_name(operator.target) not in ("aten.add", "aten.sub") or operator.kwargs:
        return None
    others = [argument for argument in operator.args if argument is not operand]
    is_one = len(operator.args) == 2 and len(others) == 1 and isinstance(others[0], Node)
    # w - mask, not mask - w
    if not is_one or (operator_name(operator.target) == "aten.sub" and operator.args[0] is not operand):
        return None
    return others[0]  # type: ignore[return-value]


def entries(shape: Sequence[int], path: Iterable[Node]) -> Tensor:
    """Return where in a parameter the entries of what operators make of it stand.

    Args:
        shape: Shape of the parameter.
        path: The operators, from the parameter on.

    Raises:
        RuntimeError: Their result depends on values of activations.
    """
    numbers: Any = torch.arange(prod(shape), device="cpu").reshape(tuple(shape))
    for operator in path:
        if traits_of(operator) & Trait.COPIES:
            continue
        if operator_name(operator.target) in AFFINE:  # table + mask: its entries for every mask
            numbers = numbers.expand(shape_of(operator.meta["val"]))
            continue
        arguments, operand = operator.args, operator.args[0]
        smallest = min(numbers.shape, default=1) if isinstance(numbers, Tensor) else 1
        values: dict[Node, Any] = {}
        for node in operator.all_input_nodes:
            values[node] = numbers if node is operand else _stand_in(node, smallest)
        target: Any = operator.target
        numbers = target(*map_arg(arguments, values.get), **map_arg(operator.kwargs, values.get))  # type: ignore[arg-type]
    return numbers  # type: ignore[no-any-return]


def _stand_in(node: Node, size: int) -> Any:
    """Return a value for an argument of an operator: an index with entries below a size.

    Raises:
        RuntimeError: It is a mask, so that the size of the result depends on it.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        raise RuntimeError("a mask picks its entries")
    shape = shape_of(value)
    return (torch.arange(prod(shape), device="cpu") % max(size, 1)).reshape(shape)


def axes_shown(numbers: Tensor, shape: Sequence[int]) -> tuple[Axes, ...]:
    """Return along which axes of a tensor of copies every axis of the parameter is laid out.

    Args:
        numbers: Where the entries stand in the parameter.
        shape: Shape of the parameter.

    Returns:
        For every axis of the parameter those of the tensor, counted from its last one (-1), in whose order
        its positions stand; none for an axis of length 1, and for one that is cut, picked from or mixed with
        another.
    """
    # Axes along which there are copies of the very same memory have nothing to tell.
    for axis, step in enumerate(numbers.stride()):
        if step == 0:
            numbers = numbers.narrow(axis, 0, 1)
    varying: list[list[int]] = []
    orders: list[Axes] = []
    for axis, size in enumerate(shape):
        positions = numbers // prod(shape[axis + 1 :]) % size
        along = [place for place in range(numbers.dim()) if _varies(positions, place)]
        varying.append(along)
        orders.append(_order(positions, along, size))
    found = []
    for axis, order in enumerate(orders):
        others: set[int] = set()
        others.update(*varying[:axis], *varying[axis + 1 :])
        alone = others.isdisjoint(order)
        found.append(tuple(place - numbers.dim() for place in order) if alone else ())
    return tuple(found)


def _varies(positions: Tensor, place: int) -> bool:
    return bool((positions != positions.narrow(place, 0, 1)).any())


def _order(positions: Tensor, along: Sequence[int], size: int) -> Axes:
    """Return axes in the order in which they count ``0, 1, ..., size - 1``; none where they do not."""
    # Along all others the positions are the same.
    for place in range(positions.dim()):
        if place not in along:
            positions = positions.narrow(place, 0, 1)
    steps = {place: int(positions.narrow(place, 1, 1).flatten()[0]) for place in along}
    order = tuple(sorted(along, key=lambda place: -steps[place]))
    rest = [place for place in range(positions.dim()) if place not in along]
    line = positions.permute(*rest, *order).flatten()
    return order if torch.equal(line, torch.arange(size)) else ()
