"""Contractions: the label form that every product of an activation with a weight comes down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_uppercase

from torch import Tensor

from mupass._records import Axes, Shape

ONE = "1"  # label of an axis of length 1 that the weight's is broadcast against


def reordered(view: Sequence[int], kind: str, args: Sequence[int] = ()) -> Axes:
    """Return the order of axes after a transpose.

    Args:
        view: The order before.
        kind: ``last`` swaps the last two axes, ``swap`` those in `args`, ``permute`` takes them in order.
        args: Axes, counted from the end where negative.
    """
    # w.permute(2, 0, 1)
    if kind == "permute":
        return tuple(view[axis] for axis in args)
    order = list(view)
    first, second = -2, -1
    # w.transpose(0, 1), or w.mT with the last two axes
    if kind == "swap":
        first, second = args
    order[first], order[second] = order[second], order[first]
    return tuple(order)


@dataclass(frozen=True)
class Contraction:
    """A sum of products, ``output = sum activation weight``, with one label an axis, as in einsum.

    Attributes:
        activation: Labels of the activation, `ONE` among them.
        weight: Labels of the weight, in the order of the *parameter's* axes (transposes undone).
        output: Labels of the output.
        sizes: Sizes of the parameter's axes.
    """

    activation: str
    weight: str
    output: str
    sizes: Shape

    @property
    def group_axes(self) -> Axes:
        """Axes of the parameter that count separate weights: in the input, the weight and the output."""
        shared = self._axes(of_activation=True, of_output=True)
        return tuple(axis for axis in shared if self.sizes[axis] > 1)

    @property
    def in_axes(self) -> Axes:
        """Axes of the parameter that are summed over."""
        return self._axes(of_activation=True, of_output=False)

    @property
    def out_axes(self) -> Axes:
        """Axes of the parameter that only the output shares."""
        return self._axes(of_activation=False, of_output=True)

    def _axes(self, of_activation: bool, of_output: bool) -> Axes:
        """Return the axes of the parameter that the activation and the output have, or have not."""
        axes: list[int] = []
        for axis, label in enumerate(self.weight):
            if (label in self.activation) == of_activation and (label in self.output) == of_output:
                axes.append(axis)
        return tuple(axes)

    @property
    def proper(self) -> bool:
        """Whether each row of the input meets the weight once and nothing else is summed."""
        for labels in (self.activation, self.weight, self.output):
            # einsum("bii,oi->bo", x, w) reads a diagonal
            if len(set(labels)) < len(labels):
                return False
        activation, weight, output = set(self.activation), set(self.weight), set(self.output)
        # einsum("bi,oij->bo", x, w) sums the weight over j by itself; einsum("bti,oi->bo", x, w) sums the
        # activation over t first.
        if weight - activation - output or activation - {ONE} - weight - output:
            return False
        return bool(self.in_axes and self.out_axes)

    def input_rows(self, x: Tensor) -> Tensor:
        """Lay the activation out as ``[groups, samples, positions, fan_in]``, in the parameter's order.

        Args:
            x: The activation; samples are the first axis that is neither a group nor summed.
        """
        return self._rows(x, self.activation, self.in_axes)

    def output_rows(self, g: Tensor) -> Tensor:
        """Lay the output's gradient out as ``[groups, samples, positions, *fan_out axes]``.

        Args:
            g: Gradient of the output.
        """
        rows = self._rows(g, self.output, self.out_axes)
        return rows.reshape(*rows.shape[:-1], *[self.sizes[axis] for axis in self.out_axes])

    def _rows(self, tensor: Tensor, labels: str, axes: Sequence[int]) -> Tensor:
        """Lay a tensor out as ``[groups, samples, positions, sizes of these axes of the parameter]``."""
        groups = [self.weight[axis] for axis in self.group_axes]
        summed = [self.weight[axis] for axis in axes]
        row_labels = [label for label in labels if label not in groups and label not in summed]
        tensor = tensor.permute([labels.index(label) for label in (*groups, *row_labels, *summed)])
        # Samples are the first axis of rows; what follows counts positions inside of a sample.
        samples = tensor.shape[len(groups)] if row_labels else 1
        # Lists, not generators: Dynamo cannot take those through an autograd function.
        groups_count = prod([self.sizes[axis] for axis in self.group_axes])
        return tensor.reshape(groups_count, samples, -1, prod([self.sizes[axis] for axis in axes]))


def linear(rank: int, view: Sequence[int], sizes: Sequence[int]) -> Contraction:
    """Return the form of ``F.linear``.

    Args:
        rank: Rank of the input.
        view: For each axis of the weight as the operator sees it, the parameter's axis.
        sizes: Sizes of the parameter's axes.
    """
    # [*rows, i] with [o, i] makes [*rows, o].
    row_labels = ascii_uppercase[: rank - 1]
    weight, output = "oi", row_labels + "o"
    if len(view) == 1:  # F.linear(x, vector)
        weight, output = "i", row_labels
    return Contraction(row_labels + "i", _in_order(weight, view), output, tuple(sizes))


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
    left_rank, right_rank = len(shape), len(view)
    if weight_at == 0:
        left_rank, right_rank = right_rank, left_rank
    batch_labels = ascii_uppercase[: max(left_rank, right_rank, 2) - 2]
    # [*batch, i, k] @ [*batch, k, j]; a vector on either side is [k]
    left_labels = (batch_labels + "ik")[-left_rank:]
    right_labels = "k"
    output = "" if summed else batch_labels
    # A vector on the left leaves no axis i, and one on the right no axis j.
    if left_rank > 1:
        output += "i"
    if right_rank > 1:
        right_labels = (batch_labels + "kj")[-right_rank:]
        output += "j"
    if weight_at == 0:
        left_labels, right_labels = right_labels, left_labels
    return _broadcast(left_labels, right_labels, output, view, sizes, shape)


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
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    # Implicit outputs, more operands, and "..." in the weight have no fixed labels.
    if len(terms) != 2 or not arrow or "." in terms[weight_at]:
        return None
    activation = terms[1 - weight_at]
    # The axes of "..." get letters that the equation does not use.
    free_letters = [letter for letter in ascii_uppercase if letter not in equation]
    count = len(shape) - len(activation.replace("...", ""))
    hidden = "".join(free_letters[:count])
    activation, output = activation.replace("...", hidden), output.replace("...", hidden)
    return _broadcast(activation, terms[weight_at], output, view, sizes, shape)


def _broadcast(
    activation: str, weight: str, output: str, view: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> Contraction:
    """Find the axes along which the weight alone has entries: no more shared than if x did not have them."""
    weight = _in_order(weight, view)
    # x [1, n, k] @ w [m, k, j]: x repeats along m, where only w has entries.
    wide_labels = {label for label, size in zip(weight, sizes, strict=True) if size > 1}
    labels = ""
    for label, size in zip(activation, shape, strict=True):
        labels += ONE if size == 1 and label in wide_labels else label
    return Contraction(labels, weight, output, tuple(sizes))


def _in_order(weight: str, view: Sequence[int]) -> str:
    """Put the weight's labels in the order of the parameter's axes."""
    return "".join([weight[list(view).index(axis)] for axis in range(len(view))])
