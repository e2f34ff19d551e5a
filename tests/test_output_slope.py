"""What `kl_clip` is measured by: the mean squared gradient of a loss term by the model's output."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._optim.kronecker.slope import FALLEN, LEAST, UNIT, OutputSlope
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


def test_where_the_model_returns_its_loss_the_bound_stands() -> None:
    x, y = tokens()
    net = transformed(OwnLoss(Characters()), x, y)
    optimizer = mupass.KFAC(net, loss_terms=y.numel())
    net(x, y).backward()
    optimizer.step()
    assert not optimizer._slope.numbers.any() and optimizer._slope.factor() == 1.0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inp(x))
        return self.first(h), self.second(h)


@pytest.mark.sample("eager")
@pytest.mark.parametrize("whole", [False, True], ids=["eager", "in a larger graph"])
def test_of_several_outputs_it_is_that_of_the_one_that_terms_are_counted_on(whole: bool) -> None:
    torch._dynamo.reset()
    x, y = classes()
    net = transformed(TwoHeads(), x)
    optimizer = mupass.KFAC(net)

    def loss() -> Tensor:
        return sum(cross_entropy(output, y) for output in net(x))  # type: ignore[return-value]

    wanted = expected(net(x)[0], y)
    (torch.compile(loss)() if whole else loss()).backward()
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("told", [None, 12], ids=["counted", "told"])
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
    optimizer = mupass.KFAC(net, target_scale=1.0)  # gradients as large as of targets that are far away
    # The gradient by a conjugate comes as a view that is conjugated when it is read.
    parts = torch.view_as_real(net(x).conj().resolve_conj()) if dtype.is_complex else net(x)
    (4096.0 / 12 * parts.double().sum()).backward()
    wanted = 3 * 4096.0**2 * (2 if dtype.is_complex else 1)
    optimizer.step()
    assert slope_of(optimizer) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["model", "loss"])
def test_a_compiled_model_and_one_within_a_larger_graph_tell_the_same(whole: bool) -> None:
    torch._dynamo.reset()
    x, y = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net)
    wanted = expected(net(x), y)
    loss = (
        torch.compile(lambda: cross_entropy(net(x), y))()
        if whole
        else cross_entropy(torch.compile(net)(x), y)
    )
    loss.backward()
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
        ((UNIT, 1e-4 * UNIT), 1e-4 * LEAST),  # and no further
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


@pytest.mark.parametrize(
    ("value", "counts"),
    [(1.0, NO), (float("nan"), YES), (float("inf"), YES), (0.0, YES)],
    ids=["refused step", "nan", "overflow", "no sample"],
)
def test_averages_are_corrected_for_their_start_and_skip_what_tells_nothing(
    value: float, counts: Tensor
) -> None:
    slope = noted(1.0, 3.0, decay=0.5)
    torch.testing.assert_close(slope.numbers, torch.tensor([1.75, 0.75, 1.75 / 0.75]).double())
    before = slope.numbers.clone()
    slope.note(torch.tensor(value), 0.5, counts)
    torch.testing.assert_close(slope.numbers, before, rtol=0.0, atol=0.0)


class Masked(nn.Module):
    """Padded rows are zeros, whose gradients no parameter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x).masked_fill(~mask[:, None], 0.0)


def test_a_gradient_of_nan_that_no_parameter_sees_does_no_harm() -> None:
    x, _ = classes()
    mask = torch.arange(12) < 9
    y = torch.randn(12, 3, dtype=torch.float64) * mask[:, None]
    net = transformed(Masked(), x, mask)
    optimizer = mupass.KFAC(net)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        # The root has no derivative at the zeros of padded rows.
        loss = (net(x, mask) - y).square().sum(1).sqrt()[mask].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_samples_changes_nothing(reduction: str) -> None:
    x, y = classes()
    net = transformed(mlp(), x)
    optimizer = mupass.KFAC(net, loss_reduction=reduction)

    def step(samples: int) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[:samples]), y[:samples], reduction="sum")
        (loss if reduction == "sum" else loss / 12).backward()
        optimizer.step()

    step(12)
    before = optimizer._slope.numbers.clone()
    step(0)
    assert torch.equal(optimizer._slope.numbers, before)
    step(12)
    assert all(p.isfinite().all() for p in net.parameters())


# A loss that is multiplied is warned of; here it is what is tried.
MULTIPLIED = pytest.mark.filterwarnings("ignore:mupass.KFAC. summed loss:UserWarning")


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


@pytest.mark.sample
@MULTIPLIED
@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"e_a": 0.5, "e_b": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_a_number_that_multiplies_the_loss_changes_no_step(scale: float, options: dict[str, Any]) -> None:
    plain, scaled = trained(1.0, **options), trained(scale, **options)
    for name, weight in plain.items():
        torch.testing.assert_close(scaled[name], weight, rtol=1e-6, atol=1e-8)


@MULTIPLIED
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
    """A residual stream without a readout, so that outputs grow with the width; a gate inside does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.fc, self.gate = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return h + self.fc(torch.tanh(h)) * torch.sigmoid(self.gate(h))


@pytest.mark.parametrize("case", ["outputs that grow", "sampled targets"])
def test_bounds_stand_where_gradients_at_the_output_tell_something_else(case: str) -> None:
    x, y = classes()
    growing = case == "outputs that grow"
    net = transformed(Features() if growing else mlp(), x)
    assert plan_of(net)[1].open_output == growing
    optimizer = mupass.KFAC(net, fisher="empirical" if growing else "sampled")
    if growing:
        net(x).square().mean().backward()
    else:
        optimizer.observe(lambda: cross_entropy(out := net(x), mupass.sample_targets(out)))
        cross_entropy(net(x), y).backward()
    optimizer.step()
    assert optimizer._slope.factor() == 1.0


def test_states_go_from_sampled_to_empirical_targets() -> None:
    net = transformed(mlp(), classes()[0])
    mupass.KFAC(net).load_state_dict(mupass.KFAC(net, fisher="sampled").state_dict())


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
    assert torch.equal(loaded._slope.numbers, optimizer._slope.numbers)
    step(net, optimizer, 1)
    step(again, loaded, 1)
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    damaged = optimizer.state_dict()
    damaged["state"][0]["slope"] = -damaged["state"][0]["slope"]
    with pytest.raises(mupass.OptimizerError, match="negative"):
        loaded.load_state_dict(damaged)
