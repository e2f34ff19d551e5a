"""Depth: residual branches are found, multiplied by 1/L, and updates keep their size as layers are added."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import log2

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from torch import Tensor, nn

import mupass
from mupass import OptimizerSpec, Plan, TransformError
from mupass._capture.capture import capture
from mupass._roles.branches import find_branches

WIDTH, BASE = 32, 2


class Residual(nn.Module):
    """One hidden layer a branch."""

    def __init__(self, layers: int, width: int = WIDTH) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(torch.tanh(up(h)))
        return self.head(h)


class Odd(nn.Module):
    """Parallel branches, a dropout and a scale behind a branch, sums that are none, shared conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.table = nn.Linear(6, 8), nn.Parameter(torch.randn(8))
        self.cond, self.scale = nn.Linear(6, 8), nn.Parameter(torch.ones(8))
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, cond = self.inp(x) + self.table, self.cond(x)
        h = h + self.a(torch.tanh(h + cond)) + self.b(torch.tanh(h + cond))  # two
        h = h + F.dropout(self.scale * self.c(h), 0.0)  # one
        h = h + 0.04 * h**3  # none
        y = torch.tanh(h)
        h = h + self.d(y + self.inner(y))  # one, with another inside
        return self.head(h)


def test_branches_are_found_and_their_parameters_with_them() -> None:
    x = torch.randn(4, 6)
    found = find_branches(capture(Odd(), (x,), {}))
    assert [b.modules for b in found] == [("a",), ("b",), ("c",), ("d",)]
    assert [set(b.parameters) for b in found] == [
        {"a.weight", "a.bias"},
        {"b.weight", "b.bias"},
        {"c.weight", "c.bias", "scale"},
        {"d.weight", "d.bias", "inner.weight", "inner.bias"},
    ]
    net = mupass.transform(Odd(), x, base=8, depth=1, optimizer="sgd")
    assert net.mupass_plan.depth == 4
    assert {n for n in net.mupass_plan if net.mupass_plan[n].scales.lr == 4} == {
        n for b in found for n in b.parameters
    }


class Ended(nn.Module):
    """A branch whose module is not its last operator."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inp, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.end = end

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        h = self.inp(x)
        return self.head(h + factor * self.end(self.branch(h)))


@pytest.mark.parametrize("end", [F.relu, lambda y: y.abs().roll(1, -1), lambda y: y.flip(-1) / 3])
def test_operators_that_pass_a_factor_may_end_a_branch(end: Callable[[Tensor], Tensor]) -> None:
    net, x = Ended(end).double(), torch.randn(4, 6, dtype=torch.float64)
    (found,) = find_branches(capture(net, (x,), {}))
    assert (found.modules, found.reason) == (("branch",), "")
    want = net(x, 0.25)
    net.branch.register_forward_hook(lambda module, args, output: output / 4)
    torch.testing.assert_close(net(x), want)


def test_other_operators_may_not_end_a_branch() -> None:
    (found,) = find_branches(capture(Ended(torch.tanh), (torch.randn(4, 6),), {}))
    assert not found.modules and "it ends with aten.tanh in the root module" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_has_two_branches_a_layer(train: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(6, 16), encoder, nn.Linear(16, 3)).train(train)
    x = torch.randn(2, 5, 6)
    assert len(mupass.analyze(net, x, base=16).branches) == 6

    def by_hand(x: Tensor) -> Tensor:
        h = net[0](x)
        for one in encoder.layers:
            h = h + one._sa_block(one.norm1(h), None, None) / 3
            h = h + one._ff_block(one.norm2(h)) / 3
        return net[2](h)

    want = by_hand(x).detach()
    new = mupass.transform(net, x, base=16, depth=2, inplace=False)
    with torch.no_grad():  # where torch would take a fast path around the modules
        torch.testing.assert_close(new(x), want)


def test_at_the_base_depth_nothing_changes() -> None:
    x = torch.randn(4, 6)
    net = Residual(3)
    want = net(x)
    plan = mupass.transform(net, x, base=WIDTH, depth=3).mupass_plan
    assert (net(x) == want).all() and plan.depth == 1
    plain = mupass.transform(Residual(3), x, base=WIDTH).mupass_plan
    assert [e.scales for e in plan.entries] == [e.scales for e in plain.entries]
    deep = Residual(6)
    want = deep(x)
    mupass.transform(deep, x, base=WIDTH, depth=3, parameterization="standard")
    assert (deep(x) == want).all() and deep.mupass_plan.depth == 1


@pytest.mark.parametrize(
    ("spec", "lr", "damping_out"),
    [
        ("sgd", 4.0, 1.0),
        ("adam", 1.0, 1.0),
        ("muon", 1.0, 1.0),
        ("kfac", 1 / 4, 1 / 16),
        (OptimizerSpec("kfac", e_a=0.5, e_b=0.5), 1.0, 1 / 16),
        ("foof", 4.0, 1 / 16),
        ("shampoo", 1.0, 1 / 16),
        (OptimizerSpec("shampoo", e=1.0), 1 / 4, 1 / 16),
        (OptimizerSpec("shampoo", graft="sgd"), 4.0, 1 / 16),
    ],
)
def test_the_rows_of_depth(spec: str | OptimizerSpec, lr: float, damping_out: float) -> None:
    net = transformed(Residual, 8, inputs=torch.randn(4, 6), base=WIDTH, depth=2)
    plan = net.mupass_plan.for_optimizer(spec)
    inside, outside = plan["up.3.weight"].scales, plan["head.weight"].scales
    assert (inside.lr, inside.damping_out) == pytest.approx((lr, damping_out))
    assert (outside.lr, outside.damping_out) == (1.0, 1.0)


def test_plan_keeps_depth() -> None:
    x = torch.randn(4, 6)
    net = mupass.transform(Residual(4), x, base=WIDTH, depth=2, optimizer="sgd")
    text = str(net.mupass_plan)
    assert "each is multiplied by 1/L" in text and "L = 2" in text
    assert "m_out L/m_in = 2" in net.mupass_plan.explain("up.0.weight")
    plan = Plan.from_json(net.mupass_plan.to_json())
    assert plan == net.mupass_plan
    again = Residual(4)
    with pytest.warns(mupass.MupassWarning, match=r"mupass\.fold"):
        again.load_state_dict(net.state_dict())
    again = mupass.transform(again, plan=plan)
    torch.testing.assert_close(again(x), net(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), net(x))
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x))


class Bare(nn.Module):
    """A branch that ends with a function; or with a module behind it, as the refusal advises."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.inp, self.mid, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        added = torch.tanh(self.mid(h))
        return self.head(h + (self.end(added) if self.end else added))


