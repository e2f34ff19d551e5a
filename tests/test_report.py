"""The report and the command line show what analysis found."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mupass
from mupass._cli import main
from mupass._cli.targets import load


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


def test_text_has_one_line_a_parameter_in_the_models_order() -> None:
    text = mupass.analyze(small(), base=8).report("sgd").text()
    lines = text.splitlines()
    assert "width 32" in lines[0] and "base width 8" in lines[0]
    found = [line.split()[0] for line in lines[3:]]
    assert found == ["Sequential", "0", "weight", "bias", "2", "weight", "bias"]
    weight = lines[5]
    assert "[0.out=32*, 6]" in weight and "input" in weight and weight.split()[-1] == "4"
    assert lines[8].split()[-1] == "0.25" and "output" in lines[8]


def test_html_is_one_page_with_the_evidence() -> None:
    page = mupass.analyze(small()).report().html()
    assert page.startswith("<!doctype html>") and page.count('class="name"') == 4
    assert "axis 1 of input" in page and 'class="inf"' in page and "http" not in page


def test_graph_joins_parameters_through_dimensions() -> None:
    graph = mupass.analyze(small()).report().graph()
    assert graph.has_edge("0.weight", "0.out") and graph.has_edge("0.out", "2.weight")
    assert graph.nodes["0.out"] == {"kind": "dimension", "infinite": True}
    assert graph.nodes["2.weight"]["role"] == "output"


def test_a_policy_is_marked_and_explained() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.qkv, self.out = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.inp(x)).view(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    text = str(mupass.analyze(Heads(), torch.randn(2, 4, 5)).report())
    assert "heads*head_dim" in text


def test_command_line_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "tests.test_report:small", "--input", "2x6", "--base", "8"]) == 0
    assert "[0.out=32*, 6]" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["analyze", "tests.test_report:small", "--html", str(page), "--dim", "0.out=infinite"]) == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nocolon"], "not module:factory"),
        (["no_such_module:x"], "cannot build"),
        (["math:pi"], "cannot build"),
        (["builtins:dict"], "not an nn.Module"),
        (["tests.test_report:small", "--input", "2xq"], "not sizes"),
        (["tests.test_report:small", "--dim", "nothing=finite"], "matches no dimension"),
        (["tests.test_report:small", "--dim", "0.out=maybe"], "must be 'finite' or 'infinite'"),
        (["tests.test_report:small", "--base", "-1"], "positive"),
    ],
)
def test_command_line_refuses_by_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *words]) == 2
    assert message in capsys.readouterr().err


def test_load_takes_instances_and_factories() -> None:
    assert isinstance(load("tests.test_report:small"), nn.Sequential)
    with pytest.raises(mupass.MupassError, match="module:factory"):
        load("timm")


@pytest.mark.zoo
def test_command_line_knows_timm_and_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert main(["analyze", "timm:vit_tiny_patch16_224"]) == 0
    assert "d_model=192*" in capsys.readouterr().out
    assert main(["analyze", "hf:GPT2Config,n_layer=1,n_embd=96,n_head=3"]) == 0
    assert "tied: lm_head.weight" in capsys.readouterr().out
