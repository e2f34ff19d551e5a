"""What an optimizer owes its user: resuming, schedules, refusals, coverage, fallbacks; slopes in width."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import mupass
from benchmarks.one_step_slopes import OPTIMIZERS, slopes

WIDTH, BASE, RHO = 8, 4, 0.01
Make = Callable[..., Any]


class Small(nn.Module):
    """Table, gain, positions, a layer, a free matrix and a head: something for every treatment."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(11, w), nn.Parameter(torch.randn(5, w) / 4)
        self.norm, self.fc = nn.LayerNorm(w), nn.Linear(w, w)
        self.free = nn.Parameter(torch.randn(w, w) / math.sqrt(w))
        self.head = nn.Linear(w, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.fc(self.norm(self.emb(ids) + torch.tanh(self.pos))))  # K-FAC takes no such table
        return self.head(torch.tanh(h @ self.free))


def small(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small(WIDTH).double()


def make(base: int = BASE, seed: int = 0) -> Small:
    return transformed(small, seed, inputs=batch(0)[0], base=base)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (4, 5), generator=g), torch.randint(11, (4, 5), generator=g)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, at: range, then: Any = None) -> None:
    for seed in at:
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        if then is not None:
            then.step()


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for n, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(n)), n


OPTIONS: dict[str, tuple[Make, dict[str, Any]]] = {
    "kfac": (mupass.KFAC, {"factor_every": 3, "root_every": 2, "weight_decay": 0.1}),
    "ekfac": (mupass.KFAC, {"ekfac": True, "sharing": "reduce", "factor_every": 2, "root_every": 3}),
    "kfac pi": (mupass.KFAC, {"damping_mode": "pi", "e_a": 0.5, "e_b": 0.5, "fallback": "sgd"}),
    "foof": (mupass.KFAC, {"e_b": 0.0, "momentum": 0.0, "factor_every": 2}),
    "shampoo": (mupass.Shampoo, {"root_every": 3, "weight_decay": 0.1, "block_size": 5}),
    "shampoo sum": (mupass.Shampoo, {"factor_decay": 1.0, "fallback": "sgd", "damping_mode": "trace"}),
    "shampoo graft": (mupass.Shampoo, {"graft": "adam", "root_every": 2, "block_size": 3}),
    "soap": (mupass.SOAP, {"basis_every": 2, "weight_decay": 0.1, "block_size": 5}),
    "soap eigh": (mupass.SOAP, {"basis_every": 3, "eigh_every": 2, "fallback": "adam_atan2"}),
    "muon": (mupass.Muon, {"weight_decay": 0.1, "fallback": "adam_atan2"}),
    "adamuon": (mupass.Muon, {"adaptive": True, "nesterov": False, "roles": ["hidden", "output"]}),
}
every = pytest.mark.parametrize("cls, options", OPTIONS.values(), ids=list(OPTIONS))
CLASSES = [mupass.KFAC, mupass.Shampoo, mupass.SOAP, mupass.Muon]
all_ = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__.lower())
both = pytest.mark.parametrize("cls", CLASSES[:2], ids=["kfac", "shampoo"])


