"""Forms: how an operator that uses a weight lays out its input and its output's gradient as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupass._roles.standardized import standardized
from mupass._taps.correlation import patch_gram

Args = tuple[Any, ...]  # of a torch function: those that are given by place
Kwargs = Mapping[str, Any]  # those that are given by name
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Arguments of a convolution with a number for each position axis, and what they are where they are not given.
SPREAD = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
# Where a correlation is faster than patches: with fewer channels, or more taps, its products are small.
CHANNELS, TAPS = 16, 27


class Form(Protocol):
    """Rows of one operator, with the positions of a sample on an axis of their own."""

    def input_rows(self, x: Tensor) -> Tensor:
        """Return ``[groups, samples, positions, fan_in]``."""

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[groups, samples, positions, *fan_out axes]``."""


@dataclass(frozen=True)
class Convolution:
    """A convolution module, transposed or not.

    Attributes:
        groups: Number of separate convolutions.
        outputs: Channels of one of them.
        kernel: Kernel sizes.
        stride: Strides.
        padding: Entries before and after each position axis, last axis first, as `F.pad` takes them.
        dilation: Dilations.
        padding_mode: As `torch.nn.functional.pad` names it.
        transposed: Whether stride spreads the input instead of skipping outputs.
    """

    groups: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    transposed: bool

    @staticmethod
    def called(weight: Tensor, arguments: Kwargs, transposed: bool) -> Convolution:
        """Describe a call of ``F.conv2d`` and the like.

        Args:
            weight: The kernel, ``[channels out, channels in, *positions]``; transposed, the other way round.
            arguments: Others that the function was given, by name.
            transposed: Whether it is one of ``F.conv_transpose2d`` and the like.
        """
        outputs = weight.shape[1] if transposed else weight.shape[0] // arguments.get("groups", 1)
        return _described(tuple(weight.shape[2:]), outputs, arguments, transposed)

    @staticmethod
    def of(module: Any) -> Convolution:
        """Describe a convolution module.

        Args:
            module: One of `CONVOLUTIONS` or `TRANSPOSED`.
        """
        # The module's weight is not asked for its shape: a parametrization would compute it.
        arguments = {name: getattr(module, name) for name in (*SPREAD, "groups")}
        outputs = module.out_channels // module.groups
        form = _described(tuple(module.kernel_size), outputs, arguments, isinstance(module, TRANSPOSED))
        padding_mode = str(module.padding_mode)
        if padding_mode == "zeros":
            padding_mode = "constant"  # as F.pad calls it
        return replace(form, padding_mode=padding_mode)

    def input_rows(self, x: Tensor) -> Tensor:
        """Unfold patches: ``[groups, batch, positions, channels of a group x kernel]``.

        Args:
            x: ``[batch, channels, *positions]``, batch left out or not.
        """
        rank = len(self.kernel)
        patches = self._batched(x)
        strides = self.stride
        # A transposed convolution is a plain one, of stride 1, of its spread input.
        if self.transposed:
            patches, strides = self._spread(patches), (1,) * rank
        if any(self.padding):
            patches = F.pad(patches, self.padding, self.padding_mode)
        for axis, (size, stride, gap) in enumerate(zip(self.kernel, strides, self.dilation, strict=True)):
            patches = patches.unfold(2 + axis, (size - 1) * gap + 1, stride)[..., ::gap]
        if self.transposed:  # it meets its kernel back to front
            patches = patches.flip(list(range(2 + rank, 2 + 2 * rank)))
        patches = patches.unflatten(1, (self.groups, -1))  # type: ignore[no-untyped-call]
        # Copied with positions innermost, in long runs of memory (three times faster), and seen as rows.
        order = [1, 2, *range(3 + rank, 3 + 2 * rank), 0, *range(3, 3 + rank)]
        rows = patches.permute(order).flatten(1, 1 + rank).flatten(3)  # [groups, fan_in, batch, positions]
        return rows.permute(0, 2, 3, 1)

    def overlaps(self, inputs: int) -> bool:
        """Return whether `patch_gram` serves: at stride 1, patches share most of their products.

        Args:
            inputs: Size of the input factor.
        """
        taps = prod(self.kernel)
        plain = not self.transposed and set(self.stride) == {1}
        return plain and 1 < taps <= TAPS and inputs >= CHANNELS * taps

    def patch_gram(self, x: Tensor) -> Tensor:
        """Return ``sum x x^T`` over the rows of `input_rows`, which are not formed.

        Args:
            x: ``[batch, channels, *positions]``, batch left out or not; in the precision of the factor.
        """
        inputs, padding = self._batched(x), self.padding
        # The operator pads with zeros itself; other paddings put entries of the input there.
        if any(padding) and self.padding_mode != "constant":
            inputs, padding = F.pad(inputs, padding, self.padding_mode), (0,) * len(padding)
        inputs = inputs.unflatten(1, (self.groups, -1)).movedim(0, 2)  # type: ignore[no-untyped-call]
        return patch_gram(inputs, list(self.kernel), list(self.dilation), list(padding))

    def _batched(self, tensor: Tensor) -> Tensor:
        """Give a sample without a batch axis one."""
        return tensor.unsqueeze(0) if tensor.dim() == len(self.kernel) + 1 else tensor

    def _spread(self, x: Tensor) -> Tensor:
        """Put ``stride - 1`` zeros between positions."""
        sizes = []
        places: list[Any] = [...]
        for size, stride in zip(x.shape[2:], self.stride, strict=True):
            sizes.append((size - 1) * stride + 1)
            places.append(slice(None, None, stride))
        spread = x.new_zeros(*x.shape[:2], *sizes)
        spread[tuple(places)] = x
        return spread

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[groups, batch, positions, channels of a group]``.

        Args:
            g: Gradient of the output.
        """
        gradients = self._batched(g).unflatten(1, (self.groups, -1))  # type: ignore[no-untyped-call]
        rows = gradients.flatten(3).permute(1, 2, 0, 3)  # [groups, channels, batch, positions]
        return rows.contiguous().permute(0, 2, 3, 1)  # copied in long runs of memory, as above


def _described(kernel: tuple[int, ...], outputs: int, arguments: Kwargs, transposed: bool) -> Convolution:
    """Return the form of a convolution that pads with zeros.

    Args:
        kernel: Kernel sizes.
        outputs: Channels of one of its groups.
        arguments: Groups, stride, padding and so on, those that are given; one number stands for all axes.
        transposed: Whether it is transposed.
    """
    sizes = {}
    for name, default in SPREAD.items():
        value = arguments.get(name, default)
        if isinstance(value, int):
            value = (value,) * len(kernel)
        elif not isinstance(value, str):  # "same" and "valid" stay
            value = tuple(value) * (len(kernel) // len(value))
        sizes[name] = value
    padding = _pads(kernel, sizes["padding"], sizes["dilation"])
    if transposed:
        padding = _transposed_pads(kernel, sizes["padding"], sizes["dilation"], sizes["output_padding"])
    return Convolution(
        groups=arguments.get("groups", 1),
        outputs=outputs,
        kernel=kernel,
        stride=sizes["stride"],
        padding=padding,
        dilation=sizes["dilation"],
        padding_mode="constant",
        transposed=transposed,
    )


def _pads(kernel: Sequence[int], given: Any, dilation: Sequence[int]) -> tuple[int, ...]:
    """Return the entries before and after each position axis, last axis first."""
    padding: list[int] = []
    for axis in reversed(range(len(kernel))):
        if given == "same":  # the extra element goes behind, as in torch
            total = dilation[axis] * (kernel[axis] - 1)
            padding += [total // 2, total - total // 2]
        elif given == "valid":
            padding += [0, 0]
        else:
            padding += [int(given[axis])] * 2
    return tuple(padding)


def _transposed_pads(
    kernel: Sequence[int], given: Sequence[int], dilation: Sequence[int], behind: Sequence[int]
) -> tuple[int, ...]:
    """Return what surrounds the spread input so that a plain convolution gives the output's positions."""
    padding: list[int] = []
    for axis in reversed(range(len(kernel))):
        reach = dilation[axis] * (kernel[axis] - 1) - given[axis]
        padding += [reach, reach + behind[axis]]
    return tuple(padding)


