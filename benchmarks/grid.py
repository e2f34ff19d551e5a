"""Train at several widths and learning rates, and see whether the best learning rate stays put.

    python -m benchmarks.grid                       # K-FAC on an MLP: a few minutes on 2 cores
    python -m benchmarks.grid --model cnn --optimizer shampoo
    python -m benchmarks.grid --quick               # seconds, to see that everything works

Each width is trained under maximal-update parameterization (mup) and under the standard parameterization. A
table of loss and accuracy is printed, with the best learning rate of each width, and the curves are written
as a PNG: the experiment of figure 6 of Ishikawa & Karakida (arXiv 2312.12226) in small.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mupass
from benchmarks.models import mlp, plain_cnn
from examples.data import DataError, Images, fashion_mnist

PARAMETERIZATIONS = ("mup", "standard")
LR_POWERS = {"kfac": (-8, 1), "shampoo": (-9, -2), "adam": (-13, -4), "sgd": (-7, 2)}
WIDTHS = {"mlp": [64, 128, 256, 512], "cnn": [16, 32, 64, 128]}
DAMPING = {"kfac": 1e-2, "shampoo": 1e-3}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        parameterization: ``mup`` or ``standard``.
        width: Width of the model.
        lr: Learning rate at the base width.
        loss: Training loss over the last epoch; infinite when it diverged.
        accuracy: Share of test images classified right.
    """

    parameterization: str
    width: int
    lr: float
    loss: float
    accuracy: float


