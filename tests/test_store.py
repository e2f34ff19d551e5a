"""What a store holds fits what is asked, and no kill, full disk or foreign file loses a result."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._runs.fingerprint import digest
from mupass._runs.store import Store

X, Y = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
SCALE = 1.0


class Weighted:
    """A loss that is an object."""

    factor = 1.0

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * self.weight * self.factor

    def bound(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def keyword(value: Any) -> Callable[..., Tensor]:
    def loss(output: Tensor, target: Tensor, *, weight: Any = value) -> Tensor:
        return F.cross_entropy(output, target) * weight

    return loss


def closed(value: Any) -> Callable[..., Tensor]:
    return lambda output, target: F.cross_entropy(output * value["x"][0], target)


def with_global(value: float) -> Callable[..., Tensor]:
    """Return a function of a module of its own, whose helper reads a global."""
    module = types.ModuleType("study_settings")
    exec(  # noqa: S102
        "import torch.nn.functional as F\nSCALE = 1.0\n"
        "def helper(x):\n    return x * SCALE\n"
        "def loss(output, target):\n    return F.cross_entropy(helper(output), target)\n",
        vars(module),
    )
    module.SCALE = value  # type: ignore[attr-defined]
    return module.loss  # type: ignore[attr-defined, no-any-return]


def cached(value: float) -> Callable[..., Any]:
    return functools.lru_cache(lambda x: x * value)


class Rows(torch.utils.data.Dataset):
    """A dataset with tensors in its attributes."""

    def __init__(self, value: float) -> None:
        self.rows = [torch.full((3,), value)]


PAIRS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "self": (lambda v: Weighted(v).bound, 1.0, 2.0),
    "an object": (Weighted, 1.0, 2.0),
    "a tensor in a container in a closure": (lambda v: closed({"x": [torch.tensor(v)]}), 1.0, 2.0),
    "a list in a closure": (lambda v: closed({"x": v}), [1.0], [2.0]),
    "a keyword default": (keyword, 1.0, 2.0),
    "a global of a helper": (with_global, 1.0, 2.0),
    "an attribute of a module": (lambda v: nn.CrossEntropyLoss(label_smoothing=v), 0.0, 0.5),
    "a buffer of a module": (lambda v: nn.CrossEntropyLoss(weight=torch.tensor([1.0, v])), 1.0, 2.0),
    "a partial": (lambda v: functools.partial(F.cross_entropy, label_smoothing=v), 0.0, 0.5),
    "a cached function": (cached, 1.0, 2.0),
    "a dataset": (Rows, 1.0, 2.0),
    "a dtype": (lambda v: v, torch.float32, torch.float64),
    "a number and its text": (lambda v: v, 1, "1"),
    "an integer and a float": (lambda v: v, 1, 1.0),
    "a nest": (lambda v: v, [[1], [2]], [[1, 2]]),
    "a nested function": (lambda v: lambda: lambda x: x + v, 1, 2),
    "an activation": (lambda v: nn.Sequential(nn.Linear(2, 2).to("meta"), v()), nn.ReLU, nn.Tanh),
    "a generator of numbers": (lambda v: torch.Generator().manual_seed(v), 1, 2),
}


@pytest.mark.parametrize("kind", list(PAIRS))
def test_hashes_tell_what_a_result_depends_on(kind: str) -> None:
    make, first, second = PAIRS[kind]
    assert digest(make(first)) == digest(make(first))
    assert digest(make(first)) != digest(make(second))


@pytest.mark.parametrize("module", ["networkx", "torch.nn", "json", "__main__", "study_settings"])
def test_code_of_installed_packages_is_told_by_its_name(module: str) -> None:
    first, second = with_global(1.0), with_global(2.0)
    for function in (first, second):
        function.__module__ = module
    # What the caller has written is told by all that it reads.
    own = module in ("__main__", "study_settings")
    assert (digest(first) != digest(second)) == own


@pytest.mark.parametrize(
    "thing",
    [lambda: iter([1]), lambda: (i for i in range(3)), lambda: open(os.devnull)],
    ids=["iterator", "generator", "file"],
)
def test_what_cannot_be_hashed_is_refused_by_name(thing: Callable[[], Any]) -> None:
    held = thing()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert held is not None
        return F.cross_entropy(output, target)

    with pytest.raises(mupass.StudyError, match="held in .*loss.* cannot be hashed"):
        digest(loss)
    if hasattr(held, "close"):
        held.close()


@pytest.mark.slow
def test_a_hash_is_the_same_in_another_process() -> None:
    code = "import test_store as t; print(*[t.digest(m(a)) for n, (m, a, b) in t.PAIRS.items()])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == [digest(make(first)) for make, first, _ in PAIRS.values()]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def swept(path: Path | str | None, model: nn.Module | None = None, **options: Any) -> list[float]:
    arguments = {"grid": [0.01, 0.03], "widths": [32], "steps": 4, "progress": False, **options}
    found = mupass.sweep(model or mlp(), [(X, Y)], store=path, **arguments)
    return [trial.loss for trial in found.trials]


@pytest.mark.slow
def test_a_store_never_gives_the_result_of_another_study(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    tanh = nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in mlp()))
    frozen = mlp()
    frozen[0].requires_grad_(False)
    for options in (
        {},
        {"loss": Weighted(2.0)},
        {"loss": Weighted(2.0).bound},
        {"model": tanh},
        {"evaluate": lambda model: float(F.cross_entropy(model(X), Y))},
        {"optimizer": "adamw"},
        {"prepare": lambda model: model.requires_grad_(True) and nn.Sequential.train(model)},
        {"dtype": torch.float64},
    ):
        fresh = swept(None, **options)
        assert swept(store, **options) == fresh
        assert swept(store, **options) == fresh  # now from the store
    assert swept(store) == swept(None)


def test_what_needs_no_store_needs_no_hash() -> None:
    held = iter([1])
    assert len(swept(None, loss=lambda o, t: F.cross_entropy(o, t) + 0 * (held is None))) == 2


# -------------------------------------------------------------------------------------------- files


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(mupass.StudyError, match="folder .* does not exist"):
        swept(tmp_path / "no" / "runs.db")
    with pytest.raises(mupass.StudyError, match="cannot be|can be neither"):
        swept(tmp_path)
    with pytest.raises(mupass.StudyError, match="store must be a path"):
        swept(3)  # type: ignore[arg-type]
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table runs (key text, loss real)")
    other.commit()
    other.close()
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("create table notes (text text)")
    foreign.commit()
    foreign.close()
    for name, message in (("other.db", "not a store of this version"), ("foreign.db", "has a table notes")):
        held = (tmp_path / name).read_bytes()
        with pytest.raises(mupass.StudyError, match=message):
            swept(tmp_path / name)
        assert (tmp_path / name).read_bytes() == held
    # SQLite takes an empty path for a file that goes away with its connection.
    with pytest.raises(mupass.StudyError, match="store must be a path"):
        swept("")  # type: ignore[arg-type]


def test_a_complete_store_is_read_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "runs.db"
    expected = swept(store)
    connect = sqlite3.connect

    def read_only(path: str, **options: Any) -> sqlite3.Connection:
        place = path if path.startswith("file:") else f"{Path(path).as_uri()}?mode=ro"
        return connect(place, **{**options, "uri": True})

    monkeypatch.setattr(sqlite3, "connect", read_only)
    held = store.read_bytes()
    assert swept(store) == expected
    with pytest.raises(mupass.StudyError, match="readonly.*kept"):
        swept(store, grid=[0.01, 0.03, 0.1])
    assert store.read_bytes() == held


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "runs.db"
    grid = [0.01 * 1.1**i for i in range(40)]
    expected = swept(None, grid=grid, steps=1)
    put = Store.put

    def full(self: Store, key: str, job: Any, loss: float, seconds: float) -> None:
        pages = self.connection.execute("pragma page_count").fetchone()[0]
        self.connection.execute(f"pragma max_page_count = {pages}")
        put(self, key, {**job, "note": "x" * 900}, loss, seconds)

    with monkeypatch.context() as patch, pytest.raises(mupass.StudyError, match="full.*kept"):
        patch.setattr(Store, "put", full)
        swept(store, grid=grid, steps=1)
    with Store(store) as opened:
        written = opened.connection.execute("select count(*) from runs").fetchone()[0]
    assert 0 < written < 40
    assert swept(store, grid=grid, steps=1) == expected


def test_plans_and_reports_are_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mupass.transform(mlp(), X, base=32).mupass_plan
    path = tmp_path / "plan.json"
    plan.save(path)
    assert mupass.Plan.load(path) == plan
    held = path.read_bytes()

    def broken(self: Path, *args: Any, **options: Any) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", broken)
        with pytest.raises(mupass.PlanError, match="No space left"):
            plan.save(path)
        with pytest.raises(mupass.StudyError, match="No space left"):
            mupass.report(tmp_path / "page.html", plan)
    assert path.read_bytes() == held and sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]
    with pytest.raises(mupass.PlanError, match="cannot be written"):
        plan.save(tmp_path / "no" / "plan.json")
    with pytest.raises(mupass.PlanError, match="cannot be read"):
        mupass.Plan.load(tmp_path / "nothing.json")


# -------------------------------------------------------------------------------------------- kills

HEAD = """
import sys, torch, torch.nn.functional as F, mupass
import test_store as t
torch.set_num_threads(1)
model = t.mlp()
"""
PLAN = """
plan = mupass.transform(model, t.X, base=32).mupass_plan
print("ready", flush=True)
while True:
    plan.save(sys.argv[1])
