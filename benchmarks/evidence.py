"""Does maximal-update parameterization matter? Tuned at width 64, used at up to 2048: the headline benchmark.

    OMP_NUM_THREADS=1 python -m benchmarks.evidence --jobs 2      # the core: what is not done, then tables
    python -m benchmarks.evidence --long --only ^staircase/kfac/  # beyond the core; names of rows
    python -m benchmarks.evidence --estimate                      # CPU minutes that are left
    python -m benchmarks.evidence --table                         # markdown tables of what was run
    python -m benchmarks.evidence --figure docs/images/evidence.svg

Written down before the first run. `docs/evidence.md` says the same, with reasons, and what would count
against us; its results came later.

* Tasks: ``staircase`` (batches of 64) and ``image_pairs`` (batches of 64), multilayer perceptrons with two
  hidden layers and half mean squared error; ``gpt_64`` (8 sequences of 64 characters), a GPT of two blocks
  and cross-entropy. All batches are new to the model. 300 steps, rates fall linearly to zero.
* Optimizers at their defaults: only rates vary, all of an optimizer's by one factor, those of its fallback
  too. ``kfac_constant`` and ``shampoo_constant`` have ``damping_mode="absolute"``: damping is constant in
  time, and has the plan's factors in width. AdamW starts from torch's default rate, without weight decay;
  SGD from 0.1, without momentum.
* Parameterizations: mup, standard, ntk, all of base width 64, where they are the same network.
* Tuning, on seed 0: rates in factors of 2 from the default at width 64, and from the rate tuned there at
  the others, until the best one has worse ones on both sides. Ties go to the lower rate.
* Seeds 1 to 5, none of which chose a rate: at the rate tuned at width 64 and at the width's own. At the
  widths of `Design.spread` also at half and twice the width's own rate, for the shift of the optimum.
* The *loss* is that on held-out data after the last step. A run whose loss is NaN or infinite, whose loss
  on a batch is above 100 times the untrained network's, or which ends above the untrained network has
  *diverged*: it counts with the untrained network's loss, and is marked.
* *Regret in loss*: the loss at the rate tuned at width 64 minus that at the width's own rate, paired by
  seed.
* *Regret in steps*: 300 minus the step at which the run at its own rate has reached what the run of the
  same seed at the rate tuned at width 64 ends at; both as means of the loss on batches over the last 50
  steps, read every 10. 0 where it does not get there, 300 where the run at the rate of width 64 diverged.
* *Shift of the optimum*, in factors of 2, from width 64: each seed's optimum is the vertex of the parabola
  through the logarithms of its losses at the width's own rate, half and twice that, or where the middle one
  is not the lowest the lower end. The interval is Student's t, 95 %, over seeds.
* *Change of features*: ``|h_T - h_0| / |h_0|`` of the readout's inputs, over 256 held-out samples.
* Kernel baselines: ridge regression with the NNGP kernel and the NTK (`benchmarks.kernels`) on 2048, 8192
  and, long, 19200 training samples, which is what a network sees. The best of three ridges on the held-out
  data.

The core is staircase up to width 512 and characters up to 128, K-FAC, Shampoo and AdamW, mup and standard,
kernels on up to 8192 samples; the rest is behind ``--long``. A run is one line of JSON, under a key that
holds the optimizer's arguments, defaults included; a benchmark that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import inspect
import math
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mupass
from benchmarks.char_transfer import search
from benchmarks.kernels import ridge_losses
from benchmarks.log import RESULTS, Log, commit, digest
from benchmarks.quality import BUCKET, LAST, Late
from benchmarks.tasks import Task, task, training

BASE, STEPS = 64, 300
SEEDS = 5  # 1 to 5; the grid is seed 0
BLOWN_UP = 100.0  # times the untrained network's loss
FEATURE_SAMPLES = 256
PARAMETERIZATIONS = ("mup", "standard", "ntk")
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kfac": (mupass.KFAC, {}),
    "kfac_constant": (mupass.KFAC, {"damping_mode": "absolute"}),
    "kfac_fixed": (mupass.KFAC, {"damping": 1e-3}),  # the default of the first results, see docs/evidence.md
    "shampoo": (mupass.Shampoo, {}),
    "shampoo_constant": (mupass.Shampoo, {"damping_mode": "absolute"}),
    "soap": (mupass.SOAP, {}),
    "soap_256": (mupass.SOAP, {"block_size": 256}),  # the default of the first results
    "muon": (mupass.Muon, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {}),
}
TORCH_RATES = {"adamw": 1e-3, "sgd": 0.1}  # where the grids of torch's optimizers start
CORE_OPTIMIZERS, CORE_PARAMETERIZATIONS = ("kfac", "shampoo", "adamw"), ("mup", "standard")
CORE_KERNELS, KERNELS = (2048, 8192), (2048, 8192, 19_200)
KEY = ("kind", "task", "optimizer", "parameterization", "width", "power", "seed", "settings")
# What the estimate counts with: rates of a grid, and steps whose time is taken.
GRID_AT_BASE, GRID_BEYOND, PROBE = 5, 4, 11


@dataclass(frozen=True)
class Design:
    """What is run on one task.

    Attributes:
        batch: Samples of a step.
        widths: All widths, the base width first.
        core: Widths that a reader runs by default.
        spread: Widths between which the shift of the optimum is measured.
        kernels: Whether kernel regression makes sense here.
    """

    batch: int
    widths: tuple[int, ...]
    core: tuple[int, ...]
    spread: tuple[int, ...]
    kernels: bool


DESIGNS = {
    "staircase": Design(64, (64, 128, 256, 512, 1024, 2048), (64, 128, 256, 512), (64, 512), True),
    "image_pairs": Design(64, (64, 128, 256, 512, 1024), (), (64, 512), True),
    "gpt_64": Design(8, (64, 128, 256, 512), (64, 128), (64, 256), False),
}


@dataclass(frozen=True)
class Row:
    """One optimizer under one parameterization on one task, at all widths."""

    task: str
    optimizer: str
    parameterization: str

    def __str__(self) -> str:
        return f"{self.task}/{self.optimizer}/{self.parameterization}"


@dataclass(frozen=True)
class Setup:
    """What the command line chose.

    Attributes:
        long: Whether to go beyond the core.
        widths: Widths to leave out all others; None for those of the design.
        steps: Steps of every run.
        seeds: Number of fresh seeds.
        data: Folder with Fashion-MNIST.
        out: File of runs.
    """

    long: bool = False
    widths: tuple[int, ...] | None = None
    steps: int = STEPS
    seeds: int = SEEDS
    data: str | None = None
    out: Path = RESULTS / "evidence.jsonl"

    def log(self) -> Log:
        return Log(self.out, KEY)

    def fresh_seeds(self) -> range:
        return range(1, self.seeds + 1)

    def widths_of(self, name: str) -> list[int]:
        """Return the widths of a task, narrowest first: the base width, and those that were chosen."""
        design = DESIGNS[name]
        widths = design.widths if self.long else design.core
        return [w for w in widths if w == BASE or self.widths is None or w in self.widths]

    def spread_of(self, name: str) -> list[int]:
        """Return the widths between which the shift is measured; none where there are not two."""
        widths = [w for w in DESIGNS[name].spread if w in self.widths_of(name)]
        return widths if len(widths) > 1 else []

    def rows(self, only: Sequence[str] = ()) -> list[Row]:
        """Return all rows, or those whose name a regular expression finds."""
        names = [name for name in DESIGNS if self.widths_of(name)]
        found = []
        for name in names:
            for optimizer in OPTIMIZERS if self.long else CORE_OPTIMIZERS:
                kinds = PARAMETERIZATIONS if self.long else CORE_PARAMETERIZATIONS
                found += [Row(name, optimizer, kind) for kind in kinds]
        return [row for row in found if not only or any(re.search(word, str(row)) for word in only)]

    def key(self, row: Row, width: int, power: int, seed: int) -> dict[str, Any]:
        """Return what tells a run from all others."""
        return {
            "kind": "run",
            **vars(row),
            "width": width,
            "power": power,
            "seed": seed,
            "settings": settings(row, self.steps),
        }


def settings(row: Row, steps: int) -> str:
    """Hash everything that a loss depends on, apart from code, width, rate and seed."""
    kind, arguments = OPTIMIZERS[row.optimizer]
    parameters = inspect.signature(kind).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    rest = {"number of steps": steps, "batch": DESIGNS[row.task].batch, "base": BASE}
    return digest({**found, **arguments, **rest, "start": TORCH_RATES.get(row.optimizer)})


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer at its defaults, for a transformed model."""
    kind, arguments = OPTIMIZERS[name]
    if name in TORCH_RATES:
        return kind(mupass.param_groups(model, TORCH_RATES[name], optimizer=name), **arguments)
    return kind(model, **arguments)


