"""Tensors that code computes rather than draws: recognized by their formula, recomputed at another size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def recompute(old: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Recompute a structured tensor (identity, mask, ramp, frequencies, sinusoids) at another shape.

    A formula counts as recognized when it reproduces the old values at the old shape.

    Args:
        old: Present values.
        shape: New shape.

    Returns:
        The new values, or None when no formula is recognized.
    """
    values = old.detach().cpu()
    for formula in _formulas(values):
        try:
            recomputed = formula(tuple(values.shape))
        except (ValueError, OverflowError):  # the formula has no value at this shape
            continue
        # A formula is only known by its values at the old shape.
        if recomputed.shape == values.shape and _close(recomputed, values):
            return formula(tuple(shape)).to(old.dtype)
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    kind = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.to(kind), b.to(kind)
    # Infinity, as in attention masks, has no part in the tolerance.
    finite = b[b.isfinite()].abs()
    return len(finite) > 0 and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * finite.max().item())


def _formulas(old: Tensor) -> Iterator[_Formula]:
    # Axes of length 1 are there for broadcasting.
    lengths = [length for length in old.shape if length != 1]
    if len(lengths) == 1 and not old.is_complex() and old.dtype != torch.bool and lengths[0] > 2:
        yield from _ramps(old.flatten().double())
    if old.dim() == 2:
        yield from _matrices(old)
    if len(lengths) == 2 and lengths[1] > 2:
        # The first position has angles of 0, whose sines are 0 and cosines 1: no drawn matrix starts so.
        first = old.squeeze()[0]
        if ((first == 0) | (first == 1)).all():
            yield from _tables(old)


class _Formula:
    """A function of the shape; a row is computed along the only (or last) axis that is not 1."""

    def __init__(self, function: object):
        self.function = function

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        result: Tensor = self.function(shape)  # type: ignore[operator]
        return result.reshape(shape)


def _ramps(row: Tensor) -> Iterator[_Formula]:
    """Yield arange, linspace between whole numbers, and geometric sequences whose ends do not move."""
    count, first, last = len(row), row[0].item(), row[-1].item()
    step = (last - first) / (count - 1)
    # arange(first, first + n * step, step)
    if _round(first) and _round(step) and round(step) != 0:
        yield _Formula(lambda s: first + round(step) * torch.arange(math.prod(s), dtype=torch.float64))
    # linspace(first, last, n), whose ends stay where they are
    elif _round(first) and _round(last):
        yield _Formula(lambda s: torch.linspace(first, last, math.prod(s), dtype=torch.float64))
    # base^(i / n): the frequencies of rotary positions, the slopes of ALiBi
    if (row > 0).all() and last != first:
        yield from _geometric(count, math.log(first), math.log(last))
    # decays of retention, 1 - 2^(-5-i), and their logarithms
    yield from _powers_of_two(1 - row, lambda powers: 1 - powers)
    yield from _powers_of_two(-row.expm1(), lambda powers: (-powers).log1p())


def _powers_of_two(row: Tensor, function: Callable[[Tensor], Tensor]) -> Iterator[_Formula]:
    """Yield a function of 2^(start + slope i), where the row holds such powers, all below 1."""
    if not ((row > 0) & (row < 1)).all():
        return
    start, stop = row[0].log2().item(), row[-1].log2().item()
    slope = (stop - start) / (len(row) - 1)
    if _round(start) and _round(slope):
        yield _Formula(
            lambda s: function(2.0 ** (round(start) + round(slope) * torch.arange(math.prod(s)).double()))
        )


def _geometric(count: int, first: float, last: float) -> Iterator[_Formula]:
    """Yield base^((i + start) / (n - less)) for the bases that come out round."""
    slope = (last - first) / (count - 1)
    for less in (0, 1):
        for start in (0, 1):
            total = slope * (count - less)
            base = math.exp(abs(total))
            # Bases that people write are whole numbers.
            if abs(first - start * slope) < 1e-5 and abs(base / round(base) - 1) < 1e-3:
                exact = math.copysign(math.log(round(base)), total)
                yield _Formula(_power(exact, start, less))


def _power(log_base: float, start: int, less: int) -> object:
    def row(shape: tuple[int, ...]) -> Tensor:
        length = math.prod(shape)
        return torch.exp(log_base * (torch.arange(length, dtype=torch.float64) + start) / (length - less))

    return row


def _matrices(old: Tensor) -> Iterator[_Formula]:
    """Yield multiples of the identity, and triangular masks of two values."""
    rows, columns = old.shape
    corner, above, below = old[0, 0], old[0, -1], old[-1, 0]
    if rows > 1 and columns > 1:
        # corner * eye(n)
        if above == below == 0:
            yield _Formula(lambda s: corner * torch.eye(*s, dtype=old.dtype))
        yield _Formula(
            lambda s: (
                torch.where(torch.ones(s).tril().bool(), below, above)
                if corner == below
                else torch.where(torch.ones(s).triu().bool(), above, below)
            )
        )


def _tables(old: Tensor) -> Iterator[_Formula]:
    """Yield sinusoidal tables (positions, features), and cosines, sines, phases of rotary positions."""
    if old.is_complex():
        kinds: tuple[str, ...] = ("phase",)
    else:
        kinds = (
            "sin cos",
            "cos sin",
            "sin|cos",
            "cos|sin",
            "cos",
            "sin",
            "cos cos",
            "sin sin",
            "cos|cos",
            "sin|sin",
        )
    # The bases of sinusoids in use: the original one, and those of long contexts.
    for base in (10000.0, 500000.0, 1000000.0):
        for less in (0, 1):
            for kind in kinds:
                yield _Formula(_table(base, less, kind))


def _table(base: float, less: int, kind: str) -> object:
    """Features alternate (``sin cos``) or lie side by side (``sin|cos``)."""

    def table(shape: tuple[int, ...]) -> Tensor:
        length, width = (n for n in shape if n != 1)
        parts = kind.replace("|", " ").split()
        if width % len(parts) or width // len(parts) <= less:
            raise ValueError(f"{width} features for {kind}")
        half = width // len(parts)
        # angle[position, i] = position * base^(-i / half)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * base ** (
            -torch.arange(half, dtype=torch.float64) / (half - less)
        )
        tables = {
            "cos": angle.cos(),
            "sin": angle.sin(),
            "phase": torch.polar(torch.ones_like(angle), angle),
        }
        pieces = [tables[part] for part in parts]
        if "|" in kind:
            return torch.cat(pieces, -1)
        return torch.stack(pieces, -1).flatten(-2)

    return table


def _round(value: float) -> bool:
    return abs(value - round(value)) <= 1e-6 * max(1.0, abs(value))
