"""The plan of a narrow model on a wide one: equal to the plan that this one gets beside a second instance."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold import Residual, Tied
from test_initialize import IMAGES, Encoder
from test_zoo import PLAIN
from torch import Tensor, nn
from zoo.analyses import third_party
from zoo.case import Case

import mupass
from mupass._records import Geometry

IDS = torch.arange(24).reshape(2, 12) % 23


def known(geometry: Geometry) -> Geometry:
    """Return what does not say how it was found out."""
    return replace(geometry, evidence=(), ambiguous=(), dims=())


def check_equal(found: nn.Module, want: nn.Module) -> None:
    ours, theirs = found.mupass_plan, want.mupass_plan
    assert list(ours) == list(theirs)
    for a, b in zip(ours.entries, theirs.entries, strict=True):
        assert known(a.geometry) == known(b.geometry)
        assert (a.scales, a.init_factor, a.init_std) == (b.scales, b.init_factor, b.init_std), a.geometry.name
    for field in ("width", "base_width", "depth", "branches", "carriers", "trained", "parameterization"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), want.parameters(), strict=True))


def saved(plan: mupass.Plan) -> mupass.Plan:
    return mupass.Plan.from_json(plan.to_json())


Build = Callable[[int], nn.Module]


def beside_the_narrowest(build: Build, k: int, inputs: Any, **options: Any) -> nn.Module:
    """Transform a model of multiplier k beside one of 1."""
    models = []
    for multiplier in (k, 1):
        torch.manual_seed(0)
        models.append(build(multiplier).eval())
    return mupass.transform(models[0], inputs, base=models[1], **options)


def equals_the_plan_of(small: nn.Module, build: Build, inputs: Any, **options: Any) -> nn.Module:
    """Compare a model of multiplier 4 by the plan of 2 with itself beside one of 1; return the first."""
    want = beside_the_narrowest(build, 4, inputs, **options)
    given = {"trained": True} if options.get("trained") else {}
    torch.manual_seed(0)
    found = mupass.transform(build(4).eval(), plan=saved(small.mupass_plan), **given)
    check_equal(found, want)
    return found


class Grouped(nn.Module):
    """Keys and values in half as many heads as queries, all in one weight."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.qkv, self.out = nn.Linear(6, d), nn.Linear(d, 2 * d), nn.Linear(d, 4)
        self.sizes = [d, d // 2, d // 2]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in self.qkv(self.enter(x)).split(self.sizes, -1)
        )
        k, v = (z.repeat_interleave(2, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Callable[[int], nn.Module], Tensor, dict[str, Any]]] = {
    "gpt": (lambda k: Tied(16 * k), IDS, {}),
    "gpt, deep": (lambda k: Tied(16 * k), IDS, {"depth": 1.5}),
    "gpt, trained": (lambda k: Tied(16 * k), IDS, {"trained": True}),
    "gpt, ntk": (lambda k: Tied(16 * k), IDS, {"parameterization": "ntk"}),
    "grouped queries": (lambda k: Grouped(16 * k), torch.randn(2, 5, 6), {}),
    "vit": (lambda k: Encoder(16 * k), IMAGES, {}),
    "cnn": (lambda k: Residual(8 * k), torch.randn(2, 3, 8, 8), {"depth": 2}),
}


@pytest.mark.sample("gpt", "cnn")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::mupass.MupassWarning")
def test_the_plan_of_a_narrow_model_is_that_of_the_wide_one(name: str) -> None:
    build, inputs, options = MODELS[name]
    small = beside_the_narrowest(build, 2, inputs, **options)
    model = equals_the_plan_of(small, build, inputs, **options)
    # The optimizers take it: what is fused is split where the wide model's matrices end.
    for make in (mupass.KFAC, mupass.Shampoo, mupass.Muon):
        optimizer = make(copy.deepcopy(model))
        assert optimizer.coverage()


# Heads in a list: a plan takes it that there are as many. A part that is a sum of a width and a fixed state.
OTHERWISE = {"set_transformer", "mamba2_dual"}


def equals_its_own_plan_where_it_can(case: Case) -> None:
    with third_party():
        try:
            small = beside_the_narrowest(case.build, 2, case.inputs())
        except mupass.TransformError:
            pytest.skip("it takes no multiplier")
        equals_the_plan_of(small, case.build, case.inputs())


@pytest.mark.thin(2)
@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in PLAIN.items() if n not in OTHERWISE])
def test_the_zoo_by_plans_of_narrow_models(case: Case) -> None:
    equals_its_own_plan_where_it_can(case)


