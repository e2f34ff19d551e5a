"""Recurrences step by step: the written form of fused operators, whose products can be tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mupass._taps.forms import Features, Kwargs
from mupass._taps.leaves import Tap

States = tuple[Tensor, ...]  # the hidden state; of an LSTM also the cell
Step = Callable[[Tensor, Callable[[Tensor], Tensor], States], States]
TapOf = Callable[[Tensor | None], Tap | None]


def _lstm(inputs: Tensor, product: Callable[[Tensor], Tensor], states: States) -> States:
    hidden, cell = states
    # The gates in the order of the LSTM's weights: input, forget, cell, output.
    input_gate, forget_gate, candidate, output_gate = (inputs + product(hidden)).chunk(4, -1)
    # c' = f * c + i * tanh(g), h' = o * tanh(c')
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell


def _gru(inputs: Tensor, product: Callable[[Tensor], Tensor], states: States) -> States:
    (hidden,) = states
    # The gates in the order of the GRU's weights: reset, update, new.
    reset_in, update_in, new_in = inputs.chunk(3, -1)
    reset, update, new = product(hidden).chunk(3, -1)
    # n = tanh(W x + r * (U h)); h' = n + z * (h - n), which is (1 - z) * n + z * h.
    candidate = (new_in + (reset_in + reset).sigmoid() * new).tanh()
    return (candidate + (update_in + update).sigmoid() * (hidden - candidate),)


def _rnn_tanh(inputs: Tensor, product: Callable[[Tensor], Tensor], states: States) -> States:
    return ((inputs + product(states[0])).tanh(),)


def _rnn_relu(inputs: Tensor, product: Callable[[Tensor], Tensor], states: States) -> States:
    return ((inputs + product(states[0])).relu(),)


SEQUENCES: Mapping[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _rnn_tanh,
    torch.rnn_relu: _rnn_relu,
}
CELLS: Mapping[Any, Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _rnn_tanh,
    torch.rnn_relu_cell: _rnn_relu,
}
# Names of their arguments, in order.
PADDED = "input hx params has_biases num_layers dropout train bidirectional batch_first".split()
PACKED = "data batch_sizes hx params has_biases num_layers dropout train bidirectional".split()
ONE_STEP = "input hx w_ih w_hh b_ih b_hh".split()


@dataclass(frozen=True)
class Steps:
    """A product at every step of a sequence; rows stand step after step.

    Attributes:
        samples: Number of samples in a step; 0 where it varies, and every row is a sample of its own.
    """

    samples: int

    def input_rows(self, x: Tensor) -> Tensor:
        """Return ``[1, samples, steps, features]``.

        Args:
            x: ``[steps * samples, features]``.
        """
        return self._rows(x)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, samples, steps, features]``.

        Args:
            g: Gradient of the output.
        """
        return self._rows(g)

    def _rows(self, tensor: Tensor) -> Tensor:
        if not self.samples:
            # Packed rows have no regular layout: each is a sample with one step.
            return tensor[None, :, None]
        # [steps * samples, features] -> [1, samples, steps, features]
        return tensor.unflatten(0, (-1, self.samples)).transpose(0, 1)[None]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class LateSteps(Steps):
    """The same, of inputs that are known step by step, behind the tap.

    Attributes:
        inputs: Those of every step, filled in as steps run.
    """

    inputs: list[Any] = field(default_factory=list)

    def input_rows(self, x: Tensor) -> Tensor:
        """Return ``[1, samples, steps, features]`` of the inputs of all steps.

        Args:
            x: Not read.
        """
        return self._rows(torch.cat(self.inputs))


