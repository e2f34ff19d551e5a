"""transform: same class and keys, exact at the base width, and nothing changed when it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mupass
from mupass._optim.groups import param_groups
from mupass._rewrite import InputMultiplier
from mupass._scales.plan import Plan
from mupass._transform import transform


class TiedLM(nn.Module):
    """Embedding shared with the readout, which has a bias of its own."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.wte = nn.Embedding(50, d)
        self.ln = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.head = nn.Linear(d, 50)
        self.head.weight = self.wte.weight

    def features(self, ids: Tensor) -> Tensor:
        h: Tensor = self.wte(ids)
        hidden: Tensor = self.down(torch.relu(self.up(self.ln(h))))
        return h + hidden

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(ids))
        return logits


class FunctionalLM(TiedLM):
    """The same tie written with F.linear, so that no module holds the readout."""

    def __init__(self, d: int = 64):
        super().__init__(d)
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = F.linear(self.features(ids), self.wte.weight)
        return logits


def mlp(d: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 10))


def cnn(d: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, d, 3),
        nn.BatchNorm2d(d),
        nn.ReLU(),
        nn.Conv2d(d, d, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(d, 10),
    )


IDS = torch.arange(12).reshape(2, 6)
MODELS: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "mlp": (mlp, torch.linspace(-1, 1, 40).reshape(2, 20)),
    "cnn": (cnn, torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)),
    "lm": (TiedLM, IDS),
}


def seeded(build: Callable[..., nn.Module], d: int = 64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(d)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused transform could have left behind."""
    hooks = {n: [(k, len(v)) for k, v in vars(m).items() if "_hooks" in k] for n, m in model.named_modules()}
    keys = {n: list(vars(m)) for n, m in model.named_modules()}
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return {"hooks": hooks, "keys": keys, "tensors": tensors, "ids": [id(p) for p in model.parameters()]}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["hooks"] == before["hooks"]
    assert after["keys"] == before["keys"]
    assert after["ids"] == before["ids"]
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parameterization", ["mup", "ntk", "mean_field", "standard"])
def test_base_width_is_standard_to_the_bit(name: str, parameterization: str) -> None:
    build, x = MODELS[name]
    plain, model = seeded(build), seeded(build)
    done = transform(model, x, base=64, parameterization=parameterization)
    assert done is model and type(done) is type(plain)
    assert list(done.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in done.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for key, value in plain.state_dict().items():
        assert torch.equal(done.state_dict()[key], value), key
    for mode in (True, False):
        assert torch.equal(done.train(mode)(x), plain.train(mode)(x))


@pytest.mark.parametrize("name", MODELS)
def test_random_state_and_mode_are_left_alone(name: str) -> None:
    build, x = MODELS[name]
    model = seeded(build).eval()
    model.get_submodule(next(iter(dict(model.named_children())))).train()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    transform(model, x, base=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes


def test_wide_model_is_rescaled_as_planned() -> None:
    plain, model = seeded(mlp), seeded(mlp)
    transform(model, MODELS["mlp"][1], base=16)
    for name, parameter in model.named_parameters():
        factor = {"2.bias": 2.0, "4.bias": 2.0, "4.weight": 0.5}.get(name, 1.0)
        assert torch.equal(parameter, plain.get_parameter(name) * factor), name
        assert model.mupass_plan[name].init_factor == factor  # type: ignore[union-attr, index]


def test_standard_scales_nothing_but_carries_a_plan() -> None:
    plain, model = seeded(mlp), seeded(mlp)
    transform(model, MODELS["mlp"][1], base=16, parameterization="standard")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert isinstance(model.mupass_plan, Plan)


def test_tied_readout_gets_its_multiplier_before_the_bias() -> None:
    model = seeded(TiedLM)
    transform(model, IDS, base=16)
    assert isinstance(model, TiedLM)
    plain = seeded(TiedLM)
    with pytest.warns(mupass.MupassWarning, match=r"mupass\.fold"):
        plain.load_state_dict(model.state_dict())  # same weights, no multiplier
    assert isinstance(plain, TiedLM)
    expected = F.linear(plain.features(IDS) / 4, plain.wte.weight, plain.head.bias)
    torch.testing.assert_close(model(IDS), expected)
    assert not torch.allclose(model(IDS), plain(IDS))
    named = model.head(input=model.features(IDS))
    torch.testing.assert_close(named, expected)


def logit_change(d: int, optimizer: str, parameterization: str) -> float:
    """RMS change of the tied model's logits in one small step, mean of three seeds."""
    changes = []
    for seed in range(3):
        model = seeded(TiedLM, d, seed).double()
        transform(model, IDS, base=64, parameterization=parameterization)
        cls = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        step = cls(param_groups(model, 1e-5, optimizer=optimizer))
        before = model(IDS)
        torch.autograd.backward(F.cross_entropy(before.flatten(0, 1), IDS.roll(1).flatten()))
        step.step()
        changes.append(float((model(IDS) - before).detach().square().mean().sqrt()))
    return sum(changes) / len(changes)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tied_model_learns_at_the_same_speed_at_all_widths(optimizer: str) -> None:
    # From 256 on: below, the overlap of random embeddings still adds to their length.
    for parameterization, low, high in (("mup", -0.1, 0.1), ("standard", 0.4, 2.0)):
        moved = [logit_change(d, optimizer, parameterization) for d in (256, 1024)]
        slope = math.log(moved[1] / moved[0]) / math.log(4)
        assert low <= slope <= high, (parameterization, moved)


@pytest.mark.slow
def test_ntk_warns_of_a_tied_readout_whose_logits_grow() -> None:
    size = {}
    for name in ("mup", "ntk"):
        models = [transform(seeded(TiedLM, 64), IDS, base=64, parameterization=name)]
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            models.append(transform(seeded(TiedLM, 1024), IDS, base=64, parameterization=name))
        assert [r.category for r in raised] == [mupass.MupassWarning] * (name == "ntk")
        narrow, wide = (float(model(IDS).detach().square().mean().sqrt()) for model in models)
        size[name] = wide / narrow
        warned = any("grows as sqrt(width)" in w for w in models[0].mupass_plan.warnings)  # type: ignore[union-attr]
        assert warned == (name == "ntk")
    assert size["mup"] < 1.2 and size["ntk"] > 2, size


def test_copies_keep_plan_and_multiplier() -> None:
    model = transform(seeded(TiedLM), IDS, base=16)
    expected = model(IDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(IDS), expected)
        assert twin.mupass_plan == model.mupass_plan


# Dynamo takes the root's hooks as a frame of their own and looks at .grad of the output it is handed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_multiplier_compiles_without_a_break() -> None:
    model = transform(seeded(TiedLM), IDS, base=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))


