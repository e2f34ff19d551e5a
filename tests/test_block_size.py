"""Factors of blocks on the diagonal: against the masked dense factors in float64, and flat in width."""

from __future__ import annotations

import math

import pytest
import torch
from test_compile import fresh, kfac, make, train  # noqa: F401
from test_kfac import LR, ONE_STEP, RHO, Deltas, growth, moved, one_step, power
from test_taps import BASE, CASES, Case, dense_factors, normal, squares, terms_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mupass

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def blocks(n: int, size: int) -> tuple[int, int]:
    count = math.ceil(n / size)
    return count, math.ceil(n / count)


def root(m: Tensor, size: int, base: int, e: float, order: float | None) -> Tensor:
    """``(masked m + rho)^-e`` with a rho for each block, over the growth of their number since the base."""
    count, side = blocks(len(m), size)
    of = torch.arange(len(m)) // side
    masked = m * (of[:, None] == of)
    grown = count / blocks(base, size)[0]
    traces = torch.stack([masked.diagonal()[of == i].sum() for i in of])
    rho = RHO * traces if order is None else torch.full_like(traces, RHO * order / grown)
    return power(masked + rho.diag(), 0.0, e) / grown**e


def dense_update(case: Case, plain: nn.Module, mode: str, e_a: float, e_b: float, size: int) -> Deltas:
    """One step from its formula, layer by layer and group by group."""
    factors, found = dense_factors(plain, terms_of(case)), {}
    plain.zero_grad()
    terms_of(case)(plain).mean().backward()
    narrow = case.plain(BASE)
    for module, f in factors.items():
        layer = plain.get_submodule(module)
        for kind in ("weight", "bias"):
            p = getattr(layer, kind, None)
            if p is None:
                continue
            name, table = f"{module}.{kind}", isinstance(layer, nn.Embedding)
            grad = p.grad.T if table else p.grad
            shape = narrow.get_parameter(name).shape
            n_out, n_in = (shape[1], shape[0]) if table else (shape[0] // len(f.b), shape[1:].numel())
            m_in, m_out = growth(case, name)
            parts = []
            for g, b, a in zip(grad.chunk(len(f.b)), f.b, f.a, strict=True):
                left = root(b, size, n_out, e_b, 1 / m_out if mode == "absolute" else None)
                if kind == "bias":
                    right = (1 + torch.ones(1, 1, dtype=b.dtype) * RHO) ** -e_a
                else:  # a table's A is diagonal, and whole
                    cut = len(a) if table else size
                    right = root(a, cut, len(a) if table else n_in, e_a, m_in if mode == "absolute" else None)
                parts.append((left @ g.reshape(len(b), -1) @ right).reshape(g.shape))
            step = -LR * m_out ** (1 - e_b) * m_in ** (e_a - 1) * torch.cat(parts)
            found[name] = step.T if table else step
    return found


@pytest.mark.sample
@pytest.mark.parametrize("powers", [(1, 1), (0.5, 0.5), (1, 0)], ids=str)
@pytest.mark.parametrize("mode", ["trace", "absolute"])
@pytest.mark.parametrize(
    "name", ["linear", "sequence", "twice", "embedding", "2d stride padding", "2d groups", "2d groups stride"]
)
def test_the_update_equals_the_formula_with_masked_factors(
    name: str, mode: str, powers: tuple[float, float]
) -> None:
    case = CASES[name]
    net, plain = case.net(), case.plain()
    plain.load_state_dict(net.state_dict())
    want = dense_update(case, plain, mode, *powers, size=3)
    got = one_step(case, net, damping_mode=mode, e_a=powers[0], e_b=powers[1], block_size=3)
    whole = one_step(case, case.net(), damping_mode=mode, e_a=powers[0], e_b=powers[1])
    assert got.keys() == want.keys()
    for n in want:
        scale = want[n].abs().max()
        assert (got[n] - want[n]).abs().max() < 1e-8 * scale > 0, n
    assert any((got[n] - whole[n]).norm() > 0.1 * whole[n].norm() for n in want)


def test_blocks_that_hold_every_side_change_nothing() -> None:
    case = CASES["2d stride padding"]
    for n, step in one_step(case, case.net(), block_size=1000).items():
        assert torch.equal(step, one_step(case, case.net())[n])


def test_a_norm_in_blocks() -> None:
    """A gain's factor is cut like a bias': its gradient in a block sees this block's alone."""
    case = Case("norm", lambda w: nn.Sequential(nn.Linear(5, w), nn.LayerNorm(w), nn.Linear(w, 3)),
                normal(6, 5), normal(6, 3), squares)  # fmt: skip
    net = case.net()
    x, y = case.batch()
    z = net[0](x)
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + net[1].eps).sqrt()
    gain = torch.ones_like(z).requires_grad_()  # one gain a sample
    losses = squares(net[2](z * gain * net[1].weight.detach() + net[1].bias.detach()), y)
    (deltas,) = torch.autograd.grad(losses.sum(), gain)
    b, grad = deltas.T @ deltas / len(x), deltas.mean(0)
    m_out = len(b) / case.plain(BASE)[1].weight.numel()
    want = -LR / (1 + RHO) * (root(b, 3, len(b) // 2, 1.0, None) @ grad)
    scale = {e.geometry.name: e.scales.lr for e in net.mupass_plan.for_optimizer("kfac").entries}["1.weight"]
    assert m_out == 2
    torch.testing.assert_close(one_step(case, net, block_size=3)["1.weight"], want * scale)


def mlp(w: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, 8))


@pytest.mark.slow
def test_the_update_of_an_activation_keeps_its_order_in_width() -> None:
    """Blocks of 32 at widths 64 to 512; RMS of the change of every layer's output by its weight."""
    widths, sizes = (64, 128, 256, 512), {}
    for w in widths:
        changes = []
        for seed in range(4):
            torch.manual_seed(seed)
            x, y = torch.randn(64, 16, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
            net = mupass.transform(mlp(w).double(), x, base=64)
            inputs: dict[int, Tensor] = {}
            for i in (0, 2, 4):
                keep = lambda m, a, i=i, inputs=inputs: inputs.update({i: a[0].detach()})  # noqa: E731
                net[i].register_forward_pre_hook(keep)
            # Errors are summed over eight outputs: as large as the mean of targets that are far away.
            how = {"momentum": 0.0, "step_bound": None, "target_scale": 1.0}
            optimizer = mupass.KFAC(net, LR, RHO, block_size=32, **how)
            for _ in range(2):  # the readout starts at zero: its second step is like any other
                optimizer.zero_grad()
                squares(net(x), y).mean().backward()
                step = moved(net, optimizer.step)
            changes.append([(inputs[i] @ step[f"{i}.weight"].T).square().mean().sqrt() for i in (0, 2, 4)])
        sizes[w] = torch.tensor(changes).log().mean(0)
    logs = torch.tensor(widths).double().log()
    logs -= logs.mean()
    slopes = (logs[:, None] * torch.stack([sizes[w] for w in widths])).sum(0) / logs.square().sum()
    assert (slopes.abs() < 0.15).all(), slopes


@pytest.mark.slow
def test_steps_are_averaged_and_resumed_and_compiled() -> None:
    net = make("transformer")
    optimizer = kfac(net, block_size=5, root_every=3)
    counter = CompileCounterWithBackend("aot_eager")
    losses = train(torch.compile(net, fullgraph=True, backend=counter), optimizer, "transformer", 6)
    twin = make("transformer")
    other = kfac(twin, block_size=5, root_every=3)
    assert losses == pytest.approx(train(twin, other, "transformer", 6), rel=1e-7)
    assert counter.frame_count == 2
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(mupass.OptimizerError, match="in the state of .* has shape"):
        kfac(twin).load_state_dict(optimizer.state_dict())
    assert math.isfinite(other.curvature_along({n: p.detach() for n, p in twin.named_parameters()}))


@pytest.mark.parametrize("options", [{"ekfac": True}, {"damping_mode": "pi"}, {"block_size": 0}], ids=str)
def test_what_needs_whole_factors_is_refused(options: dict) -> None:
    case = CASES["linear"]
    with pytest.raises(mupass.OptimizerError, match="block_size"):
        mupass.KFAC(case.net(), LR, RHO, **{"block_size": 3} | ONE_STEP | options)
