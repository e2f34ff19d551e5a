"""State of the optimizers: by parameter, checked as a whole before anything is loaded, divided over ranks."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from plans import transformed
from ranks import free_port, one_of_two
from test_optim import OPTIONS, assert_equal, every, make, train
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import mupass
from mupass._optim.saved import copy_state

Entry = dict[str, Tensor]


def same(first: Any, second: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def trained(name: str, steps: int = 3) -> tuple[nn.Module, Any]:
    cls, options = OPTIONS[name]
    net = make()
    optimizer = cls(net, 0.01, **options)
    train(net, optimizer, range(steps))
    return net, optimizer


@pytest.mark.sample(every=2)
@every
def test_torchs_functions_for_checkpoints_carry_all_of_it(cls: Any, options: dict[str, Any]) -> None:
    net = make()
    optimizer = cls(net, 0.01, **options)
    train(net, optimizer, range(4))
    weights, state = get_state_dict(net, optimizer)
    file = io.BytesIO()
    torch.save((weights, state), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    assert any("fc.weight" in str(key) for key in state["state"])  # by name
    other = make(seed=1)
    restored = cls(other, 0.7, **options)
    set_state_dict(other, restored, model_state_dict=weights, optim_state_dict=state)
    train(net, optimizer, range(4, 8))
    train(other, restored, range(4, 8))
    assert_equal(net, other)
    assert restored.param_groups[0]["lr"] == 0.01


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", OPTIONS)
def test_everything_is_in_the_state_of_parameters(name: str) -> None:
    net, optimizer = trained(name)
    found = optimizer.state_dict()
    assert set(found) == {"state", "param_groups"}
    own = [c.parameter for c in optimizer.coverage() if c.treatment.split()[0] not in ("adamw", "sgd")]
    assert all(optimizer.state[net.get_parameter(n)] for n in own)


class Ordered(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(10, 32), nn.Linear(32, 4)
        for name in order:
            setattr(self, name, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.stem(x)))))))


@pytest.mark.sample(every=2)
@every
def test_a_state_of_parameters_in_another_order_is_refused_or_taken_by_name(
    cls: Any, options: dict[str, Any]
) -> None:
    nets = [transformed(Ordered, order, inputs=torch.ones(4, 10), base=8) for order in ("ab", "ba", "ab")]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [cls(net, 0.01, **options) for net in nets]

    def advance(net: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(16, 10, generator=torch.Generator().manual_seed(step))
            F.cross_entropy(net(x), torch.arange(16) % 4).backward()
            optimizer.step()

    advance(nets[0], optimizers[0], range(3))
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(mupass.OptimizerError, match=r"of the state has 'a\.\w+' .* 'b\.\w+'"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert same(optimizers[1].state_dict(), before)
    optimizers[2].load_state_dict(optimizers[0].state_dict())
    # torch's functions match them by name.
    weights, state = get_state_dict(nets[0], optimizers[0])
    set_state_dict(nets[1], optimizers[1], model_state_dict=weights, optim_state_dict=state)
    for net, optimizer in zip(nets[:2], optimizers[:2], strict=True):
        advance(net, optimizer, range(3, 5))
    for name, p in nets[0].named_parameters():
        torch.testing.assert_close(p, nets[1].get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.sample(every=3)
@every
def test_a_state_for_a_model_without_values_is_refused(cls: Any, options: dict[str, Any]) -> None:
    net = mupass.transform(Ordered("ab"), torch.ones(4, 10), base=8)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", mupass.MupassWarning)
        empty = mupass.transform(Ordered("ab"), plan=net.mupass_plan)  # type: ignore[arg-type]
    with pytest.raises(mupass.OptimizerError, match=r"stem.weight is on the meta device"):
        cls(empty, 0.01, **options).load_state_dict(cls(net, 0.01, **options).state_dict())


def damages(entry: Entry) -> list[tuple[str, str, Callable[[Entry], Any]]]:
    """Ways to damage the state of a parameter: what, at which key, how."""
    found: list[tuple[str, str, Callable[[Entry], Any]]] = []
    for key, value in entry.items():
        assert value.is_floating_point(), key
        ways: dict[str, Any] = {
            "shape": torch.zeros(*value.shape, 2),
            "type": 3,
            "whole numbers": torch.zeros_like(value, dtype=torch.int64),
            "NaN": torch.full_like(value, math.nan),
            "infinity": torch.full_like(value, math.inf),
            "sparse": value.to_sparse() if value.dim() else 3,
        }
        signless = ("weight", "weights", "square", "peak", "rooted", "rho", "values", "sum")
        if key.rstrip("0123456789").endswith(signless) and value.numel():
            ways["negative"] = value - value.abs().amax() - 1
        found.append(("missing", key, lambda e, k=key: e.pop(k)))
        for what, bad in ways.items():
            found.append((what, key, lambda e, k=key, b=bad: e.__setitem__(k, b)))
    return found


@pytest.mark.sample("kfac")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    net, optimizer = trained(name)
    good, _ = optimizer.state_dict(), train(net, optimizer, range(3, 5))
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    tried = 0
    for number, entry in good["state"].items():
        for what, key, damage in damages(entry):
            bad = {**good, "state": {**good["state"], number: dict(entry)}}
            damage(bad["state"][number])
            with pytest.raises(mupass.OptimizerError, match="state of|has shape"):
                optimizer.load_state_dict(bad)
                pytest.fail(f"{what} of {key} of parameter {number}")
            tried += 1
    assert tried > 30
    assert same(optimizer.state_dict(), before) and same(net.state_dict(), weights)


GROUPS: list[tuple[str, Any]] = [
    *[("lr", v) for v in (math.nan, -1.0, "0.1", None, torch.tensor(math.nan))],
    *[("weight_decay", v) for v in (math.inf, -1.0)],
    *[("momentum", v) for v in (1.0, -0.1)],
    *[("betas", v) for v in ((0.9,), (0.9, 1.0), 0.9)],
    *[("mupass_steps", v) for v in (-1, 2.5, "3")],
    *[(key, 1) for key in ("mupass_watching", "mupass_due")],
    ("mupass_kind", "Shampoo"),
    *[("mupass_names", v) for v in (None, [], 3)],
    ("mupass_scale", 3.0),
    ("params", None),
    ("params", [0]),
    ("params", [[]]),
]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("key, value", GROUPS, ids=[f"{k}={v!r}" for k, v in GROUPS])
def test_damaged_groups_are_refused(key: str, value: Any) -> None:
    net, optimizer = trained("kfac")
    bad = optimizer.state_dict()
    before = copy.deepcopy(bad)
    group = next(g for g in bad["param_groups"] if g["algorithm"] == ("adamw" if key == "betas" else "kfac"))
    group[key] = value
    with pytest.raises(mupass.OptimizerError):
        optimizer.load_state_dict(bad)
    del group[key]
    with pytest.raises(mupass.OptimizerError):
        optimizer.load_state_dict(bad)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_a_state_from_before_a_scheduler_takes_what_that_added_away(name: str) -> None:
    """As finders of a rate do: they save, try rates by a scheduler of their own, and load."""
    net, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    assert "initial_lr" in optimizer.param_groups[0]
    optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict()["param_groups"], saved["param_groups"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [group["lr"] / 2 for group in saved["param_groups"]]


@pytest.mark.parametrize("name", ["kfac", "muon"])
def test_hooks_of_loading_are_called_as_torch_calls_them(name: str) -> None:
    _, optimizer = trained(name)
    saved, loaded = copy.deepcopy(optimizer.state_dict()), []
    optimizer.register_load_state_dict_pre_hook(lambda own, state: {**state, "state": state["renamed"]})
    optimizer.register_load_state_dict_post_hook(lambda own: loaded.append(own))
    given = {"renamed": saved["state"], "param_groups": saved["param_groups"]}
    optimizer.load_state_dict(given)
    assert loaded == [optimizer] and given.keys() == {"renamed", "param_groups"}
    assert same(optimizer.state_dict(), saved)


@pytest.mark.parametrize("bad", [None, [], {}, {"state": {}}, {"state": [], "param_groups": []}], ids=repr)
def test_what_is_no_state_is_refused(bad: Any) -> None:
    _, optimizer = trained("muon", 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(mupass.OptimizerError):
        optimizer.load_state_dict(bad)
    stray = copy.deepcopy(before)
    stray["state"][99] = {}
    with pytest.raises(mupass.OptimizerError, match="unknown parameters: 99"):
        optimizer.load_state_dict(stray)
    assert same(optimizer.state_dict(), before)


def test_numbers_of_rows_come_with_a_loaded_state_between_two_collections() -> None:
    def train(model: nn.Module, optimizer: Any, rows: int, steps: int) -> None:
        for _ in range(steps):
            x = torch.linspace(-1, 1, 6 * rows, dtype=torch.float64).reshape(rows, 6).sin()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    # Directions are longer where steps have fewer than 256 rows. Factors are collected at steps 0, 4 and 8.
    runs = []
    for rows in (8, 512):
        model = build()
        optimizer = mupass.KFAC(model, factor_every=4, root_every=4)
        train(model, optimizer, rows, 6)
        runs.append((model, optimizer))
    (few, its_optimizer), (many, other_optimizer) = runs
    many.load_state_dict(few.state_dict())
    other_optimizer.load_state_dict(its_optimizer.state_dict())
    for model, optimizer in runs:
        train(model, optimizer, 8, 2)
    for parameter, same_parameter in zip(few.parameters(), many.parameters(), strict=True):
        assert torch.equal(parameter, same_parameter)


# Ranks -----------------------------------------------------------------------------------------------------

RANKED: dict[str, Callable[[nn.Module], Any]] = {
    "kfac": lambda net: mupass.KFAC(net, 0.05, 1e-2, root_every=2, stagger=False, kl_clip=1e-2),
    "shampoo": lambda net: mupass.Shampoo(net, 0.01, root_every=2, staggered=False, block_size=8),
    "soap": lambda net: mupass.SOAP(net, 0.01, basis_every=2, staggered=False, block_size=3),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    sizes, layers = [6, 15, 15, 15, 15, 15, 3], []  # in whole blocks of 3: bases of full rank
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    example = torch.zeros(2, 6, dtype=torch.float64)
    return mupass.transform(nn.Sequential(*layers[:-1]).double(), example, base=5)


def go_on(model: nn.Module, optimizer: Any, rows: slice, at: range) -> None:
    for seed in at:
        torch.manual_seed(seed)
        x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def held(optimizer: Any) -> int:
    """Bytes of the preconditioner that this process has."""
    entries = [(k, t) for s in optimizer.state.values() for k, t in s.items() if "." in k]
    return sum(t.numel() * t.element_size() for _, t in entries if t.device.type != "meta")


def _rank(rank: int, port: int, name: str, path: Path) -> None:
    with one_of_two(rank, port):
        rows = slice(32 * rank, 32 * rank + 32)
        model = nn.parallel.DistributedDataParallel(build())
        optimizer = RANKED[name](model)
        go_on(model, optimizer, rows, range(4))
        state = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
        go_on(model, optimizer, rows, range(4, 7))
        through = [p.detach().clone() for p in model.parameters()]
        second = nn.parallel.DistributedDataParallel(build())
        restored = RANKED[name](second)
        alone = torch.load(path / "alone.pt")
        second.module.load_state_dict(alone[0])
        restored.load_state_dict(alone[1])
        go_on(second, restored, rows, range(4, 7))
        others = [p.detach().clone() for p in second.parameters()]
        torch.save((state, through, others, held(optimizer)), path / f"rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKED)
def test_ranks_share_the_preconditioner_and_states_go_from_two_to_one_and_back(
    name: str, tmp_path: Path
) -> None:
    alone = build()
    optimizer = RANKED[name](alone)
    everything = slice(0, 64)
    go_on(alone, optimizer, everything, range(4))
    torch.save((alone.state_dict(), optimizer.state_dict()), tmp_path / "alone.pt")
    whole = held(optimizer)
    go_on(alone, optimizer, everything, range(4, 7))
    want = [p.detach() for p in alone.parameters()]
    mp.spawn(_rank, (free_port(), name, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same(parts[0][0], parts[1][0])  # every rank returns all of the state
    assert max(part[3] for part in parts) <= 0.55 * whole and sum(part[3] for part in parts) == whole
    (weights, state), through, others, _ = parts[0]
    restored_model = build()
    restored = RANKED[name](restored_model)
    restored_model.load_state_dict(weights)
    restored.load_state_dict(state)
    go_on(restored_model, restored, everything, range(4, 7))
    for p, q, r, s in zip(want, restored_model.parameters(), through, others, strict=True):
        for other in (q.detach(), r, s):
            torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("saved_as", ["whole", "shard"])
def test_a_state_of_all_ranks_is_cut_to_the_part_of_each(saved_as: str) -> None:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())  # the second of two, alone
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.arange(12.0).view(4, 3)
        parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)], src_data_rank=None))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        momentum = optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        saved = whole
        if saved_as == "shard":
            saved = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        copy_state(optimizer, [{}], {parameter: {"momentum_buffer": saved}})
        assert torch.equal(momentum.to_local(), whole[2:])
    finally:
        dist.destroy_process_group()


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:.*skipped steps")
@pytest.mark.parametrize("cut", [1, 5, 6, 7])
@pytest.mark.parametrize("bad", [0, 5])
def test_a_run_goes_on_where_a_step_was_skipped(bad: int, cut: int) -> None:
    """Factors were due in it, and are collected as late as in the run that was not cut.

    Whether a root is that of the present average is told anew, so that the two differ by rounding.
    """
    ends = []
    for saved_at in (None, cut):
        net = make()
        optimizer = mupass.KFAC(net, 0.05, factor_every=5, root_every=5)
        for step in range(9):
            if step == saved_at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = mupass.KFAC(net, 0.05, factor_every=5, root_every=5)
                optimizer.load_state_dict(state)
            if step == bad:
                spoiled = net.fc.register_forward_hook(lambda module, args, out: out * math.nan)
            train(net, optimizer, range(step, step + 1))
            if step == bad:
                spoiled.remove()
        ends.append(net)
    for one, other in zip(*(net.parameters() for net in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
