"""How steep the loss is at the model's output, by which `kl_clip` is measured."""

from __future__ import annotations

import torch
from torch import Tensor

# The slope at which `kl_clip` is the bound as it stands: that of a classifier in the middle of its training.
UNIT = 0.5
# Part of the largest slope below which a bound falls with the slope once more, and to which part of itself it
# falls at most. Picked by benchmarks.
FALLEN, LEAST = 0.25, 1 / 32


class OutputSlope:
    """The mean squared gradient G of a loss term by the model's output, and what it does to a bound.

    The empirical Fisher has G in it, so ``<d, F d>`` is G times what the step changes in the predictions.
    A bound on it, held still, lets a step change them by ``1 / sqrt(G)``: a loss that is multiplied by c
    would be trained with steps of 1/c, and targets that are fitted well with longer and longer ones. So

        bound = kl_clip * (G / UNIT) * min(1, max(LEAST, G / (FALLEN * min(largest G, UNIT))))

    With the first factor the change of predictions is bounded, whatever multiplies the loss. The second one
    makes it fall with the error, once this is well below what it was: a Gauss-Newton step does so, too. It
    stops at LEAST, so that logits of samples that are learnt go on to grow. A slope above UNIT at the start,
    as of outputs that are far too large, counts as UNIT there.
    It is Theta(1) in width under ``mup`` where the model's outputs do not grow.

    Where B has another power than 1, its direction holds that power of G, and so does the factor.

    Nothing here waits for the device.

    Args:
        dtype: Precision of the averages.
        device: Where they are.
        power: Power of B.
        in_place: Whether numbers are written to the tensor that is there.

    Attributes:
        numbers: ``[3]``: the average of G, its total weight, and the largest average so far.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, power: float, in_place: bool = True) -> None:
        self.numbers = torch.zeros(3, dtype=dtype, device=device)
        self._power, self._in_place = power, in_place

    def note(self, slope: Tensor, decay: float, counts: Tensor) -> None:
        """Add what a step has seen to the averages.

        Args:
            slope: G of this step.
            decay: Weight of the past.
            counts: Whether the step counts.
        """
        mean, weight, largest = self.numbers
        # Nothing is told by a step without a sample, or whose outputs have gradients that overflow or are
        # NaN where no parameter sees it (rows that a mask takes out behind the loss).
        counts = counts.to(slope.device) & slope.isfinite() & (slope > 0)
        seen = decay * mean + (1 - decay) * slope.to(mean)
        seen_weight = decay * weight + (1 - decay)
        new = torch.stack([seen, seen_weight, torch.maximum(largest, seen / seen_weight.clamp(min=1e-30))])
        numbers = torch.where(counts.to(mean.device), new, self.numbers)
        if self._in_place:
            self.numbers.copy_(numbers)
        else:
            self.numbers = numbers

    def factor(self) -> Tensor:
        """Return what a bound is multiplied by; 1 where nothing was seen yet."""
        mean, weight, largest = self.numbers
        slope = mean / weight.clamp(min=1e-30)
        usual = FALLEN * largest.clamp(max=UNIT)
        fallen = (slope / usual.clamp(min=1e-30)).clamp(min=LEAST, max=1.0)
        size = (slope / UNIT * fallen).clamp(min=1e-30) ** self._power
        return torch.where(weight > 0, size, torch.ones_like(size))
