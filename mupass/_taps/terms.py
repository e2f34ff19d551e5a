"""How many terms a mean loss averages over, and its gradient by the model's output: as gradient of a leaf."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_unflatten

from mupass._parallel import is_sharded, whole
from mupass._taps.leaves import is_batched, is_trained, under_transform
from mupass._taps.loss_form import (
    first_numbers,
    first_rows,
    is_over_classes,
    may_be_squared,
    multiple_of_a_mean,
)
from mupass._taps.visits import Visits
from mupass._taps.watcher import Watcher

FEW = 0.25  # part by which a number of terms may be off
LOOKED_AT = 3  # passes whose loss is looked at: its form does not change


class Told(NamedTuple):
    """What an eager backward pass tells besides the numbers that the leaf's gradient holds.

    Attributes:
        left_out: Number of terms without a gradient.
        terms: Number of the others.
        multiple: How many times a mean of cross-entropies over these the loss is; 0 for another loss, None
            where the pass was not looked at.
        elsewhere: Whether it is a cross-entropy over another axis than classes are taken to have.
        reach: What the length of a term's gradient is multiplied by to give the root mean square of its
            distance from its target, were the loss a mean squared error: half the root of its number of
            entries. 0 for a loss of another form.
        is_vector: Whether the output has one axis, each entry of which counts as a term.
    """

    left_out: Tensor
    terms: Tensor
    multiple: Tensor | None
    elsewhere: Tensor | None = None
    reach: Tensor | None = None
    is_vector: bool = False


class Kept(NamedTuple):
    """Some terms of an output, whose gradient tells the form of the loss.

    Attributes:
        own: ``[rows, classes]``, or ``[1, entries]`` of an output of one number a term.
        others: Axis -> rows that have their classes there.
        classes: Whether a term has several entries.
    """

    own: Tensor | None
    others: dict[int, Tensor]
    classes: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> Kept:
        """Return some terms of an output, or of its gradient.

        Args:
            tensor: The output, or the gradient.
        """
        # A vector may be the classes of one sample.
        if tensor.dim() == 1:
            whole_rows = first_rows(tensor[None], 1)
            return cls(first_numbers(tensor), {} if whole_rows is None else {0: whole_rows}, classes=False)
        class_axis = _class_axis(tensor.shape)
        classes = tensor.shape[class_axis] > 1
        own = first_rows(tensor, class_axis) if classes else first_numbers(tensor)
        others = {}
        terms = tensor.numel() // max(tensor.shape[class_axis], 1)
        for axis in range(tensor.dim()):
            other_terms = tensor.numel() // max(tensor.shape[axis], 1)
            # A count that is hardly off does not matter.
            if axis != class_axis and abs(other_terms - terms) > FEW * terms:
                rows = first_rows(tensor, axis)
                if rows is not None:
                    others[axis] = rows
        return cls(own, others, classes)


class _Terms(torch.autograd.Function):
    """Identity on the model's outputs; its backward pass tells how many loss terms they feed.

    It tells the sum of squares of the gradient that terms are counted on, too.
    """

    @staticmethod
    def forward(
        ctx: Any, tap: TermsTap | None, looked_at: bool, count: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Pass the outputs on; copies, so that a loss may work in place on them."""
        ctx.tap, ctx.terms = tap, [loss_terms(output.shape) for output in outputs]
        # Copies of a few rows, not outputs: nothing is kept alive by them.
        ctx.kept = [_kept(output) for output in outputs] if looked_at else [None] * len(outputs)
        ctx.save_for_backward(count)
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the outputs' gradients; that of the leaf: terms of the first that has one, and squares."""
        if any(map(is_batched, grads)):
            return None, None, None, *grads
        tap = ctx.tap
        if tap is not None and tap.passes is not None:
            tap.passes.begin()
        (count,) = ctx.saved_tensors
        number, gradient, logits = _first_with_gradient(ctx.terms, grads, ctx.kept)
        if tap is not None and gradient is not None:
            tap.told.note(_told(gradient.detach(), number, logits))
        squares = torch.zeros_like(count[0])
        if gradient is not None:
            squares = _sum_of_squares(gradient, count).detach()
        found = torch.stack([torch.full_like(squares, number), squares])
        if tap is not None and tap.passes is not None and tap.passes.leaves_out(tap, tap.count):
            tap.add(found)
            return None, None, None, *grads
        return None, None, found, *grads


