"""What a training run asks of any optimizer: momentum, decay, overrides, fallback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from mupass._optim.checks import check_choice, check_flag, check_number
from mupass._optim.fallback import Fallback

MOMENTUM_OF = ("gradients", "directions")
DECAYED = ("all", "matrices")
# Numbers of a parameter group that must not be negative, with what they must stay below.
BOUNDS = {
    "lr": math.inf,
    "weight_decay": math.inf,
    "damping": math.inf,
    "momentum": 1.0,
    "eps": math.inf,
    "mupass_scale": math.inf,
    "mupass_epsilon": math.inf,
}


class TrainingOptions(TypedDict, total=False):
    """Keywords that all planned optimizers take, for type checkers and editors."""

    weight_decay: float
    decay: str
    overrides: Mapping[str, Mapping[str, float]] | None
    fallback: str | Fallback
    fallback_lr: float | None
    stochastic_rounding: bool
    strict: bool


@dataclass(frozen=True)
class Training:
    """Settings that all planned optimizers share; their keywords are explained at `mupass.KFAC`.

    Attributes:
        momentum: Weight of the past.
        momentum_of: One of `MOMENTUM_OF`: what momentum averages or adds up.
        weight_decay: Decoupled decay.
        decay: One of `DECAYED`: which parameters decay.
        overrides: Other settings by pattern of names.
        fallback: What trains the parameters that the optimizer does not take, or its name.
        fallback_lr: Learning rate in place of the fallback's own.
        stochastic_rounding: Whether weights in bfloat16 are rounded at random.
        strict: Whether to raise when any parameter falls back.

    Raises:
        OptimizerError: A number out of range, or an unknown word.
    """

    momentum: float
    momentum_of: str = "gradients"
    weight_decay: float = 0.0
    decay: str = "all"
    overrides: Mapping[str, Mapping[str, float]] | None = None
    fallback: str | Fallback = "adamw"
    fallback_lr: float | None = None
    stochastic_rounding: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, 0, 1)
        check_number("weight_decay", self.weight_decay)
        check_choice("decay", self.decay, DECAYED)
        check_choice("momentum_of", self.momentum_of, MOMENTUM_OF)
        check_flag("stochastic_rounding", self.stochastic_rounding)
        check_flag("strict", self.strict)
