"""Kinds of faults met at the first sight of 70 more architectures."""

from __future__ import annotations

import pytest
import torch
from test_doubts import doubted
from torch import Tensor, nn
from zoo.case import randn

import mupass
from mupass._scales.init import own_init
from mupass._scales.laws import Fans, Sample, find_laws


class Trees(nn.Module):
    """Soft decisions, the products of which are the shares of the leaves of trees of three levels."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.decide, self.leave = nn.Linear(5, d * 3), nn.Linear(d, 2)
        self.cases, self.leaves = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.cases(self.decide(x).unflatten(-1, (-1, 3, 1))).sigmoid().prod(2)
        return self.leave(self.leaves(shares).squeeze(-1))


def test_cases_that_are_products_of_decisions_are_marked() -> None:
    found = doubted(Trees(32), randn(4, 5))
    assert {"cases.weight:0", "cases.bias:0", "leaves.weight:1"} <= set(found)
    assert "its entries are products" in found["leaves.weight:1"]


class Pairs(nn.Module):
    """Two words, compared by several matrices."""

    def __init__(self, d: int, matrices: int) -> None:
        super().__init__()
        self.words, self.mix = nn.Linear(5, d), nn.Linear(d, d)
        self.pair, self.score = nn.Bilinear(d, d, matrices), nn.Linear(matrices, 2)

    def forward(self, x: Tensor) -> Tensor:
        words = self.mix(self.words(x).relu())
        return self.score(self.pair(words[:-1], words[1:]).tanh())


@pytest.mark.parametrize(("matrices", "asked"), [(4, True), (32, False)])
def test_what_a_matrix_each_makes_of_two_widths_is_marked_if_narrower(matrices: int, asked: bool) -> None:
    found = doubted(Pairs(32, matrices), randn(4, 5))
    assert ("each of its entries has a matrix" in found.get("pair.weight:0", "")) == asked
    assert ("score.weight:1" in found) == asked


class BandPass(nn.Module):
    """Filters of audio, each the difference of two low-pass filters."""

    def __init__(self, filters: int, d: int) -> None:
        super().__init__()
        self.low, self.band = nn.Parameter(torch.rand(filters, 1)), nn.Parameter(torch.rand(filters, 1))
        self.register_buffer("times", torch.arange(-5.0, 6.0))
        self.mix, self.leave = nn.Conv1d(filters, d, 3), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        high = self.low + self.band
        kernel = (high * self.times).sin() - (self.low * self.times).sin()
        return self.leave(self.mix(nn.functional.conv1d(x, kernel[:, None]).abs()).relu().mean(-1))


def test_filters_that_the_code_computes_are_marked() -> None:
    found = doubted(BandPass(20, 32), randn(2, 1, 40))
    assert {"low:0", "band:0", "mix.weight:1"} <= set(found)
    assert "the code computes the weight" in found["mix.weight:1"] and "leave.weight:1" not in found


class Field(nn.Module):
    """A distance, of points and a code that hidden units are joined to, all as wide as the other layers."""

    def __init__(self, d: int, code: int = 13) -> None:
        super().__init__()
        self.codes, self.enter, self.deep = nn.Embedding(4, code), nn.Linear(code + 3, d), nn.Linear(d, d)
        self.narrow, self.wide, self.leave = nn.Linear(d, d - code - 3), nn.Linear(d, d), nn.Linear(d, 1)

    def forward(self, which: Tensor, points: Tensor) -> Tensor:
        joined = torch.cat([self.codes(which), points], -1)
        h = self.narrow(self.deep(self.enter(joined).relu()).relu()).relu()
        return self.leave(self.wide(torch.cat([h, joined], -1)).relu())


@pytest.mark.parametrize("d", [64, 128, 256])
def test_what_a_code_in_doubt_fills_up_to_a_width_is_in_doubt_with_it(d: int) -> None:
    analysis = mupass.analyze(Field(d), (torch.arange(4), randn(4, 3)), base=32)
    for name, parameter in Field(32).named_parameters():
        for axis, size in enumerate(parameter.shape):
            if not analysis[name].ambiguous[axis]:
                assert analysis[name].base_shape[axis] == size, (name, axis)
    assert analysis["narrow.weight"].ambiguous[0] and not analysis["deep.weight"].ambiguous[0]


class Gates(nn.Module):
    """A cell of convolutions whose parts are cut by a number, on frames as wide as it has channels."""

    def __init__(self, num_hidden: int, width: int = 8) -> None:
        super().__init__()
        self.num_hidden = num_hidden
        self.enter = nn.Conv2d(1, 3 * num_hidden, 3, padding=1)
        self.norm = nn.LayerNorm([3 * num_hidden, width, width])
        square = nn.LayerNorm([num_hidden, width, width])
        self.state = nn.Sequential(nn.Conv2d(num_hidden, num_hidden, 1), square)
        self.leave = nn.Conv2d(num_hidden, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        share, new, out = torch.split(self.norm(self.enter(x)), self.num_hidden, dim=1)
        return self.leave(self.state(share.sigmoid() * new.tanh()) * out.sigmoid())


@pytest.mark.parametrize(("source", "target"), [(8, 16), (16, 8), (16, 32)])
def test_parts_that_a_number_cuts_and_norms_over_equal_sizes_are_resized(source: int, target: int) -> None:
    x = randn(2, 1, 8, 8)
    resized, want = mupass.resize(Gates(source), target, example_inputs=x), Gates(target)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), want(x))


class Decays(nn.Module):
    """Units with rates of their own."""

    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        d = len(rates)
        self.register_buffer("rates", rates)
        self.enter, self.leave = nn.Linear(5, d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).relu() * self.rates)


def retention(d: int) -> Tensor:
    return torch.log(1 - 2 ** (-5 - torch.arange(d).float()))


def test_logarithms_of_decays_are_computed_again() -> None:
    resized = mupass.resize(Decays(retention(4)), 8, example_inputs=randn(4, 5))
    torch.testing.assert_close(resized.rates, retention(8))


@pytest.mark.parametrize("rates", [[-0.03, 0.01, -0.02, 0.04], [0.96, 0.98, 0.97, 0.99]])
def test_a_few_numbers_of_another_size_are_not_taken_for_draws(rates: list[float]) -> None:
    with pytest.raises(mupass.ResizeError, match="buffer rates grows .* unknown law"):
        mupass.resize(Decays(torch.tensor(rates)), 8, example_inputs=randn(4, 5))


class Recurrent(nn.Module):
    """An embedding of PyTorch's and a cell with gains of its own law."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embedding, self.leave = nn.Embedding(50, d), nn.Linear(2 * d, 50)
        self.weight = nn.Parameter(torch.empty(d, 4 * d).uniform_(-((3 / d) ** 0.5), (3 / d) ** 0.5))
        self.gains = nn.ParameterList(nn.Parameter(1.5**0.5 * (2 * torch.rand(4 * d) - 1)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) @ self.weight
        keep, new = (torch.sin(h * self.gains[0]) + h * self.gains[1]).chunk(2, -1)
        return self.leave(keep.sigmoid() * new)


def test_a_law_that_gains_suggest_is_not_that_of_an_embedding_beyond_the_errors_of_both() -> None:
    torch.manual_seed(1)
    model = Recurrent(32)
    analysis = mupass.analyze(model, torch.arange(6), base=64)
    laws = own_init(dict(model.named_parameters()), analysis.geometries)
    # The deviation that the law gives now, which was 1.28.
    law = laws["embedding.weight"]
    assert law.std is not None and abs(law.std / law.factor - 1) < 4 / (2 * 1600) ** 0.5


def test_a_gain_of_others_that_a_tensor_does_not_bear_out_is_in_doubt_where_a_usual_law_fits() -> None:
    def sample(name: str, count: int, std: float, fan_in: int | None, fan_out: int) -> Sample:
        average = (fan_in + fan_out) / 2 if fan_in else None
        return Sample(name, count, std, True, Fans(fan_in, fan_out, 0.5, 0.5, average=average, m_average=0.5))

    # Drawn by xavier_uniform_: tables, and weights of two shapes, to the larger of which no constant fits.
    tables = [sample("users", 224, 0.2358, None, 32), sample("items", 288, 0.2148, None, 32)]
    weights = [sample("first", 1024, 0.1749, 32, 32), sample("second", 512, 0.2041, 32, 16)]
    found = {finding.sample.name: finding for finding in find_laws([*tables, *weights])}
    assert found["first"].doubtful or found["first"].kind == "fan_avg"
    assert not found["users"].doubtful and not found["items"].doubtful


class Normalized(nn.Module):
    """A norm that multiplies by the root of the width, with or without a gain of its own."""

    def __init__(self, d: int, gain: bool) -> None:
        super().__init__()
        self.scale, self.gain = d**0.5, nn.Parameter(torch.ones(d)) if gain else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * self.scale * self.gain


def normalized(d: int, gain: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(5, d), Normalized(d, gain), nn.Linear(d, 3))


def test_the_root_of_a_width_is_told_from_that_of_data_as_long_by_a_parameter_or_asked_about() -> None:
    tokens = randn(2, 16, 5)
    resized, want = mupass.resize(normalized(16, True), 32, example_inputs=tokens), normalized(32, True)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(tokens), want(tokens))
    with pytest.warns(
        mupass.MupassWarning, match=r"computed from the width: 1\.scale = 4 \(the root of 16\)"
    ):
        mupass.resize(normalized(16, False), 32, example_inputs=tokens)
    # Data of another length leave no doubt.
    assert mupass.resize(normalized(16, False), 32, example_inputs=tokens[:, :7])[1].scale == 32**0.5


