"""Kinds of sizes that inference got wrong without a word at the first sight of 81 new architectures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_doubts import doubted
from test_zoo import PLAIN
from torch import Tensor, nn
from zoo.case import randn

import mupass


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def base_shapes(
    build: Callable[[int], nn.Module], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[float, ...]]:
    """Return base shapes of the model of multiplier 2, where its width has half the size."""
    width = mupass.analyze(build(2), inputs).width
    analysis = mupass.analyze(build(2), inputs, base=width // 2)
    return {geometry.name: geometry.base_shape for geometry in analysis.geometries}


class Pitch(nn.Module):
    """A distribution over bins of pitch, and its mean by a weight that holds the pitch of every bin."""

    def __init__(self, d: int, frozen: bool, bins: int = 6) -> None:
        super().__init__()
        self.bins = bins
        self.enter, self.low, self.high = (
            nn.Conv1d(4, d, 3, padding=1),
            nn.Linear(d, 2 * bins),
            nn.Linear(d, d),
        )
        self.again = nn.Linear(d, 2 * bins)
        self.mean = nn.Linear(bins, 1, bias=False).requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu().transpose(1, 2)
        both = torch.cat([self.low(h), self.again(self.high(h).relu())], 1)
        return self.mean(both.unflatten(-1, (2, self.bins)).softmax(-1))[..., 0]


def test_bins_of_which_a_frozen_weight_takes_the_mean_are_fixed_and_marked() -> None:
    analysis = mupass.analyze(Pitch(32, frozen=True), randn(2, 4, 9))
    for name, axis in (("low.weight", 0), ("low.bias", 0), ("again.weight", 0), ("mean.weight", 1)):
        assert not analysis[name].infinite[axis] and analysis[name].ambiguous[axis]
    assert analysis["again.weight"].infinite == (False, True)
    assert base_shapes(lambda k: Pitch(16 * k, True), (randn(2, 4, 9),)) == shapes(Pitch(16, True))
    # What is trained may be any layer behind a softmax, if the code names no size of its own for it.
    for bins, grows in ((6, False), (8, True)):
        analysis = mupass.analyze(Pitch(32, False, bins), randn(2, 4, 9))
        assert analysis["mean.weight"].infinite == (False, grows)


class Discrete(nn.Module):
    """A state of several draws of a class each, straight through, which the next layer reads."""

    def __init__(self, d: int, draws: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.draws, self.classes = draws, classes
        self.enter, self.logits = nn.Linear(7, d), nn.Linear(d, draws * classes)
        self.leave, self.head = nn.Linear(draws * classes + 2, d), nn.Linear(d, 7)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        logits = self.logits(self.enter(x).relu()).view(-1, self.draws, self.classes)
        soft = logits.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), self.classes).to(soft.dtype)
        state = (hard + soft - soft.detach()).flatten(1)
        return self.head(self.leave(torch.cat([state, action], 1)).relu())


class SoftKeys(nn.Module):
    """Attention without a softmax over positions: entries of each head of the queries compete instead."""

    def __init__(self, d: int = 32, size: int = 8) -> None:
        super().__init__()
        self.size = size
        self.enter, self.qkv, self.out, self.head = (
            nn.Linear(*n) for n in ((5, d), (d, 3 * d), (d, d), (d, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.enter(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        context = k.softmax(-2).mT @ v
        return self.head(self.out((q.softmax(-1) @ context).transpose(1, 2).flatten(2)))


def test_codes_of_classes_are_marked_and_heads_of_linear_attention_are_not() -> None:
    found = doubted(Discrete(32), randn(4, 7), randn(4, 2))
    assert set(found) == {"logits.weight:0", "logits.bias:0", "leave.weight:1"}
    assert all("codes (3 x 5)" in reason for reason in found.values())
    assert doubted(SoftKeys(), randn(2, 6, 5)) == {}


class Matrices(nn.Module):
    """A matrix for each head, all of them in one vector."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        d = heads * size
        self.left, self.right, self.head = nn.Linear(6, d), nn.Linear(6, d), nn.Linear(d, 2)
        self.forms = nn.Parameter(torch.randn(heads * size * size) / size)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu(), self.right(x).relu()
        matrices = self.forms.view(self.heads, self.size, self.size)
        a, b = (y.view(-1, self.heads, self.size) for y in (left, right))
        scores = ((a.unsqueeze(2) @ matrices).squeeze(2) * b).sum(-1, keepdim=True)
        return self.head((scores * a).flatten(1) + left)


