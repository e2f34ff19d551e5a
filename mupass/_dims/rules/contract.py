"""Rules for operators that sum products: matrix products, einsum, convolutions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mupass._dims.call import Call, Result
from mupass._dims.facts import NOWHERE, Axis, Between, Bilinear, MadeWeight, Value, bare
from mupass._dims.graph import summed_axes
from mupass._dims.registry import rule
from mupass._dims.rules.elementwise import broadcast, is_matrix, pointwise, pointwise_of
from mupass._dims.rules.reshape import merge_axes
from mupass._records import PRODUCT_AND_SUM

Labels = Sequence[str]


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor of a sum of products, its axes by their labels."""

    value: Value
    axes: Mapping[str, Axis]


def contract(
    call: Call, kind: str, operands: Sequence[Value], labels: Sequence[Labels], out: Labels
) -> Value:
    """Treat any sum of products as einsum: equal labels are one axis, missing ones are summed.

    This is also where parameters are recognized as weights: an axis that a parameter shares with an
    activation and that is summed is fan_in, one that only the parameter has is fan_out, and one that both
    have and the output keeps is a batch of separate weights. An axis of length 1 that is broadcast against
    the parameter's counts as one that the activation does not have.

    Args:
        call: The operator call.
        kind: What a weight does here, for its record of uses: ``linear``, ``matmul``, ``attention``...
        operands: Its tensors.
        labels: For each operand a label on every axis.
        out: Labels of the result.
    """
    terms = []
    for value, names in zip(operands, labels, strict=True):
        terms.append(Operand(value, dict(zip(names, value.axes, strict=True))))
    axes = _unify_labels(call, terms)
    # mv(W, v), v a buffer: the power iteration of spectral norm, which is no use of the weight. A layer that
    # reads a vector of its own is none: a net that makes weights of a learned code.
    if call.static and kind != "linear" and any(map(_is_constant_vector, operands)):
        return call.value(bare(axes[label] for label in out))
    weights = [term for term in terms if term.value.parametric]
    for weight in weights:
        if _is_mixture(call, weight, out):
            mixed_axes = {**axes, **weight.axes}
            return call.value([mixed_axes[label] for label in out], static=True)
    _record_weights(call, kind, weights, terms, out)
    if not weights and len(operands) == 2 and not call.backward:
        _record_bilinear(call, axes, terms, out)
    return call.value([_with_origins(axes[label], label, terms) for label in out])


def _is_constant_vector(value: Value) -> bool:
    return not value.parametric and len(value.axes) == 1


def _unify_labels(call: Call, terms: Iterable[Operand]) -> dict[str, Axis]:
    """State that axes of one label agree, and return one axis a label, of more than one entry if any is."""
    axes: dict[str, Axis] = {}
    for term in terms:
        for label, axis in term.axes.items():
            labelled = axes.setdefault(label, axis)
            # Of [1, n] and [m, n] the axis with entries stands for both.
            if labelled.size == 1 != axis.size:
                axes[label] = axis
            call.unify(labelled, axis)
    return axes


def _with_origins(axis: Axis, label: str, terms: Iterable[Operand]) -> Axis:
    """Return an axis of the output that is every parameter axis of its label."""
    origins = [term.axes[label].origin for term in terms if label in term.axes]
    return Axis(axis.dim, axis.size, NOWHERE.union(*origins))


def _is_mixture(call: Call, weight: Operand, out: Labels) -> bool:
    """Whether whole weights are summed into one a sample, and record it: ``w = sum_e g_e W_e``."""
    summed = [axis for label, axis in weight.axes.items() if label not in out]
    # Only along axes that a first run found to count mixed weights.
    if not summed or any(
        not summed_axis.origin or not summed_axis.origin <= call.mixed for summed_axis in summed
    ):
        return False
    for axis in summed:
        call.facts.mixtures[axis.dim] = call.where
    call.pointwise_use("pointwise", weight.value)
    return True


