"""Stacks: blocks of equal shape from all parameters in one tensor, with the state they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mupass._optim.matrix.blocking import Blocking
from mupass._optim.vocabulary import State, Tensors
from mupass._taps.factors import factor_dtype

Slot = tuple[str, int]  # parameter, block
TRITON = (7, 0)  # capability of a GPU from which it is supported
Function = TypeVar("Function", bound=Callable[..., Any])


class Stack:
    """Blocks of one shape, ``[K, *shape]``, and what an optimizer remembers of them.

    Attributes:
        slots: Parameter and number of each block.
        shape: Sizes of one block.
        dtype: Precision of the arithmetic, float32 or better.
        device: Where the parameters are; meta where another rank keeps the state.
        state: Tensors whose first axis is K; all of them belong to the saved state.
        incidents: Kind of incident and place within a block -> ``[K]``, how often since the last report.
    """

    def __init__(
        self, slots: Sequence[Slot], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.shape, self.dtype, self.device = list(slots), shape, dtype, device
        self.state: State = {}
        self.incidents: dict[tuple[str, str], Tensor] = {}

    def zeros(self, *shape: int) -> Tensor:
        """Return ``[K, *shape]`` of zeros."""
        return torch.zeros(len(self.slots), *shape, dtype=self.dtype, device=self.device)

    def each(self, value: Callable[[str], float]) -> Tensor:
        """Return ``[K]``, a number for each slot.

        Args:
            value: Of a parameter's name.
        """
        by_name = {name: value(name) for name, _ in self.slots}
        return torch.tensor([by_name[name] for name, _ in self.slots], dtype=self.dtype, device=self.device)

    def runs(self, present: Collection[str]) -> list[slice]:
        """Return the slots of some parameters, as runs of slots that stand together.

        Args:
            present: Names of the parameters.
        """
        run_list: list[slice] = []
        for number, (name, _) in enumerate(self.slots):
            if name not in present:
                continue
            start = number
            # A neighbour of the last run makes it longer.
            if run_list and run_list[-1].stop == number:
                start = run_list.pop().start
            run_list.append(slice(start, number + 1))
        return run_list

    def gather(self, blocks: Mapping[str, Sequence[Tensor]], at: slice) -> Tensor:
        """Return the blocks of some slots in one tensor.

        Args:
            blocks: Parameter -> its blocks.
            at: The slots.
        """
        return torch.stack([blocks[name][block] for name, block in self.slots[at]]).to(self.dtype)

    def note(self, kind: str, happened: Tensor, at: slice | Tensor, place: str = "") -> None:
        """Count incidents on the device.

        Args:
            kind: What happened.
            happened: Where, one entry a slot.
            at: Those slots.
            place: Where within a block, to be put before its name.
        """
        if (kind, place) not in self.incidents:
            self.incidents[kind, place] = self.zeros()
        self.incidents[kind, place][at] += happened

    def entries(self, name: str) -> State:
        """Return a parameter's part of the state, as views.

        Args:
            name: The parameter.
        """
        slices = self.runs([name])
        if not slices:
            return {}
        size = "x".join(map(str, self.shape))
        return {f"{size}.{key}": tensor[slices[0]] for key, tensor in self.state.items()}


def make_stacks(
    blockings: Mapping[str, Blocking], parameters: Tensors, device: torch.device | None = None
) -> list[Stack]:
    """Sort the blocks of all parameters by shape, precision and device.

    Args:
        blockings: How each parameter is cut.
        parameters: The parameters, by the same names.
        device: In place of the parameters' own.
    """
    slots_of: dict[Any, list[Slot]] = defaultdict(list)
    for name, parameter in parameters.items():
        for block, shape in enumerate(blockings[name].shapes()):
            slots_of[shape, factor_dtype(parameter), device or parameter.device].append((name, block))
    return [Stack(slots, *key) for key, slots in slots_of.items()]


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """Return whether updates on a device are compiled.

    Args:
        wanted: As asked for. None is yes where a compiler for the device is there and gains: on CUDA with
            Triton.
        device: The device.
    """
    if wanted is not None or device.type != "cuda" or not torch.cuda.is_available():
        return bool(wanted)
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= TRITON


def compiled(function: Function) -> Function:
    """Return a function compiled for one shape.

    Dynamo keeps graphs by code object and stops after a few of them, and a model may have any number of
    shapes. So every shape has a code object of its own.

    Args:
        function: Pure tensor code without graph breaks; numbers that may change must be tensors.
    """
    assert isinstance(function, FunctionType)
    own_function = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    own_function.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own_function, fullgraph=True, dynamic=False)  # type: ignore[return-value]
