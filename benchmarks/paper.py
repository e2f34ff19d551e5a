"""Figures 1 and 2 of arXiv 2312.12226 in small, and alignment while training.

    OMP_NUM_THREADS=1 python -m benchmarks.paper                # what is not done yet, then all tables
    python -m benchmarks.paper --table                          # the tables of what was run
    python -m benchmarks.paper --only kfac/mup --seeds 2

An MLP with two hidden layers and no biases learns 1024 images of Fashion-MNIST at 14 x 14 pixels, half
squared error on one-hot labels minus their mean, in batches of 64. The base width is 64. Optimizers are as in
the paper: K-FAC and Shampoo (e = 1/2) with relative damping, K-FAC without bounds on the step or memory of
damping; AdamW beside them. Rates are in factors of 2 and the best at width 64 on seed 0 after 100 steps
(training loss on all images), until it has worse ones on both sides; all widths then use it.

* Features (figure 1): RMS of the change of the last hidden pre-activations, ``h_t - h_0``, after 1, 10 and
  100 steps, on 256 images, and its slope against the width. Theory: 0 under ``mup``; under ``standard`` -1/2
  for K-FAC, which is lazy.
* Curvature (figure 2): slopes of ``tr A`` and ``tr B`` of all layers. Theory under ``mup``, at all steps: A 0
  in the first layer (its input is data) and 1 beyond; B -1 below the readout and 0 there.
* Alignment (`mupass.AlignmentProbe`): exponents at width 256 after 10, 100 and 1000 steps under ``mup``, and
  the stable rank of the change of every weight, ``|dW|_F^2 / |dW|_2^2``.

Slopes are fits of logarithms for every seed; means and Student's 95 % intervals over seeds. A run is one line
of ``results/paper.jsonl``. Printed minutes are process time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks.char_transfer import search
from benchmarks.evidence_report import STUDENT
from benchmarks.log import RESULTS, Log, commit
from examples.data import fashion_mnist
from mupass._study.slopes import fit

BASE, WIDTHS = 64, (64, 128, 256, 512, 1024)
IMAGES, SAMPLES, BATCH, CLASSES = 1024, 256, 64, 10
MOMENTS = (0, 1, 10, 100)  # steps after which features and curvature are looked at
ALIGNED_AT, ALIGNED_WIDTH = (10, 100, 1000), 256
POWERS = range(-12, 4)
UNBOUND = {
    "step_bound": None,
    "kl_clip": None,
    "damping_floor": 0.0,
    "damping_memory": 0.0,
    "variance_adaptation": False,
}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "kfac": lambda model, lr: mupass.KFAC(model, lr, 1e-2, **UNBOUND),
    "shampoo": lambda model, lr: mupass.Shampoo(model, lr, graft="none"),
    "adamw": lambda model, lr: torch.optim.AdamW(mupass.param_groups(model, lr), lr, weight_decay=0.0),
}
STARTS = {"kfac": -6, "shampoo": -6, "adamw": -7}  # powers of 2 that the grids start from
LAYERS = ("first", "hidden", "readout")
THEORY = {"A": (0, 1, 1), "B": (-1, -1, 0)}
KEY = ("kind", "optimizer", "parameterization", "width", "power", "seed")
Data = tuple[Tensor, Tensor]


def images(folder: str | None) -> Data:
    """Return 1024 flat images and their centred one-hot labels."""
    data = fashion_mnist(folder, IMAGES, CLASSES)
    x = F.avg_pool2d(data.train_x, 2).flatten(1)
    return x, F.one_hot(data.train_y, CLASSES).float() - 1 / CLASSES


def mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.ReLU(),
        nn.Linear(width, CLASSES, bias=False),
    )  # fmt: skip


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def build(data: Data, width: int, parameterization: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(data[0].shape[1], width)
    return mupass.transform(model, data[0][:2], base=BASE, parameterization=parameterization)


def steps_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, seed: int, steps: int
) -> Iterator[float]:
    """Train, and yield the loss of every batch; end where it is no number."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for rows in torch.randperm(IMAGES, generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(model(data[0][rows]), data[1][rows])
            loss.backward()
            optimizer.step()
            yield loss.item()
            done += 1
            if done == steps or not math.isfinite(loss.item()):
                return


@torch.no_grad()
def whole_loss(model: nn.Module, data: Data) -> float:
    """Return the loss on all images."""
    value = loss_of(model(data[0]), data[1]).item()
    return value if math.isfinite(value) else math.inf


