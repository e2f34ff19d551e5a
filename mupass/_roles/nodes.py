"""Small questions to operators of a graph, which several modules of this room ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import flatten, operator_name
from mupass._dims.infer import Inference


def tensors_among(arguments: Iterable[Any]) -> list[Node]:
    """Return the arguments of an operator that are tensors, not numbers or None.

    Args:
        arguments: Some of its arguments.
    """
    return [argument for argument in arguments if isinstance(argument, Node)]


def place_of(operator: Node, owners: Mapping[Node, str]) -> str:
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


def all_static(results: Iterable[Any]) -> bool:
    """Return whether tensors are made of parameters, buffers and constants alone.

    Args:
        results: What the inference knows of them, nested as operators return them.
    """
    return all(value.static for value in flatten(results) if isinstance(value, Value))


def inner_dims(solved: Inference) -> frozenset[int]:
    """Return the dimensions of products of two activations that are no batch, such as head_dim of attention.

    Args:
        solved: The inference.
    """
    dimensions: set[int] = set()
    for product in solved.engine.facts.bilinear:
        dimensions |= solved.engine.space.find_all(product.inner)
    return frozenset(dimensions)