def linear_decay(optimizer: torch.optim.Optimizer, power: int, steps: int) -> Any:
    """Return the schedule: all rates times ``2^power``, falling linearly to zero over the steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**power * max(0.0, 1 - step / steps))


def build(row: Row, width: int, seed: int, work: Task) -> nn.Module:
    torch.manual_seed(seed)
    model = work.build(width)
    return mupass.transform(model, work.test[0][:2], base=BASE, parameterization=row.parameterization)


@torch.no_grad()
def features(model: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of the readout, the last linear layer of the model."""
    readout = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = readout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(x)
    hook.remove()
    return seen[0]


def train(row: Row, width: int, power: int, seed: int, setup: Setup) -> dict[str, Any]:
    """Do one run and return its line."""
    start = time.process_time()
    work, steps = task(row.task, setup.data), setup.steps
    model = build(row, width, seed, work)
    initial, samples = work.evaluate(model), work.test[0][:FEATURE_SAMPLES]
    before = features(model, samples)
    optimizer = make(row.optimizer, model)
    schedule = linear_decay(optimizer, power, steps)
    batches = work.batches(DESIGNS[row.task].batch, seed)
    bound = BLOWN_UP * initial
    losses = list(training(model, [optimizer, schedule], work, batches, steps, bound))
    whole = len(losses) == steps and losses[-1] <= bound
    final = work.evaluate(model) if whole else math.inf
    diverged = not final <= initial
    change = ((features(model, samples) - before).norm() / before.norm()).item()
    stats = optimizer.stats() if hasattr(optimizer, "stats") else {}
    return {
        **setup.key(row, width, power, seed),
        "initial": initial,
        "final": math.inf if diverged else final,
        "curve": [statistics.fmean(losses[i : i + BUCKET]) for i in range(0, len(losses), BUCKET)],
        "change": change,
        "incidents": {name: count for name, count in stats.items() if name != "steps"},
        "cpu_seconds": round(time.process_time() - start, 2),
        "commit": commit(),
    }


