"""K-FAC: whole updates against a dense float64 reference, schedules of the factors, and bad batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plans import transformed
from test_taps import BASE, CASES, DENSE, Case, dense_factors, normal, squares, terms_of
from torch import Tensor, nn

import mupass
from mupass._optim.kronecker import factor_stack, preconditioner
from mupass._optim.linalg.packed import packed_size, unpack
from mupass._optim.linalg.roots import diagonal_roots, inverse_roots
from mupass._taps.taps import tap_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

LR, RHO = 0.1, 0.03
PLAIN = {"momentum": 0.0, "step_bound": None, "kl_clip": None, "root_every": 1, "damping_memory": 0.0}
ONE_STEP = {**PLAIN, "strict": True, "damping_floor": 0.0}
Deltas = dict[str, Tensor]


def power(m: Tensor, rho: Tensor | float, exponent: float) -> Tensor:
    """(m + rho I)^-exponent by eigenvalues."""
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag((values + rho).pow(-exponent)) @ vectors.T


def damping(
    mode: str, a: Tensor, b: Tensor, m_in: float, m_out: float, rho: float = RHO
) -> tuple[Tensor | float, Tensor | float]:
    """rho_A and rho_B by their formulas."""
    if mode == "trace":
        return rho * a.trace(), rho * b.trace()
    if mode == "absolute":
        return rho * m_in, rho / m_out
    pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt()
    return pi * rho**0.5, rho**0.5 / pi


def growth(case: Case, name: str) -> tuple[float, float]:
    """(m_in, m_out) of a parameter: shapes here over shapes of the model built at the base width."""
    shape = dict(case.plain().named_parameters())[name].shape
    base = dict(case.plain(BASE).named_parameters())[name].shape
    if len(shape) == 1:
        return 1.0, shape[0] / base[0]
    m_in, m_out = shape[1:].numel() / base[1:].numel(), shape[0] / base[0]
    return (m_out, m_in) if name == "0.weight" and case.name == "embedding" else (m_in, m_out)


def dense_update(
    case: Case, plain: nn.Module, mode: str, e_a: float, e_b: float, reduction: str = "mean"
) -> Deltas:
    """One K-FAC step from its formula, layer by layer and group by group."""
    factors = dense_factors(plain, terms_of(case))
    plain.zero_grad()
    losses = terms_of(case)(plain)
    (losses.sum() if reduction == "sum" else losses.mean()).backward()
    found = {}
    for module, f in factors.items():
        for kind in ("weight", "bias"):
            p = getattr(plain.get_submodule(module), kind, None)
            if p is None:
                continue
            name, grad = f"{module}.{kind}", p.grad
            transposed = grad.dim() == 2 and isinstance(plain.get_submodule(module), nn.Embedding)
            grad = grad.T if transposed else grad
            m_in, m_out = growth(case, name)
            parts = []
            for g, b, a in zip(grad.chunk(len(f.b)), f.b, f.a, strict=True):
                a = torch.ones(1, 1, dtype=b.dtype) if kind == "bias" else a
                rho_a, rho_b = damping(mode, a, b, m_in, m_out)
                step = power(b, rho_b, e_b) @ g.reshape(len(b), len(a)) @ power(a, rho_a, e_a)
                parts.append(step.reshape(g.shape))
            scale = m_out ** (1 - e_b) * m_in ** (e_a - 1)
            step = -LR * scale * torch.cat(parts)
            found[name] = step.T if transposed else step
    return found


def moved(net: nn.Module, step: Callable[[], None]) -> Deltas:
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    step()
    return {n: p.detach() - before[n] for n, p in net.named_parameters()}


def one_step(case: Case, net: nn.Module, reduction: str = "mean", **options: Any) -> Deltas:
    optimizer = mupass.KFAC(net, LR, RHO, loss_reduction=reduction, **ONE_STEP | options)
    losses = terms_of(case)(net)
    (losses.sum() if reduction == "sum" else losses.mean()).backward()
    return moved(net, optimizer.step)


def check_update(case: Case, mode: str, e_a: float, e_b: float, reduction: str = "mean") -> None:
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    want = dense_update(case, plain, mode, e_a, e_b, reduction)
    got = one_step(case, net, reduction, damping_mode=mode, e_a=e_a, e_b=e_b)
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max()
        assert scale > 0, name
        assert (got[name] - want[name]).abs().max() < 1e-8 * scale, name


@pytest.mark.sample
@pytest.mark.parametrize("mode", ["trace", "absolute", "pi"])
@pytest.mark.parametrize("name", CASES)
def test_update_equals_the_dense_formula(name: str, mode: str) -> None:
    check_update(CASES[name], mode, 1, 1)


POWERS = [(0.5, 0.5), (1, 0), (0, 1), (0, 0), (0.25, 2)]


@pytest.mark.sample
@pytest.mark.parametrize(
    "mode, powers",
    # pi balances two factors; with one left out see below
    [(m, p) for m in ("trace", "absolute", "pi") for p in POWERS if m != "pi" or 0 not in p],
    ids=str,
)
@pytest.mark.parametrize("name", ["sequence", "embedding", "2d groups stride"])
def test_other_powers_equal_the_dense_formula(name: str, mode: str, powers: tuple[float, float]) -> None:
    check_update(CASES[name], mode, *powers)


@pytest.mark.parametrize("name", ["linear", "sequence", "2d groups", "embedding"])
def test_a_sum_loss_gives_the_factors_of_the_mean(name: str) -> None:
    check_update(CASES[name], "trace", 1, 1, "sum")


@pytest.mark.parametrize("side, powers", [("a", (1, 0)), ("b", (0, 1))])
def test_pi_with_one_side_takes_the_other_for_the_identity(side: str, powers: tuple[float, float]) -> None:
    case = DENSE["linear"]
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    f = dense_factors(plain, terms_of(case))["2"]
    terms_of(case)(plain).mean().backward()
    grad = plain[2].weight.grad
    m = f.a[0] if side == "a" else f.b[0]
    inverse = power(m, (m.trace() / len(m) * RHO).sqrt(), 1)
    # m_out^(1 - e_b) m_in^(e_a - 1), both are 2
    want = -LR * 2 * grad @ inverse if side == "a" else -LR / 2 * inverse @ grad
    got = one_step(case, net, damping_mode="pi", e_a=powers[0], e_b=powers[1])["2.weight"]
    torch.testing.assert_close(got, want)


def test_float32_agrees_with_float64() -> None:
    case = DENSE["linear"]
    want = one_step(case, case.net())
    (x, y), net = case.batch(), case.net().float()
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP)
    case.terms(net(x.float()), y.float()).mean().backward()
    got = moved(net, optimizer.step)
    for name in want:
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).norm() < 1e-4 * want[name].norm(), name


# Momentum and state -----------------------------------------------------------------------------------------


def matrix_of(optimizer: mupass.KFAC, parameter: str, side: str, what: str = "factor") -> Tensor:
    """A factor, corrected for its start, or a root, ``[groups, n, n]``, out of ``optimizer.state``."""
    state = optimizer.state[optimizer.root.get_parameter(parameter)]
    kept = state[f"{side}0.{what}"]
    size = next(n for n in range(1, 1000) if packed_size(n) == kept.shape[-1])
    whole = unpack(kept, size)
    return whole / state[f"{side}0.weight"][:, None, None] if what == "factor" else whole


def test_the_gradient_is_averaged_and_then_preconditioned() -> None:
    run = Run(DENSE["linear"], momentum=0.8, factor_decay=0.0, damping_memory=0.0, damping_floor=0.0)
    mean, weight = torch.zeros(8, 8, dtype=torch.float64), 0.0
    for seed in range(1, 5):
        a, b = (m.view(8, 8) for m in batch_factors(run.case, run.net, seed).chunk(2))
        got = moved(run.net, run.step)["2.weight"]
        mean = 0.8 * mean + 0.2 * run.net[2].weight.grad  # type: ignore[index]
        weight = 0.8 * weight + 0.2
        want = -LR * power(b, RHO * b.trace(), 1) @ (mean / weight) @ power(a, RHO * a.trace(), 1)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


# Schedules -------------------------------------------------------------------------------------------------


class Run:
    """A K-FAC run on fresh batches of one case."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.case, self.net = case, case.net()
        self.optimizer = mupass.KFAC(self.net, **{"lr": LR, "damping": RHO} | PLAIN | options)
        self.at = 0

    def step(self, scale: float = 1.0) -> None:
        self.at += 1
        x, y = self.case.batch(self.at)
        self.optimizer.zero_grad()
        (self.case.terms(self.net(x), y).mean() * scale).backward()
        self.optimizer.step()

    def snapshot(self, what: str) -> Tensor:
        """All factors, or all roots, in one vector."""
        end = ".factor" if what == "factors" else ".root"
        states = self.optimizer.state.values()
        kept = [
            t / (s[k.replace("factor", "weight")][:, None] if end == ".factor" else 1)
            for s in states
            for k, t in s.items()
            if k.endswith(end)
        ]
        return torch.cat([t.flatten() for t in kept])

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def batch_factors(case: Case, net: nn.Module, seed: int) -> Tensor:
    """The factors of hidden layer 2 on one batch, in one vector."""
    plain = case.plain()
    plain.load_state_dict(net.state_dict())
    x, y = case.batch(seed)
    f = dense_factors(plain, lambda m: case.terms(m(x), y))["2"]
    return torch.cat([f.a[0].flatten(), f.b[0].flatten()])


