"""sweep finds optima, says what is not bracketed, and loses nothing when it is killed."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._runs.fingerprint import digest
from mupass._runs.jobs import Job, Work
from mupass._runs.store import Store
from mupass._study.sweep import points_of
from mupass._study.sweep_result import Sweep
from mupass._study.trials import Trial, vertex

ROOT = Path(__file__).parent.parent


def mlp(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def data(batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(32, 10, generator=draw) for _ in range(batches)]
    return [(x, x[:, :4].argmax(1)) for x in xs]


SMALL = {"steps": 10, "widths": [16, 32], "optimizer": "sgd", "progress": False}


def made(losses: dict[tuple[int, float], list[float]]) -> Sweep:
    trials = [
        Trial(width, (("lr", lr),), seed, loss)
        for (width, lr), row in losses.items()
        for seed, loss in enumerate(row)
    ]
    return Sweep(tuple(trials), "adam", "mup", 10)


@pytest.mark.parametrize("optimum", [0.02, 0.05, 0.1, 0.3])
def test_the_vertex_of_a_parabola_is_found(optimum: float) -> None:
    lrs = [0.01, 0.03, 0.1, 0.2, 1.0]
    losses = [math.exp(0.3 + 0.5 * math.log(lr / optimum) ** 2) for lr in lrs]
    at = losses.index(min(losses))
    if 0 < at < len(lrs) - 1:
        assert vertex(lrs, losses, at) == pytest.approx(optimum)


def test_the_interval_covers_the_optimum_as_often_as_it_says() -> None:
    lrs = [2.0**-p for p in range(10, 0, -1)]
    draw = torch.Generator().manual_seed(0)
    hits, trials = 0, 300
    for _ in range(trials):
        shifts = 0.4 * torch.randn(4, generator=draw, dtype=torch.float64)
        row = {
            (64, lr): [math.exp(0.2 * (math.log2(lr) + 5.3 - s) ** 2 - 1) for s in shifts.tolist()]
            for lr in lrs
        }
        found = made(row).optimum(64)
        assert found.bracketed and found.low < found.value < found.high
        hits += found.low <= 2**-5.3 <= found.high
    assert 0.91 <= hits / trials <= 0.985


def test_an_end_of_the_grid_is_not_an_optimum() -> None:
    found = made({(64, 0.1): [3.0], (64, 0.2): [2.0], (64, 0.4): [1.0], (128, 0.1): [2.0], (128, 0.2): [1.0],
                  (128, 0.4): [3.0]})  # fmt: skip
    assert [o.width for o in found.open_ends()] == [64]
    assert "NOT BRACKETED: at width 64" in found.verdict() and "extend it above" in found.verdict()
    assert found.optimum(128).bracketed and found.optimum(128).best == 0.2
    assert (found.optimum(128).low, found.optimum(128).high) == (0.1, 0.4)
    gone = made({(64, 0.1): [math.inf], (64, 0.2): [math.inf], (64, 0.4): [math.inf]})
    assert "every run diverged" in gone.verdict() and not gone.optimum(64).bracketed


def test_a_diverged_neighbor_leaves_the_tried_value() -> None:
    found = made({(64, 0.1): [2.0], (64, 0.2): [1.0], (64, 0.4): [math.inf]}).optimum(64)
    assert found.value == found.best == 0.2 and found.bracketed


def test_all_points_of_a_grid() -> None:
    assert points_of([0.2, 0.1, 0.2]) == [(("lr", 0.1),), (("lr", 0.2),)]
    assert len(points_of({"lr": [1, 2], "damping": [0.1, 0.2, 0.3]})) == 6
    assert points_of({"lr": (value / 10 for value in (1, 2))}) == points_of([0.1, 0.2])


def test_a_sweep_under_mup_keeps_its_optimum_and_standard_does_not() -> None:
    lrs = [2.0**p for p in range(-11, 0)]
    settings = {"optimizer": "adam", "steps": 20, "widths": [32, 256], "progress": False}
    mup = mupass.sweep(mlp, data(), lrs, **settings)
    standard = mupass.sweep(mlp, data(), lrs, **settings, parameterization="standard")
    assert not mup.open_ends(), str(mup)
    assert abs(mup.moves()) < 1, str(mup)
    assert standard.moves() < -1.5, str(standard)
    assert mup.best() == {"lr": mup.optimum(32).best}
    at_base = [t for t in mup.trials if t.width == 32]
    assert [t.loss for t in at_base] == [t.loss for t in standard.trials if t.width == 32]


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("loky")
    grid = {"lr": [0.1, 0.3], "momentum": [0.1, 0.9]}
    alone = mupass.sweep(mlp(), data(), grid, seeds=2, **SMALL)
    together = mupass.sweep(mlp(), data(), grid, seeds=2, jobs=2, store=tmp_path / "runs.db", **SMALL)
    assert alone == together and len(alone.trials) == 16
    factory = {**SMALL, "optimizer": lambda model, lr: mupass.Shampoo(model, lr=lr)}
    assert mupass.sweep(mlp(), data(), [0.1], jobs=2, **factory) == mupass.sweep(
        mlp(), data(), [0.1], **factory
    )


SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import mupass
from mupass._runs.batches import cross_entropy
from test_sweep import data, mlp

def slow(output, targets):
    time.sleep({pause})
    return cross_entropy(output, targets)

if __name__ == "__main__":
    found = mupass.sweep(mlp(), data(), [0.03, 0.1, 0.3, 1.0], [16, 32], loss=slow, optimizer="sgd", steps=10,
                         seeds=2, store=sys.argv[1], progress=False, jobs={jobs})
    print(found.report())
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_gives_the_same_table(tmp_path: Path, jobs: int) -> None:
    if jobs > 1:
        pytest.importorskip("loky")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), pause=0.03, jobs=jobs))

    def start(store: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(tmp_path / store)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def finished() -> int:
        with sqlite3.connect(f"file:{tmp_path / 'killed.db'}?mode=ro", uri=True) as known:
            (count,) = known.execute("select count(*) from runs").fetchone()
        known.close()
        return count

    undisturbed, _ = start("whole.db").communicate(timeout=300)
    victim, count, deadline = start("killed.db"), 0, time.monotonic() + 300
    while count < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            count = finished()
        except sqlite3.OperationalError:  # not made yet
            continue
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    before = finished()
    assert 3 <= before < 16 and victim.returncode == -signal.SIGKILL
    with sqlite3.connect(tmp_path / "killed.db") as known:
        old = known.execute("select key, loss, seconds from runs").fetchall()
    known.close()
    resumed, _ = start("killed.db").communicate(timeout=300)
    assert resumed == undisturbed and "width 32" in resumed
    assert finished() == 16
    with sqlite3.connect(tmp_path / "killed.db") as known:
        new = known.execute("select key, loss, seconds from runs").fetchall()
    known.close()
    assert set(old) <= set(new)  # nothing that was known is run again


def test_a_larger_sweep_takes_over_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "runs.db"
    first = mupass.sweep(mlp, data(), [0.1, 0.3], store=store, **SMALL)
    calls, run = [], Work.run

    def counted(self: Work, job: Job) -> tuple[float, float]:
        calls.append(job)
        return run(self, job)

    def plain(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(mupass.param_groups(model, lr, optimizer="sgd"))

    monkeypatch.setattr(Work, "run", counted)
    settings = {**SMALL, "optimizer": plain}
    mupass.sweep(mlp, data(), [0.1, 0.3], store=store, **settings)
    assert len(calls) == 4  # another optimizer is another study
    more = mupass.sweep(mlp, data(), [0.1, 0.3, 0.5], store=store, **settings)
    assert len(calls) == 6 and [t.loss for t in more.trials if t.point[0][1] < 0.5] == [
        t.loss for t in first.trials
    ]


def test_a_store_of_other_weights_or_data_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    mupass.sweep(mlp(), data(), [0.1], store=store, **SMALL)
    other = mlp()
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    for model, batches in ((other, data()), (mlp(), data(3))):
        with pytest.raises(mupass.StudyError, match="other initial weights or other data"):
            mupass.sweep(model, batches, [0.1], store=store, **SMALL)
    text = tmp_path / "text.db"
    text.write_text("not a database, but a text that is long enough to be read as one " * 20)
    with pytest.raises(mupass.StudyError, match="not a store"):
        Store(text)


def test_hashes_tell_functions_apart() -> None:
    def power(k: float):
        return lambda x: x**k

    assert digest(power(2.0)) == digest(power(2.0)) != digest(power(3.0))
    assert digest(lambda x: x + 1) != digest(lambda x: x + 2)
    assert digest(torch.ones(2)) != digest(torch.ones(2, dtype=torch.float64))
    assert digest(torch.zeros(4)) != digest(torch.zeros(2, 2))


def test_an_evaluation_takes_the_place_of_the_training_loss() -> None:
    held = data(6)[-1]

    def validation(model: nn.Module) -> float:
        assert not model.training
        return nn.functional.cross_entropy(model(held[0]), held[1]).item()

    found = mupass.sweep(mlp, data(), [0.1, 0.5], evaluate=validation, **SMALL)
    assert found.score.endswith("validation") and all(0 < t.loss < 3 for t in found.trials)


def test_divergence_is_infinite_and_shown() -> None:
    found = mupass.sweep(mlp, data(), [0.1, 1e12], **SMALL)
    assert [math.isinf(t.loss) for t in found.trials] == [False, True] * 2
    assert "diverged" in str(found) and "2 diverged" in str(found)


def test_reports(tmp_path: Path) -> None:
    found = mupass.sweep(mlp, data(), {"lr": [0.1, 0.3, 1.0], "momentum": [0.1, 0.5]}, **SMALL)
    assert found.report() == str(found) and "momentum" in str(found)
    page = Path(found.report(tmp_path / "sweep.html")).read_text()
    assert page.startswith("<!doctype html>") and "src=" not in page and "NOT BRACKETED" in page


@pytest.mark.slow
def test_a_report_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = mupass.sweep(mlp, data(), {"lr": [0.1, 0.3, 1.0], "momentum": [0.1, 0.5]}, **SMALL)
    assert Path(found.report(tmp_path / "sweep.png")).stat().st_size > 10_000


@pytest.mark.parametrize("grid", [[], {}, {"lr": []}, [0.0], [-1.0], [math.nan], {"lr": 0.1}, [True]])
def test_grids_that_make_no_sense_are_refused(grid) -> None:
    with pytest.raises(mupass.StudyError, match="grid"):
        mupass.sweep(mlp, data(), grid, **SMALL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": []}, "grid"),
        ({"grid": {"damping": [0.1]}, "optimizer": "sgd"}, "takes no damping"),
        ({"optimizer": "sophia"}, "unknown optimizer"),
        ({"seeds": 0}, "seeds"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_what_is_wrong_is_told_before_any_model_is_made(wrong: dict, message: str) -> None:
    class Untouched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    for study in (mupass.sweep, mupass.transfer):
        with pytest.raises(mupass.StudyError, match=message):
            study(Untouched(6, 3), data(), **{"grid": [0.1, 0.2], "progress": False, **wrong})
    with pytest.raises(mupass.StudyError, match="unknown driver"):
        mupass.transfer(Untouched(6, 3), data(), grid=[0.1, 0.2], driver="random")


@pytest.mark.sample("sgd", "soap")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "soap", "muon", lambda model, lr: None])
def test_hyperparameters_that_the_optimizer_does_not_take_are_refused(optimizer) -> None:
    wanted = {"lr": [0.1], "damping": [0.1]}
    with pytest.raises(mupass.StudyError, match="takes no damping; it takes lr"):
        mupass.sweep(mlp(), data(), wanted, optimizer=optimizer, steps=1, progress=False)
    with pytest.raises(mupass.StudyError, match="takes no damping; it takes lr"):
        mupass.transfer(mlp(), data(), 64, grid=wanted, optimizer=optimizer, progress=False)
    model = mupass.transform(mlp(), data()[0][0])
    with pytest.raises(mupass.StudyError, match="takes no damping; it takes lr"):
        mupass.hypergradient(model, data(), {"lr": 0.1, "damping": 0.1}, optimizer=optimizer, steps=1)


def test_processes_without_loky_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loky", None)
    with pytest.raises(mupass.StudyError, match="loky"):
        mupass.sweep(mlp, data(), [0.1], jobs=2, **SMALL)


SHARED = """
import os, pathlib, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import mupass
from mupass._runs import store
from test_sweep import data, mlp
folder = pathlib.Path({folder!r})

