"""coord_check: does every layer's update have the same size at every width?"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mupass._analyze import analyze
from mupass._errors import MupassError
from mupass._optim import KFAC, Shampoo, param_groups
from mupass._resize import resize
from mupass._transform import transform

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": lambda m: torch.optim.SGD(param_groups(m, 1e-2, optimizer="sgd")),
    "adam": lambda m: torch.optim.Adam(param_groups(m, 1e-3, optimizer="adam")),
    "kfac": lambda m: KFAC(m, 1e-2, 1e-2, momentum=0, fallback="sgd", fallback_lr=1e-2),
    "shampoo": lambda m: Shampoo(m, 1e-2, 1e-4, momentum=0, fallback="sgd", fallback_lr=1e-2),
}
CAUSES = {
    "grows": "its update is too large at large width: learning rate or multiplier too large by that power of width",
    "vanishes": "it stops learning at large width: learning rate too small, or damping too large, by that power",
}


@dataclass(frozen=True)
class Fit:
    """Log-log slope in width of one quantity.

    Attributes:
        module: Qualified name of the module.
        quantity: ``output`` (RMS of a coordinate), ``change`` (of it since the start) or ``update`` (RMS of dW h).
        step: Number of optimizer steps taken.
        slope: Power of width.
        error: Half width of its 95 % confidence interval.
        values: RMS at each width, averaged over seeds (geometric mean).
    """

    module: str
    quantity: str
    step: int
    slope: float
    error: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class CoordCheck:
    """Result of a coordinate check.

    Attributes:
        widths: Widths that were trained.
        fits: All slopes, in the order in which the modules ran.
        tolerance: Largest slope that counts as flat.
    """

    widths: tuple[int, ...]
    fits: tuple[Fit, ...]
    tolerance: float

    @property
    def failures(self) -> tuple[Fit, ...]:
        """Return slopes of changes and updates, at the last step, that are surely not flat.

        Outputs themselves are not judged: those of a readout shrink at the start under muP, as they should.
        """
        last = max(f.step for f in self.fits)
        return tuple(
            f for f in self.fits
            if f.step == last and f.quantity != "output" and abs(f.slope) - f.error > self.tolerance
        )  # fmt: skip

    @property
    def ok(self) -> bool:
        """Whether every module's update keeps its size."""
        return not self.failures

    def __str__(self) -> str:
        """Return a table of the last step, with a verdict for every module."""
        last = max(f.step for f in self.fits)
        rows = [f for f in self.fits if f.step == last]
        width = max(len(f.module) for f in rows)
        failed = set(self.failures)
        lines = [f"slopes in width at step {last}, widths {list(self.widths)}; flat means |slope| <= {self.tolerance}"]
        for f in rows:
            verdict = "" if f.quantity == "output" else "FAIL" if f in failed else "ok"
            lines.append(f"{f.module:<{width}}  {f.quantity:<7} {f.slope:+.2f} +- {f.error:.2f}  {verdict}")
        lines.append(self.verdict())
        return "\n".join(lines)

    def verdict(self) -> str:
        """Return one sentence: pass, or the first offending module with the likely cause."""
        if self.ok:
            return "PASS: every module's update keeps its size at all widths"
        first = self.failures[0]
        kind = "grows" if first.slope > 0 else "vanishes"
        power = f"width^{first.slope:+.2f}"
        return f"FAIL: {first.module}: the {first.quantity} scales like {power}; {CAUSES[kind]}"

    def html(self) -> str:
        """Return one self-contained HTML page."""
        last, failed = max(f.step for f in self.fits), set(self.failures)
        rows = "".join(
            f"<tr class='{'bad' if f in failed else ''}'><td>{html.escape(f.module)}</td><td>{f.quantity}</td>"
            f"<td>{f.slope:+.2f} &plusmn; {f.error:.2f}</td>"
            + "".join(f"<td>{v:.3g}</td>" for v in f.values) + "</tr>"
            for f in self.fits if f.step == last
        )  # fmt: skip
        heads = "".join(f"<th>width {w}</th>" for w in self.widths)
        return (
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>mupass coordinate check</title><style>"
            "body{font:14px/1.45 system-ui,sans-serif;margin:2rem}table{border-collapse:collapse}"
            "td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #eaeef2}"
            ".bad td{color:#cf222e;font-weight:600}</style><h1>Coordinate check</h1>"
            f"<p>{html.escape(self.verdict())}</p><table><tr><th>module</th><th>quantity</th><th>slope</th>{heads}</tr>"
            f"{rows}</table></html>"
        )

    def plot(self, path: str | Path) -> None:
        """Write the changes against width, one line a module, as a PNG (needs matplotlib).

        Args:
            path: File to write.
        """
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        last, failed = max(f.step for f in self.fits), set(self.failures)
        figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
        for axis, quantity in zip(axes, ("change", "update"), strict=True):
            for f in self.fits:
                if f.step == last and f.quantity == quantity:
                    bad = f in failed
                    axis.plot(self.widths, f.values, marker=".", color="#cf222e" if bad else "#0969da", alpha=0.8,
                              lw=1.8 if bad else 1, label=f.module if bad else None)
            axis.set(xscale="log", yscale="log", xlabel="width", ylabel=f"RMS of the {quantity}", title=quantity)
            axis.grid(alpha=0.3)
            if failed:
                axis.legend(frameon=False, fontsize=7)
        figure.suptitle(self.verdict(), fontsize=9, wrap=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def coord_check(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    optimizer: str | MakeOptimizer = "adam",
    scales: Sequence[float] = (1, 2, 4),
    parameterization: str = "mup",
    example_inputs: Any = None,
    seeds: int = 2,
    tolerance: float = 0.2,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
) -> CoordCheck:
    """Train resized copies of a model for a few steps, and fit how every module's update scales with width.

    Args:
        model: The model, not transformed; it is not changed.
        batches: One batch for each step; what `loss` takes.
        loss: Function of a model and a batch that gives the scalar loss.
        optimizer: ``sgd``, ``adam``, ``kfac``, ``shampoo``, or a function that builds one for a transformed model.
        scales: Widths relative to the model's own, the smallest being the base.
        parameterization: ``mup`` should pass; ``standard`` should fail.
        example_inputs: As for `mupass.analyze`.
        seeds: Number of initializations to average over.
        tolerance: Largest slope that counts as flat. A slope fails when its 95 % confidence interval lies outside;
            with widths below 64 and one seed, expect false alarms.
        prepare: Applied to each transformed copy before training, for planting faults or further rewriting.

    Returns:
        All slopes and the verdict.

    Raises:
        MupassError: The model cannot be resized, fewer than two scales, an unknown optimizer name, or no batch.
    """
    if len(set(scales)) < 2:
        raise MupassError("a slope needs at least two scales")
    if not batches:
        raise MupassError("coord_check needs one batch for each step")
    make = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise MupassError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}, or pass a function")
    base = analyze(model, example_inputs).width * min(scales)
    logs: dict[tuple[str, str, int], list[list[float]]] = defaultdict(lambda: [[] for _ in scales])
    widths = []
    for i, scale in enumerate(sorted(scales)):
        for seed in range(seeds):
            copy = resize(model, scale=scale, example_inputs=example_inputs, seed=seed, fresh=True)
            copy = transform(copy, example_inputs, base=base, parameterization=parameterization)
            if seed == 0:
                widths.append(copy.mupass_plan.width)
            copy = prepare(copy) if prepare else copy
            for key, value in _train(copy, make, batches, loss):
                logs[key][i].append(math.log(max(value, 1e-30)))
    fits = (_fit(key, rows, widths) for key, rows in logs.items() if all(rows))
    return CoordCheck(tuple(widths), tuple(fits), tolerance)


