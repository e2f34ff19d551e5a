"""Rules for operators that only a derivative runs, such as ``aten.convolution_backward``."""

from __future__ import annotations

from mupass._dims.call import Call, Result, rule
from mupass._dims.facts import Axis, Value
from mupass._dims.graph import shape_of


@rule("backward")
def gradients(call: Call) -> Result:
    """A gradient has the axes of what it is the gradient of.

    The outputs come in the order of the operands, where those that no derivative is asked of are left out:
    each output is the gradient of the first operand of its shape that no output before it belongs to. With
    none left it is computed from the incoming gradient entry by entry (softmax), or has axes of its own.
    """
    incoming = [v for name, v in call.arguments.items() if name.startswith("grad") and isinstance(v, Value)]
    operands = [v for v in call.values if not any(v is g for g in incoming)] + incoming
    found = call.node.meta["val"]
    outputs: list[Value | None] = []
    for tensor in found if isinstance(found, (tuple, list)) else [found]:
        if tensor is None:  # no derivative was asked of this operand
            outputs.append(None)
            continue
        shape = shape_of(tensor)
        alike = [v for v in operands if tuple(a.size for a in v.axes) == shape]
        if alike:
            operands = [v for v in operands if v is not alike[0]]
            outputs.append(call.value(alike[0].axes))
        else:
            outputs.append(call.value([call.new(s) for s in shape]))
    return tuple(outputs) if isinstance(found, (tuple, list)) else outputs[0]


@rule("aten.select_backward")
def select_backward(call: Call) -> Result:
    """Put the gradient of one position back among zeros."""
    axes = list(call["grad_output"].axes)
    dim = call["dim"] % len(call.shape)
    return call.value([*axes[:dim], call.new(call.shape[dim]), *axes[dim:]])


@rule("aten.slice_backward")
def slice_backward(call: Call) -> Result:
    """Put the gradient of a span back among zeros."""
    pairs = zip(call["grad_output"].axes, call.shape, strict=True)
    return call.value([_widened(call, axis, size) for axis, size in pairs])


def _widened(call: Call, axis: Axis, size: int) -> Axis:
    return axis if axis.size == size else call.derive(axis, size)
