"""What the code itself scales with the width before a weight reads it is undone by that weight's scales."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

WIDTHS = (64, 128, 256, 512)


class Scaled(nn.Module):
    """A hidden layer, a gain and a tied readout, each behind a power of the width."""

    def __init__(self, width: int):
        super().__init__()
        self.tokens = nn.Embedding(20, width)
        self.mid, self.conv = nn.Linear(width, width), nn.Conv1d(width, width, 1)
        self.gain = nn.Parameter(torch.full((width,), 1.3))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.tokens.weight
        for bias in (self.mid.bias, self.conv.bias):
            nn.init.zeros_(bias)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mid(F.normalize(self.tokens(ids), dim=-1)).tanh()
        h = self.conv((h * h.shape[-1] ** 0.5).transpose(-1, -2)).transpose(-1, -2).tanh()
        h = F.normalize(h, dim=-1) * self.gain
        return self.head(h * h.shape[-1] ** -0.5)


IDS = torch.randint(20, (3, 2), generator=torch.Generator().manual_seed(5))
TARGETS = torch.randint(20, (3, 2), generator=torch.Generator().manual_seed(6))
OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(mupass.param_groups(m, 0.1, optimizer="sgd")),
    "adam": lambda m: torch.optim.Adam(mupass.param_groups(m, 1e-3, optimizer="adam", eps=1e-12)),
    "kfac": lambda m: mupass.KFAC(m, lr=0.1, damping=1.0, momentum=0.0, fallback="sgd", fallback_lr=0.1),
    "shampoo": lambda m: mupass.Shampoo(
        m, lr=0.1, damping=1.0, momentum=0.0, fallback="sgd", fallback_lr=0.1
    ),
}


def built(width: int, seed: int) -> nn.Module:
    torch.manual_seed(100 * width + seed)
    return Scaled(width).double()


def kept(table: dict[str, Tensor], name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
    table[name], table[f"{name} out"] = args[0].detach(), out.detach()


def slope(values: dict[int, list[float]]) -> float:
    x = torch.tensor([math.log(w) for w in values]).double()
    y = torch.tensor([sum(map(math.log, v)) / len(v) for v in values.values()]).double()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_outputs_and_updates_do_not_scale_with_width(optimizer: str) -> None:
    names = ("mid", "conv", "gain", "head")
    start = {n: {w: [] for w in WIDTHS} for n in names}
    moved = {n: {w: [] for w in WIDTHS} for n in names}
    for width in WIDTHS:
        for seed in range(4):
            model = mupass.transform(
                built(width, seed), IDS, base=built(32, 9), init={"tokens.*": "constant"}
            )
            inputs: dict[str, Tensor] = {}
            for name in ("mid", "conv", "head"):
                getattr(model, name).register_forward_hook(partial(kept, inputs, name))
            optim = OPTIMIZERS[optimizer](model)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            F.cross_entropy(model(IDS).flatten(0, 1), TARGETS.flatten()).backward()
            optim.step()
            dw = {n: p.detach() - before[n] for n, p in model.named_parameters()}
            unit = F.normalize(inputs["conv out"].transpose(-1, -2).tanh(), dim=-1)
            effects = {
                "mid": inputs["mid"] @ dw["mid.weight"].T,
                "conv": dw["conv.weight"][..., 0] @ inputs["conv"],
                "gain": unit * dw["gain"],
                "head": inputs["head"] @ dw["tokens.weight"].T,
            }
            outputs = {n: inputs[f"{n} out"] for n in ("mid", "conv", "head")}
            outputs["gain"] = unit * before["gain"]
            for name in names:
                start[name][width].append(outputs[name].square().mean().sqrt().item())
                moved[name][width].append(effects[name].square().mean().sqrt().item())
    for name in names:
        assert abs(slope(moved[name])) < 0.15, (name, moved[name])
        if name != "head":
            assert abs(slope(start[name])) < 0.1, (name, start[name])
    assert slope(start["head"]) == pytest.approx(-0.5, abs=0.2)


def test_which_parameters_and_why() -> None:
    plan = mupass.transform(built(128, 0), IDS, base=built(64, 0), init={"tokens.*": "constant"}).mupass_plan
    given = {n: plan[n].geometry.given for n in plan if plan[n].geometry.given}
    assert given == {"tokens.weight": -0.5, "mid.weight": -0.5, "conv.weight": 0.5, "gain": -0.5}
    assert not any("multiplies" in w or "unit length" in w for w in plan.warnings)
    assert "aten.div in the root module" in plan.explain("gain")
    assert plan["gain"].init_factor == pytest.approx(2**0.5)
    assert plan["tokens.weight"].scales.multiplier == pytest.approx(2**-0.5)
    assert mupass.Plan.from_json(plan.to_json()) == plan


def test_nothing_changes_at_the_base_width() -> None:
    model = built(64, 0)
    before = model(IDS)
    plan = mupass.transform(model, IDS, base=64).mupass_plan
    assert torch.equal(model(IDS), before)
    for entry in plan.entries:
        assert {entry.scales.lr, entry.scales.init, entry.scales.multiplier, entry.scales.epsilon} == {1.0}


def test_one_model_cannot_tell_of_a_number_whether_it_follows_the_width() -> None:
    with pytest.warns(mupass.MupassWarning, match="multiplies by") as found:
        plan = mupass.transform(built(128, 0), IDS, base=64, init={"tokens.*": "constant"}).mupass_plan
    assert len(found) == 2
    assert {n for n in plan if plan[n].geometry.given} == {"mid.weight", "gain"}
    named = [w for w in plan.warnings if "multiplies by" in w]
    assert len(named) == 2 and all("to the power" in w for w in named)


def test_a_number_that_is_the_same_in_a_second_instance_does_not_follow_the_width() -> None:
    class Fixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.enter(x).relu() * 0.125)  # 64 ** -0.5 by chance

    x = torch.randn(2, 5)
    assert any("0.125" in w for w in mupass.analyze(Fixed(64), x, base=16).warnings)
    found = mupass.analyze(Fixed(64), x, base=Fixed(16))
    assert not any("0.125" in w for w in found.warnings)
    assert found["head.weight"].given == 0


def test_a_weight_that_also_reads_something_else_is_left_alone_and_the_place_named() -> None:
    class Both(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.enter, self.mid, self.head = (
                nn.Linear(5, width),
                nn.Linear(width, width),
                nn.Linear(width, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x).relu()
            return self.head(self.mid(F.normalize(x, dim=-1)) + self.mid(x))

    found = mupass.analyze(Both(), torch.randn(2, 5), base=16)
    assert found["mid.weight"].given == 0
    assert any("unit length" in w for w in found.warnings)
