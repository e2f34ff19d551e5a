"""A function of a model, evaluated at other parameters and buffers than the model has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mupass._hyper.elementary_norms import Apart


@contextmanager
def derivatives(order: str, phrases: Iterable[str], refuse: Callable[[str], Exception]) -> Iterator[None]:
    """Take fused attention apart, which lacks derivatives, and say by name which operator lacks one.

    Args:
        order: Which derivative is needed, in words, and by what.
        phrases: Words in an error of torch that tell that one is missing; other errors are the model's own.
        refuse: Makes the error to be raised.

    Raises:
        Exception: That error; an operator has no such derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (NotImplementedError, RuntimeError) as error:
        if not any(phrase in str(error) for phrase in phrases):
            raise
        raise refuse(f"an operator of the model has no {order}: {error}") from error


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
