"""K-FAC on weights that no plain module uses: updates against dense factors of an equivalent plain model."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, damping, moved, power
from test_taps import BASE, WIDTH, normal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
W = WIDTH
Rows = list[tuple[Tensor, Tensor]]  # (input rows [n, fan_in], output [.., rows' shape, fan_out]) of every use


@dataclass(frozen=True)
class Use:
    """One matrix of a parameter, and how to see its uses in a plain copy of the model.

    Attributes:
        parameter: Its name.
        matrix: Parameter-shaped tensor -> ``[fan_out, fan_in]``.
        probes: Names under which the model's `see` was called.
        inputs: Probe and layout of the input, where it is not that of the output's own call.
    """

    parameter: str
    matrix: Callable[[Tensor], Tensor]
    probes: tuple[str, ...]
    vector: bool = False
    place: Callable[[Tensor], Tensor] = lambda t: t


class Seen(nn.Module):
    """A model that can report (input rows, output) of its weight uses, for the reference."""

    def see(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Called by forward with an input and the output of a weight; probes in the reference only."""
        log = getattr(self, "log", None)
        if log is None:
            return y
        zero = torch.zeros_like(y, requires_grad=True)
        log.append((name, x.detach(), zero))
        return y + zero


class Raw(Seen):
    """Matmul, its transpose, einsum with heads, functional linear, addmm in (in, out) layout."""

    def __init__(self, w: int = W) -> None:
        super().__init__()
        scale = 1 / math.sqrt(w)
        self.first = nn.Parameter(torch.randn(5, w) / math.sqrt(5))
        self.turned = nn.Parameter(torch.randn(w, w) * scale)
        self.heads = nn.Parameter(torch.randn(w // 4, 4, w) * scale)
        self.plain = nn.Parameter(torch.randn(w, w) * scale)
        self.shift = nn.Parameter(torch.randn(w) * 0.1)
        self.gpt, self.gpt_bias = nn.Parameter(torch.randn(w, w) * scale), nn.Parameter(torch.randn(w) * 0.1)
        self.gain, self.move = nn.Parameter(torch.rand(w) + 0.5), nn.Parameter(torch.randn(w) * 0.1)
        self.out = nn.Parameter(torch.randn(3, w) * scale)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.see("first", x, x @ self.first))
        h = torch.tanh(self.see("turned", h, torch.matmul(h, self.turned.t())))
        h = torch.tanh(self.see("heads", h, torch.einsum("bnd,hkd->bnhk", h, self.heads))).flatten(2)
        h = torch.tanh(self.see("plain", h, F.linear(h, self.plain, self.shift)))
        flat = torch.addmm(self.gpt_bias, h.reshape(-1, h.shape[-1]), self.gpt)
        h = torch.tanh(self.see("gpt", h, flat.view(h.shape)))
        h = self.see("gain", h, h * self.gain)
        h = torch.tanh(self.see("move", h, self.move + h))
        return self.see("out", h, h @ self.out.mT)


class Experts(Seen):
    """A weight a expert, in einsum and in bmm; the same weight used twice; a transposed convolution."""

    def __init__(self, w: int = W) -> None:
        super().__init__()
        self.inp = nn.Linear(5, w)
        self.up = nn.Parameter(torch.randn(3, w, 2 * w) / math.sqrt(w))
        self.down = nn.Parameter(torch.randn(3, 2 * w, w) / math.sqrt(2 * w))
        self.again = nn.Parameter(torch.randn(w, w) / math.sqrt(w))
        self.out = nn.Linear(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x)).reshape(1, -1, self.again.shape[0])
        h = torch.cat([h, torch.sin(h), torch.cos(h)])
        u = torch.tanh(self.see("up", h, torch.einsum("end,edf->enf", h, self.up)))
        h = torch.tanh(self.see("down", u, torch.bmm(u, self.down))).sum(0).view(*x.shape[:2], -1)
        h = torch.tanh(self.see("again", h, h @ self.again))
        h = torch.tanh(self.see("again", h, torch.mm(h.flatten(0, 1), self.again).view(h.shape)))
        return self.out(h)


