"""What Shampoo, SOAP and Muon share: parameters as stacks of matrices, routed by role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.base import PlannedOptimizer
from mupass._optim.checks import check_choice, check_flag, check_period, check_words
from mupass._optim.linalg.spectral import with_unit_norm
from mupass._optim.matrix.block_stack import Slot, Stack, compiled, compiles, make_stacks
from mupass._optim.matrix.blocking import WHOLE, Blocking
from mupass._optim.training import Training
from mupass._optim.vocabulary import State, Tensors
from mupass._parallel import deal, rank_of
from mupass._records import Geometry
from mupass._scales.plan import OptimizerSpec

KERNELS = ("matrix", "modes")
ROLES = ("input", "hidden", "output", "scalar")  # of matrices; scalar: no axis grows with width
LONGEST = 256  # side of a block where blocks are as long as at the base width
AT_A_TIME = 1 << 18  # entries, 1 MiB in float32
Blocks = Mapping[str, Sequence[Tensor]]  # parameter -> its blocks


class LayoutOptions(TypedDict, total=False):
    """Keywords of `mupass.Shampoo` and `mupass.SOAP` that `Layout` holds, for type checkers and editors."""

    roles: Collection[str]
    kernels: str
    compile: bool | None
    data_parallel: bool | None


@dataclass(frozen=True)
class Layout:
    """Which parameters are taken, as what blocks, and where and how these are worked on.

    Attributes:
        roles: Roles of parameters, of `ROLES`.
        compile: Whether the update of each shape is compiled; None where it gains.
        data_parallel: Whether ranks share the work; None where there are several.
        block_size: Largest side of a block; ``base`` for sides as long as at the base width.
        kernels: One of `KERNELS`: axes of a convolution's kernel are part of a matrix, or sides of their own.
        spectral: Whether every block of the update is divided by its spectral norm.

    Raises:
        OptimizerError: An argument is out of range, or a word is unknown.
    """

    roles: Collection[str] = ROLES
    compile: bool | None = None
    data_parallel: bool | None = None
    block_size: int | str = WHOLE
    kernels: str = "matrix"
    spectral: bool = False

    def __post_init__(self) -> None:
        unknown = set(check_words("roles", self.roles)) - set(ROLES)
        if unknown:
            raise OptimizerError(f"unknown roles {', '.join(sorted(unknown))}; known: {', '.join(ROLES)}")
        if self.compile is not None:
            check_flag("compile", self.compile)
        if isinstance(self.block_size, str):
            check_choice("block_size", self.block_size, ("base",))
        else:
            check_period("block_size", self.block_size)
        check_choice("kernels", self.kernels, KERNELS)
        check_flag("spectral", self.spectral)


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
        training: Training,
        layout: Layout,
        damping: float = 0.0,
    ) -> None:
        self.roles, self.block_size = frozenset(layout.roles), layout.block_size
        self.modes = layout.kernels == "modes"
        self._ranks = self._sharing(model, layout.data_parallel)
        self._layout = layout
        self._blockings: dict[str, Blocking] = {}
        super().__init__(model, spec, lr, damping, training)

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        treatments, reasons, preconditioned = {}, {}, {}
        for parameter, name in self.names.items():
            geometry = self.plan[name].geometry
            reason = self._reason(geometry) or self._unfit.get(name, "")
            if reason:
                reasons[name] = reason
                continue
            kernel = any(use.kind == "conv" for use in geometry.uses)
            self._blockings[name] = self._blocking(geometry, kernel)
            preconditioned[name], treatments[name] = parameter, self.spec.name
            count = len(self._blockings[name].shapes())
            if count > 1:
                treatments[name] += f" x{count}"
        self._set_up(preconditioned)
        return treatments, reasons

    def _blocking(self, geometry: Geometry, kernel: bool) -> Blocking:
        """Return how a parameter is cut; the axes of a kernel may be sides of their own."""
        modes = self.modes and kernel
        if isinstance(self.block_size, str):
            return Blocking(geometry, LONGEST, modes, as_at_base=True)
        return Blocking(geometry, self.block_size, modes)

    def _growth(self, name: str) -> float:
        """Return the number of blocks relative to the base width; 1 where no rate follows the width."""
        if self.plan.parameterization == "standard":
            return 1.0
        return self._blockings[name].growth()

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        """Make the stacks, each parameter's on the rank that keeps it."""
        self._parameters = parameters
        # Each rank keeps the state of some parameters, at about equal cost.
        self._keeper = deal({name: self._cost(name) for name in parameters}, self._ranks)
        mine: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            destination = mine if self._keeper[name] == rank_of(self._ranks) else others
            destination[name] = parameter
        self._stacks = make_stacks(self._blockings, mine)
        # The shapes of what other ranks keep.
        self._remote = make_stacks(self._blockings, others, torch.device("meta"))
        for stack in (*self._stacks, *self._remote):
            stack.state |= self._first_stack_state(stack)
            if self._layout.spectral:
                stack.state["top"] = stack.zeros(stack.shape[1:].numel())
        self._function: Callable[..., Tensor] = self._update()
        if self._layout.spectral:
            self._function = with_unit_norm
        self._compiled: list[Callable[..., Tensor] | None] = []
        for stack in self._stacks:
            compiles_here = compiles(self._layout.compile, stack.device)
            self._compiled.append(compiled(self._function) if compiles_here else None)

    def _cost(self, name: str) -> int:
        """Return about how much work a parameter's directions are."""
        return sum(shape.numel() * sum(shape) for shape in self._blockings[name].shapes())

    @property
    def _owner(self) -> Mapping[str, int]:
        return self._keeper if self._ranks > 1 else {}

    def _replaced(self, name: str, new: Tensor) -> None:
        if name in self._parameters:
            self._parameters[name] = new

    def _own_state(self, name: str) -> State:
        entries: State = {}
        for stack in (*self._stacks, *self._remote):
            entries |= stack.entries(name)
        return entries

    def _wanted(self) -> bool:
        return bool(self.roles)

    def _reason(self, geometry: Geometry) -> str:
        """Return why a parameter is not taken, or nothing."""
        if not geometry.fan_in_axes or not geometry.fan_out_axes:
            return "it is no matrix: no activation is contracted with it"
        if geometry.role not in self.roles:
            return f"its role is {geometry.role}; roles={', '.join(sorted(self.roles)) or 'none'}"
        return ""

    def _first_stack_state(self, stack: Stack) -> State:
        """Return what is remembered of the blocks of a stack, before the first step."""
        raise NotImplementedError

    def _update(self) -> Callable[..., Tensor]:
        """Return the function that is compiled: pure tensor code, state changed in place."""
        raise NotImplementedError

    def _observe(self, number: int, at: slice, gradient: Tensor, counts: Tensor) -> None:
        """Take in the gradients of some slots.

        Before all directions where gradients are averaged by the base class, after their own direction
        elsewhere.

        Args:
            number: Of the stack.
            at: The slots.
            gradient: Their gradients, ``[k, *shape]``; zeros for those that do not count.
            counts: ``[k]``, 1 or 0.
        """

    def _prepare(self, number: int) -> None:
        """Get ready for the directions of a stack, after all of its gradients were seen."""

    def _arguments(
        self, number: int, at: slice, gradient: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        """Return the arguments of the update for some slots, see `_observe`.

        The gradient is there where ``_needs_gradient`` or the update works on gradients.
        """
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
        length = max(4, AT_A_TIME // stack.shape.numel())
        return [slice(start, min(start + length, run.stop)) for start in range(run.start, run.stop, length)]

    def _call(self, number: int, at: slice, *arguments: Any) -> Tensor:
        """Call the update: compiled for whole stacks, eager for parts of any size."""
        stack = self._stacks[number]
        if self._layout.spectral:
            arguments = (stack.state["top"][at], self._update(), *arguments)
        function = self._compiled[number]
        # Compiled code is of one shape: a part of a stack runs eagerly.
        if function is None or at.stop - at.start < len(stack.slots):
            function = self._function
        return function(*arguments)

    def _directions(self, gradients: Tensors, means: Tensors, ok: Tensor) -> Tensors:
        # Directions of other parameters come from the ranks that keep them.
        mine = [name for name in gradients if self._keeper[name] == rank_of(self._ranks)]
        blocks = {name: self._blockings[name].cut(gradients[name]) for name in mine}
        averaged = blocks
        if self.smooths:
            averaged = {name: self._blockings[name].cut(means[name]) for name in mine}
        direction_of: dict[Slot, Tensor] = {}
        for number, stack in enumerate(self._stacks):
            runs = stack.runs(blocks)
            pieces: list[slice] = []
            for run in runs:
                pieces += self._pieces(number, run)
            step = self._step_smoothed if self.smooths else self._step_and_observe
            for piece, directions in step(number, pieces, blocks, averaged, ok):
                direction_of.update(zip(stack.slots[piece], directions.unbind(), strict=True))
            self._finish(number, runs)
        by_name = {}
        # All blocks of a parameter are put together again.
        for name, own_blocks in blocks.items():
            parts = [direction_of[name, block] for block in range(len(own_blocks))]
            by_name[name] = self._blockings[name].paste(parts, gradients[name])
        return by_name

    def _step_smoothed(
        self, number: int, pieces: Sequence[slice], blocks: Blocks, averaged: Blocks, ok: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the directions of averages: all gradients of a stack are observed before any of them."""
        stack, counted = self._stacks[number], []
        for piece in pieces:
            gradient, counts = self._counted(stack, piece, blocks, ok)
            self._observe(number, piece, gradient, counts)
            counted.append(counts)
        self._prepare(number)
        for piece, counts in zip(pieces, counted, strict=True):
            # Gathered once more: to keep the gradients of all pieces would take the memory of the stack.
            again = stack.gather(blocks, piece) if self._needs_gradient else None
            arguments = self._arguments(number, piece, again, stack.gather(averaged, piece), counts)
            yield piece, _masked(self._call(number, piece, *arguments), counts)

    def _step_and_observe(
        self, number: int, pieces: Sequence[slice], blocks: Blocks, averaged: Blocks, ok: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the directions of gradients, each observed after its own direction."""
        for piece in pieces:
            gradient, counts = self._counted(self._stacks[number], piece, blocks, ok)
            arguments = self._arguments(number, piece, gradient, gradient, counts)
            directions = self._call(number, piece, *arguments)
            self._observe(number, piece, gradient, counts)
            yield piece, _masked(directions, counts)

    def _counted(self, stack: Stack, at: slice, blocks: Blocks, ok: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of some slots, and which of them count, ``[k]``.

        One the square of whose norm is not finite would spoil every average. It is zero, and does not count.
        """
        gradient = stack.gather(blocks, at)  # a copy, and finite
        finite = torch.linalg.vector_norm(gradient.flatten(1), dim=1).square().isfinite()
        stack.note("overflowed_blocks", ~finite, at, "the squared gradient of ")
        counts = finite.to(stack.dtype) * ok.to(stack.device, stack.dtype)
        return gradient.mul_(wide(counts, gradient)), counts

    def _incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        incidents, counts = [], []
        for stack in self._stacks:
            for (kind, place), happened in stack.incidents.items():
                incidents += [(kind, f"{place}{name}, block {block}") for name, block in stack.slots]
                counts.append(happened.clone())
                happened.zero_()
        return incidents, counts


def wide(weights: Tensor, like: Tensor) -> Tensor:
    """Return ``[K]`` numbers in a form that multiplies ``[K, ...]``.

    Args:
        weights: The numbers.
        like: A tensor of the shape to multiply.
    """
    return weights.view(-1, *[1] * (like.dim() - 1))


def _masked(blocks: Tensor, counts: Tensor) -> Tensor:
    """Return directions ``[k, *shape]``, which are finite, with zeros for those that do not count."""
    return blocks * wide(counts, blocks)
