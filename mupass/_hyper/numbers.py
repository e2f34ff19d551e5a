"""Numbers: which entries of an optimizer's groups a hyperparameter sets, how steeply, and who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mupass._errors import StudyError, is_number
from mupass._hyper.kfac import KFACRule
from mupass._hyper.rules import SGD, Adam, Key, Rule
from mupass._hyper.shampoo import ShampooRule
from mupass._optim.base import PlannedOptimizer
from mupass._optim.kfac import KFAC
from mupass._optim.shampoo import Shampoo
from mupass._runs.recipes import Make, optimizer_of

STEP = 1e-4  # relative; what recipes do to a number is linear, for which a difference is exact


@dataclass(frozen=True)
class Numbers:
    """An optimizer at one point of its hyperparameters.

    Attributes:
        rule: How it steps.
        values: Entries of groups that some hyperparameter sets.
        slopes: Hyperparameter -> derivative of the entries that it sets.
    """

    rule: Rule
    values: Mapping[Key, float]
    slopes: Mapping[str, Mapping[Key, float]]


def rule_of(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Rule:
    """Return the rule by which an optimizer steps.

    Args:
        optimizer: The optimizer, before its first step.
        names: Parameter -> name.

    Raises:
        StudyError: No rule is known for its class, or for one of its options.
    """
    # The very classes: a subclass may step otherwise.
    if type(optimizer) is torch.optim.SGD:
        return SGD(optimizer, names)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = bool(optimizer.param_groups[0].get("decoupled_weight_decay"))
        return Adam(optimizer, names, decoupled or type(optimizer) is torch.optim.AdamW)
    if type(optimizer) is Shampoo:
        return ShampooRule(optimizer, names)
    if type(optimizer) is KFAC:
        return KFACRule(optimizer, names)
    raise StudyError(
        f"{type(optimizer).__name__} cannot be differentiated: its steps are known for torch.optim.SGD, Adam "
        "and AdamW and for mupass.KFAC and Shampoo; search with driver='grid' or 'optuna' instead"
    )


def read_numbers(make: Make, model: nn.Module, point: Mapping[str, float]) -> Numbers:
    """Find what each hyperparameter sets, by making the optimizer with neighboring values.

    Args:
        make: Makes the optimizer.
        model: The transformed model.
        point: Hyperparameters by name.

    Raises:
        StudyError: A hyperparameter sets nothing that the step can be differentiated by, or something else.
    """
    # Differences of what a recipe makes of neighboring values: it may be any function.
    optimizer = optimizer_of(make, model, point)
    rule = rule_of(optimizer, {parameter: name for name, parameter in model.named_parameters()})
    numbers_here, slopes = _entries(optimizer), {}
    for name, value in point.items():
        step = STEP * (abs(value) or 1.0)
        low = 0.0
        if value:  # most numbers must not be negative
            low = value - step
        high = value + step
        below = _entries(make(model, **{**point, name: low}))
        above = _entries(make(model, **{**point, name: high}))
        numbers_moved = {}
        for key in numbers_here:
            if above[key] != below[key]:
                numbers_moved[key] = (above[key] - below[key]) / (high - low)
        # Numbers that a recipe sets but that the rule does not know, such as a number of steps.
        foreign = sorted({key for _, key in numbers_moved} - set(rule.keys))
        if foreign or not numbers_moved:
            effect = f"sets {', '.join(foreign) or 'no number of its groups'}"
            raise StudyError(
                f"{type(optimizer).__name__} cannot be differentiated by {name!r}, which {effect}; possible: "
                f"{', '.join(rule.keys)}"
            )
        slopes[name] = numbers_moved
    # Only entries that some hyperparameter moves are differentiated by.
    keys: set[Key] = set().union(*slopes.values())
    return Numbers(rule, {key: numbers_here[key] for key in sorted(keys)}, slopes)


def _entries(optimizer: torch.optim.Optimizer) -> dict[Key, float]:
    """Return all numbers of an optimizer: those of its groups, and its own as those of group -1."""
    numbers: dict[Key, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        entries = {name: value for name, value in group.items() if name not in ("params", "betas")}
        if "betas" in group:
            entries["beta1"], entries["beta2"] = group["betas"]
        numbers.update({(number, name): float(value) for name, value in entries.items() if is_number(value)})
    if isinstance(optimizer, PlannedOptimizer):
        # What a recipe may set besides the groups: of these no derivative is known.
        for settings in (vars(optimizer), vars(optimizer.spec)):
            numbers.update(
                {(-1, name): float(number) for name, number in settings.items() if is_number(number)}
            )
    return numbers
