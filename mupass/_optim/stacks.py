"""Stacks: blocks of equal shape from all parameters in one tensor, with the state they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from mupass._optim.blocks import Blocking
from mupass._taps.factors import factor_dtype

Slot = tuple[str, int]  # parameter, block
Function = TypeVar("Function", bound=Callable[..., Any])


class Stack:
    """Blocks of one shape, ``[K, *shape]``, and what an optimizer remembers of them.

    Attributes:
        slots: Parameter and number of each block.
        shape: Sizes of one block.
        dtype: Precision of the arithmetic, float32 or better.
        device: Where the parameters are.
        state: Tensors whose first axis is K; all of them belong to the saved state.
    """

    def __init__(
        self, slots: Sequence[Slot], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.shape, self.dtype, self.device = list(slots), shape, dtype, device
        self.state: dict[str, Tensor] = {}
        self._room = self.zeros(*shape)  # for gradients, the same memory at every step: fresh pages cost time

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

    def gather(self, blocks: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, Tensor | None, list[Slot]]:
        """Stack the gradients of this step.

        Args:
            blocks: Parameter -> blocks of its gradient; parameters without a gradient are missing.

        Returns:
            ``[K', *shape]``, valid until the next call; the slots that these are (None for all, in order);
            the slots left out, the square of whose norm is not finite: they would spoil every average.
        """
        at = [i for i, (name, _) in enumerate(self.slots) if name in blocks]
        if not at:
            return self._room[:0], torch.tensor(at, device=self.device), []
        g = self._room[: len(at)]
        torch.stack([blocks[self.slots[i][0]][self.slots[i][1]] for i in at], out=g)
        fine = torch.linalg.vector_norm(g.flatten(1), dim=1).square().isfinite()
        if bool(fine.all()):
            return g, None if len(at) == len(self.slots) else torch.tensor(at, device=self.device), []
        lost = [self.slots[at[i]] for i in (~fine).nonzero().flatten().tolist()]
        return g[fine], torch.tensor(at, device=self.device)[fine], lost

    def view(self, at: Tensor | None) -> dict[str, Tensor]:
        """Return the state of some slots: the tensors themselves for all of them, copies for a part.

        Args:
            at: Slots, or None for all.
        """
        return self.state if at is None else {name: tensor[at] for name, tensor in self.state.items()}

    def put(self, at: Tensor | None, part: Mapping[str, Tensor]) -> None:
        """Write back what `view` gave, after it was changed in place.

        Args:
            at: The slots that `view` was asked for.
            part: Its result.
        """
        if at is not None:
            for name, tensor in part.items():
                self.state[name][at] = tensor


def make_stacks(blockings: Mapping[str, Blocking], parameters: Mapping[str, Tensor]) -> list[Stack]:
    """Sort the blocks of all parameters by shape, precision and device.

    Args:
        blockings: How each parameter is cut.
        parameters: The parameters, by the same names.
    """
    found: dict[Any, list[Slot]] = defaultdict(list)
    for name, parameter in parameters.items():
        for i, block in enumerate(blockings[name].cut(torch.empty(parameter.shape, device="meta"))):
            found[block.shape, factor_dtype(parameter), parameter.device].append((name, i))
    return [Stack(slots, *key) for key, slots in found.items()]


def compiled(function: Function) -> Function:
    """Return a function compiled for one shape.

    Dynamo keeps graphs by code object and stops after a few of them, and a model may have any number of
    shapes. So every shape has a code object of its own.

    Args:
        function: Pure tensor code without graph breaks; numbers that may change must be tensors.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)  # type: ignore[return-value]
