"""Leaves: Kronecker factors as gradients of dummy leaves.

The output of an operator that uses a weight goes through an autograd function with extra inputs, the leaves.
The gradient of a leaf is *defined* as the factor that the operator adds to: ``sum x x^T``, ``sum g g^T`` and
the number of rows. Autograd then does the book-keeping: accumulation over micro-batches, reused weights,
checkpointing, and one graph under torch.compile. While no leaf requires a gradient a tap does nothing, so
that toggling ``requires_grad`` gives exactly two graphs: a cheap one and a curvature one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mupass._errors import OptimizerError
from mupass._parallel import whole
from mupass._taps.factors import Layer, raw_input, raw_outputs, second_moments
from mupass._taps.forms import Form, held, with_held
from mupass._taps.visits import Visits
from mupass._taps.watcher import Watcher


class _Factors(torch.autograd.Function):
    """Identity on the output; its backward pass computes the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        layer: Layer,
        form: Form,
        tap: Tap | None,
        rows: Tensor,
        a: Tensor | None,
        *others: Tensor | None,
    ) -> Tensor:
        """Pass the output on; a copy, so that an activation may work in place on it.

        The others are a leaf for every matrix, and behind them what the form holds.
        """
        ctx.layer, ctx.form, ctx.tap, ctx.dtype = layer, form, tap, rows.dtype
        # None, and not zeros, in the place of gradients that are not there.
        if tap is not None:
            ctx.set_materialize_grads(False)
            ctx.seen = []  # when passes that count have run through this call
        ctx.matrices = len(layer.outputs)
        ctx.save_for_backward(x, *others[ctx.matrices :])
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the output's gradient, and as gradients of the leaves the row count, A and the Bs."""
        (g,) = grads
        wanted, tap, matrices = ctx.needs_input_grad, ctx.tap, ctx.matrices
        if is_batched(g):
            return g, *[None] * (len(wanted) - 1)
        x, *kept = ctx.saved_tensors
        if tap is not None and tap.passes is not None:
            tap.passes.begin()
        if g is None:  # an output of the model that the loss does not depend on
            return (None,) * len(wanted)
        with torch.no_grad():
            # Under tensor parallelism a rank holds slices of an activation; factors are of all of it.
            inputs, gradient, form = whole(x), whole(g), with_held(ctx.form, kept)
            # Arguments of `forward` by their places: A is the sixth, and behind it are the Bs.
            input_factor = None
            if wanted[6]:
                make_input = raw_input
                if tap is not None and tap.once is not None:
                    make_input = tap.once.raw_input
                input_factor = make_input(ctx.layer, form, inputs, ctx.dtype)
            sides = wanted[7 : 7 + matrices]
            output_factors, count = raw_outputs(ctx.layer, form, inputs, gradient, sides, ctx.dtype)
            rows = _rows(count, g.device, ctx.dtype)
            if tap is None:
                # A compiled graph gets zeros in the place of gradients that are not there. As a product, A is
                # also no result of the graph itself, so that equal ones are computed once, see `Once`.
                reached = (g != 0).any().to(ctx.dtype).reshape(1)
                rows = rows * reached
                if input_factor is not None:
                    input_factor = input_factor * reached
        # autograd.grad(..., create_graph=True) runs this with gradients enabled.
        if tap is not None:
            tap.visits.note(ctx.seen)
            if torch.is_grad_enabled():
                g = tap.followed(g)
            tap.check_shapes(input_factor, output_factors)
            if tap.is_left_out:
                tap.add(rows, input_factor, output_factors)
                tap.count_visits(rows)
                return g, *[None] * (len(wanted) - 1)
        return g, None, None, None, None, rows, input_factor, *output_factors, *[None] * len(kept)


class _Moments(torch.autograd.Function):
    """Identity on the output; its backward pass computes second moments in given bases."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        layer: Layer,
        form: Form,
        tap: Tap | None,
        bases: int,
        *tensors: Tensor,
    ) -> Tensor:
        """Pass the output on; the tensors are bases, then leaves, then what the form holds."""
        ctx.layer, ctx.form, ctx.tap, ctx.bases = layer, form, tap, bases
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        # A leaf for every matrix: there is a basis for each of them and one for the input.
        ctx.save_for_backward(x, *tensors[:bases], *tensors[2 * bases - 1 :])
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the output's gradient, and as gradients of the leaves the moments of every matrix."""
        (g,) = grads
        if g is None or is_batched(g):
            return g, *[None] * (len(ctx.needs_input_grad) - 1)
        x, *saved = ctx.saved_tensors
        bases, kept = saved[: ctx.bases], saved[ctx.bases :]
        with torch.no_grad():
            form = with_held(ctx.form, kept)
            moments = second_moments(ctx.layer, form, whole(x), whole(g), bases, bases[0].dtype)
        if ctx.tap is not None and ctx.tap.is_left_out:
            for leaf, found in zip(ctx.tap.moments, moments, strict=True):
                _add(leaf, found)
            return g, *[None] * (len(ctx.needs_input_grad) - 1)
        # The arguments of `forward` that are no tensors, the bases and the form have no gradients.
        return g, *[None] * 5, *[None] * len(bases), *moments, *[None] * len(kept)


