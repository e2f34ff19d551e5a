"""Rules for operators that sum products: matrix products, einsum, convolutions."""

from collections.abc import Sequence

from mupass._dims.call import Call, Result, rule
from mupass._dims.facts import NOWHERE, Axis, Bilinear, MadeWeight, Value, bare
from mupass._dims.shape import merge_axes

Labels = Sequence[str]


def contract(
    call: Call, kind: str, operands: Sequence[Value], labels: Sequence[Labels], out: Labels
) -> Value:
    """Treat any sum of products as einsum: equal labels are one axis, missing ones are summed.

    This is also where parameters are recognized as weights: an axis that a parameter shares with an
    activation and that is summed is fan_in, one that only the parameter has is fan_out, and one that both
    have and the output keeps is a batch of separate weights. An axis of length 1 that is broadcast against
    the parameter's counts as one that the activation does not have.
    """
    table: dict[str, Axis] = {}
    for value, names in zip(operands, labels, strict=True):
        for axis, name in zip(value.axes, names, strict=True):
            known = table.setdefault(name, axis)
            if known.size == 1 != axis.size:
                table[name] = axis
            call.unify(known, axis)
    if call.static and any(not v.parametric and len(v.axes) == 1 for v in operands):
        # mv(W, v), v a buffer: the power iteration of spectral norm, which is no use of the weight
        return call.value([Axis(table[n].dim, table[n].size) for n in out])
    weights = [i for i, v in enumerate(operands) if v.parametric]
    for value, names in zip(operands, labels, strict=True):
        if value.parametric and (mixture := _mixture(call, value, names, out)):
            return call.value([mixture.get(n, table[n]) for n in out], static=True)
    owned = {i: dict(zip(labels[i], operands[i].axes, strict=True)) for i in weights}
    met = {i: _met(i, owned[i], operands, labels) for i in weights}
    for i in weights:
        _blocks(call, owned[i], met[i], out)
    basis = len(weights) == len(operands) > 1
    if basis:
        weights = weights[-1:]  # both are parameters: the second acts on the first
    for i in weights:
        own, others = owned[i], met[i]
        named = {n for j, names in enumerate(labels) if j != i for n in names}
        summed = [a for n, a in own.items() if n in others and n not in out]
        made = [a for n, a in own.items() if n not in named and n in out]
        beside = [a for n, a in own.items() if n in named - others and n in out]
        _between(call, i, own, summed, operands, labels)
        if summed or made or beside:
            call.use(kind, summed, made, operands[i], basis, beside)
        else:
            call.pointwise_use("pointwise", operands[i])
    if not weights and len(operands) == 2 and not call.backward:
        _bilinear(call, table, labels, out)
    origins = {
        n: NOWHERE.union(
            *(
                dict(zip(names, v.axes, strict=True))[n].origin
                for v, names in zip(operands, labels, strict=True)
                if n in names
            )
        )
        for n in out
    }
    return call.value([Axis(table[n].dim, table[n].size, origins[n]) for n in out])


def _between(
    call: Call,
    i: int,
    own: dict[str, Axis],
    summed: Sequence[Axis],
    operands: Sequence[Value],
    labels: Sequence[Labels],
) -> None:
    """Record what a weight contracts with each of several activations: ``y_o = sum_ij a_i W_oij b_j``."""
    sides = []
    for j, names in enumerate(labels):
        if j != i and not operands[j].static:
            sides.append(tuple(own[n].dim for n in names if n in own and own[n] in summed))
    if len([side for side in sides if side]) > 1:
        call.facts.between.append(tuple(side for side in sides if side))


def _mixture(call: Call, weight: Value, names: Labels, out: Labels) -> dict[str, Axis]:
    """Return the axes that are left of a weight whose alternatives are summed: ``w = sum_e g_e W_e``."""
    summed = [a for n, a in zip(names, weight.axes, strict=True) if n not in out]
    if not summed or any(not a.origin or not a.origin <= call.engine.mixed for a in summed):
        return {}
    call.facts.mixtures.update({a.dim: call.where for a in summed})
    call.pointwise_use("pointwise", weight)
    return dict(zip(names, weight.axes, strict=True))


