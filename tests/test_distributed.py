"""Two gloo processes with half a batch each take the steps of one process with the whole batch."""

import copy
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import free_port, one_of, one_of_two
from torch import nn

import mupass

STEPS = 4


class Standard(nn.Conv2d):
    """A convolution that standardizes the rows of its kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.layer_norm(self.weight.flatten(1), [self.weight[0].numel()], eps=1e-12)
        return F.conv2d(x, rows.view_as(self.weight), self.bias)


CONVOLUTIONS = {"standardized": Standard}


def build(convolution: type[nn.Conv2d] = nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        convolution(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    return mupass.transform(net.double(), torch.zeros(2, 1, 6, 6, dtype=torch.float64), base=8)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(16) % 3


def train(model: nn.Module, rows: slice, name: str) -> list[torch.Tensor]:
    x, y = data()
    make = {
        "kfac": lambda: mupass.KFAC(model, 0.05, 1e-2),
        "standardized": lambda: mupass.KFAC(model, 0.05, 1e-2),
        "adapted": lambda: mupass.KFAC(model, 0.05, 1e-2, variance_adaptation=True, kl_clip=3e-2),
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
    with one_of_two(rank, port):
        model = nn.parallel.DistributedDataParallel(build(CONVOLUTIONS.get(name, nn.Conv2d)))
        trained = train(model, slice(8 * rank, 8 * rank + 8), name)
        other = [p.clone() for p in trained]
        for p in other:
            dist.broadcast(p, src=1)
        if rank == 0:
            apart = max((a - b).abs().max().item() for a, b in zip(trained, other, strict=True))
            torch.save((apart, trained), path)


@pytest.mark.sample("shampoo")
@pytest.mark.parametrize("name", ["kfac", "standardized", "adapted", "ekfac", "shampoo", "soap", "muon"])
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (free_port(), name, tmp_path / "result.pt"), nprocs=2)
    apart, trained = torch.load(tmp_path / "result.pt")
    assert apart == 0
    for ours, theirs in zip(
        trained, train(build(CONVOLUTIONS.get(name, nn.Conv2d)), slice(0, 16), name), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


class Tasks(nn.Module):
    """Two heads of one stem, of which a rank may run either."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        z = torch.tanh(self.stem(x))
        logits: torch.Tensor = self.first(z) if task == 0 else self.second(z)
        return logits


def tasks(run: Callable[[nn.Module], nn.Module], parts: Sequence[tuple[int, slice]]) -> list[torch.Tensor]:
    """Return what training makes of parts of a batch, each with its task."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 6).double(), torch.arange(16) % 3
    net = mupass.transform(Tasks().double(), (x, 0), base=8)
    model = run(net)
    optimizer = mupass.KFAC(model, 0.05, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        for task, rows in parts:
            (F.cross_entropy(model(x[rows], task), y[rows]) / len(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def _of_one_task(rank: int, port: int, path: Path) -> None:
    with one_of_two(rank, port):

        def wrapped(net: nn.Module) -> nn.Module:
            return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)

        torch.save(tasks(wrapped, [(rank, slice(8 * rank, 8 * rank + 8))]), path / f"{rank}.pt")


@pytest.mark.slow
def test_ranks_may_run_different_tasks(tmp_path: Path) -> None:
    """The gradients by which clipping is told came on one rank alone, and the other waited for good."""
    mp.spawn(_of_one_task, (free_port(), tmp_path), nprocs=2)
    want = tasks(lambda net: net, [(0, slice(0, 8)), (1, slice(8, 16))])
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def _uneven(rank: int, port: int, path: Path) -> None:
    with one_of_two(rank, port):
        model = nn.parallel.DistributedDataParallel(build())
        x, y = data()
        for cls in (mupass.KFAC, mupass.Muon):
            optimizer = cls(model)
            with model.join(), pytest.warns(mupass.MupassWarning, match="equally many batches"):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        path.touch()


@pytest.mark.slow
def test_steps_that_some_ranks_may_leave_out_are_told(tmp_path: Path) -> None:
    """Inside of `join` a rank may have no more batches, and the others would wait for it."""
    mp.spawn(_uneven, (free_port(), tmp_path / "done"), nprocs=2)
    assert (tmp_path / "done").exists()


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


class Inner(nn.Module):
    """Raw parameters of a unit of its own."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(w, w) / w**0.5)
        self.gain = nn.Parameter(torch.rand(w) + 0.5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.einsum("btd,dk->btk", h, self.up) * self.gain)


