"""transfer tunes a narrow copy, and makes the full model with what it found."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_sweep import data
from torch import nn

import mupass


def mlp(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    return nn.Sequential(*layers)


GRID = {"lr": [2.0**p for p in range(-10, -2)]}
QUICK = {"steps": 10, "proxy": 32, "progress": False}


def test_the_full_model_has_the_hyperparameters_of_the_proxy() -> None:
    model = mlp()
    found = mupass.transfer(model, data(), grid=GRID, optimizer="adam", **QUICK)
    assert found.model is model and (found.proxy_width, found.width) == (32, 128)
    lr = found.hyperparameters["lr"]
    proxy = mupass.sweep(mlp(), data(), GRID, [32], optimizer="adam", steps=10, progress=False)
    assert found.search == proxy and lr == proxy.best()["lr"]
    factors = {n: g["lr"] / lr for g in found.optimizer.param_groups for n, p in model.named_parameters()
               if any(p is q for q in g["params"])}  # fmt: skip
    assert factors["0.weight"] == 1 and factors["2.weight"] == factors["4.weight"] == 0.25
    x, y = data(1)[0]
    before = nn.functional.cross_entropy(model(x), y)
    before.backward()
    found.optimizer.step()
    assert nn.functional.cross_entropy(model(x), y) < before


def test_a_target_width_is_built() -> None:
    model = mlp(64)
    before = [p.clone() for p in model.parameters()]
    found = mupass.transfer(model, data(), 256, grid=[0.01, 0.02, 0.04], optimizer="sgd", **QUICK)
    assert found.width == 256 and found.model[2].weight.shape == (256, 256)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not hasattr(model, "mupass_plan")
    assert found.model.mupass_plan["2.weight"].geometry.base_shape == (32, 32)


def test_a_planned_optimizer_with_two_hyperparameters(tmp_path: Path) -> None:
    found = mupass.transfer(
        mlp(),
        data(),
        grid={"lr": [0.1, 0.3], "damping": [0.01, 0.1]},
        optimizer=lambda model, lr, damping: mupass.KFAC(model, lr=lr, damping=damping),
        **QUICK,
    )
    assert isinstance(found.optimizer, mupass.KFAC)
    assert set(found.hyperparameters) == {"lr", "damping"}
    assert found.optimizer.param_groups[0]["damping"] == found.hyperparameters["damping"]
    assert "NOT BRACKETED" in found.verdict()
    record = json.loads(Path(found.report(tmp_path / "found.json")).read_text())
    assert record["hyperparameters"] == found.hyperparameters and len(record["trials"]) == 4
    assert record["bracketed"] is False and record["proxy_width"] == 32
    page = Path(found.report(tmp_path / "found.html")).read_text()
    assert "Transfer" in page and "tuned at width 32" in page
    assert found.report() == str(found)


def test_optuna_searches_and_goes_on_after_a_break(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    settings = {"grid": {"lr": [1e-4, 1.0]}, "optimizer": "adam", "driver": "optuna", **QUICK}
    store = tmp_path / "runs.db"
    short = mupass.transfer(mlp(), data(), trials=6, store=store, **settings)
    long = mupass.transfer(mlp(), data(), trials=15, store=store, **settings)
    assert long.search.trials[:6] == short.search.trials and len(long.search.trials) == 15
    assert long.search == mupass.transfer(mlp(), data(), trials=15, **settings).search
    assert long.search.driver == "optuna" and all(1e-4 <= t.point[0][1] <= 1 for t in long.search.trials)
    grid = mupass.sweep(mlp(), data(), [10.0**-p for p in range(5)], [32], steps=10, progress=False)
    assert min(t.loss for t in long.search.trials) <= min(t.loss for t in grid.trials) * 1.25


def test_what_cannot_be_transferred_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setitem(sys.modules, "optuna", None)
    for message, arguments in {
        "standard parameterization": {"parameterization": "standard"},
        "must be narrower": {"proxy": 128},
        "unknown driver": {"driver": "random"},
        "needs Optuna": {"driver": "optuna"},
        "every run on the proxy diverged": {"grid": [1e9], "optimizer": "sgd"},
    }.items():
        with pytest.raises(mupass.StudyError, match=message):
            mupass.transfer(model, data(), **{"grid": [0.1, 0.2], **QUICK, **arguments})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not hasattr(model, "mupass_plan")
