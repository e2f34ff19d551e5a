"""The scale table: rows of the papers, the base width, bad names, and one-step slopes in width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._rewrite import rescale
from mupass._scales.optimizers import OPTIMIZERS, OptimizerSpec
from mupass._scales.parameterizations import PARAMETERIZATIONS
from mupass._scales.plan import Plan
from mupass._scales.scales import SCALES, scales
from mupass._transform import make_plan

WIDTHS = (64, 128, 256, 512, 1024)
BASE = 64
BATCH = 8


def geometry(fan_in: int, fan_out: int, m_in: float, m_out: float, role: str) -> mupass.Geometry:
    """Geometry of a weight of shape (fan_out, fan_in), or of a bias when fan_in is 0."""
    shape = (fan_out, fan_in) if fan_in else (fan_out,)
    base = (fan_out / m_out, fan_in / m_in) if fan_in else (fan_out / m_out,)
    return mupass.Geometry(
        name="w",
        shape=shape,
        base_shape=base,
        infinite=(m_out != 1, m_in != 1)[: len(shape)],
        dims=("out", "in")[: len(shape)],
        role=role,  # type: ignore[arg-type]
        fan_in_axes=(1,) if fan_in else (),
        fan_out_axes=(0,),
    )


ROWS = {
    "input": geometry(20, 512, 1, 8, "input"),
    "hidden": geometry(512, 512, 8, 8, "hidden"),
    "output": geometry(512, 10, 8, 1, "output"),
    "vector": geometry(0, 512, 1, 8, "vector"),
}
M = 8.0

# Ishikawa & Karakida, table 1: lr ~ M^-c for (input, hidden, output); biases are in the input row.
KFAC_POWERS = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize(("e_a", "e_b"), KFAC_POWERS)
def test_kfac_learning_rates_are_table_1(e_a: float, e_b: float) -> None:
    c = {"input": e_b - 1, "hidden": e_b - e_a, "output": 1 - e_a, "vector": e_b - 1}
    for name, row in ROWS.items():
        assert scales(row, OptimizerSpec("kfac", e_a=e_a, e_b=e_b)).lr == pytest.approx(M ** -c[name])


@pytest.mark.parametrize("e", [0.0, 0.5, 1.0])
def test_shampoo_learning_rates_are_table_1(e: float) -> None:
    c = {"input": e - 1, "hidden": 0.0, "output": 1 - e, "vector": e - 1}
    for name, row in ROWS.items():
        assert scales(row, OptimizerSpec("shampoo", e=e)).lr == pytest.approx(M ** -c[name])


def test_learning_rates_and_epsilons_are_those_of_qiu_et_al() -> None:
    # arXiv 2512.05620, with D the width: (d_in, d_out) is (1, D), (D, D), (D, 1); 1/L is left out.
    sizes = {"input": (1.0, M), "hidden": (M, M), "output": (M, 1.0), "vector": (1.0, M)}
    for name, (d_in, d_out) in sizes.items():
        rows = {
            "muon": ((d_out / d_in) ** 0.5, (d_in / d_out) ** 0.5),
            "soap": ((d_out * d_in) ** 0.5 / d_in, (d_out * d_in) ** 0.5 / d_out),  # one block
            "adamuon": (1 / d_in, (d_in * d_out) ** -0.5),
            "adam_atan2": (1 / d_in, 1 / d_out),
        }
        for optimizer, (lr, epsilon) in rows.items():
            found = scales(ROWS[name], OptimizerSpec(optimizer))
            assert (found.lr, found.epsilon) == pytest.approx((lr, epsilon)), (name, optimizer)


@pytest.mark.parametrize("graft", ["sgd", "adam", "rmsprop"])
def test_a_graft_brings_its_row(graft: str) -> None:
    row = "adam" if graft == "rmsprop" else graft
    for geometry_ in ROWS.values():
        found = scales(geometry_, OptimizerSpec("shampoo", e=0.7, graft=graft))
        assert found.lr == scales(geometry_, OptimizerSpec(row)).lr
        assert found.damping_in == scales(geometry_, OptimizerSpec("shampoo")).damping_in
    with pytest.raises(mupass.PlanError, match="unknown graft"):
        OptimizerSpec("shampoo", graft="lion")


def test_damping_exponents_are_table_1() -> None:
    d_a = {"input": 0, "hidden": -1, "output": -1}
    d_b = {"input": 1, "hidden": 1, "output": 0}
    d_shampoo = {"input": 1, "hidden": 0, "output": -1}
    for name in d_a:
        kfac = scales(ROWS[name], OptimizerSpec("kfac"))
        assert (kfac.damping_in, kfac.damping_out) == pytest.approx((M ** -d_a[name], M ** -d_b[name]))
        shampoo = scales(ROWS[name], OptimizerSpec("shampoo"))
        assert shampoo.damping_in == shampoo.damping_out == pytest.approx(M ** -d_shampoo[name])


def test_init_is_table_1_in_the_gauge_without_multipliers() -> None:
    b = {"input": 0.0, "hidden": 0.5, "output": 1.0, "vector": 0.0}
    b_lazy = {**b, "output": 0.5}
    for name, row in ROWS.items():
        assert scales(row, OptimizerSpec("sgd")).init == pytest.approx(M ** -b[name])
        assert scales(row, OptimizerSpec("sgd"), "ntk").init == pytest.approx(M ** -b_lazy[name])


def test_lazy_learning_rates() -> None:
    c = {
        "sgd": (0.0, 1.0, 1.0),
        "kfac": (0.0, 0.0, 0.0),
        "foof": (0.0, 0.0, 0.0),
        "shampoo": (0.0, 0.5, 0.5),
        "adam": (0.5, 1.5, 1.0),
    }
    for optimizer, powers in c.items():
        for name, power in zip(("input", "hidden", "output"), powers, strict=True):
            lr = scales(ROWS[name], OptimizerSpec(optimizer), "ntk").lr
            assert lr == pytest.approx(M**-power), (optimizer, name)


def test_mean_field_is_everetts_row_moved_to_our_gauge() -> None:
    # Everett et al., table 1: W = w/n^a with std n^-b. The lr columns are under full alignment.
    a, b = {"input": 0.0, "hidden": 0.5, "output": 1.0}, 0.0
    lr = {
        "sgd": {"input": 1.0, "hidden": 1.0, "output": 1.0},
        "adam": {"input": 0.0, "hidden": -0.5, "output": 0.0},
    }
    for optimizer, factor in {"sgd": 2, "adam": 1}.items():
        for name in a:
            row = scales(ROWS[name], OptimizerSpec(optimizer), "mean_field")
            assert row.init == pytest.approx(M ** -(a[name] + b))
            # dW = dw / n^a, and dw itself follows the gradient n^-a dL/dW once more for SGD
            assert row.lr == pytest.approx(M ** (lr[optimizer][name] - factor * a[name])), (optimizer, name)


# Everett et al., arXiv 2407.05872, table 1, for (embedding, hidden, readout): W = n^-a w, w starts at n^-b,
# and powers of n in the learning rate of w, under full alignment and under none.
EVERETT = {
    "standard": ((0, 0, 0), (0, 0.5, 0.5)),
    "ntk": ((0, 0.5, 0.5), (0, 0, 0)),
    "mup": ((-0.5, 0, 0.5), (0.5, 0.5, 0.5)),
    "mean_field": ((0, 0.5, 1), (0, 0, 0)),
}
EVERETT_RATES = {
    ("standard", "sgd"): ((0.5, -0.5, -1), (0.5, 0, -0.5)),
    ("standard", "adam"): ((0, -1, -1), (0, -0.5, -0.5)),
    ("standard", "adafactor"): ((0, -0.5, -0.5), (0, 0, 0)),
    ("ntk", "sgd"): ((0.5, 0.5, 0), (0.5, 1, 0.5)),
    ("ntk", "adam"): ((0, -0.5, -0.5), (0, 0, 0)),
    ("ntk", "adafactor"): ((0, -0.5, -0.5), (0, 0, 0)),
    ("mup", "sgd"): ((0, 0, 0), (0, 0.5, 0)),
    ("mup", "adam"): ((-0.5, -1, -0.5), (-0.5, -0.5, 0)),
    ("mup", "adafactor"): ((0, -0.5, 0), (0, 0, 0.5)),
    ("mean_field", "sgd"): ((1, 1, 1), (1, 1.5, 1)),
    ("mean_field", "adam"): ((0, -0.5, 0), (0, 0, 0.5)),
    ("mean_field", "adafactor"): ((0, -0.5, 0), (0, 0, 0.5)),
}


@pytest.mark.parametrize("alignment", ["full", "none"])
@pytest.mark.parametrize(("parameterization", "optimizer"), EVERETT_RATES)
def test_alignment_is_the_table_of_everett_et_al(
    parameterization: str, optimizer: str, alignment: str
) -> None:
    multipliers, inits = EVERETT[parameterization]
    table = EVERETT_RATES[parameterization, optimizer][alignment == "none"]
    gauge = {"sgd": 2, "adam": 1, "adafactor": 0}[optimizer]  # how the rate of W = n^-a w follows from w's
    rows = zip(("input", "hidden", "output"), multipliers, inits, table, strict=True)
    for name, a, b, lr in rows:
        found = scales(ROWS[name], OptimizerSpec(optimizer, alignment=alignment), parameterization)
        assert found.lr == pytest.approx(M ** (lr - gauge * a)), name
        # "standard" leaves the user's own 1/sqrt(fan_in) alone; the others state it.
        assert parameterization == "standard" or found.init == pytest.approx(M ** -(a + b))


def test_full_alignment_is_mup_itself() -> None:
    for optimizer in ("sgd", "adam", "adamw", "adam_atan2", "adafactor", "lion"):
        for row in ROWS.values():
            aligned = scales(row, OptimizerSpec(optimizer, alignment="full"))
            assert aligned == scales(row, OptimizerSpec(optimizer)), optimizer


def test_alignments_without_rows_are_refused() -> None:
    for optimizer in ("kfac", "shampoo", "muon", "soap"):
        with pytest.raises(mupass.PlanError, match="alignment= has rows for sgd, adam"):
            OptimizerSpec(optimizer, alignment="full")
    with pytest.raises(mupass.PlanError, match="unknown alignment 'half'; known: full, none, measured"):
        OptimizerSpec("adam", alignment="half")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_factor_is_exactly_one_at_the_base_width(optimizer: str, parameterization: str) -> None:
    for row in (
        geometry(7, 512, 1, 1, "input"),
        geometry(512, 48, 1, 1, "hidden"),
        geometry(0, 9, 1, 1, "vector"),
    ):
        found = scales(row, OptimizerSpec(optimizer), parameterization)
        assert all(getattr(found, name) == 1.0 for name in SCALES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_standard_scales_nothing_at_any_width(optimizer: str) -> None:
    for row in ROWS.values():
        assert all(getattr(scales(row, OptimizerSpec(optimizer), "standard"), name) == 1.0 for name in SCALES)


def test_tied_embedding_takes_the_readout_multiplier() -> None:
    use = mupass.Use("aten.linear.default", "head", "linear", (1,), (0,))
    tied = mupass.Geometry("wte", (50, 256), (50, 64), (False, True), ("V", "d"), "input", (0,), (1,), (use,))
    for name, beta in {"mup": 1.0, "mean_field": 1.0, "ntk": 0.5}.items():
        assert scales(tied, OptimizerSpec("sgd"), name).multiplier == pytest.approx(4**-beta)
        assert scales(tied, OptimizerSpec("sgd"), name).init == 1.0


@pytest.mark.parametrize("power", [math.nan, math.inf, -0.5, "1", None, True])
@pytest.mark.parametrize("field", ["e_a", "e_b", "e"])
def test_bad_powers_are_refused(field: str, power: object) -> None:
    with pytest.raises(mupass.PlanError, match=field):
        OptimizerSpec("kfac", **{field: power})  # type: ignore[arg-type]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        mupass.PlanError, match="known: sgd, adam, adamw, adam_atan2, adamuon, adafactor, lion, kfac, foof"
    ):
        OptimizerSpec("sophia")
    with pytest.raises(mupass.PlanError, match="known: mup, standard, ntk, mean_field"):
        scales(ROWS["hidden"], OptimizerSpec("sgd"), "mupp")
    with pytest.raises(mupass.PlanError, match="foof fixes"):
        OptimizerSpec("foof", e_a=0.5)


def test_foof_is_kfac_on_the_input_side() -> None:
    foof, kfac = OptimizerSpec("foof"), OptimizerSpec("kfac", e_a=1, e_b=0)
    assert (foof.e_a, foof.e_b) == (1.0, 0.0)
    assert all(scales(row, foof) == scales(row, kfac) for row in ROWS.values())


# One-step slopes -------------------------------------------------------------------------------


def mlp(width: int) -> nn.Module:
    layers = [nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).double()


@cache
def analysis_of(width: int) -> mupass.Analysis:
    return mupass.analyze(mlp(width), torch.randn(2, 20).double(), base=BASE)


class Probe:
    """One first step of a tanh MLP of some width, seen layer by layer.

    For every parameter: RMS of what its update adds to the pre-activation (``dW h``), how much of the
    output that moves (``delta . dW h``), and the RMS of its gradient.
    """

    def __init__(self, width: int, seed: int, optimizer: str, parameterization: str):
        analysis = analysis_of(width)
        torch.manual_seed(seed)
        self.model = mlp(width)
        torch.manual_seed(1000 + seed)  # the same data at all widths
        x, y = torch.randn(BATCH, 20).double(), torch.randn(BATCH, 10).double()
        self.plan: Plan = make_plan(self.model, analysis, OptimizerSpec(optimizer), parameterization)
        rescale(self.model, {entry.geometry.name: entry.init_factor for entry in self.plan.entries})
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        h = x
        for name, layer in self.model.named_children():
            self.inputs[name] = h.detach()
            h = layer(h)
            h.retain_grad()
            self.outputs[name] = h
        torch.autograd.backward(0.5 * (h - y).square().sum(1).mean())

    def updates(self, rule: Callable[[str, Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """RMS of ``dW h`` and mean of ``|delta . dW h|`` by parameter, for updates of the given rule."""
        found = {}
        for name, parameter in self.model.named_parameters():
            layer, kind = name.split(".")
            assert parameter.grad is not None
            update = self.plan[name].scales.lr * rule(name, parameter.grad)
            moved = self.inputs[layer] @ update.T if kind == "weight" else update.expand(BATCH, -1)
            delta = self.outputs[layer].grad
            assert delta is not None
            effect = (delta * BATCH * moved).sum(1).abs().mean()
            found[name] = (float(moved.square().mean().sqrt()), float(effect))
        return found

    def gradients(self) -> dict[str, float]:
        """RMS of every gradient."""
        return {
            n: float(p.grad.square().mean().sqrt())
            for n, p in self.model.named_parameters()
            if p.grad is not None
        }


def slopes(values: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """By parameter, least-squares slope of log(mean over seeds) in log(width)."""
    x = torch.tensor([math.log(w) for w in values], dtype=torch.float64)
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    means = {
        n: torch.tensor([sum(run[n] for run in runs) / len(runs) for runs in values.values()]).double()
        for n in values[WIDTHS[0]][0]
    }
    return {n: float((x * mean.log()).sum()) for n, mean in means.items()}


@pytest.fixture(scope="module", params=["mup", "ntk", "standard"])
def probes(request: pytest.FixtureRequest) -> tuple[str, dict[int, list[Probe]]]:
    # The forward and backward pass do not depend on the optimizer: one set of runs for both.
    return request.param, {w: [Probe(w, seed, "sgd", request.param) for seed in range(4)] for w in WIDTHS}


def one_step(
    runs: dict[int, list[Probe]], optimizer: str, epsilon: dict[str, float] | None, scaled: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """Slopes of ``dW h`` and of its effect on the output, for the first step of SGD or Adam."""
    spec = OptimizerSpec(optimizer)
    moved, effect = {}, {}
    for width, group in runs.items():
        found = []
        for probe in group:
            probe.plan = probe.plan.for_optimizer(spec)

            def rule(name: str, g: Tensor, probe: Probe = probe) -> Tensor:
                if optimizer == "sgd":
                    return -g
                eps = epsilon[name] * (probe.plan[name].scales.epsilon if scaled else 1.0) if epsilon else 0.0
                return -g / (g.abs() + eps).clamp_min(1e-300)

            found.append(probe.updates(rule))
        moved[width] = [{n: v[0] for n, v in run.items()} for run in found]
        effect[width] = [{n: v[1] for n, v in run.items()} for run in found]
    return slopes(moved), slopes(effect)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_moves_what_the_parameterization_promises(
    probes: tuple[str, dict[int, list[Probe]]], optimizer: str
) -> None:
    name, runs = probes
    moved, effect = one_step(runs, optimizer, None)
    hidden = [n for n in moved if not n.startswith("4.")]
    if name == "mup":  # features and output both move by Theta(1)
        assert max(map(abs, moved.values())) <= 0.1, moved
        assert max(map(abs, effect.values())) <= 0.1, effect
    elif name == "ntk":  # the output moves by Theta(1), hidden coordinates by 1/sqrt(width)
        assert max(map(abs, effect.values())) <= 0.1, effect
        assert all(abs(moved[n] + 0.5) <= 0.1 for n in hidden), moved
    else:  # one learning rate for all: hidden layers and the readout blow up
        assert moved["2.weight"] > 0.35 and moved["4.weight"] > 0.7, moved
        assert optimizer == "adam" or moved["0.weight"] < -0.35, moved


def test_epsilon_follows_the_gradient(probes: tuple[str, dict[int, list[Probe]]]) -> None:
    name, runs = probes
    if name == "standard":  # one epsilon, although gradients shrink as 1/sqrt(width)
        assert all(entry.scales.epsilon == 1 for entry in runs[WIDTHS[-1]][0].plan.entries)
        return
    gradients = slopes({w: [p.gradients() for p in group] for w, group in runs.items()})
    beta = PARAMETERIZATIONS[name].readout_power
    assert beta is not None
    for parameter, found in gradients.items():
        expected = 0.0 if parameter.startswith("4.") else -beta
        assert abs(found - expected) <= 0.1, (parameter, found)
    # An epsilon that matters, three times the gradient at the base width: scaled it keeps the step's
    # order, constant it damps wider models away.
    at_base = [probe.gradients() for probe in runs[BASE]]
    epsilon = {n: 3 * sum(g[n] for g in at_base) / len(at_base) for n in at_base[0]}
    _, scaled = one_step(runs, "adam", epsilon)
    assert max(map(abs, scaled.values())) <= 0.1, scaled
    _, constant = one_step(runs, "adam", epsilon, scaled=False)
    assert constant["2.weight"] < -0.35, constant
