"""EKFAC: whole steps against per-term gradients from autograd, in float64, and what a K-FAC user expects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_compile import MODELS, assert_same, fresh, make, train  # noqa: F401
from test_curvature import Mean
from test_kfac import LR, ONE_STEP, RHO, dense_update, moved, one_step
from test_taps import BASE, CASES, DENSE, Case, normal, squares
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import mupass
from mupass._optim.kronecker import ekfac
from mupass._optim.kronecker.factor_pairs import Pair

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
# Bases of the first step stay, moments are those of the last one.
SMALL = 1e-6  # no step leads out of where gradients are of their usual size
FIXED = {
    "factor_decay": 0.0,
    "damping_memory": 0.0,
    "step_bound": None,
    "kl_clip": None,
    "root_every": 1000,
    "stagger": False,
}


@pytest.mark.sample(every=6)
@pytest.mark.parametrize("mode", ["trace", "absolute"])
@pytest.mark.parametrize("name", CASES)
def test_with_the_eigenvalues_products_for_moments_it_is_kfac(name: str, mode: str) -> None:
    """The first step has no basis yet to measure moments in, and starts from these products."""
    case = CASES[name]
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    want = dense_update(case, plain, mode, 1, 1)
    got = one_step(case, net, damping_mode=mode, ekfac=True)
    for n, step in want.items():
        assert (got[n] - step).abs().max() < 1e-8 * step.abs().max(), n


def test_with_damping_by_the_largest_eigenvalue_it_is_kfac_too() -> None:
    case = DENSE["linear"]
    want, got = (one_step(case, case.net(), damping_mode="eigen", ekfac=e) for e in (False, True))
    for n, step in want.items():
        torch.testing.assert_close(got[n], step, rtol=1e-7, atol=1e-12)


# The definition --------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A fused weight of two matrices, and three experts, on the way to one output a sample."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp, self.both, self.out = nn.Linear(5, w), nn.Linear(w, 2 * w), nn.Linear(w, 3)
        self.experts = nn.Parameter(torch.randn(3, w, w) / w**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(torch.tanh(self.inp(x))).chunk(2, -1)
        h = torch.tanh(gate) * up
        taken = torch.stack([h, h.sin(), h.cos()])
        return self.out(torch.einsum("entd,edh->enth", taken, self.experts).tanh().sum(0).mean(1))


def pooled(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), Mean(1), nn.Linear(w, 3))


def deconvolved(w: int) -> nn.Module:
    up = nn.ConvTranspose2d(w, w, 3, 2, 1)
    return nn.Sequential(
        nn.Conv2d(2, w, 1), nn.Tanh(), up, nn.Tanh(), nn.Flatten(2), Mean(2), nn.Linear(w, 3)
    )


GATED = Case("gated", Gated, normal(6, 4, 5), normal(6, 3), squares)
POOLED = Case("pooled", pooled, normal(9, 4, 5), normal(9, 3), squares)
# One term a position and nothing mixes positions: a position is a sample. Else a sample's positions go
# together: there only the reduce setting has the gradients of samples.
EXACT = {
    "linear": (DENSE["linear"], "expand", "2.weight"),
    "a position a term": (DENSE["sequence"], "expand", "2.weight"),
    "positions of a sample": (POOLED, "reduce", "2.weight"),
    "convolution": (CASES["2d stride padding"], "reduce", "2.weight"),
    "grouped convolution": (CASES["2d groups stride"], "reduce", "2.weight"),
    "transposed convolution": (
        Case("deconvolved", deconvolved, normal(5, 2, 3, 3), normal(5, 3), squares),
        "reduce",
        "2.weight",
    ),
    "fused": (GATED, "reduce", "both.weight"),
    "experts": (GATED, "reduce", "experts"),
}


class Ran:
    """Two steps on two batches, with all that is known before the second one."""

    def __init__(self, case: Case, sharing: str, parameter: str, second: int = 2, **options: Any) -> None:
        self.net = case.net()
        how = {"momentum": 0.0, "damping_floor": 0.0, "sharing": sharing, "ekfac": True}
        self.optimizer = mupass.KFAC(self.net, SMALL, RHO, **how | FIXED | options)
        blocks = self.optimizer._kronecker.blocks
        self.block, self.pairs = next((b, p) for b, p in blocks if b.parameter == parameter)
        self.weight = self.net.get_parameter(parameter)
        for _ in range(3):  # in the first period bases are computed anew at steps 0, 1, 2, 4, ...
            self._pass(case, 1)
            self.optimizer.step()
        self.before = {k: v.clone() for k, v in self.optimizer._kronecker.moments.state[parameter, 0].items()}
        self.bases = [[m.clone() for m in self.basis(pair)] for pair in self.pairs]
        losses = self._pass(case, second)
        twin = case.plain()
        twin.load_state_dict(self.net.state_dict())
        terms = case.terms(twin(self.x), self.y)
        assert torch.allclose(terms, losses)
        of = twin.get_parameter(parameter)
        gradients = [torch.autograd.grad(term, of, retain_graph=True)[0] for term in terms]
        self.gradients = [
            torch.stack(s) for s in zip(*map(self.block.matrices.split, gradients), strict=True)
        ]
        self.step = moved(self.net, self.optimizer.step)[parameter]

    def _pass(self, case: Case, seed: int) -> Tensor:
        self.x, self.y = case.batch(seed)
        self.optimizer.zero_grad()
        losses = case.terms(self.net(self.x), self.y)
        losses.mean().backward()
        return losses

    def slots(self, pair: Pair) -> Iterator[tuple[Any, slice]]:
        for slot in (pair.b, pair.a):
            bank, first, count = self.optimizer._kronecker.at[slot]  # type: ignore[index]
            yield bank, slice(first, first + count)

    def basis(self, pair: Pair) -> list[Tensor]:
        return [bank.state["vectors"][at] for bank, at in self.slots(pair)]

    def moments(self, piece: int) -> Tensor:
        """Mean over terms of the squared entries of their gradients, in the bases that were there."""
        u_b, u_a = self.bases[piece]
        return (u_b.mT @ self.gradients[piece] @ u_a).square().mean(0)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", EXACT)
def test_a_step_divides_by_the_mean_squares_of_the_terms_gradients(name: str) -> None:
    case, sharing, parameter = EXACT[name]
    ran = Ran(case, sharing, parameter)
    counts = {"fused": (2, 1), "experts": (1, 3), "grouped convolution": (1, 2)}
    assert (len(ran.pairs), ran.pairs[0].groups) == counts.get(name, (1, 1))
    steps = []
    for i, pair in enumerate(ran.pairs):
        (b, at_b), (a, at_a) = ran.slots(pair)
        u_b, u_a = ran.bases[i]
        for u, values in (
            (u_b, b.state["values"][at_b]),
            (u_a, a.state["values"][at_a]),
        ):  # orthogonal, in either case
            torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[-1]).double().expand_as(u))
            assert values.amin() >= 0
        # Damping as K-FAC's, by the traces of the first step.
        values_b, values_a = b.state["values"][at_b][:, :, None], a.state["values"][at_a][:, None]
        rho_b, rho_a = RHO * values_b.sum(1, keepdim=True), RHO * values_a.sum(2, keepdim=True)
        damping = rho_a * values_b + rho_b * values_a + rho_a * rho_b
        grad = ran.gradients[i].mean(0)
        steps.append(u_b @ ((u_b.mT @ grad @ u_a) / (ran.moments(i) + damping)) @ u_a.mT)
    want = -SMALL * ran.block.matrices.join(steps, ran.weight)
    assert (ran.step - want).norm() < 1e-9 * want.norm()


@pytest.mark.parametrize("name", ["positions of a sample", "convolution"])
def test_the_expand_setting_leaves_out_what_positions_have_in_common(name: str) -> None:
    case, _, parameter = EXACT[name]
    ran = Ran(case, "expand", parameter)
    found, want = ran.optimizer._kronecker.moments.value(ran.pairs[0]), ran.moments(0)
    assert (found - want).norm() > 0.1 * want.norm()


def test_samples_are_taken_a_few_at_a_time_where_their_gradients_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Ran(*(EXACT["convolution"][i] for i in (0, 1, 2)))
    monkeypatch.setattr("mupass._taps.factors.BUFFER", 2 * whole.weight.numel())
    torch.testing.assert_close(Ran(*(EXACT["convolution"][i] for i in (0, 1, 2))).step, whole.step)


def test_of_all_scales_in_the_eigenbases_the_moments_come_nearest_to_the_fisher() -> None:
    """In the Frobenius norm, with K-FAC's products of eigenvalues among them (George et al., theorem 2)."""
    ran = Ran(POOLED, "reduce", "2.weight", second=1)
    rows = ran.gradients[0].flatten(1)
    fisher = rows.T @ rows / len(rows)
    (b, at_b), (a, at_a) = ran.slots(ran.pairs[0])
    turn = torch.kron(*(u[0] for u in ran.bases[0]))
    kfac = torch.kron(b.state["values"][at_b][0], a.state["values"][at_a][0])
    moments = ran.optimizer._kronecker.moments.value(ran.pairs[0]).flatten()

    def distance(scales: Tensor) -> Tensor:
        return (fisher - turn @ torch.diag(scales) @ turn.T).norm()

    assert distance(moments) < distance(kfac)
    for factor in (0.9, 1.1):
        assert distance(moments) < distance(factor * moments)


