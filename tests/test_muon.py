"""Muon: whole updates against singular value decompositions, the polynomials, routing by role."""

from __future__ import annotations

from math import log2, sqrt
from typing import Any

import pytest
import torch
from test_kfac import moved
from test_shampoo import MODELS, assert_close, growth, make
from torch import Tensor, nn

import mupass
from mupass._optim.linalg.polar import orthogonalize, quintics

needs_torch_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no torch.optim.Muon"
)
LR = 0.1
EVERY = {"roles": ["input", "hidden", "output"], "fallback": "sgd", "fallback_lr": 0.5}


def polar(g: Tensor) -> Tensor:
    """U V^T over the singular values that are not rounding errors."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return (u * (s > 1e-10 * s[0])) @ v


@pytest.mark.parametrize("name", MODELS)
def test_update_equals_singular_vectors(name: str) -> None:
    net, x = make(name)
    optimizer = mupass.Muon(net, LR, steps=14, adjust="spectral", **EVERY)
    net(x).square().mean().backward()
    got = moved(net, optimizer.step)
    for parameter, matrices in MODELS[name][2].items():
        m_in, m_out = growth(name, parameter)
        grad = net.get_parameter(parameter).grad
        assert grad is not None
        for move, g in zip(matrices(got[parameter]), matrices(grad), strict=True):
            assert_close(move, -LR * sqrt(m_out / m_in) * polar(g), parameter)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(nesterov: bool, adaptive: bool) -> None:
    net, _ = make("mlp")
    options = {"momentum": 0.8, "nesterov": nesterov, "adaptive": adaptive, "beta2": 0.7}
    optimizer = mupass.Muon(net, LR, steps=30, **options)
    average = torch.zeros(12, 12, dtype=torch.float64)
    squares, weight = average.clone(), 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(30, 5, dtype=torch.float64)).square().mean().backward()
        g = net[2].weight.grad  # type: ignore[index]
        average = 0.8 * average + 0.2 * g
        want = polar(0.2 * g + 0.8 * average if nesterov else average)
        if adaptive:
            squares, weight = 0.7 * squares + 0.3 * want**2, 0.7 * weight + 0.3
            want = want / (squares / weight).sqrt() / 2  # Adam's rate, 1 / m_in
        got = moved(net, optimizer.step)["2.weight"]
        assert (got + LR * want).abs().max() < 1e-5 * want.abs().max()


@needs_torch_muon
def test_a_step_points_where_torch_muon_points() -> None:
    net, x = make("mlp")
    optimizer = mupass.Muon(net, LR)
    net(x).square().mean().backward()
    twin = nn.Parameter(net[2].weight.detach().clone().float())  # type: ignore[index]
    before = twin.detach().clone()
    twin.grad = net[2].weight.grad.float()  # type: ignore[index,union-attr]
    torch.optim.Muon([twin], lr=LR, weight_decay=0.0).step()
    ours, theirs = moved(net, optimizer.step)["2.weight"].flatten(), (twin.detach() - before).flatten()
    # Their polynomial leaves singular values between 0.7 and 1.2, in bfloat16.
    assert torch.cosine_similarity(ours, theirs.double(), 0) > 0.9


def torch_muon(grad: Tensor, lr: float, **options: Any) -> Tensor:
    """Return one step of torch's Muon, whose polynomial here takes all singular values to 1."""
    weight = nn.Parameter(torch.zeros(grad.shape))
    weight.grad = grad.float()
    cubic = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}
    torch.optim.Muon([weight], lr=lr, weight_decay=0.0, **cubic, **options).step()
    return weight.detach().double()


