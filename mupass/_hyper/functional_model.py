"""A function of a model, evaluated at other parameters and buffers than the model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupass._hyper.elementary_norms import Apart


class Body(nn.Module):
    """A model inside of a module that calls any function of it: `functional_call` then swaps its tensors.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """Return the function's result.

        Args:
            function: Called with the model.
        """
        return function(self.model)


def call(model: nn.Module, function: Callable[[nn.Module], Any], *tensors: Mapping[str, Tensor]) -> Any:
    """Return what a function of a model gives when the model has other parameters and buffers, norms apart.

    Args:
        model: The model.
        function: Called with the model.
        *tensors: Values by name.
    """
    named: dict[str, Tensor] = {}
    # Body holds the model as an attribute, so that names get its prefix.
    for part in tensors:
        named.update({f"model.{name}": tensor for name, tensor in part.items()})
    with Apart():
        return torch.func.functional_call(Body(model), named, (function,))
