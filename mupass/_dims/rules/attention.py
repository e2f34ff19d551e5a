"""Rules for attention: fused kernels, packed projections, score functions."""

from mupass._dims.call import Call, Result, one_or_all
from mupass._dims.facts import Attention, Axis, Bilinear, Value
from mupass._dims.registry import rule
from mupass._dims.rules.contract import add_bias, contract, letters
from mupass._dims.rules.reshape import merge_axes, split_axis
from mupass._errors import is_number


def _scores(call: Call, query: Value, key: Value) -> Value:
    """Return q k^T for every head."""
    # scores[b, h, l, s] = sum_e q[b, h, l, e] k[b, h, s, e]
    batch = letters(len(query.axes) - 2)
    labels = [[*batch, "l", "e"], [*batch, "s", "e"]]
    return contract(call, "attention", [query, key], labels, [*batch, "l", "s"])


def _weighted(call: Call, scores: Value, value: Value) -> Value:
    """Return the sum of values, weighed by scores."""
    batch = letters(len(scores.axes) - 2)
    # out[b, h, l, e] = sum_s scores[b, h, l, s] v[b, h, s, e]
    labels = [[*batch, "l", "s"], [*batch, "s", "e"]]
    return contract(call, "attention", [scores, value], labels, [*batch, "l", "e"])


@rule(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_cudnn_attention",
)
def attention(call: Call) -> Result:
    """softmax(q k^T / sqrt(E)) v, with grouped key/value heads."""
    query, key, value = call["query"], call["key"], call["value"]
    # Grouped-query attention: keys and values have fewer heads, each for several heads of queries.
    if call.get("enable_gqa", False) and query.axes[-3].size != key.axes[-3].size:
        queries_per_head = call.new(query.axes[-3].size // key.axes[-3].size)
        call.literal(queries_per_head, "query heads for each key/value head")
        key, value = _repeat_heads(call, key, queries_per_head), _repeat_heads(call, value, queries_per_head)
    # Kept for the check of the scale: 1/sqrt(E) or 1/E.
    call.facts.attention.append(Attention(query.axes[-1].dim, call.get("scale"), call.where, call.node))
    scores = _scores(call, query, key)
    mask = call.get("attn_mask", call.get("attn_bias"))
    if isinstance(mask, Value):  # softmax(q k^T + mask)
        for axis, other in zip(mask.axes[::-1], scores.axes[::-1], strict=False):
            call.unify(axis, other)
        # A relative position bias is a parameter that is added to scores.
        if mask.parametric:
            call.pointwise_use("pointwise", mask)
    result = _weighted(call, scores, value)
    return one_or_all([result, *map(call.unknown, call.shapes[1:])])


def _repeat_heads(call: Call, tensor: Value, share: Axis) -> Value:
    """Return keys or values with as many heads as there are queries, of which several share one."""
    *batch, heads, positions, inner = tensor.axes
    return Value((*batch, merge_axes(call, [heads, share]), positions, inner), tensor.static)


@rule("aten.multi_head_attention_forward", "aten._native_multi_head_attention")
def packed_attention(call: Call) -> Result:
    """The fused inference kernel of nn.MultiheadAttention: packed qkv, heads, output projection."""
    query, key, value = call["query"], call["key"], call["value"]
    # The fused kernel serves self-attention: query, key and value are one tensor.
    call.unify(query.axes[-1], key.axes[-1])
    call.unify(key.axes[-1], value.axes[-1])
    batch = letters(2)
    labels, out = [[*batch, "i"], ["o", "i"]], [*batch, "o"]
    packed = contract(call, "linear", [query, call["qkv_weight"]], labels, out)
    add_bias(call, packed, call["qkv_bias"], -1)
    # packed = 3 x heads x head_dim
    three_matrices, width = split_axis(call, packed.axes[-1], [3, packed.axes[-1].size // 3])
    call.enumerate(three_matrices, "query, key and value")
    heads, inner = split_axis(call, width, [call["num_head"], width.size // call["num_head"]])
    # Heads and head_dim meet inside of the kernel, where no operator shows it.
    call.facts.bilinear.append(Bilinear((heads.dim,), (inner.dim,), call.where))
    call.facts.attention.append(Attention(inner.dim, None, call.where, call.node))
    attended = Value((*query.axes[:-1], width))
    result = contract(call, "linear", [attended, call["proj_weight"]], labels, out)
    add_bias(call, result, call["proj_bias"], -1)
    return (call.value(result.axes), *map(call.unknown, call.shapes[1:]))


@rule("flex_attention")
def flex_attention(call: Call) -> Result:
    """Attention with a score function: its subgraph changes scores, not axes."""
    query, key, value = call.values[:3]
    # flex_attention(query, key, value, score_mod, block_mask, scale): a higher-order operator has no schema.
    scale = call.node.args[5] if len(call.node.args) > 5 else None
    call.facts.attention.append(
        Attention(query.axes[-1].dim, scale if is_number(scale) else None, call.where, call.node)
    )
    result = _weighted(call, _scores(call, query, key), value)
    return (result, *map(call.unknown, call.shapes[1:]))
