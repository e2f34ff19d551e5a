"""Who takes part in the timing of K-FAC: mupass, its peers and AdamW, each with a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from benchmarks import peers
from benchmarks.models import GPT, cnn

CYCLE = 10  # steps; roots are due once in each
VOCABULARY, LENGTH = 128, 128
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

    def check(self) -> None:
        """Raise when the optimizer left something out on the way: its time would mean nothing."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, mupass.KFAC) and optimizer.stats().keys() != {"steps"}:
                raise RuntimeError(f"mupass.KFAC met incidents: {optimizer.stats()}")


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
    model = seeded(task)
    optimizers = peers.kfac_pytorch(
        model,
        LR,
        rest_lr=None,
        factor_update_steps=every,
        inv_update_steps=CYCLE,
        damping=1e-2,
        kl_clip=lambda step: None,  # None itself is refused
        compute_method=method,
    )
    call = torch.compile(model) if compiled else None
    return Contestant(task, model, optimizers, call)


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
