"""Stages of a pipeline: a transformed model of which modules were removed."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mupass._errors import PlanError
from mupass._scales.plan import ATTRIBUTE, plan_of


def stage(model: nn.Module) -> nn.Module:
    """Make the plan of a transformed model that of the modules which are left of it.

    For pipeline parallelism: transform the whole model, on the meta device where it is large, and take a copy
    for each stage, without the modules of the others. What is left keeps its names, scales and multipliers.
    Optimizers made of a stage share nothing with other ranks. `mupass.KFAC` must be told ``loss_terms=``,
    since most stages see no loss, and ``loss_scale=``: the schedules of torch.distributed.pipelining divide
    gradients by the number of micro-batches after the backward passes, as if the loss had been multiplied by
    it. What K-FAC does to all layers together holds for each stage: ``kl_clip``, ``damping_floor``, and
    ``stagger``. Without these three its steps are those of the whole model.

    Args:
        model: The copy, in which modules were removed, or replaced by some without parameters.

    Returns:
        The same model.

    Raises:
        PlanError: The model was not transformed, nothing of the plan is left, or a parameter has another name
            or shape than in the plan, or is half of a tie. The model is as it was.

    Example:
        >>> import copy, mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8), base=32)
        >>> last = copy.deepcopy(net)
        >>> last[0] = torch.nn.Identity()
        >>> list(mupass.stage(last).mupass_plan)
        ['2.weight', '2.bias']
    """
    root, plan = plan_of(model)
    # With every name of a tied parameter.
    names = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    modules = {name for name, _ in root.named_modules()}
    entries = []
    for entry in plan.entries:
        own_names = set(entry.geometry.names)
        if own_names & names:
            entries.append(entry)
        if own_names & names and own_names - names:
            raise PlanError(
                f"{', '.join(sorted(own_names & names))} is tied to {', '.join(sorted(own_names - names))}, "
                "which is in another stage: keep both in one, or untie them before mupass.transform"
            )
    if not entries:
        raise PlanError("no parameter of the plan is left in this stage")
    branches = tuple(name for name in plan.branches if name in modules)
    scores = tuple(scale for scale in plan.scores if scale.module in modules)
    stage_plan = replace(
        plan, entries=tuple(entries), branches=branches, carriers=(), stage=True, scores=scores
    )
    stage_plan.check(root)
    setattr(root, ATTRIBUTE, stage_plan)
    return model