def test_a_product_that_holds_one_factor_twice_is_marked() -> None:
    analysis = mupass.analyze(Matrices(4, 6), randn(3, 6))
    assert analysis["forms"].infinite == (True,) and analysis["forms"].ambiguous == (True,)
    assert "grows, and no other" in analysis["forms"].evidence[0]


class Distance(nn.Module):
    """A distance field: coordinates are put in again where a layer leaves room for them."""

    def __init__(self, d: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.enter, self.narrow, self.wide = nn.Linear(3, d), nn.Linear(d, d - 3), nn.Linear(d, d)
        self.head = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x).relu()
        h = torch.cat([self.narrow(first).relu(), x], -1)
        if self.form == "residual":
            h = h + first
        return self.head(self.wide(h).relu())


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("form", ["plain", "residual"])
@pytest.mark.parametrize(("source", "target"), [(24, 48), (48, 24)])
def test_a_width_less_the_data_that_joins_it_keeps_that_difference(
    form: str, source: int, target: int
) -> None:
    x = randn(5, 3)
    analysis = mupass.analyze(Distance(source, form), x, base=target)
    want = Distance(target, form)
    assert {geometry.name: geometry.base_shape for geometry in analysis.geometries} == shapes(want)
    # A sum with what has the whole width proves it; without one the sizes alone tell, which is marked.
    assert analysis["narrow.weight"].ambiguous == (form == "plain", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mupass.MupassWarning)
        resized = mupass.resize(Distance(source, form), target, example_inputs=x)
    assert shapes(resized) == shapes(want)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), want(x))


