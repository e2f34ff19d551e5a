"""param_groups: few groups with the plan's learning rates, for any optimizer of torch.optim."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mupass
from benchmarks.one_step_slopes import Lion
from mupass._optim.groups import param_groups
from mupass._transform import transform

WIDTH, BASE = 128, 16
M = WIDTH / BASE


def model(parameterization: str = "mup", base: float = BASE) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(20, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    net = nn.Sequential(*layers)
    return transform(net, torch.zeros(2, 20), base=base, parameterization=parameterization)


def by_name(net: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    names = {p: n for n, p in net.named_parameters()}
    return {names[p]: group[key] for group in groups for p in group["params"]}


def test_few_groups_that_cover_every_parameter_once() -> None:
    net = model()
    groups = param_groups(net, 0.1, optimizer="sgd")
    assert len(groups) == 3  # input and biases; hidden and output bias; readout
    assert sum(len(g["params"]) for g in groups) == 6
    assert set(by_name(net, groups, "lr")) == {n for n, _ in net.named_parameters()}
    assert len(param_groups(model(base=WIDTH), 0.1)) == 1


def test_learning_rates_are_multiplied_and_the_factor_is_kept() -> None:
    net = model()
    groups = param_groups(net, 0.1, optimizer="sgd")
    scale = by_name(net, groups, "mupass_scale")
    assert scale["0.weight"] == M and scale["2.weight"] == 1 and scale["4.weight"] == 1 / M
    assert scale["0.bias"] == scale["2.bias"] == M and scale["4.bias"] == 1
    assert by_name(net, groups, "lr") == pytest.approx({n: 0.1 * s for n, s in scale.items()})


def test_epsilon_belongs_to_adam() -> None:
    net = model()
    eps = by_name(net, param_groups(net, 0.1, eps=1e-6), "eps")
    assert eps["2.weight"] == pytest.approx(1e-6 / M) and eps["4.weight"] == pytest.approx(1e-6)
    assert by_name(net, param_groups(net, 0.1), "eps")["4.weight"] == 1e-8
    assert all("eps" not in g for g in param_groups(net, 0.1, optimizer="sgd"))
    with pytest.raises(mupass.OptimizerError, match="eps belongs to adam and adamw"):
        param_groups(net, 0.1, optimizer="sgd", eps=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_decay_alone_shrinks_all_weights_by_the_same_factor(name: str) -> None:
    # With zero gradients only the decay acts; torch multiplies it by the group's learning rate.
    net = model()
    cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lion": Lion}[name]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = cls(param_groups(net, 0.1, optimizer=name, weight_decay=0.2))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (1 - 0.1 * 0.2))


def test_decay_inside_adam_keeps_its_share_of_the_gradient() -> None:
    # Adam normalizes gradient + decay * weight; its effect on a weight, lr * decay * weight / |gradient|,
    # must not depend on width. |gradient| is of the order of epsilon's factor.
    net = model()
    groups = param_groups(net, 1.0, optimizer="adam", weight_decay=1.0)
    decay, lr, eps = (by_name(net, groups, key) for key in ("weight_decay", "lr", "eps"))
    effect = {n: lr[n] * decay[n] / (eps[n] / 1e-8) for n in lr}
    assert effect == pytest.approx(dict.fromkeys(effect, 1.0))


def test_relative_schedulers_keep_the_factors() -> None:
    net = model()
    optimizer = torch.optim.AdamW(param_groups(net, 0.1))
    first = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5 * lr for lr in first])


def test_one_cycle_needs_its_peak_by_group_as_documented() -> None:
    groups = param_groups(model(), 0.1, optimizer="sgd")
    peaks = [g["mupass_scale"] * 0.3 for g in groups]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=10)
    ratios = {g["lr"] / g["mupass_scale"] for g in optimizer.param_groups}
    assert max(ratios) == pytest.approx(min(ratios))
    scalar = torch.optim.SGD(param_groups(model(), 0.1, optimizer="sgd"), momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(scalar, max_lr=0.3, total_steps=10)
    assert len({g["lr"] for g in scalar.param_groups}) == 1  # why the list is needed


def test_frozen_parameters_have_groups_for_when_they_are_thawed() -> None:
    net = model()
    want = by_name(net, param_groups(net, 0.1), "lr")
    net.get_parameter("0.weight").requires_grad_(False)
    assert by_name(net, param_groups(net, 0.1), "lr") == want
    net.requires_grad_(False)
    with pytest.raises(mupass.OptimizerError, match="every parameter of the model is frozen"):
        param_groups(net, 0.1)


def test_through_compile_and_after_deepcopy() -> None:
    net = model()
    compiled: Any = torch.compile(net, backend="eager")
    assert by_name(net, param_groups(compiled, 0.1), "lr") == by_name(net, param_groups(net, 0.1), "lr")


def test_sizes_that_are_not_whole_numbers_do_not_split_groups() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()]
    net = transform(nn.Sequential(*layers, nn.Linear(100, 10)), torch.zeros(2, 20), base=37)
    assert len(param_groups(net, 0.1, optimizer="sgd")) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("field", ["lr", "weight_decay", "eps"])
def test_bad_numbers_are_refused(field: str, value: float) -> None:
    arguments: dict[str, Any] = {"lr": 0.1, field: value}
    with pytest.raises(mupass.OptimizerError, match=f"{field} must be a finite number >= 0"):
        param_groups(model(), **arguments)


def test_unknown_optimizer_and_plain_model_are_refused() -> None:
    with pytest.raises(mupass.PlanError, match="unknown optimizer 'sophia'"):
        param_groups(model(), 0.1, optimizer="sophia")
    with pytest.raises(mupass.PlanError, match="call mupass.transform"):
        param_groups(nn.Linear(3, 3), 0.1)


@pytest.mark.parametrize("how", ["alone", "other optimizer", "own group", "later"])
def test_layers_that_were_added_are_told_where_nothing_trains_them(how: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(5, 6)
    mupass.transform(net, x, base=16)
    optimizers = [torch.optim.AdamW(mupass.param_groups(net, lr=1e-3))]
    start = 12 if how == "later" else 0
    told: list[tuple[int, str]] = []
    for step in range(35):
        if step == start:
            net.append(nn.Linear(3, 3))
            before = net[3].weight.detach().clone()
            if how == "other optimizer":
                optimizers.append(torch.optim.SGD(net[3].parameters(), lr=1e-3))
            if how == "own group":
                optimizers[0].add_param_group({"params": list(net[3].parameters()), "lr": 1e-3})
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x).square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for optimizer in optimizers:
                optimizer.step()
        told += [(step, str(w.message)) for w in caught if w.category is mupass.MupassWarning]
    trained = how in ("other optimizer", "own group")
    assert trained != torch.equal(net[3].weight, before)
    assert len(told) == (0 if trained else 1)
    for step, message in told:
        assert "AdamW: 3.weight, 3.bias came into the model" in message and step <= start + 20
