"""Builds a model at new sizes and proves it: every operator must have the shape that the terms predict.

A Hugging Face model is built anew from its rewritten configuration, any other is copied with its numbers
rewritten. Which number stands for which dimension is searched for: a run that goes wrong points at a module,
and other options of the numbers near it are tried for as long as the run gets further.
Where none does, the search goes back to the choice before.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mupass._errors import ResizeError
from mupass._resize.attributes import Attributes, Slot, nearest
from mupass._resize.builders import Builder
from mupass._resize.prediction import Failure, Target

TRIES = 60


def rebuild(build: Builder, attributes: Attributes, target: Target, name: str) -> nn.Module:
    """Search for the numbers with which the model runs as predicted.

    Args:
        build: Builds a candidate from a choice of options.
        attributes: The options.
        target: What it must look like.
        name: The model's class, for the error.

    Returns:
        The resized model.

    Raises:
        ResizeError: None was found.
    """
    candidate = build({})
    first = target.failure(candidate)
    if first is None:
        return candidate
    # Choices of which each got further than the one before it.
    path: list[tuple[dict[Slot, int], Failure]] = [({}, first)]
    furthest = first
    tried: list[dict[Slot, int]] = [{}]
    while path and len(tried) <= TRIES:
        choice, failure = path[-1]
        trial = next(
            (trial for trial in _trials(attributes, choice, failure.where) if trial not in tried), None
        )
        if trial is None:
            path.pop()  # nothing leads on from here, so that what led here was wrong: 10 x 4 for 5 x 8
            continue
        tried.append(trial)
        candidate = build(trial)
        next_failure = target.failure(candidate)
        if next_failure is None:
            return candidate
        # The first that gets further is kept, and the search goes on from there.
        if next_failure.score > failure.score:
            path.append((trial, next_failure))
            furthest = max(furthest, next_failure, key=lambda reached: reached.score)
    raise ResizeError(
        f"{name} cannot be resized, for its code holds a size that no attribute tells: {furthest.message}"
        + (f" (at first: {first.message})" if first.message != furthest.message else "")
    )


def _trials(attributes: Attributes, choice: Mapping[Slot, int], where: str) -> list[dict[Slot, int]]:
    """Return the choices that differ from the present one in a slot, those near the blamed module first."""
    trials = []
    for slot in nearest(attributes.slots, where):
        for option in range(len(slot.options)):
            if option != choice.get(slot, 0):
                trials.append({**choice, slot: option})
    return trials
