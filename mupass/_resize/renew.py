"""New values for parameters and buffers: drawn by the law of the old ones, or recomputed by their formula.

A tensor is cut along sums (q, k, v) and opened along products (heads x head_dim). A slice that is constant
along all that grows is a pattern (a padding row, gate biases, decay rates) and is continued; all else must
look like independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor

from mupass._errors import ResizeError
from mupass._resize.sizes import NewSizes
from mupass._resize.structure import recompute
from mupass._scales.init import Init
from mupass._scales.laws import tolerance

SIGMAS = 6  # a wrong alarm about once in 10^9 tensors
FEW_NUMBERS = 8  # fewer tell no law of a whole tensor
UNIT_LENGTH = 1e-4  # error of the length of a direction


@dataclass(frozen=True)
class Segment:
    """One part of an axis, with the factors that it is the product of, row-major."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    grows: tuple[bool, ...]


def segments(sizes: NewSizes, dim: int) -> list[Segment]:
    """Cut an axis into the parts and factors that the graph tells apart.

    Args:
        sizes: The new sizes.
        dim: Dimension of the axis.
    """
    space, grows = sizes.solved.engine.space, sizes.solved.verdicts.grows
    parts = []
    # A sum first: its parts may be products of their own.
    for part in _members(sizes, dim, "sum"):
        parts += segments(sizes, part)
    if parts:
        return parts
    factors = _factors(sizes, dim)
    old_sizes, new_sizes = tuple(map(space.size, factors)), tuple(map(sizes.of_dim, factors))
    growing = []
    for factor, before, after in zip(factors, old_sizes, new_sizes, strict=True):
        growing.append(grows(factor) or before != after)
    return [Segment(old_sizes, new_sizes, tuple(growing))]


def _factors(sizes: NewSizes, dim: int) -> list[int]:
    """Return the factors that a dimension is the product of, itself where there are none."""
    factors = []
    for member in _members(sizes, dim, "product"):
        factors += _factors(sizes, member)
    return factors or [dim]


def _members(sizes: NewSizes, dim: int, kind: str) -> Sequence[int]:
    """Return what a growing dimension is made of, by the first term that is known."""
    if not sizes.solved.verdicts.grows(dim):
        return ()
    # Any of several terms would do: they are equal.
    terms = sizes.terms(sizes.solved.engine.space.find(dim), kind)
    return next(iter(terms), ())


def _new_shape(axes: Sequence[Sequence[Segment]]) -> list[int]:
    return [sum(math.prod(segment.new) for segment in axis) for axis in axes]


def pattern(old: Tensor, axes: Sequence[Sequence[Segment]]) -> Tensor | None:
    """Continue a tensor that is not random along anything that grows.

    Args:
        old: Present values.
        axes: Segments of every axis.

    Returns:
        The values at the new shape, or None where some of the old ones look drawn.
    """
    shape = _new_shape(axes)
    old = old.detach().cpu()
    # A head for no classes.
    if not old.numel() and not math.prod(shape):
        return old.new_empty(shape)
    # Identity, masks and sinusoids are recomputed by their formula.
    if list(old.shape) != shape:
        recomputed = recompute(old, shape)
        if recomputed is not None:
            return recomputed
    repeated = torch.empty(shape, dtype=old.dtype)
    for block in _blocks(axes):
        rows = block.rows(old)
        # Constant along all that grows: the constant goes on.
        if not (rows == rows[:, :1]).all():
            return None
        block.put(repeated, rows[:, :1].repeat(1, block.count))
    return repeated