def averaged(run: Run) -> Tensor:
    return torch.cat([matrix_of(run.optimizer, "2.weight", side).flatten() for side in "ab"])


@pytest.mark.parametrize("decay", [0.0, 0.95, 0.999])
def test_averages_are_corrected_for_their_start(decay: float) -> None:
    run = Run(DENSE["linear"], factor_decay=decay)
    weights, total = [], 0.0
    for seed in (1, 2, 3):
        new = batch_factors(run.case, run.net, seed)
        weights = [(decay * w, f) for w, f in weights] + [(1 - decay, new)]
        run.step()
        total = sum(w for w, _ in weights)
        torch.testing.assert_close(averaged(run), sum(w * f for w, f in weights) / total)


@pytest.mark.parametrize("name", ["linear", "sequence", "embedding", "2d groups"])
def test_two_micro_batches_equal_one_batch(name: str) -> None:
    case = CASES[name]
    want = one_step(case, case.net())
    (x, y), net = case.batch(), case.net()
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP)
    half = [case.terms(net(x[i::2]), y[i::2]) for i in range(2)]
    terms = sum(map(len, half))
    for losses in half:
        (losses.sum() / terms).backward()
    got = moved(net, optimizer.step)
    for n in want:
        torch.testing.assert_close(got[n], want[n])


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "options", [{}, {"sharing": "reduce"}, {"block_size": 8}, {"damping_mode": "pi"}], ids=str
)
def test_matrices_that_are_worked_on_together_move_as_each_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for entries in (2**18, 300, 1):  # all of one shape, a few at a time, one by one
        for room in (factor_stack, preconditioner):
            monkeypatch.setattr(room, "IN_CACHE", entries)
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(5)], nn.Linear(16, 3)).double()
        mupass.transform(net, torch.randn(4, 16, dtype=torch.float64), base=8)
        optimizer = mupass.KFAC(net, root_every=3, **options)
        for _ in range(7):
            x = torch.randn(12, 16, dtype=torch.float64)
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
        found.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_factors_are_collected_every_so_many_steps(every: int) -> None:
    run = Run(DENSE["linear"], factor_every=every)
    tap = tap_of(run.net[2])  # type: ignore[index]
    for at in range(7):
        before, collecting = run.snapshot("factors"), tap.rows.requires_grad  # type: ignore[union-attr]
        run.step()
        assert collecting == (at % every == 0)
        assert torch.equal(before, run.snapshot("factors")) != collecting


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_roots_are_recomputed_every_so_many_steps(every: int) -> None:
    run = Run(DENSE["linear"], root_every=every, stagger=False)
    for at in range(11):
        before = run.snapshot("roots")
        run.step()
        due = at % every == 0 or (at < every and at in (1, 2, 4))
        assert torch.equal(before, run.snapshot("roots")) != due


