"""K-FAC on recurrences: values of the written steps, and updates against dense factors, sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kfac import LR, PLAIN, RHO, damping, moved, power
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mupass

# Dynamo instantiates the class to trace it, on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WIDTH, BASE, LENGTH = 8, 4, 5
LENGTHS = [5, 4, 4, 2]  # of packed sequences
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
EVERYTHING = {"num_layers": 2, "bidirectional": True, "batch_first": True}
SEQUENCES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lstm": ("LSTM", {}, False),
    "lstm, everything": ("LSTM", EVERYTHING, False),
    "lstm, no bias": ("LSTM", {"bias": False}, False),
    "lstm, projected": ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}, False),
    "lstm, packed": ("LSTM", EVERYTHING, True),
    "gru": ("GRU", {}, False),
    "gru, everything": ("GRU", EVERYTHING, False),
    "gru, packed": ("GRU", EVERYTHING, True),
    "rnn, tanh": ("RNN", {}, False),
    "rnn, relu": ("RNN", {"nonlinearity": "relu", **EVERYTHING}, True),
}
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}


class Sequence(nn.Module):
    """A recurrence between two linear layers, that starts from states other than zero."""

    def __init__(self, name: str, width: int = WIDTH) -> None:
        super().__init__()
        self.kind, options, self.packed = SEQUENCES[name]
        self.inp = nn.Linear(3, width)
        self.rnn = getattr(nn, self.kind)(width, width, **options)
        self.directions = 2 if self.rnn.bidirectional else 1
        self.out = nn.Linear(self.hidden * self.directions, 2)

    @property
    def hidden(self) -> int:
        return self.rnn.proj_size or self.rnn.hidden_size

    def start(self) -> list[Tensor]:
        """Of every layer and direction, the same for all samples."""
        cells = self.rnn.num_layers * self.directions
        sizes = [self.hidden, self.rnn.hidden_size][: STATES[self.kind]]
        return [torch.linspace(-1, 1, cells * n, dtype=torch.float64).view(cells, 1, n) for n in sizes]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))  # [samples, steps, width]
        start: Any = [state.expand(-1, len(x), -1).contiguous() for state in self.start()]
        start = tuple(start) if len(start) > 1 else start[0]
        if self.packed:
            y, _ = self.rnn(pack_padded_sequence(x, LENGTHS, batch_first=True), start)
            y = pad_packed_sequence(y, batch_first=True)[0]
        elif self.rnn.batch_first:
            y = self.rnn(x, start)[0]
        else:
            y = self.rnn(x.transpose(0, 1), start)[0].transpose(0, 1)
        return self.out(y.sum(1))  # one term of the loss for a sample


class Cells(nn.Module):
    """Cells that code calls step by step."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inp = nn.Linear(3, width)
        self.lstm, self.gru = nn.LSTMCell(width, width), nn.GRUCell(width, width)
        self.rnn = nn.RNNCell(width, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        h = c = g = r = x.new_zeros(len(x), x.shape[-1])
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
        return self.out(r)


class Reference:
    """Runs models sample by sample and step by step, with zeros added to what weights put out."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}  # weight -> (sample, input, zeros)
        self.sample = 0

    def product(self, owner: nn.Module, prefix: str, names: tuple[str, str], x: Tensor) -> Tensor:
        weight = getattr(owner, names[0])
        y = F.linear(x, weight, getattr(owner, names[1], None))
        zeros = torch.zeros_like(y, requires_grad=True)
        self.seen.setdefault(f"{prefix}.{names[0]}", []).append((self.sample, x.detach(), zeros))
        return y + zeros

    def step(
        self, kind: str, owner: nn.Module, prefix: str, end: str, x: Tensor, states: Any
    ) -> list[Tensor]:
        i = self.product(owner, prefix, (f"weight_ih{end}", f"bias_ih{end}"), x)
        h = self.product(owner, prefix, (f"weight_hh{end}", f"bias_hh{end}"), states[0])
        if kind == "RNN":
            act = torch.relu if getattr(owner, "nonlinearity", "tanh") == "relu" else torch.tanh
            return [act(i + h)]
        if kind == "GRU":
            (ri, zi, ni), (rh, zh, nh) = i.chunk(3), h.chunk(3)
            z = torch.sigmoid(zi + zh)
            return [(1 - z) * torch.tanh(ni + torch.sigmoid(ri + rh) * nh) + z * states[0]]
        enter, keep, new, leave = (i + h).chunk(4)
        cell = torch.sigmoid(keep) * states[1] + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        if getattr(owner, "proj_size", 0):
            hidden = self.product(owner, prefix, (f"weight_hr{end}", ""), hidden)
        return [hidden, cell]

    def sequence(self, net: Sequence, x: Tensor) -> list[Tensor]:
        rows = list(x)
        for layer in range(net.rnn.num_layers):
            outputs = []
            for direction in range(net.directions):
                states = [state[layer * net.directions + direction, 0] for state in net.start()]
                end, order = f"_l{layer}", list(range(len(rows)))
                if direction:
                    end, order = f"{end}_reverse", order[::-1]
                made: dict[int, Tensor] = {}
                for at in order:
                    states = self.step(net.kind, net.rnn, "rnn", end, rows[at], states)
                    made[at] = states[0]
                outputs.append([made[at] for at in range(len(rows))])
            rows = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        return rows

    def outputs(self, net: Any, x: Tensor) -> list[Tensor]:
        found = []
        for self.sample, steps in enumerate(torch.tanh(net.inp(x))):
            if isinstance(net, Sequence):
                length = LENGTHS[self.sample] if net.packed else len(steps)
                found.append(torch.stack(self.sequence(net, steps[:length])).sum(0))
                continue
            h = c = g = r = steps.new_zeros(WIDTH)
            for step in steps:
                h, c = self.step("LSTM", net.lstm, "lstm", "", step, [h, c])
                (g,) = self.step("GRU", net.gru, "gru", "", h, [g])
                (r,) = self.step("RNN", net.rnn, "rnn", "", g, [r])
            found.append(r)
        return [net.out(row) for row in found]

    def factors(self, name: str, terms: list[Tensor], reduce: bool) -> tuple[Tensor, Tensor]:
        """A over rows and B over loss terms of one weight; rows of a sample as one in the reduce setting."""
        calls = self.seen[name]
        zeros = [zero for *_, zero in calls]
        deltas = [torch.autograd.grad(term, zeros, retain_graph=True, allow_unused=True) for term in terms]
        rows: dict[int, list[int]] = {}
        for number, (sample, *_) in enumerate(calls):
            rows.setdefault(sample if reduce else number, []).append(number)
        a, b = [], []
        for numbers in rows.values():
            a.append(torch.stack([calls[number][1] for number in numbers]).mean(0))
            for delta in deltas:
                own = [delta[number] for number in numbers if delta[number] is not None]
                b += [torch.stack(own).sum(0)] if own else []
        inputs, outputs = torch.stack(a), torch.stack(b)
        return inputs.T @ inputs / len(a), outputs.T @ outputs / len(terms)


def data() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), LENGTH, 3, dtype=torch.float64)


def made(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return build().double()


def check_update(build: Callable[[], nn.Module], gates: Callable[[str], int], sharing: str, run: Any) -> None:
    x, net = data(), mupass.transform(made(build), data(), base=BASE)
    plain = made(build)
    plain.load_state_dict(net.state_dict())
    optimizer = mupass.KFAC(
        net, LR, RHO, **PLAIN, damping_floor=0.0, sharing=sharing, damping_mode="absolute", strict=True
    )
    run(net)(x).square().sum(-1).mean().backward()
    got = moved(net, optimizer.step)
    reference = Reference()
    terms = [row.square().sum() for row in reference.outputs(plain, x)]
    (sum(terms) / len(terms)).backward(retain_graph=True)
    seen = list(reference.seen)
    for name in seen:
        a, b = reference.factors(name, terms, sharing == "reduce")
        bias = name.replace("weight", "bias")
        pieces = gates(name)
        for parameter, left in ((name, a), (bias, torch.ones(1, 1, dtype=a.dtype))):
            if parameter not in got:
                continue
            grad = plain.get_parameter(parameter).grad
            found = got[parameter].chunk(pieces)
            for piece, own in enumerate(grad.view(len(grad), -1).chunk(pieces)):
                span = slice(piece * len(own), (piece + 1) * len(own))
                entry = net.mupass_plan[parameter].geometry
                growths = (entry.m_in, entry.m_out)
                rho_a, rho_b = damping("absolute", left, b[span, span], *growths)
                want = -LR * power(b[span, span], rho_b, 1) @ own @ power(left, rho_a, 1)
                assert want.norm() > 0
                difference = found[piece].reshape(want.shape) - want
                assert difference.norm() < 1e-8 * want.norm(), (parameter, piece)


def of_sequence(name: str) -> Callable[[str], int]:
    return lambda weight: 1 if "weight_hr" in weight else GATES[SEQUENCES[name][0]]


@pytest.mark.sample
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_update_equals_the_dense_formula(name: str, sharing: str) -> None:
    if sharing == "reduce" and SEQUENCES[name][2]:
        sharing = "expand"  # of packed sequences every row is a sample
    check_update(lambda: Sequence(name), of_sequence(name), sharing, lambda net: net)


@pytest.mark.sample("eager")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_update_of_cells_equals_the_dense_formula(compiled: bool) -> None:
    def run(net: nn.Module) -> Any:
        return torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net

    check_update(Cells, lambda name: GATES[{"l": "LSTM", "g": "GRU", "r": "RNN"}[name[0]]], "expand", run)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("name", SEQUENCES)
def test_written_steps_have_the_values_and_gradients_of_the_fused_layer(name: str) -> None:
    plain = made(lambda: Sequence(name))
    net = mupass.transform(copy.deepcopy(plain), data(), base=WIDTH)
    optimizer = mupass.KFAC(net)
    assert optimizer.factors_due
    keys = list(net.state_dict())
    outputs = [model(data()) for model in (plain, net)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().mean().backward()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(net.get_parameter(key).grad, parameter.grad, rtol=1e-10, atol=1e-12)
    assert list(net.state_dict()) == keys == list(plain.state_dict())


@pytest.mark.parametrize("name", ["lstm, everything", "gru, packed"])
def test_last_states_are_those_of_the_fused_layer(name: str) -> None:
    plain = made(lambda: Sequence(name))
    net = mupass.transform(copy.deepcopy(plain), data(), base=WIDTH)
    mupass.KFAC(net)
    x: Any = torch.randn(len(LENGTHS), LENGTH, WIDTH, dtype=torch.float64)
    if net.packed:
        x = pack_padded_sequence(x, LENGTHS, batch_first=True)
    torch.testing.assert_close(net.rnn(x)[1], plain.rnn(x)[1], rtol=1e-12, atol=1e-12)


def test_the_fused_layer_runs_where_no_factors_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mupass.transform(made(lambda: Sequence("gru")), data())
    optimizer = mupass.KFAC(net, factor_every=2)
    written = []
    layer = mupass._taps.recurrent._sequence
    monkeypatch.setattr(mupass._taps.recurrent, "_sequence", lambda *a: written.append(1) or layer(*a))
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        net(data()).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            net(data())
        counts.append(len(written))
    assert counts == [1, 1, 2, 2]


def test_dropout_between_layers_draws_as_the_fused_layer_does() -> None:
    outputs = []
    for tapped in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, dropout=0.5))
        if tapped:
            mupass.KFAC(mupass.transform(net, torch.randn(LENGTH, 4, 3), base=WIDTH))
        torch.manual_seed(3)
        outputs.append(net(torch.randn(LENGTH, 4, 3))[0])
    torch.testing.assert_close(*outputs)


def test_a_gate_that_gets_no_gradient_is_told_by_its_number() -> None:
    """Of the backward direction's first step the forget gate acts on a state of zeros."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    x = torch.randn(6, 4, 5)
    net = mupass.transform(Last(), x, base=8)
    optimizer = mupass.KFAC(net)
    F.cross_entropy(net(x), torch.arange(6) % 3).backward()
    before = net.lstm.weight_ih_l0_reverse.detach().clone()
    told = "part 2 of 4 of the outputs of lstm.weight_(ih|hh)_l0_reverse receives no gradient"
    with pytest.warns(mupass.MupassWarning, match=told) as found:
        optimizer.step()
    assert len(found) == 2
    moved_gates = (net.lstm.weight_ih_l0_reverse != before).view(4, 8, 5).any(2).all(1)
    assert moved_gates.tolist() == [True, False, True, True]
