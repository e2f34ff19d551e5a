"""Rules for recurrent layers, their single cells, and gates."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import Axis, Value, bare
from mupass._dims.registry import rule
from mupass._dims.rules.reshape import split_axis

_GATES = {"aten.lstm": 4, "aten.gru": 3}


@rule("aten.glu")
def glu(call: Call) -> Result:
    """One half gates the other: two parts that agree."""
    source = call.values[0]
    dim = call.get("dim", -1) % len(source.axes)
    half = call.new(call.shape[dim])
    # a sigmoid(b), where a and b are the halves
    call.space.sum(source.axes[dim].dim, (half.dim, half.dim))
    return call.value([*source.axes[:dim], half, *source.axes[dim + 1 :]])


@rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(call: Call) -> Result:
    """Stacked (bidirectional) recurrence: gates x hidden rows, layer by layer."""
    packed = "data" in call.arguments
    source: Value = call["data"] if packed else call["input"]
    parameters: list[Value] = list(call["params"])
    states = _states(call)
    directions = 2 if call["bidirectional"] else 1
    # Weights and biases stand cell after cell, in the order of layers and directions.
    per_cell = len(parameters) // (call["num_layers"] * directions)
    features = source.axes[-1]
    hidden = cell = states[0].axes[-1]
    for _ in range(call["num_layers"]):
        outputs = []
        for _ in range(directions):
            hidden, cell = _cell(call, parameters[:per_cell], features)
            del parameters[:per_cell]
            # LSTMs have a hidden state and a cell, the others one state.
            call.unify(states[0].axes[-1], hidden)
            call.unify(states[-1].axes[-1], cell)
            outputs.append(hidden)
        # The next layer reads the outputs of both directions side by side.
        features = outputs[0] if directions == 1 else _join(call, outputs)
    results = [call.value([*source.axes[:-1], features])]
    if not packed and len(source.axes) == len(states[0].axes) == 3:  # samples of a batch
        call.unify(source.axes[0 if call["batch_first"] else 1], states[0].axes[1])
    for state, width in zip(states, (hidden, cell), strict=False):
        batch = states[0].axes[: len(state.axes) - 1]
        results.append(call.value([*bare(batch), width]))
    return tuple(results)


def _states(call: Call) -> list[Value]:
    """Return the states that a recurrence starts from: one, or hidden state and cell of an LSTM."""
    states = call["hx"]
    if isinstance(states, Value):
        return [states]
    return list(states)


def _join(call: Call, outputs: Sequence[Axis]) -> Axis:
    """Return the axis that both directions are joined into."""
    joined = call.new(sum(axis.size for axis in outputs))
    call.space.sum(joined.dim, tuple(axis.dim for axis in outputs))
    return joined


def _cell(call: Call, parameters: Sequence[Value], features: Axis) -> tuple[Axis, Axis]:
    """Tie one cell's weights: w_ih, w_hh, then biases and a projection where there are any.

    Args:
        call: The operator call.
        parameters: Two weights, with two biases or without, with a projection (``proj_size``) or without.
        features: The axis that the cell reads.

    Returns:
        The widths of the hidden state and of the cell.
    """
    # Two weights, two biases or none, a projection or none: 2, 3, 4 or 5 tensors.
    number_of_parameters = len(parameters)
    w_ih, w_hh = parameters[:2]
    call.unify(w_ih.axes[1], features)
    # rows = gates x cell
    gates = _GATES.get(call.operator.removesuffix("_cell"), 1)
    gate, cell = split_axis(call, w_ih.axes[0], [gates, w_ih.axes[0].size // gates])
    call.enumerate(gate, "the gates of a recurrent cell")
    call.unify(w_ih.axes[0], w_hh.axes[0])
    if number_of_parameters >= 4:
        for bias in parameters[2:4]:
            call.unify(w_ih.axes[0], bias.axes[0])
            call.pointwise_use("bias", bias)
    for weight in (w_ih, w_hh):
        call.use("recurrent", weight.axes[1:], weight.axes[:1], weight)
    if number_of_parameters in (3, 5):  # projected hidden state
        projection = parameters[-1]
        call.unify(projection.axes[1], cell)
        call.unify(projection.axes[0], w_hh.axes[1])
        call.use("recurrent", projection.axes[1:], projection.axes[:1], projection)
        return projection.axes[0], cell
    call.unify(w_hh.axes[1], cell)
    return cell, cell


@rule("aten._pack_padded_sequence")
def pack(call: Call) -> Result:
    """Positions of all samples in one axis, shortest samples last, and how many there are at each step."""
    count, steps = call.shapes
    features = call["input"].axes[2:]
    return call.value([call.new(count[0]), *features]), call.value([call.new(steps[0])])


@rule("aten._pad_packed_sequence")
def unpack(call: Call) -> Result:
    """The inverse, and the length of every sample."""
    padded, lengths = call.shapes
    first, second = call.new(padded[0]), call.new(padded[1])
    # The batch axis comes first or second, as batch_first says.
    batch = first if call["batch_first"] else second
    features = call["data"].axes[1:]
    return call.value([first, second, *features]), call.value([Axis(batch.dim, lengths[0])])


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def recurrent_cell(call: Call) -> Result:
    """One step of a recurrence."""
    states = _states(call)
    parameters = [call["w_ih"], call["w_hh"]]
    for name in ("b_ih", "b_hh"):
        if isinstance(call.get(name), Value):
            parameters.append(call[name])
    hidden, _ = _cell(call, parameters, call["input"].axes[-1])
    rows = call["input"].axes[:-1]
    for state in states:
        call.unify(state.axes[-1], hidden)
        for row, state_row in zip(rows, state.axes, strict=False):
            call.unify(row, state_row)
    return one_or_all([call.value([*rows, hidden]) for _ in states])