def _first_with_gradient(
    terms: Sequence[int], grads: Sequence[Tensor | None], rows: Sequence[Kept | None]
) -> tuple[int, Tensor | None, Kept | None]:
    """Return the terms, gradient and rows of the first output that has one; 0 and None if none has."""
    # A second output, such as an auxiliary one, averages its terms in a loss of its own.
    # A plain loop: Dynamo of torch 2.8 does not trace next() of a generator with a default.
    for count, grad, some in zip(terms, grads, rows, strict=True):
        if grad is not None:
            return count, grad, some
    return 0, None, None


def _kept(output: Tensor) -> Kept | None:
    """Return some terms of an output whose gradient tells the form of the loss; None where it would not."""
    # A shard of the outputs has the gradients of that shard only.
    return None if is_sharded(output) else Kept.of(output)


def _told(gradient: Tensor, terms: int, kept: Kept | None) -> Told:
    """Return what the gradient by an output tells of the loss.

    Args:
        gradient: The gradient.
        terms: Number of terms of the output.
        kept: Some of its terms, where the form of the loss is asked for.
    """
    left_out = whole(_terms_without_gradient(gradient))
    counted = terms - left_out
    found = Kept.of(gradient) if kept is not None else None
    if kept is None or found is None or kept.own is None or found.own is None:
        return Told(left_out, counted, None)
    multiple = multiple_of_a_mean(kept.own, found.own, counted, kept.classes)
    elsewhere = torch.zeros_like(multiple, dtype=torch.bool)
    for axis, rows in kept.others.items():
        elsewhere = elsewhere | is_over_classes(rows, found.others[axis])
    squared = (multiple == 0) & ~elsewhere
    if kept.classes:
        squared = squared & may_be_squared(kept.own, found.own)
    reach = 0.5 * (gradient.numel() / max(terms, 1)) ** 0.5
    return Told(
        left_out, counted, multiple, elsewhere & (multiple == 0), reach * squared, gradient.dim() == 1
    )


