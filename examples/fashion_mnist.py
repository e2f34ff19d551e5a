"""Check, sweep, transfer: is the parameterization right, does the best rate stay, tune small to train large.

    python examples/fashion_mnist.py                     # K-FAC on an MLP: under 3 minutes on 2 cores
    python examples/fashion_mnist.py --optimizer adam
    python examples/fashion_mnist.py --quick             # seconds, to see that everything works

One model of width 512 is all that is given. Narrower copies of it are made by `mupass`: first to see whether
updates scale as they should under maximal-update parameterization (mup) and under the standard one, then to
find the best learning rate at several widths, and at last to tune the model itself by its narrowest copy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mupass

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.data import DataError, Images, fashion_mnist

PARAMETERIZATIONS = ("mup", "standard")
# Learning rates at the base width, as powers of two.
GRIDS = {"kfac": range(-8, -1), "shampoo": range(-9, -2), "adam": range(-11, -4), "sgd": range(-6, 1)}


def mlp(width: int) -> nn.Module:
    """Three weight layers on flattened images."""
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def batches(data: Images, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split the training images."""
    return list(zip(data.train_x.split(size), data.train_y.split(size), strict=True))


def check(model: nn.Module, data: Images, optimizer: str) -> list[mupass.CoordCheck]:
    """Print whether updates scale as they should under mup, and that they do not under the standard one."""
    small = batches(data, 32)[:3]  # the theory is for fewer rows than width
    checks = []
    for parameterization in PARAMETERIZATIONS:
        found = mupass.coord_check(model, small, optimizer=optimizer, parameterization=parameterization)
        print(f"{parameterization}: {found.verdict()}")
        checks.append(found)
    return checks


def sweep(model: nn.Module, data: Images, options: argparse.Namespace) -> list[mupass.Sweep]:
    """Print the best learning rate of every width, and write the curves."""
    sweeps = []
    for parameterization in PARAMETERIZATIONS:
        found = mupass.sweep(
            model, batches(data, options.batch), options.lrs, options.widths, optimizer=options.optimizer,
            steps=options.steps, seeds=options.seeds, parameterization=parameterization, store=options.store,
            jobs=options.jobs, progress=sys.stderr.isatty(),
        )  # fmt: skip
        print(f"\n{parameterization}\n{found}")
        path = options.out.with_stem(f"{options.out.stem}_{parameterization}")
        print(f"wrote {found.report(path)}")
        sweeps.append(found)
    return sweeps


def transfer(model: nn.Module, data: Images, options: argparse.Namespace) -> mupass.Transfer:
    """Tune the narrowest copy, train the model with what was found, and print its test accuracy."""
    found = mupass.transfer(
        model, batches(data, options.batch), grid={"lr": options.lrs}, proxy=options.widths[0],
        optimizer=options.optimizer, steps=options.steps, seeds=options.seeds, store=options.store,
        jobs=options.jobs, progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(found.verdict())
    for _ in range(options.epochs):
        for x, y in batches(data, options.batch):
            found.optimizer.zero_grad()
            F.cross_entropy(found.model(x), y).backward()
            found.optimizer.step()
    with torch.no_grad():
        accuracy = float((found.model(data.test_x).argmax(1) == data.test_y).float().mean())
    print(f"test accuracy {100 * accuracy:.1f} % after {options.epochs} epochs of {options.samples} images")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=tuple(GRIDS), default="kfac")
    parser.add_argument("--width", type=int, default=512, help="of the model (default: 512)")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="of its copies")
    parser.add_argument("--lrs", type=float, nargs="+", help="at the narrowest width")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32, help="of each run of the sweep (default: 32)")
    parser.add_argument("--epochs", type=int, default=2, help="of the model itself (default: 2)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4096, help="training images (default: 4096)")
    parser.add_argument("--store", help="file that keeps results: what was stopped goes on where it was")
    parser.add_argument("--jobs", type=int, default=1, help="processes (more than one needs loky)")
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist.png"), help=".png or .html")
    parser.add_argument("--quick", action="store_true", help="two widths, three learning rates, few steps")
    options = parser.parse_args(arguments)
    options.lrs = options.lrs or [2.0**power for power in GRIDS[options.optimizer]]
    if options.quick:
        options.width, options.widths, options.lrs = 128, options.widths[:2], options.lrs[::3]
        options.samples, options.steps, options.epochs = 512, 4, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the three studies; the exit code is 1 when the check fails under mup, 2 when there is no data."""
    options = parse(arguments)
    torch.set_num_threads(1)  # at these sizes a second thread gains little
    try:
        data = fashion_mnist(options.data, options.samples, 2000).to("cpu", flat=True)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    begin = time.perf_counter()
    torch.manual_seed(0)
    model: Any = mlp(options.width)
    print(f"=== check: do updates scale as they should? ({options.optimizer})")
    checks = check(model, data, options.optimizer)
    print("\n=== sweep: does the best learning rate stay where it is?")
    sweeps = sweep(model, data, options)
    print(f"\n=== transfer: tune width {options.widths[0]}, train width {options.width}")
    tuned = transfer(model, data, options)
    page = options.out.with_suffix(".html")
    print(f"wrote {mupass.report(page, *checks, *sweeps, tuned, title='Width of an MLP on Fashion-MNIST')}")
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0 if checks[0].ok else 1


if __name__ == "__main__":
    sys.exit(main())
