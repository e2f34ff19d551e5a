"""coord_check passes muP, fails the standard parameterization, and names planted faults."""

import gc
import math
import weakref
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.plain_dense import CASES as DENSE

import mupass
from mupass._rewrite import InputMultiplier
from mupass._runs.batches import Batch, cross_entropy, logits_of
from mupass._runs.copies import default_widths
from mupass._study.probe import Probe, _along, rms
from mupass._study.recorder import OUTPUT, Site
from mupass._study.slopes import fit, student

OPTIMIZERS = ["adam", "sgd", "shampoo", "kfac"]
VOCAB, LENGTH = 30, 8
WIDTHS = [64, 128, 256]


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)
    )


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 12, generator=generator), torch.randint(5, (16,), generator=generator)


class TinyLM(nn.Module):
    """A language model with a tied readout and one attention block."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(VOCAB, width)
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.last(x + self.out(y.transpose(1, 2).flatten(2))))


class Normed(TinyLM):
    """With norms of queries and keys, whose parameters all heads share."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__(width, heads)
        self.of_q, self.of_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.of_q(q), self.of_k(k), v, is_causal=True)
        return self.head(self.last(x + self.out(y.transpose(1, 2).flatten(2))))


LAW = {"tokens.*": "constant"}  # one draw of 30 rows leaves the law in doubt


def text() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.thin(2)
@pytest.mark.sample("mlp-vectors-auto-adam")
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "soap", "muon"])
@pytest.mark.parametrize(("build", "data", "init"), [(mlp, vectors, "auto"), (TinyLM, text, LAW)])
def test_mup_passes_and_standard_fails(build, data, init, optimizer: str) -> None:
    mup = mupass.coord_check(build(), data(), init=init, optimizer=optimizer)
    assert mup.ok and mup.verdict().startswith("PASS"), str(mup)
    assert mup.widths == (64, 128, 256)
    standard = mupass.coord_check(
        build(), data(), init=init, optimizer=optimizer, parameterization="standard"
    )
    assert not standard.ok and "standard parameterization" in standard.verdict(), str(standard)


ZOO = [("deep_sets", "adam"), ("deep_sets", "kfac"), ("actor_critic", "adam"), ("mixture_of_experts", "adam")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), ZOO)
def test_other_architectures(name: str, optimizer: str) -> None:
    case = DENSE[name]
    model, inputs = case.build(1), case.inputs()
    shape = logits_of(model(*inputs[0], **inputs[1])).shape
    data = (inputs, torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def loss(output: object, targets: Tensor) -> Tensor:
        return F.mse_loss(logits_of(output), targets)

    settings = {"loss": loss, "optimizer": optimizer, "steps": 2, "seeds": 2}
    assert mupass.coord_check(model, data, **settings).ok
    assert not mupass.coord_check(model, data, **settings, parameterization="standard").ok


def test_the_model_is_left_alone() -> None:
    model = TinyLM()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    mupass.coord_check(model, text(), widths=[32, 64], steps=1, init=LAW)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not hasattr(model, "mupass_plan")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_a_missing_readout_multiplier_is_named() -> None:
    def remove(model: nn.Module) -> nn.Module:
        hooks = model.head._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, InputMultiplier):
                del hooks[key]
                del model.head._forward_pre_hooks_with_kwargs[key]
        return model

    for optimizer in ("adam", "sgd"):
        with pytest.warns(mupass.MupassWarning, match="head had a multiplier of mupass.transform"):
            found = mupass.coord_check(TinyLM(), text(), optimizer=optimizer, init=LAW, prepare=remove)
        assert found.first.site == Site("head", "linear", "tokens.weight"), str(found)
        assert found.first.slope.power > 0.4
        assert "lacks its multiplier 1/m" in found.blame


def swapped(layer: str):
    """Adam with the axes of one layer mixed up."""

    def make(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
        groups = mupass.param_groups(model, lr, optimizer="adam")
        weight = model.get_parameter(layer)
        geometry = model.mupass_plan[layer].geometry
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not weight]
        groups.append({"params": [weight], "lr": lr / geometry.m_out})  # Adam's rule is 1/m_in
        return torch.optim.Adam([g for g in groups if g["params"]])

    return make


