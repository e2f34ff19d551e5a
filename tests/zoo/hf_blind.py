"""Hugging Face transformers that were written down before the inference had seen any of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from zoo.case import LENGTH, VOCAB, Cases, keywords, randint, randn
from zoo.hf_other import vision
from zoo.hf_text import PAIR, PLAIN, decoder, encoder

CASES = Cases()
BOTH = keywords(
    input_ids=lambda: randint(VOCAB, 2, LENGTH),
    pixel_values=lambda: randn(2, 3, 32, 32),
)


def experts(k: int, **more: Any) -> dict[str, Any]:
    """Settings of decoders with experts."""
    return decoder(k, head_dim=8, num_experts_per_tok=2, **more)


def pair(k: int, **more: Any) -> dict[str, Any]:
    """Settings that encoder-decoders after BART share."""
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("ffn_dim", 40 * k), ("layers", 2), ("attention_heads", 2 * k))
    }
    return dict(d_model=16 * k, **sizes) | more


@CASES(PLAIN)
def qwen3_next(k: int) -> nn.Module:
    return hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **experts(k, num_experts=4, moe_intermediate_size=16 * k),
            shared_expert_intermediate_size=16 * k,
            linear_num_key_heads=2 * k,
            linear_num_value_heads=4 * k,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        )
    )


@CASES(PLAIN)
def minimax(k: int) -> nn.Module:
    layers = ["linear_attention", "full_attention"]
    return hf.MiniMaxForCausalLM(
        hf.MiniMaxConfig(**experts(k, num_local_experts=4), block_size=4, layer_types=layers)
    )


@CASES(PLAIN)
def glm4_moe(k: int) -> nn.Module:
    return hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **experts(k, n_routed_experts=4, moe_intermediate_size=16 * k), first_k_dense_replace=1
        )
    )


@CASES(PLAIN)
def falcon_h1(k: int) -> nn.Module:
    return hf.FalconH1ForCausalLM(
        hf.FalconH1Config(
            **decoder(k, head_dim=8),
            mamba_d_ssm=64 * k,
            mamba_n_heads=8 * k,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=4,
            mamba_chunk_size=4,
        )
    )


@CASES(PLAIN)
def xglm(k: int) -> nn.Module:
    return hf.XGLMForCausalLM(
        hf.XGLMConfig(vocab_size=VOCAB, d_model=16 * k, ffn_dim=40 * k, num_layers=2, attention_heads=2 * k)
    )


@CASES(PAIR)
def longt5(k: int) -> nn.Module:
    return hf.LongT5ForConditionalGeneration(
        hf.LongT5Config(
            vocab_size=VOCAB,
            d_model=16 * k,
            d_kv=8,
            d_ff=40 * k,
            num_layers=2,
            num_heads=2 * k,
            local_radius=4,
        )
    )


@CASES(PAIR)
def pegasus_x(k: int) -> nn.Module:
    return hf.PegasusXForConditionalGeneration(
        hf.PegasusXConfig(
            **pair(k, vocab_size=VOCAB, max_position_embeddings=32, num_global_tokens=4, block_size=4)
        )
    )


@CASES(keywords(pixel_values=lambda: randn(2, 3, 32, 32), pixel_mask=lambda: torch.ones(2, 32, 32).long()))
def conditional_detr(k: int) -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8 * k,
        hidden_sizes=[8 * k, 16 * k],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    return hf.ConditionalDetrForObjectDetection(
        hf.ConditionalDetrConfig(
            **pair(k, num_queries=6, num_labels=5, backbone_config=backbone), use_timm_backbone=False
        )
    )


@CASES(BOTH)
def owlvit(k: int) -> nn.Module:
    text = encoder(k, num_hidden_layers=1, max_position_embeddings=LENGTH)
    return hf.OwlViTModel(
        hf.OwlViTConfig(text_config=text, vision_config=vision(k, num_hidden_layers=1), projection_dim=24 * k)
    )


@CASES(BOTH)
def git(k: int) -> nn.Module:
    return hf.GitForCausalLM(hf.GitConfig(**encoder(k), vision_config=vision(k)))


@CASES(
    keywords(
        past_values=lambda: randn(2, 20).abs(),
        past_time_features=lambda: randn(2, 20, 2),
        past_observed_mask=lambda: torch.ones(2, 20),
        future_values=lambda: randn(2, 6).abs(),
        future_time_features=lambda: randn(2, 6, 2),
    )
)
def informer(k: int) -> nn.Module:
    lags = [1, 2, 3, 8]
    return hf.InformerForPrediction(
        hf.InformerConfig(
            **pair(k, prediction_length=6, context_length=12, num_time_features=2), lags_sequence=lags
        )
    )


@CASES(keywords(pixel_values=lambda: randn(2, 4, 3, 32, 32)))
def timesformer(k: int) -> nn.Module:
    return hf.TimesformerForVideoClassification(
        hf.TimesformerConfig(**vision(k, num_frames=4, num_labels=10))
    )
