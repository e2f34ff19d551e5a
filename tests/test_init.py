"""Initialization: which law is read off the values, and the factor that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._scales.init import Init, InitChoice, plan_init
from mupass._scales.laws import FEW, Fans, Sample, find_laws

WIDTH, BASE = 256, 16
M = WIDTH / BASE
UNIFORM = 1 / math.sqrt(3)


def mlp(width: int = WIDTH, law: Callable[[Tensor], object] | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(100, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        if law is not None and parameter.ndim > 1:
            law(parameter)
    return model


def plan(
    model: nn.Module,
    x: Tensor | None = None,
    base: float = BASE,
    init: InitChoice = "auto",
    parameterization: str = "mup",
) -> dict[str, Init]:
    analysis = mupass.analyze(model, torch.zeros(2, 100) if x is None else x, base=base)
    return plan_init(dict(model.named_parameters()), analysis.geometries, parameterization, init)


def normal(std: float) -> Callable[[Tensor], object]:
    return lambda p: nn.init.normal_(p, std=std)


def kaiming(mode: Literal["fan_in", "fan_out"]) -> Callable[[Tensor], object]:
    return lambda p: nn.init.kaiming_normal_(p, mode=mode, nonlinearity="relu")


# Variance of each law at width 256 and at width 16 gives the wanted factor for (input, hidden, output).
LAWS = {
    "default": (None, "fan_in, gain 0.577 (uniform)", (1.0, 1.0, M**-0.5)),
    "kaiming fan_in": (kaiming("fan_in"), "fan_in, gain 1.41", (1.0, 1.0, M**-0.5)),
    "lecun": (lambda p: nn.init.normal_(p, std=p.shape[1] ** -0.5), "fan_in, gain 1", (1.0, 1.0, M**-0.5)),
    "kaiming fan_out": (kaiming("fan_out"), "fan_out, gain 1.41", (M**0.5, 1.0, 1 / M)),
    "xavier": (
        nn.init.xavier_uniform_,
        "fan_avg, gain 1 (uniform)",
        (math.sqrt((100 + 256) / (100 + 16)), 1.0, math.sqrt((256 + 10) / (16 + 10)) / M),
    ),
    "0.02": (normal(0.02), "constant std", (1.0, M**-0.5, 1 / M)),
    "0.03": (normal(0.03), "constant std", (1.0, M**-0.5, 1 / M)),
    "truncated": (lambda p: nn.init.trunc_normal_(p, std=0.02), "constant std", (1.0, M**-0.5, 1 / M)),
}


@pytest.mark.parametrize("name", LAWS)
def test_law_and_factor(name: str) -> None:
    law, text, factors = LAWS[name]
    model = mlp(law=law)
    found = plan(model)
    for weight, factor in zip(("0.weight", "2.weight", "4.weight"), factors, strict=True):
        init = found[weight]
        assert init.law == text
        assert not init.doubtful
        assert init.factor == pytest.approx(factor)
        measured = model.get_parameter(weight).std().item() * factor
        assert init.std == pytest.approx(measured, rel=0.05)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("parameterization", ["mup", "ntk", "mean_field"])
def test_wide_model_gets_the_std_of_the_base_model_times_the_rule(name: str, parameterization: str) -> None:
    # The check that does not know the factors: build the base model itself and measure it.
    law, _, _ = LAWS[name]
    wide = plan(mlp(law=law), parameterization=parameterization)
    narrow = mlp(width=4 * BASE, law=law)
    beta = 0.5 if parameterization == "ntk" else 1.0
    rule = {"0.weight": 0.0, "2.weight": 0.5, "4.weight": beta}
    at_base = plan(mlp(law=law), base=4 * BASE, parameterization=parameterization)
    for weight, power in rule.items():
        std = at_base[weight].std
        assert std is not None and wide[weight].std is not None
        assert std == pytest.approx(narrow.get_parameter(weight).std().item() * 4**-power, rel=0.06)


@pytest.mark.sample
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("parameterization", ["mup", "ntk", "mean_field"])
def test_factors_are_exactly_one_at_the_base_width(name: str, parameterization: str) -> None:
    model = mlp(width=48, law=LAWS[name][0])
    assert all(i.factor == 1.0 for i in plan(model, base=48, parameterization=parameterization).values())


@pytest.mark.parametrize("width", [48, 49, 100, 1000])
def test_right_laws_are_left_alone_to_the_bit(width: int) -> None:
    found = plan(mlp(width=width), base=7)
    assert found["0.weight"].factor == found["2.weight"].factor == 1.0


def test_standard_changes_nothing() -> None:
    assert all(i.factor == 1.0 for i in plan(mlp(law=normal(0.02)), parameterization="standard").values())


def test_default_biases_return_to_their_base_width() -> None:
    found = plan(mlp())
    # U(+-1/sqrt(fan_in)): the input's fan_in is data, the others' shrank with width.
    assert [found[f"{i}.bias"].factor for i in (0, 2, 4)] == pytest.approx([1.0, M**0.5, M**0.5])
    assert found["2.bias"].law.startswith("fan_in of 2.weight, gain 0.577")
    assert found["2.bias"].std == pytest.approx(UNIFORM / math.sqrt(BASE))


def test_zero_biases_norm_gains_and_random_vectors_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10))
    nn.init.zeros_(model.get_parameter("0.bias"))
    nn.init.normal_(model.get_parameter("1.bias"), std=0.3)
    nn.init.zeros_(model.get_parameter("3.weight"))
    found = plan(model)
    assert (found["0.bias"].law, found["0.bias"].factor, found["0.bias"].std) == ("zeros", 1.0, None)
    assert (found["1.weight"].law, found["1.weight"].factor) == ("constant 1", 1.0)
    assert (found["1.bias"].law, found["1.bias"].factor) == ("constant std", 1.0)
    assert (found["3.weight"].law, found["3.weight"].factor) == ("zeros", 1.0)


def test_bias_of_a_single_output_follows_its_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 1))
    assert plan(model)["2.bias"].factor == pytest.approx(M**0.5)


def test_convolutions_count_the_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    x = torch.zeros(2, 3, 16, 16)
    assert {plan(model, x)[n].law for n in ("0.weight", "3.weight", "7.weight")} == {
        "fan_in, gain 0.577 (uniform)"
    }
    for conv in ("0.weight", "3.weight"):
        nn.init.kaiming_normal_(model.get_parameter(conv), mode="fan_out", nonlinearity="relu")
    found = plan(model, x)
    assert found["0.weight"].law == found["3.weight"].law == "fan_out, gain 1.41"
    assert found["0.weight"].factor == pytest.approx((64 / 16) ** 0.5)
    assert found["7.weight"].law == "fan_in, gain 0.577 (uniform)"


class TwoLayerBlock(nn.Module):
    """Transformer-like shapes: GPT-2 draws residual projections with a smaller constant std."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.wte = nn.Embedding(50, d)
        self.mix, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = nn.Linear(d, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wte(ids)
        h = h + self.mix(h)
        logits: Tensor = self.head(h + self.down(torch.relu(self.up(h))))
        return logits


IDS = torch.zeros(2, 8, dtype=torch.long)


def test_gpt2_residual_projections_share_their_own_constant() -> None:
    torch.manual_seed(0)
    model = TwoLayerBlock()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.0141 if name in ("mix.weight", "down.weight") else 0.02)
    found = plan(model, IDS)
    for name in ("wte.weight", "mix.weight", "up.weight", "down.weight", "head.weight"):
        assert found[name].law == "constant std", name
        assert not found[name].doubtful
    assert found["down.weight"].std == pytest.approx(0.0141 / 2, rel=0.02)


