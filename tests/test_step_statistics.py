"""Statistics belong to the step: every update is that of a dense reference, in float64, of that very step."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import plans
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import mupass
from mupass._errors import MupassWarning, OptimizerError

# Dynamo itself makes an instance of torch.autograd.Function for whatever function it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

WIDTH, SAMPLES, CLASSES, RHO, LR = 8, 12, 3, 0.1, 0.05
Loss = Callable[[nn.Module], Tensor]


class Heads(nn.Module):
    """Several tasks, whose heads read one hidden layer; the second has a layer of its own."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(5, w), nn.Linear(w, CLASSES)
        self.mid, self.second = nn.Linear(w, w), nn.Linear(w, CLASSES)

    def forward(self, x: Tensor, task: int = 0) -> Any:
        z = torch.tanh(self.stem(x))
        one = self.first(z) if task != 2 else None
        two = self.second(torch.tanh(self.mid(z))) if task != 1 else None
        return one if task == 1 else two if task == 2 else (one, two)


class Exits(nn.Module):
    """Blocks with an exit behind each; a call may leave at any of them."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(5, w)
        self.blocks = nn.ModuleList(nn.Linear(w, w) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(w, CLASSES) for _ in range(3))

    def forward(self, x: Tensor, exit: int = 2) -> Tensor:
        z = torch.tanh(self.stem(x))
        for i, (block, leave) in enumerate(zip(self.blocks, self.exits, strict=True)):
            z = torch.tanh(block(z))
            y: Tensor = leave(z)  # computed at every exit, used at one
            if i == exit:
                break
        return y


class Dropped(nn.Module):
    """Residual branches of gated pairs; a call may leave out any of them, or one layer of a pair."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, w), nn.Linear(w, CLASSES)
        self.up = nn.ModuleList(nn.Linear(w, w) for _ in range(3))
        self.gate = nn.ModuleList(nn.Linear(w, w) for _ in range(3))

    def forward(
        self, x: Tensor, ups: tuple[int, ...] = (0, 1, 2), gates: tuple[int, ...] = (0, 1, 2)
    ) -> Tensor:
        z = torch.tanh(self.stem(x))
        for i, (up, gate) in enumerate(zip(self.up, self.gate, strict=True)):
            if i in ups or i in gates:
                branch = up(z) if i in ups else torch.ones_like(z)
                z = z + (branch * torch.sigmoid(gate(z)) if i in gates else branch)
        return self.head(z)


class Experts(nn.Module):
    """Each sample goes to one expert; some get none, and are called with an empty batch or not at all."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, w), nn.Linear(w, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(w, w) for _ in range(4))

    def forward(self, x: Tensor, route: Tensor | None = None, skip: bool = False) -> Tensor:
        z = torch.tanh(self.stem(x))
        route = torch.arange(len(x)) % 4 if route is None else route
        out = torch.zeros_like(z)
        for i, expert in enumerate(self.experts):
            at = (route == i).nonzero().flatten()
            if len(at) or not skip:
                out = out.index_add(0, at, torch.tanh(expert(z[at])))
        return self.head(z + out)


class Attention(nn.Module):
    """Queries, keys and values read one activation."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, w), nn.Linear(w, CLASSES)
        self.q, self.k, self.v = nn.Linear(w, w), nn.Linear(w, w), nn.Linear(w, w)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        scores = torch.softmax(self.q(z) @ self.k(z).mT / WIDTH**0.5, -1)
        return self.head(z + scores @ self.v(z))


def plain(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def transformed(build: Callable[[], nn.Module]) -> nn.Module:
    return plans.transformed(plain, build, inputs=torch.randn(SAMPLES, 5).double(), base=WIDTH)


def kfac(net: nn.Module, **options: Any) -> mupass.KFAC:
    """K-FAC without memory: a step is made of its own statistics alone."""
    plain: dict[str, Any] = {
        "lr": LR,
        "damping": RHO,
        "e_a": 1.0,
        "e_b": 1.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "factor_decay": 0.0,
        "factor_every": 1,
        "root_every": 1,
        "stagger": False,
        "damping_mode": "absolute",
        "damping_floor": 0.0,
        "kl_clip": None,
    }
    return mupass.KFAC(net, **plain | options)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 5, generator=draw, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=draw)