def test_parts_that_do_not_follow_are_refused_by_name() -> None:
    with third_party():
        case = PLAIN["mamba2_dual"]
        plan = mupass.transform(case.build(2), case.inputs(), base=case.build(1)).mupass_plan
        with pytest.raises(mupass.PlanError, match=r"into.weight:0, which holds 3 matrices: .* give base="):
            mupass.transform(case.build(4), plan=plan)


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def refused(model: nn.Module, plan: mupass.Plan, message: str, **options: Any) -> None:
    before, count = copy.deepcopy(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(mupass.PlanError, match=message):
        mupass.transform(model, plan=plan, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "mupass_plan") and before.keys() == model.state_dict().keys()
    assert sum(len(m._forward_hooks) for m in model.modules()) == count


def test_another_architecture_is_refused_by_name() -> None:
    plan = saved(mupass.transform(net(6, 32, 32, 3), torch.zeros(2, 6), base=16).mupass_plan)
    refused(net(6, 64, 64, 5), plan, r"4.weight:0: planned as fixed at 3, has 5")
    refused(net(7, 64, 64, 3), plan, r"0.weight:1: planned as fixed at 6, has 7")
    refused(net(6, 64, 64, 64, 3), plan, r"6.weight: not in the plan")
    refused(net(6, 64, 3), plan, r"4.weight: missing from the model")
    conv = net(6, 64, 64, 3)
    conv[2] = nn.Conv1d(64, 64, 1)
    refused(conv, plan, r"2.weight: planned with 2 axes, has 3")
    odd = net(6, 64, 64, 3)
    odd[2] = nn.Linear(96, 64)
    refused(odd, plan, r"2.weight:1: 0.out is 96 here and 64 in 0.weight:0")
    refused(net(6, 64, 64, 3), plan, "of another width", trained=True)
    refused(net(6, 64, 64, 3), plan, "plan= settles base", base=16)
    refused(net(6, 32, 32, 3), plan, "plan= settles init", init="fan_in")


def test_ties_and_blocks_are_the_plans() -> None:
    plan = mupass.transform(Tied(32), IDS, base=16).mupass_plan
    untied = Tied(64)
    untied.head.weight = nn.Parameter(torch.randn(23, 64))
    refused(untied, plan, "the plan ties it to tokens.weight")
    deeper = Tied(64)
    deeper.blocks.append(copy.deepcopy(deeper.blocks[0]))
    refused(deeper, plan, r"blocks.2.qkv.weight: not in the plan")
    folded = mupass.fold(mupass.transform(Tied(32), IDS, base=16)).mupass_plan
    refused(Tied(64), folded, "plan of a folded model")


def test_a_narrow_model_of_the_base_width_is_enough() -> None:
    """Nothing is scaled in it, and its plan scales the wide one."""
    small = mupass.transform(net(6, 16, 16, 3), torch.zeros(2, 6)).mupass_plan
    assert small.base_width == 16
    torch.manual_seed(1)
    wide = mupass.transform(net(6, 64, 64, 3), plan=saved(small), optimizer="adam")
    torch.manual_seed(1)
    want = mupass.transform(net(6, 64, 64, 3), torch.zeros(2, 6), base=16, optimizer="adam")
    check_equal(wide, want)
    assert wide.mupass_plan.width == 64 and wide.mupass_plan["2.weight"].scales.lr == 0.25


class Numbered(nn.Module):
    """Its code multiplies by the root of its width."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(23, d), nn.Linear(d, d), nn.Linear(d, 23)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(F.relu(self.mix(x * x.shape[-1] ** 0.5)))


def test_what_the_narrow_model_was_silent_of_is_said_of_the_wide_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # at the base width nothing is said
        plan = mupass.transform(Numbered(64), IDS).mupass_plan
    with pytest.warns(mupass.MupassWarning, match="multiplies by 8"):
        mupass.transform(Numbered(256), plan=saved(plan))


def test_laws_are_read_off_the_wide_model_or_told() -> None:
    plan = mupass.transform(net(6, 32, 32, 3), torch.zeros(2, 6), base=16).mupass_plan
    wide = net(6, 128, 128, 3)
    for layer in wide[::2]:
        nn.init.normal_(layer.weight, std=0.02)
    fixed = mupass.transform(wide, plan=plan, inplace=False, init={"*weight": "constant"}).mupass_plan
    assert fixed["2.weight"].init_factor == pytest.approx(8**-0.5)
    with torch.device("meta"):
        late = net(6, 128, 128, 3)
    with pytest.warns(mupass.MupassWarning, match="on the meta device"):
        mupass.transform(late, plan=plan)
    late.to_empty(device="cpu")
    torch.manual_seed(2)
    for layer in late[::2]:
        layer.reset_parameters()
    mupass.initialize(late)
    torch.manual_seed(2)
    check_equal(late, mupass.transform(net(6, 128, 128, 3), plan=plan))
