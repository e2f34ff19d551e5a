"""Kinds of models that the other files have few of: graphs, speech, recommendation, state spaces, codecs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import VOCAB, Cases, image, normal, randint, randn, tokens

CASES = Cases()
NODES, EDGES = 9, 20


def graph(features: int = 5, edge_features: int = 3) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (randn(NODES, features), randint(NODES, 2, EDGES), randn(EDGES, edge_features)), {}


class ScatterMPNN(nn.Module):
    """Messages made from edges, summed into nodes by index, a gated update, and a sum over the graph."""

    def __init__(self, d: int):
        super().__init__()
        self.enter, self.edge = nn.Linear(5, d), nn.Linear(3, d)
        self.message = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        self.update, self.head = nn.GRUCell(d, d), nn.Linear(d, 2)

    def forward(self, x: Tensor, index: Tensor, e: Tensor) -> Tensor:
        x, e = self.enter(x), self.edge(e)
        for _ in range(2):
            m = self.message(torch.cat([x[index[0]], x[index[1]], e], -1))
            x = self.update(torch.zeros_like(x).index_add(0, index[1], m), x)
        return self.head(x.sum(0, keepdim=True))


@CASES(graph)
def scatter_mpnn(k: int) -> nn.Module:
    return ScatterMPNN(8 * k)


class EdgeSoftmax(nn.Module):
    """Attention over the edges of a graph, normalized for each target by scatter."""

    def __init__(self, heads: int, head_dim: int = 8):
        super().__init__()
        self.heads, d = heads, heads * head_dim
        self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.q, self.k, self.v, self.bias = (
            nn.Linear(d, d),
            nn.Linear(d, d),
            nn.Linear(d, d),
            nn.Linear(3, heads),
        )
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor, index: Tensor, e: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (f(x).view(len(x), self.heads, -1) for f in (self.q, self.k, self.v))
        score = (q[index[1]] * k[index[0]]).sum(-1) / q.shape[-1] ** 0.5 + self.bias(e)
        to = index[1][:, None].expand_as(score)
        top = torch.full((len(x), self.heads), -1e9).scatter_reduce(0, to, score, "amax")
        weight = (score - top[index[1]]).exp()
        total = torch.zeros(len(x), self.heads).scatter_add(0, to, weight)
        mixed = (weight / total[index[1]])[..., None] * v[index[0]]
        y = torch.zeros_like(v).index_add(0, index[1], mixed).flatten(1)
        return self.head(F.relu(x + self.out(y)))


@CASES(graph)
def edge_softmax(k: int) -> nn.Module:
    return EdgeSoftmax(2 * k)


class Separable(nn.Module):
    """Depthwise convolution in time, pointwise mixing, squeeze and excitation; a residual."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.depth = nn.Conv1d(n_in, n_in, 5, padding=2, groups=n_in, bias=False)
        self.point, self.norm = nn.Conv1d(n_in, n_out, 1, bias=False), nn.BatchNorm1d(n_out)
        self.squeeze, self.excite = nn.Linear(n_out, n_out // 4), nn.Linear(n_out // 4, n_out)
        self.short = nn.Conv1d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.point(self.depth(x)))
        gate = self.excite(F.silu(self.squeeze(y.mean(-1)))).sigmoid()
        return F.silu(y * gate[..., None] + self.short(x))


@CASES(normal(2, 20, 16))
def context_net(k: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(20, 8 * k, 3, 2, 1), nn.BatchNorm1d(8 * k), nn.SiLU()),
        *(Separable(8 * k, 8 * k), Separable(8 * k, 16 * k), nn.Conv1d(16 * k, 11, 1), nn.LogSoftmax(1)),
    )


class Transducer(nn.Module):
    """Speech encoder, label predictor, and a joint network over every pair of positions."""

    def __init__(self, d: int):
        super().__init__()
        self.encoder = nn.LSTM(20, d, bidirectional=True, batch_first=True)
        self.labels, self.predictor = nn.Embedding(12, d), nn.GRU(d, 2 * d, batch_first=True)
        self.left, self.right, self.joint = (
            nn.Linear(2 * d, 3 * d),
            nn.Linear(2 * d, 3 * d),
            nn.Linear(3 * d, 12),
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        left = self.left(self.encoder(x)[0])[:, :, None]
        right = self.right(self.predictor(self.labels(labels))[0])[:, None]
        return self.joint((left + right).tanh()).log_softmax(-1)


@CASES(lambda: ((randn(2, 8, 20), randint(12, 2, 4)), {}))
def transducer(k: int) -> nn.Module:
    return Transducer(8 * k)


class Bags(nn.Module):
    """Pooled bags of ids beside dense features, by embedding_bag with offsets."""

    def __init__(self, d: int):
        super().__init__()
        self.words, self.tags = nn.EmbeddingBag(50, d, mode="mean"), nn.EmbeddingBag(30, d, mode="sum")
        self.dense = nn.Linear(6, d)
        self.deep = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d), nn.ReLU())
        self.head = nn.Linear(d, 1)

    def forward(self, words: Tensor, offsets: Tensor, tags: Tensor, dense: Tensor) -> Tensor:
        parts = [self.words(words, offsets), self.tags(tags), self.dense(dense)]
        return self.head(self.deep(torch.cat(parts, -1)))