@dataclass(frozen=True)
class Tuned:
    """What the grid of seed 0 says at one width.

    Attributes:
        power: The best rate, as a power of 2 times the default.
        bracketed: Whether both neighbours were tried.
    """

    power: int
    bracketed: bool


def tuned(log: Log, row: Row, width: int, setup: Setup) -> Tuned | None:
    """Return the best rate of seed 0; None where nothing was run, or all of it diverged."""
    fields = setup.key(row, width, 0, 0)
    del fields["power"]
    losses = {line["power"]: line["final"] for line in log.some(**fields)}
    if not any(map(math.isfinite, losses.values())):
        return None
    power = min(losses, key=lambda p: (losses[p], p))
    return Tuned(power, {power - 1, power + 1} <= losses.keys())


def seed_powers(width: int, narrow: int, own: int, spread: Sequence[int]) -> list[int]:
    """Return the rates at which a width's fresh seeds are run, the most important first."""
    powers = [narrow, own]
    if width in spread:
        powers += [own - 1, own + 1]
    return list(dict.fromkeys(powers))


def finish(row: Row, setup: Setup, until: float) -> str:
    """Do what is missing of a row, and say how it went; start no run after the time ``until``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log = setup.log()

    def run(width: int, power: int, seed: int) -> float:
        line = log.get(**setup.key(row, width, power, seed))
        if line is None:
            if time.time() > until:
                raise Late
            line = train(row, width, power, seed, setup)
            log.add(line)
        return line["final"]

    narrow, said = 0, []
    try:
        for width in setup.widths_of(row.task):
            found = search(lambda lr, w=width: run(w, round(math.log2(lr)), 0), 2.0**narrow, 2)
            if not math.isfinite(found.losses[found.best]):
                return f"{row}: every rate diverged at width {width}"
            own = round(math.log2(found.best))
            narrow = own if width == BASE else narrow
            for power in seed_powers(width, narrow, own, setup.spread_of(row.task)):
                for seed in setup.fresh_seeds():
                    run(width, power, seed)
            said.append(f"{width}: 2^{own} {found.losses[found.best]:.3g}")
    except Late:
        said.append("to be continued")
    return f"{row}  " + ", ".join(said)


def kernel_key(name: str, kernel: str, samples: int) -> dict[str, Any]:
    """Return the key of a kernel's line; its width is the number of training samples."""
    return {
        "kind": "kernel", "task": name, "optimizer": kernel, "parameterization": None,
        "width": samples, "power": None, "seed": 1, "settings": "ridge",
    }  # fmt: skip