@needs_torch_muon
@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_adjusted_steps_are_those_of_torch(shape: tuple[int, int], adjust: str) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    net = nn.Sequential(nn.Linear(4, columns), nn.Tanh(), nn.Linear(columns, rows), nn.Tanh())
    net.append(nn.Linear(rows, 3)).double()
    mupass.transform(net, torch.randn(2, 4, dtype=torch.float64), base=max(shape))
    options = {} if adjust == "original" else {"adjust": adjust}  # the default is torch's
    optimizer = mupass.Muon(net, LR, steps=14, **options)
    grad = torch.randn(rows, columns, dtype=torch.float64)
    net[2].weight.grad = grad
    got = moved(net, optimizer.step)["2.weight"]
    want = torch_muon(grad, LR, adjust_lr_fn=adjust)
    assert (got - want).norm() < 0.02 * want.norm()  # theirs is in bfloat16
    if adjust == "match_rms_adamw":
        assert got.square().mean().sqrt().item() == pytest.approx(0.2 * LR, rel=1e-6)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_adjusted_rates_follow_the_row_of_muon(adjust: str) -> None:
    for name in ("mlp", "attention"):
        net, x = make(name)
        twin, _ = make(name)
        net(x).square().mean().backward()
        twin(x).square().mean().backward()
        adjusted = moved(net, mupass.Muon(net, LR, adjust=adjust, **EVERY).step)
        plain = moved(twin, mupass.Muon(twin, LR, adjust="spectral", **EVERY).step)
        for parameter, matrices in MODELS[name][2].items():
            m_in, m_out = growth(name, parameter)
            pairs = zip(matrices(adjusted[parameter]), matrices(plain[parameter]), strict=True)
            for ours, muon in pairs:
                rows, columns = ours.shape[0] / m_out, ours.shape[1] / m_in
                factor = 0.2 * sqrt(max(rows, columns))
                if adjust == "original":
                    factor = sqrt(max(1, rows / columns))
                assert_close(ours, muon * factor, parameter)


def test_matched_rates_default_to_those_of_adam() -> None:
    net, _ = make("mlp")
    assert mupass.Muon(net, adjust="match_rms_adamw").param_groups[0]["lr"] == pytest.approx(
        mupass.Muon(net, adaptive=True).param_groups[0]["lr"]
    )


def test_normuon_against_its_formula() -> None:
    net, _ = make("mlp")
    optimizer = mupass.Muon(net, LR, momentum=0.8, beta2=0.7, steps=30, normuon=True)
    average, rows = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(30, 5, dtype=torch.float64)).square().mean().backward()
        g = net[2].weight.grad  # type: ignore[index]
        average = 0.8 * average + 0.2 * g
        turned = polar(0.2 * g + 0.8 * average)
        rows = 0.7 * rows + 0.3 * turned.square().mean(1)
        want = turned / rows.sqrt()[:, None]  # arXiv 2510.05491, algorithm 1; its length follows
        want *= turned.norm() / want.norm()
        got = moved(net, optimizer.step)["2.weight"]
        assert (got + LR * want).abs().max() < 1e-4 * want.abs().max()
        if seed == 0:  # all neurons move by the same amount
            assert got.norm(dim=1).std() < 1e-4 * got.norm(dim=1).mean()


def test_normuon_leaves_dead_neurons_alone_and_has_a_state_of_its_own() -> None:
    net, x = make("mlp")
    optimizer = mupass.Muon(net, LR, normuon=True)
    net(x).square().mean().backward()
    net[2].weight.grad[3] = 0.0  # type: ignore[index,union-attr]
    assert (moved(net, optimizer.step)["2.weight"][3] == 0).all()
    with pytest.raises(mupass.OptimizerError, match="lacks"):
        mupass.Muon(make("mlp")[0], LR, normuon=True).load_state_dict(
            mupass.Muon(make("mlp")[0], LR).state_dict()
        )


@pytest.mark.parametrize(
    "options", [{"normuon": True}, {"adjust": "match_rms_adamw"}, {"adjust": "original"}]
)
def test_adamuon_takes_neither_adjustment_nor_normuon(options: dict[str, Any]) -> None:
    with pytest.raises(mupass.OptimizerError, match="adaptive=True is AdaMuon"):
        mupass.Muon(make("mlp")[0], LR, adaptive=True, **options)
    with pytest.raises(mupass.OptimizerError, match="unknown adjust 'adamw'; known: spectral"):
        mupass.Muon(make("mlp")[0], LR, adjust="adamw")


WIDTHS = (64, 512)
VARIANTS: dict[str, dict[str, Any]] = {
    "matched": {"adjust": "match_rms_adamw"},
    "normuon": {"normuon": True},
    "normuon matched": {"normuon": True, "adjust": "match_rms_adamw"},
}


