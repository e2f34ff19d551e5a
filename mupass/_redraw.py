"""Draws a parameter anew by the law that its model was initialized with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def redraw(
    model: nn.Module, name: str, old: Tensor, shape: torch.Size, generator: torch.Generator | None
) -> Tensor:
    """Return values of a new shape that follow the law of the old ones.

    Constants stay constants. Otherwise the kind of distribution (uniform, normal, or normal cut at two
    standard deviations) is told from the largest value in units of the standard deviation, and the scale
    from the standard deviation, by the law that `mupass._init` detects: fixed, or 1/sqrt(fan_in) and the like.

    Args:
        model: The model that the parameter belongs to.
        name: Its qualified name.
        old: Its values.
        shape: The new shape.
        generator: Source of randomness; the global one when None.

    Returns:
        A tensor on the CPU in the parameter's dtype.
    """
    raise NotImplementedError
