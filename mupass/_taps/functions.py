"""Autograd functions of the caller's, whose inside no tap can see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

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


def _parameter(node: Any) -> Tensor | None:
    """Return the parameter that a node passes the gradient of on to, through copies and views; or None."""
    while not hasattr(node, "variable"):
        kind = node.name().partition("Backward")[0]
        if kind not in SAME or node.next_functions[0][0] is None:
            return None
        node = node.next_functions[0][0]
    return node.variable  # type: ignore[no-any-return]