class Code(nn.Module):
    """Weights that other code uses: the root's, those of a unit, of attention, of a layer never called."""

    def __init__(self, w: int = 8) -> None:
        super().__init__()
        self.first, self.inner, self.below = nn.Parameter(torch.randn(1, w)), Inner(w), nn.Linear(w, w)
        self.attn, self.out = nn.MultiheadAttention(w, 2, batch_first=True), nn.Linear(w, 3)
        self.positions, self.gru = nn.Parameter(torch.randn(6, w)), nn.GRU(w, w, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(torch.tanh(x[..., None] @ self.first + self.positions))
        h = h + self.gru(h)[0]
        h = torch.tanh(F.linear(h, self.below.weight, self.below.bias)) + h
        return self.out((h + self.attn(h, h, h)[0]).mean(1))


def code() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Code().double(), torch.zeros(2, 6, dtype=torch.float64), base=4)


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
    "adapted": lambda model: kfac(model, variance_adaptation=True),
    "code": lambda model: mupass.KFAC(model, 0.05, 1e-2, root_every=3, kl_clip=1e-2, strict=True),
    "shampoo": lambda model: mupass.Shampoo(model, 0.01, root_every=3, graft="adam", block_size=8),
    "soap": lambda model: mupass.SOAP(model, 0.01, basis_every=2, eigh_every=2, block_size=3),
    "muon": lambda model: mupass.Muon(model, 0.01, fallback="sgd"),
}


def _sharded_worker(rank: int, port: int, name: str, path: Path) -> None:
    from torch.distributed.checkpoint import load, save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rows, make = slice(8 * rank, 8 * rank + 8), SHARDED[name]
    build = code if name == "code" else norms

    def shard() -> nn.Module:
        model = build()
        fully_shard(model.inner if name == "code" else model[3], mesh=mesh)
        return fully_shard(model, mesh=mesh)  # type: ignore[no-any-return]

    with one_of_two(rank, port):
        mesh = init_device_mesh("cpu", (2,))
        wrapped = nn.parallel.DistributedDataParallel(build())
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


