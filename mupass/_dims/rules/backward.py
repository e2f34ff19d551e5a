"""Rules for operators that only a derivative runs, such as ``aten.convolution_backward``."""

from mupass._dims.call import Call, Result
from mupass._dims.facts import Value
from mupass._dims.graph import shape_of
from mupass._dims.registry import rule


@rule("backward")
def gradients(call: Call) -> Result:
    """A gradient has the axes of what it is the gradient of.

    The outputs come in the order of the operands, where those that no derivative is asked of are left out:
    each output is the gradient of the first operand of its shape that no output before it belongs to. With
    none left it is computed from the incoming gradient entry by entry (softmax), or has axes of its own.
    """
    incoming = []
    for name, argument in call.arguments.items():
        if name.startswith("grad") and isinstance(argument, Value):
            incoming.append(argument)
    # Operands come first: an incoming gradient may have the shape of one of them.
    operands = [value for value in call.values if not _is_among(value, incoming)] + incoming
    results = call.node.meta["val"]
    several = isinstance(results, (tuple, list))
    outputs: list[Value | None] = []
    for tensor in results if several else [results]:
        if tensor is None:  # no derivative was asked of this operand
            outputs.append(None)
            continue
        shape = shape_of(tensor)
        operand = next((value for value in operands if value.sizes == shape), None)
        if operand is None:
            outputs.append(call.unknown(shape))
        else:
            operands = [value for value in operands if value is not operand]
            outputs.append(call.value(operand.axes))
    if several:
        return tuple(outputs)
    return outputs[0]


def _is_among(value: Value, others: list[Value]) -> bool:
    """Whether a tensor is one of several, not merely equal to one."""
    return any(value is other for other in others)


@rule("aten.select_backward")
def select_backward(call: Call) -> Result:
    """Put the gradient of one position back among zeros."""
    axes = list(call["grad_output"].axes)
    dim = call["dim"] % len(call.shape)
    return call.value([*axes[:dim], call.new(call.shape[dim]), *axes[dim:]])


@rule("aten.slice_backward")
def slice_backward(call: Call) -> Result:
    """Put the gradient of a span back among zeros."""
    return call.value(map(call.resized, call["grad_output"].axes, call.shape))
