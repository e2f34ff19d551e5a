"""Are Shampoo and K-FAC, with settings matched, the optimizers that other packages call so?

    python -m benchmarks.peer_parity --peers FOLDER

An MLP without biases, at its base width, takes steps too small to change its gradients. For each weight the
cosine between our last step and the peer's is printed, and the ratio of their norms. Distributed Shampoo:
roots at every step, damping 1e-6 absolute; without momentum and graft, with both, with either. kfac-pytorch:
inverses at every step, averages that keep the present only (it starts its own at the identity), damping 1e-2
absolute, without momentum. Its loss is a sum, for it takes gradients of single terms from the loss as it is;
its steps are longer by the size of the batch.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mupass
from benchmarks.peers import look_into, missing

WIDTH, BATCH, LR, STEPS = 64, 128, 1e-7, 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [(20, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    first, second, third = (nn.Linear(a, b, bias=False) for a, b in sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).double()


def last_step(model: nn.Module, optimizers: list[Any], reduction: str = "mean") -> list[torch.Tensor]:
    """Train, and return the change of every weight in the last step."""
    generator = torch.Generator().manual_seed(1)
    moves: list[torch.Tensor] = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 20, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (BATCH,), generator=generator)
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction=reduction).backward()
        before = [p.detach().clone() for p in model.parameters()]
        for optimizer in optimizers:
            optimizer.step()
        moves = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    return moves


def ours(kind: type, **settings: Any) -> list[torch.Tensor]:
    model = mupass.transform(network(), torch.randn(2, 20, dtype=torch.float64), base=WIDTH)
    return last_step(model, [kind(model, LR, **settings)])


def shampoo(momentum: float, graft: bool) -> list[torch.Tensor]:
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)
    model = network()
    peer = DistributedShampoo(
        model.parameters(),
        lr=LR,
        betas=(momentum, 0.95),
        epsilon=1e-6,
        precondition_frequency=1,
        max_preconditioner_dim=512,  # at 1024 it would take the small readout for one vector
        grafting_config=AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8) if graft else None,
    )
    return last_step(model, [peer])


def kfac() -> list[torch.Tensor]:
    from kfac.preconditioner import KFACPreconditioner

    model = network()
    peer = KFACPreconditioner(
        model,
        factor_update_steps=1,
        inv_update_steps=1,
        damping=1e-2,
        factor_decay=1e-12,
        kl_clip=lambda step: None,  # type: ignore[arg-type, return-value]
        lr=LR,
        compute_method="inverse",
        factor_dtype=torch.float64,
        inv_dtype=torch.float64,
    )
    return last_step(model, [peer, torch.optim.SGD(model.parameters(), LR)], "sum")


def row(name: str, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(mine, theirs, strict=True)]
    cosines = "  ".join(f"{torch.cosine_similarity(a, b, 0).item():.7f}" for a, b in pairs)
    norms = "  ".join(f"{(a.norm() / b.norm()).item():.5f}" for a, b in pairs)
    return f"{name:<44}{cosines}   {norms}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="FOLDER", help="whose subfolders hold what is not installed")
    look_into(parser.parse_args().peers)
    warnings.simplefilter("ignore")
    gone = missing(["Distributed Shampoo", "kfac-pytorch"])
    for name, reason in gone.items():
        print(f"{name} is missing: {reason}")
    print(f"{'':<44}{'cosine of each weight':<33}   norm, ours / the peer's")
    for momentum in (0.0, 0.9) if "Distributed Shampoo" not in gone else ():
        for graft in (False, True):
            mine = ours(
                mupass.Shampoo,
                damping=1e-6,
                damping_mode="absolute",
                damping_memory=0.0,
                momentum=momentum,
                factor_decay=0.95,
                root_every=1,
                graft="adam" if graft else "none",
            )
            name = f"Shampoo, momentum {momentum:g}, {'Adam' if graft else 'no'} graft"
            print(row(name, mine, shampoo(momentum, graft)))
    if "kfac-pytorch" not in gone:
        mine = ours(
            mupass.KFAC,
            damping=1e-2,
            damping_mode="absolute",
            damping_memory=0.0,
            momentum=0.0,
            factor_decay=0.0,
            root_every=1,
            step_bound=None,
            kl_clip=None,
        )
        print(row("K-FAC", mine, kfac()))


if __name__ == "__main__":
    main()
