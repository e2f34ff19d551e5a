"""timm's factories and schedules: width factors live through them, and a loss of their ratios is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.scheduler")
pytestmark = pytest.mark.zoo
EPOCHS = 8


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "num_heads": 6, "depth": 2, "num_classes": 5}
    return mupass.transform(timm.create_model("vit_tiny_patch16_224", **sizes), images()[0], base=32)


def images() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(16) % 5


def groups(lr: float = 1e-3) -> Callable[[nn.Module], list[dict[str, Any]]]:
    return lambda model: mupass.param_groups(model, lr=lr, weight_decay=0.1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[int], Any]
) -> list[list[float]]:
    """Return the rates of all groups in each epoch of one step."""
    x, y = images()
    rates = []
    for epoch in range(EPOCHS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(epoch + 1)
    return rates


def cosine(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    return timm.scheduler.CosineLRScheduler(optimizer, t_initial=EPOCHS, **options)


def test_the_factory_and_the_schedule_take_the_steps_of_a_plain_loop() -> None:
    model = vit()
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=1e-3, weight_decay=0.1, param_group_fn=groups()
    )
    found = train(model, optimizer, cosine(optimizer, warmup_t=2).step)
    scales = [group["mupass_scale"] for group in optimizer.param_groups]
    assert len(set(scales)) > 1
    want = vit()
    plain = torch.optim.AdamW(mupass.param_groups(want, lr=1e-3, weight_decay=0.1))

    def follow(epoch: int) -> None:
        share = epoch / 2 if epoch < 2 else (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for group, scale in zip(plain.param_groups, scales, strict=True):
            group["lr"] = 1e-3 * share * scale

    follow(0)
    rates = train(want, plain, follow)
    for ours, theirs in zip(found, rates, strict=True):
        assert ours == pytest.approx(theirs)
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [mupass.KFAC, mupass.Shampoo, mupass.SOAP, mupass.Muon])
def test_our_optimizers_keep_their_factors_and_the_ratio_to_the_fallback(make: Any) -> None:
    model = vit()
    optimizer = make(model, 0.01, fallback_lr=1e-3)
    start = [(group["lr"], group["mupass_scale"]) for group in optimizer.param_groups]
    rates = train(model, optimizer, cosine(optimizer, warmup_t=2).step)
    assert [group["mupass_scale"] for group in optimizer.param_groups] == [scale for _, scale in start]
    shares = [[rate / lr for rate, (lr, _) in zip(row, start, strict=True)] for row in rates]
    assert all(row == pytest.approx([row[0]] * len(row)) for row in shares)
    assert [row[0] for row in shares[:3]] == pytest.approx([0, 0.5, (1 + math.cos(math.pi / 4)) / 2])


def by_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, param_group_fn=groups())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda m: timm.optim.create_optimizer_v2(m, "adamw", lr=1e-3, weight_decay=0.1),
            {},
            "one learning rate",
        ),
        (
            lambda m: timm.optim.create_optimizer_v2(m, "adamw", lr=1e-3, layer_decay=0.7),
            {},
            "one learning rate",
        ),
        (by_adamw, {"warmup_t": 2, "warmup_lr_init": 1e-5}, "width factors are lost"),
        (by_adamw, {"lr_min": 1e-4}, "width factors are lost"),
        (lambda m: mupass.Muon(m, 0.01, fallback_lr=1e-3), {"lr_min": 1e-4}, "no longer have the ratio"),
    ],
    ids=["no groups", "layer decay alone", "warmup from a number", "a floor", "a floor of ours"],
)
def test_a_loss_of_ratios_is_told(make: Any, options: dict[str, Any], message: str) -> None:
    model = vit()
    optimizer = make(model)
    schedule = cosine(optimizer, **options)
    with pytest.warns(mupass.MupassWarning, match=message):
        train(model, optimizer, schedule.step)
