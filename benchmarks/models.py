"""Two small models that the benchmarks share: a GPT and a CNN."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward network; heads of fixed size, so their number grows."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder; logits for every token."""

    def __init__(self, width: int, layers: int, vocabulary: int, length: int, head: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, head) for _ in range(layers)])
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.readout(self.norm(self.blocks(x)))


def cnn(width: int) -> nn.Module:
    """Three convolutions, batch norm and a head on 28 x 28 images; ``width`` channels, then twice that."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in (
        (1, width, 5, 2),
        (width, 2 * width, 3, 2),
        (2 * width, 2 * width, 3, 1),
    ):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))
