"""Models that take derivatives in their forward pass: roles are those of the function differentiated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import randn

import mupass


class Energy(nn.Module):
    """The energy of a cloud of points by attention, or derivatives of it."""

    def __init__(self, how: str, heads: int = 4, head_dim: int = 8):
        super().__init__()
        d = heads * head_dim
        self.how, self.heads = how, heads
        self.enter, self.norm = nn.Linear(3, d), nn.LayerNorm(d)
        self.qkv, self.mix = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.grow, self.shrink, self.head = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Linear(d, 1)

    def energy(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.mix((weights @ v).transpose(-3, -2).flatten(-2))
        x = x + self.shrink(F.silu(self.grow(x)))
        return self.head(x).sum((-1, -2))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "value":
            return self.energy(x)
        if self.how == "vmap":
            return torch.func.vmap(self.energy)(x)
        if self.how == "jvp":
            return torch.func.jvp(self.energy, (x,), (x,))[1]
        if self.how == "vjp":
            value, back = torch.func.vjp(self.energy, x)
            return back(torch.ones_like(value))[0]
        if self.how == "autograd.grad":
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        return torch.func.vmap(getattr(torch.func, self.how)(self.energy))(x)


WAYS = ["vmap", "jvp", "vjp", "grad", "jacrev", "jacfwd", "hessian", "autograd.grad"]


@pytest.mark.sample("vmap", "autograd.grad")
@pytest.mark.parametrize("how", WAYS)
def test_a_derivative_leaves_every_verdict_as_it_is(how: str) -> None:
    x = randn(2, 5, 3)
    plain, derived = (mupass.analyze(Energy(way), x, base=8) for way in ("value", how))
    for one, other in zip(plain.geometries, derived.geometries, strict=True):
        assert (other.name, other.role, other.infinite) == (one.name, one.role, one.infinite)
        assert (other.fan_in_axes, other.fan_out_axes) == (one.fan_in_axes, one.fan_out_axes), one.name
        assert (other.base_shape, other.readout_uses) == (one.base_shape, ()), one.name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jvp", "grad"])
def test_the_depth_of_a_model_that_takes_derivatives_is_refused_by_name(how: str) -> None:
    x = randn(2, 5, 3)
    mupass.transform(Energy("value"), x, base=8, depth=4)
    with pytest.raises(
        mupass.TransformError, match=r"takes derivatives \(torch\.func, torch\.autograd\.grad\)"
    ):
        mupass.transform(Energy(how), x, base=8, depth=16)


class Convolutions(nn.Module):
    """The slope of a convolutional network in its data, by torch.func."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, width, 3, padding=1), nn.GroupNorm(1, width)
        self.second, self.last = nn.Conv1d(width, width, 3, padding=1), nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def value(self, z: Tensor) -> Tensor:
        y = F.relu(self.second(F.gelu(self.norm(self.first(z[None])))))
        return self.head(self.last(y[..., 1:].mean(-1)))[0, 0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(self.value))(x)


def test_convolutions_and_norms_run_backwards() -> None:
    analysis = mupass.analyze(Convolutions(), randn(3, 2, 8), base=4)
    roles = {g.name: g.role for g in analysis.geometries if g.role not in ("vector", "scalar")}
    assert roles == {"first.weight": "input", "second.weight": "hidden", "head.weight": "output"}
    assert not any(any(g.ambiguous) for g in analysis.geometries)


class Odd(nn.Module):
    """An operator without a rule under a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        def value(z: Tensor) -> Tensor:
            y = self.enter(z)
            return self.head(torch.linalg.householder_product(y[:, None], z[:1])[:, 0])

        return torch.func.vmap(value)(x)


def test_what_has_no_rule_under_a_transform_is_refused_by_name() -> None:
    with pytest.raises(
        mupass.InferenceError, match=r"householder_product.*no dimension rule.*torch\.func"
    ) as caught:
        mupass.analyze(Odd(), randn(2, 3))
    assert "take the derivative outside" in str(caught.value)


def test_what_fails_under_a_transform_says_so() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda z: self.enter(z) * z.sum().item())(x)

    with pytest.raises(mupass.CaptureError, match=r"under a transform of torch\.func \(vmap, grad, jvp\)"):
        mupass.analyze(Fails(), randn(2, 3))


def test_kfac_refuses_a_model_that_is_all_under_torch_func() -> None:
    # Its taps see nothing there: it would leave every weight at rest.
    torch.manual_seed(0)
    model, x = Energy("grad"), torch.randn(8, 4, 3)
    mupass.transform(model, x, base=16)
    optimizer = mupass.KFAC(model)
    with pytest.warns(mupass.MupassWarning), pytest.raises(mupass.OptimizerError, match="SOAP"):
        model(x).square().mean().backward()
        optimizer.step()
    with pytest.warns(mupass.MupassWarning, match="all go to adamw"):
        rest = mupass.KFAC(model, exclude=["*"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rest.zero_grad()
    model(x).square().mean().backward()
    rest.step()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "head.weight" in moved
