"""Hugging Face transformers: vision, speech, several modalities and time series."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from zoo.case import LENGTH, VOCAB, Cases, Inputs, keywords, randint, randn

CASES = Cases()


def pixels(size: int = 32) -> Inputs:
    return keywords(pixel_values=lambda: randn(2, 3, size, size))


def vision(k: int, **more: Any) -> dict[str, Any]:
    """Settings that most plain vision transformers share."""
    return (
        dict(
            hidden_size=16 * k,
            intermediate_size=40 * k,
            num_hidden_layers=2,
            num_attention_heads=2 * k,
            image_size=32,
            patch_size=8,
        )
        | more
    )


@CASES(pixels())
def vit_model(k: int) -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**vision(k)))


@CASES(pixels())
def deit(k: int) -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**vision(k, num_labels=10)))


@CASES(pixels())
def beit(k: int) -> nn.Module:
    return hf.BeitForImageClassification(
        hf.BeitConfig(**vision(k, num_labels=10, use_relative_position_bias=True))
    )


@CASES(pixels())
def dinov2(k: int) -> nn.Module:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**vision(k, num_labels=10, mlp_ratio=2)))


@CASES(pixels())
def swin(k: int) -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16 * k,
            depths=[2, 2],
            num_heads=[2 * k, 4 * k],
            window_size=4,
            num_labels=10,
        )
    )


@CASES(
    pixels(),
    ambiguous=r"continuous_position_bias_mlp\.0\.(weight|bias):0|continuous_position_bias_mlp\.2\.weight:1",
)
def swin_v2(k: int) -> nn.Module:
    return hf.Swinv2ForImageClassification(
        hf.Swinv2Config(
            image_size=32,
            patch_size=2,
            embed_dim=16 * k,
            depths=[1, 1],
            num_heads=[2 * k, 4 * k],
            window_size=4,
            num_labels=10,
        )
    )


@CASES(pixels())
def convnext_v2(k: int) -> nn.Module:
    return hf.ConvNextV2ForImageClassification(
        hf.ConvNextV2Config(hidden_sizes=[8 * k, 16 * k, 16 * k, 24 * k], depths=[1, 1, 1, 1], num_labels=10)
    )


@CASES(pixels(64))
def segformer(k: int) -> nn.Module:
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            hidden_sizes=[8 * k, 16 * k, 16 * k, 32 * k],
            num_attention_heads=[k, 2 * k, 2 * k, 4 * k],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=24 * k,
            num_labels=5,
        )
    )


@CASES(pixels(64))
def detr(k: int) -> nn.Module:
    return hf.DetrForObjectDetection(
        hf.DetrConfig(
            use_timm_backbone=False,
            backbone_config=hf.ResNetConfig(
                embedding_size=8 * k,
                hidden_sizes=[8 * k, 16 * k],
                depths=[1, 1],
                layer_type="basic",
                out_features=["stage2"],
            ),
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            num_queries=7,
            num_labels=5,
        )
    )


@CASES(pixels())
def yolos(k: int) -> nn.Module:
    return hf.YolosForObjectDetection(
        hf.YolosConfig(
            **vision(
                k,
                image_size=[32, 32],
                num_detection_tokens=5,
                num_labels=4,
                use_mid_position_embeddings=False,
            )
        )
    )


@CASES(pixels(64))
def hf_resnet(k: int) -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8 * k, hidden_sizes=[16 * k, 32 * k], depths=[1, 2], num_labels=10)
    )


@CASES(pixels(64))
def mobilevit(k: int) -> nn.Module:
    return hf.MobileViTForImageClassification(
        hf.MobileViTConfig(
            image_size=64,
            hidden_sizes=[16 * k, 24 * k, 32 * k],
            neck_hidden_sizes=[8 * k, 8 * k, 16 * k, 16 * k, 24 * k, 32 * k, 40 * k],
            num_attention_heads=4 * k,
            mlp_ratio=2.0,
            num_labels=10,
        )
    )


@CASES(pixels())
def poolformer(k: int) -> nn.Module:
    return hf.PoolFormerForImageClassification(
        hf.PoolFormerConfig(hidden_sizes=[8 * k, 16 * k, 16 * k, 24 * k], depths=[1, 1, 1, 1], num_labels=10)
    )


@CASES(pixels(64))
def levit(k: int) -> nn.Module:
    return hf.LevitForImageClassification(
        hf.LevitConfig(
            image_size=64,
            hidden_sizes=[16 * k, 24 * k, 32 * k],
            num_attention_heads=[2 * k, 3 * k, 4 * k],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
            down_ops=[
                ["Subsample", 4, 4 * k, 4, 2, 2],
                ["Subsample", 4, 6 * k, 4, 2, 2],
            ],
            num_labels=10,
        )
    )


@CASES(pixels(64), ambiguous=r"head\.2\.(weight|bias):0|head\.4\.weight:1")  # 32 channels at any width
def dpt(k: int) -> nn.Module:
    return hf.DPTForDepthEstimation(
        hf.DPTConfig(
            **vision(k, image_size=64, num_hidden_layers=4),
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8 * k, 8 * k, 16 * k, 16 * k],
            fusion_hidden_size=16 * k,
            is_hybrid=False,
            add_projection=False,
        )
    )


@CASES(keywords(pixel_values=lambda: randn(2, 3, 32, 32), bool_masked_pos=lambda: randint(2, 2, 16).bool()))
def simmim(k: int) -> nn.Module:
    return hf.ViTForMaskedImageModeling(
        hf.ViTConfig(**vision(k, encoder_stride=8)),
    )


@CASES(keywords(pixel_values=lambda: randn(2, 3, 32, 32), noise=lambda: randn(2, 16)))
def vit_mae(k: int) -> nn.Module:
    return hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(
            **vision(k),
            decoder_hidden_size=8 * k,
            decoder_num_attention_heads=2 * k,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=16 * k,
        )
    )


@CASES(
    keywords(
        input_ids=lambda: randint(VOCAB, 3, LENGTH),
        pixel_values=lambda: randn(3, 3, 32, 32),
        attention_mask=lambda: torch.ones(3, LENGTH, dtype=torch.long),
    )
)
def clip(k: int) -> nn.Module:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=16 * k,
        intermediate_size=40 * k,
        num_hidden_layers=1,
        num_attention_heads=2 * k,
    )
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config=text | {"max_position_embeddings": LENGTH, "eos_token_id": 2},
            vision_config=vision(k, hidden_size=24 * k, num_attention_heads=3 * k, num_hidden_layers=1),
            projection_dim=20 * k,
        )
    )


@CASES(keywords(input_ids=lambda: randint(VOCAB, 3, LENGTH), pixel_values=lambda: randn(3, 3, 32, 32)))
def siglip(k: int) -> nn.Module:
    text = dict(
        vocab_size=VOCAB,
        hidden_size=16 * k,
        intermediate_size=40 * k,
        num_hidden_layers=1,
        num_attention_heads=2 * k,
    )
    return hf.SiglipModel(
        hf.SiglipConfig(
            text_config=text | {"max_position_embeddings": LENGTH, "projection_size": 16 * k},
            vision_config=vision(k, num_hidden_layers=1),
        )
    )


@CASES(
    keywords(
        input_ids=lambda: randint(VOCAB, 2, LENGTH),
        pixel_values=lambda: randn(2, 3, 32, 32),
        attention_mask=lambda: torch.ones(2, LENGTH, dtype=torch.long),
    )
)
def vilt(k: int) -> nn.Module:
    return hf.ViltModel(
        hf.ViltConfig(vocab_size=VOCAB, max_position_embeddings=32, **vision(k), max_image_length=-1)
    )


@CASES(
    keywords(
        input_features=lambda: randn(2, 20, 40),
        decoder_input_ids=lambda: randint(VOCAB, 2, 6),
        use_cache=False,
    )
)
def whisper(k: int) -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCAB,
            num_mel_bins=20,
            d_model=16 * k,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2 * k,
            decoder_attention_heads=2 * k,
            encoder_ffn_dim=40 * k,
            decoder_ffn_dim=40 * k,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def speech(k: int, **more: Any) -> dict[str, Any]:
    """Settings that the wav2vec 2.0 family shares."""
    return (
        dict(
            vocab_size=30,
            hidden_size=16 * k,
            intermediate_size=40 * k,
            num_hidden_layers=2,
            num_attention_heads=2 * k,
            conv_dim=(8 * k, 8 * k),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embedding_groups=4,
            num_conv_pos_embeddings=8,
            mask_time_prob=0.0,
            layerdrop=0.0,
            pad_token_id=0,
        )
        | more
    )


WAVE = keywords(input_values=lambda: randn(2, 400))


@CASES(WAVE)
def wav2vec2(k: int) -> nn.Module:
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**speech(k)))


@CASES(WAVE)
def hubert(k: int) -> nn.Module:
    return hf.HubertForSequenceClassification(
        hf.HubertConfig(
            **speech(
                k,
                feat_extract_norm="layer",
                num_labels=6,
                classifier_proj_size=12 * k,
                use_weighted_layer_sum=True,
            )
        )
    )


@CASES(WAVE, ambiguous=r"gru_rel_pos_(linear|const:1)")
def wavlm(k: int) -> nn.Module:
    return hf.WavLMForCTC(hf.WavLMConfig(**speech(k)))


@CASES(WAVE)
def sew(k: int) -> nn.Module:
    return hf.SEWForCTC(hf.SEWConfig(**speech(k, squeeze_factor=2)))


@CASES(keywords(input_values=lambda: randn(2, 32, 16)))
def ast(k: int) -> nn.Module:
    settings = vision(k)
    settings.pop("image_size")
    return hf.ASTForAudioClassification(
        hf.ASTConfig(**settings, max_length=32, num_mel_bins=16, num_labels=5)
    )


@CASES(keywords(input_values=lambda: randn(2, 1, 640)))
def encodec(k: int) -> nn.Module:
    return hf.EncodecModel(
        hf.EncodecConfig(
            num_filters=4 * k,
            upsampling_ratios=[4, 2],
            hidden_size=8 * k,
            num_lstm_layers=1,
            codebook_size=16,
            target_bandwidths=[48.0],
            sampling_rate=24000,
        )
    )


@CASES(keywords(input_ids=lambda: randint(30, 2, 10)))
def vits(k: int) -> nn.Module:
    return hf.VitsModel(
        hf.VitsConfig(
            vocab_size=30,
            hidden_size=16 * k,
            num_hidden_layers=1,
            num_attention_heads=2 * k,
            ffn_dim=24 * k,
            flow_size=8 * k,
            spectrogram_bins=9,
            upsample_initial_channel=16 * k,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            prior_encoder_num_flows=2,
            prior_encoder_num_wavenet_layers=1,
            posterior_encoder_num_wavenet_layers=1,
            duration_predictor_filter_channels=16 * k,
            depth_separable_channels=2,
            use_stochastic_duration_prediction=False,
        )
    )


@CASES(keywords(past_values=lambda: randn(2, 32, 3)))
def patchtst(k: int) -> nn.Module:
    return hf.PatchTSTForPrediction(
        hf.PatchTSTConfig(
            num_input_channels=3,
            context_length=32,
            patch_length=8,
            patch_stride=8,
            prediction_length=5,
            d_model=16 * k,
            num_attention_heads=2 * k,
            ffn_dim=40 * k,
            num_hidden_layers=1,
        )
    )


@CASES(
    keywords(past_values=lambda: randn(2, 32, 3)),
    ambiguous=r"patch_mixer\.mlp\.fc1\.(weight|bias):0|patch_mixer\.mlp\.fc2\.weight:1",
)
def patchtsmixer(k: int) -> nn.Module:
    return hf.PatchTSMixerForPrediction(
        hf.PatchTSMixerConfig(
            num_input_channels=3,
            context_length=32,
            patch_length=8,
            patch_stride=8,
            prediction_length=5,
            d_model=16 * k,
            num_layers=2,
        ),
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
def time_series_transformer(k: int) -> nn.Module:
    return hf.TimeSeriesTransformerForPrediction(
        hf.TimeSeriesTransformerConfig(
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
        )
    )


@CASES(
    keywords(
        states=lambda: randn(2, 5, 7),
        actions=lambda: randn(2, 5, 3),
        rewards=lambda: randn(2, 5, 1),
        returns_to_go=lambda: randn(2, 5, 1),
        timesteps=lambda: randint(20, 2, 5),
        attention_mask=lambda: torch.ones(2, 5, dtype=torch.long),
    )
)
def decision_transformer(k: int) -> nn.Module:
    return hf.DecisionTransformerModel(
        hf.DecisionTransformerConfig(
            state_dim=7, act_dim=3, hidden_size=16 * k, max_ep_len=32, n_layer=1, n_head=2 * k, n_positions=32
        )
    )
