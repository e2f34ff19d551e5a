"""Rates in training: schedules that lose ratios are told in that step, as are optimizers without a plan."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plans import transformed
from torch import nn
from torch.optim import lr_scheduler as schedules

import mupass

X, Y = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


def plain_mlp() -> nn.Module:
    layers = nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 4)
    return nn.Sequential(*layers)


def mlp(base: int = 32) -> nn.Module:
    return transformed(plain_mlp, inputs=X, base=base)


def train(
    model: nn.Module, optimizer: Any, after: Callable[[], Any] = lambda: None, steps: int = 4
) -> list[int]:
    """Return the steps in which a warning was given."""
    told = []
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [step] * len(caught)
        assert all(w.category is mupass.MupassWarning for w in caught)
        after()
    return told


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(mupass.param_groups(model, lr=1e-3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(mupass.param_groups(model, lr=1e-2, optimizer="sgd"), momentum=0.9)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return mupass.Muon(model, lr=0.02, fallback_lr=1e-3)


MULTIPLY: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "warmup from zero": lambda o: schedules.LambdaLR(o, lambda step: step / 4),
    "step": lambda o: schedules.StepLR(o, 1, 0.3),
    "cosine to zero": lambda o: schedules.CosineAnnealingLR(o, T_max=4),
    "cosine, over and over": lambda o: schedules.CosineAnnealingLR(o, T_max=2),
    "linear, then exponential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=4, power=2),
    "by group": lambda o: schedules.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=10),
}
ABSOLUTE: dict[str, tuple[Callable[[Any], Any], int]] = {  # and the step in which ratios are lost
    "cosine": (lambda o: schedules.CosineAnnealingLR(o, T_max=5, eta_min=1e-4), 1),
    "one cycle": (lambda o: schedules.OneCycleLR(o, max_lr=0.02, total_steps=10), 0),
    "cyclic": (lambda o: schedules.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False), 0),
    "swa": (lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3), 1),
}


@pytest.mark.sample
@pytest.mark.parametrize("make", [adamw, sgd, muon])
@pytest.mark.parametrize("name", MULTIPLY)
def test_what_multiplies_is_silent(make: Make, name: str) -> None:
    model = mlp()
    optimizer = make(model)
    schedule = MULTIPLY[name](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the order of calls
        assert train(model, optimizer, schedule.step) == []


@pytest.mark.parametrize("make", [adamw, sgd, muon])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_what_sets_rates_is_told_in_the_step_that_loses_ratios(make: Make, name: str) -> None:
    model = mlp()
    optimizer = make(model)
    build, step = ABSOLUTE[name]
    assert train(model, optimizer, build(optimizer).step) == [step]


def test_the_message_names_the_optimizer_and_what_to_write() -> None:
    model = mlp()
    for optimizer, match in (
        (adamw(model), r"AdamW.*mupass_scale"),
        (muon(model), r"mupass\.Muon.*max_lr=\["),
    ):
        schedules.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)
        nn.functional.cross_entropy(model(X), Y).backward()
        with pytest.warns(mupass.MupassWarning, match=match):
            optimizer.step()


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_loop_that_sets_one_rate(make: Make) -> None:
    model = mlp()
    optimizer = make(model)
    rates = iter([1.0, 0.5, 0.2, 0.1])
    scale = [g["lr"] for g in optimizer.param_groups]

    def multiply() -> None:
        factor = next(rates)
        for group, lr in zip(optimizer.param_groups, scale, strict=True):
            group["lr"] = lr * factor

    assert train(model, optimizer, multiply) == []

    def overwrite() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-4

    assert train(model, optimizer, overwrite) == [1]


def test_rates_by_hand_and_a_loaded_state_are_no_loss() -> None:
    model = mlp()
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr"] *= 0.1  # a slower first layer
    schedule = schedules.StepLR(optimizer, 1, 0.5)
    assert train(model, optimizer, schedule.step) == []
    again = adamw(model)
    again.load_state_dict(optimizer.state_dict())
    assert train(model, again) == []
    own = mupass.Muon(model, lr=0.1, fallback_lr=1e-2)
    own.load_state_dict(muon(model).state_dict())
    assert train(model, own) == []


def test_equal_factors_leave_nothing_to_lose() -> None:
    model = mlp(base=256)
    optimizer = adamw(model)
    assert train(model, optimizer, schedules.OneCycleLR(optimizer, max_lr=0.02, total_steps=10).step) == []


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As trainers make them: one rate, decay for matrices."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2]},
    ]


PLAIN: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
    "groups": lambda m: torch.optim.AdamW(decay_groups(m), lr=1e-3),
    "layers": lambda m: torch.optim.Adam([{"params": c.parameters()} for c in m if list(c.parameters())]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_optimizer_on_a_transformed_model_is_told_once(name: str) -> None:
    for model in (mlp(), torch.compile(mlp(), backend="eager")):
        optimizer = PLAIN[name](getattr(model, "_orig_mod", model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                nn.functional.cross_entropy(model(X), Y).backward()
                optimizer.step()
        text = [str(w.message) for w in caught if w.category is mupass.MupassWarning]
        assert len(text) == 1 and "mupass.param_groups(model" in text[0] and "0.weight" not in text[0][:20]


def test_no_alarm_where_nothing_is_lost() -> None:
    one_factor, standard = mlp(), nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 4))
    mupass.transform(standard, X, base=16, parameterization="standard")
    by_hand = mlp()
    plan = by_hand.mupass_plan.for_optimizer("adamw")
    groups = [{"params": [p], "lr": 1e-3 * plan[n].scales.lr} for n, p in by_hand.named_parameters()]
    base, stranger = mlp(base=256), nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4))
    folded = mupass.fold(mlp(), keep_plan=False)
    for model, optimizer in (
        (one_factor, torch.optim.AdamW(one_factor[4].parameters())),  # the readout alone is trained
        (standard, torch.optim.AdamW(standard.parameters())),
        (by_hand, torch.optim.AdamW(groups)),
        (base, torch.optim.AdamW(base.parameters())),
        (stranger, torch.optim.AdamW(stranger.parameters())),
        (folded, torch.optim.AdamW(folded.parameters())),
    ):
        if optimizer.param_groups[0]["params"][0] is one_factor[4].weight:
            optimizer.param_groups[0]["params"].pop()  # its bias has another factor
        assert train(model, optimizer) == []


@pytest.mark.slow
def test_models_and_optimizers_are_not_kept_alive() -> None:
    import gc

    from mupass._optim.schedules import _watches
    from mupass._scales.marks import marked_models

    model = mlp()
    optimizer = adamw(model)
    train(model, optimizer)
    before = len(marked_models()), len(_watches)
    twin = copy.deepcopy(optimizer)
    del model, optimizer, twin
    gc.collect()
    assert len(marked_models()) < before[0] and len(_watches) < before[1]


@pytest.mark.parametrize("name", ["deep copy", "pickle", "of a copy"])
def test_a_copy_of_a_transformed_model_is_watched_as_well(name: str) -> None:
    model = mlp()
    if name == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        copied = copy.deepcopy(model)
    if name == "of a copy":
        copied = copy.deepcopy(copied)
    assert train(copied, torch.optim.AdamW(copied.parameters(), lr=1e-3)) == [0]
    assert train(copied, adamw(copied)) == []
    plain = mupass.fold(copied, keep_plan=False)
    assert train(copy.deepcopy(plain), torch.optim.AdamW(plain.parameters(), lr=1e-3)) == []


def test_groups_that_were_made_for_another_optimizer_are_told() -> None:
    for made_for, cls, told in [
        ("adamw", torch.optim.SGD, [0]),
        ("sgd", torch.optim.AdamW, [0]),
        ("adam", torch.optim.AdamW, []),  # the same rates
        ("adam", torch.optim.RMSprop, []),  # a class without a row of its own
        ("sgd", torch.optim.SGD, []),
    ]:
        model = mlp()
        groups = mupass.param_groups(model, lr=1e-3, optimizer=made_for)
        assert train(model, cls(groups)) == told, (made_for, cls)
    model = mlp(base=256)  # no factors, nothing to lose
    assert train(model, torch.optim.SGD(mupass.param_groups(model, lr=1e-3))) == []


@pytest.mark.parametrize("key", ["weight_decay", "eps"])
@pytest.mark.parametrize("late", [False, True])
def test_a_number_that_a_loop_sets_for_all_groups_is_told(key: str, late: bool) -> None:
    """A schedule of weight decay, as of DINO: groups have decays that follow the width."""
    model = mlp()
    optimizer = torch.optim.AdamW(mupass.param_groups(model, lr=1e-3, weight_decay=0.1, eps=1e-8))

    def one_for_all() -> None:
        for group in optimizer.param_groups:
            group[key] = 0.2

    if not late:
        one_for_all()
    assert train(model, optimizer, one_for_all) == [int(late)]


def test_numbers_that_follow_the_width_are_no_loss() -> None:
    model = mlp()
    groups = mupass.param_groups(model, lr=1e-3, weight_decay=0.1)
    vectors = [g for g in groups if all(p.dim() < 2 for p in g["params"])]
    assert len({g["weight_decay"] for g in groups}) > 1 and vectors
    for group in vectors:
        group["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups)

    def schedule() -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] *= 1.5
            group["eps"] *= 2

    assert not train(model, optimizer, schedule)
    # At the base width all factors are 1, and one number for all groups is right.
    model = mlp(base=256)
    optimizer = torch.optim.AdamW(mupass.param_groups(model, lr=1e-3, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["weight_decay"], group["eps"] = 0.3, 1e-6
    assert not train(model, optimizer)


def test_a_class_derived_from_one_of_torch_wants_its_groups() -> None:
    class Own(torch.optim.SGD):
        pass

    model = mlp()
    optimizer = Own(mupass.param_groups(model, lr=1e-3))
    model(X).sum().backward()
    with pytest.warns(
        mupass.MupassWarning, match=r"^Own is given groups that mupass.param_groups made for adamw"
    ):
        optimizer.step()
    assert not train(model, Own(mupass.param_groups(model, lr=1e-3, optimizer="sgd")))


@pytest.mark.parametrize(
    ("name", "wrong", "right", "told"),
    [
        ("ASGD", {}, {"optimizer": "sgd"}, "0.weight has the rate times 1, and sgd wants 8"),
        ("Adagrad", {"optimizer": "sgd"}, {}, "0.weight has the rate times 8, and adam wants 1"),
        (
            "RMSprop",
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "optimizer": "adam"},
            "0.weight has the weight decay times 1, and adam wants 0.125",
        ),
        (
            "AdamW",
            {"weight_decay": 0.1, "optimizer": "adam"},
            {"weight_decay": 0.1},
            "0.weight has the weight decay times 0.125, and adamw wants 1",
        ),
        ("Adadelta", {}, None, "mupass.param_groups has no width factors for it"),
    ],
)
def test_groups_for_another_family_of_torchs_optimizers_are_told(
    name: str, wrong: dict[str, Any], right: dict[str, Any] | None, told: str
) -> None:
    model, make = mlp(), getattr(torch.optim, name)
    optimizer = make(mupass.param_groups(model, lr=1e-3, **wrong))
    model(X).sum().backward()
    with pytest.warns(mupass.MupassWarning, match=told):
        optimizer.step()
    if right is not None:
        assert not train(model, make(mupass.param_groups(model, lr=1e-3, **right)))
    narrow = mlp(256)  # at the base width all factors are 1
    assert not train(narrow, make(mupass.param_groups(narrow, lr=1e-3, **wrong)))


@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_parameter_that_was_replaced_is_told_once(make: Make) -> None:
    model = mlp()
    optimizer = make(model)
    assert train(model, optimizer) == []
    model[4] = nn.Linear(256, 4)
    assert train(model, optimizer) == [0]
    frozen = mlp()
    frozen[2].requires_grad_(False)
    assert train(frozen, make(frozen)) == []


def test_keywords_of_a_class_that_groups_override_are_told() -> None:
    def told(cls: Any, keywords: dict[str, Any], **made: Any) -> list[str]:
        model = mlp()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, cls(mupass.param_groups(model, **made), **keywords), steps=1)
            optimizer = cls(mupass.param_groups(model, **made), **keywords)
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
        return [str(w.message) for w in caught]

    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    (text,) = told(adamw, {"lr": 3e-4, "weight_decay": 0.1, "eps": 1e-6}, lr=1e-3)
    for part in ("lr=0.0003 (the groups were made with 0.001)", "weight_decay=0.1", "eps=1e-06"):
        assert part in text
    (text,) = told(sgd, {"weight_decay": 0.1}, lr=1e-2, optimizer="sgd")
    assert "weight_decay=0.1 (the groups were made with 0)" in text
    # The same numbers, zero, and what was left out.
    assert told(adamw, {"lr": 1e-3, "weight_decay": 0.1}, lr=1e-3, weight_decay=0.1) == []
    assert told(adamw, {"weight_decay": 0.0, "betas": (0.8, 0.9)}, lr=1e-3, weight_decay=0.1) == []
    assert told(sgd, {"momentum": 0.9}, lr=1e-2, optimizer="sgd") == []


def test_a_state_with_other_width_factors_is_told() -> None:
    for base, told in [(64, [0]), (32, [])]:
        other = mlp(base=base)
        source = adamw(other)
        train(other, source)
        for steps in (0, 2):  # loaded before the first step, and later
            model = mlp()
            optimizer = adamw(model)
            assert train(model, optimizer, steps=steps) == []
            optimizer.load_state_dict(source.state_dict())
            assert train(model, optimizer) == told


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["assigned", "tied", "parametrized", "folded"])
def test_what_becomes_of_parameters_is_told_to_groups(how: str, late: bool) -> None:
    square = nn.Linear(256, 256), nn.Linear(256, 256)
    model = nn.Sequential(nn.Linear(10, 256), *square, nn.LayerNorm(256), nn.Linear(256, 4))
    optimizer = adamw(mupass.transform(model, X, base=32))
    if late:
        train(model, optimizer, steps=2)
    expected = {
        "assigned": "0.weight, 0.bias, 1.weight, 1.bias, 2.weight",
        "tied": "2.weight was tied to another parameter",
        "parametrized": "2.weight was parametrized",
    }
    if how == "assigned":
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    elif how == "tied":
        model[2].weight = model[1].weight
    elif how == "parametrized":
        nn.utils.parametrizations.spectral_norm(model[2])
    else:  # there is nothing to fold
        mupass.fold(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    texts = [str(w.message) for w in caught]
    assert len(texts) == (how != "folded")
    assert all(expected[how] in text for text in texts)


class TiedReadout(nn.Module):
    """A readout that shares the table of tokens; a norm before it takes its multiplier."""

    def __init__(self, w: int = 32) -> None:
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(20, w), nn.LayerNorm(w), nn.Linear(w, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.tokens(ids)))


@pytest.mark.parametrize("how", ["readout untied", "table untied", "folded"])
def test_what_becomes_of_a_tied_readout_is_told_to_groups(how: str) -> None:
    ids = torch.arange(12).view(2, 6)
    model = mupass.transform(TiedReadout(), ids, base=8)
    optimizer = adamw(model)
    copied = nn.Parameter(model.head.weight.detach().clone())
    if how == "folded":
        mupass.fold(model)
    else:
        (model.head if how == "readout untied" else model.tokens).weight = copied
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
    (text,) = [str(w.message) for w in caught]
    expected = {
        "readout untied": "head.weight came into the model",
        "table untied": "tokens.weight came into the model",
        "folded": "folded after its groups were made, and the rates of norm.weight, norm.bias",
    }
    assert expected[how] in text
