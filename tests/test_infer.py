"""Policies of width inference: what one model cannot tell, a rule decides, marked, and open to overruling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass


class Attention(nn.Module):
    """Attention whose head count and convolution groups may coincide."""

    def __init__(self, heads: int = 4, head_dim: int = 8, groups: int = 4):
        super().__init__()
        d = heads * head_dim
        self.heads = heads
        self.table, self.conv = nn.Embedding(20, d), nn.Conv1d(d, d, 3, padding=1, groups=groups)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.scale, self.per_head = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.ones(heads, 1, 1))
        self.head = nn.Linear(d, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q * self.scale, k, v * self.per_head)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


def attention(**settings: int) -> mupass.Analysis:
    return mupass.analyze(Attention(**settings), randint(20, 2, 6))


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_heads_grow_and_head_dim_does_not(groups: int) -> None:
    analysis = attention(groups=groups)
    assert analysis["scale"].infinite == (False,) and analysis["scale"].ambiguous == (True,)
    assert analysis["per_head"].infinite == (True, False, False)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_are_fixed_and_are_not_heads(groups: int) -> None:
    assert attention(groups=groups)["conv.weight"].infinite == (True, True, False)


def test_overrides_settle_a_policy() -> None:
    model, ids = Attention(), randint(20, 2, 6)
    analysis = mupass.analyze(model, ids, dims={"scale:0": "infinite"})
    assert analysis["scale"].infinite == (True,) and analysis["scale"].ambiguous == (False,)


def test_contradicting_overrides_are_refused() -> None:
    dims = {r"q\.weight:1": "finite", r"k\.weight:1": "infinite"}
    with pytest.raises(mupass.InferenceError, match="contradicts"):
        mupass.analyze(Attention(), randint(20, 2, 6), dims=dims)


def test_a_base_model_settles_policies_and_lists_what_inference_had_wrong() -> None:
    model, base = Attention(heads=4, head_dim=16, groups=4), Attention(heads=4, head_dim=8, groups=4)
    analysis = mupass.analyze(model, randint(20, 2, 6), base=base)
    assert analysis["scale"].infinite == (True,)
    assert analysis["per_head"].infinite == (False, False, False)
    assert not any(any(g.ambiguous) for g in analysis.geometries)
    assert any(w.startswith("scale:0") and "says finite" in w for w in analysis.warnings)


class Blocks(nn.Module):
    """A width cut into blocks, each with a matrix of its own; and a dense mixture of experts."""

    def __init__(self, blocks: int = 4, size: int = 6, experts: int = 3):
        super().__init__()
        d = blocks * size
        self.blocks = blocks
        self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 5)
        self.diagonal = nn.Parameter(torch.randn(blocks, size, size))
        self.gate, self.experts = nn.Linear(d, experts), nn.Parameter(torch.randn(experts, d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = torch.einsum("bhi,hij->bhj", x.view(len(x), self.blocks, -1), self.diagonal).flatten(1)
        y = torch.einsum("bd,edf->bef", x, self.experts)
        return self.head(x + torch.einsum("be,bef->bf", self.gate(x).softmax(-1), y))


def test_blocks_grow_in_number_and_experts_do_not() -> None:
    analysis = mupass.analyze(Blocks(), randn(2, 5))
    assert analysis["diagonal"].infinite == (True, False, False)
    assert analysis["diagonal"].ambiguous == (True, True, True)
    assert analysis["experts"].infinite == (False, True, True)
    assert analysis["gate.weight"].infinite == (False, True)
    assert analysis["gate.weight"].ambiguous == (True, False)


class JoinedBlocks(nn.Module):
    """Unequal parts of a width, a matrix each: in one block-diagonal matrix, or in products of their own."""

    def __init__(self, joined: bool, widths: tuple[int, int] = (16, 24)):
        super().__init__()
        self.joined, self.widths = joined, widths
        self.enter, self.head = nn.Linear(5, sum(widths)), nn.Linear(sum(widths), 3)
        self.blocks = nn.ParameterList(torch.randn(width, width) / width**0.5 for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        if self.joined:
            h = h @ torch.block_diag(*self.blocks)
        else:
            parts = h.split(self.widths, -1)
            h = torch.cat([part @ block for part, block in zip(parts, self.blocks, strict=True)], -1)
        return self.head(torch.tanh(h))


def test_a_block_diagonal_matrix_is_a_product_for_each_block() -> None:
    joined, apart = (mupass.analyze(JoinedBlocks(how), randn(4, 5)) for how in (True, False))
    for right in apart.geometries:
        found = joined[right.name]
        for verdict in ("infinite", "ambiguous", "role", "fan_in_axes", "fan_out_axes", "fusions", "dims"):
            assert getattr(found, verdict) == getattr(right, verdict), (right.name, verdict)
    # Only the second block is wider than in the base: its own fans count, not those of the whole.
    analysis = mupass.analyze(JoinedBlocks(True), randn(4, 5), base=JoinedBlocks(True, (16, 8)))
    assert [(g.m_in, g.m_out) for g in analysis.geometries if "blocks" in g.name] == [(1, 1), (3, 3)]


def test_vectors_and_data_on_a_block_diagonal() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, 24), nn.Linear(48, 3)
            self.row = nn.Parameter(torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            # [4, 24], [24] and a number: 4 + 1 + 1 rows of data, 24 + 24 + 1 columns
            h = torch.block_diag(torch.tanh(self.enter(x)), self.row, x.sum())
            return self.head(torch.tanh(h[:, :-1]))

    analysis = mupass.analyze(Rows(), randn(4, 5))
    assert analysis["row"].infinite == (True,) and analysis["enter.weight"].infinite == (True, False)
    assert analysis["head.weight"].infinite == (False, True)


class HeadWeights(nn.Module):
    """A weight a head, for queries that all heads read from one activation; and one that each reads alone."""

    def __init__(self, how: str, heads: int = 4, head_dim: int = 8):
        super().__init__()
        d = heads * head_dim
        self.how = how
        self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 5)
        self.query = nn.Parameter(torch.randn(heads, d, head_dim) / d**0.5)
        self.mix = nn.Parameter(torch.randn(heads, head_dim, head_dim) / head_dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        q = {
            "einsum": lambda: torch.einsum("btd,hdk->bhtk", h, self.query),
            "einsum, axis of one": lambda: torch.einsum("bhtd,hdk->bhtk", h[:, None], self.query),
            "matmul, axis of one": lambda: h[:, None] @ self.query,
        }[self.how]()
        y = F.scaled_dot_product_attention(q, q, q) @ self.mix
        return self.head(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["einsum", "einsum, axis of one", "matmul, axis of one"])
def test_an_axis_that_is_broadcast_is_not_shared(how: str) -> None:
    analysis = mupass.analyze(HeadWeights(how), randn(2, 6, 5), base=HeadWeights(how, heads=2))
    query, (mix,) = analysis["query"], analysis["mix"].uses
    assert (query.role, query.fan_in_axes, query.fan_out_axes) == ("hidden", (1,), (0, 2))
    assert (query.m_in, query.m_out) == (2, 2)
    assert (mix.fan_in, mix.fan_out) == ((1,), (2,))  # here every head has an activation of its own


def test_only_fixed_parts_of_a_table_are_read() -> None:
    class Relative(nn.Module):
        def __init__(self, d: int = 16):
            super().__init__()
            self.enter, self.head = nn.Linear(3, d), nn.Linear(d, 3)
            self.positions = nn.Parameter(torch.randn(9, d))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            scores = x @ self.positions[:5].t()
            return self.head(scores.softmax(-1) @ x)

    analysis = mupass.analyze(Relative(), randn(2, 5, 3))
    assert analysis["positions"].infinite == (False, True)


@pytest.mark.parametrize("how", ["two axes", "one axis", "second axis"])
def test_rows_that_a_mask_keeps_have_the_axes_of_all_rows(how: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.hidden, self.head = nn.Linear(5, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            h = torch.relu(self.enter(x))
            if how == "two axes":  # [2, 6, 24] -> [kept, 24]
                h = h[keep]
            elif how == "one axis":
                h = h.flatten(0, 1)[keep.flatten()]
            elif how == "second axis":
                h = h[:, keep[0]]
            return self.head(torch.relu(self.hidden(h)))

    keep = torch.arange(12).view(2, 6) % 3 > 0
    analysis = mupass.analyze(Masked(), (randn(2, 6, 5), keep))
    hidden = analysis["hidden.weight"]
    assert (hidden.role, hidden.infinite, hidden.ambiguous) == ("hidden", (True, True), (False, False))
    assert analysis["enter.weight"].infinite == (True, False) and analysis["head.weight"].role == "output"


def test_unknown_operators_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(3, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.linalg.householder_product(self.enter(x).T, torch.ones(3)).T)

    with pytest.raises(mupass.InferenceError, match="householder_product.*no dimension rule"):
        mupass.analyze(Odd(), randn(4, 3))


def test_a_hidden_output_is_a_policy() -> None:
    class Headless(nn.Module):
        def __init__(self, d: int = 8):
            super().__init__()
            self.enter, self.body = nn.Linear(3, d), nn.Linear(d, d)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return x + self.body(x)

    body = mupass.analyze(Headless(), randn(2, 3))["body.weight"]
    assert body.infinite == (True, True) and body.ambiguous == (True, True)
    assert "hidden state" in body.evidence[0]


class Recurrent(nn.Module):
    """A recurrent net on sequences of several lengths, packed or padded."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool, sort: bool = False):
        super().__init__()
        self.packed, self.sort = packed, sort
        self.table, self.net = nn.Embedding(20, 12), kind(12, 16, 2, batch_first=True, bidirectional=True)
        self.head, self.whole = nn.Linear(32, 5), nn.Linear(16, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        if not self.packed:
            y, state = self.net(x)
        else:
            pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
            y, state = self.net(pack(x, lengths, batch_first=True, enforce_sorted=self.sort))
            y, _ = pad(y, batch_first=True)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(y), self.whole(last[-1])


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_have_the_roles_of_padded_ones(kind: type[nn.RNNBase], sort: bool) -> None:
    inputs = randint(20, 3, 7), torch.tensor([7, 5, 2])
    padded, packed = (mupass.analyze(Recurrent(kind, p, sort), inputs, base=8) for p in (False, True))
    assert {g.role for g in packed.geometries} == {"input", "hidden", "output", "vector", "scalar"}
    for one, other in zip(padded.geometries, packed.geometries, strict=True):
        assert (other.role, other.infinite, other.dims) == (one.role, one.infinite, one.dims), one.name
        assert (other.ambiguous, other.fusions) == (one.ambiguous, one.fusions), one.name


class OneEinsum(nn.Module):
    """A product of several weights in one einsum, or one after the other."""

    def __init__(self, how: str, one: bool, d: int = 24):
        super().__init__()
        self.how, self.one = how, one
        self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 3)
        self.up, self.gate = (nn.Parameter(torch.randn(d, 2 * d) / d**0.5) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(2 * d))
        self.square = nn.Parameter(torch.randn(2 * d, 2 * d) / d**0.5)
        self.down = nn.Parameter(torch.randn(2 * d, d) / d**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        up = torch.einsum("bi,if->bf", h, self.up)
        sums = {
            "two layers": ("bi,if,fo->bo", (h, self.up, self.down), up),
            "three layers": ("bi,if,fg,go->bo", (h, self.up, self.square, self.down), up @ self.square),
            "gain": ("bi,if,f,fo->bo", (h, self.up, self.gain, self.down), up * self.gain),
            "gate": ("bi,bj,if,jf,fo->bo", (h, h, self.up, self.gate, self.down), up * (h @ self.gate)),
            "chain": (None, (h, self.up, self.square, self.down), up @ self.square),
        }
        equation, operands, hidden = sums[self.how]
        if not self.one:
            return self.head(hidden @ self.down)
        if equation is None:
            return self.head(torch.linalg.multi_dot(operands))
        return self.head(torch.einsum(equation, *operands))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("how", ["two layers", "three layers", "gain", "gate", "chain"])
def test_one_einsum_is_its_products_one_after_the_other(how: str) -> None:
    one, several = (mupass.analyze(OneEinsum(how, one), randn(4, 5)) for one in (True, False))
    for right in several.geometries:
        found = one[right.name]
        for verdict in ("infinite", "role", "fan_in_axes", "fan_out_axes"):
            assert getattr(found, verdict) == getattr(right, verdict), (right.name, verdict)


@pytest.mark.parametrize("how", ["inner", "addmv"])
def test_other_spellings_of_a_linear_layer(how: str) -> None:
    class Spelt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, 24), nn.Linear(40, 3)
            self.weight, self.bias = nn.Parameter(torch.randn(40, 24) / 5), nn.Parameter(torch.zeros(40))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.enter(x))
            if how == "inner":
                h = torch.inner(h, self.weight) + self.bias
            else:
                h = torch.stack([torch.addmv(self.bias, self.weight, row) for row in h])
            return self.head(torch.tanh(h))

    weight = mupass.analyze(Spelt(), randn(4, 5))["weight"]
    assert (weight.role, weight.infinite, weight.fan_in_axes) == ("hidden", (True, True), (1,))


