"""Whether a loss is a cross-entropy that is summed instead of averaged: its gradient by the outputs tells."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8  # of a batch that are looked at: the form is exact in every one
FORM = 0.02  # how far entries may be off it, relative to the largest one; half precision rounds by less


def first_rows(output: Tensor, class_axis: int) -> Tensor | None:
    """Return a copy of the first terms of an output, ``[rows, classes]``; None if it has none, or no classes.

    Args:
        output: Of a model.
        class_axis: Its axis that counts classes.
    """
    if (
        output.dim() < 2
        or output.shape[class_axis] < 2
        or not output.is_floating_point()
        or not output.numel()
    ):
        return None
    rows = output.detach().movedim(class_axis, -1).reshape(-1, output.shape[class_axis])[:ROWS]
    return rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)


def multiple_of_a_mean(logits: Tensor, gradient: Tensor, terms: Tensor) -> Tensor:
    """Return how many times a mean of cross-entropies a loss is; 0 where it is none of them.

    The mean over T terms has the gradient ``(p - y) / T`` by its logits, with p the softmax and y the class,
    or with p the logistic function of each logit and y of 0 and 1.

    Args:
        logits: Some terms of the model's output, ``[rows, classes]``.
        gradient: Of the loss by these.
        terms: T, a tensor of one number.
    """
    gradient = gradient.to(logits)
    # Terms that the loss leaves out say nothing.
    alive = (gradient != 0).any(-1, keepdim=True)
    # The right class is the only one whose logit the loss would have larger.
    classes = torch.zeros_like(logits).scatter_(-1, gradient.argmin(-1, keepdim=True), 1.0)
    softmax = _multiple(torch.softmax(logits, -1) - classes, gradient, alive)
    binary = _multiple(torch.sigmoid(logits) - (gradient < 0).to(logits), gradient, alive)
    return torch.maximum(softmax, binary) * terms.to(logits)


def _multiple(form: Tensor, gradient: Tensor, alive: Tensor) -> Tensor:
    """Return what a gradient is a multiple of its form by, or 0 where it has another form."""
    form = form * alive
    multiple = (form * gradient).sum() / form.square().sum().clamp(min=torch.finfo(form.dtype).tiny)
    largest = gradient.abs().amax()
    fits = (gradient - multiple * form).abs().amax() <= FORM * largest
    return torch.where(fits & (largest > 0) & multiple.isfinite(), multiple, 0.0)
