"""Kinds of faults met at the first sight of 72 programs as people write them for themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_doubts import doubted
from torch import Tensor, nn
from zoo.case import randn

import mupass


def wrong(build: Callable[[int], nn.Module], inputs: tuple[Tensor, ...]) -> list[str]:
    """Return the axes without a mark whose verdict is not that of two instances."""
    analysis = mupass.analyze(build(1), inputs)
    wide = dict(build(2).named_parameters())
    found = []
    for name, parameter in build(1).named_parameters():
        for axis, size in enumerate(parameter.shape):
            geometry = analysis[name]
            is_right = geometry.infinite[axis] == (size != wide[name].shape[axis])
            if not is_right and not geometry.ambiguous[axis]:
                found.append(f"{name}:{axis} {geometry.evidence[axis]}")
    return found


class Scan(nn.Module):
    """A selective scan whose decay rates times step sizes are written as einsum."""

    def __init__(self, d: int, state: int = 16, by_einsum: bool = True) -> None:
        super().__init__()
        self.splits, self.by_einsum = [d // 16, state, state], by_einsum
        self.enter, self.project = nn.Linear(5, d), nn.Linear(d, d // 16 + 2 * state, bias=False)
        self.step, self.leave = nn.Linear(d // 16, d), nn.Linear(d, 3)
        self.rates = nn.Parameter(torch.randn(d, state))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.enter(x))
        low, write, read = self.project(h).split(self.splits, -1)
        step = F.softplus(self.step(low))
        rates = -torch.exp(self.rates)
        decay = torch.einsum("bld,dn->bldn", step, rates) if self.by_einsum else step[..., None] * rates
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t].exp() * state + h[:, t, :, None] * write[:, t, None]
            outputs.append(torch.einsum("bdn,bn->bd", state, read[:, t]))
        return self.leave(torch.stack(outputs, 1))


@pytest.mark.parametrize("by_einsum", [True, False])
def test_a_product_entry_by_entry_makes_no_width(by_einsum: bool) -> None:
    def build(k: int) -> nn.Module:
        return Scan(96 * k, by_einsum=by_einsum)

    assert not wrong(build, randn(2, 4, 5))
    assert mupass.analyze(build(1), randn(2, 4, 5))["rates"].role == "vector"


class Upsampled(nn.Module):
    """A convolution with a kernel a sample that also doubles the size, as in the generator of StyleGAN 2."""

    def __init__(self, d: int, style: int = 8) -> None:
        super().__init__()
        self.start, self.style = nn.Parameter(torch.randn(1, 2 * d, 4, 4)), nn.Linear(style, 2 * d)
        self.weight, self.bias = nn.Parameter(torch.randn(1, d, 2 * d, 3, 3)), nn.Parameter(torch.zeros(d))
        self.head = nn.Conv2d(d, 3, 1)
        self.register_buffer("blur", torch.ones(1, 1, 2, 2) / 4)

    def forward(self, z: Tensor) -> Tensor:
        batch, (_, n_out, n_in, *kernel) = len(z), self.weight.shape
        kernels = self.weight * self.style(z).view(batch, 1, n_in, 1, 1)
        kernels = kernels.transpose(1, 2).reshape(batch * n_in, n_out, *kernel)
        x = self.start.repeat(batch, 1, 1, 1).view(1, batch * n_in, 4, 4)
        x = F.conv_transpose2d(x, kernels, stride=2, groups=batch)
        x = F.conv2d(x.view(batch * n_out, 1, *x.shape[-2:]), self.blur)
        x = x.view(batch, n_out, *x.shape[-2:])
        return self.head(F.leaky_relu(x + self.bias[:, None, None], 0.2))


def test_what_a_transposed_convolution_with_a_kernel_a_sample_makes_can_be_cut_into_samples() -> None:
    assert not wrong(lambda k: Upsampled(16 * k), randn(3, 8))
    analysis = mupass.analyze(Upsampled(16), randn(3, 8))
    assert analysis["bias"].dims[0] == analysis["weight"].dims[1]  # the bias lies along what the kernels make


class Invertible(nn.Module):
    """A matrix between channels of the data, by its factors, and a coupling: one step of Glow."""

    def __init__(self, d: int, channels: int = 6, written: bool = False) -> None:
        super().__init__()
        whole = torch.linalg.qr(torch.randn(channels, channels))[0]
        order, lower, upper = torch.linalg.lu(whole)
        self.written = written  # the identity in the forward pass, not in a buffer
        self.register_buffer("order", order)
        self.register_buffer("eye", torch.eye(channels))
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper.triu(1))
        self.scales = nn.Parameter(upper.diagonal().abs().log())
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.coupling = nn.Sequential(
            nn.Conv2d(channels // 2, d, 3, padding=1), nn.ReLU(), nn.Conv2d(d, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(len(self.lower)) if self.written else self.eye
        lower = self.lower.tril(-1) + eye
        weight = self.order @ lower @ (self.upper.triu(1) + torch.diag(self.scales.exp()))
        kept, changed = (F.conv2d(x, weight[:, :, None, None]) + self.shift).chunk(2, 1)
        scale, shift = self.coupling(kept).chunk(2, 1)
        return torch.cat([kept, (changed + shift) * torch.sigmoid(scale)], 1)


@pytest.mark.parametrize("written", [False, True])
def test_a_square_matrix_between_channels_of_the_data_is_fixed_on_both_sides(written: bool) -> None:
    x = randn(2, 6, 4, 4)

    def build(k: int) -> nn.Module:
        return nn.Sequential(Invertible(16 * k, written=written), Invertible(16 * k, written=written))

    assert not wrong(build, x)
    analysis = mupass.analyze(build(1), x)
    names = [f"{step}.{factor}" for step in (0, 1) for factor in ("lower", "upper", "scales", "shift")]
    assert not any(any(analysis[name].infinite) or any(analysis[name].ambiguous) for name in names)


class Board(nn.Module):
    """A trunk with a head of few channels that is read position by position, or pooled."""

    def __init__(self, d: int, few: int = 3, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.trunk, self.mix = nn.Conv2d(3, d, 3, padding=1), nn.Conv2d(d, d, 3, padding=1)
        self.narrow, self.norm = nn.Conv2d(d, few, 1), nn.BatchNorm2d(few)
        self.value = nn.Linear(few if pooled else few * 42, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x).relu()
        h = self.norm(self.narrow(h + self.mix(h).relu())).relu()
        return self.value(h.mean((2, 3)) if self.pooled else h.flatten(1)).tanh()


def test_few_channels_that_are_read_position_by_position_are_marked() -> None:
    x = randn(2, 3, 6, 7)
    marked = {"narrow.weight:0", "narrow.bias:0", "norm.weight:0", "norm.bias:0", "value.weight:1"}
    assert set(doubted(Board(24), x)) == marked
    # As many as before, or more: the channels of the last layer.
    assert doubted(Board(24, few=24), x) == {}
    assert doubted(Board(24, few=20, pooled=True), x) == {}


class Fixed(nn.Module):
    """Linear attention whose inner width is one number at stages of different width."""

    def __init__(self, d: int, heads: int = 2, size: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Conv2d(d, 3 * heads * size, 1, bias=False), nn.Conv2d(heads * size, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(len(x), self.heads, -1, x[0, 0].numel()) for t in self.qkv(x).chunk(3, 1))
        mixed = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        mixed = torch.einsum("bhde,bhdn->bhen", mixed, q.softmax(-2))
        return x + self.out(mixed.reshape(len(x), -1, *x.shape[2:]))


def test_queries_and_keys_are_marked_with_the_values_of_one_weight() -> None:
    def build(k: int) -> nn.Module:
        d = 16 * k
        enter, down, leave = nn.Conv2d(3, d, 1), nn.Conv2d(d, 2 * d, 3), nn.Conv2d(2 * d, 3, 1)
        return nn.Sequential(enter, nn.ReLU(), Fixed(d), down, nn.ReLU(), Fixed(2 * d), leave)

    x = randn(2, 3, 6, 6)
    assert not wrong(build, x)
    found = doubted(build(1), x)
    assert {"2.qkv.weight:0", "2.out.weight:1", "5.qkv.weight:0", "5.out.weight:1"} == set(found)


class Codebook(nn.Module):
    """Vector quantization as in VQGAN: distances by a product with the table, of which the least counts."""

    def __init__(self, d: int, codes: int = 12, scored: bool = False) -> None:
        super().__init__()
        self.enter, self.leave, self.scored = nn.Linear(5, d), nn.Linear(d, 3), scored
        self.table = nn.Embedding(codes, d)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z, table = self.enter(x).relu(), self.table.weight
        product = torch.einsum("bd,dn->bn", z, table.t())
        distance = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * product
        nearest = self.table(distance.argmin(1))
        loss = (nearest.detach() - z).square().mean() + (nearest - z.detach()).square().mean()
        found = self.leave(z + (nearest - z).detach())
        return (found, loss, distance) if self.scored else (found, loss)


def test_a_codebook_of_which_the_nearest_row_is_picked_is_no_readout() -> None:
    x, dims = torch.randn(7, 5), {"table.weight:1": "infinite"}
    torch.manual_seed(0)
    model = mupass.transform(Codebook(32), x, base=8, dims=dims)
    geometry = mupass.plan_of(model)[1]["table.weight"].geometry
    assert geometry.role == "input" and not geometry.readout_uses
    optimizer = mupass.KFAC(model, loss_terms=7)
    found, loss = model(x)
    (found.square().mean() + loss).backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # Distances that are put out have gradients, and a multiplier would change them.
    with pytest.raises(mupass.TransformError, match="also the readout"):
        mupass.transform(Codebook(32, scored=True), x, base=8, dims=dims)


class ByLambda(nn.Module):
    """A block whose second half is a function in an attribute, as in minGPT."""

    def __init__(self, d: int, how: str) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, d), nn.Linear(d, 3)
        self.block = nn.ModuleDict({"up": nn.Linear(d, 4 * d), "down": nn.Linear(4 * d, d)})
        block = self.block

        def inner(x: Tensor) -> Tensor:
            return torch.relu(block["up"](x))

        if how == "closure":
            self.run = lambda x: block["down"](torch.relu(block["up"](x)))
        elif how == "default":
            self.run = lambda x, m=block: m["down"](torch.relu(m["up"](x)))
        elif how == "nested":
            self.run = lambda x: self.block["down"](inner(x))
        else:
            self.run = lambda x: x
            self.enter.register_forward_hook(lambda module, args, h: h + block["down"](inner(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(torch.relu(h + self.run(h)))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("how", ["closure", "default", "nested", "hook"])
def test_functions_in_attributes_of_a_copy_run_the_modules_of_the_copy(how: str) -> None:
    x, model, wide = torch.randn(4, 5), ByLambda(16, how), ByLambda(32, how)
    resized = mupass.resize(model, scale=2, example_inputs=x)
    resized.load_state_dict(wide.state_dict())
    torch.testing.assert_close(resized(x), wide(x))
    same = mupass.resize(model, scale=1, example_inputs=x)
    same(x).sum().backward()
    assert all(parameter.grad is not None for parameter in same.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(same(x), model(x))


def test_studies_train_the_copies_of_models_with_functions_in_attributes() -> None:
    models: dict[int, ByLambda] = {}

    def build(width: int) -> nn.Module:
        torch.manual_seed(0)
        models[width] = ByLambda(width, "closure")
        return models[width]

    x = torch.randn(16, 5)
    mupass.coord_check(build, [(x, torch.zeros(16, dtype=torch.long))], widths=[8, 16], optimizer="sgd")
    for model in models.values():
        assert all(parameter.grad is None for parameter in model.parameters())
