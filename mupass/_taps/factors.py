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
from mupass._taps.forms import Bag, Convolution, Elementwise, Form, Lookup, Sorted, Standardized, Table
from mupass._taps.pieces import cut, pieces

BAND = 128  # rows of a factor that are multiplied together
BUFFER = 1 << 24  # numbers that gradients of single samples may take at a time


@dataclass(frozen=True)
class Layer:
    """What the factors must know of a weight use.

    Attributes:
        kind: ``linear``, ``grouped``, ``conv``, ``standardized``, ``conv_transpose``, ``embedding``,
            ``contraction``, ``table`` or ``vector``.
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
        features: Of a table, the axes of the parameter that are features; all others count its rows.
        shown: Of a table, the axes of what meets activations along which the features stand, counted from
            the last one (-1).
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
    features: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of the input factor: ``[groups * blocks, n, n]``, or ``[groups, n]``."""
        return self._shape(self.inputs, self.diagonal_in)

    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every output factor, ``[groups * blocks, n, n]`` or ``[groups, n]``."""
        return tuple(self._shape(size, self.diagonal_out) for size in self.outputs)

    @property
    def counted(self) -> int:
        """How many numbers of rows there are: one for each group where rows come group by group."""
        return self.groups if self.kind == "grouped" else 1

    def _shape(self, size: int, diagonal: bool) -> tuple[int, ...]:
        if diagonal:
            return (self.groups, size)
        count, length = pieces(size, self.block)
        return (self.groups * count, length, length)


def raw_input(layer: Layer, form: Form, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum x x^T`` over rows.

    Args:
        layer: Shapes.
        form: Layout of the operator.
        x: Its input.
        dtype: Precision of the factor.
    """
    # The rows are one-hot, and their products a diagonal: how often each row of the table was read.
    if isinstance(form, (Lookup, Bag, Table)):
        read = form.input_rows(x).reshape(-1)
        ones = torch.ones(read.numel(), dtype=dtype, device=x.device)
        if isinstance(form, Lookup) and form.padding >= 0:
            ones = (read != form.padding).to(dtype)
        counts = torch.zeros(layer.inputs, dtype=dtype, device=x.device)
        return counts.scatter_add(0, read, ones).unsqueeze(0)
    # Products of whole patches are shared; means and pieces of them, and their squares alone, are not.
    whole = not (layer.reduce or layer.diagonal_in or 0 < layer.block < layer.inputs)
    whole &= not x.requires_grad  # correlations have no derivative
    if whole and isinstance(form, Convolution) and form.overlaps(layer.inputs):
        with without_autocast(x.device):
            return form.patch_gram(x.to(dtype))
    # Inputs less their mean have the factor P A P, with P = I - 1 1^T / n.
    if whole and isinstance(form, Standardized) and form.convolution.overlaps(layer.inputs):
        with without_autocast(x.device):
            return _centered(form.convolution.patch_gram(x.to(dtype)))
    # [groups, samples, positions, fan_in] -> [groups, rows, fan_in]
    inputs = form.input_rows(x)
    if layer.reduce:
        inputs = inputs.mean(2)
    else:
        inputs = inputs.flatten(1, 2)
    return _factor(layer, inputs, layer.diagonal_in, dtype)


