"""Fused parameters are recognized as several matrices, and splitting is exact."""

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._records import Fusion
from mupass._roles.fused import join, split


class Attention(nn.Module):
    """Self-attention with one fused projection, in any of the layouts that people use."""

    def __init__(self, layout: str, d: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.layout, self.heads = layout, heads
        self.inp, self.qkv, self.out = nn.Linear(5, d), nn.Linear(d, 3 * d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(self.inp(x))
        b, n, d = x.shape[0], x.shape[1], x.shape[2] // 3
        h, e = self.heads, d // self.heads
        if self.layout == "chunk":
            q, k, v = (t.view(b, n, h, e).transpose(1, 2) for t in x.chunk(3, -1))
        elif self.layout == "leading":
            q, k, v = x.view(b, n, 3, h, e).permute(2, 0, 3, 1, 4)
        else:  # interleaved by head, as in GPT-NeoX
            q, k, v = x.view(b, n, h, 3 * e).transpose(1, 2).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, d)).mean(1)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("chunk", [list(range(0, 24)), list(range(24, 48))]),
        ("leading", [list(range(0, 24)), list(range(24, 48))]),
        (
            "interleaved",
            [
                [h * 24 + i for h in range(3) for i in range(8)],
                [h * 24 + 8 + i for h in range(3) for i in range(8)],
            ],
        ),
    ],
)
def test_qkv_is_three_matrices(layout: str, rows: list[list[int]]) -> None:
    model = Attention(layout)
    geometry = mupass.analyze(model, torch.randn(2, 4, 5))["qkv.weight"]
    q, k, v = split(model.qkv.weight, geometry.fusions)
    assert torch.equal(q, model.qkv.weight[rows[0]]) and torch.equal(k, model.qkv.weight[rows[1]])
    assert torch.equal(join([q, k, v], geometry.fusions), model.qkv.weight)


def test_gate_and_up_by_chunk_and_by_glu() -> None:
    class Gated(nn.Module):
        def __init__(self, glu: bool) -> None:
            super().__init__()
            self.glu, self.up, self.down = glu, nn.Linear(6, 40), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.glu:
                return self.down(nn.functional.glu(self.up(x)))
            gate, up = self.up(x).chunk(2, -1)
            return self.down(gate.sigmoid() * up)

    for glu in (False, True):
        found = mupass.analyze(Gated(glu), torch.randn(2, 6))
        assert [f.sizes for f in found["up.weight"].fusions] == [(20, 20)]
        assert found["down.weight"].fusions == ()


def test_lstm_gates() -> None:
    model = nn.Sequential()
    model.lstm = nn.LSTM(5, 16)
    found = mupass.analyze(LastState(), torch.randn(3, 2, 5))
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert found[name].fusions == (Fusion(0, (4, 16), 0, (1, 1, 1, 1), (False, True), (False,) * 4),)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][-1])


def test_a_plain_matrix_is_not_fused() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    assert all(g.fusions == () for g in mupass.analyze(net).geometries)


def test_split_and_join_are_inverse_on_any_axis() -> None:
    x = torch.randn(3, 24, 5)
    for fusion in (
        Fusion(1, (2, 3, 4), 1, (1, 2)),
        Fusion(1, (24,), 0, (10, 14)),
        Fusion(0, (3,), 0, (1, 1, 1)),
    ):
        pieces = split(x, [fusion])
        assert len(pieces) == len(fusion.sizes) and sum(p.numel() for p in pieces) == x.numel()
        assert torch.equal(join(pieces, [fusion]), x)
