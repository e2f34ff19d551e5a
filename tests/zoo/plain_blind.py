"""Plain PyTorch that was written down before the inference had seen any of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import VOCAB, Cases, image, normal, randint, randn

CASES = Cases()


class Glow(nn.Module):
    """One step of an invertible flow: its 1x1 convolution has a determinant, its channels are data."""

    def __init__(self, width: int, channels: int = 12) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (F.pixel_unshuffle(x, 2) + self.shift) * self.log_scale.exp()
        left, right = F.conv2d(x, self.mixing[:, :, None, None]).chunk(2, 1)
        log, shift = self.net(left).chunk(2, 1)
        return torch.cat([left, right * log.sigmoid() + shift], 1), self.mixing.slogdet()[1]


@CASES(image(8))
def glow(k: int) -> nn.Module:
    return Glow(16 * k)


class SlotAttention(nn.Module):
    """Slots compete for positions; a GRU cell updates them; a broadcast decoder mixes their pictures."""

    def __init__(self, d: int, slots: int = 5) -> None:
        super().__init__()
        self.slots = slots
        self.encoder, self.decoder = nn.Conv2d(3, d, 5, padding=2), nn.ConvTranspose2d(d, 4, 8)
        self.norm, self.mean, self.log_std = nn.LayerNorm(d), *(nn.Parameter(torch.zeros(d)) for _ in "ms")
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.cell, self.mlp = (
            nn.GRUCell(d, d),
            nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.encoder(x).flatten(2).mT)
        batch, _, d = x.shape
        slots = self.mean + self.log_std.exp() * torch.randn(batch, self.slots, d)
        for _ in range(2):
            attention = (self.k(x) @ self.q(slots).mT * d**-0.5).softmax(-1)
            updates = (attention / attention.sum(1, keepdim=True)).mT @ self.v(x)
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).view(batch, -1, d)
            slots = slots + self.mlp(slots)
        pictures = self.decoder(slots.flatten(0, 1)[:, :, None, None]).unflatten(0, (batch, self.slots))
        colors, mask = pictures.split([3, 1], 2)
        return (colors * mask.softmax(1)).sum(1)


@CASES(image(8))
def slot_attention(k: int) -> nn.Module:
    return SlotAttention(24 * k)


class NeuralCDE(nn.Module):
    """A layer writes a matrix [width, channels] that acts on the increments of the data."""

    def __init__(self, width: int, channels: int = 4) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.first, self.hidden = nn.Linear(channels, width), nn.Linear(width, 2 * width)
        self.field, self.head = nn.Linear(2 * width, width * channels), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = self.first(x[:, 0])
        for step in x.diff(dim=1).unbind(1):
            field = self.field(self.hidden(state).relu()).tanh().view(-1, self.width, self.channels)
            state = state + torch.einsum("bhc,bc->bh", field, step)
        return self.head(state)


@CASES(normal(2, 6, 4))
def neural_cde(k: int) -> nn.Module:
    return NeuralCDE(16 * k)


class Tagger(nn.Module):
    """Characters through a convolution, words through a GRU, tags through a linear-chain CRF."""

    def __init__(self, k: int, tags: int = 9) -> None:
        super().__init__()
        self.characters, self.words = nn.Embedding(40, 12 * k), nn.Embedding(VOCAB, 24 * k)
        self.convolution = nn.Conv1d(12 * k, 20 * k, 3, padding=1)
        self.rnn = nn.GRU(44 * k, 28 * k, 2, bidirectional=True, batch_first=True)
        self.emission, self.start = nn.Linear(56 * k, tags), nn.Parameter(torch.zeros(tags))
        self.transition = nn.Parameter(torch.zeros(tags, tags))

    def forward(self, words: Tensor, characters: Tensor) -> Tensor:
        spelled = self.characters(characters.flatten(0, 1)).mT
        spelled = self.convolution(spelled).amax(-1).unflatten(0, words.shape)
        emissions = self.emission(self.rnn(torch.cat([self.words(words), spelled], -1))[0])
        forward = self.start + emissions[:, 0]
        for emission in emissions[:, 1:].unbind(1):
            forward = torch.logsumexp(forward[:, :, None] + self.transition, 1) + emission
        return forward


@CASES(lambda: ((randint(VOCAB, 2, 6), randint(40, 2, 6, 5)), {}))
def crf_tagger(k: int) -> nn.Module:
    return Tagger(k)


class QuestionAnswering(nn.Module):
    """Attention over a picture by a question; both meet in a bilinear layer."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.picture, self.words = nn.Conv2d(3, 12 * k, 4, 4), nn.Embedding(VOCAB, 10 * k)
        self.rnn, self.project = nn.LSTM(10 * k, 16 * k, batch_first=True), nn.Linear(16 * k, 16 * k)
        self.attention, self.both = nn.Conv2d(28 * k, 1, 1), nn.Bilinear(12 * k, 16 * k, 14 * k)
        self.head = nn.Linear(14 * k, 11)

    def forward(self, picture: Tensor, question: Tensor) -> Tensor:
        seen = self.picture(picture).relu()
        asked = self.rnn(self.words(question))[1][0][-1]
        spread = self.project(asked)[:, :, None, None].expand(-1, -1, *seen.shape[2:])
        weights = self.attention(torch.cat([seen, spread], 1)).flatten(2).softmax(-1)
        return self.head(self.both((seen.flatten(2) * weights).sum(-1), asked).relu())


@CASES(lambda: ((randn(2, 3, 16, 16), randint(VOCAB, 2, 6)), {}))
def question_answering(k: int) -> nn.Module:
    return QuestionAnswering(k)


class TreeLSTM(nn.Module):
    """A balanced binary tree; a node's gates read both children side by side."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.table, self.leaf = nn.Embedding(VOCAB, 12 * h // 16), nn.Linear(12 * h // 16, 3 * h)
        self.node, self.forget = nn.Linear(2 * h, 3 * h), nn.Linear(h, h)
        self.head = nn.Linear(h, 3)

    def forward(self, ids: Tensor) -> Tensor:
        i, o, u = self.leaf(self.table(ids)).chunk(3, -1)
        c = i.sigmoid() * u.tanh()
        h = o.sigmoid() * c.tanh()
        while h.shape[1] > 1:
            left, right = h[:, 0::2], h[:, 1::2]
            i, o, u = self.node(torch.cat([left, right], -1)).chunk(3, -1)
            kept = self.forget(left).sigmoid() * c[:, 0::2] + self.forget(right).sigmoid() * c[:, 1::2]
            c = i.sigmoid() * u.tanh() + kept
            h = o.sigmoid() * c.tanh()
        return self.head(h[:, 0])


@CASES(lambda: ((randint(VOCAB, 2, 8),), {}))
def tree_lstm(k: int) -> nn.Module:
    return TreeLSTM(16 * k)


class ConvLSTM(nn.Module):
    """An LSTM whose products are convolutions, with a peephole for each channel and position."""

    def __init__(self, h: int, size: int = 8) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(1 + h, 4 * h, 3, padding=1), nn.Conv2d(h, 1, 1)
        self.peephole = nn.Parameter(torch.zeros(h, size, size))

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), *self.peephole.shape)
        for frame in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + (i + self.peephole * c).sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@CASES(normal(2, 3, 1, 8, 8))
def conv_lstm(k: int) -> nn.Module:
    return ConvLSTM(12 * k)