def test_moments_follow_a_turn_of_the_basis() -> None:
    """As the diagonal, in the new basis, of the matrix that they are the diagonal of in the old one."""
    ran = Ran(POOLED, "reduce", "2.weight", root_every=1)
    (old_b, old_a), (new_b, new_a) = ran.bases[0], ran.basis(ran.pairs[0])
    old, new = (torch.kron(b[0], a[0]) for b, a in ((old_b, old_a), (new_b, new_a)))
    dense = old @ torch.diag(ran.moments(0).flatten()) @ old.T
    want = (new.T @ dense @ new).diagonal().reshape(ran.weight.shape)
    assert not torch.allclose(old, new, atol=0.1)
    torch.testing.assert_close(ran.optimizer._kronecker.moments.value(ran.pairs[0])[0], want)


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_moments_are_averaged_as_the_factors_are(decay: float) -> None:
    ran = Ran(POOLED, "reduce", "2.weight", factor_decay=decay)
    total, weight = ran.before["sum"], float(ran.before["weight"])
    assert weight == pytest.approx(1 - decay**3)
    want = (decay * total + (1 - decay) * ran.moments(0)) / (decay * weight + 1 - decay)
    torch.testing.assert_close(ran.optimizer._kronecker.moments.value(ran.pairs[0]), want)


