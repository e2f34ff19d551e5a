"""Recipes: how a study makes the optimizer of a transformed copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from mupass._errors import StudyError, kind_of
from mupass._optim.base import PlannedOptimizer
from mupass._optim.groups import param_groups
from mupass._scales.optimizers import OPTIMIZERS, Recipe

Make = Callable[..., torch.optim.Optimizer]
OF_GROUPS = ("lr", "weight_decay", "eps")  # arguments of `param_groups`


@dataclass(frozen=True)
class NamedRecipe:
    """Makes the optimizer of a name, from a transformed model and hyperparameters.

    Attributes:
        name: Of the optimizer.
        recipe: That of its row.
        for_check: Whether a coordinate check is made with it.
    """

    name: str
    recipe: Recipe
    for_check: bool = False

    def __call__(self, model: nn.Module, **chosen: Any) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            model: A transformed model.
            **chosen: Hyperparameters by name.
        """
        options = {**self.recipe.defaults, **chosen}
        if self.for_check:
            # A check wants settings under which the width shows, such as absolute damping.
            options = {**self.recipe.defaults, **self.recipe.for_check, **chosen}
        if self.recipe.fallback_at_lr:
            # The fallback moves at the optimizer's rate, so that one rate is swept.
            options.setdefault("fallback_lr", options["lr"])
        made_by = self._class()
        # Optimizers of mupass take the model; those of torch take groups.
        if issubclass(made_by, PlannedOptimizer):
            return made_by(model, **options)
        of_groups = {name: options.pop(name) for name in OF_GROUPS if name in options}
        return made_by(param_groups(model, **of_groups, optimizer=self.name), **options)

    def names(self) -> list[str]:
        """Return the names of all hyperparameters that it takes."""
        if issubclass(self._class(), PlannedOptimizer):
            # The first parameter is the model.
            return list(signature(self._class()).parameters)[1:]
        return list(self.recipe.defaults)

    def _class(self) -> Any:
        module, _, name = self.recipe.made_by.partition(":")
        return getattr(import_module(module), name)


def check_names(make: Make, names: Iterable[str]) -> None:
    """Refuse hyperparameters that an optimizer does not take, before anything is trained.

    Args:
        make: Result of `recipe`.
        names: Names of the hyperparameters.

    Raises:
        StudyError: It takes no such hyperparameter.
    """
    if isinstance(make, NamedRecipe):
        accepted = make.names()
    else:
        # The first parameter is the model.
        parameters = list(signature(make).parameters.values())[1:]
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            return  # a function of **options takes anything
        accepted = [parameter.name for parameter in parameters]
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise StudyError(
            f"the optimizer takes no {', '.join(map(str, unknown))}; it takes {', '.join(accepted)}"
        )


def recipe(optimizer: str | Make, for_check: bool = False) -> Make:
    """Return the function that makes an optimizer.

    Args:
        optimizer: A name, or the function itself: of a transformed model and hyperparameters by name.
        for_check: Whether a coordinate check is to be made with it.

    Raises:
        StudyError: Unknown name, or neither a name nor a function.
    """
    if isinstance(optimizer, str):
        recipes = {name: row.recipe for name, row in OPTIMIZERS.items() if row.recipe is not None}
        if optimizer not in recipes:
            raise StudyError(
                f"unknown optimizer {optimizer!r}; known: {', '.join(recipes)}, or give a function such as "
                "lambda model, lr: mupass.KFAC(model, lr=lr)"
            )
        return NamedRecipe(optimizer, recipes[optimizer], for_check)
    if not callable(optimizer):
        raise StudyError(
            f"optimizer must be a name or a function of a model and lr, not {type(optimizer).__name__}"
        )
    return optimizer


def optimizer_of(make: Make, model: nn.Module, point: Mapping[str, float]) -> torch.optim.Optimizer:
    """Make the optimizer of a copy.

    Args:
        make: Result of `recipe`.
        model: The transformed copy.
        point: Hyperparameters by name.

    Raises:
        StudyError: The function does not take them, or gives no optimizer.
    """
    try:
        optimizer = make(model, **point)
    except TypeError as error:
        raise StudyError(f"the function that makes the optimizer fails at {dict(point)}: {error}") from error
    if not callable(getattr(optimizer, "step", None)) or not callable(getattr(optimizer, "zero_grad", None)):
        raise StudyError(f"the function that makes the optimizer gives {kind_of(optimizer)}")
    return optimizer
