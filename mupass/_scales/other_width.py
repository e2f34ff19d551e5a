"""A plan at another width: what was found out on one instance of an architecture, for another instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod

from torch import nn

from mupass._errors import PlanError
from mupass._records import Fusion, Geometry, ScoreScale, Shape, Site
from mupass._scales.plan import Plan, refuse, shapes_of

Shapes = Mapping[str, Shape]


def at_width_of(plan: Plan, model: nn.Module) -> tuple[list[Geometry], int]:
    """Return the geometry of every parameter of another instance of a plan's architecture, and its width.

    Verdicts, roles and base sizes are the plan's; sizes are those of the model.

    Args:
        plan: Of an instance of any width.
        model: An instance whose growing axes have other sizes.

    Raises:
        PlanError: The model is of another architecture, its axes do not fit together, or the plan is that of
            a folded model.
    """
    if plan.folded:
        raise PlanError(
            "the plan of a folded model is for its own weights, which hold the multipliers of its width; "
            "take the plan of the model before mupass.fold"
        )
    shapes = shapes_of(model)
    refuse([*plan.other_names(model), *_axis_faults(plan, shapes)])
    ratios = _ratios(plan, shapes)
    geometries = []
    for entry in plan.entries:
        planned = entry.geometry
        # Fusions and groups hold sizes, which follow from the new ones.
        fusions = tuple(
            _fused_again(planned, fusion, shapes[planned.name], ratios) for fusion in planned.fusions
        )
        sites = tuple(_grouped_again(planned, site, shapes[planned.name]) for site in planned.sites)
        geometries.append(replace(planned, shape=shapes[planned.name], fusions=fusions, sites=sites))
    by_name = {geometry.name: geometry for geometry in geometries}
    for number, geometry in enumerate(geometries):
        # The length of a readout under weight norm follows the readout's fan_in.
        direction = by_name.get(geometry.direction)
        if direction is not None and direction.role == "output":
            geometries[number] = replace(geometry, m_direction=direction.m_in)
    return geometries, _width(plan, shapes, ratios)


def scores_at(plan: Plan, geometries: Sequence[Geometry]) -> tuple[ScoreScale, ...]:
    """Return the factors on attention scores of another instance of a plan's architecture.

    Args:
        plan: Of an instance of any width.
        geometries: Of the other instance.

    Raises:
        PlanError: No parameter tells how large a head is there.
    """
    by_name = {geometry.name: geometry for geometry in geometries}
    scores = []
    for scale in plan.scores:
        if not scale.follows:
            raise PlanError(
                f"the scores of {scale.module} have a factor that follows head_dim, and no parameter of that "
                "size tells it at another width; transform with base= instead of plan="
            )
        old, new = plan[scale.follows].geometry, by_name[scale.follows]
        # Runs of features grow with the axis that they are cut from.
        ratio = Fraction(new.fan_out, old.fan_out)
        parts = tuple((int(first * ratio), int(last * ratio)) for first, last in scale.parts)
        scores.append(replace(scale, growth=new.m_out, parts=parts))
    return tuple(scores)


def _axis_faults(plan: Plan, shapes: Shapes) -> list[str]:
    """Say which axes cannot have the sizes that they have."""
    faults = []
    size_of: dict[tuple[str, int], tuple[int, str]] = {}  # dimension -> its size, and where it was met
    for entry in plan.entries:
        geometry = entry.geometry
        shape = shapes.get(geometry.name)
        if shape is None:
            continue  # it is among the names that differ
        if len(shape) != len(geometry.shape):
            faults.append(f"{geometry.name}: planned with {len(geometry.shape)} axes, has {len(shape)}")
            continue
        # A growing axis may have any size, as long as all axes of its dimension have the same one.
        for axis, (size, planned_size) in enumerate(zip(shape, geometry.shape, strict=True)):
            location = f"{geometry.name}:{axis}"
            if not geometry.infinite[axis]:
                if size != planned_size:
                    faults.append(f"{location}: planned as fixed at {planned_size}, has {size}")
                continue
            name = geometry.dims[axis]
            first_size, first_location = size_of.setdefault((name, planned_size), (size, location))
            if size != first_size:
                faults.append(f"{location}: {name} is {size} here and {first_size} in {first_location}")
    return faults


def _ratios(plan: Plan, shapes: Shapes) -> Counter[float]:
    """Return by how much dimensions have grown, and how many axes have by that; sums are left out."""
    ratios: Counter[float] = Counter()
    for name, planned_size, size in _growing_axes(plan, shapes):
        # width + 2*16: a sum of which a part is fixed
        if planned_size and "+" not in name:
            ratios[size / planned_size] += 1
    return ratios


def _growing_axes(plan: Plan, shapes: Shapes) -> Iterator[tuple[str, int, int]]:
    """Yield the dimension of every axis that grows, its planned size and the one that it has."""
    for entry in plan.entries:
        geometry = entry.geometry
        axes = zip(geometry.infinite, geometry.dims, geometry.shape, shapes[geometry.name], strict=True)
        for grows, name, planned_size, size in axes:
            if grows:
                yield name, planned_size, size


def _width(plan: Plan, shapes: Shapes, ratios: Counter[float]) -> int:
    """Return the size of the dimension that names the width."""
    axes = _growing_axes(plan, shapes)
    sizes = Counter(size for _, planned_size, size in axes if planned_size == plan.width)
    # The dimension that named the width tells it; else the most frequent ratio does.
    if sizes:
        return sizes.most_common(1)[0][0]
    return round(plan.width * ratios.most_common(1)[0][0])


def _fused_again(geometry: Geometry, fusion: Fusion, shape: Shape, ratios: Counter[float]) -> Fusion:
    """Return how an axis of another size is fused.

    Raises:
        PlanError: The sizes of its matrices do not follow from that of the axis.
    """
    size = shape[fusion.axis]
    if size == geometry.shape[fusion.axis]:
        return fusion
    location = f"{geometry.name}:{fusion.axis}, which holds {len(fusion.sizes)} matrices"
    growing = [position for position, grows in enumerate(fusion.grows) if grows]
    if len(growing) != 1 or not fusion.part_grows:
        raise PlanError(f"{location}: a plan does not tell which of its factors grew; give base= instead")
    (position,) = growing
    # [3, heads, head_dim] with the new number of heads: what does not grow divides the axis.
    others = prod(factor for number, factor in enumerate(fusion.view) if number != position)
    new_size, remainder = divmod(size, others)
    view = (*fusion.view[:position], new_size, *fusion.view[position + 1 :])
    sizes = fusion.sizes
    # cat([q, k, v]) along the axis that grew: each part grew with it.
    if position == fusion.along:
        sizes = _parts(fusion, new_size, len(ratios) == 1)
    if remainder or not sizes:
        raise PlanError(f"{location}: {size} cannot be divided among them by the plan; give base= instead")
    return replace(fusion, view=view, sizes=sizes)


def _grouped_again(geometry: Geometry, site: Site, shape: Shape) -> Site:
    """Return a use with as many groups as a kernel of another size has.

    Raises:
        PlanError: Their number does not follow from the sizes.
    """
    # A kernel [out, in / groups, ...] whose second axis is fixed has more groups, not larger ones.
    if site.groups == 1 or geometry.infinite[1]:
        return site
    groups, remainder = divmod(site.groups * shape[0], geometry.shape[0])
    if remainder:
        raise PlanError(
            f"{geometry.name}: {shape[0]} outputs cannot be divided among groups by the plan, which has "
            f"{site.groups} for {geometry.shape[0]}; give base= instead"
        )
    return replace(site, groups=groups)


def _parts(fusion: Fusion, whole: int, by_one_ratio: bool) -> tuple[int, ...]:
    """Return the lengths of matrices that stand one behind the other; none where they do not follow.

    Args:
        fusion: How they were.
        whole: Their length together.
        by_one_ratio: Whether all of the model grew by one ratio.
    """
    growing = [size for size, grows in zip(fusion.sizes, fusion.part_grows, strict=True) if grows]
    fixed = sum(fusion.sizes) - sum(growing)
    # Queries may have grown otherwise than keys and values.
    if len(set(growing)) > 1 and not by_one_ratio:
        return ()
    sizes = []
    for size, grows in zip(fusion.sizes, fusion.part_grows, strict=True):
        # A part that grows takes its share of what is left by the fixed ones.
        new_size, remainder = divmod(size * (whole - fixed), sum(growing)) if grows else (size, 0)
        if remainder or new_size <= 0:
            return ()
        sizes.append(new_size)
    return tuple(sizes)
