"""Torch only: recurrent, attention, convolutional and state-space models of sequences, and speech."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import LENGTH, VOCAB, Cases, normal, randint, randn, tokens

CASES = Cases()


class WaveNet(nn.Module):
    """Gated dilated convolutions with residual and skip paths."""

    def __init__(self, c: int, skip: int):
        super().__init__()
        self.front = nn.Conv1d(1, c, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=2**i) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(c, skip, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.front(x), 0
        for i, (dilated, residual, skip) in enumerate(
            zip(self.dilated, self.residual, self.skip, strict=True)
        ):
            a, b = dilated(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = a.tanh() * b.sigmoid()
            total = total + skip(h)
            x = x + residual(h)
        return self.end(total)


@CASES(normal(2, 1, 20))
def wavenet(k: int) -> nn.Module:
    return WaveNet(8 * k, 12 * k)


class TCN(nn.Module):
    """Causal residual convolutions on embedded tokens."""

    def __init__(self, d: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(n, 2 * d, 3, padding=2), nn.ReLU(), nn.Dropout(0.1), nn.Conv1d(2 * d, 2 * d, 1)
            )
            for n in (d, 2 * d)
        )
        self.shortcut = nn.Conv1d(d, 2 * d, 1)
        self.head = nn.Linear(2 * d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = F.relu(self.shortcut(x) + self.blocks[0](x)[..., : x.shape[-1]])
        x = F.relu(x + self.blocks[1](x)[..., : x.shape[-1]])
        return self.head(x.transpose(1, 2))


@CASES(tokens())
def tcn(k: int) -> nn.Module:
    return TCN(8 * k)


class Conformer(nn.Module):
    """Macaron feed-forward, relative attention and a gated depthwise convolution; subsampled filterbanks."""

    def __init__(self, heads: int, head_dim: int = 8, mels: int = 20):
        super().__init__()
        d = heads * head_dim
        self.heads = heads
        self.sub = nn.Sequential(nn.Conv2d(1, d, 3, 2), nn.ReLU(), nn.Conv2d(d, d, 3, 2), nn.ReLU())
        self.project = nn.Linear(d * (((mels - 1) // 2 - 1) // 2), d)
        self.ff1, self.ff2 = (
            nn.Sequential(
                nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.SiLU(), nn.Dropout(0.1), nn.Linear(4 * d, d)
            )
            for _ in range(2)
        )
        self.norm_att, self.norm_conv, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.pos = nn.Linear(d, d, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.zeros(heads, head_dim)) for _ in range(2))
        self.point1, self.depth = nn.Conv1d(d, 2 * d, 1), nn.Conv1d(d, d, 7, padding=3, groups=d)
        self.batch_norm, self.point2 = nn.BatchNorm1d(d), nn.Conv1d(d, d, 1)
        self.head = nn.Linear(d, 30)

    def positions(self, length: int, d: int) -> Tensor:
        at = torch.arange(length - 1, -length, -1.0)[:, None]
        rate = torch.exp(torch.arange(0, d, 2) * -(math.log(10000.0) / d))
        return torch.stack([torch.sin(at * rate), torch.cos(at * rate)], -1).flatten(1)

    def attend(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1) for f in (self.q, self.k, self.v))
        p = self.pos(self.positions(n, d)).view(-1, self.heads, d // self.heads)
        content = torch.einsum("bihd,bjhd->bhij", q + self.pos_bias_u, k)
        position = torch.einsum("bihd,jhd->bhij", q + self.pos_bias_v, p)
        position = (
            F.pad(position, (1, 0)).view(b, self.heads, -1, n)[:, :, 1:].reshape(b, self.heads, n, 2 * n - 1)
        )
        weights = ((content + position[..., :n]) / math.sqrt(d // self.heads)).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, d))

    def forward(self, x: Tensor) -> Tensor:
        x = self.sub(x.unsqueeze(1))
        b, c, t, f = x.shape
        x = self.project(x.transpose(1, 2).contiguous().view(b, t, c * f))
        x = x + 0.5 * self.ff1(x)
        x = x + self.attend(self.norm_att(x))
        h = F.glu(self.point1(self.norm_conv(x).transpose(1, 2)), 1)
        x = x + self.point2(F.silu(self.batch_norm(self.depth(h)))).transpose(1, 2)
        return self.head(self.norm_out(x + 0.5 * self.ff2(x))).log_softmax(-1)


@CASES(normal(2, 24, 20))
def conformer(k: int) -> nn.Module:
    return Conformer(2 * k)


class ConvTasNet(nn.Module):
    """Learned encoder and decoder around masks for two speakers."""

    def __init__(self, n: int, bottleneck: int, hidden: int, speakers: int = 2):
        super().__init__()
        self.speakers = speakers
        self.encoder = nn.Conv1d(1, n, 16, 8, bias=False)
        self.norm, self.enter = nn.GroupNorm(1, n), nn.Conv1d(n, bottleneck, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(bottleneck, hidden, 1),
                nn.PReLU(),
                nn.GroupNorm(1, hidden),
                nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i, groups=hidden),
                nn.PReLU(),
                nn.GroupNorm(1, hidden),
                nn.Conv1d(hidden, bottleneck, 1),
            )
            for i in range(2)
        )
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(bottleneck, speakers * n, 1))
        self.decoder = nn.ConvTranspose1d(n, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        h = self.enter(self.norm(code))
        for block in self.blocks:
            h = h + block(h)
        b, n, t = code.shape
        masks = self.masks(h).view(b, self.speakers, n, t).sigmoid()
        masked = masks * code.unsqueeze(1)
        return self.decoder(masked.view(b * self.speakers, n, t)).view(b, self.speakers, -1)


@CASES(normal(2, 1, 80))
def conv_tasnet(k: int) -> nn.Module:
    return ConvTasNet(16 * k, 8 * k, 24 * k)


class S4D(nn.Module):
    """Diagonal state space as a long convolution by FFT; complex states, whose number is fixed."""

    def __init__(self, d: int, states: int = 4):
        super().__init__()
        self.enter = nn.Linear(3, d)
        self.log_dt = nn.Parameter(torch.rand(d))
        self.c = nn.Parameter(torch.randn(d, states, dtype=torch.cfloat))
        self.log_a_real = nn.Parameter(torch.zeros(d, states))
        self.a_imag = nn.Parameter(math.pi * torch.arange(states).repeat(d, 1).float())
        self.skip = nn.Parameter(torch.randn(d))
        self.out = nn.Sequential(nn.Conv1d(d, 2 * d, 1), nn.GLU(dim=-2))
        self.head = nn.Linear(d, 5)

    def kernel(self, length: int) -> Tensor:
        dt = self.log_dt.exp()
        a = -self.log_a_real.exp() + 1j * self.a_imag
        dt_a = a * dt.unsqueeze(-1)
        powers = dt_a.unsqueeze(-1) * torch.arange(length)
        c = self.c * (torch.exp(dt_a) - 1.0) / a
        return 2 * torch.einsum("hn,hnl->hl", c, torch.exp(powers)).real

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x).transpose(1, 2)
        n = u.shape[-1]
        k_f = torch.fft.rfft(self.kernel(n), n=2 * n)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * k_f, n=2 * n)[..., :n]
        y = F.gelu(y + u * self.skip.unsqueeze(-1))
        return self.head(self.out(y).transpose(1, 2).mean(1))


@CASES(normal(2, 10, 3))
def s4d(k: int) -> nn.Module:
    return S4D(8 * k)


class MambaBlock(nn.Module):
    """Selective scan: input-dependent steps, states of fixed number, a low rank that grows."""

    def __init__(self, d: int, rank: int, states: int = 4):
        super().__init__()
        inner = 2 * d
        self.rank, self.states = rank, states
        self.norm = nn.RMSNorm(d)
        self.into = nn.Linear(d, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).repeat(inner, 1).log())
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.into(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, b, c = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -self.a_log.exp())
        drive = dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        h, ys = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            ys.append(torch.einsum("bds,bs->bd", h, c[:, t]))
        y = torch.stack(ys, 1) + u * self.skip
        return x + self.out(y * F.silu(z))


class MambaLM(nn.Module):
    def __init__(self, d: int, rank: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.blocks = nn.Sequential(MambaBlock(d, rank), MambaBlock(d, rank))
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


@CASES(lambda: ((randint(VOCAB, 2, 5),), {}))
def mamba_scan(k: int) -> nn.Module:
    return MambaLM(8 * k, 2 * k)


class LRU(nn.Module):
    """Linear recurrent unit: complex diagonal recurrence whose state is a width."""

    def __init__(self, d: int, states: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.nu, self.theta = nn.Parameter(torch.rand(states)), nn.Parameter(torch.rand(states))
        self.b = nn.Parameter(torch.randn(states, d, dtype=torch.cfloat) / d**0.5)
        self.c = nn.Parameter(torch.randn(d, states, dtype=torch.cfloat) / states**0.5)
        self.d = nn.Parameter(torch.randn(d))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        u = self.embed(ids)
        decay = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        drive = u.to(self.b.dtype) @ self.b.T
        h, ys = torch.zeros_like(drive[:, 0]), []
        for t in range(u.shape[1]):
            h = decay * h + drive[:, t]
            ys.append((h @ self.c.T).real)
        return self.head(F.gelu(torch.stack(ys, 1) + self.d * u))


@CASES(lambda: ((randint(VOCAB, 2, 5),), {}))
def linear_recurrent_unit(k: int) -> nn.Module:
    return LRU(8 * k, 12 * k)


class Seq2Seq(nn.Module):
    """Bidirectional GRU encoder, attention of Bahdanau, GRU-cell decoder."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, d), nn.Embedding(VOCAB, d)
        self.encoder = nn.GRU(d, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.query, self.key = nn.Linear(hidden, hidden, bias=False), nn.Linear(2 * hidden, hidden)
        self.energy = nn.Linear(hidden, 1, bias=False)
        self.cell = nn.GRUCell(d + 2 * hidden, hidden)
        self.head = nn.Linear(3 * hidden, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.source(source))
        h = torch.tanh(self.bridge(torch.cat([last[0], last[1]], -1)))
        keys, words, outputs = self.key(memory), self.target(target), []
        for t in range(target.shape[1]):
            scores = self.energy(torch.tanh(self.query(h).unsqueeze(1) + keys)).squeeze(-1)
            context = torch.bmm(scores.softmax(-1).unsqueeze(1), memory).squeeze(1)
            h = self.cell(torch.cat([words[:, t], context], -1), h)
            outputs.append(self.head(torch.cat([h, context], -1)))
        return torch.stack(outputs, 1)


@CASES(lambda: ((randint(VOCAB, 2, 7), randint(VOCAB, 2, 5, seed=1)), {}))
def seq2seq(k: int) -> nn.Module:
    return Seq2Seq(8 * k, 12 * k)


class HandLSTM(nn.Module):
    """LSTM written with raw parameters and sliced gates; peepholes."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(VOCAB, d)
        self.w = nn.Parameter(torch.randn(d, 4 * hidden) * 0.1)
        self.u = nn.Parameter(torch.randn(hidden, 4 * hidden) * 0.1)
        self.b, self.peep = nn.Parameter(torch.zeros(4 * hidden)), nn.Parameter(torch.zeros(3, hidden))
        self.head = nn.Linear(hidden, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x, n = self.embed(ids), self.hidden
        h = c = x.new_zeros(x.shape[0], n)
        outputs = []
        for t in range(x.shape[1]):
            g = x[:, t] @ self.w + h @ self.u + self.b
            i = torch.sigmoid(g[:, :n] + self.peep[0] * c)
            f = torch.sigmoid(g[:, n : 2 * n] + self.peep[1] * c)
            c = f * c + i * torch.tanh(g[:, 2 * n : 3 * n])
            h = torch.sigmoid(g[:, 3 * n :] + self.peep[2] * c) * torch.tanh(c)
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))


@CASES(lambda: ((randint(VOCAB, 2, 4),), {}))
def hand_lstm(k: int) -> nn.Module:
    return HandLSTM(8 * k, 12 * k)


class ELMo(nn.Module):
    """Characters by convolutions of several kernels, highway, projected LSTM, scalar mix of layers."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.chars = nn.Embedding(30, 4)
        self.convs = nn.ModuleList(nn.Conv1d(4, d, n) for n in (1, 2, 3))
        self.highway = nn.Linear(3 * d, 6 * d)
        self.project = nn.Linear(3 * d, d)
        self.lstms = nn.ModuleList(nn.LSTM(d, hidden, proj_size=d, batch_first=True) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(d, 9)

    def forward(self, ids: Tensor) -> Tensor:
        b, n, c = ids.shape
        x = self.chars(ids.view(b * n, c)).transpose(1, 2)
        x = torch.cat([conv(x).max(-1).values for conv in self.convs], -1)
        gate, value = self.highway(x).chunk(2, -1)
        x = torch.sigmoid(gate) * torch.relu(value) + (1 - torch.sigmoid(gate)) * x
        layers = [self.project(x).view(b, n, -1)]
        for lstm in self.lstms:
            layers.append(lstm(layers[-1])[0] + layers[-1])
        weights = self.mix.softmax(0)
        return self.head(sum(w * layer for w, layer in zip(weights, layers, strict=True)))


@CASES(lambda: ((randint(30, 2, 5, 6),), {}), ambiguous=r"chars\.weight:1|convs\.\d\.weight:1")
def char_lstm(k: int) -> nn.Module:
    return ELMo(8 * k, 12 * k)


class Perceiver(nn.Module):
    """A fixed number of latents reads the input by cross-attention; learned queries decode."""

    def __init__(self, heads: int, head_dim: int = 8, latents: int = 6):
        super().__init__()
        d = heads * head_dim
        self.embed = nn.Linear(5, d)
        self.latents = nn.Parameter(torch.randn(latents, d))
        self.queries = nn.Parameter(torch.randn(3, d))
        self.read, self.think, self.answer = (
            nn.MultiheadAttention(d, heads, batch_first=True) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        z = self.latents.expand(len(x), -1, -1)
        z = z + self.read(self.norms[0](z), x, x, need_weights=False)[0]
        y = self.norms[1](z)
        z = z + self.think(y, y, y)[0]
        z = z + self.mlp(self.norms[2](z))
        q = self.queries.unsqueeze(0).repeat(len(x), 1, 1)
        return self.head(self.answer(q, z, z, need_weights=False)[0])


@CASES(normal(2, 9, 5))
def perceiver(k: int) -> nn.Module:
    return Perceiver(2 * k)


class SetTransformer(nn.Module):
    """Induced set attention and pooling by a seed vector; heads by chunk and cat along the batch."""

    def __init__(self, heads: int, head_dim: int = 8):
        super().__init__()
        self.heads = heads
        d = heads * head_dim
        self.enter = nn.Linear(3, d)
        self.inducing, self.seed = nn.Parameter(torch.randn(1, 5, d)), nn.Parameter(torch.randn(1, 1, d))
        self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(d, d) for _ in range(3)) for _ in range(4))
        self.head = nn.Linear(d, 2)

    def mab(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q[i](x), self.k[i](y), self.v[i](y)
        n = q.shape[-1] // self.heads
        q_, k_, v_ = (torch.cat(t.split(n, 2), 0) for t in (q, k, v))
        a = (q_ @ k_.transpose(1, 2) / math.sqrt(n)).softmax(2)
        o = torch.cat((q_ + a @ v_).split(x.shape[0], 0), 2)
        return o + F.relu(self.o[i](o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        h = self.mab(0, self.inducing.repeat(len(x), 1, 1), x)
        x = self.mab(1, x, h)
        return self.head(self.mab(2, self.seed.repeat(len(x), 1, 1), x).squeeze(1))


@CASES(normal(2, 9, 3))
def set_transformer(k: int) -> nn.Module:
    return SetTransformer(2 * k)


@CASES(lambda: ((randn(2, 7, 6), randn(2, 5, 6, seed=1)), {}))
def torch_transformer(k: int) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            d = 16 * k
            self.source, self.target, self.head = nn.Linear(6, d), nn.Linear(6, d), nn.Linear(d, 3)
            self.core = nn.Transformer(d, 2 * k, 1, 1, 3 * d, batch_first=True)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.head(self.core(self.source(source), self.target(target), tgt_mask=mask))

    return Wrapped()


class LinearAttention(nn.Module):
    """Kernelized causal attention with rotary positions, a gated linear unit and decay per head."""

    def __init__(self, heads: int, head_dim: int = 8):
        super().__init__()
        d = heads * head_dim
        self.heads = heads
        self.embed = nn.Embedding(VOCAB, d)
        self.qkv, self.gate, self.out = (
            nn.Linear(d, 3 * d, False),
            nn.Linear(d, d, False),
            nn.Linear(d, d, False),
        )
        self.decay = nn.Parameter(torch.zeros(heads))
        self.norm = nn.LayerNorm(head_dim)
        self.head = nn.Linear(d, VOCAB)

    def rotate(self, x: Tensor) -> Tensor:
        n, half = x.shape[-2], x.shape[-1] // 2
        angle = torch.arange(n)[:, None] * 10000 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.rotate(F.elu(q) + 1), self.rotate(F.elu(k) + 1)
        distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        decay = torch.sigmoid(self.decay)[:, None, None] ** distance
        y = self.norm(((q @ k.mT) * decay.tril()) @ v)
        y = y.transpose(1, 2).flatten(2) * F.silu(self.gate(x))
        return self.head(x + self.out(y))


@CASES(tokens())
def retention(k: int) -> nn.Module:
    return LinearAttention(2 * k)


class GMLP(nn.Module):
    """Spatial gating: a token-mixing matrix of fixed size acts on half of the channels."""

    def __init__(self, d: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 6 * d), nn.Linear(3 * d, d)
        self.gate_norm, self.spatial = nn.LayerNorm(3 * d), nn.Conv1d(LENGTH, LENGTH, 1)
        self.head = nn.Linear(d, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        x = x + self.down(u * self.spatial(self.gate_norm(v)))
        return self.head(x.mean(1))


@CASES(tokens())
def gmlp(k: int) -> nn.Module:
    return GMLP(8 * k)


class RWKV(nn.Module):
    """Time shift with learned mixing, and the wkv recurrence."""

    def __init__(self, d: int):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Embedding(VOCAB, d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mix = nn.ParameterDict(
            {n: nn.Parameter(torch.rand(1, 1, d)) for n in ("k", "v", "r", "ck", "cr")}
        )
        self.decay, self.first = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.key, self.value, self.receptance, self.output = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.c_key, self.c_value = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        self.c_receptance = nn.Linear(d, d, bias=False)
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.head = nn.Linear(d, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm1(x)
        past = self.shift(h)
        k, v, r = (h * self.mix[n] + past * (1 - self.mix[n]) for n in ("k", "v", "r"))
        k, v, r = self.key(k), self.value(v), self.receptance(r).sigmoid()
        a = b = torch.zeros_like(k[:, 0])
        ys = []
        for t in range(k.shape[1]):
            e = (self.first + k[:, t]).exp()
            ys.append((a + e * v[:, t]) / (b + e))
            w = (-self.decay.exp()).exp()
            a, b = w * a + k[:, t].exp() * v[:, t], w * b + k[:, t].exp()
        x = x + self.output(r * torch.stack(ys, 1))
        h = self.norm2(x)
        past = self.shift(h)
        key = torch.relu(self.c_key(h * self.mix["ck"] + past * (1 - self.mix["ck"]))).square()
        gate = torch.sigmoid(self.c_receptance(h * self.mix["cr"] + past * (1 - self.mix["cr"])))
        return self.head(x + gate * self.c_value(key))


@CASES(lambda: ((randint(VOCAB, 2, 5),), {}))
def rwkv(k: int) -> nn.Module:
    return RWKV(8 * k)


class SparseMoE(nn.Module):
    """Top-2 routing to expert modules by index_add, with a shared expert."""

    def __init__(self, d: int, experts: int = 4):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.router = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 3 * d), nn.SiLU(), nn.Linear(3 * d, d)) for _ in range(experts)
        )
        self.shared = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.shared_gate, self.head = nn.Linear(d, 1), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            gate = (weights * (chosen == i)).sum(-1, keepdim=True)
            y = y + gate * expert(x)
        y = y + torch.sigmoid(self.shared_gate(x)) * self.shared(x)
        return self.head(x + y).unflatten(0, ids.shape)


@CASES(tokens())
def sparse_moe(k: int) -> nn.Module:
    return SparseMoE(8 * k)
