"""Torch only: graph networks by scatter, recommendation, state-space duals, speech synthesis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import VOCAB, Cases, normal, randint, randn, tokens

CASES = Cases()


class EGNN(nn.Module):
    """Equivariant message passing: coordinates move, features pass through index_add."""

    def __init__(self, d: int):
        super().__init__()
        self.enter = nn.Linear(5, d)
        self.edge = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * d + 1, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU()) for _ in range(2)
        )
        self.coordinate = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1, bias=False)) for _ in range(2)
        )
        self.node = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Linear(d, d)) for _ in range(2)
        )
        self.head = nn.Linear(d, 1)

    def forward(self, h: Tensor, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        h, (i, j) = self.enter(h), edges
        for edge, coordinate, node in zip(self.edge, self.coordinate, self.node, strict=True):
            r = x[i] - x[j]
            m = edge(torch.cat([h[i], h[j], r.square().sum(-1, keepdim=True)], -1))
            x = x + torch.zeros_like(x).index_add(0, i, r * coordinate(m))
            total = torch.zeros(len(h), m.shape[-1]).scatter_add(0, i[:, None].expand_as(m), m)
            h = h + node(torch.cat([h, total], -1))
        return self.head(h).sum(0), x


@CASES(lambda: ((randn(7, 5), randn(7, 3), randint(7, 2, 12)), {}))
def egnn(k: int) -> nn.Module:
    return EGNN(8 * k)


class SchNetLike(nn.Module):
    """Continuous filters made from distances in a fixed radial basis."""

    def __init__(self, d: int, filters: int, basis: int = 10):
        super().__init__()
        self.atoms = nn.Embedding(10, d)
        self.register_buffer("centers", torch.linspace(0, 5, basis))
        self.filter = nn.Sequential(nn.Linear(basis, filters), nn.Softplus(), nn.Linear(filters, filters))
        self.into, self.out = nn.Linear(d, filters, bias=False), nn.Linear(filters, d)
        self.head = nn.Sequential(nn.Linear(d, d // 2), nn.Softplus(), nn.Linear(d // 2, 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h, distance = self.atoms(z), torch.cdist(x, x)
        w = self.filter(torch.exp(-10 * (distance.unsqueeze(-1) - self.centers) ** 2))
        h = h + self.out((self.into(h).unsqueeze(0) * w).sum(1))
        return self.head(h).sum()


@CASES(lambda: ((randint(10, 6), randn(6, 3)), {}))
def schnet_like(k: int) -> nn.Module:
    return SchNetLike(8 * k, 12 * k)


class DenseGCN(nn.Module):
    """Adjacency by matrix product, additive graph attention, differentiable pooling."""

    def __init__(self, heads: int, head_dim: int = 6, clusters: int = 3):
        super().__init__()
        d = heads * head_dim
        self.heads = heads
        self.w1, self.w2 = nn.Parameter(torch.randn(5, d)), nn.Linear(d, d, bias=False)
        self.a_left, self.a_right = (
            nn.Parameter(torch.randn(heads, head_dim)),
            nn.Parameter(torch.randn(heads, head_dim)),
        )
        self.assign, self.head = nn.Linear(d, clusters), nn.Linear(d, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(adjacency @ (x @ self.w1))
        h = self.w2(x).view(len(x), self.heads, -1)
        scores = F.leaky_relu((h * self.a_left).sum(-1)[:, None] + (h * self.a_right).sum(-1)[None])
        weights = scores.masked_fill(adjacency.unsqueeze(-1) == 0, -1e9).softmax(1)
        x = torch.einsum("ijh,jhd->ihd", weights, h).flatten(1)
        pooled = self.assign(x).softmax(-1).t() @ x
        return self.head(pooled.mean(0))


@CASES(lambda: ((randn(7, 5), (randn(7, 7) > 0).float()), {}))
def dense_gat(k: int) -> nn.Module:
    return DenseGCN(2 * k)


class DIN(nn.Module):
    """Deep interest network: candidate-aware pooling of the history by an activation unit."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.items, self.profile = nn.Embedding(40, d, padding_idx=0), nn.Embedding(9, d)
        self.unit = nn.Sequential(nn.Linear(4 * d, hidden), nn.PReLU(), nn.Linear(hidden, 1))
        self.mlp = nn.Sequential(nn.Linear(3 * d, hidden), nn.PReLU(hidden), nn.Linear(hidden, 2))

    def forward(self, history: Tensor, candidate: Tensor, user: Tensor) -> Tensor:
        h, c = self.items(history), self.items(candidate)
        q = c.unsqueeze(1).expand_as(h)
        w = self.unit(torch.cat([q, h, q - h, q * h], -1)) * (history != 0).unsqueeze(-1)
        return self.mlp(torch.cat([(w * h).sum(1), c, self.profile(user)], -1)).log_softmax(-1)