@pytest.mark.thin(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_shards_equal_data_parallel_and_a_restarted_run_goes_on(name: str, tmp_path: Path) -> None:
    mp.spawn(_sharded_worker, (free_port(), name, tmp_path), nprocs=2)
    want, through, resumed = torch.load(tmp_path / "result.pt")
    for a, b, c in zip(want, through, resumed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
        assert torch.equal(b, c)


class Parallel(nn.Module):
    """A block whose two layers are split over ranks by columns and rows, between layers that are not.

    All matrices are square, so that factors have full rank after one batch: eigenvectors to eigenvalues of
    zero are rounding, and what SOAP and EKFAC do along them is, too.
    """

    def __init__(self, w: int) -> None:
        super().__init__()
        self.enter, self.norm, self.out = nn.Linear(w, w), nn.LayerNorm(w), nn.Linear(w, w)
        self.up, self.down = nn.Linear(w, w), nn.Linear(w, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        return self.out(self.norm(h + self.down(F.gelu(self.up(h)))))


MESHES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "kfac": lambda model: mupass.KFAC(model, strict=True),
    "ekfac": lambda model: mupass.KFAC(model, ekfac=True, strict=True),
    "shampoo": lambda model: mupass.Shampoo(model, 0.01),
    "soap": lambda model: mupass.SOAP(model, 0.01, basis_every=2),
    "muon": lambda model: mupass.Muon(model, 0.01),
    "adamw": lambda model: torch.optim.AdamW(mupass.param_groups(model, 0.01)),
}


def _parallel_block() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Parallel(8).double(), torch.zeros(2, 8, dtype=torch.float64), base=4)


def _train_parallel(
    model: nn.Module, name: str, rows: slice, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> list[torch.Tensor]:
    optimizer, draw = MESHES[name](model), torch.Generator().manual_seed(1)
    for _ in range(8):
        x = torch.randn(64, 8, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        with around():
            F.cross_entropy(model(x[rows]), x.argmax(1)[rows]).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


# Data parallelism on one axis of the mesh, and what happens on the other.
LAYOUTS = {"tensor": (1, 2), "classes": (1, 2), "shards and tensor": (2, 2), "hybrid shards": (2, 2)}


def _mesh_worker(rank: int, port: int, names: Sequence[str], layout: str, path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    sizes = LAYOUTS[layout]
    ranks = sizes[0] * sizes[1]
    with one_of(ranks, rank, port):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "inner"))
        trained = {}
        for name in names:
            model = _parallel_block()
            part = slice(None)
            if layout == "hybrid shards":
                fully_shard(model, mesh=mesh)
                part = slice(rank, None, ranks)
            else:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                if layout == "classes":  # logits stay in shards, and so does the loss
                    plan["out"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
                parallelize_module(model, mesh["inner"], plan)
            if layout == "shards and tensor":
                fully_shard(model, mesh=mesh["data"])
                part = slice(rank // 2, None, 2)
            around = loss_parallel if layout == "classes" else nullcontext
            trained[name] = _train_parallel(model, name, part, around)
        if rank == 0:
            torch.save(trained, path)


# One start of the ranks, which takes seconds, serves several optimizers.
FIRST, OTHERS = ("kfac",), ("ekfac", "shampoo", "soap", "muon", "adamw")


@pytest.mark.thin(2)
@pytest.mark.slow
@pytest.mark.parametrize("names", [FIRST, OTHERS], ids=["kfac", "others"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mesh_equals_one_process(names: Sequence[str], layout: str, tmp_path: Path) -> None:
    where, (outer, inner) = tmp_path / "result.pt", LAYOUTS[layout]
    mp.spawn(_mesh_worker, (free_port(), names, layout, where), nprocs=outer * inner)
    trained = torch.load(where)
    for name in names:
        want = _train_parallel(_parallel_block(), name, slice(None))
        for number, (ours, theirs) in enumerate(zip(trained[name], want, strict=True)):
            message = f"{name}, parameter {number}"
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, msg=message)


# Saved on two ranks, loaded on one ------------------------------------------------------------------------

CHECKPOINTED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **MESHES,
    "shampoo, grafts": lambda model: mupass.Shampoo(model, 0.01, graft="adam", root_every=2),
    "shampoo, no graft": lambda model: mupass.Shampoo(model, 0.01, graft="none"),
}
WRAPPED = ("data parallel", "shards")


def _go_on(model: nn.Module, optimizer: torch.optim.Optimizer, at: range, rows: slice) -> None:
    for step in at:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), x.argmax(1)[rows]).backward()
        optimizer.step()


def _saving_worker(rank: int, port: int, wrapping: str, names: Sequence[str], path: Path) -> None:
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_of_two(rank, port):
        mesh = init_device_mesh("cpu", (2,))
        for name in names:
            model = _parallel_block()
            if wrapping == "shards":
                fully_shard(model.up, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                model = nn.parallel.DistributedDataParallel(model)
            optimizer = CHECKPOINTED[name](model)
            _go_on(model, optimizer, range(5), slice(rank, None, 2))
            weights, state = get_state_dict(model, optimizer)
            save({"model": weights, "optimizer": state}, checkpoint_id=path / name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(wrapping: str, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    mp.spawn(_saving_worker, (free_port(), wrapping, list(CHECKPOINTED), tmp_path), nprocs=2)
    for name, make in CHECKPOINTED.items():
        undisturbed, model = _parallel_block(), _parallel_block()
        _go_on(undisturbed, make(undisturbed), range(10), slice(None))
        optimizer = make(model)
        weights, state = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / name)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        _go_on(model, optimizer, range(5, 10), slice(None))
        for (key, ours), theirs in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, msg=f"{name}, {key}")


def test_a_shard_that_code_sees_as_one_falls_back_by_name(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        model, mesh = code(), init_device_mesh("cpu", (1,))
        model.inner.up = nn.Parameter(distribute_tensor(model.inner.up.detach(), mesh, [Shard(0)]))
        found = {c.parameter: c for c in mupass.KFAC(model, 0.05).coverage()}
        assert found["inner.up"].treatment == "adamw"
        assert "called by inner, not by a plain module, and a sharded" in found["inner.up"].reason
        assert found["first"].treatment == "kfac linear"
    finally:
        dist.destroy_process_group()


# A rank that is killed -------------------------------------------------------------------------------------

# Steps: in all, between checkpoints, at the kill, with a NaN gradient.
TOTAL, SAVED, KILLED, BAD = 30, 8, 21, 5


def _killed_worker(rank: int, port: int, path: Path, kill: bool) -> None:
    """Train with checkpoints, from the last whole one that there is; or die in the middle of a step."""
    from torch.distributed.checkpoint import load, save

    with one_of_two(rank, port):
        model = nn.parallel.DistributedDataParallel(build())
        optimizer = mupass.KFAC(model, 0.05, 1e-2, factor_every=2, root_every=3, kl_clip=1e-2)
        state = {"model": model.module.state_dict(), "optimizer": optimizer}
        whole = sorted(int(p.parent.name) for p in path.glob("*/.metadata"))  # written when all else is
        first = whole[-1] if whole else 0
        if first:
            load(state, checkpoint_id=path / str(first))
        x, y = data()
        for at in range(first, TOTAL):
            if at and at % SAVED == 0:
                save(state, checkpoint_id=path / str(at))
            rows = torch.randperm(16, generator=torch.Generator().manual_seed(at))[4 * rank : 4 * rank + 4]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            if at == BAD:
                model.module[3].weight.grad.fill_(torch.nan)
            if kill and at == KILLED and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
        if rank == 0:
            loss = F.cross_entropy(model.module(x), y).item()
            result = (first, loss, optimizer.stats(), [p.detach() for p in model.parameters()])
            torch.save(result, path / "result.pt")


@pytest.mark.slow
def test_a_run_with_a_rank_killed_ends_where_a_clean_one_does(tmp_path: Path) -> None:
    clean, faulty = tmp_path / "clean", tmp_path / "faulty"
    for path in (clean, faulty):
        path.mkdir()
    mp.spawn(_killed_worker, (free_port(), clean, False), nprocs=2)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.spawn(_killed_worker, (free_port(), faulty, True), nprocs=2)
    assert not (faulty / "result.pt").exists()
    mp.spawn(_killed_worker, (free_port(), faulty, False), nprocs=2)
    start, loss, stats, parameters = torch.load(clean / "result.pt")
    restart, end, counts, restored = torch.load(faulty / "result.pt")
    assert (start, restart) == (0, 16)
    assert stats == {"steps": TOTAL - 1, "skipped_steps": 1}
    assert counts == {"steps": TOTAL}  # a resumed run counts incidents anew
    assert end == loss < 0.5
    assert all(torch.equal(p, q) for p, q in zip(restored, parameters, strict=True))


class Deep(nn.Module):
    """Layers by name, any of which may be missing."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(w, w), nn.LayerNorm(w)
        self.layers = nn.ModuleDict({str(i): nn.Linear(w, w) for i in range(3)})
        self.head = nn.Linear(w, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.enter is not None:
            x = self.enter(x)
        for layer in self.layers.values():
            x = x + F.gelu(layer(x))
        if self.head is not None:
            x = self.head(self.norm(x))
        return x


MICRO, ROWS = 4, 64


def _deep() -> nn.Module:
    torch.manual_seed(0)
    return mupass.transform(Deep(8).double(), torch.zeros(2, 8, dtype=torch.float64), base=4)


def _stage_of(model: nn.Module, rank: int) -> nn.Module:
    """Return a copy with the first half of the layers, or with the second."""
    part = copy.deepcopy(model)
    for name in ("1", "2") if rank == 0 else ("0",):
        del part.layers[name]
    if rank == 0:
        part.norm = part.head = None
    else:
        part.enter = None
    return mupass.stage(part)


# Bounds of K-FAC hold for each stage, and roots are spread over a period among those of the stage alone:
# without that, and without a floor under all layers, steps are the same.
UNBOUND: dict[str, Any] = {"loss_terms": ROWS, "kl_clip": None, "damping_floor": 0.0, "stagger": False}
PIPELINE: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "kfac": lambda m, scale: mupass.KFAC(m, loss_scale=scale, strict=True, **UNBOUND),
    "ekfac": lambda m, scale: mupass.KFAC(m, loss_scale=scale, ekfac=True, **UNBOUND),
    "shampoo": lambda m, scale: mupass.Shampoo(m, 0.01, root_every=1),
    "soap": lambda m, scale: mupass.SOAP(m, 0.01, basis_every=2),
    "muon": lambda m, scale: mupass.Muon(m, 0.01),
    "adamw": lambda m, scale: torch.optim.AdamW(mupass.param_groups(m, 0.01)),
}


def _train_in_micro_batches(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    optimizer, draw = PIPELINE[name](model, 1.0), torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(ROWS, 8, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        for part in x.chunk(MICRO):
            (F.cross_entropy(model(part), part.argmax(1)) / MICRO).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _pipeline_worker(rank: int, port: int, names: Sequence[str], path: Path) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    with one_of_two(rank, port):
        trained = {}
        for name in names:
            part = _stage_of(_deep(), rank)
            optimizer, draw = PIPELINE[name](part, MICRO), torch.Generator().manual_seed(1)
            stage = PipelineStage(part, rank, 2, torch.device("cpu"))
            schedule = ScheduleGPipe(stage, MICRO, loss_fn=lambda y, t: F.cross_entropy(y, t))
            for _ in range(6):
                x = torch.randn(ROWS, 8, generator=draw, dtype=torch.float64)
                optimizer.zero_grad()
                if rank == 0:
                    schedule.step(x)
                else:
                    schedule.step(target=x.argmax(1))
                optimizer.step()
            trained[name] = {key: p.detach().clone() for key, p in part.named_parameters()}
        torch.save(trained, path / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("names", [FIRST, OTHERS], ids=["kfac", "others"])
def test_stages_of_a_pipeline_equal_one_process(names: Sequence[str], tmp_path: Path) -> None:
    mp.spawn(_pipeline_worker, (free_port(), names, tmp_path), nprocs=2)
    stages = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in names:
        found = {**stages[0][name], **stages[1][name]}
        want = _train_in_micro_batches(_deep(), name)
        assert found.keys() == want.keys()
        for key, value in want.items():
            message = f"{name}, {key}"
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8, msg=message)


def test_a_stage_keeps_its_part_of_the_plan_and_refuses_what_needs_the_whole() -> None:
    model = _deep()
    parts = [_stage_of(model, rank) for rank in (0, 1)]
    assert sorted([*parts[0].mupass_plan, *parts[1].mupass_plan]) == sorted(model.mupass_plan)
    for part in parts:
        assert all(part.mupass_plan[name] == model.mupass_plan[name] for name in part.mupass_plan)
        assert mupass.Plan.from_json(part.mupass_plan.to_json()) == part.mupass_plan
        with pytest.raises(mupass.OptimizerError, match="pass loss_terms="):
            mupass.KFAC(part, loss_terms=64)
        with pytest.raises(mupass.OptimizerError, match="leave it out"):
            mupass.Shampoo(part, data_parallel=True)
        with pytest.raises(mupass.TransformError, match="fold that"):
            mupass.fold(part)
    with pytest.raises(mupass.PlanError, match="no plan"):
        mupass.stage(Deep(8))
    other = copy.deepcopy(model)
    other.layers["0"] = nn.Linear(8, 4).double()
    with pytest.raises(mupass.PlanError, match="planned with shape"):
        mupass.stage(other)
    renamed = copy.deepcopy(model)
    renamed.layers["3"] = renamed.layers.pop("0")
    with pytest.raises(mupass.PlanError, match=r"layers.3.weight: not in the plan"):
        mupass.stage(renamed)
    assert not renamed.mupass_plan.stage


def test_a_tie_is_in_one_stage() -> None:
    table = nn.Embedding(10, 16)
    net = nn.Sequential(table, nn.LayerNorm(16), nn.Linear(16, 10, bias=False))
    net[2].weight = table.weight
    net = mupass.transform(net, torch.zeros(1, 3, dtype=torch.long), base=8)
    for missing in (0, 2):
        part = copy.deepcopy(net)
        part[missing] = nn.Identity()
        with pytest.raises(mupass.PlanError, match="which is in another stage"):
            mupass.stage(part)
