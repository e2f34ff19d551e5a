"""The K-FAC benchmarks at tiny sizes: they run, their references are right, and they notice what is wrong."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import write
from torch import Tensor

import mupass
from benchmarks import contestants, kfac_parity, kfac_time, paper, speedup, to_target
from benchmarks.false_alarms import interval
from benchmarks.floor import Floor
from benchmarks.parity_cases import CASES, MID, WIDTH, Experts

pytestmark = [
    pytest.mark.filterwarnings("ignore:mupass:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
BY_NAME = {c.name: c for c in CASES}


@pytest.fixture(autouse=True)
def _warnings_and_guards():
    """The scripts silence warnings and set a switch of Dynamo for their process; not for other tests."""
    guards = torch._dynamo.config.skip_nnmodule_hook_guards
    yield
    torch._dynamo.config.skip_nnmodule_hook_guards = guards


# Parity ----------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_case_is_exact(name: str) -> None:
    worst, falls = kfac_parity.of_mupass(kfac_parity.problem(BY_NAME[name]))
    assert not falls and worst < 1e-10


@pytest.mark.parametrize(
    "dispatch",
    [
        lambda h, w: torch.einsum("ntd,edh->neth", h, w).transpose(0, 1),
        lambda h, w: (h.flatten(0, 1) @ w).unflatten(1, h.shape[:2]),
        lambda h, w: (h.flatten(0, 1)[None] @ w).unflatten(1, h.shape[:2]),
    ],
    ids=["einsum", "matmul", "broadcast"],
)
def test_experts_that_read_one_activation_are_matrices_of_their_own(dispatch: Any) -> None:
    case = replace(BY_NAME["mixture of experts, einsum"], build=lambda: Experts(dispatch))
    p = kfac_parity.problem(case)
    worst, falls = kfac_parity.of_mupass(p)
    assert not falls and worst < 1e-10
    net = mupass.transform(case.build().double(), p.x, base=WIDTH)
    slots = [
        b for b in mupass.KFAC(net, 1.0)._kronecker.banks["a"] if any("experts" in name for name, _ in b.keys)
    ]
    assert sum("experts" in name for b in slots for name, _ in b.keys) == 1  # one A for all


def exact_peer(p: kfac_parity.Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that a package without a fault would have, in scales of its own."""
    weight = p.factors["mid.weight"]
    return {"mid": (7 * weight.a[0], 0.3 * weight.b[0])}


def test_a_peer_is_compared_up_to_a_scalar_and_its_faults_are_seen() -> None:
    p = kfac_parity.problem(replace(BY_NAME["Linear"], subject=MID))
    layers = exact_peer(p)
    assert kfac_parity.compared(p, layers) < 1e-12
    a, b = layers["mid"]
    assert kfac_parity.compared(p, {"mid": (torch.eye(len(a)).double(), b)}) > 0.05
    assert kfac_parity.compared(p, {"mid": (a, b.roll(1, 0).roll(1, 1))}) > 0.05
    with pytest.raises(kfac_parity.Missing):
        kfac_parity.compared(p, {"inp": layers["mid"]})


def test_a_folded_bias_is_compared_with_a_folded_reference() -> None:
    p = kfac_parity.problem(replace(BY_NAME["Linear"], subject=MID))
    folded = p.folded["mid.weight"]
    assert kfac_parity.compared(p, {"mid": (folded.a[0], folded.b[0])}) < 1e-12
    separate = torch.block_diag(folded.a[0][:-1, :-1], folded.a[0][-1:, -1:])
    assert kfac_parity.compared(p, {"mid": (separate, folded.b[0])}) > 0.01


def test_a_tied_reference_is_a_kronecker_product_nearer_than_either_use() -> None:
    torch.manual_seed(0)
    first, second = (
        (torch.randn(1, 5, 2, n).double(), torch.randn(1, 5, 2, m).double()) for n, m in ((4, 3), (3, 4))
    )
    a, b = kfac_parity.tied([first, second])
    (a1, b1), (a2, b2) = (kfac_parity.pooled([pair], False) for pair in (first, second))
    whole = torch.kron(a1[0], b1[0]) + torch.kron(torch.diag(b2[0].diagonal()), a2[0])
    distances = [(torch.kron(x, y) - whole).norm() for x, y in ((a[0], b[0]), (a1[0], b1[0]))]
    assert distances[0] < distances[1]
    for _ in range(20):  # no small change brings it nearer
        near = torch.kron(a[0] + 1e-3 * torch.randn_like(a[0]), b[0] + 1e-3 * torch.randn_like(b[0]))
        assert (near - whole).norm() > distances[0]


def test_the_table_names_peers_that_are_not_there(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def absent(p: kfac_parity.Problem) -> float:
        raise ImportError("no such package")

    def broken(p: kfac_parity.Problem) -> float:
        raise KeyError("a layer")

    monkeypatch.setattr(kfac_parity, "PEERS", {"absent": absent, "broken": broken})
    assert kfac_parity.main(["--only", "addmm"]) == 0
    printed = capsys.readouterr().out
    assert "not installed" in printed and "KeyError" in printed and "exact in 1 of 1 rows" in printed


# Time ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_time_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--models cnn --width 16 --cycles 1 --warm 0 --only AdamW mupass --batches 1 --no-memory"
    assert kfac_time.main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("mupass") for line in lines) == 2
    assert sum(line.startswith("floor") for line in lines) == 2
    assert sum("AdamW" in line and "mupass" in line and "%" in line for line in lines) == 2


