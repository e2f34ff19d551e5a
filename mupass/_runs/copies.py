"""Copies: one model at several widths, transformed, with as many initializations as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypedDict

import torch
from torch import nn

from mupass._analyze import analyze
from mupass._capture.copying import deepcopy
from mupass._errors import StudyError, each_matter_once
from mupass._resize.resize import resize
from mupass._runs.batches import Batch, in_precision, move
from mupass._runs.checks import check_functions, check_widths
from mupass._scales.init import InitChoice
from mupass._scales.plan import Plan, plan_of
from mupass._transform import transform

Width = int | Mapping[str, int]
Source = nn.Module | Callable[[Any], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]
SMALLEST = 64  # below, effects of finite width are as large as a wrong power


class CopyKeywords(TypedDict, total=False):
    """What `coord_check`, `sweep` and `transfer` all take, for type checkers and editors."""

    parameterization: str
    dims: Mapping[str, str] | None
    prepare: Prepare | None
    init: InitChoice


@dataclass(frozen=True)
class CopyOptions:
    """How every copy of a model is transformed.

    Attributes:
        parameterization: As for `mupass.transform`.
        base: As for `mupass.transform`; the narrowest copy if None.
        dims: As for `mupass.transform`.
        prepare: Applied to each transformed copy.
        init: As for `mupass.transform`.
        dtype: Precision of the copies; None for that of the model.
    """

    parameterization: str = "mup"
    base: Any = None
    dims: Mapping[str, str] | None = None
    prepare: Prepare | None = None
    init: InitChoice = "auto"
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Copies:
    """Transformed copies, one for each width.

    Attributes:
        widths: Sizes of the dimension that names the model's width.
        models: The copies.
        narrow: The narrowest one as it was before its transform: a base model for all others.
    """

    widths: tuple[int, ...]
    models: tuple[nn.Module, ...]
    narrow: nn.Module

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Their plans."""
        return tuple(plan_of(model)[1] for model in self.models)

    def draw(self, index: int, seed: int) -> nn.Module:
        """Return a copy with another initialization.

        Entries of every trainable parameter are shuffled: entries that are independent and alike are as
        likely in any order, so this is another draw of the same law, whatever the law.

        Args:
            index: Which width.
            seed: Number of the initialization; 0 is the one that the copy has.
        """
        # A copy of the transformed copy, so that a run changes nothing that others see.
        model = deepcopy(self.models[index])
        if not seed:
            return model
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = parameter.detach()
                # A seed for each initialization, the same on every device.
                order = torch.randperm(values.numel(), generator=generator).to(values.device)
                values.copy_(values.flatten()[order].view_as(values))
        return model


@each_matter_once()
def make_copies(
    source: Source,
    widths: Sequence[Width] | None,
    batches: Sequence[Batch],
    options: CopyOptions,
    least: int = 2,
) -> tuple[Copies, list[Batch]]:
    """Resize one model, or build it by a function, at several widths, and transform each.

    Args:
        source: A model, which is not changed, or a function of a width.
        widths: As for `mupass.resize`, or what the function takes; three around `SMALLEST` if left out.
        batches: Batches; the first is the example input.
        options: How the copies are transformed.
        least: Smallest number of different widths.

    Returns:
        The copies, the narrowest first, and the batches on their device.

    Raises:
        StudyError: Fewer widths than wanted, or the same twice.
    """
    check_widths(source, widths)
    check_functions(prepare=options.prepare)
    build = _builder(source, batches[0], options)
    if widths is None:
        if not isinstance(source, nn.Module):
            raise StudyError("widths= is needed with a function that builds the model")
        widths = default_widths(analyze(source, batches[0].inputs).width)
    # Precision first: a transform reads the law of the values as they will be trained.
    models = [_in_precision(build(width), options.dtype) for width in widths]
    # The number of parameters grows with the width, whatever form widths are given in.
    models.sort(key=_count_entries)
    if len(set(map(_count_entries, models))) < max(len(models), least):
        raise StudyError(f"at least {least} different widths are needed, not {list(widths)}")
    device = next((parameter.device for parameter in models[0].parameters()), torch.device("cpu"))
    moved_batches = [move(batch, device, options.dtype) for batch in batches]
    narrow = models[0]
    transformed = [_transformed(model, narrow, moved_batches[0].inputs, options) for model in models]
    # The plan's own word for the width, which the caller may not know.
    sizes = tuple(plan_of(model)[1].width for model in transformed)
    return Copies(sizes, tuple(transformed), narrow), moved_batches


def _in_precision(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a model in a precision; ``model.to`` would make real numbers of complex ones."""
    if any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        return model._apply(lambda tensor: in_precision(tensor, dtype))  # type: ignore[no-untyped-call]
    return model.to(dtype=dtype)


def _transformed(model: nn.Module, narrow: nn.Module, inputs: Any, options: CopyOptions) -> nn.Module:
    """Return a transformed copy of a model; the narrowest model is the base unless there is another."""
    base = options.base
    # The narrowest copy is the base itself, at its own width.
    if base is None and model is narrow:
        base = analyze(narrow, inputs, dims=options.dims).width
    elif base is None:
        base = narrow
    # A base model is a second instance, which settles all dimensions itself; so does a file of base shapes.
    dims = None if isinstance(base, (nn.Module, str, PathLike)) else options.dims
    copy = transform(
        deepcopy(model), inputs, base=base, parameterization=options.parameterization, init=options.init,
        dims=dims,
    )  # fmt: skip
    return options.prepare(copy) if options.prepare else copy


def _count_entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def default_widths(width: int) -> tuple[int, ...]:
    """Return three widths, doubling, that are the model's own times powers of two.

    Args:
        width: The model's width.
    """
    # The model's own width times a power of two, at least 64.
    smallest = halved(width)
    while smallest < SMALLEST:
        smallest *= 2
    return (smallest, 2 * smallest, 4 * smallest)


def halved(width: int) -> int:
    """Return a width, halved while the half is whole and at least `SMALLEST`.

    Args:
        width: The model's width.
    """
    while width >= 2 * SMALLEST and width % 2 == 0:
        width //= 2
    return width


def _builder(source: Source, batch: Batch, options: CopyOptions) -> Callable[[Any], nn.Module]:
    """Return what makes a model of a width: `resize` of a model, or the caller's function."""
    if isinstance(source, nn.Module):
        # One seed for all widths, so that parameters of fixed size are drawn alike.
        return lambda width: resize(
            source, width, example_inputs=batch.inputs, dims=options.dims, init=options.init, seed=0,
            fresh=True,
        )  # fmt: skip

    def build(width: Any) -> nn.Module:
        try:
            # The function may draw initial weights: the caller's random state stays.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = source(width)
        except Exception as error:
            raise StudyError(
                f"the function that builds the model fails at width {width!r}: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise StudyError(f"the function gave a {type(model).__name__} at width {width}, not an nn.Module")
        return model

    return build
