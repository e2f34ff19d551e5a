"""Names of dimensions: parts of parts, equal parts counted, parts the dimension plays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._dims.names import DimNames
from mupass._dims.space import Space


class Attention(nn.Module):
    def __init__(self, cut: Callable[[Tensor], list[Tensor]], d: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.cut, self.heads = cut, heads
        self.enter, self.qkv, self.out = nn.Linear(5, d), nn.Linear(d, 3 * d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(self.qkv(self.enter(x)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in x)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CUTS = {
    "chunk": lambda x: x.chunk(3, -1),
    "slices": lambda x: [x[..., i : i + 24] for i in (0, 24, 48)],
    "view": lambda x: x.unflatten(-1, (3, 24)).unbind(-2),
}


@pytest.mark.parametrize("cut", CUTS)
def test_query_key_and_value_in_one_are_three_times_the_heads(cut: str) -> None:
    analysis = mupass.analyze(Attention(CUTS[cut]), torch.zeros(2, 4, 5))
    assert analysis["qkv.weight"].dims == ("3*heads*head_dim", "d_model")
    assert analysis["out.weight"].dims == ("4", "heads*head_dim")


def test_parts_of_parts_are_written_out_and_runs_counted() -> None:
    space = Space()
    whole, half, a, b = (space.new(s) for s in (24, 8, 3, 5))
    space.sum(half, (a, b))
    space.sum(whole, (half, half, space.new(8)))
    pair, two = space.new(16), space.new(2)
    space.product(pair, (two, half))
    names = DimNames(space, {space.find(a): "a"})
    assert names.term(half) == "a+5"
    assert names.term(whole) == "2*(a+5)+8"
    assert names.term(pair) == "2*(a+5)"
    assert names.term(space.new(7)) == "7"


@pytest.mark.zoo
def test_gpt2_says_what_its_fused_projection_holds() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    analysis = mupass.analyze(hf.GPT2LMHeadModel(config))
    assert analysis["transformer.h.0.attn.c_attn.weight"].dims == ("d_model", "3*heads*head_dim")
