"""Time of optimizer steps on a small GPT beside other libraries, interleaved in one run.

All optimizers train on copies of one model; each round takes one step of each, so that a busy machine slows
all alike. Only the optimizer's step is timed. A round's gradients are the same for all: they come from one
forward and backward pass of a model that stands still, and are copied. Recomputations (roots, bases) are due
every PERIOD steps; the mean over whole periods is what training pays, the worst step is what it waits for.
On CPU process time is taken, which other processes change least: run with OMP_NUM_THREADS=1.

    python -m benchmarks.optimizer_peers --peers FOLDER             # `benchmarks.peers` says what is in it
    python -m benchmarks.optimizer_peers --peers FOLDER --memory    # bytes a parameter, K-FAC too

Memory is that of all tensors alive after 11 steps of training, with gradients freed, each storage once, less
the model's own; one optimizer after the other, each with arguments as for the timing.

A library that is not installed is left out, and named.
"""

import argparse
import gc
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks import peers
from benchmarks.kfac_time import tensor_bytes
from benchmarks.models import GPT
from benchmarks.peers import PERIOD

VOCABULARY, LENGTH = 256, 128


def gpt(width: int) -> nn.Module:
    """Four blocks of four heads, on sequences of 128 tokens."""
    return GPT(width, 4, VOCABULARY, LENGTH, width // 4)


@dataclass
class Entry:
    """One optimizer with its own model, and its times in seconds."""

    name: str
    model: nn.Module
    optimizers: peers.Optimizers
    peer_of: str
    times: list[float] = field(default_factory=list)
    warm_up: float = 0.0

    def step(self, gradients: list[Tensor]) -> float:
        for p, g in zip(self.model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        start = clock()
        for optimizer in self.optimizers:
            optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start


Make = Callable[[nn.Module], peers.Optimizers]


def ours(compile: bool) -> dict[str, tuple[Make, str]]:
    """Optimizers of this package: name -> (constructor, name of the comparison)."""
    suffix = ", compiled" if compile else ""
    table: dict[str, tuple[Make, str]] = {}

    def add(name: str, kind: type, peer: str, lr: float = 1e-3, **settings: Any) -> None:
        table[f"mupass {name}{suffix}"] = (lambda m: [kind(m, lr, compile=compile, **settings)], peer)

    for size in (256, 1024):
        for graft, note in (("none", ""), ("adam", " # adam")):
            settings = {"root_every": PERIOD, "block_size": size, "graft": graft}
            add(f"Shampoo {size}{note}", mupass.Shampoo, f"Distributed Shampoo {size}{note}", **settings)
    for size in (1024, 256):  # peers do not cut, and no side of this model is longer than 1024
        add(f"SOAP {size}", mupass.SOAP, "HeavyBall SOAP", basis_every=PERIOD, block_size=size)
    for note, dtype in {"": None, " bfloat16": torch.bfloat16}.items():  # torch's has no other
        add(f"Muon{note}", mupass.Muon, "torch Muon", lr=1e-2, product_dtype=dtype)
    return table


def others(compiled: bool) -> dict[str, Make]:
    """Other libraries, those that are there; HeavyBall compiled or not."""
    found: dict[str, Make] = {}
    for size in (256, 1024):
        for note in ("", " # adam"):
            found[f"Distributed Shampoo {size}{note}"] = partial(
                peers.distributed_shampoo, lr=1e-3, size=size, graft=bool(note)
            )
    found["HeavyBall SOAP"] = partial(peers.heavyball_soap, lr=1e-3, compiled=compiled)
    found["official SOAP"] = partial(peers.official_soap, lr=1e-3)
    found["pytorch_optimizer SOAP"] = partial(peers.pytorch_optimizer_soap, lr=1e-3)
    found["torch Muon"] = partial(peers.torch_muon, lr=1e-2)
    absent = peers.missing(list(found))
    for name, reason in absent.items():
        print(f"left out: {name} ({reason})")
    return {name: make for name, make in found.items() if name not in absent}


def chosen(options: argparse.Namespace) -> list[tuple[str, Make, str]]:
    """Return name, constructor and peer of all that take part; the peer's is empty for a peer itself."""
    mine: dict[str, tuple[Make, str]] = {}
    for compile in [False, True] if options.compile else [False]:
        mine |= ours(compile)
    table = [(name, make, to) for name, (make, to) in mine.items()]
    table += [(name, make, "") for name, make in others(not options.memory).items()]
    if options.memory:  # K-FAC is timed by `benchmarks.kfac_time`, as its factors are made in backward
        table += [("mupass KFAC", lambda m: [mupass.KFAC(m, 1e-3, root_every=PERIOD)], "kfac-pytorch")]
        absent = peers.missing(["kfac-pytorch"])
        if absent:
            print(f"left out: kfac-pytorch ({absent['kfac-pytorch']})")
        else:
            table += [("kfac-pytorch", partial(peers.kfac_pytorch, lr=1e-3), "")]
    words = options.only
    return [row for row in table if not words or any(re.search(word, row[0]) for word in words)]


def built(name: str, make: Make, to: str, width: int, weights: dict[str, Tensor]) -> Entry:
    """Return an optimizer with a model of its own; ours are transformed."""
    model = gpt(width)
    model.load_state_dict(weights)
    if to:
        mupass.transform(model, torch.zeros(1, LENGTH, dtype=torch.long), base=width)
    return Entry(name, model, make(model), to)


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.randint(VOCABULARY, (4, LENGTH + 1))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def run(options: argparse.Namespace) -> list[Entry]:
    torch.manual_seed(0)
    source = gpt(options.width)
    entries = [built(*row, options.width, source.state_dict()) for row in chosen(options)]
    for step in range(-options.warm, options.steps):
        source.zero_grad()
        loss_of(source).backward()
        gradients = [p.grad for p in source.parameters()]
        gc.collect()
        for entry in entries:
            elapsed = entry.step(gradients)  # type: ignore[arg-type]
            if step < 0:
                entry.warm_up += elapsed
            else:
                entry.times.append(elapsed)
    return entries


def bytes_a_parameter(name: str, make: Make, to: str, width: int, steps: int = PERIOD + 1) -> float:
    """Train, free the gradients, and count what is alive beyond the model and what was alive before."""
    torch.manual_seed(0)
    if to:  # what the first transform of a process leaves behind is no optimizer's
        mupass.transform(gpt(width), torch.zeros(1, LENGTH, dtype=torch.long), base=width)
    weights = gpt(width).state_dict()
    before = tensor_bytes()
    entry = built(name, make, to, width, weights)
    for _ in range(steps):
        loss_of(entry.model).backward()
        for optimizer in entry.optimizers:
            optimizer.step()
        entry.model.zero_grad()  # frees them
    own = sum(t.nbytes for t in (*entry.model.parameters(), *entry.model.buffers()))
    return (tensor_bytes() - before - own) / sum(p.numel() for p in entry.model.parameters())


def memory_table(options: argparse.Namespace) -> None:
    """Print bytes a parameter, the peers first."""
    print(f"{'optimizer':38} {'bytes a parameter':>18}  the peer's")
    found: dict[str, float] = {}
    for name, make, to in sorted(chosen(options), key=lambda row: bool(row[2])):
        found[name] = bytes_a_parameter(name, make, to, options.width)
        peer = f"{found[to]:.1f} ({to})" if to in found else ""
        print(f"{name:38} {found[name]:18.1f}  {peer}", flush=True)


def table(entries: list[Entry]) -> None:
    print(f"{'optimizer':38} {'mean':>8} {'median':>8} {'worst':>8} {'warm-up':>8}  ratio to peer")
    print(f"{'':38} {'ms':>8} {'ms':>8} {'ms':>8} {'s':>8}  mean, median, worst")
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
        print(f"{e.name:38} {cells} {e.warm_up:8.1f}  {ratio}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help=f"a multiple of the period, {PERIOD}")
    parser.add_argument("--warm", type=int, default=11, help="steps before, counted as warm-up")
    parser.add_argument("--peers", metavar="FOLDER", help="whose subfolders hold what is not installed")
    parser.add_argument("--memory", action="store_true", help="count bytes instead of timing")
    parser.add_argument("--compile", action="store_true", help="also with compile=True")
    parser.add_argument("--only", nargs="+", help="regular expressions for the names to run")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    peers.look_into(options.peers)
    if options.memory:
        memory_table(options)
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.steps} steps")
    table(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
