"""initialize: the plan's initialization, for values that a model gets after its transform."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mupass._errors import TransformError, some, warn
from mupass._rewrite import rescale
from mupass._scales.drawn_again import scaled_already
from mupass._scales.init import InitChoice, Values, plan_init
from mupass._scales.learned import learned_of
from mupass._scales.plan import ATTRIBUTE, Plan, plan_of


def initialize(model: nn.Module, *, init: InitChoice = "auto") -> Plan:
    """Scale initial values that a transformed model was given after its transform.

    For a model that was transformed on the meta device, also when sharded since, and for layers whose
    ``reset_parameters`` ran again::

        with torch.device("meta"):
            model = mupass.transform(Net(), inputs)
        fully_shard(model)
        model.to_empty(device="cuda")
        model.apply(draw)  # the model's own initialization
        plan = mupass.initialize(model)

    The initialization law is read off the values, as `transform` reads it, so the result is that of a
    transform of these values. Parameters that hold the plan's values already are left alone: a second call
    changes nothing. Call it before training, and not after a checkpoint of a transformed model was loaded:
    its values are right already.

    Args:
        model: Transformed model, wrapped or sharded or not, with initial values.
        init: Law of the values, as for `mupass.transform`.

    Returns:
        The plan, which is on the model too, with the law that the values of each parameter were taken for in
        ``plan[name].init_law``, and what they were multiplied by.

    Raises:
        PlanError: The model carries no plan, or its parameters are no longer those of the plan (``to_empty``
            breaks ties).
        TransformError: Parameters are still on the meta device; the values look trained; the model was
            transformed as a trained one.
    """
    root, plan = plan_of(model)
    plan.check(root)
    if plan.trained:
        raise TransformError("the model was transformed with trained=True: its values are left as they are")
    parameters = {name: parameter.detach() for name, parameter in root.named_parameters()}
    _refuse_empty(parameters)
    _refuse_trained(parameters, plan, init)
    # Layers that were drawn anew have their own law's size; others may hold the plan's already.
    scaled_before = scaled_already(parameters, plan)
    # What the user's law gave, also where it is scaled already.
    drawn = dict(parameters)
    for name, entry in scaled_before.items():
        drawn[name] = parameters[name] / entry.init_factor
    inits = plan_init(drawn, [entry.geometry for entry in plan.entries], plan.parameterization, init)
    new_laws = {name: law for name, law in inits.items() if name not in scaled_before}
    doubtful = [name for name, law in new_laws.items() if law.doubtful]
    if doubtful:
        warn([f"initialization law in doubt for {some(doubtful)}: settle it with init={{pattern: law}}"])
    rescale(root, {name: law.factor for name, law in new_laws.items()})
    entries = []
    for entry in plan.entries:
        law = new_laws.get(entry.geometry.name)
        if law is not None:
            entry = replace(entry, init_law=law.law, init_std=law.std, init_factor=law.factor)
        entries.append(entry)
    plan = replace(plan, entries=tuple(entries))
    setattr(root, ATTRIBUTE, plan)
    return plan


def _refuse_empty(parameters: Values) -> None:
    empty = [name for name, values in parameters.items() if values.is_meta]
    if empty:
        raise TransformError(
            f"{some(empty)} on the meta device; give the model memory and values first: "
            "model.to_empty(device=...), then its own initialization"
        )


def _refuse_trained(parameters: Values, plan: Plan, init: InitChoice) -> None:
    """Refuse values that no law draws, but for those whose law the caller states."""
    suspects = learned_of(plan, parameters, init)
    if not suspects:
        return
    ranks = ""
    if any(hasattr(values, "full_tensor") for values in parameters.values()):
        ranks = "; ranks that drew the same numbers for their shards need seeds of their own"
    raise TransformError(
        f"{some(suspects)} look trained: no initialization law draws such values. A checkpoint of a "
        f"transformed model needs no call; init={{pattern: law}} if these are initial values{ranks}"
    )