def _bilinear(call: Call, table: dict[str, Axis], labels: Sequence[Labels], out: Labels) -> None:
    shared = set(labels[0]) & set(labels[1]) & set(out)
    batch = tuple(table[n].dim for n in table if n in shared and table[n].size > 1)
    inner = tuple(table[n].dim for n in table if n not in shared and table[n].size > 1)
    call.facts.bilinear.append(Bilinear(batch, inner, call.where))
    summed = {n for n in table if n in labels[0] and n in labels[1] and n not in out and table[n].size > 1}
    for names in labels:
        kept = [table[n].dim for n in names if n in out and n not in shared and table[n].size > 1]
        call.facts.made_weights.append(MadeWeight(tuple(table[n].dim for n in summed), tuple(kept)))


def _met(i: int, own: dict[str, Axis], operands: Sequence[Value], labels: Sequence[Labels]) -> set[str]:
    """Return the labels of one operand that others have too, not as a single entry for all of its own."""
    return {
        name
        for j, (names, value) in enumerate(zip(labels, operands, strict=True))
        for name, axis in zip(names, value.axes, strict=True)
        if j != i and name in own and (axis.size > 1 or own[name].size == 1)
    }


def _blocks(call: Call, own: dict[str, Axis], met: set[str], out: Labels) -> None:
    """A weight with a batch axis is one small weight for each block of the width."""
    shared = {n for n in own if n in out and n in met and own[n].size > 1}
    if shared and not call.static:
        inner = tuple(a.dim for n, a in own.items() if n not in shared and a.size > 1)
        call.facts.blocks.append(Bilinear(tuple(own[n].dim for n in shared), inner, call.where))


def letters(count: int, start: int = 0) -> list[str]:
    """Return that many distinct labels."""
    return [f"b{start + i}" for i in range(count)]


@rule("aten.linear", "aten.addmm", "aten._linear")
def linear(call: Call) -> Result:
    """Return x W^T + b."""
    if call.operator == "aten.addmm":
        result = contract(call, "matmul", [call["mat1"], call["mat2"]], ["ik", "kj"], "ij")
        return add_bias(call, result, call["self"], -1)
    source, weight = call["input"], call["weight"]
    tokens = source.static  # learned queries and encoded positions are data that happen to be constant
    if source.parametric:
        call.pointwise_use("pointwise", source)
    if tokens:
        source = Value(bare(source.axes))
    batch = letters(len(source.axes) - 1)
    out = ["o"] if len(weight.axes) == 2 else []
    result = contract(call, "linear", [source, weight], [[*batch, "i"], [*out, "i"]], [*batch, *out])
    result = add_bias(call, result, call.get("bias"), -1)
    return Value(bare(result.axes), True) if tokens else result


def add_bias(call: Call, result: Value, bias: Value | None, axis: int) -> Value:
    """Add a bias along one axis."""
    if isinstance(bias, Value):
        if bias.axes and result.axes:
            call.unify(bias.axes[-1], result.axes[axis])
        if bias.parametric:
            call.pointwise_use("bias", bias)
    return result