def identity(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    return t.T


def expert(i: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[i].T


USES: dict[str, tuple[type[Seen], list[Use]]] = {
    "raw": (
        Raw,
        [
            Use("first", transposed, ("first",)),
            Use("turned", identity, ("turned",)),
            Use("heads", lambda t: t.reshape(-1, t.shape[-1]), ("heads",), place=lambda t: t.flatten(-2)),
            Use("plain", identity, ("plain",)),
            Use("shift", lambda t: t[:, None], ("plain",), vector=True),
            Use("gpt", transposed, ("gpt",)),
            Use("gpt_bias", lambda t: t[:, None], ("gpt",), vector=True),
            Use("out", identity, ("out",)),
        ],
    ),
    "experts": (
        Experts,
        [
            *(Use("up", expert(i), ("up",), place=lambda t, i=i: t[..., i, :, :]) for i in range(3)),
            *(Use("down", expert(i), ("down",), place=lambda t, i=i: t[..., i, :, :]) for i in range(3)),
            Use("again", transposed, ("again",)),
        ],
    ),
}


def factors(model: Seen, terms: Callable[[nn.Module], Tensor], use: Use) -> tuple[Tensor, Tensor]:
    """A and B by their definition: means over rows, and over loss terms of the sum over positions."""
    model.log = []
    losses = terms(model)
    log, model.log = model.log, None
    calls = [(x, zero) for name, x, zero in log if name in use.probes]
    x = torch.cat(
        [use.place(x).flatten(0, -2) if use.parameter != "heads" else x.flatten(0, -2) for x, _ in calls]
    )
    deltas = []
    for loss in losses:
        for delta in torch.autograd.grad(loss, [zero for _, zero in calls], retain_graph=True):
            deltas.append(use.place(delta).flatten(0, -2))
    d = torch.cat(deltas)
    return x.T @ x / len(x), d.T @ d / len(losses)


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().flatten(0, -2).sum(-1)


def make(cls: type[Any], w: int = W) -> Any:
    torch.manual_seed(0)
    return cls(w).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return normal(4, 7, 5)(), normal(4, 7, 3)()


def transformed(cls: type[Seen]) -> Seen:
    return mupass.transform(make(cls), data()[0], base=BASE)


@pytest.mark.sample("raw-trace-eager", "raw-pi-eager", "experts-trace-eager", "experts-pi-eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["trace", "pi"])
@pytest.mark.parametrize("name", USES)
def test_update_equals_the_dense_formula(name: str, mode: str, compiled: bool) -> None:
    cls, uses = USES[name]
    (x, y), net, plain = data(), transformed(cls), make(cls)
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(net, LR, RHO, damping_floor=0.0, damping_mode=mode, **PLAIN, strict=True)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    squares(run(x), y).mean().backward()
    got = moved(net, optimizer.step)
    squares(plain(x), y).mean().backward()
    for use in uses:
        a, b = factors(plain, lambda m: squares(m(x), y), use)
        grad = use.matrix(plain.get_parameter(use.parameter).grad)  # type: ignore[arg-type]
        if use.vector:
            a = torch.ones(1, 1, dtype=x.dtype)
        if use.parameter in ("up", "down"):  # rows are an expert's own
            assert len(b) == grad.shape[0]
        rho_a, rho_b = damping(mode, a, b, 1, 1)
        want = -LR * power(b, rho_b, 1) @ grad @ power(a, rho_a, 1)
        found = use.matrix(got[use.parameter])
        assert (found - want).norm() < 1e-8 * want.norm(), use


class Heads(nn.Module):
    """Heads that read one activation: as one product, or as products along an axis of one."""

    def __init__(self, broadcast: bool, w: int = W) -> None:
        super().__init__()
        self.broadcast = broadcast
        self.inp, self.out = nn.Linear(5, w), nn.Linear(w, 3)
        self.heads = nn.Parameter(torch.randn(w // 4, w, 4) / math.sqrt(w))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        y = h[:, None] @ self.heads if self.broadcast else torch.einsum("btd,hdk->bhtk", h, self.heads)
        return self.out(torch.tanh(y).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_heads_along_an_axis_of_one_are_one_matrix(compiled: bool) -> None:
    """Blocks of a growing number would take larger steps the more there are."""
    steps = []
    for broadcast in (False, True):
        torch.manual_seed(0)
        (x, y), net = data(), Heads(broadcast).double()
        # A broadcast axis is no sign of a width: it may count an ensemble as well.
        net = mupass.transform(net, x, base=BASE, dims={"heads:0": "infinite", "heads:2": "finite"})
        optimizer = mupass.KFAC(net, LR, RHO, **PLAIN, strict=True)
        run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        squares(run(x), y).mean().backward()
        steps.append(moved(net, optimizer.step))
    for name, want in steps[0].items():
        assert want.norm() > 0
        torch.testing.assert_close(steps[1][name], want, rtol=1e-8, atol=1e-10)


def norms(w: int = W) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, w, 3, padding=1),
        nn.BatchNorm1d(w),
        nn.Tanh(),
        nn.GroupNorm(2, w),
        nn.ConvTranspose1d(w, w, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2),
        nn.InstanceNorm1d(w, affine=True),
        nn.Tanh(),
        nn.Flatten(2),
        Swap(),
        nn.LayerNorm(w),
        nn.Tanh(),
        nn.Linear(w, w),
        nn.RMSNorm(w),
        nn.Linear(w, 3),
        Pool(),
    )


class Pool(nn.Module):
    """One output a sample, so that no position feeds two terms of the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).mean(1)


class Swap(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_norms_take_the_gradient_of_every_position(train: bool) -> None:
    torch.manual_seed(0)
    x = normal(4, 2, 6)()
    net = mupass.transform(norms().double(), x, base=BASE).train(train)
    torch.manual_seed(0)
    plain = norms().double().train(train)
    plain.load_state_dict(net.state_dict())
    y = torch.randn_like(plain(x))
    plain.load_state_dict(net.state_dict())  # running statistics
    optimizer = mupass.KFAC(net, LR, RHO, damping_floor=0.0, **PLAIN, strict=True)
    squares(net(x), y).mean().backward()
    got = moved(net, optimizer.step)
    squares(plain(x), y).mean().backward()
    for index in (1, 3, 5, 9, 12):
        module = plain[index]
        for kind in ("weight", "bias"):
            p = getattr(module, kind, None)
            if p is None:
                continue
            want = norm_update(plain, index, kind, x, y, train)
            found = got[f"{index}.{kind}"]
            assert (found - want).norm() < 1e-8 * want.norm(), (index, kind)


def norm_update(model: nn.Sequential, index: int, kind: str, x: Tensor, y: Tensor, train: bool) -> Tensor:
    """The update of one gain or shift, from a copy of it for every position (and sample)."""
    state = {n: b.clone() for n, b in model.named_buffers()}
    h = x
    for module in model[:index]:
        h = module(h)
    module = model[index]
    channels_first = not isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    bare = type(module).__new__(type(module))
    bare.__dict__ = {**vars(module), "_parameters": dict.fromkeys(("weight", "bias"))}
    z = bare(h.detach())
    z = z.transpose(1, 2) if channels_first else z
    gain, shift = module.weight, getattr(module, "bias", None)
    gains = gain.detach().expand_as(z).clone().requires_grad_()
    shifts = (
        (torch.zeros_like(gain) if shift is None else shift).detach().expand_as(z).clone().requires_grad_()
    )
    h = z.detach() * gains + shifts
    h = h.transpose(1, 2) if channels_first else h
    for later in model[index + 1 :]:
        h = later(h)
    losses = squares(h, y)
    copies = gains if kind == "weight" else shifts
    # In training, batch norm mixes samples; the gradient of a position is then that of all terms together.
    terms = losses.sum()[None] if train else losses
    d = torch.cat([torch.autograd.grad(t, copies, retain_graph=True)[0].flatten(0, -2) for t in terms])
    model.load_state_dict({**model.state_dict(), **state})
    b = d.T @ d / len(losses)
    grad = d.sum(0) / len(losses)
    return -LR / (1 + RHO) * power(b, RHO * b.trace(), 1) @ grad


def test_transposed_convolution_equals_its_dense_factors() -> None:
    """Rows from the Jacobian of the layer's output by its weight, as for the other convolutions."""
    for options in (
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2, "groups": 2},
        {"stride": (2, 1), "kernel_size": (2, 3), "padding": (0, 1)},
    ):
        kernel = options.pop("kernel_size", 3)  # type: ignore[attr-defined]
        torch.manual_seed(0)
        build = lambda w, k=kernel, o=options: nn.Sequential(  # noqa: E731
            nn.Conv2d(2, w, 1),
            nn.Tanh(),
            nn.ConvTranspose2d(w, w, k, **o),
            nn.Tanh(),
            nn.Flatten(2),
            Swap(),
            nn.Linear(w, 3),
        )
        x = normal(2, 2, 3, 3)()
        net = mupass.transform(build(W).double(), x, base=BASE)
        plain = build(W).double()
        plain.load_state_dict(net.state_dict())
        y = torch.randn_like(plain(x))
        optimizer = mupass.KFAC(net, LR, RHO, damping_floor=0.0, **PLAIN, strict=True)
        squares(net(x), y).mean().backward()
        got = moved(net, optimizer.step)["2.weight"]
        want = transposed_update(plain, x, y)
        assert (got - want).norm() < 1e-8 * want.norm(), options


def transposed_update(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    layer, h = model[2], model[1](model[0](x)).detach()
    weight = layer.weight.detach()
    output = layer(h)
    zero = torch.zeros_like(output, requires_grad=True)
    losses = squares(model[6](model[5](model[4](model[3](output.detach() + zero)))), y)
    deltas = torch.stack([torch.autograd.grad(loss, zero, retain_graph=True)[0] for loss in losses])
    jacobian = torch.autograd.functional.jacobian(
        lambda w: F.conv_transpose2d(
            h, w, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        ),
        weight,
    )
    groups, each, own = layer.groups, layer.out_channels // layer.groups, layer.in_channels // layer.groups
    grad = torch.einsum("tnohw,nohwxyij->xyij", deltas, jacobian) / len(losses)
    step = torch.zeros_like(weight)
    for g in range(groups):
        # Rows of the first output channel of the group, by the weights of the group that lead to it.
        rows = jacobian[:, g * each, :, :, g * own : (g + 1) * own, 0].reshape(-1, own * weight[0, 0].numel())
        d = deltas[:, :, g * each : (g + 1) * each].movedim(2, -1).reshape(-1, each)
        a, b = rows.T @ rows / len(rows), d.T @ d / len(losses)
        part = grad[g * own : (g + 1) * own].movedim(1, 0).reshape(each, -1)
        part = power(b, RHO * b.trace(), 1) @ part @ power(a, RHO * a.trace(), 1)
        shape = (each, own, *weight.shape[2:])
        # conv_transpose has (1, 1) for lr powers (1 - 1, 1 - 1): no width factor
        step[g * own : (g + 1) * own] = -LR * part.reshape(shape).movedim(0, 1)
    return step


class Attend(nn.Module):
    """`nn.MultiheadAttention`, self or cross, packed or with widths of its own."""

    def __init__(self, w: int = W, cross: bool = False, separate: bool = False) -> None:
        super().__init__()
        self.inp, self.cross = nn.Linear(5, w), cross
        kind: dict[str, Any] = {"kdim": 5, "vdim": 5} if separate else {}
        self.att = nn.MultiheadAttention(w, w // 4, batch_first=True, **kind)
        self.separate, self.out = separate, nn.Linear(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        other = x if self.separate else torch.sin(h) if self.cross else h
        return self.out(torch.tanh(self.att(h, other, other, need_weights=False)[0]))


class Spelled(nn.Module):
    """The same attention with plain modules."""

    def __init__(self, source: Attend) -> None:
        super().__init__()
        w = source.out.in_features
        kv = 5 if source.separate else w
        self.inp, self.out = nn.Linear(5, w), nn.Linear(w, 3)
        self.q, self.k, self.v, self.o = nn.Linear(w, w), nn.Linear(kv, w), nn.Linear(kv, w), nn.Linear(w, w)
        self.heads, self.cross, self.separate = source.att.num_heads, source.cross, source.separate
        att = source.att
        self.double()
        state = {"inp": source.inp, "out": source.out, "o": att.out_proj}
        with torch.no_grad():
            for name, module in state.items():
                self.get_submodule(name).load_state_dict(module.state_dict())
            parts = (
                (att.q_proj_weight, att.k_proj_weight, att.v_proj_weight)
                if source.separate
                else att.in_proj_weight.chunk(3)
            )
            for name, weight, bias in zip("qkv", parts, att.in_proj_bias.chunk(3), strict=True):
                self.get_submodule(name).weight.copy_(weight)
                self.get_submodule(name).bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        other = x if self.separate else torch.sin(h) if self.cross else h
        q, k, v = (
            f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, t in zip((self.q, self.k, self.v), (h, other, other), strict=True)
        )
        a = F.scaled_dot_product_attention(q, k, v)
        return self.out(torch.tanh(self.o(a.transpose(1, 2).flatten(2))))


@pytest.mark.sample("self-eager", "separate-eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_packed_attention_is_its_plain_layers(kind: str, compiled: bool) -> None:
    (x, y) = data()
    torch.manual_seed(0)
    options = {"cross": kind == "cross", "separate": kind == "separate"}
    net = mupass.transform(Attend(**options).double(), x, base=BASE)
    nn.init.normal_(net.att.in_proj_bias)
    plain = mupass.transform(Spelled(net).double(), x, base=BASE)
    plain.load_state_dict(Spelled(net).double().state_dict())
    steps = []
    for model in (net, plain):
        optimizer = mupass.KFAC(model, LR, RHO, damping_floor=0.0, **PLAIN, strict=True)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        squares(run(x), y).mean().backward()
        steps.append(moved(model, optimizer.step))
    got, want = steps
    if kind == "separate":
        for n in "qkv":
            torch.testing.assert_close(
                got[f"att.{n}_proj_weight"], want[f"{n}.weight"], rtol=1e-7, atol=1e-12
            )
    else:
        weight = torch.cat([want[f"{n}.weight"] for n in "qkv"])
        torch.testing.assert_close(got["att.in_proj_weight"], weight, rtol=1e-7, atol=1e-12)
        bias = torch.cat([want[f"{n}.bias"] for n in "qkv"])
        torch.testing.assert_close(got["att.in_proj_bias"], bias, rtol=1e-7, atol=1e-12)
    for mine, theirs in (("att.out_proj", "o"), ("inp", "inp"), ("out", "out")):
        for leaf in ("weight", "bias"):
            torch.testing.assert_close(got[f"{mine}.{leaf}"], want[f"{theirs}.{leaf}"], rtol=1e-7, atol=1e-12)


class ByFunction(nn.Module):
    """Attention by its function, with an empty tensor for the packed weight, as WavLM calls it."""

    def __init__(self, w: int = W) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, w), nn.Linear(w, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(w, w, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x)).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            h, h, h, W, 4, torch.empty([0]), None, None, None, False, 0.0, self.o.weight, None,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )  # fmt: skip
        return self.out(torch.tanh(attended.transpose(0, 1)))


def test_attention_by_its_function_is_its_plain_layers() -> None:
    (x, y) = data()
    net, plain = (mupass.transform(make(cls), x, base=BASE) for cls in (ByFunction, Apart))
    plain.load_state_dict(net.state_dict())
    steps = []
    for model in (net, plain):
        optimizer = mupass.KFAC(model, LR, RHO, damping_floor=0.0, **PLAIN, strict=True)
        squares(model(x), y).mean().backward()
        steps.append(moved(model, optimizer.step))
    for name, want in steps[1].items():
        assert want.norm() > 0
        torch.testing.assert_close(steps[0][name], want, rtol=1e-7, atol=1e-12)


class Apart(ByFunction):
    """The same attention with its modules called."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(torch.tanh(self.o(attended)))


@pytest.mark.slow
@pytest.mark.parametrize("make_net", [Raw, Experts, Attend], ids=["raw", "experts", "attention"])
def test_two_graphs_over_a_run_with_schedules(make_net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    (x, y) = (t.float() for t in data())
    net = mupass.transform(make_net(), x, base=BASE)
    optimizer = mupass.KFAC(net, 0.01, RHO, factor_every=2, root_every=3, kl_clip=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(net, fullgraph=True, backend=counter)
    for step in range(10):
        for group in optimizer.param_groups:
            group["damping"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        squares(run(x), y).mean().backward()
        optimizer.step()
        schedule.step()
    assert counter.frame_count == 2  # with factors and without


def test_copies_and_pickles_of_tapped_parameters_are_plain() -> None:
    net = transformed(Raw)
    mupass.KFAC(net, LR)
    assert type(net.first).__name__ == "TappedParameter" and isinstance(net.first, nn.Parameter)
    twin = copy.deepcopy(net)
    loaded = pickle.loads(pickle.dumps(net))
    for other in (twin, loaded):
        assert all(type(p) is nn.Parameter for p in other.parameters())
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
        mupass.KFAC(other, LR, strict=True)


def test_a_parameter_that_was_replaced_is_refused_by_name() -> None:
    net, (x, y) = transformed(Raw), data()
    optimizer = mupass.KFAC(net, LR, momentum=0.0)
    replaced = nn.Parameter(net.turned.detach().clone())
    grad = torch.ones_like(replaced)
    old, net.turned = net.turned, replaced
    squares(net(x), y).mean().backward()
    old.grad = grad
    told = pytest.warns(mupass.MupassWarning, match="turned was replaced after the optimizer was made")
    refused = pytest.raises(
        mupass.OptimizerError, match=r"turned has a gradient, but its tap saw no operator"
    )
    with told, refused:
        optimizer.step()


class Scaled(nn.Module):
    """One number multiplies, one shifts, all entries of a sample."""

    def __init__(self, w: int = W) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, w), nn.Linear(w, 3)
        self.scale, self.move = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inp(x) * self.scale) + self.move).mean(1)


def test_one_number_has_one_gradient_a_sample() -> None:
    torch.manual_seed(0)
    x, y = data()[0], torch.randn(4, 3, dtype=torch.float64)
    net = mupass.transform(Scaled().double(), x, base=BASE)
    plain = Scaled().double()
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(net, LR, RHO, damping_floor=0.0, **PLAIN, strict=True)
    squares(net(x), y).mean().backward()
    got = moved(net, optimizer.step)
    for name in ("scale", "move"):
        p = plain.get_parameter(name)
        losses = squares(plain(x), y)
        g = torch.stack([torch.autograd.grad(t, p, retain_graph=True)[0] for t in losses])
        b = g.square().mean()
        want = -LR * g.mean() / (b * (1 + RHO)) / (1 + RHO)
        torch.testing.assert_close(got[name].squeeze(), want)