def renewed(run: Run) -> set[str]:
    """Take a step and return which slots got new roots."""
    states = {run.optimizer.names[p]: s for p, s in run.optimizer.state.items()}
    roots = {f"{n} {k}": t for n, s in states.items() for k, t in s.items() if k.endswith(".root")}
    before = {name: root.clone() for name, root in roots.items()}
    run.step()
    return {name for name, root in roots.items() if not torch.equal(root, before[name])}


def test_staggered_roots_are_each_recomputed_once_a_period() -> None:
    run = Run(DENSE["linear"], root_every=3)
    for _ in range(3):  # all at steps 0, 1 and 2 of the first period
        slots = renewed(run)
        assert len(slots) == 6
    turns = [renewed(run) for _ in range(6)]
    assert all(turns) and set.union(*turns[:3]) == slots and sum(map(len, turns[:3])) == len(slots)
    assert turns[:3] == turns[3:]


@pytest.mark.parametrize("exponents", [(1.0, 1.0), (0.5, 0.5)], ids=str)
def test_an_old_root_follows_the_size_of_its_factor(exponents: tuple[float, float]) -> None:
    how = {"root_every": 100, "stagger": False, "factor_decay": 0.0}
    run = Run(DENSE["linear"], e_a=exponents[0], e_b=exponents[1], **how)
    for _ in range(3):
        run.step()
    a, b = (matrix_of(run.optimizer, "0.weight", side, "root")[0].clone() for side in "ab")
    then = [matrix_of(run.optimizer, "0.weight", side)[0].trace() for side in "ab"]
    x, y = run.case.batch(2)
    run.optimizer.zero_grad()
    run.case.terms(run.net(3 * x), y).mean().backward()  # A is about nine times what it was
    before = run.snapshot("roots")
    got = moved(run.net, run.optimizer.step)["0.weight"]
    assert torch.equal(before, run.snapshot("roots"))
    now = [matrix_of(run.optimizer, "0.weight", side)[0].trace() for side in "ab"]
    grown = [float((n / t).clamp(min=1)) ** e for n, t, e in zip(now, then, exponents, strict=True)]
    assert grown[0] > 2
    scale = 2 ** (1 - exponents[1])  # m_out is 2, m_in 1
    want = -LR * scale * b @ run.net[0].weight.grad @ a / grown[0] / grown[1]  # type: ignore[index]
    torch.testing.assert_close(got, want)


