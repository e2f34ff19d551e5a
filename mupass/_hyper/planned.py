"""Planned optimizers: momentum, decay and fallbacks of `mupass._optim.base`, as functions."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from mupass._hyper.rules import Entries, Rule, adam_averages
from mupass._optim.fallback import BETAS, EPSILON


class PlannedRule(Rule):
    """`PlannedOptimizer`, but for what directions are."""

    keys = ("lr", "weight_decay", "momentum", "damping")

    def update(self, count: int, p: Tensor, g: Tensor, own: dict[str, Tensor], read: Entries) -> Tensor:
        """Return the new value of one parameter, see `Rule`."""
        algorithm = read["algorithm"]
        if algorithm in ("adamw", "adam_atan2"):
            mean, root = adam_averages(count, g, own, *BETAS)
            epsilon = EPSILON * read["mupass_epsilon"]
            g = mean / (root + epsilon) if algorithm == "adamw" else torch.atan2(mean, root) * (4 / pi)
        else:
            past = own.get("momentum")
            g = g if past is None else read["momentum"] * past + g
            own["momentum"] = g
        p = p * (1 - read["lr"] * read["weight_decay"])
        return p - read["lr"] * read["mupass_scale"] * g
