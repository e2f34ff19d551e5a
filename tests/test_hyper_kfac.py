"""K-FAC's unrolled steps are those of the optimizer; hypergradients are those of finite differences."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_hypergradient import BATCHES, HELD_X, HELD_Y, mlp, odd
from torch import Tensor, nn

import mupass
from mupass._errors import StudyError
from mupass._runs.batches import cross_entropy, read_batches
from mupass._runs.copies import Copies
from mupass._runs.jobs import Job, Work
from mupass._runs.recipes import recipe

STEPS = 5


def held_out(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(HELD_X), HELD_Y)


def kfac(model: nn.Module, lr: float, damping: float, momentum: float, **options: Any) -> Any:
    return mupass.KFAC(model, lr, damping, momentum=momentum, fallback_lr=0.01, **options)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Unflatten(1, (1, 10)),
        nn.Conv1d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv1d(8, 8, 3),
    ]
    model = nn.Sequential(*layers, nn.GroupNorm(4, 8), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)).double()
    return mupass.transform(model, HELD_X[:2], base=4)


class Tied(nn.Module):
    """Tokens from the signs of the data, raw parameters, and one weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(4, 12), nn.LayerNorm(12)
        self.mix = nn.Parameter(torch.randn(12, 12) / 12**0.5)
        self.head = nn.Linear(12, 4, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens((x > 0).long() + 2 * (x > 0.5).long())
        return self.head(self.norm(h + torch.tanh(torch.einsum("btd,de->bte", h, self.mix))).mean(1))


class Recurrent(nn.Module):
    """A recurrence over halves of the data, and a cell behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell = nn.GRU(5, 8, batch_first=True), nn.LSTMCell(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gru(x.unflatten(1, (2, 5)))[0].sum(1)
        return self.head(self.cell(h, (h, h))[0])


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Recurrent().double(), HELD_X[:2], base=4)


def tied() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Tied().double(), HELD_X[:2], base=6)


THREE = {"lr": 0.02, "damping": 1e-1, "momentum": 0.5}
CASES = {
    "default": (kfac, mlp),
    "own defaults": (mupass.KFAC, odd),
    "bounded": (partial(kfac, step_bound=1e-3, damping_memory=0.5), mlp),
    "directions": (partial(kfac, momentum_of="directions", step_bound=1e-2, kl_clip=1e-4), mlp),
    "stale": (partial(kfac, root_every=4, damping_memory=0.9, stagger=False), cnn),
    "absolute": (partial(kfac, damping_mode="absolute", root_every=2), mlp),
    "eigen": (partial(kfac, damping_mode="eigen", e_a=0.5, e_b=0.5), mlp),
    "pi": (partial(kfac, damping_mode="pi", weight_decay=0.1), mlp),
    "foof": (partial(kfac, e_b=0.0, factor_every=2, root_every=4), mlp),
    "clipped": (partial(kfac, kl_clip=1e-3, stagger=False, root_every=3), mlp),
    "blocks": (partial(kfac, factor_decay=0.5, block_size=8), mlp),
    "fallback": (partial(kfac, norms=False, exclude=["0.*"]), mlp),
    "convolutions": (kfac, cnn),
    "reduce": (partial(kfac, sharing="reduce", fallback="sgd"), cnn),
    "attention": (kfac, odd),
    "tied": (partial(kfac, diagonal_above=3), tied),
    "recurrent": (kfac, recurrent),
}


def run(name: str, point: dict[str, float] | None = None, **options: Any) -> mupass.HyperGradient:
    make, build = CASES[name]
    settings = {"optimizer": make, "steps": STEPS, "evaluate": held_out, **options}
    return mupass.hypergradient(build(), BATCHES, point or THREE, **settings)


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("name", CASES)
def test_the_run_is_that_of_the_optimizer(name: str) -> None:
    make, build = CASES[name]
    model = build()
    copies = Copies((16,), (model,), model)
    work = Work(copies, read_batches(BATCHES, STEPS), cross_entropy, recipe(make), STEPS, held_out)
    score, _ = work.run(Job(0, tuple(THREE.items()), 0))
    assert run(name).loss == pytest.approx(score, rel=1e-10)


def difference(name: str, key: str) -> float:
    value = THREE[key]
    step = 1e-5 * value
    up, down = (run(name, {**THREE, key: value + s}).loss for s in (step, -step))
    return (up - down) / (2 * step)


@pytest.mark.thin(2)
@pytest.mark.sample("clipped")
@pytest.mark.parametrize("name", CASES)
def test_both_modes_agree_with_finite_differences(name: str) -> None:
    reverse, forward = run(name), run(name, mode="forward")
    assert reverse.loss == pytest.approx(forward.loss, rel=1e-12)
    for key, value in THREE.items():
        assert reverse.gradient[key] == pytest.approx(difference(name, key), rel=1e-5, abs=1e-9)
        assert forward.gradient[key] == pytest.approx(reverse.gradient[key], rel=1e-8)
        assert reverse.logarithmic[key] == value * reverse.gradient[key]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ekfac": True}, "ekfac=True .* eigenbases"), ({"fisher": "sampled"}, "fisher='sampled' .* observe")],
)
def test_what_the_rule_does_not_follow_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        mupass.hypergradient(mlp(), BATCHES, THREE, optimizer=partial(kfac, **options), steps=2)


def test_the_model_is_left_alone_and_trains_on() -> None:
    model = mlp()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    mupass.hypergradient(model, BATCHES, THREE, optimizer=kfac, steps=2, evaluate=held_out)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    optimizer = kfac(model, **THREE)
    F.cross_entropy(model(HELD_X), HELD_Y).backward()
    optimizer.step()
    assert set(optimizer.stats()) == {"steps"}


def test_bounds_bind_in_the_cases_above() -> None:
    free = partial(kfac, step_bound=None, momentum_of="directions")
    CASES["free"] = (free, mlp)
    try:
        losses = {name: run(name).loss for name in ("free", "directions")}
    finally:
        del CASES["free"]
    assert losses["free"] != pytest.approx(losses["directions"], rel=1e-4)
    assert run("bounded").loss != pytest.approx(run("default").loss, rel=1e-4)