class Counted(nn.Module):
    """A table and a stack of matrices that `torch.nn.init` draws by the first two axes, whatever they are."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.table, self.leave = nn.Embedding(26, d), nn.Linear(d, 2)
        self.forms = nn.Parameter(torch.empty(d, 10, d))
        nn.init.xavier_uniform_(self.table.weight)
        nn.init.xavier_uniform_(self.forms)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        products = torch.einsum("bi,imj->bmj", h, self.forms)
        return self.leave((products * h[:, None]).sum(1))


def deviations(model: nn.Module) -> dict[str, float]:
    return {name: parameter.std().item() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("source", "target"), [(16, 32), (32, 16)])
def test_what_torch_draws_by_the_first_two_axes_is_drawn_so_at_another_width(
    source: int, target: int
) -> None:
    torch.manual_seed(0)
    dims = {"forms:1": "finite"}
    resized = mupass.resize(Counted(source), target, example_inputs=torch.arange(6), dims=dims)
    got, want = deviations(resized), deviations(Counted(target))
    for name in ("table.weight", "forms"):
        assert got[name] == pytest.approx(want[name], rel=0.06), name


class Upsampling(nn.Module):
    """Transposed convolutions with lengths and directions, as in HiFi-GAN."""

    def __init__(self, d: int) -> None:
        super().__init__()
        up = nn.ConvTranspose1d(d, d // 2, 4, 2)
        self.enter, self.up = nn.Conv1d(3, d, 3), nn.utils.parametrizations.weight_norm(up)
        self.leave = nn.Conv1d(d // 2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.up(self.enter(x).relu()).relu())


def test_the_length_and_the_bias_of_a_normalized_weight_follow_its_direction() -> None:
    torch.manual_seed(0)
    resized = mupass.resize(Upsampling(32), 256, example_inputs=randn(2, 3, 8))
    assert resized.up.bias.std().item() == pytest.approx((128 * 4 * 3) ** -0.5, rel=0.2)
    length, direction = resized.up.parametrizations.weight.parameters()
    torch.testing.assert_close(length, torch.norm_except_dim(direction, 2, 0))


class Routed(nn.Module):
    """Tokens find their experts by scores: how many each gets depends on the values."""

    def __init__(self, d: int, experts: int = 3) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(5, d), nn.Linear(d, experts), nn.Linear(d, 2)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu()
        scores = self.gate(h)
        shares, chosen = (scores - scores.mean(0)).softmax(-1).max(-1)  # no expert goes without tokens
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            if float(rows.sum()) < 0:  # a branch on values, which torch.export cannot capture
                continue
            y = y.index_add(0, rows, expert(h[rows]) * shares[rows, None])
        return self.leave(y + h)


@pytest.mark.filterwarnings("ignore:torch.export cannot capture")
def test_numbers_of_tokens_that_values_tell_may_change_with_the_width() -> None:
    torch.manual_seed(0)
    x = randn(40, 5)
    resized, want = mupass.resize(Routed(16), 32, example_inputs=x), Routed(32)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(x), want(x))


def test_factors_of_modules_of_torch_are_no_roots_of_a_width() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 16, 1), nn.Upsample(scale_factor=4, mode="linear"), nn.Conv1d(16, 2, 3)
    )
    assert mupass.resize(model, 32, example_inputs=randn(2, 3, 8))[1].scale_factor == 4


def depthwise(sizes: list[int]) -> nn.Module:
    """Depthwise convolutions of many widths, so that a search of their groups would be long."""
    layers: list[nn.Module] = [nn.Conv1d(3, sizes[0], 1)]
    for size, later in zip(sizes, [*sizes[1:], 2], strict=True):
        layers += [nn.Conv1d(size, size, 3, padding=1, groups=size), nn.ReLU(), nn.Conv1d(size, later, 1)]
    return nn.Sequential(*layers)


def test_groups_of_depthwise_convolutions_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mupass._resize.rebuild.TRIES", 0)
    sizes = [8, 16, 24, 32]
    resized = mupass.resize(depthwise(sizes), scale=2, example_inputs=randn(2, 3, 8))
    assert repr(resized) == repr(depthwise([2 * size for size in sizes]))