def test_the_quadratic_model_is_that_of_the_moments() -> None:
    ran = Ran(POOLED, "reduce", "2.weight")
    move = torch.randn_like(ran.weight)
    (u_b, u_a), moments = ran.bases[0], ran.moments(0)
    want = ((u_b.mT @ move @ u_a).square() * moments).sum()
    assert ran.optimizer.curvature_along({"2.weight": move}) == pytest.approx(float(want), rel=1e-9)


def test_gradient_scalers_and_micro_batches_change_nothing() -> None:
    steps = []
    for scale, parts in ((1.0, 1), (1024.0, 1), (1.0, 3)):
        net = POOLED.net()
        optimizer = mupass.KFAC(net, LR, RHO, ekfac=True, sharing="reduce", loss_scale=scale, momentum=0.0)
        for seed in (1, 2):
            x, y = POOLED.batch(seed)
            optimizer.zero_grad()
            for part in torch.arange(len(x)).chunk(parts):
                (POOLED.terms(net(x[part]), y[part]).sum() / len(x) * scale).backward()
            for p in net.parameters():
                p.grad /= scale
            step = moved(net, optimizer.step)
        steps.append(step)
    for n, want in steps[0].items():
        for other in steps[1:]:
            torch.testing.assert_close(other[n], want, rtol=1e-8, atol=1e-12)


# What it owes its user -------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Something that it rescales, and everything that it does not."""

    def __init__(self, w: int, tied: bool = False) -> None:
        super().__init__()
        self.emb, self.norm, self.fc = nn.Embedding(11, w), nn.LayerNorm(w), nn.Linear(w, w)
        self.raw, self.head = nn.Parameter(torch.randn(w, w) / w**0.5), nn.Linear(w, 11, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.fc(self.norm(self.emb(ids))))
        return self.head(torch.tanh(h @ self.raw))


