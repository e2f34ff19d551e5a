"""Checks of an optimizer's arguments, and the table of how it treats every parameter."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from mupass import _errors
from mupass._errors import OptimizerError, is_number, is_whole, kind_of

# check_choice(name, value, known) refuses what is none of the known words.
check_choice = partial(_errors.check_choice, OptimizerError)


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> float:
    """Return a finite number within bounds.

    Args:
        name: What to call it in the error.
        value: The number.
        low: Smallest value allowed.
        high: Bound that must not be reached, unless infinite.

    Raises:
        OptimizerError: It is no number, NaN, infinite or out of bounds.
    """
    # An int may be too large for a float.
    number = is_number(value) and abs(value) < 1e300
    if not number or not math.isfinite(value) or value < low or value >= high:
        bounds = f">= {low:g}" + (f" and < {high:g}" if math.isfinite(high) else "")
        raise OptimizerError(f"{name} must be a finite number {bounds}, not {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return True or False.

    Args:
        name: What to call it in the error.
        value: The flag.

    Raises:
        OptimizerError: It is something else: the text ``"no"`` would count as yes.
    """
    _errors.check_flags(OptimizerError, **{name: value})
    return bool(value)


def check_betas(name: str, betas: Any) -> None:
    """Check the weights of the past of Adam's two averages.

    Args:
        name: What to call them in the error.
        betas: The weights.

    Raises:
        OptimizerError: They are not two numbers from 0 to 1.
    """
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise OptimizerError(f"{name} must be two numbers, not {betas!r}")
    for beta in betas:
        check_number(name, beta, 0, 1)


def check_period(name: str, value: Any) -> int:
    """Return a number of steps, at least 1.

    Args:
        name: What to call it in the error.
        value: The number.

    Raises:
        OptimizerError: It is not a positive whole number.
    """
    if not is_whole(value) or value < 1:
        raise OptimizerError(f"{name} must be a whole number of steps >= 1, not {value!r}")
    return value


def check_words(name: str, value: Any) -> tuple[str, ...]:
    """Return a collection of words.

    Args:
        name: What to call it in the error.
        value: The words.

    Raises:
        OptimizerError: It is one text, no collection, or holds something else.
    """
    if isinstance(value, str) or not isinstance(value, Collection):
        raise OptimizerError(f"{name} must be a list of texts, such as [{value!r}], not {kind_of(value)}")
    if not all(isinstance(word, str) for word in value):
        raise OptimizerError(f"{name} must hold texts, not {list(value)!r:.80}")
    return tuple(value)


@dataclass(frozen=True)
class Covered:
    """How one parameter is treated.

    Attributes:
        parameter: Its name.
        treatment: Block type, or name of the fallback.
        reason: Why.
    """

    parameter: str
    treatment: str
    reason: str


class Coverage(tuple[Covered, ...]):
    """Treatment of every parameter; prints as a table."""

    def __str__(self) -> str:
        """Return one line a parameter."""
        width = max((len(covered.parameter) for covered in self), default=0)
        return "\n".join(
            f"{covered.parameter:<{width}}  {covered.treatment:<12}  {covered.reason}" for covered in self
        )
