"""Taps: Kronecker factors as gradients of dummy leaves.

A forward hook on each layer sends its output through an autograd function with extra inputs, the leaves.
The gradient of a leaf is *defined* as the factor that the layer adds to: ``sum x x^T``, ``sum g g^T`` and the
number of rows. Autograd then does the book-keeping: accumulation over micro-batches, reused modules,
checkpointing, and one graph under torch.compile. While no leaf requires a gradient the hook does nothing, so
that toggling ``requires_grad`` gives exactly two graphs: a cheap one and a curvature one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._factors import Layer, gram, input_rows, output_rows
from mupass._plan import Plan
from mupass._terms import TermsTap, is_terms_hook, terms_hook, terms_tap_of


class _Factors(torch.autograd.Function):
    """Identity on the output; its backward pass computes the layer's factors."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, rows: Tensor, layer: Layer
    ) -> Tensor:
        """Pass the output on; a copy, so that an activation may work in place on it."""
        ctx.layer = layer
        ctx.dtype = rows.dtype
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the output's gradient, and as gradients of the leaves A, B and the row count."""
        (g,) = grads
        (x,) = ctx.saved_tensors
        layer: Layer = ctx.layer
        a = b = None
        with torch.no_grad():
            outputs = output_rows(layer, g)
            if ctx.needs_input_grad[2]:
                a = (
                    _counts(x, layer, ctx.dtype)
                    if layer.kind == "embedding"
                    else gram(input_rows(layer, x), ctx.dtype)
                )
            if ctx.needs_input_grad[3]:
                b = gram(outputs, ctx.dtype)
            rows = torch.full((1,), outputs.shape[1], dtype=ctx.dtype, device=g.device)
        return g, None, a, b, rows, None


def _counts(ids: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """Return how often each row of a lookup table was read: the diagonal of A for one-hot inputs."""
    ones = torch.ones(ids.numel(), dtype=dtype, device=ids.device)
    return torch.zeros(layer.inputs, dtype=dtype, device=ids.device).scatter_add(0, ids.reshape(-1), ones)


class Tap:
    """Forward hook on one layer; idle until an optimizer opens it.

    Attributes:
        layer: Shapes of the layer.
        a: Leaf whose gradient is ``sum x x^T``; None while idle or not wanted.
        b: Leaf whose gradient is ``sum g g^T``.
        rows: Leaf whose gradient is the number of rows summed.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.rows: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Send the output through the tap.

        Args:
            module: The layer.
            args: Its positional arguments.
            kwargs: Its named arguments.
            output: Its output.

        Returns:
            The same output with the factors hanging on its gradient; None (leave it be) while idle.
        """
        if self.rows is None or not self.rows.requires_grad or not output.requires_grad:
            return None
        if self.rows.device != output.device:
            raise OptimizerError(
                f"the model is on {output.device}, its optimizer was made on {self.rows.device}; "
                "move the model first, then make the optimizer"
            )
        x = args[0] if args else kwargs["input"]
        return _Factors.apply(output, x.detach(), self.a, self.b, self.rows, self.layer)  # type: ignore[no-any-return, no-untyped-call]

    def open(self, device: torch.device, dtype: torch.dtype, a: bool, b: bool) -> None:
        """Make the leaves; a scalar seen as a matrix, so that they take no memory.

        Args:
            device: Device of the layer.
            dtype: Precision of the factors.
            a: Whether the input factor is wanted.
            b: Whether the output factor is wanted.
        """
        zero = torch.zeros((), device=device, dtype=dtype)
        self.a = zero.expand(self.layer.input_shape()) if a else None
        self.b = zero.expand(self.layer.output_shape()) if b else None
        # One axis: Dynamo takes a float64 scalar on the CPU for a Python number, and compiles twice.
        self.rows = torch.zeros(1, device=device, dtype=dtype)

    def collect(self, on: bool) -> None:
        """Collect factors in the passes that follow, or stop.

        Args:
            on: Whether to collect.
        """
        for leaf in (self.a, self.b, self.rows):
            if leaf is not None:
                leaf.requires_grad_(on)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor] | None:
        """Take out what was summed since the last call, or None when no pass was collected."""
        if self.rows is None or self.rows.grad is None:
            return None
        found = [leaf.grad if leaf is not None else None for leaf in (self.a, self.b, self.rows)]
        self.clear()
        return found[0], found[1], found[2]  # type: ignore[return-value]

    def clear(self) -> None:
        """Forget what was summed."""
        for leaf in (self.a, self.b, self.rows):
            if leaf is not None:
                leaf.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get idle taps: leaves belong to the optimizer that opened them."""
        return {"layer": self.layer, "a": None, "b": None, "rows": None}


@dataclass(frozen=True)
class Tapped:
    """A layer that K-FAC can precondition.

    Attributes:
        module: Its qualified name.
        weight: Name of its weight.
        bias: Name of its bias, or None.
        layer: Its shapes.
    """

    module: str
    weight: str
    bias: str | None
    layer: Layer


def eligible(model: nn.Module, plan: Plan) -> tuple[tuple[Tapped, ...], dict[str, str]]:
    """Tell which parameters K-FAC can take, and why not the others.

    Args:
        model: The module that the plan's names are relative to.
        plan: Its plan.

    Returns:
        The layers, and parameter name -> reason for every parameter that none of them covers.
    """
    layers, reasons = [], {}
    for entry in plan.entries:
        g = entry.geometry
        if not any(u.fan_in or u.fan_out for u in g.uses):
            reasons[g.name] = "no activation is contracted with it (bias, gain, table of positions)"
            continue
        path, _, leaf = g.name.rpartition(".")
        layer = Layer.of(model.get_submodule(path)) if leaf == "weight" else None
        if g.aliases or len(g.uses) > 1:
            reasons[g.name] = f"it has {max(len(g.uses), 2)} uses ({', '.join(u.operator for u in g.uses)})"
        elif layer is None:
            reasons[g.name] = (
                f"{g.uses[0].operator} in {g.uses[0].module or 'the root module'} is not a plain layer"
            )
        else:
            bias = f"{path}.bias".lstrip(".")
            layers.append(Tapped(path, g.name, bias if bias in plan else None, layer))
    for tapped in layers:
        if (
            tapped.bias
            and len(plan[tapped.bias].geometry.uses) == 1
            and not plan[tapped.bias].geometry.aliases
        ):
            reasons.pop(tapped.bias, None)
    return tuple(layers), reasons


def attach(model: nn.Module, plan: Plan) -> None:
    """Hang an idle tap on every layer that K-FAC can precondition.

    Args:
        model: The module that the plan's names are relative to.
        plan: Its plan.
    """
    for tapped in eligible(model, plan)[0]:
        module = model.get_submodule(tapped.module)
        if tap_of(module) is None:
            module.register_forward_hook(Tap(tapped.layer), with_kwargs=True)
    if terms_tap_of(model) is None:
        model.register_forward_hook(terms_hook(TermsTap()))


def tap_of(module: nn.Module) -> Tap | None:
    """Return the tap that hangs on a module, or None.

    Args:
        module: Any module.
    """
    return next((h for h in module._forward_hooks.values() if isinstance(h, Tap)), None)


def detach(model: nn.Module) -> None:
    """Take all taps off a model.

    Args:
        model: The module that `attach` was given.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Tap) or is_terms_hook(hook):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
