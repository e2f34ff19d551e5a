"""Parameter groups: the plan's scales for any optimizer of ``torch.optim``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mupass._alignment import Alignment, measured_exponents
from mupass._errors import OptimizerError
from mupass._optim.checks import check_number
from mupass._optim.made_groups import SCALE, note_groups
from mupass._optim.model_bound import tell_left_out
from mupass._optim.schedules import FAMILY
from mupass._rewrite import tell_lost_multipliers
from mupass._scales.drawn_again import tell_drawn_again
from mupass._scales.optimizers import OPTIMIZERS
from mupass._scales.plan import ATTRIBUTE, OptimizerSpec, plan_of
from mupass._scales.scales import Scales, rounded


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    optimizer: str | OptimizerSpec = "adamw",
    weight_decay: float = 0.0,
    eps: float | None = None,
    alignment: str | Mapping[str, Alignment] | None = None,
) -> list[dict[str, Any]]:
    """Few parameter groups that give an optimizer of ``torch.optim`` the plan's scales.

    ``torch.optim.AdamW(mupass.param_groups(model, lr=3e-4, weight_decay=0.1))``. Parameters of equal
    scales share a group. ``mupass_scale`` in each group is the factor that ``lr`` was multiplied by, so
    schedulers that multiply (LambdaLR, StepLR, CosineAnnealingLR with ``eta_min=0``, ...) work as they
    are. One that sets absolute values needs them by group:
    ``OneCycleLR(opt, max_lr=[lr * g["mupass_scale"] for g in groups], ...)``; a scalar there would
    overwrite the factors.

    Weight decay is Theta(1) in width when it does not depend on the learning rate. ``AdamW`` and ``SGD``
    multiply it by the group's learning rate, which is undone here: ``lr * weight_decay`` is the same in
    all groups. ``Adam`` adds it to the gradient *before* the normalization, so there it also carries the
    order of a gradient entry, the factor of epsilon. Use the ``optimizer`` that matches your class.

    Args:
        model: Transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        optimizer: ``sgd``, ``adam``, ``adamw`` or another name of the scale table, for optimizers of
            that family (RMSprop and NAdam are ``adam``).
        weight_decay: Weight decay at the base width.
        eps: Adam's epsilon at the base width, 1e-8 if left out; only for ``adam`` and ``adamw``.
        alignment: ``full`` or ``none``: the largest stable rate of each layer under that alignment of
            updates with activations, see `OptimizerSpec`. Or what a probe of `mupass.alignment` measured, at
            any width: each layer's own exponent.

    Returns:
        Groups in the order of their first parameter. Frozen parameters are in them, so that one that is
        thawed later is trained; while they are frozen they have no gradient, and no step moves them.

    Raises:
        OptimizerError: ``lr``, ``weight_decay`` or ``eps`` is NaN, infinite or negative; ``eps`` for an
            optimizer that has none; every parameter is frozen.
        PlanError: An unknown alignment, one for an optimizer that has no rows, or one measured on a layer
            that this model lacks.
        MupassError: An alignment measured on a layer that has not moved.

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> groups = mupass.param_groups(net, lr=3e-4, weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    spec = OptimizerSpec.of(optimizer)
    # An alignment that was measured gives each layer an exponent of its own.
    if isinstance(alignment, Mapping):
        exponents = tuple(measured_exponents(alignment).items())
        spec = replace(spec, alignment="measured", exponents=exponents)
    elif alignment:
        spec = replace(spec, alignment=alignment)
    adaptive = spec.row.takes_eps
    if eps is not None and not adaptive:
        takers = [candidate.name for candidate in OPTIMIZERS.values() if candidate.takes_eps]
        raise OptimizerError(f"eps belongs to {' and '.join(takers)}, not to {spec.name}")
    epsilon = 1e-8 if eps is None else eps
    for name, value in {"lr": lr, "weight_decay": weight_decay, "eps": epsilon}.items():
        check_number(name, value)
    root, plan = plan_of(model)
    tell_left_out(model, root)
    plan = plan.for_optimizer(spec)
    plan.check(root)
    tell_drawn_again(root, plan)
    tell_lost_multipliers(root)
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise OptimizerError("every parameter of the model is frozen")
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    factors_of: dict[str, dict[int, float]] = {"weight_decay": {}, "eps": {}}
    # Frozen parameters too: thawing one needs no new group.
    for name, parameter in root.named_parameters():
        scales = plan[name].scales
        decay = _decay_factor(spec, scales)
        factors = [scales.lr, decay]
        factors_of["weight_decay"][id(parameter)] = decay
        if adaptive:
            factors.append(scales.epsilon)
            factors_of["eps"][id(parameter)] = scales.epsilon
        # Parameters with equal factors share a group, so that a schedule sees few of them.
        key = tuple(map(rounded, factors))
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr": lr * scales.lr,
                "weight_decay": weight_decay * decay,
                SCALE: scales.lr,
                FAMILY: spec.name,
            }
            if adaptive:
                groups[key]["eps"] = epsilon * scales.epsilon
        groups[key]["params"].append(parameter)
    setattr(root, ATTRIBUTE, plan)  # its print shows the optimizer in use
    made = list(groups.values())
    numbers = {"lr": float(lr), "weight_decay": float(weight_decay)}
    if adaptive:
        numbers["eps"] = float(epsilon)
    note_groups(root, plan, made, numbers, factors_of)
    return made


def _decay_factor(spec: OptimizerSpec, scales: Scales) -> float:
    """Return what ``weight_decay`` is multiplied by, so that its effect is the same at all widths."""
    # torch multiplies it by the group's rate, which has scales.lr in it.
    decay = scales.weight_decay
    if spec.row.normalizes_decay:  # decay has the order of a gradient entry, to which it is added
        decay *= scales.epsilon
    return decay / scales.lr
