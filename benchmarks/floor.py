"""The floor of a K-FAC step: the time of the matrix products that it cannot do without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.contestants import Task, seeded

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")  # prefixes, with backward


def timed(call: Callable[[], Any]) -> float:
    """Return the time of a call: on one thread that of the process, which a busy machine changes least."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


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
