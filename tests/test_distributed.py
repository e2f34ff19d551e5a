"""Two gloo processes with half a batch each take the steps of one process with the whole batch."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import mupass

STEPS = 4


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    return mupass.transform(net.double(), torch.zeros(2, 1, 6, 6, dtype=torch.float64), base=8)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(16) % 3


def train(model: nn.Module, rows: slice, name: str) -> list[torch.Tensor]:
    x, y = data()
    make = {
        "kfac": lambda: mupass.KFAC(model, 0.05, 1e-2),
        # The large layer has fewer rows than inputs: a basis of what none reaches is rounding errors.
        "ekfac": lambda: mupass.KFAC(
            model, 0.05, 1e-2, ekfac=True, sharing="reduce", root_every=2, exclude=["3.weight"]
        ),
        "shampoo": lambda: mupass.Shampoo(model, 0.01),
        # Small blocks, for the same reason.
        "soap": lambda: mupass.SOAP(model, 0.01, basis_every=2, block_size=3),
        "muon": lambda: mupass.Muon(model, 0.01),
    }
    optimizer = make[name]()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _worker(rank: int, port: int, name: str, path: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    try:
        model = nn.parallel.DistributedDataParallel(build())
        trained = train(model, slice(8 * rank, 8 * rank + 8), name)
        other = [p.clone() for p in trained]
        for p in other:
            dist.broadcast(p, src=1)
        if rank == 0:
            apart = max((a - b).abs().max().item() for a, b in zip(trained, other, strict=True))
            torch.save((apart, trained), path)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["kfac", "ekfac", "shampoo", "soap", "muon"])
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, name, tmp_path / "result.pt"), nprocs=2)
    apart, trained = torch.load(tmp_path / "result.pt")
    assert apart == 0
    for ours, theirs in zip(trained, train(build(), slice(0, 16), name), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_data_parallel_needs_a_process_group() -> None:
    with pytest.raises(mupass.OptimizerError, match="init_process_group"):
        mupass.KFAC(build(), 0.1, data_parallel=True)


def norms() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12),
        nn.LayerNorm(12),
        nn.Tanh(),
        nn.Linear(12, 16, bias=False),
        nn.Tanh(),
        nn.Linear(16, 3),
    )
    return mupass.transform(net.double(), torch.zeros(2, 6, dtype=torch.float64), base=8)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, at: range) -> list[torch.Tensor]:
    x, y = data()
    for i in at:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows].flatten(1)[:, i : i + 6]), y[rows]).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def kfac(model: nn.Module, **options: bool) -> mupass.KFAC:
    how = {"root_every": 3, "weight_decay": 0.1, "kl_clip": 1e-2, "exclude": ["3.weight"], **options}
    return mupass.KFAC(model, 0.05, 1e-2, **how)


SHARDED = {
    "kfac": kfac,
    "ekfac": lambda model: kfac(model, ekfac=True),
    "shampoo": lambda model: mupass.Shampoo(model, 0.01, root_every=3, graft="adam", block_size=8),
    "soap": lambda model: mupass.SOAP(model, 0.01, basis_every=2, eigh_every=2, block_size=3),
    "muon": lambda model: mupass.Muon(model, 0.01, fallback="sgd"),
}


def _sharded_worker(rank: int, port: int, name: str, path: Path) -> None:
    from torch.distributed.checkpoint import load, save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    rows = slice(8 * rank, 8 * rank + 8)
    mesh, make = init_device_mesh("cpu", (2,)), SHARDED[name]

    def shard() -> nn.Module:
        model = norms()
        fully_shard(model[3], mesh=mesh)
        return fully_shard(model, mesh=mesh)  # type: ignore[no-any-return]

    try:
        wrapped = nn.parallel.DistributedDataParallel(norms())
        want = steps(wrapped, make(wrapped), rows, range(8))
        model = shard()
        optimizer = make(model)
        steps(model, optimizer, rows, range(4))
        save({"model": model.state_dict(), "optimizer": optimizer}, checkpoint_id=path / "saved")
        through = steps(model, optimizer, rows, range(4, 8))
        other = shard()
        restarted = make(other)
        state = {"model": other.state_dict(), "optimizer": restarted}
        load(state, checkpoint_id=path / "saved")
        other.load_state_dict(state["model"])
        resumed = steps(other, restarted, rows, range(4, 8))
        if rank == 0:
            torch.save((want, through, resumed), path / "result.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", SHARDED)
def test_shards_equal_data_parallel_and_a_restarted_run_goes_on(name: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_sharded_worker, (port, name, tmp_path), nprocs=2)
    want, through, resumed = torch.load(tmp_path / "result.pt")
    for a, b, c in zip(want, through, resumed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
        assert torch.equal(b, c)
