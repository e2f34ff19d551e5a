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
