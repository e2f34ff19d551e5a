"""One-step slopes: how RMS(dW h) of every layer scales with width, for every optimizer and parameterization.

Under maximal-update parameterization each layer's update must move its output by Theta(1) per coordinate, so
the log-log slope in width is 0; biases are held to the same (RMS of db). The standard parameterization is run
beside it and must fail. Everything is float64 and goes through `mupass.transform` and the shipped optimizers.
The base width is the smallest one.

    python -m benchmarks.one_step_slopes                 # widths 128..1024
    python -m benchmarks.one_step_slopes --widths 128 256 512 1024 2048 4096

For the CNN the width is the fan_in of the hidden convolution, channels x 2 x 2: the size of its K-FAC factor.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass


class Damping(NamedTuple):
    """Relative to the trace for K-FAC, to the largest eigenvalue for Shampoo."""

    kfac: float
    shampoo: float


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, program 1; ``torch.optim`` has none."""

    def __init__(self, params: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            of_step, of_average = group["betas"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p *= 1 - group["lr"] * group["weight_decay"]
                p -= group["lr"] * average.lerp(p.grad, 1 - of_step).sign()
                average.lerp_(p.grad, 1 - of_average)


OPTIMIZERS: dict[str, Callable[[nn.Module, Damping], torch.optim.Optimizer]] = {
    "sgd": lambda m, d: torch.optim.SGD(mupass.param_groups(m, 1e-2, optimizer="sgd")),
    "adam": lambda m, d: torch.optim.Adam(mupass.param_groups(m, 1e-3, optimizer="adam")),
    "lion": lambda m, d: Lion(mupass.param_groups(m, 1e-4, optimizer="lion")),
    "kfac (1,1)": lambda m, d: mupass.KFAC(m, 1e-2, d.kfac, momentum=0, **KFAC),
    # Only the new moments: averaged with what they start from, half of the step would be K-FAC's.
    "ekfac": lambda m, d: mupass.KFAC(m, 1e-2, d.kfac, ekfac=True, factor_decay=0, momentum=0, **KFAC),
    "kfac (.5,.5)": lambda m, d: mupass.KFAC(m, 1e-2, d.kfac, e_a=0.5, e_b=0.5, momentum=0, **KFAC),
    "foof (1,0)": lambda m, d: mupass.KFAC(m, 1e-2, d.kfac, e_a=1, e_b=0, momentum=0, **KFAC),
    "shampoo e=1/2": lambda m, d: mupass.Shampoo(
        m, 1e-2, d.shampoo, e=0.5, momentum=0, graft="none", **SHAMPOO
    ),
    "shampoo e=1": lambda m, d: mupass.Shampoo(
        m, 1e-2, d.shampoo, e=1.0, momentum=0, graft="none", **SHAMPOO
    ),
    "shampoo blocks": lambda m, d: mupass.Shampoo(
        m, 1e-2, d.shampoo, momentum=0, graft="none", **SHAMPOO | BLOCKS
    ),
    "shampoo # adam": lambda m, d: mupass.Shampoo(m, 1e-3, d.shampoo, graft="adam", momentum=0, **SHAMPOO),
    "blocks # adam": lambda m, d: mupass.Shampoo(
        m, 1e-3, d.shampoo, graft="adam", momentum=0, **SHAMPOO | BLOCKS
    ),
    "# spectral": lambda m, d: mupass.Shampoo(m, 1e-2, d.shampoo, graft="spectral", momentum=0, **SHAMPOO),
    "blocks # spectral": lambda m, d: mupass.Shampoo(
        m, 1e-2, d.shampoo, graft="spectral", momentum=0, **SHAMPOO | BLOCKS
    ),
    "shampoo # sgd": lambda m, d: mupass.Shampoo(m, 1e-2, d.shampoo, graft="sgd", momentum=0, **SHAMPOO),
    "soap": lambda m, d: mupass.SOAP(m, 1e-3, **SHAMPOO),
    "soap blocks": lambda m, d: mupass.SOAP(m, 1e-3, **SHAMPOO | BLOCKS),
    "muon": lambda m, d: mupass.Muon(m, 1e-2, roles=ROLES, fallback="sgd", fallback_lr=1e-2),
    "adamuon": lambda m, d: mupass.Muon(m, 1e-3, adaptive=True, roles=ROLES, fallback="adam_atan2"),
    "adam-atan2": lambda m, d: mupass.Muon(m, 0.0, roles=(), fallback="adam_atan2"),
}
# Vectors go to SGD here: with its own row of the table it must be flat too.
# What a step does by itself, without a bound on it.
KFAC = {"strict": True, "step_bound": None, "kl_clip": None}
SHAMPOO = {"fallback": "sgd", "fallback_lr": 1e-2, "block_size": 1 << 20}
BLOCKS = {"block_size": 32}
ROLES = ("input", "hidden", "output")
LIMIT = 0.1


def mlp(width: int) -> nn.Module:
    """Three weight layers on 20 features."""
    return nn.Sequential(
        nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )


def cnn(width: int) -> nn.Module:
    """Two convolutions and a head on 4x4 images; width is the hidden fan_in."""
    c = width // 4
    return nn.Sequential(
        nn.Conv2d(2, c, 2, 2), nn.Tanh(), nn.Conv2d(c, c, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(c, 4)
    )


class Attention(nn.Module):
    """One residual block: fused qkv with heads of size 16, and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inp, self.norm = nn.Linear(20, width), nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norm(h)).view(batch, length, 3, width // 16, 16).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        h = h + self.out(attended)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return self.head(self.norm(h)).mean(1)


MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (20,)),
    "cnn": (cnn, (2, 4, 4)),
    "transformer": (Attention, (4, 20)),
}
BATCH = {
    "mlp": 32,
    "cnn": 8,
    "transformer": 8,
}  # the theory is for rows (samples x positions) fixed as width grows
# Under muP logits start out near 1/sqrt(width), and the last norm of the transformer sends them back with the
# gradient. A damping far below that part resolves it, brings it up to the size of the rest, and shows how it
# vanishes with width instead of how a step scales.
DAMPING = {
    "mlp": Damping(1e-2, 1e-4),
    "cnn": Damping(1e-2, 1e-4),
    "transformer": Damping(1e-1, 1.0),
}


def updates(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], x: Tensor, y: Tensor
) -> dict[str, float]:
    """Take one step and return RMS(dW h) of every weight and RMS(db) of every bias.

    The first gradient gives SOAP and EKFAC their bases. There a second step with the same gradient is
    measured; nothing moves at the first.
    """
    inputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.__setitem__(n, args[0].detach()))
        for n, m in layers.items()
    ]
    optimizer = make(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # Linear in the outputs, whose gradient is then the same at all widths. A squared error would bring in the
    # outputs themselves, which shrink with width under muP, and with them gradients, for a few octaves.
    (y * model(x)).mean().backward()
    for handle in handles:
        handle.remove()
    if isinstance(optimizer, mupass.SOAP) or getattr(optimizer, "ekfac", False):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        (y * model(x)).mean().backward()
    optimizer.step()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    result = {}
    for name, layer in layers.items():
        change = moved[f"{name}.weight"]
        h = inputs[name]
        effect = (
            F.linear(h, change) if isinstance(layer, nn.Linear) else F.conv2d(h, change, stride=layer.stride)
        )
        result[f"{name}.weight"] = effect.square().mean().sqrt().item()
        result[f"{name}.bias"] = moved[f"{name}.bias"].square().mean().sqrt().item()
    return result


def slopes(
    model: str, optimizer: str, parameterization: str, widths: list[int], seeds: int = 4
) -> dict[str, float]:
    """Fit the log-log slope in width of every layer's update, averaged over seeds."""
    build, shape = MODELS[model]
    make = partial(OPTIMIZERS[optimizer], d=DAMPING[model])
    table: dict[str, list[float]] = {}
    for width in widths:
        total: dict[str, float] = {}
        for seed in range(seeds):
            torch.manual_seed(seed)
            x = torch.randn(BATCH[model], *shape, dtype=torch.float64)
            y = 1 + 0.5 * torch.randn(BATCH[model], 4, dtype=torch.float64)
            net = build(width).double()
            net = mupass.transform(net, x, base=min(widths), parameterization=parameterization, dims=None)
            for name, value in updates(net, make, x, y).items():
                total[name] = total.get(name, 0.0) + torch.tensor(value).log().item()
        for name, value in total.items():
            table.setdefault(name, []).append(value / seeds)
    logs = torch.tensor(widths, dtype=torch.float64).log()
    return {n: _fit(logs, torch.tensor(v, dtype=torch.float64)) for n, v in table.items()}


def _fit(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=4)
    both = ["mup", "standard"]
    parser.add_argument("--parameterizations", nargs="+", default=both, choices=both)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    ok = True
    print(f"log-log slope in width of RMS(dW h) and RMS(db), widths {options.widths}, float64, one step")
    for model in options.models:
        for optimizer in options.optimizers:
            for parameterization in options.parameterizations:
                start = time.perf_counter()
                found = slopes(model, optimizer, parameterization, options.widths, options.seeds)
                flat = all(abs(s) <= LIMIT for s in found.values())
                ok &= flat == (parameterization == "mup")
                cells = "  ".join(f"{n} {s:+.2f}" for n, s in found.items())
                verdict = "flat" if flat else "not flat"
                print(
                    f"{model:11} {optimizer:14} {parameterization:9} {verdict:9}{cells}  "
                    f"({time.perf_counter() - start:.0f}s)",
                    flush=True,
                )
    print(f"{time.process_time() / 60:.0f} CPU minutes")
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
