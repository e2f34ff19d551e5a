"""Hypergradients are those of finite differences and of loops written by hand; runs are the optimizers'."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from test_sweep import data
from torch import Tensor, nn

import mupass
from mupass._hyper.elementary_norms import Apart
from mupass._hyper.roots import damped_root
from mupass._runs.batches import cross_entropy, read_batches
from mupass._runs.copies import Copies
from mupass._runs.jobs import Job, Work
from mupass._runs.recipes import recipe

BATCHES = [(x.double(), y) for x, y in data(4)]
HELD_X, HELD_Y = BATCHES.pop()


def held_out(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(HELD_X), HELD_Y)


def plain_mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    ).double()


def mlp(width: int = 16, base: int = 8) -> nn.Module:
    return transformed(plain_mlp, width, inputs=HELD_X[:2], base=base)


class Odd(nn.Module):
    """Attention, normalization with running averages, dropout and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(10, 16), nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head, self.drop = nn.Linear(16, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm(self.up(x)))[:, None]
        h = torch.cat([h, -h], 1)
        return self.head(self.drop(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


def odd() -> nn.Module:
    torch.manual_seed(0)
    model = mupass.transform(Odd().double(), HELD_X[:2], base=8)
    model.norm.bias.requires_grad_(False)
    return model


def sgd(model: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov: bool = False) -> Any:
    groups = mupass.param_groups(model, lr, optimizer="sgd", weight_decay=weight_decay)
    options = {"nesterov": True} if nesterov else {"dampening": 0.3}
    return torch.optim.SGD(groups, momentum=momentum, **options)


def adam(model: nn.Module, lr: float, beta1: float, beta2: float, weight_decay: float) -> Any:
    groups = mupass.param_groups(model, lr, optimizer="adam", weight_decay=weight_decay, eps=1e-4)
    return torch.optim.Adam(groups, betas=(beta1, beta2))


def shampoo(model: nn.Module, lr: float, damping: float, momentum: float, **options: Any) -> Any:
    return mupass.Shampoo(model, lr, damping, momentum=momentum, fallback_lr=0.01, **options)


def betas(model: nn.Module, lr: float, damping: float, beta1: float, eps: float) -> Any:
    fallback = mupass.Fallback("adamw", lr=0.01, betas=(beta1, 0.95), eps=eps, weight_decay=0.1)
    return mupass.Shampoo(model, lr, damping, graft="none", fallback=fallback)


TWO, THREE = {"lr": 0.02, "damping": 1e-2}, {"lr": 0.02, "damping": 1e-2, "momentum": 0.5}
CASES: dict[str, tuple[Any, dict[str, float], Callable[[], nn.Module]]] = {
    "sgd": ("sgd", {"lr": 0.1, "momentum": 0.7}, mlp),
    "sgd without momentum yet": ("sgd", {"lr": 0.1, "momentum": 0.0}, mlp),
    "damped momentum": (sgd, {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.02}, mlp),
    "nesterov": (partial(sgd, nesterov=True), {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.02}, odd),
    "adam": (adam, {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1}, mlp),
    "adamw": ("adamw", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}, odd),
    "shampoo": ("shampoo", TWO, mlp),
    "defaults": (lambda model, lr, damping: mupass.Shampoo(model, lr, damping), TWO, mlp),
    "graft sgd": (partial(shampoo, graft="sgd", damping_memory=0.5, momentum_of="directions"), THREE, mlp),
    "graft rmsprop": (partial(shampoo, graft="rmsprop", root_every=3, graft_eps=1e-3), THREE, mlp),
    "late": (partial(shampoo, graft="adam", start_step=2, graft_beta2=0.9, block_size=6), THREE, mlp),
    "no graft": (partial(shampoo, graft="none", root_every=3, staggered=False), THREE, mlp),
    "absolute": (partial(shampoo, damping_mode="absolute", e=1.0, root_every=2), THREE, mlp),
    "trace": (
        partial(shampoo, damping_mode="trace", sides="left", block_size=6, weight_decay=0.1),
        THREE,
        mlp,
    ),
    "sums": (partial(shampoo, factor_decay=1.0, fallback="sgd"), THREE, odd),
    "betas": (betas, {**TWO, "beta1": 0.8, "eps": 1e-3}, odd),
    "angle": (partial(shampoo, fallback="adam_atan2"), THREE, mlp),
}
STEPS = 5


def run(name: str, point: dict[str, float] | None = None, **options: Any) -> mupass.HyperGradient:
    make, default, build = CASES[name]
    settings = {"optimizer": make, "steps": STEPS, "evaluate": held_out, **options}
    return mupass.hypergradient(build(), BATCHES, point or default, **settings)


def difference(name: str, key: str, **options: Any) -> float:
    """Central difference, or one to the right of zero."""
    point = CASES[name][1]
    value = point[key]
    # The loss bends sharply in the decay of adam: a step of 1e-4 is off by 2e-5, one of 1e-5 by 2e-7.
    step = (1e-5 if (name, key) == ("adam", "weight_decay") else 1e-4) * (value or 1.0)
    if not value:
        losses = [run(name, {**point, key: i * step}, **options).loss for i in range(3)]
        return (-3 * losses[0] + 4 * losses[1] - losses[2]) / (2 * step)
    up, down = (run(name, {**point, key: value + s}, **options).loss for s in (step, -step))
    return (up - down) / (2 * step)


@pytest.mark.sample(every=6)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scored", [True, False])
def test_the_run_is_that_of_the_optimizer(name: str, scored: bool) -> None:
    make, point, build = CASES[name]
    evaluate, model = held_out if scored else None, build()
    copies = Copies((16,), (model,), model)
    work = Work(copies, read_batches(BATCHES, STEPS), cross_entropy, recipe(make), STEPS, evaluate)
    score, _ = work.run(Job(0, tuple(point.items()), 0))
    assert run(name, evaluate=evaluate).loss == pytest.approx(score, rel=1e-11)


@pytest.mark.thin(2)
@pytest.mark.sample("sgd", "adam", "absolute")
@pytest.mark.parametrize("name", CASES)
def test_both_modes_agree_with_finite_differences(name: str) -> None:
    reverse, forward = run(name), run(name, mode="forward")
    assert reverse.loss == forward.loss or reverse.loss == pytest.approx(forward.loss, rel=1e-14)
    for key, value in CASES[name][1].items():
        assert forward.gradient[key] == pytest.approx(reverse.gradient[key], rel=1e-9)
        assert reverse.gradient[key] == pytest.approx(difference(name, key), rel=1e-5, abs=1e-9)
        assert reverse.logarithmic[key] == value * reverse.gradient[key]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw", "absolute"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_gpu_finds_the_same(name: str, mode: str) -> None:
    make, point, build = CASES[name]
    settings = {"optimizer": make, "steps": STEPS, "mode": mode}
    here = mupass.hypergradient(build().eval(), BATCHES, point, **settings)
    there = mupass.hypergradient(build().eval().cuda(), BATCHES, point, **settings)
    assert there.loss == pytest.approx(here.loss, rel=1e-9)
    assert there.gradient == pytest.approx(here.gradient, rel=1e-6)


def test_a_training_loss_too() -> None:
    found = run("shampoo", evaluate=None)
    for key in TWO:
        assert found.gradient[key] == pytest.approx(difference("shampoo", key, evaluate=None), rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_it_is_the_gradient_of_a_loop_written_by_hand(name: str) -> None:
    point, model = CASES[name][1], mlp()
    number = {key: torch.tensor(v, dtype=torch.float64, requires_grad=True) for key, v in point.items()}
    plan = model.mupass_plan.for_optimizer(name)
    p = {n: q.detach().clone().requires_grad_() for n, q in model.named_parameters()}
    first, second = ({n: torch.zeros_like(q) for n, q in p.items()} for _ in range(2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
        h = torch.relu(h @ p["2.weight"].T + p["2.bias"])
        return F.cross_entropy(h @ p["4.weight"].T + p["4.bias"], y)

    for step in range(STEPS):
        grads = torch.autograd.grad(loss(*BATCHES[step % 3]), list(p.values()), create_graph=True)
        for n, g in zip(list(p), grads, strict=True):
            s = plan[n].scales
            if name == "sgd":
                first[n] = number["momentum"] * first[n] + g
                p[n] = p[n] - number["lr"] * s.lr * first[n]
                continue
            g = g + number["weight_decay"] * s.epsilon / s.lr * p[n]
            first[n] = number["beta1"] * first[n] + (1 - number["beta1"]) * g
            second[n] = number["beta2"] * second[n] + (1 - number["beta2"]) * g**2
            top = first[n] / (1 - number["beta1"] ** (step + 1))
            bottom = (second[n] / (1 - number["beta2"] ** (step + 1))).clamp(min=1e-300).sqrt()
            p[n] = p[n] - number["lr"] * s.lr * top / (bottom + 1e-4 * s.epsilon)
    score = loss(HELD_X, HELD_Y)
    wanted = torch.autograd.grad(score, list(number.values()))
    found = run(name)
    assert found.loss == pytest.approx(score.item(), rel=1e-12)
    for key, g in zip(number, wanted, strict=True):
        assert found.gradient[key] == pytest.approx(g.item(), rel=1e-9)


def test_norms_in_elementary_operators_have_the_values_of_torch() -> None:
    x, gain, shift = torch.randn(5, 6, 4), torch.rand(6) + 0.5, torch.randn(6)

    def results() -> list[Tensor]:
        mean, variance = torch.full((6,), 0.2), torch.full((6,), 1.5)
        return [
            F.batch_norm(x, mean, variance, gain, shift, training=True),
            F.batch_norm(x, mean, variance, gain, shift),
            F.instance_norm(x, mean, variance, gain, shift),
            F.instance_norm(x, mean, variance, gain, shift, use_input_stats=False),
            F.layer_norm(x.mT, (6,), gain, shift),
            mean,
            variance,
        ]

    expected = results()
    with Apart():
        found = results()
    torch.testing.assert_close(found, expected)


def test_every_group_has_its_own_derivative() -> None:
    def two(model: nn.Module, low: float, high: float) -> torch.optim.Optimizer:
        first, *rest = mupass.param_groups(model, low, optimizer="sgd")
        for group in rest:
            group["lr"] = high**2 * group["mupass_scale"]
        return torch.optim.SGD([first, *rest])

    point = {"low": 0.1, "high": 0.3}
    found = mupass.hypergradient(mlp(), BATCHES, point, optimizer=two, steps=4)
    first, *rest = found.groups
    assert "0.weight" in first.parameters and {g.entry for g in found.groups} == {"lr"}
    scale = mlp().mupass_plan.for_optimizer("sgd")["0.weight"].scales.lr
    assert found.gradient["low"] == pytest.approx(first.gradient * scale)
    by_log = math.fsum(g.value * g.gradient for g in rest)  # the rate of the others is high squared
    assert found.logarithmic["high"] == pytest.approx(2 * by_log)
    assert "by its logarithm" in str(found) and "low = 0.1" in str(found)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("power", [0.25, 1.0])
def test_roots_have_derivatives_where_eigenvalues_coincide(relative: bool, power: float) -> None:
    rows = torch.randn(2, 6, 3, dtype=torch.float64)  # three eigenvalues are zero

    def root(rows: Tensor, damping: Tensor) -> Tensor:
        return damped_root(rows @ rows.mT, damping, power, relative)

    damping = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    inputs = (rows.requires_grad_(), damping)
    assert torch.autograd.gradcheck(root, inputs, check_forward_ad=True, atol=1e-6)
    twins = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1).requires_grad_()
    # Where the largest coincide, damping relative to them has no derivative.
    assert relative or torch.autograd.gradcheck(root, (twins, damping), check_forward_ad=True)


def test_a_zero_matrix_without_damping_has_the_root_zero() -> None:
    bank = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    root = damped_root(bank, torch.ones(1, dtype=torch.float64), 0.25, True)
    root.sum().backward()
    assert not root.any() and not bank.grad.any()


def test_a_run_that_diverges_has_no_gradient() -> None:
    found = run("sgd", {"lr": 1e9, "momentum": 0.9})
    assert math.isinf(found.loss) and all(map(math.isnan, found.gradient.values()))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return mupass.Muon(model, lr)


class Counts(nn.Module):
    """A codebook of the old kind: an average that is kept without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(10, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.up(x))
        if self.training:
            self.mean.lerp_(y.detach().mean(0), 0.5)
        return y - self.mean


def test_a_buffer_that_autograd_cannot_follow_is_refused() -> None:
    model = mupass.transform(Counts().double(), HELD_X[:2], base=8)
    with pytest.raises(mupass.StudyError, match="the buffer mean changes"):
        mupass.hypergradient(model, BATCHES, {"lr": 0.1}, optimizer="sgd", evaluate=held_out)


REFUSED: dict[str, dict[str, Any]] = {
    "Muon cannot be differentiated": {"optimizer": muon},
    "amsgrad=True of Adam": {
        "optimizer": lambda model, lr: torch.optim.Adam(mupass.param_groups(model, lr), amsgrad=True)
    },
    "graft='spectral' of Shampoo cannot .* use graft='adam'": {
        "optimizer": lambda model, lr: mupass.Shampoo(model, lr, graft="spectral")
    },
    "by 'decay', which sets factor_decay": {
        "optimizer": lambda model, lr, decay: mupass.Shampoo(model, lr, factor_decay=decay),
        "point": {"lr": 0.1, "decay": 0.9},
    },
    "by 'nothing', which sets no number": {
        "optimizer": lambda model, lr, nothing: torch.optim.SGD(model.parameters(), lr),
        "point": {"lr": 0.1, "nothing": 0.9},
    },
    "no .item": {"evaluate": lambda model: held_out(model).item()},
    "unknown form 'explicit'": {"form": "explicit"},
    "unknown mode 'sideways'": {"mode": "sideways"},
    "steps must be at least 1": {"steps": 0},
    "no second derivative": {"loss": lambda output, y: F.cross_entropy(Once.apply(output), y)},
    "needs evaluate=": {"form": "implicit", "evaluate": None},
    "stationary point of torch.optim.SGD alone": {"form": "implicit", "optimizer": "adam"},
    "lr: the stationary point of SGD does not depend on it": {"form": "implicit"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_differentiated_is_refused(message: str) -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    settings = {
        "point": {"lr": 0.1},
        "optimizer": "sgd",
        "steps": 2,
        "evaluate": held_out,
        **REFUSED[message],
    }
    with pytest.raises(mupass.StudyError, match=message):
        mupass.hypergradient(model, BATCHES, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model.training


def test_a_model_without_a_width_is_refused() -> None:
    with pytest.raises(mupass.InferenceError, match="no dimension of Linear grows"):
        mupass.hypergradient(nn.Linear(10, 4).double(), BATCHES, {"lr": 0.1})


class Regression(nn.Module):
    """Two layers without a nonlinearity between: not convex, but with a minimum that is sharp under decay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(10, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)))


def decayed(model: nn.Module, weight_decay: float, lr: float = 0.1) -> torch.optim.Optimizer:
    groups = mupass.param_groups(model, lr, optimizer="sgd", weight_decay=weight_decay)
    return torch.optim.SGD(groups, momentum=0.5)


def trained(weight_decay: float, start: nn.Module | None = None) -> nn.Module:
    """Newton's method on the training loss with decay, from where gradient descent arrives."""
    torch.manual_seed(0)
    model = start or mupass.transform(Regression(3).double(), HELD_X[:2], base=2)
    decays = [g["weight_decay"] for g in decayed(model, weight_decay).param_groups for _ in g["params"]]
    members = [p for g in decayed(model, weight_decay).param_groups for p in g["params"]]
    order = {p: d for p, d in zip(members, decays, strict=True)}
    named = dict(model.named_parameters())
    d = torch.cat([torch.full_like(p, order[p]).flatten() for p in named.values()])

    def objective(flat: Tensor) -> Tensor:
        return training_loss(model, flat) + (d * flat * flat).sum() / 2

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    if start is None:
        for _ in range(2000):
            flat = flat - 0.3 * torch.func.grad(objective)(flat)
    for _ in range(8):
        hessian = torch.func.hessian(objective)(flat)
        flat = flat - torch.linalg.solve(hessian, torch.func.grad(objective)(flat)[:, None])[:, 0]
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    return model


def unflatten(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    pieces = flat.split([p.numel() for p in model.parameters()])
    return {n: x.view_as(p) for (n, p), x in zip(model.named_parameters(), pieces, strict=True)}


def training_loss(model: nn.Module, flat: Tensor) -> Tensor:
    named = unflatten(model, flat)
    losses = [F.cross_entropy(torch.func.functional_call(model, named, (x,)), y) for x, y in BATCHES]
    return torch.stack(losses).mean()


trained_once = pytest.mark.xdist_group("the minimum")  # on one worker, which trains to it once


@pytest.fixture(scope="module")
def minimum() -> nn.Module:
    return trained(0.02)


@trained_once
@pytest.mark.sample("cg")
@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_the_implicit_form_follows_the_minimum(minimum: nn.Module, solver: str) -> None:
    settings = {"form": "implicit", "evaluate": held_out, "solver": solver}
    settings["optimizer"] = partial(decayed, lr=0.5)
    point = {"weight_decay": 0.02}
    found = mupass.hypergradient(minimum, BATCHES, point, terms=20000, tolerance=1e-8, **settings)
    scores = [held_out(trained(0.02 + s, deepcopy(minimum))).item() for s in (1e-5, -1e-5)]
    assert found.gradient["weight_decay"] == pytest.approx((scores[0] - scores[1]) / 2e-5, rel=1e-6)
    assert found.loss == held_out(minimum).item()
    assert len(found.groups) >= 2
    total = math.fsum(g.value * g.gradient for g in found.groups)
    assert total == pytest.approx(found.logarithmic["weight_decay"])


class Spare(Regression):
    """A parameter more, which nothing reads."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.spare = nn.Parameter(torch.zeros(3))


@trained_once
def test_the_implicit_form_takes_a_parameter_that_nothing_reads(minimum: nn.Module) -> None:
    settings = {"form": "implicit", "evaluate": held_out, "optimizer": decayed}
    spare = mupass.transform(Spare(3).double(), HELD_X[:2], base=2)
    spare.load_state_dict(minimum.state_dict(), strict=False)
    found = mupass.hypergradient(spare, BATCHES, {"weight_decay": 0.02}, **settings)
    expected = mupass.hypergradient(minimum, BATCHES, {"weight_decay": 0.02}, **settings)
    assert found.gradient == pytest.approx(expected.gradient)


@pytest.mark.slow
@trained_once
def test_unrolling_at_the_minimum_tends_to_the_implicit_form(minimum: nn.Module) -> None:
    settings = {"optimizer": decayed, "evaluate": held_out, "loss": cross_entropy}
    xs, ys = (
        torch.cat(part) for part in zip(*BATCHES, strict=True)
    )  # equal batches: the mean of their means
    point = {"weight_decay": 0.02}
    exact = mupass.hypergradient(minimum, BATCHES, point, form="implicit", tolerance=1e-9, **settings)
    short, long = (
        mupass.hypergradient(minimum, (xs, ys), point, steps=steps, mode="forward", **settings)
        for steps in (20, 300)
    )
    errors = [abs(h.gradient["weight_decay"] / exact.gradient["weight_decay"] - 1) for h in (short, long)]
    assert errors[1] < 0.2 and errors[1] < errors[0] / 2


@trained_once
def test_implicit_refusals_name_what_is_wrong(minimum: nn.Module) -> None:
    settings = {"optimizer": decayed, "form": "implicit", "evaluate": held_out}
    point = {"weight_decay": 0.02}
    with pytest.raises(mupass.StudyError, match="not at a stationary point"):
        mupass.hypergradient(minimum, BATCHES, {"weight_decay": 0.1}, **settings)
    with pytest.raises(mupass.StudyError, match="allow more terms"):
        mupass.hypergradient(minimum, BATCHES, point, terms=1, **settings)
    with pytest.raises(mupass.StudyError, match="unknown solver"):
        mupass.hypergradient(minimum, BATCHES, point, solver="lu", **settings)
    fast = {**settings, "optimizer": partial(decayed, lr=100.0), "solver": "neumann"}
    with pytest.raises(mupass.StudyError, match="Neumann series diverges"):
        mupass.hypergradient(minimum, BATCHES, point, **fast)
