"""Copies of models: `copy.deepcopy`, and functions in their attributes that know modules of the source."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def deepcopy(model: ModelT, memo: dict[int, Any] | None = None) -> ModelT:
    """Return a copy of a model that shares nothing with it.

    `copy.deepcopy` keeps functions as they are. One in an attribute or among the hooks of a module,
    ``self.mlpf = lambda x: m.c_proj(act(m.c_fc(x)))`` of minGPT, would run the modules of the source.

    Args:
        model: Any module.
        memo: As for `copy.deepcopy`: what stands for objects of the source, by their id.
    """
    memo = {} if memo is None else memo
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        attributes = vars(module)
        for name, value in attributes.items():
            if isinstance(value, FunctionType):
                attributes[name] = _rebound(value, memo)
            elif isinstance(value, dict):  # hooks
                for key, function in value.items():
                    if isinstance(function, FunctionType):
                        value[key] = _rebound(function, memo)
    return copied


def _rebound(function: FunctionType, memo: Mapping[int, Any]) -> FunctionType:
    """Return a function with what it holds of the source replaced by the copy; itself if it holds none."""
    cells = list(function.__closure__ or ())
    contents = [_copy_of(_content(cell), memo) for cell in cells]
    defaults = [_copy_of(value, memo) for value in function.__defaults__ or ()]
    unchanged = all(new is _content(cell) for new, cell in zip(contents, cells, strict=True))
    if unchanged and all(new is old for new, old in zip(defaults, function.__defaults__ or (), strict=True)):
        return function
    twin_cells = tuple(
        cell if new is _content(cell) else CellType(new) for new, cell in zip(contents, cells, strict=True)
    )
    twin = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        tuple(defaults) or None,
        twin_cells or None,
    )
    twin.__kwdefaults__, twin.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(twin).update(vars(function))
    return twin


def _content(cell: CellType) -> Any:
    """Return what a cell holds; None while it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _copy_of(value: Any, memo: Mapping[int, Any]) -> Any:
    """Return what stands for a value of the source in its copy; the value itself if nothing does."""
    if isinstance(value, (nn.Module, Tensor)):
        return memo.get(id(value), value)
    return _rebound(value, memo) if isinstance(value, FunctionType) else value