def log_moves(width: int, seed: int, options: dict[str, Any], exponent: float = 0.0) -> list[float]:
    """Return log2 of RMS(dW h) of three layers after one step; rates are m^exponent times the plan's."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    net = nn.Sequential(net, nn.Linear(width, 10)).double()
    torch.manual_seed(1000 + seed)
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(10, (8,))
    mupass.transform(net, x, base=64)
    optimizer = mupass.Muon(net, (width / 64) ** exponent, fallback="sgd", **options)
    nn.functional.cross_entropy(net(x), y).backward()
    inputs = {"0.0.weight": x, "0.2.weight": net[0][:2](x), "1.weight": net[0](x)}
    deltas = moved(net, optimizer.step)
    return [(h @ deltas[n].T).square().mean().sqrt().log2().item() for n, h in inputs.items()]


def slopes(options: dict[str, Any], exponent: float = 0.0) -> Tensor:
    roles = {"roles": ["input", "hidden", "output"], "steps": 5}
    moves = [
        torch.tensor([log_moves(w, seed, options | roles, exponent) for seed in range(2)]).mean(0)
        for w in WIDTHS
    ]
    return (moves[-1] - moves[0]) / log2(WIDTHS[-1] / WIDTHS[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_move_layers_alike_at_all_widths(variant: str) -> None:
    found = slopes(VARIANTS[variant])
    assert (found.abs() < 0.1).all(), found


@pytest.mark.parametrize("lower", [1e-3, 0.05])
def test_quintics_are_the_best_on_their_intervals(lower: float) -> None:
    low, high = lower, 1.0
    for a, b, c in quintics(6, lower):
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = 1 - (a * x + b * x**3 + c * x**5)
        worst = error.abs().max().item()
        if worst > 1e-6:  # Chebyshev: three coefficients, so four extremes of equal size, signs alternating
            turns = (error.diff().sign().diff() != 0).nonzero().flatten() + 1
            extremes = [error[0], *error[turns], error[-1]]
            signed = [float(e) * s for e, s in zip(extremes, (1, -1, 1, -1), strict=True)]
            assert signed == pytest.approx([worst] * 4, rel=1e-4)
        low, high = 1 - worst, 1 + worst
    assert high - low < 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.2), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (24, 96), (72, 24)])
def test_singular_values_come_out_near_one(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, min(shape))).Q for n in shape)
    s = torch.logspace(-2.3, 0, min(shape))  # above 0.003 of the norm
    x = (u * s) @ v.mT
    got = torch.linalg.svdvals(orthogonalize(x, torch.zeros(3), quintics(4), dtype))
    if max(shape) >= 3 * min(shape) and dtype is torch.bfloat16:
        tolerance = 0.35  # through the Gram matrix, which holds squares: small singular values lose digits
    assert (got - 1).abs().max() < tolerance


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_wide_matrices_take_the_same_polynomials(steps: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 40, dtype=torch.float64)
    got = orthogonalize(x, torch.zeros(2, dtype=torch.float64), quintics(steps), x.dtype)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s /= s.norm(p=4, dim=1, keepdim=True)
    for a, b, c in quintics(steps):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(got, (u * s[:, None, :]) @ v)


def test_epsilon_damps_small_gradients_alike_at_all_widths() -> None:
    # The norm of a gradient goes like sqrt(m_in / m_out), and epsilon has to follow.
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    x /= x.flatten(1).norm(dim=1)[:, None, None]
    whole = orthogonalize(x, torch.zeros(2, dtype=torch.float64), quintics(5), x.dtype)
    damped = orthogonalize(1e-9 * x, torch.full((2,), 1e-3, dtype=torch.float64), quintics(5), x.dtype)
    assert damped.norm() < 1e-2 * whole.norm()
    rows = {n: mupass.Muon(make("mlp")[0], LR, **EVERY).plan[n].scales.epsilon for n in MODELS["mlp"][2]}
    assert rows == pytest.approx({"0.weight": 2**-0.5, "2.weight": 1.0, "4.weight": 2**0.5})


class Misnamed(nn.Module):
    """Names that say the opposite of what the parameters are."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.lm_head, self.embed, self.norm_bias = nn.Embedding(9, w), nn.Linear(w, w), nn.Linear(w, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm_bias(torch.tanh(self.embed(self.lm_head(ids))))


@pytest.mark.parametrize("cls", [mupass.Muon, mupass.SOAP, mupass.Shampoo])
def test_routing_is_by_role(cls: Any) -> None:
    torch.manual_seed(0)
    net = mupass.transform(Misnamed(8), torch.arange(6).view(2, 3), base=4)
    found = {c.parameter: c for c in cls(net, 0.1, roles=["hidden"]).coverage()}
    own = cls.__name__.lower()
    assert {n: c.treatment for n, c in found.items()} == {
        "lm_head.weight": "adamw",
        "embed.weight": own,
        "embed.bias": "adamw",
        "norm_bias.weight": "adamw",
        "norm_bias.bias": "adamw",
    }
    assert "its role is input" in found["lm_head.weight"].reason
    assert "its role is output" in found["norm_bias.weight"].reason
    assert {c.treatment for c in mupass.Muon(net, 0.1).coverage()} == {"muon", "adamw"}
