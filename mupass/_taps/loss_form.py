"""What form a loss has, by its gradient: a cross-entropy, over which axis and how many times its mean.

Outputs may be logits, their probabilities or the logarithms of these. Squared errors are told from other
losses as far as gradients tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8  # of a batch that are looked at: the form is exact in every one
ENTRIES = 64  # of outputs of one number each
TINY = 1e-30  # in the place of a probability of zero
FORM = 0.02  # how far entries may be off it, relatively; half precision rounds by less


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


def first_numbers(output: Tensor) -> Tensor | None:
    """Return a copy of the first entries of an output of one number a term, ``[1, entries]``; None of others.

    Args:
        output: Of a model, a vector or with an axis of one class.
    """
    if not output.is_floating_point() or not output.numel():
        return None
    numbers = output.detach().reshape(1, -1)[:, :ENTRIES]
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32), copy=True)


def multiple_of_a_mean(outputs: Tensor, gradient: Tensor, terms: Tensor, classes: bool = True) -> Tensor:
    """Return how many times a mean of cross-entropies a loss is; 0 where it is none of them.

    The mean over T terms has the gradient ``(p - y) / T`` by its logits, with p the softmax and y the class,
    or with p the logistic function of each logit and y of 0 and 1.

    Args:
        outputs: Some terms of the model's output, ``[rows, classes]``, or of numbers, `first_numbers`.
        gradient: Of the loss by these.
        terms: T, a tensor of one number.
        classes: Whether there are several classes.
    """
    multiple = _of_numbers(outputs, gradient)
    if classes:
        multiple = torch.maximum(multiple, _over_classes(outputs, gradient))
    return multiple * terms.to(outputs)


def is_over_classes(outputs: Tensor, gradient: Tensor) -> Tensor:
    """Return whether a loss is a multiple of a cross-entropy over the classes of some rows.

    Args:
        outputs: Rows of the model's output, ``[rows, classes]``.
        gradient: Of the loss by these.
    """
    return _over_classes(outputs, gradient) > 0


def _over_classes(outputs: Tensor, gradient: Tensor) -> Tensor:
    """Return what multiple of ``p - y`` the gradient by the logits of rows is, or 0."""
    gradient = gradient.to(outputs)
    # Terms that the loss leaves out say nothing.
    alive = (gradient != 0).any(-1, keepdim=True)
    multiple = _of_softmax(outputs, gradient, alive)
    # The model ends with log_softmax, or with softmax: the chain rule gives the gradient by the logits.
    p = outputs.exp()
    by_logits = gradient - p * gradient.sum(-1, keepdim=True)
    logs = _of_softmax(outputs, by_logits, alive) * _sums_to_one(p)
    by_logits = outputs * (gradient - (outputs * gradient).sum(-1, keepdim=True))
    positive = (outputs > 0).all()
    probabilities = _of_softmax(outputs.clamp(min=TINY).log(), by_logits, alive) * _sums_to_one(outputs)
    return torch.stack([multiple, logs, probabilities * positive]).amax(0)


def _of_numbers(outputs: Tensor, gradient: Tensor) -> Tensor:
    """Return what multiple of ``p - y`` the gradient by logits of two classes is, or 0."""
    gradient = gradient.to(outputs)
    alive = (gradient != 0).any(-1, keepdim=True)
    multiple = _of_logistic(outputs, gradient, alive)
    # The model ends with a logistic function.
    inside = ((outputs > 0) & (outputs < 1)).all()
    logits = outputs.clamp(TINY, 1 - FORM * FORM).logit()
    return torch.maximum(multiple, _of_logistic(logits, gradient * outputs * (1 - outputs), alive) * inside)


def _sums_to_one(p: Tensor) -> Tensor:
    """Return whether rows are probabilities of classes."""
    return ((p.sum(-1) - 1).abs() < FORM * FORM).all()


def may_be_squared(output: Tensor, gradient: Tensor) -> Tensor:
    """Return whether a loss may be a squared error of its terms, by what its gradient shows; a tensor.

    It is not where the gradient of every term sums to zero, as for all losses of a softmax, or is at a right
    angle to the term, as for all losses of directions (cosines).

    Args:
        output: Some terms of the model's output, ``[rows, entries]``.
        gradient: Of the loss by these.
    """
    gradient = gradient.to(output)
    length = gradient.norm(dim=-1)
    shift = gradient.sum(-1).abs() <= FORM * gradient.abs().sum(-1)
    turn = (gradient * output).sum(-1).abs() <= FORM * length * output.norm(dim=-1)
    # Terms that the loss leaves out say nothing.
    left_out = length == 0
    return ~((shift | left_out).all() | (turn | left_out).all())


def _of_softmax(logits: Tensor, gradient: Tensor, alive: Tensor) -> Tensor:
    """Return what multiple of ``p - y`` a gradient is, with p the softmax and y one class; 0 for none."""
    # The right class is the only one whose logit the loss would have larger.
    classes = torch.zeros_like(logits).scatter_(-1, gradient.argmin(-1, keepdim=True), 1.0)
    softmax = torch.softmax(logits, -1)
    multiple, error = _fitted((softmax - classes) * alive, gradient)
    # The other classes have the softmax itself, which is small where there are many: a squared error of few
    # ones among zeros is told by them.
    others = (1 - classes) * alive
    largest = (softmax * others).amax()
    fits = ((error * others).amax() <= FORM * multiple * largest) & (error.amax() <= FORM * multiple)
    return torch.where(fits, multiple, 0.0)


def _of_logistic(logits: Tensor, gradient: Tensor, alive: Tensor) -> Tensor:
    """Return what multiple of ``p - y`` a gradient is, with p a logistic function and y 0 or 1; else 0."""
    p = torch.sigmoid(logits)
    multiple, error = _fitted((p - (gradient < 0).to(p)) * alive, gradient)
    # Where logits are alike, so are gradients of any loss: the form shows in how they differ.
    spread = torch.where(alive, p, -torch.inf).amax() - torch.where(alive, p, torch.inf).amin()
    return torch.where(error.amax() < FORM * multiple * spread, multiple, 0.0)


def _fitted(form: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiple of a form that is nearest to a gradient, and how far its entries are off."""
    multiple = (form * gradient).sum() / form.square().sum().clamp(min=torch.finfo(form.dtype).tiny)
    # Of nothing, and of what is not finite, no form is told.
    multiple = torch.where(multiple.isfinite() & (multiple > 0), multiple, 0.0)
    return multiple, (gradient - multiple * form).abs()