def _sum_of_squares(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the sum of squares of the entries of a gradient.

    Args:
        gradient: By an output.
        like: Of the precision, and on the device, of the sum.
    """
    real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    # In the precision of the sum, in which squares of half precision do not overflow, without a copy of the
    # gradient, which may be that of all words of a vocabulary.
    precision = torch.promote_types(real.dtype, like.dtype)
    norm = whole(torch.linalg.vector_norm(real, dtype=precision))
    return norm.square().to(like)


def _terms_without_gradient(gradient: Tensor) -> Tensor:
    """Return how many terms of a loss leave an output alone: all entries of its gradient are exactly zero.

    Args:
        gradient: Of a model's output.
    """
    if gradient.dim() == 1:
        return (gradient == 0).sum()
    return (~(gradient != 0).any(_class_axis(gradient.shape))).sum()


def _class_axis(shape: tuple[int, ...]) -> int:
    """Return the axis of an output that counts classes.

    Args:
        shape: Of the output, at least two axes.
    """
    # [batch, classes, height, width]: channels of an image stand behind the batch axis.
    return 1 if len(shape) >= 4 else len(shape) - 1


def loss_terms(shape: tuple[int, ...]) -> int:
    """Return how many terms a mean loss on an output of this shape averages over.

    The class axis is left out: axis 1 of image-like outputs ``[batch, classes, height, width(, depth)]``,
    the last one otherwise (``[batch, classes]``, ``[batch, tokens, classes]``). Every entry of a vector is a
    term.

    Args:
        shape: Shape of the model's output, at least one axis.
    """
    if len(shape) == 1:
        return shape[0]
    class_axis = _class_axis(shape)
    terms = 1
    for axis, size in enumerate(shape):
        # All other axes count terms: each position has a loss of its own.
        if axis != class_axis:
            terms *= size
    return terms


class TermsTap:
    """Counts loss terms at the root module (see `terms_hook`); idle until K-FAC opens it.

    The count travels as the gradient of a leaf like the factors do, so that it adds up over micro-batches.
    With it goes the sum of squares of the loss's gradient by that output.

    Attributes:
        count: The leaf, ``[terms, squares]``; None while idle.
        counts: Whether the number of terms is asked for, and not told by the caller.
        passes: Told of forward and backward passes of the model while factors are collected.
        collecting: Whether they are.
        told: What the backward pass that runs has told.
        left_out: Number of terms without a gradient since the count was taken last; None without a pass.
        looked_at: What passes since then have told that were looked at.
        to_look_at: How many more passes are looked at.
        uses: Outputs since it was set to an empty list, see `fill`. While it is a list the leaf is left out.
    """

    uses: list[tuple[Tensor]] | None = None

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self.counts = True
        self.passes: Watcher | None = None
        self.collecting = False
        self.told: Visits[Told] = Visits()
        self.left_out: Tensor | None = None
        self.looked_at: list[Told] = []
        self.to_look_at = LOOKED_AT

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Send the output through the tap, as a forward hook does.

        Of several tensors the first that the loss depends on counts.

        Args:
            module: The root module.
            args: Its positional arguments.
            output: Its output, any nest of tensors.

        Returns:
            The same output; None (leave it be) while idle, or where the first tensor is a scalar, as of
            models that return their loss.
        """
        if under_transform() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return None
        eager = not torch.compiler.is_compiling()
        watcher = self.passes if eager and self.collecting else None
        if watcher is not None:
            watcher.enter()
        if not self._counts_outputs_of(module):
            return None
        return self._with_taps(output, eager, watcher)

    def _with_taps(self, output: Any, eager: bool, watcher: Watcher | None) -> Any:
        """Return an output whose tensors go through the tap; None where it has none to count."""
        fields = _fields(output) if eager else None
        leaves, spec = tree_flatten(output if fields is None else fields)
        if watcher is not None:
            watcher.look_through([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        # In a graph an output that the loss does not depend on has a gradient of zeros, and cannot be told.
        positions = _positions_of_outputs(leaves, only_first=not eager or self.uses is not None)
        if not positions:
            return None
        tapped = self._tapped([leaves[position] for position in positions], eager)
        for position, tensor in zip(positions, tapped, strict=True):
            leaves[position] = tensor
        made = tree_unflatten(leaves, spec)
        return made if fields is None else _with_fields(output, made)

    def _counts_outputs_of(self, module: nn.Module) -> bool:
        """Return whether terms are wanted, and there will be gradients to count them with."""
        if self.count is None or (self.uses is None and not self.count.requires_grad):
            return False
        # A frozen model, as a critic that only scores, has none.
        return is_trained(module.parameters())

    def _tapped(self, outputs: Sequence[Tensor], eager: bool) -> Sequence[Tensor]:
        """Return outputs whose backward pass counts their terms, or which `fill` will count."""
        if self.uses is not None:
            # The caller makes the gradients itself, and has the terms counted by `fill`.
            self.uses.append((outputs[0],))
            return [outputs[0].clone()]
        # Of a compiled graph hooks on the leaves tell that it runs backwards, see `Tap.watch`.
        tap = self if eager else None
        looked_at = eager and self.counts and self.to_look_at > 0
        return _Terms.apply(tap, looked_at, self.count, *outputs)  # type: ignore[no-any-return, no-untyped-call]

    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        """Count the terms of `uses` where a backward pass would, and forget these.

        Args:
            gradients: Those of the outputs; None where the loss does not depend on one.
        """
        uses, self.uses = self.uses or (), None
        terms, squares = 0, []
        for (output,), gradient in zip(uses, gradients, strict=True):
            if gradient is not None and self.count is not None:
                terms += loss_terms(output.shape)
                squares.append(_sum_of_squares(gradient, self.count.detach()))
        if self.count is not None and squares:
            # The caller differentiates by what gradients depend on: squares keep their graph.
            total = torch.stack(squares).sum()
            self.count.grad = torch.stack([torch.full_like(total, terms, requires_grad=False), total])

    def open(self, device: torch.device, dtype: torch.dtype, counts: bool) -> None:
        """Make the leaf.

        Args:
            device: Device of the model.
            dtype: Precision of the leaf.
            counts: Whether the number of terms is asked for.
        """
        self.counts = counts
        self.count = torch.zeros(2, device=device, dtype=dtype, requires_grad=True)
        self.count.register_hook(self._add_up)  # type: ignore[no-untyped-call]
        self.count.requires_grad_(False)

    def add(self, found: Tensor) -> None:
        """Add to the gradient of the leaf where autograd does not.

        Args:
            found: Number of terms, and squares.
        """
        if self.count is not None:
            self._add_up(found)
            self.count.grad = found if self.count.grad is None else self.count.grad + found

    def _add_up(self, gradient: Tensor) -> None:
        """Add up what a pass which counts has told.

        Args:
            gradient: That of the leaf, which is left alone.
        """
        for told in self.told.take():
            self.left_out = told.left_out if self.left_out is None else self.left_out + told.left_out
            if told.multiple is not None:
                self.to_look_at -= 1
                self.looked_at.append(told)

    @property
    def multiple(self) -> Tensor | None:
        """How many times a mean of cross-entropies a step's loss is; 0 for another, None if not looked at.

        The larger one of what a single pass is, and what all passes together are.
        """
        if not self.looked_at or self.counted is None or self.left_out is None:
            return None
        multiples = torch.stack([told.multiple for told in self.looked_at if told.multiple is not None])
        terms = torch.stack([told.terms for told in self.looked_at]).to(multiples)
        # The smallest weight of a term, 0 where a pass had another loss: means that are added up are that
        # many times the mean of all, and micro-batches of unequal sizes are told from them.
        weight = (multiples / terms.clamp(min=1)).amin()
        return torch.maximum(multiples.amax(), weight * (self.counted - self.left_out).to(multiples))

    @property
    def reach(self) -> Tensor | None:
        """The smallest `Told.reach` of a step's passes; None where none was looked at."""
        reaches = [told.reach for told in self.looked_at if told.reach is not None]
        return torch.stack(reaches).amin() if reaches else None

    @property
    def elsewhere(self) -> Tensor | None:
        """How many passes had a cross-entropy over another axis than classes are taken to have; or None."""
        found = [told.elsewhere for told in self.looked_at if told.elsewhere is not None]
        return torch.stack(found).sum() if found and self.counts else None

    @property
    def is_vector(self) -> bool:
        """Whether all passes that were looked at had an output of one axis, whose entries are counted."""
        return self.counts and bool(self.looked_at) and all(told.is_vector for told in self.looked_at)

    @property
    def counted(self) -> Tensor | None:
        """The count since it was taken last; None where there is none, or the caller tells it."""
        if self.count is None or self.count.grad is None or not self.counts:
            return None
        return self.count.grad[0]

    def collect(self, on: bool) -> None:
        """Count in the passes that follow, or stop.

        Args:
            on: Whether to count.
        """
        self.collecting = on
        if self.count is not None:
            self.count.requires_grad_(on)

    def take(self) -> Tensor | None:
        """Take out the leaf's gradient since the last call; None when no loss passed through the output."""
        gradient = None if self.count is None else self.count.grad
        self.clear()
        return gradient

    def clear(self) -> None:
        """Forget the count."""
        self.left_out, self.looked_at = None, []
        if self.count is not None:
            self.count.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get an idle tap."""
        return vars(TermsTap())


def _fields(output: Any) -> dict[str, Any] | None:
    """Return the fields of an instance of a dataclass, of which torch sees no parts; None of all else."""
    # Those that are registered, as outputs of transformers, are taken apart as they say themselves.
    if not is_dataclass(output) or isinstance(output, type) or not tree_is_leaf(output):
        return None
    return {field.name: getattr(output, field.name) for field in fields_of(output)}


def _with_fields(output: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of an instance of a dataclass, which may be frozen, with other values."""
    copied = copy.copy(output)
    for name, value in values.items():
        object.__setattr__(copied, name, value)
    return copied


def _positions_of_outputs(leaves: list[Any], only_first: bool) -> list[int]:
    """Return where the tensors are that a loss may be made of; none where the model returns its loss."""
    tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    # return loss, logits: the loss is made already, and its terms cannot be told.
    if not tensors or leaves[tensors[0]].dim() == 0:
        return []
    # An output without a gradient takes part in no loss.
    positions = [
        position for position in tensors if leaves[position].dim() > 0 and leaves[position].requires_grad
    ]
    if only_first:
        return positions[:1]
    return positions


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _count(tap: TermsTap, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tap(module, args, output)


@torch.compiler.substitute_in_graph(_count, skip_signature_check=True)
def _count_in_graph(tap: TermsTap, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tap(module, args, output)


def terms_hook(tap: TermsTap) -> partial[Any]:
    """Return the forward hook of a tap.

    torch.compile runs the hooks of the module that it is given outside of the graph, and would compile this
    one into a graph of its own; there it runs eagerly. Inside of a larger graph it is traced with the rest.

    Args:
        tap: The tap.
    """
    return partial(_count, tap)


def terms_tap_of(model: nn.Module) -> TermsTap | None:
    """Return the tap that counts loss terms, or None.

    Args:
        model: The module that the plan's names are relative to.
    """
    for hook in model._forward_hooks.values():
        if is_terms_hook(hook):
            return hook.args[0]  # what `terms_hook` was given
    return None


def is_terms_hook(hook: Any) -> TypeGuard[partial[Any]]:
    """Return whether a forward hook counts loss terms.

    Args:
        hook: Any hook.
    """
    return isinstance(hook, partial) and hook.func is _count
