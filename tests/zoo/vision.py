"""timm and torchvision, widened by their own width arguments."""

from __future__ import annotations

from typing import Any

import timm
import torchvision
from timm.models import byobnet, efficientnet, regnet, resnet, resnetv2
from timm.models.metaformer import MetaFormer
from torch import nn
from torchvision.models import segmentation

from zoo.case import Cases, image

CASES = Cases()


def create(name: str, **settings: Any) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10, **settings)


@CASES(image(32))
def timm_swin(k: int) -> nn.Module:
    return create(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16 * k,
        depths=(2, 2),
        num_heads=(2 * k, 4 * k),
    )


@CASES(image(32), ambiguous=r"cpb_mlp\.0\.(weight|bias):0|cpb_mlp\.2\.weight:1")
def timm_swin_v2(k: int) -> nn.Module:
    return create(
        "swinv2_tiny_window8_256",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16 * k,
        depths=(2, 2),
        num_heads=(2 * k, 4 * k),
    )


@CASES(image(32))
def timm_deit(k: int) -> nn.Module:
    return create(
        "deit_tiny_distilled_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=16 * k,
        depth=2,
        num_heads=2 * k,
    )


@CASES(image(32))
def timm_beit(k: int) -> nn.Module:
    return create(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=16 * k, depth=2, num_heads=2 * k
    )


@CASES(image(32))
def timm_cait(k: int) -> nn.Module:
    return create("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=16 * k, depth=2, num_heads=2 * k)


@CASES(image(32), ambiguous=r"pos_embed(er)?\.token_projection\.weight:1")
def timm_xcit(k: int) -> nn.Module:
    return create("xcit_nano_12_p8_224", img_size=32, embed_dim=16 * k, depth=2, num_heads=2 * k)


@CASES(image(32))
def timm_convmixer(k: int) -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(16 * k, 2, kernel_size=3, patch_size=4, num_classes=10)


@CASES(image(32))
def timm_poolformer(k: int) -> nn.Module:
    return MetaFormer(
        depths=(1, 1, 1, 1), dims=tuple(c * k for c in (8, 16, 16, 24)), use_mlp_head=False, num_classes=10
    )


@CASES(image(64))
def timm_edgenext(k: int) -> nn.Module:
    return create(
        "edgenext_xx_small",
        dims=(8 * k, 16 * k, 24 * k, 40 * k),
        depths=(1, 2, 2, 2),
        heads=(k, 2 * k, 3 * k, 4 * k),
    )


@CASES(image(64))
def timm_efficientnet(k: int) -> nn.Module:
    stages = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e6_c24_se0.25"], ["ir_r1_k5_s2_e6_c40_se0.25"]]
    blocks = efficientnet.decode_arch_def(stages)
    return efficientnet.EfficientNet(
        blocks,
        num_classes=10,
        stem_size=16 * k,
        num_features=64 * k,
        round_chs_fn=lambda c: c * k,
        act_layer=nn.SiLU,
    )


@CASES(image(64))
def timm_mobilenet_v3(k: int) -> nn.Module:
    from timm.models.mobilenetv3 import MobileNetV3

    stages = [["ds_r1_k3_s1_e1_c16"], ["ir_r1_k3_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c48"]]
    return MobileNetV3(
        efficientnet.decode_arch_def(stages),
        num_classes=10,
        stem_size=16 * k,
        num_features=64 * k,
        round_chs_fn=lambda c: c * k,
    )


@CASES(image(64), ambiguous=r"conv2\.conv\.weight:1")
def timm_regnet(k: int) -> nn.Module:
    cfg = regnet.RegNetCfg(
        depth=10, w0=16 * k, wa=16.0 * k, wm=2.0, group_size=8, se_ratio=0.25, stem_width=16 * k
    )
    return regnet.RegNet(cfg, num_classes=10)


@CASES(image(64), ambiguous=r"conv2\.weight:1")
def timm_resnext(k: int) -> nn.Module:
    return resnet.ResNet(
        resnet.Bottleneck,
        (1, 1, 1, 1),
        num_classes=10,
        cardinality=4,
        base_width=32,
        stem_type="deep",
        stem_width=8 * k,
        channels=(8 * k, 16 * k, 16 * k, 24 * k),
    )


@CASES(
    image(64), ambiguous=r"conv2\.(conv|fc1)\.weight:1|conv2\.(fc1|bn1)\.(weight|bias):0|conv2\.fc2\.weight:1"
)  # at least 32 units
def timm_resnest(k: int) -> nn.Module:
    from timm.models.resnest import ResNestBottleneck

    return resnet.ResNet(
        ResNestBottleneck,
        (1, 1, 1, 1),
        num_classes=10,
        stem_type="deep",
        stem_width=8 * k,
        avg_down=True,
        channels=(16 * k, 32 * k, 32 * k, 48 * k),
        block_args=dict(radix=2, avd=True, avd_first=False),
    )


@CASES(image(64))
def timm_sknet(k: int) -> nn.Module:
    from timm.models.sknet import SelectiveKernelBasic

    return resnet.ResNet(
        SelectiveKernelBasic,
        (1, 1, 1, 1),
        num_classes=10,
        stem_type="deep",
        stem_width=8 * k,
        channels=(16 * k, 32 * k, 32 * k, 48 * k),
        block_args=dict(sk_kwargs=dict(rd_ratio=1 / 8, rd_divisor=1, split_input=True)),
        zero_init_last=False,
    )


@CASES(image(64))
def timm_resnet_v2(k: int) -> nn.Module:
    return resnetv2.ResNetV2(
        layers=(1, 1, 1, 1), channels=(128 * k, 128 * k, 256 * k, 256 * k), stem_chs=32 * k, num_classes=10
    )


@CASES(image(64))
def timm_nfnet(k: int) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    cfg = NfCfg(
        depths=(1, 1, 1, 1),
        channels=(32 * k, 32 * k, 48 * k, 64 * k),
        stem_chs=16 * k,
        ch_div=1,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5, "rd_divisor": 1},
    )
    return NormFreeNet(cfg, num_classes=10)