def reference(net: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """The step of every linear layer, from inputs and output gradients that hooks of our own see."""
    twin = copy.deepcopy(net)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                y.retain_grad()
            calls[name].append((args[0].detach(), y))

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(keep(name))
    value = loss(twin)
    for seen in calls.values():
        for _, y in seen:
            y.grad = None  # what a derivative inside of the loss left there
    value.backward()
    steps = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for name, seen in calls.items():
        used = [(x.flatten(0, -2), y.grad.flatten(0, -2)) for x, y in seen if y.grad is not None]
        if sum(len(x) for x, _ in used):
            x, g = (torch.cat(rows) for rows in zip(*used, strict=True))
            a, b = x.T @ x / len(x), SAMPLES * g.T @ g
            weight, bias = twin.get_submodule(name).weight, twin.get_submodule(name).bias
            damped_a, damped_b = a + RHO * torch.eye(len(a)).double(), b + RHO * torch.eye(len(b)).double()
            steps[f"{name}.weight"] = torch.linalg.solve(damped_b, weight.grad) @ torch.linalg.inv(damped_a)
            steps[f"{name}.bias"] = torch.linalg.solve(damped_b, bias.grad) / (1 + RHO)
    return steps


def assert_step(net: nn.Module, optimizer: mupass.KFAC, loss: Loss) -> None:
    optimizer.zero_grad()
    assert_taken(net, optimizer, loss)


def assert_taken(net: nn.Module, optimizer: mupass.KFAC, loss: Loss, run: nn.Module | None = None) -> None:
    """Let the model, or its compiled form, run; nothing is cleared before."""
    want = reference(net, loss)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    loss(net if run is None else run).backward()
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(
            before[name] - p.detach(),
            LR * want[name],
            rtol=1e-7,
            atol=1e-10,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def cross_entropy(x: Tensor, y: Tensor, *how: Any) -> Loss:
    return lambda net: F.cross_entropy(net(x, *how), y)


def both(x: Tensor, y: Tensor) -> Loss:
    return lambda net: sum(F.cross_entropy(out, y) for out in net(x))  # type: ignore[return-value]


def second_of_both(x: Tensor, y: Tensor) -> Loss:
    return lambda net: F.cross_entropy(net(x)[1], y)


def parts(*numbers: int) -> Tensor:
    return torch.tensor((numbers * SAMPLES)[:SAMPLES])


STEPS: dict[str, tuple[Callable[[], nn.Module], list[Callable[[Tensor, Tensor], Loss]]]] = {
    "tasks": (
        Heads,
        [
            *(lambda x, y, task=task: cross_entropy(x, y, task) for task in (1, 2, 2, 1)),
            both,
            second_of_both,
            *(lambda x, y, task=task: cross_entropy(x, y, task) for task in (2, 1)),
        ],
    ),
    "exits": (Exits, [lambda x, y, i=i: cross_entropy(x, y, i) for i in (0, 2, 1, 0, 2)]),
    "layer drop": (
        Dropped,
        [
            lambda x, y, ups=ups, gates=gates: cross_entropy(x, y, ups, gates)
            for ups, gates in (
                ((0,), (0,)),
                ((0, 1), (1, 2)),
                ((), (0, 2)),
                ((2,), ()),
                ((0, 1, 2), (0, 1, 2)),
            )
        ],
    ),
    "experts": (
        Experts,
        [
            lambda x, y, route=route, skip=skip: cross_entropy(x, y, route, skip)
            for route, skip in ((parts(0, 1), False), (parts(2, 2, 0), True), (parts(3), False), (None, True))
        ],
    ),
    "attention": (Attention, [cross_entropy] * 3),
}


@pytest.mark.sample
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", STEPS)
def test_every_update_is_that_of_its_own_step(name: str, scale: float) -> None:
    build, makers = STEPS[name]
    net = transformed(build)
    optimizer = kfac(net)
    assert {c.treatment for c in optimizer.coverage()} == {"kfac linear", "kfac bias"}
    for i, make in enumerate(makers):
        x, y = batch(i)
        assert_step(net, optimizer, make(x * scale ** (i % 2), y))
    assert optimizer.stats() == {"steps": len(makers)}


def test_the_average_of_a_layer_that_did_not_run_stays() -> None:
    net = transformed(Heads)
    optimizer = kfac(net, factor_decay=0.9)
    bank, first, _ = optimizer._kronecker.at["a:mid:0"]
    for task in (2, 1, 1):
        x, y = batch(task)
        optimizer.zero_grad()
        F.cross_entropy(net(x, task), y).backward()
        optimizer.step()
        if task == 2:
            kept = {name: tensor[first].clone() for name, tensor in bank.state.items()}
    for name in ("factor", "weight", "peak", "recent"):
        assert torch.equal(bank.state[name][first], kept[name]), name
    assert kept["weight"] == pytest.approx(0.1)


@pytest.mark.parametrize("ekfac", [False, True])
def test_weights_that_read_one_activation_multiply_it_once(monkeypatch: Any, ekfac: bool) -> None:
    from mupass._taps import leaves

    multiplied = []
    make = leaves.raw_input
    monkeypatch.setattr(leaves, "raw_input", lambda *args: multiplied.append(1) or make(*args))
    net = transformed(Attention)
    optimizer = kfac(net, ekfac=ekfac)
    for i in range(2):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert len(multiplied) == 2 * 3  # stem, head, and one for q, k and v


# Passes whose gradients do not reach the step


def in_place(net: nn.Module) -> None:
    net.zero_grad(set_to_none=False)


def by_hand(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = None


def by_data(net: nn.Module) -> None:
    """As loops of old do; autograd does not count it."""
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.zero_()


CLEAR: dict[str, Callable[[nn.Module], None]] = {
    "model.zero_grad": lambda net: net.zero_grad(),
    "in place": in_place,
    "by hand": by_hand,
    "by data": by_data,
}


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.sample
@pytest.mark.parametrize("order", ["before the forward pass", "behind the forward pass"])
@pytest.mark.parametrize(
    "options", [{}, {"ekfac": True}, {"loss_terms": SAMPLES}], ids=["kfac", "ekfac", "terms"]
)
@pytest.mark.parametrize("how", CLEAR)
def test_a_cleared_pass_leaves_no_statistics(how: str, options: Any, order: str) -> None:
    assert_same(*(with_passes(extra, how, options, order, False) for extra in (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "order"), [("model.zero_grad", "before"), ("in place", "before"), ("by hand", "behind")]
)
@pytest.mark.usefixtures("fresh")
def test_a_cleared_pass_of_a_compiled_model_leaves_no_statistics(how: str, order: str) -> None:
    assert_same(*(with_passes(extra, how, {"loss_terms": SAMPLES}, order, extra) for extra in (False, True)))


def with_passes(extra: bool, how: str, options: Any, order: str, compiled: bool) -> nn.Module:
    """Train two steps, with or without passes for adversarial samples in between that are cleared."""
    net = transformed(Attention if "loss_terms" not in options else lambda: Context("plain"))
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    optimizer = kfac(net, **options)
    for i in range(2):
        x, y = batch(i)
        optimizer.zero_grad()
        first = F.cross_entropy(run(x), y) if order.startswith("behind") else None
        if extra:
            attacked = (x + 0.1).requires_grad_(True)
            for _ in range(3):
                F.cross_entropy(run(attacked), y).backward()
            CLEAR[how](net)
        loss = F.cross_entropy(run(x), y) if first is None else first
        loss.backward()
        optimizer.step()
    return net


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_that_are_cleared_behind_the_last_pass_have_no_statistics() -> None:
    net = transformed(Attention)
    optimizer = kfac(net)
    x, y = batch(0)
    before = copy.deepcopy(net.state_dict())
    F.cross_entropy(net(x), y).backward()
    net.zero_grad()
    optimizer.step()  # without any gradient there is no step
    assert optimizer.stats() == {"steps": 0}
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert_step(net, optimizer, cross_entropy(x, y))


@pytest.mark.parametrize("how", ["frozen", "lent", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_pass_through_weights_without_gradients_leaves_no_statistics(how: str) -> None:
    """A critic that is frozen while it scores, and a teacher whose weights run in the student's modules."""
    net = transformed(Attention)
    optimizer = kfac(net)
    run = torch.compile(net) if how == "compiled" else net
    teacher = {name: 2 * p.detach() for name, p in net.named_parameters()}
    for i in range(3):
        x, y = batch(i)
        drawn = (3 * x).requires_grad_(True)  # what a generator made
        if how == "lent":
            F.cross_entropy(torch.func.functional_call(net, teacher, (drawn,)), y).backward()
        else:
            net.requires_grad_(False)
            F.cross_entropy(run(drawn), y).backward()
            net.requires_grad_(True)
        assert_taken(net, optimizer, cross_entropy(x, y), run)
        net.zero_grad()


class Failing(torch.autograd.Function):
    """Identity whose backward pass fails, as one that runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise MemoryError


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("at", ["stem", "head"])
def test_a_pass_that_an_exception_stopped_leaves_no_statistics(at: str, to_none: bool) -> None:
    net = transformed(Attention)
    optimizer = kfac(net)
    for i in range(3):
        x, y = batch(i)
        fails = net.get_submodule(at).register_forward_hook(lambda module, args, out: Failing.apply(out))  # type: ignore[no-untyped-call]
        loss = F.cross_entropy(net(5 * x), y)
        fails.remove()
        with pytest.raises(MemoryError):
            loss.backward()
        net.zero_grad(set_to_none=to_none)
        assert_taken(net, optimizer, cross_entropy(x, y))
        net.zero_grad(set_to_none=to_none)


def test_an_input_may_be_written_to_behind_torch() -> None:
    """Layers that read one buffer share its factor, in one pass; NumPy's writes change no version."""
    net, other = transformed(Branches), transformed(Branches)
    optimizer, twin = kfac(net), kfac(other)
    buffer = np.zeros((SAMPLES, 5))
    shown = torch.from_numpy(buffer)
    for i in range(2):
        x, y = batch(i)
        buffer[:] = x.numpy()
        F.cross_entropy(net(shown), y).backward()
        F.cross_entropy(other(x), y).backward()
    optimizer.step()
    twin.step()
    assert_same(net, other)


class Branches(nn.Module):
    """Two layers that read the input."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, w), nn.Linear(5, w), nn.Linear(w, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x)) * torch.tanh(self.two(x)))


class Written(nn.Module):
    """Weights and a gain in code; or in modules, whose taps see the forward pass alone."""

    def __init__(self, modules: bool = False, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head, self.modules_ = nn.Linear(5, w), nn.Linear(w, CLASSES), modules
        if modules:
            self.mid = nn.Linear(w, w, bias=False)
            self.norm = nn.LayerNorm(w, bias=False)
        else:
            self.w = nn.Parameter(torch.empty(w, w).uniform_(-0.3, 0.3))
            self.gain = nn.Parameter(torch.ones(w))

    @property
    def parts(self) -> tuple[nn.Parameter, nn.Parameter]:
        return (self.mid.weight, self.norm.weight) if self.modules_ else (self.w, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        if self.modules_:
            return self.head(torch.tanh(self.norm(self.mid(z))))
        return self.head(torch.tanh(F.layer_norm(F.linear(z, self.w), [WIDTH]) * self.gain))


def test_a_penalty_on_weights_is_no_use_of_them() -> None:
    nets = []
    for modules in (False, True):
        net = transformed(lambda modules=modules: Written(modules))
        with torch.no_grad():
            for number, p in enumerate(net.parts):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + number)
        for module in (net.stem, net.head):
            nn.init.constant_(module.bias, 0.1)
            nn.init.eye_(module.weight)
        optimizer = kfac(net)
        assert all(c.treatment.startswith("kfac") for c in optimizer.coverage())
        for i in range(2):
            x, y = batch(i)
            w, gain = net.parts
            loss = F.cross_entropy(net(x), y)
            loss = loss + 0.1 * (w @ w.T - torch.eye(WIDTH)).square().mean() + 0.1 * (gain * gain).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        nets.append(net)
    for one, other in zip(nets[0].parts, nets[1].parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


class TiedInCode(nn.Module):
    """A weight of a module that code reads as well, turned or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH) if how.startswith("table") else nn.Linear(11, WIDTH, bias=False)
        self.mid, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.mid(torch.tanh(self.table(x))))
        if self.how == "table":
            return F.linear(z, self.table.weight)
        return z @ (self.table.weight.T if self.how == "table turned" else self.table.weight)


@pytest.mark.parametrize("how", ["table", "table turned", "layer"])
def test_a_weight_of_a_module_that_code_reads_too_is_told_of_no_other_use(how: str) -> None:
    """Both uses have a tap: that of the module, and that of the code."""
    torch.manual_seed(0)
    x = torch.arange(11) if how != "layer" else torch.randn(11, 11).double()
    net = mupass.transform(TiedInCode(how).double(), x, base=WIDTH)
    optimizer = kfac(net, strict=True, damping_mode="trace")
    assert optimizer.coverage()[0].treatment == "kfac tied"
    F.cross_entropy(net(x), torch.arange(11)).backward()
    optimizer.step()
    assert optimizer.stats() == {"steps": 1}
    if how != "layer":  # which is read both ways
        with pytest.warns(
            MupassWarning, match=r"table\.weight is used in a way that the captured pass had not"
        ):
            net.table.weight.T @ torch.ones(11, 4).double()  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("what", ["Hessian product", "gradients of samples", "forward derivative"])
def test_derivatives_that_no_step_uses_are_not_told(what: str) -> None:
    net, (x, y) = transformed(Attention), batch(0)
    optimizer, loss = kfac(net), cross_entropy(x, y)
    optimizer.zero_grad()
    parameters = dict(net.named_parameters())
    lent = {name: parameter.detach() for name, parameter in parameters.items()}

    def of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    if what == "Hessian product":
        first = torch.autograd.grad(loss(net), list(parameters.values()), create_graph=True)
        torch.autograd.grad(sum((g * g.detach()).sum() for g in first), list(parameters.values()))  # type: ignore[arg-type]
    elif what == "gradients of samples":
        every = torch.func.vmap(torch.func.grad(of), (None, 0, 0))
        every(lent, x[:, None], y[:, None])
    else:
        torch.func.jvp(lambda values: of(values, x, y), (lent,), (lent,))
    assert_taken(net, optimizer, loss)
    assert optimizer.stats() == {"steps": 1}


class Fused(torch.autograd.Function):
    """A product by a kernel of the caller's, with a weight or without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ x


class Twice(nn.Module):
    """A layer whose weight is used once more, in one of several ways."""

    def __init__(self, how: str, written: bool, w: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, w), nn.Linear(w, CLASSES)
        self.how, self.written = how, written
        if written:
            self.w = nn.Parameter(torch.empty(w, w).uniform_(-0.3, 0.3))
        else:
            self.mid = nn.Linear(w, w, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        w = self.w if self.written else self.mid.weight
        z = torch.tanh(F.linear(z, w) if self.written else self.mid(z))
        if self.how == "function":
            z = torch.tanh(Fused.apply(z, w.t().t()))  # type: ignore[no-untyped-call]
        elif self.how == "turned, while it is trained" and len(x) > 2:  # not in the captured pass
            z = torch.tanh(z @ w)
        elif self.how == "function of activations":
            z = Fused.apply(z, z.T @ z)  # type: ignore[no-untyped-call]
        return self.head(z)


@pytest.mark.parametrize(
    "how, written, told",
    [
        ("function", True, "w is used by Fused, a torch.autograd.Function"),
        ("function", False, "mid.weight is used by Fused, a torch.autograd.Function"),
        ("function of activations", False, ""),
        ("turned, while it is trained", True, "w is used in a way that the captured pass had not"),
        ("nothing", True, ""),
    ],
)
def test_a_use_that_no_tap_can_see_is_told_by_name(how: str, written: bool, told: str) -> None:
    torch.manual_seed(0)
    net = mupass.transform(Twice(how, written).double(), torch.randn(2, 5).double(), base=WIDTH)
    optimizer = kfac(net)
    for i in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            cross_entropy(*batch(i))(net).backward()
            optimizer.step()
        texts = [str(w.message) for w in caught if issubclass(w.category, MupassWarning)]
        assert len(texts) == (bool(told) and i == 0)
        assert all(told in text for text in texts)


@pytest.mark.parametrize("between", ["nothing", "scaled", "replaced"])
def test_accumulated_passes_count_whatever_is_done_to_gradients_between_them(between: str) -> None:
    nets = []
    for change in ("nothing", between):
        net = transformed(Attention)
        optimizer = kfac(net)
        for i in range(2):
            x, y = batch(i)
            F.cross_entropy(net(x), y).backward()
            for p in net.parameters():
                if change == "scaled":
                    p.grad.mul_(2)
                    p.grad.div_(2)
                elif change == "replaced":
                    p.grad = p.grad.clone()
        optimizer.step()
        nets.append(net)
    assert_same(*nets)


@pytest.mark.parametrize("ekfac", [False, True])
def test_a_pass_to_given_parameters_alone_leaves_its_statistics(ekfac: bool) -> None:
    """`backward(inputs=...)`, as of a generator that spares its critic: the leaves are no inputs."""
    twins = [transformed(Heads) for _ in range(2)]
    ordinary, given = (kfac(net, ekfac=ekfac) for net in twins)
    losses = [cross_entropy(*batch(i), 1) for i in range(3)]
    for net, optimizer in zip(twins, (ordinary, given), strict=True):
        for number, loss in enumerate(losses):
            inputs = list(net.parameters()) if number and optimizer is given else None
            (loss(net) / 3).backward(inputs=inputs)
        # Gradients that are handed to the caller, and a saliency, are no step's.
        x = batch(3)[0].requires_grad_(True)
        losses[0](net).backward(inputs=[x])
        optimizer.step()
    for one, other in zip(*(net.parameters() for net in twins), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    # What is no input has neither gradient nor statistics.
    net = twins[0]
    want = reference(net, losses[1])
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    plain = kfac(net)
    plain.zero_grad()
    losses[1](net).backward(inputs=list(net.first.parameters()))
    plain.step()
    for n, p in net.named_parameters():
        moves = n.startswith("first.")
        torch.testing.assert_close(before[n] - p.detach(), LR * want[n] * moves, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "when", ["before it is made", "not cleared", "written", "cleared", "set to zero", "of a penalty"]
)
def test_gradients_of_before_the_first_pass_are_told(when: str) -> None:
    net = transformed(Heads)
    loss = cross_entropy(*batch(0), 1)
    if when == "before it is made":
        loss(net).backward()
    optimizer = kfac(net)
    if when == "of a penalty":  # whose gradient is in no statistics as a term of the loss, either
        (net.stem.weight.square().sum() + net.first.weight.square().sum()).backward()
    elif when == "written":  # as of a run that is resumed between two passes of one step
        for p in (net.stem.weight, net.stem.bias, net.first.weight, net.first.bias):
            p.grad = torch.ones_like(p)
    elif when != "before it is made":
        loss(net).backward()
        optimizer.step()
        if when != "not cleared":
            net.zero_grad(set_to_none=when == "cleared")
    loss(net).backward()
    told = when in ("before it is made", "not cleared", "written")
    with warnings.catch_warnings():
        if told:
            warnings.simplefilter("ignore", MupassWarning)
        optimizer.step()
    assert ("older_gradients" in optimizer.stats()) == told
    # An adversarial pass on top of the old gradients, which is cleared with them.
    loss(net).backward()
    net.zero_grad()
    before = optimizer.stats()
    assert_taken(net, optimizer, loss)
    assert optimizer.stats() == {**before, "steps": before["steps"] + 1}


def test_gradients_that_vanish_by_themselves_are_not_cleared() -> None:
    net = transformed(Attention)
    nn.init.zeros_(net.head.weight)
    optimizer = kfac(net)
    for i in range(2):
        x, y = batch(i)
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer._curvature.passes.drop_cleared()
    taken = optimizer._curvature.take()
    assert all(float(sums.rows) == 2 * SAMPLES for sums in taken.values())


def test_a_part_of_the_gradients_may_be_cleared() -> None:
    """The head's factor is then that of the second pass, everything else is of both."""
    curves = {}
    for how in ("both", "second", "part"):
        net = transformed(Attention)
        optimizer = kfac(net)
        for i in range(2):
            x, y = batch(i)
            F.cross_entropy(net(x), y).backward()
            if i == 0 and how != "both":
                (net if how == "second" else net.head).zero_grad()
        curves[how] = {place.module: sums for place, sums in optimizer._curvature.take().items()}
    for module, sums in curves["part"].items():
        want = curves["second" if module == "head" else "both"][module]
        torch.testing.assert_close((sums.a, sums.b), (want.a, want.b))


def penalized(x: Tensor, y: Tensor) -> Loss:
    def loss(net: nn.Module) -> Tensor:
        at = x.clone().requires_grad_(True)
        value = F.cross_entropy(net(at), y)
        (slope,) = torch.autograd.grad(value, at, create_graph=True)
        return value + 10 * slope.square().sum()

    return loss


def test_a_gradient_penalty_counts_its_layers_once() -> None:
    """The gradients of outputs are those of loss and penalty together; the first pass adds nothing."""
    net = transformed(Attention)
    optimizer = kfac(net)
    with pytest.warns(mupass.MupassWarning, match="depends on a gradient that was taken with create_graph"):
        assert_step(net, optimizer, penalized(*batch(0)))
    for i in range(1, 3):  # told once
        assert_step(net, optimizer, penalized(*batch(i)))
    assert optimizer.stats()["derivatives_in_the_loss"] == 3


class Potential(nn.Module):
    """An energy of which forces are the gradient by its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x))).mean(1)


def forces(net: nn.Module, x: Tensor, create_graph: bool = True) -> tuple[Tensor, Tensor]:
    at = x.clone().requires_grad_(True)
    energy = net(at)
    (slope,) = torch.autograd.grad(energy.sum(), at, retain_graph=True, create_graph=create_graph)
    return energy, -slope


def test_a_head_that_only_forces_read_is_refused_by_name() -> None:
    net, (x, _) = transformed(Potential), batch(0)
    optimizer = kfac(net, loss_terms=len(x))
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    forces(net, x)[1].square().mean().backward()
    with pytest.warns(mupass.MupassWarning, match="forces"):
        with pytest.raises(
            mupass.OptimizerError, match="head.weight has a gradient.* that only a derivative"
        ):
            optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_forces_beside_an_energy_are_told_and_what_no_loss_depends_on_is_not() -> None:
    net, (x, _) = transformed(Potential), batch(0)
    optimizer = kfac(net)
    energy, force = forces(net, x)
    energy.square().mean().backward()  # the forces are looked at, and are in no loss
    optimizer.step()
    optimizer.zero_grad()
    energy, force = forces(net, x, create_graph=False)
    (energy - force.square().sum(1)).square().mean().backward()
    optimizer.step()
    assert "derivatives_in_the_loss" not in optimizer.stats()
    optimizer.zero_grad()
    energy, force = forces(net, x)
    (energy.square().mean() + force.square().mean()).backward()
    with pytest.warns(mupass.MupassWarning, match="derivatives in the loss"):
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"ekfac": True}], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_jacobian_beside_the_step_changes_nothing(vectorize: bool, settings: dict[str, Any]) -> None:
    """Its gradients come one by one, or all in one batch, of which no statistics are taken."""
    outcomes = []
    for looks in (False, True):
        net = transformed(Attention)
        optimizer = kfac(net, **settings)
        for i in range(3):
            x, y = batch(i)
            if looks:
                jacobian: Any = torch.autograd.functional.jacobian(
                    lambda at, net=net: net(at).sum(0), x, vectorize=vectorize
                )
                assert jacobian.shape == (CLASSES, *x.shape)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        outcomes.append([parameter.detach() for parameter in net.parameters()])
    for looked, plain in zip(*outcomes, strict=True):
        assert torch.equal(looked, plain)


# Operators on other paths


class Unused(nn.Module):
    """An output that nothing uses, computed before or behind the one that counts."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.other, self.when = nn.Linear(WIDTH, 4), when

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.stem(x))
        left = self.other(z) if self.when == "before" else None
        y = self.head(z)
        left = self.other(z) if self.when == "behind" else left
        return (y, left) if self.when == "returned" else y


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_unused_output_does_not_matter(when: str) -> None:
    net = transformed(lambda: Unused(when))
    optimizer = kfac(net)
    for i in range(2):
        assert_step(net, optimizer, cross_entropy(*batch(i)))


@dataclass(frozen=True)
class Answer:
    """What a model puts out beside what no loss is made of."""

    name: str
    rest: list[Tensor]
    logits: Tensor


def test_terms_are_counted_on_the_fields_of_a_dataclass() -> None:
    class Answers(Unused):
        def forward(self, x: Tensor) -> Answer:
            y, left = super().forward(x)
            return Answer("of a class of its own", [left], y)

    net, (x, y) = transformed(lambda: Answers("returned")), batch(0)
    optimizer = kfac(net)
    given = net(x)
    assert type(given) is Answer and given.name == "of a class of its own"
    assert_step(net, optimizer, lambda net: F.cross_entropy(net(x).logits, y))


class Masked(nn.Module):
    """torch's own encoder or decoder layers with a mask."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        one = layer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.decoder = nn.TransformerDecoder(one, 2) if decoder else None
        self.encoder = None if decoder else nn.TransformerEncoder(one, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self.stem(x)
        if self.decoder is not None:
            return self.head(self.decoder(z, z.flip(1), tgt_mask=mask))
        assert self.encoder is not None
        return self.head(self.encoder(z, mask=mask))


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_layers_with_a_mask_have_the_factors_of_the_exported_model(decoder: bool, boolean: bool) -> None:
    """Given as a user gives it, a mask makes export fail; the recorded run must tell the same callers."""
    mask = nn.Transformer.generate_square_subsequent_mask(4).double()
    mask = mask.isinf() if boolean else mask
    x, y = torch.randn(3, 4, 5).double(), torch.randint(CLASSES, (12,))
    found = []
    for example in (((x,), {"mask": mask}), (x,)):
        torch.manual_seed(0)
        net = mupass.transform(Masked(decoder).double(), example, base=WIDTH)
        optimizer = kfac(net, strict=True)
        F.cross_entropy(net(x, mask).flatten(0, 1), y).backward()
        optimizer.step()
        assert optimizer.stats() == {"steps": 1}
        found.append(net)
    assert found[0].mupass_plan.capture != found[1].mupass_plan.capture  # type: ignore[union-attr]
    assert_same(*found)


class Named(nn.Module):
    """Weights of plain modules that other code gives to operators, by name."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.table, self.mid, self.head = (
            nn.Embedding(7, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )
        self.plain = plain

    def forward(self, ids: Tensor) -> Tensor:
        if self.plain:
            return self.head(torch.tanh(self.mid(self.table(ids))))
        z = F.linear(
            input=F.embedding(ids, weight=self.table.weight), weight=self.mid.weight, bias=self.mid.bias
        )
        return torch.addmm(self.head.bias, mat1=torch.tanh(z), mat2=self.head.weight.t())


def test_operands_may_be_given_by_name() -> None:
    nets = []
    ids, y = torch.randint(7, (SAMPLES,)), batch(0)[1]
    for plain in (True, False):
        torch.manual_seed(0)
        net = mupass.transform(Named(plain).double(), ids, base=WIDTH)
        optimizer = kfac(net, strict=True)
        F.cross_entropy(net(ids), y).backward()
        optimizer.step()
        nets.append(net)
    assert_same(*nets)


class Converted(nn.Module):
    """A gain and a shift in code, as they are or converted, as the norms of language models have them."""

    def __init__(self, converted: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.converted = converted

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        if self.converted:
            return self.head(z * self.gain.double() + self.shift.to(z.dtype))
        return self.head(z * self.gain + self.shift)


def test_gains_and_shifts_may_be_converted() -> None:
    nets = []
    x, y = batch(0)
    for converted in (False, True):
        net = transformed(lambda converted=converted: Converted(converted))
        optimizer = kfac(net, strict=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        nets.append(net)
    assert not torch.equal(net.gain, torch.ones(WIDTH))
    assert_same(*nets)


class Context(nn.Module):
    """A block in another grad mode: reentrant checkpointing in several forms, or none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.mid, self.head = (
            nn.Linear(5, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )
        self.how = how

    def inner(self, z: Tensor) -> Tensor:
        return torch.tanh(self.mid(z))

    def outer(self, z: Tensor) -> Tensor:
        return checkpoint(self.inner, z, use_reentrant=True)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        if self.how == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.head(self.inner(z))
        if self.how == "plain":
            return self.head(self.inner(z))
        run = self.outer if self.how == "nested" else self.inner
        return self.head(checkpoint(run, z, use_reentrant=self.how != "not reentrant"))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("how", ["not reentrant", "reentrant", "nested", "autocast"])
def test_checkpointed_blocks_are_like_others(how: str) -> None:
    nets = []
    for form in ("plain", how):
        net = transformed(lambda form=form: Context(form))
        optimizer = kfac(net, strict=True)
        for i in range(2):
            x, y = batch(i)
            F.cross_entropy(net(x), y).backward()  # twice before the step
        optimizer.step()
        nets.append(net)
    assert_same(*nets)


class Recomputed(nn.Module):
    """Weights in code, in a part that is checkpointed, or not."""

    def __init__(self, saves: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.one = nn.Parameter(torch.empty(WIDTH, WIDTH).uniform_(-0.3, 0.3))
        self.two = nn.Parameter(torch.empty(WIDTH, WIDTH).uniform_(-0.3, 0.3))
        self.gain, self.saves = nn.Parameter(torch.ones(WIDTH)), saves

    def inner(self, z: Tensor) -> Tensor:
        return torch.tanh(F.linear(torch.tanh(z @ self.one), self.two) * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        return self.head(checkpoint(self.inner, z, use_reentrant=False) if self.saves else self.inner(z))


@pytest.mark.parametrize("how", ["inputs", "backward", "grad", "zeros"])
def test_gradients_of_given_weights_go_through_a_checkpoint(how: str) -> None:
    """The pass to ``inputs=`` runs forward again, where taps must save as many tensors as before."""
    nets, found = [], []
    for saves in (False, True):
        net = transformed(lambda saves=saves: Recomputed(saves))
        optimizer = kfac(net, strict=True)
        parameters = [net.one, net.gain, *net.stem.parameters()]
        x, y = batch(0)
        loss = F.cross_entropy(net(x), y)
        if how == "inputs":
            loss.backward(inputs=parameters)
        elif how == "backward":
            torch.autograd.backward([loss], [torch.tensor(2.0).double()], None, False, None, parameters)
        else:  # gradients for the caller, before a step of its own
            parameters.append(net.two)
            inner = net.inner(torch.ones(1, WIDTH).double()) if how == "zeros" else loss
            found.append(torch.autograd.grad(inner.sum(), parameters, materialize_grads=how == "zeros"))
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        nets.append(net)
    assert_same(*nets)
    for pair in zip(*found, strict=True) if found else ():
        torch.testing.assert_close(*pair)
    if how == "zeros":
        assert not found[0][2].any()
        assert found[0][2].shape == nets[0].stem.weight.shape


def test_a_part_without_gradient_is_seen_and_stays() -> None:
    class Frozen(Context):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = torch.tanh(self.stem(x))
            return self.head(self.inner(z))

    net = transformed(lambda: Frozen(""))
    assert {e.geometry.name: e.geometry.role for e in net.mupass_plan.entries}["mid.weight"] == "hidden"  # type: ignore[union-attr]
    assert_step(net, kfac(net), cross_entropy(*batch(0)))


class Sum(nn.Module):
    """beta * b + alpha * (x W), by one operator or by several."""

    def __init__(self, operator: str, alpha: float, beta: float, fused: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        members = () if operator == "addmm" else (2,)
        self.weight = nn.Parameter(torch.randn(*members, WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(*(m for m in members if operator == "baddbmm"), 1, WIDTH) / 4)
        self.operator, self.alpha, self.beta, self.fused = operator, alpha, beta, fused

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.stem(x))
        z = z if self.operator == "addmm" else torch.stack([z, -z])
        if self.fused:
            z = getattr(torch, self.operator)(self.bias, z, self.weight, alpha=self.alpha, beta=self.beta)
        elif self.operator == "addbmm":
            z = torch.einsum("bni,bij->nj", z, self.weight) * self.alpha + self.bias * self.beta
        else:
            z = z @ self.weight * self.alpha + self.bias * self.beta
        z = torch.tanh(z)
        return self.head(z.mean(0) if self.operator == "baddbmm" else z)


@pytest.mark.sample
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 1.0), (0.5, 0.25), (2.0, 0.5)])
@pytest.mark.parametrize("operator", ["addmm", "baddbmm", "addbmm"])
def test_numbers_inside_of_an_operator_are_in_the_factors(operator: str, alpha: float, beta: float) -> None:
    """Weights move as with separate operators; a vector that is added by the dense step of its own B."""
    nets, before = [], {}
    x, y = batch(0)
    for fused in (True, False):
        net = transformed(lambda fused=fused: Sum(operator, alpha, beta, fused))
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer = kfac(net, fallback="sgd", fallback_lr=0.0)
        F.cross_entropy(net(x), y).backward()
        gradient = net.bias.grad
        optimizer.step()
        nets.append(net)
        if fused:
            treatments = {c.parameter: c.treatment for c in optimizer.coverage()}
            assert treatments["weight"] == ("kfac linear" if operator == "addmm" else "kfac contraction")
    for name, p in nets[0].named_parameters():
        if name != "bias":
            torch.testing.assert_close(p, dict(nets[1].named_parameters())[name], rtol=1e-7, atol=1e-10)
    assert (treatments["bias"] == "kfac bias") == (operator != "baddbmm")
    if operator != "baddbmm":
        twin = transformed(lambda: Sum(operator, alpha, beta, False))
        made: list[Tensor] = []
        twin.bias.register_hook(lambda g: None)
        z = torch.tanh(twin.stem(x))
        z = (
            torch.einsum("bni,bij->nj", torch.stack([z, -z]), twin.weight)
            if z.dim() != twin.weight.dim()
            else z @ twin.weight
        )
        z = (z * alpha + twin.bias * beta).detach().requires_grad_(True)
        F.cross_entropy(twin.head(torch.tanh(z)), y).backward()
        made.append(z.grad * beta)
        b = SAMPLES * made[0].T @ made[0]
        step = torch.linalg.solve(b + RHO * torch.eye(WIDTH).double(), gradient.flatten()) / (1 + RHO)
        torch.testing.assert_close((before["bias"] - nets[0].bias.detach()).flatten(), LR * step)


@pytest.mark.parametrize("shape", [(SAMPLES, WIDTH), (1,)])
def test_what_is_added_but_is_no_vector_of_outputs_is_left_to_the_fallback(shape: tuple[int, ...]) -> None:
    class Table(Sum):
        def __init__(self) -> None:
            super().__init__("addmm", 1.0, 1.0, True)
            self.bias = nn.Parameter(torch.zeros(shape))

    net = transformed(Table)
    optimizer = kfac(net)
    reasons = {c.parameter: (c.treatment, c.reason) for c in optimizer.coverage()}
    assert reasons["bias"][0] == "adamw"
    assert "not one number for each output of weight" in reasons["bias"][1]
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


# Transforms of torch.func, torch.compile


def test_taps_let_transforms_pass_and_say_so_once() -> None:
    net = transformed(Heads)
    optimizer = kfac(net)
    x, y = batch(0)

    def loss_of(z: Tensor) -> Tensor:
        return net(z[None], 1).sum()

    with pytest.warns(MupassWarning, match=r"stem.weight is used under a transform of torch.func") as caught:
        slopes = torch.func.vmap(torch.func.grad(loss_of))(x)
        _, change = torch.func.jvp(lambda z: net(z, 1).sum(1), (x,), (x,))
    assert len([w for w in caught if issubclass(w.category, MupassWarning)]) == 1
    idle = copy.deepcopy(net)
    want = torch.func.vmap(torch.func.grad(lambda z: idle(z[None], 1).sum()))(x)
    torch.testing.assert_close(slopes, want)
    torch.testing.assert_close(change, (want * x).sum(1))
    assert_step(net, optimizer, cross_entropy(x, y, 1))


class Physics(nn.Module):
    """A derivative by torch.func in the forward pass."""

    def __init__(self, derivative: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head, self.derivative = nn.Linear(WIDTH, 1), derivative

    def forward(self, x: Tensor) -> Tensor:
        value = self.derivative(lambda z: self.head(self.net(z)).squeeze(-1))
        return torch.func.vmap(value)(x).flatten(1)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", ["grad", "jacrev", "jacfwd", "hessian"])
def test_a_forward_pass_with_torch_func_is_analysed(name: str) -> None:
    net = Physics(getattr(torch.func, name))
    analysis = mupass.analyze(net, torch.randn(6, 2), base=4)
    roles = {g.name: g.role for g in analysis.geometries}
    assert roles == {
        "net.0.weight": "input",
        "net.0.bias": "vector",
        "net.2.weight": "hidden",
        "net.2.bias": "vector",
        "head.weight": "output",
        "head.bias": "scalar",
    }
    assert not any(g.readout_uses for g in analysis.geometries)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_model_in_training_can_be_traced() -> None:
    net = transformed(Attention)
    optimizer = kfac(net)
    x, y = batch(0)
    traced = torch.jit.trace(net, x)  # type: ignore[no-untyped-call]
    exported = torch.export.export(net, (x,)).module()
    for program in (traced, exported):
        torch.testing.assert_close(program(x), net(x))
    assert_step(net, optimizer, cross_entropy(x, y))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_own_factors_cost_no_graph_and_no_product_when_compiled() -> None:
    """Two graphs, no break; equal products of one activation are one product."""
    counter = CompileCounterWithBackend("aot_eager")
    eager = transformed(Attention)
    twin = copy.deepcopy(eager)
    run = torch.compile(twin, fullgraph=True, backend=counter)
    optimizers = kfac(eager, factor_every=2), kfac(twin, factor_every=2)
    for i in range(4):
        x, y = batch(i)
        for net, optimizer in zip((eager, run), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert counter.frame_count == 2
    assert not counters["graph_break"]
    assert_same(eager, twin)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_an_output_that_the_loss_leaves_out_takes_no_part_when_compiled() -> None:
    """Its gradients are zeros in a graph."""
    net = transformed(Heads)
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    optimizer = kfac(net, factor_decay=0.5)
    bank, first, _ = optimizer._kronecker.at["b:first:0"]
    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        one, two = run(x)
        (F.cross_entropy(one, y) if i == 0 else F.cross_entropy(two, y)).backward()
        if i == 0:
            kept = {}
        optimizer.step()
        kept = kept or {name: tensor[first].clone() for name, tensor in bank.state.items()}
    assert optimizer.stats() == {"steps": 3}
    assert float(bank.state["weight"][first]) == 0.5
    for name in ("factor", "weight", "peak", "recent"):
        assert torch.equal(bank.state[name][first], kept[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_compiled_products_of_one_activation_are_one() -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    products = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph)

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        shapes = [n.meta["val"].shape for n in graph.graph.nodes if n.target is torch.ops.aten.bmm.default]
        products.append(sum(shape == (1, WIDTH, WIDTH) for shape in shapes))
        return make_boxed_func(graph)

    net = transformed(Attention)
    kfac(net)
    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition
    )
    x, y = batch(0)
    F.cross_entropy(torch.compile(net, fullgraph=True, backend=backend)(x), y).backward()
    assert products == [2 + 4]  # A of q, k and v together and of the head; B of q, k, v and the stem


# Rows of a table that stand for nothing --------------------------------------------------------------------


class Padded(nn.Module):
    """Tokens, of which 0 stands for none, looked up by a module or by a function."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table = how, nn.Embedding(9, WIDTH, padding_idx=0 if how == "module" else None)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) if self.how == "module" else F.embedding(ids, self.table.weight, padding_idx=-9)
        return self.head(torch.tanh(self.mix(x)).mean(1))


@pytest.mark.parametrize("how", ["module", "function"])
def test_rows_that_no_gradient_reaches_are_not_in_the_factors_of_their_table(how: str) -> None:
    ids, y = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 1]]), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    net = mupass.transform(Padded(how).double(), ids, base=WIDTH)
    optimizer = kfac(net)
    looked_up: list[Tensor] = []
    handle = net.mix.register_forward_pre_hook(lambda module, args: looked_up.append(args[0]))
    F.cross_entropy(net(ids), y).backward()
    (taken,) = [sums for place, sums in optimizer._curvature.take().items() if "table" in str(place)]
    loss = F.cross_entropy(net(ids), y)
    (gradient,) = torch.autograd.grad(loss, looked_up[1:])
    handle.remove()
    rows = gradient[ids != 0]
    torch.testing.assert_close(taken.b[0][0], len(y) * rows.T @ rows)
    counts = torch.bincount(ids.flatten(), minlength=9).double()
    counts[0] = 0
    torch.testing.assert_close(taken.a.flatten(), counts / counts.sum())
    assert float(taken.rows) == 7


def test_gradients_that_are_divided_by_frequencies_fall_back_by_name() -> None:
    ids = torch.randint(9, (4, 5))
    net = nn.Sequential(
        nn.Embedding(9, WIDTH, scale_grad_by_freq=True), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
    )
    (row, *_) = mupass.KFAC(mupass.transform(net, ids, base=WIDTH)).coverage()
    assert row.treatment == "adamw" and "divided by how often a row was read" in row.reason


# Passes that are not what they look like -------------------------------------------------------------------


def test_two_backward_passes_through_one_forward_pass_are_told() -> None:
    net, (x, y) = transformed(Attention), batch(0)
    optimizer = kfac(net)
    out = net(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    out.square().mean().backward()
    with pytest.warns(MupassWarning, match="several backward passes ran through one forward pass"):
        optimizer.step()


@pytest.mark.parametrize("between", ["cleared", "of inputs", "another forward pass", "a step"])
def test_passes_whose_gradients_do_not_add_up_in_one_step_are_not_told(between: str) -> None:
    net, (x, y) = transformed(Attention), batch(0)
    optimizer = kfac(net)
    x = x.requires_grad_(True)
    out = net(x)
    if between == "of inputs":
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        out.sum().backward(inputs=[x], retain_graph=True)
    else:
        F.cross_entropy(out, y).backward(retain_graph=True)
    if between == "cleared":
        net.zero_grad()
    if between == "a step":
        optimizer.step()
        optimizer.zero_grad()
        out = net(x)
    if between == "another forward pass":
        out = net(x)
    F.cross_entropy(out, y).backward()
    optimizer.step()
    assert "repeated_passes" not in optimizer.stats()


def test_output_rows_without_a_gradient_are_told_and_their_number_settles_it() -> None:
    x, y = batch(0)
    y[:5] = -100  # left out of the mean
    loss = cross_entropy(x, y)
    for terms in (None, 7):
        net = transformed(Attention)
        optimizer = kfac(net, loss_terms=terms)
        loss(net).backward()
        if terms is None:
            with pytest.warns(MupassWarning, match=r"gradient of exactly zero.*pass loss_terms="):
                optimizer.step()
        else:
            optimizer.step()
    few = batch(1)
    few[1][:3] = -100  # a quarter, which may be chance
    optimizer.zero_grad()
    cross_entropy(*few)(net).backward()
    optimizer.step()


def test_saliency_of_one_sample_says_nothing_of_loss_terms() -> None:
    net, (x, y) = transformed(Attention), batch(0)
    optimizer = kfac(net)
    at = x.clone().requires_grad_(True)
    torch.autograd.grad(net(at)[0].sum(), at)
    cross_entropy(x, y)(net).backward()
    optimizer.step()
    assert optimizer.stats() == {"steps": 1}


def test_a_model_that_runs_under_vmap_alone_is_refused() -> None:
    net, (x, y) = transformed(lambda: Heads()), batch(0)
    optimizer = kfac(net)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    with pytest.warns(MupassWarning, match="under a transform of torch.func"):
        F.cross_entropy(torch.vmap(lambda row: net(row, 1))(x), y).backward()
    with pytest.raises(mupass.OptimizerError, match="every weight that has a gradient"):
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_gradients_without_a_backward_pass_are_refused_before_there_are_factors() -> None:
    net, (x, y) = transformed(Attention), batch(0)
    optimizer = kfac(net)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    loss, parameters = cross_entropy(x, y), list(net.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(net), parameters), strict=True):
        parameter.grad = gradient
    with pytest.raises(mupass.OptimizerError, match=r"written into \.grad.*mupass.SOAP"):
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    # Later there are factors of before: the step is taken with them, and told.
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()
    with pytest.warns(MupassWarning, match=r"Directions follow the factors of before.*call backward\(\)"):
        optimizer.step()


def test_a_weight_that_is_tied_later_is_told_by_name() -> None:
    net, (x, y) = transformed(Exits), batch(0)
    optimizer = kfac(net)
    net.blocks[1].weight = net.blocks[0].weight
    cross_entropy(x, y)(net).backward()
    with pytest.warns(MupassWarning, match="blocks.1.weight was tied to blocks.0.weight after the optimizer"):
        optimizer.step()


class Other(nn.Module):
    """Another module that uses the parameters of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_gradients_that_come_past_their_taps_later_are_told_by_name() -> None:
    net = transformed(Heads)
    optimizer = kfac(net)
    told = []
    for i, task in enumerate((1, 2, 1, 2, 2)):
        if i == 3:
            net.mid = Other(net.mid)
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(net(x, task), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [(i, str(w.message).split(":")[2].split()[0]) for w in caught]
    assert told == [(3, "mid.bias"), (3, "mid.weight")]
    assert optimizer.stats() == {"steps": 5, "gradients_without_statistics": 4}


@pytest.mark.parametrize("every", [2, 4])
def test_a_layer_that_runs_between_collections_alone_is_seen(every: int) -> None:
    """Two tasks in turn: the second one's layers take part in no step of an even number."""
    net = transformed(Heads)
    optimizer = kfac(net, factor_every=every)
    for i in range(8):
        x, y = batch(i)
        loss = cross_entropy(x, y, 1 + i % 2)
        # The steps of the second task are collected as soon as it is known that it is left out.
        assert optimizer.factors_due == (i in (0, 2, 3, 4, 6, 7))
        if optimizer.factors_due:
            assert_step(net, optimizer, loss)
            continue
        before = net.mid.weight.detach().clone()
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        assert torch.equal(before, net.mid.weight) == (i == 1)  # nothing was seen of it before


class Tripled(Heads):
    """A layer whose output is three times what it is, told by a hook, which the model or the caller sets."""

    def __init__(self, by_itself: bool = True) -> None:
        super().__init__()
        if by_itself:
            self.stem.register_forward_hook(triple)


class Multiplied(Heads):
    def forward(self, x: Tensor, task: int = 1) -> Tensor:
        y: Tensor = self.first(torch.tanh(3 * self.stem(x)))
        return y


def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3 * output


@pytest.mark.parametrize("hook", ["of the model", "later", "in front"])
def test_a_tap_sees_an_output_before_hooks_of_the_caller(hook: str) -> None:
    net, plain = transformed(lambda: Tripled(hook == "of the model")), transformed(Multiplied)
    plain.load_state_dict(net.state_dict())
    optimizer = kfac(net)
    if hook != "of the model":
        net.stem.register_forward_hook(triple, prepend=hook == "in front")
    loss = cross_entropy(*batch(0), 1)
    want = reference(plain, loss)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(before[n] - p.detach(), LR * want[n], rtol=1e-7, atol=1e-10, msg=n)


@pytest.mark.parametrize("changes", [True, False])
def test_a_hook_of_all_modules_that_changes_outputs_is_told(changes: bool) -> None:
    net = transformed(Heads)
    optimizer = kfac(net)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return 3 * output if changes and module is net.stem else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        if not changes:
            assert_step(net, optimizer, both(*batch(0)))
            return
        with pytest.warns(
            MupassWarning, match=r"^stem.weight is used by a module whose output a hook changes"
        ):
            both(*batch(0))(net).backward()
        with pytest.raises(OptimizerError, match=r"stem.weight has a gradient, but its tap saw no operator"):
            optimizer.step()
    finally:
        handle.remove()