def _shared_labels(weight: Operand, terms: Iterable[Operand]) -> set[str]:
    """Return the labels of a weight that others have too, not as a single entry for all of its own."""
    shared = set()
    for other in terms:
        if other is weight:
            continue
        for label, axis in other.axes.items():
            # A single entry that is broadcast against the weight's axis shares nothing with it.
            if label in weight.axes and (axis.size > 1 or weight.axes[label].size == 1):
                shared.add(label)
    return shared


def _record_weights(
    call: Call, kind: str, weights: Sequence[Operand], terms: Sequence[Operand], out: Labels
) -> None:
    """Record the uses of the parameters in a sum of products."""
    for weight in weights:
        _record_blocks(call, weight, terms, out)
    # a @ b, both parameters: the second acts on the first
    between_parameters = len(weights) == len(terms) > 1
    if between_parameters:
        weights = weights[-1:]
    for weight in weights:
        _record_weight(call, kind, weight, terms, out, between_parameters)


def _record_blocks(call: Call, weight: Operand, terms: Iterable[Operand], out: Labels) -> None:
    """A weight with a batch axis is one small weight for each block of the width."""
    shared = _shared_labels(weight, terms)
    batch: list[int] = []
    inner: list[int] = []
    for label, axis in weight.axes.items():
        if axis.size == 1:
            continue
        # einsum("bgi,gio->bgo", x, w): g is in all three, so each g has a weight of its own.
        if label in shared and label in out:
            batch.append(axis.dim)
        else:
            inner.append(axis.dim)
    if batch and not call.static:
        call.facts.blocks.append(Bilinear(tuple(batch), tuple(inner), call.where))


def _record_weight(
    call: Call, kind: str, weight: Operand, terms: Sequence[Operand], out: Labels, between_parameters: bool
) -> None:
    """Record the use of a parameter in a sum of products: what it sums over, and what it makes."""
    shared = _shared_labels(weight, terms)
    labels_of_others: set[str] = set()
    for other in terms:
        if other is not weight:
            labels_of_others.update(other.axes)
    fan_in, fan_out, beside = [], [], []
    for label, axis in weight.axes.items():
        # y[b, o] = sum_i x[b, i] W[o, i]: i is fan_in, o is fan_out
        if label not in out:
            if label in shared:
                fan_in.append(axis)
        elif label not in labels_of_others:
            fan_out.append(axis)
        elif label not in shared:  # others have it as a single entry
            beside.append(axis)
    _record_between(call, weight, fan_in, fan_out, terms)
    if fan_in or fan_out or beside:
        call.use(kind, fan_in, fan_out, weight.value, between_parameters, beside)
    else:
        call.pointwise_use("pointwise", weight.value)


def _record_between(
    call: Call, weight: Operand, fan_in: Sequence[Axis], fan_out: Iterable[Axis], terms: Iterable[Operand]
) -> None:
    """Record what a weight contracts with each of several activations: ``y_o = sum_ij a_i W_oij b_j``."""
    sides = []
    for other in terms:
        if other is weight or other.value.static:
            continue
        shared = [weight.axes[label] for label in other.axes if label in weight.axes]
        side = tuple(axis.dim for axis in shared if axis in fan_in)
        if side:
            sides.append(side)
    if len(sides) > 1:
        call.facts.between.append(Between(tuple(sides), tuple(axis.dim for axis in fan_out)))