class Joined(nn.Module):
    """Coordinates beside features that other layers read too: the width is the features' own."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.beside, self.again = nn.Linear(4, d), nn.Linear(d + 3, d + 3), nn.Linear(d, d)
        self.head = nn.Linear(2 * d + 3, 2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        h = self.enter(x).relu()
        both = torch.cat([h, places], -1)
        return self.head(torch.cat([both + self.beside(both).relu(), self.again(h).relu()], -1))


def test_features_that_are_read_alone_too_are_no_remainder() -> None:
    inputs = randn(5, 4), randn(5, 3)
    assert base_shapes(lambda k: Joined(16 * k), inputs) == shapes(Joined(16))


class Indexer(nn.Module):
    """Positions are weighed by scores of several heads, whose keys are the same for all heads."""

    def __init__(self, d: int, heads: int, size: int = 6, form: str = "halves") -> None:
        super().__init__()
        self.heads, self.size, self.form = heads, size, form
        self.enter, self.queries, self.keys = nn.Linear(5, d), nn.Linear(d, heads * size), nn.Linear(d, size)
        self.norm, self.weights, self.value = nn.LayerNorm(size), nn.Linear(d, heads), nn.Linear(d, d)
        self.head = nn.Linear(d, 3)

    def turn(self, x: Tensor) -> Tensor:
        if self.form == "steps":
            turned, kept = x.split([4, self.size - 4], -1)
            even, odd = turned[..., ::2], turned[..., 1::2]
            turned = torch.cat([even * 0.6 - odd * 0.8, odd * 0.6 + even * 0.8], -1)
            return torch.cat([turned, kept], -1)
        if self.form == "view":
            turned, kept = x.split([4, self.size - 4], -1)
            turned = turned.unflatten(-1, (2, 2)).transpose(-1, -2).reshape(turned.shape)
            rotated = torch.cat([-turned[..., 2:], turned[..., :2]], -1)
            return torch.cat([turned * 0.6 + rotated * 0.8, kept], -1)
        left, right, kept = x.split([2, 2, self.size - 4], -1)
        return torch.cat([left * 0.6 - right * 0.8, right * 0.6 + left * 0.8, kept], -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q = self.turn(self.queries(x).unflatten(-1, (self.heads, self.size)))
        k = self.turn(self.norm(self.keys(x)))
        scores = torch.einsum("blhe,bse->blhs", q, k).relu()
        mixed = torch.einsum("blhs,blh->bls", scores, self.weights(x)).softmax(-1)
        return self.head(mixed @ self.value(x) + x)


@pytest.mark.parametrize("form", ["halves", "view", "steps"])
def test_keys_that_all_heads_share_have_the_size_of_a_head(form: str) -> None:
    analysis = mupass.analyze(Indexer(32, 4, form=form), randn(2, 7, 5))
    assert analysis["keys.weight"].infinite == (False, True)
    assert analysis["keys.weight"].ambiguous == (True, False)
    assert analysis["queries.weight"].infinite == (True, True)
    inputs = (randn(2, 7, 5),)
    assert base_shapes(lambda k: Indexer(16 * k, 4 * k, 6, form), inputs) == shapes(Indexer(16, 4))


class Stage(nn.Module):
    """Attention in which heads and their size are numbers of the code, on tokens of any width."""

    def __init__(self, d: int, inner: int, size: int = 8) -> None:
        super().__init__()
        self.size, self.norm = size, nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.size))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def staged(first: int, second: int) -> nn.Module:
    stages = Stage(24, first), nn.Linear(24, 48), nn.GELU(), Stage(48, second)
    return nn.Sequential(nn.Linear(5, 24), *stages, nn.Linear(48, 3))


def test_an_inner_width_of_attention_that_is_one_number_everywhere_is_marked() -> None:
    x = randn(2, 6, 5)
    found = doubted(staged(32, 32), x)
    expected = {
        f"{stage}.{axis}" for stage in (1, 4) for axis in ("qkv.weight:0", "qkv.bias:0", "out.weight:1")
    }
    assert set(found) == expected
    assert doubted(staged(24, 48), x) == {}


def test_a_first_convolution_that_is_wider_than_what_follows_is_marked() -> None:
    def mobile(stem: int) -> nn.Module:
        rest = nn.ReLU(), nn.Conv2d(stem, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten()
        return nn.Sequential(nn.Conv2d(3, stem, 3, 2), *rest, nn.Linear(24, 10))

    x = randn(2, 3, 8, 8)
    assert set(doubted(mobile(32), x)) == {"0.weight:0", "0.bias:0", "2.weight:1"}
    assert doubted(mobile(16), x) == {}


@dataclass
class Settings:
    """Settings of a network; the multiplier holds for any width."""

    width: int
    inner: int
    multiplier: float = 32**-0.5


class Ordinary:
    """The same as an ordinary class, which gives its defaults in its signature."""

    def __init__(self, width: int, inner: int, multiplier: float = 32**-0.5) -> None:
        self.width, self.inner, self.multiplier = width, inner, multiplier


class Configured(nn.Module):
    def __init__(self, settings: Settings | Ordinary) -> None:
        super().__init__()
        self.settings = settings
        self.enter, self.inner = nn.Linear(5, settings.width), nn.Linear(settings.width, settings.inner)
        self.head = nn.Linear(settings.inner, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.enter(x).relu()).relu()) * self.settings.multiplier


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(("given", "expected"), [({}, 32**-0.5), ({"multiplier": 64**-0.5}, 128**-0.5)])
@pytest.mark.parametrize("kind", [Settings, Ordinary])
def test_a_default_multiplier_is_no_root_of_a_width(
    kind: type[Settings | Ordinary], given: dict[str, float], expected: float
) -> None:
    model = Configured(kind(64, 32, **given))
    resized = mupass.resize(model, scale=2, example_inputs=randn(2, 5))
    assert vars(resized.settings) == {"width": 128, "inner": 64, "multiplier": expected}


def test_resize_says_which_sizes_follow_a_policy() -> None:
    def ranked(k: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 32 * k), nn.ReLU(), nn.Linear(32 * k, 4), nn.Linear(4, 32 * k), nn.ReLU()
        )

    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = ranked(1), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    x = randn(2, 6)
    with pytest.warns(mupass.MupassWarning, match=r"body\.2\.weight:0 \(4 to 8\) and 2 more: a width like"):
        assert mupass.resize(Ranked(), 64, example_inputs=x).body[2].out_features == 8
    # What is settled, or does not change, asks nothing; warnings are errors here.
    finite = {r"body\.2\.weight:0": "finite"}
    assert mupass.resize(Ranked(), 64, example_inputs=x, dims=finite).body[2].out_features == 4
    mupass.resize(Ranked(), 32, example_inputs=x)


class Caching(nn.Module):
    """Tables that the first pass makes and later ones take: an attribute, an entry of a dict, of a list."""

    def __init__(self, branches: bool, d: int = 24) -> None:
        super().__init__()
        self.branches, self.codes = branches, nn.Parameter(torch.randn(6, d))
        self.register_buffer("count", torch.full((6, 1), 2.0))
        self.enter, self.head = nn.Linear(5, d), nn.Linear(6, 3)
        self.mean: Tensor | None = None
        self.tables: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = self.codes / self.count
        if "turned" not in self.tables:
            self.tables["turned"] = self.mean.t()
            self.seen.append(self.mean)
        h = self.enter(x)
        if self.branches and float(h.detach().sum()) > 1e9:
            h = -h
        return self.head((h @ self.tables["turned"]).relu())


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.filterwarnings("ignore:torch.export cannot capture")
def test_what_a_pass_caches_is_taken_back(branches: bool) -> None:
    model, x = Caching(branches), randn(4, 5)
    first = mupass.analyze(model, x)
    assert model.mean is None and not model.tables and not model.seen
    assert first["codes"].infinite == mupass.analyze(model, x)["codes"].infinite
    model(x).sum().backward()
    assert model.codes.grad is not None
    # What was there before stays.
    kept = model.mean
    mupass.analyze(model, x)
    assert model.mean is kept and list(model.tables) == ["turned"] and len(model.seen) == 1


class Streams(nn.Module):
    """The hidden state several times; weights say how much of each copy is read and written."""

    def __init__(self, d: int, copies: int = 3) -> None:
        super().__init__()
        self.copies, self.enter, self.layer, self.head = (
            copies,
            nn.Linear(5, d),
            nn.Linear(d, d),
            nn.Linear(d, 4),
        )
        self.read, self.write = nn.Linear(copies * d, copies), nn.Linear(copies * d, copies)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).unsqueeze(2).expand(-1, -1, self.copies, -1)
        for _ in range(2):
            flat = x.flatten(2)
            inner = (self.read(flat).sigmoid().unsqueeze(-1) * x).sum(2)
            x = x + self.write(flat).tanh().unsqueeze(-1) * self.layer(inner).relu().unsqueeze(2)
        return self.head(x.sum(2))


def test_the_number_of_copies_of_a_hidden_state_is_fixed_and_marked() -> None:
    analysis = mupass.analyze(Streams(32), randn(2, 6, 5))
    assert analysis["read.weight"].infinite == analysis["write.weight"].infinite == (False, True)
    assert analysis["read.weight"].ambiguous[0] and analysis["write.bias"].ambiguous[0]
    assert base_shapes(lambda k: Streams(16 * k), (randn(2, 6, 5),)) == shapes(Streams(16))


class Experts(nn.Module):
    """All experts run on all tokens; a table of the best two weighs them."""

    def __init__(self, d: int, experts: int = 6) -> None:
        super().__init__()
        self.experts, self.table = experts, nn.Embedding(20, d)
        self.gate, self.head = nn.Linear(d, experts, bias=False), nn.Linear(d, 20)
        self.up = nn.Parameter(torch.randn(experts, d, 3 * d) / d**0.5)
        self.down = nn.Parameter(torch.randn(experts, 3 * d, d) / (3 * d) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        best, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weights = torch.zeros(*ids.shape, self.experts).scatter(-1, chosen, best)
        y = torch.einsum("blef,efd->bled", torch.einsum("bld,edf->blef", x, self.up).relu(), self.down)
        return self.head(x + (y * weights[..., None]).sum(2))


class Capsules(nn.Module):
    """Blocks of channels at every position, each with matrices of its own."""

    def __init__(self, d: int, size: int = 4) -> None:
        super().__init__()
        self.size, self.enter, self.head = size, nn.Conv2d(1, d, 3, stride=2), nn.Linear(30, d)
        self.forms, self.leave = nn.Parameter(torch.randn(d // size * 9, 5, size, 6)), nn.Linear(d, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x).relu().unflatten(1, (-1, self.size)).flatten(3).transpose(2, 3).flatten(1, 2)
        votes = torch.einsum("bni,njio->bnjo", u, self.forms)
        return self.leave(
            self.head((votes * votes.sum(-1, keepdim=True).softmax(2)).sum(1).flatten(1)).relu()
        )


class Sampled(nn.Module):
    """Deformable attention: every head looks at points of its own."""

    def __init__(self, d: int, size: int = 8, points: int = 3) -> None:
        super().__init__()
        self.size, self.points, heads = size, points, d // size
        self.enter, self.query = nn.Conv2d(3, d, 4, stride=4), nn.Parameter(torch.randn(5, d))
        self.near, self.offsets, self.weigh = (
            nn.Linear(d, n) for n in (2, heads * points * 2, heads * points)
        )
        self.leave, self.head = nn.Linear(d, d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        values = self.enter(x)
        b, d, h, w = values.shape
        q = self.query.expand(b, -1, -1)
        places = self.offsets(q).view(b, 5, -1, self.points, 2) + self.near(q)[:, :, None, None]
        weights = self.weigh(q).view(b, 5, -1, self.points).softmax(-1).transpose(1, 2).flatten(0, 1)
        grid = places.transpose(1, 2).flatten(0, 1)
        found = F.grid_sample(values.reshape(-1, self.size, h, w), grid, align_corners=False)
        mixed = (found * weights[:, None]).sum(-1).view(b, d, 5).transpose(1, 2)
        return self.head(self.leave(mixed))


def test_matrices_that_read_the_same_are_experts() -> None:
    ids = torch.arange(12).view(2, 6)
    analysis = mupass.analyze(Experts(32), ids)
    assert analysis["up"].infinite == (False, True, True) and analysis["up"].ambiguous[0]
    assert base_shapes(lambda k: Experts(16 * k), (ids,)) == shapes(Experts(16))


def test_capsules_become_more_with_the_channels() -> None:
    analysis = mupass.analyze(Capsules(16), randn(2, 1, 7, 7))
    assert analysis["forms"].infinite == (True, False, False, True)
    # How long a capsule of the second layer is, and so what reads all of them, one model cannot tell.
    assert analysis["forms"].ambiguous[3] and analysis["head.weight"].ambiguous == (False, True)


def test_coordinates_of_a_sampling_grid_are_fixed() -> None:
    inputs = (randn(2, 3, 16, 16),)
    assert mupass.analyze(Sampled(32), inputs)["near.weight"].infinite == (False, True)
    assert base_shapes(lambda k: Sampled(16 * k), inputs) == shapes(Sampled(16))


class Mixed(nn.Module):
    """A mix of each position with the one before, by a narrow pair of weights; or a gate of a sample."""

    def __init__(self, pooled: bool, d: int = 32, rank: int = 4) -> None:
        super().__init__()
        self.pooled, self.enter, self.head = pooled, nn.Linear(5, d), nn.Linear(d, 3)
        self.down, self.up = nn.Linear(d, rank), nn.Linear(rank, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.pooled:
            return self.head(x * self.up(self.down(x.mean(1)).relu()).sigmoid()[:, None])
        return self.head(x + self.up(self.down(x).tanh()) * (x.roll(1, 1) - x))


def test_a_narrow_place_at_every_position_is_marked_and_a_gate_of_a_sample_is_not() -> None:
    x = randn(2, 6, 5)
    found = doubted(Mixed(pooled=False), x)
    assert set(found) == {"down.weight:0", "down.bias:0", "up.weight:1"}
    assert all("far narrower" in reason for reason in found.values())
    assert doubted(Mixed(pooled=True), x) == {}


class Latent(nn.Module):
    """Keys and values come of a latent that is kept in a cache, empty before the first token."""

    def __init__(self, d: int = 48, rank: int = 16) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.down, self.up = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        latent = self.down(x)
        return self.head(
            self.up(torch.cat([latent.new_empty(len(x), 0, latent.shape[-1]), latent], 1)).relu()
        )


def test_a_latent_behind_an_empty_cache_is_marked() -> None:
    assert set(doubted(Latent(), randn(2, 6, 5))) == {"down.weight:0", "up.weight:1"}


class SingleHead(nn.Module):
    """One head on a part of the width, with queries and keys of a size of their own, all from one layer."""

    def __init__(self, d: int, size: int = 16) -> None:
        super().__init__()
        self.parts = size, size, d // 2
        self.enter, self.norm, self.qkv = (
            nn.Linear(5, d),
            nn.LayerNorm(d // 2),
            nn.Linear(d // 2, sum(self.parts)),
        )
        self.leave, self.head = nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = self.enter(x).relu().chunk(2, -1)
        q, k, v = self.qkv(self.norm(part)).split(self.parts, -1)
        mixed = (q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v
        return self.head(self.leave(torch.cat([mixed, rest], -1).relu()))


def test_queries_and_keys_of_one_head_as_long_as_its_values_are_marked() -> None:
    for d in (32, 64):  # at 32 queries, keys and values are equally long
        analysis = mupass.analyze(SingleHead(d), randn(2, 6, 5))
        assert analysis["qkv.weight"].infinite == (True, True)
        assert analysis["qkv.weight"].ambiguous == (True, False)


class Talking(nn.Module):
    """Heads are mixed before and after the softmax; values have another size per head than queries."""

    def __init__(self, d: int = 32, heads: int = 4, size: int = 8, values: int = 16) -> None:
        super().__init__()
        self.heads, self.enter, self.head = heads, nn.Linear(5, d), nn.Linear(d, 3)
        self.q, self.k, self.v = (nn.Linear(d, heads * n, bias=False) for n in (size, size, values))
        self.before, self.after = nn.Conv2d(heads, heads, 1), nn.Conv2d(heads, heads, 1)
        self.leave = nn.Linear(heads * values, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.after(self.before(q @ k.mT * 0.3).softmax(-1))
        return self.head(x + self.leave((scores @ v).transpose(1, 2).flatten(2)))


def test_talking_heads_with_values_of_another_size_are_marked() -> None:
    found = doubted(Talking(), randn(2, 6, 5))
    whole = {f"{name}.weight:0" for name in ("q", "k", "v", "before", "after")}
    assert whole | {"before.weight:1", "after.weight:1", "leave.weight:1"} <= set(found)


class Widened(nn.Module):
    """A pointwise convolution that widens before the readout, or an ordinary one."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.enter, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.last, self.head = nn.Conv2d(32, 40, kernel), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.body(self.enter(x).relu()).relu()).relu().mean((2, 3)))


