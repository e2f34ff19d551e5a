"""SOAP against Adam written out in the original basis, in float64."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from test_kfac import moved
from test_shampoo import make
from torch import Tensor, nn

import mupass

LR, BETA1, BETA2, DECAY = 0.1, 0.8, 0.7, 0.9
EPSILON = 1e-8


class Reference:
    """One matrix: averages in its own axes, projected anew at each step, as the paper states it."""

    def __init__(self, scale: float, epsilon: float, every: int, eigh_every: int) -> None:
        self.scale, self.epsilon = scale, epsilon
        self.every, self.eigh_every = every, eigh_every
        self.step = 0
        self.factors: list[Tensor] = []

    def __call__(self, g: Tensor) -> Tensor:
        if not self.factors:
            self.factors = [(1 - DECAY) * g @ g.T, (1 - DECAY) * g.T @ g]
            self.bases = [torch.linalg.eigh(f)[1].flip(-1) for f in self.factors]
            self.mean, self.square = torch.zeros_like(g), torch.zeros_like(g)
            return torch.zeros_like(g)
        self.step += 1
        left, right = self.bases
        self.mean = BETA1 * self.mean + (1 - BETA1) * g
        self.square = BETA2 * self.square + (1 - BETA2) * (left.T @ g @ right) ** 2
        mean = left.T @ self.mean @ right / (1 - BETA1**self.step)
        root = (self.square / (1 - BETA2**self.step)).sqrt()
        update = left @ (mean / (root + self.epsilon)) @ right.T
        for side, moment in enumerate((g @ g.T, g.T @ g)):
            self.factors[side] = DECAY * self.factors[side] + (1 - DECAY) * moment
            early = self.step < self.every and self.step in (1, 2, 4, 8)
            if early or self.step % self.every == 0:
                self._turn(side)
        return -LR * self.scale * update

    def _turn(self, side: int) -> None:
        factor, basis = self.factors[side], self.bases[side]
        order = torch.diag(basis.T @ factor @ basis).argsort(descending=True)
        self.square = self.square[order] if side == 0 else self.square[:, order]
        new = torch.linalg.qr(factor @ basis[:, order])[0]
        if self.eigh_every and (self.step // self.every) % self.eigh_every == 0:
            new = torch.linalg.eigh(factor)[1].flip(-1)
        self.bases[side] = new


@pytest.mark.sample
@pytest.mark.parametrize(("every", "eigh_every"), [(1, 0), (3, 0), (6, 0), (1, 3), (2, 2)])
@pytest.mark.parametrize("size", [3, 6, 100])
@pytest.mark.parametrize("name", ["mlp", "einsum"])
def test_updates_equal_the_reference(name: str, size: int, every: int, eigh_every: int) -> None:
    net, _ = make(name)
    parameter = "2.weight" if name == "mlp" else "hid"  # square and of full rank: its bases are unique
    options: dict[str, Any] = {"momentum": BETA1, "beta2": BETA2, "factor_decay": DECAY}
    options |= {"basis_every": every, "eigh_every": eigh_every, "staggered": False, "block_size": size}
    optimizer = mupass.SOAP(net, LR, **options)
    # Rates are sqrt(b_out b_in) / d_in and epsilons sqrt(b_out b_in) / d_out, here and at the base width 6.
    now, base = min(size, 12), min(size, 6)
    tiles = [(slice(r, r + now), slice(c, c + now)) for r in range(0, 12, now) for c in range(0, 12, now)]
    row = (now / 12) / (base / 6)
    references = [Reference(row, row * EPSILON, every, eigh_every) for _ in tiles]
    for seed in range(9):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(40, 5, dtype=torch.float64)).square().mean().backward()
        grad = net.get_parameter(parameter).grad
        assert grad is not None
        g = grad if name == "mlp" else grad.T
        got = moved(net, optimizer.step)[parameter]
        got = got if name == "mlp" else got.T
        for reference, tile in zip(references, tiles, strict=True):
            want = reference(g[tile])
            assert (got[tile] - want).abs().max() < 1e-6 * LR, (seed, tile)
            assert seed == 0 or want.abs().max() > 0.03 * LR


@pytest.mark.parametrize("size", [3, 6, 100])
def test_rates_and_epsilons_are_those_of_blocks(size: int) -> None:
    net, _ = make("mlp")
    optimizer = mupass.SOAP(net, LR, block_size=size)
    rates = {
        n: g["mupass_scale"] for g in optimizer.param_groups for n in map(optimizer.names.get, g["params"])
    }

    def block(n: int) -> int:
        return min(n, size)

    shapes = {"0.weight": ((12, 5), (6, 5)), "2.weight": ((12, 12), (6, 6)), "4.weight": ((3, 12), (3, 6))}
    for name, ((d_out, d_in), (base_out, base_in)) in shapes.items():
        now = sqrt(block(d_out) * block(d_in))
        base = sqrt(block(base_out) * block(base_in))
        tiles = -(-d_out // size) * -(-d_in // size) / (-(-base_out // size) * -(-base_in // size))
        if d_out * d_in / (base_out * base_in) == tiles * (now / base) ** 2:  # blocks of equal shape
            assert rates[name] == pytest.approx((now / d_in) / (base / base_in)), name
            grows = d_out / base_out if name != "4.weight" else 1.0  # delta is of order 1 at the readout
            assert optimizer._epsilon(name) == pytest.approx((now / base) / grows), name


def stack(width: int, inputs: int = 20) -> nn.Module:
    """Return a multilayer perceptron with the base widths 64 and 256."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, 3)
    )
    return mupass.transform(net.double(), torch.randn(4, inputs, dtype=torch.float64), base=256)


