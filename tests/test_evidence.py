"""The evidence benchmark at tiny sizes: it is what its page says, goes on where it was, and judges right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import write
from torch import nn

from benchmarks import evidence, evidence_report, tasks
from benchmarks import kernels as kernel_module
from benchmarks.evidence import Row, Setup, Tuned
from benchmarks.evidence_report import Cell
from benchmarks.kernels import RIDGES, kernels, ridge_losses

pytestmark = pytest.mark.filterwarnings("ignore:mupass:UserWarning")
PAGE = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
WORDS = "--only ^staircase/adamw/(mup|standard) --widths 128 --steps 50 --seeds 2".split()
MUP, STANDARD = Row("staircase", "adamw", "mup"), Row("staircase", "adamw", "standard")


@pytest.fixture(autouse=True)
def _one_thread():
    """The script works with one thread; not the tests after it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# The design ------------------------------------------------------------------------------------------------


def listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def test_the_page_says_what_the_script_does() -> None:
    for name, design in evidence.DESIGNS.items():
        between = " and ".join(map(str, design.spread))
        cells = (name, design.batch, listed(design.widths), listed(design.core), between)
        assert "| " + " | ".join(map(str, cells)) + " |" in PAGE
        assert design.widths[0] == evidence.BASE == tasks.TASKS[name][0]
    flat = " ".join(PAGE.split())
    assert f"Parameterizations: {', '.join(evidence.PARAMETERIZATIONS)}, all of base width" in flat
    assert f"Optimizers: {', '.join(evidence.OPTIMIZERS)}." in flat
    assert f" {evidence.STEPS} steps, the rate falls linearly to zero" in flat
    assert f"Seeds 1 to {evidence.SEEDS}," in flat and list(Setup().fresh_seeds()) == [1, 2, 3, 4, 5]
    assert f"above {evidence.BLOWN_UP:.0f} times the untrained" in flat
    assert f"over {evidence.FEATURE_SAMPLES} held-out samples" in flat
    assert f"on {evidence.KERNELS[0]}, {evidence.KERNELS[1]} and {evidence.KERNELS[2]} samples" in flat
    assert evidence.KERNELS[-1] == evidence.STEPS * evidence.DESIGNS["staircase"].batch
    assert "Ridges of 1e-4, 1e-2 and 1 times" in flat and RIDGES == (1e-4, 1e-2, 1.0)
    assert f"starts at {evidence.TORCH_RATES['adamw']}" in flat
    assert f"starts at {evidence.TORCH_RATES['sgd']}" in flat
    for number, criterion in evidence_report.CRITERIA.items():
        assert f"\n{number}. {criterion}\n" in PAGE


def test_the_core_is_a_part_of_the_whole() -> None:
    core, whole = Setup(), Setup(long=True)
    assert set(core.rows()) < set(whole.rows())
    assert len(core.rows()) == 2 * 3 * 2 and len(whole.rows()) == 3 * 10 * 3
    assert core.widths_of("staircase") == [64, 128, 256, 512] and core.widths_of("image_pairs") == []
    assert core.spread_of("staircase") == [64, 512]
    assert core.spread_of("gpt_64") == []  # there is nothing to compare width 64 with
    assert Setup(True, (256,)).widths_of("gpt_64") == [64, 256]
    assert [str(row) for row in core.rows(["^gpt.*/kfac/m"])] == ["gpt_64/kfac/mup"]


def test_seeds_are_run_at_both_rates_and_beside_the_own_one() -> None:
    assert evidence.seed_powers(64, 0, 0, []) == [0]
    assert evidence.seed_powers(128, 0, -2, [64, 512]) == [0, -2]
    assert evidence.seed_powers(512, 0, -1, [64, 512]) == [0, -1, -2]
    assert evidence.seed_powers(512, 3, 0, [64, 512]) == [3, 0, -1, 1]


def test_other_arguments_are_other_runs(monkeypatch) -> None:
    before = evidence.settings(MUP, 50)
    assert before != evidence.settings(MUP, 60)
    assert before != evidence.settings(replace(MUP, optimizer="sgd"), 50)
    constant = [evidence.settings(replace(MUP, optimizer=name), 50) for name in ("kfac", "kfac_constant")]
    assert constant[0] != constant[1]
    monkeypatch.setitem(evidence.TORCH_RATES, "adamw", 0.5)
    assert before != evidence.settings(MUP, 50)


# Runs ------------------------------------------------------------------------------------------------------


def test_a_schedule_scales_all_rates_and_ends_at_zero() -> None:
    work = tasks.task("staircase")
    optimizer = evidence.make("muon", evidence.build(replace(MUP, optimizer="muon"), 128, 0, work))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len(set(rates)) > 1  # Muon's own, and that of its fallback
    schedule = evidence.linear_decay(optimizer, -3, 4)
    for left in (4, 3, 2, 1, 0):
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([rate / 8 * left / 4 for rate in rates])
        optimizer.step()
        schedule.step()