@CASES(lambda: ((randint(50, 12), torch.tensor([0, 3, 7]), randint(30, 3, 4), randn(3, 6)), {}))
def embedding_bags(k: int) -> nn.Module:
    return Bags(8 * k)


class GRU4Rec(nn.Module):
    """Sessions of items through a GRU; scores against the same table of items."""

    def __init__(self, d: int):
        super().__init__()
        self.items, self.gru, self.project = (
            nn.Embedding(40, d),
            nn.GRU(d, 2 * d, batch_first=True),
            nn.Linear(2 * d, d),
        )
        self.bias = nn.Parameter(torch.zeros(40))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.project(self.gru(self.items(ids))[0]).tanh()
        return F.linear(h, self.items.weight, self.bias)


@CASES(lambda: ((randint(40, 2, 7),), {}))
def gru4rec(k: int) -> nn.Module:
    return GRU4Rec(8 * k)


class AutoInt(nn.Module):
    """Self-attention over the fields of a click, with residual weights; a wide linear part beside it."""

    def __init__(self, heads: int, head_dim: int = 8, fields: int = 5):
        super().__init__()
        self.heads, d = heads, heads * head_dim
        self.table, self.wide = nn.Embedding(60, d), nn.Embedding(60, 1)
        self.q, self.k, self.v, self.short = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.head = nn.Linear(fields * d, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        weight = torch.einsum("bihe,bjhe->bhij", q, k).softmax(-1)
        x = F.relu(torch.einsum("bhij,bjhe->bihe", weight, v).flatten(2) + self.short(x))
        return self.head(x.flatten(1)) + self.wide(ids).sum(1)


@CASES(lambda: ((randint(60, 3, 5),), {}))
def autoint(k: int) -> nn.Module:
    return AutoInt(2 * k)


class S5(nn.Module):
    """A state space with many inputs and outputs: one diagonal state of fixed size, run as a recurrence."""

    def __init__(self, d: int, state: int = 4):
        super().__init__()
        self.log_decay, self.log_step = nn.Parameter(torch.zeros(state)), nn.Parameter(torch.zeros(state))
        self.b, self.c = nn.Parameter(torch.randn(state, d)), nn.Parameter(torch.randn(d, state))
        self.skip, self.norm, self.gate = nn.Parameter(torch.ones(d)), nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        u, h, out = self.norm(x), torch.zeros(len(x), len(self.log_decay)), []
        step = self.log_step.exp()
        decay = torch.exp(-step * self.log_decay.exp())
        for t in range(x.shape[1]):
            h = decay * h + step * (u[:, t] @ self.b.t())
            out.append(h @ self.c.t())
        y = F.gelu(torch.stack(out, 1) + self.skip * u)
        return x + y * self.gate(y).sigmoid()


@CASES(normal(2, 6, 4), ambiguous=r"log_(decay|step):0|\.b:0|\.c:1")  # the size of the state
def s5(k: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8 * k), S5(8 * k), S5(8 * k), nn.Linear(8 * k, 3))


class H3(nn.Module):
    """Query, key and value; a shift and a long convolution, by Fourier transform, between products."""

    def __init__(self, d: int, length: int = 12, state: int = 4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.shift = nn.Conv1d(d, d, 3, padding=2, groups=d)
        self.decay, self.mix = nn.Parameter(torch.rand(d, state)), nn.Parameter(torch.randn(d, state))
        self.register_buffer("time", torch.arange(length).float())

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.q(x), self.k(x), self.v(x)
        k = self.shift(k.transpose(1, 2))[..., :n]
        kernel = (self.mix[..., None] * torch.exp(-self.decay.abs()[..., None] * self.time[:n])).sum(1)
        u = k * v.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * torch.fft.rfft(kernel, 2 * n), 2 * n)[..., :n]
        return self.o(q * y.transpose(1, 2))


class H3LM(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.table, self.mixers = nn.Embedding(VOCAB, d), nn.ModuleList(H3(d) for _ in range(2))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(d) for _ in range(3)), nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.head(self.norms[-1](x))


