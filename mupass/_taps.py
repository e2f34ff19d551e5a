"""Taps: Kronecker factors as gradients of dummy leaves.

The output of an operator that uses a weight goes through an autograd function with extra inputs, the leaves.
The gradient of a leaf is *defined* as the factor that the operator adds to: ``sum x x^T``, ``sum g g^T`` and
the number of rows. Autograd then does the book-keeping: accumulation over micro-batches, reused weights,
checkpointing, and one graph under torch.compile. While no leaf requires a gradient a tap does nothing, so
that toggling ``requires_grad`` gives exactly two graphs: a cheap one and a curvature one.

A tap sits in a forward hook where a module is one such operator, and in the parameter itself where it is used
by other code (`mupass._intercept`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code

from mupass._errors import OptimizerError
from mupass._factors import Layer, raw_input, raw_outputs
from mupass._forms import CONVOLUTIONS, TRANSPOSED, Convolution, Elementwise, Features, Form, Lookup
from mupass._terms import TermsTap, is_terms_hook, terms_hook, terms_tap_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS, *INSTANCE_NORMS)
HOOKED = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED, *NORMS)


class _Factors(torch.autograd.Function):
    """Identity on the output; its backward pass computes the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        layer: Layer,
        form: Form,
        rows: Tensor,
        a: Tensor | None,
        *b: Tensor | None,
    ) -> Tensor:
        """Pass the output on; a copy, so that an activation may work in place on it."""
        ctx.layer, ctx.form, ctx.dtype = layer, form, rows.dtype
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the output's gradient, and as gradients of the leaves the row count, A and the Bs."""
        (g,) = grads
        (x,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        with torch.no_grad():
            a = raw_input(ctx.layer, ctx.form, x, ctx.dtype) if wanted[5] else None
            b, count = raw_outputs(ctx.layer, ctx.form, x, g, wanted[6:], ctx.dtype)
            rows = torch.full((1,), count, dtype=ctx.dtype, device=g.device)
        return g, None, None, None, rows, a, *b


class Tap:
    """Leaves of one weight use; idle until an optimizer opens it.

    Attributes:
        layer: Shapes, or None before the tap is opened for the first time.
        a: Leaf whose gradient is ``sum x x^T``; None while idle or not wanted.
        b: Leaves whose gradients are ``sum g g^T``, one a matrix.
        rows: Leaf whose gradient is the number of rows summed.
    """

    def __init__(self) -> None:
        self.layer: Layer | None = None
        self.a: Tensor | None = None
        self.b: tuple[Tensor | None, ...] = ()
        self.rows: Tensor | None = None

    def through(self, output: Tensor, x: Tensor, form: Form) -> Tensor:
        """Hang the factors on the gradient of an output.

        Args:
            output: Output of the operator.
            x: Its input.
            form: How both are laid out.

        Returns:
            The same values; the very tensor while no factors are wanted.
        """
        if self.rows is None or not self.rows.requires_grad or not output.requires_grad:
            return output
        if self.rows.device != output.device:
            raise OptimizerError(
                f"the model is on {output.device}, its optimizer was made on {self.rows.device}; "
                "move the model first, then make the optimizer"
            )
        return _Factors.apply(output, x.detach(), self.layer, form, self.rows, self.a, *self.b)  # type: ignore[no-any-return, no-untyped-call]

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
        zero = torch.zeros((), device=device, dtype=dtype)
        self.a = zero.expand(layer.input_shape()) if a and layer.inputs else None
        self.b = tuple(zero.expand(shape) if b else None for shape in layer.output_shapes())
        # One axis: Dynamo takes a float64 scalar on the CPU for a Python number, and compiles twice.
        self.rows = torch.zeros(1, device=device, dtype=dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All leaves: rows, A, Bs, without those that are not wanted."""
        return tuple(leaf for leaf in (self.rows, self.a, *self.b) if leaf is not None)

    def collect(self, on: bool) -> None:
        """Collect factors in the passes that follow, or stop.

        Args:
            on: Whether to collect.
        """
        for leaf in self.leaves:
            leaf.requires_grad_(on)

    def take(self) -> tuple[Tensor | None, tuple[Tensor | None, ...], Tensor] | None:
        """Take out A, the Bs and the rows summed since the last call, or None when no pass was collected."""
        if self.rows is None or self.rows.grad is None:
            return None
        rows = self.rows.grad
        a = None if self.a is None else self.a.grad
        b = tuple(None if leaf is None else leaf.grad for leaf in self.b)
        self.clear()
        return a, b, rows

    def clear(self) -> None:
        """Forget what was summed."""
        for leaf in self.leaves:
            leaf.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get idle taps: leaves belong to the optimizer that opened them."""
        return {"layer": None, "a": None, "b": (), "rows": None}


class ModuleTap(Tap):
    """Forward hook on a module that is one operator."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.form = _form_of(module)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Send the output through the tap.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs: Its named arguments.
            output: Its output.
        """
        if self.rows is None or not self.rows.requires_grad:
            return None
        x = args[0] if args else kwargs["input"]
        with torch.no_grad():
            x = normalized(module, x)
        return self.through(output, x, self.form)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get idle taps."""
        return {**super().__getstate__(), "form": self.form}


def _form_of(module: nn.Module) -> Form:
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return Convolution.of(module)
    if isinstance(module, nn.Embedding):
        return Lookup()
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return Elementwise(-len(module.normalized_shape), len(module.normalized_shape))
    return Elementwise(1) if isinstance(module, NORMS) else Features()


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm's gain multiplies; for other modules the input itself.

    Args:
        module: Any module of `HOOKED`.
        x: Its input.
    """
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        batch = module.training or module.running_mean is None
        stats = (None, None) if batch else (module.running_mean, module.running_var)
        if isinstance(module, INSTANCE_NORMS):
            return F.instance_norm(x, *stats, None, None, batch, 0.0, module.eps)
        return F.batch_norm(x, *stats, None, None, batch, 0.0, module.eps)
    return x


def hookable(module: nn.Module) -> bool:
    """Return whether a module's whole forward is one operator that a hook can tap.

    Args:
        module: Any module; subclasses that keep the forward of a class of `HOOKED` count.
    """
    known = next((cls for cls in HOOKED if isinstance(module, cls)), None)
    if known is None or type(module).forward is not known.forward:
        return False
    return not isinstance(module, nn.Embedding) or (not module.sparse and module.max_norm is None)


def attach(model: nn.Module) -> None:
    """Hang an idle tap on every module that is one operator.

    Before the model is compiled: torch.compile does not notice hooks that come later.

    Args:
        model: The module that the plan's names are relative to.
    """
    _let_dynamo_see(model)
    for module in model.modules():
        if hookable(module) and tap_of(module) is None:
            module.register_forward_hook(ModuleTap(module), with_kwargs=True)
    if terms_tap_of(model) is None:
        model.register_forward_hook(terms_hook(TermsTap()))


def _let_dynamo_see(model: nn.Module) -> None:
    """Make torch.compile tell a model with hooks from one without.

    By default Dynamo guards on no hooks, and finds compiled code by the code of ``forward``: it would run a
    transformed model by the graph of a plain one of the same class, without taps and multipliers. Guards on
    hooks are switched on, and what was compiled without them is dropped.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for cls in {type(module) for module in model.modules()}:
        code = getattr(cls.forward, "__code__", None)
        if code is not None:
            reset_code(code)


def tap_of(module: nn.Module) -> ModuleTap | None:
    """Return the tap that hangs on a module, or None.

    Args:
        module: Any module.
    """
    return next((h for h in module._forward_hooks.values() if isinstance(h, ModuleTap)), None)


def detach(model: nn.Module) -> None:
    """Take all hooks off a model.

    Args:
        model: The module that `attach` was given.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ModuleTap) or is_terms_hook(hook):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