def test_inplace_false_works_on_a_copy() -> None:
    model = seeded(TiedLM)
    before = state(model)
    done = transform(model, IDS, base=16, inplace=False)
    assert done is not model
    assert_untouched(model, before)
    assert done.wte.weight is done.head.weight  # type: ignore[union-attr]
    assert torch.equal(done(IDS), transform(model, IDS, base=16)(IDS))


def test_saved_plan_gives_the_same_model() -> None:
    first = transform(seeded(TiedLM), IDS, base=16, optimizer="shampoo")
    saved = Plan.from_json(first.mupass_plan.to_json())  # type: ignore[operator, union-attr]
    again = transform(seeded(TiedLM), plan=saved)
    assert torch.equal(first(IDS), again(IDS))
    assert again.mupass_plan == first.mupass_plan
    adam = transform(seeded(TiedLM), plan=saved, optimizer="adam")
    assert adam.mupass_plan == saved.for_optimizer("adam")


def test_saved_plan_of_another_model_is_refused() -> None:
    plan = transform(seeded(mlp), MODELS["mlp"][1], base=16).mupass_plan
    for other in (seeded(mlp)[:-1], seeded(TiedLM)):
        before = state(other)
        with pytest.raises(mupass.PlanError, match="plan of another model"):
            transform(other, plan=plan)  # type: ignore[arg-type]
        assert_untouched(other, before)


@pytest.mark.parametrize(
    "argument",
    [{"base": 32}, {"dims": {"x": "finite"}}, {"parameterization": "ntk"}, {"init": "fan_in"}],
)
def test_saved_plan_and_an_argument_that_it_settles(argument: dict[str, Any]) -> None:
    plan = transform(seeded(mlp), MODELS["mlp"][1], base=16).mupass_plan
    with pytest.raises(mupass.PlanError, match=f"plan= settles {next(iter(argument))}"):
        transform(seeded(mlp), plan=plan, **argument)  # type: ignore[arg-type]