class Sums(NamedTuple):
    """What a tap summed.

    Attributes:
        a: ``sum x x^T``, where wanted.
        b: ``sum g g^T`` of every matrix, where wanted.
        rows: Number of rows.
        moments: Second moments in the bases of every matrix; none without bases.
    """

    a: Tensor | None
    b: tuple[Tensor | None, ...]
    rows: Tensor
    moments: tuple[Tensor, ...] = ()


def under_transform() -> bool:
    """Return whether a transform of torch.func runs (vmap, grad, jvp): taps cannot see what it does."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _beneath(tensor: Tensor) -> Tensor:
    """Return what transforms of torch.func have wrapped: a parameter, or values that were lent for a call."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_trained(parameters: Iterable[Tensor]) -> bool:
    """Return whether a backward pass would reach one of some parameters.

    Args:
        parameters: Those that a module has at present.
    """
    # A plain loop: it ends at the first one, and Dynamo of torch 2.8 traces it.
    for parameter in parameters:
        if parameter.requires_grad and (not under_transform() or _beneath(parameter).requires_grad):
            return True
    return False


def is_batched(gradient: Tensor | None) -> bool:
    """Return whether a gradient stands for several at once, as in a Jacobian by ``is_grads_batched=True``.

    Autograd hands such gradients to the caller and adds them to no parameter, so no step sees them.

    Args:
        gradient: As a backward pass gets it; None where there is none.
    """
    if gradient is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


