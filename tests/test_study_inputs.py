"""Studies take models with and without a transform, run on any executor, and give tables."""

from __future__ import annotations

import csv
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import nn

import mupass

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
DATA = [(X, X[:, :3].argmax(1))]
GRID = {"lr": [0.01, 0.1, 1.0]}
SHORT: dict[str, Any] = {"optimizer": "sgd", "steps": 4}


def mlp(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    return nn.Sequential(*layers)


def done(**how: Any) -> nn.Module:
    return mupass.transform(mlp(), X, **{"base": 32, **how})


def sweep(model: Any, **how: Any) -> mupass.Sweep:
    return mupass.sweep(model, DATA, GRID, [32, 64], progress=False, **SHORT, **how)


def test_coord_check_takes_either() -> None:
    plain, given = mlp(), done()
    values = [p.detach().clone() for p in given.parameters()]
    a = mupass.coord_check(plain, DATA, steps=1, widths=[64, 128])
    b = mupass.coord_check(given, DATA, steps=1, widths=[64, 128])
    assert a.notes == () and "transformed already (mup, base width 32)" in str(b)
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.verdict == other.verdict
        assert one.slope.values == pytest.approx(other.slope.values, rel=1e-3)  # factors are rounded
    assert all(torch.equal(p, v) for p, v in zip(given.parameters(), values, strict=True))
    assert given.mupass_plan.base_width == 32


def test_coord_check_takes_batches_in_their_order() -> None:
    def powers(*batches: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, Any]]:
        return mupass.coord_check(mlp, list(batches), steps=3, seeds=2, widths=[32, 64]).records()

    first, second = ((X.roll(shift, 1), X[:, :3].argmax(1)) for shift in range(2))
    # After the last one comes the first again.
    assert powers(first, second) == powers(first, second, first) != powers(first)


def test_sweep_takes_either() -> None:
    a, b = sweep(mlp()), sweep(torch.compile(done(), backend="eager"))
    assert [t.loss for t in a.trials] == pytest.approx([t.loss for t in b.trials], rel=1e-4)
    assert a.notes == () and "transformed already" in str(b)


def test_transfer_takes_either_and_changes_the_model_given() -> None:
    how: dict[str, Any] = {"grid": GRID, "proxy": 64, "progress": False, **SHORT}
    given = done()
    a, b = mupass.transfer(mlp(), DATA, **how), mupass.transfer(given, DATA, **how)
    assert b.model is given and a.hyperparameters == b.hyperparameters
    assert given.mupass_plan.base_width == 64
    for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(a.model(X), b.model(X))
    assert "transformed already" in str(b)


def test_hypergradient_takes_either() -> None:
    plain = mlp().double()
    data = [(X.double(), DATA[0][1])]
    values = [p.detach().clone() for p in plain.parameters()]
    a = mupass.hypergradient(plain, data, {"lr": 0.1}, **SHORT)
    b = mupass.hypergradient(mupass.transform(mlp().double(), X.double()), data, {"lr": 0.1}, **SHORT)
    assert a.gradient == pytest.approx(b.gradient) and b.notes == ()
    assert "a copy was, under mup with base width 128" in str(a)
    assert all(torch.equal(p, v) for p, v in zip(plain.parameters(), values, strict=True))
    assert not hasattr(plain, "mupass_plan")


def test_what_cannot_be_undone_is_refused() -> None:
    with pytest.raises(mupass.StudyError, match="folded"):
        sweep(mupass.fold(done()))
    with pytest.raises(mupass.StudyError, match="only 0 of this Sequential is transformed"):
        sweep(nn.Sequential(done(), nn.Linear(3, 3)))


class Inline(Executor):
    """Runs at once, with futures of its own kind as clusters have."""

    class Later:
        def __init__(self, value: Any) -> None:
            self.value = value

        def result(self) -> Any:
            return self.value

        def cancel(self) -> None:
            """Do nothing."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.Later(fn(*args, **kwargs))


class Waiting(Executor):
    """Futures of the standard library, done as they are made."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.sample("threads")
@pytest.mark.parametrize("kind", ["threads", "inline", "waiting", "processes"])
def test_any_executor_gives_the_same_table(kind: str) -> None:
    expected = sweep(mlp())
    makers = {
        "threads": lambda: ThreadPoolExecutor(3),
        "inline": Inline,
        "waiting": Waiting,
        "processes": lambda: ProcessPoolExecutor(2, mp_context=get_context("spawn")),
    }
    with makers[kind]() as pool:
        found = sweep(mlp(), jobs=pool)
        assert found.trials == expected.trials
        if kind == "threads":
            proxy = mupass.transfer(mlp(), DATA, grid=GRID, proxy=32, jobs=pool, progress=False, **SHORT)
            assert proxy.search.trials == tuple(t for t in expected.trials if t.width == 32)


@pytest.mark.parametrize("jobs", [0, 1.5, True, "two"])
def test_jobs_must_be_a_number_or_an_executor(jobs: Any) -> None:
    with pytest.raises(mupass.StudyError, match="Executor"):
        sweep(mlp(), jobs=jobs)


def test_results_are_tables(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = sweep(mlp)
    checked = mupass.coord_check(mlp, DATA, steps=1, widths=[64, 128])
    slopes = mupass.hypergradient(done(), DATA, {"lr": 0.1}, **SHORT)
    assert swept.records()[0] == {"width": 32, "lr": 0.01, "seed": 0, "loss": swept.trials[0].loss}
    for result, count in ((swept, len(swept.trials)), (checked, len(checked.rows)), (slopes, None)):
        path = tmp_path / "table.csv"
        assert result.to_csv(path) == str(path)
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert len(rows) == (count or len(result.records())) and rows
        page = result._repr_html_()
        assert page.startswith("<p><b>") and page.count("<") == page.count(">")
    first = checked.rows[0]
    assert float(checked.records()[0]["power"]) == first.slope.power
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(mupass.StudyError, match="pip install pandas"):
        swept.to_frame()


def test_to_frame() -> None:
    pandas = pytest.importorskip("pandas")
    swept = sweep(mlp)
    frame = swept.to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame) == ["width", "lr", "seed", "loss"]
    assert frame.loss.tolist() == [t.loss for t in swept.trials]


@pytest.mark.parametrize(
    "grid", [None, 3, "0.1", [], {"lr": None}, {"lr": 0.1}, {"lr": torch.tensor(0.1)}], ids=str
)
def test_a_grid_that_lists_nothing_is_refused(grid: Any) -> None:
    for study in (
        lambda model: mupass.sweep(model, DATA, grid, widths=[16], steps=1, progress=False),
        lambda model: mupass.transfer(model, DATA, grid=grid, proxy=16, steps=1, progress=False),
    ):
        with pytest.raises(mupass.StudyError, match="grid"):
            study(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)))
