"""Regression in other units: what targets of another size do to a training at the defaults.

    OMP_NUM_THREADS=1 python -m benchmarks.target_units            # two minutes on one core
    OMP_NUM_THREADS=1 python -m benchmarks.target_units --seeds 1

An MLP of width 64 learns ``y = size ((x . w) / 4 + x_1 x_2)`` of 16 Gaussian inputs, mean squared error,
fresh batches of 64, 300 steps. Printed is the mean over the last 20 losses, divided by the variance of the
targets: what a guess of zero has is 1. In brackets are the lowest and the highest of the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

INPUTS, WIDTH, BATCH, STEPS, LAST = 16, 64, 64, 300, 20
SIZES = (100.0, 1.0, 0.1, 0.01)
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "K-FAC": mupass.KFAC,
    "Shampoo": mupass.Shampoo,
    "AdamW, 1e-3": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0),
}


def batches(size: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets without end."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = torch.randn(INPUTS, generator=generator)
    while True:
        x = torch.randn(BATCH, INPUTS, generator=generator)
        yield x, size * (x @ weights / 4 + x[:, 0] * x[:, 1])[:, None]


def final_loss(name: str, size: float, seed: int) -> float:
    """Return the mean of the last losses, relative to the variance of their targets."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
    )
    model = mupass.transform(model, torch.randn(4, INPUTS))
    optimizer = OPTIMIZERS[name](model)
    ratios = []
    for _, (x, y) in zip(range(STEPS), batches(size, seed), strict=False):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        ratios.append(loss.item() / y.square().mean().item())
    return statistics.fmean(ratios[-LAST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    # What is told of plans is not what is measured.
    warnings.simplefilter("ignore", mupass.MupassWarning)
    print("| size of targets | " + " | ".join(OPTIMIZERS) + " |")
    print("|---" * (1 + len(OPTIMIZERS)) + "|")
    for size in SIZES:
        cells = []
        for name in OPTIMIZERS:
            losses = [final_loss(name, size, seed) for seed in seeds]
            cells.append(f"{statistics.fmean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})")
        print(f"| {size:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
