"""The plan survives what attributes on tensors do not: copies, sharding, export, functional calls."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port, one_of_two
from torch import Tensor, nn

import mupass
from mupass._scales.plan import plan_of


class Net(nn.Module):
    """A tied language model small enough for every test; a top-level class, so that it pickles."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.up, self.down, self.norm = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.LayerNorm(d)
        self.head = nn.Linear(d, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


IDS = torch.arange(12).reshape(3, 4) % 11


def make() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Net(), IDS, base=8)


def scales_of(model: nn.Module) -> list[tuple[int, float]]:
    groups = mupass.param_groups(model, lr=1.0, optimizer="adamw")
    return [(len(g["params"]), g["lr"]) for g in groups]


@pytest.fixture
def model() -> nn.Module:
    return make()


def test_the_plan_is_not_trivial(model: nn.Module) -> None:
    assert {lr for _, lr in scales_of(model)} == {1.0, 0.25}
    plan = plan_of(model)[1]
    assert plan["embed.weight"].scales.multiplier == 0.25
    assert plan["head.weight"] is plan["embed.weight"]


def test_deepcopy_is_independent_and_complete(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    assert scales_of(twin) == scales_of(model)
    assert torch.equal(twin(IDS), model(IDS))
    with torch.no_grad():
        twin.up.weight.zero_()
    assert not torch.equal(twin(IDS), model(IDS))


def test_pickle_and_torch_save(model: nn.Module) -> None:
    for twin in (pickle.loads(pickle.dumps(model)), _torch_round_trip(model)):
        assert scales_of(twin) == scales_of(model)
        assert torch.equal(twin(IDS), model(IDS))


def _torch_round_trip(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_meta_to_empty_then_load(model: nn.Module) -> None:
    with torch.device("meta"):
        with pytest.warns(mupass.MupassWarning, match="on the meta device"):
            hollow = mupass.transform(Net(), IDS.to("meta"), base=8)
    hollow = hollow.to_empty(device="cpu")
    with pytest.warns(mupass.MupassWarning, match=r"mupass\.fold"):
        hollow.load_state_dict(model.state_dict())
    hollow.head.weight = hollow.embed.weight  # to_empty breaks ties, in plain PyTorch too
    assert scales_of(hollow) == scales_of(model)
    assert torch.equal(hollow(IDS), model(IDS))


def test_state_dict_reload_needs_no_new_transform(model: nn.Module) -> None:
    plain = Net()
    with pytest.warns(mupass.MupassWarning, match=r"mupass\.fold"):
        assert list(plain.state_dict()) == list(model.state_dict())
    other = mupass.transform(Net(), IDS, base=8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_a_saved_plan_gives_the_same_model(model: nn.Module) -> None:
    plan = mupass.Plan.from_json(plan_of(model)[1].to_json())
    torch.manual_seed(0)
    again = mupass.transform(Net(), plan=plan)
    assert torch.equal(again(IDS), model(IDS)) and scales_of(again) == scales_of(model)


def test_export_contains_the_multiplier(model: nn.Module) -> None:
    program = torch.export.export(model, (IDS,))
    torch.testing.assert_close(program.module()(IDS), model(IDS))


def test_functional_call(model: nn.Module) -> None:
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, state, (IDS,), tie_weights=True), model(IDS))


def _worker(rank: int, port: int, queue: mp.SimpleQueue) -> None:
    with one_of_two(rank, port):
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        single = make()
        wrapped = DistributedDataParallel(make())
        sharded = make()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in (sharded.up, sharded.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        results = {}
        for name, model in (("single", single), ("ddp", wrapped), ("fsdp2", sharded)):
            optimizer = torch.optim.AdamW(mupass.param_groups(model, lr=0.01), foreach=False)
            for _ in range(3):
                optimizer.zero_grad()
                model(IDS).square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                results[name] = (scales_of(model), model(IDS).tolist())
        if rank == 0:
            queue.put(results)


@pytest.mark.slow
def test_ddp_and_fsdp2_train_like_one_process() -> None:
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (free_port(), queue), nprocs=2)
    results = queue.get()
    for name in ("ddp", "fsdp2"):
        assert results[name][0] == results["single"][0], name
        torch.testing.assert_close(
            torch.tensor(results[name][1]), torch.tensor(results["single"][1]), rtol=1e-5, atol=1e-6
        )