class _Products:
    """Products with one weight at all steps, tapped once."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, tap: Tap | None, outputs: Tensor, runs: _Runs
    ) -> None:
        self.weight, self.bias = weight, bias
        self.differentiable = tap is not None and tap.uses is not None
        self.form = LateSteps(runs.samples, [None] * len(runs.sizes))
        # Zeros that are added to the outputs: their gradient is that of the outputs of all steps.
        added = torch.zeros_like(outputs, requires_grad=True)
        if tap is not None:
            added = tap.through(added, outputs, self.form)
        self.added = torch.split(added, list(runs.sizes))

    def at(self, step: int) -> Callable[[Tensor], Tensor]:
        """Return the product of one step."""

        def product(x: Tensor) -> Tensor:
            self.form.inputs[step] = x if self.differentiable else x.detach()
            return F.linear(x, self.weight, self.bias) + self.added[step]

        return product


@dataclass(frozen=True)
class _Runs:
    """The steps of a sequence.

    Attributes:
        sizes: Number of samples at every step; it does not grow.
        samples: That number, where it is the same at all steps; 0 where it is not.
    """

    sizes: tuple[int, ...]
    samples: int

    def layer(
        self,
        step: Step,
        inputs: Tensor,
        weights: Sequence[Tensor],
        taps: TapOf,
        states: States,
        backwards: bool,
    ) -> tuple[Tensor, States]:
        """Run one direction of one layer.

        Args:
            step: Kind of recurrence.
            inputs: ``[rows, features]``, step after step.
            weights: w_ih, w_hh, then both biases, then a projection of the hidden state, if there are any.
            taps: Weight -> its tap.
            states: Those to start from, each ``[samples, features]``.
            backwards: Whether the last step comes first.

        Returns:
            The hidden states of all rows, and the last states of all samples.
        """
        w_ih, w_hh = weights[:2]
        b_ih, b_hh = weights[2:4] if len(weights) > 3 else (None, None)
        # W x of all steps in one product, since no step waits for another one.
        entered = _tapped(F.linear(inputs, w_ih, b_ih), inputs, taps(w_ih), Steps(self.samples))
        entering = torch.split(entered, list(self.sizes))
        # Of U h the factor is made at the end, when the inputs of all steps are known.
        recurring = _Products(w_hh, b_hh, taps(w_hh), entered, self)
        projecting = None
        # nn.LSTM(proj_size=...): a last weight makes a smaller hidden state of the larger one.
        if len(weights) % 2:
            w_hr = weights[-1]
            projected_zeros = entered.new_zeros(len(entered), w_hr.shape[0])
            projecting = _Products(w_hr, None, taps(w_hr), projected_zeros, self)
        outputs: list[Any] = [None] * len(self.sizes)
        ended: list[States] = []  # samples whose sequences are over, the last ones first
        # Packed sequences are sorted by length, the longest first: a step runs those that are not over.
        running = tuple(state[: self.sizes[-1 if backwards else 0]] for state in states)
        for position in self._order(backwards):
            size, count = self.sizes[position], len(running[0])
            if size < count:
                ended.append(tuple(state[size:] for state in running))
                running = tuple(state[:size] for state in running)
            elif size > count:  # backwards: longer sequences run already, shorter ones begin
                running = tuple(
                    torch.cat([state, initial[count:size]])
                    for state, initial in zip(running, states, strict=True)
                )
            running = step(entering[position], recurring.at(position), running)
            if projecting is not None:
                running = projecting.at(position)(running[0]), *running[1:]
            outputs[position] = running[0]
        ended.append(running)
        # Samples stand with the longest sequence first, and those ended last: hence the reversed order.
        last_states = tuple(torch.cat(chunks[::-1]) for chunks in zip(*ended, strict=True))
        return torch.cat(outputs), last_states

    def _order(self, backwards: bool) -> Iterator[int]:
        steps = range(len(self.sizes))
        return reversed(steps) if backwards else iter(steps)


def _tapped(output: Tensor, x: Tensor, tap: Tap | None, form: Any) -> Tensor:
    return output if tap is None else tap.through(output, x, form)


def weights_of(func: Any, args: Sequence[Any], kwargs: Kwargs) -> list[Tensor]:
    """Return the weights and biases that a recurrence is given.

    Args:
        func: One of `SEQUENCES` or `CELLS`.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    bound = _bound(func, args, kwargs)
    if func in SEQUENCES:
        return list(bound["params"])
    return [bound[name] for name in ONE_STEP[2:] if bound.get(name) is not None]


