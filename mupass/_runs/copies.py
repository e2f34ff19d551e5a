"""Copies: one model at several widths, transformed, with as many initializations as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mupass._analyze import analyze
from mupass._errors import StudyError, each_matter_once
from mupass._resize.resize import resize
from mupass._runs.batches import Batch, move
from mupass._runs.checks import check_functions, check_widths
from mupass._scales.init import InitChoice
from mupass._scales.plan import Plan, plan_of
from mupass._transform import transform

Width = int | Mapping[str, int]
Source = nn.Module | Callable[[Any], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]
SMALLEST = 64  # below, effects of finite width are as large as a wrong power


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
        model = deepcopy(self.models[index])
        if seed:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        order = torch.randperm(parameter.numel(), generator=generator)
                        shuffled = parameter.flatten()[order.to(parameter.device)]
                        parameter.copy_(shuffled.view_as(parameter))
        return model


@each_matter_once()
def make_copies(
    source: Source,
    widths: Sequence[Width] | None,
    batches: Sequence[Batch],
    *,
    parameterization: str = "mup",
    base: Any = None,
    dims: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
    init: InitChoice = "auto",
    dtype: torch.dtype | None = None,
    least: int = 2,
) -> tuple[Copies, list[Batch]]:
    """Resize one model, or build it by a function, at several widths, and transform each.

    Args:
        source: A model, which is not changed, or a function of a width.
        widths: As for `mupass.resize`, or what the function takes; three around `SMALLEST` if left out.
        batches: Batches; the first is the example input.
        parameterization: As for `mupass.transform`.
        base: As for `mupass.transform`; the narrowest copy if left out.
        dims: As for `mupass.transform`.
        prepare: Applied to each transformed copy.
        init: As for `mupass.transform`.
        dtype: Precision of the copies; that of the model if left out.
        least: Smallest number of different widths.

    Returns:
        The copies, the narrowest first, and the batches on their device.

    Raises:
        StudyError: Fewer widths than wanted, or the same twice.
    """
    check_widths(source, widths)
    check_functions(prepare=prepare)
    build = _builder(source, batches[0], dims, init)
    if widths is None:
        if not isinstance(source, nn.Module):
            raise StudyError("widths= is needed with a function that builds the model")
        widths = default_widths(analyze(source, batches[0].inputs).width)
    raw = [build(width).to(dtype=dtype) for width in widths]
    device = next((p.device for p in raw[0].parameters()), torch.device("cpu"))
    batches = [move(batch, device, dtype) for batch in batches]
    inputs = batches[0].inputs
    raw.sort(key=_numbers)
    if len(set(map(_numbers, raw))) < max(len(raw), least):
        raise StudyError(f"at least {least} different widths are needed, not {list(widths)}")
    done = []
    for model in raw:
        # The narrowest copy is the base: for the others a second instance, which settles all dimensions.
        own = analyze(raw[0], inputs, dims=dims).width if model is raw[0] else raw[0]
        chosen = own if base is None else base
        copy = transform(
            deepcopy(model),
            inputs,
            base=chosen,
            parameterization=parameterization,
            init=init,
            dims=None if isinstance(chosen, nn.Module) else dims,
        )
        done.append(prepare(copy) if prepare else copy)
    sizes = tuple(plan_of(model)[1].width for model in done)
    return Copies(sizes, tuple(done), raw[0]), list(batches)


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def default_widths(width: int) -> tuple[int, ...]:
    """Return three widths, doubling, that are the model's own times powers of two.

    Args:
        width: The model's width.
    """
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


def _builder(
    source: Source, batch: Batch, dims: Mapping[str, str] | None, init: InitChoice
) -> Callable[[Any], nn.Module]:
    if isinstance(source, nn.Module):
        return lambda width: resize(
            source, width, example_inputs=batch.inputs, dims=dims, init=init, seed=0, fresh=True
        )

    def build(width: Any) -> nn.Module:
        try:
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
