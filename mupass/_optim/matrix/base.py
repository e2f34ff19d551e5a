"""What Shampoo, SOAP and Muon share: parameters as stacks of matrices, routed by role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.base import PlannedOptimizer
from mupass._optim.checks import check_words
from mupass._optim.linalg.spectral import with_unit_norm
from mupass._optim.matrix.block_stack import Slot, Stack, compiled, compiles, make_stacks
from mupass._optim.matrix.blocking import WHOLE, Blocking
from mupass._parallel import deal, rank_of, world_size
from mupass._records import Geometry
from mupass._scales.plan import OptimizerSpec

ROLES = ("input", "hidden", "output", "scalar")  # of matrices; scalar: no axis grows with width
AT_A_TIME = 1 << 18  # entries, 1 MiB in float32


class MatrixOptimizer(PlannedOptimizer):
    """Base of optimizers that work on the matrices of parameters.

    Which parameters these are is a matter of their role in the plan, never of their name. The matrices of
    all parameters are cut into blocks, and blocks of equal shape are handled as one tensor.
    """

    _needs_gradient = False  # whether the update takes the gradient besides its average

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        lr: float | None,
        damping: float = 0.0,
        *,
        roles: Collection[str] = ROLES,
        block_size: int = WHOLE,
        modes: bool = False,
        spectral: bool = False,
        compile: bool | None = None,
        data_parallel: bool | None = None,
        **common: Any,
    ) -> None:
        unknown = set(check_words("roles", roles)) - set(ROLES)
        if unknown:
            raise OptimizerError(f"unknown roles {', '.join(sorted(unknown))}; known: {', '.join(ROLES)}")
        self.roles, self.block_size, self.modes = frozenset(roles), block_size, modes
        self._ranks = world_size(data_parallel)
        self._blockings: dict[str, Blocking] = {}
        self._spectral, self._compiles = spectral, compile
        super().__init__(model, spec, lr, damping, **common)

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        own, reasons = {}, {}
        for name in self.names.values():
            geometry = self.plan[name].geometry
            reason = self._reason(geometry) or self._unfit.get(name, "")
            if reason:
                reasons[name] = reason
                continue
            kernel = any(use.kind == "conv" for use in geometry.uses)
            self._blockings[name] = Blocking(geometry, self.block_size, self.modes and kernel)
            count = len(self._blockings[name].cut(torch.empty(geometry.shape, device="meta")))
            own[name] = f"{self.spec.name} x{count}" if count > 1 else self.spec.name
        self._set_up({n: p for p, n in self.names.items() if n in own})
        return own, reasons

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        """Make the stacks, each parameter's on the rank that keeps it."""
        self._parameters = parameters
        self._keeper = deal({name: self._cost(name, p) for name, p in parameters.items()}, self._ranks)
        rank = rank_of(self._ranks)
        mine = {n: p for n, p in parameters.items() if self._keeper[n] == rank}
        others = {n: p for n, p in parameters.items() if n not in mine}
        self._stacks = make_stacks(self._blockings, mine)
        self._remote = make_stacks(self._blockings, others, torch.device("meta"))
        for stack in (*self._stacks, *self._remote):
            stack.state |= self._first_stack_state(stack)
            if self._spectral:
                stack.state["top"] = stack.zeros(stack.shape[1:].numel())
        self._function = with_unit_norm if self._spectral else self._update()
        self._compiled = [
            compiled(self._function) if compiles(self._compiles, stack.device) else None
            for stack in self._stacks
        ]

    def _cost(self, name: str, parameter: Tensor) -> int:
        """Return about how much work a parameter's directions are."""
        blocks = self._blockings[name].cut(torch.empty(parameter.shape, device="meta"))
        return sum(block.numel() * sum(block.shape) for block in blocks)

    @property
    def _owner(self) -> Mapping[str, int]:
        return self._keeper if self._ranks > 1 else {}

    def _replaced(self, name: str, new: Tensor) -> None:
        if name in self._parameters:
            self._parameters[name] = new

    def _own_state(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stack in (*self._stacks, *self._remote):
            found |= stack.entries(name)
        return found

    def _wanted(self) -> bool:
        return bool(self.roles)

    def _reason(self, geometry: Geometry) -> str:
        """Return why a parameter is not taken, or nothing."""
        if not geometry.fan_in_axes or not geometry.fan_out_axes:
            return "it is no matrix: no activation is contracted with it"
        if geometry.role not in self.roles:
            return f"its role is {geometry.role}; roles={', '.join(sorted(self.roles)) or 'none'}"
        return ""

    def _first_stack_state(self, stack: Stack) -> dict[str, Tensor]:
        """Return what is remembered of the blocks of a stack, before the first step."""
        raise NotImplementedError

    def _update(self) -> Callable[..., Tensor]:
        """Return the function that is compiled: pure tensor code, state changed in place."""
        raise NotImplementedError

    def _observe(self, number: int, at: slice, g: Tensor, counts: Tensor) -> None:
        """Take in the gradients of some slots.

        Before all directions where gradients are averaged by the base class, after their own direction
        elsewhere.

        Args:
            number: Of the stack.
            at: The slots.
            g: Their gradients, ``[k, *shape]``; zeros for those that do not count.
            counts: ``[k]``, 1 or 0.
        """

    def _prepare(self, number: int) -> None:
        """Get ready for the directions of a stack, after all of its gradients were seen."""

    def _arguments(
        self, number: int, at: slice, g: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        """Return the arguments of the update for some slots, see `_observe`; g where it was asked for."""
        raise NotImplementedError

    def _finish(self, number: int, runs: Sequence[slice]) -> None:
        """Do what follows on the directions of a stack."""

    def _pieces(self, number: int, run: slice) -> list[slice]:
        """Return a run of slots of a stack in pieces.

        On CPU a few blocks at a time: what is made on the way then stays in the cache, where fresh memory for
        whole stacks would cost more than the arithmetic on it.
        """
        stack = self._stacks[number]
        whole_stack = run.stop - run.start == len(stack.slots)
        if stack.device.type != "cpu" or (self._compiled[number] is not None and whole_stack):
            return [run]
        few = max(4, AT_A_TIME // stack.shape.numel())
        return [slice(i, min(i + few, run.stop)) for i in range(run.start, run.stop, few)]

    def _call(self, number: int, at: slice, *arguments: Any) -> Tensor:
        """Call the update: compiled for whole stacks, eager for parts of any size."""
        stack = self._stacks[number]
        if self._spectral:
            arguments = (stack.state["top"][at], self._update(), *arguments)
        function = self._compiled[number] if at.stop - at.start == len(stack.slots) else None
        return (function or self._function)(*arguments)

    def _directions(
        self, gradients: Mapping[str, Tensor], means: Mapping[str, Tensor], ok: Tensor
    ) -> dict[str, Tensor]:
        mine = {n for n in gradients if self._keeper[n] == rank_of(self._ranks)}
        blocks = {n: self._blockings[n].cut(gradients[n]) for n in mine}
        averaged = {n: self._blockings[n].cut(means[n]) for n in mine} if self.smooths else blocks
        found: dict[Slot, Tensor] = {}
        for number, stack in enumerate(self._stacks):
            runs = stack.runs(mine)
            pieces = [piece for run in runs for piece in self._pieces(number, run)]
            seen = {}
            if self.smooths:
                for at in pieces:
                    g, seen[at.start] = self._counted(stack, at, blocks, ok)
                    self._observe(number, at, g, seen[at.start])
                self._prepare(number)
            for at in pieces:
                if self.smooths:
                    again = stack.gather(blocks, at) if self._needs_gradient else None
                    counts = seen[at.start]
                    mean = stack.gather(averaged, at)
                else:
                    mean, counts = self._counted(stack, at, blocks, ok)
                    again = mean
                direction = self._call(number, at, *self._arguments(number, at, again, mean, counts))
                if not self.smooths:
                    self._observe(number, at, mean, counts)
                found.update(zip(stack.slots[at], _masked(direction, counts).unbind(), strict=True))
            self._finish(number, runs)
        directions = {}
        for name, pieces_ in blocks.items():
            parts = [found[name, i] for i in range(len(pieces_))]
            directions[name] = self._blockings[name].paste(parts, gradients[name])
        return directions

    def _counted(
        self, stack: Stack, at: slice, blocks: Mapping[str, Sequence[Tensor]], ok: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of some slots, and which of them count, ``[k]``.

        One the square of whose norm is not finite would spoil every average. It is zero, and does not count.
        """
        g = stack.gather(blocks, at)
        fine = torch.linalg.vector_norm(g.flatten(1), dim=1).square().isfinite()
        stack.note("overflowed_blocks", ~fine, at, "the squared gradient of ")
        counts = fine.to(stack.dtype) * ok.to(stack.device, stack.dtype)
        return _masked(g, counts), counts

    def _incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        told, counts = [], []
        for stack in self._stacks:
            for (kind, place), happened in stack.incidents.items():
                told += [(kind, f"{place}{name}, block {i}") for name, i in stack.slots]
                counts.append(happened.clone())
                happened.zero_()
        return told, counts


def wide(weights: Tensor, like: Tensor) -> Tensor:
    """Return ``[K]`` numbers in a form that multiplies ``[K, ...]``.

    Args:
        weights: The numbers.
        like: A tensor of the shape to multiply.
    """
    return weights.view(-1, *[1] * (like.dim() - 1))


def _masked(blocks: Tensor, counts: Tensor) -> Tensor:
    """Return blocks ``[k, *shape]`` with zeros for those that do not count."""
    zero = torch.zeros((), dtype=blocks.dtype, device=blocks.device)
    return torch.where(wide(counts, blocks) > 0, blocks, zero)
