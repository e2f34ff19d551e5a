"""Damping of the two Kronecker factors of a layer (Ishikawa & Karakida, arXiv 2312.12226, eqs. 14 and 15)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE = ("trace", "eigen")
MODES = (*RELATIVE, "absolute", "pi")
# Rows of a step from which relative damping is what it says, and by how much it grows at most below.
ROWS, MOST = 256, 16.0
# The power of that growth which a direction is multiplied by, for each side.
LENGTHENING = 1 / 8
FLOOR = 1e-7  # of pi-damping's traces, as in Martens & Grosse's reference code


@dataclass(frozen=True)
class Sides:
    """Traces and sizes of the factors A and B of several layers, aligned.

    Attributes:
        trace_a: Traces of A, ``[K]``; ones for biases, whose A is the number 1.
        trace_b: Traces of B, ``[K]``.
        dim_a: Sizes of A.
        dim_b: Sizes of B.
        scale_a: Width factor of absolute damping of A.
        scale_b: Width factor of absolute damping of B.
        damping_a: The hyperparameter for A, ``[K]``.
        damping_b: That for B.
    """

    trace_a: Tensor
    trace_b: Tensor
    dim_a: Tensor
    dim_b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    damping_a: Tensor
    damping_b: Tensor


def few_rows(rows: Tensor) -> Tensor:
    """Return what relative damping is multiplied by where a step sees few rows of a factor.

    A mean over n rows knows about n directions. In the others, gradient and factor are noise, which the
    inverse of small eigenvalues blows up, the more so the wider the layer. Ridge regression with a prior of
    Theta(1) on the distance of a weight from its optimum has a damping of 1/n, for the product of both
    factors. The power, 2, and the two numbers are picked by benchmarks. Sides of fixed size have few
    directions, and stay as they are.

    Args:
        rows: Numbers of rows of the last observation: samples, or their positions.
    """
    return (ROWS / rows.clamp(min=1)).square().clamp(1.0, MOST)


def lengthening(grown_a: Tensor, grown_b: Tensor) -> Tensor:
    """Return what a direction is multiplied by where the damping of its sides has grown.

    More damping makes a direction shorter, most where eigenvalues are small, so that the same rate takes
    smaller steps with smaller batches. This makes up for a part of it, which was picked by benchmarks.

    Args:
        grown_a: By how much the damping of A has grown, see `few_rows`.
        grown_b: By how much that of B has.
    """
    return (grown_a * grown_b).pow(LENGTHENING)


def damp(mode: str, sides: Sides, floor: float = 0.0, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rho_A and rho_B for every layer.

    * ``trace``: ``rho_X = damping * tr(X)``, the paper's rescaled rule (eq. 15): it has the width order of
      the factor's eigenvalues by itself. The trace, not the trace over the size.
    * ``eigen``: ``damping`` itself, for roots that take it relative to the largest eigenvalue.
    * ``absolute``: ``damping`` times the width factor of the scale table.
    * ``pi``: the usual heuristic, ``rho_A = pi sqrt(damping)``, ``rho_B = sqrt(damping) / pi`` with
      ``pi^2 = (tr A / dim A) / (tr B / dim B)``. Its order is right in hidden layers only: under muP the
      input layer's update decays like 1/width.

    Args:
        mode: One of `MODES`.
        sides: The factors.
        floor: Smallest trace of B that ``trace`` damping reckons with, relative to the largest one. Both are
            compared at the base width (each over its own width factor), so it cannot bind at one width only.
            A branch behind a gate near zero has gradients, and so a B, smaller by many orders; without a
            floor its step would be larger by as many.
        largest: That largest trace of B at the base width; by default the one among ``sides``.

    Returns:
        ``rho_A`` and ``rho_B``, each ``[K]``.
    """
    damping_a, damping_b = sides.damping_a, sides.damping_b
    if mode == "trace":
        if largest is None:
            largest = (sides.trace_b / sides.scale_b).amax()
        # The floor is relative to the largest trace at the base width: back to this width by each factor.
        trace_b = torch.maximum(sides.trace_b, floor * largest * sides.scale_b)
        return damping_a * sides.trace_a, damping_b * trace_b
    if mode == "eigen":
        return damping_a, damping_b
    if mode == "absolute":
        return damping_a * sides.scale_a, damping_b * sides.scale_b
    # pi^2 is the ratio of the mean eigenvalues.
    mean_a = (sides.trace_a / sides.dim_a).clamp(min=FLOOR)
    mean_b = (sides.trace_b / sides.dim_b).clamp(min=FLOOR)
    pi = torch.sqrt(mean_a / mean_b)
    return pi * damping_a.sqrt(), damping_b.sqrt() / pi
