"""Small questions to operators of a graph, which several modules of this room ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import flatten, operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait, traits

Owners = Mapping[Node, str]  # module of every operator


def tensors_among(arguments: Iterable[Any]) -> list[Node]:
    """Return the arguments of an operator that are tensors, not numbers or None.

    Args:
        arguments: Some of its arguments.
    """
    return [argument for argument in arguments if isinstance(argument, Node)]


def traits_of(operator: Node) -> Trait:
    """Return what an operator does to its operands.

    Args:
        operator: The operator.
    """
    return traits(operator_name(operator.target))


def arguments_of(operator: Node) -> dict[str, Any]:
    """Return the arguments of an operator by their names in its schema.

    Args:
        operator: An operator of a library, not a function of Python.
    """
    target: Any = operator.target
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, operator.args, strict=False)) | dict(operator.kwargs)


def made_of(sources: Iterable[Node], captured: Capture) -> set[Node]:
    """Return some values of a graph, and all that is computed from them.

    Args:
        sources: The values.
        captured: The graph.
    """
    made = set(sources)
    for operator in captured.nodes:
        if not made.isdisjoint(operator.all_input_nodes):
            made.add(operator)
    return made


def behind_copies(tensor: Any) -> Any:
    """Follow copies, in another type or place, back to what they are copies of.

    Args:
        tensor: An operand.
    """
    while isinstance(tensor, Node) and tensor.args and traits_of(tensor) & Trait.COPIES:
        tensor = tensor.args[0]
    return tensor


def place_of(operator: Node, owners: Owners) -> str:
    """Name an operator by what it is and the module that calls it.

    Args:
        operator: The operator.
        owners: Module of every operator.
    """
    return f"{operator_name(operator.target)} in {owners.get(operator, '') or 'the root module'}"


def placeholders_of(captured: Capture, parameter: str) -> list[Node]:
    """Return the placeholders of a parameter.

    Args:
        captured: The graph.
        parameter: Its name.
    """
    return [node for node, name in captured.parameters.items() if name == parameter]


def leaves(value: Node, module: str, owners: Owners) -> bool:
    """Return whether anything outside of a module reads a value of it.

    Args:
        value: The value.
        module: Name of the module.
        owners: Module of every operator.
    """
    for reader in value.users:
        if not f"{owners.get(reader, '')}.".startswith(f"{module}."):
            return True
    return False


def is_inside(module: str, outer: str) -> bool:
    """Return whether a module is inside of another one, and not that itself.

    Args:
        module: Name of the module.
        outer: Name of the other; ``""`` is the root.
    """
    return module != outer and (not outer or module.startswith(f"{outer}."))


def all_static(results: Iterable[Any]) -> bool:
    """Return whether tensors are made of parameters, buffers and constants alone.

    Args:
        results: What the inference knows of them, nested as operators return them.
    """
    return all(value.static for value in flatten(results) if isinstance(value, Value))


def is_parametric(tensor: Node, solved: Inference) -> bool:
    """Return whether a tensor is static, and an axis of it still one of a parameter.

    Args:
        tensor: The tensor.
        solved: The inference.
    """
    value = solved.engine.env.get(tensor)
    return isinstance(value, Value) and value.parametric


def inner_dims(solved: Inference) -> frozenset[int]:
    """Return the dimensions of products of two activations that are no batch, such as head_dim of attention.

    Args:
        solved: The inference.
    """
    dimensions: set[int] = set()
    for product in solved.engine.facts.bilinear:
        dimensions |= solved.engine.space.find_all(product.inner)
    return frozenset(dimensions)
