"""Running averages of batch normalization, as functions of what they average."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RunningAverages(TorchFunctionMode):
    """While active, `F.batch_norm` leaves and takes running averages that autograd can follow.

    The library's own are constants, and a score in eval mode depends on the parameters through them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


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
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)
    if not training:
        shape = [1, -1, *[1] * (input.dim() - 2)]
        out = (input - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape)
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)
    axes = [i for i in range(input.dim()) if i != 1]
    variance, mean = torch.var_mean(input, axes)
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * variance)
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
