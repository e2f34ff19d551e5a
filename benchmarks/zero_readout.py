"""A zero readout costs K-FAC accuracy at large batches; SGD does not mind.

Table 2 of Ishikawa & Karakida (arXiv 2312.12226) in small: 1024 images of Fashion-MNIST, a small CNN, muP
with the readout at its own scale (b_L = 1) and with a readout of zeros (their b_L = 64 is zero in floating
point). K-FAC's first step from a zero readout is kernel regression on random features: with a large batch it
fits so well that features are never learned. Every cell is the best test accuracy over a factor-4 grid of
learning rates, averaged over seeds.

    python -m benchmarks.zero_readout
    python -m benchmarks.zero_readout --optimizers kfac --damping-floor 0 --unbounded   # the paper's K-FAC
"""

import argparse
import sys
import time
import warnings

import torch

import mupass
from benchmarks.grid import train
from benchmarks.models import plain_cnn
from examples.data import Images, fashion_mnist

GRIDS = {"kfac": [2.0**p for p in (-9, -7, -5, -3, -1)], "sgd": [2.0**p for p in (-7, -5, -3, -1, 1)]}


def accuracy(
    optimizer: str, zero: bool, lr: float, batch: int, data: Images, seed: int, options: argparse.Namespace
) -> float:
    """Train one network and return its test accuracy."""
    torch.manual_seed(seed)
    model = mupass.transform(plain_cnn(options.width), data.train_x[:2], base=options.width)
    if zero:
        torch.nn.init.zeros_(model[-1].weight)
        torch.nn.init.zeros_(model[-1].bias)
    if optimizer == "kfac":
        bounds = {"kl_clip": None, "step_bound": None} if options.unbounded else {}
        steps = mupass.KFAC(
            model, lr, options.damping, momentum=0.0, damping_floor=options.damping_floor, fallback="sgd",
            **bounds,
        )  # fmt: skip
    else:
        steps = torch.optim.SGD(mupass.param_groups(model, lr, optimizer="sgd"), momentum=0.9)
    # Steps fall with the batch, so epochs rise with its root: large batches are not just undertrained.
    epochs = round(options.epochs * max(1.0, (batch / 64) ** 0.5))
    return train(model, steps, data, epochs, batch)[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10, help="at batches up to 64")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--damping-floor", type=float, default=0.1, help="of K-FAC; 0 is the paper's rule")
    parser.add_argument(
        "--unbounded", action="store_true", help="K-FAC without bounds on a step, as the paper's"
    )
    parser.add_argument("--data")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    data = fashion_mnist(options.data, 1024, 4000)
    print(
        f"test accuracy, 1024 images, CNN of width {options.width}, "
        f"best lr of {len(GRIDS['kfac'])}, {options.seeds} seeds"
    )
    print("optimizer  readout " + "".join(f"batch {b}".rjust(13) for b in options.batches))
    for optimizer in options.optimizers:
        rows = {}
        for zero in (False, True):
            rows[zero] = []
            for batch in options.batches:
                means = [
                    sum(accuracy(optimizer, zero, lr, batch, data, s, options) for s in range(options.seeds))
                    / options.seeds
                    for lr in GRIDS[optimizer]
                ]
                rows[zero].append(100 * max(means))
            print(
                f"{optimizer:10} {'zero' if zero else 'b_L = 1':8}"
                + "".join(f"{a:11.2f} %" for a in rows[zero]),
                flush=True,
            )
        print(
            f"{'':10} {'loss':8}"
            + "".join(f"{a - b:11.2f}  " for a, b in zip(rows[False], rows[True], strict=True))
        )
    print(f"{time.process_time() / 60:.0f} CPU minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
