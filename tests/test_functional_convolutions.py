"""K-FAC on kernels that code gives to functions of convolution, also in a shape of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, moved
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WIDTH, BASE = 8, 4
OPTIONS = {"damping_floor": 0.0, **PLAIN}


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def loss(output: Tensor) -> Tensor:
    """One term a sample."""
    return (output - 1).square().flatten(1).sum(1).mean()


def stepped(
    build: Callable[[], nn.Module], x: Tensor, compiled: bool = False, **options: Any
) -> tuple[Any, Any, Any]:
    """The model at its start, what a step moved, and the optimizer after it."""
    torch.manual_seed(0)
    net: Any = mupass.transform(build().double(), x, base=BASE)
    optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS, **options)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    loss(run(x)).backward()
    return net, moved(net, optimizer.step), optimizer


# Functional convolutions -----------------------------------------------------------------------------------

KERNELS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {"padding": 1}),
    "1d same": (1, {"padding": "same", "dilation": 2}),
    "2d": (2, {"stride": 2, "padding": (1, 0), "groups": 2}),
    "3d": (3, {"stride": (1, 2, 1)}),
    "1d transposed": (1, {"stride": 2, "padding": 1, "output_padding": 1}),
    "2d transposed": (2, {"dilation": 2, "groups": 2}),
}


class Convolved(nn.Module):
    """A convolution as a module, or as a function of its parameters."""

    def __init__(self, kind: str, functional: bool) -> None:
        super().__init__()
        rank, self.options = KERNELS[kind]
        transposed = "transposed" in kind
        self.functional = (
            getattr(F, f"conv{'_transpose' if transposed else ''}{rank}d") if functional else None
        )
        self.inp = getattr(nn, f"Conv{rank}d")(2, WIDTH, 1)
        conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
        self.conv = conv(WIDTH, WIDTH, 3, **self.options)
        self.out = getattr(nn, f"Conv{rank}d")(WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        if self.functional:
            x = self.functional(x, self.conv.weight, self.conv.bias, **self.options)
        else:
            x = self.conv(x)
        return self.out(torch.tanh(x)).flatten(2).mean(2)


@pytest.mark.sample(*(f"{kind}-eager" for kind in KERNELS))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KERNELS)
def test_functional_convolutions_are_the_modules(kind: str, compiled: bool) -> None:
    x = data(3, 2, *[5] * KERNELS[kind][0])
    module, function = (stepped(lambda f=f: Convolved(kind, f), x, compiled) for f in (False, True))
    places = {place.module for place in function[2]._cover.layers}
    assert "conv" not in places and None in places  # tapped inside the parameter
    for name, want in module[1].items():
        assert want.norm() > 0
        torch.testing.assert_close(function[1][name], want, rtol=1e-9, atol=1e-12)


class Matrix(nn.Module):
    """A matrix as a kernel of one position, and a kernel that loses its axis of one channel on the way."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.inp, self.mix = nn.Conv1d(2, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1, bias=False)
        self.each = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        if not plain:
            self.mix.weight = nn.Parameter(self.mix.weight.detach().squeeze(2))
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        if self.plain:
            return self.out(torch.tanh(self.each(self.mix(x))).mean(2))
        x = F.conv1d(x, self.mix.weight[:, :, None])
        kernel = self.each.weight.squeeze(1)
        x = F.conv1d(x, kernel.unsqueeze(1), self.each.bias, groups=WIDTH)
        return self.out(torch.tanh(x).mean(2))


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_kernels_in_another_shape_are_the_modules(compiled: bool) -> None:
    x = data(3, 2, 6)
    (_, want, _), (net, got, optimizer) = (stepped(lambda p=p: Matrix(p), x, compiled) for p in (True, False))
    assert all(covered.treatment.startswith("kfac") for covered in optimizer.coverage())
    for name, step in want.items():
        assert step.norm() > 0
        torch.testing.assert_close(got[name], step.view_as(got[name]), rtol=1e-9, atol=1e-12)


class Squared(nn.Module):
    """Layers whose weights K-FAC does not take, and their biases; or plain layers with the same weights."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.conv, self.mix, self.out = nn.Conv1d(2, WIDTH, 3), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        if plain:
            for layer in (self.conv, self.mix):
                layer.weight = nn.Parameter(layer.weight.detach().double().square())

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.out(torch.tanh(self.mix(torch.tanh(self.conv(x)).mT)).mean(1))
        x = torch.tanh(F.conv1d(x, self.conv.weight**2, self.conv.bias)).mT
        return self.out(torch.tanh(F.linear(x, self.mix.weight**2, self.mix.bias)).mean(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_a_bias_beside_a_weight_that_is_not_taken_has_its_own_factor(compiled: bool, sharing: str) -> None:
    x = data(3, 2, 6)
    (_, want, _), (_, got, optimizer) = (
        stepped(lambda p=p: Squared(p), x, compiled, sharing=sharing) for p in (True, False)
    )
    treatments = {covered.parameter: covered.treatment for covered in optimizer.coverage()}
    for layer in ("conv", "mix"):
        assert treatments[f"{layer}.weight"] == "adamw" and treatments[f"{layer}.bias"] == "kfac shift"
        assert want[f"{layer}.bias"].norm() > 0
        torch.testing.assert_close(got[f"{layer}.bias"], want[f"{layer}.bias"], rtol=1e-9, atol=1e-12)


def test_a_bias_that_no_function_takes_by_itself_falls_back_by_name() -> None:
    class Added(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight**2)

    net = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), Added(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    net = mupass.transform(net.double(), data(4, 5), base=BASE)
    reasons = {c.parameter: c.reason for c in mupass.KFAC(net).coverage() if c.treatment == "adamw"}
    assert list(reasons) == ["2.weight", "2.bias"]
    assert "K-FAC does not take as one weight" in reasons["2.bias"]
