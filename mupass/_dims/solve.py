"""solve: from a model to its dimensions, with what a second instance and the caller settle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mupass._capture.capture import capture
from mupass._capture.graph import Capture
from mupass._dims.base_shapes import BaseShapes
from mupass._dims.infer import Inference, infer
from mupass._dims.names import DimNames, name_dims
from mupass._dims.second_instance import Second, compare
from mupass._dims.space import SizeConflict
from mupass._errors import InferenceError


@dataclass(frozen=True)
class Solution:
    """A model's graph with its dimensions solved.

    Attributes:
        captured: The graph.
        alone: What one model tells.
        solved: The same, with what a second instance and the caller settle.
        names: Names of dimensions.
        second: What the second instance tells.
    """

    captured: Capture
    alone: Inference
    solved: Inference
    names: DimNames
    second: Second

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Where verdicts contradict each other, once each."""
        return tuple(dict.fromkeys(self.solved.verdicts.conflicts))


def solve(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    base: nn.Module | BaseShapes | None,
    dims: Mapping[str, str],
    strict: bool,
) -> Solution:
    """Capture a model and infer its dimensions.

    Args:
        model: The module.
        args: Positional inputs.
        kwargs: Keyword inputs.
        base: A second instance at another width, or a file of base shapes, or None.
        dims: Verdicts that the caller settles, as for `analyze`.
        strict: Whether an operator without a rule is an error.

    Raises:
        InferenceError: The caller's verdicts contradict each other or the graph.
    """
    if not isinstance(dims, Mapping):
        raise InferenceError(f"dims must be a mapping from name to 'finite' or 'infinite', not {dims!r}")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    captured = capture(model, args, kwargs)
    try:
        alone = infer(captured, {}, strict)
    except SizeConflict as error:  # the export misstates a size: record a concrete run instead
        captured = capture(model, args, kwargs, error)
        alone = infer(captured, {}, strict)
    without_caller, second = alone, Second()
    if base is not None:
        # The base model decides; inference from one model only says where it would have been wrong.
        if isinstance(base, BaseShapes):
            second = base.settle(alone, shapes)
        else:
            second = compare(captured, alone, shapes, base, args, kwargs)
        without_caller = infer(captured, second.axes, strict, second.dims)
    names = name_dims(model, without_caller, alone)
    by_axis, by_dim = _overrides(dims, shapes, names)
    overrides = {**second.axes, **by_axis}
    solved = infer(captured, overrides, strict, {**second.dims, **by_dim}) if dims else without_caller
    solution = Solution(captured, alone, solved, names, second)
    if solution.conflicts and not second.axes:
        raise InferenceError(solution.conflicts[0])
    return solution


def _overrides(
    dims: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], names: DimNames
) -> tuple[dict[tuple[str, int], tuple[bool, str]], dict[int, tuple[bool, str]]]:
    """Read the caller's verdicts, by parameter axis and by dimension (a head_dim inside a product, say)."""
    by_axis: dict[tuple[str, int], tuple[bool, str]] = {}
    by_dim: dict[int, tuple[bool, str]] = {}
    for pattern, verdict in dims.items():
        _check_override(pattern, verdict)
        of_that_name = names.find(pattern)
        matching = [] if of_that_name else _matching_axes(pattern, shapes)
        if not of_that_name and not matching:
            raise InferenceError(f"dims[{pattern!r}] matches no dimension and no parameter:axis")
        settled = (verdict == "infinite", f"dims[{pattern!r}] = {verdict!r}")
        by_axis.update(dict.fromkeys(matching, settled))
        by_dim.update(dict.fromkeys(of_that_name, settled))
    return by_axis, by_dim


def _check_override(pattern: object, verdict: object) -> None:
    """Refuse what is no name, no regular expression or no verdict."""
    if not isinstance(pattern, str) or not isinstance(verdict, str):
        raise InferenceError(f"dims maps names to 'finite' or 'infinite', not {pattern!r} to {verdict!r}")
    if verdict not in ("finite", "infinite"):
        raise InferenceError(f"dims[{pattern!r}] must be 'finite' or 'infinite', not {verdict!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InferenceError(
            f"dims[{pattern!r}] is no dimension and no regular expression: {error}"
        ) from error


def _matching_axes(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """Return every (parameter, axis) that a regular expression matches, written ``parameter:axis``."""
    matching = []
    for name, shape in shapes.items():
        for axis in range(len(shape)):
            if re.fullmatch(pattern, f"{name}:{axis}"):
                matching.append((name, axis))
    return matching