class Once:
    """The last input factor of taps that read one activation: several of them multiply it once in a pass.

    Each tap still has a factor of its own, so that it does not matter which of them take part in a step.
    In a compiled graph equal products become one without this.
    """

    def __init__(self) -> None:
        self._storage: StorageWeakRef | None = None
        self._key: Any = None
        self._value: Tensor | None = None

    def raw_input(self, layer: Layer, form: Form, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``sum x x^T`` over rows; what was returned for the very same values before, if it was last.

        Args:
            layer: Shapes.
            form: Layout of the operator.
            x: Its input.
            dtype: Precision of the factor.
        """
        if type(x) is not Tensor:
            return raw_input(layer, form, x, dtype)
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        # Same memory, layout and version in one backward pass: the same values, without being compared.
        # Between two passes other code, such as NumPy, may have written into the memory.
        present = (torch._C._current_graph_task_id(), x._version)
        key = (present, x.storage_offset(), x.shape, x.stride(), x.dtype, form, dtype, layer.input_shape())
        # A weak reference keeps the address from being used again, but not the memory.
        before = self._storage
        same_memory = before is not None and before == storage and not before.expired()  # type: ignore[no-untyped-call]
        if self._value is None or not same_memory or self._key != key:
            self._value = raw_input(layer, form, x, dtype)
            self._storage, self._key = storage, key
        return self._value

    def clear(self) -> None:
        """Let go of the factor."""
        self._storage = self._key = self._value = None


def _rows(count: int | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the leaf of rows: one number, or one for each group."""
    if isinstance(count, Tensor):
        return count.to(dtype)
    return torch.full((1,), count, dtype=dtype, device=device)


def _add(leaf: Tensor, found: Tensor) -> None:
    """Add to the gradient of a leaf, out of place: it may have a derivative."""
    leaf.grad = found if leaf.grad is None else leaf.grad + found


class Tap:
    """Leaves of one weight use; idle until an optimizer opens it.

    Attributes:
        layer: Shapes, or None before the tap is opened for the first time.
        a: Leaf whose gradient is ``sum x x^T``; None while idle or not wanted.
        b: Leaves whose gradients are ``sum g g^T``, one a matrix.
        rows: Leaf whose gradient is the number of rows summed, or that of every group.
        bases: Of the second moments: that of the input, and that of every matrix' output.
        moments: Leaves whose gradients are the second moments, one a matrix.
        once: Shared with taps that read the same activation.
        passes: Told of backward passes that reach the tap.
        visits: Calls of the layer that the backward pass which runs has come by.
        uses: Outputs, inputs and layouts of the passes since it was set to an empty list. While it is a list
            nothing is hung on outputs: factors that can be differentiated are made of these, see `fill`.
    """

    def __init__(self) -> None:
        self.uses: list[tuple[Tensor, Tensor, Form]] | None = None
        self.layer: Layer | None = None
        self.a: Tensor | None = None
        self.b: tuple[Tensor | None, ...] = ()
        self.rows: Tensor | None = None
        self.bases: tuple[Tensor, ...] = ()
        self.moments: tuple[Tensor, ...] = ()
        self.once: Once | None = None
        self.passes: Watcher | None = None
        self.visits: Visits[list[int]] = Visits()
        self._collection = 0  # how often sums were taken or forgotten

    def through(self, output: Tensor, x: Tensor, form: Form) -> Tensor:
        """Hang the factors on the gradient of an output.

        Args:
            output: Output of the operator.
            x: Its input.
            form: How both are laid out.

        Returns:
            The same values; the very tensor while no factors are wanted.
        """
        # No factor is wanted, or torch.jit.trace makes a program of its own.
        if self.idle or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return output
        # First, since a tensor under vmap does not say that it requires a gradient.
        if under_transform():
            if self.passes is not None and torch.is_grad_enabled():
                self.passes.miss(self, "under a transform of torch.func (vmap, grad, jvp)")
            return output
        if not output.requires_grad:  # nothing flows back (torch.no_grad())
            return output
        # A caller who takes derivatives of factors makes them of these by `fill`.
        if self.uses is not None:
            self.uses.append((output, x, form))
            return output.clone()  # an activation may work in place on it
        assert self.rows is not None
        if self.rows.device != output.device:
            raise OptimizerError(
                f"the model is on {output.device}, its optimizer was made on {self.rows.device}; "
                "move the model first, then make the optimizer"
            )
        # A factor is a statistic: no gradient flows back through its input.
        inputs = x.detach()
        tap: Tap | None = self
        # A compiled graph calls nobody as it runs backwards; hooks on the leaves tell of it, see `watch`.
        if torch.compiler.is_compiling():
            tap = None
        if self.bases:
            tensors = (*self.bases, *self.moments, *held(form))
            output = _Moments.apply(output, inputs, self.layer, form, tap, len(self.bases), *tensors)  # type: ignore[no-untyped-call]
        # Last, and so first in the backward pass: it says that one has begun.
        others = (*self.b, *held(form))
        return _Factors.apply(output, inputs, self.layer, form, tap, self.rows, self.a, *others)  # type: ignore[no-any-return, no-untyped-call]

    def followed(self, gradient: Tensor) -> Tensor:
        """Return the gradient of an output, which tells when a loss that depends on it is differentiated.

        Forces, or a penalty on gradients: the operator that carries it on reads the weight a second time.

        Args:
            gradient: In a backward pass that can itself be differentiated.
        """
        passes = self.passes
        if passes is None:
            return gradient

        def tell(_: Tensor) -> None:
            passes.differentiated(self)

        gradient = gradient.view_as(gradient)
        if not gradient.requires_grad:
            gradient = gradient.detach().requires_grad_(True)
        gradient.register_hook(tell)  # type: ignore[no-untyped-call]
        return gradient

    def open(self, layer: Layer, device: torch.device, dtype: torch.dtype, a: bool, b: bool) -> None:
        """Make the leaves; a scalar seen as a matrix, so that they take no memory.

        Args:
            layer: Shapes of the factors.
            device: Device of the weight.
            dtype: Precision of the factors.
            a: Whether the input factor is wanted.
            b: Whether the output factors are wanted.
        """
        self.layer = layer
        number = torch.zeros((), device=device, dtype=dtype)
        self.a = None
        if a and layer.inputs:
            self.a = number.expand(layer.input_shape())
        self.b = (None,) * len(layer.outputs)
        if b:
            self.b = tuple(number.expand(shape) for shape in layer.output_shapes())
        # One axis: Dynamo takes a float64 scalar on the CPU for a Python number, and compiles twice.
        self.rows = torch.zeros(layer.counted, device=device, dtype=dtype)
        self.bases = self.moments = ()
        self.once = self.passes = None

    def watch(self, passes: Watcher) -> None:
        """Tell of backward passes that reach the tap.

        Args:
            passes: Told before the first of the leaves gets its gradient.
        """
        self.passes = passes
        self._watch(self.leaves)
        if self.rows is not None:
            self.rows.requires_grad_(True).register_hook(self.count_visits)  # type: ignore[no-untyped-call]
            self.rows.requires_grad_(False)

    def count_visits(self, gradient: Tensor) -> None:
        """Tell of calls of the layer that a pass of this collection has run through before.

        Args:
            gradient: That of the leaf of rows, which is left alone.
        """
        for seen in self.visits.take():
            if seen == [self._collection] and self.passes is not None:
                self.passes.repeated(self)
            seen[:] = [self._collection]

    def _watch(self, leaves: Sequence[Tensor]) -> None:
        if self.passes is not None:
            for leaf in leaves:
                # Only a tensor that requires a gradient takes a hook.
                leaf.requires_grad_(True).register_hook(self.passes.begin_late)  # type: ignore[no-untyped-call]
                leaf.requires_grad_(False)

    def rescale(self, bases: Sequence[Tensor]) -> None:
        """Collect second moments as well, in bases that their owner changes in place.

        Args:
            bases: ``[groups, n, n]`` of the input, then of the output of every matrix.
        """
        self.bases = tuple(bases)
        number = bases[0].new_zeros(())
        fan_in = bases[0].shape[-1]
        # Second moments have the shape of the gradient: [groups, fan_out, fan_in].
        self.moments = tuple(number.expand(*basis.shape[:2], fan_in) for basis in bases[1:])
        self._watch(self.moments)

    @property
    def idle(self) -> bool:
        """Whether outputs pass as they are."""
        return self.uses is None and (self.rows is None or not self.rows.requires_grad)

    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        """Put the factors of `uses` where a backward pass would leave them, and forget these.

        Args:
            gradients: Those of the outputs; None where the loss does not depend on one.
        """
        uses, self.uses = self.uses or (), None
        assert self.layer is not None and self.rows is not None
        wanted = [leaf is not None for leaf in self.b]
        # A reused weight has several uses, whose factors add up.
        for (_, x, form), gradient in zip(uses, gradients, strict=True):
            if gradient is None:
                continue
            input_factor = None if self.a is None else raw_input(self.layer, form, x, self.rows.dtype)
            factors, count = raw_outputs(self.layer, form, x, gradient, wanted, self.rows.dtype)
            self.add(_rows(count, self.rows.device, self.rows.dtype), input_factor, factors)

    def check_shapes(self, a: Tensor | None, b: Sequence[Tensor | None]) -> None:
        """Refuse a weight of another shape than when the tap was opened, as by ``weight.data = ...``.

        Args:
            a: Input factor, where wanted.
            b: Output factors, where wanted.

        Raises:
            OptimizerError: A factor has another shape than its leaf.
        """
        for leaf, found in zip((self.a, *self.b), (a, *b), strict=True):
            if leaf is not None and found is not None and leaf.shape != found.shape:
                raise OptimizerError(
                    f"a layer has factors of shape {tuple(found.shape)}, and had {tuple(leaf.shape)} when "
                    "the optimizer was made: transform the new model, and make the optimizer anew"
                )

    @property
    def is_left_out(self) -> bool:
        """Whether the pass that runs adds to gradients of parameters alone, as ``backward(inputs=...)``."""
        return self.passes is not None and self.rows is not None and self.passes.leaves_out(self, self.rows)

    def add(self, rows: Tensor, a: Tensor | None, b: Sequence[Tensor | None]) -> None:
        """Add to the gradients of the leaves where autograd does not.

        Args:
            rows: Number of rows.
            a: Input factor, where wanted.
            b: Output factors, where wanted.
        """
        for leaf, found in zip((self.rows, self.a, *self.b), (rows, a, *b), strict=True):
            if leaf is not None and found is not None:
                _add(leaf, found)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All leaves: rows, A, Bs, moments, without those that are not wanted."""
        return tuple(leaf for leaf in (self.rows, self.a, *self.b, *self.moments) if leaf is not None)

    def collect(self, on: bool) -> None:
        """Collect factors in the passes that follow, or stop.

        Args:
            on: Whether to collect.
        """
        for leaf in self.leaves:
            leaf.requires_grad_(on)

    @property
    def has_sums(self) -> bool:
        """Whether a backward pass has added to the leaves."""
        return self.rows is not None and self.rows.grad is not None

    def zeros(self) -> Sums:
        """Return what a pass without a single row sums."""
        assert self.layer is not None and self.rows is not None

        def zeros(leaf: Tensor | None) -> Tensor | None:
            return None if leaf is None else leaf.new_zeros(leaf.shape)

        moments = tuple(leaf.new_zeros(leaf.shape) for leaf in self.moments)
        return Sums(zeros(self.a), tuple(map(zeros, self.b)), self.rows.new_zeros(self.rows.shape), moments)

    def take(self) -> Sums | None:
        """Take out what was summed since the last call, or None when no pass was collected."""
        if self.rows is None or self.rows.grad is None:
            return None

        def gradient(leaf: Tensor | None) -> Tensor | None:
            return None if leaf is None else leaf.grad

        moments = tuple(leaf.grad for leaf in self.moments if leaf.grad is not None)
        summed = Sums(gradient(self.a), tuple(map(gradient, self.b)), self.rows.grad, moments)
        self.clear()
        return summed

    def clear(self) -> None:
        """Forget what was summed."""
        self._collection += 1
        # Dropped, not zeroed: None says that no pass came by.
        for leaf in self.leaves:
            leaf.grad = None
        if self.once is not None:
            self.once.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get idle taps: leaves belong to the optimizer that opened them."""
        return vars(Tap())
