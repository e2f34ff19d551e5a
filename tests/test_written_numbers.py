"""Sizes that the code of a model writes out, and sizes that its builder rounds: no graph tells either."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from test_doubts import doubted
from test_first_sight import shapes
from torch import Tensor, nn
from zoo.case import randn

import mupass
from mupass._capture.written import written_sizes

CHANNELS = [6, 12]
SCALE = torch.tensor([1.0, 2.0])


class Step(nn.Sequential):
    """A convolution with a norm, whose sizes come from elsewhere."""

    def __init__(self, channels: int, made: int, kernel: int = 3, **kwargs: object) -> None:
        options = {"bias": False}
        scale = SCALE or SCALE if not kernel else SCALE
        self.scale, self.name = scale, "step" * kernel
        super().__init__()
        self.add_module("conv", nn.Conv2d(channels, made, kernel, padding=kernel // 2, **options, **kwargs))
        self.add_module("norm", nn.BatchNorm2d(made))


class Inner(nn.Module):
    """A layer whose inner size is a default that nobody changes."""

    expansion = 2

    def __init__(self, d: int, inner: int | None = None, linear: bool = False) -> None:
        super().__init__()
        inner = inner or 40
        layer = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.up, self.down = layer(d, inner), layer(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Picture(nn.Module):
    """A stem of 18 channels, an inner layer of 40, side branches of 12 and 24, all else of the width."""

    def __init__(self, d: int) -> None:
        super().__init__()
        stem_channels = 18
        self.stem = Step(3, stem_channels, stride=2)
        steps = []
        for _ in range(2):
            steps.append(Step(stem_channels if not steps else d, d))
        self.body, self.inner = nn.Sequential(*steps), Inner(d)
        self.first, self.second = self._sides(d)
        self.head = nn.Linear(2 * d, 5)

    def _sides(self, d: int) -> tuple[nn.Module, nn.Module]:
        factor = Inner.expansion
        sides = [
            nn.Sequential(nn.Conv2d(d, CHANNELS[i] * factor, 1), nn.ReLU(), Step(CHANNELS[i] * factor, d))
            for i in range(2)
        ]
        return sides[0], sides[1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.body(self.stem(x).relu()).relu())
        return self.head(torch.cat([self.first(h), self.second(h)], 1).relu().mean((2, 3)))


WRITTEN = {
    *("stem.conv.weight:0", "stem.norm.weight:0", "stem.norm.bias:0", "body.0.conv.weight:1"),
    *("inner.up.weight:0", "inner.up.bias:0", "inner.down.weight:1"),
    *("first.0.weight:0", "first.0.bias:0", "first.2.conv.weight:1"),
    *("second.0.weight:0", "second.0.bias:0", "second.2.conv.weight:1"),
}
IMAGE = (randn(2, 3, 8, 8),)


def test_numbers_that_the_code_writes_out_are_fixed_and_marked_by_the_class_that_does() -> None:
    found = doubted(Picture(32), *IMAGE)
    assert set(found) == WRITTEN
    fixed = {
        f"{geometry.name}:{axis}"
        for geometry in mupass.analyze(Picture(32), IMAGE).geometries
        for axis, infinite in enumerate(geometry.infinite)
        if not infinite
    }
    assert fixed >= WRITTEN
    assert "the code of Picture writes the number 18" in found["stem.conv.weight:0"]
    assert "the code of Inner writes the number 40" in found["inner.up.weight:0"]
    assert "the code of Picture writes the number 24" in found["second.0.weight:0"]


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(("source", "target"), [(32, 64), (32, 16)])
def test_resize_keeps_them_and_says_so_unless_the_caller_settles_them(source: int, target: int) -> None:
    with pytest.warns(
        mupass.MupassWarning, match=r"numbers of the code stay .*: stem\.conv\.weight:0 \(18\)"
    ):
        resized = mupass.resize(Picture(source), target, example_inputs=IMAGE)
    want = Picture(target)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized.eval()(*IMAGE), want.eval()(*IMAGE))
    # Warnings are errors here: what the caller settles is not asked about.
    fixed = mupass.resize(
        Picture(source), target, example_inputs=IMAGE, dims=dict.fromkeys(WRITTEN, "finite")
    )
    assert shapes(fixed) == shapes(want)
    grown = mupass.resize(
        Picture(source), target, example_inputs=IMAGE, dims=dict.fromkeys(WRITTEN, "infinite")
    )
    assert shapes(grown)["stem.conv.weight"][0] == 18 * target // source


class Numbers(nn.Module):
    """A model of which every width but one is a number: they say nothing of what would be widened."""

    def __init__(self, latent: int = 20) -> None:
        super().__init__()
        self.enter, self.deep = nn.Linear(7, 64), nn.Linear(64, 48)
        self.code, self.back = nn.Linear(48, latent), nn.Linear(latent, 48)
        self.leave = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 7))

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.deep(self.enter(x).relu()).relu())
        return self.leave(self.back(code.relu()).relu())


def test_a_model_of_numbers_is_not_marked_for_them() -> None:
    found = doubted(Numbers(), randn(4, 7))
    assert not any("writes the number" in reason for reason in found.values())


def test_code_without_source_and_sizes_of_arguments_are_no_numbers() -> None:
    source = (
        "class Net(nn.Module):\n"
        "    def __init__(self, d):\n"
        "        super().__init__()\n"
        "        self.enter = nn.Linear(5, 8)\n"
    )
    names: dict = {"nn": nn}
    exec(source, names)
    assert written_sizes(names["Net"](3)) == {}
    # 18 is the width here, and still only the stem's number.
    sizes = written_sizes(Picture(18))
    assert sizes["stem.conv.weight"] == {18: "Picture"} and sizes["inner.up.weight"] == {40: "Inner"}
    assert sizes["head.weight"] == {5: "Picture"} and "body.1.conv.weight" not in sizes


class Gated(nn.Module):
    """Gates of a quarter of their channels, to the next multiple of a number."""

    def __init__(self, widths: tuple[int, ...], step: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, widths[0], 3)
        narrow = [max(step, math.floor(width / 4 + step / 2) // step * step) for width in widths]
        self.down = nn.ModuleList(nn.Conv2d(*sizes, 1) for sizes in zip(widths, narrow, strict=True))
        self.up = nn.ModuleList(nn.Conv2d(*sizes, 1) for sizes in zip(narrow, widths, strict=True))
        self.move = nn.ModuleList(
            nn.Conv2d(*sizes, 1) for sizes in zip(widths, widths[1:] + widths[:1], strict=True)
        )
        self.head = nn.Linear(widths[0], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for down, up, move in zip(self.down, self.up, self.move, strict=True):
            x = move(x * up(down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()).relu()
        return self.head(x.mean((2, 3)))


def test_gates_of_which_some_are_rounded_are_marked_and_exact_ones_are_not() -> None:
    assert [Gated((48, 96), 8).down[i].out_channels for i in (0, 1)] == [16, 24]
    found = doubted(Gated((48, 96), 8), *IMAGE)
    places = ("down.0.weight:0", "down.0.bias:0", "up.0.weight:1")
    assert set(found) == {*places, *[place.replace("0", "1", 1) for place in places]}
    assert all("1/4 of their widths only to multiples of 8" in reason for reason in found.values())
    with pytest.warns(mupass.MupassWarning, match="its builder may round it"):
        mupass.resize(Gated((48, 96), 8), scale=2, example_inputs=IMAGE)
    assert doubted(Gated((48, 96), 4), *IMAGE) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mupass.resize(Gated((48, 96), 4), scale=2, example_inputs=IMAGE)


class Flow(nn.Module):
    """Couplings on data whose entries are put in another order, or of which some are chosen."""

    def __init__(self, d: int, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.half = len(order) // 2
        self.nets = nn.ModuleList()
        for _ in range(2):
            self.nets.append(nn.Sequential(nn.Linear(self.half, d), nn.ReLU(), nn.Linear(d, 2 * self.half)))
        self.scale = nn.Parameter(torch.ones(self.half))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.order]
        for net in self.nets:
            left, right = x[:, : self.half], x[:, self.half :]
            shift, slope = net(left).chunk(2, -1)
            x = torch.cat([right * (self.scale * slope.tanh()).exp() + shift, left], -1)
        return x


@pytest.mark.parametrize("order", [[3, 1, 0, 2, 5, 4], [7, 1, 0, 2]])
def test_data_in_another_order_is_data(order: list[int]) -> None:
    x = randn(5, 6 if len(order) == 6 else 8)
    analysis = mupass.analyze(Flow(32, order), x)
    assert analysis["scale"].infinite == (False,)
    assert analysis["nets.0.0.weight"].infinite == (True, False)
    assert analysis["nets.1.2.weight"].infinite == (False, True)
    assert doubted(Flow(32, order), x) == {}


class Shuffled(nn.Module):
    """Units of a width in another order, by a fixed index."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, d), nn.Linear(d, 3)
        self.register_buffer("order", torch.arange(d).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu()[:, self.order])


