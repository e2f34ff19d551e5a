"""Learning rates in training: whether schedules keep ratios between groups, and whether the plan is used.

A schedule that multiplies keeps the ratios between parameter groups. One that sets absolute rates
(``OneCycleLR(max_lr=x)``, ``eta_min=``, ``g["lr"] = x``) does not: width factors of `param_groups`, or the
fallback's own rate in an optimizer of mupass, are lost. One global hook of ``torch.optim`` looks at the rates
before each step; it compares a few numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mupass._errors import warn
from mupass._optim.made_groups import (
    SCALE,
    TOLERANCE,
    Difference,
    MadeGroups,
    first_difference,
    lost_keywords,
    made_for,
    other_factor,
    tied_since,
    told_of_fold,
)
from mupass._optim.vocabulary import Group
from mupass._rewrite import MULTIPLIED, tell_lost_multipliers
from mupass._scales.marks import marked_models
from mupass._scales.optimizers import OPTIMIZERS
from mupass._scales.plan import ATTRIBUTE, Plan

LOOKS = 10  # first steps in each of which models are looked through; then one in as many
OwnModel = tuple[nn.Module, list[MadeGroups]]  # a model, and the calls that made groups for it
ADADELTA = "Adadelta"
WITHOUT_RULE = (
    "{}: mupass.param_groups has no width factors for it. It starts with steps of the root of its eps, which "
    "it adds to squared gradients, too, whose size follows the width: take AdamW, or RMSprop"
)
FAMILY = "mupass_optimizer"  # row of the scale table that groups were made for
LAYER = "lr_scale"  # what schedules of timm multiply the rate of a group by: layer decay


@dataclass
class RateWatch:
    """Rates of one optimizer, as their ratios are to stay.

    Attributes:
        start: Of each watched group.
        groups: The list of groups that they belong to; loading a state makes a new one.
        own: Whether the optimizer is one of mupass, whose ``lr`` is without the width factor.
        done: Whether there is nothing more to say of rates.
        planned: Whether groups are of `mupass.param_groups`, in an optimizer that is not of mupass.
        idle: Identities of its parameters that had no gradient in the last step.
        steps: How many steps it has begun.
        strangers: Parameters with a gradient that were added to a model of its parameters, by name, with
            their version: one that is the same at the next look was moved by nobody.
        told: Names of those that were told.
        factors: ``weight_decay`` and ``eps`` -> identity of a parameter -> what its number is times.
        unfolded: Models of its parameters whose weights do not hold their multipliers.
    """

    start: dict[int, float]
    groups: int
    own: bool = False
    done: bool = False
    planned: bool = False
    idle: frozenset[int] = frozenset()
    steps: int = 0
    strangers: dict[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    factors: dict[str, dict[int, float]] = field(default_factory=dict)
    unfolded: WeakSet[nn.Module] = field(default_factory=WeakSet)


_watches: WeakKeyDictionary[torch.optim.Optimizer, RateWatch] = WeakKeyDictionary()
_hooked: list[Any] = []


def watch_models() -> None:
    """Notice optimizers that are made of a transformed model's parameters without its plan."""
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_step))


def watch_rates(optimizer: torch.optim.Optimizer) -> None:
    """Keep in mind the rates of an optimizer of mupass as it is made.

    Args:
        optimizer: The optimizer, with its groups.
    """
    rates = _rates(optimizer.param_groups)
    _watches[optimizer] = RateWatch(rates, id(optimizer.param_groups), own=True)
    watch_models()


def check_rates(optimizer: torch.optim.Optimizer) -> None:
    """Warn in the step in which the ratios between groups are lost, once for each optimizer.

    Rates that are tensors on an accelerator are not read: that would wait for it in every step.

    Args:
        optimizer: Any optimizer, about to take a step.
    """
    watch = _watches.get(optimizer)
    if watch is None:
        watch = _watches[optimizer] = _first_look(optimizer)
    if watch.done:
        return
    groups = optimizer.param_groups
    if watch.groups != id(groups):  # a state was loaded
        watch.start, watch.groups = _rates(groups), id(groups)
        _check_factors(optimizer, _own_models(optimizer))
    # A group that starts at zero, as a warmup does, says nothing about ratios.
    rates = {number: rate for number, rate in _rates(groups).items() if watch.start.get(number)}
    if any(rate < 0 or not isfinite(rate) for rate in rates.values()):
        return  # the step itself refuses them
    if any(rates.values()) and not _equal([rate / watch.start[number] for number, rate in rates.items()]):
        watch.done = True
        _tell_lost(optimizer, watch.own)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    check_rates(optimizer)
    watch = _watches[optimizer]
    if watch.planned:
        _check_numbers(optimizer, watch)
        _check_folded(optimizer, watch)
        _check_members(optimizer, watch)
        _check_added(optimizer, watch)