def test_stale_roots_precondition_fresh_gradients() -> None:
    case = DENSE["linear"]
    run = Run(case, factor_every=2)
    run.step()
    a, b = (matrix_of(run.optimizer, "2.weight", side, "root")[0].clone() for side in "ab")
    got = moved(run.net, run.step)["2.weight"]
    torch.testing.assert_close(got, -LR * b @ run.net[2].weight.grad @ a)  # type: ignore[index]


def test_momentum_of_directions_adds_them_up() -> None:
    case, how = DENSE["linear"], {"lr": 1e-9, "momentum_of": "directions"}
    steps = {m: Run(case, momentum=m, **how) for m in (0.0, 0.5)}
    plain, heavy = ([moved(r.net, r.step)["2.weight"] for _ in range(3)] for r in steps.values())
    want = plain[2] + 0.5 * plain[1] + 0.25 * plain[0]
    torch.testing.assert_close(heavy[2], want, rtol=1e-4, atol=0)


def test_damping_is_a_key_of_the_groups() -> None:
    case = DENSE["linear"]
    net = case.net()
    optimizer = mupass.KFAC(net, LR, 123.0, **ONE_STEP)
    for group in optimizer.param_groups:
        group["damping"] = RHO
    terms_of(case)(net).mean().backward()
    got, want = moved(net, optimizer.step), one_step(case, case.net())
    for name in want:
        assert torch.equal(got[name], want[name])


def test_zero_grad_forgets_the_factors_of_a_pass() -> None:
    case = DENSE["linear"]
    net, want = case.net(), one_step(case, case.net())
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP)
    x, y = case.batch(5)
    case.terms(net(x), y).mean().backward()
    optimizer.zero_grad()
    terms_of(case)(net).mean().backward()
    got = moved(net, optimizer.step)
    assert all(torch.equal(got[n], want[n]) for n in want)


# Loss terms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [28, lambda: 28], ids=["number", "function"])
def test_loss_terms_given(terms: Any) -> None:
    case = DENSE["embedding"]
    got, want = one_step(case, case.net(), loss_terms=terms), one_step(case, case.net())
    assert all(torch.equal(got[n], want[n]) for n in want)
    other = one_step(case, case.net(), loss_terms=27)
    assert not torch.allclose(other["1.weight"], want["1.weight"], rtol=1e-4)


