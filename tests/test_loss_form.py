"""What K-FAC tells of a loss by its gradient at the model's output: summed, or of targets far away."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from torch import Tensor, nn

import mupass
from mupass._taps.loss_form import first_rows, multiple_of_a_mean

X, CLASSES = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), 5
Y = torch.arange(24) % CLASSES
SOFT = torch.softmax(torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(2)), 1)
BINARY = (torch.arange(24 * CLASSES).view(24, CLASSES) % 3 == 0).float()
Loss = Callable[[Tensor], Tensor]


def plain_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def net() -> nn.Module:
    return transformed(plain_net, inputs=X)


def told(loss: Loss, steps: int = 4, **options: object) -> tuple[int, str]:
    """Train, and return how many steps were told to be of a summed loss, and what was warned of."""
    model = net()
    optimizer = mupass.KFAC(model, root_every=1, **options)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(X)).backward()
            optimizer.step()
    return optimizer.stats().get("summed_loss", 0), "\n".join(str(warning.message) for warning in caught)


SUMMED: dict[str, Loss] = {
    "sum": lambda out: F.cross_entropy(out, Y, reduction="sum"),
    "sum of log-probabilities": lambda out: -F.log_softmax(out, 1)[torch.arange(24), Y].sum(),
    "multiplied": lambda out: 10 * F.cross_entropy(out, Y),
    "binary, summed": lambda out: F.binary_cross_entropy_with_logits(out, BINARY, reduction="sum"),
}


@pytest.mark.parametrize("loss", SUMMED.values(), ids=SUMMED)
def test_a_summed_loss_is_warned_of_by_name(loss: Loss) -> None:
    steps, text = told(loss)
    assert steps == 3  # the form of a loss does not change: three passes are looked at
    assert "loss_reduction='sum'" in text and "loss_terms=" in text and "loss_scale=" in text


USUAL: dict[str, Loss] = {
    "mean": lambda out: F.cross_entropy(out, Y),
    "two losses": lambda out: F.cross_entropy(out, Y) + 0.5 * F.cross_entropy(out, (Y + 1) % CLASSES),
    "weights of classes": lambda out: F.cross_entropy(out, Y, weight=torch.tensor([1.0, 9, 1, 1, 1])),
    "smoothed": lambda out: F.cross_entropy(out, Y, label_smoothing=0.1),
    "temperature": lambda out: F.cross_entropy(out / 0.05, Y),
    "binary": lambda out: F.binary_cross_entropy_with_logits(out, BINARY),
    "one target": lambda out: (out - 1).square().mean(),
    "signs": lambda out: (out - 2 * BINARY + 1).square().mean(),
    "one of many": lambda out: (out - F.one_hot(Y, CLASSES)).square().sum(1).mean(),
    # Not squared errors, with gradients as large as of targets that are far away.
    "soft targets": lambda out: 20 * F.kl_div(F.log_softmax(out, 1), SOFT, reduction="batchmean"),
    "margins": lambda out: 30 * F.multi_margin_loss(out, Y),
    "cosines": lambda out: 100 * F.cosine_similarity(out, SOFT).mean(),
    "some left out": lambda out: F.cross_entropy(out, torch.where(torch.arange(24) < 4, -100, Y)),
}


FAR: dict[str, Loss] = {
    "large targets": lambda out: F.mse_loss(out, 100 * BINARY),
    "one of them": lambda out: F.mse_loss(out[:, :1], 30 * BINARY[:, :1]),
    "absolute and squared": lambda out: F.smooth_l1_loss(out, 100 * BINARY, beta=1000) * 1000,
    "summed over samples": lambda out: (out - BINARY).square().mean(1).sum(),
}


@pytest.mark.parametrize("loss", FAR.values(), ids=FAR)
def test_targets_that_are_far_from_the_outputs_are_told_with_what_to_pass(loss: Loss) -> None:
    model = net()
    optimizer = mupass.KFAC(model, root_every=1)
    with pytest.warns(mupass.MupassWarning, match=r"target_scale=.*targets\.var.*loss_reduction='sum'"):
        for _ in range(4):
            optimizer.zero_grad()
            loss(model(X)).backward()
            optimizer.step()
    assert optimizer.stats()["far_targets"] == 3
    assert told(loss, target_scale=1.0) == (0, "")
    assert told(loss, loss_reduction="sum") == (0, "")


class Multiple(nn.Module):
    """Outputs of another network, times a number."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)