def test_two_parameters_in_one_memory_are_refused_by_name() -> None:
    """A tie by ``.data`` is no tie: the readout's factor would shrink the embedding, without a word."""
    ids = torch.randint(50, (2, 5))
    ties: list[Callable[[TiedLM], None]] = [
        lambda m: setattr(m.head.weight, "data", m.wte.weight.data),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.wte.weight.detach())),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.wte.weight.detach()[:, ::2].repeat(1, 2))),
    ]
    for number, tie in enumerate(ties):
        model = TiedLM()
        model.head.weight = nn.Parameter(torch.randn(50, 64))
        tie(model)
        before = model.wte.weight.detach().clone()
        if number == 2:  # a copy
            transform(model, ids, base=16)
            assert torch.equal(model.wte.weight, before)
            continue
        with pytest.raises(
            mupass.TransformError, match=r"wte.weight and head.weight are two.*model.head.weight ="
        ):
            transform(model, ids, base=16)
        assert torch.equal(model.wte.weight, before)
    # Parts of one buffer, beside each other, one behind the other or by turns.
    for parts in (torch.randn(128, 64).chunk(2), torch.randn(64, 128).chunk(2, 1)):
        model = mlp()
        model[2].weight = nn.Parameter(parts[0])
        model.insert(3, nn.Linear(64, 64))
        model[3].weight = nn.Parameter(parts[1])
        transform(model, torch.randn(2, 20), base=16)


def test_second_transform_is_refused() -> None:
    model = transform(seeded(mlp), MODELS["mlp"][1], base=16)
    before = state(model)
    with pytest.raises(mupass.TransformError, match="transformed already"):
        transform(model, MODELS["mlp"][1], base=16)
    with pytest.raises(mupass.TransformError, match="0 is transformed already"):
        transform(nn.Sequential(model, nn.Linear(10, 10)), MODELS["mlp"][1])
    with pytest.raises(mupass.TransformError, match="transformed already"):
        transform(copy.deepcopy(model), MODELS["mlp"][1])
    assert_untouched(model, before)


def test_wrapped_and_other_objects_are_refused() -> None:
    with pytest.raises(mupass.TransformError, match="transform first, then compile"):
        transform(torch.compile(seeded(mlp), backend="eager"), MODELS["mlp"][1])  # type: ignore[type-var]
    with pytest.raises(mupass.TransformError, match="takes a model .an nn.Module., not a list"):
        transform([1])  # type: ignore[type-var]


def test_tied_readout_without_a_module_says_what_to_write() -> None:
    model = seeded(FunctionalLM)
    before = state(model)
    with pytest.raises(mupass.TransformError) as error:
        transform(model, IDS, base=16)
    for part in ("wte.weight", "aten.linear", "the root module", "self.end = nn.Dropout(0.0)"):
        assert part in str(error.value)
    assert_untouched(model, before)
    assert torch.equal(transform(model, IDS, base=64)(IDS), seeded(FunctionalLM)(IDS))  # no multiplier there


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"optimizer": "sophia"}, mupass.PlanError),
        ({"parameterization": "mupp"}, mupass.PlanError),
        ({"init": "kaiming"}, mupass.PlanError),
        ({"base": -1}, mupass.MupassError),
        ({"base": math.nan}, mupass.MupassError),
        ({"dims": {"nothing": "finite"}}, mupass.MupassError),
        ({"example_inputs": torch.zeros(2, 21)}, mupass.MupassError),
    ],
)
def test_bad_arguments_leave_the_model_untouched(arguments: dict[str, Any], error: type[Exception]) -> None:
    model = seeded(mlp)
    before = state(model)
    with pytest.raises(error):
        transform(model, **{"example_inputs": MODELS["mlp"][1], **arguments})
    assert_untouched(model, before)


@pytest.mark.parametrize("stage", ["mupass._transform.attach", "mupass._rewrite.rescale"])
def test_failure_halfway_is_undone(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, *args: Any) -> None:
        model.get_submodule("up").register_forward_hook(lambda *a: None)
        model.get_submodule("up").left_behind = 1  # type: ignore[assignment]
        raise RuntimeError("no memory")

    model = seeded(TiedLM)
    before = state(model)
    monkeypatch.setattr(stage, fail)
    with pytest.raises(RuntimeError, match="no memory"):
        transform(model, IDS, base=16)
    assert_untouched(model, before)
    monkeypatch.undo()
    transform(model, IDS, base=16)


