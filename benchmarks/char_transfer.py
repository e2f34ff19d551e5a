"""Transfer of learning rate and damping on a character-level transformer, trained on Python's own sources.

    python -m benchmarks.char_transfer                                   # widths 64 to 512, hours on 2 cores
    python -m benchmarks.char_transfer --widths 32 64 128 256 --steps 60 --batch 4 --layers 1
    python -m benchmarks.char_transfer --what damping --optimizers shampoo kfac

At each width the rate is moved by factors of 2 until the best one has worse ones on both sides. Printed are
the best rate of each width, how many factors of 2 it moves, and the loss of all widths at the best rate of
the base width, where wider must not be worse. Damping is moved likewise, by factors of 10 at a fixed rate,
under the rule that scales it and under one that does not: a constant for Shampoo, pi-damping for K-FAC. The
loss is the mean over the last quarter of the steps, each on a new batch.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, log2, log10

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks.models import GPT
from examples.data import python_text
from mupass._optim.matrix.block_stack import Stack

HEAD = 16
FALLBACK_LR = 2**-8


class ConstantDamping(mupass.Shampoo):
    """Shampoo whose absolute damping is one number at all widths."""

    def _damping(self, stack: Stack, side: int) -> Tensor:
        return stack.each(self._dampings().__getitem__)


Make = Callable[[nn.Module, float], torch.optim.Optimizer]
COMMON = {"fallback_lr": FALLBACK_LR}
# All but the rate as each has it by default; with the rate that the search starts from.
RATES: dict[str, tuple[Make, float]] = {
    "adamw": (lambda m, lr: torch.optim.AdamW(mupass.param_groups(m, lr)), 2**-8),
    "muon": (mupass.Muon, 2**-6),
    "soap": (mupass.SOAP, 2**-7),
    "shampoo": (mupass.Shampoo, 2**-8),
    "kfac": (mupass.KFAC, 2**-6),
}
SHAMPOO = {"root_every": 5, "block_size": 512, "graft": "none", **COMMON}
DAMPINGS: dict[str, dict[str, tuple[Callable[[nn.Module, float, float], torch.optim.Optimizer], float]]] = {
    "shampoo": {
        "relative": (lambda m, lr, d: mupass.Shampoo(m, lr, d, e=1.0, **SHAMPOO), 1e-2),
        "constant": (
            lambda m, lr, d: ConstantDamping(m, lr, d, e=1.0, damping_mode="absolute", **SHAMPOO),
            1e-6,
        ),
    },
    "kfac": {
        "trace": (lambda m, lr, d: mupass.KFAC(m, lr, d, root_every=5, **COMMON), 1e-2),
        "pi": (lambda m, lr, d: mupass.KFAC(m, lr, d, root_every=5, damping_mode="pi", **COMMON), 1e-3),
    },
}


@dataclass(frozen=True)
class Search:
    """Losses of one width by hyperparameter."""

    losses: dict[float, float]

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda x: (self.losses[x], x))

    @property
    def bracketed(self) -> bool:
        return min(self.losses) < self.best < max(self.losses)


def search(loss: Callable[[float], float], start: float, factor: float) -> Search:
    """Walk from a start until the best value has worse ones on both sides."""
    losses = {0: loss(start)}  # by power of the factor: products of rounded numbers would not meet again
    for _ in range(12):
        best = min(losses, key=lambda k: (losses[k], k))  # where all diverge, downwards
        missing = [k for k in (best - 1, best + 1) if k not in losses]
        if not missing:
            break
        losses[missing[0]] = loss(start * factor ** missing[0])
    return Search({start * factor**k: value for k, value in losses.items()})


def train(
    width: int, make: Callable[[nn.Module], torch.optim.Optimizer], data: Tensor, options: argparse.Namespace
) -> float:
    """Return the mean loss over the last quarter of the steps; infinity when it blows up."""
    torch.manual_seed(options.seed)
    vocabulary = int(data.max()) + 1
    model: nn.Module = GPT(width, options.layers, vocabulary, options.length, HEAD, spread=None)
    example = torch.zeros(1, options.length, dtype=torch.long)
    model = mupass.transform(model, example, base=options.base)
    optimizer = make(model)
    batches = torch.Generator().manual_seed(options.seed)
    losses = []
    for _ in range(options.steps):
        at = torch.randint(len(data) - options.length - 1, (options.batch,), generator=batches)
        ids = torch.stack([data[i : i + options.length + 1] for i in at])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        if not isfinite(loss.item()) or loss.item() > 50:
            return inf
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, options.steps // 4) :]
    return sum(last) / len(last)


def report(
    name: str, found: dict[int, Search], base: int, show: Callable[[float], str], start: float
) -> None:
    for width, result in found.items():
        cells = "  ".join(f"{show(x)} {result.losses[x]:.3f}" for x in sorted(result.losses))
        mark = "" if result.bracketed else "  (not bracketed)"
        print(f"  {name:18} width {width:4}  best {show(result.best):>6}{mark}   {cells}")
    at = found[base].best if base in found else start
    line = "  ".join(f"{w}: {r.losses[at]:.3f}" for w, r in found.items() if at in r.losses)
    print(f"  {name:18} at {show(at)}, best of the base width:  {line}", flush=True)


def sweep(
    name: str,
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    start: float,
    factor: float,
    show: Callable[[float], str],
    data: Tensor,
    options: argparse.Namespace,
) -> dict[int, Search]:
    """Search at every width, the base width first, and then from its best."""
    found: dict[int, Search] = {}
    for width in sorted(options.widths, key=lambda w: w != options.base):

        def loss(x: float, width: int = width) -> float:
            return train(width, lambda m: make(m, x), data, options)

        found[width] = search(loss, start, factor)
        start = found[width].best if width == options.base else start
    found = dict(sorted(found.items()))
    report(name, found, options.base, show, start)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=["lr", "damping"], default=["lr", "damping"])
    parser.add_argument("--optimizers", nargs="+", choices=[*RATES], default=[*RATES])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--base", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damping-lr", type=float, default=2**-11, help="rate of the damping sweeps")
    options = parser.parse_args(arguments)
    if options.base not in options.widths:
        parser.error("--base must be one of --widths")
    warnings.simplefilter("ignore")
    data, alphabet = python_text(300_000)
    print(f"{len(alphabet)} characters, {vars(options)}")
    for name in options.optimizers:
        if "lr" in options.what and name in RATES:
            make, start = RATES[name]
            found = sweep(name, make, start, 2, lambda x: f"2^{round(log2(x))}", data, options)
            moved = [log2(r.best) for r in found.values()]
            print(f"{name}: best rate moves by {max(moved) - min(moved):.0f} factors of 2", flush=True)
        if "damping" in options.what and name in DAMPINGS:
            for rule, (damped, start) in DAMPINGS[name].items():
                found = sweep(
                    f"{name} {rule}",
                    lambda m, d, damped=damped: damped(m, options.damping_lr, d),
                    start,
                    10,
                    lambda x: f"1e{round(log10(x))}",
                    data,
                    options,
                )
                moved = [log10(r.best) for r in found.values()]
                print(f"{name}, {rule} damping: best moves by {max(moved) - min(moved):.0f} factors of 10")
    return 0


if __name__ == "__main__":
    sys.exit(main())