class PooledReadout(nn.Module):
    """The readout sees every token, the loss only their mean: fewer terms than rows."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, w), nn.Linear(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inp(x))).mean(1)


def convolutional(w: int) -> nn.Module:
    """The readout is a convolution, and positions are averaged after it."""
    return nn.Sequential(
        nn.Conv2d(2, w, 3), nn.Tanh(), nn.Conv2d(w, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.parametrize(
    "build, shape", [(PooledReadout, (4, 7, 5)), (convolutional, (4, 2, 5, 5))], ids=["tokens", "positions"]
)
def test_terms_are_counted_after_pooling(build: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    case = Case("pooled", build, normal(*shape), normal(4, 3), squares)
    check_update(case, "trace", 1, 1)


class OwnLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.net = mlp_of(w)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)


def mlp_of(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, w), nn.Tanh(), nn.Linear(w, 3))


@pytest.mark.parametrize("keyword", ["loss_terms", "loss_scale"])
@pytest.mark.parametrize("value", [-3, float("nan"), float("inf"), "12", None, torch.ones(2)], ids=str)
def test_what_a_function_of_the_loss_returns_is_a_number(keyword: str, value: Any) -> None:
    net = DENSE["linear"].net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(mupass.OptimizerError, match=f"what the function {keyword} returned must be a finite"):
        one_step(DENSE["linear"], net, **{keyword: lambda: value})
    assert all(map(torch.equal, before, net.parameters()))


def test_a_model_that_returns_its_loss_needs_loss_terms() -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    net = mupass.transform(OwnLoss(8), (x, y), base=4)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = mupass.KFAC(net, LR)
    net(x, y).backward()
    with pytest.raises(mupass.OptimizerError, match="Pass loss_terms="):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer = mupass.KFAC(net, LR, loss_terms=6)
    optimizer.zero_grad()
    net(x, y).backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


# Survival --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["trace", "absolute", "pi"])
@pytest.mark.parametrize("powers", [(1, 1), (0.5, 0.5), (0, 1)], ids=str)
def test_zero_readout(mode: str, powers: tuple[float, float]) -> None:
    run = Run(DENSE["linear"], damping_mode=mode, e_a=powers[0], e_b=powers[1])
    nn.init.zeros_(run.net[4].weight)  # type: ignore[index,arg-type]
    with pytest.warns(UserWarning, match="receives no gradient") as found:
        step = moved(run.net, run.step)
    assert len(found) == 2  # one for each layer below
    assert run.optimizer.stats() == {"steps": 1, "zero_traces": 2}
    assert all(torch.count_nonzero(step[f"{i}.{k}"]) == 0 for i in (0, 2) for k in ("weight", "bias"))
    assert all(torch.count_nonzero(step[f"4.{k}"]) > 0 for k in ("weight", "bias"))
    step = moved(run.net, run.step)  # silent: the readout has moved, and so does the rest
    assert all(s.isfinite().all() and torch.count_nonzero(s) for s in step.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_skips_the_step_and_leaves_no_trace(bad: float) -> None:
    run, clean = (Run(DENSE["linear"], momentum=0.9, weight_decay=0.1) for _ in range(2))
    for r in (run, clean):
        r.step()
        r.step()
    before = run.parameters()
    with pytest.warns(mupass.MupassWarning, match="skipped steps"):
        run.step(bad)
        assert run.optimizer.stats() == {"steps": 2, "skipped_steps": 1}
    assert torch.equal(run.parameters(), before)
    run.at -= 1
    for r in (run, clean):
        for _ in range(3):
            r.step()
    assert torch.equal(run.parameters(), clean.parameters())
    with warnings.catch_warnings():  # warned once; counted again
        warnings.simplefilter("error")
        run.step(bad)
        assert run.optimizer.stats()["skipped_steps"] == 2


def test_one_bad_gradient_entry_is_enough() -> None:
    run = Run(DENSE["linear"])
    x, y = run.case.batch()
    run.case.terms(run.net(x), y).mean().backward()
    run.net[4].bias.grad[1] = float("nan")  # type: ignore[index]
    before = run.parameters()
    with pytest.warns(UserWarning, match="skipped steps"):
        run.optimizer.step()
    assert torch.equal(run.parameters(), before)


def test_a_skipped_step_forgets_its_factors() -> None:
    case = DENSE["linear"]
    net, want = case.net(), one_step(case, case.net())
    optimizer = mupass.KFAC(net, LR, RHO, **ONE_STEP)
    terms_of(case)(net).mean().backward()
    net.get_parameter("4.bias").grad.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="skipped steps"):
        optimizer.step()
    net.zero_grad()  # the model's: it knows of no factors
    terms_of(case)(net).mean().backward()
    got = moved(net, optimizer.step)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_overflowing_factors_keep_the_average() -> None:
    run = Run(DENSE["linear"])
    run.step()
    factors = averaged(run)
    with pytest.warns(UserWarning, match="overflowed factors"):
        run.step(1e200)  # gradients are finite, their squares are not
        run.optimizer.stats()
    half = len(factors) // 2
    assert torch.equal(averaged(run)[half:], factors[half:])  # B
    assert not torch.equal(averaged(run)[:half], factors[:half])  # A saw nothing unusual
    assert run.optimizer.stats()["overflowed_factors"] == 3


def test_a_failed_root_keeps_the_old_one() -> None:
    run = Run(DENSE["linear"])
    run.step()
    roots = run.snapshot("roots")
    for group in run.optimizer.param_groups:
        group["damping"] = 0.0
    for state in run.optimizer.state.values():
        for factor in (t for key, t in state.items() if key.endswith(".factor")):
            factor.zero_()[..., 0] = 1  # singular
    run.optimizer.factor_every = 10
    run.optimizer._due = False
    run.optimizer._curvature.collect(False)
    with pytest.warns(UserWarning, match="failed roots: factor [AB] of") as found:
        step = moved(run.net, run.step)
        assert run.optimizer.stats()["failed_roots"] == 6
    assert len(found) == 6
    assert torch.equal(run.snapshot("roots"), roots)
    assert all(s.isfinite().all() and torch.count_nonzero(s) for s in step.values())


class Branches(nn.Module):
    """A layer that sits out some batches."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp, self.left, self.out = nn.Linear(5, w), nn.Linear(w, w), nn.Linear(w, 3)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        return self.out(h if self.skip else torch.tanh(self.left(h)))