def _first_look(optimizer: torch.optim.Optimizer) -> RateWatch:
    """Look at an optimizer of ``torch.optim`` before its first step."""
    groups = optimizer.param_groups
    watch = RateWatch({}, id(groups))
    scales = {number: float(group[SCALE]) for number, group in enumerate(groups) if SCALE in group}
    if not scales:
        watch.done = True
        _check_planned(optimizer)
        return watch
    watch.planned = True
    _check_family(optimizer)
    own_models = _own_models(optimizer)
    _check_keywords(optimizer, own_models)
    _check_factors(optimizer, own_models)
    for _, made in own_models:
        for key, factors in made[-1].factors.items():
            watch.factors.setdefault(key, {}).update(factors)
    watch.unfolded.update(root for root, made in own_models if not made[-1].folded)
    _note_start(optimizer, watch, scales)
    return watch


def _note_start(optimizer: torch.optim.Optimizer, watch: RateWatch, scales: Mapping[int, float]) -> None:
    """Note the rates that groups start with; warn where their ratios are lost before the first step.

    Args:
        optimizer: The optimizer.
        watch: What is known of it.
        scales: Width factors, by number of the group.
    """
    groups = optimizer.param_groups
    # Schedules of timm multiply a group's rate by its layer's factor.
    layered = {number: scale * _layer_factor(groups[number]) for number, scale in scales.items()}
    rates = {number: rate for number, rate in _rates(groups).items() if number in scales}
    # One rate for all groups, where their width factors differ.
    one_rate = len(rates) > 1 and _equal(list(rates.values()))
    if one_rate and any(rates.values()) and not _equal(list(scales.values())):
        watch.done = True  # a scheduler has set one rate for all groups before the first step
        _tell_lost(optimizer, own=False)
    # All are zero where a warmup starts; a layer of the factor zero is not trained.
    elif _equal([rate / layered[number] for number, rate in rates.items() if layered[number]]):
        watch.start = layered
    elif _equal([rate / scales[number] for number, rate in rates.items()]):
        watch.start = dict(scales)
    else:
        watch.start = rates  # the user has given some groups rates of their own


def _check_planned(optimizer: torch.optim.Optimizer) -> None:
    """Warn of an optimizer that gives parameters one rate where the plan of their model has several."""
    rates: dict[Tensor, float | None] = {}
    group_of: dict[Tensor, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            rates[parameter], group_of[parameter] = _rate(group), number
    for root, plan in _planned_models():
        scaled = plan.for_optimizer(_family(optimizer))
        own_rates: list[float] = []
        without_layers: list[float] = []
        factors: dict[str, float] = {}
        by_group: dict[int, list[float]] = {}
        for name, parameter in root.named_parameters():
            if parameter not in rates:
                continue
            rate, layer = rates[parameter], _layer_factor(optimizer.param_groups[group_of[parameter]])
            if rate is not None and layer:
                own_rates.append(rate)
                without_layers.append(rate / layer)
            if name in scaled:
                factors[name] = scaled[name].scales.lr
                by_group.setdefault(group_of[parameter], []).append(factors[name])
        # One group, or all groups with one rate but for layer decay, for parameters whose factors differ.
        mixed = not all(_equal(values) for values in by_group.values())
        one_rate = _equal(own_rates) or _equal(without_layers)
        if mixed or (one_rate and not _equal(list(factors.values()))):
            _tell_unplanned(optimizer, root, factors)
            return


def _planned_models() -> list[tuple[nn.Module, Plan]]:
    """Return the transformed models that are alive, with their plans."""
    return [(root, vars(root)[ATTRIBUTE]) for root in marked_models() if ATTRIBUTE in vars(root)]


def _groups_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Group]:
    """Return the group of every parameter of an optimizer."""
    groups: dict[Tensor, Group] = {}
    for group in optimizer.param_groups:
        groups.update(dict.fromkeys(group["params"], group))
    return groups


