"""New values for parameters and buffers: drawn by the law of the old ones, or recomputed by their formula.

A tensor is cut along sums (q, k, v) and opened along products (heads x head_dim). A slice that is constant
along all that grows is a pattern (a padding row, gate biases, decay rates) and is continued; all else must
look like independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mupass._errors import ResizeError
from mupass._resize.sizes import NewSizes
from mupass._resize.structure import recompute
from mupass._scales.init import Init
from mupass._scales.laws import tolerance

SIGMAS = 6  # a wrong alarm about once in 10^9 tensors


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
    for members in sizes.terms(sizes.solved.engine.space.find(dim), "sum") if grows(dim) else ():
        return [s for m in members for s in segments(sizes, m)]
    factors = _factors(sizes, dim)
    old, new = tuple(map(space.size, factors)), tuple(map(sizes.of_dim, factors))
    return [Segment(old, new, tuple(grows(f) or a != b for f, a, b in zip(factors, old, new, strict=True)))]


def _factors(sizes: NewSizes, dim: int) -> list[int]:
    for members in (
        sizes.terms(sizes.solved.engine.space.find(dim), "product")
        if sizes.solved.verdicts.grows(dim)
        else ()
    ):
        return [f for m in members for f in _factors(sizes, m)]
    return [dim]


def pattern(old: Tensor, axes: Sequence[Sequence[Segment]]) -> Tensor | None:
    """Continue a tensor that is not random along anything that grows.

    Args:
        old: Present values.
        axes: Segments of every axis.

    Returns:
        The values at the new shape, or None where some of the old ones look drawn.
    """
    shape = [sum(math.prod(s.new) for s in axis) for axis in axes]
    old = old.detach().cpu()
    if list(old.shape) != shape and (made := recompute(old, shape)) is not None:
        return made
    new = torch.empty(shape, dtype=old.dtype)
    for block in _blocks(axes):
        rows = block.rows(old)
        if not (rows == rows[:, :1]).all():
            return None
        block.put(new, rows[:, :1].repeat(1, block.count))
    return new


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
    new = torch.empty([sum(math.prod(s.new) for s in axis) for axis in axes], dtype=old.dtype)
    for block in _blocks(axes):
        here = new[block.here]
        orthogonal = _orthogonal(old[block.there], here.shape, generator) if init is not None else None
        if orthogonal is not None:
            here.copy_(orthogonal)
            continue
        values = block.rows(old)
        rows = values[:, :1].repeat(1, block.count)
        free = ~(values == values[:, :1]).all(1)
        if free.any():
            if _patterned(block.opened(old)[free]):
                raise ResizeError(
                    f"{name} grows with width and holds a pattern that is neither drawn at random nor a "
                    "known formula; its values at another width cannot be told"
                )
            rows[free] = _drawn(name, values[free], block.count, init, generator)
        block.put(new, rows)
    return new


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
        grows = [g for p in self.parts for g in p.grows]
        return grows if any(grows) else [True] * len(grows)

    @property
    def _order(self) -> list[int]:
        return sorted(range(len(self._grows)), key=lambda i: self._grows[i])

    @property
    def _new(self) -> list[int]:
        return [n for p in self.parts for n in p.new]

    @property
    def count(self) -> int:
        """Length of a new row."""
        return math.prod(n for n, g in zip(self._new, self._grows, strict=True) if g)

    def opened(self, old: Tensor) -> Tensor:
        """Return the old block as (row, growing factors...)."""
        split = old[self.there].reshape([n for p in self.parts for n in p.old]).permute(self._order)
        return (
            split.flatten(0, len(self._order) - sum(self._grows) - 1) if not all(self._grows) else split[None]
        )

    def rows(self, old: Tensor) -> Tensor:
        """Return the old block as (row, entry)."""
        return self.opened(old).flatten(1)

    def put(self, new: Tensor, rows: Tensor) -> None:
        """Write new rows into their place."""
        split = rows.reshape([self._new[i] for i in self._order])
        back = split.permute([self._order.index(i) for i in range(len(self._order))])
        new[self.here] = back.reshape(new[self.here].shape)


def _blocks(axes: Sequence[Sequence[Segment]]) -> Iterator[_Block]:
    for block in product(*(_spans(axis) for axis in axes)):
        yield _Block(tuple(b[0] for b in block), tuple(b[1] for b in block), tuple(b[2] for b in block))


def _spans(axis: Sequence[Segment]) -> list[tuple[slice, slice, Segment]]:
    """Return where each segment lies now, where it will lie, and itself."""
    spans, at, to = [], 0, 0
    for segment in axis:
        old, new = math.prod(segment.old), math.prod(segment.new)
        spans.append((slice(at, at + old), slice(to, to + new), segment))
        at, to = at + old, to + new
    return spans


def _patterned(free: Tensor) -> bool:
    """Whether neighbours along a growing axis are alike: independent draws are not."""
    x = torch.view_as_real(free).movedim(-1, 0).flatten(0, 1) if free.is_complex() else free
    x = x.double()
    for axis in range(1, x.dim()):
        length = x.shape[axis]
        if length < 2:
            continue
        steps = x.diff(dim=axis)
        if (
            length >= 8
            and len(x) * length == x.numel()
            and ((steps > 0).all(axis) | (steps < 0).all(axis)).any()
        ):
            return True
        centred = x - x.mean(tuple(range(1, x.dim())), keepdim=True)
        total = centred.square().mean()
        pairs = steps.numel()
        likeness = (centred.narrow(axis, 0, length - 1) * centred.narrow(axis, 1, length - 1)).mean() / total
        limit = SIGMAS / math.sqrt(pairs) + 1 / length
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
    work = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    mean, std = work.mean(), work.std(correction=0)
    if mean.abs() <= SIGMAS * std / math.sqrt(work.numel()):
        mean = torch.zeros_like(mean)
    factor = 1.0
    if init is not None:
        factor, law = init.factor, init.std
        if law is not None and abs(std.item() * factor / law - 1) <= tolerance(work.numel()):
            std = std.new_tensor(law / factor)
    elif mean != 0 or abs(std - 1) > tolerance(work.numel()):
        raise ResizeError(f"buffer {name} grows with width and holds random values of an unknown law")
    shape = (len(work), count)
    unit = _unit(work, shape, generator)
    return ((mean + std * unit) * factor).to(values.dtype)


def _unit(values: Tensor, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """Draw with mean 0 and standard deviation 1: uniform, normal, or from the values themselves."""
    n = values.numel()
    x = (values - values.mean()) / values.std(correction=0)
    new = torch.empty(shape, dtype=values.dtype)
    if x.abs().max() <= math.sqrt(3) * (1 + tolerance(n) / 2):
        return new.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    skew, tails = x.pow(3).mean().abs(), (x.pow(4).mean() - 3).abs()
    if skew <= SIGMAS * math.sqrt(6 / n) and tails <= SIGMAS * math.sqrt(24 / n):
        return new.normal_(generator=generator)
    return x.flatten()[torch.randint(n, shape, generator=generator)]


def _orthogonal(old: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor | None:
    """Draw an orthogonal matrix where the old one is orthogonal."""
    if old.dim() < 2 or not old.dtype == torch.float32 or min(old.shape[0], old[0].numel()) < 3:
        return None
    matrix = old.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = matrix @ matrix.T
    square = gram.diagonal().mean()
    if not torch.allclose(
        gram, square * torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-4 * square.item()
    ):
        return None
    new = torch.empty(tuple(shape))
    torch.nn.init.orthogonal_(new, math.sqrt(square.item()), generator=generator)
    return new
