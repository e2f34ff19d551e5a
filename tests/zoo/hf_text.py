"""Hugging Face transformers: language models, encoders, sequence to sequence, state-space, experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from zoo.case import LENGTH, VOCAB, Cases, Inputs, keywords, randint

CASES = Cases()


def ids(**more: Any) -> Inputs:
    return keywords(input_ids=lambda: randint(VOCAB, 2, LENGTH), **more)


def masked(**more: Any) -> Inputs:
    return ids(attention_mask=lambda: torch.ones(2, LENGTH, dtype=torch.long), **more)


PLAIN = ids(use_cache=False)
PAIR = ids(decoder_input_ids=lambda: randint(VOCAB, 2, 8, seed=1), use_cache=False)


def decoder(k: int, **more: Any) -> dict[str, Any]:
    """Settings that most decoders share."""
    return (
        dict(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            intermediate_size=48 * k,
            num_hidden_layers=2,
            num_attention_heads=4 * k,
            num_key_value_heads=2 * k,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | more
    )


def encoder(k: int, **more: Any) -> dict[str, Any]:
    """Settings that most encoders share."""
    return (
        dict(
            vocab_size=VOCAB,
            hidden_size=16 * k,
            intermediate_size=40 * k,
            num_hidden_layers=2,
            num_attention_heads=2 * k,
            max_position_embeddings=32,
            pad_token_id=0,
        )
        | more
    )


@CASES(PLAIN)
def qwen2(k: int) -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder(k)))


@CASES(PLAIN)
def qwen3(k: int) -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder(k, head_dim=8, tie_word_embeddings=True)))


@CASES(PLAIN)
def mistral(k: int) -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**decoder(k, head_dim=8, sliding_window=4)))


@CASES(PLAIN)
def gemma2(k: int) -> nn.Module:
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**decoder(k, head_dim=8, query_pre_attn_scalar=8, sliding_window=4))
    )


@CASES(PLAIN)
def gemma3(k: int) -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**decoder(k, head_dim=8, sliding_window=4)))


@CASES(PLAIN)
def phi3(k: int) -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**decoder(k)))


@CASES(PLAIN)
def phi(k: int) -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**decoder(k, partial_rotary_factor=0.5)))


@CASES(PLAIN)
def stablelm(k: int) -> nn.Module:
    return hf.StableLmForCausalLM(hf.StableLmConfig(**decoder(k, qk_layernorm=False)))


@CASES(PLAIN)
def olmo2(k: int) -> nn.Module:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**decoder(k)))


@CASES(PLAIN)
def cohere(k: int) -> nn.Module:
    return hf.CohereForCausalLM(hf.CohereConfig(**decoder(k)))


@CASES(PLAIN)
def glm(k: int) -> nn.Module:
    return hf.GlmForCausalLM(hf.GlmConfig(**decoder(k, head_dim=8)))


@CASES(PLAIN)
def granite(k: int) -> nn.Module:
    return hf.GraniteForCausalLM(hf.GraniteConfig(**decoder(k)))


@CASES(PLAIN)
def mixtral(k: int) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**decoder(k, num_local_experts=4)))


@CASES(PLAIN)
def qwen2_moe(k: int) -> nn.Module:
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **decoder(k, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24 * k),
            shared_expert_intermediate_size=40 * k,
        )
    )


@CASES(
    PLAIN,
    ambiguous=r"q_a_proj\.weight:0|q_a_layernorm|q_b_proj\.weight:1|kv_a_proj_with_mqa\.weight:0|kv_a_layernorm|kv_b_proj\.weight:1",
)
def deepseek_v3(k: int) -> nn.Module:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **decoder(k, num_key_value_heads=4 * k),
            moe_intermediate_size=24 * k,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=12 * k,
            kv_lora_rank=12 * k,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    )


@CASES(PLAIN)
def opt(k: int) -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            ffn_dim=64 * k,
            num_hidden_layers=2,
            num_attention_heads=4 * k,
            max_position_embeddings=32,
            word_embed_proj_dim=16 * k,
            do_layer_norm_before=False,
        )
    )


@CASES(PLAIN)
def gpt_neox(k: int) -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**encoder(k)))


@CASES(PLAIN)
def gpt_neo(k: int) -> nn.Module:
    return hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=16 * k,
            num_layers=2,
            num_heads=2 * k,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=32,
        )
    )


@CASES(PLAIN)
def gptj(k: int) -> nn.Module:
    return hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=VOCAB, n_positions=32, n_embd=32 * k, n_layer=2, n_head=2 * k, rotary_dim=4)
    )


@CASES(PLAIN)
def codegen(k: int) -> nn.Module:
    return hf.CodeGenForCausalLM(
        hf.CodeGenConfig(
            vocab_size=VOCAB, n_positions=32, n_ctx=32, n_embd=32 * k, n_layer=2, n_head=4 * k, rotary_dim=4
        )
    )


@CASES(PLAIN)
def falcon(k: int) -> nn.Module:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            num_hidden_layers=2,
            num_attention_heads=4 * k,
            multi_query=True,
            bias=True,
        )
    )


@CASES(PLAIN)
def gpt_bigcode(k: int) -> nn.Module:
    return hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(
            vocab_size=VOCAB, n_positions=32, n_embd=32 * k, n_layer=2, n_head=4 * k, multi_query=True
        )
    )


@CASES(PLAIN)
def bloom(k: int) -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=32 * k, n_layer=2, n_head=4 * k))


@CASES(PLAIN)
def mpt(k: int) -> nn.Module:
    return hf.MptForCausalLM(
        hf.MptConfig(
            vocab_size=VOCAB, d_model=32 * k, n_layers=2, n_heads=4 * k, expansion_ratio=2, max_seq_len=32
        )
    )


@CASES(PLAIN)
def mamba(k: int) -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=2 * k,
            use_mambapy=False,
        )
    )


@CASES(PLAIN)
def mamba2(k: int) -> nn.Module:
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            state_size=4,
            num_heads=8 * k,
            head_dim=8,
            n_groups=1,
            num_hidden_layers=2,
            chunk_size=4,
        )
    )


@CASES(PLAIN)
def falcon_mamba(k: int) -> nn.Module:
    return hf.FalconMambaForCausalLM(
        hf.FalconMambaConfig(
            vocab_size=VOCAB, hidden_size=32 * k, state_size=4, num_hidden_layers=2, time_step_rank=2 * k
        )
    )


@CASES(ids())
def hf_rwkv(k: int) -> nn.Module:
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(
            vocab_size=VOCAB,
            context_length=32,
            hidden_size=32 * k,
            attention_hidden_size=32 * k,
            intermediate_size=64 * k,
            num_hidden_layers=2,
            use_cache=False,
        )
    )


@CASES(PLAIN)
def recurrent_gemma(k: int) -> nn.Module:
    return hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            intermediate_size=64 * k,
            lru_width=32 * k,
            num_hidden_layers=3,
            num_attention_heads=4 * k,
            num_key_value_heads=4 * k,
            attention_window_size=8,
        )
    )


@CASES(masked())
def distilbert(k: int) -> nn.Module:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCAB,
            dim=16 * k,
            hidden_dim=40 * k,
            n_layers=2,
            n_heads=2 * k,
            max_position_embeddings=32,
        )
    )


@CASES(masked())
def roberta(k: int) -> nn.Module:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**encoder(k)))


@CASES(masked())
def bert_model(k: int) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**encoder(k)))


@CASES(masked())
def bert_squad(k: int) -> nn.Module:
    return hf.BertForQuestionAnswering(hf.BertConfig(**encoder(k)))


@CASES(masked())
def albert(k: int) -> nn.Module:
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**encoder(k, embedding_size=8 * k)))


@CASES(masked())
def electra(k: int) -> nn.Module:
    return hf.ElectraForPreTraining(hf.ElectraConfig(**encoder(k, embedding_size=8 * k)))


@CASES(masked())
def deberta(k: int) -> nn.Module:
    return hf.DebertaForMaskedLM(
        hf.DebertaConfig(**encoder(k, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    )


@CASES(masked())
def deberta_v2(k: int) -> nn.Module:
    return hf.DebertaV2ForTokenClassification(
        hf.DebertaV2Config(
            **encoder(
                k,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_buckets=8,
                norm_rel_ebd="layer_norm",
            ),
            share_att_key=True,
            conv_kernel_size=3,
        )
    )


@CASES(masked())
def xlnet(k: int) -> nn.Module:
    return hf.XLNetLMHeadModel(
        hf.XLNetConfig(
            vocab_size=VOCAB, d_model=16 * k, n_layer=2, n_head=2 * k, d_inner=40 * k, use_mems_eval=False
        )
    )


@CASES(masked())
def xlm(k: int) -> nn.Module:
    return hf.XLMForSequenceClassification(
        hf.XLMConfig(vocab_size=VOCAB, emb_dim=16 * k, n_layers=2, n_heads=2 * k, max_position_embeddings=32)
    )


@CASES(masked())
def longformer(k: int) -> nn.Module:
    return hf.LongformerForMaskedLM(
        hf.LongformerConfig(**encoder(k, attention_window=[4, 4], max_position_embeddings=40))
    )


@CASES(masked())
def mpnet(k: int) -> nn.Module:
    return hf.MPNetForMaskedLM(hf.MPNetConfig(**encoder(k)))


@CASES(masked())
def funnel(k: int) -> nn.Module:
    return hf.FunnelForSequenceClassification(
        hf.FunnelConfig(
            vocab_size=VOCAB,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=16 * k,
            n_head=2 * k,
            d_head=8,
            d_inner=40 * k,
        )
    )


@CASES(masked())
def squeezebert(k: int) -> nn.Module:
    return hf.SqueezeBertForSequenceClassification(hf.SqueezeBertConfig(**encoder(k, embedding_size=16 * k)))


@CASES(masked())
def modernbert(k: int) -> nn.Module:
    return hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**encoder(k, cls_token_id=1, sep_token_id=2, local_attention=4))
    )


@CASES(ids())
def fnet(k: int) -> nn.Module:
    return hf.FNetForMaskedLM(
        hf.FNetConfig(
            vocab_size=VOCAB,
            hidden_size=16 * k,
            intermediate_size=40 * k,
            num_hidden_layers=2,
            max_position_embeddings=32,
        )
    )


@CASES(masked())
def nystromformer(k: int) -> nn.Module:
    return hf.NystromformerForMaskedLM(
        hf.NystromformerConfig(**encoder(k, num_landmarks=4, segment_means_seq_len=LENGTH))
    )


@CASES(masked())
def convbert(k: int) -> nn.Module:
    return hf.ConvBertForMaskedLM(hf.ConvBertConfig(**encoder(k, embedding_size=16 * k, head_ratio=1)))


@CASES(PAIR)
def bart(k: int) -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            max_position_embeddings=32,
        )
    )


@CASES(PAIR)
def marian(k: int) -> nn.Module:
    return hf.MarianMTModel(
        hf.MarianConfig(
            vocab_size=VOCAB,
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            max_position_embeddings=32,
            pad_token_id=0,
            decoder_start_token_id=1,
        )
    )


@CASES(PAIR)
def flan_t5(k: int) -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=16 * k,
            d_kv=8,
            d_ff=40 * k,
            num_layers=1,
            num_heads=2 * k,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


@CASES(PAIR)
def prophetnet(k: int) -> nn.Module:
    return hf.ProphetNetForConditionalGeneration(
        hf.ProphetNetConfig(
            vocab_size=VOCAB,
            hidden_size=16 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_encoder_attention_heads=2 * k,
            num_decoder_attention_heads=2 * k,
            max_position_embeddings=32,
        )
    )


@CASES(masked(), ambiguous=r"decoding_cross_attention\.attention\.self\.(query|key)\.(weight|bias):0")
def perceiver_lm(k: int) -> nn.Module:
    return hf.PerceiverForMaskedLM(
        hf.PerceiverConfig(
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
            num_latents=6,
            d_latents=16 * k,
            d_model=24 * k,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=2 * k,
            num_cross_attention_heads=2 * k,
            qk_channels=16 * k,
            v_channels=16 * k,
        )
    )
