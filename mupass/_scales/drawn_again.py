"""Whether values have the size that the plan gave them, or that of a draw which nothing has scaled since."""

from __future__ import annotations

from collections import defaultdict
from math import log, sqrt

import torch
from torch import Tensor, nn

from mupass._errors import some, warn
from mupass._parallel import is_sharded, whole
from mupass._scales.entry import Entry
from mupass._scales.init import Values
from mupass._scales.learned import FEWEST, looks_trained
from mupass._scales.plan import Plan

LEAST = 1.1  # factor on the mean square that can be told from chance and from a few steps
TOLERANCE = 0.02  # of the mean square, beside what chance makes of it
DEVIATIONS = 5.0  # standard errors of a mean square that chance is allowed


def scaled_already(parameters: Values, plan: Plan) -> dict[str, Entry]:
    """Return the parameters whose values have the plan's size rather than that before scaling.

    Modules are drawn as a whole, and what a few entries cannot tell the others of their module do: the size
    under which all of them are likelier counts.

    Args:
        parameters: Values by name.
        plan: The plan.
    """
    telling = _telling(plan)
    evidence: dict[str, float] = defaultdict(float)
    for name, entry in telling.items():
        square = _mean_square(parameters[name]) / _variance(entry)
        # Log-likelihoods of normal entries with the plan's std, and with the one before scaling.
        scaled, unscaled = -square / 2, log(entry.init_factor) - square * entry.init_factor**2 / 2
        # A module's parameters are drawn together, so their evidence adds up.
        evidence[_owner(name)] += parameters[name].numel() * (scaled - unscaled)
    return {name: entry for name, entry in telling.items() if evidence[_owner(name)] > 0}


def drawn_again(parameters: Values, plan: Plan) -> list[str]:
    """Name the matrices that are draws of their own law's size: whatever made them, nothing scaled them.

    Values that training has marked are none, and neither are matrices whose size scaling left alone.

    Args:
        parameters: Values by name.
        plan: The plan.
    """
    if plan.trained or plan.folded:
        return []
    names = []
    for name, entry in _telling(plan).items():
        values = parameters.get(name)
        if values is None or values.is_meta or values.numel() < FEWEST:
            continue
        if not entry.geometry.fan_in_axes:  # a vector bears no mark of training
            continue
        if not LEAST <= max(entry.init_factor, 1 / entry.init_factor) ** 2:
            continue
        # In units of what the law gave after the factor, and before it.
        after = _mean_square(values) / _variance(entry)
        before = after * entry.init_factor**2
        if _may_be_one(after, values.numel()) or not _may_be_one(before, values.numel()):
            continue
        # Shards are not gathered to look for marks of training.
        if is_sharded(values) or looks_trained(values, entry.geometry) is False:
            names.append(name)
    return names


def tell_drawn_again(model: nn.Module, plan: Plan) -> None:
    """Warn of parameters that were drawn anew behind a transform, so that the plan's initialization is lost.

    Args:
        model: The transformed model.
        plan: Its plan.
    """
    names = drawn_again(dict(model.named_parameters()), plan)
    if names:
        text = (
            f"the plan's initialization is lost in {some(names)}: the size of the values is that of a draw "
            "after mupass.transform (reset_parameters, init_weights, to_empty). Call "
            "mupass.initialize(model) before the optimizer is made"
        )
        warn([text])


def _telling(plan: Plan) -> dict[str, Entry]:
    """Return the parameters whose size can tell: it is known, and scaling changed it."""
    return {entry.geometry.name: entry for entry in plan.entries if entry.init_factor != 1 and entry.init_std}


def _variance(entry: Entry) -> float:
    """Return the variance of the plan's initial values."""
    assert entry.init_std is not None
    return entry.init_std**2


def _mean_square(values: Tensor) -> float:
    """Return the mean square of the entries; of a parameter in shards, that of all of them."""
    values = values.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    return whole(values.float().square().mean()).item()


def _may_be_one(square: float, entries: int) -> bool:
    """Return whether chance explains a mean square, in units of its expectation."""
    # The squares of normal entries vary by 2; those of flat ones by less.
    return abs(square - 1) <= TOLERANCE + DEVIATIONS * sqrt(2 / entries)


def _owner(name: str) -> str:
    """Return the module that a parameter belongs to."""
    return name.rpartition(".")[0]