@rule(
    "aten.matmul",
    "aten.mm",
    "aten.bmm",
    "aten.mv",
    "aten.dot",
    "aten.linalg_matmul",
    "aten.__matmul__",
    "aten.inner",
    "aten.vdot",
    "aten.baddbmm",
    "aten.addbmm",
)
def matmul(call: Call) -> Result:
    """Matrix product with broadcast batch axes."""
    a, b = (
        (call["batch1"], call["batch2"])
        if call.operator.endswith("bmm") and "batch1" in call.arguments
        else call.values[:2]
    )
    ra, rb = len(a.axes), len(b.axes)
    batch = max(ra, rb, 2) - 2
    left = letters(max(ra - 2, 0), batch - max(ra - 2, 0)) + (["i"] if ra > 1 else []) + ["k"]
    right = letters(max(rb - 2, 0), batch - max(rb - 2, 0)) + (["k", "j"] if rb > 1 else ["k"])
    out = letters(batch if max(ra, rb) > 2 else 0) + (["i"] if ra > 1 else []) + (["j"] if rb > 1 else [])
    if call.operator == "aten.addbmm":  # sums over the batch axis as well
        out = ["i", "j"]
    result = contract(call, "matmul", [a, b], [left, right], out)
    if call.operator in ("aten.baddbmm", "aten.addbmm"):
        for axis, other in zip(result.axes[::-1], call["self"].axes[::-1], strict=False):
            call.unify(axis, other)
        if call["self"].parametric:
            call.pointwise_use("bias", call["self"])
    return result


@rule("aten.outer", "aten.ger", "aten.kron")
def outer(call: Call) -> Result:
    """Outer product."""
    a, b = call.values[:2]
    if call.operator == "aten.kron":
        return call.value([merge_axes(call, pair) for pair in zip(a.axes, b.axes, strict=True)])
    return call.value([*a.axes, *b.axes])


@rule("aten.einsum")
def einsum(call: Call) -> Result:
    """Einstein summation, ellipsis included."""
    operands: list[Value] = list(call["tensors"])
    equation = call["equation"].replace(" ", "")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    labels: list[Labels] = [_spell(t, len(v.axes)) for t, v in zip(terms, operands, strict=True)]
    if not output and "->" not in equation:
        flat = [n for names in labels for n in names]
        output_labels = [n for n in sorted(set(flat)) if n.startswith("...")] + sorted(
            n for n in set(flat) if flat.count(n) == 1 and not n.startswith("...")
        )
    else:
        output_labels = _spell(output, len(call.shape))
    for names, value in zip(labels, operands, strict=True):  # a repeated label is a diagonal
        for i, name in enumerate(names):
            call.unify(value.axes[names.index(name)], value.axes[i])
    while len(operands) > 2 and (pair := _activations(operands, labels, output_labels)):
        operands, labels = _contracted(call, operands, labels, output_labels, pair)
    return contract(call, "einsum", operands, labels, output_labels)


def _activations(operands: Sequence[Value], labels: Sequence[Labels], out: Labels) -> tuple[int, int] | None:
    """Return two activations that are contracted with each other, as attention and values are."""
    moving = [i for i, v in enumerate(operands) if not v.parametric]
    for i, j in ((i, j) for j in moving for i in moving if i < j):
        kept = set(out).union(*(names for k, names in enumerate(labels) if k not in (i, j)))
        if set(labels[i]) & set(labels[j]) - kept:
            return i, j
    return None


def _contracted(
    call: Call, operands: Sequence[Value], labels: Sequence[Labels], out: Labels, pair: tuple[int, int]
) -> tuple[list[Value], list[Labels]]:
    """Contract two operands of several, as if the code had done so first."""
    rest = [k for k in range(len(operands)) if k not in pair]
    kept = set(out).union(*(labels[k] for k in rest))
    made = [n for n in dict.fromkeys([*labels[pair[0]], *labels[pair[1]]]) if n in kept]
    value = contract(call, "einsum", [operands[k] for k in pair], [labels[k] for k in pair], made)
    return [value, *(operands[k] for k in rest)], [made, *(labels[k] for k in rest)]


