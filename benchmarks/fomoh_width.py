"""How FoMoH's plane and step scale with width, by the law of its directions.

    python -m benchmarks.fomoh_width

An MLP under mup, one step in float64. Fitted are powers of the width: of the root mean square of the slopes
along one direction, the largest curvature in the plane, RMS(dW h) of every layer and the decrease of the loss
(means of logarithms over seeds).
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import mupass
from benchmarks.models import mlp

LAYERS = {"0": "input", "2": "hidden", "4": "readout"}


def one_step(width: int, law: str, directions: int, seed: int) -> dict[str, float]:
    """Take one step and return what is fitted."""
    torch.manual_seed(seed)
    x, y = torch.randn(32, 784, dtype=torch.float64), torch.randint(10, (32,))
    model = mupass.transform(mlp(width).double(), x[:2], base=64)
    given = x
    inputs = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            inputs[name], given = given, layer(given)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in LAYERS}
    optimizer = mupass.FoMoH(model, directions=directions, law=law, seed=seed)
    loss = float(optimizer.step(lambda: F.cross_entropy(model(x), y)))
    with torch.no_grad():
        after = float(F.cross_entropy(model(x), y))
    found = {
        "slope": float(optimizer.slopes.square().mean().sqrt()),
        "curvature": float(torch.linalg.eigvalsh(optimizer.curvature).abs().max()),
        "decrease": loss - after,
    }
    for name, role in LAYERS.items():
        layer: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        moved = inputs[name] @ (layer.weight.detach() - before[name]).T
        found[f"dW h, {role}"] = float(moved.square().mean().sqrt())
    return found


def main() -> None:
    """Print the fitted powers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--directions", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs = torch.tensor(options.widths, dtype=torch.float64).log()
    for law in ("plan", "normal"):
        rows: dict[str, list[float]] = {}
        for width in options.widths:
            runs = [one_step(width, law, options.directions, seed) for seed in range(options.seeds)]
            for key in runs[0]:
                values = [math.log(max(run[key], 1e-300)) for run in runs]
                rows.setdefault(key, []).append(sum(values) / len(values))
        for key, row in rows.items():
            y = torch.tensor(row, dtype=torch.float64)
            power = ((logs - logs.mean()) @ (y - y.mean())) / (logs - logs.mean()).square().sum()
            ends = f"{math.exp(row[0]):.3g} to {math.exp(row[-1]):.3g}"
            print(f"{law:<8}{key:<16}{float(power):+.2f}   {ends}", flush=True)


if __name__ == "__main__":
    main()
