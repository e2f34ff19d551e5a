"""Models as studies want them: `mupass.transform` undone where they have it, or done where they lack it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mupass._capture.copying import deepcopy
from mupass._errors import StudyError
from mupass._fold import strip
from mupass._scales.marks import unmark
from mupass._scales.plan import ATTRIBUTE, plan_of


def is_transformed(model: Any) -> bool:
    """Return whether a model, or one inside of it, has a plan.

    Args:
        model: Any model, or a function that builds one.
    """
    return isinstance(model, nn.Module) and any(ATTRIBUTE in vars(module) for module in model.modules())


def untransformed(source: Any) -> tuple[Any, tuple[str, ...]]:
    """Return what a study can resize, and what was made of it.

    Args:
        source: A model, which is not changed, or a function of a width.

    Returns:
        The source itself, or a copy of a transformed model with that undone; and notes for the reader.

    Raises:
        StudyError: The model is folded, or only a part of it is transformed.
    """
    if not is_transformed(source):
        return source, ()
    root, plan = plan_of(source)
    # A wrapper around a transformed model is taken off; a part of a larger model is refused.
    _check(source, root)
    copied = deepcopy(root)
    undo(copied)
    return copied, (
        f"the model given is transformed already ({plan.parameterization}, base width {plan.base_width:g}): "
        "the study took a copy with that undone, and transformed copies of its own",
    )


def undo(model: nn.Module) -> None:
    """Take a transform back: initialization as it was, up to rounding, and no hooks.

    Args:
        model: A transformed model, changed in place.

    Raises:
        StudyError: It is folded.
    """
    root, plan = plan_of(model)
    _check(root, root)
    parameters = dict(root.named_parameters())
    with torch.no_grad():
        for entry in plan.entries:
            # Factors of exactly 1 touched nothing: those parameters stay as they are to the bit.
            if entry.init_factor != 1:
                parameters[entry.geometry.name].div_(entry.init_factor)
    strip(root)
    delattr(root, ATTRIBUTE)
    unmark(root)


def _check(source: nn.Module, root: nn.Module) -> None:
    wrapper = type(source).__name__ in {"OptimizedModule", "DistributedDataParallel"}
    if source is not root and not wrapper:
        name = next(path for path, module in source.named_modules() if module is root)
        raise StudyError(
            f"only {name} of this {type(source).__name__} is transformed; give the study that module"
        )
    if plan_of(root)[1].folded:
        raise StudyError("the model is folded; give the study the model as it was built")
