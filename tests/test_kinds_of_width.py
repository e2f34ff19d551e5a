"""Sizes that look like widths and are none, or the reverse: frames, copies, chunks, features, stacks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass

VOCAB = 30
IDS = randint(VOCAB, 2, 6)


class Frames(nn.Module):
    """Several frames of a spectrum a step: one linear layer makes all of them."""

    def __init__(self, view: str, d: int = 32, mels: int = 20, frames: int = 3):
        super().__init__()
        self.view, self.mels, self.frames = view, mels, frames
        self.enter, self.hidden, self.out = nn.Linear(10, d), nn.Linear(d, d), nn.Linear(d, mels * frames)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.tanh(self.hidden(torch.tanh(self.enter(x)))))
        if self.view == "apart":
            return y.view(*y.shape[:-1], self.frames, self.mels)
        y = y.view(len(y), -1, self.mels)
        return y if self.view == "in a row" else y.transpose(1, 2)


@pytest.mark.parametrize("view", ["apart", "in a row", "channels first"])
def test_frames_and_bins_of_a_spectrum_are_data(view: str) -> None:
    analysis = mupass.analyze(Frames(view), randn(2, 6, 10))
    assert analysis["out.weight"].infinite == (False, True)
    assert analysis["out.weight"].role == "output"
    assert not any(any(g.ambiguous) for g in analysis.geometries)


class Multiplied(nn.Module):
    """A depthwise convolution of colours with several outputs a colour."""

    def __init__(self, multiplier: int, d: int = 32):
        super().__init__()
        self.apart = nn.Conv2d(3, 3 * multiplier, 3, padding=1, groups=3)
        self.mix, self.conv = nn.Conv2d(3 * multiplier, d, 1), nn.Conv2d(d, d, 3, padding=1)
        self.head = nn.Linear(d, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(F.relu(self.mix(self.apart(x))))).mean((2, 3)))


def test_outputs_a_colour_are_asked_about_and_either_answer_can_be_stated() -> None:
    x = randn(2, 3, 8, 8)
    assert mupass.analyze(Multiplied(1), x)["apart.weight"].infinite == (False,) * 4
    asked = mupass.analyze(Multiplied(3), x)
    assert asked["apart.weight"].ambiguous == (True, False, False, False)
    assert asked["mix.weight"].ambiguous == (False, True, False, False)
    told = mupass.analyze(Multiplied(3), x, dims={"apart.weight:0": "finite"})
    assert told["apart.weight"].role == "scalar"
    assert (told["mix.weight"].role, told["mix.weight"].infinite[1]) == ("input", False)


class Copies(nn.Module):
    """AltUp (arXiv 2301.13310), as in Gemma 3n: copies of the hidden state, mixed by a map for each token."""

    def __init__(self, d: int = 32, copies: int = 4):
        super().__init__()
        self.copies = copies
        self.table, self.head, self.route = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB), nn.Linear(d, copies)
        self.block = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.more = nn.ModuleList(nn.Linear(d, d) for _ in range(copies - 1))
        self.predict = nn.Linear(copies, copies * copies, bias=False)
        self.correct = nn.Linear(copies, copies, bias=False)
        self.between = nn.Parameter(torch.eye(copies))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = torch.stack([x, *[make(x) for make in self.more]])
        scores = torch.tanh(self.route(h[0]))
        maps = self.predict(scores).unflatten(-1, (self.copies, self.copies)).mT
        predicted = (h.permute(1, 2, 3, 0) @ maps).permute(3, 0, 1, 2) + h
        made = self.block(predicted[0])
        new = (made - predicted[0]).repeat(self.copies, 1, 1, 1)
        weights = self.correct(torch.tanh(self.route(made))).permute(2, 0, 1) + 1
        h = torch.einsum("ij,jbtd->ibtd", self.between, new * weights.unsqueeze(-1) + predicted)
        first, *rest = h.unbind()
        return self.head(first + torch.stack(rest).mean(0))


def test_copies_of_the_hidden_state_are_no_width() -> None:
    analysis = mupass.analyze(Copies(), IDS)
    assert analysis["route.weight"].infinite == (False, True) and analysis["route.weight"].role == "output"
    for name in ("predict.weight", "correct.weight", "between"):
        assert analysis[name].infinite == (False, False), name
    # That there is one score a copy nobody says: the policy is marked, and can be overruled.
    assert analysis["route.weight"].ambiguous == (True, False)
    told = mupass.analyze(Copies(), IDS, dims={"route.weight:0": "infinite"})
    assert told["route.weight"].infinite == (True, True) and told["correct.weight"].infinite == (False, True)
    for name in ("table.weight", "block.0.weight", "block.2.weight", "more.0.weight", "head.weight"):
        assert True in analysis[name].infinite and not any(analysis[name].ambiguous), name


class ValueHeads(nn.Module):
    """Gated attention whose values are wider than its queries, in chunks or in wider heads."""

    def __init__(self, how: str, k: int = 1, heads: int = 4, head_dim: int = 8):
        super().__init__()
        d = k * heads * head_dim
        self.how, self.heads = how, k * heads
        self.table, self.head = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB)
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.gate, self.out = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.apart(self.query(x)), self.apart(self.key(x)), self.value(x)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        if self.how == "chunks of the width":
            parts = [(scores @ self.apart(part)).transpose(1, 2).flatten(2) for part in v.chunk(2, -1)]
            mixed = torch.cat(parts, -1)
        elif self.how == "chunks of a head":
            parts = [scores @ part for part in self.apart(v).chunk(2, -1)]
            mixed = torch.cat(parts, -1).transpose(1, 2).flatten(2)
        else:
            mixed = (scores @ self.apart(v)).transpose(1, 2).flatten(2)
        return self.head(x + self.out(mixed * torch.sigmoid(self.gate(x))))


@pytest.mark.parametrize("how", ["chunks of the width", "chunks of a head", "a head of twice the size"])
def test_values_of_twice_the_size_grow_by_heads(how: str) -> None:
    alone = mupass.analyze(ValueHeads(how, 2), IDS)
    truth = mupass.analyze(ValueHeads(how, 2), IDS, base=ValueHeads(how, 1))
    for one, other in zip(alone.geometries, truth.geometries, strict=True):
        assert (one.role, one.infinite) == (other.role, other.infinite), one.name


class KeysAndValues(nn.Module):
    """Keys and values in one projection: a head of it is twice a query's."""

    def __init__(self, how: str, k: int = 1, heads: int = 4, head_dim: int = 8):
        super().__init__()
        d = k * heads * head_dim
        self.how, self.heads = how, k * heads
        self.table, self.head = nn.Embedding(VOCAB, d), nn.Linear(d, VOCAB)
        self.query, self.both, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.norm, self.norm_both = nn.LayerNorm(head_dim), nn.LayerNorm(2 * head_dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q = self.norm(self.query(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        both = self.norm_both(self.both(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k, v = both.chunk(2, -1) if self.how == "chunk" else both.unflatten(-1, (2, -1)).unbind(-2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("how", ["chunk", "unbind"])
def test_a_head_of_keys_and_values_is_fixed(how: str) -> None:
    alone = mupass.analyze(KeysAndValues(how, 2), IDS)
    truth = mupass.analyze(KeysAndValues(how, 2), IDS, base=KeysAndValues(how, 1))
    for one, other in zip(alone.geometries, truth.geometries, strict=True):
        assert (one.role, one.infinite) == (other.role, other.infinite), one.name


class Field(nn.Module):
    """A radiance field: sines and cosines of positions, read by the first layer and again by a later one."""

    def __init__(self, d: int = 64, frequencies: int = 6, of_directions: int = 2):
        super().__init__()
        n, m = 3 * (1 + 2 * frequencies), 3 * (1 + 2 * of_directions)
        self.frequencies, self.of_directions = frequencies, of_directions
        self.first, self.second, self.again = nn.Linear(n, d), nn.Linear(d, d), nn.Linear(d + n, d)
        self.features, self.view = nn.Linear(d, d), nn.Linear(d + m, d // 2)
        self.density, self.colour = nn.Linear(d, 1), nn.Linear(d // 2, 3)

    def encode(self, x: Tensor, frequencies: int) -> Tensor:
        phases = (x[..., None] * 2.0 ** torch.arange(frequencies)).flatten(-2)
        return torch.cat([x, phases.sin(), phases.cos()], -1)

    def forward(self, x: Tensor, towards: Tensor) -> tuple[Tensor, Tensor]:
        e = self.encode(x, self.frequencies)
        h = F.relu(self.second(F.relu(self.first(e))))
        h = F.relu(self.again(torch.cat([e, h], -1)))
        seen = torch.cat([self.features(h), self.encode(towards, self.of_directions)], -1)
        return self.density(h), self.colour(F.relu(self.view(seen)))


@pytest.mark.parametrize("d", [64, 39])
def test_fourier_features_that_a_later_layer_reads_again_are_no_width(d: int) -> None:
    x = randn(5, 3), randn(5, 3)
    analysis = mupass.analyze(Field(d), x)
    assert analysis["first.weight"].infinite == (True, False) and analysis["first.weight"].role == "input"
    assert analysis["first.weight"].ambiguous == (False, True)  # the code makes them: a policy
    assert analysis["again.weight"].base_shape == (d, d + 39)
    half = mupass.analyze(Field(d), x, base=d / 2)
    assert half["first.weight"].base_shape == (d / 2, 39)
    assert half["again.weight"].base_shape == (d / 2, d / 2 + 39)


class Stacked(nn.Module):
    """Three matrices in one parameter, flattened into one for a single product."""

    def __init__(self, how: str, k: int = 1, d: int = 32):
        super().__init__()
        d *= k
        self.how, self.heads = how, 4 * k
        self.enter, self.head = nn.Linear(7, d), nn.Linear(d, 5)
        self.three = nn.Parameter(torch.randn(3, d, d) / d**0.5)
        self.out = nn.Linear(3 * d if how == "together" else d, d)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(torch.tanh(self.enter(x)), self.three.flatten(end_dim=1))
        if self.how == "together":
            return self.head(torch.tanh(self.out(torch.tanh(y))))
        if self.how == "heads":
            q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        q, k, v = y.chunk(3, -1)
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v)))


@pytest.mark.parametrize("how", ["chunks", "heads", "together"])
def test_the_number_of_matrices_in_a_parameter_does_not_grow(how: str) -> None:
    analysis = mupass.analyze(Stacked(how), randn(2, 6, 7))
    assert analysis["three"].infinite == (False, True, True)
    truth = mupass.analyze(Stacked(how, 2), randn(2, 6, 7), base=Stacked(how, 1))
    assert truth["three"].infinite == (False, True, True)
    # Where nothing tells the three apart, the choice is marked.
    assert analysis["three"].ambiguous == ((True, True, False) if how == "together" else (False,) * 3)