def _centered(factor: Tensor) -> Tensor:
    """Return ``sum (x - m)(x - m)^T`` for ``sum x x^T``, where m is the mean over the entries of x."""
    rows = factor - factor.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def raw_outputs(
    layer: Layer, form: Form, x: Tensor, g: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[list[Tensor | None], int | Tensor]:
    """Return ``sum g g^T`` over rows for every matrix, and the number of rows, or those of every group.

    Args:
        layer: Shapes.
        form: Layout of the operator.
        x: Its input; only gains need it.
        g: Gradient of its output.
        wanted: Which of the matrices; the others get None.
        dtype: Precision of the factors.
    """
    padded: Tensor | None = None
    if isinstance(form, Lookup) and form.padding >= 0:
        # The gradient at these positions does not reach the table.
        padded = x != form.padding
        g = g * padded[..., None]
    outputs = form.output_rows(g)
    samples, positions = outputs.shape[1], outputs.shape[2]
    together = layer.reduce
    if isinstance(form, Elementwise):
        parts = [outputs] * len(layer.gains)
        # y = gain * x + shift: the gradient of the shift is g, that of the gain g * x.
        if any(layer.gains):
            products = outputs * form.input_rows(x.expand_as(g))
            parts = [products if gain else outputs for gain in layer.gains]
        together |= not form.count  # one number has one gradient a sample
    else:
        parts = [part.flatten(3) for part in split(outputs, layer.fusions)]
    factors: list[Tensor | None] = []
    for part, is_wanted in zip(parts, wanted, strict=True):
        if not is_wanted:
            factors.append(None)
            continue
        # [groups, samples, positions, n] -> [groups, rows, n]
        gradients = part.sum(2) if together else part.flatten(1, 2)
        factors.append(_factor(layer, gradients, layer.diagonal_out, dtype))
    if isinstance(form, Sorted):
        return factors, form.counts()
    if padded is not None:
        return factors, padded.sum().reshape(1)
    # In the reduce setting a sample is one row.
    return factors, samples if layer.reduce else samples * positions


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
    with without_autocast(g.device):
        # In the eigenbases the gradient of a row is the outer product of its rotated g and its rotated x.
        inputs = form.input_rows(x).to(dtype) @ bases[0][:, None]
        moments = []
        for piece, basis in zip(split(form.output_rows(g), layer.fusions), bases[1:], strict=True):
            outputs = piece.flatten(3).to(dtype) @ basis[:, None]
            if layer.reduce and outputs.shape[2] > 1:
                moments.append(_of_samples(outputs, inputs))
            else:
                # The square of g x^T is g^2 (x^2)^T: no gradient of a sample is formed.
                moments.append(outputs.flatten(1, 2).square().mT @ inputs.flatten(1, 2).square())
    return moments


def _of_samples(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Form the gradients of samples, as many at a time as fit into a buffer of `BUFFER` numbers."""
    # The gradient of one sample has as many numbers as the weights of all groups.
    count = max(BUFFER // (outputs.shape[0] * outputs.shape[-1] * inputs.shape[-1]), 1)
    if outputs.shape[1] <= count:
        return (outputs.mT @ inputs).square().sum(1)
    chunks = zip(torch.split(outputs, count, 1), torch.split(inputs, count, 1), strict=True)
    return torch.stack([(rows.mT @ columns).square().sum(1) for rows, columns in chunks]).sum(0)


def _factor(layer: Layer, rows: Tensor, diagonal: bool, dtype: torch.dtype) -> Tensor:
    """Return a factor, or what is kept of it: its diagonal, or the blocks on it."""
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
    with without_autocast(rows.device):
        # On a GPU one large product is faster than half of the work in several.
        if rows.is_cpu and rows.shape[-1] > 2 * BAND and not torch.compiler.is_compiling():
            return _by_bands(rows)
        return rows.mT @ rows


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep their precision; one that does nothing costs less.

    Args:
        device: Where they are made.
    """
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    # The meta device has no autocast.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _by_bands(rows: Tensor) -> Tensor:
    """Return ``rows^T rows``; what is right of the diagonal is a copy of what is below: half of the work."""
    groups, _, size = rows.shape
    product = rows.new_empty(groups, size, size)
    for start in range(0, size, BAND):
        band = product[:, start : start + BAND]
        stop = start + band.shape[1]
        # This band of rows up to the diagonal; what is left of it, transposed, stands above its columns.
        band[..., :stop].baddbmm_(rows[..., start:stop].mT, rows[..., :stop], beta=0)
        product[:, :start, start:stop] = band[..., :start].mT
    return product


def squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the diagonal of `gram`, ``[groups, n]``.

    Args:
        rows: ``[groups, rows, n]``.
        dtype: Precision of the factor.
    """
    return rows.to(dtype).square().sum(1)


def by_group(rows: Tensor, like: Tensor) -> Tensor:
    """Return numbers of rows in the axes of factors ``[groups * blocks, ...]``.

    Args:
        rows: One number, or one for each group.
        like: The factors.
    """
    # One number for all groups broadcasts by itself.
    if len(rows) == 1:
        return rows
    return rows.repeat_interleave(len(like) // len(rows)).view(-1, *[1] * (like.dim() - 1))


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
    return layer if layer.kind in ("embedding", "table") else replace(layer, reduce=True)
