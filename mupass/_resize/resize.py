"""resize: the same architecture at another width, from one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mupass._capture.graph import parameter_names
from mupass._capture.inputs import as_call, find_inputs
from mupass._dims.infer import ONE_ENTRY
from mupass._dims.policies import CODE_FEATURES, CODE_NUMBER
from mupass._dims.solve import solve
from mupass._errors import ResizeError, warn
from mupass._resize.attributes import Attributes, handled_dims
from mupass._resize.builders import by_config, by_copy, has_constructor
from mupass._resize.draw import Draw, initialize
from mupass._resize.gains import follow_fan_in, sizes_of_layers
from mupass._resize.norm_groups import follow_heads
from mupass._resize.prediction import target_of
from mupass._resize.rebuild import rebuild
from mupass._resize.reinfer import check_anew
from mupass._resize.sizes import NewSizes
from mupass._scales.init import InitChoice

NAMED = 6  # matters that a warning tells


def resize(
    model: nn.Module,
    width: int | Mapping[str, int] | None = None,
    *,
    scale: float | None = None,
    example_inputs: Any = None,
    dims: Mapping[str, str] | None = None,
    init: InitChoice = "auto",
    device: torch.device | str | None = None,
    seed: int | None = None,
    fresh: bool = False,
) -> nn.Module:
    """Build a narrower or wider copy of a model: same class, same parameter names, new sizes.

    Every growing dimension keeps its ratio to the width unless it is named. Parameters that change are drawn
    by the model's own initialization law at the new sizes, all others are copied. Integer attributes and
    configuration entries that hold a size are rewritten, and the result is captured again: each operator must
    have exactly the shape that the dimension terms predict, or the resize is refused. A Hugging Face model is
    built anew from its rewritten configuration, and its own code initializes what no law explains.

    Args:
        model: The module, with its initial weights; not changed. A meta-device model gives a real copy of any
            width, initialized by the modules' own code.
        width: New size of the model's width, or new sizes by dimension name (as `analyze` prints them).
        scale: Alternatively, the factor on every growing dimension.
        example_inputs: As for `mupass.analyze`.
        dims: As for `mupass.analyze`.
        init: Law of the present values, as for `mupass.transform`.
        device: Device of the copy; by default that of the model, or the CPU for a meta-device model.
        seed: Seed of the new parameters; the global random state is left alone when given.
        fresh: Draw all parameters anew, those of unchanged size too.

    Returns:
        The resized copy.

    Raises:
        ResizeError: A dimension would not be a whole number, a name is unknown, sizes contradict each other,
            values follow a pattern that is not known, or the code holds a size that cannot be found.

    Example:
        >>> import mupass, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> mupass.resize(model, 256)
        Sequential(
          (0): Linear(in_features=6, out_features=256, bias=True)
          (1): ReLU()
          (2): Linear(in_features=256, out_features=3, bias=True)
        )
    """
    parameter_names(model)  # refuses what cannot be analysed on any input
    args, kwargs = find_inputs(model) if example_inputs is None else as_call(example_inputs)
    home = next(iter(model.parameters())).device
    args, kwargs = tree_map(lambda x: x.to(home) if isinstance(x, Tensor) else x, (args, kwargs))
    dims = dims or {}
    _check_seed(seed)
    # Captured once: the sizes, the new tensors and the proof come from this graph.
    inferred = solve(model, args, kwargs, None, dims, strict=True)
    captured, solved = inferred.captured, inferred.solved
    sizes = NewSizes.of(solved, inferred.names, width, scale)
    target_device = _target_device(home, device)
    target = target_of(model, captured, sizes, (args, kwargs), target_device)
    _warn_of_policies(model, sizes, target.shapes)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    draw = Draw(model, captured, sizes, init, fresh, generator)
    # A Hugging Face constructor knows its own initialization, and what else follows from a configuration.
    own_code = (sizes.changes or home.type == "meta") and has_constructor(model)
    tensors: dict[str, Tensor] = {}
    for name, values in draw.parameters(target.shapes, own_code).items():
        # Frozen parameters stay frozen.
        trained = model.get_parameter(name).requires_grad
        tensors[name] = nn.Parameter(values.to(target_device), trained)
    handled = handled_dims(captured, solved)
    if own_code:
        attributes = Attributes(sizes, handled)
        build = by_config(model, attributes, tensors, target_device, seed)
    else:
        # Of a copy all numbers are rewritten, buffers included.
        known = sizes_of_layers(model, target.shapes) | follow_fan_in(model, target.shapes)
        known |= follow_heads(model, captured, sizes)
        attributes = Attributes(sizes, handled, known=known)
        for name, buffer in draw.buffers(attributes).items():
            tensors[name] = buffer.to(target_device)
        build = by_copy(model, attributes, tensors)
    resized = rebuild(build, attributes, target, type(model).__name__)
    if not own_code:
        _warn_of_roots(attributes)
    if home.type == "meta" and not own_code:
        initialize(resized, seed)
    check_anew(resized, sizes, target.inputs, dims)
    return resized


def _target_device(home: torch.device, wanted: torch.device | str | None) -> torch.device:
    """Return the device of the copy; a meta-device model has no home for values."""
    if wanted is not None:
        return torch.device(wanted)
    return torch.device("cpu") if home.type == "meta" else home


def _warn_of_roots(attributes: Attributes) -> None:
    """Name the numbers that were left as they are though they may be roots of a width."""
    roots = [f"{path}.{name} = {what}".lstrip(".") for (path, name), what in attributes.doubts.items()]
    if roots:
        text = (
            "numbers that may be roots of a width or of data as long stay; set on the copy what is computed "
            f"from the width: {_first(roots, ', ', '')}"
        )
        warn([text])


def _warn_of_policies(model: nn.Module, sizes: NewSizes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Say which axes got another size, or kept theirs, by a policy alone, which one model cannot settle."""
    if not sizes.changes:
        return
    axes_of: dict[tuple[int, str], list[str]] = {}  # dimension and policy -> its axes of parameters
    kept: list[str] = []  # axes that features or numbers of the code fix
    single: list[str] = []  # axes of one entry that have several in other blocks, where they grow
    for name, parameter in model.named_parameters():
        for axis, before in enumerate(parameter.shape):
            dim = sizes.solved.engine.space.find(sizes.solved.dims[name][axis])
            if dim in sizes.given:  # what the caller sizes by name is settled
                continue
            verdict = sizes.solved.verdict(name, axis)
            after = shapes[name][axis]
            # What stays as it is changes nothing.
            if verdict.policy and before != after:
                matter = dim, verdict.why.removeprefix("policy: ")
                axes_of.setdefault(matter, []).append(f"{name}:{axis} ({before} to {after})")
            # Sizes that the code writes out, and sinusoids of so many features, which it may as well make as
            # many as the width has units.
            if verdict.why.startswith((CODE_FEATURES, CODE_NUMBER)) and before == after:
                kept.append(f"{name}:{axis} ({before})")
            if verdict.why.startswith(ONE_ENTRY):
                single.append(f"{name}:{axis}")
    if axes_of:
        warn(
            [
                "sizes that one model cannot settle follow policies; say dims={'PARAMETER:AXIS': 'finite'} "
                f"of those that stay: {_first(_matters(axes_of), '; ', ';')}"
            ]
        )
    if kept:
        warn(
            [
                "features and numbers of the code stay as they are, which one model cannot settle; say "
                f"dims={{'PARAMETER:AXIS': 'infinite'}} of those that grow: {_first(kept, ', ', '')}"
            ]
        )
    if single:
        warn(
            [
                "axes of one entry, such as one head, stay so, though they grow in other blocks; resize a "
                f"model that has several there if these should grow too: {_first(single, ', ', '')}"
            ]
        )


def _matters(axes_of: Mapping[tuple[int, str], Sequence[str]]) -> list[str]:
    """Return for every dimension its first axis, how many more it has, and its policy."""
    matters = []
    for (_, reason), axes in axes_of.items():
        remainder = f" and {len(axes) - 1} more" if len(axes) > 1 else ""
        matters.append(f"{axes[0]}{remainder}: {reason}")
    return matters


def _first(items: Sequence[str], separator: str, end: str) -> str:
    """Return the first items as a list, and behind its end how many more there are."""
    unnamed = f"{end} and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return separator.join(items[:NAMED]) + unnamed


def _check_seed(seed: int | None) -> None:
    """Refuse a seed that is no whole number."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ResizeError(f"seed must be a whole number, not {seed!r}")