def test_expanded_parameter_is_refused() -> None:
    model = seeded(mlp)
    model[4].weight = nn.Parameter(torch.randn(1, 64).expand(10, 64))  # type: ignore[index]
    before = state(model)
    with pytest.raises(mupass.TransformError, match="4.weight is an expanded view"):
        transform(model, MODELS["mlp"][1], base=16)
    assert_untouched(model, before)


def test_meta_model_is_planned_and_told_what_remains() -> None:
    model = seeded(mlp).to("meta")
    with pytest.warns(mupass.MupassWarning, match="on the meta device"):
        transform(model, MODELS["mlp"][1].to("meta"), base=16)
    plan = model.mupass_plan
    assert isinstance(plan, Plan)
    assert any("call mupass.initialize(model)" in warning for warning in plan.warnings)
    model.to_empty(device="cpu")
    model.load_state_dict(seeded(mlp).state_dict())
    mupass.initialize(model)
    expected = transform(seeded(mlp), MODELS["mlp"][1], base=16)
    torch.testing.assert_close(model(MODELS["mlp"][1]), expected(MODELS["mlp"][1]))


def test_input_multiplier_is_one_plain_object() -> None:
    hook = InputMultiplier(0.25)
    args, kwargs = hook(nn.Identity(), (torch.ones(2), 7), {"key": 1})
    assert torch.equal(args[0], torch.full((2,), 0.25)) and args[1] == 7 and kwargs == {"key": 1}
    assert pickle.loads(pickle.dumps(hook)) == hook


def test_an_attribute_that_is_called_like_hooks_is_left_alone() -> None:
    model = seeded(mlp)
    model[0].capture_hooks_installed = True  # as some of Hugging Face's models have it
    model = transform(model, MODELS["mlp"][1], base=16)
    assert model[0].capture_hooks_installed is True


def test_the_default_precision_may_be_double() -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)),
        torch.randn(4, 6),
    )
    plan = mupass.transform(copy.deepcopy(net), x, base=8).mupass_plan
    torch.set_default_dtype(torch.float64)
    try:
        assert mupass.transform(net.double(), x.double(), base=8).mupass_plan.entries == plan.entries
    finally:
        torch.set_default_dtype(torch.float32)


class Encoded(nn.Module):
    """A head on an encoder that another model may have as well."""

    def __init__(self, encoder: nn.Module, d: int = 64):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(x)))


@pytest.mark.parametrize("other", ["shares", "is a part", "has a copy"])
def test_what_another_model_has_scaled_is_not_scaled_again(other: str) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = torch.randn(4, 5)
    first = transform(Encoded(encoder), x, base=16)
    second: nn.Module = Encoded(encoder)
    if other == "is a part":
        second = encoder
    if other == "has a copy":
        second = Encoded(copy.deepcopy(encoder))
    before = [p.detach().clone() for model in (first, second) for p in model.parameters()]
    with pytest.raises(mupass.MupassError, match="a second pass would scale them twice"):
        transform(second, x, base=16, init="fan_in")
    after = [p for model in (first, second) for p in model.parameters()]
    assert all(map(torch.equal, after, before))
    # Values that stay are no second scaling, and neither is a model that was built anew.
    transform(second, x, base=16, trained=True)
    transform(Encoded(nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64))), x, base=16)


@pytest.mark.parametrize("how", ["new module", "around", "elsewhere"])
def test_a_multiplier_that_went_with_its_module_is_told(how: str, recwarn: Any) -> None:
    torch.manual_seed(0)
    ids = torch.arange(8)[None]
    model = transform(TiedLM(), ids, base=16)
    steps = torch.optim.AdamW(param_groups(model, lr=1e-3))
    muon = mupass.Muon(model)
    head = model.head
    if how == "new module":
        model.head = nn.Linear(64, 50)
        model.head.weight, model.head.bias = head.weight, head.bias
    elif how == "around":
        model.head = nn.Sequential(head)
    else:
        model.head = torch.compile(head, backend="eager")
    for optimizer in (steps, muon, muon, steps):
        model(ids).square().mean().backward()
        optimizer.step()
    lost = [str(w.message) for w in recwarn if "had a multiplier" in str(w.message)]
    assert len(lost) == (2 if how == "new module" else 0)  # each optimizer says so once
    if how == "new module":
        with pytest.warns(mupass.MupassWarning, match=r"^head had a multiplier of mupass.transform"):
            param_groups(model, lr=1e-3)