def test_the_floor_holds_the_products_of_the_model() -> None:
    task = contestants.make_task("gpt", batch=1, width=16)
    floor = Floor.of(task)
    model = contestants.seeded(task)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [x.shape[1] for x, _ in floor.rows] == [m.in_features for m in layers]
    assert all(len(x) == contestants.LENGTH for x, _ in floor.rows)
    names = [func.overloadpacket.__name__ for func, _, _ in floor.base.calls]
    # Forward, and twice backward, of every layer; attention forward and backward in each block.
    assert sum("attention" in n for n in names) == 2 * 4
    assert len(names) - 2 * 4 == 3 * len(layers)
    assert floor.parts(1).keys() == {"model", "grams", "precondition", "roots"}


def test_an_incident_makes_a_timing_void() -> None:
    step = contestants.ours(contestants.make_task("cnn", batch=4, width=8), 1)
    step()
    step.check()
    step.optimizers[0].count("failed_roots", "somewhere")
    with pytest.raises(RuntimeError, match="failed_roots"):
        step.check()


@pytest.mark.slow
def test_memory_counts_what_the_optimizer_keeps() -> None:
    class Queue(list[object]):
        put = list.append

    found = Queue()
    threads = torch.get_num_threads()
    kfac_time.measure_memory("cnn", "AdamW", 1, found)
    torch.set_num_threads(threads)
    ((state, _, size),) = found
    assert 2 * size <= state < 2 * size + 1e5  # two moments, and little else


# Training to a target --------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    folder = write(tmp_path / "data", compressed=True, train=64 * 30, test=10)
    common = f"--tasks cnn --data {folder} --out {tmp_path / 'log.jsonl'} --limit 24 --seeds 2"
    return common.split()


@pytest.mark.slow
def test_runs_are_kept_and_taken_up_again(words: list[str], tmp_path: Path, capsys) -> None:
    words += "--optimizers sgd --lrs 0.001 0.1 1e6 --target 2.0".split()
    assert to_target.main([*words, "--minutes", "0"]) == 0
    assert not (tmp_path / "log.jsonl").exists() and "not run" not in capsys.readouterr().out
    assert to_target.main(words) == 0
    first = (tmp_path / "log.jsonl").read_text()
    runs = [json.loads(line) for line in first.splitlines()]
    # The grid at the base width, with the second seed what reached the target, the best one 8 times wider.
    assert [r["lr"] for r in runs] == [0.1, 0.001, 1e6, 0.1, 0.1, 0.1]
    assert [r["seed"] for r in runs] == [0, 0, 0, 1, 0, 1] and [r["width"] for r in runs] == [8] * 4 + [
        64
    ] * 2
    assert all(r["reached"] and r["loss"] <= 2.0 for r in runs if r["lr"] == 0.1)
    assert all(math.isinf(r["loss"]) and r["steps"] < 24 for r in runs if r["lr"] == 1e6)
    printed = capsys.readouterr().out
    assert to_target.main(words) == 0  # nothing left to do
    assert (tmp_path / "log.jsonl").read_text() == first and capsys.readouterr().out == printed
    assert "sgd" in printed and "2^-3.32" in printed and "!" not in printed.split("mean +-")[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["kfac", "shampoo", "adamw"])
def test_every_optimizer_trains(words: list[str], optimizer: str, tmp_path: Path) -> None:
    assert to_target.main([*words, "--optimizers", optimizer, "--lrs", "0.002", "--seeds", "1"]) == 0
    runs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["width"] for r in runs] == [8, 64] and all(r["loss"] < 2.2 for r in runs)  # guessing: 2.3


def run(lr: float, reached: bool, steps: int, loss: float, seed: int = 0) -> to_target.Run:
    return to_target.Run("cnn", "sgd", 8, lr, seed, reached, steps, 1.0, 1.0, loss)


def test_a_run_is_given_up_at_twice_the_steps_of_the_best(tmp_path: Path) -> None:
    log, task = to_target.Runs(tmp_path / "log"), to_target.Task(None, None, base=8, target=0.5, limit=500)  # type: ignore[arg-type]
    options = argparse.Namespace(optimizers=["sgd"], seeds=1, lrs=[0.1, 0.2, 0.4])
    todo = to_target.wanted(log, "cnn", task, options)
    assert next(todo) == ("sgd", 8, 0.2, 0, 500)
    log.add(run(0.2, True, 80, 0.5))
    log.add(run(0.2, True, 30, 0.5, seed=1))  # another seed sets no limit
    assert next(todo)[-1] == 160
    log.add(run(0.1, False, 160, 0.7))
    assert next(todo) == ("sgd", 8, 0.4, 0, 160)
    assert next(todo) == ("sgd", 64, 0.2, 0, 500) and not list(todo)


