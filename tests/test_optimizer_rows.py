"""One row is all that mupass must be told of an optimizer: a made-up one goes through every stage."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import mupass
from mupass._optim.schedules import _family
from mupass._scales.optimizers import GRADIENT, OPTIMIZERS, OptimizerRow, OptimizerSpec, Recipe, Step
from mupass._scales.scales import scales
from mupass._study.causes import spec_of

PACKAGE = Path(mupass.__file__).parent


class UnitGradient(torch.optim.Optimizer):
    """Steps of Frobenius norm ``lr``: each gradient divided by its own norm."""

    def __init__(self, params: object, lr: float = 0.1, floor: float = 1e-12) -> None:
        super().__init__(params, {"lr": lr, "floor": floor})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad / (p.grad.norm() + group["floor"])


ROW = OptimizerRow(
    "unit_gradient",
    source="made up",
    step=Step(0.5, 0.5),  # delta h^T / (|delta| |h|)
    columns={"lr": "rate of the unit"},
    epsilon=None,
    in_summary=True,
    torch_class="UnitGradient",
    recipe=Recipe(f"{__name__}:UnitGradient", {"lr": 0.1, "floor": 1e-12}),
    cause_if_growing="made up: it grows",
)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> OptimizerRow:
    monkeypatch.setitem(OPTIMIZERS, ROW.name, ROW)
    return ROW


def network(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 8), torch.randint(0, 4, (16,)))]


def test_a_made_up_row_in_plan_groups_and_report(row: OptimizerRow) -> None:
    undecided = mupass.transform(network(), batches()[0][0], base=16)
    assert "lr unit_gradient" in str(undecided.mupass_plan)
    model = mupass.transform(network(), batches()[0][0], base=16, optimizer=row.name)
    assert "rate of the unit" in str(model.mupass_plan)
    # A matrix of one direction and Frobenius norm 1 moves the output by |delta| |h|, as Muon's.
    wanted = {"0.weight": 2.0, "2.weight": 1.0, "4.weight": 0.5}
    groups = mupass.param_groups(model, 0.1, optimizer=row.name)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, factor in wanted.items():
        assert model.mupass_plan[name].scales.lr == pytest.approx(factor)
        assert rates[id(model.get_parameter(name))] == pytest.approx(0.1 * factor)
    optimizer = UnitGradient(groups)
    assert _family(optimizer) == row.name
    assert spec_of(optimizer, None) == OptimizerSpec(row.name)
    with pytest.raises(mupass.MupassError, match="eps belongs to adam and adamw, not to unit_gradient"):
        mupass.param_groups(model, 0.1, optimizer=row.name, eps=1e-8)
    report = mupass.analyze(network(), batches()[0][0]).report(row.name)
    assert row.name in str(report)


def test_a_made_up_row_in_studies(row: OptimizerRow, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"lr": [0.05, 0.1], "floor": [1e-12]}
    found = mupass.sweep(network, batches(), grid, [32, 64], optimizer=row.name, steps=2)
    assert len(found.trials) == 4 and row.name in str(found)
    with pytest.raises(mupass.MupassError, match="the optimizer takes no momentum; it takes lr, floor"):
        mupass.sweep(network(), batches(), {"momentum": [0.9]}, [32], optimizer=row.name)
    with pytest.raises(mupass.MupassError, match="unknown optimizer 'made_up'; known: sgd, .*unit_gradient"):
        mupass.sweep(network(), batches(), [0.1], [32], optimizer="made_up")
    widths = [64, 128, 256]
    right = mupass.coord_check(network, batches(), widths=widths, optimizer=row.name, lr=0.05, steps=2)
    assert right.ok, str(right)
    # The rates of SGD are others, and the check sees that updates follow the width.
    monkeypatch.setitem(OPTIMIZERS, row.name, replace(row, step=GRADIENT))
    wrong = mupass.coord_check(network, batches(), widths=widths, optimizer=row.name, lr=0.05, steps=2)
    assert not wrong.ok and row.cause_if_growing in str(wrong)


def test_every_row_says_where_it_is_from_and_its_recipe_is_one_of_the_optimizers() -> None:
    for name, known in OPTIMIZERS.items():
        assert known.name == name
        assert re.search(r"arXiv \d{4}\.\d{5}", known.source), name
        assert {*known.options, *known.step_powers, *known.fixed} <= set(OptimizerSpec.__dataclass_fields__)


def test_no_stage_after_the_rows_asks_for_the_name_of_an_optimizer() -> None:
    # Files of single optimizers and of the fallback implement what they name.
    stages = ("_scales", "_taps", "_roles", "_capture", "_dims", "_study", "_runs", "_cli", "_resize")
    names = "|".join(OPTIMIZERS)
    compared = re.compile(rf'(?:[!=]=|\bin) ?[({{\[]?"(?:{names})"')
    for stage in stages:
        for path in (PACKAGE / stage).rglob("*.py"):
            assert not compared.search(path.read_text(encoding="utf-8")), path
    for path in ("groups.py", "schedules.py"):
        assert not compared.search((PACKAGE / "_optim" / path).read_text(encoding="utf-8")), path


@pytest.mark.parametrize(("graft", "like"), [("sgd", "sgd"), ("adam", "adam"), ("spectral", "muon")])
def test_a_length_under_a_grafted_shampoo_follows_the_graft(graft: str, like: str) -> None:
    length = mupass.Geometry("g", (4,), (4.0,), (False,), ("out",), "scalar", direction="v", m_direction=16.0)
    grafted = scales(length, OptimizerSpec("shampoo", e=0.7, graft=graft))
    assert grafted.lr == scales(length, OptimizerSpec(like)).lr
