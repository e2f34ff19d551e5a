"""Steps and seconds to AdamW's loss on wider networks, with the rate that was tuned at width 64 alone.

Qiu et al. (arXiv 2512.05620) report that second-order optimizers need 1.3 to 1.4 times fewer steps than AdamW
at scale, and that the gain is lost where hyperparameters are transferred wrongly. Here on the character GPT
of `benchmarks.quality` (two blocks, 8 sequences of 64), narrow networks on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.speedup               # what is not done, then the table
    python -m benchmarks.speedup --widths 512 --optimizers adamw muon   # hours with all optimizers
    python -m benchmarks.speedup --table

Decided before the first run:

* 300 steps at a constant rate, everything but the rate as each optimizer has it by default. The *final loss*
  is the mean over the last 50; every batch is new. A loss that is NaN, infinite or above 100 ends a run.
* The rate is tuned at width 64 on seed 0, on a grid of powers of 2, until the best one has worse ones on both
  sides. At that width ``mup`` and ``standard`` are the same. Wider networks are trained with that rate, seeds
  1 to 3, under both; AdamW has the rate factors of `mupass.param_groups`.
* The *target* of a seed is the final loss of AdamW under ``mup`` at the same width and seed. *Steps* is the
  first step at which the mean over the last 50 is at the target. The *gain* is AdamW's 300 steps over these
  steps; in seconds it is AdamW's CPU time of a run over that of these steps, both from their own runs.
* Against us counts: a gain under ``mup`` that is below 1, or below that under ``standard``; a final loss
  under ``mup`` that is above that under ``standard`` by more than two errors of the paired difference.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mupass
from benchmarks.char_transfer import search
from benchmarks.log import RESULTS, Log, commit
from benchmarks.quality import BLOWN_UP, BUCKET, LAST, Late, outcome, reaches
from benchmarks.tasks import task, training

NAME, BATCH, BASE, STEPS = "gpt_64", 8, 64, 300
PARAMETERIZATIONS = ("mup", "standard")
KEY = ("optimizer", "parameterization", "width", "lr", "seed", "steps")
# Class, and where its tuning starts.
OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "adamw": (torch.optim.AdamW, 2.0**-8),
    "muon": (mupass.Muon, 2.0**-6),
    "soap": (mupass.SOAP, 2.0**-8),
    "shampoo": (mupass.Shampoo, 2.0**-8),
    "kfac": (mupass.KFAC, 2.0**-4),
}


@dataclass(frozen=True)
class Setup:
    """What the command line chose."""

    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    optimizers: tuple[str, ...]
    steps: int
    until: float
    out: Path


def run(
    optimizer: str, parameterization: str, width: int, lr: float, seed: int, setup: Setup
) -> dict[str, Any]:
    """Return the line of a run, from the log where it is done."""
    log = Log(setup.out, KEY)
    key = dict(zip(KEY, (optimizer, parameterization, width, lr, seed, setup.steps), strict=True))
    row = log.get(**key)
    if row is not None:
        return row
    if time.time() > setup.until:
        raise Late
    work = task(NAME)
    torch.manual_seed(seed)
    model = mupass.transform(
        work.build(width), work.test[0][:2], base=BASE, parameterization=parameterization
    )
    make = OPTIMIZERS[optimizer][0]
    if issubclass(make, torch.optim.AdamW):
        steps_with = make(mupass.param_groups(model, lr), weight_decay=0.0)
    else:
        steps_with = make(model, lr)
    start = time.process_time()
    losses = list(training(model, [steps_with], work, work.batches(BATCH, seed), setup.steps, BLOWN_UP))
    seconds = time.process_time() - start
    final, curve = outcome(losses, setup.steps)
    row = {
        **key,
        "final": final,
        "curve": curve,
        "cpu_seconds": round(seconds, 2),
        "commit": commit(),
    }
    log.add(row)
    return row


def tuned(optimizer: str, setup: Setup) -> float:
    """Return the best rate of the base width."""
    start = OPTIMIZERS[optimizer][1]
    return search(lambda lr: run(optimizer, "mup", BASE, lr, 0, setup)["final"], start, 2).best


def gains(row: dict[str, Any], adam: dict[str, Any], steps: int) -> tuple[float, float]:
    """Return how many times fewer steps and seconds than AdamW's a run takes to AdamW's loss; 0 for never."""
    taken = reaches(row, adam["final"])
    if taken is None or not math.isfinite(adam["final"]):
        return 0.0, 0.0
    return steps / taken, adam["cpu_seconds"] / (row["cpu_seconds"] * taken / steps)


def cell(values: Sequence[float], digits: int) -> str:
    """Return a mean with its standard error."""
    if not all(map(math.isfinite, values)):
        return f"diverges ({sum(map(math.isinf, values))} of {len(values)})"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
    return text


def table(setup: Setup) -> str:
    """Train what is not done, and return a table in Markdown."""
    lines = [
        "| optimizer, rate | width | parameterization | final loss | gain in steps | gain in seconds |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer in setup.optimizers:
        lr = tuned(optimizer, setup)
        for width in setup.widths:
            for parameterization in PARAMETERIZATIONS:
                rows, pairs = [], []
                for seed in setup.seeds:
                    adam = run("adamw", "mup", width, tuned("adamw", setup), seed, setup)
                    rows.append(run(optimizer, parameterization, width, lr, seed, setup))
                    pairs.append(gains(rows[-1], adam, setup.steps))
                in_steps, in_seconds = zip(*pairs, strict=True)
                cells = [cell([row["final"] for row in rows], 3), cell(in_steps, 2), cell(in_seconds, 2)]
                start = [f"{optimizer}, 2^{math.log2(lr):.0f}", str(width), parameterization]
                lines.append(f"| {' | '.join([*start, *cells])} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so long")
    parser.add_argument("--table", action="store_true", help="only what was run")
    parser.add_argument("--out", type=Path, default=RESULTS / "speedup.jsonl")
    options = parser.parse_args(arguments)
    if options.steps % BUCKET or options.steps < LAST:
        parser.error(f"--steps {options.steps}: a multiple of {BUCKET}, from {LAST}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    until = -math.inf if options.table else time.time() + 60 * options.minutes
    setup = Setup(
        tuple(options.widths), tuple(range(1, options.seeds + 1)), tuple(options.optimizers), options.steps,
        until, options.out,
    )  # fmt: skip
    try:
        print(table(setup))
    except Late:
        print("to be continued")
    rows = Log(setup.out, KEY).rows.values()
    print(f"{len(rows)} runs, {sum(row['cpu_seconds'] for row in rows) / 60:.0f} CPU minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
