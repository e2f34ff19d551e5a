"""torch.compile: two graphs and no break in training with K-FAC, and the parameters of eager training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR

import mupass

# Dynamo itself makes an instance of torch.autograd.Function for whatever function it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

WIDTH, BASE, STEPS = 16, 8, 20


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, w: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(w), nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.norm2, self.up, self.down = nn.LayerNorm(w), nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(h.transpose(1, 2).reshape(b, n, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Embedding, positions, one block, tied head."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(13, w), nn.Parameter(torch.randn(6, w) / 10)
        self.block, self.norm = Block(w), nn.LayerNorm(w)
        self.head = nn.Linear(w, 13, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.emb(ids) + self.pos)))


def mlp(w: int) -> nn.Module:
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Linear(5, w), relu, nn.Linear(w, w), relu, nn.Linear(w, 3))


def cnn(w: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, w, 3, padding=1, bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        nn.Conv2d(w, w, 3, stride=2, padding=1, groups=2, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        nn.Conv2d(w, w, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(w, 3),
    )


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(8, 5), lambda: torch.randint(3, (8,))),
    "cnn": (cnn, lambda: torch.randn(8, 2, 6, 6), lambda: torch.randint(3, (8,))),
    "transformer": (Language, lambda: torch.randint(13, (4, 6)), lambda: torch.randint(13, (4, 6))),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    build, x, _ = MODELS[name]
    return mupass.transform(build(WIDTH).double(), _double(x()), base=BASE)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def kfac(net: nn.Module, **options: Any) -> mupass.KFAC:
    return mupass.KFAC(net, **{"lr": 0.02, "damping": 0.1, "factor_every": 5} | options)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, name: str, steps: int = STEPS) -> list[float]:
    """Train under a schedule that changes lr at each step."""
    torch.manual_seed(1)
    _, make_x, make_y = MODELS[name]
    schedule = LambdaLR(optimizer, lambda t: 1 - t / (2 * STEPS))
    losses = []
    for _ in range(steps):
        x, y = _double(make_x()), make_y()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def assert_same(first: nn.Module, second: nn.Module, **how: float) -> None:
    for (n, p), q in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, n=n: f"{n}: {m}", **how)


@pytest.mark.sample("mlp")
@pytest.mark.parametrize("name", MODELS)
def test_two_graphs_no_break_and_eager_parameters(name: str) -> None:
    eager = make(name)
    twin = copy.deepcopy(eager)
    before = {n: p.detach().clone() for n, p in eager.named_parameters()}
    want = train(eager, kfac(eager), name)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    got = train(compiled, kfac(compiled), name)
    assert counter.frame_count == 2  # a cheap graph, and one that collects factors
    assert not counters["graph_break"]
    assert got == pytest.approx(want, rel=1e-7)
    assert_same(eager, twin, rtol=1e-6, atol=1e-9)
    assert all(not torch.allclose(p, before[n], rtol=1e-3) for n, p in twin.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_the_number_of_graphs_follows_factor_every(every: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    net = torch.compile(make("mlp"), fullgraph=True, backend=counter)
    train(net, kfac(net, factor_every=every, root_every=2, momentum=0), "mlp")
    assert counter.frame_count == (1 if every == 1 else 2)


@pytest.mark.sample("kfac")
@pytest.mark.parametrize("make_optimizer", [mupass.Shampoo, kfac], ids=["shampoo", "kfac"])
def test_the_optimizer_may_be_made_before_or_after_compiling(make_optimizer: Callable[..., Any]) -> None:
    nets = [make("mlp") for _ in range(2)]
    late = torch.compile(nets[0], fullgraph=True, backend="aot_eager")
    train(late, make_optimizer(late, lr=0.02), "mlp", 6)
    optimizer = make_optimizer(nets[1], lr=0.02)
    train(torch.compile(nets[1], fullgraph=True, backend="aot_eager"), optimizer, "mlp", 6)
    assert_same(*nets)


class Wrapper(nn.Module):
    """A larger module around a transformed one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_a_transformed_part_of_a_larger_graph(name: str) -> None:
    eager = make(name)
    twin = copy.deepcopy(eager)
    train(eager, kfac(eager), name, 7)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Wrapper(twin), fullgraph=True, backend=counter)
    train(compiled, kfac(compiled), name, 7)
    assert counter.frame_count == 2
    assert_same(eager, twin, rtol=1e-6, atol=1e-9)


def test_an_idle_model_compiles_without_a_trace_of_the_taps() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    net = make("mlp")
    torch.compile(net, fullgraph=True, backend=backend)(MODELS["mlp"][1]().double()).sum().backward()
    (graph,) = graphs
    assert len([n for n in graph.graph.nodes if n.op in ("call_function", "call_module")]) == 5


@pytest.mark.slow
def test_evaluation_between_steps_adds_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    net = torch.compile(make("mlp"), fullgraph=True, backend=counter)
    optimizer = kfac(net)
    for _ in range(3):
        train(net, optimizer, "mlp", 5)
        with torch.no_grad():
            net(MODELS["mlp"][1]().double())
    assert counter.frame_count <= 4  # grad mode x collecting


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_inductor_agrees_with_eager(name: str) -> None:
    if name == "transformer" and torch.__version__ < "2.13":
        pytest.skip("inductor of torch before 2.13 cannot take derivatives of attention in float64 on CPU")
    eager = make(name)
    twin = copy.deepcopy(eager)
    train(eager, kfac(eager), name)
    compiled = torch.compile(twin, fullgraph=True)
    train(compiled, kfac(compiled), name)
    assert_same(eager, twin, rtol=1e-5, atol=1e-8)


class Shared(nn.Module):
    """A class of which a plain and a transformed instance are compiled in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inp(x)))


@pytest.mark.slow
@pytest.mark.parametrize("plain_first", [True, False])
def test_a_plain_model_of_the_class_does_not_lend_its_graph(plain_first: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 6)

    def plain() -> None:
        torch.compile(Shared(), fullgraph=True, backend="aot_eager")(x).sum().backward()

    if plain_first:
        plain()
    net = mupass.transform(Shared(), x, base=4)
    optimizer = mupass.KFAC(net, 0.01)
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(run(x), torch.zeros(4, 3)).backward()
        optimizer.step()
        if not plain_first:
            plain()
    assert optimizer.stats() == {"steps": 2}


@pytest.mark.sample("KFAC")
@pytest.mark.parametrize("kind", [mupass.KFAC, mupass.Shampoo, mupass.SOAP, mupass.Muon])
def test_a_training_step_that_is_compiled_as_a_whole_moves_as_an_eager_one(kind: Any) -> None:
    """Dynamo breaks at the backward pass and traces what is around it."""
    torch._dynamo.reset()
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    moved = []
    for whole in (False, True):
        torch.manual_seed(0)
        net = mupass.transform(mlp(WIDTH), x, base=BASE)
        optimizer = kind(net)

        def step(net: nn.Module = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        start = [p.detach().clone() for p in net.parameters()]
        run = torch.compile(step, backend="eager") if whole else step
        for _ in range(3):
            run()
        moved.append([p.detach() - q for p, q in zip(net.parameters(), start, strict=True)])
    for eager, compiled in zip(*moved, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
