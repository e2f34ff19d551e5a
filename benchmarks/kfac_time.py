"""Step time of K-FAC beside its peers and AdamW, interleaved in one run; the GEMM floor; memory; overhead.

A step is forward, backward and optimizer. All contestants take step i before any takes step i + 1, so noise
of the machine meets all alike. Steps come in cycles of 10 (roots are due once a cycle): every position in
the cycle gets its median over cycles; "mean" averages the positions, "worst" is the largest. Warm-up
cycles, compilation with them, are left out. On one thread it is the time of the process, which other work on
the machine changes least.

The floor is the time of the matrix products that the step cannot do without: those of forward and backward
(recorded from a real step and replayed), ``x^T x`` and ``g^T g`` of every linear layer on curvature steps,
and ``B^-1 G A^-1``. The inverses themselves (one Cholesky factorization and inversion for each factor and
cycle) are listed apart. ``x^T x`` counts as a whole product over patches; mupass can be below this floor,
because it leaves out what is symmetric, and takes convolutions of stride 1 as correlations.

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
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import mupass
from benchmarks.contestants import CONTESTANTS, CYCLE, Contestant, Task, make_task, seeded
from benchmarks.floor import Floor, timed

BATCHES = {"gpt": (1, 4, 16), "cnn": (16, 64, 256)}


def interleaved(steps: dict[str, Contestant], cycles: int, warm: int) -> dict[str, list[float]]:
    """Return for every contestant the median time of each position in the cycle, in milliseconds."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(CYCLE)] for name in steps}
    for at in range((warm + cycles) * CYCLE):
        for name, step in steps.items():
            taken = timed(step)
            if at >= warm * CYCLE:
                times[name][at % CYCLE].append(1e3 * taken)
    for step in steps.values():
        step.check()
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
    # What a collection frees may have kept other garbage alive.
    for _ in range(4):
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated things answer isinstance with a warning
        alive = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    storages = [t.untyped_storage() for t in alive if _has_memory(t)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _has_memory(t: Tensor) -> bool:
    """Tell real tensors from those that captures and compilations leave behind."""
    if isinstance(t, (FakeTensor, FunctionalTensor)) or t.is_meta:
        return False
    return not torch._is_functional_tensor(t)


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
    parser.add_argument("--batches", type=int, nargs="*", help=f"for the overhead table (default: {BATCHES})")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true", help="only overhead and memory")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    # Several models of one class are compiled here; without guards on hooks one would run another's graph.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    names = [n for n in options.only if not (options.no_compile and n.endswith("compiled"))]
    eager = [n for n in names if not n.endswith("compiled") and n != "AdamW"]
    for model in options.models:
        if not options.no_times:
            task = make_task(model, width=options.width)
            floor = Floor.of(task).parts(2 * options.cycles)
            for every in (1, CYCLE):
                torch._dynamo.reset()
                steps, missing = started(task, names, every)
                found = interleaved(steps, options.cycles, options.warm)
                print(time_table(model, found, floor, every, missing), flush=True)
        batches = BATCHES[model] if options.batches is None else options.batches
        if batches:
            print(overhead_table(model, batches, eager, max(1, options.cycles // 2)), flush=True)
        if not options.no_memory:
            print(memory_table(model, ["AdamW", *eager]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
