"""fold: forward multipliers go into plain weights, and everything of mupass is taken off the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from typing import TypeVar

import torch
from torch import nn

from mupass._capture.copying import deepcopy
from mupass._errors import TransformError, check_flags, warn
from mupass._records import Carrier, Geometry, ScoreScale, Use
from mupass._rewrite import MULTIPLIERS, SaveNotice, readout_module
from mupass._scales.marks import unmark
from mupass._scales.plan import ATTRIBUTE, Entry, Plan, plan_of
from mupass._scales.scales import scales
from mupass._taps.attention import ScaledAttention
from mupass._taps.intercept import release
from mupass._taps.sharded import WholeHook
from mupass._taps.taps import detach, forget_compiled

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Change:
    """What becomes of one parameter: ``factor * value + shift``.

    Attributes:
        made: Factor that holds one on what the parameter makes.
        met: Factor that undoes one on what the parameter is multiplied with.
        shift: What is added, for a parameter to which the code adds a constant.
        parts: Factors on some of its rows: (axis, first, behind the last, factor).
    """

    made: float = 1.0
    met: float = 1.0
    shift: float = 0.0
    parts: tuple[tuple[int, int, int, float], ...] = ()


@dataclass
class Work:
    """What `fold` is about to do, all of it checked.

    Attributes:
        changes: Parameter -> what becomes of it.
        untied: Tied parameter -> why nothing else can hold the multiplier of its readout.
        joint: Parameters of which only the part that makes queries changes.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    joint: list[str] = field(default_factory=list)


def fold(model: Model, *, inplace: bool = True, keep_plan: bool = True) -> Model:
    """Put all forward multipliers of a transformed model into its weights, and take mupass off it.

    The model computes what it did before, and its weights are right without mupass: ``save_pretrained``, a
    ``state_dict`` or an export of them can be given away. Class and ``state_dict`` keys stay; hooks and taps
    are gone. The multiplier of a tied readout goes into the last norm, those of residual branches
    (``depth=``) into the layers that end them. A readout is untied only where nothing else can hold its
    multiplier, and a warning says so.

    A folded model can be trained on: its plan, ``model.mupass_plan``, has rates, damping and epsilon of the
    folded parameters to match, so that `param_groups` and the optimizers of mupass go on as before. Make
    the optimizer anew, after folding. Only weight decay differs, on gains that the code stores as their
    distance from 1.

    Example::

        plain = mupass.fold(model, inplace=False)  # the model in training stays as it is
        plain.save_pretrained("out")

    Args:
        model: Transformed model, or a wrapper around it.
        inplace: Change this very model (default), or a deep copy of the transformed module.
        keep_plan: Whether the plan stays on the model. Without it a pickle of the whole module can be read
            where mupass is not installed.

    Returns:
        The folded model, the same object unless ``inplace=False``.

    Raises:
        PlanError: The model was not transformed.
        TransformError: No parameter can hold a multiplier, or the model is a stage of a pipeline; it is as it
            was.
    """
    check_flags(TransformError, inplace=inplace, keep_plan=keep_plan)
    root, plan = plan_of(model)
    if plan.stage:
        raise TransformError(
            "a stage of a pipeline cannot be folded, since what holds a multiplier may be in another one: "
            "load the weights of all stages into the whole transformed model, and fold that"
        )
    work = _work(root, plan)
    target: nn.Module = root
    if not inplace:
        target = deepcopy(root)
        model = target  # type: ignore[assignment]
    # The plan is computed from the model as it was; the model is changed after that.
    new_plan = _folded_plan(plan, work)
    _apply(target, work, plan)
    strip(target)
    if keep_plan:
        setattr(target, ATTRIBUTE, new_plan)
    else:
        delattr(target, ATTRIBUTE)
        unmark(target)
    alerts = []
    if work.joint and keep_plan:
        alerts.append(
            f"mupass.fold: {', '.join(work.joint[:4])} make queries, keys and values, and only the queries "
            "hold a factor now (their head_dim grows). Rates are for whole parameters: trained on, these "
            "queries learn at another rate than in the transformed model. Give the result away, and train on "
            "the transformed one; or let the queries have a layer of their own"
        )
    for name, reason in work.untied.items():
        modules = ", ".join(sorted({use.module for use in plan[name].geometry.readout_uses}))
        alerts.append(
            f"mupass.fold: {modules} has a weight of its own now and is tied to {name} no more, since "
            f"nothing else can hold its multiplier ({reason}); trained on, the two learn apart. A "
            "norm with a gain before the readout keeps the tie"
        )
    warn(alerts)
    return model