def kernel_jobs(setup: Setup, only: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the tasks and sample sizes of kernel regression; their rows are called ``task/kernel``."""
    for name, design in DESIGNS.items():
        wanted = not only or any(re.search(word, f"{name}/kernel") for word in only)
        if design.kernels and setup.widths_of(name) and wanted:
            for samples in KERNELS if setup.long else CORE_KERNELS:
                yield name, samples


def regress(name: str, samples: int, setup: Setup) -> None:
    """Fit both kernels on one sample size and log their losses, where that is not done."""
    log = setup.log()
    if log.get(**kernel_key(name, "ntk", samples)) is not None:
        return
    start = time.process_time()
    work = task(name, setup.data)
    losses = ridge_losses(next(work.batches(samples, 1)), work.test)
    seconds = round((time.process_time() - start) / len(losses), 2)
    for kernel, loss in losses.items():
        line = {"final": loss, "cpu_seconds": seconds, "commit": commit()}
        log.add({**kernel_key(name, kernel, samples), **line})


def step_seconds(row: Row, width: int, setup: Setup) -> tuple[float, float]:
    """Return the time of a step and of all else of a run, by a few steps."""
    work = task(row.task, setup.data)
    start = time.process_time()
    model = build(row, width, 0, work)
    optimizer = make(row.optimizer, model)
    schedule = linear_decay(optimizer, -20, setup.steps)  # small: what is timed should not diverge
    work.evaluate(model)
    batches, ends = work.batches(DESIGNS[row.task].batch, 0), [time.process_time()]
    for _ in training(model, [optimizer, schedule], work, batches, PROBE, math.inf):
        ends.append(time.process_time())
    return (ends[-1] - ends[1]) / (PROBE - 1), ends[1] - start


def minutes_left(row: Row, setup: Setup, clock: dict[tuple[str, str, int], float]) -> tuple[float, float]:
    """Return the CPU minutes of a row that are spent, and those that are left."""
    log, spent, left = setup.log(), 0.0, 0.0
    for width in setup.widths_of(row.task):
        fields = {**vars(row), "kind": "run", "width": width, "settings": settings(row, setup.steps)}
        lines = log.some(**fields)
        seconds = sum(line["cpu_seconds"] for line in lines)
        grid = GRID_AT_BASE if width == BASE else GRID_BEYOND
        # At the base width both rates are the same; elsewhere they are often, and count twice.
        rates = 1 if width == BASE else 2
        rates += 2 if width in setup.spread_of(row.task) else 0
        missing = max(0, grid + rates * setup.seeds - len(lines))
        if row_is_done(log, row, width, setup):
            missing = 0
        if missing and lines:
            left += missing * seconds / len(lines)
        elif missing:
            place = (row.task, row.optimizer, width)
            if place not in clock:
                step, fixed = step_seconds(row, width, setup)
                clock[place] = setup.steps * step + fixed
            left += missing * clock[place]
        spent += seconds
    return spent / 60, left / 60


def row_is_done(log: Log, row: Row, width: int, setup: Setup) -> bool:
    """Say whether the grid and all seeds of a width are there."""
    narrow, own = tuned(log, row, BASE, setup), tuned(log, row, width, setup)
    if narrow is None or own is None or not own.bracketed:
        return False
    powers = seed_powers(width, narrow.power, own.power, setup.spread_of(row.task))
    keys = [setup.key(row, width, power, seed) for power in powers for seed in setup.fresh_seeds()]
    return all(log.get(**key) is not None for key in keys)


def estimate(rows: Sequence[Row], setup: Setup) -> str:
    """Return CPU minutes by row and in all; kernels take minutes more (`docs/evidence.md`)."""
    clock: dict[tuple[str, str, int], float] = {}
    lines, total = [f"{'CPU minutes':<36}{'spent':>8}{'left':>8}"], [0.0, 0.0]
    for row in rows:
        spent, left = minutes_left(row, setup, clock)
        lines.append(f"{row!s:<36}{spent:8.1f}{left:8.1f}")
        total = [total[0] + spent, total[1] + left]
    return "\n".join([*lines, f"{'in all':<36}{total[0]:8.1f}{total[1]:8.1f}"])


def work_off(rows: Sequence[Row], setup: Setup, options: argparse.Namespace) -> None:
    """Do what is missing: kernels first, then the rows, on several processes."""
    until = time.time() + 60 * options.minutes
    for name, samples in kernel_jobs(setup, options.only):
        if time.time() < until:
            regress(name, samples, setup)
    work = partial(finish, setup=setup, until=until)
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for line in pool.imap_unordered(work, rows):
                print(line, flush=True)
    else:
        for line in map(work, rows):
            print(line, flush=True)


def positive(text: str) -> int:
    """Read a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="all rows and widths, not the core alone")
    parser.add_argument("--only", nargs="+", default=[], help="regular expressions of rows, or task/kernel")
    parser.add_argument("--widths", type=positive, nargs="+", help=f"leave out others (not {BASE})")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="number of fresh seeds (default: 5)")
    parser.add_argument("--steps", type=positive, default=STEPS)
    parser.add_argument("--jobs", type=positive, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Setup.out)
    parser.add_argument("--estimate", action="store_true", help="print CPU minutes and do nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of what was run")
    parser.add_argument("--figure", type=Path, help="draw loss against width to this file (matplotlib)")
    options = parser.parse_args(arguments)
    if options.steps % BUCKET or options.steps < LAST:
        parser.error(f"--steps {options.steps}: a multiple of {BUCKET}, from {LAST}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import evidence_report

    options = parse(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    widths = tuple(options.widths) if options.widths else None
    setup = Setup(options.long, widths, options.steps, options.seeds, options.data, options.out)
    rows = setup.rows(options.only)
    if options.estimate:
        print(estimate(rows, setup))
        return 0
    if options.figure is not None:
        evidence_report.draw(setup, options.figure)
        return 0
    if not options.table:
        work_off(rows, setup, options)
    print(evidence_report.tables(setup))
    return 0


if __name__ == "__main__":
    sys.exit(main())
