"""How much of an average of gradients is signal, and how much the noise of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mupass._optim.fallback import state_dtype
from mupass._optim.vocabulary import State, Tensors
from mupass._parallel import sum_over_ranks

# What a step leaves of the sums that the share is a quotient of, and the smallest share that is believed.
# Both are picked by benchmarks.
KEPT, LEAST = 0.9, 0.01


class Slopes(NamedTuple):
    """Slopes of the loss along directions ``D m``, one entry for each parameter.

    Attributes:
        along_mean: ``<D m, m>`` with the average m of gradients that the direction is made of.
        along_last: ``<D m, g>`` with the gradient g of this step.
        fresh: Weight of g in m; 1 in the first step.
        momentum: Weight of the past, which ``1 - fresh`` goes towards.
    """

    along_mean: Tensor
    along_last: Tensor
    fresh: Tensor
    momentum: Tensor


class SignalShare:
    """The part of gradient averages that is signal, and not the noise of their batches.

    Gradients of neighbouring steps are taken as one signal, each with noise of its own. Along the direction
    ``D m`` of an average m, the slopes by the average and by the last gradient g in it are then

        <D m, m> = S + k N        <D m, g> = S + f N

    with S that of the signal, N what the noise of one gradient has, f the weight of g in m, and k the sum of
    the squared weights of all gradients in m: noise adds up by squares, and g meets itself alone. So
    ``S (f - k) = f <D m, m> - k <D m, g>``. Both slopes are those of one D. ``S / <D m, m>`` is the share of
    signal, and its root the length of the signal in that of m, in the metric of D. Where steps are too long
    for the curvature, gradients turn against the average, and the share falls, too.

    The idea is that of variance adaptation (Balles & Hennig, arXiv 1705.07774), and of the product of
    successive gradients that tells whether a rate is too large (Baydin et al., arXiv 1703.04782).
    Each sum is of order 1 in width under ``mup``, as ``<D m, m>`` times the rate is, so the share is too.

    Nothing here waits for the device.

    Args:
        parameters: Own parameters by name, those of other ranks too.
        in_place: Whether numbers are written to the tensor that is there.

    Attributes:
        state: ``[3, K]``, a column for each parameter: the sum of squared weights k, and the sums of
            ``<D m, m>`` and of its signal S, both of which fade. They begin with a share of 1.
    """

    def __init__(self, parameters: Tensors, in_place: bool = True) -> None:
        self._in_place = in_place
        self._at = {name: place for place, name in enumerate(parameters)}
        dtype, device = torch.float32, torch.device("cpu")
        for parameter in parameters.values():
            dtype = torch.promote_types(dtype, state_dtype(parameter))
            device = parameter.device
        self.state = torch.zeros(3, len(self._at), dtype=dtype, device=device)
        self._places: dict[tuple[str, ...], Tensor] = {}

    def entries(self, name: str) -> State:
        """Return the numbers of a parameter, as a view; nothing for one that is not there.

        Args:
            name: Name of the parameter.
        """
        if name not in self._at:
            return {}
        return {"signal": self.state[:, self._at[name]]}

    def note(self, names: Sequence[str], slopes: Slopes, counts: Tensor) -> None:
        """Take what a step has found.

        Args:
            names: The parameters that have a direction.
            slopes: Along their directions, aligned.
            counts: Whether the step counts.
        """
        places = self._places_of(names)
        along_mean, along_last, fresh, momentum = (numbers.to(self.state) for numbers in slopes)
        squares, means, signals = self.state[:, places]
        counts = counts.to(self.state.device)
        # m <- (1 - f) m + f g
        squares = torch.where(counts, (1 - fresh) ** 2 * squares + fresh**2, squares)
        signal = fresh * along_mean - squares * along_last
        # The first averages hold one gradient or two, and tell little: f - k is what it becomes, in parts.
        settled = (1 - momentum) - (1 - momentum) / (1 + momentum)
        told = (fresh - squares) * along_mean
        begins = counts & (means <= 0)
        adds = counts & ~begins & (along_mean > 0)
        rows = [
            squares,
            _faded(means, told / settled, along_mean, begins, adds),
            _faded(signals, signal / settled, along_mean, begins, adds),
        ]
        if self._in_place:
            self.state[:, places] = torch.stack(rows)
        else:
            self.state = self.state.index_copy(1, places, torch.stack(rows))

    def _places_of(self, names: Sequence[str]) -> Tensor:
        """Return the places of parameters, on the device; made once for each set of them."""
        key = tuple(names)
        if key not in self._places:
            places = [self._at[name] for name in names]
            self._places[key] = torch.tensor(places, device=self.state.device)
        return self._places[key]

    def factor(self, names: Sequence[str], weights: Tensor, ranks: int) -> Tensor:
        """Return the root of the share, by which directions are multiplied; 1 where nothing is known yet.

        Args:
            names: The parameters that have a direction on this rank.
            weights: What the slopes along them are multiplied by, ``[k]``.
            ranks: Number of ranks that keep parts of the parameters.
        """
        numbers = self.state[1:, self._places_of(names)]
        sums = (numbers * weights.to(numbers)).sum(1)
        if ranks > 1:
            sums = sum_over_ranks([sums])[0]
        mean, signal = sums
        known = mean > 0
        one = torch.ones_like(mean)
        # Divided where something is known only, for the derivative.
        share = torch.where(known, signal / torch.where(known, mean, one), one)
        return share.clamp(LEAST, 1.0).sqrt()


def _faded(sums: Tensor, new: Tensor, first: Tensor, begins: Tensor, adds: Tensor) -> Tensor:
    """Return sums that fade, with something new added, or begun anew."""
    return torch.where(begins, first, torch.where(adds, KEPT * sums + (1 - KEPT) * new, sums))
