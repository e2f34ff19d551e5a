"""Targets drawn from the model's own predictions: the Fisher instead of the empirical Fisher."""

from __future__ import annotations

import torch
from torch import Tensor

from mupass._errors import OptimizerError, kind_of

LOSSES = ("cross_entropy", "bce", "mse")


@torch.no_grad()
def sample_targets(
    output: Tensor, loss: str = "cross_entropy", generator: torch.Generator | None = None
) -> Tensor:
    """Draw targets from the distribution that a loss takes the model's output for.

    The curvature of a loss computed with them is a Monte-Carlo estimate of the Fisher (type 1: one sample),
    where that of the true targets is the empirical Fisher (Kunstner et al., arXiv 1905.12558).

    Args:
        output: Logits ``[batch, classes, ...]`` or ``[classes]`` for ``cross_entropy``, logits of any shape
            for ``bce``, predictions of any shape for ``mse``.
        loss: ``cross_entropy``, ``bce`` (with logits) or ``mse``, whose squared error without a factor 1/2
            is the log likelihood of a Gaussian with variance 1/2.
        generator: Source of randomness.

    Returns:
        Class indices ``[batch, ...]``, or a tensor like ``output``.

    Raises:
        OptimizerError: Unknown loss.

    Example:
        >>> import mupass, torch
        >>> mupass.sample_targets(torch.tensor([[0.0, 100.0], [100.0, 0.0]]))
        tensor([1, 0])
    """
    if not isinstance(output, Tensor):
        raise OptimizerError(
            f"sample_targets takes the outputs of the model, a tensor, not {kind_of(output)}"
        )
    if loss == "cross_entropy":
        classes = output
        if output.dim() > 1:  # [batch, classes, ...] -> [batch, ..., classes]
            classes = output.movedim(1, -1)
        weights = classes.float().softmax(-1)
        drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=generator)
        return drawn.reshape(classes.shape[:-1])
    if loss == "bce":
        return torch.bernoulli(output.float().sigmoid(), generator=generator).to(output.dtype)
    if loss == "mse":
        # exp(-(y - output)^2) is a Gaussian of variance 1/2.
        noise = torch.empty_like(output).normal_(generator=generator)
        return output + noise * 0.5**0.5
    raise OptimizerError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