def _train(
    model: nn.Module, make: MakeOptimizer, batches: Sequence[Any], loss: Loss
) -> Iterator[tuple[tuple[str, str, int], float]]:
    """Take the steps, and yield (module, quantity, step) -> RMS, measured on the first batch."""
    optimizer = make(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = _outputs(model, batches[0], loss)
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        for name, (inputs, output) in _outputs(model, batches[0], loss).items():
            shown = name or "(model)"
            yield (shown, "output", step), _rms(output)
            yield (shown, "change", step), _rms(output - start[name][1])
            effect = _effect(model.get_submodule(name), name, inputs, weights)
            if effect is not None:
                yield (shown, "update", step), _rms(effect)


def _outputs(model: nn.Module, batch: Any, loss: Loss) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Run once without dropout's noise, and return first input and first output of all modules that hold weights."""
    found: dict[str, tuple[Tensor | None, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
            if first is not None:
                given = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
                found[name] = (None if given is None else given.detach(), first.detach().clone())

        return hook

    owners = [(n, m) for n, m in model.named_modules() if not n or any(True for _ in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(record(n)) for n, m in owners]
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            loss(model, batch)
    finally:
        torch.set_rng_state(state)
        for handle in handles:
            handle.remove()
    return found


def _effect(module: nn.Module, name: str, x: Tensor | None, start: Mapping[str, Tensor]) -> Tensor | None:
    """Return dW h for the layers whose operator is known."""
    weight = getattr(module, "weight", None)
    old = start.get(f"{name}.weight")
    if x is None or old is None or not isinstance(weight, Tensor):
        return None
    change = weight.detach() - old
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            return F.linear(x, change)
        if isinstance(module, nn.Embedding):
            return F.embedding(x, change)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module._conv_forward(x, change, None)  # type: ignore[call-arg]
    return None


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _fit(key: tuple[str, str, int], rows: Sequence[Sequence[float]], widths: Sequence[int]) -> Fit:
    """Fit a line to all points in logarithms; the error is 1.96 standard errors of the slope."""
    x = torch.tensor([math.log(w) for w, r in zip(widths, rows, strict=True) for _ in r], dtype=torch.float64)
    y = torch.tensor([v for r in rows for v in r], dtype=torch.float64)
    x_, y_ = x - x.mean(), y - y.mean()
    slope = ((x_ @ y_) / (x_ @ x_)).item()
    rest = y_ - slope * x_
    error = 1.96 * math.sqrt((rest @ rest).item() / max(len(y) - 2, 1) / (x_ @ x_).item())
    return Fit(*key, slope, error, tuple(math.exp(sum(r) / len(r)) for r in rows))
