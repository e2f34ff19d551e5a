"""Steps and seconds to a target loss: K-FAC, Shampoo, AdamW and SGD with momentum, tuned narrow, run wide.

Two tasks: a CNN on Fashion-MNIST and a character-level GPT on the sources of Python's standard library.
Every optimizer gets the same grid of learning rates at the base width, all of them constant over a run; the
one that reaches the target in the fewest steps (averaged over seeds) is then used, unchanged, 8 times
wider. While tuning, a run is given up at twice the steps of the best one of its optimizer and seed, and a
rate that missed the target with one seed is not run with the next. The loss is the mean over the last 20
batches, and every batch is new to the model: one pass over the data, so that it is an unbiased estimate of
the loss on unseen data. Time is that of training alone, on one thread: seconds of the process, with
wall-clock beside them.

    python -m benchmarks.to_target                          # all of it: about 15 minutes on one core
    python -m benchmarks.to_target --tasks cnn --minutes 5  # a piece of it; call again to go on

Runs are kept as lines of JSON in ``to_target.jsonl``; a run that is there is not done again. ``--report``
only prints the table.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks.log import Log
from benchmarks.models import GPT, cnn
from benchmarks.tasks import Batches, shuffled, windows
from examples.data import fashion_mnist, python_text

GRID = [2.0**p for p in range(-11, 2, 2)]
WIDER = 8
SMOOTH = 20  # batches
PATIENCE = 2  # times the steps of the best rate so far, after which a run at the base width is given up
KRONECKER = {"momentum": 0.9, "root_every": 5}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "kfac": lambda m, lr: mupass.KFAC(m, lr, 1e-2, **KRONECKER),
    "shampoo": lambda m, lr: mupass.Shampoo(m, lr, 1e-3, **KRONECKER),
    "adamw": lambda m, lr: torch.optim.AdamW(mupass.param_groups(m, lr), weight_decay=0.0),
    "sgd": lambda m, lr: torch.optim.SGD(mupass.param_groups(m, lr, optimizer="sgd"), momentum=0.9),
}


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        build: Width -> model.
        batches: Seed -> batches, each sample once.
        base: Width at which learning rates are tuned.
        target: Loss to be reached.
        limit: Steps after which a run is given up.
    """

    build: Callable[[int], nn.Module]
    batches: Callable[[int], Batches]
    base: int
    target: float
    limit: int


def one_pass(x: Tensor, y: Tensor, batch: int) -> Callable[[int], Batches]:
    return lambda seed: shuffled(x, y, batch, torch.Generator().manual_seed(seed))


def images(folder: str | None, batch: int = 64) -> Callable[[int], Batches]:
    data = fashion_mnist(folder)
    return one_pass(data.train_x, data.train_y, batch)


def text(
    batch: int = 8, length: int = 64, characters: int = 1_000_000
) -> tuple[Callable[[int], Batches], int]:
    ids, alphabet = python_text(characters)
    return one_pass(*windows(ids, length), batch), len(alphabet)


def make_task(name: str, folder: str | None) -> Task:
    if name == "cnn":
        return Task(cnn, images(folder), base=8, target=0.55, limit=500)
    batches, vocabulary = text()
    return Task(lambda w: GPT(w, 2, vocabulary, 64, 16), batches, base=32, target=2.4, limit=500)


@dataclass(frozen=True)
class Run:
    """One training run; ``loss`` is the smoothed loss at its end, infinite where it diverged."""

    task: str
    optimizer: str
    width: int
    lr: float
    seed: int
    reached: bool
    steps: int
    seconds: float
    cpu_seconds: float
    loss: float


def train(name: str, task: Task, optimizer: str, width: int, lr: float, seed: int, limit: int) -> Run:
    """Train until the target, the limit or divergence."""
    torch.manual_seed(seed)
    batches = task.batches(seed)
    x, y = next(batches)
    model = mupass.transform(task.build(width), x[:2], base=task.base)
    steps = OPTIMIZERS[optimizer](model, lr)
    losses: list[float] = []
    wall, cpu, smoothed, reached = 0.0, 0.0, math.inf, False
    while len(losses) < limit:
        start = time.perf_counter(), time.process_time()
        steps.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        steps.step()
        losses.append(loss.item())
        wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
        smoothed = mean(losses[-SMOOTH:]) if len(losses) >= SMOOTH else math.inf
        reached = smoothed <= task.target
        if reached or not losses[-1] < 1e3:
            break
        x, y = next(batches)
    if not losses[-1] < 1e3:
        smoothed = math.inf
    return Run(name, optimizer, width, lr, seed, reached, len(losses), wall, cpu, smoothed)


