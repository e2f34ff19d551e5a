"""Fallbacks for parameters that a preconditioner cannot take, with the scales of their own table row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi

import torch
from torch import Tensor

from mupass._optim.checks import check_betas, check_choice, check_number
from mupass._optim.vocabulary import Group, State

FALLBACKS = ("adamw", "adam_atan2", "sgd")
EPSILON = 1e-8  # at the base width
BETAS = (0.9, 0.999)
# Rates of Adam and what moves like it, chosen by `benchmarks/defaults.py` at base widths from 4 to 64.
ADAM_RATE, NARROW, WIDE = 8e-3, 32, 64
SGD_RATE = 0.1


def adam_rate(base_width: float) -> float:
    """Return the default learning rate of Adam and what moves like it.

    It is 0.008 at base widths from 32 to 64. Rates of matrices fall like 1/width, so at a wider base it falls
    too; a narrower one takes more, which the benchmark found to be like the root of the width.

    Args:
        base_width: Width that rates are those of.
    """
    if base_width < NARROW:
        return ADAM_RATE * (NARROW / base_width) ** 0.5
    return ADAM_RATE * min(1.0, WIDE / base_width)


@dataclass(frozen=True)
class Fallback:
    """What trains the parameters that an optimizer does not take.

    Example:
        >>> import mupass
        >>> mupass.Fallback("adamw", lr=3e-4, betas=(0.9, 0.95)).eps
        1e-08

    An optimizer takes it as ``mupass.KFAC(model, fallback=mupass.Fallback("sgd", momentum=0.8))``.

    Attributes:
        name: ``adamw``, ``adam_atan2`` or ``sgd``.
        lr: Learning rate at the base width; None for `ADAM_RATE` (0.1 under ``sgd``).
        betas: Weights of the past in Adam's averages of gradients and of their squares.
        eps: Adam's epsilon at the base width.
        weight_decay: Decoupled weight decay; None for that of the optimizer.
        momentum: Weight of the past under ``sgd``: directions add up, as in `torch.optim.SGD`.

    Raises:
        OptimizerError: A number out of range, or an unknown name.
    """

    name: str = "adamw"
    lr: float | None = None
    betas: tuple[float, float] = BETAS
    eps: float = EPSILON
    weight_decay: float | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_choice("fallback", self.name, FALLBACKS)
        if self.lr is not None:
            check_number("fallback_lr", self.lr)
        check_betas("betas", self.betas)
        check_number("eps", self.eps)
        check_number("momentum", self.momentum, 0, 1)
        if self.weight_decay is not None:
            check_number("weight_decay", self.weight_decay)

    @staticmethod
    def of(fallback: str | Fallback, lr: float | None) -> Fallback:
        """Return the fallback that a name and a rate stand for.

        Args:
            fallback: A name, or a fallback.
            lr: Learning rate in place of the fallback's own.

        Raises:
            OptimizerError: It is neither, or the rate is out of range.
        """
        if not isinstance(fallback, Fallback):
            fallback = Fallback(fallback)
        if lr is None:
            return fallback
        return replace(fallback, lr=check_number("fallback_lr", lr))


def fallback_rate(fallback: Fallback, base_width: float) -> float:
    """Return the learning rate of a fallback at the base width.

    Args:
        fallback: The fallback.
        base_width: Width that rates are those of.
    """
    if fallback.lr is not None:
        return fallback.lr
    if fallback.name == "sgd":
        return SGD_RATE
    return adam_rate(base_width)


def real(tensor: Tensor) -> Tensor:
    """Return a tensor, or a view of real numbers of one that is complex.

    Args:
        tensor: Any tensor.
    """
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision that averages of a parameter's gradients are kept in: float32 or better.

    In half precision an epsilon of 1e-8 is 0, and an average of squares stops where it is.

    Args:
        parameter: The parameter.
    """
    return torch.promote_types(real(parameter).dtype, torch.float32)


def average_state(parameter: Tensor, *names: str) -> State:
    """Return averages before the first step: zeros, and the total weight of what was averaged.

    An average is corrected for its start from zero as it is made: it is the mean of what it has seen.

    Args:
        parameter: The parameter.
        names: Of the averages.
    """
    real_view = real(parameter)
    dtype = state_dtype(parameter)
    state = {name: torch.zeros_like(real_view, dtype=dtype) for name in names}
    return state | {f"{name}_weight": torch.zeros((), dtype=dtype, device=real_view.device) for name in names}