def look(model: nn.Module, data: Data) -> tuple[Tensor, dict[str, list[float]]]:
    """Return the last hidden pre-activations, and the traces of A and B of every layer, by autograd alone."""
    x, y = (part[:SAMPLES] for part in data)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in linear]
    loss = loss_of(model(x), y) * len(x)  # the sum: gradients of single terms
    deltas = torch.autograd.grad(loss, outputs)
    for hook in hooks:
        hook.remove()
    traces = {
        "A": [h.square().sum(1).mean().item() for h in inputs],
        "B": [delta.square().sum(1).mean().item() for delta in deltas],
    }
    return outputs[1].detach(), traces


def run_loss(optimizer: str, parameterization: str, power: int, seed: int, data: Data) -> dict[str, Any]:
    """Train at the base width, for the choice of a rate."""
    model = build(data, BASE, parameterization, seed)
    for _ in steps_of(model, OPTIMIZERS[optimizer](model, 2.0**power), data, seed, MOMENTS[-1]):
        pass
    return {"loss": whole_loss(model, data)}


def run_features(
    optimizer: str, parameterization: str, width: int, power: int, seed: int, data: Data
) -> dict[str, Any]:
    """Train, and look at features and curvature on the way."""
    model = build(data, width, parameterization, seed)
    start, traces = look(model, data)
    changes, seen = {}, {"0": traces}
    steps = steps_of(model, OPTIMIZERS[optimizer](model, 2.0**power), data, seed, MOMENTS[-1])
    for step, _ in enumerate(steps, 1):
        if step in MOMENTS:
            now, seen[str(step)] = look(model, data)
            changes[str(step)] = (now - start).square().mean().sqrt().item()
    return {"changes": changes, "traces": seen, "loss": whole_loss(model, data)}


def stable_rank(change: Tensor) -> float:
    return (change.square().sum() / torch.linalg.matrix_norm(change, 2).square()).item()


def run_alignment(optimizer: str, power: int, seed: int, data: Data) -> dict[str, Any]:
    """Train long, and measure exponents and ranks on the way."""
    model = build(data, ALIGNED_WIDTH, "mup", seed)
    probe = mupass.AlignmentProbe(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    steps = steps_of(model, OPTIMIZERS[optimizer](model, 2.0**power), data, seed, ALIGNED_AT[-1])
    for step, _ in enumerate(steps, 1):
        if step in ALIGNED_AT:
            exponents = {name: asdict(one) for name, one in probe(data[0][:SAMPLES]).items()}
            changes = {name: p.detach() - start[name] for name, p in model.named_parameters()}
            ranks = {name: stable_rank(change) for name, change in changes.items()}
            found[str(step)] = {"exponents": exponents, "ranks": ranks}
    return {"aligned": found}


def work_off(log: Log, cells: Sequence[tuple[str, str]], seeds: range, data: Data) -> None:
    """Do what is missing."""

    def line(make: Callable[..., dict[str, Any]], *arguments: Any, **key: Any) -> dict[str, Any]:
        """Return a run's line, which is made now if it is not there."""
        found = log.get(**key)
        if found is None:
            start = time.process_time()
            result = make(*arguments, data)
            spent = round(time.process_time() - start, 2)
            found = {**key, **result, "cpu_seconds": spent, "commit": commit()}
            log.add(found)
        return found

    for optimizer, parameterization in cells:
        key: dict[str, Any] = {"optimizer": optimizer, "parameterization": parameterization}

        def loss(lr: float, key: Mapping[str, Any] = key) -> float:
            power = round(math.log2(lr))
            if power not in POWERS:
                return math.inf
            at = {"kind": "loss", "width": BASE, "power": power, "seed": 0}
            words = (key["optimizer"], key["parameterization"], power, 0)
            return float(line(run_loss, *words, **key, **at)["loss"])

        best = round(math.log2(search(loss, 2.0 ** STARTS[optimizer], 2).best))
        for seed in seeds:
            at = {"power": best, "seed": seed}
            for width in WIDTHS:
                words = (optimizer, parameterization, width, best, seed)
                line(run_features, *words, kind="features", width=width, **key, **at)
            if parameterization == "mup":
                line(run_alignment, optimizer, best, seed, kind="alignment", width=ALIGNED_WIDTH, **key, **at)
        print(f"{optimizer}/{parameterization} at 2^{best}", flush=True)


def slope(values: Mapping[int, float]) -> float:
    """Return the slope of the logarithm against that of the width."""
    return fit(list(values), [[value] for value in values.values()]).power


def interval(values: Sequence[float]) -> str:
    """Write the mean over seeds and its 95 % interval."""
    if len(values) < 2:
        return f"{fmean(values):+.2f}"
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.2f} ± {half:.2f}"


