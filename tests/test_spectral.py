"""Updates of spectral norm 1, block by block, with which SOAP without blocks does not blow up."""

from __future__ import annotations

from math import log2
from typing import Any

import pytest
import torch
from test_kfac import moved
from test_shampoo import make
from torch import Tensor

import mupass

OPTIONS = {"fallback": "sgd", "fallback_lr": 0.0}
MAKE: dict[str, Any] = {
    "shampoo": lambda net, **o: mupass.Shampoo(
        net, 1.0, momentum=0, graft="spectral", root_every=1, **OPTIONS, **o
    ),
    "soap": lambda net, **o: mupass.SOAP(net, 1.0, basis_every=1, spectral=True, **OPTIONS, **o),
}


def train(net: Any, optimizer: Any, steps: int) -> dict[str, Tensor]:
    deltas: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(6, 5, dtype=torch.float64)
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        deltas = moved(net, optimizer.step)
    return deltas


@pytest.mark.parametrize("optimizer", MAKE)
def test_blocks_have_spectral_norm_one_times_the_row_of_muon(optimizer: str) -> None:
    net, _ = make("mlp")
    made = MAKE[optimizer](net, block_size=6)
    deltas = train(net, made, 6)
    for name, blocks, row in (
        ("0.weight", (2, 1), 2**0.5),
        ("2.weight", (2, 2), 1.0),
        ("4.weight", (1, 2), 2**-0.5),
    ):
        growth = {"0.weight": 2, "2.weight": 4, "4.weight": 2}[name]
        parts = [b for rows in deltas[name].chunk(blocks[0], 0) for b in rows.chunk(blocks[1], 1)]
        norms = torch.stack([torch.linalg.matrix_norm(b, 2) for b in parts]) * growth**0.5 / row
        # Power iteration is from below, so norms are from above.
        assert (norms > 1 - 1e-9).all() and (norms < 1.2).all(), (name, norms)


def test_the_direction_is_that_of_shampoo() -> None:
    one, two = make("mlp")[0], make("mlp")[0]
    plain = train(one, mupass.Shampoo(one, 1.0, momentum=0, graft="none", **OPTIONS), 1)
    spectral = train(two, MAKE["shampoo"](two), 1)
    for name in ("0.weight", "2.weight", "4.weight"):
        cosine = torch.cosine_similarity(plain[name].flatten(), spectral[name].flatten(), 0)
        assert cosine > 1 - 1e-9


def test_a_zero_update_stays_zero() -> None:
    net, x = make("mlp")
    made = MAKE["shampoo"](net)
    (0 * net(x)).sum().backward()
    assert all((d == 0).all() for d in moved(net, made.step).values())


def hidden(width: int, **options: Any) -> float:
    """Return log2 of RMS(dW h) of a hidden layer when SOAP sees its fourth gradient."""
    total = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(5, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()
        )
        net = torch.nn.Sequential(net, torch.nn.Linear(width, 3)).double()
        mupass.transform(net, torch.randn(6, 5, dtype=torch.float64), base=32)
        made = mupass.SOAP(net, 1e-6, basis_every=100, **options, **OPTIONS)
        delta = train(net, made, 4)["0.2.weight"]
        torch.manual_seed(3)
        h = net[0][:2](torch.randn(6, 5, dtype=torch.float64))
        total += (h @ delta.T).square().mean().sqrt().log2().item()
    return total / 3


@pytest.mark.slow
def test_soap_without_blocks_does_not_grow_with_width() -> None:
    slopes = {}
    for spectral in (False, True):
        options = {"block_size": 1 << 20, "spectral": spectral}
        slopes[spectral] = (hidden(256, **options) - hidden(32, **options)) / log2(8)
    # It shrinks here: the basis is stale, and most of the update is noise that no activation sees.
    assert slopes[False] > 0.25 and slopes[True] < 0.1, slopes


def test_soap_in_blocks_of_the_base_width_is_flat() -> None:
    slope = (hidden(256) - hidden(32)) / log2(8)
    assert abs(slope) < 0.1, slope
