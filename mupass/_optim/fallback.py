"""Fallbacks for parameters that a preconditioner cannot take, with the scales of their own table row."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from torch import Tensor

FALLBACKS = ("adamw", "adam_atan2", "sgd")
BETAS = (0.9, 0.999)
EPSILON = 1e-8  # at the base width


def fallback_step(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return the direction of one parameter under its group's fallback.

    Args:
        grad: Its gradient.
        state: Its optimizer state, updated in place.
        group: Its parameter group: ``algorithm``, ``momentum`` and the factor on epsilon.

    Returns:
        A tensor to be subtracted, times learning rate and width factor.
    """
    if group["algorithm"] == "sgd":
        return average(grad, state, group["momentum"])
    mean, root = _adam_averages(grad, state)
    if group["algorithm"] == "adam_atan2":
        # Everett et al., arXiv 2407.05872, section 5: no epsilon. The factor makes it 1 where the two agree.
        return torch.atan2(mean, root) * (4 / pi)
    return mean / (root + EPSILON * group["mupass_epsilon"])  # type: ignore[no-any-return]


def momentum_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `average` starts from.

    Args:
        parameter: The parameter.
        group: Its parameter group.
    """
    return {"momentum": torch.zeros_like(parameter)} if group["momentum"] else {}


def fallback_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of one parameter before its first step.

    Args:
        parameter: The parameter.
        group: Its parameter group.
    """
    if group["algorithm"] == "sgd":
        return momentum_state(parameter, group)
    # A tensor, as in torch: distributed checkpoints mistake the keys of plain numbers.
    state = {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
    return {"step": torch.zeros(()), **state}


def follow(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Bring the state of a parameter whose precision has changed to the new one.

    Args:
        state: Its optimizer state, updated in place.
        parameter: The parameter.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype != parameter.dtype:
            state[key] = value.to(parameter.dtype)
    return state


def average(direction: Tensor, state: dict[str, Any], momentum: float) -> Tensor:
    """Accumulate directions: ``buffer = momentum * buffer + direction``, as `torch.optim.SGD` does.

    Args:
        direction: The new one.
        state: Optimizer state of the parameter, updated in place.
        momentum: Weight of the past.
    """
    if momentum == 0:
        return direction
    if "momentum" not in state:
        state["momentum"] = direction.clone()
    else:
        torch.add(direction, state["momentum"], alpha=momentum, out=state["momentum"])  # one pass, not two
    return state["momentum"]  # type: ignore[no-any-return]


def _adam_averages(grad: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return Adam's mean and root mean square of gradients, corrected for their start from zero."""
    state["step"] += 1
    state["mean"].lerp_(grad, 1 - BETAS[0])
    state["square"].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    step = int(state["step"])
    mean = state["mean"] / (1 - BETAS[0] ** step)
    square = state["square"] / (1 - BETAS[1] ** step)
    return mean, square.sqrt()