def test_a_pointwise_convolution_that_widens_for_the_readout_is_marked() -> None:
    x = randn(2, 3, 12, 12)
    assert set(doubted(Widened(1), x)) == {"last.weight:0", "last.bias:0", "head.weight:1"}
    assert doubted(Widened(3), x) == {}


class Normed(nn.Module):
    """Attention of which each head's results are normalized by themselves."""

    def __init__(self, d: int, size: int = 8) -> None:
        super().__init__()
        self.size, self.enter, self.head = size, nn.Linear(5, d), nn.Linear(d, 3)
        self.qkv, self.norm = nn.Linear(d, 3 * d), nn.GroupNorm(d // size, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.norm(mixed.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize(("source", "target"), [(32, 64), (64, 32)])
@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle")
def test_a_group_norm_over_heads_gets_as_many_groups_as_there_are_heads(source: int, target: int) -> None:
    x = randn(2, 6, 5)
    resized, want = mupass.resize(Normed(source), target, example_inputs=x), Normed(target)
    assert resized.norm.num_groups == want.norm.num_groups
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), want(x))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("case", ["deep_speech", "xdeepfm", "s4d", "tree_lstm"])
def test_gates_halves_and_tables_raise_no_doubt(case: str) -> None:
    model, inputs = PLAIN[case].build(1).eval(), PLAIN[case].inputs()
    marked = {g.name.split(".")[0] for g in mupass.analyze(model, inputs).geometries if any(g.ambiguous)}
    # Gates of recurrent layers are no heads, of a gated layer one half is made, tables may be narrower.
    assert marked.isdisjoint({"gru", "attention", "out", "table"})


