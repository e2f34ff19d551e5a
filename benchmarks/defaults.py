"""Do the optimizers train at their defaults? Ten tasks, two widths, two batches, a factor-2 grid of rates.

    OMP_NUM_THREADS=1 python -m benchmarks.defaults --jobs 2         # what is not done yet, then the table
    python -m benchmarks.defaults --estimate                         # CPU minutes that are left
    python -m benchmarks.defaults --table                            # the table of what was run
    python -m benchmarks.defaults --only ^kfac/ --set kfac.damping=1e-2 --lr kfac=0.02

A cell is ``optimizer/task/width/batch``: the base width of the task and 4 times it, batches of 16 and 256
(images, sequences of 16 characters, or samples); ``--only`` takes regular expressions of such names. In each,
one seed is trained at the default learning rate (the optimizer is given the model and nothing else), and at
2 and 4 times as much and as little. Where the best of these rates is at the edge the grid goes on, up to 16
times either way. AdamW through `mupass.param_groups` is there for reference.

Decided before the first run:

* The *final loss* is the loss on held-out data, as the mean over three times: after 3/4, 7/8 and all of the
  steps. The *initial* loss is that of the untrained model on the same data.
* A run has *diverged* if a loss is NaN or infinite, if a batch's loss is above 100 times the initial loss
  (it then ends), or if the final loss is above the initial one.
* A default is *near* the best if its final loss is within 5 % or within 0.01 of the lowest on the grid.

A run is one line of JSON, under a key that holds all arguments of the optimizer, defaults included, so that a
run under other defaults is another run; what a change of code does to a run is not in the key, but the commit
is in the line, and the table names the commits. A benchmark that was killed goes on where it was. ``--lr
OPTIMIZER=VALUE`` and ``--set OPTIMIZER.argument=value`` try other defaults.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import mupass
from benchmarks.log import RESULTS, Log, commit, digest
from benchmarks.tasks import TASKS, Task, task, training

STEPS = {
    "mlp": 120,
    "cnn": 120,
    "cnn_norm": 120,
    "resnet": 80,
    "gpt": 80,
    "gpt_tied": 80,
    "vit": 80,
    "lstm": 100,
    "regression": 150,
    "staircase": 150,
}
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "kfac": (mupass.KFAC, {}),
    "ekfac": (mupass.KFAC, {"ekfac": True}),
    "shampoo": (mupass.Shampoo, {}),
    "shampoo_none": (mupass.Shampoo, {"graft": "none"}),
    "soap": (mupass.SOAP, {}),
    "muon": (mupass.Muon, {}),
    "adamw": (torch.optim.AdamW, {}),
}
WIDER, BATCHES = 4, (16, 256)
NEAR = (0, 1, -1, 2, -2)  # powers of 2 times the default rate that every cell has
FAR = 4
BLOWN_UP = 100.0  # times the initial loss
TOLERANCE, SLACK = 0.05, 0.01
PROBE = 4  # steps by which the cost of a cell is estimated
KEY = ("optimizer", "task", "width", "batch", "power", "seed", "settings")


class NoDefault(RuntimeError):
    """An optimizer that cannot be made from the model alone."""


@dataclass(frozen=True)
class Choices:
    """What the command line changes.

    Attributes:
        lrs: Optimizer -> rate that stands for its default.
        arguments: Optimizer -> further arguments.
        steps: Steps of every run; None for those of the task.
        seed: Of weights and batches.
        data: Folder with Fashion-MNIST.
        out: File of runs.
    """

    lrs: Mapping[str, float] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    seed: int = 0
    data: str | None = None
    out: Path = RESULTS / "defaults.jsonl"

    def log(self) -> Log:
        return Log(self.out, KEY)

    def given(self, optimizer: str) -> dict[str, Any]:
        """Return the arguments that an optimizer is given besides the model and the rate."""
        return {**OPTIMIZERS[optimizer][1], **self.arguments.get(optimizer, {})}


@dataclass(frozen=True)
class Cell:
    """One optimizer on one task at one width and batch."""

    optimizer: str
    task: str
    width: int
    batch: int

    def __str__(self) -> str:
        return f"{self.optimizer}/{self.task}/{self.width}/{self.batch}"

    def steps(self, choices: Choices) -> int:
        return choices.steps or STEPS[self.task]

    def settings(self, choices: Choices) -> str:
        """Hash everything that the loss depends on, apart from code, width, batch, rate and seed."""
        kind = OPTIMIZERS[self.optimizer][0]
        parameters = inspect.signature(kind).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        rate = {"lr": choices.lrs[self.optimizer]} if self.optimizer in choices.lrs else {}
        return digest(
            {**defaults, **choices.given(self.optimizer), **rate, "number of steps": self.steps(choices)}
        )

    def key(self, choices: Choices) -> dict[str, Any]:
        """Return a run's key without its power."""
        return {**vars(self), "seed": choices.seed, "settings": self.settings(choices)}

    def runs(self, log: Log, choices: Choices) -> dict[int, dict[str, Any]]:
        """Return what is done, by power of the default rate."""
        key = self.key(choices)
        found = {power: log.get(**key, power=power) for power in range(-FAR, FAR + 1)}
        return {power: row for power, row in found.items() if row is not None}


