"""Shampoo as a function of parameters, gradients, state and the numbers in its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mupass._hyper.planned import PlannedRule
from mupass._hyper.roots import damped_root
from mupass._hyper.rules import Entries, Key, State, Tensors
from mupass._optim.blocks import Blocking
from mupass._optim.shampoo import Shampoo
from mupass._optim.sides import along
from mupass._study.batches import StudyError


class ShampooRule(PlannedRule):
    """`mupass.Shampoo` with its fallbacks, without grafts of Adam's or RMSprop's norm."""

    def __init__(self, optimizer: Shampoo, names: Mapping[Tensor, str]) -> None:
        super().__init__(optimizer, names)
        self.made = optimizer
        self.group_of = {name: i for i, members in enumerate(self.members) for name in members}

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise where the optimizer has a graft, see `Rule`.

        Args:
            optimizer: The optimizer.

        Raises:
            StudyError: It has.
        """
        assert isinstance(optimizer, Shampoo)
        if optimizer.spec.graft != "none":
            raise StudyError(
                f"graft={optimizer.spec.graft!r} of Shampoo cannot be differentiated here; use none"
            )

    def directions(
        self, count: int, gradients: Tensors, state: State, numbers: Mapping[Key, Tensor]
    ) -> Tensors:
        """Return gradients between their roots, see `Rule`."""
        blockings, found = self.made._blockings, dict(gradients)
        lacking = next((name for name in blockings if name not in gradients), None)
        if lacking is not None:
            raise StudyError(
                f"{lacking} gets no gradient, and Shampoo's rule needs one of every matrix; freeze it"
            )
        blocks = {name: blocking.cut(gradients[name]) for name, blocking in blockings.items()}
        pieces: dict[tuple[str, int], Tensor] = {}
        for number, stack in enumerate(self.made._stacks):
            g = torch.stack([blocks[name][i] for name, i in stack.slots]).to(stack.dtype)
            for side in self.made._sides[number]:
                g = along(g, self._root(count, number, side, blocks, state, numbers), side)
            pieces.update(zip(stack.slots, g.unbind(), strict=True))
        for name, cut in blocks.items():
            whole = [pieces[name, i] for i in range(len(cut))]
            pasted: Tensor = _Pasted.apply(blockings[name], gradients[name], *whole)  # type: ignore[no-untyped-call]
            found[name] = pasted.to(gradients[name].dtype)
        return found

    def _root(
        self,
        count: int,
        number: int,
        side: int,
        blocks: Mapping[str, Any],
        state: State,
        numbers: Mapping[Key, Tensor],
    ) -> Tensor:
        """Return the roots of one side of a stack: those of the last time that they were due."""
        made, stack = self.made, self.made._stacks[number]
        rows = (
            torch.stack([blocks[n][i] for n, i in stack.slots])
            .to(stack.dtype)
            .movedim(side + 1, 1)
            .flatten(2)
        )
        decay, key = made.factor_decay, f"\0{number}.{side}"
        past = state.get(key, {})
        zero = stack.zeros(stack.shape[side], stack.shape[side])
        factor = decay * past.get("factor", zero) + (1.0 if decay == 1 else 1 - decay) * rows @ rows.mT
        root = past.get("root", zero)
        due = made._schedule.due(count, number, side)
        if due is not None:
            average = factor[due] / (1.0 if decay == 1 else 1 - decay ** (count + 1))
            rho = self._damping(number, side, numbers)[due]
            if made.damping_mode == "trace":
                rho = rho * average.diagonal(dim1=-2, dim2=-1).sum(-1)
            fresh = damped_root(
                average, rho, made.spec.e / len(made._sides[number]), made.damping_mode == "relative"
            )
            root = root.index_copy(0, due, fresh)
        state[key] = {"factor": factor, "root": root}
        return root

    def _damping(self, number: int, side: int, numbers: Mapping[Key, Tensor]) -> Tensor:
        stack, rho = self.made._stacks[number], []
        for name, _ in stack.slots:
            index = self.group_of[name]
            value = Entries(index, self.groups[index], numbers)["damping"]
            rho.append(torch.as_tensor(value, dtype=stack.dtype, device=stack.device))
        return torch.stack(rho) * self.made._damping_scale(stack, side)


class _Pasted(torch.autograd.Function):
    """`Blocking.paste`, which has no derivative of its own; it is linear, and its transpose is to cut."""

    @staticmethod
    def forward(ctx: Any, blocking: Blocking, like: Tensor, *blocks: Tensor) -> Tensor:
        ctx.blocking, ctx.like = blocking, like
        return blocking.paste(blocks, like)

    @staticmethod
    def jvp(ctx: Any, _: None, __: Tensor | None, *tangents: Tensor) -> Tensor:
        pasted: Tensor = ctx.blocking.paste(tangents, ctx.like)
        return pasted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.blocking.cut(gradient))
