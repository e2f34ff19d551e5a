"""What `kl_clip` is measured by: the mean squared gradient of a loss term by the model's output."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._optim.kronecker.slope import FALLEN, UNIT, OutputSlope, has_fixed_outputs
from mupass._scales.plan import plan_of

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

YES, NO = torch.tensor(True), torch.tensor(False)


def mlp(outputs: int = 3, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs)).double()


class Characters(nn.Module):
    """A table that is the readout as well."""

    def __init__(self, width: int = 16, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(tokens))))


class OwnLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.inner(x), y)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def classes(samples: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def tokens(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (samples, 5), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def expected(outputs: Tensor, y: Tensor) -> float:
    """Mean of ``|softmax - onehot|^2``, the squared gradient of a cross entropy."""
    logits = outputs.detach().flatten(0, -2)
    one_hot = F.one_hot(y.flatten(), logits.shape[-1])
    return float((logits.softmax(-1) - one_hot).square().sum(-1).mean())


def slope_of(optimizer: mupass.KFAC) -> float:
    assert optimizer._slope is not None
    mean, weight, _ = optimizer._slope.numbers
    return float(mean / weight)


def transformed(net: nn.Module, *example: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", mupass.MupassWarning
        )  # of initialization laws, which no test here needs
        return mupass.transform(net.double(), example, base=8)


# What is measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ekfac", [False, True])
def test_it_is_the_squared_gradient_of_a_loss_term(ekfac: bool) -> None:
    x, y = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net, ekfac=ekfac)
    outputs = net(x)
    cross_entropy(outputs, y).backward()
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(expected(outputs, y), rel=1e-12)


def test_of_half_a_squared_error_it_is_the_squared_error() -> None:
    x, _ = classes()
    y = torch.randn(12, 3, dtype=torch.float64)
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net)
    outputs = net(x)
    (0.5 * (outputs - y).square().sum(1).mean()).backward()
    optimizer.step()
    wanted = float((outputs.detach() - y).square().sum(1).mean())
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_every_position_of_a_sequence_is_a_term(tied: bool) -> None:
    x, y = tokens()
    net = transformed(Characters(tied=tied), x)
    optimizer = mupass.KFAC(net)
    outputs = net(x)
    cross_entropy(outputs, y).backward()
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(expected(outputs, y), rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_readouts_tell_it_where_the_model_returns_its_loss(tied: bool) -> None:
    x, y = tokens()
    inner = Characters(tied=tied)
    net = transformed(OwnLoss(inner), x, y)
    optimizer = mupass.KFAC(net, loss_terms=y.numel())
    net(x, y).backward()
    outputs = inner(x)
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(expected(outputs, y), rel=1e-12)


@pytest.mark.parametrize("told", [None, 12], ids=["output", "readouts"])
@pytest.mark.parametrize("way", ["whole", "two parts", "clipped", "scaled", "sum"])
def test_how_the_gradient_is_made_changes_nothing(way: str, told: int | None) -> None:
    x, y = classes()
    net = transformed(mlp(), x)
    scale = {"loss_scale": 1024.0} if way == "scaled" else {}
    reduction = "sum" if way == "sum" else "mean"
    optimizer = mupass.KFAC(net, loss_terms=told, loss_reduction=reduction, **scale)
    wanted = expected(net(x), y)
    if way == "two parts":
        for part in (slice(0, 6), slice(6, 12)):
            (cross_entropy(net(x[part]), y[part]) / 2).backward()
    else:
        loss = F.cross_entropy(net(x), y, reduction=reduction)
        (loss * scale.get("loss_scale", 1.0)).backward()
    if way == "clipped":
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    if way == "scaled":
        for parameter in net.parameters():
            parameter.grad.div_(1024.0)  # type: ignore[union-attr]
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex128], ids=str)
def test_of_outputs_in_another_precision_it_is_the_same(dtype: torch.dtype) -> None:
    """Half precision: gradients whose squares are beyond its range; complex: both parts of them."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).to(dtype)

    x, _ = classes()
    net = transformed(Cast(), x)
    optimizer = mupass.KFAC(net)
    parts = torch.view_as_real(net(x)) if dtype.is_complex else net(x)
    (4096.0 / 12 * parts.double().sum()).backward()
    wanted = 3 * 4096.0**2 * (2 if dtype.is_complex else 1)
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-3)


def test_a_compiled_model_tells_the_same() -> None:
    torch._dynamo.reset()
    x, y = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net)
    wanted = expected(net(x), y)
    cross_entropy(torch.compile(net)(x), y).backward()
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-9)


def test_a_wrapped_model_that_is_compiled_within_a_larger_graph_tells_the_same() -> None:
    torch._dynamo.reset()
    x, y = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net)
    wanted = expected(net(x), y)
    torch.compile(lambda: cross_entropy(net(x), y))().backward()
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-9)


