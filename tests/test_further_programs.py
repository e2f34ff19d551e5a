"""Kinds of faults met at the first sight of 58 more architectures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_doubts import doubted
from test_own_programs import wrong
from torch import Tensor, nn
from zoo.case import randint, randn

import mupass


class Between(nn.Module):
    """A function between two layers that keeps features apart from positions."""

    def __init__(self, d: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = [function]
        self.enter, self.mix, self.leave = nn.Linear(5, d), nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mix(self.function[0](self.enter(x))).relu())


LENGTHS = torch.tensor([2, 4])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad_sequence": lambda x: nn.utils.rnn.pad_sequence([x[0], x[1, :4]], batch_first=True),
    "pad_sequence of steps": lambda x: nn.utils.rnn.pad_sequence([x[0, :4], x[1]]),
    "segment_reduce": lambda x: torch.segment_reduce(x[0], "sum", lengths=LENGTHS, axis=0),
    "combinations": lambda x: x[:, torch.combinations(torch.arange(6))].sum(2),
    "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x, dim=1),
    "msort": lambda x: x.msort(),
    "gradient": lambda x: torch.gradient(x, dim=1)[0],
    "gradient of samples": lambda x: sum(torch.gradient(x, dim=(0, 1))),
    "chunk": lambda x: x.chunk(1)[0],
}


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_on_positions_leave_features_alone(name: str) -> None:
    assert not wrong(lambda k: Between(16 * k, FUNCTIONS[name]), (randn(2, 6, 5),))


@torch.library.custom_op("mupass_tests::listed", mutates_args=())
def listed(x: Tensor) -> list[Tensor]:
    return [2 * x]


@listed.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x)]


def test_an_operator_without_a_rule_may_return_a_list_of_one() -> None:
    analysis = mupass.analyze(Between(16, lambda x: listed(x)[0]), randn(2, 6, 5))
    assert analysis["mix.weight"].infinite == (True, True)


class Messages(nn.Module):
    """Messages along edges, added up where an index says, which is spread over their features."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.enter, self.mix, self.leave = d, nn.Linear(5, d), nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h, (source, target) = self.enter(x).relu(), edges
        places = target[:, None].expand(-1, self.d)
        sums = torch.zeros_like(h).scatter_add(0, places, self.mix(h[source]))
        return self.leave(sums.relu())


def test_an_index_that_is_spread_over_features_has_as_many_at_another_width() -> None:
    inputs = randn(7, 5), randint(7, 2, 11)
    resized, want = mupass.resize(Messages(16), 32, example_inputs=inputs), Messages(32)
    want.load_state_dict(resized.state_dict())
    torch.testing.assert_close(resized(*inputs), want(*inputs))


class Agents(nn.Module):
    """A recurrence for every agent of every sample; a net of the state weighs their values: QMIX."""

    def __init__(self, d: int, agents: int = 3) -> None:
        super().__init__()
        self.d, self.agents = d, agents
        self.enter, self.cell, self.values = nn.Linear(5, d), nn.GRUCell(d, d), nn.Linear(d, 4)
        self.first, self.shift = nn.Linear(6, agents * d), nn.Linear(6, d)
        self.second = nn.Linear(6, d)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        batch, steps, agents, features = x.shape
        h, values = torch.zeros(batch * agents, self.d), []
        for t in range(steps):
            h = self.cell(self.enter(x[:, t].reshape(batch * agents, features)).relu(), h)
            values.append(self.values(h).view(batch, agents, -1).amax(-1))
        chosen, state = torch.stack(values, 1).view(-1, 1, agents), state.flatten(0, 1)
        mixed = chosen @ self.first(state).abs().view(-1, self.agents, self.d) + self.shift(state)[:, None]
        return mixed.relu() @ self.second(state).abs().unsqueeze(2)


def test_rows_of_a_recurrent_cell_are_those_of_its_input() -> None:
    analysis = mupass.analyze(Agents(16), (randn(2, 2, 3, 5), randn(2, 2, 6)))
    assert not wrong(lambda k: Agents(16 * k), (randn(2, 2, 3, 5), randn(2, 2, 6)))
    for name in ("first", "shift", "second"):
        assert analysis[f"{name}.weight"].infinite == (True, False)
    # Three for each unit: the agents, which are an axis of the data.
    wide = mupass.analyze(Agents(16), (randn(2, 2, 3, 5), randn(2, 2, 6)), base=32)
    assert wide["first.weight"].base_shape == (96, 6)


