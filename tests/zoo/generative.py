"""diffusers: denoisers and autoencoders."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

from zoo.case import Cases, Inputs, image, keywords, randint, randn

CASES = Cases()
TIME = r"time_embedding\.linear_1\.weight:1"  # as many sinusoids as channels, or a fixed number


def denoise(*shape: int, **more: object) -> Inputs:
    return keywords(sample=lambda: randn(2, *shape), timestep=lambda: torch.tensor([3, 7]), **more)


@CASES(denoise(3, 16, 16), TIME)
def unet2d(k: int) -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16 * k, 32 * k),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


@CASES(denoise(4, 16, 16, encoder_hidden_states=lambda: randn(2, 5, 12)), TIME)
def unet2d_condition(k: int) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16 * k, 32 * k),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=(2 * k, 4 * k),
    )


LATENT = (
    r"encoder\.(conv_out|layers\.4)\..*:0|quant_conv\..*:[01]|decoder\.(conv_in|layers\.0)\.weight:1"
    r"|quantize\.embedding\.weight:1"
)


@CASES(image(16), LATENT)
def autoencoder_kl(k: int) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8 * k, 16 * k),
        norm_num_groups=4,
        latent_channels=4,
    )


@CASES(image(16), LATENT)
def vq_model(k: int) -> nn.Module:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8 * k, 16 * k),
        norm_num_groups=4,
        num_vq_embeddings=17,
    )


@CASES(image(16), LATENT)
def autoencoder_tiny(k: int) -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(32 * k, 32 * k),
        decoder_block_out_channels=(32 * k, 32 * k),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


@CASES(
    keywords(
        hidden_states=lambda: randn(2, 4, 8, 8),
        timestep=lambda: torch.tensor([3, 7]),
        class_labels=lambda: randint(10, 2),
    )
)
def dit(k: int) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2 * k,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


@CASES(
    keywords(
        hidden_states=lambda: randn(2, 4, 8, 8),
        timestep=lambda: torch.tensor([3, 7]),
        encoder_hidden_states=lambda: randn(2, 5, 12),
    ),
)
def pixart(k: int) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2 * k,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16 * k,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=False,
    )


@CASES(
    keywords(
        hidden_states=lambda: randn(2, 4, 8, 8),
        timestep=lambda: torch.tensor([3, 7]),
        encoder_hidden_states=lambda: randn(2, 5, 12),
        pooled_projections=lambda: randn(2, 9),
    )
)
def stable_diffusion3(k: int) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2 * k,
        joint_attention_dim=12,
        caption_projection_dim=16 * k,
        pooled_projection_dim=9,
    )


@CASES(
    keywords(
        hidden_states=lambda: randn(2, 16, 4),
        timestep=lambda: torch.tensor([0.3, 0.7]),
        encoder_hidden_states=lambda: randn(2, 5, 12),
        pooled_projections=lambda: randn(2, 9),
        img_ids=lambda: torch.zeros(16, 3),
        txt_ids=lambda: torch.zeros(5, 3),
    )
)
def flux(k: int) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2 * k,
        joint_attention_dim=12,
        pooled_projection_dim=9,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )


@CASES(
    keywords(
        sample=lambda: randn(2, 4, 8, 8),
        timestep=lambda: torch.tensor([3, 7]),
        encoder_hidden_states=lambda: randn(2, 5, 12),
        controlnet_cond=lambda: randn(2, 3, 64, 64),
        conditioning_scale=1.0,
    ),
    TIME + r"|controlnet_(down_blocks\.\d+|mid_block)\.(weight|bias):0",  # readouts, or hidden state
)
def controlnet(k: int) -> nn.Module:
    return diffusers.ControlNetModel(
        block_out_channels=(16 * k, 32 * k),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=(2 * k, 4 * k),
        conditioning_embedding_out_channels=(8 * k, 16 * k, 16 * k, 16 * k),
    )


@CASES(
    keywords(
        hidden_states=lambda: randn(2, 9),
        timestep=lambda: torch.tensor([3, 7]),
        proj_embedding=lambda: randn(2, 9),
        encoder_hidden_states=lambda: randn(2, 5, 9),
    ),
    r"time_embedding\.linear_1\.weight:1",
)
def prior(k: int) -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=2 * k,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=9,
        num_embeddings=5,
        additional_embeddings=4,
    )


class Sampled(nn.Module):
    """Two steps of an unrolled sampler around a small denoiser."""

    def __init__(self, c: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(4, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for t in (0.9, 0.5):
            x = x - t * self.net(torch.cat([x, torch.full_like(x[:, :1], t)], 1))
        return x


@CASES(image(8))
def unrolled_sampler(k: int) -> nn.Module:
    return Sampled(8 * k)
