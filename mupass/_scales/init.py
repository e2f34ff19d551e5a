"""Initialization: the factor that turns the user's own initialization into the plan's.

The plan wants ``std = (std that the user's law gives at the base width) x (init scale)``. So the law
must be known: a constant 0.02 is already the value at the base width, ``1/sqrt(fan_in)`` is not. It is
read off the values by `mupass._scales.laws` or given by ``init=``; gain and distribution are kept.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite, prod, sqrt

import torch

from mupass._errors import PlanError, check_choice
from mupass._parallel import whole
from mupass._records import Geometry
from mupass._scales.laws import KINDS, Fans, Finding, Sample, find_laws, tolerance
from mupass._scales.own_draws import Draw
from mupass._scales.scales import init_powers, init_scale

POSITIVE = 32  # entries that are not all positive by chance
DEVIATIONS = 3  # of the mean of so many draws, which chance may bring

InitChoice = str | Mapping[str, str]
Values = Mapping[str, torch.Tensor]  # of parameters by name


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
    tensors: Values,
    geometries: Sequence[Geometry],
    parameterization: str = "mup",
    init: InitChoice = "auto",
    draws: Mapping[str, Draw] | None = None,
) -> dict[str, Init]:
    """Initialization of every parameter.

    Args:
        tensors: Parameters by name, with the user's initial values.
        geometries: Their geometry.
        parameterization: Key of `mupass._scales.scales.PARAMETERIZATIONS`.
        init: ``"auto"`` reads each law off the values. ``"fan_in"``, ``"fan_out"``, ``"fan_avg"``,
            ``"constant"`` or another one of `mupass._scales.laws.FANS` states it for all parameters,
            ``{pattern: law}`` for those whose name matches a shell pattern; a later pattern wins.
        draws: What the model's own code would draw for tensors without values.

    Returns:
        Parameter name -> its `Init`.
    """
    findings, fixed = _findings(tensors, geometries, init, draws or {})
    inits = {}
    for geometry in geometries:
        # The length g of W = g v / |v|, which follows its direction v.
        if geometry.direction:
            inits[geometry.name] = _length(geometry, tensors, geometries, findings, parameterization)
        elif geometry.name in fixed:
            inits[geometry.name] = _constant(fixed[geometry.name], geometry, parameterization)
        else:
            inits[geometry.name] = _init(findings[geometry.name], geometry, parameterization)
    return inits


def own_init(tensors: Values, geometries: Sequence[Geometry], init: InitChoice = "auto") -> dict[str, Init]:
    """Tell what the user's own law would give at the base shapes.

    Args:
        tensors: Parameters by name, with the user's initial values.
        geometries: Geometry of all parameters; the base shapes are the shapes asked about. Those that are not
            among the tensors only lend their fans (a weight of zeros to its bias).
        init: As for `plan_init`.

    Returns:
        Parameter name -> law, its standard deviation there, and the factor from the present one to that.
    """
    findings, fixed = _findings(tensors, geometries, init, {})
    laws = dict(fixed)
    for name, finding in findings.items():
        # Factor on the standard deviation: the root of the ratio of variances.
        factor = sqrt(finding.sample.fans.ratio(finding.kind))
        laws[name] = _scaled(finding, factor)
    return laws


def _findings(
    tensors: Values,
    geometries: Sequence[Geometry],
    init: InitChoice,
    draws: Mapping[str, Draw],
) -> tuple[dict[str, Finding], dict[str, Init]]:
    """Return the laws of random parameters, and the answer for the others."""
    stated = told_laws(init, [geometry.name for geometry in geometries])
    samples, fixed = _measure(tensors, geometries, stated, draws)
    # Tensors whose law the caller states are no evidence for the law of others.
    findings = {
        finding.sample.name: finding
        for finding in find_laws([sample for sample in samples if sample.name not in stated])
    }
    for sample in samples:
        if sample.name in stated:
            patterned = not isinstance(init, str)
            findings[sample.name] = _as_told(sample, stated[sample.name], patterned)
    return findings, fixed


def own_fans(geometry: Geometry) -> Fans:
    """Return the fans of a parameter that an initialization law can refer to.

    Args:
        geometry: The parameter.
    """
    # PyTorch counts the kernel in a convolution's fan_out, as in its fan_in.
    is_convolution = any(use.kind.startswith("conv") for use in geometry.uses) and len(geometry.shape) > 2
    fan_out = geometry.fan_out * prod(geometry.shape[2:]) if is_convolution else geometry.fan_out
    average = _average_fan(geometry.shape)
    # Kaiming's law takes all axes but the first for fan_in, though the first one may count matrices.
    stack = prod(geometry.shape[1:]) if len(geometry.shape) > 2 else 0
    if stack in (geometry.fan_in, fan_out):
        stack = 0
    # A bias that grows has a fan_out to refer to; one of fixed length has no fan at all.
    return Fans(
        geometry.fan_in if geometry.fan_in_axes else None,
        fan_out if geometry.fan_in_axes or geometry.grows_out else None,
        geometry.m_in,
        geometry.m_out,
        average=average or None,
        m_average=average / _average_fan(geometry.base_shape) if average else 1.0,
        stack=stack or None,
        m_stack=stack / prod(geometry.base_shape[1:]) if stack else 1.0,
    )


def _average_fan(shape: Sequence[float]) -> float:
    """Return the mean of the fans of a weight as `torch.nn.init` counts them, 0 for a vector."""
    return sum(shape[:2]) * prod(shape[2:]) / 2 if len(shape) > 1 else 0.0


def lent_fans(geometry: Geometry, geometries: Sequence[Geometry]) -> Fans | None:
    """Return the fan_in of another weight by which PyTorch draws this parameter, or None.

    A bias is drawn from ``U(+-1/sqrt(fan_in of its weight))``; all that a recurrent layer holds is drawn
    from ``U(+-1/sqrt(hidden size))``, the fan_in of its ``weight_hh``. What PyTorch takes for the fan_in of a
    transposed convolution is its fan_out.

    Args:
        geometry: The parameter.
        geometries: All parameters.
    """
    lender = _lender(geometry, geometries)
    if lender is None or lender is geometry:
        return None
    # nn.init takes axis 1 for fan_in, and a transposed kernel has its outputs there.
    if any(use.kind == "conv_transpose" for use in lender.uses):
        fans = own_fans(lender)
        return Fans(fans.fan_out, None, fans.m_out, 1.0, lender.name)
    return Fans(lender.fan_in, None, lender.m_in, 1.0, lender.name)


def _lender(geometry: Geometry, geometries: Sequence[Geometry]) -> Geometry | None:
    """Return the weight of the same module by whose fan_in PyTorch draws this parameter."""
    kinds = {use.kind for use in geometry.uses}
    if geometry.fan_in_axes and "recurrent" not in kinds:
        return None
    # The modules that add the parameter to something, or whose recurrence it is part of.
    modules = {use.module for use in geometry.uses if use.kind in {"bias", "pointwise", "recurrent"}}
    weights = {}
    for weight in geometries:
        # The lengths of a normalized weight lend nothing beside its direction.
        if not weight.direction and any(use.module in modules and use.fan_in for use in weight.uses):
            weights[weight.name] = weight
    # weight_ih_l0, bias_hh_l0 -> weight_hh_l0; conv.bias -> conv.weight
    for name in (
        re.sub("(weight|bias)_[ih]h", "weight_hh", geometry.name),
        geometry.name.replace("bias", "weight"),
    ):
        if name in weights:
            return weights[name]
    # A bias of another name beside the only weight of its module.
    if len(weights) == 1 and kinds == {"bias"}:
        return next(iter(weights.values()))
    return None


def told_laws(init: InitChoice, names: Sequence[str]) -> dict[str, str]:
    """Return parameter name -> law, for the parameters whose law the user states.

    Args:
        init: As for `plan_init`.
        names: All parameters.

    Raises:
        PlanError: Unknown law, or a pattern that matches no parameter.
    """
    rules = {"*": init} if isinstance(init, str) else init
    if not isinstance(rules, Mapping):
        raise PlanError(f"init must be a law or a mapping from name pattern to law, not {init!r}")
    stated: dict[str, str] = {}
    for pattern, kind in rules.items():
        check_choice(PlanError, "initialization law", kind, ("auto", *KINDS))
        # Shell patterns, as in "*.weight".
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise PlanError(f"init: pattern {pattern!r} matches no parameter")
        stated.update(dict.fromkeys(matching, kind))
    return {name: kind for name, kind in stated.items() if kind != "auto"}


def _measure(
    tensors: Values,
    geometries: Sequence[Geometry],
    told: Mapping[str, str],
    draws: Mapping[str, Draw],
) -> tuple[list[Sample], dict[str, Init]]:
    """Return statistics of the random parameters, and the answer for those that are not random.

    Raises:
        PlanError: A parameter holds NaN or infinite values.
    """
    samples, fixed = [], {}
    for geometry in geometries:
        if geometry.name not in tensors:
            continue
        tensor, lent_by_partner = tensors[geometry.name].detach(), lent_fans(geometry, geometries)
        empty = Sample(geometry.name, tensor.numel(), None, False, own_fans(geometry), bool(geometry.uses))
        # On the meta device there are no values, but the model's own code may say what it would draw.
        if tensor.is_meta:
            measured = _as_drawn(empty, draws[geometry.name]) if geometry.name in draws else empty
        else:
            measured = _as_held(empty, whole(tensor), lent_by_partner is not None)
        if isinstance(measured, Init):
            fixed[geometry.name] = measured
            continue
        # The partner's fan counts where there are no values, or where these are PyTorch's default for it.
        if lent_by_partner is not None:
            borrowed = replace(measured, fans=lent_by_partner)
            if (
                measured.std is None
                or borrowed.drawn_by_default
                or (geometry.name in told and not geometry.fan_in_axes)
            ):
                measured = borrowed
        samples.append(measured)
    return samples, fixed


def _as_drawn(empty: Sample, draw: Draw) -> Sample | Init:
    """Return what a tensor without values will hold by the model's own code."""
    if draw.constant is not None:
        return _fixed(draw.constant)
    return replace(empty, std=draw.std, uniform=draw.uniform, promised=True) if draw.std > 0 else empty


