"""The recipes run, with the libraries that are there."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs/recipes.md"
LIBRARIES = (
    "accelerate",
    "lightning",
    "peft",
    "timm",
    "transformers",
)  # a block is of the first that it imports


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def library(block: str) -> str:
    found = re.findall(rf"^import ({'|'.join(LIBRARIES)})$", block, re.M)
    return found[0] if found else ""


def run(chosen: list[str]) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "recipes"}
    for number, block in enumerate(chosen):
        exec(compile(block, f"<recipes, block {number}>", "exec"), namespace)
    return namespace


# The recipe from the meta device is warned to call initialize, which it does; torch has one stream of random
# numbers for all ranks on GPUs only.
@pytest.mark.filterwarnings("ignore:.*mupass.initialize:mupass._errors.MupassWarning")
@pytest.mark.filterwarnings("ignore:.*andom:UserWarning")
def test_recipes_for_torch_alone_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run([b for b in blocks() if not library(b)])
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 7


@pytest.mark.zoo
@pytest.mark.parametrize("name", LIBRARIES)
def test_recipes_for_trainers_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    first, *others = blocks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # what these libraries warn of is theirs; mupass must be silent
        found = run([first, *(b for b in others if library(b) == name)])
    said = [str(w.message) for w in caught if "mupass" in type(w.message).__module__]
    assert not said
    if name == "timm":
        # The first epoch is warmup from 0, the second at the rate itself: factors of width and of the layer.
        rates = {(g["mupass_scale"], g["lr_scale"]) for g in found["adamw"].param_groups}  # type: ignore[attr-defined]
        assert len({width for width, _ in rates}) > 1 < len({layer for _, layer in rates})
        for group in found["adamw"].param_groups:  # type: ignore[attr-defined]
            assert group["initial_lr"] == pytest.approx(1e-3 * group["mupass_scale"])
        found["schedule"].step(1)  # type: ignore[attr-defined]
        for group in found["adamw"].param_groups:  # type: ignore[attr-defined]
            share = 1e-3 * group["mupass_scale"] * group["lr_scale"]
            assert group["lr"] == pytest.approx(share * (1 + 0.5**0.5) / 2)
    if name == "peft":
        logits = found["merged"](found["tokens"]).logits  # type: ignore[operator]
        assert torch.allclose(logits, found["adapted"](found["tokens"]).logits, atol=1e-5)  # type: ignore[operator]
        assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    if name == "transformers":
        plain = found["transformers"].GPT2LMHeadModel.from_pretrained("gpt2").eval()  # type: ignore[attr-defined]
        ids = torch.arange(12)[None]
        expected = found["gpt2"].eval()(ids).logits  # type: ignore[attr-defined]
        assert torch.allclose(plain(ids).logits, expected, atol=1e-5)
