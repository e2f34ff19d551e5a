"""What width does to training, with maximal-update parameterization (mup) and without, in four studies.

    python examples/fashion_mnist.py                     # K-FAC on an MLP: under 3 minutes on 2 cores
    python examples/fashion_mnist.py --optimizer adam
    python examples/fashion_mnist.py --quick             # seconds, to see that everything works

First, why: Adam's rate is tuned at width 64, and networks up to 16 times as wide are trained with it, under
mup and under the standard parameterization. The task (`examples.data.signs`) cannot be solved without
learning features.

Then how, on Fashion-MNIST. One model of width 512 is all that is given; narrower copies of it are made by
`mupass`. Do updates scale as they should? Where is the best learning rate of each width? At last the model
itself is tuned by its narrowest copy.

The exit code is 0 only if what the page is to show is there: under mup the widest network is as good at the
rate of the narrowest one, under the standard parameterization it is worse; and updates scale as they should
under mup, and do not under the standard parameterization.
"""

from __future__ import annotations

import argparse
import math
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
from examples.data import DataError, Images, fashion_mnist, signs

PARAMETERIZATIONS = ("mup", "standard")
# Learning rates at the base width, as powers of two.
GRIDS = {"kfac": range(-8, -1), "shampoo": range(-9, -2), "adam": range(-11, -4), "sgd": range(-6, 1)}
# Of the first study; rates as above.
SIGNS_WIDTHS, SIGNS_RATES, SIGNS_STEPS = (64, 256, 1024), range(-9, -3), 300
# The widest network is as good as the narrowest one below the first ratio of losses, worse above the second.
AS_GOOD, WORSE = 1.25, 2.0


def mlp(width: int, inputs: int = 784, outputs: int = 10) -> nn.Module:
    """Three weight layers on rows of numbers: pixels of an image, or signs."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def half_squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return half of the mean squared error."""
    return (outputs - targets).square().mean() / 2


def same_rate(options: argparse.Namespace) -> tuple[list[mupass.Sweep], bool]:
    """Print what the rate tuned at the narrowest width does at the others, and return whether it transfers.

    The second result says whether the widest network is as good as the narrowest one under mup, and worse
    under the standard parameterization.
    """
    widths, steps = options.signs_widths, options.signs_steps
    generator = torch.Generator().manual_seed(0)
    data = [signs(64, generator) for _ in range(steps)]  # every batch is new
    inputs, targets = signs(2048, generator)

    def held_out_loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(half_squares(model(inputs), targets))

    model, sweeps = mlp(widths[-1], 128, 1), []
    for parameterization in PARAMETERIZATIONS:
        sweeps.append(mupass.sweep(
            model, data, options.signs_lrs, widths, loss=half_squares, optimizer="adam",
            steps=steps, evaluate=held_out_loss, parameterization=parameterization, store=options.store,
            jobs=options.jobs, progress=sys.stderr.isatty(),
        ))  # fmt: skip
    # At the narrowest width, which is the base, both train the same network.
    rate = sweeps[0].best(widths[0])["lr"]
    losses = [[found.curve(width, "lr")[rate][0] for width in widths] for found in sweeps]
    print(f"held-out loss with lr = {rate:.4g}, the best one at width {widths[0]} (untrained: 0.5)")
    print("".join(f"{column:>12}" for column in ("width", *PARAMETERIZATIONS)))
    for width, *row in zip(widths, *losses, strict=True):
        cells = ["diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in row]
        print("".join(f"{cell:>12}" for cell in (str(width), *cells)))
    mup, standard = losses
    return sweeps, mup[-1] <= AS_GOOD * mup[0] and standard[-1] > WORSE * mup[-1]


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
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256], help="of its copies")
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
    parser.add_argument(
        "--quick", action="store_true", help="few widths, rates and steps, and no verdict on the first study"
    )
    options = parser.parse_args(arguments)
    options.lrs = options.lrs or [2.0**power for power in GRIDS[options.optimizer]]
    options.signs_widths, options.signs_steps = SIGNS_WIDTHS, SIGNS_STEPS
    options.signs_lrs = [2.0**power for power in SIGNS_RATES]
    if options.quick:
        options.signs_widths, options.signs_lrs, options.signs_steps = SIGNS_WIDTHS[:2], [2.0**-7], 8
        options.width, options.widths, options.lrs = 128, options.widths[:2], options.lrs[::3]
        options.samples, options.steps, options.epochs = 512, 4, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies; the exit code is 1 where one does not show what it should, 2 when there is no data."""
    options = parse(arguments)
    torch.set_num_threads(1)  # at these sizes a second thread gains little
    try:
        data = fashion_mnist(options.data, options.samples, 2000).to("cpu", flat=True)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    begin = time.perf_counter()
    torch.manual_seed(0)
    print("=== same rate, wider network (adam, signs)")
    by_width, transfers = same_rate(options)
    model: Any = mlp(options.width)
    print(f"\n=== check: do updates scale as they should? ({options.optimizer})")
    checks = check(model, data, options.optimizer)
    print("\n=== sweep: does the best learning rate stay where it is?")
    sweeps = sweep(model, data, options)
    print(f"\n=== transfer: tune width {options.widths[0]}, train width {options.width}")
    tuned = transfer(model, data, options)
    page = options.out.with_suffix(".html")
    title = "Width of an MLP: one rate for all widths; Fashion-MNIST"
    print(f"wrote {mupass.report(page, *by_width, *checks, *sweeps, tuned, title=title)}")
    print(f"{time.perf_counter() - begin:.0f} s")
    as_claimed = checks[0].ok and not checks[1].ok and (transfers or options.quick)
    return 0 if as_claimed else 1


if __name__ == "__main__":
    sys.exit(main())
