"""Numbers in the forward pass that hold the width are named, with what to write instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass


def notes(model: nn.Module, *inputs: Tensor, **options: object) -> list[str]:
    warnings = mupass.analyze(model, inputs, **options).warnings  # type: ignore[arg-type]
    return [w for w in warnings if "multiplies" in w or "unit length" in w or "head_dim grows" in w]


class Scaled(nn.Module):
    """A hidden layer times a number, in one of the ways that people write it."""

    def __init__(self, how: str, d: int = 64) -> None:
        super().__init__()
        self.how, self.enter, self.head = how, nn.Linear(5, d), nn.Linear(d, 3)
        self.register_buffer("scale", torch.tensor(d**0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        d = x.shape[-1]
        match self.how:
            case "mul":
                x = x * d**-0.5
            case "div":
                x = x / d**0.5
            case "tensor":
                x = x / torch.tensor(d).sqrt()
            case "full":
                x = x / torch.full([], d**0.5)
            case "buffer":
                x = x * self.scale
            case "after":
                return self.head(x) / d
            case "weight":
                return F.linear(x, self.head.weight * d**-0.5)
            case "other":
                x = x * 0.3
            case "common":
                x = x * 0.5
        return self.head(x)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    ("how", "value", "power", "instead"),
    [
        ("mul", "0.125", "-0.5", "0.25"),
        ("div", "0.125", "-0.5", "0.25"),
        ("tensor", "0.125", "-0.5", "0.25"),
        ("full", "0.125", "-0.5", "0.25"),
        ("buffer", "8", "0.5", "4"),
        ("after", "0.015625", "-1", "0.0625"),
        ("weight", "0.125", "-0.5", "0.25"),
    ],
)
def test_a_multiplier_that_is_a_power_of_the_width_is_named(
    how: str, value: str, power: str, instead: str
) -> None:
    (note,) = notes(Scaled(how), randn(2, 5), base=16)
    assert f"by {value}, which is the size of enter.out to the power {power};" in note
    assert f"write the number of the base width, {instead}, in its place" in note
    assert note.startswith("aten.") and "in the root module" in note
    # A second instance makes sure; what a weight reads, that weight's scales undo.
    second = notes(Scaled(how), randn(2, 5), base=Scaled(how, 16))
    assert second == ([note] if how in ("after", "weight") else [])


@pytest.mark.parametrize("how", ["other", "common", "none"])
def test_other_numbers_are_not(how: str) -> None:
    assert notes(Scaled(how), randn(2, 5)) == []


def test_a_number_of_a_fixed_axis_is_none_of_the_width() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(16, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(
                self.enter(x * 16**-0.5).relu().mean(-1, keepdim=True) * self.enter.weight.sum(1)
            )

    assert notes(Fixed(), randn(2, 16)) == []


class Attention(nn.Module):
    """Eager or fused attention with a gain for each entry of a head."""

    def __init__(self, how: str, heads: int = 2, head_dim: int = 16) -> None:
        super().__init__()
        self.how, self.heads, d = how, heads, heads * head_dim
        self.table, self.q, self.k, self.v = nn.Embedding(20, d), *(nn.Linear(d, d) for _ in range(3))
        self.gain, self.head = nn.Parameter(torch.ones(head_dim)), nn.Linear(d, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        # The code multiplies by the weight of queries itself: no module puts them out.
        parts = (F.linear(x, self.q.weight, self.q.bias), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        q, e = q * self.gain, q.shape[-1]
        match self.how:
            case "fused":
                y = F.scaled_dot_product_attention(q, k, v)
            case "inverse":
                y = F.scaled_dot_product_attention(q, k, v, scale=1 / e)
            case "given":
                y = F.scaled_dot_product_attention(q, k, v, scale=0.2)
            case "scores":
                y = (q @ k.transpose(-2, -1) / e**0.5).softmax(-1) @ v
            case "query":
                y = ((q * e**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
            case "right":
                y = (q @ k.transpose(-2, -1) / e).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("how", ["fused", "inverse", "given", "scores", "query", "right"])
def test_attention_is_warned_of_only_where_head_dim_grows(how: str) -> None:
    ids = randint(20, 2, 6)
    assert notes(Attention(how), ids) == []
    found = notes(Attention(how), ids, dims={"gain:0": "infinite"}, base=8)
    expected = {
        "fused": "head_dim grows, so logits must scale as 1/head_dim, not 1/sqrt(head_dim)",
        "given": "head_dim grows, so logits must scale as 1/head_dim; see that the scale given, 0.2, does",
        "scores": "multiplies attention by 0.25, which is the size of head_dim to the power -0.5; it grows",
        "query": "multiplies attention by 0.25, which is the size of head_dim to the power -0.5; it grows",
    }
    assert len(found) == (how in expected)
    assert how not in expected or expected[how] in found[0]


def test_unit_length_is_named_where_a_weight_reads_it_and_not_in_a_cosine() -> None:
    class Unit(nn.Module):
        def __init__(self, cosine: bool, d: int = 32) -> None:
            super().__init__()
            self.cosine, self.a, self.b, self.head = cosine, nn.Linear(5, d), nn.Linear(5, d), nn.Linear(d, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.normalize(self.a(x), dim=-1)
            return y @ F.normalize(self.b(x), dim=-1).t() if self.cosine else self.head(y + y.relu())

    (note,) = notes(Unit(False), randn(2, 5))
    assert note.startswith("aten.div in the root module: normalizes to unit length along a.out, which grows")
    assert notes(Unit(True), randn(2, 5)) == []
    fixed = mupass.analyze(Unit(False), randn(2, 5), dims={"b.weight:0": "infinite", "a.weight:0": "finite"})
    assert not any("unit length" in w for w in fixed.warnings)


@pytest.mark.zoo
def test_t5_scales_its_tied_readout_and_gemma_its_embedding() -> None:
    hf = pytest.importorskip("transformers")
    t5 = hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, use_cache=False)
    ids = {"input_ids": randint(50, 2, 6), "decoder_input_ids": randint(50, 2, 6)}
    warnings = mupass.analyze(hf.T5ForConditionalGeneration(t5), ids, base=8).warnings
    (note,) = [w for w in warnings if "multiplies" in w]
    assert "by 0.176777, which is the size of d_model to the power -0.5" in note and "0.353553" in note
