"""Rules for operators that look up, gather, scatter, pool, resample or recur."""

from collections.abc import Sequence

from mupass._dims.elementwise import broadcast
from mupass._dims.engine import Axis, Call, Result, Value, rule
from mupass._dims.shape import split_axis


@rule("aten.embedding")
def embedding(call: Call) -> Result:
    """One row of the table for each index: the table length never grows, the row does."""
    weight, indices = call["weight"], call["indices"]
    call.finite(weight.axes[0], "the length of a lookup table")
    if weight.parametric:
        call.use("embedding", weight.axes[:1], weight.axes[1:], weight)
    return call.value([*_bare(indices.axes), *weight.axes[1:]])


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Result:
    """Pooled rows of a lookup table."""
    weight = call["weight"]
    call.finite(weight.axes[0], "the length of a lookup table")
    if weight.parametric:
        call.use("embedding", weight.axes[:1], weight.axes[1:], weight)
    outputs = [call.value([call.new(call.shapes[0][0]), *weight.axes[1:]])]
    return (*outputs, *(call.value([call.new(n) for n in s]) for s in call.shapes[1:]))


def _bare(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    return tuple(Axis(a.dim, a.size) for a in axes)


@rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Result:
    """Advanced indexing: the indexed axes go, the broadcast index axes come."""
    source, indices = call["self"], call["indices"]
    tensors = [i for i in indices if isinstance(i, Value)]
    if any(_boolean(call, k) for k, i in enumerate(indices) if isinstance(i, Value)):
        return _masked(call, source, indices)
    rank = max(len(t.axes) for t in tensors)
    common = _bare(broadcast(call, tensors, rank))
    at = [k for k, i in enumerate(indices) if isinstance(i, Value)]
    kept = [a for k, a in enumerate(source.axes) if k not in at]
    for k in at:
        _table(call, source, source.axes[k])
    apart = at != list(range(at[0], at[-1] + 1))
    place = 0 if apart else at[0]
    return call.value([*kept[:place], *common, *kept[place:]])


def _boolean(call: Call, position: int) -> bool:
    node = call.node.args[1][position]  # type: ignore[index]
    value = getattr(node, "meta", {}).get("val")
    return value is not None and str(value.dtype) in ("torch.bool", "torch.uint8")


def _masked(call: Call, source: Value, indices: Sequence[Value | None]) -> Value:
    """A boolean mask merges the axes that it covers into one of data-dependent length."""
    axes, at, used = [], 0, False
    for item in list(indices) + [None] * len(source.axes):
        if at >= len(source.axes):
            break
        if item is None:
            axes.append(source.axes[at])
            at += 1
        else:
            if not used:
                axes.append(call.new(call.shape[len(axes)]))
            at, used = at + len(item.axes), True
    return call.value(axes)


def _table(call: Call, source: Value, axis: Axis) -> None:
    """Rows that are picked by index are told apart; for a bare table that means it does not grow."""
    if source.parametric:
        call.finite(axis, "the length of an indexed table")
        rest = [a for a in source.axes if a.dim != axis.dim]
        call.use("embedding", [axis], rest, source)


@rule("aten.index_select")
def index_select(call: Call) -> Result:
    """Pick positions along one axis by index."""
    source, dim = call["self"], call["dim"] % max(len(call["self"].axes), 1)
    _table(call, source, source.axes[dim])
    axes = list(source.axes)
    axes[dim] = Axis(call["index"].axes[0].dim, call.shape[dim]) if call["index"].axes else call.new(1)
    return call.value(axes)


@rule("aten.gather", "aten.take_along_dim", "aten.gather_nd")
def gather(call: Call) -> Result:
    """Pick along one axis; the other axes agree with the index where sizes do."""
    source, where = call["self"], call.get("index", call.get("indices"))
    dim = call.get("dim")
    if dim is None:
        return call.value([call.new(s) for s in call.shape])
    dim %= max(len(source.axes), 1)
    axes = []
    for i, (a, b) in enumerate(zip(source.axes, where.axes, strict=True)):
        if i == dim:
            axes.append(Axis(b.dim, b.size))
        elif a.size == b.size or b.size == 1:
            call.unify(a, b)
            axes.append(a if a.size == call.shape[i] else b)
        else:
            axes.append(Axis(b.dim, b.size))
    return call.value(axes)


@rule(
    "aten.scatter",
    "aten.scatter_add",
    "aten.scatter_reduce",
    "aten.index_add",
    "aten.index_copy",
    "aten.index_put",
    "aten.select_scatter",
    "aten.slice_scatter",
    "aten.index_fill",
    "aten.diagonal_scatter",
    "aten.index_reduce",
    "aten._index_put_impl",
)
def scatter(call: Call) -> Result:
    """Write into a tensor: the target's axes come out, and what is written agrees with them."""
    target: Value = call["self"]
    static = call.static
    source = call.get("src", call.get("source", call.get("values", call.get("value"))))
    name = call.operator.removesuffix("_")
    if isinstance(source, Value) and source.axes:
        if name == "aten.index_put":
            _match_put(call, target, source)
        elif name == "aten.select_scatter":
            kept = [a for i, a in enumerate(target.axes) if i != call["dim"] % len(target.axes)]
            for a, b in zip(kept, source.axes, strict=True):
                call.unify(a, b)
        elif len(source.axes) == len(target.axes):
            dim = call.get("dim", -1) % len(target.axes)
            for i, (a, b) in enumerate(zip(target.axes, source.axes, strict=True)):
                if i != dim:
                    call.unify(a, b)
    return call.value(target.axes, static)


def _match_put(call: Call, target: Value, source: Value) -> None:
    """The trailing axes that no index touches agree with those of the values."""
    touched = sum(
        max(len(i.axes), 1) if isinstance(i, Value) and _boolean(call, k) else 1
        for k, i in enumerate(call["indices"])
    )
    free = target.axes[touched:]
    for a, b in zip(free[::-1], source.axes[::-1], strict=False):
        call.unify(a, b)


@rule("aten.masked_select", "aten.take", "aten.argwhere")
def flat_pick(call: Call) -> Result:
    """A flat pick of entries: the result has an axis of its own."""
    return call.value([call.new(s) for s in call.shape])


@rule("aten.one_hot")
def one_hot(call: Call) -> Result:
    """A new axis of alternatives."""
    classes = call.new(call.shape[-1])
    call.finite(classes, "the classes of a one-hot code")
    return call.value([*call.values[0].axes, classes])


@rule("aten.bucketize", "aten.isin")
def bucketize(call: Call) -> Result:
    """Keeps the axes of the values that are looked up."""
    return call.value(
        call.values[0].axes
        if len(call.values[0].axes) == len(call.shape)
        else [call.new(s) for s in call.shape]
    )


@rule(
    "aten.max_pool1d",
    "aten.max_pool2d",
    "aten.max_pool3d",
    "aten.avg_pool1d",
    "aten.avg_pool2d",
    "aten.avg_pool3d",
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten.adaptive_avg_pool3d",
    "aten.adaptive_max_pool1d",
    "aten.adaptive_max_pool2d",
    "aten.adaptive_max_pool3d",
    "aten._adaptive_avg_pool2d",
    "aten._adaptive_avg_pool3d",
    "aten.max_pool2d_with_indices",
    "aten.max_pool1d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.fractional_max_pool2d",
    "aten.lp_pool2d",
    "aten.max_unpool2d",
    "aten.max_unpool3d",
)
def pool(call: Call) -> Result:
    """Positions derive from positions; channels stay."""
    source = call.values[0]
    outputs = [
        call.value([_position(call, a, s) for a, s in zip(source.axes, shape, strict=True)])
        for shape in call.shapes
    ]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _position(call: Call, axis: Axis, size: int) -> Axis:
    return axis if axis.size == size else call.derive(axis, size)


@rule(
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d",
    "aten._upsample_nearest_exact1d",
    "aten._upsample_nearest_exact2d",
    "aten._upsample_nearest_exact3d",
    "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa",
    "aten.affine_grid_generator",
)
def upsample(call: Call) -> Result:
    """Positions derive from positions; channels stay."""
    return pool(call)


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(call: Call) -> Result:
    """Channels of the input, positions of the grid."""
    source, grid = call["input"], call["grid"]
    call.unify(source.axes[0], grid.axes[0])
    return call.value([*source.axes[:2], *_bare(grid.axes[1:-1])])


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
    source: Value = call["input"]
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
    finals = [
        call.value([*_bare(states[0].axes[: state_rank - 1]), a]) for a in (hidden, cell)[: len(states)]
    ]
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


@rule("aten.roi_align", "torchvision.roi_align", "torchvision.ps_roi_align")
def roi_align(call: Call) -> Result:
    """Boxes x channels x literal bins."""
    source = call.values[0]
    bins = [call.new(s) for s in call.shape[2:]]
    for axis in bins:
        call.finite(axis, "bins of a region pooling")
    return call.value([call.new(call.shape[0]), source.axes[1], *bins])
