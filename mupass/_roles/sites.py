"""Sites: the operators of a captured graph that use a parameter, and how they see it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import shape_of
from mupass._dims.operator_traits import Trait, traits
from mupass._records import Site, Use
from mupass._roles import contraction

CONVOLUTIONS = ("aten.conv", "aten.convolution", "aten._convolution")
View = tuple[int, ...]  # for each axis that the operator sees, the parameter's axis


def find_sites(captured: Capture) -> dict[str, tuple[Site, ...]]:
    """Find every operator that uses each parameter.

    Args:
        captured: The graph.

    Returns:
        Parameter name -> its sites. Calls that differ only in their input are one site, with all sources.
    """
    found = {}
    for node, name in captured.parameters.items():
        sites: dict[Site, list[str]] = defaultdict(list)
        rank = len(_shape(node))
        for user, seen, view in _users(node, tuple(range(rank))):
            if user in captured.derivatives:  # the weight is used forwards as well
                continue
            site, source = _site(captured, name, user, seen, view)
            sites[site].append(source)
        found[name] = tuple(_with_sources(s, sources) for s, sources in sites.items())
    return found


def readers_of(captured: Capture, parameter: str, use: Use) -> list[tuple[Node, Node]]:
    """Return the operators of one use of a parameter, each with the activation that it multiplies.

    Args:
        captured: The graph.
        parameter: Name of the parameter.
        use: One of its uses, a product.
    """
    found = []
    for node, name in captured.parameters.items():
        if name != parameter:
            continue
        rank = len(_shape(node))
        for user, seen, view in _users(node, tuple(range(rank))):
            site, _ = _site(captured, parameter, user, seen, view)
            if (site.operator, site.module, site.in_axes) != (use.operator, use.module, use.fan_in):
                continue
            factors, _ = _factors(user, _name(user))
            others = [factor for factor in factors if isinstance(factor, Node) and factor is not seen]
            if others:
                found.append((user, others[0]))
    return found


def _with_sources(site: Site, sources: list[str]) -> Site:
    return Site(**{**vars(site), "sources": tuple(sources)})


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return shape_of(value) if isinstance(value, torch.Tensor) else ()


def _users(node: Node, view: View) -> Iterator[tuple[Node, Node, View]]:
    """Yield (operator, the node it reads, how it sees the parameter), through moves and transposes."""
    for user in node.users:
        if user.op == "output":
            continue
        name = _name(user)
        turned = _turn(user, name, view)
        if traits(name) & Trait.COPIES and user.args and user.args[0] is node:
            yield from _users(user, view)
        elif turned is not None:
            yield from _users(user, turned)
        else:
            yield user, node, view


def _name(node: Node) -> str:
    target: Any = node.target
    return str(target).rsplit(".", 1)[0] if node.op == "call_function" else str(target)


def _turn(node: Node, name: str, view: View) -> View | None:
    """Return how the result of a transpose shows the parameter, or None for other operators."""
    args: Any = node.args
    if name in ("aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint") and len(view) == 2:
        return contraction.reordered(view, "last")
    if name in ("aten.transpose", "aten.swapaxes") and view:
        return contraction.reordered(view, "swap", args[1:3])
    return contraction.reordered(view, "permute", args[1]) if name == "aten.permute" else None


def _site(captured: Capture, parameter: str, user: Node, seen: Node, view: View) -> tuple[Site, str]:
    name, module = _name(user), captured.owners.get(user, "")
    slots = [i for i, a in enumerate(user.args) if a is seen]
    shape = _shape(next(n for n, p in captured.parameters.items() if p == parameter))

    def site(kind: str, **more: Any) -> Site:
        return Site(kind, str(user.target), module, **more)

    if name == "aten.embedding" and slots == [0] and view == (0, 1):
        return site("embedding", in_axes=(0,), out_axes=(1,)), _source(user.args[1])
    if name.startswith(CONVOLUTIONS) and slots == [1] and view == tuple(range(len(view))):
        return site("conv", in_axes=view[1:], out_axes=view[:1]), _source(user.args[0])
    if traits(name) & (Trait.MATRIX_PRODUCT | Trait.AFFINE) or name.startswith(CONVOLUTIONS):
        return _product(captured, user, name, seen, view, shape, site)
    if "norm" in name and len(slots) == 1 and len(shape) >= 1:
        arguments: Any = user.target
        name = arguments._schema.arguments[slots[0]].name
        if name in ("weight", "bias"):
            return site("norm gain" if name == "weight" else "norm shift"), _source(user.args[0])
    if name in ("aten.mul", "aten.add") and len(slots) == 1:
        return _elementwise(captured, user, name, slots[0], shape, site)
    return site("", reason=f"{user.target} uses it in a way that has no Kronecker form here"), ""


def _product(
    captured: Capture, user: Node, name: str, seen: Node, view: View, shape: tuple[int, ...], site: Any
) -> tuple[Site, str]:
    factors, bias = _factors(user, name)
    if bias is seen and isinstance(factors[-1], Node):
        return _added(captured, user, name, factors, shape, site)
    if name.startswith(CONVOLUTIONS):
        return site("", reason=f"{user.target} does not use it as it is"), ""
    places = [place for place, factor in enumerate(factors) if factor is seen]
    others = [factor for factor in factors if isinstance(factor, Node) and factor is not seen]
    if len(places) != 1 or len(others) != 1 or len(factors) != 2:
        return site("", reason=f"{user.target} multiplies it with itself or with several tensors"), ""
    (activation,) = others
    if root_of(activation) in captured.parameters:
        reason = f"{user.target} multiplies it with another parameter, not with an activation"
        return site("", reason=reason), ""
    form = product_form(name, user.args[0], _shape(activation), view, shape, places[0])
    if form is None or not form.proper:
        return site("", reason=f"{user.target} is not one sum over a shared axis"), ""
    kind = "contraction"
    if name == "aten.linear" and view == (0, 1):
        kind = "linear"
    return site(kind, in_axes=form.in_axes, out_axes=form.out_axes), _source(activation)


def _factors(user: Node, name: str) -> tuple[list[Any], Any]:
    """Return what an operator multiplies, and what it adds to the product or None."""
    if name == "aten.einsum":  # einsum(equation, [x, w])
        equation_operands: Any = user.args[1]
        return list(equation_operands), None
    if name == "aten.linear" or name.startswith(CONVOLUTIONS):  # linear(x, w, bias)
        bias = user.args[2] if len(user.args) > 2 else None
        return list(user.args[:2]), bias
    if traits(name) & Trait.AFFINE:  # addmm(bias, x, w): beta * bias + alpha * product
        return list(user.args[1:]), user.args[0]
    return list(user.args), None


def _added(
    captured: Capture, user: Node, name: str, factors: list[Any], shape: tuple[int, ...], site: Any
) -> tuple[Site, str]:
    """Return the site of what an operator adds to its own product: beta * bias + alpha * product."""
    alpha, beta = user.kwargs.get("alpha", 1), user.kwargs.get("beta", 1)
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)) or not alpha:
        return site("", reason=f"{user.target} adds it to a product times alpha={alpha}"), ""
    if name == "aten.baddbmm":  # beta * bias + alpha * bmm(x, w): added as any tensor to a product
        if beta != 1:
            return site("", reason=f"{user.target} adds it times beta={beta}"), ""
        return _along_one_axis("shift", shape, factors[0], len(_shape(user)), site)
    weight = captured.parameters.get(root_of(factors[-1]), "")
    return site("bias", weight=weight, scale=float(beta / alpha)), ""


def product_form(
    name: str, equation: Any, x: tuple[int, ...], view: View, shape: tuple[int, ...], weight_at: int
) -> contraction.Contraction | None:
    """Return the form of a product of an activation with a parameter, or None.

    Args:
        name: ATen name without overload.
        equation: Of an einsum.
        x: Shape of the activation.
        view: How the operator sees the parameter.
        shape: Shape of the parameter.
        weight_at: Place of the parameter among the two factors.
    """
    if name == "aten.einsum":
        return contraction.einsum(str(equation), x, view, shape, weight_at)
    if name == "aten.linear":
        return contraction.linear(len(x), view, shape) if weight_at == 1 else None
    return contraction.matmul(x, view, shape, weight_at, summed=name == "aten.addbmm")


def _elementwise(
    captured: Capture, user: Node, name: str, slot: int, shape: tuple[int, ...], site: Any
) -> tuple[Site, str]:
    other = user.args[1 - slot]
    if not isinstance(other, Node) or root_of(other) in captured.parameters or user.kwargs:
        return site("", reason=f"{user.target} joins it to another parameter or a number"), ""
    return _along_one_axis("gain" if name == "aten.mul" else "shift", shape, other, len(_shape(other)), site)


def _along_one_axis(kind: str, shape: tuple[int, ...], other: Node, rank: int, site: Any) -> tuple[Site, str]:
    """Return the site of a gain or a shift that varies along one axis of an activation of some rank."""
    wide = [i for i, n in enumerate(shape) if n > 1]
    if len(wide) > 1 or len(shape) > rank:
        return site("", reason="it is a table that is added to or multiplied with activations"), ""
    axis = (wide or [len(shape) - 1])[0] if shape else 0
    return site(kind, out_axes=(axis,) if shape else ()), _source(other)


def root_of(node: Any) -> Any:
    """Follow moves and transposes back to what they show.

    Args:
        node: An operand.
    """
    while isinstance(node, Node) and node.op == "call_function" and node.args:
        name, source = _name(node), node.args[0]
        if not isinstance(source, Node):
            break
        if not traits(name) & Trait.COPIES and _turn(node, name, tuple(range(len(_shape(source))))) is None:
            break
        node = source
    return node


def _source(node: Any) -> str:
    root = node
    while isinstance(root, Node) and root.op == "call_function" and traits(_name(root)) & Trait.COPIES:
        root = root.args[0]
    return str(root)
