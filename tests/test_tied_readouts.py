"""Readouts by a tied parameter that the code multiplies itself, with no layer of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randint

import mupass

VOCAB, BASE = 20, 16


class Tied(nn.Module):
    """A network on tokens whose readout is a product with its own table, written in several ways."""

    def __init__(self, how: str, d: int = 64):
        super().__init__()
        self.how = how
        self.table, self.hidden, self.norm = nn.Embedding(VOCAB, d), nn.Linear(d, d), nn.LayerNorm(d)
        self.offset = nn.Parameter(torch.randn(VOCAB))
        self.end = nn.Dropout(0.0)

    def forward(self, ids: Tensor) -> Tensor:
        w = self.table.weight
        x = self.norm(torch.tanh(self.hidden(self.table(ids))))
        if self.how == "transposed":
            return x @ w.T
        if self.how == "functional":
            return F.linear(x, w, self.offset)
        if self.how == "matmul and offset":
            return torch.matmul(x, w.t()) + self.offset
        if self.how == "einsum":
            return torch.einsum("btd,vd->btv", x, w)
        if self.how == "last position":
            return F.linear(x[:, -1], w)
        if self.how == "behind a module":
            return self.end(torch.tanh(x)) @ w.T
        if self.how == "behind no module":
            return torch.tanh(x) @ w.T
        if self.how == "also read":
            return x @ w.T + x.mean()
        raise ValueError(self.how)


WAYS = ["transposed", "functional", "matmul and offset", "einsum", "last position", "behind a module"]
IDS = randint(VOCAB, 3, 5)


def by_hand(net: Tied, scale: float) -> Tensor:
    """The logits of the same weights with what the readout reads multiplied; the offset is left alone."""
    bare = Tied(net.how)
    values = dict(net.named_parameters())
    bare.load_state_dict({**values, "offset": torch.zeros(VOCAB)})
    offset = net.offset if net.how in ("functional", "matmul and offset") else 0.0
    return bare(IDS) * scale + offset


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", WAYS)
def test_the_multiplier_goes_on_what_the_readout_reads(how: str, mode: str) -> None:
    net = mupass.transform(Tied(how).train(mode == "train"), IDS, base=BASE, optimizer="sgd")
    entry = net.mupass_plan["table.weight"]
    assert entry.geometry.role == "input" and entry.scales.multiplier == BASE / 64
    torch.testing.assert_close(net(IDS), by_hand(net, BASE / 64))


@pytest.mark.parametrize("how", ["transposed", "functional", "einsum"])
def test_a_folded_model_computes_the_same_without_hooks(how: str) -> None:
    net = mupass.transform(Tied(how).eval(), IDS, base=BASE)
    want = net(IDS)
    plain = mupass.fold(net, inplace=False, keep_plan=False)
    torch.testing.assert_close(plain(IDS), want)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_a_readout_that_cannot_be_untied_is_not_folded() -> None:
    net = mupass.transform(Tied("behind a module").eval(), IDS, base=BASE)
    with pytest.raises(mupass.TransformError, match=r"table\.weight.*takes no weight of its own"):
        mupass.fold(net)


@pytest.mark.parametrize(
    ("how", "reason"), [("behind no module", "ends with aten.tanh"), ("also read", "also read by aten.mean")]
)
def test_without_such_a_module_the_refusal_names_it(how: str, reason: str) -> None:
    with pytest.raises(
        mupass.TransformError, match=rf"an embedding and also the readout.*{reason}"
    ) as caught:
        mupass.transform(Tied(how), IDS, base=BASE)
    assert "nn.Dropout(0.0)" in str(caught.value)


def test_a_saved_plan_carries_where_the_multiplier_goes(tmp_path) -> None:
    net = mupass.transform(Tied("transposed").eval(), IDS, base=BASE)
    net.mupass_plan.save(tmp_path / "plan.json")
    other = Tied("transposed").eval()
    other.load_state_dict(Tied("transposed").state_dict())
    mupass.transform(other, plan=mupass.Plan.load(tmp_path / "plan.json"))
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(IDS), net(IDS))


class Boltzmann(nn.Module):
    """A restricted Boltzmann machine, one step of Gibbs sampling by means."""

    def __init__(self, hidden: int = 64, visible: int = 12, ended: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, visible) / visible**0.5)
        self.of_visible, self.of_hidden = (
            nn.Parameter(torch.zeros(visible)),
            nn.Parameter(torch.zeros(hidden)),
        )
        self.end = nn.Dropout(0.0) if ended else None

    def forward(self, v: Tensor) -> Tensor:
        h = torch.sigmoid(F.linear(v, self.weight, self.of_hidden))
        h = self.end(h) if self.end is not None else h
        return torch.sigmoid(F.linear(h, self.weight.t(), self.of_visible))


def test_a_weight_and_its_transpose_are_told_from_an_embedding() -> None:
    v = torch.rand(5, 12)
    message = (
        r"weight is a first layer \(a weight from data to the width\) and also the readout.*aten\.sigmoid"
    )
    with pytest.raises(mupass.TransformError, match=message):
        mupass.transform(Boltzmann(), v, base=BASE)
    net = Boltzmann(ended=True)
    h = torch.sigmoid(F.linear(v, net.weight, net.of_hidden))
    want = torch.sigmoid(F.linear(h * BASE / 64, net.weight.t(), net.of_visible))
    mupass.transform(net, v, base=BASE)
    torch.testing.assert_close(net(v), want)
    roles = {g.name: g.role for g in (e.geometry for e in net.mupass_plan.entries)}
    assert roles == {"weight": "input", "of_visible": "scalar", "of_hidden": "vector"}


def test_the_update_of_a_tied_autoencoder_does_not_depend_on_its_width() -> None:
    """One step of SGD moves hidden units and outputs by amounts that are the same at all widths."""
    v = torch.rand(64, 12, generator=torch.Generator().manual_seed(1))
    moves = []
    for width in (64, 1024):
        torch.manual_seed(0)
        net = mupass.transform(Boltzmann(width, ended=True), v, base=64, optimizer="sgd")
        optimizer = torch.optim.SGD(mupass.param_groups(net, lr=1.0, optimizer="sgd"))
        before, hidden = net(v).detach(), F.linear(v, net.weight).detach()
        F.mse_loss(net(v), v, reduction="sum").div(len(v)).backward()
        optimizer.step()
        moves.append([(net(v) - before).std().item(), (F.linear(v, net.weight) - hidden).std().item()])
    for narrow, wide in zip(*moves, strict=True):
        assert 0.4 < wide / narrow < 2.5, moves


class Alibi(nn.Module):
    """A transformer with linear biases on its scores, and a readout by its own table."""

    def __init__(self, heads: int = 4, head_dim: int = 8):
        super().__init__()
        d = heads * head_dim
        self.heads = heads
        self.table, self.enter, self.norm = nn.Embedding(VOCAB, d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.mix = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.register_buffer("slopes", 2.0 ** (-8 * torch.arange(1, heads + 1) / heads))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        places = torch.arange(ids.shape[1])
        q, k, v = self.qkv(self.enter(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores + self.slopes[:, None, None] * (places - places[:, None])
        x = x + self.mix((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return F.linear(self.norm(x), self.table.weight)


def test_linear_biases_on_scores_with_a_functional_readout() -> None:
    net = mupass.transform(Alibi(), IDS, base=BASE)
    roles = {e.geometry.name: e.geometry.role for e in net.mupass_plan.entries}
    assert {n: r for n, r in roles.items() if r != "vector"} == {
        "table.weight": "input",
        "qkv.weight": "hidden",
        "mix.weight": "hidden",
    }
    assert [u.fed_by for u in net.mupass_plan["table.weight"].geometry.readout_uses] == [("norm",)]


def test_deberta_whose_head_multiplies_by_the_table() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaV2Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=16,
        legacy=False,
    )
    net, inputs = transformers.DebertaV2ForMaskedLM(config).eval(), {"input_ids": randint(99, 2, 8)}
    mupass.transform(net, inputs, base=8)
    (use,) = net.mupass_plan["deberta.embeddings.word_embeddings.weight"].geometry.readout_uses
    assert use.fed_by == ("lm_predictions.lm_head.LayerNorm",)
    logits = net(**inputs).logits
    bias = net.lm_predictions.lm_head.bias.data
    bias += 1.0
    torch.testing.assert_close(net(**inputs).logits, logits + 1.0)
    hooks = net.lm_predictions.lm_head.LayerNorm._forward_hooks
    (held,) = [key for key, hook in hooks.items() if type(hook).__name__ == "OutputMultiplier"]
    del hooks[held]
    torch.testing.assert_close(net(**inputs).logits - bias, (logits + 1.0 - bias) * 4)