@dataclass(frozen=True, eq=False)
class Standardized:
    """A convolution whose kernel is ``W = diag(lengths) U``: U has rows of mean 0 and length 1.

    U is what the factors are of. Rows of mean 0 see inputs less their mean, and a gradient times the length
    of its row.

    Attributes:
        convolution: As with a plain kernel.
        lengths: That of every row of the kernel, negative where its gain is.
    """

    convolution: Convolution
    lengths: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what a backward pass needs of the forward one."""
        return (self.lengths,)

    def with_tensors(self, lengths: Tensor) -> Standardized:
        """Return the same with tensors that a backward pass has got.

        Args:
            lengths: As in the forward pass.
        """
        return Standardized(self.convolution, lengths)

    @staticmethod
    def called(kernel: Tensor, parameter: Tensor, arguments: Kwargs) -> Standardized:
        """Describe a call of ``F.conv2d`` and the like.

        Args:
            kernel: The standardized kernel, ``[channels out, channels in, *positions]``.
            parameter: What it is made of, in the same shape.
            arguments: Others that the function was given, by name.
        """
        with torch.no_grad():
            directions, _ = standardized(parameter.detach().flatten(1))
            lengths = (kernel.detach().flatten(1).to(directions) * directions).sum(1)
        return Standardized(Convolution.called(kernel, arguments, False), lengths)

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the patches, each less its mean.

        Args:
            x: ``[batch, channels, *positions]``, batch left out or not.
        """
        rows = self.convolution.input_rows(x)
        return rows - rows.mean(-1, keepdim=True)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[groups, batch, positions, channels of a group]``, times the lengths.

        Args:
            g: Gradient of the output.
        """
        return self.convolution.output_rows(g) * self.lengths.view(self.convolution.groups, 1, 1, -1)


@dataclass(frozen=True)
class Lookup:
    """A table read by index; its input factor is the diagonal of counts.

    Attributes:
        padding: Row that no gradient reaches, -1 where there is none: what reads it counts for nothing.
    """

    padding: int = -1

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the indices themselves: one-hot rows are never formed."""
        return x

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, samples, positions, features]``.

        Args:
            g: Gradient of the looked-up vectors.
        """
        return _rows(g)


@dataclass(frozen=True, eq=False)
class Bag:
    """Rows of a table read by index and added up bag by bag, each of them times a number.

    Every reading of a row counts, as in a look-up with the sum behind it.

    Attributes:
        bags: Number of the bag of every reading.
        weights: What the row is multiplied by in every reading.
    """

    bags: Tensor
    weights: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what a backward pass needs of the forward one."""
        return self.bags, self.weights

    def with_tensors(self, bags: Tensor, weights: Tensor) -> Bag:
        """Return the same with tensors that a backward pass has got.

        Args:
            bags: As in the forward pass.
            weights: As in the forward pass.
        """
        return Bag(bags, weights)

    @staticmethod
    def called(arguments: Kwargs, bags: int) -> Bag:
        """Describe a call of ``F.embedding_bag``.

        Args:
            arguments: What the function was given, by name.
            bags: Number of bags that it returned.
        """
        indices, table = arguments["input"], arguments["weight"]
        offsets, given = arguments.get("offsets"), arguments.get("per_sample_weights")
        reading = torch.arange(indices.numel(), device=indices.device)
        if offsets is None:  # [bags, readings of each]
            numbers = reading // indices.shape[-1]
        else:
            numbers = torch.searchsorted(offsets, reading.to(offsets.dtype), right=True) - 1
        weights = torch.ones(indices.numel(), dtype=table.dtype, device=table.device)
        if given is not None:
            weights = given.detach().reshape(-1)
        # What stands for "no word" is no part of its bag.
        padding = arguments.get("padding_idx")
        if padding is not None:
            weights = weights * (indices.reshape(-1) != padding % table.shape[0])
        if arguments.get("mode", "mean") == "mean":
            counts = weights.new_zeros(bags).scatter_add(0, numbers, weights)
            weights = weights / counts.clamp(min=1)[numbers]
        return Bag(numbers, weights)

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the indices themselves: one-hot rows are never formed."""
        return x

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, readings, 1, features]``.

        Args:
            g: Gradient of the bags.
        """
        return _rows(g[self.bags] * self.weights[:, None])