def drawn(how: str, mean: Tensor, deviation: Tensor) -> Tensor:
    if how == "distribution":
        return torch.distributions.Normal(mean, deviation).rsample()
    if how == "in place":
        return mean + deviation * torch.empty_like(mean).normal_()
    return torch.randn_like(mean) * deviation + mean


class Belief(nn.Module):
    """A latent that a prior and a posterior make: recurrent state space models, hierarchical VAEs."""

    def __init__(self, d: int, latent: int, how: str = "noise", by_kernel: bool = False) -> None:
        super().__init__()
        self.how, layer = how, nn.Linear
        if by_kernel:
            layer = partial(nn.Conv1d, kernel_size=1)
        self.enter, self.again, self.mix = layer(5, d), layer(latent + d, d), layer(d, d)
        self.prior, self.posterior = layer(d, 2 * latent), layer(2 * d, 2 * latent)
        self.leave = layer(d, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.enter(x).relu()
        mean, deviation = self.prior(self.mix(h).relu()).chunk(2, 1)
        of_both, narrow = self.posterior(torch.cat([h, self.mix(h).relu()], 1)).chunk(2, 1)
        loss = (mean - of_both).square() + deviation - narrow.exp()
        z = drawn(self.how, of_both, nn.functional.softplus(narrow) + 0.1)
        return self.leave(self.again(torch.cat([z, h], 1)).relu()), loss.sum(1)


@pytest.mark.parametrize("how", ["noise", "in place", "distribution"])
@pytest.mark.filterwarnings("ignore:torch.export cannot capture")
def test_a_latent_that_several_nets_draw_is_marked(how: str) -> None:
    x = randn(4, 5)
    assert not wrong(lambda k: Belief(24 * k, 10, how), (x,))
    found = doubted(Belief(24, 10, how), x)
    made = {f"{net}.{kind}:0" for net in ("prior", "posterior") for kind in ("weight", "bias")}
    # What reads it beside a width grows for certain, and by how much is in doubt with it.
    assert set(found) == made | {"again.weight:1"}
    assert all("drawn at random, and narrower than the 24" in reason for reason in found.values())


def test_channels_that_are_drawn_are_marked_and_wide_layers_with_noise_are_not() -> None:
    x = randn(4, 5, 7)
    assert not wrong(lambda k: Belief(24 * k, 10, by_kernel=True), (x,))
    # As wide as what it is made of: a layer of a Bayesian network.
    assert doubted(Belief(24, 24, by_kernel=True), x) == {}


class Pooling(nn.Module):
    """Rows are assigned to clusters by layers of which the last two have a unit for each: DiffPool."""

    def __init__(self, d: int, clusters: int, before: int) -> None:
        super().__init__()
        self.enter, self.deep, self.offsets = nn.Linear(5, d), nn.Linear(d, d), nn.Linear(3, before)
        self.narrow, self.assign = nn.Linear(2 * d, clusters), nn.Linear(d + clusters, clusters)
        self.spread, self.leave = nn.Linear(before, d), nn.Linear(d, 2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        first = self.enter(x).relu()
        h = self.deep(first).relu()
        inner = self.narrow(torch.cat([first, h], -1)).relu()
        shares = self.assign(torch.cat([h, inner], -1)).softmax(-1)
        h = h + self.spread(self.offsets(places).relu())
        return self.leave((shares.mT @ h).relu())


def test_narrow_layers_with_as_many_units_as_data_or_outputs_are_marked() -> None:
    inputs = randn(2, 9, 5), randn(2, 9, 3)
    assert not wrong(lambda k: Pooling(24 * k, 6, 3), inputs)
    found = doubted(Pooling(24, 6, 3), *inputs)
    assert "as many units as its readout" in found["narrow.weight:0"]
    assert "as many units as the data" in found["offsets.weight:0"] and "spread.weight:1" in found
    assert "offsets.weight:0" not in doubted(Pooling(24, 6, 12), *inputs)
    narrowing = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 6))
    assert doubted(narrowing, inputs[0]) == {}
