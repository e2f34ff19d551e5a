"""Text forms of a plan: the table that ``print(plan)`` shows and the reasons behind one entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mupass._page import aligned, column_widths
from mupass._records import Axes, Geometry, Use
from mupass._scales.entry import Entry
from mupass._scales.optimizers import OptimizerSpec
from mupass._scales.parameterizations import row
from mupass._scales.scales import Powers, depth_powers, factor_of, folded_powers, powers

SOURCES = {
    "init": "Theta(1) pre-activations; readout: arXiv 2312.12226, b_L",
    "multiplier": "a tied embedding is Theta(1), a readout 1/m: arXiv 2203.03466, table 8",
    "lr": "delta . (dW h) = Theta(1): arXiv 2312.12226, conditions 11-13",
    "damping_in": "order of the factor's eigenvalues: arXiv 2312.12226, d_A (d_R)",
    "damping_out": "order of the factor's eigenvalues: arXiv 2312.12226, d_B (d_L)",
    "epsilon": "order of what it is added to: arXiv 2512.05620, table of epsilons",
    "weight_decay": "independent decay is Theta(1): arXiv 2512.05620",
}


def formula(
    exponents: Powers,
    geometry: Geometry,
    depth: float,
    folded: Powers,
) -> str:
    """Readable power law, such as ``m_out/m_in = 0.25``.

    Args:
        exponents: Powers of ``(m_in, m_out)``.
        geometry: The parameter, whose finite fans are left out.
        depth: Power of the relative depth L.
        folded: Powers of what `mupass.fold` put into the parameter, `folded_powers`.

    Returns:
        The formula and its value; ``1`` where nothing depends on width.
    """
    folded_factor = geometry.folded ** folded[0] * geometry.folded_in ** folded[1]
    value = factor_of(geometry, exponents) * geometry.depth**depth * folded_factor
    p_in, p_out = exponents
    power_of = {}
    # A finite fan has the factor 1, and no place in the formula.
    if geometry.grows_out:
        power_of["m_out"] = p_out
    if geometry.grows_in:
        power_of["m_in"] = p_in
    if geometry.depth != 1:
        power_of["L"] = depth
    numerator = [_with_power(symbol, power) for symbol, power in power_of.items() if power > 0]
    denominator = [_with_power(symbol, -power) for symbol, power in power_of.items() if power < 0]
    if folded_factor != 1:
        numerator.append(f"{folded_factor:.4g}")
    if not numerator and not denominator:
        return f"{value:.4g}"
    quotient = " ".join(numerator) or "1"
    if len(denominator) > 1:
        quotient += f"/({' '.join(denominator)})"
    elif denominator:
        quotient += f"/{denominator[0]}"
    return f"{quotient} = {value:.4g}"


def _with_power(symbol: str, power: float) -> str:
    if power == 1:
        return symbol
    return f"{symbol}^{power:g}"


def table(
    entries: Sequence[Entry],
    optimizer: OptimizerSpec,
    parameterization: str,
    width: int,
    base_width: float,
    depth: float,
    rates: Mapping[str, Sequence[float]],
    warnings: Sequence[str],
) -> str:
    """Aligned table of all parameters, one a line, under two lines about the plan as a whole.

    Args:
        entries: Those of the plan.
        optimizer: Whose scales are shown.
        parameterization: Of the plan.
        width: Of the model.
        base_width: Width at which nothing is scaled.
        depth: Relative to the base depth.
        rates: While no optimizer is decided: each one's factor on the learning rate of every entry.
        warnings: Those of the plan.

    Returns:
        Several lines without a newline at the end.
    """
    columns = {} if rates else optimizer.row.columns
    has_tied = any(entry.geometry.readout_uses for entry in entries)
    # Only a tied embedding has a forward multiplier.
    multiplier = ["multiplier"] if has_tied else []
    rate_columns = [f"lr {name}" for name in rates]
    head = ["parameter", "role", "shape", "dims", "init", *columns.values(), *multiplier, *rate_columns]
    scales = [*columns, *multiplier]
    rows = [head]
    for number, entry in enumerate(entries):
        factors = [f"{factors[number]:.4g}" for factors in rates.values()]
        rows.append(_cells(entry, optimizer, parameterization, scales) + factors)
    whose = "any optimizer" if rates else str(optimizer)
    size = f"width {width}, base {base_width:g}, {len(entries)} parameters"
    lines = [
        f"{parameterization} plan for {whose}: {size}",
        "m_in, m_out: fan_in and fan_out relative to the base width; factors are 1 there",
    ]
    if depth != 1:
        lines += [f"L: residual branches relative to the base depth, {depth:g}; each is multiplied by 1/L"]
    lines += ["", aligned(rows, column_widths(rows)), "", _base(width, base_width)]
    if rates:
        lines += ["lr: factors of each optimizer; once one is made, its own scales with formulas"]
    elif optimizer.row.has_fallback:
        lines += [
            "what the optimizer leaves to its fallback has the fallback's scales: see optimizer.coverage()"
        ]
    if warnings:
        lines += ["", *(f"warning: {warning}" for warning in warnings)]
    return "\n".join(lines)


def _base(width: int, base_width: float) -> str:
    """Say what the base width means."""
    if width == base_width:
        return (
            f"base {base_width:g}: the width of this model, at which nothing is scaled; a model of "
            f"another width takes its hyperparameters over with base={base_width:g}"
        )
    return (
        f"base {base_width:g}: hyperparameters are those of a model of width {base_width:g}, at "
        "which nothing is scaled"
    )


def explanation(entry: Entry, optimizer: OptimizerSpec, parameterization: str) -> str:
    """Evidence for one parameter, operator by operator, then each scale with formula and source.

    Args:
        entry: Its entry of the plan.
        optimizer: Whose scales.
        parameterization: Under which parameterization.

    Returns:
        Several lines without a newline at the end.
    """
    geometry = entry.geometry
    lines = [f"{geometry.name}: {geometry.role}, shape {_shape(geometry)} ({', '.join(geometry.dims)})"]
    lines += [f"  also known as {alias}" for alias in geometry.aliases]
    lines += ["evidence", *(f"  {fact}" for fact in geometry.evidence)]
    note = {use: ", as a readout: takes the multiplier" for use in geometry.readout_uses}
    lines += ["uses", *(f"  {_use(use)}{note.get(use, '')}" for use in geometry.uses)]
    lines += [
        "fans",
        f"  m_in  = {_fan(geometry, geometry.fan_in_axes)} = {geometry.m_in:.4g}",
        f"  m_out = {_fan(geometry, geometry.fan_out_axes)} = {geometry.m_out:.4g}",
        f"initialization: {entry.init_law}",
        f"  {_std(entry)}; the tensor is multiplied by {entry.init_factor:.4g}",
        f"scales of {parameterization} for {optimizer}",
    ]
    multiplier = ["multiplier"] if geometry.readout_uses else []
    shown = ["init", *multiplier, *optimizer.row.columns, "weight_decay"]
    sources = SOURCES
    if optimizer.alignment:
        sources = SOURCES | {"lr": "RMS(dW h) = Theta(1) under that alignment: arXiv 2407.05872, table 1"}
    formulas = _formulas(geometry, optimizer, parameterization, shown)
    cells = [[f"  {name}", text, f"[{sources[name]}]"] for name, text in zip(shown, formulas, strict=True)]
    lines.append(aligned(cells, column_widths(cells)))
    return "\n".join([*lines, f"source of the row: {row(parameterization).source}"])


def _cells(entry: Entry, optimizer: OptimizerSpec, parameterization: str, scales: Sequence[str]) -> list[str]:
    geometry = entry.geometry
    init = f"{_std(entry)}, {entry.init_law}" if entry.init_std is not None else entry.init_law
    if entry.init_factor != 1:
        init += f" (times {entry.init_factor:.4g})"
    first_cells = [geometry.name, geometry.role, _shape(geometry), ", ".join(geometry.dims), init]
    return first_cells + _formulas(geometry, optimizer, parameterization, scales)


def _formulas(
    geometry: Geometry, optimizer: OptimizerSpec, parameterization: str, names: Sequence[str]
) -> list[str]:
    """Return the formula of each of these scales of a parameter."""
    exponents = powers(geometry, optimizer, parameterization)
    depths, folded = depth_powers(optimizer, parameterization), folded_powers(optimizer)
    return [
        formula(exponents[name], geometry, depths.get(name, 0.0), folded.get(name, (0.0, 0.0)))
        for name in names
    ]


def _shape(g: Geometry) -> str:
    return " x ".join(str(size) for size in g.shape) or "scalar"


def _std(entry: Entry) -> str:
    return "std not set" if entry.init_std is None else f"std {entry.init_std:.3g}"


def _use(use: Use) -> str:
    axes = f", contracts axes {use.fan_in}, keeps {use.fan_out}" if use.fan_in or use.fan_out else ""
    return f"{use.operator} in {use.module or 'the root module'} ({use.kind}{axes})"


def _fan(g: Geometry, axes: Axes) -> str:
    if not axes:
        return "no such axis"
    now = "*".join(str(g.shape[number]) for number in axes)
    base = "*".join(f"{g.base_shape[number]:g}" for number in axes)
    return f"({now})/({base})" if len(axes) > 1 else f"{now}/{base}"
