"""Initialization: the factor that turns the user's own initialization into the plan's.

The plan wants ``std = (std that the user's law gives at the base width) x (init scale)``. So the law
must be known: a constant 0.02 is already the value at the base width, ``1/sqrt(fan_in)`` is not. It is
read off the values by `mupass._laws` or given by ``init=``; gain and distribution are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

import torch

from mupass._errors import PlanError
from mupass._geometry import Geometry
from mupass._laws import KINDS, Fans, Finding, Sample, find_laws, tolerance
from mupass._scales import OptimizerSpec, powers

InitChoice = str | Mapping[str, str]


@dataclass(frozen=True)
class Init:
    """Initialization of one parameter.

    Attributes:
        law: What the present values were taken for, and how that was decided.
        std: Standard deviation to be had; None for zeros, constants and tensors without values.
        factor: What the tensor is multiplied by; exactly 1.0 at the base width.
        doubtful: Whether another law fits as well and would give another factor.
    """

    law: str
    std: float | None
    factor: float
    doubtful: bool = False


def plan_init(
    tensors: Mapping[str, torch.Tensor],
    geometries: Sequence[Geometry],
    parameterization: str = "mup",
    init: InitChoice = "auto",
) -> dict[str, Init]:
    """Initialization of every parameter.

    Args:
        tensors: Parameters by name, with the user's initial values.
        geometries: Their geometry.
        parameterization: Key of `mupass._scales.PARAMETERIZATIONS`.
        init: ``"auto"`` reads each law off the values. ``"fan_in"``, ``"fan_out"``, ``"fan_avg"`` or
            ``"constant"`` states it for all parameters, ``{pattern: law}`` for those whose name matches
            a shell pattern; a later pattern wins.

    Returns:
        Parameter name -> its `Init`.
    """
    forced = _forced(init, [g.name for g in geometries])
    fans = {g.name: law_fans(g, geometries) for g in geometries}
    samples, fixed = _measure(tensors, geometries, fans)
    auto = [s for s in samples if forced.get(s.name, "auto") == "auto"]
    findings = {f.sample.name: f for f in find_laws(auto)}
    for sample in samples:
        kind = forced.get(sample.name, "auto")
        if kind != "auto":
            findings[sample.name] = _as_told(sample, kind, patterned=not isinstance(init, str))
    return {g.name: fixed.get(g.name) or _init(findings[g.name], g, parameterization) for g in geometries}


def law_fans(geometry: Geometry, geometries: Sequence[Geometry]) -> Fans:
    """Fans that an initialization law of this parameter can refer to.

    A bias has no fan_in of its own, but PyTorch draws it from ``U(+-1/sqrt(fan_in of its weight))``.

    Args:
        geometry: The parameter.
        geometries: All parameters, among them the weight of a bias.

    Returns:
        Sizes now and at the base width, as ratios; None where the parameter has no such fan.
    """
    partner = _weight_of(geometry, geometries)
    if partner is not None:
        return Fans(partner.fan_in, None, partner.m_in, 1.0, partner.name)
    # PyTorch counts the kernel in a convolution's fan_out, as in its fan_in.
    conv = any(use.kind.startswith("conv") for use in geometry.uses) and len(geometry.shape) > 2
    kernel = geometry.shape[2:] if conv else ()
    fan_out = geometry.fan_out
    for size in kernel:
        fan_out *= size
    grows = any(geometry.infinite[i] for i in geometry.fan_out_axes)
    return Fans(
        geometry.fan_in if geometry.fan_in_axes else None,
        fan_out if geometry.fan_in_axes or grows else None,
        geometry.m_in,
        geometry.m_out,
    )


def _weight_of(bias: Geometry, geometries: Sequence[Geometry]) -> Geometry | None:
    """Return the weight whose fan_in a bias was drawn by: same module, same name but for 'bias'."""
    modules = {use.module for use in bias.uses if use.kind in {"bias", "pointwise"}}
    if bias.fan_in_axes or not modules:
        return None
    near = [
        g for g in geometries if g.fan_in_axes and any(use.module in modules and use.fan_in for use in g.uses)
    ]
    twins = [g for g in near if g.name == bias.name.replace("bias", "weight")]
    if twins:
        return twins[0]
    certain = len(near) == 1 and all(use.kind == "bias" for use in bias.uses)
    return near[0] if certain else None


def _forced(init: InitChoice, names: Sequence[str]) -> dict[str, str]:
    """Return parameter name -> law that the user states.

    Raises:
        PlanError: Unknown law, or a pattern that matches no parameter.
    """
    rules = {"*": init} if isinstance(init, str) else init
    if not isinstance(rules, Mapping):
        raise PlanError(f"init must be a law or a mapping from name pattern to law, not {init!r}")
    forced: dict[str, str] = {}
    for pattern, kind in rules.items():
        if kind not in ("auto", *KINDS):
            raise PlanError(f"unknown initialization law {kind!r}; known: auto, {', '.join(KINDS)}")
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise PlanError(f"init: pattern {pattern!r} matches no parameter")
        forced.update(dict.fromkeys(hits, kind))
    return forced


def _measure(
    tensors: Mapping[str, torch.Tensor], geometries: Sequence[Geometry], fans: Mapping[str, Fans]
) -> tuple[list[Sample], dict[str, Init]]:
    """Return statistics of the random parameters, and the answer for those that are not random.

    Raises:
        PlanError: A parameter holds NaN or infinite values.
    """
    samples, fixed = [], {}
    for g in geometries:
        tensor = tensors[g.name].detach()
        if tensor.is_meta:
            samples.append(Sample(g.name, tensor.numel(), None, False, fans[g.name]))
            continue
        values = tensor.float()
        low, high, std = values.min().item(), values.max().item(), values.std(correction=0).item()
        if not all(map(_finite, (low, high, std))):
            raise PlanError(f"{g.name} holds NaN or infinite values; initialize the model first")
        lone = values.numel() == 1 and low != 0 and fans[g.name].partner is not None
        if low == high and not lone:
            fixed[g.name] = Init("zeros" if low == 0 else f"constant {low:.4g}", None, 1.0)
            continue
        spread = abs(low) / sqrt(3) if lone else std  # one draw: its size is all there is to see
        uniform = max(high, -low) <= sqrt(3) * spread * (1 + tolerance(values.numel()) / 2)
        samples.append(Sample(g.name, values.numel(), spread, uniform, fans[g.name]))
    return samples, fixed


def _finite(x: float) -> bool:
    return x - x == 0


def _as_told(sample: Sample, kind: str, patterned: bool) -> Finding:
    """Return the stated law; a law for all parameters skips those that have no such fan.

    Raises:
        PlanError: A pattern gives a law to a parameter without that fan.
    """
    if sample.fans.denominator(kind) is None:
        if patterned:
            raise PlanError(f"init: {sample.name} has no fan for the law {kind!r}; use 'constant'")
        kind = "constant"
    return Finding(sample, kind, sample.gain(kind), "as told")


def _init(found: Finding, geometry: Geometry, parameterization: str) -> Init:
    exponent = powers(geometry, OptimizerSpec("sgd"), parameterization)["init"][0]
    present = found.sample.fans.ratio(found.kind)  # variance at the base width / variance now
    wanted = geometry.m_in ** (-2 * exponent)  # the same quotient after the transform
    # Compared as ratios, so that a law that is right already gives exactly 1.0 and no rounding.
    factor = 1.0 if parameterization == "standard" or present == wanted else sqrt(present / wanted)
    std = None if found.std is None else found.std * factor
    return Init(found.text, std, factor, found.doubtful)
