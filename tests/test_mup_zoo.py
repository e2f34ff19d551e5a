"""Scales beside those of the `mup` package (base and delta models), where it is right and where not."""

import importlib
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mupass

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mup
    import mup.optim
    import mup.shape

from zoo import plain_dense, plain_sequence, plain_vision
from zoo.case import Case

CASES = {**plain_dense.CASES, **plain_sequence.CASES, **plain_vision.CASES}


def mup_rates(case: Case, optimizer: str) -> dict[str, float]:
    """Learning rates that mup gives the case at twice its base width, by parameter name."""
    model = case.build(2)
    shapes = mup.shape.make_base_shapes(case.build(1), case.build(2))
    mup.set_base_shapes(model, shapes, rescale_params=False, do_assert=False)
    make = {"adam": mup.optim.MuAdam, "sgd": mup.optim.MuSGD}[optimizer]
    groups = make(model.parameters(), lr=1.0).param_groups
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: g["lr"] for g in groups for p in g["params"]}


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rates_equal_mups_below_the_readout(name: str, optimizer: str) -> None:
    compare(CASES[name], optimizer)


@pytest.mark.zoo
@pytest.mark.parametrize("package", ["hf_text", "vision"])
@pytest.mark.filterwarnings("ignore")  # of other people's model code
def test_learning_rates_equal_mups_on_transformers_timm_and_torchvision(package: str) -> None:
    pytest.importorskip("transformers" if package == "hf_text" else "timm")
    for case in importlib.import_module(f"zoo.{package}").CASES.values():
        for optimizer in ("adam", "sgd"):
            compare(case, optimizer)


def compare(case: Case, optimizer: str) -> None:
    """Compare learning rates at twice the base width, for all parameters that mup sees rightly."""
    torch.manual_seed(0)
    theirs = mup_rates(case, optimizer)
    analysis = mupass.analyze(case.build(2), case.inputs(), base=case.build(1))
    report = analysis.report(optimizer)
    seen = [
        g
        for g in analysis.geometries
        if g.role != "output" and not g.readout_uses and _mup_is_right(g, optimizer)
    ]
    assert seen, case.name
    for g in seen:
        assert report.scales(g).lr == pytest.approx(theirs[g.name]), (case.name, g.name, g.role, g.shape)


def _mup_is_right(g: mupass.Geometry, optimizer: str) -> bool:
    """mup counts infinite axes and takes the last as fan_in: right for (out, in) layouts."""
    if sum(g.infinite) > 2 or not g.uses:
        return False
    if g.role == "hidden" and len(g.shape) == 3 and optimizer == "sgd":
        return False  # a stack of experts: mup divides by the wrong axis
    if g.role == "hidden" and g.m_in != g.m_out:
        return max(i for i, f in enumerate(g.infinite) if f) in g.fan_in_axes  # not for (in, out) layouts
    if sum(g.infinite) == 2 and g.role in ("vector", "input"):
        return False  # two growing axes that no activation is contracted with: mup sees a matrix
    return True


# Where mup is wrong: our update is flat, its update is not.


class TiedLM(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(17, d), nn.Linear(d, d)
        self.head = nn.Linear(d, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.mix(h).relu())


def conv_readout(d: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, d, 3), nn.ReLU(), nn.Conv2d(d, d, 3), nn.ReLU(), nn.Conv2d(d, 5, 1))


def transposed_readout(d: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, d, 3), nn.ReLU(), nn.Conv2d(d, d, 3), nn.ReLU(), nn.ConvTranspose2d(d, 5, 2)
    )


class Conv1D(nn.Module):
    """A linear layer with an (in, out) weight, as in Hugging Face's GPT-2."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def in_out_layout(d: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Conv1D(128, d), nn.Tanh(), Conv1D(d, d), nn.Tanh(), Conv1D(d, 5))


def inputs(model: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if model == "tied":
        return torch.randint(17, (8, 6), generator=generator)
    return torch.randn(8, 2, 8, 8, generator=generator)


BUILD: dict[str, Callable[[int], nn.Module]] = {
    "tied": TiedLM,
    "conv": conv_readout,
    "transposed": transposed_readout,
    "in_out": in_out_layout,
}
WIDTHS = (64, 128, 256, 512)


def output_change(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """RMS of the change of the output by one step on a squared loss."""
    before = model(x)
    (before - 1).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        return (model(x) - before).square().mean().sqrt().item()


def slope(kind: str, ours: bool) -> float:
    """Log-log slope in width of the output's change after one step of Adam."""
    points = []
    for width in WIDTHS:
        logs = []
        for seed in range(4):
            torch.manual_seed(seed)
            model, x = BUILD[kind](width), inputs(kind)
            if ours:
                model = mupass.transform(model, x, base=WIDTHS[0])
                optimizer: torch.optim.Optimizer = torch.optim.Adam(
                    mupass.param_groups(model, 1e-3, optimizer="adam")
                )
            else:
                shapes = mup.shape.make_base_shapes(BUILD[kind](WIDTHS[0]), BUILD[kind](2 * WIDTHS[0]))
                mup.set_base_shapes(model, shapes, do_assert=False)
                optimizer = mup.optim.MuAdam(model.parameters(), lr=1e-3)
            logs.append(math.log(output_change(model, optimizer, x)))
        points.append(sum(logs) / len(logs))
    x_ = torch.tensor([math.log(w) for w in WIDTHS])
    y_ = torch.tensor(points)
    x_, y_ = x_ - x_.mean(), y_ - y_.mean()
    return ((x_ @ y_) / (x_ @ x_)).item()


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_flat_where_mup_is_not(kind: str) -> None:
    ours, theirs = slope(kind, ours=True), slope(kind, ours=False)
    assert abs(ours) <= 0.2, (ours, theirs)
    assert abs(theirs) >= 0.4, (ours, theirs)
