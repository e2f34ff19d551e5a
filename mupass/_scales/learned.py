"""Whether weights were trained already: values that no initialization draws.

Initial weights are independent draws of one law, flat, normal or a normal that is cut off. Training leaves
three marks on a matrix. Its entries follow none of these laws. Rows or columns differ in mean or size by more
than chance. Its largest singular value lies beyond that of independent entries, since gradients have few
directions. A draw shows none of them but once in a million.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import erf, sqrt

import torch
from torch import Tensor

from mupass._parallel import whole
from mupass._records import Geometry
from mupass._scales.init import InitChoice, Values, told_laws
from mupass._scales.own_draws import std_of_cut_normal
from mupass._scales.plan import Plan

FEWEST = 256  # entries of a matrix below which marks cannot be told from chance
MOST = 1024  # rows and columns that are looked at
SHARE = 1 / 3  # of the matrices and shifts must bear a mark, a matrix among them: one alone may be a table
DEVIATIONS = 6.0  # standard errors of a moment that chance is allowed
KOLMOGOROV = 2.0  # distance between distributions, times sqrt(entries), that chance is allowed
ITERATIONS = 12
LEADS = 0.25  # mean of a sum over its deviation, from which on the mean is told


def learned(tensors: Values, geometries: Sequence[Geometry]) -> list[str]:
    """Name the weights that look trained; none where most of the model's look initial.

    Args:
        tensors: Parameters by name.
        geometries: Geometry of those to be judged.

    Returns:
        Names, in the order of the geometries.
    """
    marked, judged = [], 0
    for geometry in geometries:
        mark = looks_trained(tensors[geometry.name], geometry)
        judged += mark is not None
        marked += [geometry.name] if mark else []
    has_matrix = any(geometry.fan_in_axes for geometry in geometries if geometry.name in marked)
    return marked if has_matrix and len(marked) >= SHARE * judged else []


def learned_of(plan: Plan, parameters: Values, init: InitChoice) -> list[str]:
    """Name the weights of a planned model that look trained, but for those whose law the caller states.

    Args:
        plan: Plan of the model.
        parameters: Its values by name.
        init: Law of the values, as for `mupass.transform`.
    """
    # A caller who states the law says that the values are drawn.
    stated = told_laws(init, list(plan))
    return learned(
        parameters, [entry.geometry for entry in plan.entries if entry.geometry.name not in stated]
    )


def looks_trained(tensor: Tensor, geometry: Geometry) -> bool | None:
    """Return whether a parameter bears a mark of training; None where it cannot be told.

    Args:
        tensor: Its values.
        geometry: Its axes and uses.
    """
    tensor = tensor.detach()
    if tensor.is_meta or not tensor.is_floating_point():
        return None
    tensor = whole(tensor)
    # A norm's shift starts as a constant: values that differ have been trained.
    if geometry.sites and all(site.kind == "norm shift" for site in geometry.sites):
        return len(torch.unique(tensor)) > 1 if tensor.numel() > 1 else None
    matrix = random_matrix(tensor, geometry)
    return None if matrix is None else bears_a_mark(matrix, geometry.fan_in)


def has_a_mean(tensor: Tensor, geometry: Geometry) -> bool:
    """Return whether the mean of a random matrix leads its sums, which have ``fan_in`` terms.

    Args:
        tensor: Its values.
        geometry: Its axes.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return False
    matrix = random_matrix(tensor.detach(), geometry)
    if matrix is None:
        return False
    size, deviation = matrix.mean().abs().item(), matrix.std().item()
    # More than chance gives, and large enough to be seen in a sum of terms of either sign.
    certain = size * sqrt(matrix.numel()) > DEVIATIONS * deviation
    return certain and size * sqrt(geometry.fan_in) > LEADS * deviation


def random_matrix(tensor: Tensor, geometry: Geometry) -> Tensor | None:
    """Return fan_out x fan_in values, or None for what is no matrix, too small, or not random.

    Args:
        tensor: Values of a parameter.
        geometry: Its axes.
    """
    if tensor.numel() < FEWEST or not geometry.fan_in_axes or not geometry.fan_out_axes:
        return None
    axis_order = (*geometry.fan_out_axes, *geometry.fan_in_axes)
    if sorted(axis_order) != list(range(tensor.dim())):
        return None
    matrix = tensor.permute(axis_order).reshape(geometry.fan_out, geometry.fan_in)
    rows, columns = (_some(size, matrix.device) for size in matrix.shape)
    # A grid of at most 1024 x 1024 entries: the marks do not need all of them, and large weights are slow.
    matrix = matrix[rows][:, columns].float()
    # Rows and columns of zeros are padding.
    matrix = matrix[matrix.any(1)][:, matrix.any(0)]
    # A pattern, a one-hot code say, has few distinct values.
    patterned = matrix.numel() < FEWEST or min(matrix.shape) < 2 or len(torch.unique(matrix[:16])) < 32
    return None if patterned else matrix


