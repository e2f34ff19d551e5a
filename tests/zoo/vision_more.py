"""More of timm, torchvision and transformers: multi-resolution, ghost modules, convolutional tokens."""

from __future__ import annotations

import timm
import torchvision
import transformers as hf
from timm.models import resnet
from torch import nn

from zoo.case import Cases, image, keywords, randn, tokens

CASES = Cases()


@CASES(image(64))
def timm_resnet18(k: int) -> nn.Module:
    return resnet.ResNet(
        resnet.BasicBlock,
        (2, 2, 2, 2),
        num_classes=10,
        channels=(8 * k, 16 * k, 32 * k, 64 * k),
        stem_width=8 * k,
        stem_type="deep",
    )


@CASES(image(64))
def tv_resnet50(k: int) -> nn.Module:
    class Narrow(torchvision.models.ResNet):
        def __init__(self) -> None:
            self.k = k
            super().__init__(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)

        def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
            if planes == 64:  # the first stage; the stem is widened with it
                self.inplanes = 8 * self.k
                self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
                self.bn1 = nn.BatchNorm2d(self.inplanes)
            return super()._make_layer(block, planes // 8 * self.k, blocks, stride, dilate)

    net = Narrow()
    net.fc = nn.Linear(64 * k * 4, 10)
    return net


@CASES(image(64))
def timm_ghostnet(k: int) -> nn.Module:
    net = timm.create_model({1: "ghostnet_050", 2: "ghostnet_100", 3: "ghostnet_130"}[k], num_classes=10)
    wide = 640 * k  # 1280 at any width in timm
    net.conv_head, net.classifier = nn.Conv2d(net.conv_head.in_channels, wide, 1), nn.Linear(wide, 10)
    return net


@CASES(image(64))
def timm_res2net(k: int) -> nn.Module:
    from timm.models.res2net import Bottle2neck

    return resnet.ResNet(
        Bottle2neck,
        (1, 1, 1, 1),
        num_classes=10,
        channels=(8 * k, 16 * k, 16 * k, 32 * k),
        base_width=32,
        stem_width=8 * k,
        stem_type="deep",
        block_args={"scale": 4},
    )


# The stems of the next three have a number of channels of their own, as their code says.
@CASES(image(64), ambiguous=r"^stem\.0\..*:0|^stages\.0\.0\.conv\.weight:1")
def timm_starnet(k: int) -> nn.Module:
    from timm.models.starnet import StarNet

    return StarNet(base_dim=24 * k, depths=[1, 1, 1], num_classes=10)


@CASES(
    image(64),
    ambiguous=r"^stem\..*:0|^stem\.1\.conv\.weight:1|^blocks\.0\.stack\.conv1\.(conv|bn)_dw\.\w+:0|"
    r"^blocks\.0\.(shortcut|stack\.conv1)\.conv(_pw)?\.weight:1",
)
def timm_xception_aligned(k: int) -> nn.Module:
    from timm.models.xception_aligned import XceptionAligned

    exit_flow = {"no_skip": True, "start_with_relu": False}
    blocks = [
        {"in_chs": 64, "out_chs": 96 * k, "stride": 2},
        {"in_chs": 96 * k, "out_chs": 96 * k, "stride": 1},
        {"in_chs": 96 * k, "out_chs": (96 * k, 120 * k, 120 * k), "stride": 1, **exit_flow},
    ]
    return XceptionAligned(blocks, num_classes=10)


# The second convolution and the head have numbers of their own.
@CASES(
    image(64),
    ambiguous=r"^conv2\.weight:0|^bn2\.\w+:0|^layer1\.0\.(conv1|downsample\.0)\.weight:1|"
    r"^(incre|downsamp)_modules\..*\.\w+:0|^incre_modules\.\d\.0\.conv[23]\.weight:1|"
    r"^downsamp_modules\.\d\.0\.weight:1|^final_layer\.[01]\.\w+:0|^final_layer\.0\.weight:1|"
    r"^classifier\.weight:1",
)
def timm_hrnet(k: int) -> nn.Module:
    from timm.models.hrnet import HighResolutionNet

    def stage(count: int, kind: str, *channels: int) -> dict[str, object]:
        return {
            "num_modules": 1,
            "num_branches": count,
            "block_type": kind,
            "num_blocks": (2,) * count,
            "num_channels": channels,
            "fuse_method": "SUM",
        }

    config = {"stem_width": 64 * k, "stage1": stage(1, "BOTTLENECK", 32 * k)}
    for number, count in ((2, 2), (3, 3), (4, 4)):
        config[f"stage{number}"] = stage(count, "BASIC", *[18 * k * 2**branch for branch in range(count)])
    return HighResolutionNet(config, num_classes=10)


# The gates are rounded to multiples of 8; both axes that one model cannot tell are those of one size.
@CASES(image(64))
def timm_repvit(k: int) -> nn.Module:
    from timm.models.repvit import RepVit

    return RepVit(embed_dim=(48 * k, 96 * k), depth=(2, 2), num_classes=10)


@CASES(image(224), ambiguous=r"token_mixer\.(qkv\.\w+:0|proj\.weight:1|attention_biases:0)")
def timm_efficientformer(k: int) -> nn.Module:
    from timm.models.efficientformer import EfficientFormer

    return EfficientFormer(
        depths=(1, 1, 1, 2), embed_dims=(16 * k, 24 * k, 32 * k, 48 * k), num_vit=1, num_classes=10
    )


@CASES(keywords(pixel_values=lambda: randn(2, 3, 32, 32)))
def cvt(k: int) -> nn.Module:
    return hf.CvtForImageClassification(
        hf.CvtConfig(
            embed_dim=[8 * k, 16 * k, 24 * k],
            num_heads=[1, 2, 3],
            depth=[1, 2, 3],
            patch_sizes=[3, 3, 3],
            num_labels=10,
        )
    )


@CASES(tokens(use_cache=False))
def dbrx(k: int) -> nn.Module:
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=16 * k,
            n_heads=2 * k,
            n_layers=1,
            max_seq_len=32,
            vocab_size=96,
            attn_config={"kv_n_heads": k, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={
                "ffn_hidden_size": 24 * k,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 16 * k,
            },
        )
    )
