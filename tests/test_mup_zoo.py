"""Scales beside those of the `mup` package (base and delta models), where it is right and where not."""

import importlib
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mup")
    import mup
    import mup.optim
    import mup.shape

from zoo import plain_dense, plain_sequence, plain_vision
from zoo.analyses import beside_a_second
from zoo.case import Case

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rates_equal_mups_below_the_readout(case: Case, optimizer: str) -> None:
    compare(case, optimizer)


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
    analysis = beside_a_second(case)
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


class Packed(nn.Module):
    """nn.MultiheadAttention, whose query, key and value weights are one parameter.

    With ``mended`` logits are divided by head_dim (times a constant), not by its root.
    """

    def __init__(
        self, d: int, heads: int, readout: type[nn.Linear] = nn.Linear, mended: bool = False
    ) -> None:
        super().__init__()
        self.mended = mended
        self.enter, self.attention = nn.Linear(8, d), nn.MultiheadAttention(d, heads, batch_first=True)
        self.mix, self.head = nn.Linear(d, d), readout(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.attend(x) if self.mended else self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.mix(x + y).tanh())

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, scale=4 / q.shape[-1])
        return self.attention.out_proj(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> list[Tensor]:
        packed = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        return [t.unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2) for t in packed.chunk(3, -1)]

    def logits(self, x: Tensor) -> Tensor:
        """Attention scores before the softmax."""
        q, k, _ = self.split(self.enter(x))
        return q @ k.transpose(-1, -2) * (4 / q.shape[-1] if self.mended else q.shape[-1] ** -0.5)


def inputs(model: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if model == "tied":
        return torch.randint(17, (8, 6), generator=generator)
    return torch.randn(8, 2, 8, 8, generator=generator)


def hugging_face_layout(d: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D as Layer

    return nn.Sequential(nn.Flatten(), Layer(d, 128), nn.Tanh(), Layer(d, d), nn.Tanh(), Layer(5, d))


BUILD: dict[str, Callable[[int], nn.Module]] = {
    "hugging_face": hugging_face_layout,
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


def log_slope(points: list[float]) -> float:
    """Slope of the logarithm of a quantity over that of the width."""
    x, y = torch.tensor([math.log(w) for w in WIDTHS]), torch.tensor(points).log()
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def slope(kind: str, ours: bool) -> float:
    """Log-log slope in width of the output's change after one step of Adam."""
    points = []
    for width in WIDTHS:
        changes = []
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
            changes.append(output_change(model, optimizer, x))
        points.append(math.prod(changes) ** 0.25)
    return log_slope(points)


@pytest.mark.parametrize("kind", [k for k in sorted(BUILD) if k != "hugging_face"])
def test_flat_where_mup_is_not(kind: str) -> None:
    flat_where_mup_is_not(kind)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")  # of other people's model code
def test_flat_where_mup_is_not_for_the_layers_of_gpt2() -> None:
    pytest.importorskip("transformers")
    flat_where_mup_is_not("hugging_face")


def flat_where_mup_is_not(kind: str) -> None:
    ours, theirs = slope(kind, ours=True), slope(kind, ours=False)
    assert abs(ours) <= 0.2, (ours, theirs)
    assert abs(theirs) >= 0.4, (ours, theirs)


# Packed attention: mup is right while heads grow; where head_dim grows, its code has to be changed for it.


def attention_slopes(
    optimizer: str, heads: Callable[[int], int], ours: bool, mended: bool = False, beside: bool = False
) -> tuple[float, float]:
    """Slopes in width of what one step changes: the output, and the logits of attention.

    ``beside`` a second instance head_dim is known to grow.
    """
    x = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(1))
    lr = {"adam": 1e-2, "sgd": 0.1}[optimizer]
    outputs, logits = [], []
    for width in WIDTHS:
        changes = []
        for seed in range(4):
            torch.manual_seed(seed)
            if ours:
                base = Packed(WIDTHS[0] // 2, heads(WIDTHS[0]), mended=mended) if beside else WIDTHS[0]
                model: Packed = mupass.transform(Packed(width, heads(width), mended=mended), x, base=base)
                factor = math.prod(scale.factor for scale in model.mupass_plan.scores)
                make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
                step: torch.optim.Optimizer = make(mupass.param_groups(model, lr, optimizer=optimizer))
            else:
                model, narrow, wide = (
                    Packed(d, heads(d), mup.MuReadout, mended) for d in (width, WIDTHS[0], 2 * WIDTHS[0])
                )
                factor = 1.0
                mup.set_base_shapes(model, mup.shape.make_base_shapes(narrow, wide), do_assert=False)
                step = {"adam": mup.optim.MuAdam, "sgd": mup.optim.MuSGD}[optimizer](
                    model.parameters(), lr=lr
                )
            before = model.logits(x).detach()
            outputs_change = output_change(model, step, x)
            change = factor * (model.logits(x) - before)
            changes.append((outputs_change, change.square().mean().sqrt().item()))
        outputs.append(math.prod(a for a, _ in changes) ** 0.25)
        logits.append(math.prod(b for _, b in changes) ** 0.25)
    return log_slope(outputs), log_slope(logits)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_packed_attention_with_more_heads_is_flat_as_in_mup(optimizer: str) -> None:
    ours = attention_slopes(optimizer, lambda d: d // 16, ours=True)
    theirs = attention_slopes(optimizer, lambda d: d // 16, ours=False)
    assert all(abs(s) <= 0.15 for s in (*ours, *theirs)), (ours, theirs)
    assert ours == pytest.approx(theirs, abs=0.05)


def test_packed_attention_with_wider_heads_gets_another_scale() -> None:
    ours = attention_slopes("adam", lambda d: 4, ours=True, beside=True)
    theirs = attention_slopes("adam", lambda d: 4, ours=False)
    assert all(abs(s) <= 0.15 for s in ours), ours
    assert abs(theirs[0]) <= 0.15  # the output, behind a softmax
    assert theirs[1] >= 0.3, theirs  # mup leaves 1 / sqrt(head_dim)
    mended = attention_slopes("adam", lambda d: 4, ours=True, mended=True)
    assert all(abs(s) <= 0.15 for s in mended), mended
    analysis = mupass.analyze(
        Packed(128, 4, mended=True), torch.randn(2, 6, 8), base=Packed(64, 4, mended=True)
    )
    assert not analysis.scores and not any("1/sqrt(head_dim)" in w for w in analysis.warnings)
