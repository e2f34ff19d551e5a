"""The alignment probe on updates whose exponents are known, and rates that follow an alignment."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mupass

N = 1024


def mlp(w: int = N) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 3))


def make(w: int = N) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 6)
    return mupass.transform(mlp(w), x, base=w // 4), x


def test_a_rank_one_update_along_the_input_is_aligned_and_a_random_one_is_not() -> None:
    net, x = make()
    probe = mupass.alignment(net)
    h = net[:2](x)[0].detach()
    with torch.no_grad():
        net[2].weight += torch.outer(torch.randn(N), h) / N
        net[4].weight += torch.randn(3, N) / N
    found = probe(x)
    assert list(found) == ["2", "4"]
    assert found["2"].alpha == pytest.approx(1.0, abs=1e-4)
    assert found["4"].alpha == pytest.approx(0.5, abs=0.15)
    # The first layer did not move: the second sees no change of its inputs.
    assert math.isnan(found["2"].omega) and math.isnan(found["2"].both)
    # What moves the third layer's inputs is independent of its weights.
    assert found["4"].omega == pytest.approx(0.5, abs=0.15)
    assert found["2"].total == pytest.approx(0.5, abs=0.15)


def test_one_step_of_sgd_is_aligned() -> None:
    net, x = make()
    probe = mupass.alignment(net)
    optimizer = torch.optim.SGD(mupass.param_groups(net, 0.1, optimizer="sgd"))
    assert all(math.isnan(a.alpha) and math.isfinite(a.total) for a in probe(x).values())
    (net(x) - 1).square().mean().backward()
    optimizer.step()
    found = probe(x)
    assert all(a.alpha == pytest.approx(1.0, abs=1e-3) for a in found.values())
    assert found["4"].omega > 0.9  # the hidden layer moved along the readout's weights


def test_convolutions_and_calls_in_training_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Dropout(), nn.Conv2d(64, 64, 3), nn.Flatten()]
    net = mupass.transform(nn.Sequential(*layers, nn.Linear(64 * 16, 2)), x, base=16)
    probe = mupass.alignment(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    hidden = net.eval()[:3](x).detach()
    net.train()
    patch = torch.nn.functional.unfold(hidden, 3).mean((0, 2)).view(64, 3, 3)
    with torch.no_grad():
        net[3].weight += torch.einsum("o,ikl->oikl", torch.randn(64), patch) / 1000
    found = probe(x)
    assert list(found) == ["3", "5"] and 0.5 < found["3"].alpha <= 1.0
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k != "3.weight")


def test_what_cannot_be_probed() -> None:
    with pytest.raises(mupass.PlanError):
        mupass.alignment(mlp(8))
    torch.manual_seed(0)
    ids = torch.arange(6).view(2, 3)

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.out = nn.Embedding(9, 8), nn.Parameter(torch.randn(8, 9))

        def forward(self, ids: Tensor) -> Tensor:
            return self.emb(ids) @ self.out

    with pytest.raises(mupass.MupassError, match="no nn.Linear or nn.Conv layer"):
        mupass.alignment(mupass.transform(Free(), ids, base=4))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_param_groups_take_an_alignment(optimizer: str) -> None:
    net, _ = make()
    plain, full, none = (
        {
            p: g["lr"]
            for g in mupass.param_groups(net, 0.1, optimizer=optimizer, alignment=a)
            for p in g["params"]
        }
        for a in (None, "full", "none")
    )
    assert plain == full
    readout = 1.0 if optimizer == "sgd" else 2.0  # sqrt(4), but SGD's readout feeds the gradients below
    for index, gain in ((0, 1.0), (2, 2.0), (4, readout)):
        weight = net[index].weight
        assert none[weight] == pytest.approx(gain * full[weight])
    with pytest.raises(mupass.PlanError, match="alignment="):
        mupass.param_groups(net, 0.1, optimizer="shampoo", alignment="full")
    explained = net.mupass_plan.for_optimizer(mupass.OptimizerSpec(optimizer, alignment="none"))
    assert "arXiv 2407.05872" in explained.explain("2.weight")
    assert mupass.Plan.from_json(explained.to_json()) == explained