def strip(model: nn.Module) -> None:
    """Take taps, multipliers and notices of mupass off a model; its weights stay.

    Args:
        model: The module that the plan's names are relative to.
    """
    detach(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), ScaledAttention):
            del module.forward
        for table in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
            for key, hook in list(table.items()):
                if isinstance(hook, (*MULTIPLIERS, SaveNotice, WholeHook)):
                    del table[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
    for parameter in model.parameters():
        release(parameter)
    forget_compiled(model)


def _work(root: nn.Module, plan: Plan) -> Work:
    """Collect what is to be done.

    Raises:
        TransformError: Something cannot be done.
    """
    result = Work()
    # Hooks tell whether the multipliers are still live, whatever the plan says.
    live: list[object] = []
    for module in root.modules():
        live += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        live.append(vars(module).get("forward"))
    if not any(isinstance(hook, MULTIPLIERS) for hook in live):
        return result  # nothing to fold, or folded already
    blocked = []
    for carrier in plan.carriers:
        # A tied readout has the multiplier of its entry; a branch has that of the depth.
        factor = plan[carrier.tied].scales.multiplier if carrier.tied else 1 / plan.depth
        if carrier.reason and carrier.tied:
            _check_untied(root, plan[carrier.tied].geometry, carrier.reason)
            result.untied[carrier.tied] = carrier.reason
        elif carrier.reason:
            blocked.append(carrier.reason)
        else:
            _hold(result.changes, carrier, factor)
    for scale in plan.scores:
        _hold_queries(result, scale)
    if blocked:
        raise TransformError(
            f"no parameter can hold the multiplier 1/{plan.depth:g} of {len(blocked)} residual branches: "
            f"{blocked[0]}. End each branch with a layer or a gain, such as nn.Linear(width, width)"
        )
    return result


def _check_untied(root: nn.Module, geometry: Geometry, reason: str) -> None:
    """Refuse to untie a parameter from a readout that no module holds.

    Raises:
        TransformError: The code reads the parameter itself, so that it cannot be given another one.
    """
    for use in geometry.readout_uses:
        if readout_module(root, geometry.name, use) is None:
            raise TransformError(
                f"no parameter can hold the multiplier of the readout by {geometry.name} ({reason}), and "
                f"{use.operator} inside {use.module or 'the root module'} takes no weight of its own. End "
                "what it reads with a layer or a norm that has a gain"
            )


def _hold(changes: dict[str, Change], carrier: Carrier, factor: float) -> None:
    """Add what one carrier does to the changes; a parameter that branches share changes once."""
    shifts = dict(carrier.offsets)
    for name in carrier.parameters:
        # c (w + 1) is (c w + c - 1) + 1: the code adds its constant after the change.
        _note(changes, name, Change(made=factor, shift=(factor - 1) * shifts.get(name, 0.0)))
    for name in carrier.divided:
        _note(changes, name, Change(met=1 / factor))


def _note(changes: dict[str, Change], name: str, change: Change) -> None:
    """Add what becomes of a parameter.

    Raises:
        TransformError: Something else is to become of it already.
    """
    if changes.setdefault(name, change) != change:
        raise TransformError(f"{name} would have to hold two different multipliers")


def _hold_queries(work: Work, scale: ScoreScale) -> None:
    """Add what holds the factor on attention scores to the changes.

    Raises:
        TransformError: Nothing can hold it.
    """
    if not scale.parts:
        if scale.carrier.reason:
            raise TransformError(
                f"no parameter can hold the factor on the queries that {scale.module} puts out: "
                f"{scale.carrier.reason}. Let a layer of their own put them out, without an activation"
            )
        _hold(work.changes, scale.carrier, scale.factor)
        return
    if not scale.rows:
        raise TransformError(f"{scale.module} has no parameters that could hold the factor on its queries")
    for name, axis in scale.rows:
        parts = tuple((axis, first, last, scale.factor) for first, last in scale.parts)
        _note(work.changes, name, Change(parts=parts))
        work.joint.append(name)


def _apply(model: nn.Module, work: Work, plan: Plan) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        # All products first: what can fail (memory) fails before the first parameter changes.
        values = {}
        for name, change in work.changes.items():
            values[name] = parameters[name] * (change.made * change.met) + change.shift
            for axis, first, last, factor in change.parts:
                values[name].narrow(axis, first, last - first).mul_(factor)
        # A readout that is untied gets a weight of its own, with the multiplier in it.
        readouts = {
            name: nn.Parameter(
                parameters[name] * plan[name].scales.multiplier, parameters[name].requires_grad
            )
            for name in work.untied
        }
        for name, value in values.items():
            parameters[name].copy_(value)
    # Every module that read the tied weight as a readout shares the new one.
    for name, weight in readouts.items():
        for module in {use.module for use in plan[name].geometry.readout_uses}:
            model.get_submodule(module).weight = weight
    if readouts:
        _untie_configuration(model)


def _untie_configuration(model: nn.Module) -> None:
    """Tell a Hugging Face model that its readout is tied no more, or loading would tie it again."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        # transformers keeps a list of names that loading ties together.
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}  # type: ignore[assignment]


def _folded_plan(plan: Plan, work: Work) -> Plan:
    """Return the plan of the folded model: scales follow what a parameter was multiplied by."""
    entries: list[Entry] = []
    for entry in plan.entries:
        name = entry.geometry.name
        change = work.changes.get(name, Change())
        geometry = replace(
            entry.geometry,
            # Apart, since rates go otherwise with a factor behind the weight than with one in front of it.
            folded=entry.geometry.folded * change.made,
            folded_in=entry.geometry.folded_in * change.met,
        )
        if name in work.untied:
            entries += _parted(plan, entry, geometry)
        else:
            # Without its multiplier the readout is an ordinary use, and takes what the code gives it along.
            if geometry.readout_uses:
                geometry = replace(geometry, readout_uses=(), given=0.0)
            entries.append(_entry(plan, entry, geometry, change.made * change.met))
    return replace(plan, entries=tuple(entries), carriers=(), branches=(), scores=(), folded=True)


def _entry(plan: Plan, entry: Entry, geometry: Geometry, factor: float) -> Entry:
    std = entry.init_std
    return replace(
        entry,
        geometry=geometry,
        init_std=std if std is None or isclose(factor, 1) else std * factor,
        scales=scales(geometry, plan.optimizer, plan.parameterization),
    )


def _parted(plan: Plan, entry: Entry, geometry: Geometry) -> list[Entry]:
    """Return the entries of an embedding and of a readout that were one parameter, in the model's order."""
    modules = {use.module for use in geometry.readout_uses}
    names = geometry.names
    # Names of the readout's module go with the readout, the others with the embedding.
    readout_names = tuple(name for name in names if name.rpartition(".")[0] in modules)
    embedding_names = tuple(name for name in names if name not in readout_names)
    parts = []
    if embedding_names:
        uses = tuple(use for use in geometry.uses if use not in geometry.readout_uses)
        embedding = _part(geometry, embedding_names, uses, modules, False)
        parts.append(_entry(plan, entry, embedding, 1.0))
    # The readout's own fans: what the embedding makes it sums over.
    use: Use = geometry.readout_uses[0]
    readout = replace(
        _part(geometry, readout_names, geometry.readout_uses, modules, True),
        role="output",
        fan_in_axes=use.fan_in,
        fan_out_axes=use.fan_out,
    )
    parts.append(_entry(plan, entry, readout, entry.scales.multiplier))
    return sorted(parts, key=lambda part: names.index(part.geometry.name))


def _part(
    geometry: Geometry, names: Sequence[str], uses: tuple[Use, ...], modules: set[str], readout: bool
) -> Geometry:
    return replace(
        geometry,
        name=names[0],
        aliases=tuple(names[1:]),
        uses=uses,
        sites=tuple(site for site in geometry.sites if (site.module in modules) == readout),
        readout_uses=(),
        given=0.0,
    )
