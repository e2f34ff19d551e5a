"""Variance adaptation of K-FAC: the share of signal in an average of gradients, and what it does to steps."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from test_taps import DENSE
from torch import Tensor, nn

import mupass
from mupass._optim.kronecker.signal import KEPT, LEAST, SignalShare, Slopes

YES = torch.tensor(True)
BETA = 0.8


def averages(gradients: list[Tensor], beta: float = BETA) -> list[tuple[Tensor, Tensor]]:
    """Bias-corrected moving averages, each with the weight of its last gradient."""
    found, total, weight = [], torch.zeros_like(gradients[0]), 0.0
    for gradient in gradients:
        total = beta * total + (1 - beta) * gradient
        weight = beta * weight + (1 - beta)
        found.append((total / weight, torch.tensor((1 - beta) / weight, dtype=torch.float64)))
    return found


def feed(share: SignalShare, metric: Tensor, gradients: list[Tensor]) -> None:
    momentum = torch.tensor([BETA], dtype=torch.float64)
    for gradient, (mean, fresh) in zip(gradients, averages(gradients), strict=True):
        direction = metric @ mean
        slopes = Slopes((direction @ mean)[None], (direction @ gradient)[None], fresh[None], momentum)
        share.note(["w"], slopes, YES)


def factor_of(share: SignalShare) -> float:
    return float(share.factor(["w"], torch.ones(1).double(), ranks=1))


def double(name: str = "w", size: int = 6) -> dict[str, Tensor]:
    return {name: torch.zeros(size, dtype=torch.float64)}


def test_sums_are_of_the_signal_that_two_slopes_along_one_direction_tell() -> None:
    root = torch.randn(6, 6, dtype=torch.float64)
    metric = root @ root.T
    gradients = [torch.randn(6, dtype=torch.float64) for _ in range(7)]
    share = SignalShare(double())
    feed(share, metric, gradients)
    settled = (1 - BETA) - (1 - BETA) / (1 + BETA)
    means = signals = torch.zeros(()).double()
    for count, (mean, _) in enumerate(averages(gradients), 1):
        weights = torch.tensor([(1 - BETA) * BETA**age for age in range(count)], dtype=torch.float64)
        weights = weights / weights.sum()
        slopes = torch.stack([metric @ mean @ mean, metric @ mean @ gradients[count - 1]])
        # S + k N and S + f N are the slopes: two equations.
        system = torch.tensor([[1.0, float(weights.square().sum())], [1.0, float(weights[0])]]).double()
        if count == 1:  # one gradient tells nothing
            means = signals = slopes[0]
            continue
        signal, _ = torch.linalg.solve(system, slopes)
        told = (weights[0] - weights.square().sum()) / settled
        means = KEPT * means + (1 - KEPT) * told * slopes[0]
        signals = KEPT * signals + (1 - KEPT) * told * signal
    torch.testing.assert_close(share.state[1:, 0], torch.stack([means, signals]), rtol=1e-5, atol=1e-6)


def test_the_signal_is_that_of_gradients_with_noise_of_their_own() -> None:
    """Over many draws of the noise, at the very step that is looked at."""
    signal = torch.randn(4, dtype=torch.float64)
    gradients = signal + torch.randn(5, 50_000, 4, dtype=torch.float64)
    mean, fresh = averages(list(gradients))[-1]
    weights = torch.tensor([(1 - BETA) * BETA**age for age in range(5)], dtype=torch.float64)
    squares = (weights / weights.sum()).square().sum()
    along_mean, along_last = (mean * mean).sum(1), (mean * gradients[-1]).sum(1)
    found = (fresh * along_mean - squares * along_last) / (fresh - squares)
    assert float(found.mean()) == pytest.approx(float(signal @ signal), abs=0.1)
    assert float(along_mean.mean()) > float(signal @ signal) + 0.5


@pytest.mark.parametrize("noise", [0.0, 1.0, 5.0])
def test_the_factor_is_the_length_of_the_signal_in_that_of_the_average(noise: float) -> None:
    size = 200
    signal = torch.randn(size, dtype=torch.float64)
    share = SignalShare(double(size=size))
    feed(
        share,
        torch.eye(size).double(),
        [signal + noise * torch.randn(size, dtype=torch.float64) for _ in range(300)],
    )
    # An average with the weight beta of the past holds (1 - beta) / (1 + beta) of a gradient's variance.
    power = float(signal @ signal)
    want = (power / (power + noise**2 * size * (1 - BETA) / (1 + BETA))) ** 0.5
    assert factor_of(share) == pytest.approx(want, rel=0.08)


def test_noise_alone_leaves_the_least_factor_and_no_step_leaves_one() -> None:
    share = SignalShare(double(size=50))
    assert factor_of(share) == 1.0
    feed(share, torch.eye(50).double(), [torch.randn(50, dtype=torch.float64) for _ in range(300)])
    assert factor_of(share) < 0.3
    gradients = [(-1.0) ** k * torch.ones(50, dtype=torch.float64) for k in range(200)]
    feed(share, torch.eye(50).double(), gradients)  # as where steps go too far, to and fro
    assert factor_of(share) == pytest.approx(LEAST**0.5)


def test_a_step_that_does_not_count_leaves_the_numbers() -> None:
    share = SignalShare(double())
    feed(share, torch.eye(6).double(), [torch.ones(6, dtype=torch.float64) for _ in range(4)])
    before = share.state.clone()
    zero = torch.zeros(1).double()
    share.note(["w"], Slopes(zero, zero, zero + 0.3, zero + BETA), torch.tensor(False))
    torch.testing.assert_close(share.state, before, rtol=0.0, atol=0.0)


def test_parameters_without_a_gradient_keep_their_numbers() -> None:
    share = SignalShare({**double("v"), **double("w")})
    one = torch.ones(1).double()
    for _ in range(2):
        share.note(["w"], Slopes(one, one, 0.5 * one, BETA * one), YES)
    assert not share.state[:, 0].any() and share.state[:, 1].all()
    assert share.entries("w")["signal"].data_ptr() == share.state[:, 1].data_ptr()
    assert not share.entries("of the fallback")


def run(adapted: bool, steps: int = 6, **options: Any) -> tuple[list[dict[str, Tensor]], mupass.KFAC]:
    """Updates on the same weights with new batches, so that adapted and plain steps see the same."""
    case, updates = DENSE["linear"], []
    net = case.net()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    how = {"step_bound": None, "kl_clip": None, "momentum": BETA, "variance_adaptation": adapted}
    optimizer = mupass.KFAC(net, 0.1, 1e-2, **{**how, **options})
    for seed in range(steps):
        x, y = case.batch(seed)
        optimizer.zero_grad()
        case.terms(net(x), y).mean().backward()
        optimizer.step()
        updates.append({name: p.detach() - start[name] for name, p in net.named_parameters()})
        net.load_state_dict(start)
    return updates, optimizer


def test_all_directions_are_multiplied_by_the_factor() -> None:
    plain, _ = run(False)
    adapted, optimizer = run(True)
    for number, (one, other) in enumerate(zip(plain, adapted, strict=True)):
        ratios = torch.cat([(other[name] / one[name]).flatten() for name in one if one[name].all()])
        assert float(ratios.max() - ratios.min()) < 1e-6
        assert LEAST**0.5 - 1e-9 <= float(ratios.mean()) <= 1.0
        assert number > 0 or float(ratios.mean()) == pytest.approx(1.0)
    names = [name for name in plain[0] if optimizer._signal.entries(name)]
    weights = torch.tensor(
        [g["lr"] ** 2 * g["mupass_scale"] for g in optimizer.param_groups for _ in g["params"]],
        dtype=torch.float64,
    )
    order = [optimizer.names[p] for g in optimizer.param_groups for p in g["params"]]
    chosen = torch.stack([weights[order.index(name)] for name in names])
    assert float(optimizer._signal.factor(names, chosen, 1)) == pytest.approx(float(ratios.mean()), rel=1e-6)


def test_the_step_that_is_taken_is_bounded() -> None:
    """A direction that the share has shortened below a bound is not shortened again."""
    free, _ = run(True)
    held, _ = run(True, step_bound=1e3)
    bound, _ = run(True, step_bound=1e-5)
    for one, other, least in zip(free, held, bound, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-14)
            assert least[name].norm() < one[name].norm()
    # Bounded steps have the length of the bound, whatever the share is.
    plain, _ = run(False, step_bound=1e-5)
    for one, other in zip(plain, bound, strict=True):
        torch.testing.assert_close(one["2.weight"], other["2.weight"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum_of": "directions"}])
def test_without_averages_of_gradients_nothing_is_adapted(options: dict[str, Any]) -> None:
    plain, adapted = run(False, **options)[0], run(True, **options)[0]
    for one, other in zip(plain, adapted, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name])


@pytest.mark.slow
def test_noisy_regression_comes_closer_than_without() -> None:
    """Steps of one length stay on a plateau of noise, which those that are adapted leave."""
    losses = {False: 0.0, True: 0.0}
    for adapted, seed in product((False, True), range(3)):
        torch.manual_seed(seed)
        x = torch.randn(512, 8)
        y = torch.tanh(x[:, :1] + x[:, 1:2])
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        net = mupass.transform(net, x[:2], base=32)
        optimizer = mupass.KFAC(net, variance_adaptation=adapted)
        batches = torch.Generator().manual_seed(0)
        for _ in range(150):
            rows = torch.randint(512, (16,), generator=batches)
            optimizer.zero_grad()
            (net(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses[adapted] += float((net(x) - y).square().mean())
    assert losses[True] < 0.85 * losses[False], losses
