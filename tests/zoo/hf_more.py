"""Hugging Face transformers, further afield: hybrids, experts, detectors, more speech and series."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

from zoo.case import LENGTH, VOCAB, Cases, keywords, randint, randn
from zoo.hf_other import WAVE, pixels, speech, vision
from zoo.hf_text import PAIR, PLAIN, decoder, encoder, ids, masked

CASES = Cases()


@CASES(PLAIN)
def starcoder2(k: int) -> nn.Module:
    return hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**decoder(k)))


@CASES(PLAIN)
def nemotron(k: int) -> nn.Module:
    return hf.NemotronForCausalLM(hf.NemotronConfig(**decoder(k, head_dim=8)))


@CASES(PLAIN)
def persimmon(k: int) -> nn.Module:
    settings = decoder(k)
    settings.pop("num_key_value_heads")
    return hf.PersimmonForCausalLM(hf.PersimmonConfig(**settings))


@CASES(PLAIN)
def olmoe(k: int) -> nn.Module:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**decoder(k, num_experts=4, num_experts_per_tok=2)))


@CASES(PLAIN)
def granite_moe(k: int) -> nn.Module:
    return hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**decoder(k, num_local_experts=4, num_experts_per_tok=2))
    )


@CASES(PLAIN)
def jamba(k: int) -> nn.Module:
    return hf.JambaForCausalLM(
        hf.JambaConfig(
            **decoder(k, num_hidden_layers=4, num_experts=4, attn_layer_period=2, attn_layer_offset=1),
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=2 * k,
            use_mamba_kernels=False,
        )
    )


@CASES(PLAIN)
def bamba(k: int) -> nn.Module:
    return hf.BambaForCausalLM(
        hf.BambaConfig(
            **decoder(k, attn_layer_indices=[1]),
            mamba_n_heads=8 * k,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=4,
            mamba_chunk_size=4,
        )
    )


@CASES(PLAIN)
def xlstm(k: int) -> nn.Module:
    return hf.xLSTMForCausalLM(
        hf.xLSTMConfig(
            vocab_size=VOCAB,
            hidden_size=32 * k,
            num_hidden_layers=1,
            num_heads=2 * k,
            chunk_size=4,
            ffn_round_up_to_multiple_of=1,
            mlstm_round_up_to_multiple_of=1,
            qk_dim_factor=0.5,
        )
    )


@CASES(PLAIN)
def lfm2(k: int) -> nn.Module:
    return hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**decoder(k, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False))
    )


@CASES(PLAIN)
def gpt_oss(k: int) -> nn.Module:
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **decoder(k, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
        )
    )


@CASES(masked())
def roformer(k: int) -> nn.Module:
    return hf.RoFormerForMaskedLM(hf.RoFormerConfig(**encoder(k, embedding_size=16 * k)))


@CASES(masked(), "contact_head")  # nothing reads it
def esm(k: int) -> nn.Module:
    return hf.EsmForMaskedLM(hf.EsmConfig(**encoder(k, position_embedding_type="rotary", mask_token_id=1)))


@CASES(masked())
def mobilebert(k: int) -> nn.Module:
    return hf.MobileBertForMaskedLM(
        hf.MobileBertConfig(
            **encoder(
                k,
                embedding_size=8 * k,
                true_hidden_size=8 * k,
                intra_bottleneck_size=8 * k,
                num_attention_heads=k,
                key_query_shared_bottleneck=True,
            )
        )
    )


@CASES(masked())
def canine(k: int) -> nn.Module:
    return hf.CanineModel(
        hf.CanineConfig(
            **{n: v for n, v in encoder(k).items() if n != "vocab_size"},
            num_hash_buckets=16,
            local_transformer_stride=4,
        )
    )


@CASES(ids())
def reformer(k: int) -> nn.Module:
    return hf.ReformerModelWithLMHead(
        hf.ReformerConfig(
            vocab_size=VOCAB,
            hidden_size=16 * k,
            num_attention_heads=2 * k,
            attention_head_size=8,
            feed_forward_size=40 * k,
            attn_layers=["local"],
            local_attn_chunk_length=4,
            axial_pos_shape=(3, 4),
            axial_pos_embds_dim=(8 * k, 8 * k),
            is_decoder=True,
            use_cache=False,
        )
    )


@CASES(PAIR)
def pegasus(k: int) -> nn.Module:
    return hf.PegasusForConditionalGeneration(
        hf.PegasusConfig(
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
def m2m100(k: int) -> nn.Module:
    return hf.M2M100ForConditionalGeneration(
        hf.M2M100Config(
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


@CASES(pixels())
def vit_msn(k: int) -> nn.Module:
    return hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**vision(k, num_labels=10)))


@CASES(pixels())
def data2vec_vision(k: int) -> nn.Module:
    return hf.Data2VecVisionForImageClassification(
        hf.Data2VecVisionConfig(**vision(k, num_labels=10, use_shared_relative_position_bias=True))
    )


@CASES(pixels(64))
def pvt(k: int) -> nn.Module:
    return hf.PvtForImageClassification(
        hf.PvtConfig(
            image_size=64,
            hidden_sizes=[8 * k, 16 * k, 16 * k, 32 * k],
            num_attention_heads=[k, 2 * k, 2 * k, 4 * k],
            depths=[1, 1, 1, 1],
            num_labels=10,
        )
    )


@CASES(pixels(64))
def hiera(k: int) -> nn.Module:
    return hf.HieraForImageClassification(
        hf.HieraConfig(
            image_size=[64, 64],
            embed_dim=16 * k,
            depths=[1, 1],
            num_heads=[2 * k, 4 * k],
            masked_unit_size=[4, 4],
            query_stride=[2, 2],
            num_query_pool=1,
            num_labels=10,
        )
    )


@CASES(pixels(64))
def hf_mobilenet_v1(k: int) -> nn.Module:
    return hf.MobileNetV1ForImageClassification(
        hf.MobileNetV1Config(image_size=64, depth_multiplier=0.5 * k, min_depth=8, num_labels=10)
    )


@CASES(pixels(64))
def swiftformer(k: int) -> nn.Module:
    return hf.SwiftFormerForImageClassification(
        hf.SwiftFormerConfig(
            image_size=64, depths=[1, 1, 1, 1], embed_dims=[8 * k, 16 * k, 24 * k, 32 * k], num_labels=10
        )
    )


@CASES(pixels(64))
def glpn(k: int) -> nn.Module:
    return hf.GLPNForDepthEstimation(
        hf.GLPNConfig(
            hidden_sizes=[8 * k, 16 * k, 16 * k, 32 * k],
            num_attention_heads=[k, 2 * k, 2 * k, 4 * k],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=16 * k,
        )
    )


@CASES(
    pixels(32),
    r"continuous_position_bias_mlp\.0\.(weight|bias):0|continuous_position_bias_mlp\.2\.weight:1"
    r"|conv_before_upsample.*:0|convolution_0\.(weight:[01]|bias)|final_convolution\.weight:1",
)
def swin2sr(k: int) -> nn.Module:
    return hf.Swin2SRForImageSuperResolution(
        hf.Swin2SRConfig(
            image_size=32, embed_dim=16 * k, depths=[1, 1], num_heads=[2 * k, 2 * k], window_size=4, upscale=2
        )
    )


@CASES(pixels(64), r"auxiliary_head\.classifier.*:0")  # nothing reads its output
def upernet(k: int) -> nn.Module:
    backbone = hf.ConvNextConfig(
        hidden_sizes=[8 * k, 16 * k, 16 * k, 24 * k],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=backbone, hidden_size=16 * k, auxiliary_channels=12 * k, num_labels=5
        )
    )


@CASES(pixels(64))
def deformable_detr(k: int) -> nn.Module:
    return hf.DeformableDetrForObjectDetection(
        hf.DeformableDetrConfig(
            use_timm_backbone=False,
            backbone_config=hf.ResNetConfig(
                embedding_size=8 * k,
                hidden_sizes=[8 * k, 16 * k],
                depths=[1, 1],
                layer_type="basic",
                out_features=["stage1", "stage2"],
            ),
            num_feature_levels=2,
            d_model=32 * k,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4 * k,
            decoder_attention_heads=4 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            num_queries=7,
            num_labels=5,
            encoder_n_points=2,
            decoder_n_points=2,
        )
    )


@CASES(WAVE, "pos_conv_embed")  # nothing reads it
def wav2vec2_conformer(k: int) -> nn.Module:
    return hf.Wav2Vec2ConformerForCTC(
        hf.Wav2Vec2ConformerConfig(
            **speech(k, position_embeddings_type="relative", conv_depthwise_kernel_size=5)
        )
    )


@CASES(WAVE)
def unispeech_sat(k: int) -> nn.Module:
    return hf.UniSpeechSatForSequenceClassification(
        hf.UniSpeechSatConfig(**speech(k, num_labels=5, classifier_proj_size=8 * k))
    )


@CASES(WAVE, r"^classifier\.(weight|bias):0")  # logits as many as the embedding is wide
def wav2vec2_xvector(k: int) -> nn.Module:
    return hf.Wav2Vec2ForXVector(
        hf.Wav2Vec2Config(
            **speech(
                k,
                tdnn_dim=(16 * k, 16 * k, 24 * k),
                tdnn_kernel=(3, 2, 1),
                tdnn_dilation=(1, 1, 1),
                xvector_output_dim=12 * k,
                num_labels=5,
            )
        )
    )


@CASES(WAVE, r"codevectors:[12]|weight_proj.*:0|(project_q|project_hid).*:0")  # projections
def wav2vec2_pretraining(k: int) -> nn.Module:
    return hf.Wav2Vec2ForPreTraining(
        hf.Wav2Vec2Config(
            **speech(
                k,
                num_codevectors_per_group=5,
                num_codevector_groups=2,
                codevector_dim=8 * k,
                proj_codevector_dim=8 * k,
                do_stable_layer_norm=True,
                feat_extract_norm="layer",
            )
        )
    )


@CASES(
    keywords(
        input_features=lambda: randn(2, 40, 20),
        decoder_input_ids=lambda: randint(VOCAB, 2, 6),
        use_cache=False,
    )
)
def speech_to_text(k: int) -> nn.Module:
    return hf.Speech2TextForConditionalGeneration(
        hf.Speech2TextConfig(
            vocab_size=VOCAB,
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            input_feat_per_channel=20,
            conv_channels=24 * k,
            max_source_positions=40,
            max_target_positions=16,
        )
    )


@CASES(keywords(input_features=lambda: randn(2, 20, 16)))
def wav2vec2_bert(k: int) -> nn.Module:
    return hf.Wav2Vec2BertForCTC(
        hf.Wav2Vec2BertConfig(
            vocab_size=30,
            hidden_size=16 * k,
            intermediate_size=40 * k,
            num_hidden_layers=1,
            num_attention_heads=2 * k,
            feature_projection_input_dim=16,
            conv_depthwise_kernel_size=5,
            pad_token_id=0,
        )
    )


@CASES(
    keywords(
        past_values=lambda: randn(2, 20),
        past_time_features=lambda: randn(2, 20, 2),
        past_observed_mask=lambda: torch.ones(2, 20),
        future_values=lambda: randn(2, 6),
        future_time_features=lambda: randn(2, 6, 2),
    )
)
def autoformer(k: int) -> nn.Module:
    return hf.AutoformerForPrediction(
        hf.AutoformerConfig(
            prediction_length=6,
            context_length=13,
            lags_sequence=[1, 2, 7],
            num_time_features=2,
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            label_length=4,
            moving_average=3,
        )
    )


@CASES(
    keywords(
        input_ids=lambda: randint(VOCAB, 2, LENGTH),
        pixel_values=lambda: randn(2, 3, 32, 32),
        attention_mask=lambda: torch.ones(2, LENGTH, dtype=torch.long),
    ),
    "^(vision|text)_proj",  # nothing reads it
)
def blip(k: int) -> nn.Module:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=16 * k,
        encoder_hidden_size=16 * k,
        intermediate_size=40 * k,
        num_hidden_layers=1,
        num_attention_heads=2 * k,
        max_position_embeddings=32,
    )
    return hf.BlipForImageTextRetrieval(
        hf.BlipConfig(
            text_config=text,
            vision_config=vision(k, num_hidden_layers=1),
            projection_dim=12 * k,
            image_text_hidden_size=12 * k,
        )
    )


# Left and top come before right and bottom.
@CASES(
    keywords(input_ids=lambda: randint(VOCAB, 2, LENGTH), bbox=lambda: randint(50, 2, LENGTH, 4).sort(-1)[0])
)
def layoutlm(k: int) -> nn.Module:
    return hf.LayoutLMForTokenClassification(hf.LayoutLMConfig(**encoder(k, max_2d_position_embeddings=64)))
