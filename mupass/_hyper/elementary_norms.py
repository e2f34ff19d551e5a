"""Normalization layers in elementary operators, whose derivatives are right at every order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Apart(TorchFunctionMode):
    """While active, batch, layer and instance normalization are computed from means and variances.

    Two things are wrong with the library's own for derivatives of derivatives. Their forward derivatives take
    the saved mean and deviation for constants, so that nested duals miss a part of the second derivative
    (torch 2.13 and 2.14). And running averages are constants to autograd, though a score in eval mode depends
    on the parameters through them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return REPLACED.get(function, function)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # Channels stand on axis 1; all other axes are averaged over.
    axes = [i for i in range(input.dim()) if i != 1]
    if running_mean is not None and running_var is not None:
        if not training:
            mean, variance = _along(running_mean, input, axes), _along(running_var, input, axes)
            return _scaled(input, mean, variance, axes, weight, bias, eps)
        variance, mean = torch.var_mean(input, axes)
        _average(running_mean, mean, momentum)
        # As torch: the running variance is the unbiased one, which var_mean gives by default.
        _average(running_var, variance, momentum)
    return _normal(input, axes, axes, weight, bias, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    # The last axes are normalized over; the weight has these.
    count = len(normalized_shape)
    axes = list(range(input.dim() - count, input.dim()))
    return _normal(input, axes, list(range(input.dim() - count)), weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # Each channel of each sample has a mean of its own; gain and bias have one number a channel.
    axes, others = list(range(2, input.dim())), [i for i in range(input.dim()) if i != 1]
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        mean, variance = _along(running_mean, input, others), _along(running_var, input, others)
        return _scaled(input, mean, variance, others, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        variance, mean = torch.var_mean(input, axes)
        # Running averages are those over the samples of the batch.
        _average(running_mean, mean.mean(0), momentum)
        _average(running_var, variance.mean(0), momentum)
    return _normal(input, axes, others, weight, bias, eps)


def _average(running: Tensor, new: Tensor, momentum: float) -> None:
    """Update a running average in place."""
    running.mul_(1 - momentum).add_(momentum * new)


def _normal(
    x: Tensor, axes: list[int], kept: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize over axes; weight and bias have all axes but the kept ones."""
    # With the biased variance.
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return _scaled(x, mean, variance, kept, weight, bias, eps)


def _scaled(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    kept: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + eps) * weight + bias``; weight and bias lack the kept axes."""
    x = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        x = x * _along(weight, x, kept)
    if bias is not None:
        x = x + _along(bias, x, kept)
    return x


def _along(t: Tensor, x: Tensor, kept: list[int]) -> Tensor:
    """Return a tensor with an axis of length 1 where x has a kept one."""
    shape = list(x.shape)
    for axis in kept:
        shape[axis] = 1
    return t.view(shape)


# Functions of torch.nn.functional and the operators behind them, which modules may call.
REPLACED = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
}
