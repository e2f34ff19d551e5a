"""Correlation of inputs against patches that `F.unfold` or plain indexing forms, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupass._taps.correlation import patch_gram
from mupass._taps.factors import Layer, raw_input
from mupass._taps.forms import Convolution

CONVS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(16, 4, 4, padding=2), (9,)),
    "same": (lambda: nn.Conv2d(16, 4, 3, padding=1), (5, 6)),
    "valid": (lambda: nn.Conv2d(17, 4, 3), (6, 5)),
    "much padding": (lambda: nn.Conv2d(16, 4, (2, 3), padding=(3, 4)), (3, 2)),
    "dilation": (lambda: nn.Conv2d(16, 4, 3, padding=2, dilation=2), (6, 7)),
    "groups": (lambda: nn.Conv2d(48, 6, 3, padding=1, groups=3), (4, 5)),
    "even kernel": (lambda: nn.Conv2d(16, 4, (4, 3), padding="same"), (5, 4)),
    "reflect": (lambda: nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect"), (5, 4)),
    "circular": (lambda: nn.Conv1d(16, 4, 3, padding=2, padding_mode="circular"), (7,)),
    "one output": (lambda: nn.Conv2d(16, 4, 3), (3, 3)),
    "3-D": (lambda: nn.Conv3d(16, 4, 3, padding=1), (3, 4, 3)),
}


def by_index(conv: Any, x: Tensor) -> Tensor:
    """Every patch, read tap by tap from the padded input."""
    pads = conv._reversed_padding_repeated_twice
    x = F.pad(x, pads, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    outs = [n - d * (k - 1) for n, k, d in zip(x.shape[2:], conv.kernel_size, conv.dilation, strict=True)]
    shifted = []
    for tap in product(*map(range, conv.kernel_size)):
        at = tuple(slice(d * t, d * t + n) for d, t, n in zip(conv.dilation, tap, outs, strict=True))
        shifted.append(x[(..., *at)].flatten(2))
    patches = torch.stack(shifted, 2).unflatten(1, (conv.groups, -1))  # batch, groups, channels, taps, rows
    rows = patches.permute(1, 2, 3, 0, 4).flatten(3).flatten(1, 2)
    return torch.stack([r @ r.T for r in rows])


def layer(conv: Any) -> Layer:
    size = conv.weight[0].numel()
    return Layer("conv", conv.groups, size, (conv.out_channels // conv.groups,))


@pytest.mark.parametrize("name", CONVS)
def test_correlation_equals_the_sum_over_patches(name: str) -> None:
    make, sizes = CONVS[name]
    torch.manual_seed(0)
    conv, x = make(), torch.randn(3, make().in_channels, *sizes, dtype=torch.float64)
    form = Convolution.of(conv)
    assert form.overlaps(layer(conv).inputs)
    expected = by_index(conv, x)
    torch.testing.assert_close(
        raw_input(layer(conv), form, x, torch.float64), expected, rtol=1e-12, atol=1e-12
    )
    rows = form.input_rows(x).flatten(1, 2)
    torch.testing.assert_close(rows.mT @ rows, expected, rtol=1e-12, atol=1e-12)


def test_one_image_without_a_batch() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 4, 3, padding=1), torch.randn(16, 5, 6, dtype=torch.float64)
    found = raw_input(layer(conv), Convolution.of(conv), x, torch.float64)
    torch.testing.assert_close(found, by_index(conv, x[None]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 4, 3, stride=2, padding=1),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(16, 4, 1),
        nn.Conv2d(16, 4, 7, padding=3),
        nn.ConvTranspose2d(16, 4, 3),
    ],
)
def test_patches_are_formed_where_they_share_too_little(conv: Any) -> None:
    assert not Convolution.of(conv).overlaps(layer(conv).inputs)


def test_autocast_does_not_reach_the_factor() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 4, 3, padding=1), torch.randn(3, 16, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = raw_input(layer(conv), Convolution.of(conv), x, torch.float32)
    torch.testing.assert_close(found.double(), by_index(conv, x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_operator_tells_torch_what_it_does(groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(groups, 16, 3, 4, 5)
    torch.library.opcheck(patch_gram, (x, [3, 2], [1, 1], [1, 0, 1, 1]))