def test_coverage_says_what_is_not_rescaled_and_why() -> None:
    x = torch.randint(11, (4, 7))
    net = mupass.transform(Mixed(8), x, base=BASE)
    found = {c.parameter: c for c in mupass.KFAC(net, LR, ekfac=True, strict=True).coverage()}
    rescaled = {n for n, c in found.items() if c.treatment.startswith("ekfac")}
    assert rescaled == {"fc.weight", "raw", "head.weight"}
    for name, reason in (("emb.weight", "a diagonal"), ("fc.bias", "number 1"), ("norm.weight", "number 1")):
        assert found[name].treatment.startswith("kfac") and reason in found[name].reason
    large = mupass.KFAC(net, LR, ekfac=True, diagonal_above=10).coverage()
    assert "a diagonal" in next(c.reason for c in large if c.parameter == "head.weight")
    tied = mupass.transform(Mixed(8, True), x, base=BASE)
    reasons = {c.parameter: c.reason for c in mupass.KFAC(tied, LR, ekfac=True).coverage()}
    assert "two transposed uses" in reasons["emb.weight"]
    assert not any(c.reason for c in mupass.KFAC(net, LR).coverage())


@pytest.mark.parametrize("options", [{"e_a": 0.5}, {"e_b": 0.0}, {"damping_mode": "pi"}], ids=str)
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(mupass.OptimizerError, match="ekfac=True"):
        mupass.KFAC(DENSE["linear"].net(), LR, ekfac=True, **options)


def test_the_state_of_plain_kfac_is_refused() -> None:
    net = DENSE["linear"].net()
    with pytest.raises(mupass.OptimizerError, match="the state of 0.weight lacks .*another optimizer"):
        mupass.KFAC(net, LR, ekfac=True).load_state_dict(mupass.KFAC(net, LR).state_dict())


def steps(case: Case, net: nn.Module, optimizer: mupass.KFAC, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        x, y = case.batch(seed)
        optimizer.zero_grad()
        loss = case.terms(net(x), y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_under_a_zero_readout_nothing_moves_and_then_all_does() -> None:
    case, net = DENSE["linear"], DENSE["linear"].net()
    nn.init.zeros_(net.get_parameter("4.weight"))
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP, ekfac=True)
    with pytest.warns(UserWarning, match="receives no gradient"):
        first = moved(net, lambda: steps(case, net, optimizer, range(1)))
    assert all(torch.count_nonzero(first[f"{i}.weight"]) == 0 for i in (0, 2))
    assert torch.count_nonzero(first["4.weight"])
    for seed in range(1, 4):
        later = moved(net, lambda s=seed: steps(case, net, optimizer, range(s, s + 1)))
        assert all(d.isfinite().all() and torch.count_nonzero(d) for d in later.values())


def test_a_failed_decomposition_keeps_the_old_one_with_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    case, net = DENSE["linear"], DENSE["linear"].net()
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP, ekfac=True, factor_decay=0.9)
    steps(case, net, optimizer, range(1))
    states = {n: optimizer.state[p] for n, p in net.named_parameters()}
    kept = {
        (n, k): t.clone()
        for n, s in states.items()
        for k, t in s.items()
        if k.endswith(("vectors", "values"))
    }

    def failing(bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return bank[..., 0], bank * torch.nan, torch.zeros(len(bank)) > 0

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="failed roots"):
        patch.setattr(ekfac, "eigenbases", failing)
        steps(case, net, optimizer, range(1, 2))
        assert optimizer.stats()["failed_roots"] == 6
    assert len(kept) == 12 and all(torch.equal(states[n][k], t) for (n, k), t in kept.items())
    steps(case, net, optimizer, range(2, 4))
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:mupass.KFAC. overflowed factors")
def test_moments_that_overflow_are_left_out_and_counted() -> None:
    net = DENSE["linear"].net()
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP, ekfac=True)
    steps(DENSE["linear"], net, optimizer, range(1))
    optimizer.zero_grad()
    x, y = DENSE["linear"].batch(1)
    with pytest.warns(UserWarning, match="the second moments"):
        (DENSE["linear"].terms(net(x), y).mean() * 1e200).backward()
        optimizer.step()
        optimizer.stats()
    moments = optimizer._kronecker.moments.state.values()
    assert len(moments) == 3 and all(own["sum"].isfinite().all() for own in moments)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_graphs_no_break_and_eager_parameters(name: str) -> None:
    options = {"lr": 0.01, "damping": 0.1, "factor_every": 5, "ekfac": True, "sharing": "reduce"}
    eager = make(name)
    twin = copy.deepcopy(eager)
    want = train(eager, mupass.KFAC(eager, **options), name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    got = train(compiled, mupass.KFAC(compiled, **options), name)
    assert counter.frame_count == 2
    assert not counters["graph_break"]
    assert got == pytest.approx(want, rel=1e-7)
    assert_same(eager, twin, rtol=1e-6, atol=1e-9)
