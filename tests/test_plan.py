"""The plan record: look-up, JSON, table, explanation, and the check against a model."""

from __future__ import annotations

import copy
import json
import pickle
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mupass
from mupass._scales.optimizers import OPTIMIZERS, OptimizerSpec
from mupass._scales.parameterizations import PARAMETERIZATIONS
from mupass._scales.plan import VERSION, Plan, plan_of
from mupass._transform import make_plan


class TiedLM(nn.Module):
    """Smallest model with every role: tied embedding, positions, norm, hidden layers, untied head."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.wte = nn.Embedding(50, d)
        self.pos = nn.Parameter(torch.randn(8, d) * 0.02)
        self.ln = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.value = nn.Linear(d, 1)
        self.head = nn.Linear(d, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.wte(ids) + self.pos
        h = h + self.down(torch.relu(self.up(self.ln(h))))
        return self.head(h), self.value(h)


IDS = torch.zeros(2, 8, dtype=torch.long)


@cache
def analysis(d: int) -> mupass.Analysis:
    return mupass.analyze(TiedLM(d), IDS, base=16)


def planned(d: int = 64, optimizer: str = "kfac", parameterization: str = "mup") -> tuple[TiedLM, Plan]:
    found = analysis(d)
    torch.manual_seed(0)
    model = TiedLM(d)
    return model, make_plan(model, found, OptimizerSpec(optimizer), parameterization)


def test_look_up_by_name_and_by_alias() -> None:
    model, plan = planned()
    assert list(plan) == [n for n, _ in model.named_parameters()]
    assert len(plan) == len(list(model.parameters()))
    assert plan["head.weight"] is plan["wte.weight"]
    assert "head.weight" in plan and "up.weight" in plan and "nothing" not in plan
    with pytest.raises(mupass.PlanError, match=r"no parameter 'up.wight'; near: up.weight"):
        plan["up.wight"]


@pytest.mark.sample
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_json_round_trip_is_exact(optimizer: str, parameterization: str) -> None:
    # d = 84 over base 16 gives scales with no short decimal form.
    _, plan = planned(84, optimizer, parameterization)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


def test_json_keeps_stacked_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 3)
    )
    plan = make_plan(model, mupass.analyze(model, torch.zeros(2, 5, 8), base=16), OptimizerSpec("kfac"))
    assert any(entry.geometry.fusions for entry in plan.entries)
    assert Plan.from_json(plan.to_json()) == plan


def damage(plan: Plan, change: Any) -> str:
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=VERSION + 1), f"version {VERSION + 1}; this mupass reads {VERSION}"),
        (lambda d: d.update(version="1"), "version '1'"),
        (lambda d: d.pop("version"), "not the JSON of a mupass plan"),
        (lambda d: d.pop("width"), "plan.width is missing"),
        (lambda d: d["entries"][0].pop("scales"), "incomplete or damaged"),
        (lambda d: d["entries"][0]["geometry"].pop("role"), "geometry.role is missing"),
        (lambda d: d["entries"][0]["scales"].update(extra=1), "incomplete or damaged"),
        (lambda d: d["optimizer"].update(name="sophia"), "unknown optimizer 'sophia'"),
        (lambda d: d.update(entries=3), "damaged: plan.entries must be a list"),
        (
            lambda d: d["entries"][0]["geometry"]["shape"].__setitem__(0, 10**400),
            "shape has more numbers than any tensor can hold",
        ),
        (
            lambda d: d["entries"][0]["geometry"].update(shape=[0, 10**400]),
            "shape has more numbers than any tensor can hold",
        ),
    ],
)
def test_damaged_json_is_refused(change: Any, message: str) -> None:
    _, plan = planned()
    with pytest.raises(mupass.PlanError, match=message):
        Plan.from_json(damage(plan, change))


def of(plan: Any, parameter: str) -> dict[str, Any]:
    return next(e["geometry"] for e in plan["entries"] if e["geometry"]["name"] == parameter)


def site(plan: Any) -> dict[str, Any]:
    return of(plan, "up.weight")["sites"][0]


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "uses are gone": (
        lambda d: of(d, "up.weight").update(uses=[]),
        r"no use of it contracts fan_in_axes \(1,\)",
    ),
    "axes of a use are gone": (
        lambda d: of(d, "up.weight")["uses"][0].update(fan_in=[], fan_out=[]),
        "no use of it contracts fan_in_axes",
    ),
    "sites are gone": (lambda d: of(d, "up.weight").update(sites=[]), "has 1 uses and no site"),
    "fans share an axis": (
        lambda d: of(d, "up.weight").update(fan_out_axes=[0, 1]),
        r"fan_in_axes \(1,\) and fan_out_axes \(0, 1\) share an axis",
    ),
    "fans are gone": (
        lambda d: of(d, "up.weight").update(fan_in_axes=[], fan_out_axes=[]),
        "role 'hidden' contradicts its axes, which are those of vector",
    ),
    "another role": (
        lambda d: of(d, "up.weight").update(role="output"),
        "role 'output' contradicts its axes",
    ),
    "nothing grows": (
        lambda d: of(d, "up.weight").update(infinite=[False, False]),
        "role 'hidden' contradicts its axes, which are those of scalar",
    ),
    "an axis on both sides": (
        lambda d: site(d).update(in_axes=[0, 1]),
        r"site linear has axes both in \(0, 1\) and out \(0,\)",
    ),
    "sides are swapped": (
        lambda d: site(d).update(in_axes=[0], out_axes=[1]),
        r"no use of it contracts the axes \(0,\) of site linear",
    ),
    "a side is gone": (lambda d: site(d).update(out_axes=[]), "site linear has no axes on one side"),
    "a kind of its own": (lambda d: site(d).update(kind="line"), "site of an unknown kind 'line'"),
    "another operator": (
        lambda d: site(d).update(kind="conv"),
        "site conv is no form of aten.linear.default",
    ),
    "the bias of nothing": (
        lambda d: of(d, "up.bias")["sites"][0].update(weight="upp.weight"),
        "site bias is the bias of 'upp.weight', which is not in the plan",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_plan_that_contradicts_itself_is_refused(kind: str) -> None:
    change, message = CONTRADICTIONS[kind]
    _, plan = planned()
    with pytest.raises(mupass.PlanError, match=message):
        Plan.from_json(damage(plan, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(mupass.PlanError, match="not the JSON of a mupass plan"):
        Plan.from_json(text)


def test_another_optimizer_changes_the_scales_only() -> None:
    _, plan = planned()
    adam = plan.for_optimizer("adam")
    assert adam == planned(optimizer="adam")[1]
    assert plan.for_optimizer("kfac") is plan
    for a, b in zip(adam.entries, plan.entries, strict=True):
        assert (a.init_factor, a.init_std, a.scales.multiplier) == (
            b.init_factor,
            b.init_std,
            b.scales.multiplier,
        )
    assert adam["up.weight"].scales.lr == 0.25 and plan["up.weight"].scales.lr == 1.0


def test_check_accepts_its_model_and_names_every_difference() -> None:
    model, plan = planned()
    plan.check(model)
    plan.check(copy.deepcopy(model))
    with pytest.raises(
        mupass.PlanError, match=r"up.weight: planned with shape \(256, 64\), has \(512, 128\)"
    ):
        plan.check(TiedLM(128))
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(mupass.PlanError, match="extra: not in the plan"):
        plan.check(model)
    del model.extra
    del model.value
    with pytest.raises(mupass.PlanError, match="value.weight: missing from the model"):
        plan.check(model)


def test_check_notices_a_broken_tie() -> None:
    model, plan = planned()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(mupass.PlanError, match="head.weight: the plan ties it to wte.weight"):
        plan.check(model)


def test_table_has_a_line_for_each_parameter_with_formula_and_number() -> None:
    _, plan = planned()
    lines = str(plan).splitlines()
    assert lines[0] == "mup plan for kfac(e_a=1, e_b=1): width 64, base 16, 10 parameters"
    body = {line.split()[0]: line for line in lines[4 : 4 + len(plan)]}
    assert list(body) == list(plan)
    assert "m_in = 4" in body["down.weight"] and "1/m_out = 0.25" in body["down.weight"]
    assert "64 x 256" in body["down.weight"] and "hidden" in body["down.weight"]
    assert body["wte.weight"].endswith("1/m_out = 0.25")  # the multiplier of the tied readout
    assert "damping" not in str(plan.for_optimizer("sgd"))
    assert "epsilon" in str(plan.for_optimizer("adam"))
    # aligned: every row starts its second column where the header does
    column = lines[3].index("role")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[3 : 4 + len(plan)])


def test_formula_of_fractional_powers() -> None:
    model = TiedLM()
    analysis = mupass.analyze(model, IDS, base=16)
    plan = make_plan(model, analysis, OptimizerSpec("kfac", e_a=0.5, e_b=0.5))
    assert "m_out^0.5/m_in^0.5 = 1" in str(plan)
    assert "1/(m_out^0.5 m_in) = 0.125" in str(planned(optimizer="adam", parameterization="ntk")[1])


def test_explanation_gives_evidence_uses_and_sources() -> None:
    _, plan = planned()
    text = plan.explain("head.weight")
    entry = plan["wte.weight"]
    assert "also known as head.weight" in text
    for fact in entry.geometry.evidence:
        assert fact in text
    assert "aten.embedding.default in wte" in text
    assert "aten.linear.default in head" in text and "takes the multiplier" in text
    assert "m_out = 64/16 = 4" in text
    assert entry.init_law in text
    assert "arXiv 2312.12226" in text and "damping_out" in text
    with pytest.raises(mupass.PlanError):
        plan.explain("nothing")


def test_warnings_are_printed() -> None:
    torch.manual_seed(0)
    model = TiedLM()
    nn.init.normal_(model.down.weight, std=0.0437)
    plan = make_plan(model, mupass.analyze(model, IDS, base=16), OptimizerSpec("kfac"))
    assert "warning: initialization law in doubt for down.weight" in str(plan)


def test_plan_of_finds_the_root_through_wrappers() -> None:
    model, plan = planned()
    with pytest.raises(mupass.PlanError, match="call mupass.transform"):
        plan_of(model)
    model.mupass_plan = plan  # type: ignore[assignment]
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (model, compiled, nn.Sequential(model), nn.Sequential(compiled)):
        root, found = plan_of(wrapped)
        assert root is model and found is plan
    twin = copy.deepcopy(model)
    assert plan_of(twin) == (twin, plan)
    assert plan_of(pickle.loads(pickle.dumps(model)))[1] == plan
    with pytest.raises(mupass.PlanError, match="several transformed models"):
        plan_of(nn.ModuleList([model, twin]))


@pytest.mark.parametrize("first", [16, 32])  # at 32 the first block's rate differs from the others
def test_multipliers_by_pattern_are_the_plans(first: int) -> None:
    """Exactly one pattern fits each name, with this name's scales; blocks that differ are kept apart."""
    sizes = [32, 64, 64, 64, 128]
    pairs = zip(sizes, sizes[1:], strict=False)
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairs]
    net = nn.Sequential(nn.Linear(6, 32), *blocks, nn.Linear(128, 3))
    base = nn.Sequential(nn.Linear(6, first), *copy.deepcopy(blocks), nn.Linear(64, 3))
    for block, (a, b) in zip(list(base)[1:-1], [(first, 32), (32, 32), (32, 32), (32, 64)], strict=True):
        block[0] = nn.Linear(a, b)
    plan = mupass.transform(net, torch.zeros(2, 6), base=base, optimizer="adamw").mupass_plan
    found = json.loads(json.dumps(plan.multipliers()))
    groups = mupass.param_groups(net, lr=1.0, weight_decay=0.1)
    assert found["optimizer"] == "adamw" and found["branches"] == {}
    for name in plan:
        (row,) = (row for pattern, row in found["parameters"].items() if re.fullmatch(pattern, name))
        scales = plan[name].scales
        assert (row["init"], row["lr"], row["epsilon"]) == (scales.init, scales.lr, scales.epsilon)
        group = next(g for g in groups if any(p is net.get_parameter(name) for p in g["params"]))
        assert group["lr"] == pytest.approx(row["lr"])
        assert group["weight_decay"] == pytest.approx(0.1 * row["weight_decay_times_lr"])
    one = r"\d+\.\d+\.weight" in found["parameters"]
    assert one == (first == 16) and plan["2.0.weight"].scales.lr == 0.5


def test_multipliers_know_aliases_and_branches() -> None:
    plan = mupass.transform(TiedLM(), IDS, base=16, depth=0.5, optimizer="adam").mupass_plan
    found = plan.multipliers()
    assert found["parameters"]["wte\\.weight"] == found["parameters"]["head\\.weight"]
    assert found["parameters"]["wte\\.weight"]["multiplier"] == 0.25
    assert found["branches"] == {"down": {"multiplier": 0.5}}
