"""Recipes: how a study makes the optimizer of a transformed copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mupass._errors import StudyError, kind_of
from mupass._optim.groups import param_groups
from mupass._optim.kfac import KFAC
from mupass._optim.muon import Muon
from mupass._optim.shampoo import Shampoo
from mupass._optim.soap import SOAP

Make = Callable[..., torch.optim.Optimizer]


def _sgd(model: nn.Module, lr: float = 0.01, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(param_groups(model, lr, optimizer="sgd"), momentum=momentum)


def _adam(model: nn.Module, lr: float = 1e-3, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.Adam(param_groups(model, lr, optimizer="adam", eps=eps))


def _adamw(
    model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, eps: float = 1e-8
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr, weight_decay=weight_decay, eps=eps))


def _kfac(model: nn.Module, lr: float = 0.01, damping: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return KFAC(model, lr, damping, **{"momentum": 0.0, "fallback": "sgd", "fallback_lr": lr, **options})


def _shampoo(
    model: nn.Module, lr: float = 0.01, damping: float = 1e-4, **options: Any
) -> torch.optim.Optimizer:
    # Shampoo's own steps, not those of a graft.
    own = {"graft": "none", "root_every": 1, "momentum": 0.0, "fallback": "sgd", "fallback_lr": lr}
    return Shampoo(model, lr, damping, **{**own, **options})


def _soap(model: nn.Module, lr: float = 1e-3, **options: Any) -> torch.optim.Optimizer:
    return SOAP(model, lr, **{"fallback_lr": lr, **options})


def _muon(model: nn.Module, lr: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    return Muon(model, lr, **options)


RECIPES: Mapping[str, Make] = MappingProxyType(
    {
        "sgd": _sgd,
        "adam": _adam,
        "adamw": _adamw,
        "kfac": _kfac,
        "shampoo": _shampoo,
        "soap": _soap,
        "muon": _muon,
    }
)


# What a recipe hands on by **options.
CLASSES: Mapping[Make, type[torch.optim.Optimizer]] = MappingProxyType(
    {_kfac: KFAC, _shampoo: Shampoo, _soap: SOAP, _muon: Muon}
)


# The orders in width are those of any damping. They show where the damping, not the width, limits the rank of
# a factor: at once when it is 1 relative to the trace, only beyond width 1/damping when there are more rows
# than that. Relative to the largest eigenvalue the rank still shows: it grows with the width up to the rows.
# SOAP's rows are those of blocks, and a check may be narrower than those of training. Bounds on K-FAC's steps
# would hide how they grow.
FOR_CHECK: Mapping[str, Make] = MappingProxyType(
    {
        "kfac": partial(_kfac, damping=1.0, step_bound=None, kl_clip=None, root_every=1),
        "shampoo": partial(_shampoo, damping=1.0, damping_mode="trace"),
        "soap": partial(_soap, block_size=32),
    }
)


def check_names(make: Make, names: Iterable[str]) -> None:
    """Refuse hyperparameters that an optimizer does not take, before anything is trained.

    Args:
        make: Result of `recipe`.
        names: Names of the hyperparameters.

    Raises:
        StudyError: It takes no such hyperparameter.
    """
    # The first parameter is the model.
    taken = list(signature(make).parameters.values())[1:]
    if make in CLASSES:
        taken += list(signature(CLASSES[make]).parameters.values())[1:]
    elif any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken):
        return  # a function of **options takes anything
    # dict.fromkeys: each name once, in order.
    named = [parameter.name for parameter in taken if parameter.kind is not Parameter.VAR_KEYWORD]
    known = dict.fromkeys(named)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise StudyError(f"the optimizer takes no {', '.join(unknown)}; it takes {', '.join(known)}")


def recipe(optimizer: str | Make, for_check: bool = False) -> Make:
    """Return the function that makes an optimizer.

    Args:
        optimizer: A name, or the function itself: of a transformed model and hyperparameters by name.
        for_check: Whether a coordinate check is to be made with it.

    Raises:
        StudyError: Unknown name, or neither a name nor a function.
    """
    if isinstance(optimizer, str):
        if optimizer not in RECIPES:
            raise StudyError(
                f"unknown optimizer {optimizer!r}; known: {', '.join(RECIPES)}, or give a function such as "
                "lambda model, lr: mupass.KFAC(model, lr=lr)"
            )
        if for_check and optimizer in FOR_CHECK:
            return FOR_CHECK[optimizer]
        return RECIPES[optimizer]
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
