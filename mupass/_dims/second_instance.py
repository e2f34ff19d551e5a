"""What a second instance of an architecture, at another width, tells of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from mupass._capture.capture import capture
from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import computing, flatten, output_shapes
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
        twins: Operator of the first that computes -> the same operator of the second.
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
    # Example inputs follow the second instance to its device.
    moved_args, moved_kwargs = tree_map_only(Tensor, lambda x: x.to(device), (tuple(args), dict(kwargs)))
    try:
        captured_base = capture(base, moved_args, moved_kwargs)
    except CaptureError as error:
        return Second(axes, notes=(f"{_UNSETTLED} since it cannot be captured ({error})",))
    nodes, others = computing(captured.nodes), computing(captured_base.nodes)
    if [node.target for node in others] != [node.target for node in nodes]:
        return Second(axes, notes=(f"{_UNSETTLED} since it runs other operators at its width",))
    # The same operators in the same order: each has its twin.
    twins = dict(zip(nodes, others, strict=True))
    sizes = _other_sizes(alone, twins, base)
    dims = {}
    for dim, other_size in sizes.items():
        size = alone.engine.space.size(dim)
        dims[dim] = (size != other_size, f"the base model has size {other_size}, this one {size}")
    return Second(axes, dims, sizes, (), captured_base, twins)


_UNSETTLED = "the base model settles parameter axes, but no factors of them,"


def _other_sizes(alone: Inference, twins: Mapping[Node, Node], base: nn.Module) -> dict[int, int]:
    """Return the size in the second instance of every dimension of a tensor or a parameter."""
    find = alone.engine.space.find
    sizes: dict[int, int] = {}
    # Activations first, since they show factors that no parameter has as an axis.
    for node, counterpart in twins.items():
        values = [value for value in flatten([alone.engine.env.get(node)]) if isinstance(value, Value)]
        for value, shape in zip(values, output_shapes(counterpart), strict=False):
            for axis, size in zip(value.axes, shape, strict=False):
                sizes[find(axis.dim)] = size
    for name, dims in alone.dims.items():
        for dim, size in zip(dims, base.get_parameter(name).shape, strict=True):
            sizes[find(dim)] = size
    return sizes


def _by_parameter(
    shapes: Mapping[str, tuple[int, ...]], base: nn.Module
) -> dict[tuple[str, int], tuple[bool, str]]:
    """Read verdicts off a second instance: what differs in size is infinite."""
    base_shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    shared = [name for name in shapes if name in base_shapes]
    differing = sorted(base_shapes.keys() ^ shapes.keys())
    differing = differing or [name for name in shared if len(base_shapes[name]) != len(shapes[name])]
    if differing or list(base_shapes) != list(shapes):
        raise InferenceError(
            f"the base model is not the same architecture: parameters differ at {differing[:3] or 'order'}"
        )
    verdicts = {}
    for name, shape in shapes.items():
        for axis, (size, base_size) in enumerate(zip(shape, base_shapes[name], strict=True)):
            reason = f"the base model has size {base_size}, this one {size}"
            verdicts[name, axis] = (size != base_size, reason)
    if shapes == base_shapes:
        raise InferenceError(
            "the base model has the same width as this one; give a narrower or wider instance"
        )
    return verdicts


def disagreements(alone: Inference, truth: Mapping[tuple[str, int], tuple[bool, str]]) -> tuple[str, ...]:
    """Say where inference from one model alone would have decided otherwise than the base model.

    Args:
        alone: Inference from one model.
        truth: (parameter, axis) -> whether it grows, and why.
    """
    differences = []
    for (name, axis), (infinite, reason) in truth.items():
        verdict = alone.verdict(name, axis)
        if verdict.infinite != infinite:
            decided = "infinite" if verdict.infinite else "finite"
            differences.append(
                f"{name}:{axis} {reason}, but inference from one model says {decided} ({verdict.why})"
            )
    return tuple(differences)
