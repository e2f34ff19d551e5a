"""The benchmarks of defaults and of quality at tiny sizes: they run, go on where they were, judge right."""

from __future__ import annotations

import json
import math
import pickle
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_examples import write
from test_muon import needs_torch_muon
from torch import nn

import mupass
from benchmarks import char_transfer, defaults, optimizer_peers, peers, quality, tasks
from benchmarks.log import Log, LogError, digest

pytestmark = pytest.mark.filterwarnings("ignore:mupass:UserWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return str(write(tmp_path_factory.mktemp("images") / "data", compressed=False, train=300, test=60))


# Tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=8)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_the_same_by_seed_and_begins_at_chance(name: str, images: str) -> None:
    task = tasks.task(name, images)
    first, again, other = (next(task.batches(16, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and len(first[0]) == 16
    torch.manual_seed(0)
    model = task.build(task.base)
    model(first[0][:2])
    chance = {"regression": 1.0, "staircase": 0.5, "image_pairs": 0.5}.get(name)
    if chance is None:
        chance = math.log(model(first[0][:2]).shape[-1])
    initial = task.evaluate(model)
    assert initial == pytest.approx(chance, rel=0.2) and model.training
    wide = mupass.transform(task.build(2 * task.base), task.test[0][:2], base=task.base)
    assert sum(p.numel() for p in wide.parameters()) > 1.5 * sum(p.numel() for p in model.parameters())


def test_evaluation_is_the_mean_loss_in_evaluation_mode(images: str) -> None:
    task = tasks.task("cnn_norm", images)
    x, y = task.test
    task = tasks.Task(task.build, task.batches, task.loss, (x.repeat(9, 1, 1, 1), y.repeat(9)), task.base)
    model = task.build(4)
    found = task.evaluate(model)  # three chunks, the last one short
    reference = F.cross_entropy(model.eval().double()(x.double()), y).item()
    assert found == pytest.approx(reference, rel=1e-5)


def test_made_data_is_what_it_is_said_to_be() -> None:
    x, y = next(tasks.task("staircase").batches(64, 3))
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    by_hand = (x[:, 0] + x[:, 0] * x[:, 1] + x[:, 0] * x[:, 1] * x[:, 2]) / 3**0.5
    assert torch.allclose(y[:, 0], by_hand)
    loss = tasks.task("staircase").loss(torch.zeros_like(y), y)
    assert loss.item() == pytest.approx(0.5 * y.square().mean().item())
    batches = tasks.task("regression").batches(8, 0)
    a, b = next(batches), next(batches)
    assert not torch.equal(a[0], b[0])
    noise = tasks.noisy_teacher(4000, torch.Generator().manual_seed(1))
    same = tasks.noisy_teacher(4000, torch.Generator().manual_seed(1))
    assert torch.equal(noise[1], same[1])  # one teacher for all
    fixed = torch.Generator().manual_seed(0)
    first, second = torch.randn(32, 64, generator=fixed), torch.randn(64, 4, generator=fixed)
    residual = noise[1] - torch.tanh(2 * noise[0] @ first / 32**0.5) @ (2 * second) / 8
    assert residual.std().item() == pytest.approx(0.1, rel=0.05)


def test_every_sample_comes_once_before_any_comes_again() -> None:
    x = torch.arange(20)
    seen = [rows for rows, _ in islice(tasks.passes(x, x, 5, 0), 8)]
    for half in (seen[:4], seen[4:]):
        assert sorted(torch.cat(half).tolist()) == list(range(20))
    assert not torch.equal(seen[0], seen[4])
    with pytest.raises(ValueError, match="a batch of 21 from 20"):
        next(tasks.passes(x, x, 21, 0))


def test_training_ends_at_a_loss_above_the_bound() -> None:
    task = tasks.task("regression")
    model = task.build(8)
    before = [p.clone() for p in model.parameters()]
    run = partial(tasks.training, model, [torch.optim.SGD(model.parameters(), 0.1)], task)
    assert len(list(run(task.batches(4, 0), 5, 1e-9))) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert len(list(run(task.batches(4, 0), 5, 1e9))) == 5
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# Runs on disk ----------------------------------------------------------------------------------------------


def test_a_log_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "results" / "log.jsonl"
    log, other = Log(path, ("a",)), Log(path, ("a",))
    log.add({"a": 1, "b": 2})
    other.add({"a": 2, "b": math.inf})
    with path.open("a") as stream:
        stream.write('{"a": 3, "b"')
    again = Log(path, ("a",))
    assert "line 3 is not whole" in capsys.readouterr().err
    assert again.get(a=3) is None and again.get(a=2) == {"a": 2, "b": math.inf}
    again.add({"a": 3, "b": 4})
    assert [row["a"] for row in Log(path, ("a",)).some()] == [1, 2, 3]
    with pytest.raises(LogError, match="line 1 is no run"):
        Log(path, ("c",))


def nested():
    def named() -> None: ...

    return named


def test_a_digest_knows_every_setting_and_no_address() -> None:
    settings = {"lr": 0.1, "roles": frozenset({"a", "b", "c"}), "type": torch.bfloat16, "call": nested()}
    found = digest(settings)
    assert found == digest({**dict(reversed(settings.items())), "call": nested()})
    changed = [{**settings, key: "other"} for key in settings]
    assert len({found, *map(digest, changed)}) == 5
    assert digest({"roles": {"x", "y"}}) == digest({"roles": {"y", "x"}})


# Defaults --------------------------------------------------------------------------------------------------


def walk(loss) -> dict[int, float]:
    losses: dict[int, float] = {}
    while (power := defaults.next_power(losses)) is not None:
        assert power not in losses
        losses[power] = loss(power)
    return losses


def test_a_cell_goes_on_until_its_best_rate_is_inside() -> None:
    assert sorted(walk(lambda p: p**2)) == [-2, -1, 0, 1, 2]
    assert sorted(walk(lambda p: (p - 3) ** 2)) == [-2, -1, 0, 1, 2, 3, 4]
    assert sorted(walk(lambda p: -p)) == [-2, -1, 0, 1, 2, 3, 4]
    assert sorted(walk(lambda p: math.inf)) == [-4, -3, -2, -1, 0, 1, 2]


WORDS = "--only ^adamw/regression/32/16 --steps 16".split()


@pytest.mark.slow
def test_a_benchmark_goes_on_where_it_was(tmp_path: Path, capsys) -> None:
    path = tmp_path / "defaults.jsonl"
    words = [*WORDS, "--out", str(path)]
    assert defaults.main([*words, "--minutes", "0"]) == 0 and not path.exists()
    assert "0 of 1 cells are done" in capsys.readouterr().out
    assert defaults.main(words) == 0
    whole, printed = path.read_text(), capsys.readouterr().out
    assert "1 of 1 cells are done" in printed and "diverged at the default: none" in printed
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))  # killed after two runs
    assert defaults.main(words) == 0

    def losses(text: str) -> list[tuple]:
        rows = map(json.loads, text.splitlines())
        return [(row["power"], row["lr"], row["initial"], row["final"], row["worst"]) for row in rows]

    assert losses(path.read_text()) == losses(whole)
    rates = {power: lr for power, lr, *_ in losses(whole)}
    assert all(lr == rates[0] * 2.0**power for power, lr in rates.items()) and rates[0] == 1e-3
    again = path.read_text()
    capsys.readouterr()
    assert defaults.main(words) == 0 and path.read_text() == again
    assert defaults.main([*words, "--table"]) == 0 and path.read_text() == again
    # Other defaults are other runs.
    assert defaults.main([*words, "--set", "adamw.betas=(0.8,0.9)", "--lr", "adamw=0.01"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["settings"] for row in rows}) == 2 and len(rows) > len(rates) + 4
    assert rows[-1]["arguments"] == {"betas": "(0.8, 0.9)"}


def test_a_run_that_blows_up_has_diverged(tmp_path: Path) -> None:
    choices = defaults.Choices(steps=8, out=tmp_path / "log")
    cell = defaults.Cell("adamw", "regression", 32, 16)
    calm, wild = (defaults.train(cell, power, 1e-3, choices) for power in (0, 16))
    assert not calm["diverged"] and calm["final"] < calm["initial"] and calm["worst"] < 3 * calm["initial"]
    assert wild["diverged"] and not wild["final"] <= wild["initial"] and wild["worst"] > calm["worst"]


class Counted(mupass.Muon):
    """Muon with a default rate; it remembers what it was given."""

    given: list[tuple] = []

    def __init__(self, model: nn.Module, lr: float = 0.5, **settings: float) -> None:
        self.given.append((lr, settings))
        super().__init__(model, lr, **settings)


class Bare(mupass.Muon):
    """Muon without a default."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model, lr)


@pytest.mark.slow
def test_at_the_default_an_optimizer_is_given_the_model_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(defaults.OPTIMIZERS, "muon", (Counted, {}))
    monkeypatch.setattr(Counted, "given", [])
    words = ["--only", "^muon/staircase/256/16", "--steps", "4", "--out", str(tmp_path / "log")]
    assert defaults.main(words) == 0
    assert Counted.given[0] == (0.5, {})  # asked for its rate, which width does not change
    assert [lr for lr, _ in Counted.given[1:6]] == [0.5, 1.0, 0.25, 2.0, 0.125]
    monkeypatch.setitem(defaults.OPTIMIZERS, "muon", (Bare, {}))
    capsys.readouterr()
    assert defaults.main(words) == 2
    assert "muon has no default learning rate: give one, --lr muon=VALUE" in capsys.readouterr().err
    assert defaults.main([*words, "--lr", "muon=0.01"]) == 0


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("optimizer", defaults.OPTIMIZERS)
def test_every_optimizer_takes_part(optimizer: str, tmp_path: Path) -> None:
    # What an optimizer does not take has a rate of its own.
    own = {} if optimizer == "adamw" else {optimizer: {"fallback_lr": 2e-6}}
    choices = defaults.Choices(arguments=own, steps=3, out=tmp_path / "log")
    row = defaults.train(defaults.Cell(optimizer, "gpt", 32, 16), 1, 1e-6, choices)
    assert row["lr"] == 2e-6 and row["final"] == pytest.approx(row["initial"], rel=0.05)


def outcome(losses: dict[int, float], initial: float = 1.0) -> defaults.Outcome:
    rows = {p: {"final": x, "diverged": not x <= initial, "initial": initial} for p, x in losses.items()}
    return defaults.Outcome(defaults.Cell("kfac", "mlp", 32, 16), rows)


def test_the_judgement_of_a_cell() -> None:
    good = outcome({-2: 0.9, -1: 0.4, 0: 0.3, 1: 0.29, 2: 0.5})
    assert good.complete and good.best == 1 and good.near(0) and not good.near(-1)
    assert good.diverged([0]) == 0 and not good.near(3)
    slow = outcome({-2: 0.9, -1: 0.8, 0: 0.7, 1: 0.5, 2: 0.3})
    assert not slow.complete and not slow.near(0)
    wild = outcome({-2: 0.5, -1: 0.7, 0: 1.2, 1: math.inf, 2: math.nan})
    assert wild.best == -2 and wild.diverged([0]) == 1 and wild.diverged(defaults.NEAR) == 3
    assert outcome({p: math.inf for p in range(-4, 3)}).best is None
    assert defaults.is_near(0.012, 0.003) and not defaults.is_near(0.0131, 0.003)
    assert defaults.is_near(1.05, 1.0) and not defaults.is_near(1.06, 1.0)
    assert not defaults.is_near(math.inf, math.inf)
    line = defaults.summary("kfac", [good, wild]).split()
    assert line[:7] == ["kfac", "2", "1", "30.0", "%", "50", "%"]


@pytest.mark.parametrize("word", ["--lr=kfac", "--lr=kafc=1", "--set=kfac=1", "--set=nobody.damping=1"])
def test_words_that_mean_nothing_are_refused(word: str, capsys) -> None:
    with pytest.raises(SystemExit):
        defaults.parse([word])
    assert "kfac" in capsys.readouterr().err


@pytest.mark.slow
def test_estimates_count_what_is_left(tmp_path: Path, capsys) -> None:
    words = [*WORDS, "--out", str(tmp_path / "log")]
    assert defaults.main([*words, "--estimate"]) == 0
    assert not (tmp_path / "log").exists()
    assert "adamw" in capsys.readouterr().out
    assert defaults.main(words) == 0
    spent, left = defaults.left(defaults.cells(WORDS[1:2])[0], defaults.parse(words)[1])
    assert spent > 0 and left == 0


def test_work_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    work = partial(defaults.finish, choices=defaults.Choices(arguments={"kfac": {"damping": 1.0}}), until=0.0)
    assert pickle.loads(pickle.dumps(work))(defaults.cells()[0]) == ""
    setup = quality.Setup(quality.CONTESTANTS, out=tmp_path / "log")
    again = pickle.loads(pickle.dumps(setup))
    assert again == setup and again.key("run", "x", "AdamW", 1.0, 0) == setup.key("run", "x", "AdamW", 1.0, 0)


# Quality ---------------------------------------------------------------------------------------------------


def test_a_search_leaves_rates_that_diverge_downwards() -> None:
    found = char_transfer.search(lambda x: (math.log2(x) + 4) ** 2 if x < 0.2 else math.inf, 2.0, 2)
    assert found.best == 2**-4 and found.bracketed


def test_a_comparison_is_paired() -> None:
    found = quality.Comparison.of([1.0, 2.0, 3.0], [1.1, 2.0, 2.8])
    assert found.mean == pytest.approx(0.1 / 3) and found.peer == pytest.approx(5.9 / 3)
    differences = torch.tensor([-0.1, 0.0, 0.2], dtype=torch.float64)
    assert found.error == pytest.approx((differences.std() / 3**0.5).item()) and found.holds
    assert not quality.Comparison.of([1.02, 1.02], [1.0, 1.0]).holds
    assert quality.Comparison.of([1.009, 1.009], [1.0, 1.0]).holds


def test_adamw_reaches_its_own_loss(setup: quality.Setup) -> None:
    row = quality.train("regression", "AdamW", 2.0**-8, 1, setup)
    assert len(row["curve"]) == 6 and row["final"] == pytest.approx(sum(row["curve"][1:]) / 5)
    assert quality.to_target({1: row}, {1: row})[1] == 60
    assert quality.main(["--steps", "55"]) == 2


def test_steps_to_a_target_are_counted_by_the_trailing_mean() -> None:
    row = {"curve": [5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]}
    assert quality.reaches(row, 3.0) == 50 and quality.reaches(row, 2.0) == 60
    assert quality.reaches(row, 1.0) is None
    rows = {1: row, 2: row}
    assert quality.to_target(rows, {1: {"final": 3.0}, 2: {"final": 2.0}})[1] == 55
    assert quality.to_target(rows, {1: {"final": 3.0}, 2: {"final": 1.0}})[0] == "1 of 2"


@pytest.fixture
def setup(tmp_path: Path, monkeypatch) -> quality.Setup:
    monkeypatch.setattr(quality, "TASKS", {"regression": 16})
    return quality.Setup(quality.CONTESTANTS, 60, (1, 2), out=tmp_path / "quality.jsonl")


def test_contestants_see_the_same_weights_and_batches(setup: quality.Setup) -> None:
    names = ["AdamW", "mupass SOAP", "mupass Shampoo"]
    curves = [quality.train("regression", who, 1e-12, 1, setup)["curve"] for who in names]
    assert all(curve == pytest.approx(curves[0], rel=1e-4) for curve in curves[1:])
    other = quality.train("regression", "AdamW", 1e-12, 2, setup)["curve"]
    assert other != pytest.approx(curves[0], rel=1e-2)


@pytest.mark.slow
@needs_torch_muon
def test_quality_is_tuned_timed_and_goes_on(setup: quality.Setup, monkeypatch, capsys) -> None:
    words = [
        "--only",
        "AdamW",
        "Muon",
        "Absent",
        "--steps",
        "60",
        "--seeds",
        "1",
        "2",
        "--out",
        str(setup.out),
    ]
    absent = quality.Contestant(-8, quality.adamw, package="Absent")
    monkeypatch.setattr(quality, "CONTESTANTS", {**quality.CONTESTANTS, "Absent": absent})
    monkeypatch.setitem(peers.MODULES, "Absent", "no_such_module")
    monkeypatch.setattr(quality, "PERIODS", 1)
    assert quality.main(words) == 0
    whole, printed = setup.out.read_text(), capsys.readouterr().out
    assert "left out: Absent (ModuleNotFoundError" in printed
    rows = [json.loads(line) for line in whole.splitlines()]
    for who in ("AdamW", "mupass Muon", "torch Muon"):
        mine = [row for row in rows if (row["kind"], row["contestant"]) == ("run", who)]
        tuning = {row["lr"]: row["final"] for row in mine if row["seed"] == 0}
        best = min(tuning, key=tuning.__getitem__)
        assert {best / 2, 2 * best} <= tuning.keys()
        assert [(row["seed"], row["lr"]) for row in mine if row["seed"]] == [(1, best), (2, best)]
        assert sum(row["kind"] == "time" and row["contestant"] == who for row in rows) == 1
    muon, peer, adam = (
        [row["final"] for row in rows if row["kind"] == "run" and row["contestant"] == who and row["seed"]]
        for who in ("mupass Muon", "torch Muon", "AdamW")
    )
    for rivals, name in ((peer, "torch Muon"), (adam, "AdamW")):
        mean = sum(a - b for a, b in zip(muon, rivals, strict=True)) / 2
        (line,) = (line for line in printed.splitlines() if line.startswith(f"mupass Muon / {name} "))
        assert f"{mean:+.4f} +-" in line and "nan" not in line
    # Nothing is done again; a lost run is.
    assert quality.main(words) == 0 and setup.out.read_text() == whole
    setup.out.write_text("".join(whole.splitlines(keepends=True)[1:]))
    assert quality.main(words) == 0
    last = json.loads(setup.out.read_text().splitlines()[-1])
    assert (last["lr"], last["seed"], last["final"]) == (rows[0]["lr"], rows[0]["seed"], rows[0]["final"])


def test_an_argument_of_ours_can_be_changed(setup: quality.Setup, capsys) -> None:
    words = ["--only", "AdamW", "SOAP", "--out", str(setup.out)]
    found = quality.chosen(quality.parse([*words, "--set", "SOAP.block_size=64"]))
    changed, plain = found["mupass SOAP"], quality.CONTESTANTS["mupass SOAP"]
    assert changed.settings == {**plain.settings, "block_size": 64}
    assert changed.digest(60) != plain.digest(60) != plain.digest(61)
    assert quality.main([*words, "--set", "KFAC.damping=1"]) == 2
    assert "with a NAME of SOAP" in capsys.readouterr().err


# Peers -----------------------------------------------------------------------------------------------------


def test_a_torch_without_muon_is_said_to_lack_it(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    found = peers.missing(["torch Muon", "AdamW"])
    assert found == {"torch Muon": f"torch {torch.__version__} has no torch.optim.Muon"}
    assert "torch Muon" not in optimizer_peers.others(compiled=False)


@needs_torch_muon
def test_muon_on_a_kernel_is_muon_on_its_matrix() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 3, 2, 2))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    first = peers.Flattened([kernel], lambda parts: torch.optim.Muon(parts, lr=0.1))
    second = torch.optim.Muon([matrix], lr=0.1)
    before = kernel.detach().clone()
    for _ in range(3):
        kernel.grad = torch.randn(6, 3, 2, 2)
        matrix.grad = kernel.grad.flatten(1).clone()
        first.step()
        second.step()
    assert torch.equal(kernel.flatten(1), matrix) and not torch.equal(kernel, before)


def test_muon_takes_the_hidden_matrices() -> None:
    def names(model: nn.Module) -> list[str]:
        own = {id(p) for p in peers.hidden_matrices(model)}
        return [name for name, p in model.named_parameters() if id(p) in own]

    assert names(tasks.mlp(8)) == ["2.weight"] and names(tasks.plain_cnn(4)) == ["2.weight"]
    found = names(tasks.gpt(32, 10, layers=1))
    assert found == [f"blocks.0.{part}.weight" for part in ("qkv", "proj", "up", "down")]


@pytest.mark.slow
def test_bytes_a_parameter_are_those_of_the_state() -> None:
    count = partial(optimizer_peers.bytes_a_parameter, "peer", to="", width=32, steps=2)
    assert count(lambda m: [torch.optim.SGD(m.parameters(), 0.1)]) == 0
    assert count(lambda m: [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)]) == pytest.approx(4, abs=0.01)
    assert count(lambda m: [torch.optim.AdamW(m.parameters())]) == pytest.approx(8, abs=0.02)
