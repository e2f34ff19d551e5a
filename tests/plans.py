"""Transformed models whose plan is made once for all tests of a worker; a capture is dear."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

import mupass

Model = TypeVar("Model", bound=nn.Module)
_PLANS: dict[Hashable, mupass.Plan] = {}


def transformed(build: Callable[..., Model], *args: Hashable, inputs: Any, **options: Any) -> Model:
    """Build a model and transform it; all that one function makes of equal arguments have one plan.

    Args:
        build: Makes the model, with initial values of one law whenever it is called.
        *args: What it takes.
        inputs: Example inputs, the same for all calls with these arguments.
        **options: As for `mupass.transform`; numbers and strings, or a function that makes the base model.
    """
    key = (build, args, tuple(options.items()))
    if key not in _PLANS:
        if callable(base := options.get("base")):
            options["base"] = base()
        _PLANS[key] = mupass.transform(build(*args), inputs, **options).mupass_plan  # type: ignore[assignment]
    return mupass.transform(build(*args), plan=_PLANS[key])