class ScoredTokens(nn.Module):
    """Attention with a temperature a head: as many heads as each has entries, of which it takes the root."""

    def __init__(self, heads: int, head_dim: int = 8) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.temperature = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.qkv, self.out = nn.Linear(5, 3 * heads * head_dim), nn.Linear(heads * head_dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * self.scale / self.temperature).softmax(-1)
        out: Tensor = self.out((scores @ v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle:mupass.MupassWarning")
def test_the_root_of_a_head_is_not_that_of_as_many_heads() -> None:
    torch.manual_seed(0)
    resized, truth = (
        mupass.resize(ScoredTokens(8), scale=0.5, example_inputs=(randn(2, 6, 5),)),
        ScoredTokens(4),
    )
    assert resized.temperature.shape == truth.temperature.shape and resized.scale == truth.scale
    truth.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(randn(2, 6, 5)), truth(randn(2, 6, 5)))


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle:mupass.MupassWarning")
def test_a_constructor_draws_what_too_few_entries_tell_of_nothing() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = hf.UMT5ForConditionalGeneration(
        hf.UMT5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_decoder_layers=1, num_heads=4,
            use_cache=False, relative_attention_num_buckets=8,
        )
    )  # fmt: skip
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    with torch.no_grad():  # 32 entries, drawn by 1/sqrt(32), as they may turn out
        model.get_parameter(table).mul_(0.2 / model.get_parameter(table).std())
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    wide = mupass.resize(model, 64, example_inputs=inputs, seed=0).get_parameter(table)
    # Its constructor draws it by 1/sqrt(64); 64 entries tell that to a third.
    assert wide.shape == (8, 8) and wide.std().item() == pytest.approx(64**-0.5, rel=0.4)


