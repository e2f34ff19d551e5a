"""FoMoH: slopes and curvature are autograd's, the step is Newton's where the plane is everything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_hypergradient import Odd
from torch import Tensor, nn

import mupass
from mupass._hyper.fomoh import minimizer, plane
from mupass._hyper.functional_model import call

torch.manual_seed(0)
X = torch.randn(32, 10, dtype=torch.float64)
Y = X[:, :4].argmax(1)


def mlp(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)]
    model = nn.Sequential(*layers)
    return mupass.transform(model.double(), X[:2], base=4)


def odd() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Odd().double(), X[:2], base=8)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y)


def flat_loss(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    named = dict(model.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in named.values()])
        values = {n: x.view_as(p) for (n, p), x in zip(named.items(), pieces, strict=True)}
        torch.manual_seed(3)  # dropout
        return F.cross_entropy(torch.func.functional_call(model, values, (X,)), Y)

    return loss, torch.cat([p.detach().flatten() for p in named.values()])


@pytest.mark.sample("mlp")
@pytest.mark.parametrize("build", [mlp, odd])
def test_slopes_and_curvature_are_those_of_autograd(build: Callable[[], nn.Module]) -> None:
    model = build()
    optimizer = mupass.FoMoH(model, lr=0.0, directions=3, seed=5)
    drawn = mupass.FoMoH(model, directions=3, seed=5)
    tangents = [torch.cat([v.flatten() for v in drawn._draw().values()]) for _ in range(3)]
    torch.manual_seed(3)
    optimizer.step(loss_of(model))
    loss, flat = flat_loss(model)
    v = torch.stack(tangents)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
    assert torch.allclose(optimizer.slopes, v @ gradient, rtol=1e-10, atol=1e-10)
    assert torch.allclose(optimizer.curvature, v @ hessian @ v.T, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_with_all_directions_it_is_newtons_step() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    mupass.transform(model, x[:2], base=4)
    model[0].requires_grad_(False)  # what is left is least squares
    optimizer = mupass.FoMoH(model, directions=16, damping=0.0)
    before = optimizer.step(lambda: F.mse_loss(model(x), y))
    exact = torch.linalg.lstsq(torch.tanh(model[0](x)), y).solution.T
    assert torch.allclose(model[2].weight, exact, atol=1e-8)
    assert F.mse_loss(model(x), y) < before and optimizer.stats() == {"steps": 1, "skipped_steps": 0}


def test_a_plane_step_is_the_minimum_of_the_plane() -> None:
    torch.manual_seed(2)
    half = torch.randn(9, 9, dtype=torch.float64)
    matrix, vector = half @ half.T, torch.randn(9, dtype=torch.float64)
    v = torch.randn(4, 9, dtype=torch.float64)

    def at(*shifts: tuple[Tensor, Tensor]) -> Tensor:
        x = sum((c * w for c, w in shifts), start=torch.zeros(9, dtype=torch.float64))
        return x @ matrix @ x / 2 + vector @ x

    slopes, curvature = plane(at, list(v))
    assert torch.allclose(slopes, v @ vector) and torch.allclose(curvature, v @ matrix @ v.T)
    exact = torch.linalg.solve(v @ matrix @ v.T, v @ vector)
    assert torch.allclose(minimizer(slopes, curvature, 0.0), -exact)
    saddle = torch.diag(torch.tensor([2.0, -1.0]).double())
    step = minimizer(torch.ones(2).double(), saddle, 0.5)  # 0.5 times the largest, 2, is added
    assert torch.allclose(step, -torch.tensor([1 / 3, 1 / 2]).double())


@pytest.mark.slow
def test_it_trains_and_never_raises_the_loss() -> None:
    model = mlp()
    optimizer = mupass.FoMoH(model, directions=4, damping=1e-2)
    losses = [float(optimizer.step(loss_of(model))) for _ in range(15)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model, other = mlp(), mlp()
    first, second = mupass.FoMoH(model, directions=2), mupass.FoMoH(other, directions=2, seed=9)
    for _ in range(2):
        first.step(loss_of(model))
    state, weights = first.state_dict(), model.state_dict()
    other.load_state_dict({k: v.clone() for k, v in weights.items()})
    second.load_state_dict(state)
    for _ in range(2):
        assert first.step(loss_of(model)) == second.step(loss_of(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert first.stats() == second.stats()


def test_running_averages_move_once_and_dropout_is_drawn_once() -> None:
    model, twin = odd(), odd()
    optimizer = mupass.FoMoH(model, directions=2)
    torch.manual_seed(4)
    optimizer.step(loss_of(model))
    drawn = torch.rand(())
    torch.manual_seed(4)
    loss_of(twin)()
    assert torch.equal(drawn, torch.rand(()))
    assert torch.allclose(model.norm.running_mean, twin.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.gpu
def test_a_gpu_takes_the_same_step() -> None:
    model, twin = odd().eval(), odd().eval().cuda()
    mupass.FoMoH(model, directions=2).step(loss_of(model))
    mupass.FoMoH(twin, directions=2).step(lambda: F.cross_entropy(twin(X.cuda()), Y.cuda()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q.cpu(), atol=1e-8)


def test_directions_scale_with_the_plan() -> None:
    model = mlp(64)
    plan, normal = mupass.FoMoH(model), mupass.FoMoH(model, law="normal")
    a, b = plan._draw(), normal._draw()
    for name, factor in {"0.weight": 1.0, "2.weight": 0.25, "4.weight": 0.25, "4.bias": 1.0}.items():
        assert torch.allclose(a[name], factor * b[name]), name


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


NORMS = {
    "batch": nn.BatchNorm1d(6),
    "layer": nn.LayerNorm(5),
    "instance": nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "group": nn.GroupNorm(2, 6),
    "rms": nn.RMSNorm(5),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normalizations_have_their_second_derivative(norm: str, training: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(4, 6, 1), NORMS[norm]).double().train(training)
    x, c = torch.randn(9, 4, 5, dtype=torch.float64), torch.randn(9, 6, 5, dtype=torch.float64)
    weight, buffers = model[0].weight.detach(), {n: b.clone() for n, b in model.named_buffers()}
    v, w = torch.randn(2, 6, 4, 1, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        values = {"0.weight": weight, **still()}
        return (torch.func.functional_call(model, values, (x,)).square() * c).sum()

    def still() -> dict[str, Tensor]:
        return {n: b.clone() for n, b in buffers.items()}

    def at(*shifts: tuple[Tensor, Tensor]) -> Tensor:
        values = {"0.weight": sum((number * direction for number, direction in shifts), start=weight)}
        return call(model, lambda m: (m(x).square() * c).sum(), values, still())

    hessian = torch.autograd.functional.hessian(loss, weight)
    wanted = torch.stack([torch.einsum("ijm,ijmkln,kln->", a, hessian, b) for a in (v, w) for b in (v, w)])
    assert torch.allclose(plane(at, [v, w])[1].flatten(), wanted, rtol=1e-10, atol=1e-10)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_what_it_cannot_take_is_refused() -> None:
    model = mlp()
    for message, options in {
        "lr must be": {"lr": -1.0},
        "directions must be": {"directions": 0},
        "halvings must be": {"halvings": 1.5},
        "unknown law": {"law": "sphere"},
        "damping must be": {"damping": float("nan")},
    }.items():
        with pytest.raises(mupass.OptimizerError, match=message):
            mupass.FoMoH(model, **options)
    before = [p.clone() for p in model.parameters()]
    for message, closure in {
        "needs a closure": None,
        "tensor of one number, not float": lambda: loss_of(model)().item(),
        "does not depend": lambda: torch.ones(()),
        "no forward derivative": lambda: F.cross_entropy(Reverse.apply(model(X)), Y),
        "no curvature": lambda: model(X).sum() * 0 + model[-1].bias.sum(),
    }.items():
        with pytest.raises(mupass.OptimizerError, match=message):
            mupass.FoMoH(model, damping=0.0).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    state = mupass.FoMoH(model, directions=2).state_dict()
    with pytest.raises(mupass.OptimizerError, match="not a state of FoMoH"):
        mupass.FoMoH(model, directions=3).load_state_dict(state)
    with pytest.raises(mupass.OptimizerError, match="frozen"):
        mupass.FoMoH(frozen(model))
    with pytest.raises(mupass.PlanError):
        mupass.FoMoH(nn.Linear(3, 3))


def test_a_loss_that_is_not_finite_is_skipped() -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    optimizer = mupass.FoMoH(model)
    optimizer.step(lambda: loss_of(model)() * float("nan"))
    assert optimizer.stats() == {"steps": 0, "skipped_steps": 1}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