@dataclass(frozen=True)
class Elementwise:
    """A gain or a shift along one axis.

    Attributes:
        axis: The first feature axis of the output, counted from the last one (-1) where negative.
        count: Number of feature axes; 0 for one number that acts on all of them.
    """

    axis: int
    count: int = 1

    def input_rows(self, x: Tensor) -> Tensor:
        """Return what a gain multiplies, as `output_rows` lays it out."""
        return self.output_rows(x)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, samples, positions, features]``.

        Args:
            g: Gradient of the output.
        """
        if not self.count:
            return _rows(g[..., None])
        axis = self.axis % g.dim()
        features, rows = list(range(axis, axis + self.count)), g
        if axis + self.count < g.dim():
            # Copied in long runs of memory, features first, and seen as rows.
            front, back = list(range(self.count)), list(range(-self.count, 0))
            rows = g.movedim(features, front).contiguous().movedim(front, back)
        return _rows(rows.flatten(-self.count))


@dataclass(frozen=True)
class Features:
    """A weight that acts on the last axis: rows are all others."""

    def input_rows(self, x: Tensor) -> Tensor:
        """Return ``[1, samples, positions, features]``.

        Args:
            x: ``[batch, ..., features]``, or one vector.
        """
        return _rows(x)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, samples, positions, features]``.

        Args:
            g: Gradient of the output.
        """
        return _rows(g)