def _some(size: int, device: torch.device) -> Tensor:
    """Return evenly spaced indices, all of them where there are few."""
    return torch.linspace(0, size - 1, min(size, MOST), device=device).round().long()


def bears_a_mark(matrix: Tensor, fan_in: int) -> bool:
    """Return whether a matrix shows a mark of training.

    Args:
        matrix: Its values, two axes.
        fan_in: What PyTorch's default law divides by.
    """
    centered = matrix - matrix.mean()
    return (
        _follows_no_law(matrix)
        or _leaves_its_bound(matrix, 1 / sqrt(fan_in))
        or _differs_by_row(centered)
        or _has_a_direction(centered)
    )


def _leaves_its_bound(matrix: Tensor, bound: float) -> bool:
    """Find entries beyond the bound of a flat law that has the size of ``U(-bound, bound)``."""
    std = matrix.std(correction=0)
    kurtosis = ((matrix / std) ** 4).mean().item()  # 1.8 for a flat law, 3 for a normal one
    # Weights of the size of PyTorch's default that go beyond its bound were not drawn by it.
    default = abs(std.item() * sqrt(3) / bound - 1) < 0.05 and kurtosis < 2
    return default and matrix.abs().max().item() > 1.02 * bound


def _follows_no_law(matrix: Tensor) -> bool:
    """Compare the distribution of the entries with the laws that code draws from (Kolmogorov, Smirnov)."""
    values = matrix[matrix != 0]  # sparse weights are zero at the others
    values = ((values - values.mean()) / values.std()).sort().values
    empirical = torch.arange(1, len(values) + 1, device=values.device) / len(values)
    distances = []
    # Flat, normal, and normals cut off at one, two and three standard deviations.
    for law in (_flat, torch.special.ndtr, *map(_cut, (1.0, 2.0, 3.0))):
        expected = law(values)
        distances.append((empirical - expected).abs().max().item())
    # For draws of the law itself, the distance falls like one over the root of the number of entries.
    return min(distances) > KOLMOGOROV / sqrt(len(values)) + 0.01


def _flat(values: Tensor) -> Tensor:
    return ((values / sqrt(3) + 1) / 2).clamp(0, 1)


def _cut(bound: float) -> Callable[[Tensor], Tensor]:
    """Return the distribution of a normal cut off at a bound, scaled to variance 1."""
    mass = erf(bound / sqrt(2))
    std = std_of_cut_normal(bound, mass)
    low = (1 - mass) / 2
    return lambda values: (torch.special.ndtr((values * std).clamp(-bound, bound)) - low) / mass


def _differs_by_row(matrix: Tensor) -> bool:
    """Compare means, and means of squares, between rows and between columns with what chance gives."""
    squares = matrix.square()
    for values in (matrix, matrix.mT, squares, squares.mT):
        count, length = values.shape
        # Independent entries give about 1: a mean of n entries has 1/n of their variance.
        ratio = values.mean(1).var() * length / values.var()
        # The standard error of that ratio, with room for the heavier tail of squares.
        error = sqrt((2 + 12 / length) / count)
        if ratio > 1 + DEVIATIONS * error + 12 / count:
            return True
    return False


def _has_a_direction(matrix: Tensor) -> bool:
    """Compare the largest singular value with its bound for independent entries."""
    # Signs alternate, since the mean of all entries was subtracted.
    vector = torch.ones(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    vector[::2] = -1
    size = 0.0
    # Power iteration on M^T M: enough steps to see a singular value that stands out.
    for _ in range(ITERATIONS):
        image = matrix @ (vector / vector.norm())
        size = image.norm().item()  # below the largest singular value, and near it where that stands out
        vector = matrix.mT @ image
    # A bound for independent entries: largest row norm plus largest column norm.
    return size > 1.05 * (matrix.norm(dim=0).max() + matrix.norm(dim=1).max()).item()
