"""Capture: every kind of model, and none of them is touched."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass
from mupass._capture.capture import capture
from mupass._capture.inputs import as_call, find_inputs


class Noisy(nn.Module):
    """Everything that a careless capture would change: batch statistics, buffers, random numbers."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, d), nn.BatchNorm1d(d)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(d, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.head(self.drop(self.norm(self.layer(x + torch.randn_like(x)))))


class Branching(Noisy):
    """Takes a branch that depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.exp() if x.sum() > 0 else x.cos()


@pytest.mark.parametrize("model", [Noisy(), Branching()], ids=["export", "recorded"])
@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_not_touched(model: nn.Module, train: bool) -> None:
    model.train(train)
    model.drop.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    x, random = randn(4, 3), torch.get_rng_state()
    before = x.clone()
    mupass.analyze(model, x)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(x, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Dropped(nn.Module):
    """Skips its layers at random."""

    def __init__(self, draw: Callable[[], float | Tensor]) -> None:
        super().__init__()
        self.draw, self.head = draw, nn.Linear(8, 2)
        self.layers = nn.ModuleList(nn.Linear(3 if i == 0 else 8, 8) for i in range(9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            if self.training and self.draw() <= 0.9:
                continue
            x = x + layer(x).relu()
        return self.head(x)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.random(),
        lambda: random.uniform(0, 1),
        lambda: numpy.random.rand(),
        lambda: numpy.random.uniform(),
        lambda: numpy.random.uniform(0, 1),
        lambda: 2 - numpy.random.uniform(2.0),
        lambda: torch.rand([]),
        lambda: torch.rand(()),
    ],
)
def test_layers_that_are_dropped_at_random_are_seen(draw: Callable[[], float | Tensor]) -> None:
    state, numpys = random.getstate(), numpy.random.get_state()[1].copy()
    analysis = mupass.analyze(Dropped(draw), randn(4, 3))
    assert not [w for w in analysis.warnings if "not read" in w]
    assert all(analysis[f"layers.{i}.weight"].infinite == (True, True) for i in range(1, 9))
    assert state == random.getstate() and (numpys == numpy.random.get_state()[1]).all()


@dataclass
class Prediction:
    classes: Tensor
    more: list[Tensor]


class Cache:
    """A class of its own that PyTorch cannot take apart."""

    def __init__(self, x: Tensor) -> None:
        self.layers = [[x]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: torch.distributions.Categorical(logits=x, validate_args=False),
        lambda x: {"logits": x, "cache": Cache(x)},
        lambda x: Prediction(x, [x.exp()]),
    ],
)
def test_outputs_of_any_class_are_read(wrap: Callable[[Tensor], object], device: str) -> None:
    class Wrapped(Noisy):
        def forward(self, x: Tensor) -> object:
            return wrap(super().forward(x))

    model = Wrapped().to(device)
    analysis = mupass.analyze(model, randn(4, 3).to(device))
    assert analysis.capture == "export"
    assert analysis["head.weight"].infinite == (False, True)
    assert type(model(randn(4, 3).to(device))) is type(wrap(randn(4, 2)))


def test_a_branch_on_data_is_recorded_and_reported() -> None:
    analysis = mupass.analyze(Branching(), randn(4, 3))
    assert analysis.capture == "recorded run"
    assert any("one concrete run was recorded" in w for w in analysis.warnings)
    assert analysis["layer.weight"].infinite == (True, False)
    assert analysis["head.weight"].infinite == (False, True)


def test_a_branch_on_data_cannot_be_taken_on_meta() -> None:
    with pytest.raises(mupass.CaptureError, match="cannot capture Branching on the meta device"):
        mupass.analyze(Branching().to("meta"), torch.zeros(4, 3, device="meta"))


def test_meta_models_work() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(4, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 3)
        )
    analysis = mupass.analyze(model, torch.zeros(2, 4, device="meta"))
    assert [g.infinite for g in analysis.geometries[::2]] == [(True, False), (True, True), (False, True)]


def test_models_without_parameters_are_refused() -> None:
    with pytest.raises(mupass.CaptureError, match="ReLU has no parameters"):
        mupass.analyze(nn.ReLU(), randn(2, 3))


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(mupass.CaptureError, match=r"0\.weight has no shape yet"):
        mupass.analyze(model, randn(2, 3))
    model(randn(2, 3))
    assert mupass.analyze(model, randn(2, 3))["0.weight"].infinite == (True, False)


def test_a_failing_model_is_named_with_its_error() -> None:
    with pytest.raises(mupass.CaptureError, match="Linear fails on its example inputs: RuntimeError"):
        mupass.analyze(nn.Linear(3, 4), randn(2, 5))


@pytest.mark.parametrize("exported", [True, False])
def test_parameters_that_the_forward_pass_makes_are_refused_by_name(exported: bool) -> None:
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.middle, self.head = nn.Linear(3, 8), None, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x)
            if not exported and h.sum() > 1e9:
                return x
            if self.middle is None:
                self.middle = nn.Linear(8, 8)
            return self.head(self.middle(h))

    model = Late()
    with pytest.raises(mupass.CaptureError, match=r"middle.weight, middle.bias: .*Run the model once before"):
        mupass.transform(model, randn(4, 3))
    assert model.middle is None and len(list(model.parameters())) == 4
    model(randn(4, 3))
    assert mupass.analyze(model, randn(4, 3))["middle.weight"].infinite == (True, True)


def test_empty_batches_are_refused() -> None:
    with pytest.raises(mupass.InferenceError, match="size 0"):
        mupass.analyze(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(0, 3))


def test_frozen_unused_and_shared_parameters() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.shared, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.unused = nn.Linear(8, 8)
            self.enter.requires_grad_(False)
            self.twin = self.shared

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twin(self.shared(self.enter(x))))

    analysis = mupass.analyze(Model(), randn(2, 3))
    assert analysis["enter.weight"].infinite == (True, False)
    assert analysis["shared.weight"].aliases == ("twin.weight",)
    assert any("unused.weight is not read" in w for w in analysis.warnings)
    assert analysis["unused.weight"].infinite == (True, True)
    assert analysis["unused.weight"].ambiguous == (True, True)


def test_integer_and_complex_parameters() -> None:
    class Model(nn.Module):
        def __init__(self, d: int = 8):
            super().__init__()
            self.order = nn.Parameter(torch.arange(d), requires_grad=False)
            self.w = nn.Parameter(torch.randn(3, d, dtype=torch.cfloat))
            self.head = nn.Linear(d, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.to(torch.cfloat) @ self.w).abs() * self.order)

    analysis = mupass.analyze(Model(), randn(2, 3))
    assert analysis["w"].infinite == (False, True)
    assert analysis["order"].infinite == (True,)


class Several(nn.Module):
    def __init__(self, d: int = 8):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, d), nn.Linear(5, d), nn.Linear(d, 2)

    def forward(self, a: Tensor, *, b: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        h = self.left(a) + scale * self.right(b)
        return {"logits": self.head(h), "hidden_state": h}


def test_several_inputs_and_outputs() -> None:
    analysis = mupass.analyze(Several(), ((randn(2, 3),), {"b": randn(2, 5), "scale": 0.5}))
    assert analysis["head.weight"].infinite == (False, True)
    assert analysis["right.weight"].infinite == (True, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("x", (("x",), {})),
        (("x", "y"), (("x", "y"), {})),
        ({"x": 1}, ((), {"x": 1})),
        ((("x",), {"y": 1}), (("x",), {"y": 1})),
        ([("x",), {"y": 1}], (("x",), {"y": 1})),
    ],
)
def test_forms_of_example_inputs(given: object, expected: tuple) -> None:
    assert as_call(given) == expected


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 2)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 2)),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, 2)),
        nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)),
        nn.LSTM(5, 8, batch_first=True),
    ],
    ids=["linear", "image", "digits", "tokens", "recurrent"],
)
def test_inputs_are_found(model: nn.Module) -> None:
    args, kwargs = find_inputs(model)
    model(*args, **kwargs)


def test_the_last_states_of_an_lstm_are_captured() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 8, 2, bidirectional=True), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            _, (hidden, _) = self.lstm(x)
            return self.head(hidden.permute(1, 0, 2).flatten(1))

    captured = capture(Last(), (torch.zeros(7, 2, 5),), {})
    assert captured.method == "export" and captured.outputs[0][1].meta["val"].shape == (2, 3)


def test_inputs_that_cannot_be_found_are_asked_for() -> None:
    with pytest.raises(mupass.CaptureError, match="cannot tell what Several takes"):
        mupass.analyze(Several())


def test_dead_code_says_nothing() -> None:
    class Model(nn.Module):
        def __init__(self, d: int = 8):
            super().__init__()
            self.table, self.head = nn.Embedding(11, d), nn.Linear(d, 11)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            length = x[:, :, -1].shape[1]
            return self.head(x[:, :length])

    assert mupass.analyze(Model(), randint(11, 2, 5))["table.weight"].infinite == (False, True)


def test_subgraphs_are_read() -> None:
    class Model(nn.Module):
        def __init__(self, d: int = 8):
            super().__init__()
            self.enter, self.body, self.head = nn.Linear(3, d), nn.Linear(d, d), nn.Linear(d, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            with torch.no_grad():
                y = self.body(x)
            with torch.autocast("cpu", torch.bfloat16):
                z = self.body(x)
            return self.head(x + y + z)

    analysis = mupass.analyze(Model(), randn(2, 3))
    assert analysis["body.weight"].infinite == (True, True)
    assert capture(Model(), (randn(2, 3),), {}).method == "export"
