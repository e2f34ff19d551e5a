"""K-FAC on grouped products: each expert as a layer of its own that reads the rows of its group."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, moved
from torch import Tensor, nn

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products on CPU"),
]
WIDTH, BASE, EXPERTS = 16, 8, 3
OPTIONS: dict[str, Any] = {"damping_floor": 0.0, **PLAIN}


class Grouped(nn.Module):
    """Two grouped products, one with a transposed weight; rows of a sample all go to one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / math.sqrt(WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / math.sqrt(2 * WIDTH))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        h = torch.tanh(F.grouped_mm(h, self.up.transpose(1, 2), offs=ends))
        return self.out(torch.tanh(F.grouped_mm(h, self.down, offs=ends)))


class Apart(nn.Module):
    """The same with a layer for each expert, called where it has rows."""

    def __init__(self, source: Grouped) -> None:
        super().__init__()
        self.inp, self.out = copy.deepcopy(source.inp), copy.deepcopy(source.out)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))
        with torch.no_grad():
            for i in range(EXPERTS):
                self.up[i].weight.copy_(source.up[i])
                self.down[i].weight.copy_(source.down[i].T)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        h, start, parts = torch.tanh(self.inp(x)), 0, []
        for i, end in enumerate(ends.tolist()):
            if end > start:
                parts.append(torch.tanh(self.down[i](torch.tanh(self.up[i](h[start:end])))))
            start = end
        return self.out(torch.cat(parts))


def batches() -> list[tuple[Tensor, Tensor]]:
    """In the second one an expert has no row; in all of them experts have different numbers."""
    torch.manual_seed(1)
    ends = [[2, 7, 12], [4, 4, 12], [3, 8, 12]]
    return [(torch.randn(12, 5), torch.tensor(end, dtype=torch.int32)) for end in ends]


def run(net: Any, step: Any, dtype: torch.dtype, **options: Any) -> tuple[list[dict[str, Tensor]], Any]:
    optimizer = mupass.KFAC(net, LR, RHO, **OPTIONS, **options)
    steps = []
    for x, ends in batches():
        optimizer.zero_grad()
        (step(x.to(dtype), ends) - 1).square().sum(1).mean().backward()
        steps.append(moved(net, optimizer.step))
    return steps, optimizer


@pytest.mark.parametrize("options", [{}, {"block_size": 8}, {"factor_every": 2}], ids=str)
def test_grouped_experts_move_as_layers_of_their_own(options: dict[str, Any]) -> None:
    """Grouped products are there in single precision only; the layers are in double precision."""
    torch.manual_seed(0)
    x, ends = batches()[0]
    net = mupass.transform(Grouped(), (x, ends), base=BASE)
    plain = mupass.transform(Apart(Grouped()), (x, ends), base=BASE)
    plain.load_state_dict(Apart(net).state_dict())
    plain = plain.double()
    (got, optimizer), (want, _) = (
        run(net, net, torch.float32, **options),
        run(plain, plain, torch.float64, **options),
    )
    treatments = {covered.parameter: covered.treatment for covered in optimizer.coverage()}
    assert treatments["up"] == treatments["down"] == "kfac grouped"
    for mine, theirs in zip(got, want, strict=True):
        for i in range(EXPERTS):
            for found, layer in ((mine["up"][i], f"up.{i}.weight"), (mine["down"][i].T, f"down.{i}.weight")):
                assert (found - theirs[layer]).norm() <= 2e-4 * theirs[layer].norm(), layer
        assert (mine["inp.weight"] - theirs["inp.weight"]).norm() < 2e-4 * theirs["inp.weight"].norm()


@pytest.mark.slow
def test_grouped_products_compile_in_one_graph() -> None:
    """In half precision, which is all that torch compiles them for."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(Grouped().bfloat16(), (batches()[0][0].bfloat16(), batches()[0][1]), base=BASE)
        step = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        found.append(run(net, step, torch.bfloat16)[0])
    for eager, compiled in zip(*found, strict=True):
        for name in ("up", "down"):
            difference = (eager[name] - compiled[name]).float().norm()
            assert 0 < eager[name].float().norm() and difference < 0.02 * eager[name].float().norm()


def test_ekfac_leaves_grouped_experts_to_kfac_by_name() -> None:
    net = mupass.transform(Grouped(), batches()[0], base=BASE)
    steps, optimizer = run(net, net, torch.float32, ekfac=True)
    found = {covered.parameter: (covered.treatment, covered.reason) for covered in optimizer.coverage()}
    assert found["up"] == ("kfac grouped", "not rescaled: its rows come group by group")
    assert all(step["up"].norm() > 0 for step in steps)