def _rows(tensor: Tensor) -> Tensor:
    """Lay ``[samples, ..., features]`` out; one vector is one sample with one position."""
    if tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() == 2:
        return tensor[None, :, None]
    return tensor.flatten(1, -2)[None]


@dataclass(frozen=True)
class Scaled:
    """A product that its operator multiplies by a number (``alpha`` of addmm).

    Attributes:
        form: Of the product.
        factor: The number.
    """

    form: Form
    factor: float

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the rows of the input, as they are."""
        return self.form.input_rows(x)

    def output_rows(self, g: Tensor) -> Tensor:
        """Return the gradients of the product's rows.

        Args:
            g: Gradient of the output.
        """
        return self.form.output_rows(g) * self.factor


@dataclass(frozen=True, eq=False)
class Sorted:
    """A product of rows that stand group by group, with a matrix for each group: ``F.grouped_mm``.

    Attributes:
        ends: Where the rows of each group end, ``[groups]``; rows behind the last end belong to none.
    """

    ends: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what a backward pass needs of the forward one."""
        return (self.ends,)

    def with_tensors(self, ends: Tensor) -> Sorted:
        """Return the same with tensors that a backward pass has got.

        Args:
            ends: As in the forward pass.
        """
        return Sorted(ends)

    def counts(self) -> Tensor:
        """Return the number of rows of each group, ``[groups]``."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def input_rows(self, x: Tensor) -> Tensor:
        """Return ``[groups, rows, 1, features]``, with zeros behind the rows of each group.

        Args:
            x: ``[rows, features]``.
        """
        counts = self.counts()
        # How many rows the largest group has is a number of this run.
        most = len(x) if torch.compiler.is_compiling() else int(counts.max())
        place = torch.arange(most, device=x.device)
        own = place < counts[:, None]
        at = torch.where(own, (self.ends - counts)[:, None] + place, 0)
        return torch.where(own[..., None], x[at], 0.0)[:, :, None]

    def output_rows(self, g: Tensor) -> Tensor:
        """Return the same of the output's gradient.

        Args:
            g: Gradient of the output.
        """
        return self.input_rows(g)


@dataclass(frozen=True)
class Table:
    """A table of which entries, copied to where activations are, are joined with them there.

    It is multiplied with one-hot rows, as in a look-up: what reads a row is the number of that row.

    Attributes:
        features: Axes of the copies along which the features stand, counted from the last one (-1).
        factor: What the entries were multiplied by on their way.
    """

    features: tuple[int, ...]
    factor: float = 1.0

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the numbers of the rows that were read; one-hot rows are never formed.

        Args:
            x: The number of its row for every entry of the copies.
        """
        for axis in self.features:
            x = x.narrow(axis, 0, 1)
        return x

    def output_rows(self, g: Tensor) -> Tensor:
        """Return ``[1, samples, positions, features]``.

        Args:
            g: Gradient of the copies.
        """
        last = list(range(-len(self.features), 0))
        rows = g.movedim(self.features, last).flatten(g.dim() - len(last)) if last else g[..., None]
        return _rows(rows * self.factor)


# Forms that hold tensors of the forward pass. An autograd function saves these like any other tensor: what
# reaches a compiled backward pass in another way is mistaken for a size there (torch 2.8, moving sizes).
HOLDING = (Bag, Sorted, Standardized)


def held(form: Form) -> tuple[Tensor, ...]:
    """Return the tensors of a form, to be saved for the backward pass; of most forms there are none."""
    return form.tensors() if isinstance(form, HOLDING) else ()


def with_held(form: Form, tensors: Sequence[Tensor]) -> Form:
    """Return a form as the backward pass uses it.

    Args:
        form: That of the forward pass.
        tensors: Its `held` tensors, as they were saved.
    """
    return form.with_tensors(*tensors) if isinstance(form, HOLDING) else form