def test_the_best_rate_reaches_the_target_soonest_in_all_seeds(tmp_path: Path) -> None:
    log = to_target.Runs(tmp_path / "log")
    assert to_target.tuned(log, "cnn", "sgd", 8) is None
    for r in (
        run(0.1, True, 50, 0.5),
        run(0.1, False, 100, 0.7, 1),
        run(0.2, True, 80, 0.5),
        run(0.2, True, 90, 0.5, 1),
    ):
        log.add(r)
    assert to_target.tuned(log, "cnn", "sgd", 8) == 0.2
    log.add(run(0.4, True, 70, 0.5))
    log.add(run(0.4, True, 70, 0.5, 1))
    assert to_target.tuned(log, "cnn", "sgd", 8) == 0.4
    assert "85 +- 7.1" in to_target.cell(log.some("cnn", "sgd", 8, 0.2))
    assert "1 of 2 runs" in to_target.cell(log.some("cnn", "sgd", 8, 0.1))


def test_text_batches_come_once_and_are_shifted_by_one() -> None:
    batches, alphabet = to_target.text(batch=4, length=8, characters=2000)
    seen = list(batches(0))
    assert sum(len(x) for x, _ in seen) == 2000 // 9 and alphabet > 20
    for x, y in seen:
        assert torch.equal(x[:, 1:], y[:, :-1])
    again, other = next(batches(0)), next(batches(1))
    assert torch.equal(seen[0][0], again[0]) and not torch.equal(seen[0][0], other[0])


def test_intervals_of_a_rate_are_exact() -> None:
    low, high = interval(3, 40)
    assert low == pytest.approx(0.01574, abs=1e-5) and high == pytest.approx(0.20387, abs=1e-5)
    assert interval(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)


@pytest.mark.slow
def test_paper_figures_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch.manual_seed(0)
    data = torch.randn(1024, 12), torch.nn.functional.one_hot(torch.arange(1024) % 10, 10).float() - 0.1
    monkeypatch.setattr(paper, "images", lambda folder: data)
    monkeypatch.setattr(paper, "WIDTHS", (64, 96))
    monkeypatch.setattr(paper, "ALIGNED_AT", (2, 4))
    monkeypatch.setattr(paper, "MOMENTS", (0, 1, 3))
    monkeypatch.setattr(paper, "POWERS", range(-7, -4))
    words = ["--only", "kfac/mup", "--seeds", "2", "--out", str(tmp_path / "runs.jsonl")]
    assert paper.main(words) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["kind"] for row in rows].count("features") == 4
    assert {row["power"] for row in rows if row["kind"] == "loss"} <= {-7, -6, -5}
    table = capsys.readouterr().out
    assert "| kfac, mup | tr A | 0 | +0.00 ± 0.00 |" in table  # the first input is data
    assert paper.main([*words, "--table"]) == 0
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines  # nothing is run again


def test_paper_slope_and_interval() -> None:
    assert paper.slope({64: 3.0, 128: 6.0, 512: 24.0}) == pytest.approx(1.0)
    assert paper.interval([1.0, 3.0]) == "+2.00 ± 12.71"


# Steps to AdamW's loss with a rate tuned narrow -------------------------------------------------------------


def test_gains_count_steps_and_seconds_to_the_target() -> None:
    adam = {"final": 2.0, "curve": [2.0] * 10, "cpu_seconds": 10.0}
    # The mean over the last five of ten buckets of ten steps is at 2.0 after eight: (3 + 2 + 2 + 2 + 1) / 5.
    faster = {"curve": [9.0, 9.0, 9.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0], "cpu_seconds": 20.0}
    in_steps, in_seconds = speedup.gains(faster, adam, 100)
    assert in_steps == pytest.approx(100 / 80)
    assert in_seconds == pytest.approx(10.0 / (20.0 * 0.8))
    never = {**faster, "curve": [9.0] * 10}
    assert speedup.gains(never, adam, 100) == (0.0, 0.0)
    assert speedup.gains(faster, {**adam, "final": math.inf}, 100) == (0.0, 0.0)


@pytest.mark.slow
def test_speedup_tunes_narrow_trains_wide_and_goes_on(tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs.jsonl"
    words = ["--widths", "128", "--seeds", "1", "--optimizers", "adamw", "muon", "--steps", "50"]
    speedup.main([*words, "--minutes", "-1", "--out", str(out)])
    assert "to be continued" in capsys.readouterr().out
    speedup.main([*words, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for optimizer in ("adamw", "muon"):
        own = [row for row in rows if row["optimizer"] == optimizer]
        tuned = {row["lr"]: row["final"] for row in own if row["width"] == 64}
        best = min(tuned, key=tuned.__getitem__)
        assert {best / 2, best * 2} <= tuned.keys()
        wide = [row for row in own if row["width"] == 128]
        assert {(row["parameterization"], row["lr"]) for row in wide} == {("mup", best), ("standard", best)}
    table = capsys.readouterr().out
    speedup.main([*words, "--table", "--out", str(out)])
    assert capsys.readouterr().out == table and len(out.read_text().splitlines()) == len(rows)
