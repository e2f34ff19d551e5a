"""Bad calls and damaged files: an error of mupass and nothing changed; no raw error, no spoilt weight."""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupass
from mupass._runs.store import Store

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

X, Y = torch.randn(8, 10), torch.arange(8) % 4
DATA = [(X, Y)]
pytestmark = pytest.mark.filterwarnings("ignore::mupass.MupassWarning")


def budget(count: int) -> Any:
    """Return settings of a deterministic search that is not timed."""
    health = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=health
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def ready() -> nn.Module:
    return mupass.transform(net(), X, base=16)


class Odd:
    """Something that nobody expects."""


def odd_values() -> Any:
    """Return values of every kind that an argument may be given by mistake."""
    number = st.one_of(
        st.sampled_from(
            [0, -1, 1, 2, 10**400, 0.0, -0.0, 1e300, -1e300, 1e-300, math.nan, math.inf, -math.inf]
        ),
        st.integers(-3, 70),
        st.floats(),
    )
    text = st.one_of(
        st.sampled_from(["", "mup", "kfac", "auto", "resnet18", "*", "(", "0.weight", "relative"]), st.text()
    )
    leaf = st.one_of(number, text, st.booleans(), st.none(), st.binary(max_size=3))
    nest = st.one_of(
        st.lists(leaf, max_size=3),
        st.dictionaries(st.one_of(text, st.integers()), leaf, max_size=2),
        st.tuples(leaf, leaf),
    )
    thing = st.sampled_from(
        [Odd, Odd(), len, lambda: None, torch.ones(3), torch.float32, nn.Linear, complex(1, 2), iter([])]
    )
    return st.one_of(leaf, nest, thing)


TARGETS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "analyze": (
        lambda m, **k: mupass.analyze(m, **{"example_inputs": X, **k}),
        ("example_inputs", "base", "dims"),
    ),
    "transform": (
        lambda m, **k: mupass.transform(
            m, **({} if "plan" in k else {"example_inputs": X}) | {"base": 16} | k
        ),
        ("example_inputs", "base", "dims", "optimizer", "parameterization", "init", "depth", "plan"),
    ),
    "resize": (
        lambda m, **k: mupass.resize(
            m, **{"example_inputs": X, **({} if "scale" in k else {"width": 16}), **k}
        ),
        ("width", "scale", "dims", "init"),
    ),
    "initialize": (lambda m, **k: mupass.initialize(m, **k), ("init",)),
    "param_groups": (
        lambda m, **k: mupass.param_groups(m, **{"lr": 0.1, **k}),
        ("lr", "optimizer", "weight_decay", "eps", "alignment"),
    ),
    "KFAC": (
        lambda m, **k: mupass.KFAC(m, **{"lr": 0.1, **k}),
        (
            "lr",
            "damping",
            "damping_mode",
            "momentum",
            "weight_decay",
            "fallback",
            "fallback_lr",
            "exclude",
            "e_a",
            "e_b",
        ),
    ),
    "Shampoo": (
        lambda m, **k: mupass.Shampoo(m, **{"lr": 0.1, **k}),
        ("lr", "damping", "momentum", "roles", "e", "graft", "block_size", "kernels", "fallback"),
    ),
    "SOAP": (
        lambda m, **k: mupass.SOAP(m, **{"lr": 0.1, **k}),
        ("lr", "roles", "block_size", "weight_decay"),
    ),
    "Muon": (lambda m, **k: mupass.Muon(m, **{"lr": 0.1, **k}), ("lr", "roles", "momentum", "weight_decay")),
    "FoMoH": (lambda m, **k: mupass.FoMoH(m, **k), ("lr", "damping", "directions")),
    "coord_check": (
        lambda m, **k: mupass.coord_check(
            m, **{"data": DATA, "widths": [16, 32], "steps": 1, "seeds": 2, **k}
        ),
        ("data", "widths", "steps", "seeds", "optimizer", "lr", "parameterization", "dims", "loss"),
    ),
    "sweep": (
        lambda m, **k: mupass.sweep(
            m, **{"data": DATA, "grid": [0.1], "widths": [16], "steps": 1, "progress": False, **k}
        ),
        ("data", "grid", "widths", "steps", "seeds", "optimizer", "parameterization", "dims", "jobs", "loss"),
    ),
    "transfer": (
        lambda m, **k: mupass.transfer(
            m, **{"data": DATA, "grid": [0.1], "proxy": 16, "steps": 1, "progress": False, **k}
        ),
        (
            "data",
            "grid",
            "proxy",
            "target",
            "steps",
            "seeds",
            "driver",
            "optimizer",
            "parameterization",
            "jobs",
        ),
    ),
    "hypergradient": (
        lambda m, **k: mupass.hypergradient(m, **{"data": DATA, "point": {"lr": 0.1}, "steps": 1, **k}),
        ("data", "point", "steps", "optimizer", "form", "mode", "solver"),
    ),
}
FRESH = ("analyze", "transform", "resize", "coord_check", "sweep", "transfer")
NARROW = {"width", "scale", "widths", "proxy", "target", "steps", "seeds", "jobs", "directions", "block_size"}


