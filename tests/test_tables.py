"""K-FAC on tables that are added to activations or multiplied with them: updates against dense factors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_kfac import LR, PLAIN, RHO, damping, moved, power
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WIDTH, BASE = 8, 4
OPTIONS: dict[str, Any] = {"damping_floor": 0.0, **PLAIN}
# Shape of the table, its features and its rows, and what it is joined to.
TABLES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "positions": ((5, WIDTH), (1,), (0,), "add"),
    "positions of one batch": ((1, 5, WIDTH), (2,), (1,), "add"),
    "image": ((1, WIDTH, 2, 3), (1,), (2, 3), "add"),
    "gains": ((5, WIDTH), (1,), (0,), "mul"),
    "numbers to features": ((5, WIDTH), (1,), (0,), "numbers"),
    "gains of channels": ((WIDTH, 2, 3), (0,), (1, 2), "mul"),
}


class Tabled(nn.Module):
    """A table between two layers; ``copies`` stand for it in the reference, one for each sample."""

    copies: Tensor | None = None

    def __init__(self, kind: str, width: int = WIDTH) -> None:
        super().__init__()
        shape, _, rows, self.how = TABLES[kind]
        self.image = len(rows) == 2
        self.table = nn.Parameter(torch.randn([width if size == WIDTH else size for size in shape]))
        self.inp = nn.Conv2d(3, width, 1) if self.image else nn.Linear(3, width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.copies is None else self.copies
        if self.how == "numbers":
            h = x[..., :1] * table
        else:
            h = self.inp(x)
            h = h + table if self.how == "add" else table * h
        h = h.flatten(2).mT if self.image else h
        return self.out(torch.tanh(self.mix(torch.tanh(h))).mean(1))  # one term a sample


def data(kind: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn((4, 3, 2, 3) if len(TABLES[kind][2]) == 2 else (4, 5, 3), dtype=torch.float64)


def terms(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - 1).square().sum(1)


@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"damping_mode": "absolute"}], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", TABLES)
def test_update_equals_the_dense_formula(kind: str, compiled: bool, options: dict[str, Any]) -> None:
    x, (_, features, rows, _) = data(kind), TABLES[kind]
    torch.manual_seed(0)
    net: Any = mupass.transform(Tabled(kind).double(), x, base=BASE)
    plain: Any = Tabled(kind).double()
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS, **options)
    treatments = {covered.parameter: covered.treatment for covered in optimizer.coverage()}
    assert treatments["table"] == ("kfac table shift" if TABLES[kind][3] == "add" else "kfac table gain")
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    terms(run, x).mean().backward()
    got = moved(net, optimizer.step)["table"]
    # Every entry of the output has a copy of its table.
    whole = plain.table.detach().expand(len(x), *plain.table.shape[-len(x.shape) + 1 :])
    plain.copies = whole.clone().requires_grad_()
    deltas = torch.stack(
        [torch.autograd.grad(t, plain.copies, retain_graph=True)[0] for t in terms(plain, x)]
    )
    d = deltas.movedim(features[0] - plain.table.dim(), -1).flatten(0, -2)
    count = plain.table.numel() // WIDTH
    a, b = torch.eye(count, dtype=x.dtype) / count, d.T @ d / len(x)
    order = [axis for axis in range(plain.table.dim()) if axis not in (*features, *rows)]
    gradient = deltas.sum((0, 1)).reshape(plain.table.shape) / len(x)
    flat = gradient.permute(*order, *features, *rows).reshape(WIDTH, count)
    rho_a, rho_b = damping(options.get("damping_mode", "trace"), a, b, 1, 2)
    want = -LR * power(b, rho_b, 1) @ flat @ power(a, rho_a, 1)
    found = got.permute(*order, *features, *rows).reshape(WIDTH, count)
    assert (found - want).norm() < 1e-8 * want.norm()


def test_two_micro_batches_equal_one_batch() -> None:
    x, steps = data("positions"), []
    for parts in (1, 2):
        torch.manual_seed(0)
        net = mupass.transform(Tabled("positions").double(), x, base=BASE)
        optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS)
        for part in x.chunk(parts):
            (terms(net, part).sum() / len(x)).backward()
        steps.append(moved(net, optimizer.step))
    for name, want in steps[0].items():
        torch.testing.assert_close(steps[1][name], want, rtol=1e-9, atol=1e-12)


class Masked(nn.Linear):
    """A weight that is multiplied with a constant mask is no table."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.register_buffer("mask", torch.ones(width, width).tril())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def test_a_masked_weight_and_a_sliced_table_fall_back_by_name() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, WIDTH))
            self.inp, self.mask, self.out = nn.Linear(3, WIDTH), Masked(WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mask(torch.tanh(self.inp(x) + self.table[: x.shape[1]])))).mean(1)

    x = data("positions")
    net = mupass.transform(Sliced().double(), x, base=BASE)
    optimizer = mupass.KFAC(copy.deepcopy(net))
    reasons = {c.parameter: c.reason for c in optimizer.coverage() if c.treatment == "adamw"}
    assert list(reasons) == ["table", "mask.weight"]
    assert "aten.slice" in reasons["table"] and "no activation" in reasons["mask.weight"]
