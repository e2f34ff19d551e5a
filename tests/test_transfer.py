"""transfer tunes a narrow copy, and makes the full model with what it found."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep import data
from torch import Tensor, nn

import mupass


def mlp(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    return nn.Sequential(*layers)


GRID = {"lr": [2.0**p for p in range(-10, -2)]}
QUICK = {"steps": 10, "proxy": 32, "progress": False}


@pytest.mark.slow
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


@pytest.mark.slow
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


def held_out(model: nn.Module) -> Tensor:
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))


def plain_sgd(model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(mupass.param_groups(model, lr, optimizer="sgd"), momentum=momentum)


@pytest.mark.sample("adam")
@pytest.mark.parametrize(
    ("optimizer", "grid"),
    [
        ("adam", GRID),
        ("shampoo", {"lr": [2.0**p for p in range(-9, 1, 3)], "damping": [1e-4, 1e-2, 1.0]}),
        ("kfac", {"lr": [2.0**p for p in range(-8, 0)], "damping": [1e-2, 1e-1, 1.0]}),
        (plain_sgd, {"lr": [2.0**p for p in range(-7, 2)], "momentum": [0.1, 0.5, 0.9]}),
    ],
    ids=["adam", "shampoo", "kfac", "sgd"],
)
def test_gradients_find_what_a_grid_finds(optimizer: Any, grid: dict[str, list[float]]) -> None:
    settings = {"grid": grid, "optimizer": optimizer, "evaluate": held_out, **QUICK, "steps": 15}
    searched = mupass.transfer(mlp(), data(), driver="gradient", trials=20, **settings)
    tried = mupass.transfer(mlp(), data(), **settings)
    lowest, of_grid = (min(t.loss for t in found.search.trials) for found in (searched, tried))
    assert lowest <= of_grid * 1.01
    assert searched.search.driver == "gradient" and len(searched.search.trials) == 20
    # Trials may tie: where K-FAC's `kl_clip` bounds each step, the rate drops out of it.
    best = [dict(t.point) for t in searched.search.trials if t.loss == lowest]
    assert dict(searched.hyperparameters) in best
    assert searched.record()["driver"] == "gradient"
    for name, values in grid.items():
        assert min(values) * 0.999 <= searched.hyperparameters[name] <= max(values) * 1.001


@pytest.mark.slow
def test_a_gradient_search_goes_on_after_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"grid": GRID, "optimizer": "adam", "driver": "gradient", "seeds": 2, **QUICK}
    store = tmp_path / "runs.db"
    short = mupass.transfer(mlp(), data(), trials=3, store=store, **settings)
    long = mupass.transfer(mlp(), data(), trials=6, store=store, **settings)
    assert long.search.trials[:6] == short.search.trials and len(long.search.trials) == 12
    fresh = mupass.transfer(mlp(), data(), trials=6, **settings)
    assert fresh.search == long.search
    monkeypatch.setattr("mupass._study.descent.unrolled", None)  # all is in the store
    assert mupass.transfer(mlp(), data(), trials=6, store=store, **settings).search == long.search


def test_a_gradient_search_leaves_what_diverges() -> None:
    settings = {**QUICK, "optimizer": "sgd", "driver": "gradient", "trials": 14}
    found = mupass.transfer(mlp(), data(), grid=[1e-2, 1e12], **settings)
    losses = [t.loss for t in found.search.trials]
    assert math.isinf(losses[0]) and math.isfinite(min(losses)) and min(losses) < 1.3


@pytest.mark.slow
def test_the_initial_law_can_be_stated() -> None:
    before = mlp()[2].weight.std()
    settings = {"grid": [0.01, 0.02], "optimizer": "sgd", **QUICK}
    for init, factor in {"auto": 1.0, "constant": 0.5}.items():  # 1/sqrt(128/32)
        found = mupass.transfer(mlp(), data(), init=init, **settings)
        assert (found.model[2].weight.std() / before).item() == pytest.approx(factor)


def test_what_cannot_be_transferred_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setitem(sys.modules, "optuna", None)
    for message, arguments in {
        "standard parameterization": {"parameterization": "standard"},
        "must be narrower": {"proxy": 128},
        "unknown driver": {"driver": "random"},
        "needs Optuna": {"driver": "optuna"},
        "one process": {"driver": "gradient", "jobs": 2},
        "two different values": {"driver": "gradient", "grid": [0.1]},
        "must be below 1": {
            "driver": "gradient",
            "optimizer": plain_sgd,
            "grid": {"lr": [0.1, 0.2], "momentum": [0.5, 1.0]},
        },
        "trials must be at least 1": {"driver": "gradient", "trials": 0},
        "every run on the proxy diverged": {"grid": [1e9], "optimizer": "sgd"},
    }.items():
        with pytest.raises(mupass.StudyError, match=message):
            mupass.transfer(model, data(), **{"grid": [0.1, 0.2], **QUICK, **arguments})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not hasattr(model, "mupass_plan")
