"""Rules: optimizers as functions of parameters, gradients, state and the numbers in their groups.

Each takes a finished optimizer apart, so that scales, blocks and fallbacks are the optimizer's own, and makes
the same step from tensors that autograd can follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from torch import Tensor

from mupass._hyper.roots import damped_root
from mupass._optim import Shampoo
from mupass._optim._blocks import Blocking
from mupass._optim._fallback import BETAS, EPSILON
from mupass._optim._sides import along
from mupass._study.batches import StudyError

Tensors = dict[str, Tensor]
State = dict[str, Any]  # nested by parameter; every leaf is a tensor
Key = tuple[int, str]  # number of a group, entry of it


class Rule:
    """One step of an optimizer, without side effects.

    Attributes:
        keys: Entries of groups that the step can be differentiated by.
    """

    keys: tuple[str, ...] = ("lr", "weight_decay")

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
        self.groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self.members = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
        self.refuse(optimizer)

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise where the optimizer has an option that the rule does not follow.

        Args:
            optimizer: The optimizer.

        Raises:
            StudyError: It has.
        """
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in self.groups):
                raise StudyError(f"{option}=True of {type(optimizer).__name__} cannot be differentiated here")

    def step(
        self, count: int, parameters: Tensors, gradients: Tensors, state: State, numbers: Mapping[Key, Tensor]
    ) -> tuple[Tensors, State]:
        """Take one step.

        Args:
            count: Steps taken before.
            parameters: Values by name.
            gradients: Their gradients; what the loss does not depend on is missing.
            state: Result of the step before; empty at first.
            numbers: Entries of groups that are to be differentiated by.

        Returns:
            New parameters and state.
        """
        parameters, state = dict(parameters), dict(state)
        found = self.directions(count, gradients, state, numbers)
        for i, group in enumerate(self.groups):
            read = _Entries(i, group, numbers)
            for name in self.members[i]:
                if name in gradients:
                    own = dict(state.get(name, {}))
                    parameters[name] = self.update(count, parameters[name], found[name], own, read)
                    state[name] = own
        return parameters, state

    def directions(
        self, count: int, gradients: Tensors, state: State, numbers: Mapping[Key, Tensor]
    ) -> Tensors:
        """Return preconditioned gradients; by default the gradients.

        Args:
            count: Steps taken before.
            gradients: The gradients.
            state: State, whose shared part may be replaced.
            numbers: As for `step`.
        """
        return gradients

    def update(self, count: int, p: Tensor, g: Tensor, own: dict[str, Tensor], read: _Entries) -> Tensor:
        """Return the new value of one parameter.

        Args:
            count: Steps taken before.
            p: The parameter.
            g: Its direction.
            own: Its state, whose entries are replaced.
            read: The numbers of its group.
        """
        raise NotImplementedError


class _Entries:
    """The numbers of one group: tensors where they are differentiated by, else as the optimizer has them."""

    def __init__(self, index: int, group: Mapping[str, Any], numbers: Mapping[Key, Tensor]) -> None:
        self.index, self.group, self.numbers = index, group, numbers

    def __getitem__(self, key: str) -> Any:
        found = self.numbers.get((self.index, key))
        return entry(self.group, key) if found is None else found


def entry(group: Mapping[str, Any], key: str) -> Any:
    """Return an entry of a group; ``beta1`` and ``beta2`` are the parts of ``betas``.

    Args:
        group: The group.
        key: Name of the entry.
    """
    return group["betas"][int(key[-1]) - 1] if key in ("beta1", "beta2") else group[key]