def sum_state(parameter: Tensor) -> State:
    """Return a sum of directions before the first step.

    Args:
        parameter: The parameter.
    """
    return {"momentum": torch.zeros_like(real(parameter), dtype=state_dtype(parameter))}


def fallback_state(parameter: Tensor, group: Group) -> State:
    """Return the state of one parameter before its first step.

    Args:
        parameter: The parameter.
        group: Its parameter group.
    """
    if group["algorithm"] == "sgd":
        if not group["momentum"]:
            return {}
        return sum_state(parameter)
    return average_state(parameter, "mean", "square")


def averages(
    gradients: Sequence[Tensor], states: Sequence[State], name: str, beta: float, ok: Tensor
) -> list[Tensor]:
    """Add gradients to their moving averages, and return these: the very tensors of the state.

    They are corrected for their start from zero. A step that does not count (``ok`` is zero) leaves them as
    they are.

    Args:
        gradients: The gradients; zeros where the step does not count.
        states: State of each parameter, updated in place.
        name: Of the average.
        beta: Weight of the past.
        ok: 1, or 0 for a step that does not count.
    """
    means = [state[name] for state in states]
    weights = [state[f"{name}_weight"] for state in states]
    # Tensors of one device and precision are averaged together.
    numbers_of: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, weight in enumerate(weights):
        numbers_of.setdefault((weight.device, weight.dtype), []).append(number)
    for kind, numbers in numbers_of.items():
        # The sum beta sum + (1 - beta) gradient has the weight w <- beta w + (1 - beta), and their quotient,
        # which is kept, moves towards the gradient by (1 - beta) / w.
        new_weight = ok.to(*kind) * (1 - beta)
        own_weights = [weights[number] for number in numbers]
        weight = torch.stack(own_weights)
        weight = weight + new_weight * (1 - weight)
        torch._foreach_copy_(own_weights, list(weight.unbind()))
        # A first step that does not count leaves a weight of zero.
        parts = new_weight / weight.clamp(min=1e-30)
        own_means = [means[number] for number in numbers]
        # The model may have changed its precision since the state was made.
        own_gradients = [
            gradients[number].to(mean.dtype) for number, mean in zip(numbers, own_means, strict=True)
        ]
        torch._foreach_lerp_(own_means, own_gradients, list(parts.unbind()))
    return means


def fallback_directions(
    gradients: Sequence[Tensor], states: Sequence[State], group: Group, ok: Tensor
) -> list[Tensor]:
    """Return the directions of a group's parameters under its fallback.

    Args:
        gradients: Their gradients, real and in the precision of the state; zeros where the step does not
            count.
        states: Their optimizer states, updated in place.
        group: The group: ``algorithm``, its hyperparameters and the factor on epsilon.
        ok: 1, or 0 for a step that does not count.

    Returns:
        Tensors to be subtracted, times learning rate and width factor; some are those of the state.
    """
    if group["algorithm"] == "sgd":
        if not group["momentum"]:
            return list(gradients)
        momentum, directions = group["momentum"], []
        for gradient, state in zip(gradients, states, strict=True):
            directions.append(heavy_ball(gradient, state, momentum, ok))
        return directions
    first, second = group["betas"]
    means = averages(gradients, states, "mean", first, ok)
    squares = averages(torch._foreach_mul(list(gradients), list(gradients)), states, "square", second, ok)
    roots = torch._foreach_sqrt(squares)
    if group["algorithm"] == "adam_atan2":
        # Everett et al., arXiv 2407.05872, section 5: no epsilon. The factor makes it 1 where the two agree.
        return [torch.atan2(mean, root) * (4 / pi) for mean, root in zip(means, roots, strict=True)]
    # mean / (root of the mean square + epsilon)
    torch._foreach_add_(roots, group["eps"] * group["mupass_epsilon"])
    return list(torch._foreach_div(means, roots))


def heavy_ball(direction: Tensor, state: State, momentum: float, ok: Tensor) -> Tensor:
    """Accumulate directions: ``buffer = momentum * buffer + direction``, as `torch.optim.SGD` does.

    Returns the buffer itself.

    Args:
        direction: The new one; zero where the step does not count.
        state: Optimizer state of the parameter, updated in place.
        momentum: Weight of the past.
        ok: 1, or 0 for a step that does not count, which leaves the sum as it is.
    """
    buffer = state["momentum"]
    decay = 1 - (1 - momentum) * ok.to(buffer)
    return buffer.mul_(decay).add_(direction)
