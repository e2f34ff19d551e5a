"""Transfer of damping over widths: the rules that scale it beside a constant (arXiv 2312.12226, figure 7).

    python -m benchmarks.damping_transfer                  # widths 64 to 512
    python -m benchmarks.damping_transfer --optimizers kfac --widths 64 512
    python -m benchmarks.damping_transfer --optimizers "shampoo input" "shampoo output" --widths 64 256 1024

An MLP on 1024 images of Fashion-MNIST, squared error on one-hot labels, as in the paper. Initialization and
learning rates are muP's for all; only the rule of damping differs:

* rescaled: the default, relative to the trace (K-FAC) or to the largest eigenvalue (Shampoo);
* table: absolute, times the width factors of the scale table;
* constant: absolute, the same at all widths.

Shampoo takes all layers, or one ("shampoo input", "shampoo output") beside SGD for the others: the table's
factor is 1 / width for the first layer, width for the last and 1 between, so that in all of them together the
errors of a constant pull both ways, and the hidden layer not at all.

At each width damping is moved by factors of 4 until the best value has worse ones on both sides. Printed are
all losses, by how many factors of 2 the best value moves from the narrowest to the widest network, and the
loss of all widths at the best value of the narrowest. The loss is the training loss after the last epoch.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from functools import partial
from math import inf, isfinite, log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks.char_transfer import report, search
from examples.data import fashion_mnist
from mupass import OptimizerSpec

RULES = ("rescaled", "table", "constant")
FACTOR = 4
# Damping alone: no floor under it, and no bound on the step.
UNBOUND = {"damping_floor": 0.0, "step_bound": None, "kl_clip": None, "variance_adaptation": False}
SHAMPOO = {"graft": "none", "root_every": 2}
SPECS = {"kfac": OptimizerSpec("kfac"), "shampoo": OptimizerSpec("shampoo", e=1.0)}
ROLES = {"shampoo input": ("input",), "shampoo output": ("output",)}
NAMES = [*SPECS, *ROLES]
STARTS = {"kfac": 2.0**-6, "shampoo": 2.0**-10}  # absolute damping; relative damping starts from 2^-2


def mlp(inputs: int, width: int) -> nn.Module:
    """Three weight layers without biases, as in the paper."""
    return nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 10, bias=False),
    )


def make(
    model: nn.Module, name: str, rule: str, damping: float, o: argparse.Namespace
) -> torch.optim.Optimizer:
    """Return the optimizer under one rule of damping."""
    spec = SPECS[name.split()[0]]
    if rule == "constant":
        plan = model.mupass_plan.for_optimizer(spec)
        ones = {"damping_in": 1.0, "damping_out": 1.0}
        entries = tuple(replace(e, scales=replace(e.scales, **ones)) for e in plan.entries)
        model.mupass_plan = replace(plan, entries=entries)
    mode = {} if rule == "rescaled" else {"damping_mode": "absolute"}
    if name == "kfac":
        return mupass.KFAC(model, o.kfac_lr, damping, root_every=2, **UNBOUND, **mode)
    if name in ROLES:
        rest = {"roles": ROLES[name], "fallback": "sgd", "fallback_lr": o.sgd_lr}
        return mupass.Shampoo(model, o.layer_lr, damping, e=spec.e, **SHAMPOO, **rest, **mode)
    return mupass.Shampoo(model, o.shampoo_lr, damping, e=spec.e, **SHAMPOO, **mode)


def train(
    width: int, name: str, rule: str, damping: float, data: tuple[Tensor, Tensor], o: argparse.Namespace
) -> float:
    """Return the loss on all images after the last epoch; infinity when it blows up."""
    x, y = data
    torch.manual_seed(o.seed)
    model = mupass.transform(mlp(x.shape[1], width), x[:4], base=min(o.widths))
    optimizer = make(model, name, rule, damping, o)
    order = torch.Generator().manual_seed(o.seed)
    for _ in range(o.epochs):
        for at in torch.randperm(len(x), generator=order).split(o.batch):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x[at]), y[at])
            if not isfinite(loss.item()) or loss.item() > 1e3:
                return inf
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        last = F.mse_loss(model(x), y).item()
    return last if isfinite(last) else inf


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kfac-lr", type=float, default=2.0**-7)
    parser.add_argument("--shampoo-lr", type=float, default=2.0**-9)
    parser.add_argument("--layer-lr", type=float, default=2.0**-5, help="of Shampoo in one layer")
    parser.add_argument("--sgd-lr", type=float, default=2.0**-4, help="of the other layers")
    options = parser.parse_args(arguments)
    options.widths.sort()
    warnings.simplefilter("ignore")
    images = fashion_mnist(None, options.samples, 1)
    data = (
        F.avg_pool2d(images.train_x, 2).flatten(1),  # 14 x 14: a factor of 196 instead of 784
        F.one_hot(images.train_y, 10).float(),
    )
    print(vars(options), flush=True)
    for name in options.optimizers:
        for rule in options.rules:
            start = 2.0**-2 if rule == "rescaled" else STARTS[name.split()[0]]
            found = {}
            for width in options.widths:
                loss = partial(train, width, name, rule, data=data, o=options)
                found[width] = search(lambda d, loss=loss: loss(d), start, FACTOR)
                start = found[width].best
            report(f"{name} {rule}", found, options.widths[0], lambda d: f"2^{round(log2(d))}", start)
            first, last = found[options.widths[0]].best, found[options.widths[-1]].best
            print(f"{name}, {rule} damping: best moves by 2^{round(log2(last / first))}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
