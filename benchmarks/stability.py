"""Does K-FAC stay where it has arrived, and does it mind clipped gradients?

    OMP_NUM_THREADS=1 python -m benchmarks.stability            # both tables
    OMP_NUM_THREADS=1 python -m benchmarks.stability --solved   # the first
    OMP_NUM_THREADS=1 python -m benchmarks.stability --clipped  # the second

*Solved*: an MLP of width 64 learns 128 samples, in batches of 16, and is trained on for 2,000 steps in all.
The loss on all samples is noted after each step: the worst one after the first below 1e-3, and the last one.
Beside it the worst loss of a single batch after the first batch below 1e-3, before all samples are learnt.

*Clipped*: the tasks of `benchmarks.defaults`, with gradients clipped to norms of 0.1, 1 and 5 and without;
the final loss is that on held-out data.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mupass
from benchmarks.tasks import task, training

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without kl_clip": {"kl_clip": None},
    "no momentum": {"momentum": 0.0},
    "no momentum, no kl_clip": {"momentum": 0.0, "kl_clip": None},
    "lr=0.03, damping=1e-2": {"lr": 0.03, "damping": 1e-2},
    "roots at every step": {"root_every": 1},
}
CLIPPED = ("mlp", "cnn", "cnn_norm", "gpt", "vit", "regression", "staircase")
NORMS = (None, 0.1, 1.0, 5.0)


def solved(seed: int, steps: int, **arguments: Any) -> tuple[float, float, float]:
    """Return the worst loss after the first one below 1e-3, that of batches, and the last loss."""
    torch.manual_seed(seed)
    x = torch.randn(128, 10)
    y = x[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = mupass.KFAC(mupass.transform(model, x[:2], base=32), **arguments)
    batches = torch.Generator().manual_seed(seed)
    of_batches, of_all = [], []
    for _ in range(steps):
        rows = torch.randint(128, (16,), generator=batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        of_batches.append(loss.item())
        with torch.no_grad():
            of_all.append(F.cross_entropy(model(x), y).item())
    return worst_after(of_all), worst_after(of_batches), of_all[-1]


def worst_after(losses: list[float], low: float = 1e-3) -> float:
    """Return the largest loss after the first one that is low; NaN where none is."""
    first = next((i for i, loss in enumerate(losses) if loss < low), None)
    return float("nan") if first is None else max(losses[first:])


class Clipper:
    """Clips gradients before an optimizer's step, as a training loop does."""

    def __init__(self, model: nn.Module, norm: float | None) -> None:
        self.model, self.norm = model, norm

    def step(self) -> None:
        if self.norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)


def clipped(name: str, batch: int, steps: int, norm: float | None) -> float:
    """Return the final loss under clipped gradients."""
    work = task(name)
    torch.manual_seed(0)
    model = mupass.transform(work.build(work.base), work.test[0][:2], base=work.base)
    both = [Clipper(model, norm), mupass.KFAC(model)]
    for _ in training(model, both, work, work.batches(batch, 0), steps, 1e9):
        pass
    return work.evaluate(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solved", action="store_true")
    parser.add_argument("--clipped", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clipped-steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    both, start = options.solved == options.clipped, time.process_time()
    if options.solved or both:
        print(
            f"{'solved task: worst; of batches; last':<40}"
            + "  ".join(f"seed {s:<20}" for s in range(options.seeds))
        )
        for name, arguments in SETTINGS.items():
            found = [solved(seed, options.steps, **arguments) for seed in range(options.seeds)]
            print(
                f"{name:<40}" + "  ".join(f"{a:<8.2g} {b:<8.2g} {c:<8.2g}" for a, b, c in found),
                flush=True,
            )
    if options.clipped or both:
        print(f"{'final loss by norm of clipping':<24}" + "".join(f"{n or 'none':>10}" for n in NORMS))
        for name in CLIPPED:
            losses = [clipped(name, 64, options.clipped_steps, norm) for norm in NORMS]
            print(f"{name:<24}" + "".join(f"{loss:>10.4f}" for loss in losses), flush=True)
    print(f"{(time.process_time() - start) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
