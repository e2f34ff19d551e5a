"""Stochastic rounding of bfloat16 weights: neighbours only, right in the mean, the same when resumed."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._optim.rounding import to_bfloat16

CLASSES = [mupass.KFAC, mupass.Shampoo, mupass.SOAP, mupass.Muon]


@cache
def _network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)]
    return mupass.transform(nn.Sequential(*layers), torch.randn(2, 5), base=width)


def network(dtype: torch.dtype = torch.bfloat16, width: int = 16) -> nn.Module:
    return copy.deepcopy(_network(width)).to(dtype)


def train(net: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        torch.manual_seed(100 * seed + step)
        optimizer.zero_grad()
        net(torch.randn(8, 5, dtype=next(net.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


def test_the_mean_is_the_value_and_draws_are_its_neighbours() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(40) * 10.0**k for k in range(-6, 7, 3)])
    values = torch.cat([values, values.to(torch.bfloat16).float(), torch.tensor([0.0, -0.0])])
    draws = torch.stack([to_bfloat16(values, seed) for seed in range(2000)]).double()
    values = values.double()
    # Eight significant bits; a mean of coins is within 4.5 standard errors of its own.
    spacing = 2.0 ** (values.abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((draws.mean(0) - values).abs() <= 4.5 * 0.5 * spacing / 2000**0.5).all()
    assert ((draws - values).abs() < spacing).all()
    assert all(len(column.unique()) <= 2 for column in draws.T)
    exact = values.to(torch.bfloat16).double() == values
    assert exact.sum() > 200 and (draws[:, exact] == values[exact]).all()


def test_infinite_and_largest_numbers_stay_numbers() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan])
    got = to_bfloat16(values, 0)
    assert got[0] == torch.inf and got[1] == -torch.inf and got[2].isnan()


def step_of(net: nn.Module, stochastic: bool, seed: int) -> Tensor:
    """Return by how much a step that is small for their precision moves the entries of a weight."""
    net = copy.deepcopy(net)
    torch.manual_seed(seed)
    optimizer = mupass.Muon(net, 2e-3, steps=12, stochastic_rounding=stochastic)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = net[2].weight.detach().float()  # type: ignore[index]
    optimizer.step()
    return net[2].weight.detach().float() - before  # type: ignore[index]


def test_the_mean_of_steps_is_the_step_in_float32() -> None:
    net = network(width=64)
    want = -2e-3 / 64  # where the gradient is constant, U V^T is too
    assert abs(step_of(net, False, 0).mean().item() - want) > 0.1 * abs(want)
    moves = torch.stack([step_of(net, True, seed) for seed in range(8)])
    error = (moves.std() / moves.numel() ** 0.5).item()
    assert 4 * error < 0.1 * abs(want)
    assert abs(moves.mean().item() - want) < 4 * error


@pytest.mark.parametrize("cls", CLASSES)
def test_seeded_by_torch_and_resumed_bit_for_bit(cls: Any) -> None:
    nets = [network() for _ in range(3)]
    made = []
    for net, seed in zip(nets, (7, 7, 8), strict=True):
        torch.manual_seed(seed)
        made.append(cls(net, 1e-3, stochastic_rounding=True))
        train(net, made[-1], 3)
    one, two, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(one, two) and not torch.equal(one, other)
    fresh = copy.deepcopy(nets[2])
    fresh.load_state_dict(nets[0].state_dict())
    resumed = cls(fresh, 1e-3, stochastic_rounding=True)
    resumed.load_state_dict(made[0].state_dict())
    train(nets[0], made[0], 2, seed=1)
    train(fresh, resumed, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("dtype", "reason"), [(torch.float16, "is in float16"), (torch.float32, "are none")])
def test_nothing_to_round_is_refused(cls: Any, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(mupass.OptimizerError, match=reason):
        cls(network(dtype), 1e-3, stochastic_rounding=True)