def start(name, lease):
    pid = os.fork()
    if pid:
        return pid
    try:
        store.LEASE = lease
        log = folder / f"{{name}}.log"

        def make(model, lr):
            with log.open("a") as begun:
                begun.write(f"{{os.getpid()}} {{model.mupass_plan.width}} {{lr}} {{torch.initial_seed()}}\\n")
            time.sleep(0.4)
            return torch.optim.SGD(mupass.param_groups(model, lr, optimizer="sgd"))

        found = mupass.sweep(mlp(), data(), [0.03, 0.1, 0.3, 1.0], [16, 32], optimizer=make, steps=3, seeds=2,
                             store=folder / f"{{name}}.db", progress=False)
        (folder / f"{{name}}.{{os.getpid()}}.txt").write_text(found.report())
    finally:
        os._exit(0)

for pid in [start("both", 60), start("both", 60)]:
    os.waitpid(pid, 0)
victim, survivor = start("killed", 10), start("killed", 10)
log = folder / "killed.log"
while not log.exists() or log.read_text().count(f"{{victim}} ") < 2:
    time.sleep(0.01)
os.kill(victim, signal.SIGKILL)  # within the pause of its second run or a later one
os.waitpid(victim, 0)
os.waitpid(survivor, 0)
print(victim, survivor)
"""


@pytest.mark.slow
def test_two_processes_share_a_store(tmp_path: Path) -> None:
    """Each run is done once; a killed process's claim lapses, and the table is the undisturbed one."""
    script = SHARED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        try:
            said, _ = launcher.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    assert launcher.returncode == 0
    victim, survivor = said.split()

    def runs(name: str) -> list[tuple[str, ...]]:
        return [tuple(line.split()) for line in (tmp_path / f"{name}.log").read_text().splitlines()]

    done = runs("both")
    assert len(done) == len({run[1:] for run in done}) == 16
    assert len({run[0] for run in done}) == 2  # both took part
    tables = [path.read_text() for path in tmp_path.glob("both.*.txt")]
    assert len(tables) == 2 and tables[0] == tables[1] and "0.03" in tables[0]

    begun = [run[1:] for run in runs("killed")]
    assert {run[0] for run in runs("killed")} == {victim, survivor}
    assert len(set(begun)) == 16 and len(begun) <= 17  # only what the victim was at is begun again
    assert not (tmp_path / f"killed.{victim}.txt").exists()
    assert (tmp_path / f"killed.{survivor}.txt").read_text() == tables[0]


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path / "runs.db") as one, Store(tmp_path / "runs.db") as two:
        assert one.reserve("a") and one.reserve("a") and not two.reserve("a") and two.reserve("b")
        one.put("a", {}, 1.0, 0.1)
        assert not two.reserve("a") and two.get("a") == 1.0  # done
        with one.claims_renewed():
            assert one.reserve("c") and not two.reserve("c")
        assert two.reserve("c")  # given back
        monkeypatch.setattr("mupass._runs.store.LEASE", 0.2)
        with one.claims_renewed():
            assert one.reserve("d")
            time.sleep(0.6)
            assert not two.reserve("d")  # renewed while its holder lives
        assert two.reserve("e")
        time.sleep(0.3)
        assert one.reserve("e")  # void
