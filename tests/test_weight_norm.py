"""Weights divided by their own size: weight norm has a rule, spectral norm and unit length are named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import mupass

pytestmark = [
    pytest.mark.filterwarnings("ignore::mupass._errors.MupassWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": weight_norm,
    "parametrization": parametrizations.weight_norm,
}
MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(mupass.param_groups(m, 1e-2, optimizer="sgd")),
    "adam": lambda m: torch.optim.Adam(mupass.param_groups(m, 1e-3, optimizer="adam"), eps=1e-30),
    "muon": lambda m: mupass.Muon(m, 1e-2, roles=("input", "hidden", "output"), fallback="adamw"),
    "kfac": lambda m: mupass.KFAC(m, 1e-2, damping=1e-2, momentum=0, fallback="adamw"),
    "shampoo": lambda m: mupass.Shampoo(
        m, 1e-2, damping=1e-4, momentum=0, graft="none", root_every=1, fallback="adamw"
    ),
}


def build(norm: Callable[[nn.Module], nn.Module], width: int, hidden: bool = True) -> nn.Sequential:
    middle = nn.Linear(width, width)
    return nn.Sequential(
        nn.Linear(20, width), nn.Tanh(), norm(middle) if hidden else middle, nn.Tanh(),
        norm(nn.Linear(width, 8, bias=False)),
    )  # fmt: skip


def moved(
    model: nn.Sequential, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> list[float]:
    """Return log RMS(dW h) of every layer in the last of some steps, W what the layer multiplies by."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 20, generator=generator).double()
    y = 1 + 0.5 * torch.randn(16, 8, generator=generator).double()
    model = mupass.transform(model.double(), x, base=64)
    optimizer = make(model)
    for _ in range(steps):
        with torch.no_grad():
            model(x)  # the hook computes the weight anew
            inputs = [x, model[:2](x), model[:4](x)]
            before = [model[i].weight.detach().clone() for i in (0, 2, 4)]
        optimizer.zero_grad()
        (y * model(x)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        model(x)
        changes = [model[i].weight - w for i, w in zip((0, 2, 4), before, strict=True)]
        return [(h @ c.T).square().mean().sqrt().log().item() for h, c in zip(inputs, changes, strict=True)]


@pytest.mark.thin(2)
@pytest.mark.sample(every=7)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_layer_is_flat_under_weight_norm(form: str, optimizer: str, steps: int) -> None:
    widths, logs = (64, 128, 256, 512), []
    for width in widths:
        torch.manual_seed(0)
        logs.append(moved(build(FORMS[form], width), MAKERS[optimizer], steps))
    x = torch.tensor(widths).double().log()
    y = torch.tensor(logs).double()
    slopes = ((x - x.mean()) @ (y - y.mean(0))) / (x - x.mean()).square().sum()
    assert slopes.abs().max() < 0.15, slopes


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_normed_readout_starts_as_the_plain_one(form: str) -> None:
    """At four times the base width entries of the readout are a half of those of the plain initialization."""
    torch.manual_seed(0)
    model = build(FORMS[form], 256)
    with torch.no_grad():
        model(torch.zeros(1, 20))
        before = [model[i].weight.detach().clone() for i in (2, 4)]
    mupass.transform(model, torch.zeros(4, 20), base=64)
    model(torch.zeros(1, 20))
    torch.testing.assert_close(model[2].weight, before[0])
    torch.testing.assert_close(model[4].weight, before[1] / 2)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes_at_the_base_width(form: str) -> None:
    model = build(FORMS[form], 64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mupass.transform(model, torch.zeros(4, 20), base=64)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plan = model.mupass_plan
    assert all(plan[n].scales.lr == plan[n].scales.init == 1 for n in plan)


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("train", [True, False])
def test_a_power_iteration_is_no_use_of_the_weight(
    norm: Callable[[nn.Module], nn.Module], train: bool
) -> None:
    model = nn.Sequential(
        norm(nn.Linear(20, 64)), nn.Tanh(), norm(nn.Linear(64, 64)), nn.Tanh(), nn.Linear(64, 8)
    )
    model.train(train)
    analysis = mupass.analyze(model, torch.zeros(4, 20), base=32)
    weights = [g for g in analysis.geometries if len(g.shape) == 2]
    assert sorted((g.role, g.fan_in_axes) for g in weights) == [
        ("hidden", (1,)),
        ("input", (1,)),
        ("output", (1,)),
    ]
    assert not any(g.readout_uses for g in weights)
    first = next(g.name for g in weights if g.role == "input")
    assert [w for w in analysis.warnings if w.startswith(f"{first}: ") and "divides this weight" in w]


def test_a_readout_of_unit_length_is_named() -> None:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.normalize(self.weight, dim=1))

    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), Cosine(64, 8, bias=False))
    analysis = mupass.analyze(model, torch.zeros(4, 20), base=32)
    assert analysis["2.weight"].role == "output"
    assert [w for w in analysis.warnings if w.startswith("2.weight: ") and "divides this weight" in w]


@pytest.mark.sample("adam")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_check_passes_a_weight_normed_readout(optimizer: str) -> None:
    x, y = torch.randn(32, 20), torch.randint(8, (32,))
    normed = partial(build, parametrizations.weight_norm)
    check = mupass.coord_check(normed, [(x, y)], optimizer=optimizer, widths=(64, 128, 256), steps=1)
    assert check.ok, check.verdict()