def _record_bilinear(call: Call, axes: Mapping[str, Axis], terms: Sequence[Operand], out: Labels) -> None:
    """Record a product of two activations, and each of them as a weight that acts on the other."""
    left, right = (term.axes for term in terms)
    batch, summed, inner = [], [], []
    for label, axis in axes.items():
        if axis.size == 1:
            continue
        in_both = label in left and label in right
        # scores[b, l, s] = sum_e q[b, l, e] k[b, s, e]: b is batch, e is summed
        if in_both and label in out:
            batch.append(axis.dim)
        else:
            inner.append(axis.dim)
            if in_both:
                summed.append(axis.dim)
    call.facts.bilinear.append(Bilinear(tuple(batch), tuple(inner), call.where))
    # A hypernetwork: an activation acts on the other as a weight, and either may be it.
    for acting, acted_on in ((left, right), (right, left)):
        kept = [label for label in acting if label in out and label not in acted_on and axes[label].size > 1]
        made_weight = MadeWeight(tuple(summed), tuple(axes[label].dim for label in kept))
        call.facts.made_weights.append(made_weight)


def letters(count: int, start: int = 0) -> list[str]:
    """Return that many distinct labels."""
    return [f"b{start + number}" for number in range(count)]


def add_bias(call: Call, result: Value, bias: Value | None, axis: int) -> Value:
    """Add a bias along one axis."""
    if isinstance(bias, Value):
        # A bias lies along the features, or along the channels ahead of the positions of an image.
        if bias.axes and result.axes:
            call.unify(bias.axes[-1], result.axes[axis])
        if bias.parametric:
            call.pointwise_use("bias", bias)
    return result


@rule("aten.linear", "aten._linear")
def linear(call: Call) -> Result:
    """Return x W^T + b."""
    source, weight = call["input"], call["weight"]
    tokens = source.static  # learned queries and encoded positions are data that happen to be constant
    if source.parametric:
        call.pointwise_use("pointwise", source)
    if tokens:
        source = Value(bare(source.axes))
    batch = letters(len(source.axes) - 1)
    out = ["o"][: len(weight.axes) - 1]  # none for a weight that is a vector
    result = contract(call, "linear", [source, weight], [[*batch, "i"], [*out, "i"]], [*batch, *out])
    add_bias(call, result, call.get("bias"), -1)
    if tokens:
        return Value(bare(result.axes), True)
    return result


@rule("aten.addmm")
def addmm(call: Call) -> Result:
    """Return b + x W."""
    result = contract(call, "matmul", [call["mat1"], call["mat2"]], ["ik", "kj"], "ij")
    return add_bias(call, result, call["self"], -1)


def _matmul_labels(left: Value, right: Value) -> tuple[list[str], list[str], list[str]]:
    """Return labels for both factors and the result; batch axes are aligned at their ends."""
    left_rank, right_rank = len(left.axes), len(right.axes)
    # Batch axes that only one factor has are broadcast.
    batch = letters(max(left_rank, right_rank, 2) - 2)
    out = list(batch)
    if left_rank > 1:
        out.append("i")
    right_labels = ["k"]
    if right_rank > 1:
        out.append("j")
        right_labels = [*batch, "k", "j"][-right_rank:]
    return [*batch, "i", "k"][-left_rank:], right_labels, out


@rule(
    "aten.matmul",
    "aten.mm",
    "aten.bmm",
    "aten.mv",
    "aten.dot",
    "aten.linalg_matmul",
    "aten.__matmul__",
    "aten.vdot",
)
def matmul(call: Call) -> Result:
    """Matrix product with broadcast batch axes."""
    left, right = call.values[:2]
    left_labels, right_labels, out = _matmul_labels(left, right)
    return contract(call, "matmul", [left, right], [left_labels, right_labels], out)


@rule("aten.inner")
def inner(call: Call) -> Result:
    """Sum of products over the last axes of both factors."""
    left, right = call.values[:2]
    rows = letters(len(left.axes) - 1)
    columns = letters(len(right.axes) - 1, len(rows))
    return contract(call, "matmul", [left, right], [[*rows, "k"], [*columns, "k"]], [*rows, *columns])


@rule("aten.addmv")
def addmv(call: Call) -> Result:
    """Return b + W x."""
    result = contract(call, "matmul", [call["mat"], call["vec"]], ["ik", "k"], "i")
    return add_bias(call, result, call["self"], -1)