def _spell(term: str, rank: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    extra = rank - len(before) - len(after)
    return [*before, *(f"...{extra - i}" for i in range(extra)), *after]


@rule("aten.bilinear")
def bilinear(call: Call) -> Result:
    """Return x1 W x2 + b."""
    batch = letters(len(call["input1"].axes) - 1)
    result = contract(
        call,
        "bilinear",
        [call["input1"], call["input2"], call["weight"]],
        [[*batch, "i"], [*batch, "j"], ["o", "i", "j"]],
        [*batch, "o"],
    )
    return add_bias(call, result, call.get("bias"), -1)


@rule(
    "aten.conv1d",
    "aten.conv2d",
    "aten.conv3d",
    "aten.convolution",
    "aten._convolution",
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.conv_transpose3d",
    "aten._convolution_mode",
)
def convolution(call: Call) -> Result:
    """Convolution: channels are contracted, kernel axes never grow, positions derive from positions."""
    source: Value = call["input"]
    weight: Value = call["weight"]
    rank = len(weight.axes) - 2
    transposed = bool(call.get("transposed", "transpose" in call.operator))
    channels = source.axes[-rank - 1]
    groups = call.get("groups", 1)
    places = source.axes[len(source.axes) - rank :]
    for i, axis in enumerate(weight.axes[2:]):
        # A kernel over all of an axis, to one position, contracts it as a linear layer does (TextCNN).
        if not transposed and axis.size == places[i].size > 1 and call.shape[len(call.shape) - rank + i] == 1:
            call.unify(axis, places[i])
        else:
            call.finite(axis, "a kernel axis")
    first, second = weight.axes[:2]
    into, made = (first, second) if transposed else (second, first)
    result_channels = _group(call, channels, into, made, transposed, groups)
    own = [made] if groups == 1 or transposed else [made]
    if groups == channels.size and into.size == 1 or transposed and groups == channels.size:
        call.facts.fan_out.setdefault(channels.dim, call.where)
    call.use("conv_transpose" if transposed else "conv", [into, *weight.axes[2:]], own, weight)
    if not weight.static:
        call.facts.made_weights.append(MadeWeight((into.dim,), (made.dim,)))
    spatial = [
        call.derive(a, s) if a.size != s else a
        for a, s in zip(
            source.axes[len(source.axes) - rank :], call.shape[len(call.shape) - rank :], strict=True
        )
    ]
    call.facts.positions.update(a.dim for a in (*source.axes[len(source.axes) - rank :], *spatial))
    axes = [*source.axes[: -rank - 1], result_channels, *spatial]
    return add_bias(call, call.value(axes), call.get("bias"), -rank - 1)


def _group(call: Call, channels: Axis, into: Axis, made: Axis, transposed: bool, groups: int) -> Axis:
    """Tie channels to weight axes and return the output channels."""
    if groups == 1:
        call.unify(channels, into)
        return made
    if channels.size == groups:  # depthwise: the group is the channel
        group = channels
    else:
        group = call.new(groups)
        call.facts.groups.setdefault(group.dim, call.where)
    split = made if not transposed else into
    per_group = call.new(split.size // groups)
    call.space.groups(split.dim, (group.dim, per_group.dim))
    if not transposed:
        call.space.groups(channels.dim, (group.dim, into.dim))
        return made
    call.unify(channels, into)
    whole = call.new(groups * made.size)
    call.space.groups(whole.dim, (group.dim, made.dim))
    return Axis(whole.dim, whole.size, made.origin)


@rule("aten._grouped_mm", "aten._scaled_grouped_mm", "transformers.grouped_mm_fallback")
def grouped_matmul(call: Call) -> Result:
    """Rows sorted by expert times one matrix an expert."""
    a, b = call.values[:2]
    if len(a.axes) == 2 and len(b.axes) == 3:
        call.finite(b.axes[0], "experts")
        return contract(call, "matmul", [a, b], ["ik", "gkj"], "ij")
    batch = letters(len(call.shape) - 2)
    return contract(
        call,
        "matmul",
        [a, b],
        [[*batch, "i", "k"][-len(a.axes) :], [*batch, "k", "j"][-len(b.axes) :]],
        [*batch, "i", "j"],
    )


@rule("aten.cdist", "aten._cdist_forward")
def cdist(call: Call) -> Result:
    """Distances between rows: like a product of two activations."""
    a, b = call.values[:2]
    batch = letters(len(call.shape) - 2)
    return contract(call, "distance", [a, b], [[*batch, "i", "k"], [*batch, "j", "k"]], [*batch, "i", "j"])
