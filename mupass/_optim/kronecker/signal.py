"""How much of an average of gradients is signal, and how much the noise of its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mupass._optim.fallback import state_dtype
from mupass._parallel import sum_over_ranks

# What a step leaves of the sums that the share is a quotient of, and the smallest share that is believed.
# Both are picked by benchmarks.
KEPT, LEAST = 0.97, 0.01


class Slopes(NamedTuple):
    """Slopes of the loss along directions ``D m``, one entry for each parameter.

    Attributes:
        promise: ``<D m, m>`` with the average m of gradients that the direction is made of.
        found: ``<D m, g>`` with the gradient g of this step.
        fresh: Weight of g in m; 1 in the first step.
    """

    promise: Tensor
    found: Tensor
    fresh: Tensor


class SignalShare:
    """The part of gradient averages that later gradients confirm.

    A direction ``D m`` of the average m promises a slope ``<D m, m>``. The gradient g of the next batch has
    drawn its noise anew: along the same direction it has, on average, the slope of the signal alone,
    ``<D m, g>``. Their quotient is the share of signal in ``<D m, m>``, and its root that in the length of m
    (in the metric of D). A step that is too long for the curvature lowers the share, too: the slope has
    changed by the end of it.

    The idea is that of variance adaptation (Balles & Hennig, arXiv 1705.07774), and of the product of
    successive gradients that tells whether a rate is too large (Baydin et al., arXiv 1703.04782).
    Each sum is of order 1 in width under ``mup``, as ``<D m, m>`` times the rate is, so the share is too.

    Nothing here waits for the device.

    Args:
        parameters: Own parameters by name, those of other ranks too.
        in_place: Whether numbers are written to the tensor that is there.

    Attributes:
        state: ``[3, K]``, a column for each parameter: the last promise, and the sums of promises and of the
            slopes that were found, both of which fade.
    """

    def __init__(self, parameters: Mapping[str, Tensor], in_place: bool = True) -> None:
        self._in_place = in_place
        self._at = {name: place for place, name in enumerate(parameters)}
        dtype, device = torch.float32, torch.device("cpu")
        for parameter in parameters.values():
            dtype = torch.promote_types(dtype, state_dtype(parameter))
            device = parameter.device
        self.state = torch.zeros(3, len(self._at), dtype=dtype, device=device)
        self._places: dict[tuple[str, ...], Tensor] = {}

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the numbers of a parameter, as a view; nothing for one that is not there.

        Args:
            name: Name of the parameter.
        """
        if name not in self._at:
            return {}
        return {"signal": self.state[:, self._at[name]]}

    def note(self, names: Sequence[str], slopes: Slopes, counts: Tensor) -> None:
        """Take what a step has found.

        With ``m = (1 - f) m' + f g``, the slope of the present direction is known along the present average
        m and along the gradient g, and so it is along m', the average of the step before:
        ``<D m, m'> = (<D m, m> - f <D m, g>) / (1 - f)``. By the symmetry of D this is
        ``(1 - f) <D m', m'> + f <D m', g>``, whose first part was the promise of the step before.

        Args:
            names: The parameters that have a direction.
            slopes: Along their directions, aligned.
            counts: Whether the step counts.
        """
        places = self._places_of(names)
        promise, found, fresh = (numbers.to(self.state) for numbers in slopes)
        last, promises, confirmed = self.state[:, places]
        counts = counts.to(self.state.device)
        old, one = 1 - fresh, torch.ones_like(fresh)
        # In the first step there is no average of the past, and no promise of it.
        known = counts & (last > 0) & (old > 0) & (fresh > 0)
        # Divided where something is known only, for the derivative.
        along_old = (promise - fresh * found) / torch.where(known, old, one)
        slope = (along_old - old * last) / torch.where(known, fresh, one)
        rows = [
            torch.where(counts, promise.clamp(min=0.0), last),
            torch.where(known, KEPT * promises + (1 - KEPT) * last, promises),
            torch.where(known, KEPT * confirmed + (1 - KEPT) * slope, confirmed),
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
        promised, confirmed = sums
        known = promised > 0
        one = torch.ones_like(promised)
        share = torch.where(known, confirmed / torch.where(known, promised, one), one)
        return share.clamp(LEAST, 1.0).sqrt()
