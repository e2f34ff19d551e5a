"""Weights whose entries have a mean, by a function or from the start: their sums grow with the width."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_warnings import raised
from torch import Tensor, nn

import mupass

X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
Function = Callable[[Tensor], Tensor]
WITH_A_MEAN: dict[str, Function] = {
    "softplus": F.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "abs": torch.abs,
    "relu": F.relu,
    "clamped": lambda w: w.clamp(min=0),
    "one sign, then a gain": lambda w: w.abs() * torch.linspace(0.5, 1, len(w))[:, None],
}
AROUND_ZERO: dict[str, Function] = {
    "tanh": torch.tanh,
    "sine": torch.sin,
    "cube": lambda w: w**3,
    "square": lambda w: w * w,
    "power": lambda w: w**2,
    "halves": lambda w: (w + w) / 2,
    "softplus less its mean": lambda w: F.softplus(w) - math.log(2),
    "rounded, straight through": lambda w: w + (torch.round(w * 64) / 64 - w).detach(),
    "masked": lambda w: w * (torch.arange(len(w)) % 2)[:, None],
    "shares that sum to one": lambda w: w.softmax(1),
    "shares of sizes": lambda w: w.abs() / w.abs().sum(1, keepdim=True),
    "unit length": lambda w: F.normalize(w, dim=1),
}
FUNCTIONS = {**WITH_A_MEAN, **AROUND_ZERO}


class Through(nn.Linear):
    """A linear layer of a function of its weight."""

    def __init__(self, width: int, function: Function) -> None:
        super().__init__(width, width)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight), self.bias)


def net(function: Function = torch.tanh, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.ReLU(), Through(width, function), nn.ReLU(), nn.Linear(width, 3)
    )


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_gives_a_weight_a_mean_is_named(name: str) -> None:
    told = [str(w.message) for w in raised(lambda: mupass.transform(net(FUNCTIONS[name]), X, base=16))]
    named = [text for text in told if "gives the entries of 2.weight a mean" in text]
    assert len(named) == (name in WITH_A_MEAN), told


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_named_is_what_grows(name: str) -> None:
    """Sums over positive inputs, with weights of the size that the initialization gives."""
    sizes = []
    for width in (64, 1024):
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / width**0.5
        sums = FUNCTIONS[name](weight) @ torch.ones(width)
        sizes.append(sums.square().mean().sqrt().item())
    assert (sizes[1] > 1.5 * sizes[0]) == (name in WITH_A_MEAN)


def test_nothing_is_named_where_nothing_is_scaled() -> None:
    assert raised(lambda: mupass.transform(net(torch.exp), X, base=64)) == []


@pytest.mark.parametrize(
    ("draw", "has_a_mean"),
    [
        (lambda w: w.uniform_(0, 0.2), True),
        (lambda w: w.normal_(0.06, 0.125), True),
        (lambda w: w.normal_(0, 0.125), False),
        (nn.init.orthogonal_, False),
        (nn.init.eye_, False),
        (lambda w: w.uniform_(-0.2, 0.2), False),
    ],
)
def test_initial_values_with_a_mean_are_named(draw: Callable[[Tensor], Tensor], has_a_mean: bool) -> None:
    model = net()
    draw(model.get_parameter("2.weight").data)
    told = [str(w.message) for w in raised(lambda: mupass.transform(model, X, base=16))]
    assert any(text.startswith("initial values with a mean in 2.weight:") for text in told) == has_a_mean