@pytest.mark.sample(every=6)
@pytest.mark.parametrize("optimizer", evidence.OPTIMIZERS)
def test_parameterizations_are_one_network_at_the_base_width(optimizer: str, tmp_path: Path) -> None:
    setup = Setup(steps=10, out=tmp_path / "log")
    power = 0 if optimizer == "sgd" else -2
    runs = []
    for kind in evidence.PARAMETERIZATIONS:
        runs.append(evidence.train(Row("staircase", optimizer, kind), 64, power, 1, setup))
    assert runs[0]["final"] < runs[0]["initial"] and runs[0]["change"] > 0
    for run in runs[1:]:
        assert run["final"] == pytest.approx(runs[0]["final"], rel=1e-4)


def test_features_are_the_inputs_of_the_readout() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    x = torch.randn(7, 3)
    assert torch.equal(evidence.features(model, x), model[:4](x))
    assert not model[-1]._forward_pre_hooks
    gpt = tasks.task("gpt_64").build(64)
    ids = tasks.task("gpt_64").test[0][:2]
    with torch.no_grad():
        assert torch.allclose(gpt.readout(evidence.features(gpt, ids)), gpt(ids))


def test_a_run_that_blows_up_counts_as_untrained(tmp_path: Path) -> None:
    line = evidence.train(MUP, 64, 20, 1, Setup(steps=50, out=tmp_path / "log"))
    assert line["final"] == math.inf and 0.4 < line["initial"] < 0.7
    assert evidence_report.loss_of(line) == line["initial"]


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evidence, "CORE_KERNELS", (64,))
    monkeypatch.setattr(evidence_report, "KERNELS", (64,))
    monkeypatch.setitem(evidence.TORCH_RATES, "adamw", 0.016)  # near the best one: a short grid
    path = tmp_path / "evidence.jsonl"
    words = [*WORDS, "--out", str(path)]
    words[1:2] = [words[1], "^staircase/kernel"]
    assert evidence.main([*words, "--minutes", "0"]) == 0 and not path.exists()
    assert evidence.main([*words, "--estimate"]) == 0 and not path.exists()
    capsys.readouterr()
    assert evidence.main(words) == 0
    printed, whole = capsys.readouterr().out, path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    setup = Setup(widths=(128,), steps=50, seeds=2, out=path)
    for row in (MUP, STANDARD):
        mine = [
            line
            for line in rows
            if (line["optimizer"], line["parameterization"]) == ("adamw", row.parameterization)
        ]
        own = {width: evidence.tuned(setup.log(), row, width, setup) for width in (64, 128)}
        for width in (64, 128):
            here = [line for line in mine if line["width"] == width]
            grid = {line["power"]: line["final"] for line in here if line["seed"] == 0}
            assert own[width] == Tuned(min(grid, key=grid.__getitem__), True)
            fresh = {(line["power"], line["seed"]) for line in here if line["seed"]}
            powers = {own[64].power, own[width].power}
            assert fresh == {(power, seed) for power in powers for seed in (1, 2)}
            assert evidence.row_is_done(setup.log(), row, width, setup)
    # Killed, it does again what is lost, and nothing else; the table is that of the lines.
    lost = rows.pop(-3)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not evidence.row_is_done(setup.log(), STANDARD, 128, setup)
    assert evidence.main(words) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:-1] == rows and again[-1]["final"] == lost["final"]
    shown = [line for line in printed.splitlines() if line.startswith("|")]
    capsys.readouterr()
    assert evidence.main([*words, "--table"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == shown
    assert any(line.startswith("| adamw | mup | 128 |") for line in shown)
    assert any(line.startswith("| staircase | NTK | 64 |") for line in shown)
    assert any(line.startswith("| 1 | staircase, adamw, 128 |") for line in shown)
    assert evidence.minutes_left(MUP, setup, {})[1] == 0


@pytest.mark.slow
def test_committed_lines_are_read() -> None:
    assert evidence_report.tables(Setup()).startswith("Commit ")


def test_a_grid_that_does_not_bracket_is_marked(tmp_path: Path) -> None:
    setup = Setup(steps=50, out=tmp_path / "log")
    log = setup.log()
    for power, final in {-1: math.inf, 0: 0.4, 1: 0.3}.items():
        log.add({**setup.key(MUP, 64, power, 0), "final": final})
    assert evidence.tuned(log, MUP, 64, setup) == Tuned(1, False)
    assert evidence_report.rate_text(Tuned(1, False)) == "2^1 !"
    log.add({**setup.key(MUP, 64, 2, 0), "final": 0.3})
    assert evidence.tuned(log, MUP, 64, setup) == Tuned(1, True)
    assert evidence.tuned(log, MUP, 128, setup) is None


def test_steps_and_numbers_that_do_not_fit_are_refused(capsys) -> None:
    for word in ("--steps=55", "--steps=40", "--seeds=0"):
        with pytest.raises(SystemExit):
            evidence.parse([word])
    assert "a multiple of 10, from 50" in capsys.readouterr().err


def test_pairs_of_images_need_both_images(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "data", compressed=False, train=300, test=60))
    work = tasks.task("image_pairs", folder)
    x, y = next(work.batches(2000, 0))
    assert x.shape == (2000, 392) and set(y.unique().tolist()) == {-1.0, 1.0}
    signs = {}
    data = tasks.fashion_mnist(folder, 300, 60)
    for image, label in zip(data.train_x, data.train_y.tolist(), strict=True):
        small = torch.nn.functional.avg_pool2d(image, 2).flatten()
        signs[small.numpy().tobytes()] = 1.0 if label in (0, 2, 4, 6, 8) else -1.0
    for pair, target in zip(x[:50], y[:50, 0].tolist(), strict=True):
        left, right = (half.contiguous().numpy().tobytes() for half in pair.split(196))
        assert signs[left] * signs[right] == target


# Kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_are_those_of_a_wide_network() -> None:
    torch.manual_seed(0)
    width, x = 2048, torch.randn(4, 6)
    layers = [
        nn.Linear(6, width, bias=False),
        nn.Linear(width, width, bias=False),
        nn.Linear(width, 1, bias=False),
    ]
    for layer in layers[:2]:
        nn.init.normal_(layer.weight)
    total = {"nngp": torch.zeros(4, 4), "ntk": torch.zeros(4, 4)}
    draws = 6
    for _ in range(draws):
        for layer in layers:
            nn.init.normal_(layer.weight)
        # The NTK's own scaling: weights of variance 1 behind the roots of 1 / fan_in and 2 / fan_in.
        h = torch.relu(layers[0](x) / 6**0.5)
        g = torch.relu(layers[1](h) * (2 / width) ** 0.5)
        out = layers[2](g) * (2 / width) ** 0.5
        rows = []
        for value in out[:, 0]:
            grads = torch.autograd.grad(value, [layer.weight for layer in layers], retain_graph=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        jacobian = torch.stack(rows)
        total["ntk"] += jacobian @ jacobian.T / draws
        total["nngp"] += (g @ g.T * 2 / width).detach() / draws
    found = kernels(x, x)
    for name, expected in total.items():
        assert torch.allclose(found[name], expected, rtol=0.1, atol=0.05 * float(expected.max()))


def test_a_kernel_in_parts_is_the_kernel(monkeypatch) -> None:
    monkeypatch.setattr(kernel_module, "ROWS", 3)
    x, z = torch.randn(7, 4), torch.randn(5, 4)
    for name, whole in kernels(x, z).items():
        assert torch.allclose(kernel_module.kernel(name, x, z), whole)


def test_kernel_regression_fits_what_is_smooth() -> None:
    generator = torch.Generator().manual_seed(0)

    def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 3, generator=generator)
        return x, x[:, :1]

    losses = ridge_losses(sample(400), sample(100))
    assert losses.keys() == {"nngp", "ntk"} and all(loss < 0.02 for loss in losses.values())


# Judgement -------------------------------------------------------------------------------------------------


def test_the_vertex_of_a_parabola() -> None:
    for at in (-0.4, 0.0, 0.3):
        losses = [math.exp((power - at) ** 2) for power in (-1, 0, 1)]
        assert evidence_report.vertex(losses) == pytest.approx(at)
    assert evidence_report.vertex([1.0, 2.0, 3.0]) == -1 and evidence_report.vertex([3.0, 2.0, 1.0]) == 1
    assert evidence_report.vertex([1.0, 1.0, 1.0]) == 0


def line(final: float, curve: list[float] | None = None, change: float = 1.0) -> dict[str, Any]:
    return {"final": final, "initial": 0.5, "curve": curve or [final] * 10, "change": change}


def cell(
    row: Row, width: int, finals: dict[int, list[float]], narrow: int, own: int, change: float = 1.0
) -> Cell:
    by_power = {}
    for power, losses in finals.items():
        by_power[power] = {seed: line(loss, change=change) for seed, loss in enumerate(losses, 1)}
    return Cell(row, width, Tuned(narrow, True), Tuned(own, True), by_power, 100)


def test_regrets_are_paired_by_seed() -> None:
    found = cell(MUP, 128, {0: [0.3, 0.4, math.inf], 1: [0.2, 0.2, 0.2]}, 0, 1)
    differences = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert found.regret().mean == pytest.approx(0.2)
    assert found.regret().error == pytest.approx((differences.std() / 3**0.5).item())
    # The mean over the last 50 steps is there after 50; the diverged run costs all.
    assert found.regret_in_steps() == pytest.approx((50 + 50 + 100) / 3)
    slow = replace(
        found, by_power={0: {1: line(0.5)}, 1: {1: line(0.2, [0.9] * 5 + [0.5, 0.5, 0.1, 0.1, 0.1])}}
    )
    assert slow.regret_in_steps() == 10  # means of 0.9, 0.82, 0.74, 0.58, 0.42 and, at the end, 0.26
    worse = replace(found, by_power={0: {1: line(0.1)}, 1: {1: line(0.2)}})
    assert worse.regret_in_steps() == 0


def test_the_shift_has_students_interval() -> None:
    def curve(optima: list[float], middle: int) -> dict[int, list[float]]:
        powers = (middle - 1, middle, middle + 1)
        return {power: [0.1 * math.exp((power - at) ** 2) for at in optima] for power in powers}

    narrow = cell(MUP, 64, curve([0.1, -0.1, 0.2], 0), 0, 0)
    wide = cell(MUP, 512, curve([2.2, 1.9, 2.4], 2), 0, 2)
    moves = torch.tensor([2.1, 2.0, 2.2], dtype=torch.float64)
    mean, half = evidence_report.shift(narrow, wide)
    assert mean == pytest.approx(2.1) and half == pytest.approx(4.303 * (moves.std() / 3**0.5).item())
    assert evidence_report.shift(narrow, cell(MUP, 512, {0: [0.1] * 3}, 0, 0)) is None


def judged(mup: dict[int, Cell], standard: dict[int, Cell]) -> dict[int, bool]:
    return {finding.number: finding.against for finding in evidence_report.judge(mup, standard)}


def test_each_criterion_can_fail() -> None:
    def start(row: Row) -> Cell:
        return cell(row, 64, {-1: [0.2, 0.2], 0: [0.1, 0.11], 1: [0.2, 0.2]}, 0, 0)

    def wide(
        row: Row, transferred: list[float], retuned: list[float], change: float = 1.0, own: int = 1
    ) -> Cell:
        finals = {own - 1: [0.9, 0.9], own + 1: [0.9, 0.9], own: retuned, 0: transferred}
        return cell(row, 512, finals, 0, own, change)

    good = wide(MUP, [0.1, 0.11], [0.1, 0.10])
    bad = wide(STANDARD, [0.3, 0.31], [0.2, 0.21])
    for_us = judged({64: start(MUP), 512: good}, {64: start(STANDARD), 512: bad})
    assert for_us == dict.fromkeys((1, 2, 3, 4, 5, 6), False)
    swapped = judged(
        {64: start(MUP), 512: wide(MUP, [0.3, 0.31], [0.2, 0.21], 0.4, 3)},
        {64: start(STANDARD), 512: wide(STANDARD, [0.1, 0.11], [0.1, 0.10])},
    )
    assert swapped == dict.fromkeys((1, 2, 3, 4, 5, 6), True)
    assert judged({64: start(MUP)}, {64: start(STANDARD)}) == {}  # nothing wider was run
    one = (
        {w: cell(MUP, w, {0: [0.1]}, 0, 0) for w in (64, 512)},
        {w: cell(STANDARD, w, {0: [0.3]}, 0, 0) for w in (64, 512)},
    )
    assert judged(*one)[1]  # one seed has no error


def test_kernels_and_damping_are_judged(tmp_path: Path) -> None:
    log = Setup(out=tmp_path / "log").log()
    kfac = Row("staircase", "kfac", "mup")
    constant = replace(kfac, optimizer="kfac_constant")
    found = {
        kfac: {512: cell(kfac, 512, {0: [0.2, 0.2], 1: [0.1, 0.1]}, 0, 1)},
        constant: {512: cell(constant, 512, {0: [0.2, 0.2], 1: [0.15, 0.15]}, 0, 1)},
    }
    assert [f.number for f in evidence_report.findings(log, found)] == [8]
    assert next(evidence_report.judge_damping(found)).against
    for samples, loss in ((2048, 0.1), (8192, 0.25)):
        log.add({**evidence.kernel_key("staircase", "ntk", samples), "final": loss})
    assert not next(evidence_report.judge_kernels(log, found)).against  # the most samples count
    log.add({**evidence.kernel_key("staircase", "nngp", 8192), "final": 0.2})
    assert next(evidence_report.judge_kernels(log, found)).against


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    setup = Setup(steps=50, seeds=2, out=tmp_path / "log")
    with pytest.raises(ValueError, match="no complete rows of staircase"):
        evidence_report.draw(setup, tmp_path / "none.svg")
    log = setup.log()
    for row in (MUP, STANDARD):
        for width in (64, 128):
            for seed in range(3):
                log.add({**setup.key(row, width, 0, seed), **line(0.1 + 0.01 * seed)})
    evidence_report.draw(setup, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
