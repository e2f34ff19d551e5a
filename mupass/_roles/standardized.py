"""Standardized kernels: every row of a parameter less its mean and over its deviation, times a number.

Code writes this in many ways: ``F.batch_norm`` over the reshaped kernel, ``var_mean``, by hand. So no order
of operators is looked for. The operators between the parameter and the convolution are run on random numbers,
and their result is compared with the rows that were put in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from mupass._capture.graph import Capture
from mupass._dims.graph import operator_name, shape_of
from mupass._dims.operator_traits import Trait
from mupass._roles.nodes import arguments_of, traits_of
from mupass._walks import walk

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten._convolution")
# An epsilon beside a deviation of 1 is below this, and what other rows do to a row is above.
TOLERANCE = 1e-3
FEWEST = 3  # a standardized row of two numbers is (1, -1) or (-1, 1)


def standardized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows less their mean, over their length, and these lengths.

    Rows that are constant have no direction, and become zeros.

    Args:
        rows: ``[..., n]``.

    Returns:
        ``[..., n]`` and ``[..., 1]``.
    """
    deviations = rows - rows.mean(-1, keepdim=True)
    lengths = deviations.norm(dim=-1, keepdim=True)
    return deviations / lengths.clamp(min=torch.finfo(rows.dtype).tiny), lengths


def standardized_kernels(captured: Capture, parameter: Node, dependent: Collection[Node]) -> list[Node]:
    """Return the convolutions whose kernel is a parameter with standardized rows.

    None of them where it is read in another way, too.

    Args:
        captured: The graph.
        parameter: Placeholder of the parameter.
        dependent: What depends on the inputs of the model.
    """
    shape = shape_of(parameter.meta["val"])
    if len(shape) < 3 or prod(shape[1:]) < FEWEST:
        return []
    kernels, readers = _kernels(captured, parameter, dependent)
    # F.conv2d(x, w): the kernel is the parameter itself.
    if not readers or parameter in kernels:
        return []
    if any(shape_of(kernel.meta["val"]) != shape for kernel in kernels):
        return []
    for kernel in kernels:
        if not _is_standardized(captured, parameter, kernel):
            return []
    return readers


def _kernels(
    captured: Capture, parameter: Node, dependent: Collection[Node]
) -> tuple[list[Node], list[Node]]:
    """Return the kernels that are made of a parameter, and the convolutions that read them.

    Neither, where anything but a convolution joins it to an activation.
    """
    made, waiting = {parameter}, [parameter]  # of it, and of other parameters and constants
    kernels: dict[Node, None] = {}
    readers: list[Node] = []
    while waiting:
        source = waiting.pop()
        for operator in source.users:
            # x.reshape_as(w) reads no entry of w. What runs backwards is a use that is seen forwards.
            takes_shape = traits_of(operator) & Trait.SHAPE_OF_SECOND
            blind = takes_shape and operator.args[0] is not source
            if blind or operator in captured.derivatives or operator in made:
                continue
            # F.conv2d(x, S(w), bias)
            if _convolves(operator) and [i for i, a in enumerate(operator.args) if a is source] == [1]:
                kernels[source] = None
                readers.append(operator)
            # S(w) is returned, or meets an activation elsewhere.
            elif operator.op != "call_function" or operator in dependent or _detaches(operator):
                return [], []
            else:
                made.add(operator)
                waiting.append(operator)
    return list(kernels), readers


def _detaches(operator: Node) -> bool:
    """Return whether no gradient passes: ``(w - w.mean().detach()) / w.std().detach()`` has another one."""
    return bool(traits_of(operator) & Trait.DETACHES)


def _convolves(operator: Node) -> bool:
    """Return whether an operator is a convolution that is not transposed."""
    if operator_name(operator.target) not in CONVOLUTIONS:
        return False
    # aten.convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)
    return not arguments_of(operator).get("transposed", False)


def _is_standardized(captured: Capture, parameter: Node, kernel: Node) -> bool:
    """Return whether a kernel's rows are a parameter's, standardized, each times a number of its own."""
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(parameter.meta["val"])
    others = _random_states(captured, generator)
    first = _row_numbers(kernel, others, parameter, torch.randn(shape, generator=generator).double())
    # S(a V + b) = S(V), row by row; the deviation of all rows together would not stay.
    factor, shift = torch.rand(2, shape[0], *[1] * (len(shape) - 1), generator=generator).double()
    rows = torch.randn(shape, generator=generator).double()
    second = _row_numbers(kernel, others, parameter, (1 + factor) * rows + shift)
    if first is None or second is None:
        return False
    # The number of a row does not depend on its entries.
    return _near(first, second) and bool((first != 0).all())


def _random_states(captured: Capture, generator: torch.Generator) -> dict[Node, Tensor]:
    """Return values for all parameters and buffers: positive, since some code takes the root of a gain."""
    values = {}
    for placeholder in (*captured.parameters, *captured.states):
        fake = placeholder.meta.get("val")
        if isinstance(fake, Tensor):
            values[placeholder] = torch.rand(shape_of(fake), generator=generator).double() + 0.5
        if placeholder in captured.numbers:
            values[placeholder].fill_(captured.numbers[placeholder])
    return values


def _row_numbers(
    kernel: Node, others: Mapping[Node, Tensor], parameter: Node, value: Tensor
) -> Tensor | None:
    """Return what each row of a kernel is times the standardized row of a value, ``[rows, 1]``.

    None where it is no multiple of that.
    """
    result = _run(kernel, {**others, parameter: value})
    if not isinstance(result, Tensor) or result.shape != value.shape:
        return None
    directions, _ = standardized(value.flatten(1))
    found = result.double().flatten(1)
    numbers = (found * directions).sum(1, keepdim=True)
    return numbers if _near(found, numbers * directions) else None


def _near(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() <= TOLERANCE * second.norm())


def _run(result: Node, values: Mapping[Node, Any]) -> Any:
    """Return the value of a node, or None where it cannot be computed of these values."""
    known = dict(values)
    needed = walk([result], lambda node: [] if node in values else node.all_input_nodes)
    try:
        for node in sorted(needed):  # in the order of the graph
            if node not in known:
                known[node] = _called(node, known)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return known[result]


def _called(operator: Node, known: Mapping[Node, Any]) -> Any:
    """Call an operator on the CPU.

    Raises:
        RuntimeError: A node is none that can be called.
    """
    if operator.op != "call_function":
        raise RuntimeError(f"{operator} has no value")
    target: Any = operator.target
    arguments = map_arg(operator.args, known.__getitem__)
    named = map_arg(operator.kwargs, known.__getitem__)
    arguments, named = tree_map(_as_here, (arguments, named))
    with torch.no_grad():
        return target(*arguments, **named)


def _as_here(value: Any) -> Any:
    """Return the CPU in the place of another device, and double in the place of another precision."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value