@CASES(image(64))
def timm_repvgg(k: int) -> nn.Module:
    cfg = byobnet.ByoModelCfg(
        blocks=tuple(
            byobnet.ByoBlockCfg(type="rep", d=1, c=c * k, s=2, gs=0, br=1.0) for c in (16, 16, 24, 32)
        ),
        stem_type="rep",
        stem_chs=16 * k,
    )
    return byobnet.ByobNet(cfg, num_classes=10)


@CASES(image(64))
def timm_vovnet(k: int) -> nn.Module:
    return create(
        "ese_vovnet19b_dw",
        stem_chs=(16 * k, 16 * k, 16 * k),
        stage_conv_chs=(16 * k, 16 * k, 24 * k, 24 * k),
        stage_out_chs=(16 * k, 32 * k, 48 * k, 64 * k),
    )


@CASES(image(64))
def timm_dla(k: int) -> nn.Module:
    return create("dla34", levels=(1, 1, 1, 1, 1, 1), channels=tuple(c * k for c in (8, 8, 16, 16, 24, 32)))


@CASES(image(64))
def timm_coatnet(k: int) -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    cfg = MaxxVitCfg(
        embed_dim=(16 * k, 24 * k, 32 * k, 40 * k),
        depths=(1, 1, 1, 1),
        block_type=("C", "C", "T", "T"),
        stem_width=(8 * k, 16 * k),
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias"),
    )
    return MaxxVit(cfg, img_size=64, num_classes=10)


@CASES(image(64))
def timm_maxvit(k: int) -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    cfg = MaxxVitCfg(
        embed_dim=(16 * k, 24 * k),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8 * k,
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )
    return MaxxVit(cfg, img_size=64, num_classes=10)


@CASES(image(32))
def timm_pit(k: int) -> nn.Module:
    return create(
        "pit_ti_224",
        img_size=32,
        patch_size=8,
        stride=4,
        base_dims=(8, 8, 8),
        heads=(2 * k, 4 * k, 8 * k),
        depth=(1, 1, 1),
    )


@CASES(image(64), ambiguous=r"group_conv3x3\.weight:1")
def timm_mobilevit(k: int) -> nn.Module:
    from dataclasses import replace

    cfg = byobnet.ByoModelCfg(
        blocks=(
            byobnet.ByoBlockCfg(type="bottle", d=1, c=16 * k, s=2, gs=1, br=2.0),
            byobnet.ByoBlockCfg(
                type="mobilevit",
                d=1,
                c=24 * k,
                s=1,
                block_kwargs=dict(transformer_dim=32 * k, transformer_depth=1, patch_size=2, num_heads=4 * k),
            ),
        ),
        stem_chs=16 * k,
        stem_type="3x3",
        stem_pool="",
        num_features=48 * k,
    )
    return byobnet.ByobNet(replace(cfg), num_classes=10)


@CASES(image(32))
def timm_crossvit(k: int) -> nn.Module:
    return create(
        "crossvit_tiny_240",
        img_size=32,
        img_scale=(1.0, 1.0),
        patch_size=(8, 16),
        embed_dim=(16 * k, 32 * k),
        depth=((1, 1, 0),),
        num_heads=(2 * k, 2 * k),
        mlp_ratio=(2, 2, 1),
    )


