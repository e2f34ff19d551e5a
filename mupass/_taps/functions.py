"""What the graph of autograd tells of uses that no tap can see: functions and hooks of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

OURS = ("torch.", "mupass.")
# Copies and views: what is behind one of them is still the parameter.
SAME = (
    "Alias",
    "Permute",
    "Reshape",
    "Squeeze",
    "T",
    "ToCopy",
    "Transpose",
    "Unsqueeze",
    "UnsafeView",
    "View",
)


def read_by_functions(outputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, str]]:
    """Yield parameters that a function reads as they are, and the name of the function.

    Args:
        outputs: Tensors whose graph is looked through. Functions of torch itself, as of compiled graphs and
            checkpoints, are left out.
    """
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        is_function = isinstance(node, BackwardCFunction)
        own = is_function and not type(node)._forward_cls.__module__.startswith(OURS)  # type: ignore[attr-defined]
        for source, _ in node.next_functions:
            if source is None:
                continue
            if own:
                parameter = _parameter(source)
                if parameter is not None:
                    yield parameter, type(node)._forward_cls.__name__  # type: ignore[attr-defined]
            if source not in met:
                met.add(source)
                waiting.append(source)


def will_add_to(leaf: Tensor) -> bool | None:
    """Return whether the backward pass that runs will add to the gradient of a leaf; None if it returns it.

    ``backward(inputs=...)`` adds to the gradients of these inputs alone.

    Args:
        leaf: A tensor that autograd began with.
    """
    if not leaf.is_leaf or not leaf.requires_grad:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(edge_to(leaf).node))
    except RuntimeError:  # torch.autograd.grad(loss, [leaf])
        return None


def edge_to(leaf: Tensor) -> GradientEdge:
    """Return the edge of the graph that leads to a leaf, which may have taps.

    Args:
        leaf: A tensor that requires a gradient.
    """
    # torch finds it through a view, of which a parameter with taps would make another one.
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(leaf)


def is_made_of(output: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether an output is what an operator makes of some parameters, and not a function of that.

    Args:
        output: Of a module that is one operator, with a gradient.
        parameters: Those of the module.
    """
    node: Any = output.grad_fn
    wanted = {id(parameter) for parameter in parameters}
    while node is not None:
        sources = [source for source, _ in node.next_functions if source is not None]
        if not wanted.isdisjoint(id(_parameter(source)) for source in sources):
            return True
        # The operator's output in another shape or precision, or a copy of it.
        if node.name().partition("Backward")[0] not in (*SAME, "Clone") or not sources:
            return False
        node = sources[0]
    return False


def _parameter(node: Any) -> Tensor | None:
    """Return the parameter that a node passes the gradient of on to, through copies and views; or None."""
    while not hasattr(node, "variable"):
        kind = node.name().partition("Backward")[0]
        if kind not in SAME or node.next_functions[0][0] is None:
            return None
        node = node.next_functions[0][0]
    return node.variable  # type: ignore[no-any-return]
