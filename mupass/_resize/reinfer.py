"""The resized copy, inferred anew: it must tell the same widths, and lead back to its source's sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mupass._dims.infer import Inference
from mupass._dims.scaled import Scaled
from mupass._dims.solve import solve
from mupass._errors import MupassError, ResizeError
from mupass._resize.sizes import NewSizes


def check_anew(resized: nn.Module, sizes: NewSizes, inputs: Any, dims: Mapping[str, str]) -> None:
    """Infer the widths of a resized copy and compare them with those it was made by.

    What a policy decided in either is left out: a policy may look at sizes. Where all of the model was scaled
    by one factor, the copy's own terms must give back the size of every axis of the source.

    Args:
        resized: The copy.
        sizes: The sizes that it was given.
        inputs: Positional and keyword inputs.
        dims: Verdicts that the caller settled.

    Raises:
        ResizeError: They differ; the message names the axes.
    """
    if not sizes.changes:
        return
    args, kwargs = inputs
    # The copy is solved as any model, without a word about its source.
    try:
        inferred_again = solve(resized, args, kwargs, None, dims, strict=True).solved
    except MupassError as error:
        raise ResizeError(f"the resized copy cannot be inferred anew: {error}") from error
    wrong = list(_differences(sizes, inferred_again))
    if wrong:
        remainder = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ResizeError(
            f"the resized copy tells other widths than its source: {'; '.join(wrong[:3])}{remainder}. Settle "
            "them by dims=, or give sizes by name"
        )


def _differences(sizes: NewSizes, again: Inference) -> Iterator[str]:
    # Where sizes were given by name there is no one factor to go back by.
    restored = Scaled(again, {}, 1 / sizes.factor) if not sizes.given else None
    space = sizes.solved.engine.space
    for name, row in sizes.solved.dims.items():
        for axis, (dim, counterpart) in enumerate(zip(row, again.dims[name], strict=True)):
            before, after = sizes.solved.verdict(name, axis), again.verdict(name, axis)
            # A policy may look at sizes, and an axis of one growing factor of size 1 cannot tell.
            if before.policy or after.policy or name in again.overlooked or _is_single(sizes, dim):
                continue
            if before.infinite != after.infinite:
                yield f"{name}:{axis} {'grows' if after.infinite else 'is fixed'} there ({after.why})"
            elif restored is not None:
                size, returned = space.size(dim), restored.exact(counterpart)
                if abs(returned - size) > 1e-6 * size:
                    yield f"{name}:{axis} leads back to {returned:g}, not to {size}"


def _is_single(sizes: NewSizes, dim: int) -> bool:
    """Whether the copy has a growing factor of an axis once only, such as one head: it cannot tell then."""
    space = sizes.solved.engine.space
    for factor in space.members_of(dim, "product"):
        if sizes.solved.verdicts.grows(factor) and sizes.maybe(factor) == 1:
            return True
    return False