def test_units_in_another_order_are_units() -> None:
    analysis = mupass.analyze(Shuffled(32), randn(4, 5))
    assert analysis["enter.weight"].infinite == (True, False)
    assert analysis["leave.weight"].infinite == (False, True)


class Hyper(nn.Module):
    """A small net makes a layer of a code that is a parameter itself."""

    def __init__(this, d: int, code: int = 6) -> None:  # noqa: N805
        super().__init__()
        this.code, this.enter = nn.Parameter(torch.randn(code)), nn.Linear(5, 24)
        this.first, this.second = nn.Linear(code, d), nn.Linear(d, 24)
        this.leave = nn.Linear(24, d)
        this.head = nn.Linear(d, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.second(self.first(self.code).relu())
        return self.head(self.leave(self.enter(x).relu() * made).relu())


def test_codes_that_are_parameters_are_marked_whatever_a_method_calls_its_object() -> None:
    found = doubted(Hyper(32), randn(4, 5))
    assert {"code:0", "first.weight:1"} <= set(found) and "only parameters hold it" in found["code:0"]
    assert "the code of Hyper writes the number 24" in found["enter.weight:0"]
    assert not {"first.weight:0", "second.weight:1", "head.weight:1"} & set(found)


class Table(nn.Module):
    """A table of positions for each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, 6, 6))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.table


class Stage(nn.Module):
    """Attention with a table of positions for each head."""

    def __init__(self, d: int, size: int = 8) -> None:
        super().__init__()
        self.size, self.qkv, self.out = size, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.scores = Table(d // size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = self.scores(q @ k.mT * self.size**-0.5).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


def test_one_head_is_asked_about_where_other_blocks_have_several() -> None:
    x = randn(2, 6, 5)
    stages = Stage(8), nn.Linear(8, 16), Stage(16)
    model = nn.Sequential(nn.Linear(5, 8), *stages, nn.Linear(16, 3))
    table = mupass.analyze(model, x)["1.scores.table"]
    assert not table.infinite[0] and table.ambiguous[0] and "in 3.scores.table they grow" in table.evidence[0]
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        mupass.resize(model, scale=2, example_inputs=x)
    texts = [str(warning.message) for warning in recorded]
    assert any("axes of one entry, such as one head" in text and "1.scores.table:0" in text for text in texts)
    # Where no other block has several, and in a readout of one unit, nothing speaks for growth.
    assert "1.scores.table:0" not in doubted(nn.Sequential(nn.Linear(5, 8), Stage(8), nn.Linear(8, 3)), x)
    readout = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    assert doubted(readout, x) == {}


class Normal(nn.Module):
    """A mean and a deviation, one number each, of one layer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.enter, self.both = nn.Linear(5, d), nn.Linear(d, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.both(self.enter(x).relu())
        return both[..., :1], nn.functional.softplus(both[..., 1:])


def test_outputs_of_one_entry_each_make_up_an_output() -> None:
    analysis = mupass.analyze(Normal(32), randn(4, 5))
    assert analysis["both.weight"].infinite == (False, True) and not any(analysis["both.weight"].ambiguous)
    assert mupass.resize(Normal(32), 64, example_inputs=randn(4, 5)).both.out_features == 2


class Cross(nn.Module):
    """Parameters of a rank that is a default, and a gate that is no narrower than a number."""

    def __init__(self, d: int, rank: int = 4) -> None:
        super().__init__()
        self.left = nn.ParameterList(nn.Parameter(torch.randn(d, rank)) for _ in range(2))
        self.right = nn.ParameterList(nn.Parameter(torch.randn(rank, d)) for _ in range(2))
        self.gate = Inner(d, max(d // 4, 10), linear=True)

    def forward(self, x: Tensor) -> Tensor:
        for left, right in zip(self.left, self.right, strict=True):
            x = x + x * ((x @ left).tanh() @ right)
        return self.gate(x)


class Inside(nn.Module):
    """A gate whose size is set by its caller, or else a part of its width."""

    def __init__(self, d: int, inner: int | None = None) -> None:
        super().__init__()
        if inner is None:
            inner = math.ceil(d / 4)
        self.down, self.up = nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x).relu()).sigmoid()


class World(nn.Module):
    """A recurrent state, and a latent of a size that its caller may choose and has not."""

    def __init__(self, d: int, latent: int = 6, slots: int = 3) -> None:
        super().__init__()
        self.lengths = [latent, 1, slots]
        self.enter, self.state = nn.Linear(latent + 2, d), nn.GRUCell(d, d)
        self.control, self.cross = nn.Linear(d, sum([latent, 1, slots])), Cross(d)
        self.set, self.free = Inside(d, 10), Inside(d)
        self.leave = nn.Linear(d + latent, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, z = torch.zeros(len(x), self.state.hidden_size), torch.zeros(len(x), self.lengths[0])
        for t in range(x.shape[1]):
            h = self.state(self.enter(torch.cat([z, x[:, t]], -1)).relu(), h)
            key, strength, slots = self.control(self.free(self.set(self.cross(h)))).split(self.lengths, -1)
            z = key.tanh() * strength.sigmoid() * slots.softmax(-1).square().sum(-1, keepdim=True)
        return self.leave(torch.cat([h, z], -1))


def test_defaults_bounds_and_shapes_of_parameters_are_numbers() -> None:
    x = randn(2, 3, 2)
    found = doubted(World(40), x)
    for name in ("cross.left.0:1", "cross.right.1:0", "cross.gate.up.weight:0", "set.down.weight:0"):
        assert "writes the number" in found[name]
    # The whole of it is marked by the part that grows.
    assert {"control.weight:0", "enter.weight:1"} <= set(found)
    assert not {"state.weight_hh:1", "free.down.weight:0", "leave.weight:0"} & set(found)
    # A gate that follows its width, and a latent that the caller chose.
    assert "cross.gate.up.weight:0" not in doubted(World(64), x)
    assert not {"control.weight:0", "enter.weight:1"} & set(doubted(World(40, 8), x))


class Open(nn.Module):
    """Every argument has a default: any of them may be the width."""

    def __init__(self, inner: int = 24, deep: int = 40, last: int = 16) -> None:
        super().__init__()
        self.enter, self.deep = nn.Linear(7, inner), nn.Linear(inner, deep)
        self.last, self.leave = nn.Linear(deep, last), nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.last(self.deep(self.enter(x).relu()).relu()).relu())


def test_defaults_of_a_class_that_asks_for_nothing_are_no_numbers() -> None:
    assert not any("writes the number" in reason for reason in doubted(Open(last=64), randn(4, 7)).values())


def to_multiple(size: float, step: int, least: int | None = None) -> int:
    """Round as mobile networks do, never below one step."""
    least = least or step
    rounded = max(least, int(size + step / 2) // step * step)
    if rounded < 0.9 * size:
        rounded += step
    return rounded


class Excited(nn.Module):
    """A gate of a quarter of the width, to a multiple of 8."""

    def __init__(self, d: int) -> None:
        super().__init__()
        narrow = to_multiple(d // 4, 8)
        self.enter, self.down, self.up = nn.Linear(5, d), nn.Linear(d, narrow), nn.Linear(narrow, d)
        self.leave = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu()
        return self.leave(h * self.up(self.down(h).relu()).sigmoid())


@pytest.mark.parametrize("d", [16, 32, 64])
def test_the_least_that_a_function_returns_is_a_number(d: int) -> None:
    marked = {"down.weight:0", "down.bias:0", "up.weight:1"}
    # At 16 and at 32 the gate has 8 units, and one model does not tell which it is.
    assert set(doubted(Excited(d), randn(4, 5))) == (marked if Excited(d).up.in_features == 8 else set())