"""
REPORT = """
plan = mupass.transform(model, t.X, base=32).mupass_plan
print("ready", flush=True)
while True:
    mupass.report(sys.argv[1], plan)
"""
GRID = "[0.01 * 1.05 ** i for i in range(40)]"
SWEEP = f"""
print("ready", flush=True)
t.swept(sys.argv[1], grid={GRID}, steps=20, jobs=int(sys.argv[2]))
"""
TRANSFER = f"""
print("ready", flush=True)
mupass.transfer(model, [(t.X, t.Y)], grid={GRID}, proxy=32, steps=20, store=sys.argv[1], progress=False)
"""


def killed(body: str, wait: float, *arguments: str) -> None:
    """Run a script, and kill it and its children some time after it is ready."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HEAD + body, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert child.stdout is not None and child.stdout.readline().strip() == "ready"
    time.sleep(wait)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


@pytest.mark.slow
def test_a_kill_leaves_whole_plans_and_reports(tmp_path: Path) -> None:
    for wait in (0.0, 0.03, 0.1):
        plan, page = tmp_path / "plan.json", tmp_path / "page.html"
        killed(PLAN, wait, str(plan))
        killed(REPORT, wait, str(page))
        if plan.exists():
            assert len(mupass.Plan.load(plan)) == 6
        if page.exists():
            assert page.read_text().rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, processes: int) -> None:
    if processes > 1:
        pytest.importorskip("loky")
    store = tmp_path / "runs.db"
    grid = [0.01 * 1.05**i for i in range(40)]
    for wait in (1.0, 2.0, 0.2):
        killed(SWEEP, wait, str(store), str(processes))
    with Store(store) as opened:
        before = dict(opened.connection.execute("select key, loss from runs").fetchall())
    expected = swept(None, grid=grid, steps=20)
    assert swept(store, grid=grid, steps=20) == pytest.approx(expected, rel=1e-6)
    with Store(store) as opened:
        after = dict(opened.connection.execute("select key, loss from runs").fetchall())
    assert len(after) == 40 and before.items() <= after.items()


@pytest.mark.slow
def test_a_killed_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    killed(TRANSFER, 2.0, str(store))
    grid = [0.01 * 1.05**i for i in range(40)]
    options: Any = {"grid": grid, "proxy": 32, "steps": 20, "progress": False}
    found = mupass.transfer(mlp(), [(X, Y)], store=store, **options)
    fresh = mupass.transfer(mlp(), [(X, Y)], **options)
    assert found.hyperparameters == fresh.hyperparameters
    with Store(store) as opened:
        assert opened.connection.execute("select count(*) from runs").fetchone() == (40,)
