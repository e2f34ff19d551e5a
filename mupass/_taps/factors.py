"""Kronecker factors of one weight use: raw sums of outer products of its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mupass._records import Fusion
from mupass._roles.fused import split
from mupass._taps.forms import Convolution, Elementwise, Form, Lookup
from mupass._taps.pieces import cut, pieces

BAND = 128  # rows of a factor that are multiplied together
BUFFER = 1 << 24  # numbers that gradients of single samples may take at a time


@dataclass(frozen=True)
class Layer:
    """What the factors must know of a weight use.

    Attributes:
        kind: ``linear``, ``conv``, ``conv_transpose``, ``embedding``, ``contraction`` or ``vector``.
        groups: Number of separate weights of equal shape (grouped convolution, experts).
        inputs: Size of one input factor; 0 for vectors, whose input factor is the number 1.
        outputs: Size of the output factor of every matrix: several for a fused weight (q, k, v); for a norm
            its gain and its bias.
        fusions: How output rows ``[groups, samples, positions, *fan_out axes]`` split into the matrices.
        diagonal_in: Whether only the diagonal of the input factor is kept.
        diagonal_out: Whether only the diagonal of the output factors is kept.
        gains: For vectors, whether the output's gradient is multiplied by the input, for every output.
        block: Largest block of a factor that keeps blocks on its diagonal only; 0 for whole factors.
        reduce: Average inputs, and sum gradients, over positions within a sample (the reduce setting of
            arXiv 2311.00636) instead of taking every position for a sample (the expand setting).
    """

    kind: str
    groups: int
    inputs: int
    outputs: tuple[int, ...]
    fusions: tuple[Fusion, ...] = ()
    diagonal_in: bool = False
    diagonal_out: bool = False
    gains: tuple[bool, ...] = ()
    reduce: bool = False
    block: int = 0

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of the input factor: ``[groups * blocks, n, n]``, or ``[groups, n]``."""
        return self._shape(self.inputs, self.diagonal_in)

    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every output factor, ``[groups * blocks, n, n]`` or ``[groups, n]``."""
        return tuple(self._shape(n, self.diagonal_out) for n in self.outputs)

    def _shape(self, n: int, diagonal: bool) -> tuple[int, ...]:
        if diagonal:
            return (self.groups, n)
        count, side = pieces(n, self.block)
        return (self.groups * count, side, side)


def raw_input(layer: Layer, form: Form, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum x x^T`` over rows.

    Args:
        layer: Shapes.
        form: Layout of the operator.
        x: Its input.
        dtype: Precision of the factor.
    """
    if isinstance(form, Lookup):
        ones = torch.ones(x.numel(), dtype=dtype, device=x.device)
        zeros = torch.zeros(layer.inputs, dtype=dtype, device=x.device)
        return zeros.scatter_add(0, x.reshape(-1), ones).unsqueeze(0)
    whole = not (layer.reduce or layer.diagonal_in or 0 < layer.block < layer.inputs)
    whole &= not x.requires_grad  # correlations have no derivative
    if whole and isinstance(form, Convolution) and form.overlaps(layer.inputs):
        with torch.autocast(x.device.type, enabled=False):
            return form.patch_gram(x.to(dtype))
    rows = form.input_rows(x)
    rows = rows.mean(2) if layer.reduce else rows.flatten(1, 2)
    return _factor(layer, rows, layer.diagonal_in, dtype)