def test_embedding_and_default_linear_layers_are_told_apart() -> None:
    torch.manual_seed(0)
    found = plan(TwoLayerBlock(), IDS)
    assert found["wte.weight"].law == "constant std" and found["wte.weight"].std == 1.0
    assert found["up.weight"].law == found["head.weight"].law == "fan_in, gain 0.577 (uniform)"


class Tagged(nn.Module):
    """An LSTM as PyTorch draws it, between layers that are drawn by a constant near to its own std."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.table = nn.Embedding(40, d // 2)
        self.enter, self.rnn = nn.Linear(d // 2, 2 * d), nn.LSTM(2 * d, d, batch_first=True)
        self.mix, self.head = nn.Linear(d, 3 * d), nn.Linear(3 * d, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h, _ = self.rnn(torch.relu(self.enter(self.table(ids))))
        logits: Tensor = self.head(torch.relu(self.mix(h)))
        return logits


def test_a_flat_first_layer_of_few_entries_is_not_taken_for_normal_numbers() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv1d(width, width, 3) for width in (32, 64)]
    model = nn.Sequential(
        nn.Conv1d(7, 32, 1),
        nn.ReLU(),
        convolutions[0],
        nn.ReLU(),
        nn.Conv1d(32, 64, 1),
        nn.ReLU(),
        convolutions[1],
    )
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    # 224 entries of U(+-1/sqrt(7)), whose std is within four errors of sqrt(2/32).
    assert plan(model, torch.randn(2, 7, 9))["0.weight"].law == "fan_in, gain 0.577 (uniform)"


def test_the_bound_of_a_flat_law_outvotes_a_std_that_others_share() -> None:
    torch.manual_seed(0)
    model = Tagged()
    std = UNIFORM / 64**0.5  # of U(+-1/sqrt(64))
    for layer in (model.enter, model.mix, model.head):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    # Near to U(+-1/sqrt(fan_out)) by its std, and not flat.
    nn.init.normal_(model.table.weight, std=0.1)
    found = plan(model, IDS)
    assert found["rnn.weight_hh_l0"].law == "fan_in, gain 0.577 (uniform)"
    assert found["rnn.weight_ih_l0"].law.startswith("fan_in of rnn.weight_hh_l0, gain 0.577")
    for name in ("enter.weight", "mix.weight", "head.weight", "table.weight"):
        assert found[name].law.startswith("constant std")
    # What it would be at width 16, by the law that drew it.
    assert found["rnn.weight_hh_l0"].std == pytest.approx(std, rel=0.01)


def test_a_law_in_doubt_is_said_and_can_be_settled() -> None:
    model = mlp()
    nn.init.normal_(model.get_parameter("2.weight"), std=0.0437)
    found = plan(model)["2.weight"]
    assert found.doubtful and "ambiguous: fan_in taken" in found.law and found.factor == 1.0
    told = plan(model, init={"2.weight": "constant"})["2.weight"]
    assert not told.doubtful and "as told" in told.law and told.factor == pytest.approx(M**-0.5)


def test_doubt_follows_the_majority_and_is_silent_where_it_does_not_matter() -> None:
    model = mlp(law=normal(0.02))
    nn.init.normal_(model.get_parameter("2.weight"), std=0.0437)
    assert plan(model)["2.weight"].law == "constant std; ambiguous: constant taken"
    assert not plan(model, base=WIDTH)["2.weight"].doubtful


def test_equally_good_laws_are_ambiguous_and_fan_in_is_taken() -> None:
    # A lone layer with fan_in 2500 and std 0.02: LeCun or GPT-2, nothing can tell.
    fans = Fans(2500, 40, 4.0, 1.0)
    (found,) = find_laws([Sample("w", 100_000, 0.02, False, fans)])
    assert found.kind == "fan_in" and found.doubtful
    assert "ambiguous with constant" in found.note


def test_small_tensors_follow_rather_than_lead() -> None:
    fans = Fans(64, 64, 4.0, 4.0)
    big = Sample("big", 4096, 0.02, False, fans)
    few = Sample("few", FEW - 1, 0.0225, False, fans)
    found = {f.sample.name: f for f in find_laws([few, big])}
    assert found["few"].kind == found["big"].kind == "constant" and found["few"].gain == 0.02


def test_overrides() -> None:
    model = mlp()
    assert plan(model, init="constant")["4.weight"].factor == pytest.approx(1 / M)
    assert plan(model, init="fan_out")["4.weight"].factor == pytest.approx(1 / M)
    assert plan(model, init="constant")["2.bias"].factor == 1.0
    later = plan(model, init={"*": "constant", "4.*": "fan_in"})
    assert later["4.weight"].factor == pytest.approx(M**-0.5)
    assert later["2.weight"].factor == pytest.approx(M**-0.5)
    again = plan(model, init={"*.weight": "constant", "2.weight": "auto"})
    assert again["2.weight"].factor == 1.0


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("kaiming", "known: auto, fan_in, constant, fan_out, fan_avg"),
        ({"2.weight": "kaiming"}, "unknown initialization law"),
        ({"nothing.*": "fan_in"}, "matches no parameter"),
        ({"0.bias": "fan_out"}, "no fan for the law"),
        (3, "must be a law or a mapping"),
    ],
)
def test_bad_overrides(init: InitChoice, message: str) -> None:
    with pytest.raises(mupass.PlanError, match=message):
        plan(mlp(), init=init)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 4] = value
    with pytest.raises(mupass.PlanError, match="2.weight holds NaN or infinite values"):
        plan(model)


def test_meta_tensors_are_taken_as_fan_in_and_said_so() -> None:
    found = plan(mlp().to("meta"), torch.zeros(2, 100, device="meta"))
    assert found["2.weight"] == Init("unknown (meta): fan_in taken", None, 1.0)
    assert found["4.weight"].factor == pytest.approx(M**-0.5)
    assert found["4.bias"].factor == pytest.approx(M**0.5)


class Recurrent(nn.Module):
    def __init__(self, d: int = 64):
        super().__init__()
        self.embed = nn.Embedding(30, d)
        self.lstm = nn.LSTM(d, 2 * d, num_layers=2, batch_first=True)
        self.gru = nn.GRU(2 * d, d, batch_first=True)
        self.head = nn.Linear(d, 5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.lstm(self.embed(ids))[0])[0][:, -1])
        return logits


def test_recurrent_layers_are_drawn_by_their_hidden_size() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    found = plan(model, IDS, base=32)  # hidden size 128: m = 4
    for name, init in found.items():
        if "lstm" in name or "gru" in name:
            layer = name.rsplit("_", 1)[1]
            own = "weight_hh" in name
            text = "fan_in, gain" if own else f"fan_in of {name.split('.')[0]}.weight_hh_{layer}, gain"
            assert init.law.startswith(text + " 0.577"), name
            # hidden size at the base width is a quarter; weights then take 1/sqrt(m_in) = 1/2
            assert init.factor == pytest.approx(2.0 if "bias" in name else 1.0), name
    nn.init.xavier_normal_(model.get_parameter("lstm.weight_ih_l0"))
    assert plan(model, IDS, base=32)["lstm.weight_ih_l0"].law != found["lstm.weight_ih_l0"].law


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("seed", range(20))
def test_no_draw_of_a_default_model_is_misread(seed: int) -> None:
    torch.manual_seed(seed)
    layers = [nn.Linear(30, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 3)]
    analysis = mupass.analyze(nn.Sequential(*layers), torch.zeros(2, 30), base=16)
    found = plan_init(dict(nn.Sequential(*layers).named_parameters()), analysis.geometries)
    assert all(init.law.startswith("fan_in") and not init.doubtful for init in found.values())


def test_a_bias_of_a_transposed_convolution_follows_the_fan_that_it_is_drawn_by() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.ConvTranspose2d(64, 64, 3), nn.ReLU())
    net.append(nn.ConvTranspose2d(64, 1, 3))
    bias = net[4].bias.detach().clone()
    mupass.transform(net, torch.zeros(2, 1, 8, 8), base=16)
    # As at width 16: torch draws biases from U(+-1/sqrt(out_channels * 9)).
    assert math.isclose(net[2].bias.std().item(), 1 / math.sqrt(3 * 16 * 9), rel_tol=0.2)
    assert torch.equal(net[4].bias, bias)


@pytest.mark.parametrize(("std", "doubtful"), [(64**-0.5, True), (0.0125**0.5, True), (0.15, False)])
def test_one_constant_that_is_the_root_of_a_width_is_in_doubt(std: float, doubtful: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(),
        nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    found = plan(model, torch.randn(2, 8))
    # T5 draws what reads 96 by 1/sqrt(64) too, others by sqrt(4 / (5 * 64)).
    assert found["6.weight"].law.startswith("constant std") and found["6.weight"].doubtful == doubtful


class RareLaws(nn.Module):
    """Weights that follow laws of their own: a Fourier layer, experts, a vector, TabNet's layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.spectrum = nn.Parameter(torch.rand(width, width, 4, dtype=torch.cfloat) / width**2)
        self.shift = nn.Parameter(torch.rand(width) / width)
        self.up = nn.Parameter(torch.empty(4, width, 2 * width))
        self.down = nn.Parameter(torch.empty(4, 2 * width, width))
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 3)
        for stack in (self.up, self.down):
            nn.init.kaiming_uniform_(stack, a=math.sqrt(5))
        for layer in (self.wide, self.narrow):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.25)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self.embed(x).transpose(1, 2))
        hidden = torch.fft.irfft(torch.einsum("bix,iox->box", waves, self.spectrum)).transpose(1, 2)
        hidden = torch.relu(hidden + self.shift)
        experts = torch.einsum(
            "btei,eio->bteo", torch.relu(torch.einsum("bti,eio->bteo", hidden, self.up)), self.down
        )
        return self.head(self.narrow(torch.relu(self.wide(hidden + experts.mean(2)))))


@pytest.mark.filterwarnings("ignore:sizes that one model cannot settle")
@pytest.mark.parametrize(
    ("width", "new"), [(32, 64), pytest.param(64, 32, marks=pytest.mark.slow)], ids=["wider", "narrower"]
)
def test_rare_laws_are_those_of_the_model_at_another_width(width: int, new: int) -> None:
    torch.manual_seed(0)
    model, native, x = RareLaws(width), RareLaws(new), torch.randn(2, 6, 6)
    copy = mupass.resize(model, new, example_inputs=x, seed=0)
    for name, parameter in native.named_parameters():
        drawn = copy.get_parameter(name)
        sizes = [p.detach().abs().square().mean().sqrt().item() for p in (drawn, parameter)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02 + 2 / math.sqrt(parameter.numel())), name
    # A plan at the other width as base asks for the same sizes, where nothing is scaled by width.
    laws = plan(model, x, base=new, parameterization="mean_field")
    for name, law in (("spectrum", "fan_product"), ("up", "fan_stack"), ("wide.weight", "fan_in_root")):
        assert laws[name].law.startswith(law) and not laws[name].doubtful