def shapes_of_blocks(optimizer: mupass.SOAP | mupass.Shampoo) -> dict[str, list[tuple[int, ...]]]:
    return {name: [tuple(s) for s in blocking.shapes()] for name, blocking in optimizer._blockings.items()}


@pytest.mark.parametrize("kind", [mupass.SOAP, mupass.Shampoo])
@pytest.mark.parametrize("width", [64, 128, 192])
def test_blocks_are_those_of_the_base_width(width: int, kind: Any) -> None:
    found = shapes_of_blocks(kind(stack(width), block_size="base"))
    times = width // 64
    assert found == {
        "0.weight": [(64, 20)] * times,
        "2.weight": [(256, 64)] * times**2,
        "4.weight": [(3, 256)] * times,
    }


def test_long_sides_are_cut_into_equal_parts_and_short_ones_are_not() -> None:
    # 784 = 4 * 196 <= 4 * 256
    found = shapes_of_blocks(mupass.SOAP(stack(128, inputs=784)))
    assert found["0.weight"] == [(64, 196)] * 8
    # A base width of 8 has blocks of 32, where there is room for them.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    found = shapes_of_blocks(mupass.SOAP(mupass.transform(net, torch.randn(4, 5), base=8)))
    assert found == {"0.weight": [(32, 5)] * 2, "2.weight": [(32, 32)] * 4, "4.weight": [(3, 32)] * 2}


def test_steps_in_blocks_of_the_base_width_are_those_of_that_number() -> None:
    moves = []
    for size in ("base", 64):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3))
        mupass.transform(net.double(), torch.randn(4, 20, dtype=torch.float64), base=64)
        optimizer = mupass.SOAP(net, LR, block_size=size)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            net(torch.randn(40, 20, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        moves.append([p.detach().clone() for p in net.parameters()])
    for ours, wanted in zip(*moves, strict=True):
        assert torch.equal(ours, wanted)


def test_a_state_of_other_blocks_is_refused_by_name() -> None:
    net = stack(128)
    whole = mupass.SOAP(net, block_size=256)
    net(torch.randn(4, 20, dtype=torch.float64)).square().mean().backward()
    whole.step()
    saved = whole.state_dict()
    optimizer = mupass.SOAP(stack(128))
    before = str(optimizer.state_dict())
    with pytest.raises(mupass.OptimizerError, match="block_size"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before
    mupass.SOAP(stack(128), block_size=256).load_state_dict(saved)


@pytest.mark.parametrize("kind", [mupass.SOAP, mupass.Shampoo])
def test_no_rate_follows_the_number_of_blocks_under_the_standard_parameterization(kind: Any) -> None:
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    mupass.transform(net, torch.randn(4, 5), base=6, parameterization="standard")
    options = {"graft": "none"} if kind is mupass.Shampoo else {}
    optimizer = kind(net, LR, block_size=6, **options)
    assert {group["mupass_scale"] for group in optimizer.param_groups} == {1.0}


@pytest.mark.parametrize("kind", [mupass.SOAP, mupass.Shampoo])
def test_other_words_for_a_block_size_are_refused(kind: Any) -> None:
    net, _ = make("mlp")
    with pytest.raises(mupass.OptimizerError, match="block_size"):
        kind(net, LR, block_size="whole")


def test_the_first_gradient_starts_the_basis_and_moves_nothing() -> None:
    net, x = make("mlp")
    optimizer = mupass.SOAP(net, LR)
    for step in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        got = moved(net, optimizer.step)
        for name in ("0.weight", "2.weight", "4.weight"):
            assert (torch.count_nonzero(got[name]) > 0) == (step > 0), name
    for stack in optimizer._stacks:
        for side, n in enumerate(stack.shape):
            basis = stack.state[f"basis{side}"]
            eye = torch.eye(n, dtype=torch.float64).expand_as(basis)
            torch.testing.assert_close(basis.mT @ basis, eye)


def test_a_parameter_that_comes_later_starts_its_own_count() -> None:
    pair = [make("mlp")[0] for _ in range(2)]
    optimizers = [mupass.SOAP(net, LR, basis_every=2, staggered=False) for net in pair]

    def go(i: int, seed: int, whole: bool = True) -> dict[str, Tensor]:
        net: Any = pair[i]
        torch.manual_seed(seed)
        x = torch.randn(40, 5, dtype=torch.float64)
        optimizers[i].zero_grad()
        out = net(x) if whole else net[4](net[:2](x))
        out.square().mean().backward()
        return moved(net, optimizers[i].step)

    for seed in (7, 8):
        assert torch.count_nonzero(go(0, seed, whole=False)["2.weight"]) == 0
    pair[1].load_state_dict(pair[0].state_dict())
    for seed in range(2):
        torch.testing.assert_close(go(0, seed)["2.weight"], go(1, seed)["2.weight"], rtol=1e-6, atol=1e-9)
        pair[1].load_state_dict(pair[0].state_dict())


@pytest.mark.parametrize("cls", [mupass.SOAP, mupass.Shampoo])
def test_kernel_axes_may_have_bases_of_their_own(cls: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)]
    x = torch.randn(16, 2, 6, 6, dtype=torch.float64)
    net = mupass.transform(nn.Sequential(*layers).double(), x, base=4)
    optimizer = cls(net, 0.01, kernels="modes")
    shapes = sorted(tuple(stack.shape) for stack in optimizer._stacks)
    assert shapes == [(3, 32), (8, 2, 3, 3), (8, 8, 3, 3)]
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
