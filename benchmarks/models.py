"""Small models that the benchmarks share: MLP, CNNs, ResNet, GPT, ViT, LSTM."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and a feed-forward network; heads of fixed size, so their number grows."""

    def __init__(self, width: int, head: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = width // head, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder; logits for every token.

    Args:
        width: Size of a token's vector.
        layers: Number of blocks.
        vocabulary: Number of tokens.
        length: Longest sequence.
        head: Size of a head.
        tied: Whether the readout is the table of tokens.
        spread: Standard deviation of the tables' entries; None leaves PyTorch's, 1.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        vocabulary: int,
        length: int,
        head: int,
        tied: bool = False,
        spread: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, head) for _ in range(layers)])
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if spread is not None:
            for table in (self.tokens, self.positions):
                nn.init.normal_(table.weight, std=spread)
        if tied:
            self.readout.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.readout(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """A vision transformer: patches, learned positions, blocks, the mean over patches, a head."""

    def __init__(self, width: int, layers: int, size: int, patch: int, head: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.1 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, head, causal=False) for _ in range(layers)])
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.readout(self.norm(self.blocks(x)).mean(1))


class CharacterLSTM(nn.Module):
    """One LSTM between an embedding and a readout; logits for every token."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(vocabulary, width), nn.LSTM(width, width, batch_first=True)
        self.readout = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(self.lstm(self.tokens(ids))[0])


def mlp(width: int, inputs: int = 784, outputs: int = 10) -> nn.Module:
    """Three weight layers on flat inputs."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def plain_cnn(width: int) -> nn.Module:
    """Two strided convolutions and a head; width is the number of channels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


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


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a 1 x 1 convolution, or beside the input itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet(width: int) -> nn.Module:
    """A strided stem, one residual block with ``width`` channels, one with twice as many, a head."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Residual(width, width, 1), Residual(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip
