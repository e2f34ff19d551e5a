"""Learning-rate transfer on Fashion-MNIST: K-FAC and Shampoo, mup beside standard, widths 64 to 1024.

    python -m benchmarks.fashion_transfer            # about half an hour on 2 cores
    python -m benchmarks.fashion_transfer --widths 64 128 256

For each optimizer and parameterization: the best learning rate of every width on a factor-2 grid, whether the
grid brackets it, how far it moves, and whether wider is ever worse at a fixed learning rate (by more than
5 %, at rates up to the best one).
"""

import sys
from itertools import pairwise
from pathlib import Path

from benchmarks.grid import PARAMETERIZATIONS, Run, best, parse, plot, show, steps_moved, sweep, table
from examples.data import fashion_mnist

SETTINGS = {"kfac": [], "shampoo": ["--root-every", "4"]}


def wider_is_worse(runs: list[Run], parameterization: str) -> list[str]:
    """Return the pairs of neighbouring widths at which the wider network trains worse at the same rate."""
    rows = [r for r in runs if r.parameterization == parameterization]
    widths = sorted({r.width for r in rows})
    by = {(r.width, r.lr): r.loss for r in rows}
    top = min(best(runs, parameterization, w)[0].lr for w in widths)
    lrs = sorted({r.lr for r in rows if r.lr <= top})
    return [
        f"{a}->{b} at {show(lr)}: {by[a, lr]:.3f}->{by[b, lr]:.3f}"
        for lr in lrs
        for a, b in pairwise(widths)
        if by[b, lr] > 1.05 * by[a, lr]
    ]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    widths = [] if "--widths" in arguments else ["--widths", "64", "128", "256", "512", "1024"]
    for optimizer, settings in SETTINGS.items():
        options = parse(["--optimizer", optimizer, *widths, *settings, *arguments])
        data = fashion_mnist(options.data, options.samples, 2000).to(
            options.device, flat=options.model == "mlp"
        )
        runs = list(sweep(options, data))
        print(f"\n=== {optimizer}, {options.model}, {options.samples} images, {options.epochs} epochs")
        print(table(runs))
        for parameterization in PARAMETERIZATIONS:
            found = [best(runs, parameterization, w) for w in sorted({r.width for r in runs})]
            moved = steps_moved(runs, parameterization)
            worse = wider_is_worse(runs, parameterization)
            print(
                f"{parameterization:9} best lr moves by {moved} steps; bracketed: "
                f"{all(inside for _, inside in found)}; wider is worse: {'; '.join(worse) or 'nowhere'}",
                flush=True,
            )
        plot(runs, Path(f"fashion_transfer_{optimizer}.png"), f"{optimizer}, Fashion-MNIST, {options.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
