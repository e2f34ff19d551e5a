"""Time of a training step of this tree beside that of another checkout, interleaved in one run.

    git worktree add /tmp/old COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.step_time --old /tmp/old

Each checkout trains a small GPT in a process of its own, one at a time: in every round both take PERIOD
steps, the order changing from round to round. Process time is taken, which other processes change least. A
ratio is new over old within a round; the table has the median over rounds and a 95 % interval of it (order
statistics).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

PERIOD = 10  # steps from one recomputation of all roots to the next
WARM_UP = 21  # past the first steps, in which roots are recomputed more often
VOCABULARY, LENGTH, BATCH = 256, 64, 4
OPTIMIZERS = ("kfac", "shampoo", "soap", "muon", "adamw")
PARTS = ("forward and backward", "optimizer", "whole step")


def optimizer_of(name: str, model: Any) -> Any:
    """Return an optimizer with arguments that all versions have."""
    import torch

    import mupass

    make: dict[str, Callable[[], Any]] = {
        "kfac": lambda: mupass.KFAC(model, 1e-3, root_every=PERIOD),
        "shampoo": lambda: mupass.Shampoo(model, 1e-3, root_every=PERIOD, graft="adam"),
        "soap": lambda: mupass.SOAP(model, 1e-3, basis_every=PERIOD),
        "muon": lambda: mupass.Muon(model, 1e-2),
        "adamw": lambda: torch.optim.AdamW(mupass.param_groups(model, 1e-3)),
    }
    return make[name]()


def work(name: str, width: int) -> None:
    """Train PERIOD steps for every line that comes in; print milliseconds of both parts, a step."""
    import torch
    import torch.nn.functional as F

    import mupass
    from benchmarks.models import GPT

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(width, 4, VOCABULARY, LENGTH, width // 4)
    mupass.transform(model, torch.zeros(1, LENGTH, dtype=torch.long), base=width)
    optimizer = optimizer_of(name, model)
    for line in sys.stdin:
        steps, passes, own = int(line), 0.0, 0.0
        for _ in range(steps):
            ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
            start = time.process_time()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            middle = time.process_time()
            optimizer.step()
            own += time.process_time() - middle
            passes += middle - start
            optimizer.zero_grad()
        print(1e3 * passes / steps, 1e3 * own / steps, flush=True)


class Worker:
    """A process that trains with the package of one checkout."""

    def __init__(self, folder: Path, name: str, width: int) -> None:
        command = [sys.executable, __file__, "--worker", name, str(width)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        )

    def train(self, steps: int) -> tuple[float, float, float]:
        """Return milliseconds of forward and backward, of the optimizer, and of both, a step."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}")
        passes, own = map(float, line.split())
        return passes, own, passes + own

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and a 95 % interval of it."""
    ordered, n = sorted(values), len(values)
    reach = 1.96 * sqrt(n) / 2  # ranks on both sides of the middle one
    low, high = int(max(0, n / 2 - reach)), int(min(n - 1, n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def compare(old: Path, name: str, width: int, rounds: int) -> None:
    """Print a row for each part of a step."""
    workers = {"old": Worker(old, name, width), "new": Worker(Path(__file__).parents[1], name, width)}
    times: dict[str, list[tuple[float, float, float]]] = {"old": [], "new": []}
    for worker in workers.values():
        worker.train(WARM_UP)
    for number in range(rounds):
        order = ["old", "new"] if number % 2 else ["new", "old"]
        for which in order:
            times[which].append(workers[which].train(PERIOD))
    for worker in workers.values():
        worker.end()
    for part, label in enumerate(PARTS):
        old_times, new_times = ([row[part] for row in times[which]] for which in ("old", "new"))
        ratio, low, high = interval([b / a for a, b in zip(old_times, new_times, strict=True)])
        before, after = statistics.median(old_times), statistics.median(new_times)
        row = f"{name:8} {width:5}  {label:20} {before:8.2f} {after:8.2f}"
        print(f"{row}  {ratio:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="folder of the other checkout")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--worker", nargs=2, metavar=("OPTIMIZER", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker[0], int(options.worker[1]))
        return 0
    if options.old is None or not (options.old / "mupass").is_dir():
        parser.error("--old must be a folder with a checkout of this project")
    print("optimizer width  part                   old, ms  new, ms  ratio")
    for name in options.optimizers:
        for width in options.widths:
            compare(options.old.resolve(), name, width, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