def cells(only: Sequence[str] = ()) -> list[Cell]:
    """Return all cells, or those whose name a regular expression finds."""
    every = [
        Cell(optimizer, name, factor * TASKS[name][0], batch)
        for name in STEPS
        for factor in (1, WIDER)
        for batch in BATCHES
        for optimizer in OPTIMIZERS
    ]
    return [cell for cell in every if not only or any(re.search(word, str(cell)) for word in only)]


def make(
    optimizer: str, model: nn.Module, lr: float | None, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer; ``lr=None`` leaves the rate to its default.

    Raises:
        NoDefault: There is none.
    """
    kind = OPTIMIZERS[optimizer][0]
    if kind is torch.optim.AdamW:
        rate = inspect.signature(kind).parameters["lr"].default if lr is None else lr
        return kind(mupass.param_groups(model, rate), **arguments)
    if lr is not None:
        return kind(model, lr, **arguments)
    if inspect.signature(kind).parameters["lr"].default is inspect.Parameter.empty:
        raise NoDefault(f"{optimizer} has no default learning rate: give one, --lr {optimizer}=VALUE")
    return kind(model, **arguments)


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the rate of the parameters that an optimizer treats itself, at the base width."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.AdamW):
            return group["lr"] / group["mupass_scale"]
        if group["algorithm"] == optimizer.spec.name:
            return group["lr"]
    raise NoDefault("the optimizer takes no parameter itself")


def transformed(cell: Cell, work: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mupass.transform(work.build(cell.width), work.test[0][:2], base=work.base)


def default_rate(cell: Cell, work: Task, choices: Choices) -> float:
    """Return the rate that factors of 2 are counted from."""
    if cell.optimizer in choices.lrs:
        return choices.lrs[cell.optimizer]
    model = transformed(cell, work, choices.seed)
    return rate_of(make(cell.optimizer, model, None, choices.given(cell.optimizer)))


def train(cell: Cell, power: int, rate: float, choices: Choices) -> dict[str, Any]:
    """Do one run and return its line."""
    start = time.process_time()
    work, steps = task(cell.task, choices.data), cell.steps(choices)
    model = transformed(cell, work, choices.seed)
    initial = work.evaluate(model)
    # At the default itself the optimizer gets no rate, unless the command line names one.
    lr = None if power == 0 and cell.optimizer not in choices.lrs else rate * 2.0**power
    optimizer = make(cell.optimizer, model, lr, choices.given(cell.optimizer))
    batches = work.batches(cell.batch, choices.seed)
    times = {math.ceil(steps * part) for part in (0.75, 0.875, 1.0)}
    worst, tests = 0.0, []
    for step, loss in enumerate(training(model, [optimizer], work, batches, steps, BLOWN_UP * initial), 1):
        worst = max(worst, loss if math.isfinite(loss) else math.inf)
        if step in times:
            tests.append(work.evaluate(model))
    whole = worst <= BLOWN_UP * initial and all(map(math.isfinite, tests))
    final = sum(tests) / len(tests) if whole else math.inf
    stats = optimizer.stats() if hasattr(optimizer, "stats") else {}
    return {
        **cell.key(choices),
        "power": power,
        "lr": rate * 2.0**power,
        "arguments": {k: repr(v) for k, v in choices.given(cell.optimizer).items()},
        "initial": initial,
        "final": final,
        "worst": worst,
        "diverged": not final <= initial,
        "incidents": {k: n for k, n in stats.items() if k != "steps"},
        "cpu_seconds": round(time.process_time() - start, 2),
        "commit": commit(),
    }


def next_power(losses: Mapping[int, float]) -> int | None:
    """Return which rate a cell needs next: those near the default, then on beyond a best one at the edge."""
    for power in NEAR:
        if power not in losses:
            return power
    best = min(losses, key=lambda power: (losses[power], power))  # where all diverge, to the lower ones
    beyond = (power for power in (best - 1, best + 1) if power not in losses and abs(power) <= FAR)
    return next(beyond, None)


def finish(cell: Cell, choices: Choices, until: float) -> str:
    """Do what is missing in a cell, and say so; start no run after the time ``until``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log, rate, done = choices.log(), None, 0
    while time.time() < until:
        losses = {power: row["final"] for power, row in cell.runs(log, choices).items()}
        power = next_power(losses)
        if power is None:
            break
        rate = default_rate(cell, task(cell.task, choices.data), choices) if rate is None else rate
        log.add(train(cell, power, rate, choices))
        done += 1
    if not done:
        return ""
    shown = " ".join(f"{p}: {row['final']:.3g}" for p, row in sorted(cell.runs(log, choices).items()))
    return f"{cell}  {shown}"


def left(cell: Cell, choices: Choices) -> tuple[float, float]:
    """Return seconds of CPU that a cell has taken, and that its missing runs will take, by a few steps."""
    rows = cell.runs(choices.log(), choices)
    spent = sum(row["cpu_seconds"] for row in rows.values())
    if next_power({power: row["final"] for power, row in rows.items()}) is None:
        return spent, 0.0
    missing = max(1, len(NEAR) + 1 - len(rows))  # most cells need one more than those near the default
    if rows:
        return spent, missing * spent / len(rows)
    work = task(cell.task, choices.data)
    rate = choices.lrs.get(cell.optimizer, 1e-6)  # its value does not matter for the time
    start = time.process_time()
    model = transformed(cell, work, choices.seed)
    optimizer = make(cell.optimizer, model, rate, choices.given(cell.optimizer))
    evaluated = time.process_time()
    work.evaluate(model)
    fixed = evaluated - start + 4 * (time.process_time() - evaluated)
    steps, ends = work.batches(cell.batch, choices.seed), [time.process_time()]
    for _ in training(model, [optimizer], work, steps, PROBE, math.inf):
        ends.append(time.process_time())
    step = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first one sets up
    return spent, missing * (fixed + cell.steps(choices) * step)


def estimate(todo: Sequence[Cell], choices: Choices) -> str:
    """Return minutes by optimizer, and in all."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sums: dict[str, list[float]] = {}
    for cell in todo:
        mine = sums.setdefault(cell.optimizer, [0.0, 0.0])
        for i, seconds in enumerate(left(cell, choices)):
            mine[i] += seconds / 60
    sums["in all"] = [sum(parts) for parts in zip(*sums.values(), strict=True)]
    lines = [f"{name:<14}{spent:8.1f}{rest:8.1f}" for name, (spent, rest) in sums.items()]
    return "\n".join([f"{'CPU minutes':<14}{'spent':>8}{'left':>8}", *lines])


def is_near(loss: float, best: float) -> bool:
    return math.isfinite(loss) and loss <= max((1 + TOLERANCE) * best, best + SLACK)


@dataclass(frozen=True)
class Outcome:
    """What the runs of one cell say."""

    cell: Cell
    rows: Mapping[int, Mapping[str, Any]]

    @property
    def best(self) -> int | None:
        """Power of the best rate; None where all diverged."""
        there = [power for power, row in self.rows.items() if not row["diverged"]]
        return min(there, key=lambda power: self.rows[power]["final"]) if there else None

    @property
    def complete(self) -> bool:
        return next_power({power: row["final"] for power, row in self.rows.items()}) is None

    def near(self, power: int) -> bool:
        """Whether the default would be near the best if it were this one."""
        if self.best is None or power not in self.rows:
            return False
        return is_near(self.rows[power]["final"], self.rows[self.best]["final"])

    def diverged(self, powers: Sequence[int]) -> int:
        return sum(self.rows[power]["diverged"] for power in powers)


def summary(name: str, outcomes: Sequence[Outcome]) -> str:
    count = len(outcomes)
    at_default = sum(o.diverged([0]) for o in outcomes)
    within = sum(o.diverged(NEAR) for o in outcomes)
    near = sum(o.near(0) for o in outcomes)
    # What the share of cells near their best would be, if the default were moved.
    moved = "".join(f"{100 * sum(o.near(p) for o in outcomes) / count:6.0f}" for p in range(-FAR, FAR + 1))
    powers = [o.best for o in outcomes if o.best is not None]
    middle = f"{median(powers):+.1f}" if powers else "none"
    return (
        f"{name:<14}{count:>6}{at_default:>10}{100 * within / (len(NEAR) * count):>10.1f} %"
        f"{100 * near / count:>8.0f} %{middle:>8}  {moved}"
    )


def powers_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Best power by task, a line for each optimizer, width and batch; ``=``: the default is near the best."""
    names = list(dict.fromkeys(o.cell.task for o in outcomes))
    lines = ["", "best rate, as a power of 2 times the default (=: the default is near; x: it diverges)"]
    lines.append(" " * 28 + "".join(f"{name:>11}" for name in names))
    rows: dict[tuple[str, str, int], dict[str, str]] = {}
    for o in outcomes:
        wide = "4 x base" if o.cell.width > TASKS[o.cell.task][0] else "base"
        mark = "=" if o.near(0) else "x" if o.diverged([0]) else ""
        text = "none" if o.best is None else f"{o.best:+d}"
        rows.setdefault((o.cell.optimizer, wide, o.cell.batch), {})[o.cell.task] = mark + text
    for (optimizer, wide, batch), found in rows.items():
        head = f"{optimizer:<14}{wide:<9}{batch:>4} "
        lines.append(head + "".join(f"{found.get(name, ''):>11}" for name in names))
    return lines


def table(todo: Sequence[Cell], choices: Choices) -> str:
    """Return what the finished cells say."""
    log = choices.log()
    every = [Outcome(cell, cell.runs(log, choices)) for cell in todo]
    outcomes = [o for o in every if o.complete]
    if not outcomes:
        return f"0 of {len(every)} cells are done"
    rows = [row for o in outcomes for row in o.rows.values()]
    commits = sorted({row["commit"] for row in rows})
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    lines = [
        f"{len(outcomes)} of {len(every)} cells are done, {len(rows)} runs, {minutes:.0f} CPU minutes, "
        f"commit {', '.join(commits)}",
        "",
        "diverged: at the default (cells), within a factor of 4 (runs); near: the default is within 5 % or",
        "0.01 of the best; best power of 2 (median); share near if the default were moved by 2 to this power",
        f"{'':<14}{'cells':>6}{'default':>10}{'factor 4':>12}{'near':>10}{'median':>8}  "
        + "".join(f"{p:>+6d}" for p in range(-FAR, FAR + 1)),
    ]
    ours = [o for o in outcomes if o.cell.optimizer != "adamw"]
    for name in OPTIMIZERS:
        mine = [o for o in outcomes if o.cell.optimizer == name]
        if mine:
            lines.append(summary(name, mine))
    if ours:
        lines.append(summary("all of mupass", ours))
    lines += powers_table(outcomes)
    bad = [o for o in outcomes if o.diverged([0])]
    lines += ["", f"diverged at the default: {', '.join(str(o.cell) for o in bad) or 'none'}"]
    incidents = [
        f"{o.cell} {row['incidents']}" for o in outcomes for row in o.rows.values() if row["incidents"]
    ]
    return "\n".join([*lines, f"runs with incidents: {len(incidents)}", *incidents[:20]])


def pairs(words: Sequence[str], read: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Read ``name=value``.

    Raises:
        ValueError: A word has no ``=``, or names an unknown optimizer.
    """
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or name.split(".")[0] not in OPTIMIZERS:
            raise ValueError(f"{word!r}: an optimizer of {', '.join(OPTIMIZERS)}, then =VALUE")
        yield name, read(text)


def literal(text: str) -> Any:
    """Read a Python literal; what is none is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def choose(options: argparse.Namespace) -> Choices:
    arguments: dict[str, dict[str, Any]] = {}
    for name, value in pairs(options.set, literal):
        optimizer, dot, argument = name.partition(".")
        if not dot:
            raise ValueError(f"--set {name}: OPTIMIZER.argument=value")
        arguments.setdefault(optimizer, {})[argument] = value
    out = options.out or Choices.out
    return Choices(dict(pairs(options.lr, float)), arguments, options.steps, options.seed, options.data, out)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Choices]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="regular expressions of optimizer/task/width/batch"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--lr", nargs="+", default=[], metavar="OPT=VALUE", help="instead of the default")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPT.key=VALUE", help="another argument")
    parser.add_argument("--steps", type=int, help="of every run (default: those of the task)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, help="default: results/defaults.jsonl beside this file")
    parser.add_argument("--estimate", action="store_true", help="print CPU minutes and do nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what was run")
    options = parser.parse_args(arguments)
    try:
        return options, choose(options)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options, choices = parse(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    todo = cells(options.only)
    if options.estimate:
        print(estimate(todo, choices))
        return 0
    if not options.table:
        work = partial(finish, choices=choices, until=time.time() + 60 * options.minutes)
        try:
            if options.jobs > 1:
                with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
                    for line in filter(None, pool.imap_unordered(work, todo)):
                        print(line, flush=True)
            else:
                for line in filter(None, map(work, todo)):
                    print(line, flush=True)
        except NoDefault as error:
            print(error, file=sys.stderr)
            return 2
    print(table(todo, choices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
