"""Slips in arguments: an error of mupass says what to pass, wherever they are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mupass

X, Y = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def transformed() -> nn.Module:
    return mupass.transform(mlp(), X, base=32)


def swept(grid: Any) -> Any:
    return mupass.sweep(mlp(), [(X, Y)], grid, widths=[32], steps=2, progress=False)


SLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    "no base": (lambda: mupass.analyze(mlp(), X, base={}), "names no dimension"),
    "a flag as text": (lambda: mupass.transform(mlp(), X, inplace="no"), "inplace must be True or False"),
    "trained as text": (lambda: mupass.transform(mlp(), X, trained="yes"), "trained must be True or False"),
    "strict as number": (lambda: mupass.transform(mlp(), X, strict=1), "strict must be True or False"),
    "fold": (lambda: mupass.fold(transformed(), inplace="no"), "inplace must be True or False"),
    "a grid by numbers": (lambda: swept({3: [1]}), "takes no 3"),
    "a seed as text": (lambda: mupass.resize(mlp(), 128, example_inputs=X, seed="a"), "seed must be"),
    "no path of a report": (lambda: mupass.report(transformed().mupass_plan), "path of the page"),
    "no path of a plan": (lambda: transformed().mupass_plan.save(None), "path of a file is needed"),
    "a parameter by number": (lambda: transformed().mupass_plan[0], "no parameter 0"),
    "another optimizer": (
        lambda: mupass.LevenbergMarquardt(torch.optim.AdamW(transformed().parameters())),
        "takes a mupass.KFAC, not a AdamW",
    ),
    "no outputs": (lambda: mupass.sample_targets("x"), "a tensor, not 'x'"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_told(name: str) -> None:
    call, says = SLIPS[name]
    with pytest.raises(mupass.MupassError, match=says):
        call()


@pytest.mark.parametrize("groups", [0, -1, 3, 10**400])
def test_groups_that_cannot_be_are_refused_in_a_plan(groups: int) -> None:
    content = json.loads(transformed().mupass_plan.to_json())
    content["entries"][2]["geometry"]["sites"][0]["groups"] = groups
    net, before = mlp(), mlp().state_dict()
    with pytest.raises(mupass.PlanError, match="groups"):
        mupass.transform(net, plan=mupass.Plan.from_json(json.dumps(content)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_parameter_without_entries_is_resized() -> None:
    class Empty(nn.Module):
        def __init__(self, d: int = 32):
            super().__init__()
            self.enter, self.mix, self.head = nn.Linear(10, d), nn.Linear(d, d), nn.Linear(d, 4)
            self.extra = nn.Parameter(torch.zeros(d, 0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.mix(torch.relu(self.enter(x))))) + self.extra.sum()

    wide = mupass.resize(Empty(), scale=2, example_inputs=X, seed=0)
    assert wide.mix.weight.shape == (64, 64) and wide.extra.numel() == 0
    assert wide(X).shape == (8, 4)
