"""Kronecker factors of one layer: raw sums of outer products of its inputs and of its output gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """What the factors must know of a layer.

    Attributes:
        kind: ``linear``, ``conv`` or ``embedding``.
        inputs: Size of one input factor: features, channels a group x kernel, or table length.
        outputs: Size of one output factor: features, or channels a group.
        groups: Number of separate blocks.
        kernel: Kernel sizes.
        stride: Strides.
        padding: Entries before and after each position axis, last axis first, as `F.pad` takes them.
        dilation: Dilations.
        padding_mode: As `torch.nn.functional.pad` names it.
    """

    kind: str
    inputs: int
    outputs: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "constant"

    @staticmethod
    def of(module: nn.Module) -> Layer | None:
        """Describe a module, or return None for classes that have no Kronecker form here.

        Args:
            module: Any leaf module.
        """
        if type(module) is nn.Linear:
            return Layer("linear", module.in_features, module.out_features)
        if type(module) is nn.Embedding and not module.sparse and module.max_norm is None:
            return Layer("embedding", module.num_embeddings, module.embedding_dim)
        if type(module) in CONVOLUTIONS:
            return _conv(module)  # type: ignore[arg-type]
        return None

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of the input factor: ``[groups, n, n]``, of an embedding the diagonal ``[n]``."""
        return (self.inputs,) if self.kind == "embedding" else (self.groups, self.inputs, self.inputs)

    def output_shape(self) -> tuple[int, ...]:
        """Return the shape of the output factor, ``[groups, n, n]``."""
        return (self.groups, self.outputs, self.outputs)


def _conv(module: nn.Conv2d) -> Layer:
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        if module.padding == "same":  # the extra element goes behind, as in torch
            total = dilation[axis] * (kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            size = 0 if module.padding == "valid" else module.padding[axis]
            pads += [int(size), int(size)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = module.in_channels // module.groups
    for size in kernel:
        inputs *= size
    return Layer(
        "conv",
        inputs,
        module.out_channels // module.groups,
        module.groups,
        kernel,
        tuple(module.stride),
        tuple(pads),
        dilation,
        mode,
    )


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """Lay a layer's input out as rows that its weight multiplies.

    Args:
        layer: The layer.
        x: Its input: ``[..., features]``, or ``[batch, channels, *positions]``.

    Returns:
        ``[groups, rows, n]``; rows run over batch and positions.
    """
    if layer.kind == "linear":
        return x.reshape(1, -1, layer.inputs)
    rank = len(layer.kernel)
    if x.dim() == rank + 1:
        x = x.unsqueeze(0)
    if any(layer.padding):
        x = F.pad(x, layer.padding, layer.padding_mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    # [batch, groups, channels, *positions, *kernel]
    x = x.unflatten(1, (layer.groups, -1))  # type: ignore[no-untyped-call]
    order = [1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank)]
    return x.permute(order).reshape(layer.groups, -1, layer.inputs)


def output_rows(layer: Layer, g: Tensor) -> Tensor:
    """Lay the gradient of a layer's output out as rows.

    Args:
        layer: The layer.
        g: Gradient with the shape of the output.

    Returns:
        ``[groups, rows, n]``.
    """
    if layer.kind != "conv":
        return g.reshape(1, -1, layer.outputs)
    rank = len(layer.kernel)
    if g.dim() == rank + 1:
        g = g.unsqueeze(0)
    g = g.unflatten(1, (layer.groups, -1))  # type: ignore[no-untyped-call]
    return g.permute(1, 0, *range(3, 3 + rank), 2).reshape(layer.groups, -1, layer.outputs)


def gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum of r r^T`` for every group, in the precision of the factors, out of autocast's reach.

    Args:
        rows: ``[groups, rows, n]``.
        dtype: Precision of the factor.
    """
    rows = rows.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.transpose(1, 2) @ rows


def factor_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision of a parameter's factors: double for double, single for all else.

    Args:
        parameter: The parameter.
    """
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