@rule("aten.baddbmm", "aten.addbmm")
def add_batched_matmul(call: Call) -> Result:
    """Return b + x W for every matrix of a batch, or for `addbmm` with the sum over the batch."""
    left_labels, right_labels, out = _matmul_labels(call["batch1"], call["batch2"])
    if call.operator.rstrip("_") == "aten.addbmm":  # y[i, j] = b[i, j] + sum_bk x[b, i, k] W[b, k, j]
        out = ["i", "j"]
    result = contract(call, "matmul", [call["batch1"], call["batch2"]], [left_labels, right_labels], out)
    bias: Value = call["self"]
    for axis, other in zip(result.axes[::-1], bias.axes[::-1], strict=False):
        call.unify(axis, other)
    if bias.parametric:
        call.pointwise_use("bias", bias)
    return result


@rule("aten.mul", "aten.multiply")
def multiply(call: Call) -> Result:
    """Entry by entry; where the product is summed over a parameter's axis, the parameter is contracted."""
    if _record_summed(call):
        return call.value(broadcast(call, call.values, len(call.shape)))
    return pointwise(call)


def _record_summed(call: Call) -> bool:
    """Record a weight in ``(x * w).sum(-1)`` as one in ``x @ w``; return whether there is one."""
    summed, values = summed_axes(call.node), call.values
    weight = _summed_weight(call) if summed else None
    if weight is None:
        return False
    places_of = [_own_places(value, weight) for value in values]
    operands: list[Value] = []
    out: list[str] = []
    for value, places in zip(values, places_of, strict=True):
        operands.append(Value(tuple(value.axes[place] for place in places), value.static))
        out += [str(place) for place in places if place not in summed and str(place) not in out]
    labels = [[str(place) for place in places] for places in places_of]
    shared = set(labels[0]) & set(labels[1])
    # Only a sum over an axis that both have is a contraction.
    if not any(_is_wide(weight, int(label)) for label in shared.difference(out)):
        return False
    contract(call, PRODUCT_AND_SUM, operands, labels, out)
    return True


def _summed_weight(call: Call) -> Value | None:
    """Return the weight of a product of one weight and one activation, ``x * w``; None of any other."""
    values = call.values
    weights = [value for value in values if value.parametric]
    if len(values) != 2 or len(weights) != 1 or call.static:
        return None
    # (gate[:, :, None, None] * experts).sum(1): matrices that a gate mixes are still a matrix.
    if is_matrix(weights[0], [value for value in values if value is not weights[0]]):
        return None
    return weights[0]


def _own_places(value: Value, weight: Value) -> list[int]:
    """Return the axes of an operand, counted from the last one, as broadcasting lines them up.

    Single entries of an activation that meet an axis of the weight are no axis of its own:
    ``x[:, None] * w`` is ``x[b, i] w[o, i]``.
    """
    places = list(range(-len(value.axes), 0))
    if value is weight:
        return places
    return [place for place in places if value.axes[place].size > 1 or not _is_wide(weight, place)]


def _is_wide(value: Value, place: int) -> bool:
    """Whether a tensor has more than one entry along an axis, counted from the last one."""
    return len(value.axes) >= -place and value.axes[place].size > 1


@rule("aten.outer", "aten.ger")
def outer(call: Call) -> Result:
    """Outer product."""
    left, right = call.values[:2]
    return call.value([*left.axes, *right.axes])


@rule("aten.kron")
def kron(call: Call) -> Result:
    """Kronecker product: every axis is merged of one of each factor."""
    left, right = call.values[:2]
    return call.value([merge_axes(call, pair) for pair in zip(left.axes, right.axes, strict=True)])