def make_optimizer(
    name: str, model: nn.Module, lr: float, options: argparse.Namespace
) -> torch.optim.Optimizer:
    """Build the optimizer that the command line names, with the plan's scales."""
    fallback = {"fallback": "sgd", "fallback_lr": options.fallback_lr}
    if name == "kfac":
        return mupass.KFAC(
            model, lr, options.damping, momentum=options.momentum, root_every=options.root_every, **fallback
        )
    if name == "shampoo":
        return mupass.Shampoo(
            model,
            lr,
            options.damping,
            momentum=options.momentum,
            root_every=options.root_every,
            graft="none",
            **fallback,
        )
    groups = mupass.param_groups(model, lr, optimizer=name)
    return torch.optim.Adam(groups) if name == "adam" else torch.optim.SGD(groups, momentum=options.momentum)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, epochs: int, batch: int
) -> tuple[float, float]:
    """Train; return the loss over the last epoch (infinite if it diverged) and the test accuracy."""
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        for rows in torch.randperm(len(data.train_y), generator=generator).split(batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            if not loss.isfinite() or loss > 1e3:
                return math.inf, 0.0
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
    return sum(losses) / len(losses), accuracy


def sweep(options: argparse.Namespace, data: Images) -> Iterator[Run]:
    """Yield one run for each parameterization, width and learning rate, averaged over seeds."""
    build = {"mlp": mlp, "cnn": plain_cnn}[options.model]
    for parameterization in PARAMETERIZATIONS:
        for width in options.widths:
            for lr in options.lrs:
                found = []
                for seed in range(options.seeds):
                    torch.manual_seed(seed)
                    model = build(width).to(options.device)
                    model = mupass.transform(
                        model, data.train_x[:2], base=options.base, parameterization=parameterization
                    )
                    optimizer = make_optimizer(options.optimizer, model, lr, options)
                    found.append(train(model, optimizer, data, options.epochs, options.batch))
                loss, accuracy = (sum(f[i] for f in found) / len(found) for i in (0, 1))
                yield Run(parameterization, width, lr, loss, accuracy)


def best(runs: Sequence[Run], parameterization: str, width: int) -> tuple[Run, bool]:
    """Return the run of lowest loss at one width, and whether the grid brackets it."""
    row = sorted(
        (r for r in runs if (r.parameterization, r.width) == (parameterization, width)), key=lambda r: r.lr
    )
    winner = min(row, key=lambda r: r.loss)
    return winner, 0 < row.index(winner) < len(row) - 1


def steps_moved(runs: Sequence[Run], parameterization: str) -> int:
    """Return by how many steps of the grid the best learning rate moves over all widths."""
    grid = sorted({r.lr for r in runs})
    spots = [grid.index(best(runs, parameterization, w)[0].lr) for w in {r.width for r in runs}]
    return max(spots) - min(spots)


def show(lr: float) -> str:
    """Write a learning rate as a power of two where it is one."""
    power = math.log2(lr)
    return f"2^{power:.0f}" if power.is_integer() else f"{lr:.4g}"


def table(runs: Sequence[Run]) -> str:
    """Return loss (accuracy) against learning rate and width, the best of each width starred."""
    widths, lrs = sorted({r.width for r in runs}), sorted({r.lr for r in runs})
    cells = {(r.parameterization, r.width, r.lr): r for r in runs}
    lines = []
    for parameterization in dict.fromkeys(r.parameterization for r in runs):
        lines += ["", f"{parameterization}: training loss (test accuracy)"]
        lines.append("lr".rjust(8) + "".join(f"width {w}".rjust(18) for w in widths))
        winners = {w: best(runs, parameterization, w) for w in widths}
        for lr in lrs:
            row = show(lr).rjust(8)
            for w in widths:
                run = cells[parameterization, w, lr]
                text = "diverged" if math.isinf(run.loss) else f"{run.loss:.4f} ({100 * run.accuracy:.1f} %)"
                row += (text + ("*" if winners[w][0] is run and run.loss < math.inf else " ")).rjust(18)
            lines.append(row)
        spots = [f"{w}: {_spot(run, inside)}" for w, (run, inside) in winners.items()]
        moved = steps_moved(runs, parameterization)
        lines.append(f"best lr by width: {', '.join(spots)}; it moves by {moved} grid steps")
    return "\n".join(lines)


def _spot(run: Run, inside: bool) -> str:
    if math.isinf(run.loss):
        return "none"
    return show(run.lr) + ("" if inside else " (edge of the grid)")


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Write the transfer curves: loss against learning rate, one line a width, the minima marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    widths = sorted({r.width for r in runs})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis_r")(
        [0.12 + 0.88 * i / max(len(widths) - 1, 1) for i in range(len(widths))]
    )
    for axis, parameterization in zip(axes, PARAMETERIZATIONS, strict=True):
        for width, color in zip(widths, colors, strict=True):
            row = sorted(
                (r.lr, r.loss) for r in runs if (r.parameterization, r.width) == (parameterization, width)
            )
            lrs, losses = zip(*row, strict=True)
            axis.plot(lrs, losses, color=color, marker=".", lw=1.8, label=f"width {width}")
            winner, _ = best(runs, parameterization, width)
            axis.plot(
                winner.lr, winner.loss, marker="*", ms=14, color=color, mec="white", ls="none", zorder=3
            )
        axis.axhline(math.log(10), color="0.5", lw=1, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(r.lr for r in runs) / 1.3, max(r.lr for r in runs) * 1.3)
        axis.set_yscale("log")
        axis.set_xlabel("learning rate at the base width")
        axis.set_title({"mup": "maximal update (mup)", "standard": "standard"}[parameterization])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    # What is worse than guessing (dotted) runs out of the picture, so that the minima have room.
    losses = [r.loss for r in runs if r.loss < math.log(10)]
    axes[0].set_ylim(0.8 * min(losses, default=1.0), 4.0)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("training loss, last epoch (dotted: guessing)")
    axes[0].legend(frameon=False, title="stars: best of each width", alignment="left")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def number(text: str) -> float:
    """Read a positive number such as ``0.1`` or ``2^-4``."""
    base, hat, power = text.partition("^")
    value = float(base) ** float(power) if hat else float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def count(text: str) -> int:
    """Read a whole number from 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--optimizer", choices=tuple(LR_POWERS), default="kfac")
    parser.add_argument("--widths", type=count, nargs="+", help="default: 64 to 512 (mlp), 16 to 128 (cnn)")
    parser.add_argument(
        "--lrs",
        type=number,
        nargs="+",
        help="such as 0.1 2^-4; default: powers of two that suit the optimizer",
    )
    parser.add_argument("--base", type=count, help="base width, at which lr is read (default: the smallest)")
    parser.add_argument("--samples", type=count, default=2048, help="training images (default: 2048)")
    parser.add_argument("--epochs", type=count, default=5)
    parser.add_argument("--batch", type=count, default=256)
    parser.add_argument("--seeds", type=count, default=1)
    parser.add_argument(
        "--damping",
        type=float,
        help="relative to the trace (K-FAC, default 0.01) or top eigenvalue (Shampoo, 0.001)",
    )
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument(
        "--root-every", type=count, default=1, help="steps between recomputations of the inverses"
    )
    parser.add_argument(
        "--fallback-lr", type=float, default=1e-2, help="of SGD for what is not preconditioned"
    )
    # One thread: at these sizes a second one gains little, and on a busy machine the two wait for each other.
    parser.add_argument(
        "--threads", type=count, default=1, help="CPU threads (default: 1; more for wide networks)"
    )
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("fashion_mnist.png"))
    parser.add_argument("--quick", action="store_true", help="two widths, three learning rates, one epoch")
    options = parser.parse_args(arguments)
    options.widths = options.widths or WIDTHS[options.model]
    low, high = LR_POWERS[options.optimizer]
    options.lrs = options.lrs or [2.0**p for p in range(low, high + 1)]
    if options.damping is None:
        options.damping = DAMPING.get(options.optimizer, 0.0)
    if options.quick:
        options.widths, options.lrs = options.widths[:2], options.lrs[::4][:3]
        options.samples, options.epochs = 512, 1
    options.base = options.base or min(options.widths)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, print the table and write the picture."""
    from tqdm import tqdm

    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        data = fashion_mnist(options.data, options.samples, 2000).to(
            options.device, flat=options.model == "mlp"
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    warnings.filterwarnings(
        "ignore", message="mupass", category=UserWarning
    )  # diverging runs say so in the table
    start, total = time.perf_counter(), 2 * len(options.widths) * len(options.lrs)
    runs = []
    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines
    with tqdm(total=total, unit="run", dynamic_ncols=True, mininterval=every) as bar:
        for run in sweep(options, data):
            runs.append(run)
            news = f"{run.parameterization} width {run.width} lr {show(run.lr)} loss {run.loss:.3g}"
            bar.set_postfix_str(news, refresh=False)
            bar.update()
    title = f"{options.optimizer} on Fashion-MNIST, {options.model}, {options.samples} images"
    title += f", {options.epochs} epochs"
    print(f"\n{title}, base width {options.base}")
    print(table(runs))
    plot(runs, options.out, title)
    print(f"\nwrote {options.out} after {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
