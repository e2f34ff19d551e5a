"""Values that come after transform, or were trained before it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import free_port, one_of_two
from test_transform import IDS, TiedLM
from test_warnings import IMAGES, Encoder, ResNet, raised
from test_zoo import PLAIN
from torch import Tensor, nn

import mupass
from mupass._scales.drawn_again import drawn_again
from mupass._scales.learned import learned, looks_trained
from mupass._scales.own_draws import own_draws

X = torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


class SmallGPT(nn.Module):
    """Its constructor draws by ``_init_weights``, as GPT-2 and its many copies do."""

    def __init__(self, width: int = 256, law: str = "normal") -> None:
        super().__init__()
        self.law = law
        self.tokens, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if self.law == "normal":
                nn.init.normal_(module.weight, std=0.02)
            elif self.law == "cut":
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            else:
                nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(h + self.down(F.gelu(self.up(h)))))
        return logits


def draw(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for module in model.modules():
        if hasattr(model, "_init_weights"):
            model._init_weights(module)


def equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


def on_cpu(build: Callable[[], nn.Module], inputs: Tensor, base: int) -> nn.Module:
    model = build()
    draw(model)
    return mupass.transform(model, inputs, base=base)


def on_meta(build: Callable[[], nn.Module], inputs: Tensor, base: int) -> nn.Module:
    with torch.device("meta"):
        model = build()
    with pytest.warns(mupass.MupassWarning, match=r"mupass.initialize\(model\)"):
        mupass.transform(model, inputs.to("meta"), base=base)
    model.to_empty(device="cpu")
    draw(model)
    return model


@pytest.mark.parametrize("law", ["normal", "cut", "xavier"])
def test_meta_then_initialize_is_the_transform_of_the_same_values(law: str) -> None:
    usual = on_cpu(lambda: SmallGPT(law=law), IDS, 64)
    late = on_meta(lambda: SmallGPT(law=law), IDS, 64)
    plan = mupass.initialize(late)
    equal(late, usual)
    assert plan is late.mupass_plan
    assert [e.init_factor for e in plan.entries] == [e.init_factor for e in usual.mupass_plan.entries]
    assert [e.init_law for e in plan.entries] == [e.init_law for e in usual.mupass_plan.entries]
    torch.testing.assert_close(late(IDS), usual(IDS))


@pytest.mark.slow
def test_a_meta_plan_has_the_factors_of_the_models_own_code() -> None:
    # A constant std is the one at the base width: 0.02 at width 64 is 0.01 at width 256.
    for law, factor in (("normal", 0.5), ("cut", 0.5), ("xavier", 1.0)):
        late = on_meta(lambda law=law: SmallGPT(law=law), IDS, 64).mupass_plan
        usual = on_cpu(lambda law=law: SmallGPT(law=law), IDS, 64).mupass_plan
        assert late["up.weight"].init_factor == pytest.approx(factor)
        assert "own code" in late["up.weight"].init_law
        for entry in usual.entries:
            assert late[entry.geometry.name].init_factor == pytest.approx(entry.init_factor)


def test_own_code_that_fails_promises_nothing() -> None:
    class Failing(SmallGPT):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear) and module.weight.sum().item() > 0:
                nn.init.normal_(module.weight)

    with torch.device("meta"):
        model = SmallGPT(64)
    model.__class__ = Failing
    found = own_draws(model)
    assert "up.weight" not in found and found["norm.weight"].constant == 1
    assert not any(m._forward_hooks for m in model.modules()) and all(p.is_meta for p in model.parameters())


@pytest.mark.zoo
def test_hugging_faces_own_law_is_known_on_meta() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(vocab_size=96, n_embd=256, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(config)
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    with pytest.warns(mupass.MupassWarning, match="initialize"):
        plan = mupass.transform(model, {"input_ids": ids}, base=64).mupass_plan
    torch.manual_seed(0)
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    usual = mupass.transform(hf.GPT2LMHeadModel(config), example, base=64).mupass_plan
    assert plan["transformer.h.0.attn.c_attn.weight"].init_factor == pytest.approx(0.5)
    for entry in usual.entries:
        assert plan[entry.geometry.name].init_factor == pytest.approx(entry.init_factor), entry.geometry.name


def test_a_second_call_and_layers_that_were_not_drawn_again_stay() -> None:
    torch.manual_seed(3)
    model = mupass.transform(mlp(256), X, base=32)
    before = copy.deepcopy(model)
    mupass.initialize(model)
    equal(model, before)
    torch.manual_seed(5)
    model[4].reset_parameters()
    fresh = copy.deepcopy(model[4])
    plan = mupass.initialize(model)
    equal(model[:4], before[:4])
    torch.testing.assert_close(model[4].weight, fresh.weight * 8**-0.5)
    torch.testing.assert_close(model[4].bias, fresh.bias * 8**0.5)
    assert plan["4.weight"].init_law.startswith("fan_in, gain 0.577")
    mupass.initialize(model)
    torch.testing.assert_close(model[4].weight, fresh.weight * 8**-0.5)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "make",
    [
        mupass.KFAC,
        mupass.Muon,
        lambda model: mupass.param_groups(model, 1e-3),
    ],
    ids=["kfac", "muon", "groups"],
)
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_layers_drawn_behind_a_transform_are_told_when_an_optimizer_is_made(place: str, make: Any) -> None:
    with torch.device(place):
        model = mlp(256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on meta it says that initialize is to be called
        model = mupass.transform(model, X.to(place), base=32)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for layer in model[::2]:
        layer.reset_parameters()
    with pytest.warns(mupass.MupassWarning, match=r"initialization is lost in 4.weight: .*initialize"):
        make(model)
    mupass.initialize(model)
    assert raised(lambda: make(model)) == []


@pytest.mark.parametrize("base", [32, 48])
def test_scaled_values_of_few_entries_are_told_of_no_draw(base: int) -> None:
    """A readout of 256 entries that starts smaller by a root of 2, or less: chance makes it look larger."""
    plan = mupass.transform(mlp(64), X, base=base).mupass_plan
    for seed in range(60):
        torch.manual_seed(seed)
        model = mlp(64)
        mupass.transform(model, plan=plan)
        assert drawn_again(dict(model.named_parameters()), plan) == []


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("steps", [0, 1, 10, 200])
def test_a_checkpoint_of_a_transformed_model_is_no_draw(steps: int) -> None:
    model = mupass.transform(mlp(256), X, base=32)
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.05 * parameter.grad.sign()
                parameter.grad = None
    # Of the size that a draw would have, by accident.
    readout = model.get_submodule("4")
    if steps:
        with torch.no_grad():
            readout.weight *= (3 * 256 * readout.weight.square().mean()).rsqrt()
    loaded = mupass.transform(mlp(256), X, base=32)
    loaded.load_state_dict(model.state_dict())
    assert raised(lambda: mupass.KFAC(loaded)) == []


def test_the_law_may_be_told() -> None:
    late = on_meta(lambda: SmallGPT(256), IDS, 64)
    own = late.up.weight.detach().clone()
    mupass.initialize(late, init={"up.weight": "fan_in"})
    assert torch.equal(late.up.weight, own)


def test_what_initialize_refuses() -> None:
    with torch.device("meta"):
        late = mlp()
    with pytest.warns(mupass.MupassWarning):
        mupass.transform(late, X.to("meta"), base=16)
    with pytest.raises(mupass.TransformError, match="meta device; give the model memory"):
        mupass.initialize(late)
    with pytest.raises(mupass.PlanError, match="no plan"):
        mupass.initialize(mlp())
    model = mupass.transform(mlp(), X, base=16)
    with pytest.warns(mupass.MupassWarning, match="one learning rate"):
        train(model, "Adam", 1e-2, 100)
    before = copy.deepcopy(model)
    with pytest.raises(mupass.TransformError, match="look trained"):
        mupass.initialize(model)
    equal(model, before)
    tuned = mupass.transform(mlp(), X, base=16, trained=True)
    with pytest.raises(mupass.TransformError, match="trained=True"):
        mupass.initialize(tuned)
    tied = on_meta(TiedLM, IDS, 16)
    with pytest.raises(mupass.PlanError, match="ties it to"):
        mupass.initialize(tied)
    tied.head.weight = tied.wte.weight
    mupass.initialize(tied)


def _sharded(rank: int, port: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    with one_of_two(rank, port):
        with torch.device("meta"):
            model = SmallGPT()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mupass.MupassWarning)
            mupass.transform(model, IDS.to("meta"), base=64)
        for part in (model.up, model.down, model):
            fully_shard(part)
        model.to_empty(device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has one stream of numbers for all ranks on GPUs only
            draw(model)
            with pytest.raises(mupass.TransformError, match="seeds of their own"):
                mupass.initialize(model)
            draw(model, seed=1 + rank)
        plan = mupass.initialize(model)
        factors = {n: plan[n].init_factor for n in plan}
        stds = {n: p.full_tensor().std().item() for n, p in model.named_parameters()}
        if rank == 0:
            torch.save((factors, stds), path)


@pytest.mark.slow
def test_sharded_models_are_initialized_by_the_same_call(tmp_path: Path) -> None:
    mp.start_processes(_sharded, (free_port(), tmp_path / "found"), nprocs=2, start_method="spawn")
    factors, stds = torch.load(tmp_path / "found")
    usual = on_cpu(SmallGPT, IDS, 64)
    assert factors == {e.geometry.name: e.init_factor for e in usual.mupass_plan.entries}
    for name, p in usual.named_parameters():
        assert stds[name] == pytest.approx(p.std().item(), rel=0.1, abs=1e-6), name


# ---------------------------------------------------------------------------------------- trained weights


def train(model: nn.Module, name: str, lr: float, steps: int, x: Tensor = X, y: Tensor = Y) -> None:
    optimizer = getattr(torch.optim, name)(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("width", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "lr", "steps"),
    [("SGD", 0.5, 100), ("SGD", 0.01, 500), ("Adam", 1e-2, 10), ("Adam", 1e-3, 100), ("AdamW", 1e-3, 1000)],
)
def test_trained_weights_are_told(width: int, name: str, lr: float, steps: int) -> None:
    model = mlp(width)
    train(model, name, lr, steps)
    (found,) = raised(lambda: mupass.transform(model, X, base=width // 4, init="auto"))[-1:]
    assert "look trained" in str(found.message) and "trained=True" in str(found.message)


@pytest.mark.slow
@pytest.mark.parametrize("build", [Encoder, lambda: ResNet(8)], ids=["vit", "resnet"])
def test_trained_vision_models_are_told(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x, y = build(), torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    assert not any("look trained" in str(w.message) for w in raised(lambda: _transformed(model)))
    train(model, "AdamW", 1e-3, 40, x, y)
    assert any("look trained" in str(w.message) for w in raised(lambda: _transformed(model)))


def _transformed(model: nn.Module) -> nn.Module:
    return mupass.transform(model, IMAGES, base=4, inplace=False)


@pytest.mark.thin(3)
@pytest.mark.sample(*sorted(PLAIN)[::24])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_no_initial_weights_of_the_zoo_look_trained(name: str) -> None:
    case = PLAIN[name]
    for seed in range(2):
        torch.manual_seed(seed)
        model = case.build(2)
        analysis = mupass.analyze(model, case.inputs())
        assert learned(dict(model.named_parameters()), analysis.geometries) == []


LAWS: dict[str, Callable[[Tensor], Any]] = {
    "kaiming": nn.init.kaiming_normal_,
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "cut": lambda w: nn.init.trunc_normal_(w, std=0.5, a=-1, b=1),
    "positive": lambda w: nn.init.uniform_(w, 0, 0.3),
    "sparse": lambda w: nn.init.sparse_(w, 0.3),
    "wide": lambda w: nn.init.normal_(w, std=10.0),
    "half": lambda w: w.copy_((torch.randn_like(w) / 8).bfloat16()),
    "default in bfloat16": lambda w: w.copy_(w.bfloat16()),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", list(LAWS))
def test_no_draw_of_a_known_law_bears_a_mark(law: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = mlp(64 + 16 * seed)
        with torch.no_grad():
            for layer in model[::2]:
                LAWS[law](layer.weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mupass.MupassWarning)
            plan = mupass.transform(model, X, base=64 + 16 * seed).mupass_plan
        marks = {
            e.geometry.name: looks_trained(model.get_parameter(e.geometry.name), e.geometry)
            for e in plan.entries
        }
        assert not any(marks.values()), (seed, marks)


def test_nothing_is_said_where_nothing_is_rescaled_or_the_law_is_told() -> None:
    model = mlp()
    train(model, "Adam", 1e-2, 100)
    for options in ({"base": 64}, {"base": 16, "init": "fan_in"}, {"base": 16, "trained": True}):
        assert raised(lambda options=options: mupass.transform(model, X, inplace=False, **options)) == []


def test_a_saved_plan_on_trained_weights_is_told() -> None:
    plan = mupass.transform(mlp(), X, base=16).mupass_plan
    model = mlp()
    train(model, "Adam", 1e-2, 100)
    (found,) = raised(lambda: mupass.transform(model, plan=plan, inplace=False))
    assert "look trained" in str(found.message)
    assert raised(lambda: mupass.transform(model, plan=plan, trained=True)) == []


def test_resize_tells_of_trained_weights() -> None:
    model = mlp()
    assert raised(lambda: mupass.resize(model, 32, example_inputs=X)) == []
    train(model, "Adam", 1e-2, 100)
    assert any(
        "look trained" in str(w.message) for w in raised(lambda: mupass.resize(model, 32, example_inputs=X))
    )


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "build", [lambda: mlp(), lambda: TiedLM(64), lambda: Encoder()], ids=["mlp", "tied", "vit"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "kfac", "shampoo", "sgd"])
def test_fine_tuning_leaves_values_and_outputs_and_attaches_the_scales(
    build: Callable[[], nn.Module], optimizer: str
) -> None:
    torch.manual_seed(0)
    model = build()
    x = IDS if isinstance(model, TiedLM) else IMAGES if isinstance(model, Encoder) else X
    initial = copy.deepcopy(model)
    expected, before = model(x), {n: p.clone() for n, p in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mupass.MupassWarning)
        plan = mupass.transform(model, x, base=16, optimizer=optimizer, trained=True).mupass_plan
        fresh = mupass.transform(initial, x, base=16, optimizer=optimizer).mupass_plan
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(model(x), expected)
    for entry in fresh.entries:
        name = entry.geometry.name
        assert plan[name].init_factor == 1 and plan[name].scales.multiplier == 1
        if not entry.geometry.readout_uses:
            assert plan[name].scales == entry.scales
    assert mupass.Plan.from_json(plan.to_json()) == plan


def test_the_step_of_a_tied_readout_that_is_fine_tuned_does_not_grow_with_the_width() -> None:
    moved = {}
    for width in (64, 256, 1024):
        torch.manual_seed(0)
        model = TiedLM(width)
        nn.init.normal_(model.wte.weight, std=width**-0.5)
        with pytest.warns(mupass.MupassWarning, match="untie"):
            mupass.transform(model, IDS, base=32, trained=True)
        for name, p in model.named_parameters():
            p.requires_grad_(name == "wte.weight")  # its own step
        before = model(IDS).detach()
        optimizer = torch.optim.Adam(mupass.param_groups(model, lr=1e-3, optimizer="adam"))
        F.cross_entropy(model(IDS).flatten(0, 1), IDS.roll(1, 1).flatten()).backward()
        optimizer.step()
        moved[width] = (model(IDS) - before).square().mean().sqrt().item()
    slope = math.log(moved[1024] / moved[64]) / math.log(16)
    assert abs(slope) < 0.2, moved


def test_adapters_on_frozen_weights_take_their_own_scales() -> None:
    class Adapted(nn.Module):
        def __init__(self, width: int, rank: int = 4) -> None:
            super().__init__()
            self.base, self.head = nn.Linear(width, width), nn.Linear(width, 4)
            self.enter = nn.Linear(10, width)
            self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
            nn.init.normal_(self.up.weight, std=0.01)
            for module in (self.base, self.enter):
                module.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x).relu()
            logits: Tensor = self.head((self.base(h) + self.up(self.down(h))).relu())
            return logits

    model = Adapted(256)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    mupass.transform(model, X, base=64, trained=True)
    groups = mupass.param_groups(model, lr=1.0)
    rates = {p: g["lr"] for g in groups for p in g["params"]}
    named = {n: rates.get(p) for n, p in model.named_parameters()}
    # Frozen ones have rates, for when they are thawed, and no gradient until then.
    assert named["base.weight"] is not None and named["enter.bias"] is not None
    assert named["down.weight"] == pytest.approx(0.25) and named["up.weight"] == pytest.approx(1.0)
    assert named["head.weight"] == pytest.approx(0.25)
    optimizer = mupass.KFAC(model, lr=0.01)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "base.weight" not in moved and "enter.weight" not in moved and "up.weight" in moved


def test_depth_and_fine_tuning_exclude_each_other() -> None:
    with pytest.raises(mupass.PlanError, match="depth= multiplies branches"):
        mupass.transform(Encoder(), IMAGES, base=16, depth=2, trained=True)
