"""What a second instance of an architecture, at another width, tells of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_map

from mupass._capture.capture import capture
from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import flatten, shape_of
from mupass._dims.infer import Inference
from mupass._errors import CaptureError, InferenceError


@dataclass(frozen=True)
class Second:
    """Sizes of a second instance, beside those of the first.

    Attributes:
        axes: (parameter, axis) -> whether it grows, and the sizes as evidence.
        dims: The same for dimensions, also those that no parameter carries (a head_dim, say).
        sizes: Dimension -> size in the second instance.
        notes: What could not be compared.
        captured: Its graph, where it runs the same operators.
        twins: Operator of the first -> the same operator of the second.
    """

    axes: Mapping[tuple[str, int], tuple[bool, str]] = field(default_factory=dict)
    dims: Mapping[int, tuple[bool, str]] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    captured: Capture | None = None
    twins: Mapping[Node, Node] = field(default_factory=dict)


def compare(
    captured: Capture,
    alone: Inference,
    shapes: Mapping[str, tuple[int, ...]],
    base: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Second:
    """Compare a captured model with a second instance: what differs in size is infinite.

    Parameters are compared by shape. The second instance is traced as well, on the same inputs: where its
    operators are the same ones, every dimension is compared, which settles the factors of a width.

    Args:
        captured: The graph of the first.
        alone: Inference from the first alone; dimensions are numbered alike in all runs over one graph.
        shapes: Shapes of its parameters.
        base: The second instance, meta device or not.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Returns:
        Verdicts and sizes.

    Raises:
        InferenceError: The instances are not of one architecture, or of the same width.
    """
    axes = _by_parameter(shapes, base)
    device = next(base.parameters()).device
    moved = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (tuple(args), dict(kwargs)))
    try:
        other = capture(base, *moved)
    except CaptureError as error:
        return Second(axes, notes=(f"{_UNSETTLED} since it cannot be captured ({error})",))
    if [n.target for n in other.nodes] != [n.target for n in captured.nodes]:
        return Second(axes, notes=(f"{_UNSETTLED} since it runs other operators at its width",))
    sizes: dict[int, int] = {}
    for node, twin in zip(captured.nodes, other.nodes, strict=True):
        for value, shape in zip(_values(alone, node), _shapes(twin), strict=False):
            sizes |= {alone.engine.space.find(a.dim): s for a, s in zip(value.axes, shape, strict=False)}
    for name, row in alone.dims.items():
        at = base.get_parameter(name).shape
        sizes |= {alone.engine.space.find(d): s for d, s in zip(row, at, strict=True)}
    size = alone.engine.space.size
    dims = {d: (size(d) != s, f"the base model has size {s}, this one {size(d)}") for d, s in sizes.items()}
    return Second(axes, dims, sizes, (), other, dict(zip(captured.nodes, other.nodes, strict=True)))


_UNSETTLED = "the base model settles parameter axes, but no factors of them,"


def _values(solved: Inference, node: Node) -> list[Value]:
    return [v for v in flatten([solved.engine.env.get(node)]) if isinstance(v, Value)]


def _shapes(node: Node) -> list[tuple[int, ...]]:
    return [shape_of(t) for t in flatten([node.meta.get("val")]) if isinstance(t, Tensor)]


def _by_parameter(
    shapes: Mapping[str, tuple[int, ...]], base: nn.Module
) -> dict[tuple[str, int], tuple[bool, str]]:
    """Read verdicts off a second instance: what differs in size is infinite."""
    other = {n: tuple(p.shape) for n, p in base.named_parameters()}
    if list(other) != list(shapes) or any(len(other[n]) != len(s) for n, s in shapes.items()):
        odd = sorted(set(other) ^ set(shapes)) or [n for n, s in shapes.items() if len(other[n]) != len(s)]
        raise InferenceError(
            f"the base model is not the same architecture: parameters differ at {odd[:3] or 'order'}"
        )
    table = {}
    for name, shape in shapes.items():
        for axis, (size, base_size) in enumerate(zip(shape, other[name], strict=True)):
            why = f"the base model has size {base_size}, this one {size}"
            table[name, axis] = (size != base_size, why)
    if not any(infinite for infinite, _ in table.values()):
        raise InferenceError(
            "the base model has the same width as this one; give a narrower or wider instance"
        )
    return table


def disagreements(alone: Inference, truth: Mapping[tuple[str, int], tuple[bool, str]]) -> tuple[str, ...]:
    """Say where inference from one model alone would have decided otherwise than the base model.

    Args:
        alone: Inference from one model.
        truth: (parameter, axis) -> whether it grows, and why.
    """
    return tuple(
        f"{name}:{axis} {why}, but inference from one model says "
        f"{'infinite' if alone.verdict(name, axis).infinite else 'finite'} ({alone.verdict(name, axis).why})"
        for (name, axis), (infinite, why) in truth.items()
        if alone.verdict(name, axis).infinite != infinite
    )
