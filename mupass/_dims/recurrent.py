"""Rules for recurrent layers, their single cells, and gates."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result, rule
from mupass._dims.facts import Axis, Value, bare
from mupass._dims.shape import split_axis


@rule("aten.glu")
def glu(call: Call) -> Result:
    """One half gates the other: two parts that agree."""
    source = call.values[0]
    dim = call.get("dim", -1) % len(source.axes)
    half = call.new(call.shape[dim])
    call.space.sum(source.axes[dim].dim, (half.dim, half.dim))
    return call.value([*source.axes[:dim], half, *source.axes[dim + 1 :]])


@rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(call: Call) -> Result:
    """Stacked (bidirectional) recurrence: gates x hidden rows, layer by layer."""
    source: Value = call["data"] if "data" in call.arguments else call["input"]  # packed, or not
    params: list[Value] = list(call["params"])
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    gates = {"aten.lstm": 4, "aten.gru": 3}.get(call.operator, 1)
    directions = 2 if call["bidirectional"] else 1
    per_cell = len(params) // (call["num_layers"] * directions)
    features = source.axes[-1]
    hidden = cell = states[0].axes[-1]
    for layer in range(call["num_layers"]):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * per_cell
            hidden, cell = _cell(call, params[start : start + per_cell], features, gates, per_cell)
            call.unify(states[0].axes[-1], hidden)
            call.unify(states[-1].axes[-1], cell)
            outputs.append(hidden)
        features = outputs[0] if directions == 1 else _join(call, outputs)
    state_rank = len(states[0].axes)
    finals = [call.value([*bare(states[0].axes[: state_rank - 1]), a]) for a in (hidden, cell)[: len(states)]]
    return (call.value([*source.axes[:-1], features]), *finals)


def _join(call: Call, outputs: Sequence[Axis]) -> Axis:
    whole = call.new(sum(a.size for a in outputs))
    call.space.sum(whole.dim, tuple(a.dim for a in outputs))
    return whole


def _cell(call: Call, params: Sequence[Value], features: Axis, gates: int, count: int) -> tuple[Axis, Axis]:
    """Tie one cell's weights: w_ih, w_hh, then biases and a projection where there are any."""
    w_ih, w_hh = params[:2]
    call.unify(w_ih.axes[1], features)
    rows = split_axis(call, w_ih.axes[0], [gates, w_ih.axes[0].size // gates])
    call.enumerate(rows[0], "the gates of a recurrent cell")
    cell = rows[1]
    for other in (w_hh, *(params[2:4] if count >= 4 else ())):
        call.unify(w_ih.axes[0], other.axes[0])
        if len(other.axes) == 1:
            call.pointwise_use("bias", other)
    call.use("recurrent", w_ih.axes[1:], w_ih.axes[:1], w_ih)
    call.use("recurrent", w_hh.axes[1:], w_hh.axes[:1], w_hh)
    if count in (3, 5):  # projected hidden state
        projection = params[-1]
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
    return call.value([call.new(count[0]), *call["input"].axes[2:]]), call.value([call.new(steps[0])])


@rule("aten._pad_packed_sequence")
def unpack(call: Call) -> Result:
    """The inverse, and the length of every sample."""
    padded, lengths = call.shapes
    first, second = (call.new(size) for size in padded[:2])
    batch = second if not call["batch_first"] else first
    return call.value([first, second, *call["data"].axes[1:]]), call.value([Axis(batch.dim, lengths[0])])


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def recurrent_cell(call: Call) -> Result:
    """One step of a recurrence."""
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    gates = {"aten.lstm_cell": 4, "aten.gru_cell": 3}.get(call.operator, 1)
    params = [p for p in (call["w_ih"], call["w_hh"], call.get("b_ih"), call.get("b_hh")) if p is not None]
    hidden, _ = _cell(call, params, call["input"].axes[-1], gates, len(params))
    for state in states:
        call.unify(state.axes[-1], hidden)
    outputs = [call.value([*states[0].axes[:-1], hidden]) for _ in states]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
