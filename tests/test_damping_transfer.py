"""The benchmark of damping transfer at a tiny size: its three rules are three rules."""

from __future__ import annotations

import argparse

import pytest
import torch

import mupass
from benchmarks import damping_transfer

RATES = {"kfac_lr": 2**-7, "shampoo_lr": 2**-9, "layer_lr": 2**-5, "sgd_lr": 2**-4}
OPTIONS = argparse.Namespace(seed=0, widths=[8, 32], epochs=2, batch=16, **RATES)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(32, 12)
    return x, torch.eye(10)[(x[:, :10]).argmax(1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_rules_agree_at_the_base_width_and_differ_beyond(name: str) -> None:
    x, y = data()
    found = {
        (rule, width): damping_transfer.train(width, name, rule, 1.0, (x, y), OPTIONS)
        for rule in damping_transfer.RULES
        for width in OPTIONS.widths
    }
    assert found["table", 8] == found["constant", 8] != found["rescaled", 8]
    assert found["table", 32] != found["constant", 32]


@pytest.mark.parametrize(("name", "factor"), [("shampoo input", 1 / 4), ("shampoo output", 4)])
def test_in_one_layer_a_constant_must_move_by_the_width(name: str, factor: float) -> None:
    table = damping_transfer.train(32, name, "table", 2.0**-4, data(), OPTIONS)
    moved = damping_transfer.train(32, name, "constant", 2.0**-4 * factor, data(), OPTIONS)
    assert table == moved != damping_transfer.train(32, name, "constant", 2.0**-4, data(), OPTIONS)


def test_constant_damping_is_the_number_itself() -> None:
    model = mupass.transform(damping_transfer.mlp(12, 32), torch.randn(4, 12), base=8)
    made = damping_transfer.make(model, "kfac", "constant", 0.5, OPTIONS)
    assert {(e.scales.damping_in, e.scales.damping_out) for e in made.plan.entries} == {(1.0, 1.0)}
    assert {e.scales.lr for e in made.plan.entries} == {1.0}