class Products(nn.Module):
    """A hidden weight and a readout that are multiplied entry by entry and summed, or as matrices."""

    def __init__(self, by_hand: bool, d: int = 32):
        super().__init__()
        self.by_hand, self.enter = by_hand, nn.Linear(6, d)
        self.hidden, self.readout = nn.Parameter(torch.randn(d, d)), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.enter(x))
        if not self.by_hand:
            return torch.relu(h @ self.hidden.t()) @ self.readout
        h = torch.relu((h.unsqueeze(1) * self.hidden).sum(-1))
        return torch.sum(F.dropout(self.readout * h, 0.1, self.training), dim=1)


def test_a_product_and_its_sum_are_a_matrix_product() -> None:
    by_hand, reference = Products(True), Products(False)
    reference.load_state_dict(by_hand.state_dict())
    init = {"hidden": "fan_in", "readout": "fan_in"}
    plans = [
        mupass.transform(model, randn(4, 6), base=8, init=init).mupass_plan for model in (by_hand, reference)
    ]
    roles = {entry.geometry.name: entry.geometry.role for entry in plans[0].entries}
    assert roles["hidden"] == "hidden" and roles["readout"] == "output"
    for optimizer in ("sgd", "adam", "kfac", "shampoo"):
        ours, theirs = (plan.for_optimizer(optimizer) for plan in plans)
        for name in ours:
            assert ours[name].scales == theirs[name].scales
            assert ours[name].init_factor == theirs[name].init_factor
            assert not any(ours[name].geometry.ambiguous)
    coverage = {row.parameter: row for row in mupass.KFAC(by_hand).coverage()}
    assert "write x @ w" in coverage["readout"].reason and "write x @ w" in coverage["hidden"].reason


def test_a_mean_of_products_is_no_matrix_product() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.hidden, self.gain = (
                nn.Linear(6, 32),
                nn.Linear(32, 32),
                nn.Parameter(torch.ones(32)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return (torch.relu(self.hidden(torch.relu(self.enter(x)))) * self.gain).mean(-1)

    # The mean divides by the width, so that the gain moves the output as a gain does.
    assert mupass.analyze(Mean(), randn(4, 6))["gain"].role == "vector"
