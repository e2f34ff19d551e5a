"""What a forward pass reads as values, not as sizes: limits of counts, and places that values tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mupass._dims.facts import Value
from mupass._dims.graph import operator_name

# Operators that hold a tensor against a number.
LIMITS = {f"aten.{name}" for name in ("le", "lt", "ge", "gt", "eq", "ne", "clamp", "clamp_min", "clamp_max")}


def limits(node: Node) -> list[int]:
    """Return the whole numbers that an operator holds whole numbers against: tokens that an expert takes.

    Args:
        node: The operator.
    """
    if operator_name(node.target) not in LIMITS or not _is_whole(node.args[0]):
        return []
    numbers = tree_leaves((node.args[1:], node.kwargs))
    return [number for number in numbers if type(number) is int]


def counts_no_width(node: Node, has_width: Callable[[Node], bool]) -> bool:
    """Whether whole numbers come of tensors without any width, so that no width bounds them.

    Args:
        node: Makes them.
        has_width: Whether an operator's result has an axis that grows.
    """
    pending, visited = [node], {node}
    while pending:
        node = pending.pop()
        if has_width(node):
            return False
        # Behind what makes whole numbers of others (argmax, a comparison) the values say no more.
        if _is_whole(node):
            pending += [source for source in node.all_input_nodes if source not in visited]
            visited.update(node.all_input_nodes)
    return True


def grows(value: Any, is_width: Callable[[int], bool]) -> bool:
    """Whether a result of inference has an axis that grows.

    Args:
        value: The result.
        is_width: Whether a dimension grows.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Value) and any(is_width(axis.dim) for axis in leaf.axes):
            return True
    return False


def _is_whole(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


class SamePlaces(TorchDispatchMode):
    """Lets every run find the places (``nonzero``) that the first one found, as far as shapes agree.

    Which tokens an expert gets depends on values, which a resized model draws anew: only so do both run the
    same operators.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[torch.Size, Tensor]] = []
        self.again = False
        self._calls = 0

    def __enter__(self) -> SamePlaces:
        """Begin a run."""
        self._calls = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End a run; further ones find what it found."""
        self.again = True
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator.

        Args:
            func: The operator.
            types: Classes of its arguments.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            What it gives, or gave at first.
        """
        if func is not torch.ops.aten.nonzero.default:
            return func(*args, **(kwargs or {}))
        call, self._calls = self._calls, self._calls + 1
        if not self.again:
            self.found.append((args[0].shape, func(*args)))
        if call < len(self.found) and self.found[call][0] == args[0].shape:
            return self.found[call][1].to(args[0].device, copy=True)
        return func(*args)