def _as_held(empty: Sample, tensor: torch.Tensor, lent: bool) -> Sample | Init:
    """Return statistics of a tensor's values; of a constant, the answer.

    Raises:
        PlanError: It holds NaN or infinite values.
    """
    # A complex tensor has two real numbers for each entry.
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().flatten()
    smallest, largest = (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)
    if not (isfinite(smallest) and isfinite(largest)):
        raise PlanError(f"{empty.name} holds NaN or infinite values; initialize the model first")
    # One draw from U(-a, a) is no constant, though it has one value.
    single_draw = len(values) == 1 and smallest != 0 and lent
    if smallest == largest and not single_draw:
        return _fixed(smallest)
    # Of a single draw its size is all there is to see.
    std = abs(smallest) / sqrt(3) if single_draw else values.std(correction=0).item()
    # Flat from zero on, as torch.rand draws: the mean is half of the largest. That of squares is a third.
    off = abs(values.mean().item() - largest / 2)
    positive = smallest >= 0 and len(values) >= POSITIVE and off <= DEVIATIONS * std / sqrt(len(values))
    # The largest of n draws from a flat law of standard deviation s stays below sqrt(3) s: from their mean.
    bound = largest / 2 if positive else max(largest, -smallest)
    uniform = bound <= sqrt(3) * std * (1 + tolerance(len(values)) / 2)
    return replace(empty, std=std, uniform=uniform, bound=bound, from_zero=positive and uniform)


