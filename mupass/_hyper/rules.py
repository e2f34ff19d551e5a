"""Rules: optimizers as functions of parameters, gradients, state and the numbers in their groups.

Each takes a finished optimizer apart, so that scales, blocks and fallbacks are the optimizer's own, and makes
the same step from tensors that autograd can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mupass._errors import StudyError

Tensors = dict[str, Tensor]
State = dict[str, Any]  # nested; every leaf is a tensor
Key = tuple[int, str]  # number of a group, entry of it


@dataclass(frozen=True)
class Moment:
    """What one step is taken from, besides parameters and state.

    Attributes:
        count: Steps taken before.
        gradients: Gradients by parameter; what the loss does not depend on is missing.
        numbers: Entries of groups that are to be differentiated by.
        watched: Gradients of what `Rule.watch` returned.
    """

    count: int
    gradients: Tensors
    numbers: Mapping[Key, Tensor]
    watched: list[Tensor | None]


class Rule:
    """One step of an optimizer, without side effects.

    Attributes:
        keys: Entries of groups that the step can be differentiated by.
    """

    keys: tuple[str, ...] = ("lr", "weight_decay")

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
        # Groups without their parameters: numbers, and options such as nesterov.
        self.groups: list[dict[str, Any]] = []
        self.members: list[list[str]] = []
        for group in optimizer.param_groups:
            self.groups.append({key: value for key, value in group.items() if key != "params"})
            self.members.append([names[parameter] for parameter in group["params"]])
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

    def watch(self, forward: Callable[[Tensors], Tensor], parameters: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Run the model before a step.

        Args:
            forward: Loss as a function of the parameters.
            parameters: Values by name.

        Returns:
            The loss, and what else `step` is to get the gradients of.
        """
        return forward(parameters), []

    def step(self, now: Moment, parameters: Tensors, state: State) -> tuple[Tensors, State]:
        """Take one step.

        Args:
            now: Gradients and numbers.
            parameters: Values by name.
            state: Result of the step before, by parameter and shared; empty at first.

        Returns:
            New parameters and state.
        """
        parameters, by_parameter = dict(parameters), dict(state.get("by_parameter", {}))
        shared = dict(state.get("shared", {}))
        # Copies above: the tensors of the step before belong to its graph.
        directions = self.directions(now, shared)
        for i, group in enumerate(self.groups):
            read = Entries(i, group, now.numbers)
            for name in self.members[i]:
                # A parameter without a gradient stays as it is, and so does its state.
                if name in now.gradients:
                    own_numbers = dict(by_parameter.get(name, {}))
                    parameters[name] = self.update(parameters[name], directions[name], own_numbers, read)
                    by_parameter[name] = own_numbers
        return parameters, {"by_parameter": by_parameter, "shared": shared}

    def directions(self, now: Moment, shared: State) -> Tensors:
        """Return preconditioned gradients; by default the gradients.

        Args:
            now: As for `step`.
            shared: State that belongs to no parameter, whose entries are replaced.
        """
        return now.gradients

    def update(self, p: Tensor, g: Tensor, own: Tensors, read: Entries) -> Tensor:
        """Return the new value of one parameter.

        Args:
            p: The parameter.
            g: Its direction.
            own: Its state, whose entries are replaced.
            read: The numbers of its group.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Entries:
    """The numbers of one group: tensors where they are differentiated by, else as the optimizer has them.

    Attributes:
        index: Number of the group.
        group: The group.
        numbers: Entries of groups that are to be differentiated by.
    """

    index: int
    group: Mapping[str, Any]
    numbers: Mapping[Key, Tensor]

    def __getitem__(self, key: str) -> Any:
        if (self.index, key) in self.numbers:
            return self.numbers[self.index, key]
        # beta1 and beta2 are the parts of betas.
        return self.group["betas"][int(key[-1]) - 1] if key in ("beta1", "beta2") else self.group[key]


class SGD(Rule):
    """`torch.optim.SGD`: weight decay is added to the gradient, momentum sums."""

    keys = ("lr", "weight_decay", "momentum")

    def update(self, p: Tensor, g: Tensor, own: Tensors, read: Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        g = g + read["weight_decay"] * p
        past = own.get("momentum")
        # As torch: damping of momentum begins with the second step, and is nothing without momentum.
        share = 1 - read["dampening"] if self.groups[read.index]["momentum"] else 1
        average = g if past is None else read["momentum"] * past + share * g
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

    def update(self, p: Tensor, g: Tensor, own: Tensors, read: Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        # AdamW shrinks weights; Adam adds decay to the gradient.
        if self.decoupled:
            p = p * (1 - read["lr"] * read["weight_decay"])
        else:
            g = g + read["weight_decay"] * p
        mean, root = adam_averages(g, own, read["beta1"], read["beta2"])
        return p - read["lr"] * mean / (root + read["eps"])


def corrected(own: Tensors, name: str, new: Tensor, beta: Any) -> Tensor:
    """Return a moving average, corrected for its start from zero.

    Args:
        own: State that it is kept in with its total weight; both are replaced.
        name: Of the average.
        new: What is averaged.
        beta: Weight of the past.
    """
    past, weight = own.get(name, torch.zeros_like(new)), own.get(f"{name}_weight", new.new_zeros(()))
    # average <- beta average + (1 - beta) new, and the same of 1 for its weight
    own[name] = beta * past + (1 - beta) * new
    own[f"{name}_weight"] = beta * weight + (1 - beta)
    return own[name] / own[f"{name}_weight"]


def adam_averages(g: Tensor, own: Tensors, beta1: Any, beta2: Any) -> tuple[Tensor, ...]:
    """Return Adam's corrected mean and root mean square.

    Args:
        g: Gradient.
        own: State of the parameter, whose entries are replaced.
        beta1: Weight of the past in the mean.
        beta2: Weight of the past in the mean square.
    """
    return corrected(own, "mean", g, beta1), root_of(corrected(own, "square", g * g, beta2))


def root_of(square: Tensor) -> Tensor:
    """Return the root of a mean square, constant where it is zero: its slope would be infinite.

    Args:
        square: The mean square. Where it is zero every gradient was.
    """
    # Twice: where() alone would multiply an infinite slope by 0.
    alive = square > 0
    return torch.where(alive, square, 1.0).sqrt() * alive
