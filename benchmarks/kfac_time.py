"""Step time of K-FAC beside its peers and AdamW, interleaved in one run; the GEMM floor; memory; overhead.

A step is forward, backward and optimizer. All contestants take step i before any takes step i + 1, so noise
of the machine meets all alike. Steps come in cycles of 10 (roots are due once a cycle): every position in
the cycle gets its median over cycles; "mean" averages the positions, "worst" is the largest. Warm-up
cycles, compilation with them, are left out.

The floor is the time of the matrix products that the step cannot do without: those of forward and backward
(recorded from a real step and replayed), ``x^T x`` and ``g^T g`` of every linear layer on curvature steps,
and ``B^-1 G A^-1``. The inverses themselves (one Cholesky factorization and inversion for each factor and
cycle) are listed apart.

    python -m benchmarks.kfac_time                        # about ten minutes on one core
    python -m benchmarks.kfac_time --models gpt --cycles 3 --no-compile

Peers are used where they can be imported: ``pip install singd`` and ``pip install
git+https://github.com/gpauloski/kfac-pytorch``. Both take nn.Linear and nn.Conv2d only. What they leave
gets SGD, as in `mupass.KFAC` here. kfac-pytorch runs without its kl-clip, which costs time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import mupass
from benchmarks.models import GPT, cnn

CYCLE = 10  # steps; roots are due once in each
VOCABULARY, LENGTH = 128, 128
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")  # prefixes, with backward
LR = 1e-4  # small: what is timed should not diverge


@dataclass(frozen=True)
class Task:
    """A model with one batch."""

    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        out = model(self.x)
        return F.cross_entropy(out.flatten(0, -2), self.y.flatten())


def make_task(name: str, batch: int | None = None, width: int | None = None) -> Task:
    """The GPT (width 256, 4 layers, 4 sequences of 128 tokens) or the CNN (64 channels, 64 images)."""
    torch.manual_seed(0)
    if name == "gpt":
        ids = torch.randint(VOCABULARY, (batch or 4, LENGTH + 1))
        return Task(
            lambda: GPT(width or 256, 4, VOCABULARY, LENGTH, min(64, width or 64)), ids[:, :-1], ids[:, 1:]
        )
    x, y = torch.randn(batch or 64, 1, 28, 28), torch.randint(10, (batch or 64,))
    return Task(lambda: cnn(width or 64), x, y)


# Contestants -----------------------------------------------------------------------------------------------


class Contestant:
    """A model with its optimizer; one call is one step."""

    def __init__(
        self, task: Task, model: nn.Module, optimizers: Sequence[Any], call: nn.Module | None = None
    ) -> None:
        self.task, self.model, self.optimizers = task, model, optimizers
        self.call = model if call is None else call

    def __call__(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.zero_grad()
        self.task.loss(self.call).backward()
        for optimizer in self.optimizers:
            optimizer.step()


def seeded(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return task.build()


def adamw(task: Task, every: int, compiled: bool = False) -> Contestant:
    model = seeded(task)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Contestant(task, model, [optimizer], torch.compile(model) if compiled else None)


def ours(task: Task, every: int, compiled: bool = False) -> Contestant:
    model = mupass.transform(seeded(task), task.x[:2])
    optimizer = mupass.KFAC(
        model, LR, 1e-2, momentum=0.9, factor_every=every, root_every=CYCLE, fallback="sgd", fallback_lr=LR
    )
    return Contestant(task, model, [optimizer], torch.compile(model, fullgraph=True) if compiled else None)


def kfac_pytorch(task: Task, every: int, method: str = "inverse", compiled: bool = False) -> Contestant:
    from kfac.preconditioner import KFACPreconditioner

    model = seeded(task)
    preconditioner = KFACPreconditioner(
        model,
        factor_update_steps=every,
        inv_update_steps=CYCLE,
        damping=1e-2,
        kl_clip=lambda step: None,  # None itself is refused
        lr=LR,
        compute_method=method,
    )
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    call = torch.compile(model) if compiled else None
    return Contestant(task, model, [preconditioner, optimizer], call)


def singd(task: Task, every: int) -> Contestant:
    from singd.optim.optimizer import SINGD

    model = seeded(task)
    average = "batch+sequence" if task.y.dim() > 1 else "batch"
    own = SINGD(
        model, lr=LR, damping=1e-2, T=every, lr_cov=1e-4, loss_average=average, warn_unsupported=False
    )
    taken = {p for group in own.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if p not in taken]
    return Contestant(task, model, [own, torch.optim.SGD(rest, LR, momentum=0.9)] if rest else [own])


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "AdamW": adamw,
    "mupass": ours,
    "kfac-pytorch, inverse": kfac_pytorch,
    "kfac-pytorch, eigen": lambda t, e: kfac_pytorch(t, e, "eigen"),
    "singd": singd,
    "AdamW, compiled": lambda t, e: adamw(t, e, True),
    "mupass, compiled": lambda t, e: ours(t, e, True),
    "kfac-pytorch, compiled": lambda t, e: kfac_pytorch(t, e, compiled=True),
}


# Timing ----------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> float:
    """Return the time of a call: on one thread that of the process, which a busy machine changes least."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def interleaved(steps: dict[str, Callable[[], Any]], cycles: int, warm: int) -> dict[str, list[float]]:
    """Return for every contestant the median time of each position in the cycle, in milliseconds."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(CYCLE)] for name in steps}
    for at in range((warm + cycles) * CYCLE):
        for name, step in steps.items():
            taken = timed(step)
            if at >= warm * CYCLE:
                times[name][at % CYCLE].append(1e3 * taken)
    return {name: [median(t) for t in found] for name, found in times.items()}


def started(task: Task, names: Sequence[str], every: int) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Make the contestants and take two steps; return them, and why the others cannot take part."""
    steps, missing = {}, {}
    for name in names:
        try:
            contestant = CONTESTANTS[name](task, every)
            contestant(), contestant()
            steps[name] = contestant
        except ImportError as error:
            missing[name] = f"not installed ({error})"
        except Exception as error:  # noqa: BLE001 a peer's failure is a result
            if name.startswith("mupass") or name.startswith("AdamW"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return steps, missing


# The floor -------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the matrix products of what runs inside, ready to be replayed on data of the same layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__.lstrip("_").startswith(PRODUCTS):
            keep = lambda x: x.detach().clone() if isinstance(x, Tensor) else x  # noqa: E731
            self.calls.append((func, tree_map(keep, args), tree_map(keep, kwargs)))
        return func(*args, **kwargs)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


@dataclass
class Floor:
    """The products of one model: what a step cannot do without."""

    base: Recorder
    rows: list[tuple[Tensor, Tensor]]  # inputs [n, in] and output gradients [n, out] of every linear layer

    @staticmethod
    def of(task: Task) -> Floor:
        model, rows = seeded(task), []
        taps = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

        def tap(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            weight = module.weight.flatten(1)
            count = out.numel() // len(weight)
            rows.append((torch.randn(count, weight.shape[1]), torch.randn(count, len(weight))))

        handles = [m.register_forward_hook(tap) for m in taps]
        task.loss(model)
        for handle in handles:
            handle.remove()
        recorder = Recorder()
        with recorder:
            task.loss(model).backward()
        return Floor(recorder, rows)

    def grams(self) -> None:
        for x, g in self.rows:
            x.T @ x, g.T @ g

    def precondition(self) -> None:
        for (x, g), (a, b) in zip(self.rows, self.factors(), strict=True):
            b @ (g[:1].T @ x[:1]) @ a

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        if not hasattr(self, "_factors"):
            self._factors = [
                tuple(r.T @ r / len(r) + torch.eye(r.shape[1]) for r in pair) for pair in self.rows
            ]
        return self._factors

    def roots(self) -> None:
        for pair in self.factors():
            for m in pair:
                torch.cholesky_inverse(torch.linalg.cholesky_ex(m)[0])

    def parts(self, repeats: int) -> dict[str, float]:
        """Return the median time of each part, in milliseconds."""
        parts = {
            "model": self.base.replay, "grams": self.grams,
            "precondition": self.precondition, "roots": self.roots,
        }  # fmt: skip
        self.factors()
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(repeats + 1):
            for name, part in parts.items():
                times[name].append(1e3 * timed(part))
        return {name: median(t[1:]) for name, t in times.items()}


# Tables ----------------------------------------------------------------------------------------------------


def time_table(
    title: str, found: dict[str, list[float]], floor: dict[str, float], every: int, missing: dict[str, str]
) -> str:
    """Return the table of one model and schedule."""
    products = floor["model"] + floor["grams"] / every + floor["precondition"]
    mean = {n: sum(t) / len(t) for n, t in found.items()}
    reference = next((n for n in found if n.startswith("kfac-pytorch, inverse")), None)
    lines = [f"\n{title}: factors every {every}, roots every {CYCLE}; milliseconds"]
    lines.append(
        f"{'':<24}{'mean':>9}{'worst':>9}{'/ floor':>9}{'/ AdamW':>9}{'mean / k-p':>12}{'worst / k-p':>13}"
    )
    for name, times in found.items():
        adam = mean.get("AdamW, compiled" if name.endswith("compiled") else "AdamW")
        row = f"{name:<24}{mean[name]:>9.1f}{max(times):>9.1f}{mean[name] / products:>9.2f}"
        row += f"{mean[name] / adam:>9.2f}" if adam else f"{'':>9}"
        if reference and not name.startswith("AdamW"):
            row += f"{mean[name] / mean[reference]:>12.2f}{max(times) / max(found[reference]):>13.2f}"
        lines.append(row)
    lines += [f"{name:<24} {why}" for name, why in missing.items()]
    parts = ", ".join(f"{k} {v:.1f}" for k, v in floor.items())
    lines.append(f"{'floor (matrix products)':<24}{products:>9.1f}          one pass of each part: {parts}")
    return "\n".join(lines)


def overhead_table(model: str, batches: Sequence[int], names: Sequence[str], cycles: int) -> str:
    """Return the time over AdamW's as the batch grows."""
    lines = [f"\n{model}: time over AdamW's in percent, as the batch grows (roots every {CYCLE})"]
    for every in (1, CYCLE):
        for batch in batches:
            steps, missing = started(make_task(model, batch), ["AdamW", *names], every)
            found = {n: sum(t) / CYCLE for n, t in interleaved(steps, cycles, 1).items()}
            cells = [f"{n} {100 * (t / found['AdamW'] - 1):+.0f} %" for n, t in found.items() if n != "AdamW"]
            what = f"factors every {every}, batch {batch}".ljust(32)
            lines.append(f"{what}AdamW {found['AdamW']:.1f} ms   " + "   ".join([*cells, *missing]))
    return "\n".join(lines)


# Memory ----------------------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Return the bytes of all tensors alive, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated things answer isinstance with a warning
        storages = {t.untyped_storage() for t in gc.get_objects() if isinstance(t, Tensor)}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(model: str, name: str, every: int, queue: Any) -> None:
    """In a process of its own: bytes that the optimizer keeps, and by how much it raises the peak."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task = make_task(model)
    plain = seeded(task)
    for _ in range(3):
        plain.zero_grad()
        task.loss(plain).backward()
    plain.zero_grad()
    if name.startswith("mupass"):
        mupass.transform(copy.deepcopy(plain), task.x[:2])  # imports and tracing are not the optimizer's
    before, size = peak(), sum(p.nbytes for p in plain.parameters())
    kept = tensor_bytes()
    try:
        contestant = CONTESTANTS[name](task, every)
    except ImportError as error:
        queue.put(str(error))
        return
    for _ in range(CYCLE + 2):
        contestant()
    risen = peak() - before - size
    contestant.model.zero_grad()
    queue.put((tensor_bytes() - kept - size, risen, size))


def memory_table(model: str, names: Sequence[str]) -> str:
    lines = [f"\n{model}: memory, MiB (state: tensors the optimizer keeps; peak: rise of the resident peak)"]
    context = multiprocessing.get_context("spawn")
    for name in names:
        queue = context.Queue()
        process = context.Process(target=measure_memory, args=(model, name, 1, queue))
        process.start()
        found = queue.get()
        process.join()
        if isinstance(found, str):
            lines.append(f"{name:<24} not installed ({found})")
            continue
        state, risen, size = (n / 2**20 for n in found)
        lines.append(f"{name:<24}state {state:>7.1f} ({state / size:.1f} x parameters)   peak {risen:>7.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt", "cnn"], choices=["gpt", "cnn"])
    parser.add_argument("--width", type=int, help="of the models (default: 256 and 64)")
    parser.add_argument("--cycles", type=int, default=5, help="cycles of ten steps that are timed")
    parser.add_argument("--warm", type=int, default=1, help="cycles that are not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16], help="for the overhead table")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    # Several models of one class are compiled here; without guards on hooks one would run another's graph.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    names = [n for n in options.only if not (options.no_compile and n.endswith("compiled"))]
    eager = [n for n in names if not n.endswith("compiled") and n != "AdamW"]
    for model in options.models:
        task = make_task(model, width=options.width)
        floor = Floor.of(task).parts(2 * options.cycles)
        for every in (1, CYCLE):
            torch._dynamo.reset()
            steps, missing = started(task, names, every)
            found = interleaved(steps, options.cycles, options.warm)
            print(time_table(model, found, floor, every, missing), flush=True)
        if options.batches:
            print(overhead_table(model, options.batches, eager, max(1, options.cycles // 2)), flush=True)
        if not options.no_memory:
            print(memory_table(model, ["AdamW", *eager]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
