"""Which operators are linear, so that two weights around them act like one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from mupass._dims.facts import Value
from mupass._dims.graph import flatten, shape_of

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
