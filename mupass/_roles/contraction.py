"""Contractions: the label form that every product of an activation with a weight comes down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_uppercase

from torch import Tensor

ONE = "1"  # label of an axis of length 1 that the weight's is broadcast against


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
        x: Labels of the activation, `ONE` among them.
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
        placed = set(self.w) <= set(self.x) | set(self.y) and set(self.x) - {ONE} <= set(self.w) | set(self.y)
        return bool(distinct and placed and self.in_axes and self.out_axes)

    def input_rows(self, x: Tensor) -> Tensor:
        """Lay the activation out as ``[groups, samples, positions, fan_in]``, in the parameter's order.

        Args:
            x: The activation; samples are the first axis that is neither a group nor summed.
        """
        return self._rows(x, self.x, self.in_axes)

    def output_rows(self, g: Tensor) -> Tensor:
        """Lay the output's gradient out as ``[groups, samples, positions, *fan_out axes]``.

        Args:
            g: Gradient of the output.
        """
        rows = self._rows(g, self.y, self.out_axes)
        return rows.reshape(*rows.shape[:-1], *[self.sizes[i] for i in self.out_axes])

    def _rows(self, t: Tensor, labels: str, axes: Sequence[int]) -> Tensor:
        groups = [self.w[i] for i in self.group_axes]
        own = [self.w[i] for i in axes]
        rows = [n for n in labels if n not in groups and n not in own]
        t = t.permute([labels.index(n) for n in (*groups, *rows, *own)])
        first = t.shape[len(groups)] if rows else 1
        # Lists, not generators: Dynamo cannot take those through an autograd function.
        count, size = prod([self.sizes[i] for i in self.group_axes]), prod([self.sizes[i] for i in axes])
        return t.reshape(count, first, -1, size)


def linear(rank: int, view: Sequence[int], sizes: Sequence[int]) -> Contraction:
    """Return the form of ``F.linear``.

    Args:
        rank: Rank of the input.
        view: For each axis of the weight as the operator sees it, the parameter's axis.
        sizes: Sizes of the parameter's axes.
    """
    rows = ascii_uppercase[: rank - 1]
    weight, y = ("oi", rows + "o") if len(view) == 2 else ("i", rows)
    return Contraction(rows + "i", _in_order(weight, view), y, tuple(sizes))


def matmul(
    shape: Sequence[int], view: Sequence[int], sizes: Sequence[int], weight_at: int, summed: bool = False
) -> Contraction:
    """Return the form of ``matmul`` (and mm, bmm, addmm, baddbmm, addbmm), batch axes aligned at the right.

    Args:
        shape: Shape of the activation.
        view: As in `linear`.
        sizes: As in `linear`.
        weight_at: 1 where the weight is the right operand, 0 where it is the left one.
        summed: Whether batch axes are summed, as in addbmm.
    """
    left, right = (len(shape), len(view)) if weight_at else (len(view), len(shape))
    batch = ascii_uppercase[: max(left, right, 2) - 2]
    a = batch[len(batch) - max(left - 2, 0) :] + ("ik" if left > 1 else "k")
    b = batch[len(batch) - max(right - 2, 0) :] + ("kj" if right > 1 else "k")
    y = ("" if summed else batch) + ("i" if left > 1 else "") + ("j" if right > 1 else "")
    return _seen(a, b, y, view, sizes, shape) if weight_at else _seen(b, a, y, view, sizes, shape)


def einsum(
    equation: str, shape: Sequence[int], view: Sequence[int], sizes: Sequence[int], weight_at: int
) -> Contraction | None:
    """Return the form of an einsum of two operands, or None where it is none.

    Args:
        equation: Its equation.
        shape: Shape of the activation.
        view: As in `linear`.
        sizes: As in `linear`.
        weight_at: Which operand is the weight, 0 or 1.
    """
    left, _, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "->" not in equation or "." in terms[weight_at]:
        return None
    free = [n for n in ascii_uppercase if n not in equation]
    hidden = "".join(free[: len(shape) - len(terms[1 - weight_at].replace("...", ""))])
    x, y = (t.replace("...", hidden) for t in (terms[1 - weight_at], output))
    return _seen(x, terms[weight_at], y, view, sizes, shape)


def _seen(
    x: str, w: str, y: str, view: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> Contraction:
    """Find the axes along which the weight alone has entries: no more shared than if x did not have them."""
    w = _in_order(w, view)
    wide = {n for n, size in zip(w, sizes, strict=True) if size > 1}
    x = "".join(ONE if size == 1 and n in wide else n for n, size in zip(x, shape, strict=True))
    return Contraction(x, w, y, tuple(sizes))


def _in_order(w: str, view: Sequence[int]) -> str:
    """Put the weight's labels in the order of the parameter's axes."""
    return "".join(w[list(view).index(i)] for i in range(len(view)))
