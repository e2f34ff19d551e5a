"""Roles: which axes of a parameter are fan_in and fan_out, and which row of the scale table it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mupass._records import Axes, Role, Use


def main_use(uses: Sequence[Use], infinite: Sequence[bool]) -> Use | None:
    """Return the use that decides a parameter's role.

    A weight that is read twice, once as a lookup table or first layer and once as a readout, takes the
    input row; the readout use is then compensated by a multiplier.

    Args:
        uses: All uses of the parameter.
        infinite: Verdict of each of its axes.

    Returns:
        The deciding use, or None for parameters that only multiply or shift activations.
    """
    # x * gain and x + bias contract nothing: such a use has neither fan_in nor fan_out.
    weights = [use for use in uses if use.fan_in or use.fan_out]
    if not weights:
        return None
    for use in weights:
        factor = _as_factor(use, weights, infinite)
        if factor is not None:
            return factor
    for row in ("input", "hidden", "output"):
        for use in weights:
            if role_of(use, infinite) == row:
                return use
    return weights[0]


def _as_factor(use: Use, uses: Sequence[Use], infinite: Sequence[bool]) -> Use | None:
    """Return what a use is, whole, of a parameter that is multiplied with another one first; else None.

    Args:
        use: One of its uses.
        uses: All of them.
        infinite: Verdict of each of its axes.
    """
    other_axes = tuple(axis for axis in range(len(infinite)) if axis not in use.fan_in)
    if use.fan_out or role_of(use, infinite) != "output" or any(infinite[axis] for axis in other_axes):
        return None
    # F.linear(x, W + B @ A): it contracts the width of A, whose rank B has contracted before.
    for other in uses:
        before = other.fan_in == other_axes and other.fan_out == use.fan_in
        if other_axes and before and other.kind != "embedding":
            return replace(use, fan_out=other_axes)
    return None


def role_of(use: Use | None, infinite: Sequence[bool]) -> Role:
    """Return the row of the scale table for one use.

    Args:
        use: A contraction of the parameter, or None when it has none.
        infinite: Verdict of each of its axes.

    Returns:
        ``input``, ``hidden`` or ``output`` for weights with a growing axis, ``vector`` for growing
        parameters that no activation is contracted with, ``scalar`` when no axis grows.
    """
    if not any(infinite):
        return "scalar"
    if use is None:
        return "vector"
    fan_in, fan_out = separate(use.fan_in, use.fan_out)
    grows_in = any(infinite[axis] for axis in fan_in)
    grows_out = any(infinite[axis] for axis in fan_out)
    if grows_in and grows_out:
        return "hidden"
    if grows_in:
        return "output"
    if grows_out:
        return "input"
    # What grows is a batch of weights: einsum("bni,nio->bno", x, w) with n heads of fixed size.
    return "vector"


def readout_uses(uses: Sequence[Use], role: Role, infinite: Sequence[bool]) -> tuple[Use, ...]:
    """Return the uses in which an input-row parameter also acts as a readout (a tied embedding)."""
    if role != "input":
        return ()
    # F.embedding(tokens, table) makes the width, F.linear(h, table) sums over it.
    return tuple(use for use in uses if role_of(use, infinite) == "output")


def separate(fan_in: Axes, fan_out: Axes) -> tuple[Axes, Axes]:
    """Give every axis one side; a weight mixed with its transpose (``W - W^T``) has its axes on both.

    Args:
        fan_in: Axes that are contracted.
        fan_out: Axes that are kept.

    Returns:
        Disjoint fan_in and fan_out; of a symmetric pair the last axis is fan_in.
    """
    if not set(fan_in) & set(fan_out):
        return fan_in, fan_out
    # F.linear(x, w - w.T): both axes are summed over in one term and made in the other.
    inside = tuple(axis for axis in fan_in if axis not in fan_out) or fan_in[-1:]
    return inside, tuple(axis for axis in fan_out if axis not in inside)
