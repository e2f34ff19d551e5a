"""K-FAC beyond one plain layer: ties, reduce, sampled targets, scalers, adaptive damping, faults."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, matrix_of, moved, power
from test_taps import BASE, DENSE, WIDTH, dense_factors, ids, normal, squares
from torch import Tensor, nn

import mupass
from mupass._optim.kronecker.slope import UNIT

ONE = {**PLAIN, "damping_floor": 0.0}


class Tied(nn.Module):
    """An embedding that is also the readout."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.emb, self.hid = nn.Embedding(11, w), nn.Linear(w, w)
        self.head = nn.Linear(w, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hid(self.emb(ids))))


def nearest(a1: Tensor, b1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """P (x) Q nearest to A1 (x) B1 + B2 (x) A2: the leading singular pair of the rearranged matrix."""
    rearranged = torch.outer(a1.flatten(), b1.flatten()) + torch.outer(b2.flatten(), a2.flatten())
    u, s, v = torch.linalg.svd(rearranged)
    p, q = u[:, 0].reshape(a1.shape), s[0] * v[0].reshape(b1.shape)
    scale = p.trace() / a1.trace()
    return p / scale, q * scale


def test_a_tied_weight_takes_the_nearest_kronecker_product() -> None:
    x, y = ids(11, 4, 7)(), ids(11, 4, 7)()
    torch.manual_seed(0)
    net = mupass.transform(Tied().double(), x, base=BASE)
    twin = copy.deepcopy(net)
    optimizer = mupass.KFAC(net, LR, RHO, **ONE, strict=True)

    def losses(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")

    losses(net).mean().backward()
    got = moved(net, optimizer.step)["emb.weight"]
    found = dense_factors(twin, losses)
    readout = found["head"]
    multiplier = net.mupass_plan["emb.weight"].scales.multiplier
    a2 = readout.a[0] / multiplier**2  # the reference runs the head again, with its multiplier
    # The diagonal of the readout's B, which stands beside the diagonal A of the table.
    p, q = nearest(found["emb"].a[0], found["emb"].b[0], torch.diag(readout.b[0].diagonal()), a2)
    losses(twin).mean().backward()
    grad = twin.emb.weight.grad
    scale = net.mupass_plan.for_optimizer("kfac")["emb.weight"].scales.lr
    want = -LR * scale * power(p, RHO * p.trace(), 1) @ grad @ power(q, RHO * q.trace(), 1)
    assert (got - want).norm() < 1e-7 * want.norm()


@pytest.mark.parametrize("kind", ["sequence", "conv"])
def test_reduce_takes_a_sample_for_a_row(kind: str) -> None:
    torch.manual_seed(0)
    sequence = kind == "sequence"
    x = (normal(4, 7, 5) if sequence else normal(4, 2, 6))()

    def build() -> nn.Module:
        first = nn.Linear(5, 8) if sequence else nn.Conv1d(2, 8, 3)
        return nn.Sequential(first, nn.Tanh(), Mean(1 if sequence else 2), nn.Linear(8, 3))

    net = mupass.transform(build().double(), x, base=BASE)
    plain = build().double()
    plain.load_state_dict(net.state_dict())
    y = torch.randn_like(plain(x))
    optimizer = mupass.KFAC(net, LR, RHO, **ONE, sharing="reduce", strict=True)
    squares(net(x), y).mean().backward()
    got = moved(net, optimizer.step)["0.weight"]
    layer = plain[0]
    out = layer(x)
    zero = torch.zeros_like(out, requires_grad=True)
    losses = squares(plain[3](plain[2](plain[1](out.detach() + zero))), y)
    g = torch.autograd.grad(losses.sum(), zero)[0]  # samples do not mix
    if sequence:
        rows, g = x.mean(1), g.sum(1)
    else:
        rows, g = F.unfold(x[:, :, None], (1, 3)).mean(2), g.sum(2)
    a, b = rows.T @ rows / 4, g.T @ g / 4
    losses_ = squares(plain(x), y).mean()
    losses_.backward()
    grad = layer.weight.grad.flatten(1)
    want = -LR * power(b, RHO * b.trace(), 1) @ grad @ power(a, RHO * a.trace(), 1)
    assert (got.flatten(1) - want).norm() < 1e-8 * want.norm()


class Mean(nn.Module):
    """Average over an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axis)


# The Fisher ------------------------------------------------------------------------------------------------


def test_sampled_targets_follow_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3)
    drawn = mupass.sample_targets(logits, generator=generator)
    torch.testing.assert_close(
        drawn.bincount(minlength=3) / len(drawn), logits[0].softmax(0), atol=0.02, rtol=0
    )
    image = mupass.sample_targets(torch.randn(2, 5, 3, 4))
    assert image.shape == (2, 3, 4) and image.max() < 5
    coins = mupass.sample_targets(torch.full((20000,), 1.0), "bce", generator)
    assert abs(float(coins.mean()) - 1 / (1 + math.exp(-1))) < 0.02
    noise = mupass.sample_targets(torch.zeros(20000), "mse", generator)
    assert abs(float(noise.var()) - 0.5) < 0.02
    with pytest.raises(mupass.OptimizerError, match="unknown loss 'hinge'"):
        mupass.sample_targets(logits, "hinge")


def test_observed_factors_are_those_of_the_sampled_loss() -> None:
    case = DENSE["linear"]
    (x, y), net = case.batch(), case.net()
    plain = case.plain()
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(net, LR, RHO, **ONE, fisher="sampled", factor_every=2)
    torch.manual_seed(3)
    targets = mupass.sample_targets(net(x), "mse")
    assert optimizer.factors_due
    optimizer.observe(lambda: case.terms(net(x), targets).mean())
    assert all(p.grad is None for p in net.parameters())
    optimizer.zero_grad()
    case.terms(net(x), y).mean().backward()
    got = moved(net, optimizer.step)
    assert not optimizer.factors_due
    found = dense_factors(plain, lambda m: case.terms(m(x), targets))["2"]
    case.terms(plain(x), y).mean().backward()
    a, b = found.a[0], found.b[0]
    want = -LR * power(b, RHO * b.trace(), 1) @ plain[2].weight.grad @ power(a, RHO * a.trace(), 1)
    assert (got["2.weight"] - want).norm() < 1e-8 * want.norm()
    with pytest.raises(mupass.OptimizerError, match="observe"):
        mupass.KFAC(case.net(), LR).observe(lambda: torch.zeros(()))


@pytest.mark.slow
def test_the_sampled_fisher_is_the_fisher_on_average() -> None:
    """Of a softmax readout: B = diag(p) - p p^T, averaged over the batch."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    net = mupass.transform(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), x, base=BASE)
    optimizer = mupass.KFAC(net, 1e-300, RHO, fisher="sampled", factor_decay=0.999)
    F.cross_entropy(net(x), torch.zeros(4, dtype=torch.long)).backward()
    for _ in range(800):
        optimizer.observe(lambda: F.cross_entropy(out := net(x), mupass.sample_targets(out)))
        optimizer.step()
    p = net(x).softmax(-1)
    want = torch.diag(p.mean(0)) - p.T @ p / 4
    assert (matrix_of(optimizer, "2.weight", "b")[0] - want).norm() < 0.1 * want.norm()


# Gradient scalers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_changes_nothing(unscaled: bool) -> None:
    case = DENSE["linear"]
    results = []
    for scaled in (False, True):
        net = case.net()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        options = {"loss_scale": scaler.get_scale} if unscaled and scaled else {}
        optimizer = mupass.KFAC(net, LR, RHO, **options)
        for seed in range(1, 4):
            x, y = case.batch(seed)
            optimizer.zero_grad()
            scaler.scale(case.terms(net(x), y).mean()).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_scale_that_cannot_be_told_is_refused() -> None:
    case = DENSE["linear"]
    (x, y), net = case.batch(), case.net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = mupass.KFAC(net, LR, RHO)
    scaler.scale(case.terms(net(x), y).mean()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(mupass.OptimizerError, match="loss_scale=scaler.get_scale"):
        scaler.step(optimizer)


# Adaptive damping and clipping -----------------------------------------------------------------------------


def test_the_quadratic_model_is_the_dense_one() -> None:
    case = DENSE["linear"]
    (x, y), net = case.batch(), case.net()
    optimizer = mupass.KFAC(net, LR, RHO, **ONE)
    case.terms(net(x), y).mean().backward()
    plain = case.plain()
    plain.load_state_dict(net.state_dict())
    optimizer.step()
    found = dense_factors(plain, lambda m: case.terms(m(x), y))
    moves = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    want = 0.0
    for name, d in moves.items():
        layer, _, kind = name.partition(".")
        a, b = found[layer].a[0], found[layer].b[0]
        f = b @ d @ a if kind == "weight" else b @ d
        want += float((d * f).sum())
    assert optimizer.curvature_along(moves) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("lr, falls", [(1e-4, True), (30.0, False)])
def test_damping_follows_the_quality_of_the_model(lr: float, falls: bool) -> None:
    case = DENSE["linear"]
    (x, y), net = case.batch(), case.net()
    optimizer = mupass.KFAC(net, lr, RHO, target_scale=1.0, **ONE)  # a rate of 30 throws the outputs far off
    adaptive = mupass.LevenbergMarquardt(optimizer, every=2, omega=0.9, largest=0.05)

    def loss() -> Tensor:
        return case.terms(net(x), y).mean()

    dampings = []
    for _ in range(4):
        optimizer.zero_grad()
        loss().backward()
        adaptive.step(loss)
        dampings.append(optimizer.param_groups[0]["damping"])
    assert dampings[0] == RHO
    if falls:
        assert adaptive.ratio == pytest.approx(1, abs=0.05)
        assert dampings[1:] == pytest.approx([RHO * 0.81, RHO * 0.81, RHO * 0.81**2])
    else:
        assert adaptive.ratio < 0.25 or math.isnan(adaptive.ratio)
        assert dampings[-1] >= RHO and dampings[-1] <= 0.05
    with pytest.raises(mupass.OptimizerError, match="both factors"):
        mupass.LevenbergMarquardt(mupass.KFAC(case.net(), LR, e_b=0.0))


def test_clipping_bounds_the_move_of_the_predictions() -> None:
    """The bound is told for a squared gradient of UNIT by the outputs, and goes with it."""
    case = DENSE["linear"]
    steps, slopes = [], []
    for bound in (None, 1e-3, 1e9):
        (x, y), net = case.batch(), case.net()
        optimizer = mupass.KFAC(net, LR, RHO, **{**ONE, "kl_clip": bound})
        outputs = net(x)
        outputs.retain_grad()
        case.terms(outputs, y).mean().backward()
        # The mean over samples of the squared gradient of each sample's loss.
        slopes.append(float((len(x) * outputs.grad).square().sum(1).mean()))
        grads = {n: p.grad.clone() for n, p in net.named_parameters()}  # type: ignore[union-attr]
        steps.append((moved(net, optimizer.step), grads))
    free, grads = steps[0]
    move = -LR * sum(float((free[n] * grads[n]).sum()) for n in free)
    assert move > 1e-3  # the scales of K-FAC are all 1
    for n, d in free.items():
        torch.testing.assert_close(steps[1][0][n], d * math.sqrt(1e-3 * slopes[1] / UNIT / move))
        torch.testing.assert_close(steps[2][0][n], d)


def test_a_branch_behind_a_closed_gate_takes_bounded_steps() -> None:
    class Gated(nn.Module):
        def __init__(self, w: int = WIDTH) -> None:
            super().__init__()
            self.inp, self.fc, self.out = nn.Linear(5, w), nn.Linear(w, w), nn.Linear(w, 3)
            self.gate = nn.Parameter(torch.full((w,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inp(x))
            return self.out(h + torch.tanh(self.fc(h)) * self.gate)

    sizes = {}
    for floor in (0.0, 1e-4, 0.1):
        torch.manual_seed(0)
        x, y = normal(6, 5)(), normal(6, 3)()
        net = mupass.transform(Gated().double(), x, base=BASE)
        how = {**ONE, "damping_floor": floor, "strict": True}
        optimizer = mupass.KFAC(net, LR, RHO, **how)
        squares(net(x), y).mean().backward()
        sizes[floor] = float(moved(net, optimizer.step)["fc.weight"].norm())
    assert sizes[0.0] > 1e4 and sizes[0.1] < sizes[1e-4] < 1


# Faults ----------------------------------------------------------------------------------------------------


def failing(matrices: Tensor, *args: Any, solve: Any = torch.linalg.cholesky_ex) -> Any:
    """A factorization that gives up on every matrix."""
    factor, info = solve(matrices, *args)
    return factor * math.nan, torch.ones_like(info)


def run(faults: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, int]]:
    """200 steps of a small classifier, with or without bad gradients, failing roots and a restart.

    A fifth of the labels is random: where the loss comes near zero, K-FAC's factors vanish, and two runs are
    far from each other with or without faults. Returned is the mean loss after the last 50 steps, above that
    of who knows the rule of the labels.
    """
    torch.manual_seed(0)
    x, tail = torch.randn(2048, 10), []
    counts: Counter[str] = Counter()  # of incidents, which a resumed run counts anew
    y = (x @ torch.randn(10, 4)).argmax(1)
    y = torch.where(torch.rand(2048) < 0.2, torch.randint(4, (2048,)), y)
    net = mupass.transform(
        nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)),
        x,
        base=32,
    )
    optimizer = mupass.KFAC(net, 0.02, 1e-2, root_every=5, kl_clip=1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        rows = torch.randint(2048, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        if faults and step % 20 == 7:
            net[2].weight.grad[0, 0] = math.nan if step % 40 == 7 else math.inf  # type: ignore[index,union-attr]
        with monkeypatch.context() as patch:
            if faults and 50 <= step < 60:
                patch.setattr(torch.linalg, "cholesky_ex", failing)
            optimizer.step()
        if faults and step == 100:  # the process dies and starts again
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            counts.update(optimizer.stats())
            net = copy.deepcopy(net)
            optimizer = mupass.KFAC(net, 0.02, 1e-2, root_every=5, kl_clip=1e-3)
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        if step >= 150:
            with torch.no_grad():
                tail.append(F.cross_entropy(net(x), y).item())
    least = -(0.85 * math.log(0.85) + 3 * 0.05 * math.log(0.05))  # the entropy of such labels
    last = optimizer.stats()
    counts.update(last)
    return sum(tail) / len(tail) - least, {**counts, "steps": last["steps"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mupass.KFAC. (skipped steps|failed roots|overflowed factors)")
def test_two_hundred_steps_with_faults_end_where_clean_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, healthy = run(False, monkeypatch)
    faulty, stats = run(True, monkeypatch)
    assert healthy == {"steps": 200}
    # The resumed run counts the five before it as steps.
    assert stats["skipped_steps"] == 10 and stats["steps"] == 195 and stats["failed_roots"] > 0
    assert clean < 0.2 and abs(faulty - clean) < 0.05


def gates(**options: Any) -> None:
    """Arguments that are out of range."""
    mupass.KFAC(DENSE["linear"].net(), LR, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_clip": -1.0}, "kl_clip"),
        ({"damping_floor": math.nan}, "damping_floor"),
        ({"damping_memory": 1.0}, "damping_memory"),
        ({"step_bound": -1.0}, "step_bound"),
        ({"sharing": "both"}, "unknown sharing 'both'"),
        ({"fisher": "true"}, "unknown fisher 'true'"),
        ({"diagonal_above": 0}, "diagonal_above"),
        ({"exclude": ["nothing"]}, "fits no parameter"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mupass.OptimizerError, match=message):
        gates(**options)