def slopes(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> str:
    """Return the slope in width of something of the runs, seed by seed."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = {row["width"]: value(row) for row in rows if row["seed"] == seed}
        if set(mine) == set(WIDTHS):
            found.append(slope(mine))
    return interval(found) if found else "diverged"


def complete(rows: Sequence[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    """Return the runs that got as far as a step with numbers."""
    return [row for row in rows if math.isfinite(row["changes"].get(step, math.nan))]


def feature_table(log: Log, cells: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the rows of figure 1."""
    yield f"| | rate | width | {' | '.join(f'{step} steps' for step in MOMENTS[1:])} |"
    yield "|---" * (3 + len(MOMENTS[1:])) + "|"
    for optimizer, parameterization in cells:
        name = f"{optimizer}, {parameterization}"
        rows = log.some(kind="features", optimizer=optimizer, parameterization=parameterization)
        if not rows:
            continue
        rate = f"2^{rows[0]['power']}"
        for width in (WIDTHS[0], WIDTHS[-1]):
            means = []
            for step in map(str, MOMENTS[1:]):
                own = [row["changes"][step] for row in complete(rows, step) if row["width"] == width]
                means.append(f"{fmean(own):.3f}" if own else "diverged")
            yield f"| {name} | {rate} | {width} | {' | '.join(means)} |"
        found = []
        for step in map(str, MOMENTS[1:]):
            found.append(slopes(complete(rows, step), lambda row, step=step: row["changes"][step]))
        yield f"| {name} | {rate} | slope | {' | '.join(found)} |"


def curvature_table(log: Log, cells: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the rows of figure 2."""
    yield "| | factor | step | " + " | ".join(LAYERS) + " |"
    yield "|---" * (3 + len(LAYERS)) + "|"
    for side, orders in THEORY.items():
        yield f"| theory, mup | tr {side} | all | {' | '.join(map(str, orders))} |"
    for optimizer, parameterization in cells:
        rows = log.some(kind="features", optimizer=optimizer, parameterization=parameterization)
        rows = complete(rows, str(MOMENTS[-1]))
        if not rows:
            continue
        for side in THEORY:
            for step in map(str, MOMENTS):
                found = []
                for layer in range(len(LAYERS)):
                    found.append(slopes(rows, lambda row, at=(step, side, layer): _trace(row, at)))
                yield f"| {optimizer}, {parameterization} | tr {side} | {step} | {' | '.join(found)} |"


def _trace(row: Mapping[str, Any], at: tuple[str, str, int]) -> float:
    step, side, layer = at
    return float(row["traces"][step][side][layer])


def alignment_table(log: Log) -> Iterator[str]:
    """Yield the exponents and ranks."""
    yield "| | layer | step | dW z0 | W0 dz | dW dz | W z | stable rank of dW |"
    yield "|---" * 8 + "|"
    for optimizer in OPTIMIZERS:
        rows = log.some(kind="alignment", optimizer=optimizer, parameterization="mup")
        for name, layer in (("2", "hidden"), ("4", "readout")):
            for step in map(str, ALIGNED_AT):
                own = [row["aligned"][step] for row in rows if step in row["aligned"]]
                if not own:
                    continue
                cells = []
                for exponent in ("alpha", "omega", "both", "total"):
                    cells.append(f"{fmean(one['exponents'][name][exponent] for one in own):.2f}")
                cells.append(f"{fmean(one['ranks'][f'{name}.weight'] for one in own):.1f}")
                yield f"| {optimizer} | {layer} | {step} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="optimizer/parameterization")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, max(STUDENT) + 1))
    parser.add_argument("--table", action="store_true", help="print the tables of what was run")
    parser.add_argument("--data", help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log = Log(options.out, KEY)
    cells = []
    for optimizer in OPTIMIZERS:
        for parameterization in ("mup", "standard"):
            if not options.only or f"{optimizer}/{parameterization}" in options.only:
                cells.append((optimizer, parameterization))
    if not options.table:
        work_off(log, cells, range(1, options.seeds + 1), images(options.data))
    for title, lines in (
        ("Change of the last hidden features", feature_table(log, cells)),
        ("Slopes of the traces in width", curvature_table(log, cells)),
        (f"Alignment at width {ALIGNED_WIDTH}", alignment_table(log)),
    ):
        print(f"\n#### {title}\n")
        print("\n".join(lines))
    minutes = sum(row["cpu_seconds"] for row in log.rows.values()) / 60
    print(f"\n{len(log.rows)} lines, {minutes:.0f} CPU minutes; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