@CASES(image(32))
def timm_naflexvit(k: int) -> nn.Module:
    return create(
        "eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=16 * k, depth=2, num_heads=2 * k
    )


@CASES(image(64))
def timm_mvit(k: int) -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    cfg = MultiScaleVitCfg(
        embed_dim=(16 * k, 32 * k), depths=(1, 1), num_heads=(2 * k, 4 * k), stride_q=((1, 1), (2, 2))
    )
    return MultiScaleVit(cfg, img_size=64, num_classes=10)


@CASES(image(64))
def timm_inception_next(k: int) -> nn.Module:
    return create("inception_next_tiny", depths=(1, 1, 1, 1), dims=(16 * k, 32 * k, 32 * k, 48 * k))


@CASES(image(64))
def timm_fastvit(k: int) -> nn.Module:
    return create("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16 * k, 32 * k, 32 * k, 64 * k))


@CASES(image(32))
def timm_resmlp(k: int) -> nn.Module:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return MlpMixer(
        img_size=32,
        patch_size=8,
        num_blocks=2,
        embed_dim=16 * k,
        mlp_ratio=4,
        block_layer=ResBlock,
        norm_layer=Affine,
        num_classes=10,
    )


@CASES(image(64))
def timm_focalnet(k: int) -> nn.Module:
    from timm.models.focalnet import FocalNet

    return FocalNet(
        embed_dim=16 * k,
        depths=(1, 1, 1, 1),
        focal_levels=(2, 2, 2, 2),
        focal_windows=(3, 3, 3, 3),
        num_classes=10,
    )


@CASES(image(64))
def tv_vgg(k: int) -> nn.Module:
    features = torchvision.models.vgg.make_layers([8 * k, "M", 16 * k, "M", 16 * k, "M"], True)
    return nn.Sequential(
        features,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * k, 32 * k),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(32 * k, 10),
    )


@CASES(image(32))
def tv_vit(k: int) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2 * k, 16 * k, 40 * k, num_classes=10)


@CASES(image(64))
def tv_mobilenet_v2(k: int) -> nn.Module:
    settings = [[1, 16 * k, 1, 1], [6, 24 * k, 2, 2], [6, 32 * k, 1, 2]]
    return torchvision.models.MobileNetV2(
        num_classes=10,
        width_mult=float(k) if k else 1.0,
        inverted_residual_setting=[[t, c // k, n, s] for t, c, n, s in settings],
    )


@CASES(image(64))
def tv_shufflenet_v2(k: int) -> nn.Module:
    return torchvision.models.ShuffleNetV2(
        [1, 2, 1], [16 * k, 16 * k, 32 * k, 48 * k, 64 * k], num_classes=10
    )


@CASES(
    image(64), ambiguous=r"layers\.14\.weight:0|layers\.15\.|classifier\.1\.weight:1"
)  # the last layer has 1280 channels at any width
def tv_mnasnet(k: int) -> nn.Module:
    return torchvision.models.MNASNet(0.5 * k, num_classes=10)


@CASES(image(32))
def tv_swin(k: int) -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 16 * k, [1, 1], [2 * k, 4 * k], [4, 4], num_classes=10)


@CASES(image(64))
def tv_maxvit(k: int) -> nn.Module:
    return torchvision.models.MaxVit((64, 64), 8 * k, 4, [16 * k, 32 * k], [1, 1], 8, 0.0, num_classes=10)


@CASES(image(64))
def tv_convnext(k: int) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    return torchvision.models.ConvNeXt(
        [CNBlockConfig(8 * k, 16 * k, 1), CNBlockConfig(16 * k, None, 1)], num_classes=10
    )


@CASES(image(64))
def tv_deeplab(k: int) -> nn.Module:
    body = nn.Sequential()
    body.add_module("a", nn.Sequential(nn.Conv2d(3, 16 * k, 3, 4, 1), nn.BatchNorm2d(16 * k), nn.ReLU()))
    body.add_module(
        "out", nn.Sequential(nn.Conv2d(16 * k, 32 * k, 3, 2, 1), nn.BatchNorm2d(32 * k), nn.ReLU())
    )
    backbone = torchvision.models._utils.IntermediateLayerGetter(body, {"out": "out"})
    head = nn.Sequential(
        segmentation.deeplabv3.ASPP(32 * k, [2, 4], 24 * k),
        nn.Conv2d(24 * k, 24 * k, 3, padding=1),
        nn.BatchNorm2d(24 * k),
        nn.ReLU(),
        nn.Conv2d(24 * k, 5, 1),
    )
    return segmentation.DeepLabV3(backbone, head)