def _check_family(optimizer: torch.optim.Optimizer) -> None:
    """Warn of groups that were made for another optimizer, where its width factors differ."""
    name = type(optimizer).__name__
    made_for = {str(group[FAMILY]) for group in optimizer.param_groups if FAMILY in group}
    own = _exact_family(optimizer)
    if not own or len(made_for) != 1 or made_for == {own}:
        return
    (other,) = made_for
    groups = _groups_of(optimizer)
    if own == ADADELTA:
        _tell_without_rule(name, groups)
        return
    for root, plan in _planned_models():
        text, difference = "the rate", _difference(root, plan.for_optimizer(own), groups)
        if difference is None:
            text, difference = "the weight decay", _other_decay(root, plan, groups, (other, own))
        if difference is not None:
            parameter, given, wanted = difference
            text = (
                f"{name} is given groups that mupass.param_groups made for {other}: {parameter} has {text} "
                f"times {given:.3g}, and {own} wants {wanted:.3g}. Write "
                f'mupass.param_groups(model, lr=..., optimizer="{own}")'
            )
            warn([text])
            return


def _tell_without_rule(name: str, groups: Mapping[Tensor, Group]) -> None:
    """Warn of an optimizer that has no row in the scale table, where a row would have width factors."""
    for root, plan in _planned_models():
        # Gradients have the orders that Adam's epsilon follows.
        orders = [entry.scales.epsilon for entry in plan.for_optimizer("adam").entries]
        if not _equal([1.0, *orders]) and not groups.keys().isdisjoint(root.parameters()):
            warn([WITHOUT_RULE.format(name)])


def _exact_family(optimizer: torch.optim.Optimizer) -> str:
    """Return the row of the scale table that a class of ``torch.optim`` has; nothing without one.

    A class of the caller's that is derived from one of torch steps as that does.
    """
    rows = {ADADELTA: ADADELTA}
    for row in OPTIMIZERS.values():
        rows.update(dict.fromkeys((row.torch_class, *row.alike), row.name))
    exact = [rows[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in rows]
    if not exact:
        return ""
    adds_decay = exact[0] in OPTIMIZERS and OPTIMIZERS[exact[0]].normalizes_decay
    # RAdam(groups, decoupled_weight_decay=True)
    if adds_decay and any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):
        return rows["AdamW"]
    return exact[0]


def _other_decay(
    root: nn.Module, plan: Plan, groups: Mapping[Tensor, Group], rows: tuple[str, str]
) -> Difference | None:
    """Return the first parameter whose decay has a width factor of another row of the table, and both.

    Adam adds decay to the gradient, of whose order it is then, and AdamW does not.

    Args:
        root: A model.
        plan: Its plan.
        groups: Group of every parameter of an optimizer.
        rows: That which groups were made for, and that of the optimizer.
    """
    normalizes = [OPTIMIZERS[row].normalizes_decay for row in rows]
    if normalizes[0] == normalizes[1]:
        return None
    scaled = plan.for_optimizer(rows[normalizes.index(True)])
    for name, parameter in root.named_parameters():
        if name in scaled and groups.get(parameter, {}).get("weight_decay"):
            order = scaled[name].scales.epsilon
            if not _equal([1.0, order]):
                factors = [order if normal else 1.0 for normal in normalizes]
                return name, factors[0], factors[1]
    return None


def _difference(root: nn.Module, plan: Plan, groups: Mapping[Tensor, Group]) -> Difference | None:
    """Return the first parameter whose group has another width factor than a plan, and both factors."""
    wanted = {id(p): (name, plan[name].scales.lr) for name, p in root.named_parameters() if name in plan}
    return first_difference(groups, wanted)


def _own_models(optimizer: torch.optim.Optimizer) -> list[OwnModel]:
    """Return the models that an optimizer's groups were made for, with these calls."""
    members = _groups_of(optimizer).keys()
    found = [(root, made_for(root, members)) for root, _ in _planned_models()]
    return [(root, made) for root, made in found if made]


def _check_keywords(optimizer: torch.optim.Optimizer, own_models: Sequence[OwnModel]) -> None:
    """Warn of keywords that a class was given and that its groups override."""
    for _, made in own_models:
        lost = lost_keywords(optimizer, made)
        if lost:
            text = (
                f"{type(optimizer).__name__} was given {', '.join(lost)}, which the groups of "
                "mupass.param_groups override with numbers of their own: give them to "
                "mupass.param_groups(model, ...) instead"
            )
            warn([text])


def _check_factors(optimizer: torch.optim.Optimizer, own_models: Sequence[OwnModel]) -> None:
    """Warn of width factors that came with a loaded state and are not those of the model's plan."""
    groups = _groups_of(optimizer)
    for _, made in own_models:
        difference = other_factor(groups, made)
        if difference is not None:
            parameter, given, wanted = difference
            text = (
                f"{type(optimizer).__name__}: {parameter} has the rate times {given:.3g}, as in a state that "
                f"was loaded, and the plan of the model wants {wanted:.3g}: the state is of another base "
                "width or plan. Transform as in the run that was saved (base=, or plan=)"
            )
            warn([text])


