"""Scales for SGD and Adam equal those of the ``mup`` package, up to the gauge.

``mup`` keeps a forward multiplier at the readout: ``y = W' h / m``. mupass has none: ``y = W h``. The same
function needs ``W = W'/m``, hence ``std = std'/m`` and, for one step, ``dW = dW'/m``:

* SGD: ``dW' = -lr' dL/dW'`` and ``dL/dW' = (dL/dW)/m``, so ``lr = lr'/m**2``;
* Adam: ``dW'`` has the size of ``lr'`` whatever the gradient, so ``lr = lr'/m``.

All other parameters are in the same gauge. No formula of ``mup`` is copied: multipliers, values and
learning rates are read off its own modules and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._rewrite import rescale
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.plan import Plan
from mupass._transform import make_plan

pytest.importorskip("mup")
from mup import MuAdam, MuReadout, MuSGD, set_base_shapes  # noqa: E402

pytestmark = pytest.mark.slow
BASE, DELTA = 32, 48


def mlp(width: int, readout: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    # Two widths in ratio 1:2, so that hidden layers are not square.
    return nn.Sequential(
        nn.Linear(20, width),
        nn.Tanh(),
        nn.Linear(width, 2 * width),
        nn.Tanh(),
        nn.Linear(2 * width, width),
        nn.Tanh(),
        readout(width, 10),
    )


def cnn(width: int, readout: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),  # BatchNorm would make a bias' gradient mere rounding
        nn.BatchNorm2d(width),
        nn.Tanh(),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * width * 9, width),
        nn.Tanh(),
        readout(width, 10),
    )


MODELS = {"mlp": (mlp, torch.Size([6, 20])), "cnn": (cnn, torch.Size([6, 3, 8, 8]))}
Build = Callable[..., nn.Sequential]


def both(
    build: Build, shape: torch.Size, width: int, optimizer: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module, Plan]:
    """The same initial draw under mupass and under ``mup``, and mupass's plan."""
    torch.manual_seed(0)
    ours = build(width).to(dtype)
    theirs = build(width, MuReadout).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    set_base_shapes(theirs, build(BASE, MuReadout), delta=build(DELTA, MuReadout))
    analysis = mupass.analyze(ours, torch.zeros(shape, dtype=dtype), base=build(BASE))
    plan = make_plan(ours, analysis, OptimizerSpec(optimizer))
    rescale(ours, {entry.geometry.name: entry.init_factor for entry in plan.entries})
    return ours, theirs, plan


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, float]]:
    """Learning rate of every parameter, read off the optimizer's groups."""
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        yield from ((names[p], group["lr"]) for p in group["params"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_learning_rates(name: str, width: int, optimizer: str) -> None:
    build, shape = MODELS[name]
    _, theirs, plan = both(build, shape, width, optimizer)
    wrapped = (
        MuSGD(theirs.parameters(), lr=1.0) if optimizer == "sgd" else MuAdam(theirs.parameters(), lr=1.0)
    )
    readout = list(theirs.children())[-1]
    assert isinstance(readout, MuReadout)
    multiplier = readout.width_mult()
    gauge = multiplier**2 if optimizer == "sgd" else multiplier
    found = dict(by_name(theirs, wrapped))
    assert set(found) == set(plan)
    last = f"{len(list(theirs.children())) - 1}.weight"
    for parameter, lr in found.items():
        expected = lr / gauge if parameter == last else lr
        assert plan[parameter].scales.lr == pytest.approx(expected, rel=1e-12), parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [16, 64, 256])
def test_initial_values(name: str, width: int) -> None:
    # Both start from one draw, so values must agree one by one, biases included.
    build, shape = MODELS[name]
    ours, theirs, _ = both(build, shape, width, "sgd")
    readout = list(theirs.children())[-1]
    assert isinstance(readout, MuReadout)
    for (parameter, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        expected = other / readout.width_mult() if other is readout.weight else other
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0, msg=parameter)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> list[Tensor]:
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        outputs.append(out.detach())
        torch.autograd.backward(nn.functional.mse_loss(out, y))
        optimizer.step()
    return outputs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_computes_the_same_function(name: str, optimizer: str) -> None:
    # The gauge is only a change of variables: outputs agree step by step, in float64.
    build, shape = MODELS[name]
    ours, theirs, plan = both(build, shape, 128, optimizer, torch.float64)
    torch.manual_seed(1)
    x, y = torch.randn(shape).double(), torch.randn(shape[0], 10).double()
    lr = 0.05 if optimizer == "sgd" else 0.003
    groups = [{"params": [p], "lr": lr * plan[n].scales.lr} for n, p in ours.named_parameters()]
    if optimizer == "sgd":
        mine_opt: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        their_opt = MuSGD(theirs.parameters(), lr=lr, momentum=0.9)
    else:
        mine_opt = torch.optim.Adam(groups, lr=lr, eps=0.0)
        their_opt = MuAdam(theirs.parameters(), lr=lr, eps=0.0)
    first, second = train(ours, mine_opt, x, y, 5), train(theirs, their_opt, x, y, 5)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f"step {step}")
    assert (first[0] - first[-1]).abs().max() > 0.05  # it did move