class Runs:
    """Finished runs on disk."""

    def __init__(self, path: Path) -> None:
        self.log = Log(path, ("task", "optimizer", "width", "lr", "seed"))

    def add(self, run: Run) -> None:
        self.log.add(asdict(run))

    def some(self, task: str, optimizer: str, width: int, lr: float | None = None) -> list[Run]:
        found = [Run(**row) for row in self.log.some(task=task, optimizer=optimizer, width=width)]
        return [r for r in found if lr is None or r.lr == lr]

    def has(self, **key: Any) -> bool:
        return self.log.get(**key) is not None


def cost(runs: Sequence[Run]) -> tuple[float, float]:
    """Rank a learning rate: mean steps to the target (infinite if one run missed it), then mean loss."""
    steps = mean(r.steps if r.reached else math.inf for r in runs)
    return steps, mean(r.loss for r in runs)


def tuned(runs: Runs, task: str, optimizer: str, base: int) -> float | None:
    """Return the best learning rate at the base width."""
    by: dict[float, list[Run]] = {}
    for run in runs.some(task, optimizer, base):
        by.setdefault(run.lr, []).append(run)
    return min(by, key=lambda lr: cost(by[lr])) if by else None


def wanted(
    runs: Runs, name: str, task: Task, options: argparse.Namespace
) -> Iterator[tuple[str, int, float, int, int]]:
    """Yield the runs to do, each with its limit: the grid at the base width, then the best rate when wide."""
    middle = sorted(options.lrs)[len(options.lrs) // 2]
    outwards = sorted(options.lrs, key=lambda lr: abs(math.log(lr / middle)))  # a good rate early saves most
    for optimizer in options.optimizers:
        for seed in range(options.seeds):
            for lr in outwards:
                if all(run.reached for run in runs.some(name, optimizer, task.base, lr)):
                    there = [
                        r.steps for r in runs.some(name, optimizer, task.base) if r.reached and r.seed == seed
                    ]
                    yield optimizer, task.base, lr, seed, min([task.limit, *(PATIENCE * n for n in there)])
        best = tuned(runs, name, optimizer, task.base)
        if best is not None:
            for seed in range(options.seeds):
                yield optimizer, WIDER * task.base, best, seed, task.limit


def cell(runs: Sequence[Run]) -> str:
    """Return steps and seconds, mean and spread over seeds, of the runs that got there."""
    there = [r for r in runs if r.reached]
    if not there:
        return f"never ({len(runs)} runs, loss {mean(r.loss for r in runs):.2f})" if runs else "not run"

    def spread(values: list[float]) -> str:
        return f"{mean(values):.3g} +- {stdev(values):.2g}" if len(values) > 1 else f"{mean(values):.3g}"

    steps, cpu = spread([float(r.steps) for r in there]), spread([r.cpu_seconds for r in there])
    numbers = f"{steps:>12} steps {cpu:>14} s (wall {mean(r.seconds for r in there):.3g})"
    return numbers + ("" if len(there) == len(runs) else f" [{len(there)} of {len(runs)} runs]")


def table(runs: Runs, tasks: dict[str, Task], optimizers: Sequence[str]) -> str:
    lines = []
    for name, task in tasks.items():
        wide = WIDER * task.base
        lines.append(f"\n{name}: to loss {task.target:g}, at most {task.limit} steps")
        lines.append(f"{'':<10}{'lr':<8}{f'width {task.base}':<52}{f'width {wide}, same lr'}")
        for optimizer in optimizers:
            best = tuned(runs, name, optimizer, task.base)
            if best is None:
                continue
            grid = sorted({r.lr for r in runs.some(name, optimizer, task.base)})
            edge = "!" if best in (grid[0], grid[-1]) else ""
            cells = [cell(runs.some(name, optimizer, w, best)) for w in (task.base, wide)]
            lines.append(f"{optimizer:<10}{f'2^{math.log2(best):.4g}{edge}':<8}{cells[0]:<52}{cells[1]}")
    return "\n".join([*lines, "mean +- deviation over seeds; !: edge of the grid"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["cnn", "gpt"], choices=["cnn", "gpt"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--lrs", type=float, nargs="+", default=GRID)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="steps after which a run is given up")
    parser.add_argument("--target", type=float)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("to_target.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of what was run")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    runs, start, tasks = Runs(options.out), time.perf_counter(), {}
    for name in options.tasks:
        task = make_task(name, options.data)
        changes = {"limit": options.limit, "target": options.target}
        tasks[name] = Task(**{**vars(task), **{k: v for k, v in changes.items() if v is not None}})
    for name, task in tasks.items():
        if options.report:
            break
        for optimizer, width, lr, seed, limit in wanted(runs, name, task, options):
            late = time.perf_counter() - start > 60 * options.minutes
            done = runs.has(task=name, optimizer=optimizer, width=width, lr=lr, seed=seed)
            if done or late:
                continue
            runs.add(train(name, task, optimizer, width, lr, seed, limit))
    print(table(runs, tasks, options.optimizers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
