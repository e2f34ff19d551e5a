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


@CASES(PLAIN)
def zaya(k: int) -> nn.Module:
    return hf.ZayaForCausalLM(
        hf.ZayaConfig(
            **decoder(k, head_dim=8, moe_intermediate_size=20 * k, num_experts=4, num_experts_per_tok=1),
            router_hidden_size=12 * k,
        )
    )


@CASES(PLAIN)
def zamba2(k: int) -> nn.Module:
    return hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **decoder(k, num_hidden_layers=3),
            layers_block_type=["mamba", "hybrid", "mamba"],
            hybrid_layer_ids=[1],
            mamba_d_state=4,
            n_mamba_heads=8 * k,
            mamba_headdim=8,
            mamba_ngroups=1,
            num_mem_blocks=1,
            chunk_size=4,
            adapter_rank=6,
        )
    )


@CASES(keywords(pixel_values=lambda: randn(2, 3, 32, 32), labels=lambda: randint(VOCAB, 2, LENGTH)))
def vision_encoder_decoder(k: int) -> nn.Module:
    sizes = dict(n_positions=32, n_embd=24 * k, n_layer=1, n_head=3 * k, bos_token_id=1, eos_token_id=2)
    text = hf.GPT2Config(vocab_size=VOCAB, add_cross_attention=True, **sizes)
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**vision(k)), text)
    both.pad_token_id, both.decoder_start_token_id = 0, 1
    return hf.VisionEncoderDecoderModel(both)


@CASES(keywords(pixel_values_videos=lambda: randn(2, 4, 3, 32, 32)))
def vjepa2(k: int) -> nn.Module:
    return hf.VJEPA2ForVideoClassification(
        hf.VJEPA2Config(
            patch_size=8,
            crop_size=32,
            frames_per_clip=4,
            hidden_size=24 * k,
            num_attention_heads=3 * k,
            num_hidden_layers=1,
            num_pooler_layers=1,
            pred_hidden_size=16 * k,
            pred_num_attention_heads=2 * k,
            pred_num_hidden_layers=1,
            num_labels=5,
        )
    )


@CASES(keywords(past_values=lambda: randn(2, 64), freq=lambda: torch.zeros(2, 1, dtype=torch.long)))
def timesfm(k: int) -> nn.Module:
    return hf.TimesFmModelForPrediction(
        hf.TimesFmConfig(
            patch_length=8,
            context_length=64,
            horizon_length=16,
            num_hidden_layers=1,
            hidden_size=24 * k,
            intermediate_size=28 * k,
            head_dim=8,
            num_attention_heads=3 * k,
        )
    )


@CASES(keywords(input_values=lambda: randn(2, 1, 320)), r"in_proj.*:0|codebook.*:1|out_proj\.weight:1")
def dac(k: int) -> nn.Module:
    return hf.DacModel(
        hf.DacConfig(
            encoder_hidden_size=8 * k,
            downsampling_ratios=[2, 4],
            upsampling_ratios=[4, 2],
            decoder_hidden_size=24 * k,
            n_codebooks=2,
            codebook_size=16,
            codebook_dim=4,
            hidden_size=32 * k,
        )
    )