def state_of(model: Any) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in model.state_dict().items()} if isinstance(model, nn.Module) else {}


def attempt(name: str, model: Any, arguments: dict[str, Any]) -> None:
    """Call, and judge what it did."""
    call = TARGETS[name][0]
    before, marked = state_of(model), isinstance(model, nn.Module) and "mupass_plan" in vars(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        result = call(model, **arguments)
    except mupass.MupassError as error:
        assert str(error).strip(), "an error without a word"
        after = state_of(model)
        assert all(torch.equal(p, after[n]) for n, p in before.items()), "a refused call changed the model"
        if isinstance(model, nn.Module):
            assert ("mupass_plan" in vars(model)) == marked
            assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
        return
    for found in (result, model):
        if isinstance(found, nn.Module):
            assert all(p.isfinite().all() for p in found.parameters()), "a weight is not finite"
    if isinstance(result, torch.optim.Optimizer) and name != "FoMoH":
        F.cross_entropy(model(X), Y).backward()
        result.step()


@pytest.mark.slow
@budget(250)
@hypothesis.given(st.data())
def test_no_bad_call_ends_in_a_raw_error(data: Any) -> None:
    name = data.draw(st.sampled_from(list(TARGETS)))
    argument = data.draw(st.sampled_from(TARGETS[name][1]))
    value = data.draw(odd_values())
    # Sizes that are in order but take hours are no bad calls.
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    hypothesis.assume(not (argument in NARROW and whole and 4 < value < math.inf))
    model = net() if name in FRESH else ready()
    attempt(name, model, {argument: value})


GIVEN = {
    "a generator of parameters": lambda: net().parameters(),
    "None": lambda: None,
    "a text": lambda: "resnet18",
    "a class": lambda: nn.Linear,
    "a state": lambda: net().state_dict(),
    "a list": lambda: [net()],
    "a number": lambda: 3,
    "a plan": lambda: ready().mupass_plan,
    "an empty module": nn.Identity,
}


@pytest.mark.sample
@pytest.mark.parametrize("given", list(GIVEN))
@pytest.mark.parametrize("name", [n for n in TARGETS if n not in ("coord_check", "sweep")])
def test_what_is_no_model_is_refused_by_name(name: str, given: str) -> None:
    with pytest.raises(mupass.MupassError, match="(?i)model|module|parameters"):
        TARGETS[name][0](GIVEN[given]())


@pytest.mark.parametrize(
    "given", ["a generator of parameters", "None", "a text", "a state", "a list", "a number"]
)
@pytest.mark.parametrize("name", ["coord_check", "sweep"])
def test_what_builds_no_model_is_refused_by_name(name: str, given: str) -> None:
    with pytest.raises(mupass.MupassError, match="(?i)model"):
        TARGETS[name][0](GIVEN[given]())


@pytest.mark.parametrize(
    "base", [0, -1, math.nan, math.inf, 1e300, 1e-300, True, "64", [64], {"w": 0}, {3: 4}]
)
def test_a_base_that_is_no_width_is_refused(base: Any) -> None:
    model = net()
    attempt("transform", model, {"base": base})
    assert not hasattr(model, "mupass_plan")


# ------------------------------------------------------------------------------------- damaged plans


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a nest."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    found = [path]
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def damaged(value: Any, path: tuple[Any, ...], how: Callable[[Any, Any], None]) -> Any:
    """Return a copy of a nest with one place damaged."""
    value = copy.deepcopy(value)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    how(owner, path[-1])
    return value


WORDS = [
    None,
    True,
    -1,
    0,
    0.0,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    10**400,
    [[]],
]
PLAN = json.loads(ready().mupass_plan.to_json())
PLAN_PLACES = [path for path in places(PLAN) if path]


def how_to_damage(data: Any) -> Callable[[Any, Any], None]:
    kind = data.draw(st.sampled_from(["set", "set", "delete", "double", "add"]))
    word = data.draw(st.sampled_from(WORDS))

    def how(owner: Any, key: Any) -> None:
        if kind == "set":
            owner[key] = word
        elif kind == "delete":
            del owner[key]
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]) if kind == "double" else word)
        else:
            owner[f"{key}2" if kind == "double" else "unknown"] = owner[key]

    return how


def judge_plan(text: str) -> None:
    """Read a plan and use it: refused by name with all as it was, or of finite effect."""
    model = net()
    before = state_of(model)
    try:
        plan = mupass.Plan.from_json(text)
        mupass.transform(model, plan=plan)
    except mupass.MupassError:
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert not hasattr(model, "mupass_plan")
        return
    assert all(p.isfinite().all() for p in model.parameters())
    for optimizer in ("adamw", "kfac", "shampoo"):
        scales = [e.scales for e in plan.for_optimizer(optimizer).entries]
        assert all(0 < s.lr < math.inf and 0 < s.multiplier < math.inf for s in scales)
    mupass.Plan.from_json(plan.to_json())