def _check_numbers(optimizer: torch.optim.Optimizer, watch: RateWatch) -> None:
    """Warn of a decay or an epsilon that is one number in all groups, where their factors differ."""
    for key, factor_of in watch.factors.items():
        numbers, factors = [], []
        for group in optimizer.param_groups:
            value, first = group.get(key), next(iter(group["params"]), None)
            # Groups without decay, as of norms and biases, say nothing.
            if isinstance(value, (int, float)) and value and id(first) in factor_of:
                numbers.append(float(value))
                factors.append(factor_of[id(first)])
        if key in watch.told or not _equal(numbers) or _equal(factors):
            continue
        watch.told.add(key)
        text = (
            f"{type(optimizer).__name__}: a loop sets one {key}, {numbers[0]:.3g}, for all groups, which "
            "mupass.param_groups gave numbers that follow the width: its factors are lost. Multiply what is "
            f'there, g["{key}"] *= new / old, or give {key}= to mupass.param_groups'
        )
        warn([text])


def _check_folded(optimizer: torch.optim.Optimizer, watch: RateWatch) -> None:
    """Warn where `mupass.fold` has put multipliers into weights whose rates are of before."""
    for root in list(watch.unfolded):
        plan: Plan | None = vars(root).get(ATTRIBUTE)
        if plan is None or not plan.folded:
            continue
        watch.unfolded.discard(root)
        text = told_of_fold(plan, type(optimizer).__name__, "its groups were")
        if text:
            warn([text])


def _check_members(optimizer: torch.optim.Optimizer, watch: RateWatch) -> None:
    """Warn where parameters of the model were replaced after the groups were made."""
    members = set(_groups_of(optimizer))
    # A tensor that the model does not use any more gets no gradient.
    idle = frozenset(id(parameter) for parameter in members if parameter.grad is None)
    if idle == watch.idle:
        return
    watch.idle = idle
    for root, plan in _planned_models():
        now = dict(root.named_parameters())
        gone = {parameter for parameter in members if id(parameter) in idle}.difference(now.values())
        made = made_for(root, members)
        # All of them may have been replaced, as by load_state_dict(assign=True).
        if not gone or (members.isdisjoint(now.values()) and not made):
            continue
        if made:
            places = dict(root.named_parameters(remove_duplicate=False))
            _tell_tied(optimizer, watch, tied_since(gone, places, members, made[-1]))
        names = [n for n, p in now.items() if n in plan and p not in members and p.grad is not None]
        watch.told.update(names)
        if names:
            text = (
                f"{type(optimizer).__name__}: {', '.join(names)} came into the {type(root).__name__} in the "
                "place of what was there when its groups were made, and is not trained: make the optimizer "
                "anew"
            )
            warn([text])


def _tell_parametrized(optimizer: torch.optim.Optimizer, watch: RateWatch, name: str, before: str) -> None:
    """Warn of a parameter that a parametrization of torch makes a weight of, where it was the weight itself.

    Args:
        optimizer: The optimizer.
        watch: What is known of it.
        name: Of the parameter, as it is now.
        before: As it was when the groups were made.
    """
    if ".parametrizations." in name and name != before and name not in watch.told:
        watch.told.add(name)
        text = (
            f"{type(optimizer).__name__}: {before} was parametrized after its groups were made, and its "
            "width factors are of before: do so first, then transform, then make the optimizer"
        )
        warn([text])


def _tell_tied(optimizer: torch.optim.Optimizer, watch: RateWatch, names: Sequence[str]) -> None:
    """Warn of parameters in whose place the model has another one of the optimizer's by now."""
    new = [name for name in names if name not in watch.told]
    watch.told.update(new)
    if new:
        text = (
            f"{type(optimizer).__name__}: {', '.join(new)} was tied to another parameter after its groups "
            "were made, which takes that for what it was: tie first, then transform, then make the optimizer"
        )
        warn([text])


def _check_added(optimizer: torch.optim.Optimizer, watch: RateWatch) -> None:
    """Warn where parameters were added to the model after the groups were made, and nothing moves them.

    Another optimizer may train them: the version of a tensor tells whether it was written to since. Models
    are looked through in the first steps, and then once in as many.
    """
    watch.steps += 1
    if watch.steps > LOOKS and watch.steps % LOOKS:
        return
    members = set(_groups_of(optimizer))
    seen: dict[str, int] = {}
    for root, plan in _planned_models():
        now = dict(root.named_parameters())
        if members.isdisjoint(now.values()):
            continue
        if MULTIPLIED not in watch.told and tell_lost_multipliers(root):
            watch.told.add(MULTIPLIED)
        made = made_for(root, members)
        known = made[-1].names if made else {}
        for name, parameter in now.items():
            if parameter in members:
                _tell_parametrized(optimizer, watch, name, known.get(id(parameter), name))
        # Of several models with one name the last one counts.
        seen.update(_added(now, plan, members, known, watch.told))
    unmoved = [name for name, version in seen.items() if watch.strangers.get(name) == version]
    watch.strangers = seen
    if unmoved:
        watch.told.update(unmoved)
        text = (
            f"{type(optimizer).__name__}: {', '.join(unmoved)} came into the model after its groups were "
            "made, and no optimizer trains it: transform the model with all its layers and make the groups "
            "anew, or add a group for it"
        )
        warn([text])


