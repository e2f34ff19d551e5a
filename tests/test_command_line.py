"""The command line: one line and exit 2 for every slip, the version, JSON, folded tables, quick start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._cli import main
from mupass._cli.words import TRAINED
from mupass._runs.recipes import recipe

HERE = "tests.test_command_line"


class Block(nn.Module):
    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def deep() -> nn.Module:
    blocks = [Block(64, 128), Block(64, 128), Block(64, 128), Block(64, 256), Block(64, 256)]
    return nn.Sequential(nn.Linear(6, 64), *blocks, nn.Linear(64, 3))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))


def broken() -> nn.Module:
    raise ZeroDivisionError("a model that cannot be built\nsecond line")


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return [(x, x[:, :3].argmax(1))]


SLIPS = {
    "analyse x:y": "did you mean analyze",
    f"analyze {HERE}:small --optimizer adma": "did you mean adam",
    f"analyze {HERE}:small --parameterization mpu": "did you mean mup",
    f"analyze {HERE}:small --optimzer adam": "did you mean --optimizer",
    f"analyze {HERE}:smal": "did you mean small",
    f"analyze {HERE}:broken": "ZeroDivisionError: a model that cannot be built",
    f"analyze {HERE}:small --base zero": "positive",
    f"analyze {HERE}:small --device cpuu": "--device 'cpuu'",
    f"analyze {HERE}:small --dim up=fine": "'finite' or 'infinite'",
    f"analyze {HERE}:small --input 2xq": "not sizes",
    f"analyze {HERE}:small --input 2x6:flot32": "did you mean",
    f"analyze {HERE}:small --html no/such/page.html": "cannot be written",
    f"check {HERE}:small --optimizer mun": "did you mean muon",
    f"check {HERE}:small --steps 0": "at least 1",
    f"check {HERE}:small --out page.pdf": "must end with",
    f"check {HERE}:small --data {HERE}:batch": "did you mean batches",
    f"sweep {HERE}:small --data {HERE}:batches --lr -1": "positive",
    f"sweep {HERE}:small --lr 0.1": "--data",
    f"transfer {HERE}:small --data {HERE}:batches --lr 0.1 --driver gird": "did you mean grid",
    f"report {HERE}:small": "--out",
    f"resize {HERE}:small --width wide": "is not a number",
    "analyze": "target",
    "": "COMMAND",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_is_one_line_and_exit_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and not said.out
    assert SLIPS[line] in said.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["mupass", mupass.__version__]
    assert main(["analyze", "--help"]) == 0
    assert "--optimizer" in capsys.readouterr().out


def test_names_of_optimizers_are_those_of_the_recipes() -> None:
    assert TRAINED == ("sgd", "adam", "adamw", "kfac", "shampoo", "soap", "muon")
    for name in TRAINED:
        model = mupass.transform(small(), base=32)
        assert isinstance(recipe(name)(model, lr=0.1), torch.optim.Optimizer)


def test_json_has_what_the_table_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", f"{HERE}:small", "--base", "32", "--optimizer", "adam", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["width"], found["base_width"], found["optimizer"]) == (128, 32, "adam")
    hidden = next(p for p in found["parameters"] if p["name"] == "2.weight")
    assert hidden["role"] == "hidden" and hidden["shape"] == [128, 128] and hidden["grows"] == [True, True]
    assert (hidden["lr"], hidden["init"], hidden["epsilon"]) == (0.25, 0.5, 0.25)


def test_blocks_that_are_alike_are_shown_once_and_lines_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", f"{HERE}:deep"]) == 0
    text = capsys.readouterr().out
    assert "1 to 3 (3 x Block)" in text and "4 to 5 (2 x Block)" in text
    assert text.count("norm (LayerNorm)") == 2
    assert max(map(len, text.splitlines())) <= 100
    assert "0 (Linear)" in text and "6 (Linear)" in text
    analysis = mupass.analyze(deep())
    assert analysis.report().html().count("norm (LayerNorm)") == 5  # the page has all


def test_transfer_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{HERE}:small", "--data", f"{HERE}:batches", "--steps", "5", "--optimizer", "sgd"]
    state = tmp_path / "full.pt"
    assert main(["transfer", *words, "--lr", "0.01", "1", "1e6", "--state", str(state)]) == 0
    assert "tuned at width 64, for a model of width 128" in capsys.readouterr().out
    small().load_state_dict(torch.load(state))
    page = tmp_path / "page.html"
    assert (
        main(["report", *words, "--lr", "0.01", "1", "1e6", "--widths", "32", "64", "--out", str(page)]) == 0
    )
    text = page.read_text()
    assert (
        all(word in text for word in ("<!doctype html>", "Plan", "sgd")) and "PASS" in capsys.readouterr().out
    )


def test_importing_mupass_reads_nothing_heavy() -> None:
    code = "import sys, mupass; print([m for m in ('torch', 'networkx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, mupass; mupass.transform; print('networkx' in set(sys.modules) - before)"
    code = f"import torch, torch.export, sys; before = set(sys.modules); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there() -> None:
    assert set(mupass.__all__) <= set(dir(mupass))
    for name in mupass.__all__:
        assert getattr(mupass, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        mupass.transfrom  # noqa: B018


@pytest.mark.zoo
def test_settings_of_configurations_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["analyze", "hf:GPT2Config,n_lyer=2"]) == 2
    assert "'n_lyer'; did you mean n_layer" in capsys.readouterr().err
    assert main(["analyze", "hf:GPT2Confg"]) == 2
    assert "did you mean GPT2Config" in capsys.readouterr().err
    for words in (
        "GPT2Config,n_layer=3,hidden_size=96,n_head=3,vocab_size=99",
        "LlamaConfig,num_hidden_layers=2",
    ):
        assert main(["analyze", f"hf:{words}"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 100 and "0 to " in text
