"""coord_check passes muP, fails the standard parameterization, and names a planted fault."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._check import coord_check

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


def batches(steps: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 12, generator=generator)
    return [(x, 1 + 0.5 * torch.randn(16, 4, generator=generator))] * steps


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac", "shampoo"])
def test_mup_passes_and_standard_fails(optimizer: str) -> None:
    mup = coord_check(mlp(), batches(), loss, optimizer=optimizer)
    assert mup.ok and mup.verdict().startswith("PASS"), str(mup)
    assert mup.widths == (64, 128, 256)
    standard = coord_check(mlp(), batches(), loss, optimizer=optimizer, parameterization="standard")
    assert not standard.ok and standard.verdict().startswith("FAIL"), str(standard)




def test_a_planted_fault_is_named_with_its_power() -> None:
    def plant(model: nn.Module) -> nn.Module:
        model[2].register_forward_hook(lambda m, a, y: y * m.in_features**0.5)
        return model

    found = coord_check(mlp(), batches(), loss, optimizer="adam", prepare=plant)
    assert not found.ok
    assert found.failures[0].module in {"2", "4", "(model)"} and found.failures[0].slope > 0.2
    assert "grows" in found.verdict() or "too large" in found.verdict()


def test_report_and_picture(tmp_path: Path) -> None:
    found = coord_check(mlp(), batches(1), loss, seeds=1)
    assert "slopes in width" in str(found) and found.html().startswith("<!doctype html>")
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_refusals() -> None:
    with pytest.raises(mupass.MupassError, match="two scales"):
        coord_check(mlp(), batches(), loss, scales=(1,))
    with pytest.raises(mupass.MupassError, match="one batch"):
        coord_check(mlp(), [], loss)
    with pytest.raises(mupass.MupassError, match="unknown optimizer 'lion'"):
        coord_check(mlp(), batches(), loss, optimizer="lion")
