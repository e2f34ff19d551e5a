"""compile=True: the same steps as eager, one graph for each shape, none for schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_shampoo import make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.torch_version import TorchVersion

import mupass
from mupass._optim.matrix.block_stack import compiles

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "shampoo": (mupass.Shampoo, {"root_every": 2}),
    "shampoo sgd": (mupass.Shampoo, {"graft": "sgd", "block_size": 5}),
    "shampoo adam": (mupass.Shampoo, {"graft": "adam", "block_size": 5}),
    "shampoo rmsprop": (mupass.Shampoo, {"graft": "rmsprop"}),
    "shampoo spectral": (mupass.Shampoo, {"graft": "spectral"}),
    "shampoo modes": (mupass.Shampoo, {"kernels": "modes"}),
    "soap": (mupass.SOAP, {"basis_every": 2}),
    "muon": (mupass.Muon, {"roles": ["input", "hidden", "output"]}),
    "adamuon": (mupass.Muon, {"adaptive": True}),
}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Count graphs; the backend needs no C++ compiler."""
    found = CompileCounterWithBackend("aot_eager")
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **options, backend=found))
    return found


def train(net: Any, x: Any, optimizer: Any, steps: int, schedule: Any = None) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            if "damping" in group and group["damping"]:
                group["damping"] = 1e-3 / (1 + step)
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=[g["lr"] for g in optimizer.param_groups], total_steps=9)


def skip_refused(name: str) -> None:
    if name == "adamuon" and torch.__version__ < "2.11":
        pytest.skip("compiled AdaMuon is refused on a CPU before torch 2.11")


@pytest.mark.thin(2)
@pytest.mark.sample("cnn-shampoo modes", "cnn-adamuon")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["cnn", "attention"])
def test_one_graph_for_each_shape_whatever_the_schedule(
    model: str, name: str, counter: CompileCounterWithBackend
) -> None:
    skip_refused(name)
    cls, options = OPTIMIZERS[name]
    pair = [make(model) for _ in range(2)]
    eager, compiled = (
        cls(net, 0.02, fallback_lr=0.02, compile=flag, **options)
        for (net, _), flag in zip(pair, (False, True), strict=True)
    )
    for (net, x), optimizer in zip(pair, (eager, compiled), strict=True):
        train(net, x, optimizer, 8, one_cycle(optimizer))
    assert counter.frame_count == len(compiled._stacks) > 0
    for p, q in zip(*(net.parameters() for net, _ in pair), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


KFACS: dict[str, dict[str, Any]] = {
    "default": {},
    "roots": {"root_every": 1, "step_bound": 1e-3},
    "blocks": {"block_size": 5, "momentum_of": "directions"},
    "eigen": {"damping_mode": "eigen", "e_a": 0.5, "e_b": 0.5},
    "foof": {"e_b": 0.0},
    "ekfac": {"ekfac": True},
}


@pytest.mark.sample("cnn-ekfac")
@pytest.mark.parametrize("name", KFACS)
@pytest.mark.parametrize("model", ["cnn", "attention"])
def test_kfac_has_one_graph_for_each_shape_whatever_the_schedule(
    model: str, name: str, counter: CompileCounterWithBackend
) -> None:
    pair, graphs = [make(model) for _ in range(2)], []
    for (net, x), flag in zip(pair, (False, True), strict=True):
        # Factors of full rank: eigenvectors to eigenvalues of zero are rounding, and so are EKFAC's moments.
        x = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        optimizer = mupass.KFAC(net, 0.05, compile=flag, **KFACS[name])
        schedule = one_cycle(optimizer)
        for steps in (1, 7):
            train(net, x, optimizer, steps, schedule)
            # Dynamo may report an empty graph of its own at its first start.
            graphs.append(sum(bool(graph.graph.find_nodes(op="call_method")) for graph in counter.graphs))
    shapes = {(p.shape, p.stride()) for p in pair[0][0].parameters()}
    first, last = graphs[2:]
    # The root application and the bound, of matrices and of vectors; nothing after the first step.
    assert graphs[:2] == [0, 0] and 0 < first == last <= 2 * len(shapes)
    for p, q in zip(*(net.parameters() for net, _ in pair), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_none_compiles_where_the_device_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("mupass._optim.matrix.block_stack.find_spec", lambda name: name)
    assert compiles(None, cuda) and not compiles(None, cpu)
    assert compiles(True, cpu) and not compiles(False, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not compiles(None, cuda)
    monkeypatch.setattr("mupass._optim.matrix.block_stack.find_spec", lambda name: None)
    assert not compiles(None, cuda)


@pytest.mark.slow
def test_more_shapes_than_dynamo_keeps_graphs_for(counter: CompileCounterWithBackend) -> None:
    widths = [5, *range(8, 48, 4), 3]
    layers: list[torch.nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    net = mupass.transform(torch.nn.Sequential(*layers[:-1]), x, base=8)
    optimizer = mupass.Shampoo(net, 0.01, compile=True)
    # Packages that other tests import set another limit.
    with torch._dynamo.config.patch(recompile_limit=8):
        train(net, x, optimizer, 3, LambdaLR(optimizer, lambda t: 1 / (1 + t)))
    assert counter.frame_count == len(optimizer._stacks) > 8


def test_eager_is_the_default(counter: CompileCounterWithBackend) -> None:
    for cls, options in OPTIMIZERS.values():
        net, x = make("cnn")
        train(net, x, cls(net, 0.02, **options), 2)
    assert counter.frame_count == 0


def test_what_old_inductors_get_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    with pytest.raises(mupass.OptimizerError, match="inductor of torch 2.8.0 writes past the end"):
        mupass.Muon(make("attention")[0], adaptive=True, compile=True)
    mupass.Muon(make("attention")[0], adaptive=True)
    mupass.Muon(make("attention")[0], compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shampoo adam", "soap", "adamuon"])
def test_inductor_agrees_with_eager(name: str) -> None:
    skip_refused(name)
    cls, options = OPTIMIZERS[name]
    pair = [make("attention") for _ in range(2)]
    for (net, x), flag in zip(pair, (False, True), strict=True):
        train(net, x, cls(net, 0.02, compile=flag, **options), 5)
    for p, q in zip(*(net.parameters() for net, _ in pair), strict=True):
        # Single precision: compiled sums run in another order, and SOAP's bases carry the difference on.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
