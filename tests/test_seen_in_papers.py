"""Kinds of faults met at the first sight of 60 architectures most of them of papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_first_sight import base_shapes, shapes
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass


class Interface(nn.Module):
    """One layer makes a key, its strength, and what is written: cut at a single position in between."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.enter, self.interface = d, nn.Linear(5, 3 * d), nn.Linear(3 * d, 2 * d + 1)
        self.key, self.written = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d)
        self.leave = nn.Linear(2 * d, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.interface(self.enter(x).relu())
        strength = F.softplus(y[:, self.d])
        h = self.key(y[:, : self.d].tanh()) * strength[:, None] + self.written(y[:, self.d + 1 :].tanh())
        return self.leave(h.relu())


def test_a_single_position_between_parts_of_a_width_is_a_part() -> None:
    x = (randn(4, 5),)
    analysis = mupass.analyze(Interface(32), x)
    assert analysis["interface.weight"].infinite == (True, True)
    assert base_shapes(lambda k: Interface(16 * k), x) == shapes(Interface(16))


class Modulation(nn.Module):
    """Shifts by an image, through as many channels as the code has for them."""

    def __init__(self, d: int) -> None:
        super().__init__()
        hidden = 24
        self.shared, self.shift = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU()), nn.Conv2d(hidden, d, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return x + self.shift(self.shared(image))


class Modulated(nn.Module):
    """Places of several widths, modulated alike."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.first, self.second = (
            nn.Linear(6, 4 * d),
            nn.Conv2d(4 * d, 2 * d, 1),
            nn.Conv2d(2 * d, d, 1),
        )
        self.norms = nn.ModuleList([Modulation(4 * d), Modulation(2 * d), Modulation(d)])
        self.leave = nn.Conv2d(d, 3, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        h = self.norms[0](self.enter(x)[:, :, None, None], image).relu()
        h = self.norms[1](self.first(h), image).relu()
        return self.leave(self.norms[2](self.second(h), image).relu())


def test_a_number_of_the_code_that_repeats_at_several_widths_is_fixed_and_marked() -> None:
    x = randn(2, 6), randn(2, 2, 4, 4)
    analysis = mupass.analyze(Modulated(32), x)
    for place in range(3):
        for name, axis in ((f"norms.{place}.shared.0.weight", 0), (f"norms.{place}.shift.weight", 1)):
            geometry = analysis[name]
            assert not geometry.infinite[axis] and geometry.ambiguous[axis]
            assert "the code of Modulation writes the number 24" in geometry.evidence[axis]
    assert base_shapes(lambda k: Modulated(16 * k), x) == shapes(Modulated(16))


class Spectral(nn.Module):
    """A weight over its largest singular value."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.utils.spectral_norm(nn.Linear(9, d)), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu())


@pytest.mark.parametrize("target", [16, 128])
def test_directions_of_spectral_norm_are_drawn_anew_at_length_one(target: int) -> None:
    resized = mupass.resize(Spectral(64), target, example_inputs=randn(4, 9), seed=0)
    direction = resized.enter.weight_u
    assert direction.shape == (target,) and math.isclose(direction.norm().item(), 1, rel_tol=1e-5)
    assert len(direction.unique()) == target


class Noisy(nn.Linear):
    """A layer with noise of two factors (NoisyNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        first, second = (torch.randn(size) for size in (inputs, outputs))
        first, second = (x.sign() * x.abs().sqrt() for x in (first, second))
        self.register_buffer("noise", torch.outer(second, first))
        self.register_buffer("bias_noise", second)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.1 * self.noise, self.bias + 0.1 * self.bias_noise)


def test_noise_of_two_factors_is_drawn_anew_as_such() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Noisy(9, 64), nn.ReLU(), Noisy(64, 48), nn.ReLU(), nn.Linear(48, 3))
    resized = mupass.resize(model, scale=16, example_inputs=randn(4, 9), seed=0)
    noise = resized[2].noise.double()
    assert noise.shape == (768, 1024)
    assert torch.linalg.svdvals(noise)[1] < 1e-3 * torch.linalg.svdvals(noise)[0]
    # E f(x)^2 = E |x| = sqrt(2 / pi), and E f(x)^4 = E x^2 = 1: within five errors of 768 and 1,024 entries.
    error = math.sqrt((1 - 2 / math.pi) * (1 / 768 + 1 / 1024))
    assert abs(noise.square().mean() - 2 / math.pi) < 5 * error
    assert abs(resized[0].bias_noise.square().mean() - math.sqrt(2 / math.pi)) < 5 / math.sqrt(1024)


class Twice(nn.Module):
    """A norm that is kept under two names, as DGCNN's are."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(d)
        self.body, self.leave = nn.Sequential(nn.Linear(5, d), self.norm, nn.ReLU()), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.body(x))


def test_buffers_of_a_module_under_two_names_are_resized() -> None:
    resized = mupass.resize(Twice(32), 64, example_inputs=randn(4, 5))
    assert resized.norm is resized.body[1] and resized.norm.running_mean.shape == (64,)
    want = Twice(64)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(want(randn(4, 5)), resized(randn(4, 5)))


class BlockGates(nn.Module):
    """Gates of which each block has a matrix of its own; the number of blocks is no usual name of a size."""

    def __init__(self, d: int, size: int = 8) -> None:
        super().__init__()
        self.blocks, self.block_width = d // size, size
        self.w = nn.Parameter(torch.randn(self.blocks, size, size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.blocks, self.block_width))
        return torch.einsum("bhi,hij->bhj", parts, self.w).flatten(-2)


@pytest.mark.parametrize("target", [40, 160])
def test_the_search_for_numbers_goes_back_where_nothing_leads_on(target: int) -> None:
    def build(d: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, d), BlockGates(d), nn.ReLU(), nn.Linear(d, 3))

    with pytest.warns(mupass.MupassWarning, match=r"1\.w:0 .* of the factors 10 x 8"):
        resized = mupass.resize(build(80), target, example_inputs=randn(4, 5), seed=0)
    assert (resized[1].blocks, resized[1].block_width) == (target // 8, 8)
    want = build(target)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(want(randn(4, 5)), resized(randn(4, 5)))


class Relations(nn.Module):
    """Messages by a matrix for each relation, all mixed of a few (R-GCN)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.nodes = nn.Embedding(7, d)
        self.basis, self.shares = nn.Parameter(torch.randn(3, d, d) / d**0.5), nn.Parameter(torch.randn(4, 3))
        self.own, self.leave = nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, source: Tensor, relation: Tensor) -> Tensor:
        d = self.basis.shape[1]
        matrices = (self.shares @ self.basis.view(3, d * d)).view(4, d, d)[relation]
        x = self.nodes.weight[source]
        message = torch.bmm(x.unsqueeze(1), matrices).squeeze(1)
        return self.leave((message + self.own(x)).relu())


def test_matrices_that_data_picks_are_no_queries_and_are_planned() -> None:
    x = randint(7, 9), randint(4, 9)
    analysis = mupass.analyze(Relations(32), x)
    assert not any("whose keys all heads share" in why for g in analysis.geometries for why in g.evidence)
    assert analysis["nodes.weight"].infinite == (False, True)
    # Shares are multiplied with another parameter: the plan has them, and no matrix of theirs.
    model = mupass.transform(Relations(32), x)
    before = model.shares.detach().clone()
    optimizer = mupass.Shampoo(model)
    model(*x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.shares, before)