def raw_outputs(
    layer: Layer, form: Form, x: Tensor, g: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[list[Tensor | None], int]:
    """Return ``sum g g^T`` over rows for every matrix, and the number of rows.

    Args:
        layer: Shapes.
        form: Layout of the operator.
        x: Its input; only gains need it.
        g: Gradient of its output.
        wanted: Which of the matrices; the others get None.
        dtype: Precision of the factors.
    """
    rows = form.output_rows(g)
    together = layer.reduce
    if isinstance(form, Elementwise):
        inputs = form.input_rows(x.expand_as(g)) if any(layer.gains) else None
        parts = [rows if inputs is None or not gain else rows * inputs for gain in layer.gains]
        together |= not form.count  # one number has one gradient a sample
    else:
        parts = [p.flatten(3) for p in split(rows, layer.fusions)]
    found = [
        _factor(layer, part.sum(2) if together else part.flatten(1, 2), layer.diagonal_out, dtype)
        if want
        else None
        for part, want in zip(parts, wanted, strict=True)
    ]
    return found, rows.shape[1] * (1 if layer.reduce else rows.shape[2])


def second_moments(
    layer: Layer, form: Form, x: Tensor, g: Tensor, bases: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return ``sum (U_B^T G U_A)^2``, entry by entry, over the gradients G of samples, for every matrix.

    A row is a sample of its own in the expand setting: ``G = g x^T``. In the reduce setting the rows of a
    sample stand together, ``G = sum over positions of g x^T``, which is its true gradient (George et al.,
    arXiv 1806.03884, eq. 10).

    Args:
        layer: Shapes.
        form: Layout of the operator.
        x: Its input.
        g: Gradient of its output.
        bases: U_A ``[groups, n, n]``, then the U_B of every matrix.
        dtype: Precision of the moments.
    """
    with torch.autocast(g.device.type, enabled=False):
        inputs = form.input_rows(x).to(dtype) @ bases[0][:, None]
        found = []
        for piece, basis in zip(split(form.output_rows(g), layer.fusions), bases[1:], strict=True):
            outputs = piece.flatten(3).to(dtype) @ basis[:, None]
            if layer.reduce and outputs.shape[2] > 1:
                found.append(_of_samples(outputs, inputs))
            else:
                found.append(outputs.flatten(1, 2).square().mT @ inputs.flatten(1, 2).square())
    return found


def _of_samples(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Form the gradients of samples, as many at a time as fit into a buffer of `BUFFER` numbers."""
    step = max(BUFFER // (outputs.shape[0] * outputs.shape[-1] * inputs.shape[-1]), 1)
    if outputs.shape[1] <= step:
        return (outputs.mT @ inputs).square().sum(1)
    pairs = zip(torch.split(outputs, step, 1), torch.split(inputs, step, 1), strict=True)
    return torch.stack([(o.mT @ i).square().sum(1) for o, i in pairs]).sum(0)


def _factor(layer: Layer, rows: Tensor, diagonal: bool, dtype: torch.dtype) -> Tensor:
    if diagonal:
        return squares(rows, dtype)
    return gram(cut(rows, *pieces(rows.shape[-1], layer.block)), dtype)


def gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum of r r^T`` for every group, in the precision of the factors, out of autocast's reach.

    Args:
        rows: ``[groups, rows, n]``.
        dtype: Precision of the factor.
    """
    rows = rows.to(dtype)
    with _without_autocast(rows.device):
        if rows.is_cpu and rows.shape[-1] > 2 * BAND and not torch.compiler.is_compiling():
            return _by_bands(rows)
        return rows.mT @ rows


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep their precision; one that does nothing costs less."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _by_bands(rows: Tensor) -> Tensor:
    """Return ``rows^T rows``; what is right of the diagonal is a copy of what is below: half of the work."""
    groups, _, n = rows.shape
    product = rows.new_empty(groups, n, n)
    for start in range(0, n, BAND):
        band = product[:, start : start + BAND]
        end = start + band.shape[1]
        band[..., :end].baddbmm_(rows[..., start:end].mT, rows[..., :end], beta=0)
        product[:, :start, start:end] = band[..., :start].mT
    return product


def squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the diagonal of `gram`, ``[groups, n]``.

    Args:
        rows: ``[groups, rows, n]``.
        dtype: Precision of the factor.
    """
    return rows.to(dtype).square().sum(1)


def factor_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision of a parameter's factors: double for double, single for all else.

    Args:
        parameter: The parameter.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def reduced(layer: Layer) -> Layer:
    """Return the layer in the reduce setting; tables, read position by position, stay as they are.

    Args:
        layer: A layer in the expand setting.
    """
    return layer if layer.kind == "embedding" else replace(layer, reduce=True)
