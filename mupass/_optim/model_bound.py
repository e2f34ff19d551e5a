"""Optimizers that belong to one model: groups from its plan, taps and names in its modules."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from mupass._errors import OptimizerError, some, warn
from mupass._optim.schedules import watch_rates
from mupass._scales.plan import ATTRIBUTE


def tell_left_out(model: nn.Module, root: nn.Module) -> None:
    """Warn of trained parameters of a module outside of the transformed model in it.

    Args:
        model: What an optimizer was given.
        root: The transformed model, which may be a part of it.
    """
    known = set(root.parameters())
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
    if left_out:
        warn(
            [
                f"the {type(model).__name__} has parameters outside of the transformed "
                f"{type(root).__name__} in it, which this optimizer does not train: {some(left_out)}. "
                "Transform the whole model; or give the optimizer the transformed part alone, and another "
                "one the rest"
            ]
        )


class BoundOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; refuses what would part it from its model."""

    _complete = False  # until the subclass has made its groups

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        watch_rates(self)
        root, plan = getattr(self, "root", None), getattr(self, "plan", None)
        if root is not None and plan is not None:
            setattr(root, ATTRIBUTE, plan)  # its print shows the optimizer in use

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse further groups: the plan says which parameters there are.

        Args:
            param_group: As in torch.

        Raises:
            OptimizerError: Always, once the optimizer is made.
        """
        if self._complete:
            raise OptimizerError("groups come from the model's plan; no others can be added")
        super().add_param_group(param_group)

    def __getstate__(self) -> NoReturn:
        """Refuse copies and pickles, which would hold parameters and taps of another model or of none.

        Raises:
            OptimizerError: Always.
        """
        name = type(self).__name__
        raise OptimizerError(
            f"{name} belongs to its model and cannot be copied or pickled: make a {name} for the copied "
            "model and call its load_state_dict(optimizer.state_dict())"
        )
