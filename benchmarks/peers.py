"""Optimizers of other libraries, as the benchmarks set them up; none of their code is here.

They are taken from where they are installed, or from a folder that ``--peers`` names, whose subfolders are
put on the path:

    pip install --no-deps --target peers/heavyball heavyball opt_einsum
    pip install --no-deps --target peers/pytorch_optimizer pytorch_optimizer
    pip install --no-deps --target peers/kfac-pytorch git+https://github.com/gpauloski/kfac-pytorch
    git clone https://github.com/facebookresearch/optimizers peers/optimizers
    git clone https://github.com/nikhilvyas/SOAP peers/SOAP

Weight decay is 0 in all of them, and what they recompute from time to time is due every `PERIOD` steps.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

PERIOD = 10
MODULES = {  # name of a peer, up to what stands behind a number sign -> module that it needs
    "Distributed Shampoo": "distributed_shampoo",
    "HeavyBall SOAP": "heavyball",
    "official SOAP": "soap",
    "pytorch_optimizer SOAP": "pytorch_optimizer",
    "kfac-pytorch": "kfac.preconditioner",
}
Optimizers = list[Any]  # stepped in this order


def look_into(folder: str | None) -> None:
    """Put the subfolders of a folder on the path, behind what is installed."""
    if folder is None:
        return
    places = sorted(str(path.resolve()) for path in Path(folder).iterdir() if path.is_dir())
    sys.path += [place for place in places if place not in sys.path]


def missing(names: Sequence[str]) -> dict[str, str]:
    """Return the peers that are not there, with the reason."""
    found = {}
    for name in names:
        if name == "torch Muon" and not hasattr(torch.optim, "Muon"):
            found[name] = f"torch {torch.__version__} has no torch.optim.Muon"
        module = MODULES.get(name.split(" #")[0])
        if module is None:  # torch's
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:  # a package may fail in any way where its own needs are not met
            found[name] = f"{type(error).__name__}: {error}"
    return found


def distributed_shampoo(model: nn.Module, lr: float, size: int = 1024, graft: bool = True) -> Optimizers:
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)  # it tells what it was told
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    own = DistributedShampoo(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        max_preconditioner_dim=size,
        precondition_frequency=PERIOD,
        grafting_config=AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8) if graft else None,
    )
    return [own]


def heavyball_soap(model: nn.Module, lr: float, compiled: bool = True) -> Optimizers:
    """Compiled by default; not in its own mode, which tunes every product for minutes."""
    import heavyball

    heavyball.utils.compile_mode = "default" if compiled else None
    return [
        heavyball.SOAP(
            model.parameters(), lr=lr, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=PERIOD
        )
    ]


def official_soap(model: nn.Module, lr: float) -> Optimizers:
    from soap import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=PERIOD)]


def pytorch_optimizer_soap(model: nn.Module, lr: float) -> Optimizers:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=PERIOD)]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon is for: neither the first layer nor the last, and no table."""
    blocks = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() > 1]
    weights = [p for p in model.parameters() if p.dim() > 1]
    return blocks or weights[1:-1]


class Flattened(torch.optim.Optimizer):
    """An optimizer for matrices on kernels, each as one matrix ``[out, in x positions]``."""

    def __init__(
        self, weights: Sequence[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.weights = list(weights)
        # The matrices share the kernels' memory.
        self.matrices = [nn.Parameter(w.detach().flatten(1)) for w in self.weights]
        self.inner = make(self.matrices)
        super().__init__(self.weights, {})
        self.state = self.inner.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.inner.step()
        self.inner.zero_grad()  # a gradient that the user frees is not kept here


def torch_muon(model: nn.Module, lr: float, rest_lr: float = 1e-3) -> Optimizers:
    """Muon for the hidden matrices, AdamW for the rest, as its documentation says."""
    matrices = hidden_matrices(model)
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    own = Flattened(matrices, lambda parts: torch.optim.Muon(parts, lr=lr, weight_decay=0.0))
    return [own, torch.optim.AdamW(others, lr=rest_lr, weight_decay=0.0, foreach=True)]


def kfac_pytorch(
    model: nn.Module, lr: float, rest_lr: float | None = 1e-3, momentum: float = 0.9, **settings: Any
) -> Optimizers:
    """Its preconditioner, then SGD with momentum.

    Args:
        model: The model.
        lr: Of SGD, and what the clipping of kfac-pytorch reckons with.
        rest_lr: Of AdamW on parameters outside linear layers and convolutions; None leaves them to SGD.
        momentum: Of SGD.
        settings: Of ``KFACPreconditioner``.
    """
    from kfac.preconditioner import KFACPreconditioner

    preconditioner = KFACPreconditioner(model, **{"inv_update_steps": PERIOD, "lr": lr, **settings})
    if rest_lr is None:
        return [preconditioner, torch.optim.SGD(model.parameters(), lr, momentum=momentum)]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    own = [p for layer in layers for p in layer.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in own)]
    parts = [preconditioner, torch.optim.SGD(own, lr, momentum=momentum)]
    return [*parts, torch.optim.AdamW(rest, rest_lr, weight_decay=0.0)] if rest else parts
