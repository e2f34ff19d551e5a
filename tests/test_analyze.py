"""The arguments of analyze: base widths, overrides by name, and refusals that come before any capture."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass


class Heads(nn.Module):
    """Attention whose head_dim is an axis of no parameter."""

    def __init__(self, d: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.inp, self.qkv, self.out = nn.Linear(5, d), nn.Linear(d, 3 * d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.inp(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


X = torch.zeros(2, 4, 5)


def test_an_override_by_name_reaches_a_factor_that_no_parameter_carries() -> None:
    fixed = mupass.analyze(Heads(), X)
    assert not any("head_dim grows" in w for w in fixed.warnings)
    grown = mupass.analyze(Heads(), X, dims={"head_dim": "infinite"})
    assert any("head_dim grows" in w for w in grown.warnings)
    assert [g.infinite for g in grown.geometries] == [g.infinite for g in fixed.geometries]


def test_an_analysis_is_read_like_a_plan() -> None:
    model = Heads()
    found = mupass.analyze(model, X)
    assert list(found) == [name for name, _ in model.named_parameters()] and len(found) == len(list(found))
    assert "qkv.weight" in found and "kqv.weight" not in found and 0 not in found


def test_an_override_by_parameter_axis() -> None:
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    found = mupass.analyze(net, dims={r"2\.weight:0": "finite"})
    assert found["2.weight"].infinite == (False, True) and found["4.weight"].role == "scalar"


@pytest.mark.parametrize("base", [0, -1, float("nan"), float("inf"), True, "wide", {"0.out": -2}])
def test_base_must_be_a_positive_number(base: object) -> None:
    with pytest.raises(mupass.InferenceError, match="positive"):
        mupass.analyze(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), base=base)  # type: ignore[arg-type]


def test_base_by_dimension_name_and_by_second_instance() -> None:
    named = mupass.analyze(Heads(), X, base={"d_model": 6, "heads": 0.75})
    second = mupass.analyze(Heads(48, 6), X, base=Heads(24, 3))
    assert named["qkv.weight"].m_in == 4 and second["qkv.weight"].m_in == 2
    assert named["qkv.weight"].m_out == 4 and second["qkv.weight"].m_out == 2
    with pytest.raises(mupass.InferenceError, match="names no dimension 'nope'"):
        mupass.analyze(Heads(), X, base={"nope": 3})
    with pytest.raises(mupass.InferenceError, match="not the same architecture"):
        mupass.analyze(Heads(), X, base=nn.Linear(3, 4))
    with pytest.raises(mupass.InferenceError, match="same width"):
        mupass.analyze(Heads(), X, base=Heads())


def test_refusals_before_capture_say_the_real_reason() -> None:
    with pytest.raises(mupass.CaptureError, match="ReLU has no parameters"):
        mupass.analyze(nn.ReLU())
    with pytest.raises(mupass.CaptureError, match="lazy module"):
        mupass.analyze(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))
    with pytest.raises(mupass.InferenceError, match="no dimension of Linear grows"):
        mupass.analyze(nn.Linear(5, 3))


def test_kfac_says_when_it_can_take_nothing() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(16, 5)), nn.Parameter(torch.randn(2, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(F.linear(x, self.first.sin())), self.second.sin())

    model = mupass.transform(Computed(), torch.randn(4, 5))
    with pytest.warns(UserWarning, match="can take no parameter of this model; all go to adamw"):
        optimizer = mupass.KFAC(model, 0.1)
    assert {c.treatment for c in optimizer.coverage()} == {"adamw"}


class Packed(nn.Module):
    """nn.MultiheadAttention: head_dim is an axis of no parameter, and its scale is the kernel's."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(5, d), nn.MultiheadAttention(d, heads, batch_first=True)
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_second_instance_tells_whether_heads_or_head_dim_grows(device: str) -> None:
    with torch.device(device):
        more_heads, wider_heads = Packed(16, 2), Packed(16, 4)
    assert mupass.analyze(Packed(32, 4), X, base=more_heads).scores == ()
    (scale,) = mupass.analyze(Packed(32, 4), X, base=wider_heads).scores
    assert (scale.module, scale.growth) == ("attention", 2)


def test_copies_that_one_instance_makes_are_no_difference_to_a_second() -> None:
    class Copying(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    def grown(base: nn.Module) -> list[float]:
        return [scale.growth for scale in mupass.analyze(Packed(32, 4), X, base=base).scores]

    assert grown(Copying(16, 2)) == [] and grown(Copying(16, 4)) == [2]


def test_a_second_instance_that_runs_other_operators_settles_parameters_only() -> None:
    class Deeper(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, d), nn.Linear(d, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.head(x.relu() if x.shape[-1] > 8 else x.relu().relu())

    analysis = mupass.analyze(Deeper(16), X, base=Deeper(8))
    assert analysis["head.weight"].infinite == (False, True) and analysis["head.weight"].m_in == 2
    assert any(
        "settles parameter axes, but no factors of them, since it runs" in w for w in analysis.warnings
    )