@rule("aten.einsum")
def einsum(call: Call) -> Result:
    """Einstein summation, ellipsis included."""
    operands: list[Value] = list(call["tensors"])
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    labels: list[Labels] = []
    for term, value in zip(inputs.split(","), operands, strict=True):
        names = _spell(term, len(value.axes))
        for name, axis in zip(names, value.axes, strict=True):  # a repeated label is a diagonal
            call.unify(value.axes[names.index(name)], axis)
        labels.append(names)
    # einsum("ij,jk", a, b), without an arrow.
    out = _spell(output, len(call.shape)) if arrow else _implied_output(labels)
    if _is_entrywise(operands, labels, out):
        terms = zip(operands, labels, strict=True)
        return pointwise_of(call, [_spread_out(call, value, names, out) for value, names in terms])
    # einsum("lhe,she,shd->lhd", q, k, v) is einsum("lhs,shd->lhd", einsum("lhe,she->lhs", q, k), v).
    while len(operands) > 2:
        pair = (
            _layer(operands, labels, out, before_others=True)
            or _activations(operands, labels, out)
            or _layer(operands, labels, out, before_others=False)
        )
        if pair is None:
            break
        operands, labels = _contract_pair(call, operands, labels, out, pair)
    return contract(call, "einsum", operands, labels, out)


def _is_entrywise(operands: Sequence[Value], labels: Sequence[Labels], out: Labels) -> bool:
    """Whether a parameter multiplies an activation entry by entry: ``einsum("bld,dn->bldn", delta, a)``."""
    if len(operands) != 2 or [value.parametric for value in operands].count(True) != 1:
        return False
    # A shared axis that stays, and none that is summed; einsum("b,n->bn", x, w) shares none.
    return bool(set(labels[0]) & set(labels[1])) and set(labels[0]).union(labels[1]) == set(out)


def _spread_out(call: Call, value: Value, names: Labels, out: Labels) -> Value:
    """Return a tensor in the order of an output, with single entries where it lacks an axis of it."""
    axes = dict(zip(names, value.axes, strict=True))
    return Value(tuple(axes.get(label) or call.new(1) for label in out), value.static)


