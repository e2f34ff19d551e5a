"""Products along the sides of stacked blocks, their second moments, and when each is worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mupass._optim.linalg.packed import add_gram
from mupass._optim.matrix.block_stack import Stack

Slots = dict[tuple[int, int], list[int]]  # stack and side -> slots
SIDES = ("both", "left", "right", "smaller")


def active_sides(choice: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of a block that are preconditioned.

    Args:
        choice: One of `SIDES`: all, fan_out, all but fan_out, or the shortest one.
        shape: Sizes of the block, fan_out first.
    """
    every = tuple(range(len(shape)))
    if choice == "smaller":
        return (min(every, key=shape.__getitem__),)
    return {"both": every, "left": every[:1], "right": every[1:]}[choice]


def along(x: Tensor, matrices: Tensor, side: int) -> Tensor:
    """Multiply one side of every block by a matrix.

    Args:
        x: ``[K, *shape]``.
        matrices: ``[K, m, n]`` with n the size of that side.
        side: Number of the side.
    """
    if side == x.dim() - 2:  # the last one: the product is contiguous as it comes
        return (x.flatten(1, -2) @ matrices.mT).view(*x.shape[:-1], -1)
    by_side = x.movedim(side + 1, 1)
    return (matrices @ by_side.flatten(2)).view(len(x), -1, *by_side.shape[2:]).movedim(1, side + 1)


def observe(packed: Tensor, gradient: Tensor, side: int, decay: float, counts: Tensor) -> None:
    """Add the second moments of one side to their moving average, in place.

    Args:
        packed: ``[K, packed_size(n)]``, see `mupass._optim.linalg.packed`.
        gradient: ``[K, *shape]``; zeros for those that do not count.
        side: Number of the side.
        decay: Weight of the past; 1 sums without forgetting.
        counts: ``[K]``, 1, or 0 where the average stays as it is.
    """
    rows = gradient.movedim(side + 1, 1).flatten(2)
    new_weight = 1.0
    if decay < 1:
        new_weight = 1 - decay
        packed.mul_((1 - new_weight * counts)[:, None])
    add_gram(packed, rows, new_weight)


def add_weight(weight: Tensor, decay: float, counts: Tensor) -> None:
    """Count one more observation in the total weight that corrects an average for its start from zero.

    Args:
        weight: ``[K]``, changed in place.
        decay: As for `observe`.
        counts: ``[K]``, 1, or 0 for an observation that does not count.
    """
    if decay == 1:
        # A sum without forgetting has the weight 1 once there is anything in it.
        torch.maximum(weight, counts, out=weight)
    else:
        weight.mul_(1 - (1 - decay) * counts).add_(counts, alpha=1 - decay)


class Schedule:
    """Which slots are due at which step.

    All are due at steps 0, 1, 2, 4, 8 and so on of the first period, when averages change most. After that
    each is due once in every period, and with ``staggered`` the work is spread over the period such that no
    step has much more of it than another.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        remote: Sequence[Stack],
        sides: Callable[[Stack], Sequence[int]],
        period: int,
        staggered: bool,
    ) -> None:
        # Blocks of other ranks are dealt out with this one's: when a block's turn is does not depend on the
        # number of ranks.
        jobs: list[tuple[int, str, int, int, int, int]] = []
        for number, stack in enumerate((*stacks, *remote)):
            for side in sides(stack):
                # The root or the basis of an n x n factor takes n^3.
                cost = stack.shape[side] ** 3
                for position, (parameter, block) in enumerate(stack.slots):
                    jobs.append((-cost, parameter, block, side, number, position))
        load = [0] * period
        self._at: list[Slots] = [{} for _ in range(period)]
        self._every: Slots = {}
        # The largest first, each to the phase with the least work so far.
        for negative_cost, _, _, side, number, position in sorted(jobs):
            phase = 0
            if staggered:
                phase = min(range(period), key=load.__getitem__)
            load[phase] -= negative_cost
            if number < len(stacks):
                for slots in (self._at[phase], self._every):
                    slots.setdefault((number, side), []).append(position)
        for slots in (*self._at, self._every):
            for due_slots in slots.values():
                due_slots.sort()

    def due(self, step: int, stack: int, side: int) -> list[int]:
        """Return the slots to work on.

        Args:
            step: Number of the step.
            stack: Number of the stack.
            side: Number of the side.

        Returns:
            Their numbers.
        """
        slots = self._at[step % len(self._at)]
        if step < len(self._at) and step & (step - 1) == 0:  # 0 or a power of two
            slots = self._every
        return slots.get((stack, side), [])