@pytest.mark.slow
@budget(400)
@hypothesis.given(st.data())
def test_no_damaged_plan_ends_in_a_raw_error(data: Any) -> None:
    path = data.draw(st.sampled_from(PLAN_PLACES))
    judge_plan(json.dumps(damaged(PLAN, path, how_to_damage(data))))


@pytest.mark.slow
@budget(60)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from(["", "\0", "}", "NaN", "1e999", '"']))
def test_no_torn_plan_ends_in_a_raw_error(cut: int, word: str) -> None:
    text = json.dumps(PLAN)
    judge_plan(text[: cut % len(text)] + word)
    judge_plan(text[: cut % len(text)] + word + text[cut % len(text) :])


@pytest.mark.parametrize(
    "text", [None, 3, b"\xff\xfe", "[]", "{}", "null", "[" * 100000, '{"version": 6, "version": 6}']
)
def test_what_is_no_plan_is_refused(text: Any) -> None:
    with pytest.raises(mupass.PlanError):
        mupass.Plan.from_json(text)


# ------------------------------------------------------------------------------------- damaged states

MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "KFAC": lambda m: mupass.KFAC(m, lr=0.01),
    "Shampoo": lambda m: mupass.Shampoo(m, lr=0.01),
    "SOAP": lambda m: mupass.SOAP(m, lr=0.01),
    "Muon": lambda m: mupass.Muon(m, lr=0.01),
}


def stepped(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = ready()
    optimizer = MAKERS[name](model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model, optimizer


def same(a: Any, b: Any) -> bool:
    """Return whether two nests are equal, NaN counting as itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


# Depends on the optimizers' states being refused as a whole and checked before anything is loaded.
@pytest.mark.slow
@budget(150)
@hypothesis.given(st.data())
def test_no_damaged_state_is_half_loaded(data: Any) -> None:
    name = data.draw(st.sampled_from(list(MAKERS)))
    model, optimizer = stepped(name)
    state = copy.deepcopy(optimizer.state_dict())
    path = data.draw(st.sampled_from([p for p in places(state) if p]))
    words = [None, "x", [], -1.0, math.nan, torch.ones(3), torch.full((2, 2), math.nan)]
    word = data.draw(st.sampled_from(words))
    delete = data.draw(st.booleans())

    def how(owner: Any, key: Any) -> None:
        if delete:
            del owner[key]
        elif isinstance(owner, tuple):
            raise TypeError
        elif isinstance(owner[key], Tensor) and word is None and owner[key].is_floating_point():
            owner[key] = owner[key] * math.nan
        else:
            owner[key] = word

    try:
        broken = damaged(state, path, how)
    except TypeError:  # a tuple
        return
    weights = state_of(model)
    try:
        optimizer.load_state_dict(broken)
    except mupass.MupassError:
        assert same(optimizer.state_dict(), state), "a refused state was half loaded"
    else:
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters()), f"{name}: {path} spoils the weights"
        return
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())


# ------------------------------------------------------------------------------------- damaged stores


def swept(path: Path) -> mupass.Sweep:
    return mupass.sweep(net(), DATA, [0.1, 0.2], widths=[16], steps=1, store=path, progress=False)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("store") / "runs.db"
    swept(path)
    return path.read_bytes()


@pytest.mark.slow
def test_no_damaged_store_ends_in_a_raw_error(complete: bytes, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"

    @budget(150)
    @hypothesis.given(
        st.integers(0, len(complete) - 1), st.integers(0, 255), st.integers(1, 400), st.booleans()
    )
    def run(place: int, byte: int, length: int, cut: bool) -> None:
        end = b"" if cut else complete[place + length :]
        path.write_bytes(
            complete[:place] + (b"" if cut else bytes([byte]) * min(length, len(complete) - place)) + end
        )
        held = path.read_bytes()
        try:
            with Store(path) as store:
                for (key,) in store.connection.execute("select key from runs").fetchall():
                    assert store.get(key) is None or isinstance(store.get(key), float)
        except mupass.StudyError:
            assert path.read_bytes() == held, "a refused file was changed"
        except sqlite3.DatabaseError:  # of the test's own query
            pass

    run()


@pytest.mark.slow
@budget(60)
@hypothesis.given(
    st.sampled_from(["studies", "runs"]), st.lists(st.sampled_from("abcd"), unique=True, min_size=1)
)
def test_other_tables_are_refused(table: str, columns: list[str]) -> None:
    path = Path("/tmp") / f"mupass-fuzz-{id(columns)}.db"
    connection = sqlite3.connect(path)
    try:
        connection.execute(f"create table {table} ({', '.join(columns)})")
        connection.commit()
        connection.close()
        with pytest.raises(mupass.StudyError, match="not a store of this version"):
            Store(path)
    finally:
        path.unlink()
