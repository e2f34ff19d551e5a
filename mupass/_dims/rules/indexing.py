"""Rules for operators that look up, gather or scatter."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result
from mupass._dims.facts import Axis, Value, bare
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast


@rule("aten.embedding")
def embedding(call: Call) -> Result:
    """One row of the table for each index: the table length never grows, the row does."""
    weight, indices = call["weight"], call["indices"]
    call.finite(weight.axes[0], "the length of a lookup table")
    _rows(call, weight)
    return call.value([*bare(indices.axes), *weight.axes[1:]])


def _rows(call: Call, weight: Value) -> None:
    if weight.parametric:
        call.facts.rows += [a.dim for a in weight.axes[1:]]
        call.use("embedding", weight.axes[:1], weight.axes[1:], weight)


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Result:
    """Pooled rows of a lookup table."""
    weight = call["weight"]
    call.finite(weight.axes[0], "the length of a lookup table")
    _rows(call, weight)
    outputs = [call.value([call.new(call.shapes[0][0]), *weight.axes[1:]])]
    return (*outputs, *(call.value([call.new(n) for n in s]) for s in call.shapes[1:]))


@rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Result:
    """Advanced indexing: the indexed axes go, the broadcast index axes come."""
    source, indices = call["self"], call["indices"]
    tensors = [i for i in indices if isinstance(i, Value)]
    if any(_boolean(call, k) for k, i in enumerate(indices) if isinstance(i, Value)):
        return _masked(call, source, indices)
    rank = max(len(t.axes) for t in tensors)
    common = bare(broadcast(call, tensors, rank))
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
    call.alternative(axis, "its positions are picked by index")
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
            call.alternative(a, "its positions are picked by index")
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


@rule("aten.multinomial")
def multinomial(call: Call) -> Result:
    """Draws from alternatives, row by row."""
    source = call.values[0]
    call.alternative(source.axes[-1], "its entries are drawn from")
    return call.value([*source.axes[:-1], call.new(call.shape[-1])])


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
