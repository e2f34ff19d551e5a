"""More plain PyTorch that was written down before the inference had seen any of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import LENGTH, VOCAB, Cases, normal, randint, randn, tokens

CASES = Cases()


class Mega(nn.Module):
    """A moving average by FFT, and attention of one head that is cut out of one wide projection."""

    def __init__(self, d: int, head: int, value: int, states: int = 3) -> None:
        super().__init__()
        self.sizes = (d, head, value, d)
        self.embed, self.norm, self.out = nn.Embedding(VOCAB, d), nn.LayerNorm(d), nn.Linear(d, VOCAB)
        self.decay, self.mix = (nn.Parameter(torch.randn(d, states)) for _ in "ab")
        self.value, self.project = nn.Linear(d, value), nn.Linear(d, sum(self.sizes))
        self.back = nn.Linear(value, d, bias=False)
        self.scale, self.shift = nn.Parameter(torch.ones(2, head)), nn.Parameter(torch.zeros(2, head))
        self.near = nn.Parameter(torch.zeros(2 * LENGTH - 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        place = torch.arange(x.shape[1])
        kernel = torch.einsum("dnl,dn->dl", self.decay.sigmoid()[..., None] ** place, self.mix)
        spectrum = torch.fft.rfft(kernel, n=2 * len(place)) * torch.fft.rfft(x.mT, n=2 * len(place))
        mean = F.silu(torch.fft.irfft(spectrum, n=2 * len(place))[..., : len(place)].mT)
        update, head, gate, rest = self.project(mean).split(self.sizes, -1)
        q, k = (F.silu(head).unsqueeze(2) * self.scale + self.shift).unbind(2)
        scores = q @ k.mT / len(place) + self.near[place - place[:, None] + len(place) - 1]
        y = F.silu(rest + self.back(scores.softmax(-1) @ F.silu(self.value(x)) * F.silu(gate)))
        return self.out(self.norm(x + update.sigmoid() * (y - x)))


@CASES(tokens())
def mega(k: int) -> nn.Module:
    return Mega(16 * k, 10 * k, 24 * k)


class DirectionalMessages(nn.Module):
    """Messages along bonds and angles; distances are expanded in sines of learned frequencies."""

    def __init__(self, d: int, basis: int, waves: int = 6) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, waves + 1.0))
        self.atoms, self.enter = nn.Embedding(10, d), nn.Linear(3 * d, d)
        self.radial, self.gate = (nn.Linear(waves, d, bias=False) for _ in "rg")
        self.angular = nn.Linear(3 * waves, basis, bias=False)
        self.bilinear = nn.Parameter(torch.randn(d, basis, d) / d)
        self.near, self.far, self.update, self.out = (nn.Linear(d, n) for n in (d, d, d, 1))

    def forward(self, atoms: Tensor, places: Tensor, bonds: Tensor, angles: Tensor) -> Tensor:
        (i, j), (one, two) = bonds, angles
        arrow = places[i] - places[j]
        length = arrow.norm(dim=-1, keepdim=True) + 1
        waves = (self.frequencies * length).sin() / length
        h = self.atoms(atoms)
        message = F.silu(self.enter(torch.cat([h[i], h[j], self.radial(waves)], -1)))
        cosine = (arrow[one] * arrow[two]).sum(-1) / (length[one] * length[two])[:, 0]
        turns = torch.stack([torch.ones_like(cosine), cosine, 2 * cosine**2 - 1], -1)
        angular = self.angular((waves[one][:, :, None] * turns[:, None]).flatten(1))
        sent = F.silu(self.far(message)) * self.gate(waves)
        mixed = torch.einsum("tb,tj,ibj->ti", angular, sent[one], self.bilinear)
        message = message + self.update(F.silu(self.near(message)).index_add(0, two, mixed))
        return self.out(torch.zeros(len(atoms), message.shape[1]).index_add(0, i, message)).sum()


@CASES(
    lambda: (
        (randint(10, 7), randn(7, 3), randint(7, 2, 9), randint(9, 2, 12)),
        {},
    ),
    r"frequencies:0|(radial|gate|angular)\.weight:1",
)
def directional_messages(k: int) -> nn.Module:
    return DirectionalMessages(20 * k, 4 * k)


class PlaneField(nn.Module):
    """A radiance field on three planes of features; the first output is density, colors read the rest."""

    def __init__(self, features: int, width: int, deep: int) -> None:
        super().__init__()
        self.planes = nn.Parameter(torch.randn(3, features, 9, 9))
        self.density = nn.Sequential(nn.Linear(3 + features, width), nn.ReLU(), nn.Linear(width, 1 + deep))
        self.color = nn.Sequential(nn.Linear(deep + 3, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, points: Tensor, view: Tensor) -> Tensor:
        flat = points.flatten(0, 1)
        pairs = torch.stack([flat[:, [0, 1]], flat[:, [0, 2]], flat[:, [1, 2]]])[:, :, None]
        features = F.grid_sample(self.planes, pairs, align_corners=True)[..., 0].sum(0).t()
        h = self.density(torch.cat([flat, features], -1)).unflatten(0, points.shape[:2])
        color = self.color(torch.cat([h[..., 1:], view[:, None].expand_as(points)], -1)).sigmoid()
        clear = torch.exp(-F.softplus(h[..., 0]))
        passed = torch.cumprod(torch.cat([torch.ones_like(clear[:, :1]), clear[:, :-1]], -1), -1)
        return ((passed * (1 - clear))[..., None] * color).sum(1)


@CASES(lambda: ((randn(4, 6, 3).tanh(), randn(4, 3, seed=1)), {}))
def plane_field(k: int) -> nn.Module:
    return PlaneField(8 * k, 26 * k, 14 * k)


class SplineFlow(nn.Module):
    """Masked layers write, for each number of the data, the bins of a monotone spline."""

    def __init__(self, width: int, data: int = 4, bins: int = 5) -> None:
        super().__init__()
        self.data, self.bins = data, bins
        self.first, self.second = nn.Linear(data, width), nn.Linear(width, width)
        self.last = nn.Linear(width, data * 2 * bins)
        inputs, hidden = torch.arange(1, data + 1), torch.arange(width) % (data - 1) + 1
        outputs = inputs.repeat_interleave(2 * bins)
        self.register_buffer("enter", (hidden[:, None] >= inputs).float())
        self.register_buffer("middle", (hidden[:, None] >= hidden).float())
        self.register_buffer("leave", (outputs[:, None] > hidden).float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, self.first.weight * self.enter, self.first.bias).relu()
        h = F.linear(h, self.second.weight * self.middle, self.second.bias).relu()
        h = F.linear(h, self.last.weight * self.leave, self.last.bias)
        wide, high = h.view(-1, self.data, 2 * self.bins).split(self.bins, -1)
        wide, high = wide.softmax(-1), high.softmax(-1)
        left, below = (F.pad(t.cumsum(-1), (1, 0)) for t in (wide, high))
        at = x.sigmoid()
        bin_ = torch.searchsorted(left.detach(), at[..., None].detach()).sub(1).clamp(0, self.bins - 1)
        left, below, wide, high = (t.gather(-1, bin_)[..., 0] for t in (left, below, wide, high))
        return below + (at - left) / wide * high, (high / wide).log().sum(-1)


@CASES(normal(3, 4))
def spline_flow(k: int) -> nn.Module:
    return SplineFlow(20 * k)


class Adapters(nn.Module):
    """A frozen-like block with a low-rank update of the queries and of a layer between two widths."""

    def __init__(self, d: int, heads: int, rank: int = 6) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(VOCAB, d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.low = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, 2 * d, bias=False))
        self.a, self.b = nn.Parameter(torch.randn(rank, 2 * d)), nn.Parameter(torch.zeros(d, rank))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.gelu(self.up(x) + self.low(x))
        return self.head(x + self.down(h) + h @ self.a.t() @ self.b.t())


@CASES(tokens())
def adapters(k: int) -> nn.Module:
    return Adapters(32 * k, 4 * k)


class Modulated(nn.Module):
    """A generator whose kernels are scaled for each sample, as a convolution with one group a sample."""

    def __init__(self, width: int, channels: int, latent: int = 8) -> None:
        super().__init__()
        self.style = nn.Sequential(nn.Linear(latent, width), nn.LeakyReLU(0.2), nn.Linear(width, width))
        self.start = nn.Parameter(torch.randn(1, channels, 4, 4))
        self.scales = nn.ModuleList(nn.Linear(width, channels) for _ in range(2))
        shapes = (channels, channels, 3, 3), (3, channels, 1, 1)
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(s) / math.prod(s[1:])) for s in shapes)
        self.bias = nn.Parameter(torch.zeros(3))

    def convolve(self, x: Tensor, style: Tensor, layer: int) -> Tensor:
        batch, kernel = len(x), self.kernels[layer]
        scaled = kernel * (1 + self.scales[layer](style))[:, None, :, None, None]
        scaled = scaled * (scaled.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, -1, *x.shape[2:])
        return F.conv2d(x, scaled.flatten(0, 1), padding="same", groups=batch).unflatten(1, (batch, -1))[0]

    def forward(self, z: Tensor) -> Tensor:
        style = self.style(F.normalize(z))
        x = F.leaky_relu(self.convolve(self.start.expand(len(z), -1, -1, -1), style, 0), 0.2)
        return self.convolve(x, style, 1) + self.bias[:, None, None]


@CASES(normal(2, 8))
def modulated_convolutions(k: int) -> nn.Module:
    return Modulated(24 * k, 16 * k)


class SpeechPooling(nn.Module):
    """A spectrogram by short-time transform, and clusters of frames that a readout sees flattened."""

    def __init__(self, d: int, mels: int = 12, clusters: int = 4) -> None:
        super().__init__()
        self.register_buffer("filters", torch.rand(mels, 33))
        self.register_buffer("window", torch.hann_window(64))
        self.enter, self.assign = nn.Conv1d(mels, d, 3, padding=1), nn.Linear(d, clusters)
        self.mix, self.readout = nn.Linear(d, d), nn.Linear(clusters * d, 5)

    def forward(self, wave: Tensor) -> Tensor:
        power = torch.stft(wave, 64, 16, window=self.window, return_complex=True).abs().square()
        x = F.gelu(self.enter((self.filters @ power).clamp(min=1e-6).log())).mT
        x = x + F.gelu(self.mix(x))
        return self.readout((self.assign(x).softmax(-1).mT @ x).flatten(1))


@CASES(normal(2, 320), r"assign\.(weight|bias):0")
def speech_pooling(k: int) -> nn.Module:
    return SpeechPooling(24 * k)