def draw(
    name: str,
    old: Tensor,
    axes: Sequence[Sequence[Segment]],
    init: Init | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw a tensor at its new shape by the law of its present values.

    Args:
        name: Its name, for errors.
        old: Present values.
        axes: Segments of every axis.
        init: Law of a parameter; None for a buffer, of which only the standard normal law can be told.
        generator: Source of random numbers.

    Returns:
        The new values, on the CPU.

    Raises:
        ResizeError: The values follow a pattern that is not recognized.
    """
    old = old.detach().cpu()
    result = torch.empty(_new_shape(axes), dtype=old.dtype)
    if init is None:
        drawn_whole = _drawn_whole(old, result.shape, generator)
        if drawn_whole is not None:
            return drawn_whole
    for block in _blocks(axes):
        target_block = result[block.here]
        if init is not None:
            orthogonal = _orthogonal(old[block.there], target_block.shape, generator)
            if orthogonal is not None:
                target_block.copy_(orthogonal)
                continue
        values = block.rows(old)
        # Rows that are constant (padding, gate biases) are continued, the others are drawn.
        rows = values[:, :1].repeat(1, block.count)
        free = ~(values == values[:, :1]).all(1)
        if free.any():
            if _patterned(block.opened(old)[free]):
                raise ResizeError(
                    f"{name} grows with width and holds a pattern that is neither drawn at random nor a "
                    "known formula; its values at another width cannot be told"
                )
            rows[free] = _drawn(name, values[free], block.count, init, generator)
        block.put(result, rows)
    return result


@dataclass(frozen=True)
class _Block:
    """One combination of segments, seen as rows along which everything grows.

    Attributes:
        there: Where it lies in the old tensor.
        here: Where it lies in the new one.
        parts: Its segments, one for each axis.
    """

    there: tuple[slice, ...]
    here: tuple[slice, ...]
    parts: tuple[Segment, ...]

    @property
    def _grows(self) -> list[bool]:
        grows = list(chain.from_iterable(part.grows for part in self.parts))
        # Where nothing grows the whole block is one row.
        return grows if any(grows) else [True] * len(grows)

    @property
    def _order(self) -> list[int]:
        return sorted(range(len(self._grows)), key=lambda i: self._grows[i])

    @property
    def _new(self) -> list[int]:
        return list(chain.from_iterable(part.new for part in self.parts))

    @property
    def count(self) -> int:
        """Length of a new row."""
        return math.prod(size for size, grows in zip(self._new, self._grows, strict=True) if grows)

    def opened(self, old: Tensor) -> Tensor:
        """Return the old block as (row, growing factors...)."""
        sizes = list(chain.from_iterable(part.old for part in self.parts))
        # Fixed factors go first and growing ones last, whatever the layout.
        split = old[self.there].reshape(sizes).permute(self._order)
        # Factors that do not grow come first in the order: together they count the rows.
        fixed = len(self._order) - sum(self._grows)
        return split.flatten(0, fixed - 1) if fixed else split[None]

    def rows(self, old: Tensor) -> Tensor:
        """Return the old block as (row, entry)."""
        return self.opened(old).flatten(1)

    def put(self, new: Tensor, rows: Tensor) -> None:
        """Write new rows into their place."""
        split = rows.reshape([self._new[number] for number in self._order])
        restored = split.permute([self._order.index(number) for number in range(len(self._order))])
        new[self.here] = restored.reshape(new[self.here].shape)


def _blocks(axes: Sequence[Sequence[Segment]]) -> Iterator[_Block]:
    # Every combination of parts of the axes: q, k and v on one, and the heads on another.
    for spans in product(*map(_spans, axes)):
        old_slices = tuple(old_slice for old_slice, _, _ in spans)
        new_slices = tuple(new_slice for _, new_slice, _ in spans)
        yield _Block(old_slices, new_slices, tuple(segment for _, _, segment in spans))


def _spans(axis: Sequence[Segment]) -> list[tuple[slice, slice, Segment]]:
    """Return where each segment lies now, where it will lie, and itself."""
    spans, old_start, new_start = [], 0, 0
    for segment in axis:
        old_end = old_start + math.prod(segment.old)
        new_end = new_start + math.prod(segment.new)
        spans.append((slice(old_start, old_end), slice(new_start, new_end), segment))
        old_start, new_start = old_end, new_end
    return spans


def _patterned(free: Tensor) -> bool:
    """Whether neighbours along a growing axis are alike: independent draws are not."""
    if free.is_complex():  # real and imaginary parts are rows of their own
        free = torch.view_as_real(free).movedim(-1, 0).flatten(0, 1)
    # In double precision, since differences of neighbours are compared.
    doubles = free.double()
    for axis in range(1, doubles.dim()):
        length = doubles.shape[axis]
        if length < 2:
            continue
        steps = doubles.diff(dim=axis)
        # A ramp: eight draws that happen to be in order are met once in 20,000 times.
        one_axis = len(doubles) * length == doubles.numel()
        monotone = (steps > 0).all(axis) | (steps < 0).all(axis)
        if length >= 8 and one_axis and monotone.any():
            return True
        # Correlation of neighbours: 0 +- 1/sqrt(pairs) for independent draws.
        centred = doubles - doubles.mean(tuple(range(1, doubles.dim())), keepdim=True)
        total = centred.square().mean()
        pairs = steps.numel()
        likeness = (centred.narrow(axis, 0, length - 1) * centred.narrow(axis, 1, length - 1)).mean() / total
        limit = SIGMAS / math.sqrt(pairs) + 1 / length
        # Of a few pairs the limit may be beyond 1, which no correlation reaches.
        if likeness > (min(limit, 0.85) if pairs >= 16 else limit):
            return True
    return False


def _drawn(
    name: str, values: Tensor, count: int, init: Init | None, generator: torch.Generator | None
) -> Tensor:
    """Draw rows as long as asked for, by the law of the old rows."""
    if values.is_complex():
        split = torch.cat([values.real, values.imag])
        halves = _drawn(name, split, count, init, generator)
        return torch.complex(*halves.chunk(2))
    if not values.is_floating_point():
        raise ResizeError(
            f"{name} holds {values.dtype} that differ along a growing axis; they cannot be drawn"
        )
    # Half precision has too few digits for a mean and a deviation.
    source = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    mean, std = source.mean(), source.std(correction=0)
    # A mean within its own sampling error is that of a law of mean zero.
    if mean.abs() <= SIGMAS * std / math.sqrt(source.numel()):
        mean = torch.zeros_like(mean)
    factor = 1.0
    if init is None and _in_unit_interval(source, mean, std):
        return torch.rand((len(source), count), generator=generator, dtype=source.dtype).to(values.dtype)
    if init is not None:
        factor, law = init.factor, init.std
        # The law's own size, where the entries have it: their sample size has an error.
        if law is not None and abs(std.item() * factor / law - 1) <= tolerance(source.numel()):
            std = std.new_tensor(law / factor)
    elif mean != 0 or not _has_deviation(std, 1, source.numel()):
        raise ResizeError(f"buffer {name} grows with width and holds random values of an unknown law")
    shape = (len(source), count)
    unit = _unit(source, (source - mean) / std, shape, generator)
    return ((mean + std * unit) * factor).to(values.dtype)


def _drawn_whole(old: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor | None:
    """Draw a buffer whose entries are not independent: a direction, or the noise of a noisy layer.

    Args:
        old: Present values.
        shape: Of the new ones.
        generator: Source of random numbers.

    Returns:
        The new values, or None where the old ones are of no such law.
    """
    if not old.is_floating_point() or old.numel() < FEW_NUMBERS or old.dim() > 2:
        return None
    # u of spectral_norm: a normal vector over its length.
    if old.dim() == 1 and abs(old.norm().item() - 1) < UNIT_LENGTH and not _patterned(old[None]):
        direction = torch.randn(tuple(shape), generator=generator, dtype=old.dtype)
        return direction / direction.norm()
    # noise = outer(f(a), f(b)) and f(a), with f(x) = sign(x) sqrt(|x|) of normal numbers: NoisyNet
    sides = _sides(old)
    if sides is None or not all(map(_is_root_noise, sides)):
        return None
    noise = torch.ones((), dtype=old.dtype)
    for size in shape:
        normal = torch.randn(size, generator=generator, dtype=old.dtype)
        noise = noise[..., None] * (normal.sign() * normal.abs().sqrt())
    return noise


def _sides(old: Tensor) -> list[Tensor] | None:
    """Return a vector, or the two of one deviation whose outer product a matrix is; None where it is none."""
    if old.dim() == 1:
        return [old]
    row, column = divmod(int(old.abs().argmax()), old.shape[1])
    left, right = old[:, column], old[row] / old[row, column]
    if min(old.shape) < FEW_NUMBERS or not torch.allclose(
        torch.outer(left, right), old, rtol=1e-4, atol=1e-6
    ):
        return None
    balance = (left.std() / right.std()).sqrt()
    return [left / balance, right * balance]


def _is_root_noise(values: Tensor) -> bool:
    """Whether the squares of values, with their signs, may be standard normal numbers."""
    normal = values.sign() * values.square()
    centred = normal.mean().abs() <= SIGMAS * normal.std() / math.sqrt(normal.numel())
    return bool(centred) and _has_deviation(normal.std(correction=0), 1, normal.numel())


def _in_unit_interval(values: Tensor, mean: Tensor, std: Tensor) -> bool:
    """Whether values look drawn by ``torch.rand``: from 0 to 1, with that law's mean and deviation."""
    law = 1 / math.sqrt(12)
    inside = ((values >= 0) & (values < 1)).all()
    centred = (mean - 0.5).abs() <= SIGMAS * law / math.sqrt(values.numel())
    return bool(inside and centred) and _has_deviation(std, law, values.numel())


def _has_deviation(std: Tensor, law: float, count: int) -> bool:
    """Whether a deviation may be that of a law: ``torch.randn`` draws no four entries of size 0.01."""
    allowed = 1 + tolerance(count)
    return bool(law / allowed <= std <= law * allowed)


def _unit(
    values: Tensor, scaled: Tensor, shape: tuple[int, int], generator: torch.Generator | None
) -> Tensor:
    """Draw with mean 0 and standard deviation 1: uniform, normal, or from the values themselves.

    Args:
        values: Present values.
        scaled: The same less the mean and over the deviation of their law, as far as these are known.
        shape: Of the draw.
        generator: Source of random numbers.
    """
    count = values.numel()
    standardized = (values - values.mean()) / values.std(correction=0)
    sample = torch.empty(shape, dtype=values.dtype)
    # Uniform on [-sqrt(3), sqrt(3)] has variance 1, and nothing lies beyond. The mean and the deviation of a
    # sample have errors, which would push its largest entries over that bound.
    if scaled.abs().max() <= math.sqrt(3) * (1 + tolerance(count) / 2):
        return sample.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    # Third and fourth moments of n normal draws: 0 +- sqrt(6/count) and 3 +- sqrt(24/count).
    skew, tails = standardized.pow(3).mean().abs(), (standardized.pow(4).mean() - 3).abs()
    if skew <= SIGMAS * math.sqrt(6 / count) and tails <= SIGMAS * math.sqrt(24 / count):
        return sample.normal_(generator=generator)
    # An unknown law: entries are drawn from the present ones.
    return standardized.flatten()[torch.randint(count, shape, generator=generator)]


def _orthogonal(old: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor | None:
    """Draw an orthogonal matrix where the old one is orthogonal."""
    # Few rows or columns are orthogonal by chance.
    if old.dim() < 2 or not old.dtype == torch.float32 or min(old.shape[0], old[0].numel()) < 3:
        return None
    matrix = old.flatten(1).double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # Orthogonal rows: W W^T = gain^2 I.
    gram = matrix @ matrix.T
    square = gram.diagonal().mean()
    multiple = square * torch.eye(len(gram), dtype=gram.dtype)
    if not torch.allclose(gram, multiple, rtol=0, atol=1e-4 * square.item()):
        return None
    new = torch.empty(tuple(shape))
    torch.nn.init.orthogonal_(new, math.sqrt(square.item()), generator=generator)
    return new