def test_a_layer_that_sits_out_keeps_its_factors_and_its_weight() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    net = mupass.transform(Branches(8), x, base=4)
    optimizer = mupass.KFAC(net, LR, RHO)

    def step(skip: bool) -> Deltas:
        net.skip = skip
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        return moved(net, optimizer.step)

    first = step(skip=True)  # never seen: no average, no 0/0
    assert torch.count_nonzero(first["left.weight"]) == 0
    second = step(skip=False)
    assert torch.count_nonzero(second["left.weight"]) > 0
    kept = matrix_of(optimizer, "left.weight", "b").clone()
    third = step(skip=True)
    assert torch.count_nonzero(third["left.weight"]) == 0
    assert torch.equal(matrix_of(optimizer, "left.weight", "b"), kept)
    assert all(d.isfinite().all() for found in (first, second, third) for d in found.values())


# Roots by themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exponent", [0.25, 1.0, 2.0])
def test_one_bad_matrix_does_not_spoil_the_bank(exponent: float, relative: bool) -> None:
    torch.manual_seed(0)
    good, rho = torch.randn(4, 4, dtype=torch.float64), torch.full((3,), RHO, dtype=torch.float64)
    good = good @ good.T
    bank = torch.stack([good, good * torch.nan, good])
    roots, failed = inverse_roots(bank, rho, exponent, relative)
    assert failed.tolist() == [False, True, False] and not roots[1].any()
    want = power(good, RHO * torch.linalg.eigvalsh(good)[-1] if relative else RHO, exponent)
    torch.testing.assert_close(roots[0], want)
    torch.testing.assert_close(roots[2], want)


def test_an_eigensolver_that_fails_on_one_matrix_is_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    good = torch.randn(3, 3, dtype=torch.float64)
    good, bad, solve = good @ good.T, torch.diag(torch.tensor([1.0, 2.0, 666.0]).double()), torch.linalg.eigh

    def eigh(bank: Tensor) -> Any:
        if (bank == 666).any():
            raise torch.linalg.LinAlgError("no convergence")  # type: ignore[attr-defined]
        return solve(bank)

    want = power(good, RHO, 0.5)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    bank = torch.stack([good, bad])
    roots, failed = inverse_roots(bank, torch.full((2,), RHO).double(), 0.5)
    assert failed.tolist() == [False, True] and not roots[1].any()
    torch.testing.assert_close(roots[0], want, rtol=1e-6, atol=1e-6)