def run(func: Any, args: Sequence[Any], kwargs: Kwargs, taps: TapOf) -> Any:
    """Run a recurrence as written steps, with the values and outputs of the fused operator.

    Args:
        func: One of `SEQUENCES` or `CELLS`.
        args: Its positional arguments.
        kwargs: Its named arguments.
        taps: Weight -> its tap, or None.
    """
    bound = _bound(func, args, kwargs)
    if func in CELLS:
        return _one_step(CELLS[func], bound, taps)
    outputs, states = _sequence(SEQUENCES[func], bound, taps)
    return outputs, *states


def _bound(func: Any, args: Sequence[Any], kwargs: Kwargs) -> dict[str, Any]:
    """Return arguments by name."""
    if func in CELLS:
        names = ONE_STEP
    else:
        # lstm(data, batch_sizes, hx, params, ...) has no batch_first.
        is_packed = "data" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        names = PACKED if is_packed else PADDED
    return by_name(names, args, kwargs)


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Kwargs) -> dict[str, Any]:
    """Return all arguments of a call by their names.

    Args:
        names: Those of the positional arguments, in order; more than there are.
        args: Positional arguments.
        kwargs: Named ones.
    """
    # A loop: Dynamo of torch 2.8 cannot make a dict of a zip of two lengths.
    bound = dict(kwargs)
    for place, value in enumerate(args):
        bound[names[place]] = value
    return bound


def _one_step(step: Step, bound: Kwargs, taps: TapOf) -> Any:
    """Run a cell."""
    x, w_ih, w_hh = bound["input"], bound["w_ih"], bound["w_hh"]
    states = _as_states(bound["hx"])
    entered = _tapped(F.linear(x, w_ih, bound.get("b_ih")), x, taps(w_ih), Features())

    def product(hidden: Tensor) -> Tensor:
        output = F.linear(hidden, w_hh, bound.get("b_hh"))
        return _tapped(output, hidden, taps(w_hh), Features())

    stepped = step(entered, product, states)
    return stepped[0] if isinstance(bound["hx"], Tensor) else stepped


def _sequence(step: Step, bound: Kwargs, taps: TapOf) -> tuple[Tensor, States]:
    """Run all layers and directions over a sequence, padded or packed."""
    batch_first, is_packed = bound.get("batch_first", False), "data" in bound
    # pack_padded_sequence gives rows, and the number of running samples at every step.
    if is_packed:
        rows, sizes = bound["data"], tuple(bound["batch_sizes"].tolist())
        runs = _Runs(sizes, 0)
    else:
        padded = bound["input"].transpose(0, 1) if batch_first else bound["input"]
        length, samples = padded.shape[:2]
        rows, runs = padded.flatten(0, 1), _Runs((samples,) * length, samples)
    directions = 2 if bound["bidirectional"] else 1
    # Weights and biases of a layer and direction stand together: as many for each.
    weights_each, layers = len(bound["params"]) // (bound["num_layers"] * directions), bound["num_layers"]
    starts = list(zip(*_as_states(bound["hx"]), strict=True))
    last_states: list[States] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            # A bidirectional layer runs its second direction backwards, with weights of its own.
            cell = layer * directions + direction
            weights = bound["params"][cell * weights_each : (cell + 1) * weights_each]
            output, states = runs.layer(step, rows, weights, taps, starts[cell], direction == 1)
            outputs.append(output)
            last_states.append(states)
        # The next layer reads both directions beside each other.
        rows = torch.cat(outputs, -1)
        if layer < layers - 1 and bound["dropout"]:
            rows = F.dropout(rows, bound["dropout"], bound["train"])
    if not is_packed:
        rows = rows.unflatten(0, (length, samples))  # type: ignore[no-untyped-call]
        if batch_first:
            rows = rows.transpose(0, 1)
    return rows, tuple(torch.stack(states) for states in zip(*last_states, strict=True))


def _as_states(hx: Any) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)
