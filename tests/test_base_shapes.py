"""Files of base shapes, as microsoft/mup writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import mupass
from mupass._errors import InferenceError

VOCABULARY, BASE, WIDTH = 11, 8, 32


class Tied(nn.Module):
    """A table that is the readout too, and a network between the two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(self.up(x).relu())
        return self.norm(x) @ self.table.weight.T


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


MODELS: dict[str, tuple[Any, Tensor]] = {
    "mlp": (mlp, torch.zeros(2, 6)),
    "tied": (Tied, torch.zeros(2, 5, dtype=torch.long)),
}


def base_shapes(build: Any) -> dict[str, list[int | None]]:
    """As mup makes them: an axis that differs between two widths has its base size, the others have none."""
    delta = dict(build(2 * BASE).named_parameters())
    found: dict[str, list[int | None]] = {}
    for name, parameter in build(BASE).named_parameters():
        pairs = zip(parameter.shape, delta[name].shape, strict=True)
        found[name] = [size if size != other else None for size, other in pairs]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [WIDTH, BASE])
def test_a_file_gives_the_plan_of_the_base_model(name: str, width: int, tmp_path: Path) -> None:
    build, x = MODELS[name]
    path = tmp_path / "model.bsh"
    path.write_text("# base shapes\n" + yaml.dump(base_shapes(build), None, indent=4))
    found = mupass.transform(build(width), x, base=str(path)).mupass_plan
    if width == BASE:
        assert all(entry.geometry.shape == entry.geometry.base_shape for entry in found.entries)
        assert all(entry.scales.lr == 1 for entry in found.entries)
        return
    want = mupass.transform(build(width), x, base=build(BASE)).mupass_plan
    for entry in want.entries:
        own = found[entry.geometry.name]
        assert own.scales == entry.scales
        assert own.geometry.base_shape == entry.geometry.base_shape
        assert own.geometry.infinite == entry.geometry.infinite
    assert found.base_width == want.base_width == BASE


def test_a_file_is_the_truth_where_one_model_says_otherwise(tmp_path: Path) -> None:
    shapes = base_shapes(mlp)
    # The middle width is fixed in this family.
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        shapes[name][axis] = None
    path = tmp_path / "model.bsh"
    path.write_text(yaml.dump(shapes))
    analysis = mupass.analyze(mlp(WIDTH), base=path)
    assert analysis["0.weight"].infinite == (False, False)
    assert analysis["2.weight"].infinite == (True, False) and analysis["2.weight"].role == "input"
    assert any("inference from one model says infinite" in note for note in analysis.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "maps no parameter"),
        ("- 1\n- 2\n", "maps no parameter"),
        ("0.weight: [8, null\n", "cannot read base shapes"),
        ("3: [8]\n", "no parameter's name"),
        ("0.weight: 8\n", "must have a list"),
        ("0.weight: [0, null]\n", "must be a positive integer"),
        ("0.weight: [8.5, null]\n", "must be a positive integer"),
        ("0.weight: [true, null]\n", "must be a positive integer"),
        ("0.weight: [8, null]\n", "another architecture"),
        ("!!python/object/apply:os.getcwd []\n", "cannot read base shapes"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / "model.bsh", mlp(WIDTH)
    path.write_text(text)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InferenceError, match=message):
        mupass.transform(model, base=path)
    assert not hasattr(model, "mupass_plan")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_file_with_other_axes_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bsh"
    with pytest.raises(InferenceError, match="cannot read base shapes"):
        mupass.analyze(mlp(WIDTH), base=path)
    shapes = base_shapes(mlp)
    shapes["2.bias"] = [BASE, BASE]
    path.write_text(yaml.dump(shapes))
    with pytest.raises(InferenceError, match=r"another architecture: it differs at \['2.bias'\]"):
        mupass.analyze(mlp(WIDTH), base=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_files_that_mup_writes(name: str, tmp_path: Path) -> None:
    mup = pytest.importorskip("mup")
    build, _ = MODELS[name]
    path = tmp_path / "model.bsh"
    mup.make_base_shapes(build(BASE), build(2 * BASE), savefile=str(path))
    assert yaml.safe_load(path.read_text()) == base_shapes(build)
