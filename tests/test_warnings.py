"""What changes a result or asks for an answer is warned of by name, once; ordinary models stay silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transform import IDS, TiedLM, cnn, mlp
from torch import Tensor, nn

import mupass


class Scaled(nn.Module):
    """Its forward multiplies its output by the root of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.head, self.width = nn.Linear(5, width), nn.Linear(width, 3), width

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enter(x).relu()) * self.width**0.5


class Unread(nn.Module):
    """It has a pooler that its forward does not read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.mid, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.pooler = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.enter(x).relu()).relu())


class Branching(Unread):
    """It takes one of two branches by the values of the data."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu()
        return self.head((self.mid if x.sum().item() > -1e9 else self.pooler)(h))


class Encoder(nn.Module):
    """Attention blocks of torch over patches, as in a ViT."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.place = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).mT + self.place
        return self.head(self.norm(self.blocks(h)).mean(1))


class ResNet(nn.Module):
    """Two residual blocks, the second with a projection as its shortcut."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Linear(2 * width, 10)
        self.convs = nn.ModuleList(
            nn.Conv2d(i * width, o * width, 3, padding=1, bias=False)
            for i, o in ((1, 1), (1, 1), (1, 2), (2, 2))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o * width) for o in (1, 1, 1, 2, 2))
        self.shortcut = nn.Conv2d(width, 2 * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.stem(x)).relu()
        for i, shortcut in ((0, nn.Identity()), (2, self.shortcut)):
            inner = self.norms[i + 1](self.convs[i](h)).relu()
            h = (shortcut(h) + self.norms[i + 2](self.convs[i + 1](inner))).relu()
        return self.head(h.mean((2, 3)))


X, IMAGES = torch.randn(4, 5), torch.randn(2, 3, 32, 32)


def raised(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [w for w in found if issubclass(w.category, mupass.MupassWarning)]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (mlp, torch.randn(2, 20)),
        (cnn, torch.randn(2, 3, 8, 8)),
        (lambda: TiedLM(64), IDS),
        (Encoder, IMAGES),
        (ResNet, IMAGES),
        (lambda: Unread(64), X),
    ],
    ids=["mlp", "cnn", "gpt", "vit", "resnet", "unread"],
)
@pytest.mark.parametrize("base", [16, 256])
def test_ordinary_models_are_silent(model: Callable[[], nn.Module], inputs: Tensor, base: int) -> None:
    assert raised(lambda: mupass.transform(model(), inputs, base=base)) == []


def test_a_warning_names_the_matter_and_points_at_the_call() -> None:
    model = Scaled(64)
    (found,) = raised(lambda: mupass.transform(model, X, base=16))
    assert found.filename == __file__
    assert "multiplies by 8" in str(found.message) and "write the number of the base width, 4" in str(
        found.message
    )
    assert str(found.message) in model.mupass_plan.warnings


def test_nothing_is_said_at_the_base_width_where_nothing_changes() -> None:
    assert raised(lambda: mupass.transform(Scaled(64), X, base=64)) == []


def test_a_recorded_run_is_told_where_a_branch_was_not_seen() -> None:
    told = [str(w.message) for w in raised(lambda: mupass.transform(Branching(64), X, base=16))]
    assert any("one concrete run was recorded" in t for t in told)
    assert any("pooler.weight is not read" in t for t in told)


def test_a_warning_made_an_error_leaves_the_model_alone() -> None:
    model = Scaled(64)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with warnings.catch_warnings(), pytest.raises(mupass.MupassWarning):
        warnings.simplefilter("error")
        mupass.transform(model, X, base=16)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not hasattr(model, "mupass_plan")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_studies_tell_a_matter_once_for_all_copies() -> None:
    data = [(X, torch.tensor([0, 1, 2, 0]))]
    for study in (
        lambda: mupass.coord_check(Scaled(64), data, widths=[16, 32, 64], optimizer="sgd", lr=1e-3),
        lambda: mupass.sweep(
            Scaled, data, [1e-3], [16, 32, 64], loss=F.cross_entropy, steps=1, progress=False
        ),
    ):
        (found,) = raised(study)
        assert found.filename == __file__ and "multiplies by" in str(found.message)


def test_an_initialization_law_in_doubt_is_asked_for_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(0.31)
    (found,) = raised(lambda: mupass.transform(model, torch.randn(2, 20), base=16))
    assert "2.weight" in str(found.message) and "init=" in str(found.message)
