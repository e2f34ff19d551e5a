"""Groups as `param_groups` made them: what an optimizer of ``torch.optim`` has lost of them since."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mupass._optim.vocabulary import Group
from mupass._scales.plan import Plan

KEPT = 4  # of the groups that were made for one model
SCALE = "mupass_scale"
TOLERANCE = 1e-4  # of factors, relative
Difference = tuple[str, float, float]  # a parameter, its width factor, and the one that is wanted


@dataclass(frozen=True)
class MadeGroups:
    """One call of `param_groups`.

    Attributes:
        names: Identity of each parameter -> its name.
        scales: Identity of each parameter -> its width factor.
        numbers: Keyword -> number, at the base width: ``lr``, ``weight_decay``, ``eps``.
        factors: ``weight_decay`` and ``eps`` -> identity of each parameter -> what the number is times.
        folded: Whether weights held their multipliers already.
    """

    names: Mapping[int, str]
    scales: Mapping[int, float]
    numbers: Mapping[str, float]
    factors: Mapping[str, Mapping[int, float]]
    folded: bool


_made: WeakKeyDictionary[nn.Module, list[MadeGroups]] = WeakKeyDictionary()


def note_groups(
    root: nn.Module,
    plan: Plan,
    groups: Sequence[Group],
    numbers: Mapping[str, float],
    factors: Mapping[str, Mapping[int, float]],
) -> None:
    """Keep in mind groups that were made for a model.

    Args:
        root: The model.
        plan: Its plan.
        groups: The groups.
        numbers: See `MadeGroups`.
        factors: See `MadeGroups`.
    """
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    scales: dict[int, float] = {}
    for group in groups:
        scales.update(dict.fromkeys(map(id, group["params"]), float(group[SCALE])))
    made = MadeGroups(names, scales, dict(numbers), factors, plan.folded)
    _made[root] = [*_made.get(root, ())[-KEPT + 1 :], made]


def made_for(root: nn.Module, members: Collection[Tensor]) -> list[MadeGroups]:
    """Return calls for a model all of whose parameters an optimizer has, even if the model has lost them.

    Args:
        root: The model.
        members: Parameters of the optimizer, which keep their identities from being used again.
    """
    identities = set(map(id, members))
    return [made for made in _made.get(root, ()) if made.names.keys() <= identities]


def lost_keywords(optimizer: torch.optim.Optimizer, made: Sequence[MadeGroups]) -> list[str]:
    """Return keywords of an optimizer's class that its groups override, since they have numbers of their own.

    Args:
        optimizer: The optimizer.
        made: Calls that may have made its groups.
    """
    usual = inspect.signature(type(optimizer)).parameters
    lost = []
    for key in ("lr", "weight_decay", "eps"):
        given = optimizer.defaults.get(key)
        if key not in usual or isinstance(given, bool) or not isinstance(given, (int, float)):
            continue
        numbers = [call.numbers[key] for call in made if key in call.numbers]
        # What was left out, and zero, ask for nothing.
        if not numbers or not given or given == usual[key].default:
            continue
        if not any(isclose(given, number, rel_tol=TOLERANCE) for number in numbers):
            lost.append(f"{key}={given:g} (the groups were made with {numbers[-1]:g})")
    return lost


def other_factor(groups: Mapping[Tensor, Group], made: Sequence[MadeGroups]) -> Difference | None:
    """Return a parameter whose group has another width factor than it was made with, and both; or None.

    Args:
        groups: Group of every parameter of an optimizer.
        made: Calls that may have made them.
    """
    difference = None
    for call in made:
        wanted = {identity: (call.names[identity], scale) for identity, scale in call.scales.items()}
        difference = first_difference(groups, wanted)
        if difference is None:
            return None
    return difference


def first_difference(
    groups: Mapping[Tensor, Group], wanted: Mapping[int, tuple[str, float]]
) -> Difference | None:
    """Return the first parameter whose group has another width factor than is wanted, and both; or None.

    Args:
        groups: Group of every parameter of an optimizer.
        wanted: Identity of each parameter -> its name and factor.
    """
    group_of = {id(parameter): group for parameter, group in groups.items()}
    for identity, (name, factor) in wanted.items():
        given = group_of.get(identity, {}).get(SCALE)
        if given is not None and not isclose(float(given), factor, rel_tol=TOLERANCE):
            return name, float(given), factor
    return None


def tied_since(
    gone: Collection[Tensor], places: Mapping[str, Tensor], members: Collection[Tensor], made: MadeGroups
) -> list[str]:
    """Return the names of parameters in whose place a model has another one of an optimizer's by now.

    Args:
        gone: Parameters of the optimizer that the model has no more.
        places: Parameters of the model by all of their names.
        members: Parameters of the optimizer.
        made: The call that made its groups.
    """
    names = [made.names[id(parameter)] for parameter in gone if id(parameter) in made.names]
    return [name for name in names if name in places and places[name] in members]


def told_of_fold(plan: Plan, owner: str, made: str) -> str:
    """Return a warning of parameters that `mupass.fold` has put multipliers into, or nothing without any.

    Args:
        plan: Of a model as it is now, behind the fold.
        owner: Whose rates are those of before.
        made: What was made before.
    """
    geometries = [entry.geometry for entry in plan.entries]
    names = [geometry.name for geometry in geometries if geometry.folded != 1 or geometry.folded_in != 1]
    if not names:
        return ""
    return (
        f"{owner}: the model was folded after {made} made, and the rates of {', '.join(names)} are those of "
        "before: make the optimizer anew"
    )
