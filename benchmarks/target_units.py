"""Regression in other units: what targets of another size, or many of them, do at the defaults.

    OMP_NUM_THREADS=1 python -m benchmarks.target_units            # three minutes on one core
    OMP_NUM_THREADS=1 python -m benchmarks.target_units --seeds 1

An MLP of width 64 learns ``y_k = size ((x . w_k) / 4 + x_i x_j)`` of 16 Gaussian inputs, with a w of its own
for every output and another pair of inputs for the first 16, mean squared error, fresh batches of 64, 300
steps. Printed is the mean over the last 20 losses, divided by the variance of the targets: what a guess of
zero has is 1. In brackets are the lowest and the highest of the seeds. ``target_scale`` is the size of all
outputs together, the root of their number times the size of each.
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
# Size of the targets, and number of outputs.
TASKS = ((100.0, 1), (10.0, 1), (5.0, 1), (1.0, 1), (0.1, 1), (0.01, 1), (1.0, 10), (1.0, 100))
# Given a model and the size of all targets together.
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "K-FAC, target_scale": lambda model, size: mupass.KFAC(model, target_scale=size),
    "K-FAC": lambda model, size: mupass.KFAC(model),
    "Shampoo": lambda model, size: mupass.Shampoo(model),
    "AdamW, 1e-3": lambda model, size: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0),
}


def batches(size: float, outputs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets without end."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = torch.randn(INPUTS, outputs, generator=generator)
    first = torch.arange(outputs) % INPUTS
    while True:
        x = torch.randn(BATCH, INPUTS, generator=generator)
        yield x, size * (x @ weights / 4 + x[:, first] * x[:, (first + 1) % INPUTS])


def final_loss(name: str, size: float, outputs: int, seed: int) -> float:
    """Return the mean of the last losses, relative to the variance of their targets."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)
    )
    model = mupass.transform(model, torch.randn(4, INPUTS))
    optimizer = OPTIMIZERS[name](model, size * outputs**0.5)
    ratios = []
    for _, (x, y) in zip(range(STEPS), batches(size, outputs, seed), strict=False):
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
    print("| size of targets | outputs | " + " | ".join(OPTIMIZERS) + " |")
    print("|---" * (2 + len(OPTIMIZERS)) + "|")
    for size, outputs in TASKS:
        cells = []
        for name in OPTIMIZERS:
            losses = [final_loss(name, size, outputs, seed) for seed in seeds]
            cells.append(f"{statistics.fmean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})")
        print(f"| {size:g} | {outputs} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
