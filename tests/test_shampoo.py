"""Shampoo: whole updates against eigendecompositions in float64, matrices of any layout, blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil
from typing import Any

import pytest
import torch
from test_kfac import moved, power
from torch import Tensor, nn

import mupass
from mupass._optim.matrix.blocking import Blocking

WIDTH, BASE, LR, RHO = 12, 6, 0.1, 0.03
OPTIONS = {"graft": "none", "momentum": 0.0, "damping_memory": 0.0, "fallback": "sgd", "fallback_lr": 0.5}


def mlp(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 3))


def cnn(w: int) -> nn.Module:
    layers = [nn.Conv2d(2, w, 2), nn.Tanh(), nn.Conv2d(w, w, (2, 1)), nn.Tanh(), nn.Flatten(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(w, 3))


def language(w: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, w), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 7))


class Attention(nn.Module):
    """Fused qkv, as timm writes it: heads of fixed size 3."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp, self.qkv, self.out = nn.Linear(5, w), nn.Linear(w, 3 * w), nn.Linear(w, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        b, n, w = h.shape
        q, k, v = self.qkv(h).view(b, n, 3, w // 3, 3).permute(2, 0, 3, 1, 4).unbind(0)
        h = torch.softmax(q @ k.transpose(-2, -1) / 3, -1) @ v
        return self.out(h.transpose(1, 2).reshape(b, n, w))


class Einsum(nn.Module):
    """Weights in (in, out) layout and with two axes of outputs."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.inp = nn.Parameter(torch.randn(5, w) / 5**0.5)
        self.hid = nn.Parameter(torch.randn(w, w) / w**0.5)
        self.heads = nn.Parameter(torch.randn(w, w // 3, 3) / w**0.5)
        self.out = nn.Parameter(torch.randn(w // 3, 3, 4) / w**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("bi,io->bo", x, self.inp))
        h = torch.tanh(torch.einsum("bi,io->bo", h, self.hid))
        h = torch.tanh(torch.einsum("bi,ihk->bhk", h, self.heads))
        return torch.einsum("bhk,hko->bo", h, self.out)


def whole(w: Tensor) -> list[Tensor]:
    return [w.reshape(len(w), -1)]


def flipped(w: Tensor) -> list[Tensor]:
    return [w.T]


# name -> (model, input, parameter -> its matrices as [fan_out, fan_in], by hand)
Matrices = dict[str, Callable[[Tensor], list[Tensor]]]
MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor], Matrices]] = {
    "mlp": (mlp, lambda: torch.randn(6, 5), {f"{i}.weight": whole for i in (0, 2, 4)}),
    "cnn": (cnn, lambda: torch.randn(3, 2, 4, 4), {f"{i}.weight": whole for i in (0, 2, 7)}),
    "language": (
        language,
        lambda: torch.arange(12).view(3, 4) % 7,
        {"0.weight": flipped, "1.weight": whole, "3.weight": whole},
    ),
    "attention": (
        Attention,
        lambda: torch.randn(2, 4, 5),
        {"inp.weight": whole, "qkv.weight": lambda w: list(w.chunk(3)), "out.weight": whole},
    ),
    "einsum": (
        Einsum,
        lambda: torch.randn(6, 5),
        {
            "inp": flipped,
            "hid": flipped,
            "heads": lambda w: [w.flatten(1).T],
            "out": lambda w: [w.flatten(0, 1).T],
        },
    ),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The model, transformed, and a batch; the base is a model, which settles what axis of heads grows."""
    torch.manual_seed(0)
    build, example, _ = MODELS[name]
    x, net = example(), build(WIDTH).double()
    x = x.double() if x.is_floating_point() else x
    return mupass.transform(net, plan=_plan(name)), x


@cache
def _plan(name: str) -> mupass.Plan:
    build, example, _ = MODELS[name]
    return mupass.transform(build(WIDTH), example(), base=build(BASE)).mupass_plan  # type: ignore[return-value]


def growth(name: str, parameter: str) -> tuple[float, float]:
    """(m_in, m_out) from the shapes of the first matrix, here and at the base width."""
    build, _, matrices = MODELS[name]
    tensors = [build(w).get_parameter(parameter) for w in (WIDTH, BASE)]
    now, base = (matrices[parameter](t)[0].shape for t in tensors)
    return now[1] / base[1], now[0] / base[0]


def damp(mode: str, m: Tensor, m_in: float, m_out: float) -> Tensor | float:
    if mode == "relative":
        return RHO * torch.linalg.eigvalsh(m)[-1]
    return RHO * m.trace() if mode == "trace" else RHO * m_in / m_out


def direction(g: Tensor, mode: str, e: float, m_in: float, m_out: float, of: Tensor | None = None) -> Tensor:
    """Precondition a gradient, or something else, by the gradient's factors."""
    left, right = g @ g.T, g.T @ g
    rho_l, rho_r = (damp(mode, m, m_in, m_out) for m in (left, right))
    return power(left, rho_l, e / 2) @ (g if of is None else of) @ power(right, rho_r, e / 2)


def step(net: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    optimizer = mupass.Shampoo(net, LR, RHO, **OPTIONS | options)
    net(x).square().mean().backward()
    return moved(net, optimizer.step)


def assert_close(found: Tensor, want: Tensor, note: str) -> None:
    assert (found - want).abs().max() < 1e-8 * want.abs().max(), note


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("mode", ["relative", "absolute", "trace"])
@pytest.mark.parametrize("e", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", MODELS)
def test_update_equals_eigendecompositions(name: str, e: float, mode: str) -> None:
    net, x = make(name)
    got = step(net, x, e=e, damping_mode=mode)
    grads = {n: p.grad for n, p in net.named_parameters()}
    for parameter, matrices in MODELS[name][2].items():
        m_in, m_out = growth(name, parameter)
        moves, gs = (matrices(t) for t in (got[parameter], grads[parameter]))  # type: ignore[arg-type]
        for move, g in zip(moves, gs, strict=True):
            want = -LR * (m_out / m_in) ** (1 - e) * direction(g, mode, e, m_in, m_out)
            assert_close(move, want, parameter)


@pytest.mark.sample
@pytest.mark.parametrize("size", [4, 5, 7])
@pytest.mark.parametrize("e", [0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_shampoo_by_themselves(name: str, e: float, size: int) -> None:
    net, x = make(name)
    got = step(net, x, e=e, block_size=size, damping_mode="trace")
    grads = {n: p.grad for n, p in net.named_parameters()}
    for parameter, matrices in MODELS[name][2].items():
        m_in, m_out = growth(name, parameter)
        rows, columns = matrices(grads[parameter])[0].shape  # type: ignore[arg-type]
        blocks = ceil(rows / size) * ceil(columns / size)
        at_base = ceil(rows / m_out / size) * ceil(columns / m_in / size)
        scale = (m_out / m_in) ** (1 - e) * (at_base / blocks) ** e
        moves, gs = (matrices(t) for t in (got[parameter], grads[parameter]))  # type: ignore[arg-type]
        for move, g in zip(moves, gs, strict=True):
            for r in range(0, rows, size):
                for c in range(0, columns, size):
                    here = slice(r, r + size), slice(c, c + size)
                    want = -LR * scale * direction(g[here], "trace", e, m_in, m_out)
                    assert_close(move[here], want, f"{parameter} at {r}, {c}")


def test_fused_matrices_are_counted_apart() -> None:
    # Block 20 holds q, k and v of width 12 or 6 each; the fused 36 and 18 rows would not fit alike.
    net, _ = make("attention")
    assert Blocking(net.mupass_plan["qkv.weight"].geometry, 20).growth() == 1  # type: ignore[union-attr,index]
    assert Blocking(net.mupass_plan["qkv.weight"].geometry, 6).growth() == 4  # type: ignore[union-attr,index]


@pytest.mark.parametrize("size", [1, 3, 5, 12, 100])
@pytest.mark.parametrize("name", MODELS)
def test_paste_undoes_cut(name: str, size: int) -> None:
    net, _ = make(name)
    for n in MODELS[name][2]:
        p = net.get_parameter(n)
        blocking = Blocking(net.mupass_plan[n].geometry, size)  # type: ignore[union-attr,index]
        blocks = blocking.cut(p)
        assert all(b.dim() == 2 and max(b.shape) <= size for b in blocks)
        assert sum(b.numel() for b in blocks) == p.numel()
        assert torch.equal(blocking.paste(blocks, p), p)


def test_stacked_matrices_of_other_axes() -> None:
    class Experts(nn.Module):
        def __init__(self, w: int) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 5, w) / 5**0.5)
            self.down = nn.Parameter(torch.randn(4, w, 3) / w**0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(torch.einsum("ebi,eio->ebo", x, self.up))
            return torch.einsum("ebi,eio->ebo", h, self.down)

    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    net = mupass.transform(Experts(WIDTH).double(), x, base=BASE)
    got = step(net, x, damping_mode="relative")
    for name, ratio in {"up": 2.0, "down": 0.5}.items():  # m_out / m_in
        for move, g in zip(got[name], net.get_parameter(name).grad, strict=True):  # type: ignore[arg-type]
            assert_close(move.T, -LR * ratio**0.5 * direction(g.T, "relative", 0.5, 1, 1), name)


@pytest.mark.parametrize("sides", ["left", "right", "smaller"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_one_side_takes_the_whole_power(name: str, sides: str) -> None:
    net, x = make(name)
    got = step(net, x, e=0.5, sides=sides, damping_mode="trace")
    for parameter, matrices in MODELS[name][2].items():
        m_in, m_out = growth(name, parameter)
        grad = net.get_parameter(parameter).grad
        for move, g in zip(matrices(got[parameter]), matrices(grad), strict=True):  # type: ignore[arg-type]
            left, right = g @ g.T, g.T @ g
            if sides == "left" or (sides == "smaller" and len(g) <= len(g.T)):
                want = power(left, RHO * left.trace(), 0.5) @ g
            else:
                want = g @ power(right, RHO * right.trace(), 0.5)
            assert_close(move, -LR * (m_out / m_in) ** 0.5 * want, parameter)


@pytest.mark.sample
@pytest.mark.parametrize("size", [5, 100])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("graft", ["none", "sgd", "adam", "rmsprop", "spectral"])
def test_the_mean_of_gradients_is_preconditioned_and_takes_the_norm_of_its_graft(
    graft: str, momentum: float, size: int
) -> None:
    net, _ = make("mlp")
    options = {**OPTIONS, "graft": graft, "block_size": size, "factor_decay": 0.0, "damping_mode": "trace"}
    optimizer = mupass.Shampoo(net, LR, RHO, **options | {"momentum": momentum})
    # m_out is 1, m_in 2; three or one blocks now, two or one at the base width.
    growth = {5: 3 / 2, 100: 1.0}[size]
    scale = {"none": (2 * growth) ** -0.5, "sgd": 0.5, "spectral": (2 * growth) ** -0.5}.get(graft, 0.5)
    mean = square = torch.zeros(3, 12, dtype=torch.float64)
    for t in range(1, 4):
        torch.manual_seed(t)
        optimizer.zero_grad()
        net(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        g = net[4].weight.grad.clone()  # type: ignore[index,union-attr]
        mean, square = momentum * mean + (1 - momentum) * g, 0.999 * square + 0.001 * g**2
        root, first = (square / (1 - 0.999**t)).sqrt() + 1e-8, mean / (1 - momentum**t)
        magnitude = {"sgd": first, "rmsprop": g / root, "adam": first / root}.get(graft)
        move = moved(net, optimizer.step)["4.weight"]
        for c in range(0, 12, size):
            want = direction(g[:, c : c + size], "trace", 0.5, 1, 1, of=first[:, c : c + size])
            if magnitude is not None:
                want = want * magnitude[:, c : c + size].norm() / want.norm()
            got = move[:, c : c + size]
            if graft == "spectral":  # to the precision of its power iteration
                want = want / torch.linalg.matrix_norm(want, 2)
                assert (got + LR * scale * want).norm() < 0.05 * LR * scale * want.norm()
            else:
                assert_close(got, -LR * scale * want, f"step {t}")


def test_sums_of_directions_are_ten_times_the_mean_by_name_only() -> None:
    """On a constant gradient, with Adam's graft, the step is Adam's; only the sum of directions is not."""
    for of, times in (("gradients", 1.0), ("directions", sum(0.9**i for i in range(40)))):
        net, x = make("mlp")
        how = {"graft": "adam", "graft_eps": 0.0, "momentum": 0.9, "momentum_of": of, "block_size": 4}
        optimizer = mupass.Shampoo(net, LR, **how)
        net(x).square().mean().backward()
        for _ in range(40):
            with torch.no_grad():
                before = {n: p.clone() for n, p in net.named_parameters()}
            move = moved(net, optimizer.step)["2.weight"]
            net.load_state_dict(before)
        for rows in move.chunk(3, 0):
            for block in rows.chunk(3, 1):  # entries of Adam's step are all LR; the scale is 1 / m_in
                assert float(block.norm()) == pytest.approx(times * LR / 2 * 4, rel=1e-5)


@pytest.mark.parametrize("mode", ["trace", "relative"])
def test_damping_remembers_the_largest_trace(mode: str) -> None:
    net, _ = make("mlp")
    how = {**OPTIONS, "factor_decay": 0.0, "root_every": 1, "damping_mode": mode, "damping_memory": 0.9}
    optimizer = mupass.Shampoo(net, LR, RHO, **how)
    peak = [torch.zeros(()).double()] * 2
    for t, size in enumerate((1.0, 10.0, 0.1, 0.1)):
        torch.manual_seed(t)
        optimizer.zero_grad()
        (net(torch.randn(6, 5, dtype=torch.float64)).square().mean() * size).backward()
        g = net[2].weight.grad.clone()  # type: ignore[index,union-attr]
        roots = []
        for side, m in enumerate((g @ g.T, g.T @ g)):
            peak[side] = torch.maximum(0.9 * peak[side], m.trace())
            of = m.trace() if mode == "trace" else torch.linalg.eigvalsh(m)[-1]
            roots.append(power(m, RHO * of * peak[side] / m.trace(), 0.25))
        assert t < 2 or peak[0] > 10 * (g @ g.T).trace()
        move = moved(net, optimizer.step)["2.weight"]
        assert_close(move, -LR * roots[0] @ g @ roots[1], f"step {t}")


@pytest.mark.parametrize("e", [0.5, 1.0])
def test_modes_of_a_kernel_share_the_power(e: float) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 2), nn.Tanh(), nn.Conv2d(8, 8, (2, 1)), nn.Flatten(), nn.Linear(8, 3)]
    x = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    net = mupass.transform(nn.Sequential(*layers).double(), x, base=4)
    got = step(net, x, e=e, kernels="modes", damping_mode="trace")
    for name, axes, ratio in [("0.weight", "oikl", 2.0), ("2.weight", "oik", 1.0)]:
        g = want = net.get_parameter(name).grad.squeeze(-1)  # type: ignore[union-attr]
        for axis in axes:
            factor = torch.einsum(f"{axes},{axes.replace(axis, 'z')}->{axis}z", g, g)
            root = power(factor, RHO * factor.trace(), e / len(axes))
            want = torch.einsum(f"{axes},{axis}z->{axes.replace(axis, 'z')}", want, root)
        assert_close(got[name].squeeze(-1), -LR * ratio ** (1 - e) * want, name)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_averages(decay: float) -> None:
    net, _ = make("mlp")
    optimizer = mupass.Shampoo(net, LR, RHO, factor_decay=decay, damping_mode="trace", **OPTIONS)
    weights: list[tuple[float, Tensor]] = []
    for seed in range(3):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        g = net[2].weight.grad.clone()  # type: ignore[index]
        weights = [(w * decay, h) for w, h in weights] + [(1 - decay if decay < 1 else 1.0, g)]
        move = moved(net, optimizer.step)["2.weight"]
    total = sum(w for w, _ in weights) if decay < 1 else 1.0
    left = sum(w * h @ h.T for w, h in weights) / total
    right = sum(w * h.T @ h for w, h in weights) / total
    want = power(left, RHO * left.trace(), 0.25) @ g @ power(right, RHO * right.trace(), 0.25)
    assert_close(move, -LR * want, "2.weight")


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_roots_are_recomputed_every_so_many_steps(every: int, staggered: bool) -> None:
    net, x = make("mlp")
    optimizer = mupass.Shampoo(net, LR, root_every=every, staggered=staggered, block_size=6, **OPTIONS)
    seen: dict[tuple[int, int, int], list[int]] = {}
    work = []
    for at in range(1 + 3 * every):
        before = [{k: t.clone() for k, t in s.state.items()} for s in optimizer._stacks]
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        work.append(0)
        for n, (stack, old) in enumerate(zip(optimizer._stacks, before, strict=True)):
            for side in (0, 1):
                assert not torch.equal(stack.state[f"factor{side}"], old[f"factor{side}"])
                for slot in range(len(stack.slots)):
                    if not torch.equal(stack.state[f"root{side}"][slot], old[f"root{side}"][slot]):
                        seen.setdefault((n, side, slot), []).append(at)
                        work[-1] += stack.shape[side] ** 3
    assert sum(len(s.slots) for s in optimizer._stacks) * 2 == len(seen) > 9
    first = {1: 1, 3: 3}[every]  # all at steps 0, 1, 2, 4, ... of the first period
    for steps in seen.values():  # and then each once in every period
        assert steps[:first] == list(range(first)) and len(steps) in (first + 2, first + 3)
        assert {b - a for a, b in zip(steps[first:], steps[first + 1 :], strict=False)} == {every}
    later = work[first : first + every]
    if staggered:  # no step has much more to do than the mean
        assert max(later) <= sum(later) / every + 6**3
    else:
        assert later[1:] == [0] * (every - 1) and later[0] > 0


@pytest.mark.parametrize("mode", ["relative", "absolute", "trace"])
def test_zero_readout(mode: str) -> None:
    net, x = make("mlp")
    nn.init.zeros_(net[4].weight)  # type: ignore[index,arg-type]
    optimizer = mupass.Shampoo(net, LR, RHO, damping_mode=mode, **OPTIONS)
    for at in range(2):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        got = moved(net, optimizer.step)
        assert all(m.isfinite().all() for m in got.values())
        assert (torch.count_nonzero(got["2.weight"]) > 0) == (at > 0)
        assert torch.count_nonzero(got["4.weight"]) > 0
    assert optimizer.stats() == {"steps": 2}


def test_a_bad_gradient_skips_the_step_and_leaves_no_trace() -> None:
    pair = [make("mlp") for _ in range(2)]
    optimizers = [mupass.Shampoo(net, LR, factor_decay=0.9, root_every=1, block_size=5) for net, _ in pair]

    def go(i: int, scale: float = 1.0) -> None:
        optimizers[i].zero_grad()
        (pair[i][0](pair[i][1]).square().mean() * scale).backward()
        optimizers[i].step()

    for i in (0, 1):
        go(i)
    with pytest.warns(UserWarning, match="skipped steps"):
        go(0, float("nan"))
        optimizers[0].stats()
    for _ in range(3):
        for i in (0, 1):
            go(i)
    assert optimizers[0].stats() == {"steps": 4, "skipped_steps": 1}
    for p, q in zip(*(net.parameters() for net, _ in pair), strict=True):
        assert torch.equal(p, q)


def test_overflowing_factors_keep_the_average() -> None:
    net, x = make("mlp")
    optimizer = mupass.Shampoo(net, LR, **OPTIONS)
    net(x).square().mean().backward()
    optimizer.step()
    before = [{k: t.clone() for k, t in s.state.items()} for s in optimizer._stacks]
    optimizer.zero_grad()
    (net(x).square().mean() * 1e200).backward()
    with pytest.warns(UserWarning, match="overflowed blocks: the squared gradient of"):
        got = moved(net, optimizer.step)
        assert optimizer.stats()["overflowed_blocks"] == 3
    for stack, old in zip(optimizer._stacks, before, strict=True):
        assert all(torch.equal(t, old[k]) for k, t in stack.state.items())
    assert torch.count_nonzero(got["2.weight"]) == 0


def test_a_parameter_without_gradient_keeps_still() -> None:
    net, x = make("mlp")
    optimizer = mupass.Shampoo(net, LR, **OPTIONS)
    h = net[:2](x)  # type: ignore[index]
    (h.square().mean() + net[4](h).square().mean()).backward()  # type: ignore[index]
    got = moved(net, optimizer.step)
    assert torch.count_nonzero(got["2.weight"]) == 0 and torch.count_nonzero(got["4.weight"]) > 0


def test_relative_damping_does_not_see_the_size_of_the_gradient() -> None:
    # e = 1/2 divides the gradient out: 1000 times the loss is the same step.
    steps = []
    for scale in (1.0, 1000.0):
        net, x = make("mlp")
        optimizer = mupass.Shampoo(net, LR, RHO, e=0.5, **OPTIONS)
        (net(x).square().mean() * scale).backward()
        steps.append(moved(net, optimizer.step)["2.weight"])
    torch.testing.assert_close(steps[0], steps[1])
