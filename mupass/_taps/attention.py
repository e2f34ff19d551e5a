"""nn.MultiheadAttention with a factor on its scores, which it computes inside of one function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupass._taps.intercept import projections


class ScaledAttention:
    """Stands for the ``forward`` of an `nn.MultiheadAttention`: the same with scores multiplied.

    The projections run outside of ``F.multi_head_attention_forward``. Inside, multiples of the identity stand
    for them, which multiply exactly; they cost three products of the width more.

    Attributes:
        module: The module.
        factor: What its scores are multiplied by.
    """

    def __init__(self, module: nn.MultiheadAttention, factor: float) -> None:
        self.module, self.factor = module, factor

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of `nn.MultiheadAttention.forward`."""
        module = self.module
        swapped = module.batch_first and query.dim() == 3
        separate = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        with torch._C.DisableTorchFunctionSubclass():
            inputs = projections((query, key, value), module.in_proj_weight, separate, module.in_proj_bias)
        if swapped:  # the function has positions first
            inputs = [projected.transpose(0, 1) for projected in inputs]
        queries, keys, values = inputs
        identity = torch.eye(module.embed_dim, dtype=queries.dtype, device=queries.device)
        attended, scores = F.multi_head_attention_forward(
            queries,
            keys,
            values,
            module.embed_dim,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            module.out_proj.weight,
            module.out_proj.bias,
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            q_proj_weight=self.factor * identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
        )
        return (attended.transpose(0, 1) if swapped else attended), scores