class Uneven(nn.Module):
    """Channels that grow from block to block by a share of a number, rounded to whole ones (ReXNet)."""

    def __init__(self, width: float, step: float) -> None:
        super().__init__()
        sizes = [round(width + i * step) for i in range(7)]
        pairs = zip([3, *sizes], sizes, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairs)
        self.head = nn.Linear(sizes[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(("step", "marked"), [(19.2, True), (20.0, False)])
def test_widths_that_share_no_factor_may_be_rounded(step: float, marked: bool) -> None:
    # 32, 51, 70, 90, 109, 128, 147
    analysis = mupass.analyze(Uneven(32, step), (randn(2, 3, 8, 8),))
    reasons = [reason for g in analysis.geometries for reason in g.evidence if "share no factor" in reason]
    assert bool(reasons) == marked


class OneToken(nn.Module):
    """An expert that gets the tokens above a threshold, one of them today."""

    def __init__(self, d: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.enter, self.expert, self.head = nn.Linear(5, d), nn.Linear(d, d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        (chosen,) = torch.where(h.detach().mean(-1) > self.threshold)
        if chosen.numel():
            h = h.index_add(0, chosen, self.expert(h[None, chosen].reshape(-1, h.shape[-1])).relu())
        logits: Tensor = self.head(h)
        return logits


def test_an_expert_of_one_token_may_get_more_at_another_width() -> None:
    torch.manual_seed(0)
    x = randn(12, 5)
    model = OneToken(16, 0.0)
    means = model.enter(x).detach().mean(-1).sort(descending=True).values
    model.threshold = float(means[:2].mean())  # one token lies above it
    wide = mupass.resize(model, scale=2, example_inputs=(x,), seed=3)
    assert wide.expert.weight.shape == (32, 32)
    assert int((wide.enter(x).mean(-1) > wide.threshold).sum()) != 1