def _added(
    now: Mapping[str, Tensor],
    plan: Plan,
    members: Collection[Tensor],
    known: Mapping[int, str],
    told: Collection[str],
) -> dict[str, int]:
    """Return the parameters with a gradient that came into a model since, by name, with their versions.

    Args:
        now: Parameters of the model.
        plan: Its plan.
        members: Parameters of the optimizer.
        known: Identity of a parameter -> its name when groups were made; empty if none were.
        told: Names of those that were told.
    """
    versions = {}
    for name, parameter in now.items():
        # What the plan knows by name may have been left out on purpose, unless it was untied since.
        came_later = name not in plan or (bool(known) and id(parameter) not in known)
        if came_later and parameter not in members and name not in told and parameter.grad is not None:
            versions[name] = parameter._version
    return versions


def _family(optimizer: torch.optim.Optimizer) -> str:
    """Return the row of the scale table that fits a class of ``torch.optim``, or looks as if it did."""
    name = type(optimizer).__name__.lower()
    for candidate in reversed(OPTIMIZERS.values()):  # MuonWithAuxAdam is a Muon
        if candidate.torch_class and candidate.torch_class.lower() in name:
            return candidate.name
    own = _exact_family(optimizer)
    return own if own in OPTIMIZERS else "adamw"


def _tell_unplanned(optimizer: torch.optim.Optimizer, root: nn.Module, factors: dict[str, float]) -> None:
    name = type(optimizer).__name__
    # The smallest and the largest factor show how far apart the plan wants them.
    low = min(factors, key=factors.__getitem__)
    high = max(factors, key=factors.__getitem__)
    text = (
        f"{name} gives parameters of a transformed {type(root).__name__} one learning rate where its plan "
        f"has several ({low}: times {factors[low]:.3g}, {high}: times {factors[high]:.3g}): its "
        f"width factors are lost. Write {name}(mupass.param_groups(model, lr=...), ...) instead of "
        "model.parameters()"
    )
    warn([text])


def _tell_lost(optimizer: torch.optim.Optimizer, own: bool) -> None:
    name = type(optimizer).__name__
    if own:
        text = (
            f"mupass.{name}: the learning rates of its groups no longer have the ratio that lr and "
            "fallback_lr gave them: a scheduler or a loop sets absolute rates. (Width factors, "
            'g["mupass_scale"], are kept.) '
            "Use a schedule that multiplies (LambdaLR, eta_min=0), or give rates by group: "
            'OneCycleLR(optimizer, max_lr=[g["lr"] for g in optimizer.param_groups], ...)'
        )
    else:
        text = (
            f"{name}: the learning rates of its groups no longer have the ratios that mupass.param_groups "
            "gave them: a scheduler or a loop sets absolute rates, and the width factors are lost. "
            "Use a schedule that multiplies (LambdaLR, eta_min=0), or give rates by group: "
            'OneCycleLR(optimizer, max_lr=[lr * g["mupass_scale"] for g in optimizer.param_groups], ...); '
            'g["lr"] = lr * g["mupass_scale"]'
        )
    warn([text])


def _layer_factor(group: Group) -> float:
    """Return what a schedule of timm multiplies a group's rate by."""
    return float(group.get(LAYER, 1.0))


def _rate(group: Group) -> float | None:
    """Return a group's rate; None where it has none, or one that an accelerator would be waited for."""
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and lr.numel() == 1:
        return float(lr)
    return float(lr) if isinstance(lr, (int, float)) else None


def _rates(groups: Sequence[Group]) -> dict[int, float]:
    """Return the rates that can be read, by number of the group."""
    rates = {}
    for number, group in enumerate(groups):
        rate = _rate(group)
        if rate is not None:
            rates[number] = rate
    return rates


def _equal(values: Sequence[float]) -> bool:
    """Return whether numbers are the same but for rounding errors."""
    return not values or max(values) - min(values) <= TOLERANCE * max(map(abs, values))
