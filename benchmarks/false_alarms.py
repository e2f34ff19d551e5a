"""How often the coordinate check cries wolf, and how often it misses: exact binomial intervals.

    python -m benchmarks.false_alarms --checks 20

Each check has other initial weights and other data. Under mup none should fail, under the standard
parameterization all should.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mupass
from benchmarks.models import GPT

OPTIMIZERS = ("adam", "sgd", "kfac", "shampoo")
WIDTHS = (64, 128, 256)


def mlp(width: int) -> nn.Module:
    """Three weight layers."""
    return nn.Sequential(
        nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def gpt(width: int) -> nn.Module:
    """A decoder of one block."""
    return GPT(width, layers=1, vocabulary=32, length=8, head=16)


def data(case: str, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return one batch of random numbers."""
    if case == "mlp":
        x = torch.randn(16, 16, generator=draw)
        return [(x, torch.randint(4, (16,), generator=draw))]
    ids = torch.randint(32, (4, 9), generator=draw)
    return [(ids[:, :-1], ids[:, 1:])]


CASES: dict[str, Callable[[int], nn.Module]] = {"mlp": mlp, "gpt": gpt}


def interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval of a rate."""
    tail = (1 - confidence) / 2

    def more(rate: float, least: int) -> float:
        """Return the chance of at least so many hits."""
        return sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(least, trials + 1)
        )

    def solve(least: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if more(middle, least) < wanted else (low, middle)
        return low

    return (solve(hits, tail) if hits else 0.0), (solve(hits + 1, 1 - tail) if hits < trials else 1.0)


def main() -> None:
    """Print counts and intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=20, help="for each model and optimizer")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--parameterization", default="mup")
    options = parser.parse_args()
    torch.set_num_threads(1)
    totals: Counter[str] = Counter()
    for case in options.cases:
        for optimizer in options.optimizers:
            counts: Counter[str] = Counter()
            begin = time.perf_counter()
            for seed in range(options.first, options.first + options.checks):

                def build(width: int, seed: int = seed, case: str = case) -> nn.Module:
                    torch.manual_seed(1000 * seed + width)
                    return CASES[case](width)

                batches = data(case, torch.Generator().manual_seed(seed))
                found = mupass.coord_check(
                    build,
                    batches,
                    widths=WIDTHS,
                    optimizer=optimizer,
                    parameterization=options.parameterization,
                )
                judged = sum(bool(row.verdict) for row in found.rows)
                counts.update(checks=1, failed=not found.ok, quantities=judged, fail=len(found.failures))
            totals.update(counts)
            print(f"{case:<6}{optimizer:<9}{line(counts)}  {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"{'all':<15}{line(totals)}")


def line(counts: Counter[str]) -> str:
    """Return counts with intervals for the reader."""
    low, high = interval(counts["failed"], counts["checks"])
    part = f"{counts['failed']} of {counts['checks']} checks failed ({100 * low:.1f} to {100 * high:.1f} %)"
    return f"{part}, {counts['fail']} of {counts['quantities']} quantities"


if __name__ == "__main__":
    main()