def test_in_units_of_its_targets_a_model_trains_as_in_units_of_one() -> None:
    """Outputs and targets that are both multiplied by a number: the same weights, step by step."""
    targets, factor, trained = torch.randn(24, CLASSES, generator=torch.Generator().manual_seed(3)), 40.0, []
    for unit in (1.0, factor):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, CLASSES)).double()
        model = mupass.transform(Multiple(layers, unit), X.double())
        # The bound of a readout is that of its own outputs, which stand before the factor here.
        optimizer = mupass.KFAC(model, step_bound=None, target_scale=unit, lr=0.3)
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(X.double()), unit * targets.double()).backward()
            optimizer.step()
        trained.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_readouts_are_bounded_in_units_of_the_targets() -> None:
    model = net()
    optimizer = mupass.KFAC(model, lr=1e6, kl_clip=None, target_scale=50.0, step_bound=0.2, momentum=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        hidden = model[:2](X)
    F.mse_loss(model(X), 50 * BINARY).backward()
    optimizer.step()
    with torch.no_grad():
        of_input = (X @ (model[0].weight - before["0.weight"]).T).square().mean().sqrt()
        of_readout = (hidden @ (model[2].weight - before["2.weight"]).T).square().mean().sqrt()
    # A step of this length meets its bounds.
    assert float(of_input) == pytest.approx(0.2, rel=0.05)
    assert float(of_readout) == pytest.approx(50 * 0.2, rel=0.05)


def test_targets_of_any_size_are_learnt_in_their_units() -> None:
    size, generator = 100.0, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = mupass.transform(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)), X)
    optimizer = mupass.KFAC(model, target_scale=size)
    for _ in range(100):
        x = torch.randn(64, 8, generator=generator)
        y = size * (x[:, :1] + x[:, :1] * x[:, 1:2]) / 2**0.5
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    # With target_scale=1 nearly all of the variance is left.
    assert loss.item() < 0.1 * size**2


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_size_of_targets_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(mupass.OptimizerError, match="target_scale"):
        mupass.KFAC(net(), target_scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", USUAL.values(), ids=USUAL)
def test_other_losses_are_not(loss: Loss) -> None:
    assert told(loss) == (0, "")


@pytest.mark.parametrize("parts", [(24,), (12, 12), (8, 8, 8), (6, 6, 6, 6), (10, 10, 3, 1)], ids=str)
def test_passes_that_are_added_up_want_their_losses_divided(parts: tuple[int, ...]) -> None:
    for by, steps in ((1, int(len(parts) > 2)), (len(parts), 0)):
        model = net()
        optimizer = mupass.KFAC(model, root_every=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, y in zip(X.split(parts), Y.split(parts), strict=True):
                (F.cross_entropy(model(x), y) / by).backward()
            optimizer.step()
        assert optimizer.stats().get("summed_loss", 0) == steps
        assert len(caught) == steps
        assert all("divide each loss by their number" in str(warning.message) for warning in caught)


def test_passes_of_other_losses_are_no_sum() -> None:
    model = net()
    optimizer = mupass.KFAC(model, root_every=1)
    for loss in (F.cross_entropy(model(X), Y), model(X).square().mean(), (model(X) - BINARY).square().mean()):
        loss.backward()
    optimizer.step()
    assert optimizer.stats() == {"steps": 1}


@pytest.mark.parametrize(
    "options",
    [{"loss_reduction": "sum"}, {"loss_terms": 1}, {"loss_scale": 24.0}],
    ids=lambda options: next(iter(options)),
)
def test_a_loss_that_the_caller_describes_is_not(options: dict[str, object]) -> None:
    assert told(SUMMED["sum"], **options) == (0, "")


def test_the_scale_of_mixed_precision_is_taken_out() -> None:
    scale = 2.0**12
    assert told(lambda out: scale * F.cross_entropy(out, Y), loss_scale=scale) == (0, "")
    assert told(lambda out: scale * SUMMED["sum"](out), loss_scale=scale)[0] == 3


@pytest.mark.parametrize("shape", [(6, 4), (3, 7, 4), (2, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_multiple_is_that_of_autograd(shape: tuple[int, ...], factor: float) -> None:
    axis = 1 if len(shape) == 4 else -1
    out = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(4, out.movedim(axis, -1).shape[:-1])
    loss = F.cross_entropy(out.movedim(axis, -1).reshape(-1, 4), classes.flatten())
    (gradient,) = torch.autograd.grad(factor * loss, out)
    rows, of_them = first_rows(out, axis % len(shape)), first_rows(gradient, axis % len(shape))
    assert rows is not None and of_them is not None
    found = multiple_of_a_mean(rows, of_them, torch.tensor(classes.numel()))
    assert float(found) == pytest.approx(factor, rel=1e-12)
    assert float(multiple_of_a_mean(rows, of_them + 1e-2, torch.tensor(classes.numel()))) == 0


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("classes", [2, 5, 500])
def test_a_squared_error_is_none_at_any_size_of_the_outputs(size: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    out = (size * torch.randn(8, classes, generator=generator)).requires_grad_()
    for targets in (F.one_hot(torch.arange(8) % classes, classes), torch.ones(8, classes)):
        (gradient,) = torch.autograd.grad((out - targets).square().sum(), out)
        assert float(multiple_of_a_mean(out.detach(), gradient, torch.tensor(8))) == 0
    # The same outputs under a sum of cross-entropies, in half precision too.
    loss = F.cross_entropy(out, torch.arange(8) % classes, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, out)
    for found in (gradient, gradient.bfloat16()):
        assert float(multiple_of_a_mean(out.detach(), found, torch.tensor(8))) == pytest.approx(8, rel=0.01)


class Ends(nn.Module):
    """A network with an end of its own: probabilities, other shapes."""

    def __init__(self, end: Loss, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(8, 64), nn.Linear(64, classes), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(torch.relu(self.first(x))))


def stats(
    end: Loss,
    loss: Loss,
    classes: int = CLASSES,
    x: Tensor = X,
    steps: int = 4,
    kinds: Sequence[str] = ("summed_loss", "classes_elsewhere"),
    **options: Any,
) -> dict[str, int]:
    """Return what was told of the loss of a model with such an end."""
    torch.manual_seed(1)
    model = mupass.transform(Ends(end, classes), x)
    optimizer = mupass.KFAC(model, root_every=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
        counts = optimizer.stats()
    return {kind: count for kind, count in counts.items() if kind in kinds}


HALVES = (torch.arange(24) % 2).float()
ENDS: dict[str, tuple[Loss, Callable[[Tensor, str], Tensor], int]] = {
    "log_softmax": (lambda y: F.log_softmax(y, -1), lambda y, how: F.nll_loss(y, Y, reduction=how), CLASSES),
    "softmax": (lambda y: y.softmax(-1), lambda y, how: F.nll_loss(y.log(), Y, reduction=how), CLASSES),
    "sigmoid": (torch.sigmoid, lambda y, how: F.binary_cross_entropy(y, BINARY, reduction=how), CLASSES),
    "one": (
        lambda y: y,
        lambda y, how: F.binary_cross_entropy_with_logits(y, HALVES[:, None], reduction=how),
        1,
    ),
    "vector": (
        lambda y: y[:, 0],
        lambda y, how: F.binary_cross_entropy_with_logits(y, HALVES, reduction=how),
        1,
    ),
    "sigmoid of one": (
        torch.sigmoid,
        lambda y, how: F.binary_cross_entropy(y, HALVES[:, None], reduction=how),
        1,
    ),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("end", ENDS)
def test_a_sum_is_told_whatever_the_model_ends_with(end: str) -> None:
    at_the_end, loss, classes = ENDS[end]
    assert stats(at_the_end, lambda y: loss(y, "sum"), classes) == {"summed_loss": 3}
    assert not stats(at_the_end, lambda y: loss(y, "mean"), classes)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("end", ENDS)
def test_other_losses_behind_such_ends_are_not(end: str) -> None:
    at_the_end, _, classes = ENDS[end]
    for target in (0.0, 0.5, 1.0):
        assert not stats(at_the_end, lambda y, t=target: (y - t).square().sum(), classes, steps=3)  # type: ignore[misc]
    for loss in (torch.sum, lambda y: F.relu(1 - y).sum(), lambda y: (y * y.detach()).sum()):
        assert not stats(at_the_end, loss, classes, steps=3)


SEQUENCES, LABELS = (
    torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2)),
    torch.arange(24) % CLASSES,
)
ELSEWHERE: dict[str, tuple[Tensor, Loss, Loss, int]] = {  # input, end, rows of logits, terms
    "one sample": (X[0], lambda y: y, lambda y: y[None], 1),
    "classes first": (X, lambda y: y.T, lambda y: y.T, 24),
    "classes, then time": (SEQUENCES, lambda y: y.mT, lambda y: y.mT.reshape(24, -1), 24),
    "channels last": (SEQUENCES.view(2, 2, 6, 8), lambda y: y, lambda y: y.reshape(24, -1), 24),
    "one score for each": (X, lambda y: y[:, :1], lambda y: y.T, 1),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_loss_over_another_axis_is_told_as_its_terms_are_miscounted(where: str) -> None:
    x, end, rows, terms = ELSEWHERE[where]
    assert stats(end, lambda y: F.cross_entropy(rows(y), LABELS[:terms]), x=x) == {"classes_elsewhere": 3}
    # Squares have no axis.
    assert not stats(end, lambda y: (rows(y) - 1).square().mean(), x=x, steps=3)


def test_an_axis_whose_count_is_the_same_does_not_matter() -> None:
    ids = torch.arange(CLASSES)
    assert not stats(lambda y: y.T, lambda y: F.cross_entropy(y.T, ids), x=X[:CLASSES])


FLAT: dict[str, tuple[Tensor, Loss, int]] = {  # input, end, classes: vectors of one entry a row
    "flat": (X, torch.flatten, CLASSES),
    "positions": (SEQUENCES, torch.flatten, CLASSES),
    "one score": (X, torch.flatten, 1),
    "a score a position": (SEQUENCES, torch.flatten, 1),
    "one of several": (X, lambda y: y.amax(-1), CLASSES),
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("how", FLAT)
def test_logits_that_were_made_flat_are_told_as_their_terms_are_miscounted(how: str) -> None:
    x, end, classes = FLAT[how]
    target = torch.arange(x[..., 0].numel() * classes) % 2 / 1.0

    def loss(y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y, target[: len(y)])

    kinds = ("flat_output", "classes_elsewhere")
    told = stats(end, loss, classes, x, kinds=kinds)
    assert told == ({"flat_output": 3} if how in ("flat", "positions") else {})
    assert not stats(end, loss, classes, x, kinds=kinds, loss_terms=24)