@CASES(lambda: ((randint(40, 3, 6), randint(40, 3), randint(9, 3)), {}))
def deep_interest(k: int) -> nn.Module:
    return DIN(8 * k, 12 * k)


class SASRec(nn.Module):
    """Self-attentive recommendation: scores are products with item embeddings, sampled by index."""

    def __init__(self, d: int, length: int = 6):
        super().__init__()
        self.items, self.positions = nn.Embedding(40, d), nn.Embedding(length, d)
        self.norm, self.attention = nn.LayerNorm(d), nn.MultiheadAttention(d, 1, batch_first=True)
        self.conv1, self.conv2 = nn.Conv1d(d, d, 1), nn.Conv1d(d, d, 1)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        n = history.shape[1]
        x = self.items(history) * self.items.embedding_dim**0.5 + self.positions(torch.arange(n))
        mask = ~torch.tril(torch.ones(n, n, dtype=torch.bool))
        x = x + self.attention(self.norm(x), x, x, attn_mask=mask)[0]
        x = x + self.conv2(F.relu(self.conv1(x.transpose(-1, -2)))).transpose(-1, -2)
        return self.items(candidates).matmul(x[:, -1].unsqueeze(-1)).squeeze(-1)


@CASES(lambda: ((randint(40, 3, 6), randint(40, 3, 5)), {}))
def sasrec(k: int) -> nn.Module:
    return SASRec(8 * k)


