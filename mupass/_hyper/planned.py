"""Planned optimizers: momentum, decay and fallbacks of `mupass._optim.base`, as functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import pi
from typing import Any

import torch
from torch import Tensor

from mupass._errors import StudyError
from mupass._hyper.rules import Entries, Moment, Rule, State, Tensors, adam_averages, corrected
from mupass._optim.base import PlannedOptimizer


class PlannedRule(Rule):
    """`PlannedOptimizer`, but for what is done to the averaged gradients."""

    keys = ("lr", "weight_decay", "momentum", "damping", "beta1", "beta2", "eps")

    def __init__(self, optimizer: PlannedOptimizer, names: Mapping[Tensor, str]) -> None:
        super().__init__(optimizer, names)
        self.sums = optimizer.momentum_of == "directions"
        self.own: dict[str, int] = {}  # parameter -> number of its group
        for number, group in enumerate(self.groups):
            if group["algorithm"] == optimizer.spec.name:
                self.own.update(dict.fromkeys(self.members[number], number))

    def refuse(self, optimizer: Any) -> None:
        """Raise where the optimizer has an option that the rule does not follow, see `Rule`.

        Args:
            optimizer: The optimizer.

        Raises:
            StudyError: It has.
        """
        ranks = (
            optimizer.ranks > 1,
            "sums over ranks have no second derivative",
            "pass data_parallel=False",
        )
        options = {**self.options(optimizer), "data_parallel=True": ranks}
        for option, (is_set, reason, instead) in options.items():
            if is_set:
                name = type(optimizer).__name__
                raise StudyError(f"{option} of {name} cannot be differentiated here: {reason}; {instead}")

    def options(self, optimizer: Any) -> dict[str, tuple[bool, str, str]]:
        """Return the options that the rule does not follow.

        Args:
            optimizer: The optimizer.

        Returns:
            How an option is written -> whether it is set, why it is not followed, what to write instead.
        """
        raise NotImplementedError

    def directions(self, now: Moment, shared: State) -> Tensors:
        """Return gradients, those of own parameters averaged and preconditioned, see `Rule`."""
        # Fallbacks keep their averages to themselves, in `update`.
        own_gradients = {name: gradient for name, gradient in now.gradients.items() if name in self.own}
        averages, means = dict(shared.get("averages", {})), dict(own_gradients)
        if not self.sums:
            for name, gradient in own_gradients.items():
                number, average = self.own[name], dict(averages.get(name, {}))
                momentum = Entries(number, self.groups[number], now.numbers)["momentum"]
                means[name] = corrected(average, "mean", gradient, momentum)
                averages[name] = average
        shared["averages"] = averages
        of_own = replace(now, gradients=own_gradients)
        return {**now.gradients, **self.preconditioned(of_own, means, shared)}

    def preconditioned(self, now: Moment, means: Tensors, shared: State) -> Tensors:
        """Return the directions of own parameters.

        Args:
            now: As for `step`, with the gradients of own parameters alone.
            means: What is preconditioned: their averages, or the same again.
            shared: State of the preconditioner, whose entries are replaced.
        """
        raise NotImplementedError

    def update(self, p: Tensor, g: Tensor, own: Tensors, read: Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        # Fallbacks step by rules of their own; own parameters are moved along their direction.
        algorithm = read["algorithm"]
        if algorithm in ("adamw", "adam_atan2"):
            mean, root = adam_averages(g, own, read["beta1"], read["beta2"])
            epsilon = read["eps"] * read["mupass_epsilon"]
            g = mean / (root + epsilon) if algorithm == "adamw" else torch.atan2(mean, root) * (4 / pi)
        elif algorithm == "sgd" or self.sums:
            # Heavy ball: directions add up.
            if "momentum" in own:
                g = read["momentum"] * own["momentum"] + g
            own["momentum"] = g
        # Decay leaves the width factor out.
        p = p * (1 - read["lr"] * read["weight_decay"])
        return p - read["lr"] * read["mupass_scale"] * g
