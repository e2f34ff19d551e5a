"""The command line checks and sweeps, and its exit code says how it went."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mupass._cli import main


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(11, 64), nn.Linear(64, 64), nn.Linear(64, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.table(ids))))


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    return [(x, x[:, :3].argmax(1))]


HERE = "tests.test_commands"


def test_check_exits_with_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "check.html"
    words = ["check", f"{HERE}:small", "--steps", "1", "--widths", "64", "128", "--out", str(page)]
    assert main(words) == 0
    assert "PASS" in capsys.readouterr().out and page.read_text().startswith("<!doctype html>")
    assert main([*words, "--parameterization", "standard"]) == 1
    assert "FAIL at" in capsys.readouterr().out
    data = ["--data", f"{HERE}:batches", "--widths", "64", "128", "--optimizer", "sgd"]
    assert main(["check", f"{HERE}:small", *data]) == 0
    assert "widths: 64, 128" in capsys.readouterr().out


def test_check_makes_up_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{HERE}:Tokens", "--steps", "1"]) == 0
    assert "table.weight: embedding in table" in capsys.readouterr().out


def test_sweep_prints_a_table_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", f"{HERE}:small", "--data", f"{HERE}:batches", "--steps", "5", "--widths", "32", "64"]
    words += ["--optimizer", "sgd", "--store", str(tmp_path / "runs.db")]
    assert main([*words, "--lr", "0.1", "1", "1e6"]) == 0
    first = capsys.readouterr().out
    assert "best lr" in first and "diverged" in first
    assert main([*words, "--lr", "0.1", "1", "1e6"]) == 0
    assert capsys.readouterr().out == first
    assert main([*words, "--lr", "1e-4", "1e-3"]) == 1
    assert "NOT BRACKETED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nocolon"], "not module:function"),
        (["--data", "math:nothing"], "cannot find"),
        (["--widths", "64"], "at least 2 different widths"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_check_refuses_by_name(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{HERE}:small", *words]) == 2
    assert message in capsys.readouterr().err