class SGD(Rule):
    """`torch.optim.SGD`: weight decay is added to the gradient, momentum sums."""

    keys = ("lr", "weight_decay", "momentum")

    def update(self, count: int, p: Tensor, g: Tensor, own: dict[str, Tensor], read: _Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        g = g + read["weight_decay"] * p
        past = own.get("momentum")
        # As torch: damping of momentum begins with the second step, and is nothing without momentum.
        fresh = 1 - read["dampening"] if self.groups[read.index]["momentum"] else 1
        average = g if past is None else read["momentum"] * past + fresh * g
        own["momentum"] = average
        return p - read["lr"] * (g + read["momentum"] * average if read["nesterov"] else average)


class Adam(Rule):
    """`torch.optim.Adam`, and `torch.optim.AdamW` with ``decoupled``."""

    keys = ("lr", "weight_decay", "beta1", "beta2", "eps")

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], decoupled: bool = False
    ) -> None:
        super().__init__(optimizer, names)
        self.decoupled = decoupled

    def update(self, count: int, p: Tensor, g: Tensor, own: dict[str, Tensor], read: _Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        if self.decoupled:
            p = p * (1 - read["lr"] * read["weight_decay"])
        else:
            g = g + read["weight_decay"] * p
        mean, root = adam_averages(count, g, own, read["beta1"], read["beta2"])
        return p - read["lr"] * mean / (root + read["eps"])


def adam_averages(
    count: int, g: Tensor, own: dict[str, Tensor], beta1: Any, beta2: Any
) -> tuple[Tensor, ...]:
    """Return Adam's corrected mean and root mean square.

    The root is constant where it is zero: there every gradient was zero, and its slope would be infinite.

    Args:
        count: Steps taken before.
        g: Gradient.
        own: State of the parameter, whose entries are replaced.
        beta1: Weight of the past in the mean.
        beta2: Weight of the past in the mean square.
    """
    zero = torch.zeros_like(g)
    own["mean"] = beta1 * own.get("mean", zero) + (1 - beta1) * g
    own["square"] = beta2 * own.get("square", zero) + (1 - beta2) * g * g
    mean, square = own["mean"] / (1 - beta1 ** (count + 1)), own["square"] / (1 - beta2 ** (count + 1))
    alive = square > 0
    return mean, torch.where(alive, square, 1.0).sqrt() * alive


class ShampooRule(Rule):
    """`mupass.Shampoo` with its fallbacks, without grafts of Adam's or RMSprop's norm."""

    keys = ("lr", "weight_decay", "momentum", "damping")

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
            value = _Entries(index, self.groups[index], numbers)["damping"]
            rho.append(torch.as_tensor(value, dtype=stack.dtype, device=stack.device))
        return torch.stack(rho) * self.made._damping_scale(stack, side)

    def update(self, count: int, p: Tensor, g: Tensor, own: dict[str, Tensor], read: _Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        algorithm = read["algorithm"]
        if algorithm in ("shampoo", "sgd"):
            past = own.get("momentum")
            g = g if past is None else read["momentum"] * past + g
            own["momentum"] = g
        else:
            mean, root = adam_averages(count, g, own, *BETAS)
            adamw = algorithm == "adamw"
            epsilon = EPSILON * read["mupass_epsilon"]
            g = mean / (root + epsilon) if adamw else torch.atan2(mean, root) * (4 / pi)
        p = p * (1 - read["lr"] * read["weight_decay"])
        return p - read["lr"] * read["mupass_scale"] * g


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


def rule_of(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Rule:
    """Return the rule by which an optimizer steps.

    Args:
        optimizer: The optimizer, before its first step.
        names: Parameter -> name.

    Raises:
        StudyError: No rule is known for its class, or for one of its options.
    """
    if type(optimizer) is torch.optim.SGD:
        return SGD(optimizer, names)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = bool(optimizer.param_groups[0].get("decoupled_weight_decay"))
        return Adam(optimizer, names, decoupled or type(optimizer) is torch.optim.AdamW)
    if type(optimizer) is Shampoo:
        return ShampooRule(optimizer, names)
    raise StudyError(
        f"{type(optimizer).__name__} cannot be differentiated: its steps are known for torch.optim.SGD, Adam "
        "and AdamW and for mupass.Shampoo; search with driver='grid' or 'optuna' instead"
    )