@pytest.mark.sample("4.weight-1")
@pytest.mark.parametrize(("layer", "power"), [("0.weight", -1), ("4.weight", 1)])
def test_a_wrong_fan_axis_is_named(layer: str, power: int) -> None:
    found = mupass.coord_check(mlp, vectors(), widths=WIDTHS, optimizer=swapped(layer))
    assert found.first.site.parameter == layer and found.first.quantity in ("update", "aligned"), str(found)
    assert found.first.slope.power == pytest.approx(power, abs=0.15)
    assert "as if fan_in were fan_out" in found.blame
    assert {r.site.parameter for r in found.failures if r.step == 1} == {layer}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mupass.KFAC. zero traces")
@pytest.mark.parametrize("build", [mlp, lambda: bottleneck()])
def test_what_a_zero_readout_hides_at_first_is_judged_at_the_next_step(build) -> None:
    model = build()
    nn.init.zeros_(model[-1].weight)
    dims = FIXED if isinstance(model[-3], nn.Linear) and model[-3].in_features == 3 else None
    found = mupass.coord_check(model, vectors(), dims=dims, optimizer=swapped("0.weight"))
    assert {(r.site.parameter, r.step) for r in found.failures} >= {("0.weight", 2)}, str(found)
    assert found.first.site.parameter == "0.weight" and "as if fan_in were fan_out" in found.blame
    assert found.first.slope.power == pytest.approx(-1, abs=0.3)
    for optimizer in OPTIMIZERS:
        found = mupass.coord_check(model, vectors(), dims=dims, optimizer=optimizer)
        assert found.ok, str(found)