def _spell(term: str, rank: int) -> list[str]:
    """Return one label an axis; axes of an ellipsis are counted from the last."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    extra = rank - len(before) - len(after)
    return [*before, *(f"...{extra - i}" for i in range(extra)), *after]


def _implied_output(labels: Iterable[Labels]) -> list[str]:
    """Return the output of an equation without an arrow: ellipsis, then what occurs once, by alphabet."""
    all_labels: list[str] = []
    for names in labels:
        all_labels += names
    ellipsis = {name for name in all_labels if name.startswith("...")}
    single = {name for name in all_labels if all_labels.count(name) == 1}
    return [*sorted(ellipsis), *sorted(single - ellipsis)]


def _activations(operands: Sequence[Value], labels: Sequence[Labels], out: Labels) -> tuple[int, int] | None:
    """Return two activations that are contracted with each other, as attention and values are."""
    moving = [position for position, value in enumerate(operands) if not value.parametric]
    for second in moving:
        for first in moving:
            if first >= second:
                break
            # A label that a third operand or the result has is not summed by this pair.
            if _summed_by(first, second, labels, out):
                return first, second
    return None


def _layer(
    operands: Sequence[Value], labels: Sequence[Labels], out: Labels, before_others: bool
) -> tuple[int, int] | None:
    """Return an activation and the weight that acts on it alone: einsum("bi,ir,ro->bo", x, u, v) is x u v.

    Args:
        operands: Factors of the product.
        labels: Labels of each.
        out: Labels of the result.
        before_others: Whether only weights are meant that further weights follow.
    """
    moving = [position for position, value in enumerate(operands) if not value.parametric]
    for weight, value in enumerate(operands):
        if not value.parametric or (before_others and not _followed(weight, operands, labels)):
            continue
        # einsum("bi,i,io->bo", x, gain, w): a gain has no label of its own.
        multiplied = [activation for activation in moving if set(labels[weight]) <= set(labels[activation])]
        if before_others and len(multiplied) == 1:
            return multiplied[0], weight
        acted_on = [activation for activation in moving if _summed_by(activation, weight, labels, out)]
        # Of several, as in einsum("bi,oij,bj->bo", x, w, y), none comes first.
        if len(acted_on) == 1:
            return acted_on[0], weight
    return None


def _followed(weight: int, operands: Sequence[Value], labels: Sequence[Labels]) -> bool:
    """Return whether a further weight shares a label with one, as v does with u in ``x u v``."""
    for position, value in enumerate(operands):
        if position != weight and value.parametric and set(labels[position]) & set(labels[weight]):
            return True
    return False


def _summed_by(first: int, second: int, labels: Sequence[Labels], out: Labels) -> set[str]:
    """Return the labels that two operands have alone, which their product sums over."""
    others = [names for position, names in enumerate(labels) if position not in (first, second)]
    return set(labels[first]) & set(labels[second]) - set(out).union(*others)


def _contract_pair(
    call: Call, operands: Sequence[Value], labels: Sequence[Labels], out: Labels, pair: tuple[int, int]
) -> tuple[list[Value], list[Labels]]:
    """Contract two operands of several, as if the code had done so first."""
    remaining = [position for position in range(len(operands)) if position not in pair]
    needed = set(out).union(*(labels[position] for position in remaining))
    first, second = pair
    both = dict.fromkeys([*labels[first], *labels[second]])
    out_labels = [label for label in both if label in needed]
    value = contract(
        call, "einsum", [operands[first], operands[second]], [labels[first], labels[second]], out_labels
    )
    other_operands = [operands[position] for position in remaining]
    other_labels = [labels[position] for position in remaining]
    return [value, *other_operands], [out_labels, *other_labels]


@rule("aten.bilinear")
def bilinear(call: Call) -> Result:
    """Return x1 W x2 + b."""
    batch = letters(len(call["input1"].axes) - 1)
    operands = [call["input1"], call["input2"], call["weight"]]
    # y[b, o] = sum_ij x1[b, i] W[o, i, j] x2[b, j]
    labels = [[*batch, "i"], [*batch, "j"], ["o", "i", "j"]]
    result = contract(call, "bilinear", operands, labels, [*batch, "o"])
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
    kernel = weight.axes[2:]
    rank = len(kernel)
    first_position = len(source.axes) - rank  # of positions
    positions, sizes = source.axes[first_position:], call.shape[first_position:]
    channels = source.axes[first_position - 1]
    transposed = bool(call.get("transposed", "transpose" in call.operator))
    groups = call.get("groups", 1)
    strides = _steps(call, rank)
    for axis, position, size, stride in zip(kernel, positions, sizes, strides, strict=True):
        # A kernel over all of an axis, to one position, contracts it as a linear layer does (TextCNN).
        if not transposed and axis.size == position.size > 1 and size == 1:
            call.unify(axis, position)
        else:
            call.finite(axis, "a kernel axis")
            call.facts.windows.append((axis.dim, stride))
    if transposed:  # weight[in, out per group, ...]
        fan_in, fan_out = weight.axes[:2]
        made_channels = _transposed_channels(call, channels, fan_in, fan_out, groups)
    else:  # weight[out, in per group, ...]
        fan_out, fan_in = weight.axes[:2]
        made_channels = fan_out
        _tie_channels(call, channels, fan_in, fan_out, groups)
    # A depthwise kernel makes the very channels that it reads.
    if groups == channels.size and (transposed or fan_in.size == 1):
        call.facts.fan_out.setdefault(channels.dim, call.where)
    call.use("conv_transpose" if transposed else "conv", [fan_in, *kernel], [fan_out], weight)
    # F.conv2d(x, kernel) with a kernel that an activation made, as in dynamic convolutions.
    if not weight.static:
        call.facts.made_weights.append(MadeWeight((fan_in.dim,), (fan_out.dim,)))
    moved_positions = [call.resized(axis, size) for axis, size in zip(positions, sizes, strict=True)]
    call.facts.positions.update(axis.dim for axis in (*positions, *moved_positions))
    result = call.value([*source.axes[: first_position - 1], made_channels, *moved_positions])
    return add_bias(call, result, call.get("bias"), -rank - 1)


def _steps(call: Call, rank: int) -> Sequence[int]:
    """Return by how much a convolution moves along each of its axes."""
    strides = call.get("stride", 1)
    # F.conv2d(x, w, stride=2) moves by 2 along both.
    steps = list(strides) if isinstance(strides, (list, tuple)) else [strides]
    return steps * rank if len(steps) == 1 else steps


def _tie_channels(call: Call, channels: Axis, fan_in: Axis, fan_out: Axis, groups: int) -> None:
    """Tie the channels that a convolution reads to its weight."""
    if groups == 1:
        call.unify(channels, fan_in)
        return
    # in = groups x weight's in, out = groups x what a group makes
    group_count = _group_axis(call, channels, groups)
    made_by_group = call.new(fan_out.size // groups)
    call.space.groups(fan_out.dim, (group_count.dim, made_by_group.dim))
    call.space.groups(channels.dim, (group_count.dim, fan_in.dim))


def _transposed_channels(call: Call, channels: Axis, fan_in: Axis, fan_out: Axis, groups: int) -> Axis:
    """Tie the channels that a transposed convolution reads to its weight; return those that it makes."""
    if groups == 1:
        call.unify(channels, fan_in)
        return fan_out
    # in = groups x what a group reads, out = groups x weight's out
    group_count = _group_axis(call, channels, groups)
    read_by_group = call.new(fan_in.size // groups)
    call.space.groups(fan_in.dim, (group_count.dim, read_by_group.dim))
    call.unify(channels, fan_in)
    whole = call.new(groups * fan_out.size)
    call.space.groups(whole.dim, (group_count.dim, fan_out.dim))
    # conv_transpose2d(x.view(1, batch * channels, ...), kernels, groups=batch): a view merged the groups into
    # the channels, and another may cut them out of what is made.
    for count, *_ in call.space.terms_of(channels.dim, "product"):
        if call.space.size(count) == groups:
            call.space.product(whole.dim, (count, fan_out.dim))
    return Axis(whole.dim, whole.size, fan_out.origin)


def _group_axis(call: Call, channels: Axis, groups: int) -> Axis:
    """Return the axis that counts groups; where the convolution is depthwise, a group is a channel."""
    if channels.size == groups:
        return channels
    group = call.new(groups)
    call.facts.groups.setdefault(group.dim, call.where)
    return group


@rule("aten._grouped_mm", "aten._scaled_grouped_mm", "transformers.grouped_mm_fallback")
def grouped_matmul(call: Call) -> Result:
    """Rows sorted by expert times one matrix an expert."""
    rows, experts = call.values[:2]
    if len(rows.axes) == 2 and len(experts.axes) == 3:
        # F.grouped_mm(x, w, offs): each row of x meets the matrix of one expert.
        call.finite(experts.axes[0], "experts")
        return contract(call, "matmul", [rows, experts], ["ik", "gkj"], "ij")
    # Matrices on both sides are batched, as in bmm.
    batch = letters(len(call.shape) - 2)
    labels = [[*batch, "i", "k"][-len(rows.axes) :], [*batch, "k", "j"][-len(experts.axes) :]]
    return contract(call, "matmul", [rows, experts], labels, [*batch, "i", "j"])


@rule("aten.cdist", "aten._cdist_forward")
def cdist(call: Call) -> Result:
    """Distances between rows: like a product of two activations."""
    batch = letters(len(call.shape) - 2)
    labels = [[*batch, "i", "k"], [*batch, "j", "k"]]
    return contract(call, "distance", call.values[:2], labels, [*batch, "i", "j"])