def _fixed(value: float) -> Init:
    return Init("zeros" if value == 0 else f"constant {value:.4g}", None, 1.0)


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


def _constant(found: Init, geometry: Geometry, parameterization: str) -> Init:
    """Constants stay, but for a gain on what the code itself scales with the width."""
    # A gain that multiplies a tensor of unit length starts larger, as the code has made that smaller.
    if not geometry.given or geometry.fan_in_axes or found.law == "zeros":
        return found
    p_out = init_powers(geometry, parameterization)[1]
    return replace(found, factor=geometry.m_out**p_out)


def _length(
    geometry: Geometry,
    tensors: Values,
    geometries: Sequence[Geometry],
    findings: Mapping[str, Finding],
    parameterization: str,
) -> Init:
    """A length that starts as that of its direction is scaled as the weight would be, another by itself."""
    direction = next(other for other in geometries if other.name == geometry.direction)
    length, weight = tensors[geometry.name].detach(), tensors[geometry.direction].detach()
    own_factor = init_scale(geometry, parameterization)
    # A length that is not that of the drawn direction has a value of its own.
    if geometry.direction not in findings or not _is_length(length, weight):
        return Init("a length of its own", None, own_factor)
    of_direction = _init(findings[geometry.direction], replace(direction, length=""), parameterization)
    return Init(
        f"length of {geometry.direction} ({of_direction.law})",
        None,
        of_direction.factor,
        of_direction.doubtful,
    )


def _is_length(length: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a tensor holds the lengths of rows, of columns or of all of a weight; taken for so on meta."""
    return length.is_meta or weight.is_meta or length_axis(length, weight) is not None


def length_axis(length: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return the axis along which a tensor holds lengths of a weight, -1 for all of it, None if it does not.

    Args:
        length: What may hold the lengths.
        weight: The weight.
    """
    # weight_norm takes the norm over all axes but one, or over all of them (dim=-1).
    for axis in range(-1, weight.dim()):
        lengths = torch.norm_except_dim(weight, 2, axis)
        if lengths.shape == length.shape and torch.allclose(lengths, length, rtol=1e-3):
            return axis
    return None


def _init(found: Finding, geometry: Geometry, parameterization: str) -> Init:
    p_in, p_out = init_powers(geometry, parameterization)
    present_ratio = found.sample.fans.ratio(found.kind)  # variance at the base width / variance now
    # The same quotient after the transform.
    wanted_ratio = geometry.m_in ** (-2 * p_in) * geometry.m_out ** (-2 * p_out)
    # Compared as ratios, so that a law that is right already gives exactly 1.0 and no rounding.
    factor = 1.0 if parameterization == "standard" else sqrt(present_ratio / wanted_ratio)
    return _scaled(found, factor)


def _scaled(finding: Finding, factor: float) -> Init:
    """Return the initialization of a tensor that follows a law and is multiplied by a factor."""
    std = finding.std
    if std is not None:
        std *= factor
    return Init(finding.text, std, factor, finding.doubtful)
