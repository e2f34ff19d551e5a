"""Search by hypergradients against a grid: validation loss of a proxy on Fashion-MNIST, runs and seconds.

    python -m benchmarks.gradient_search

The proxy is a narrow MLP. Both searches have the same bounds, the same score (loss on images that are not
trained on) and the same seed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mupass
from benchmarks.models import mlp
from examples.data import fashion_mnist

SEARCHES: dict[str, dict[str, list[float]]] = {
    "adam": {"lr": [2.0**p for p in range(-13, -3)]},
    "sgd": {"lr": [2.0**p for p in range(-6, 3)], "momentum": [0.3, 0.6, 0.8, 0.9, 0.95]},
    "shampoo": {"lr": [2.0**p for p in range(-9, 1)], "damping": [10.0**p for p in range(-5, 0)]},
}


def shampoo(model: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    """Make Shampoo with blocks, so that 784 pixels take no decomposition of that size."""
    return mupass.Shampoo(
        model, lr, damping, graft="none", momentum=0.0, block_size=128, fallback="sgd", fallback_lr=lr
    )


def main() -> None:
    """Run both searches for each optimizer and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = fashion_mnist(options.data, options.steps * options.batch, 2000).to("cpu", flat=True)
    data = list(zip(images.train_x.split(options.batch), images.train_y.split(options.batch), strict=True))

    def validation(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(images.test_x), images.test_y)

    print(f"{'optimizer':<10}{'search':<10}{'runs':>5}{'seconds':>9}{'loss':>9}  found")
    for name in options.optimizers:
        settings: dict[str, Any] = {
            "optimizer": shampoo if name == "shampoo" else name,
            "steps": options.steps,
            "evaluate": validation,
            "seeds": options.seeds,
        }
        for driver in ("grid", "gradient"):
            torch.manual_seed(0)
            begin = time.perf_counter()
            found = mupass.transfer(
                mlp(2 * options.width), data, grid=SEARCHES[name], proxy=options.width, driver=driver,
                trials=options.trials, progress=False, **settings,
            )  # fmt: skip
            seconds, trials = time.perf_counter() - begin, found.search.trials
            point = ", ".join(f"{k} {v:.4g}" for k, v in found.hyperparameters.items())
            lowest = found.search.optimum(options.width, next(iter(found.hyperparameters))).loss
            print(f"{name:<10}{driver:<10}{len(trials):>5}{seconds:>9.1f}{lowest:>9.4f}  {point}", flush=True)


if __name__ == "__main__":
    main()
