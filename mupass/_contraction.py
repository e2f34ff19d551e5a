"""Contractions: the label form that every product of an activation with a weight comes down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_uppercase

from torch import Tensor


def reordered(view: Sequence[int], kind: str, args: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the order of axes after a transpose.

    Args:
        view: The order before.
        kind: ``last`` swaps the last two axes, ``swap`` those in `args`, ``permute`` takes them in order.
        args: Axes, counted from the end where negative.
    """
    if kind == "permute":
        return tuple(view[int(i) % len(view)] for i in args)
    order = list(view)
    a, b = (-2, -1) if kind == "last" else (int(args[0]), int(args[1]))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


@dataclass(frozen=True)
class Contraction:
    """``y = sum x w``, one label an axis, as in einsum.

    Attributes:
        x: Labels of the activation.
        w: Labels of the weight, in the order of the *parameter's* axes (transposes undone).
        y: Labels of the output.
        sizes: Sizes of the parameter's axes.
    """

    x: str
    w: str
    y: str
    sizes: tuple[int, ...]

    @property
    def group_axes(self) -> tuple[int, ...]:
        """Axes of the parameter that count separate weights: in the input, the weight and the output."""
        both = set(self.x) & set(self.y)
        return tuple(i for i, n in enumerate(self.w) if n in both and self.sizes[i] > 1)

    @property
    def in_axes(self) -> tuple[int, ...]:
        """Axes of the parameter that are summed over."""
        return tuple(i for i, n in enumerate(self.w) if n in self.x and n not in self.y)

    @property
    def out_axes(self) -> tuple[int, ...]:
        """Axes of the parameter that only the output shares."""
        return tuple(i for i, n in enumerate(self.w) if n in self.y and n not in self.x)

    @property
    def proper(self) -> bool:
        """Whether each row of the input meets the weight once and nothing else is summed."""
        labels = (self.x, self.w, self.y)
        distinct = all(len(set(names)) == len(names) for names in labels)
        placed = set(self.w) <= set(self.x) | set(self.y) and set(self.x) <= set(self.w) | set(self.y)
        return bool(distinct and placed and self.in_axes and self.out_axes)

    def input_rows(self, x: Tensor, reduce: bool = False) -> Tensor:
        """Lay the activation out as ``[groups, rows, fan_in]``, axes in the order of the parameter's.

        Args:
            x: The activation.
            reduce: Average over all rows but the first (batch) axis of them.
        """
        return self._rows(x, self.x, self.in_axes, "mean" if reduce else "")

    def output_rows(self, g: Tensor, reduce: bool = False) -> Tensor:
        """Lay the output's gradient out as ``[groups, rows, *fan_out axes]``.

        Args:
            g: Gradient of the output.
            reduce: Sum over all rows but the first (batch) axis of them.
        """
        rows = self._rows(g, self.y, self.out_axes, "sum" if reduce else "")
        return rows.reshape(*rows.shape[:-1], *[self.sizes[i] for i in self.out_axes])

    def _rows(self, t: Tensor, labels: str, axes: Sequence[int], reduce: str) -> Tensor:
        groups = [self.w[i] for i in self.group_axes]
        own = [self.w[i] for i in axes]
        rows = [n for n in labels if n not in groups and n not in own]
        t = t.permute([labels.index(n) for n in (*groups, *rows, *own)])
        for at, axis in enumerate(self.group_axes):  # an activation that all groups share is broadcast
            if t.shape[at] == 1:
                t = t.expand([self.sizes[axis] if i == at else -1 for i in range(t.dim())])
        first = t.shape[len(groups)] if rows else 1
        # Lists, not generators: Dynamo cannot take those through an autograd function.
        count, size = prod([self.sizes[i] for i in self.group_axes]), prod([self.sizes[i] for i in axes])
        t = t.reshape(count, first, -1, size)
        if reduce:
            return t.mean(2) if reduce == "mean" else t.sum(2)
        return t.flatten(1, 2)


def linear(rank: int, view: Sequence[int], sizes: Sequence[int]) -> Contraction:
    """Return the form of ``F.linear``.

    Args:
        rank: Rank of the input.
        view: For each axis of the weight as the operator sees it, the parameter's axis.
        sizes: Sizes of the parameter's axes.
    """
    rows = ascii_uppercase[: rank - 1]
    return _seen(
        rows + "i", "oi" if len(view) == 2 else "i", rows + ("o" if len(view) == 2 else ""), view, sizes
    )


def matmul(rank: int, view: Sequence[int], sizes: Sequence[int], weight_at: int) -> Contraction:
    """Return the form of ``matmul`` (and mm, bmm, addmm, baddbmm), batch axes aligned at the right.

    Args:
        rank: Rank of the activation.
        view: As in `linear`.
        sizes: As in `linear`.
        weight_at: 1 where the weight is the right operand, 0 where it is the left one.
    """
    left, right = (rank, len(view)) if weight_at else (len(view), rank)
    batch = ascii_uppercase[: max(left, right, 2) - 2]
    a = batch[len(batch) - max(left - 2, 0) :] + ("ik" if left > 1 else "k")
    b = batch[len(batch) - max(right - 2, 0) :] + ("kj" if right > 1 else "k")
    y = batch + ("i" if left > 1 else "") + ("j" if right > 1 else "")
    return _seen(a, b, y, view, sizes) if weight_at else _seen(b, a, y, view, sizes)


def einsum(
    equation: str, rank: int, view: Sequence[int], sizes: Sequence[int], weight_at: int
) -> Contraction | None:
    """Return the form of an einsum of two operands, or None where it is none.

    Args:
        equation: Its equation.
        rank: Rank of the activation.
        view: As in `linear`.
        sizes: As in `linear`.
        weight_at: Which operand is the weight, 0 or 1.
    """
    left, _, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "->" not in equation or "." in terms[weight_at]:
        return None
    free = [n for n in ascii_uppercase if n not in equation]
    hidden = "".join(free[: rank - len(terms[1 - weight_at].replace("...", ""))])
    x, y = (t.replace("...", hidden) for t in (terms[1 - weight_at], output))
    return _seen(x, terms[weight_at], y, view, sizes)


def _seen(x: str, w: str, y: str, view: Sequence[int], sizes: Sequence[int]) -> Contraction:
    """Put the weight's labels in the order of the parameter's axes."""
    return Contraction(x, "".join(w[list(view).index(i)] for i in range(len(view))), y, tuple(sizes))
