"""Saved states: checked as a whole before anything of an optimizer is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mupass._errors import OptimizerError, is_number
from mupass._optim.checks import check_betas, check_number, check_period
from mupass._optim.schedules import watch_rates
from mupass._optim.training import BOUNDS
from mupass._optim.vocabulary import Group, State
from mupass._parallel import is_sharded, local, sharded_like

# Keys of groups that must not be negative, with what they must stay below.
NUMBERS = {**BOUNDS, "mupass_seed": math.inf}
NAMES = "mupass_names"  # of the parameters of a group, in order
THAWED = "mupass_thawed"  # those of them that were frozen at first, and are trained
FIXED = ("algorithm", "mupass_scale", "mupass_epsilon")
# Averages that cannot be negative, by the end of their key.
POSITIVE = (
    "weight",
    "weights",
    "rows",
    "square",
    "peak",
    "highest",
    "recent",
    "rooted",
    "rho",
    "values",
    "sum",
    "slope",
)


def saved_kind(name: str, spec: str, version: int) -> str:
    """Return what a saved state must have in common with an optimizer.

    Args:
        name: Its class.
        spec: Its spec.
        version: Format of its state.
    """
    return f"{name} {spec}, format {version}"


def check_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    thawed: Mapping[Tensor, State],
    needed: Collection[str],
    saved: Any,
) -> tuple[list[dict[str, Any]], dict[Tensor, State]]:
    """Return the settings of every group and the state of every parameter, after all was found to fit.

    Args:
        optimizer: The optimizer that is to take it over.
        names: Of its parameters, frozen ones too.
        thawed: State that those would have which were frozen, and are no more.
        needed: Settings of groups that a state must have, where this optimizer's group has them.
        saved: The state.

    Raises:
        OptimizerError: It does not fit; the message says where.
    """
    class_name = type(optimizer).__name__
    if not isinstance(saved, Mapping):
        raise OptimizerError(f"not a state of mupass.{class_name}: {type(saved).__name__} instead of a dict")
    if "mupass" in saved:
        raise OptimizerError(
            f"this state of mupass.{class_name} was written by an older version, which kept averages in "
            "another form; train on with that version, or start the optimizer anew"
        )
    for key, wanted_type in (("state", Mapping), ("param_groups", list)):
        if not isinstance(saved.get(key), wanted_type):
            raise OptimizerError(
                f"not a state of mupass.{class_name}: {key!r} is missing or no {wanted_type.__name__}"
            )
    groups, own_groups = saved["param_groups"], optimizer.param_groups
    for number, group in enumerate(groups):
        _check_kind(f"group {number}", group, own_groups[0]["mupass_kind"])
    if len(groups) != len(own_groups):
        raise OptimizerError(
            f"the state has {len(groups)} parameter groups; this {class_name} has {len(own_groups)}. "
            "Which layers are frozen, and what sets rates (base width, block_size, overrides, decay), must "
            "be the same"
        )
    for parameter, name in names.items():
        if parameter.is_meta and optimizer.state[parameter]:
            raise OptimizerError(
                f"{name} is on the meta device, where this {class_name} keeps no numbers that a state could "
                "be copied into: give the model its values first, make the optimizer, then load the state"
            )
    # Keys of the state are those that the groups list as their parameters.
    settings, listed_keys, states = [], set(), {}
    for number, (saved_group, own_group) in enumerate(zip(groups, own_groups, strict=True)):
        settings.append(_check_group(f"group {number}", saved_group, own_group, needed))
        for key, parameter in zip(saved_group["params"], own_group["params"], strict=True):
            listed_keys.add(key)
            states[parameter] = saved["state"].get(key, {})
            own_state = optimizer.state[parameter]
            if not own_state:
                own_state = _of_thawed(
                    names[parameter], states[parameter], saved_group, thawed.get(parameter)
                )
            _check_entry(names[parameter], states[parameter], own_state)
    stray = [key for key in saved["state"] if key not in listed_keys]
    if stray:
        raise OptimizerError(f"the state has entries of unknown parameters: {stray[0]!r}")
    return settings, states


def _of_thawed(name: str, theirs: Any, group: Group, ours: State | None) -> State:
    """Return the state that a parameter should have which was frozen at first; none where it still was."""
    if theirs and ours is None:
        raise OptimizerError(
            f"{name} was trained in the run that was saved, and is frozen here: layers that were thawed then "
            "must be so before its state is loaded"
        )
    if not theirs and name in group[THAWED]:
        raise OptimizerError(
            f"the state of {name}, which was thawed in the run that was saved, is lost: torch's flattened "
            "form (flatten_optimizer_state_dict=True) leaves it out; take the other"
        )
    return ours if theirs and ours else {}


def _check_kind(where: str, group: Any, ours: str) -> None:
    """Refuse a group of another optimizer, or what is no group."""
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
        raise OptimizerError(f"{where} of the state is damaged: no parameters")
    for key in group["params"]:
        if not isinstance(key, (int, str)):
            raise OptimizerError(f"{where} of the state is damaged: {key!r} stands for no parameter")
    # Class, spec and format in one text.
    kind = group.get("mupass_kind")
    if kind != ours:
        saved_name = isinstance(kind, str) and kind
        raise OptimizerError(f"state of {saved_name or 'an unknown optimizer'}; this is {ours}")


def _check_group(where: str, theirs: Group, ours: Group, needed: Collection[str]) -> dict[str, Any]:
    """Return the settings of one group."""
    if len(theirs["params"]) != len(ours["params"]):
        raise OptimizerError(
            f"{where} of the state has {len(theirs['params'])} parameters; this optimizer's has "
            f"{len(ours['params'])}: other parameters, groups or factors"
        )
    for key in ours:
        if key in needed and key not in theirs:
            raise OptimizerError(f"{where} of the state lacks {key!r}")
    _check_fixed(where, theirs, ours)
    _check_names(where, theirs, ours)
    _check_numbers(where, theirs, ours)
    _check_progress(where, theirs, ours)
    settings = {key: value for key, value in theirs.items() if key != "params"}
    return {**settings, NAMES: ours[NAMES]}


def _check_names(where: str, theirs: Group, ours: Group) -> None:
    """Refuse a state by position of a model that has its parameters in another order, or by other names."""
    own_names, saved_names = ours[NAMES], theirs[NAMES]
    if not isinstance(saved_names, (list, tuple)) or len(saved_names) != len(own_names):
        raise OptimizerError(f"{where} of the state is damaged: {NAMES} is {saved_names!r}")
    if not isinstance(theirs[THAWED], (list, tuple)):
        raise OptimizerError(f"{where} of the state is damaged: {THAWED} is {theirs[THAWED]!r}")
    for key, saved_name, name in zip(theirs["params"], saved_names, own_names, strict=True):
        # torch's functions for checkpoints have matched what they give names as keys.
        found = saved_name if isinstance(key, int) else key if key in own_names else name
        if found != name:
            raise OptimizerError(
                f"{where} of the state has {found!r} where this optimizer has {name!r}: the state of a model "
                "whose parameters have another order or other names, so that they would get each other's. "
                "Register modules in the order of the run that was saved, or load the state by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict; if they were renamed, "
                f"write the new names into {NAMES} of the saved groups"
            )


def _check_fixed(where: str, theirs: Group, ours: Group) -> None:
    """Refuse settings that follow from the model and the groups, where they are others."""
    for key in FIXED:
        if not _same(theirs[key], ours[key]):
            raise OptimizerError(
                f"{where} of the state has {key}={theirs[key]!r}, this optimizer {ours[key]!r}: the state of "
                "a model of another base width, or other groups"
            )


def _check_numbers(where: str, theirs: Group, ours: Group) -> None:
    """Refuse rates, decays and the like that are none."""
    for key, high in NUMBERS.items():
        if key in ours:
            value = theirs[key]
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            check_number(f"{key} of {where} of the state", value, 0, high)
    if "betas" in ours:
        check_betas(f"betas of {where} of the state", theirs["betas"])


def _check_progress(where: str, theirs: Group, ours: Group) -> None:
    """Refuse what does not say how far a run has come, and what waits for its next step."""
    for key in ("mupass_watching", "mupass_due"):
        if key in ours and not isinstance(theirs[key], bool):
            raise OptimizerError(f"{key} of {where} of the state is {theirs[key]!r}, neither True nor False")
    steps = theirs["mupass_steps"]
    if not (isinstance(steps, int) and steps == 0):
        check_period(f"mupass_steps of {where} of the state", steps)


def _same(theirs: Any, ours: Any) -> bool:
    """Return whether two settings are equal, numbers but for rounding errors."""
    if isinstance(ours, float):
        return is_number(theirs) and math.isclose(theirs, ours, rel_tol=1e-9)
    return bool(type(theirs) is type(ours) and theirs == ours)


def _check_entry(name: str, theirs: Any, ours: State) -> None:
    """Check the state of one parameter, tensor by tensor."""
    if not isinstance(theirs, Mapping):
        raise OptimizerError(f"the state of {name} is damaged: {type(theirs).__name__} instead of a dict")
    if theirs.keys() != ours.keys():
        missing = sorted(ours.keys() - theirs.keys())
        if missing:
            difference = f"lacks {missing[0]!r}"
        else:
            difference = f"has {min(theirs.keys() - ours.keys(), key=str)!r} besides"
        raise OptimizerError(f"the state of {name} {difference}: another optimizer's, or damaged")
    # Same keys and shapes, finite numbers, and no negative ones in averages of squares.
    for key, own_tensor in ours.items():
        value, where = theirs[key], f"{key!r} in the state of {name}"
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            raise OptimizerError(f"{where} is no tensor of floating point numbers")
        if value.layout != torch.strided:
            raise OptimizerError(f"{where} is a sparse tensor")
        if value.shape != own_tensor.shape:
            raise OptimizerError(
                f"{where} has shape {tuple(value.shape)}; this optimizer's {tuple(own_tensor.shape)}"
            )
        part = local(value)
        if part.device.type == "meta" or not bool(part.isfinite().all()):
            raise OptimizerError(f"{where} holds NaN or infinity, or nothing at all")
        if key.rstrip("0123456789").endswith(POSITIVE) and not bool((part >= 0).all()):
            raise OptimizerError(f"{where} holds negative numbers")


@torch.no_grad()
def copy_state(
    optimizer: torch.optim.Optimizer,
    settings: list[dict[str, Any]],
    states: Mapping[Tensor, State],
) -> None:
    """Copy a state that was checked into an optimizer; its tensors stay the same objects.

    Args:
        optimizer: The optimizer.
        settings: Of every group.
        states: Of every parameter.
    """
    for group, own_settings in zip(optimizer.param_groups, settings, strict=True):
        # As in torch: what a scheduler has added since goes, or the next one would begin from it.
        for key in group.keys() - own_settings.keys() - {"params"}:
            del group[key]
        group.update(own_settings)
    watch_rates(optimizer)  # their ratios are those of the state now
    for parameter, saved in states.items():
        for name, own_tensor in optimizer.state[parameter].items():
            if own_tensor.device.type == "meta":  # another rank keeps it
                continue
            value = saved[name]
            if not is_sharded(value):
                value = sharded_like(value, own_tensor)
            local(own_tensor).copy_(local(value))
