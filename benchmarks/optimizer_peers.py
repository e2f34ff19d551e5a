"""Time of optimizer steps on a small GPT beside other libraries, interleaved in one run.

All optimizers train on copies of one model; each round takes one step of each, so that a busy machine slows
all alike. Only the optimizer's step is timed. A round's gradients are the same for all: they come from one
forward and backward pass of a model that stands still, and are copied. Recomputations (roots, bases) are due
every PERIOD steps; the mean over whole periods is what training pays, the worst step is what it waits for.
On CPU process time is taken, which other processes change least: run with OMP_NUM_THREADS=1.

    pip install heavyball pytorch_optimizer
    git clone https://github.com/facebookresearch/optimizers
    python -m benchmarks.optimizer_peers --distributed-shampoo optimizers

A library that is not installed is left out, and named.
"""

import argparse
import gc
import importlib
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks.models import GPT

VOCABULARY, PERIOD = 256, 10


def gpt(width: int) -> nn.Module:
    """Four blocks of four heads, on sequences of 128 tokens."""
    return GPT(width, 4, VOCABULARY, 128, width // 4)


@dataclass
class Entry:
    """One optimizer with its own model, and its times in seconds."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    peer_of: str
    times: list[float] = field(default_factory=list)
    warm_up: float = 0.0

    def step(self, gradients: list[Tensor]) -> float:
        for p, g in zip(self.model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        start = clock()
        self.optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start

    def memory(self) -> float:
        """MiB of tensors in the state, each storage once."""
        seen: dict[int, int] = {}
        ours = [self.optimizer._extra_state()] if hasattr(self.optimizer, "_extra_state") else []
        stack: list[object] = [dict(self.optimizer.state), *ours]
        visited: set[int] = set()
        while stack:
            item = stack.pop()
            if id(item) in visited:
                continue
            visited.add(id(item))
            if isinstance(item, Tensor):
                seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, (list, tuple)):
                stack += item
            elif type(item).__module__.startswith(("distributed_shampoo", "heavyball")):
                stack += vars(item).values() if hasattr(item, "__dict__") else []
                slots = [s for c in type(item).__mro__ for s in getattr(c, "__slots__", ())]
                stack += [getattr(item, s) for s in slots if hasattr(item, s)]
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return sum(n for pointer, n in seen.items() if pointer not in own) / 2**20


Make = Callable[[nn.Module], torch.optim.Optimizer]


def ours(compile: bool) -> dict[str, tuple[Make, str]]:
    """Optimizers of this package: name -> (constructor, name of the comparison)."""
    suffix = ", compiled" if compile else ""
    table: dict[str, tuple[Make, str]] = {}
    for size in (256, 1024):
        for graft in ("none", "adam"):
            note = "" if graft == "none" else " # adam"
            table[f"mupass Shampoo {size}{note}{suffix}"] = (
                lambda m, size=size, graft=graft: mupass.Shampoo(
                    m, 1e-3, root_every=PERIOD, block_size=size, graft=graft, compile=compile
                ),
                f"Distributed Shampoo {size}{note}",
            )
    for size in (1024, 256):  # peers do not cut, and no side of this model is longer than 1024
        table[f"mupass SOAP {size}{suffix}"] = (
            lambda m, size=size: mupass.SOAP(m, 1e-3, basis_every=PERIOD, block_size=size, compile=compile),
            "HeavyBall SOAP",
        )
    for note, dtype in {"": None, " bfloat16": torch.bfloat16}.items():  # torch's has no other
        table[f"mupass Muon{note}{suffix}"] = (
            lambda m, dtype=dtype: mupass.Muon(m, 1e-2, product_dtype=dtype, compile=compile),
            "torch Muon",
        )
    return table


def peers(distributed_shampoo: str | None) -> dict[str, Make]:
    """Other libraries that are installed."""
    found: dict[str, Make] = {}
    if distributed_shampoo:
        sys.path.insert(0, os.path.abspath(distributed_shampoo))
        for size in (256, 1024):
            for note in ("", " # adam"):
                found[f"Distributed Shampoo {size}{note}"] = lambda m, size=size, graft=bool(note): (
                    _distributed_shampoo(m, size, graft)
                )
    for name, module, make in (
        ("HeavyBall SOAP", "heavyball", _heavyball),
        ("pytorch_optimizer SOAP", "pytorch_optimizer", _pytorch_optimizer),
    ):
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"left out: {name} ({error})")
        else:
            found[name] = make
    found["torch Muon"] = _torch_muon
    return found


def _distributed_shampoo(model: nn.Module, size: int, graft: bool) -> torch.optim.Optimizer:
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    return DistributedShampoo(
        model.parameters(),
        lr=1e-3,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        max_preconditioner_dim=size,
        precondition_frequency=PERIOD,
        grafting_config=AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8) if graft else None,
    )


def _heavyball(model: nn.Module) -> torch.optim.Optimizer:
    import heavyball

    heavyball.utils.compile_mode = "default"  # its own choice tunes every product for minutes
    return heavyball.SOAP(model.parameters(), lr=1e-3, precondition_frequency=PERIOD)


def _pytorch_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=1e-3, precondition_frequency=PERIOD)


def _torch_muon(model: nn.Module) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest, as its documentation says."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks")]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return Both(torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3, foreach=True))


class Both(torch.optim.Optimizer):
    """Two optimizers as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
        self.state = {p: s for part in self.parts for p, s in part.state.items()}  # type: ignore[assignment]


def run(options: argparse.Namespace) -> list[Entry]:
    torch.manual_seed(0)
    source = gpt(options.width)
    ids = torch.randint(VOCABULARY, (4, 129))
    mine = {}
    for compile in [False, True] if options.compile else [False]:
        mine |= ours(compile)
    entries = []
    chosen = [(n, m, to) for n, (m, to) in mine.items()] + [
        (n, m, "") for n, m in peers(options.distributed_shampoo).items()
    ]
    for name, make, to in chosen:
        if options.only and not any(re.search(word, name) for word in options.only):
            continue
        model = gpt(options.width)
        model.load_state_dict(source.state_dict())
        if to:
            mupass.transform(model, ids[:, :-1], base=options.width)
        entries.append(Entry(name, model, make(model), to))
    for step in range(-options.warm, options.steps):
        source.zero_grad()
        ids = torch.randint(VOCABULARY, (4, 129))
        F.cross_entropy(source(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients = [p.grad for p in source.parameters()]
        gc.collect()
        for entry in entries:
            elapsed = entry.step(gradients)  # type: ignore[arg-type]
            if step < 0:
                entry.warm_up += elapsed
            else:
                entry.times.append(elapsed)
    return entries


def table(entries: list[Entry]) -> None:
    print(f"{'optimizer':38} {'mean':>8} {'median':>8} {'worst':>8} {'warm-up':>8} {'MiB':>6}  ratio to peer")
    print(f"{'':38} {'ms':>8} {'ms':>8} {'ms':>8} {'s':>8} {'':>6}  mean, median, worst")
    by_name = {e.name: e for e in entries}
    for e in entries:
        figures = [statistics.fmean(e.times), statistics.median(e.times), max(e.times)]
        ratio = ""
        if e.peer_of in by_name:
            peer = by_name[e.peer_of].times
            other = [statistics.fmean(peer), statistics.median(peer), max(peer)]
            ratio = ", ".join(f"{a / b:.2f}" for a, b in zip(figures, other, strict=True))
            ratio += f"  ({e.peer_of})"
        cells = " ".join(f"{1e3 * f:8.1f}" for f in figures)
        print(f"{e.name:38} {cells} {e.warm_up:8.1f} {e.memory():6.0f}  {ratio}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help=f"a multiple of the period, {PERIOD}")
    parser.add_argument("--warm", type=int, default=11, help="steps before, counted as warm-up")
    parser.add_argument(
        "--distributed-shampoo", metavar="FOLDER", help="clone of facebookresearch/optimizers"
    )
    parser.add_argument("--compile", action="store_true", help="also with compile=True")
    parser.add_argument("--only", nargs="+", help="regular expressions for the names to run")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.steps} steps")
    table(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