@pytest.mark.slow
def test_an_attention_scale_that_does_not_follow_head_dim_is_named() -> None:
    class Called(TinyLM):
        """Its code multiplies by the weight of queries itself, so that no module can give the factor."""

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            h = self.norm(x)
            parts = (F.linear(h, self.q.weight), self.k(h), self.v(h))
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.head(self.last(x + self.out(y.transpose(1, 2).flatten(2))))

    with pytest.warns(mupass.MupassWarning, match="head_dim grows"):
        found = mupass.coord_check(lambda width: Called(width, heads=2), text(), widths=[64, 128, 256, 512])
    assert found.first.site.operator == "scaled_dot_product_attention", str(found)
    assert found.first.quantity == "reach" and found.first.slope.power == pytest.approx(0.5, abs=0.1)
    assert "head_dim grows (32 to 256)" in found.blame and "1/head_dim" in found.blame
    # Where a module puts queries out, the factor is there and nothing grows.
    reached = mupass.coord_check(lambda width: TinyLM(width, heads=2), text(), widths=[64, 128, 256, 512])
    assert reached.ok, str(reached)
    by_heads = mupass.coord_check(
        lambda width: TinyLM(width, heads=width // 16), text(), widths=[64, 128, 256, 512], lr=0.02
    )
    assert by_heads.ok, str(by_heads)


def bottleneck(width: int = 64) -> nn.Module:
    """A readout in the middle: what comes out of it, and the gradient that comes back, start near zero."""
    halves = [(12, width), (width, 3), (3, width), (width, 5)]
    return nn.Sequential(*(layer for a, b in halves for layer in (nn.Linear(a, b), nn.Tanh())))[:-1]


FIXED = {"2.weight:0": "finite"}


@pytest.mark.slow
def test_below_a_readout_in_the_middle_the_first_step_is_judged_relative_to_the_gradient() -> None:
    below = {"0.weight", "0.bias", "2.weight", "2.bias"}
    for optimizer in ("sgd", "adam", "shampoo"):
        found = mupass.coord_check(bottleneck(), vectors(), dims=FIXED, optimizer=optimizer)
        assert found.ok, str(found)
        assert {s.parameter for s in found.dimmed} == below and "hides the loss" in str(found)
        relative = {r.site.parameter for r in found.rows if r.rule == "relative"}
        assert optimizer != "sgd" or relative == below

    def unscaled(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
        groups = mupass.param_groups(model, lr, optimizer="sgd")
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not model[0].weight]
        return torch.optim.SGD([*groups, {"params": [model[0].weight], "lr": lr}])

    found = mupass.coord_check(bottleneck(), vectors(), dims=FIXED, optimizer=unscaled)
    assert {r.site.parameter for r in found.failures} == {"0.weight"}, str(found)
    assert "its learning rate scales like width^+0.00" in found.blame
    assert mupass.coord_check(bottleneck(), vectors(), dims=FIXED, optimizer="kfac").ok

    def bare(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
        return mupass.KFAC(model, lr, 1.0, momentum=0.0, damping_floor=0.0, fallback="sgd", fallback_lr=lr)

    kfac = mupass.coord_check(
        bottleneck(), vectors(), dims=FIXED, optimizer=bare, widths=[64, 256, 1024], steps=1, seeds=4
    )
    row = next(r for r in kfac.rows if r.site.parameter == "0.weight" and r.quantity == "update")
    assert row.slope.power > 0.3  # 1/sqrt(m) of the gradient, divided by its square
    assert {r.site.parameter for r in kfac.failures} <= below
    assert kfac.ok or "K-FAC divides by the square" in kfac.blame
    standard = mupass.coord_check(
        bottleneck(),
        vectors(),
        dims=FIXED,
        optimizer="sgd",
        parameterization="standard",
        widths=[64, 256, 1024],
        steps=1,
    )
    assert not standard.ok and not standard.dimmed


def test_a_constant_initialization_is_named() -> None:
    def constant(model: nn.Module) -> nn.Module:
        nn.init.normal_(model[2].weight, std=0.1)
        return model

    found = mupass.coord_check(mlp, vectors(), widths=WIDTHS, prepare=constant)
    assert found.first.site == Site("2", "linear", "2.weight") and found.first.quantity == "activation"
    assert found.first.slope.power == pytest.approx(0.5, abs=0.1)
    assert "initialization" in found.blame and "width^-0.5" in found.blame


def test_a_probe_leaves_nothing_behind() -> None:
    x, y = vectors()
    probe = Probe(mlp(), Batch((x,), {}, y), cross_entropy)
    assert probe.first.slopes
    first = weakref.ref(probe.first)
    del probe
    gc.collect()
    assert first() is None


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_all_heads_share_may_move_less_along_the_gradient(optimizer: str) -> None:
    found = mupass.coord_check(Normed(), text(), init=LAW, optimizer=optimizer)
    assert found.ok, str(found)
    rules = {
        row.rule for row in found.rows if row.site.parameter == "of_q.weight" and row.quantity == "aligned"
    }
    assert rules == {"bounded"}


def test_a_normalization_to_unit_length_is_undone_where_it_is_seen_and_named_where_not() -> None:
    class Unit(nn.Module):
        def __init__(self, seen: bool, width: int) -> None:
            super().__init__()
            self.seen = seen
            self.enter, self.mid = nn.Linear(12, width), nn.Linear(width, width)
            self.head = nn.Linear(width, 5)
            nn.init.zeros_(self.mid.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            unit = F.normalize(x, dim=-1) if self.seen else x * x.square().sum(-1, keepdim=True).rsqrt()
            return self.head(torch.relu(self.mid(unit)))

    settings = {"widths": WIDTHS, "steps": 1}
    for optimizer in ("adam", "sgd"):
        found = mupass.coord_check(lambda w: Unit(True, w), vectors(), optimizer=optimizer, **settings)
        assert found.ok, str(found)
    found = mupass.coord_check(lambda w: Unit(False, w), vectors(), **settings)
    assert found.first.site.parameter == "mid.weight"
    assert "normalization to unit length" in found.blame


class Raw(nn.Module):
    """Parameters in many kinds of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 5, 3, padding=1)
        self.norm = nn.BatchNorm1d(5)
        self.w, self.shift = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))
        self.rnn = nn.GRU(7, 4, batch_first=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        x = torch.einsum("bld,md->blm", x + self.shift, self.w)
        return self.head(self.drop(self.rnn(x)[0][:, -1]))


def test_the_probe_sees_what_each_parameter_does() -> None:
    model = Raw().double()
    ids = torch.randint(9, (4, 10))
    targets = torch.randn(4, 3).double()
    inputs: dict[str, Tensor] = {}

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().sum()

    for name in ("table", "conv", "norm", "rnn", "head"):
        getattr(model, name).register_forward_pre_hook(lambda m, a, name=name: inputs.update({name: a[0]}))
    probe = Probe(model, Batch((ids,), {}, targets), loss)
    start = {n: x.detach().clone() for n, x in inputs.items()}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    running = model.norm.running_mean.clone()
    found = {(s.module, s.operator, s.parameter): v for s, q, v in probe.now() if q == "update"}
    moved = {n: p.detach() - old[n] for n, p in model.named_parameters()}

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    assert torch.equal(model.norm.running_mean, running)
    assert found["table", "embedding", "table.weight"] == pytest.approx(rms(moved["table.weight"][ids]))
    y = F.conv1d(start["conv"], moved["conv.weight"], padding=1)
    assert found["conv", "conv1d", "conv.weight"] == pytest.approx(rms(y))
    assert found["conv", "conv1d", "conv.bias"] == pytest.approx(rms(moved["conv.bias"]))
    x = start["norm"]
    normal = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    assert found["norm", "batch_norm", "norm.weight"] == pytest.approx(
        rms(normal * moved["norm.weight"][:, None])
    )
    assert found["", "add", "shift"] == pytest.approx(rms(moved["shift"]))
    h = (normal * old["norm.weight"][:, None] + old["norm.bias"][:, None]).transpose(1, 2) + old["shift"]
    assert found["", "einsum", "w"] == pytest.approx(rms(h @ moved["w"].T))
    assert found["head", "linear", "head.weight"] == pytest.approx(
        rms(start["head"] @ moved["head.weight"].T)
    )
    along = {s.parameter: v for s, q, v in probe.now() if q == "aligned"}
    slope = 2 * (start["head"] @ old["head.weight"].T + old["head.bias"] - targets)
    y = start["head"] @ moved["head.weight"].T
    assert along["head.weight"] == pytest.approx(abs((y * slope).sum() / slope.norm()).item() / 12**0.5)
    hidden = nn.GRU(7, 4, batch_first=True).double()
    hidden.load_state_dict({n[4:]: v for n, v in old.items() if n.startswith("rnn.")})
    before = hidden(start["rnn"])[0]
    hidden.weight_hh_l0.data.add_(moved["rnn.weight_hh_l0"])
    assert found["rnn", "gru", "rnn.weight_hh_l0"] == pytest.approx(rms(hidden(start["rnn"])[0] - before))


def test_a_module_that_runs_twice_has_two_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.mid(torch.relu_(self.mid(x)))

    probe = Probe(Twice(), Batch((torch.randn(3, 6),), {}, None), lambda out, _: out.square().mean())
    places = [s for s in probe.start if s.parameter == "mid.weight"]
    assert [s.call for s in places] == [0, 1]
    assert Site("", OUTPUT) in probe.start


def test_slopes_against_a_reference() -> None:
    widths, powers = [64, 128, 256, 512], []
    draw = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        values = [
            [w**-0.5 * math.exp(0.1 * torch.randn((), generator=draw)) for _ in range(3)] for w in widths
        ]
        slope = fit(widths, values)
        x = numpy.repeat(numpy.log(widths), 3)
        expected, covariance = numpy.polyfit(x, numpy.log(numpy.ravel(values)), 1, cov=True)
        assert slope.power == pytest.approx(expected[0])
        assert slope.error == pytest.approx(2.2281 * covariance[0, 0] ** 0.5, rel=1e-3)
        inside += slope.low <= -0.5 <= slope.high
        powers.append(slope.power)
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423)]
)
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student(freedom, 0.95) == pytest.approx(quantile, rel=0.01)


def test_default_widths_are_powers_of_two_times_the_models() -> None:
    assert default_widths(768) == (96, 192, 384)
    assert default_widths(48) == (96, 192, 384)
    assert default_widths(4096) == (64, 128, 256)
    assert default_widths(77) == (77, 154, 308)


def test_reports(tmp_path: Path) -> None:
    found = mupass.coord_check(mlp, vectors(), widths=WIDTHS, steps=1, parameterization="standard")
    assert found.report() == str(found) and "FAIL" in str(found)
    assert found.modules()["0"] in ("ok", "FAIL") and found.modules()[OUTPUT]
    page = Path(found.report(tmp_path / "check.html")).read_text()
    assert page.startswith("<!doctype html>") and page.count("<h1>") == 1
    assert found.first.site.parameter in page and not any(s in page for s in ("<script", "src="))
    assert Path(found.report(tmp_path / "check.txt")).read_text() == str(found) + "\n"


@pytest.mark.slow
def test_reports_have_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = mupass.coord_check(mlp(), vectors(), steps=1, parameterization="standard")
    assert "<svg" in Path(found.report(tmp_path / "check.html")).read_text()
    assert Path(found.report(tmp_path / "check.png")).stat().st_size > 10_000


def test_what_cannot_be_checked_is_refused() -> None:
    x, y = vectors()
    model = mlp()
    for message, call in {
        "at least 2 different widths": lambda: mupass.coord_check(mlp, (x, y), widths=[64]),
        "no batch": lambda: mupass.coord_check(model, []),
        "unknown optimizer 'sophia'": lambda: mupass.coord_check(model, (x, y), optimizer="sophia"),
        "at least 1": lambda: mupass.coord_check(model, (x, y), steps=0),
        "class numbers": lambda: mupass.coord_check(mlp, (x, torch.randn(16, 5)), widths=[32, 64]),
        "must be batches": lambda: mupass.coord_check(model, x),
        "a pair": lambda: mupass.coord_check(model, [x]),
        "widths= is needed": lambda: mupass.coord_check(mlp, (x, y)),
        "smaller lr": lambda: mupass.coord_check(mlp, (x, y), optimizer="sgd", lr=1e200, widths=[32, 64]),
        "lr zero": lambda: mupass.coord_check(mlp, (x, y), lr=0.0, widths=[32, 64]),
        "takes no lr; it takes rate": lambda: mupass.coord_check(
            model, (x, y), optimizer=lambda model, rate: None, lr=0.1
        ),
    }.items():
        with pytest.raises(mupass.StudyError, match=message):
            call()


def test_the_default_loss_takes_the_usual_shapes() -> None:
    logits, classes = torch.randn(2, 7, 5), torch.randint(5, (2, 7))
    expected = F.cross_entropy(logits.flatten(0, 1), classes.flatten())
    assert cross_entropy(logits, classes) == expected
    assert cross_entropy((logits, None), classes) == expected
    assert cross_entropy(logits.transpose(1, 2), classes) == pytest.approx(expected.item())
    with pytest.raises(mupass.StudyError, match="do not fit"):
        cross_entropy(logits, classes[:, :3])
    with pytest.raises(mupass.StudyError, match="no tensor"):
        logits_of({"loss": torch.zeros(())})


class ComplexNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width, dtype=torch.cfloat)
        self.mid = nn.Linear(width, width, dtype=torch.cfloat)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(torch.complex(x, torch.zeros_like(x)))
        return self.head(self.mid(z * torch.sigmoid(z.abs())).abs())


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(None, marks=pytest.mark.slow)])
def test_complex_weights_are_measured(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(16, 8), torch.randn(16, 4))]
    settings = {"loss": F.mse_loss, "widths": WIDTHS, "dtype": dtype}
    checked = mupass.coord_check(ComplexNet, data, **settings)
    assert checked.ok, checked.verdict()
    places = {row.site.parameter for row in checked.rows if row.quantity == "aligned"}
    assert {"stem.weight", "mid.weight", "head.weight"} <= places
    standard = mupass.coord_check(ComplexNet, data, parameterization="standard", **settings)
    updates = [
        row for row in standard.rows if row.quantity == "update" and row.site.parameter == "mid.weight"
    ]
    # A step of Adam moves sums of width entries by a size that grows with the width.
    assert updates and all(abs(row.slope.power - 1) < 0.25 for row in updates if row.step == 1)


def test_the_size_of_complex_numbers_is_that_of_both_parts() -> None:
    x, slope = torch.randn(5, dtype=torch.cfloat), torch.randn(5, dtype=torch.cfloat)
    assert rms(x) == pytest.approx((x.real.square() + x.imag.square()).mean().sqrt().item())
    parts = torch.view_as_real(slope).double()
    along = (torch.view_as_real(x).double() * parts).sum().abs() / parts.norm() / 5**0.5
    assert _along(x, slope) == pytest.approx(along.item())
