"""Shampoo as a function of parameters, gradients, state and the numbers in its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mupass._errors import StudyError
from mupass._hyper.planned import PlannedRule
from mupass._hyper.roots import damped_root
from mupass._hyper.rules import Entries, Key, Moment, State, Tensors, corrected, root_of
from mupass._optim.kronecker.factor_stack import growth
from mupass._optim.matrix.base import wide
from mupass._optim.matrix.blocking import Blocking
from mupass._optim.matrix.mode_products import along
from mupass._optim.shampoo import Shampoo


class ShampooRule(PlannedRule):
    """`mupass.Shampoo` with its fallbacks and all grafts but the spectral one, on one rank."""

    def __init__(self, optimizer: Shampoo, names: Mapping[Tensor, str]) -> None:
        super().__init__(optimizer, names)
        self.made, self.work = optimizer, optimizer.work()

    def options(self, optimizer: Shampoo) -> dict[str, tuple[bool, str, str]]:
        """Return the options that the rule does not follow, see `PlannedRule`."""
        return {
            "graft='spectral'": (
                optimizer.spec.graft == "spectral",
                "its norms come from a power iteration that is cut short",
                "use graft='adam' or 'none'",
            ),
        }

    def preconditioned(self, now: Moment, means: Tensors, shared: State) -> Tensors:
        """Return averages between their roots, see `PlannedRule`."""
        # As the optimizer: cut, step stack by stack, paste.
        blockings, pasted_directions = self.work.blockings, {}
        for name in blockings:
            # Blocks of one shape are one tensor, so that all of them need a gradient.
            if name not in now.gradients:
                raise StudyError(
                    f"{name} gets no gradient, and Shampoo's rule needs one of every matrix; freeze it"
                )
        gradient_blocks = {name: blocking.cut(now.gradients[name]) for name, blocking in blockings.items()}
        average_blocks = {name: blocking.cut(means[name]) for name, blocking in blockings.items()}
        pieces: dict[tuple[str, int], Tensor] = {}
        for number, stack in enumerate(self.work.stacks):
            every = slice(None)
            own_state = dict(shared.get(f"stack{number}", {}))
            gradient, mean = stack.gather(gradient_blocks, every), stack.gather(average_blocks, every)
            directions = self._preconditioned_stack(now, number, gradient, mean, own_state)
            shared[f"stack{number}"] = own_state
            pieces.update(zip(stack.slots, directions.unbind(), strict=True))
        for name, cut in gradient_blocks.items():
            parts = [pieces[name, i] for i in range(len(cut))]
            pasted: Tensor = _Pasted.apply(blockings[name], now.gradients[name], *parts)  # type: ignore[no-untyped-call]
            pasted_directions[name] = pasted.to(now.gradients[name].dtype)
        return pasted_directions

    def _preconditioned_stack(self, now: Moment, number: int, g: Tensor, mean: Tensor, own: State) -> Tensor:
        """Return the directions of the blocks of one stack, whose state is replaced."""
        graft, direction = self.made.spec.graft, mean
        # Until then the step is the graft's own.
        started = now.count >= self.made.start_step
        # Factors are collected from the first step on, and used from `start_step`.
        for side in self.work.sides[number]:
            root, grown = self._root(now, number, side, g, own)
            if started:
                direction = along(direction, root, side)
                direction = direction / wide(grown, direction) if graft == "none" else direction
        if graft == "none":
            return direction
        if graft == "sgd":
            return _with_norm_of(mean, direction)
        square = root_of(corrected(own, "square", g * g, self.made.graft_beta2))
        grafted = mean if graft == "adam" else g
        magnitude = grafted / (square + wide(self.work.epsilons[number], g))
        return _with_norm_of(magnitude, direction) if started else magnitude

    def _root(self, now: Moment, number: int, side: int, g: Tensor, own: State) -> tuple[Tensor, Tensor]:
        """Return the roots of one side of a stack, and by how much they are too large by now."""
        optimizer, stack = self.made, self.work.stacks[number]
        size = stack.shape[side]
        power = optimizer.spec.e / len(self.work.sides[number])
        # The side's axis first, all others in the rows of the product.
        rows = g.movedim(side + 1, 1).flatten(2)
        # A sum without forgetting is no average; its weight stays 1.
        share, weight = 1.0, 1.0
        if optimizer.factor_decay < 1:
            share, weight = 1 - optimizer.factor_decay, 1 - optimizer.factor_decay ** (now.count + 1)
        # What the last step left of this side.
        past = own.get(f"side{side}") or {
            "factor": stack.zeros(size, size),
            "peak": stack.zeros(),
            "root": stack.zeros(size, size),
            "rooted": stack.zeros(),
        }
        factor = optimizer.factor_decay * past["factor"] + share * rows @ rows.mT
        average = factor / weight
        traces = average.diagonal(dim1=-2, dim2=-1).sum(-1)
        peak = torch.maximum(past["peak"] * optimizer.damping_memory, traces)
        root, rooted = past["root"], past["rooted"]
        due_slots = self.work.schedule.due(now.count, number, side)
        if due_slots:
            indices = torch.tensor(due_slots, device=stack.device)
            rho = self._damping(number, side, now.numbers)
            # Damping is relative to the largest trace seen, as in the optimizer.
            if optimizer.damping_mode == "trace":
                rho = rho * peak
            elif optimizer.damping_mode == "relative":
                rho = rho * peak / torch.where(traces > 0, traces, torch.ones_like(traces))
            recomputed = damped_root(
                average[indices], rho[indices], power, optimizer.damping_mode == "relative"
            )
            root = root.index_copy(0, indices, recomputed)
            rooted = rooted.index_copy(0, indices, traces[indices])
        own[f"side{side}"] = {"factor": factor, "peak": peak, "root": root, "rooted": rooted}
        return root, growth(traces, rooted).pow(power)

    def _damping(self, number: int, side: int, numbers: Mapping[Key, Tensor]) -> Tensor:
        stack, rho = self.work.stacks[number], []
        for name, _ in stack.slots:
            # Damping may be differentiated by: a tensor for each slot.
            index = self.own[name]
            value = Entries(index, self.groups[index], numbers)["damping"]
            rho.append(torch.as_tensor(value, dtype=stack.dtype, device=stack.device))
        return torch.stack(rho) * self.work.damping_scales[number][side]


def _with_norm_of(magnitude: Tensor, direction: Tensor) -> Tensor:
    """Return directions with the norms of other blocks; a direction that is zero stays so."""
    target_norm = torch.linalg.vector_norm(magnitude.flatten(1), dim=1)
    norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    # Divided where it is taken only, for the derivative.
    alive = norm > 0
    factor = torch.where(alive, target_norm / torch.where(alive, norm, torch.ones_like(norm)), 0.0)
    return direction * wide(factor, direction)


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