def test_refusals_leave_the_model_alone() -> None:
    x, net = torch.randn(4, 6), Bare()
    want = net(x)
    with pytest.raises(TransformError, match=r"mid\.weight.*aten\.tanh in the root module.*nn\.Dropout\(0"):
        mupass.transform(net, x, base=8, depth=4)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(TransformError, match="no sum"):
        mupass.transform(plain, x, base=8, depth=4)
    with pytest.raises(mupass.PlanError, match="depth must be a positive number"):
        mupass.transform(net, x, base=8, depth=0)
    assert (net(x) == want).all() and not hasattr(net, "mupass_plan")


@pytest.mark.parametrize("train", [True, False])
def test_the_advice_of_the_refusal_works(train: bool) -> None:
    x, net = torch.randn(4, 6), Bare(nn.Dropout(0.0)).train(train)
    added = torch.tanh(net.mid(net.inp(x)))
    want = net.head(net.inp(x) + added / 0.25)  # one branch at base depth 4
    net = mupass.transform(net, x, base=8, depth=4)
    assert net.mupass_plan.branches == ("end",)
    torch.testing.assert_close(net(x), want)


MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(mupass.param_groups(m, 1e-4, optimizer="sgd")),
    "adam": lambda m: torch.optim.Adam(mupass.param_groups(m, 1e-5, optimizer="adam")),
    "kfac": lambda m: mupass.KFAC(m, 1e-4, 1e-2, momentum=0),
    "shampoo": lambda m: mupass.Shampoo(m, 1e-4, 1e-4, momentum=0, fallback="sgd", fallback_lr=1e-4),
    "muon": lambda m: mupass.Muon(m, 1e-4, fallback="sgd", fallback_lr=1e-4),
}


def moved(layers: int, optimizer: str, parameterization: str) -> float:
    """Return how far the stream moves by one step of the branches alone, over three seeds."""
    total = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
        net = Residual(layers).double()
        mupass.transform(net, x, base=WIDTH, depth=BASE, parameterization=parameterization)
        seen: list[Tensor] = []
        net.head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        made = MAKE[optimizer](net)
        F.mse_loss(net(x), y).backward()
        kept = {n: p.detach().clone() for n, p in net.named_parameters() if n[:3] in {"inp", "hea"}}
        made.step()
        with torch.no_grad():
            for name, value in kept.items():
                net.get_parameter(name).copy_(value)
            net(x)
        total += (seen[1] - seen[0]).square().mean().sqrt().log2().item()
    return total / 3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(MAKE))
def test_the_stream_moves_alike_at_every_depth(optimizer: str) -> None:
    depths = (4, 16, 64)
    slopes = {}
    for parameterization in ("mup", "standard"):
        moves = [moved(d, optimizer, parameterization) for d in depths]
        slopes[parameterization] = (moves[-1] - moves[0]) / log2(depths[-1] / depths[0])
    assert abs(slopes["mup"]) < 0.15 < 0.3 < abs(slopes["standard"]), slopes