@CASES(tokens())
def h3(k: int) -> nn.Module:
    return H3LM(8 * k)


class DeepONet(nn.Module):
    """An operator: a branch reads a function, a trunk a place, their product is the value there."""

    def __init__(self, d: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(10, d), nn.Tanh(), nn.Linear(d, 2 * d))
        self.trunk = nn.Sequential(nn.Linear(2, d), nn.Tanh(), nn.Linear(d, 2 * d), nn.Tanh())
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bd,pd->bp", self.branch(u), self.trunk(x)) + self.bias


@CASES(lambda: ((randn(3, 10), randn(7, 2)), {}))
def deep_o_net(k: int) -> nn.Module:
    return DeepONet(8 * k)


def unit(n_in: int, n_out: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class HighResolution(nn.Module):
    """Two resolutions side by side that exchange what they know; a head on both."""

    def __init__(self, c: int):
        super().__init__()
        self.stem, self.fork = unit(3, c, 2), unit(c, 2 * c, 2)
        self.fine, self.coarse = unit(c, c), unit(2 * c, 2 * c)
        self.down = unit(c, 2 * c, 2, act=False)
        self.up = nn.Sequential(
            nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c), nn.Upsample(scale_factor=2)
        )
        self.head = nn.Conv2d(3 * c, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        fine, coarse = self.fine(x), self.coarse(self.fork(x))
        fine, coarse = F.relu(fine + self.up(coarse)), F.relu(coarse + self.down(fine))
        return self.head(torch.cat([fine, F.interpolate(coarse, size=fine.shape[-2:])], 1))


@CASES(image(16))
def high_resolution(k: int) -> nn.Module:
    return HighResolution(8 * k)


class Ghost(nn.Module):
    """Half of the channels by a convolution, the other half from them by a cheap depthwise one."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        half = n_out // 2
        self.primary = nn.Sequential(nn.Conv2d(n_in, half, 1), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, 1, 1, groups=half), nn.BatchNorm2d(half), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


@CASES(image(16))
def ghost(k: int) -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8 * k, 3, 2, 1),
            nn.ReLU(),
            Ghost(8 * k, 24 * k),
            nn.MaxPool2d(2),
            Ghost(24 * k, 32 * k),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * k, 10)),
    )


class EfficientBlock(nn.Module):
    """Expand, depthwise, squeeze and excitation of the block's input width, project, residual."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        wide, squeeze = 4 * n_in, n_in // 4
        self.expand = nn.Sequential(nn.Conv2d(n_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        depth = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.depth = nn.Sequential(depth, nn.BatchNorm2d(wide), nn.SiLU())
        self.reduce, self.grow = nn.Conv2d(wide, squeeze, 1), nn.Conv2d(squeeze, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        y = self.project(y * self.grow(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid())
        return x + y if self.residual else y


@CASES(image(16))
def efficient_net(k: int) -> nn.Module:
    return nn.Sequential(
        *unit(3, 8 * k, 2),
        *(
            EfficientBlock(8 * k, 8 * k, 1),
            EfficientBlock(8 * k, 16 * k, 2),
            EfficientBlock(16 * k, 16 * k, 1),
        ),
        *(nn.Conv2d(16 * k, 48 * k, 1, bias=False), nn.BatchNorm2d(48 * k), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48 * k, 10)),
    )


class BlockRouter(nn.Module):
    """Experts as stacked matrices, tokens sent by top-k weights: the feed-forward layer of DBRX."""

    def __init__(self, d: int, experts: int = 4):
        super().__init__()
        self.router = nn.Linear(d, experts, bias=False)
        self.w1, self.v1, self.w2 = (
            nn.Parameter(torch.randn(experts * 2 * d, d) * d**-0.5) for _ in range(3)
        )
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.router(x).softmax(-1).topk(2)
        weight = torch.zeros(*x.shape[:-1], self.experts).scatter(-1, choice, weight / weight.sum(-1, True))
        w1, v1, w2 = (w.view(self.experts, -1, x.shape[-1]) for w in (self.w1, self.v1, self.w2))
        return sum(
            weight[..., e, None] * ((F.silu(x @ w1[e].t()) * (x @ v1[e].t())) @ w2[e])
            for e in range(self.experts)
        )


class RoutedLM(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.table, self.norm, self.ffn = nn.Embedding(VOCAB, d), nn.LayerNorm(d), BlockRouter(d)
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.ffn(self.norm(x)))


@CASES(tokens())
def dbrx_like(k: int) -> nn.Module:
    return RoutedLM(8 * k)
