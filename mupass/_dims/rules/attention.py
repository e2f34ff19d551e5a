"""Rules for attention: fused kernels, packed projections, score functions."""

from mupass._dims.call import Call, Result
from mupass._dims.facts import Bilinear, Value
from mupass._dims.registry import rule
from mupass._dims.rules.contract import add_bias, contract, letters
from mupass._dims.rules.reshape import merge_axes, split_axis


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
    q, k, v = call["query"], call["key"], call["value"]
    if call.get("enable_gqa", False) and q.axes[-3].size != k.axes[-3].size:
        share = call.new(q.axes[-3].size // k.axes[-3].size)
        call.literal(share, "query heads for each key/value head")
        k, v = (
            Value((*x.axes[:-3], merge_axes(call, [x.axes[-3], share]), *x.axes[-2:]), x.static)
            for x in (k, v)
        )
    batch = letters(len(q.axes) - 2)
    call.facts.attention.append((q.axes[-1].dim, call.get("scale"), call.where))
    scores = contract(call, "attention", [q, k], [[*batch, "l", "e"], [*batch, "s", "e"]], [*batch, "l", "s"])
    mask = call.get("attn_mask", call.get("attn_bias"))
    if isinstance(mask, Value):
        for a, b in zip(mask.axes[::-1], scores.axes[::-1], strict=False):
            call.unify(a, b)
        if mask.parametric:
            call.pointwise_use("pointwise", mask)
    result = contract(
        call, "attention", [scores, v], [[*batch, "l", "s"], [*batch, "s", "e"]], [*batch, "l", "e"]
    )
    if len(call.shapes) == 1:
        return result
    return (result, *(call.value([call.new(n) for n in s]) for s in call.shapes[1:]))


@rule("aten.multi_head_attention_forward", "aten._native_multi_head_attention")
def packed_attention(call: Call) -> Result:
    """The fused inference kernel of nn.MultiheadAttention: packed qkv, heads, output projection."""
    query, key, value = call["query"], call["key"], call["value"]
    batch = letters(2)
    qkv_weight, out_weight = call["qkv_weight"], call["proj_weight"]
    call.unify(query.axes[-1], key.axes[-1])
    call.unify(key.axes[-1], value.axes[-1])
    qkv = contract(call, "linear", [query, qkv_weight], [[*batch, "i"], ["o", "i"]], [*batch, "o"])
    add_bias(call, qkv, call["qkv_bias"], -1)
    third = split_axis(call, qkv.axes[-1], [3, qkv.axes[-1].size // 3])
    call.enumerate(third[0], "query, key and value")
    heads, inner = split_axis(call, third[1], [call["num_head"], third[1].size // call["num_head"]])
    call.facts.bilinear.append(Bilinear((heads.dim,), (inner.dim,), call.where))
    call.facts.attention.append((inner.dim, None, call.where))
    mixed = Value((*query.axes[:-1], third[1]))
    result = contract(call, "linear", [mixed, out_weight], [[*batch, "i"], ["o", "i"]], [*batch, "o"])
    add_bias(call, result, call["proj_bias"], -1)
    outputs: list[Value | None] = [call.value(result.axes)]
    outputs += [call.value([call.new(n) for n in s]) for s in call.shapes[1:]]
    return tuple(outputs)


@rule("flex_attention")
def flex_attention(call: Call) -> Result:
    """Attention with a score function: its subgraph changes scores, not axes."""
    q, k, v = call.values[:3]
    batch = letters(len(q.axes) - 2)
    scores = contract(call, "attention", [q, k], [[*batch, "l", "e"], [*batch, "s", "e"]], [*batch, "l", "s"])
    labels = [[*batch, "l", "s"], [*batch, "s", "e"]]
    result = contract(call, "attention", [scores, v], labels, [*batch, "l", "e"])
    return (result, *(call.value([call.new(n) for n in s]) for s in call.shapes[1:]))