# What it does to a bound -----------------------------------------------------------------------------------


def noted(*slopes: float, decay: float = 0.0, power: float = 1.0) -> OutputSlope:
    slope = OutputSlope(torch.float64, torch.device("cpu"), power)
    for value in slopes:
        slope.note(torch.tensor(value, dtype=torch.float64), decay, YES)
    return slope


@pytest.mark.parametrize(
    ("slopes", "factor"),
    [
        ((), 1.0),  # nothing is known
        ((UNIT,), 1.0),
        ((100 * UNIT,), 100.0),
        ((1e-4 * UNIT,), 1e-4),  # small from the start: the loss is multiplied by a small number
        ((UNIT, FALLEN * UNIT), FALLEN),  # not much less than it was
        ((UNIT, 1e-2 * UNIT), 1e-4 / FALLEN),
        ((1e6 * UNIT, UNIT), 1.0),  # a bad start is soon forgotten
        ((1e-4, 1e-4 * FALLEN / 2), 1e-4 * FALLEN / 4 / UNIT),
    ],
)
def test_a_bound_falls_with_the_slope_and_with_its_part_of_the_largest(
    slopes: tuple[float, ...], factor: float
) -> None:
    assert float(noted(*slopes).factor()) == pytest.approx(factor, rel=1e-12)
    half = noted(*slopes, power=0.5)
    assert float(half.factor()) == pytest.approx(factor**0.5, rel=1e-12)
    assert float(noted(*slopes, power=0.0).factor()) == 1.0


def test_averages_are_corrected_for_their_start_and_skip_what_does_not_count() -> None:
    slope = noted(1.0, 3.0, decay=0.5)
    torch.testing.assert_close(slope.numbers, torch.tensor([1.75, 0.75, 1.75 / 0.75]).double())
    before = slope.numbers.clone()
    slope.note(torch.tensor(float("nan")), 0.5, NO)
    torch.testing.assert_close(slope.numbers, before, rtol=0.0, atol=0.0)


def trained(scale: float, steps: int = 6, **options: Any) -> dict[str, Tensor]:
    """Weights after some steps whose length the bound sets."""
    torch.manual_seed(0)
    x, _ = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net, 100.0, step_bound=None, norms=True, **options)
    for seed in range(steps):
        x, y = classes(seed=seed)
        optimizer.zero_grad()
        (scale * cross_entropy(net(x), y)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"e_a": 0.5, "e_b": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_a_number_that_multiplies_the_loss_changes_no_step(scale: float, options: dict[str, Any]) -> None:
    plain, scaled = trained(1.0, **options), trained(scale, **options)
    for name, weight in plain.items():
        torch.testing.assert_close(scaled[name], weight, rtol=1e-6, atol=1e-8)


def test_without_it_steps_are_as_much_shorter_as_the_loss_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputSlope, "factor", lambda self: torch.ones((), dtype=torch.float64))
    torch.manual_seed(0)
    x, _ = classes()
    start = transformed(mlp(), x).state_dict()
    plain, scaled = trained(1.0, steps=1), trained(1e3, steps=1)
    for name, weight in plain.items():
        torch.testing.assert_close(
            scaled[name] - start[name], (weight - start[name]) / 1e3, rtol=1e-6, atol=1e-12
        )


# Where a bound is taken as it stands -----------------------------------------------------------------------


class Features(nn.Module):
    """A residual stream without a readout, so that outputs grow with the width."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.fc = nn.Linear(5, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return h + self.fc(torch.tanh(h))


def test_bounds_stand_where_no_slope_of_a_fixed_size_is_seen() -> None:
    x, _ = classes()
    growing = transformed(Features(), x)
    assert not has_fixed_outputs(plan_of(growing)[1])
    assert mupass.KFAC(growing)._slope is None
    assert mupass.KFAC(transformed(mlp(), x), fisher="sampled")._slope is None
    assert has_fixed_outputs(plan_of(transformed(Characters(), tokens()[0]))[1])


def test_it_is_kept_in_the_state() -> None:
    def fresh() -> tuple[nn.Module, mupass.KFAC]:
        torch.manual_seed(0)
        net = transformed(mlp(), classes()[0])
        return net, mupass.KFAC(net, 1.0)

    def step(net: nn.Module, optimizer: mupass.KFAC, seed: int) -> None:
        x, y = classes(seed=seed)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()

    net, optimizer = fresh()
    step(net, optimizer, 0)
    again, loaded = fresh()
    again.load_state_dict(net.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded._slope.numbers, optimizer._slope.numbers)  # type: ignore[union-attr]
    step(net, optimizer, 1)
    step(again, loaded, 1)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    damaged = optimizer.state_dict()
    damaged["state"][0]["slope"] = -damaged["state"][0]["slope"]
    with pytest.raises(mupass.OptimizerError, match="negative"):
        loaded.load_state_dict(damaged)
