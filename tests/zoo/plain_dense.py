"""Torch only: dense, tabular, recommendation, implicit and set models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from zoo.case import Cases, normal, randint, randn

CASES = Cases()
FIELDS, ROWS = 5, 40


def ids_and_dense() -> tuple[tuple, dict]:
    return (randint(ROWS, 4, FIELDS), randn(4, 13)), {}


class DLRM(nn.Module):
    """Embeddings and a bottom MLP meet in pairwise dot products, then a top MLP."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, d, mode="sum") for _ in range(FIELDS))
        self.bottom = nn.Sequential(nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, d), nn.ReLU())
        pairs = (FIELDS + 1) * FIELDS // 2
        self.top = nn.Sequential(nn.Linear(d + pairs, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = [table(ids[:, i : i + 1]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([x, *rows], 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        i, j = torch.tril_indices(FIELDS + 1, FIELDS + 1, -1)
        return torch.sigmoid(self.top(torch.cat([x, products[:, i, j]], 1))).squeeze(1)


@CASES(ids_and_dense)
def dlrm(k: int) -> nn.Module:
    return DLRM(16 * k, 64 * k)


class DeepFM(nn.Module):
    """Factorization machine and MLP on shared embeddings."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.first = nn.Embedding(FIELDS * ROWS, 1)
        self.embed = nn.Embedding(FIELDS * ROWS, d)
        self.deep = nn.Sequential(
            nn.Linear(FIELDS * d + 13, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("offsets", torch.arange(FIELDS) * ROWS)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        ids = ids + self.offsets
        x = self.embed(ids)
        second = 0.5 * (x.sum(1).pow(2) - x.pow(2).sum(1)).sum(1, keepdim=True)
        deep = self.deep(torch.cat([x.flatten(1), dense], 1))
        return torch.sigmoid(self.bias + self.first(ids).sum(1) + second + deep)


@CASES(ids_and_dense)
def deepfm(k: int) -> nn.Module:
    return DeepFM(8 * k, 32 * k)


class WideDeep(nn.Module):
    """A linear model on raw features beside an MLP on embeddings."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.wide = nn.Linear(13, 1)
        self.embed = nn.ModuleList(nn.Embedding(ROWS, d) for _ in range(FIELDS))
        self.deep = nn.Sequential(
            nn.Linear(FIELDS * d + 13, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2)
        )
        self.out = nn.Linear(hidden // 2, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = torch.cat([e(ids[:, i]) for i, e in enumerate(self.embed)] + [dense], -1)
        return self.wide(dense) + self.out(torch.relu(self.deep(x)))


@CASES(ids_and_dense)
def wide_deep(k: int) -> nn.Module:
    return WideDeep(8 * k, 32 * k)


class TwoTower(nn.Module):
    """Two encoders compared by a scaled cosine; the shared space grows with them."""

    def __init__(self, d: int):
        super().__init__()
        self.user, self.item = nn.Embedding(50, d), nn.Embedding(60, d)
        self.user_tower = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.item_tower = nn.Sequential(nn.Linear(d + 13, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, user: Tensor, item: Tensor, dense: Tensor) -> Tensor:
        u = F.normalize(self.user_tower(self.user(user)), dim=-1)
        v = F.normalize(self.item_tower(torch.cat([self.item(item), dense], -1)), dim=-1)
        return self.log_scale.exp() * u @ v.t()


@CASES(lambda: ((randint(50, 4), randint(60, 4, seed=1), randn(4, 13)), {}))
def two_tower(k: int) -> nn.Module:
    return TwoTower(16 * k)


class CrossNetwork(nn.Module):
    """DCN v2: explicit feature crosses through the growing input of concatenated embeddings."""

    def __init__(self, d: int, rank: int):
        super().__init__()
        self.embed = nn.Embedding(ROWS, d)
        n = FIELDS * d
        self.cross = nn.ModuleList(nn.Linear(n, n) for _ in range(2))
        self.low = nn.ModuleList(
            nn.Sequential(nn.Linear(n, rank, bias=False), nn.Linear(rank, n)) for _ in range(2)
        )
        self.out = nn.Linear(n, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x0 = x = self.embed(ids).flatten(1)
        for cross, low in zip(self.cross, self.low, strict=True):
            x = x0 * cross(x) + x
            x = x0 * low(x) + x
        return self.out(x) + dense.sum(-1, keepdim=True)


@CASES(ids_and_dense)
def dcn(k: int) -> nn.Module:
    return CrossNetwork(8 * k, 4 * k)


class NCF(nn.Module):
    """Neural collaborative filtering: a product branch and an MLP branch."""

    def __init__(self, d: int):
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(50, d), nn.Embedding(60, d)
        self.user_mlp, self.item_mlp = nn.Embedding(50, 2 * d), nn.Embedding(60, 2 * d)
        self.mlp = nn.Sequential(nn.Linear(4 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d), nn.ReLU())
        self.predict = nn.Linear(2 * d, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        gmf = self.user_gmf(user) * self.item_gmf(item)
        mlp = self.mlp(torch.cat((self.user_mlp(user), self.item_mlp(item)), -1))
        return self.predict(torch.cat((gmf, mlp), -1)).view(-1)


@CASES(lambda: ((randint(50, 4), randint(60, 4, seed=1)), {}))
def ncf(k: int) -> nn.Module:
    return NCF(8 * k)


class NeRF(nn.Module):
    """Positional encoding of fixed size, skip concatenation, two heads."""

    def __init__(self, d: int, bands: int = 4):
        super().__init__()
        self.bands, n = bands, 3 + 6 * bands
        self.first = nn.ModuleList([nn.Linear(n, d), nn.Linear(d, d)])
        self.second = nn.ModuleList([nn.Linear(d + n, d), nn.Linear(d, d)])
        self.density, self.features = nn.Linear(d, 1), nn.Linear(d, d)
        self.view, self.rgb = nn.Linear(d + n, d // 2), nn.Linear(d // 2, 3)

    def encode(self, x: Tensor) -> Tensor:
        parts = [x]
        for i in range(self.bands):
            parts += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
        return torch.cat(parts, -1)

    def forward(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        p, v = self.encode(points), self.encode(F.normalize(directions, dim=-1))
        h = p
        for layer in self.first:
            h = torch.relu(layer(h))
        h = torch.cat([h, p], -1)
        for layer in self.second:
            h = torch.relu(layer(h))
        colour = torch.relu(self.view(torch.cat([self.features(h), v], -1)))
        return torch.sigmoid(self.rgb(colour)), torch.relu(self.density(h))


@CASES(lambda: ((randn(2, 6, 3), randn(2, 6, 3, seed=1)), {}))
def nerf(k: int) -> nn.Module:
    return NeRF(32 * k)


class Siren(nn.Module):
    """Sine network with learned Fourier features."""

    def __init__(self, d: int):
        super().__init__()
        self.fourier = nn.Parameter(torch.randn(2, d))
        self.hidden = nn.ModuleList(nn.Linear(2 * d, 2 * d) for _ in range(2))
        self.out = nn.Linear(2 * d, 3)

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.fourier
        h = torch.cat([phase.sin(), phase.cos()], -1)
        for layer in self.hidden:
            h = torch.sin(30 * layer(h))
        return self.out(h)


@CASES(normal(7, 2))
def siren(k: int) -> nn.Module:
    return Siren(16 * k)


class DeepSets(nn.Module):
    """Sum over a set between two MLPs, with a mask."""

    def __init__(self, d: int):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(6, d), nn.ELU(), nn.Linear(d, 2 * d))
        self.rho = nn.Sequential(nn.Linear(4 * d, d), nn.ELU(), nn.Linear(d, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.phi(x) * mask.unsqueeze(-1)
        pooled = torch.cat([h.sum(1) / mask.sum(1, keepdim=True), h.max(1).values], -1)
        return self.rho(pooled)


@CASES(lambda: ((randn(2, 9, 6), torch.ones(2, 9)), {}))
def deep_sets(k: int) -> nn.Module:
    return DeepSets(16 * k)


class MixtureOfExperts(nn.Module):
    """Dense mixture: every expert runs, gates weigh; the number of experts is fixed."""

    def __init__(self, d: int, experts: int = 4):
        super().__init__()
        self.embed = nn.Linear(10, d)
        self.gate = nn.Linear(d, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d, 2 * d) * d**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(experts, 2 * d))
        self.down = nn.Parameter(torch.randn(experts, 2 * d, d) * (2 * d) ** -0.5)
        self.head = nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = self.gate(x).softmax(-1)
        h = torch.einsum("bd,edf->ebf", x, self.up) + self.up_bias[:, None]
        y = torch.einsum("ebf,efd->ebd", F.gelu(h), self.down)
        return self.head(x + torch.einsum("be,ebd->bd", weights, y))


@CASES(normal(6, 10))
def mixture_of_experts(k: int) -> nn.Module:
    return MixtureOfExperts(16 * k)


class MMoE(nn.Module):
    """Multi-gate mixture for two tasks, experts as modules."""

    def __init__(self, d: int):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, d), nn.ReLU(), nn.Linear(d, d)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(20, 3) for _ in range(2))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d // 2), nn.ReLU(), nn.Linear(d // 2, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        y = torch.stack([e(x) for e in self.experts], dim=1)
        return [
            t((g(x).softmax(-1).unsqueeze(-1) * y).sum(1))
            for g, t in zip(self.gates, self.towers, strict=True)
        ]


@CASES(normal(6, 20))
def mmoe(k: int) -> nn.Module:
    return MMoE(16 * k)


class LoRALinear(nn.Module):
    """A frozen weight and a low-rank update whose rank is fixed."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@CASES(normal(6, 10), ambiguous=r"\.a:0|\.b:1")
def lora(k: int) -> nn.Module:
    d = 16 * k
    return nn.Sequential(
        nn.Linear(10, d), nn.ReLU(), LoRALinear(nn.Linear(d, 2 * d), 4), nn.ReLU(), nn.Linear(2 * d, 3)
    )


@CASES(normal(6, 10))
def normalized_weights(k: int) -> nn.Module:
    d = 16 * k
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(10, d)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(d, 2 * d)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(2 * d, 2 * d), orthogonal_map="cayley"),
        nn.Linear(2 * d, 3),
    )


class HyperNetwork(nn.Module):
    """One network writes the weights of a small, fixed one."""

    def __init__(self, d: int, n_in: int = 4, n_out: int = 3):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.net = nn.Sequential(nn.Linear(6, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU())
        self.weight, self.bias = nn.Linear(d, n_in * n_out), nn.Linear(d, n_out)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.net(z)
        w = self.weight(h).view(-1, self.n_out, self.n_in)
        return torch.bmm(w, x.unsqueeze(-1)).squeeze(-1) + self.bias(h)


@CASES(lambda: ((randn(5, 4), randn(5, 6)), {}))
def hypernetwork(k: int) -> nn.Module:
    return HyperNetwork(16 * k)


class FiLM(nn.Module):
    """A condition scales and shifts hidden units."""

    def __init__(self, d: int):
        super().__init__()
        self.stem = nn.Linear(8, d)
        self.condition = nn.Sequential(nn.Linear(3, d), nn.SiLU(), nn.Linear(d, 4 * d))
        self.blocks = nn.ModuleList(nn.Linear(d, d) for _ in range(2))
        self.head = nn.Linear(d, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.stem(x)
        scale1, shift1, scale2, shift2 = self.condition(c).chunk(4, dim=-1)
        for layer, scale, shift in zip(self.blocks, (scale1, scale2), (shift1, shift2), strict=True):
            x = x + F.relu(layer(x) * (1 + scale) + shift)
        return self.head(x)


@CASES(lambda: ((randn(5, 8), randn(5, 3)), {}))
def film(k: int) -> nn.Module:
    return FiLM(16 * k)


class Coupling(nn.Module):
    """One affine coupling layer of a normalizing flow: data in halves, hidden units grow."""

    def __init__(self, d: int, data: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(data // 2, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, data)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        log_scale, shift = self.net(a).chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([b * log_scale.exp() + shift, a], -1), log_scale.sum(-1)


class Flow(nn.Module):
    """RealNVP with an invertible linear map between couplings."""

    def __init__(self, d: int, data: int = 6):
        super().__init__()
        self.layers = nn.ModuleList(Coupling(d, data) for _ in range(3))
        self.mix = nn.Parameter(torch.eye(data) + 0.1 * torch.randn(data, data))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, log_det = layer(x @ self.mix)
            total = total + log_det
        return x, total


@CASES(normal(5, 6))
def flow(k: int) -> nn.Module:
    return Flow(16 * k)


class KANLayer(nn.Module):
    """A learned univariate function for every edge, in a fixed basis."""

    def __init__(self, n_in: int, n_out: int, grid: int = 5):
        super().__init__()
        self.register_buffer("centers", torch.linspace(-1, 1, grid))
        self.coefficients = nn.Parameter(torch.randn(n_out, n_in, grid) * 0.1)
        self.base = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2))
        return self.base(F.silu(x)) + torch.einsum("big,oig->bo", basis, self.coefficients)


@CASES(normal(5, 6))
def kan(k: int) -> nn.Module:
    return nn.Sequential(KANLayer(6, 12 * k), KANLayer(12 * k, 12 * k), KANLayer(12 * k, 2))


class Hopfield(nn.Module):
    """Association of inputs with stored patterns, whose number is fixed."""

    def __init__(self, d: int, patterns: int = 11):
        super().__init__()
        self.query = nn.Linear(9, d)
        self.stored, self.content = (
            nn.Parameter(torch.randn(patterns, d)),
            nn.Parameter(torch.randn(patterns, d)),
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        for _ in range(2):
            q = q + (q @ self.stored.t() / q.shape[-1] ** 0.5).softmax(-1) @ self.content
        return self.head(self.norm(q))


@CASES(normal(5, 9), ambiguous=r"stored:0|content:0")
def hopfield(k: int) -> nn.Module:
    return Hopfield(16 * k)


class NeuralODE(nn.Module):
    """Runge-Kutta steps of one shared vector field, with time as an extra input."""

    def __init__(self, d: int):
        super().__init__()
        self.lift, self.drop = nn.Linear(4, d), nn.Linear(d, 2)
        self.field = nn.Sequential(nn.Linear(d + 1, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))

    def slope(self, t: float, x: Tensor) -> Tensor:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for step in range(2):
            t, h = step / 2, 0.5
            k1 = self.slope(t, x)
            k2 = self.slope(t + h, x + h * k1)
            x = x + h * (k1 + k2) / 2
        return self.drop(x)


@CASES(normal(5, 4))
def neural_ode(k: int) -> nn.Module:
    return NeuralODE(16 * k)


class Siamese(nn.Module):
    """One encoder, two inputs, a bilinear comparison and an absolute difference."""

    def __init__(self, d: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, d), nn.PReLU(d), nn.Linear(d, d))
        self.compare = nn.Bilinear(d, d, 3)
        self.difference = nn.Linear(d, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = self.encoder(a), self.encoder(b)
        return self.compare(x, y) + self.difference((x - y).abs())


@CASES(lambda: ((randn(5, 12), randn(5, 12, seed=1)), {}))
def siamese(k: int) -> nn.Module:
    return Siamese(16 * k)


class Maxout(nn.Module):
    """Maximum over a fixed number of linear pieces."""

    def __init__(self, n_in: int, n_out: int, pieces: int):
        super().__init__()
        self.n_out, self.pieces = n_out, pieces
        self.linear = nn.Linear(n_in, n_out * pieces)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(*x.shape[:-1], self.n_out, self.pieces).amax(-1)


@CASES(normal(5, 12))
def maxout(k: int) -> nn.Module:
    return nn.Sequential(Maxout(12, 16 * k, 3), Maxout(16 * k, 16 * k, 3), nn.Linear(16 * k, 4))


class FTTransformer(nn.Module):
    """Tabular transformer: one token a feature, made by elementwise weights; a class token."""

    def __init__(self, heads: int, head_dim: int = 8, features: int = 7):
        super().__init__()
        d = heads * head_dim
        self.weight, self.bias = (
            nn.Parameter(torch.randn(features, d)),
            nn.Parameter(torch.zeros(features, d)),
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        layer = nn.TransformerEncoderLayer(d, heads, 2 * d, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = x.unsqueeze(-1) * self.weight + self.bias
        t = torch.cat([self.cls.expand(len(t), -1, -1), t], 1)
        return self.head(self.encoder(t)[:, 0])


@CASES(normal(5, 7))
def ft_transformer(k: int) -> nn.Module:
    return FTTransformer(2 * k)


class ActorCritic(nn.Module):
    """Actor and critic on a shared trunk, with a learned log standard deviation."""

    def __init__(self, d: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(11, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh())
        self.mean, self.value = nn.Linear(d, 4), nn.Linear(d, 1)
        self.log_std = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {
            "mean": self.mean(h),
            "std": self.log_std.exp().expand(len(x), -1),
            "value": self.value(h)[:, 0],
        }


@CASES(normal(5, 11))
def actor_critic(k: int) -> nn.Module:
    return ActorCritic(16 * k)


class DuelingQ(nn.Module):
    """Value and advantage, quantile embedding by cosines (implicit quantile network)."""

    def __init__(self, d: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(11, d), nn.ReLU())
        self.quantile = nn.Linear(20, d)
        self.value, self.advantage = nn.Linear(d, 1), nn.Linear(d, 5)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        h = self.trunk(x)
        steps = torch.arange(1, 21) * math.pi
        phi = torch.relu(self.quantile(torch.cos(tau.unsqueeze(-1) * steps)))
        h = h.unsqueeze(1) * phi
        a = self.advantage(h)
        return self.value(h) + a - a.mean(-1, keepdim=True)


@CASES(lambda: ((randn(5, 11), torch.rand(5, 8)), {}))
def implicit_quantile(k: int) -> nn.Module:
    return DuelingQ(16 * k)
