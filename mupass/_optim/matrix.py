"""What Shampoo, SOAP and Muon share: parameters as stacks of matrices, routed by role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.base import PlannedOptimizer
from mupass._optim.blocks import WHOLE, Blocking
from mupass._optim.checks import check_words
from mupass._optim.parallel import sharded_like, whole, world_size
from mupass._optim.spectral import with_unit_norm
from mupass._optim.stacks import Slot, Stack, compiled, make_stacks
from mupass._roles.geometry import Geometry
from mupass._scales.plan import OptimizerSpec

ROLES = ("input", "hidden", "output", "scalar")  # of matrices; scalar: no axis grows with width
AT_A_TIME = 1 << 18  # entries, 1 MiB in float32


class MatrixOptimizer(PlannedOptimizer):
    """Base of optimizers that work on the matrices of parameters.

    Which parameters these are is a matter of their role in the plan, never of their name. The matrices of
    all parameters are cut into blocks, and blocks of equal shape are handled as one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        lr: float,
        damping: float = 0.0,
        *,
        roles: Collection[str] = ROLES,
        block_size: int = WHOLE,
        modes: bool = False,
        spectral: bool = False,
        compile: bool = False,
        data_parallel: bool | None = None,
        **common: Any,
    ) -> None:
        unknown = set(check_words("roles", roles)) - set(ROLES)
        if unknown:
            raise OptimizerError(f"unknown roles {', '.join(sorted(unknown))}; known: {', '.join(ROLES)}")
        self.roles, self.block_size, self.modes = frozenset(roles), block_size, modes
        self._ranks = world_size(data_parallel)
        self._blockings: dict[str, Blocking] = {}
        super().__init__(model, spec, lr, damping, **common)
        self._parameters = {n: p for p, n in self.names.items() if n in self._blockings}
        self._stacks = make_stacks(self._blockings, self._parameters)
        self._function = with_unit_norm if spectral else self._update()
        self._spectral = spectral
        if spectral:
            for stack in self._stacks:
                stack.state["top"] = stack.zeros(stack.shape[1:].numel())
        self._compiled = [compiled(self._function) for _ in self._stacks] if compile else None

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        own, reasons = {}, {}
        for name in self.names.values():
            geometry = self.plan[name].geometry
            reason = self._reason(geometry)
            if reason:
                reasons[name] = reason
                continue
            kernel = any(use.kind == "conv" for use in geometry.uses)
            self._blockings[name] = Blocking(geometry, self.block_size, self.modes and kernel)
            count = len(self._blockings[name].cut(torch.empty(geometry.shape, device="meta")))
            own[name] = f"{self.spec.name} x{count}" if count > 1 else self.spec.name
        return own, reasons

    def _wanted(self) -> bool:
        return bool(self.roles)

    def _reason(self, geometry: Geometry) -> str:
        """Return why a parameter is not taken, or nothing."""
        if not geometry.fan_in_axes or not geometry.fan_out_axes:
            return "it is no matrix: no activation is contracted with it"
        if geometry.role not in self.roles:
            return f"its role is {geometry.role}; roles={', '.join(sorted(self.roles)) or 'none'}"
        return ""

    def _update(self) -> Callable[..., Tensor]:
        """Return the function that is compiled: pure tensor code, state changed in place."""
        raise NotImplementedError

    def _advance(self, stack: Stack, g: Tensor, at: Tensor | None) -> Sequence[Tensor]:
        """Take in gradients ``[K', *shape]`` of some slots (None: all) and return their directions."""
        raise NotImplementedError

    def _run(self, stack: Stack, at: Tensor | None, *arguments: Any) -> Sequence[Tensor]:
        """Call the update and return its parts: compiled for whole stacks, eager for parts of any size.

        On CPU it is called for a few blocks at a time: what is made on the way then stays in the cache, where
        fresh memory for whole stacks would cost more than the arithmetic on it.
        """
        if self._spectral:
            top = pick(stack.state["top"], at)
            arguments = (top, self._update(), *arguments)
        if self._compiled is not None and at is None:
            return self._compiled[self._stacks.index(stack)](*arguments).unbind()
        few = max(4, AT_A_TIME // stack.shape.numel()) if stack.device.type == "cpu" else len(stack.slots)
        count = len(stack.slots) if at is None else len(at)
        parts = [
            self._function(*(_slots(a, slice(first, first + few)) for a in arguments))
            for first in range(0, count, few)
        ]
        if self._spectral and at is not None:
            stack.state["top"][at] = top
        return [block for part in parts for block in part.unbind()]

    def _directions(self) -> dict[Tensor, Tensor]:
        gradients = {n: whole(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        blocks = {n: self._blockings[n].cut(g) for n, g in gradients.items()}
        found: dict[Slot, Tensor] = {}
        for stack in self._stacks:
            g, at, lost = stack.gather(blocks)
            for name, i in lost:
                self.count("overflowed_blocks", f"the squared gradient of {name}, block {i}")
            if len(g):
                slots = stack.slots if at is None else [stack.slots[i] for i in at.tolist()]
                found.update(zip(slots, self._advance(stack, g, at), strict=True))
        directions: dict[Tensor, Tensor] = {}
        for name, pieces in blocks.items():
            parameter = self._parameters[name]
            own = [(name, i) for i in range(len(pieces))]
            parts = [
                found[slot] if slot in found else torch.zeros_like(g)
                for slot, g in zip(own, pieces, strict=True)
            ]
            direction = self._blockings[name].paste(parts, gradients[name]).to(parameter.dtype)
            directions[parameter] = sharded_like(direction, parameter)
        return directions

    def _layout(self) -> Any:
        return [[*stack.shape, *stack.slots] for stack in self._stacks]

    def _extra_state(self) -> dict[str, Any]:
        return {"stacks": [stack.state for stack in self._stacks]}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        for stack, saved in zip(self._stacks, state["stacks"], strict=True):
            for name, tensor in stack.state.items():
                tensor.copy_(saved[name])


def _slots(argument: Any, which: slice) -> Any:
    """Return the entries of some slots: of a stacked tensor or several; what is no tensor is for all."""
    if isinstance(argument, tuple):
        return tuple(_slots(a, which) for a in argument)
    return argument[which] if isinstance(argument, Tensor) else argument


def pick(tensor: Tensor, at: Tensor | None) -> Tensor:
    """Return the entries of some slots.

    Args:
        tensor: ``[K, ...]``.
        at: Slots, or None for all.
    """
    return tensor if at is None else tensor[at]


def wide(weights: Tensor, like: Tensor) -> Tensor:
    """Return ``[K]`` numbers in a form that multiplies ``[K, ...]``.

    Args:
        weights: The numbers.
        like: A tensor of the shape to multiply.
    """
    return weights.view(-1, *[1] * (like.dim() - 1))