class XDeepFM(nn.Module):
    """Compressed interaction network: outer products over fields, mixed by 1x1 convolutions."""

    def __init__(self, d: int, maps: int, fields: int = 4):
        super().__init__()
        self.embed = nn.Embedding(30, d)
        self.conv1, self.conv2 = nn.Conv1d(fields * fields, maps, 1), nn.Conv1d(fields * maps, maps, 1)
        self.attention = nn.TransformerEncoderLayer(d, 1, 2 * d, batch_first=True)
        self.out, self.deep = nn.Linear(2 * maps, 1), nn.Linear(fields * d, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, f, d = x.shape
        h1 = self.conv1(torch.einsum("bfd,bgd->bfgd", x, x).reshape(b, f * f, d)).relu()
        h2 = self.conv2((x.unsqueeze(2) * h1.unsqueeze(1)).view(b, -1, d)).relu()
        return self.out(torch.cat([h1, h2], 1).sum(-1)) + self.deep(self.attention(x).flatten(1))


@CASES(lambda: ((randint(30, 3, 4),), {}))
def xdeepfm(k: int) -> nn.Module:
    return XDeepFM(8 * k, 6 * k)


class AutoRec(nn.Module):
    """Item autoencoder and matrix factorization with biases."""

    def __init__(self, d: int, items: int = 30):
        super().__init__()
        self.encode, self.decode = nn.Linear(items, d), nn.Linear(d, items)
        self.user, self.item = nn.Embedding(20, d), nn.Embedding(items, d)
        self.user_bias, self.item_bias = nn.Embedding(20, 1), nn.Embedding(items, 1)

    def forward(self, ratings: Tensor, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.sigmoid(self.encode(ratings))
        score = ((self.user(user) + code) * self.item(item)).sum(-1)
        return self.decode(code), score + (self.user_bias(user) + self.item_bias(item)).squeeze(-1)


@CASES(lambda: ((randn(3, 30), randint(20, 3), randint(30, 3)), {}))
def autorec(k: int) -> nn.Module:
    return AutoRec(8 * k)


class SSD(nn.Module):
    """Mamba-2: one input projection for all, scalar decay a head, a state shared by fixed groups."""

    def __init__(self, heads: int, head_dim: int = 4, states: int = 5, groups: int = 1):
        super().__init__()
        inner = heads * head_dim
        d = inner // 2
        self.sizes = [inner, inner + 2 * groups * states, heads]
        self.heads, self.states, self.inner = heads, states, inner
        self.embed, self.into = nn.Embedding(VOCAB, d), nn.Linear(d, sum(self.sizes), bias=False)
        channels = inner + 2 * groups * states
        self.conv = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
        self.dt_bias, self.a_log, self.d = (nn.Parameter(torch.rand(heads)) for _ in range(3))
        self.norm, self.out, self.head = (
            nn.RMSNorm(inner),
            nn.Linear(inner, d, bias=False),
            nn.Linear(d, VOCAB),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        z, xbc, dt = self.into(x).split(self.sizes, -1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., : ids.shape[1]].transpose(1, 2))
        u, b, c = xbc.split([self.inner, self.states, self.states], -1)
        u, dt = u.unflatten(-1, (self.heads, -1)), F.softplus(dt + self.dt_bias)
        decay = (dt * -self.a_log.exp()).cumsum(1)
        gap = decay.unsqueeze(2) - decay.unsqueeze(1)
        mask = torch.ones(gap.shape[1:3]).tril().bool()[..., None]
        kernel = torch.einsum("bis,bjs->bij", c, b).unsqueeze(-1) * gap.masked_fill(~mask, -torch.inf).exp()
        y = torch.einsum("bijh,bjh,bjhp->bihp", kernel, dt, u) + u * self.d[:, None]
        return self.head(x + self.out(self.norm(y.flatten(2) * F.silu(z))))


@CASES(tokens())
def mamba2_dual(k: int) -> nn.Module:
    return SSD(4 * k)


class H3(nn.Module):
    """Shift and diagonal state spaces gate each other; implicit long filters by a small network (Hyena)."""

    def __init__(self, d: int, bands: int = 3):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, d), nn.Linear(d, 3 * d)
        self.short = nn.Conv1d(3 * d, 3 * d, 3, padding=2, groups=3 * d)
        self.filter = nn.Sequential(nn.Linear(1 + 2 * bands, d), nn.GELU(), nn.Linear(d, d, bias=False))
        self.bands, self.rate, self.skip = bands, nn.Parameter(torch.rand(d)), nn.Parameter(torch.rand(d))
        self.out, self.head = nn.Linear(d, d), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x, n = self.embed(ids), ids.shape[1]
        q, k, v = self.short(self.qkv(x).transpose(1, 2))[..., :n].chunk(3, 1)
        t = torch.linspace(0, 1, n)[:, None]
        waves = t * torch.arange(1, self.bands + 1)
        h = self.filter(torch.cat([t, waves.sin(), waves.cos()], -1)) * torch.exp(-t * self.rate.abs())
        kv = k * v
        y = torch.fft.irfft(torch.fft.rfft(kv, n=2 * n) * torch.fft.rfft(h.t(), n=2 * n), n=2 * n)[..., :n]
        return self.head(x + self.out((q * (y + kv * self.skip[:, None])).transpose(1, 2)))


@CASES(tokens())
def hyena(k: int) -> nn.Module:
    return H3(8 * k)


class GatedDeltaNet(nn.Module):
    """Delta rule with a state of keys by values for every head; short convolutions; gates of low rank."""

    def __init__(self, heads: int, head_dim: int = 4, rank: int = 3):
        super().__init__()
        d = heads * head_dim
        self.heads, self.embed = heads, nn.Embedding(VOCAB, d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.beta, self.alpha = nn.Linear(d, heads), nn.Linear(d, heads)
        self.gate = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, d))
        self.norm, self.head = nn.RMSNorm(head_dim), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        k, beta, alpha = F.normalize(k, dim=-1), self.beta(x).sigmoid(), F.logsigmoid(self.alpha(x)).exp()
        state, ys = x.new_zeros(len(x), self.heads, k.shape[-1], v.shape[-1]), []
        for t in range(x.shape[1]):
            state = state * alpha[:, t, :, None, None]
            old = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
            ys.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        y = self.norm(torch.stack(ys, 1)).flatten(2) * self.gate(x).sigmoid()
        return self.head(x + self.o(y))


