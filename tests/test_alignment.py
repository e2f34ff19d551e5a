"""The alignment probe on updates whose exponents are known, and rates that follow an alignment."""

from __future__ import annotations

import math
from dataclasses import replace

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


def rates(net: nn.Module, optimizer: str, alignment: object) -> dict[str, float]:
    names = {p: n for n, p in net.named_parameters()}
    groups = mupass.param_groups(net, 1.0, optimizer=optimizer, alignment=alignment)  # type: ignore[arg-type]
    return {names[p]: g["lr"] for g in groups for p in g["params"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rates_follow_what_was_measured_on_a_narrow_copy(optimizer: str) -> None:
    narrow, x = make(64)
    probe = mupass.alignment(narrow)
    steps = torch.optim.Adam(mupass.param_groups(narrow, 1e-2, optimizer="adam"))
    for _ in range(3):
        steps.zero_grad()
        (narrow(torch.randn(8, 6)) - 1).square().mean().backward()
        steps.step()
    found = probe(x)
    wide, _ = make(256)  # four times its base width
    got, full, none = (rates(wide, optimizer, a) for a in (found, "full", "none"))
    for layer, measured in found.items():
        name = f"{layer}.weight"
        assert 0.5 < measured.alpha < 1
        # A sum of n terms is of order n^alpha, which the rate undoes; SGD's readout is bound otherwise.
        power = 1.0 if optimizer == "sgd" and layer == "4" else measured.alpha
        assert got[name] == pytest.approx(full[name] * 4 ** (1 - power))
        assert full[name] <= got[name] <= none[name]
    rest = [n for n in got if n not in ("2.weight", "4.weight")]
    assert all(got[n] == full[n] == none[n] for n in rest)


def test_a_measured_alignment_is_a_spec_like_any_other() -> None:
    net, x = make(64)
    probe = mupass.alignment(net)
    with torch.no_grad():
        net[2].weight += net[2].weight.sign() / 64
        net[4].weight += torch.outer(torch.ones(3), net[:4](x)[0].sign()) / 64
    exponents = mupass.measured_exponents(probe(x))
    assert list(exponents) == ["2.weight", "4.weight"] and 0.9 < exponents["4.weight"] <= 1.0
    spec = mupass.OptimizerSpec("adam", alignment="measured", exponents=tuple(exponents.items()))
    plan = net.mupass_plan.for_optimizer(spec)
    assert mupass.Plan.from_json(plan.to_json()) == plan
    assert f"m_in^{exponents['2.weight']:g}" in plan.explain("2.weight")
    fresh = mupass.transform(mlp(64), x, base=16, optimizer=spec)
    assert fresh.mupass_plan["2.weight"].scales == plan["2.weight"].scales


def test_measured_alignments_that_are_refused() -> None:
    net, x = make(64)
    still = mupass.alignment(net)(x)
    with pytest.raises(
        mupass.MupassError, match="no alignment was measured for 2, 4: the weight has not moved"
    ):
        mupass.param_groups(net, 0.1, optimizer="adam", alignment=still)
    moved = {n: replace(a, alpha=0.8) for n, a in still.items()}
    with pytest.raises(mupass.PlanError, match=r"no parameter '3\.weight'"):
        mupass.param_groups(net, 0.1, optimizer="adam", alignment={"3": moved["2"]})
    before, other = (
        mlp(64),
        mupass.OptimizerSpec("adam", alignment="measured", exponents=(("3.weight", 0.8),)),
    )
    with pytest.raises(mupass.PlanError, match=r"no parameter '3\.weight'"):
        mupass.transform(before, x, optimizer=other)
    assert not hasattr(before, "mupass_plan")
    with pytest.raises(mupass.PlanError, match="alignment= has rows for sgd, adam"):
        mupass.param_groups(net, 0.1, optimizer="muon", alignment=moved)
    for wrong in ({"exponents": (("2.weight", 0.7),)}, {"alignment": "measured"}):
        with pytest.raises(mupass.PlanError, match="needs exponents"):
            mupass.OptimizerSpec("adam", **wrong)
    with pytest.raises(mupass.PlanError, match=r"exponent of 2\.weight must be from 1/2 to 1, not 1\.2"):
        mupass.OptimizerSpec("adam", alignment="measured", exponents=(("2.weight", 1.2),))