def test_a_vanished_matrix_has_the_root_zero_only_without_damping() -> None:
    bank = torch.zeros(2, 2, 2)
    roots, failed = inverse_roots(bank, torch.tensor([0.0, 4.0]), 0.5)
    assert not failed.any() and torch.equal(roots, torch.stack([torch.zeros(2, 2), 0.5 * torch.eye(2)]))
    table = diagonal_roots(torch.tensor([[0.0, 4.0], [0.0, 3.0]]), torch.tensor([0.0, 1.0]), 0.5)
    assert torch.equal(table, torch.tensor([[0.0, 0.5], [1.0, 0.5]]))


# Damping of few rows ---------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


def updates_of(damping: float | None, rows: int, **settings: Any) -> Deltas:
    """One step of an MLP on so many samples."""
    model = transformed(mlp, inputs=torch.randn(2, 6).double(), base=16)
    optimizer = mupass.KFAC(model, LR, damping, **{**PLAIN, **settings})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(rows, 6).double()).square().mean().backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.sample
@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.parametrize(("rows", "factor"), [(8, 16.0), (128, 4.0), (160, 2.56), (256, 1.0), (1000, 1.0)])
def test_default_damping_falls_with_the_rows_of_a_step(
    rows: int, factor: float, ekfac: bool, monkeypatch: Any
) -> None:
    default = updates_of(None, rows, ekfac=ekfac)
    seen: list[str] = []

    def scaled(mode: str, sides: Any, *rest: Any) -> Any:
        """The given damping of 1e-3, times the factor on the sides whose size is the width, 16."""
        seen.append(mode)
        rho_a, rho_b = damp(mode, sides, *rest)
        by_a, by_b = (1 + (factor - 1) * (size == 16).double() for size in (sides.dim_a, sides.dim_b))
        return rho_a * by_a, rho_b * by_b

    damp = preconditioner.damp
    monkeypatch.setattr(preconditioner, "damp", scaled)
    # A direction is longer for each side that grows.
    sides = {"0.weight": 1, "0.bias": 1, "2.weight": 2, "2.bias": 1, "4.weight": 1, "4.bias": 0}
    longer = {name: factor ** (number / 8) for name, number in sides.items()}
    for name, update in updates_of(1e-3, rows, ekfac=ekfac).items():
        torch.testing.assert_close(default[name], update * longer[name], rtol=1e-10, atol=1e-15)
    assert seen == ["trace"]


def test_damping_that_is_given_does_not_look_at_rows() -> None:
    mixed = updates_of(None, 8, overrides={"0.*": {"damping": 1e-3}})
    low, default = updates_of(1e-3, 8), updates_of(None, 8)
    for name, update in mixed.items():
        given, other = (low, default) if name.startswith("0.") else (default, low)
        torch.testing.assert_close(update, given[name], rtol=1e-10, atol=0.0)
        if name != "4.bias":  # neither of its sides grows
            assert not torch.allclose(update, other[name], rtol=1e-3)


@pytest.mark.parametrize("settings", [{"ekfac": True}, {"damping_mode": "eigen"}])
def test_other_modes_look_at_rows_too(settings: dict[str, Any]) -> None:
    few, given = updates_of(None, 8, **settings), updates_of(1e-3, 8, **settings)
    assert not torch.allclose(few["0.weight"], given["0.weight"], rtol=1e-3)
    many, given = updates_of(None, 256, **settings), updates_of(1e-3, 256, **settings)
    torch.testing.assert_close(many["0.weight"], given["0.weight"], rtol=1e-10, atol=0.0)


def test_absolute_default_damping_does_not_look_at_rows() -> None:
    default, given = (updates_of(d, 8, damping_mode="absolute") for d in (None, 1e-3))
    for name, update in default.items():
        torch.testing.assert_close(update, given[name], rtol=0.0, atol=0.0)


def test_positions_are_rows() -> None:
    """8 sequences of 32 positions are 256 rows: damping is 1e-3."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x, found = torch.randn(8, 32, 6).double(), []
    for damping in (None, 1e-3):
        model = mupass.transform(source, x[:2], base=16, inplace=False)
        optimizer = mupass.KFAC(model, LR, damping, **PLAIN)
        model(x).square().mean().backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for default, given in zip(*found, strict=True):
        torch.testing.assert_close(default, given, rtol=1e-12, atol=0.0)