@CASES(lambda: ((randint(VOCAB, 2, 5),), {}), ambiguous=r"gate\.0\.weight:0|gate\.1\.weight:1")
def gated_delta(k: int) -> nn.Module:
    return GatedDeltaNet(3 * k)


class DeepSpeech(nn.Module):
    """Spectrogram convolutions flattened with frequency, bidirectional GRU, lookahead, CTC."""

    def __init__(self, c: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, c, (5, 5), (2, 2), 2), nn.BatchNorm2d(c), nn.Hardtanh(0, 20))
        self.gru = nn.GRU(c * 8, hidden, 2, bidirectional=True)
        self.lookahead, self.head = nn.Conv1d(hidden, hidden, 3, groups=hidden), nn.Linear(hidden, 29)
        self.norm = nn.BatchNorm1d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, f, t = x.shape
        x = self.gru(x.view(b, c * f, t).permute(2, 0, 1))[0]
        x = x.view(x.shape[0], b, 2, -1).sum(2).permute(1, 2, 0)
        x = self.lookahead(F.pad(self.norm(x), (0, 2)))
        return self.head(x.transpose(1, 2)).log_softmax(-1)


@CASES(normal(2, 1, 16, 12))
def deep_speech(k: int) -> nn.Module:
    return DeepSpeech(4 * k, 6 * k)


class Tacotron(nn.Module):
    """Location-sensitive attention, prenet, decoder cells, and a postnet.

    That the postnet reads the frames again makes them look like hidden state: one model cannot tell.
    """

    def __init__(self, d: int, mels: int = 5):
        super().__init__()
        self.embed, self.encoder = (
            nn.Embedding(30, d),
            nn.LSTM(d, d // 2, batch_first=True, bidirectional=True),
        )
        self.prenet = nn.Sequential(nn.Linear(mels, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU())
        self.query, self.memory, self.v = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, d, bias=False),
            nn.Linear(d, 1),
        )
        self.location, self.location_out = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, d, bias=False)
        self.cell, self.frame, self.stop = nn.LSTMCell(2 * d, d), nn.Linear(2 * d, mels), nn.Linear(2 * d, 1)
        self.post = nn.Sequential(
            nn.Conv1d(mels, d, 3, padding=1), nn.Tanh(), nn.Conv1d(d, mels, 3, padding=1)
        )

    def forward(self, ids: Tensor, mels: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.embed(ids))[0]
        keys, frames, stops = self.memory(memory), [], []
        h = c = context = torch.zeros(len(ids), memory.shape[-1])
        weights = torch.zeros(len(ids), ids.shape[1])
        for t in range(mels.shape[1]):
            h, c = self.cell(torch.cat([self.prenet(mels[:, t]), context], -1), (h, c))
            place = self.location_out(self.location(weights.unsqueeze(1)).transpose(1, 2))
            scores = self.v(torch.tanh(self.query(h).unsqueeze(1) + keys + place)).squeeze(-1)
            weights = scores.softmax(-1)
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            joint = torch.cat([h, context], -1)
            frames.append(self.frame(joint))
            stops.append(self.stop(joint))
        y = torch.stack(frames, 1)
        return y + self.post(y.transpose(1, 2)).transpose(1, 2), torch.cat(stops, 1)


@CASES(
    lambda: ((randint(30, 2, 6), randn(2, 3, 5)), {}),
    ambiguous=r"^location\.(weight|bias):0|location_out\.weight:1|^frame.*:0|post\.0\.weight:1|post\.2.*:0",
)
def tacotron(k: int) -> nn.Module:
    return Tacotron(16 * k)
