"""Base sizes and resized sizes: one solution of the terms, compared with the architecture at that width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mupass


def partial(parts: Callable[[int], list[int]], use: Callable[..., Tensor]) -> Callable[[int], nn.Module]:
    """Return a network that convolves one part of its channels and keeps the others."""

    class Partial(nn.Module):
        def __init__(self, d: int):
            super().__init__()
            self.sizes, self.use = parts(d), use
            self.stem = nn.Conv2d(3, d, 3)
            self.part = nn.Conv2d(self.sizes[0], self.sizes[0], 3, padding=1, bias=False)
            self.mlp = nn.Sequential(nn.Conv2d(d, 2 * d, 1), nn.ReLU(), nn.Conv2d(2 * d, d, 1))
            self.head = nn.Linear(d, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.mlp(self.use(self, x))).mean((2, 3)))

    return Partial


def by_split(self: nn.Module, x: Tensor) -> Tensor:
    first, *rest = x.split(self.sizes, 1)
    return torch.cat([self.part(first), *rest], 1)


def by_slices(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([self.part(x[:, : self.sizes[0]]), x[:, self.sizes[0] :]], 1)


def by_assignment(self: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, : self.sizes[0]] = self.part(x[:, : self.sizes[0]])
    return x


def by_narrow(self: nn.Module, x: Tensor) -> Tensor:
    first, rest = x.narrow(1, 0, self.sizes[0]), x.narrow(1, self.sizes[0], sum(self.sizes[1:]))
    return torch.cat([rest, self.part(first)], 1)


def by_chunk(self: nn.Module, x: Tensor) -> Tensor:
    first, *rest = x.chunk(4, 1)
    return torch.cat([self.part(first), *(r * 0.5 for r in rest)], 1)


def in_rows(self: nn.Module, x: Tensor) -> Tensor:
    """As in Res2Net: every part gets what became of the one before, through one weight."""
    parts = list(x.split(self.sizes, 1))
    for i in range(1, len(parts)):
        parts[i] = self.part(parts[i] + parts[i - 1])
    return torch.cat(parts, 1)


def nested(self: nn.Module, x: Tensor) -> Tensor:
    """A part that no weight reads is cut again."""
    first, rest = x.split([self.sizes[0], sum(self.sizes[1:])], 1)
    a, b = rest.split([self.sizes[0], sum(self.sizes[2:])], 1)
    return torch.cat([self.part(first), a.relu(), b], 1)


CASES = {
    "split": partial(lambda d: [d // 4, d - d // 4], by_split),
    "inception": partial(lambda d: [d // 8, d // 8, d // 4, d // 2], by_split),
    "slices": partial(lambda d: [d // 4, d - d // 4], by_slices),
    "assignment": partial(lambda d: [d // 4, d - d // 4], by_assignment),
    "narrow": partial(lambda d: [3 * d // 4, d // 4], by_narrow),
    "chunk": partial(lambda d: [d // 4, d // 4, d // 4, d // 4], by_chunk),
    "rows": partial(lambda d: [d // 4, d // 4, d // 4, d // 4], in_rows),
    "nested": partial(lambda d: [d // 4, d // 4, d // 2], nested),
}
X = torch.zeros(2, 3, 8, 8)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.sample(every=6)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [16, 64])
def test_parts_that_no_weight_reads_follow_their_whole(name: str, width: int) -> None:
    build = CASES[name]
    analysis = mupass.analyze(build(width), X, base=2 * width)
    assert {g.name: tuple(g.base_shape) for g in analysis.geometries} == shapes(build(2 * width))
    wide = mupass.resize(build(width), scale=2, example_inputs=X)
    assert shapes(wide) == shapes(build(2 * width))
    assert wide.sizes[0] == build(2 * width).sizes[0]
    right = build(2 * width)
    right.load_state_dict(wide.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(wide(x), right(x))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], width: int, **options: object):
        super().__init__()
        self.cell = cell(7, width, batch_first=True, **options)
        self.readout = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.cell(x)[0])


class Gated(nn.Module):
    """Its gate and its value come of one weight, whose rows are two blocks of the width."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.readout = nn.Linear(7, 2 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.readout(gate.sigmoid() * value)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_the_width_of_a_recurrent_model_is_its_hidden_size(
    cell: type[nn.RNNBase], options: dict[str, object]
) -> None:
    x = torch.randn(2, 5, 7)
    analysis = mupass.analyze(Recurrent(cell, 24, **options), x, base=6)
    assert (analysis.width, analysis.base_width) == (24, 6)
    narrow = Recurrent(cell, 6, **options)
    assert {g.name: g.base_shape for g in analysis.geometries} == {
        n: tuple(p.shape) for n, p in narrow.named_parameters()
    }


def test_an_axis_of_blocks_has_the_width_of_one() -> None:
    analysis = mupass.analyze(Gated(24), torch.randn(2, 7), base=6)
    assert analysis.width == 24
    assert {g.name: g.base_shape for g in analysis.geometries} == {
        n: tuple(p.shape) for n, p in Gated(6).named_parameters()
    }