# Resuming --------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=5)
@every
@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_goes_on_bit_for_bit(cls: Make, options: dict[str, Any], cut: int) -> None:
    whole = make()
    optimizer = cls(whole, 0.05, **options)
    train(whole, optimizer, range(10), LambdaLR(optimizer, lambda t: 1 / (1 + t)))

    net = make()
    optimizer = cls(net, 0.05, **options)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    train(net, optimizer, range(cut), schedule)
    file = io.BytesIO()
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(saved, file)
    file.seek(0)

    net = make(seed=1)  # other values, until the saved ones are loaded
    optimizer = cls(net, 0.7, **options)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    saved = torch.load(file, weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    train(net, optimizer, range(cut, 10), schedule)
    assert_equal(net, whole)
    assert optimizer.stats() == {"steps": 10}


@all_
def test_a_loaded_state_is_a_copy(cls: Make) -> None:
    nets = [make() for _ in range(3)]
    optimizers = [cls(net, 0.05) for net in nets]
    train(nets[0], optimizers[0], range(3))
    state = copy.deepcopy(optimizers[0].state_dict())
    for net, optimizer in zip(nets[1:], optimizers[1:], strict=True):
        net.load_state_dict(nets[0].state_dict())
        optimizer.load_state_dict(state)
        train(net, optimizer, range(3, 6))
    assert_equal(nets[1], nets[2])


@pytest.mark.parametrize(
    "cls, options",
    [
        (mupass.Shampoo, {}),
        (mupass.KFAC, {"e_a": 0.5}),
        (mupass.KFAC, {"damping_mode": "pi"}),
        (mupass.KFAC, {"fallback": "sgd"}),
    ],
    ids=["class", "power", "damping mode", "fallback"],
)
def test_the_state_of_another_optimizer_is_refused(cls: Make, options: dict[str, Any]) -> None:
    net = make()
    optimizer = cls(net, 0.05, **options)
    train(net, optimizer, range(1))
    other = mupass.KFAC(make(), 0.05)
    train(other.root, other, range(2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(mupass.OptimizerError, match="state of"):
        other.load_state_dict(optimizer.state_dict())
    twin = mupass.KFAC(make(), 0.05)
    twin.load_state_dict(before)  # what was refused left nothing behind
    for a, b in zip(_tensors(other.state_dict()), _tensors(twin.state_dict()), strict=True):
        assert torch.equal(a, b)


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def test_other_states_are_refused() -> None:
    net = make()
    with pytest.raises(mupass.OptimizerError, match="state of an unknown optimizer; this is KFAC"):
        mupass.KFAC(net, 0.05).load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    old = {**mupass.KFAC(net, 0.05).state_dict(), "mupass": {"kind": "KFAC"}}
    with pytest.raises(mupass.OptimizerError, match="mupass.KFAC was written by an older version"):
        mupass.KFAC(net, 0.05).load_state_dict(old)
    small, large = (mupass.Shampoo(net, 0.05, block_size=b) for b in (3, 100))
    with pytest.raises(mupass.OptimizerError, match="the state of .* another optimizer's, or damaged"):
        large.load_state_dict(small.state_dict())
    frozen = make()
    frozen.fc.requires_grad_(False)
    with pytest.raises(mupass.OptimizerError, match="Which layers are frozen.* must be the same"):
        mupass.KFAC(frozen, 0.05).load_state_dict(mupass.KFAC(net, 0.05).state_dict())


# Schedules -------------------------------------------------------------------------------------------------


@pytest.mark.sample
@all_
@pytest.mark.parametrize("name", ["lambda", "one cycle", "cosine"])
def test_schedules_set_lr_and_the_width_factor_multiplies(cls: Make, name: str) -> None:
    net = make()
    optimizer = cls(net, 0.05, momentum=0.0, fallback="sgd", fallback_lr=0.05)
    schedule = {
        "lambda": lambda: LambdaLR(optimizer, lambda t: 1 / (1 + t)),
        "one cycle": lambda: OneCycleLR(optimizer, max_lr=0.3, total_steps=9, cycle_momentum=False),
        "cosine": lambda: CosineAnnealingLR(optimizer, 9, eta_min=1e-3),
    }[name]()
    twin = copy.deepcopy(net)
    reference = cls(twin, 0.05, momentum=0.0, fallback="sgd", fallback_lr=0.05)
    for at in range(5):
        lr = optimizer.param_groups[0]["lr"]
        assert all(g["lr"] == lr for g in optimizer.param_groups)
        for group in reference.param_groups:
            group["lr"] = lr
        before = values(net)
        train(twin, reference, range(at, at + 1))
        train(net, optimizer, range(at, at + 1), schedule)
        assert optimizer.param_groups[0]["lr"] != lr
        assert_equal(net, twin)
        assert any(not torch.equal(p, before[n]) for n, p in net.named_parameters())
    scales = {n: g["mupass_scale"] for g in optimizer.param_groups for n in [optimizer.names[g["params"][0]]]}
    assert len(set(scales.values())) > 1


@all_
def test_a_step_is_lr_times_the_scale_of_its_group(cls: Make) -> None:
    moves = []
    for lr, factor in ((1e-3, 1.0), (2e-3, 1.0), (1e-3, 2.0)):
        net = make()
        optimizer = cls(net, lr, fallback_lr=lr)
        for group in optimizer.param_groups:
            group["mupass_scale"] *= factor
        before = values(net)
        train(net, optimizer, range(1))
        moves.append({n: p.detach() - before[n] for n, p in net.named_parameters()})
    for n in moves[0]:
        torch.testing.assert_close(moves[1][n], 2 * moves[0][n], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moves[2][n], moves[1][n], rtol=1e-9, atol=1e-12)


@all_
def test_one_cycle_may_cycle_momentum(cls: Make) -> None:
    net = make()
    optimizer = cls(net, 0.01, fallback_lr=0.01)
    train(net, optimizer, range(4), OneCycleLR(optimizer, max_lr=0.1, total_steps=9))
    own = next(g for g in optimizer.param_groups if g["algorithm"] == optimizer.spec.name)
    assert 0.84 < own["momentum"] < 0.95 and own["momentum"] != 0.9


# Refusals --------------------------------------------------------------------------------------------------


NUMBERS = [math.nan, math.inf, -0.1, "0.1", True]
BAD = [
    *[(both_, name, v) for both_ in CLASSES[:2] for v in NUMBERS for name in ("lr", "damping")],
    *[(c, "lr", v) for c in CLASSES[2:] for v in NUMBERS],
    *[(c, n, v) for c in CLASSES for n in ("weight_decay", "fallback_lr") for v in (-1, math.nan)],
    *[(c, "momentum", v) for c in CLASSES for v in (-0.1, 1.0, math.nan)],
    *[(c, "beta2", v) for c in CLASSES[2:] for v in (-0.1, 1.0, math.nan)],
    *[(mupass.SOAP, n, v) for n in ("basis_every", "block_size", "eigh_every") for v in (-1, 2.5)],
    *[(c, "damping", "1e-3") for c in CLASSES[:2]],
    (mupass.Shampoo, "damping", None),
    (mupass.SOAP, "factor_decay", 1.0),
    (mupass.SOAP, "kernels", "nonsense"),
    *[(mupass.Muon, "steps", v) for v in (0, 1.5)],
    *[(c, "roles", ["embedding"]) for c in CLASSES[1:]],
    *[(mupass.Shampoo, n, "nonsense") for n in ("graft", "sides", "kernels")],
    *[(mupass.KFAC, n, v) for n in ("e_a", "e_b") for v in (-1, math.nan, math.inf, "1")],
    *[(mupass.Shampoo, "e", v) for v in (-1, math.nan, math.inf)],
    *[(mupass.KFAC, "factor_decay", v) for v in (-0.1, 1.0, math.nan)],
    *[(mupass.Shampoo, "factor_decay", v) for v in (-0.1, 1.1, math.nan)],
    *[(mupass.KFAC, n, v) for n in ("factor_every", "root_every", "loss_terms") for v in (0, -1, 1.5, True)],
    *[(mupass.Shampoo, n, v) for n in ("root_every", "block_size") for v in (0, 2.0)],
    *[(c, n, "nonsense") for c in (mupass.KFAC, mupass.Shampoo) for n in ("fallback", "damping_mode")],
    *[(c, "fallback", "nonsense") for c in CLASSES[2:]],
    *[(c, n, v) for c in CLASSES for n in ("strict", "stochastic_rounding", "compile") for v in ("no", 1)],
    *[(mupass.KFAC, n, "no") for n in ("ekfac", "stagger", "norms")],
    *[(mupass.Muon, n, "no") for n in ("nesterov", "adaptive", "normuon")],
    *[(c, "staggered", "no") for c in (mupass.Shampoo, mupass.SOAP)],
    *[(mupass.KFAC, n, 0) for n in ("step_bound", "kl_clip", "loss_scale")],
    *[(mupass.KFAC, "loss_scale", v) for v in (math.nan, "1", -1)],
    (mupass.KFAC, "loss_reduction", "none"),
    (mupass.KFAC, "damping_mode", "relative"),
    (mupass.Shampoo, "damping_mode", "pi"),
]


@pytest.mark.parametrize("cls, name, value", BAD, ids=[f"{c.__name__} {n}={v!r}" for c, n, v in BAD])
def test_arguments_out_of_range_are_refused(cls: Make, name: str, value: Any) -> None:
    with pytest.raises(mupass.OptimizerError, match=name):
        cls(_net(), **{"lr": 0.1} | {name: value})


@cache
def _net() -> nn.Module:
    return make()


@all_
def test_choices_are_named_in_the_refusal(cls: Make) -> None:
    with pytest.raises(mupass.OptimizerError, match="unknown fallback 'lion'; known: adamw, adam_atan2, sgd"):
        cls(_net(), 0.1, fallback="lion")


@all_
def test_models_that_cannot_be_optimized(cls: Make) -> None:
    with pytest.raises(mupass.PlanError, match="call mupass.transform"):
        cls(Small(WIDTH), 0.1)
    with pytest.raises(mupass.OptimizerError, match="frozen"):
        cls(make().requires_grad_(False), 0.1)
    other = make()
    other.fc = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(mupass.PlanError, match="fc.weight"):
        cls(other, 0.1)


@all_
def test_a_closure_runs_once_with_gradients_on(cls: Make) -> None:
    net, twin = make(), make()
    optimizer, other = cls(net, 0.05), cls(twin, 0.05)
    calls = []

    def closure() -> Tensor:
        x, y = batch(len(calls))
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    train(twin, other, range(3))
    assert calls == [True] * 3 and losses[2] < losses[0]
    assert_equal(net, twin)


@pytest.mark.parametrize("cls", [*CLASSES, mupass.FoMoH])
def test_an_optimizer_stays_with_its_model(cls: Make) -> None:
    net = make()
    optimizer = cls(net, 0.1)
    for part in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(mupass.OptimizerError, match="make a .* for the copied model"):
            part(optimizer)
    with pytest.raises(mupass.OptimizerError, match="plan"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    twin = copy.deepcopy(net)
    cls(twin, 0.1).load_state_dict(optimizer.state_dict())


def test_a_detached_model_is_refused() -> None:
    net = make()
    mupass._taps.taps.detach(net)
    with pytest.raises(mupass.OptimizerError, match="lost its tap"):
        mupass.KFAC(net, 0.1)
    mupass.Shampoo(net, 0.1)


# Coverage --------------------------------------------------------------------------------------------------


def test_coverage_of_kfac() -> None:
    found = {c.parameter: (c.treatment, c.reason) for c in mupass.KFAC(make(), 0.1).coverage()}
    assert list(found) == [n for n, _ in make().named_parameters()]
    assert found["emb.weight"] == ("kfac embedding", "")
    assert found["fc.weight"] == ("kfac linear", "") and found["fc.bias"] == ("kfac bias", "")
    assert found["free"] == ("kfac linear", "")
    assert found["norm.weight"] == ("kfac gain", "") and found["norm.bias"] == ("kfac shift", "")
    assert found["pos"][0] == "adamw" and "aten.tanh" in found["pos"][1]


def test_what_is_excluded_falls_back() -> None:
    optimizer = mupass.KFAC(make(), 0.1, norms=False, exclude=["fc.*", "free"])
    found = {c.parameter: (c.treatment, c.reason) for c in optimizer.coverage()}
    for name in ("fc.weight", "fc.bias", "free"):
        assert found[name][0] == "adamw" and "exclude=" in found[name][1]
    assert found["norm.weight"] == ("adamw", "norms=False") and found["head.weight"][0] == "kfac linear"
    with pytest.raises(mupass.OptimizerError, match="exclude='fx' fits no parameter"):
        mupass.KFAC(make(), 0.1, exclude=["fx"])


def test_coverage_of_shampoo() -> None:
    optimizer = mupass.Shampoo(make(), 0.1, block_size=5, fallback="sgd")
    found = {c.parameter: c.treatment for c in optimizer.coverage()}
    assert found["fc.weight"] == "shampoo x4" and found["emb.weight"] == "shampoo x6"
    assert found["free"] == "shampoo x4" and found["fc.bias"] == found["pos"] == "sgd"
    assert {c.treatment for c in mupass.Shampoo(make(), 0.1).coverage()} == {"shampoo", "adamw"}


@all_
def test_coverage_prints_one_line_a_parameter(cls: Make) -> None:
    lines = str(cls(make(), 0.1).coverage()).splitlines()
    assert len(lines) == len(list(make().parameters()))
    assert [line.split()[0] for line in lines] == [n for n, _ in make().named_parameters()]
    assert len({line.index(line.split()[1]) for line in lines}) == 1


@all_
def test_strict_lists_what_falls_back(cls: Make) -> None:
    with pytest.raises(mupass.OptimizerError, match="strict=True, but these fall back") as error:
        cls(make(), 0.1, strict=True)
    message = str(error.value)
    assert "pos" in message
    own = [c.parameter for c in cls(make(), 0.1).coverage() if c.treatment != "adamw"]
    assert "fc.weight" in own and not any(name in message for name in own)


@pytest.mark.sample
@all_
@pytest.mark.parametrize("frozen", ["emb.weight", "fc.weight", "fc.bias", "norm.weight"])
def test_frozen_parameters_stay(cls: Make, frozen: str) -> None:
    net = make()
    net.get_parameter(frozen).requires_grad_(False)
    before = values(net)
    optimizer = cls(net, 0.05, weight_decay=0.1)
    assert frozen not in [c.parameter for c in optimizer.coverage()]
    train(net, optimizer, range(3))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys() - {frozen}


def test_a_bias_of_a_frozen_weight_is_preconditioned_all_the_same() -> None:
    moved = []
    for frozen in (False, True):
        net = make()
        net.fc.weight.requires_grad_(not frozen)
        optimizer = mupass.KFAC(net, 0.1, kl_clip=None)  # which sums over all parameters
        assert dict((c.parameter, c.treatment) for c in optimizer.coverage())["fc.bias"] == "kfac bias"
        train(net, optimizer, range(1))
        moved.append(net.fc.bias.detach().clone())
    assert torch.equal(*moved)


# Decay and fallbacks ---------------------------------------------------------------------------------------


@pytest.mark.sample
@all_
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("base", [WIDTH, BASE, 2], ids=lambda b: f"base {b}")
def test_weight_decay_is_the_same_at_all_widths(cls: Make, fallback: str, base: int) -> None:
    after = {}
    for decay in (0.0, 0.2):
        net = make(base)
        before = values(net)
        optimizer = cls(net, 0.05, weight_decay=decay, fallback=fallback, fallback_lr=0.03)
        train(net, optimizer, range(1))
        after[decay] = values(net)
    own = {c.parameter for c in optimizer.coverage() if c.treatment != fallback}
    assert own and own != before.keys()
    for n in before:
        lost = after[0.0][n] - after[0.2][n]
        torch.testing.assert_close(
            lost, (0.05 if n in own else 0.03) * 0.2 * before[n], rtol=1e-9, atol=1e-12
        )


@pytest.mark.sample
@all_
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("base", [WIDTH, BASE], ids=["base width", "wider"])
def test_fallback_is_that_of_torch(cls: Make, fallback: str, base: int) -> None:
    decay = 0.3 if fallback == "adamw" else 0.0  # decay of SGD is inside the gradient in torch
    net = make(base)
    rest = mupass.Fallback(fallback, lr=0.02, momentum=0.8)
    optimizer = cls(net, 0.0, fallback=rest, weight_decay=decay)
    left = [c.parameter for c in optimizer.coverage() if c.treatment == fallback]
    twin = make(base)
    for n, p in twin.named_parameters():
        p.requires_grad_(n in left)
    if base == WIDTH:
        groups: Any = [p for p in twin.parameters() if p.requires_grad]
    else:
        groups = mupass.param_groups(twin, 0.02, optimizer=fallback, weight_decay=decay)
        assert fallback == "adamw" or any(g["mupass_scale"] != 1 for g in groups)
    reference: torch.optim.Optimizer
    if fallback == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.02, weight_decay=decay)
    else:
        reference = torch.optim.SGD(groups, lr=0.02, momentum=0.8)
    before = values(net)
    train(net, optimizer, range(6))
    train(twin, reference, range(6))
    for n, p in net.named_parameters():
        torch.testing.assert_close(
            p, twin.get_parameter(n), rtol=1e-12, atol=1e-14, msg=lambda m, n=n: f"{n}: {m}"
        )
        assert torch.equal(p, before[n]) == (n not in left)


# Copies and precision --------------------------------------------------------------------------------------


@all_
def test_a_copy_of_a_model_in_training_is_independent(cls: Make) -> None:
    net, alone = make(), make()
    optimizer = cls(net, 0.05)
    train(net, optimizer, range(2))
    twin = copy.deepcopy(net)
    second = cls(twin, 0.05)
    train(twin, second, range(10, 13))
    train(net, optimizer, range(2, 4))
    train(alone, cls(alone, 0.05), range(4))
    assert_equal(net, alone)
    assert second.stats() == {"steps": 3}


def own_state(optimizer: Any) -> list[Tensor]:
    found = _tensors(optimizer.state_dict()["state"])
    assert found
    return found


@all_
def test_precision_follows_the_model(cls: Make) -> None:
    for dtype in (torch.float32, torch.float64):
        net = make().to(dtype)
        optimizer = cls(net, 0.05)
        train(net, optimizer, range(2))
        assert all(t.dtype == dtype for t in own_state(optimizer))
        assert all(p.dtype == dtype and p.isfinite().all() for p in net.parameters())


@all_
def test_half_precision_keeps_factors_in_float32(cls: Make) -> None:
    net = make().to(torch.bfloat16)
    optimizer = cls(net, 0.05)
    train(net, optimizer, range(3))
    assert all(t.dtype == torch.float32 for t in own_state(optimizer))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in net.parameters())


@both
def test_a_model_may_become_double_after_its_optimizer_is_made(cls: Make) -> None:
    net, twin = make().float(), make().float().double()
    optimizer = cls(net, 0.05, RHO)
    net.double()
    train(net, optimizer, range(2))
    train(twin, cls(twin, 0.05, RHO), range(2))
    for n, p in net.named_parameters():
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, twin.get_parameter(n), rtol=1e-4, atol=1e-4)


@all_
def test_training_lowers_the_loss(cls: Make) -> None:
    net = make()
    x, y = batch(0)

    def loss() -> float:
        return F.cross_entropy(net(x).flatten(0, -2), y.flatten()).item()

    first = loss()
    clip = {"kl_clip": 1e-3} if cls is mupass.KFAC else {}
    optimizer = cls(net, 0.05, fallback_lr=0.05 if cls is mupass.Muon else 0.01, **clip)
    for _ in range(30):
        train(net, optimizer, range(1))
    assert loss() < first / (2 if cls is mupass.KFAC else 4)


# Slopes in width -------------------------------------------------------------------------------------------

# RMS(dW h) is Theta(1) only as the width grows: at 128..512 the finite width itself bends the fit. It does
# so by up to 0.12 with these seeds, hence LIMIT; it fades with width, and the long test holds 0.1 up to 2048.
LIMIT, WIDE_LIMIT = 0.15, 0.1
NARROW, WIDE = [128, 256, 512], [128, 256, 512, 1024, 2048]


@pytest.mark.sample("mlp-sgd", "cnn-kfac (1,1)", "cnn-shampoo e=1/2")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_updates_do_not_depend_on_width_under_mup(model: str, optimizer: str) -> None:
    found = slopes(model, optimizer, "mup", NARROW, seeds=3)
    assert len(found) == 6
    assert max(abs(s) for s in found.values()) < LIMIT, found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["blocks # adam", "soap blocks", "muon", "adam-atan2"])
def test_updates_of_a_transformer_do_not_depend_on_width(optimizer: str) -> None:
    found = slopes("transformer", optimizer, "mup", NARROW, seeds=2)
    assert len(found) == 12
    assert max(abs(s) for s in found.values()) < LIMIT, found


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_of_a_transformer_under_all_optimizers(optimizer: str) -> None:
    found = slopes("transformer", optimizer, "mup", NARROW, seeds=4)
    assert max(abs(s) for s in found.values()) < LIMIT, found


@pytest.mark.thin(3)
@pytest.mark.sample(every=10)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_updates_depend_on_width_under_standard(model: str, optimizer: str) -> None:
    found = slopes(model, optimizer, "standard", [64, 128, 256], seeds=1)
    assert max(abs(s) for s in found.values()) > 2 * LIMIT, found


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_updates_do_not_depend_on_width_up_to_2048(model: str, optimizer: str) -> None:
    found = slopes(model, optimizer, "mup", WIDE, seeds=4)
    assert max(abs(s) for s in found.values()) < WIDE_LIMIT, found
