"""Implicit form: how the point that training stays at moves with what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from mupass._errors import StudyError, check_choice
from mupass._hyper.functional_model import call
from mupass._hyper.rules import SGD, Key, Rule, Tensors
from mupass._hyper.run import on, refuse_once, score_of
from mupass._runs.batches import Batch, Loss
from mupass._runs.jobs import Evaluate

SOLVERS = ("cg", "neumann")
Vector = list[Tensor]
Product = Callable[[Vector], Vector]


class SolverKeywords(TypedDict, total=False):
    """Keywords of `mupass.hypergradient` that `Solver` holds, for type checkers and editors."""

    solver: str
    terms: int
    tolerance: float


@dataclass(frozen=True)
class Solver:
    """How the linear system of an implicit hypergradient is solved.

    Attributes:
        solver: One of `SOLVERS`.
        terms: Largest number of products with the Hessian.
        tolerance: Largest norm of F relative to its parts, and of what the solver leaves of the right side.

    Raises:
        StudyError: An unknown solver.
    """

    solver: str = "cg"
    terms: int = 1000
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_choice(StudyError, "solver", self.solver, SOLVERS)


def implicit(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    rule: Rule,
    numbers: Mapping[Key, float],
    evaluate: Evaluate,
    solver: Solver,
) -> tuple[float, dict[Key, float]]:
    """Differentiate the score at a stationary point by the numbers that enter it.

    SGD stays where ``F = mean gradient + weight_decay * parameters`` is zero, with any learning rate and
    momentum. There ``d score / d weight_decay = -v . parameters``, ``(Hessian + weight_decay) v = d score``
    (implicit function theorem; Lorraine et al., arXiv 1911.02590, algorithm 3). ``cg`` solves for v by
    conjugate gradients, ``neumann`` by ``v = lr sum_j (1 - lr Hessian)^j d score``: what unrolling so many
    steps of gradient descent at that point would give.

    Args:
        model: The trained model.
        batches: The whole training data.
        loss: Training loss.
        rule: How the optimizer steps.
        numbers: Entries of groups by which to differentiate.
        evaluate: Score of the model.
        solver: How v is solved for.

    Returns:
        The score and its derivatives.

    Raises:
        StudyError: The optimizer's stationary point is not known, or a number does not enter it, or the model
            is not there, or the solver does not converge.
    """
    _refuse_numbers(rule, numbers)
    # Leaves of their own, so that the model keeps its parameters.
    weights = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    slopes = _mean_gradient(model, batches, loss, weights, buffers)
    group_of = {}
    for number, members in enumerate(rule.members):
        group_of.update(dict.fromkeys(members, number))
    groups = [rule.groups[group_of[name]] for name in weights]
    decay = [group["weight_decay"] for group in groups]
    flat = list(weights.values())
    # weight_decay * parameters, the other half of the balance at a stationary point.
    pull = [factor * weight.detach() for factor, weight in zip(decay, flat, strict=True)]
    _check_stationary([slope.detach() for slope in slopes], pull, solver.tolerance)
    score = score_of(model, evaluate, weights, buffers)
    # The right side of (Hessian + weight_decay) v = d score.
    # Zeros in the place of gradients that are not there would require a gradient themselves.
    right = [slope.detach() for slope in torch.autograd.grad(score, flat, materialize_grads=True)]

    def product(vector: Vector) -> Vector:
        """Return ``(Hessian + weight_decay) vector``."""
        # Hessian times vector, as the gradient of <gradient, vector>.
        images = torch.autograd.grad(slopes, flat, vector, retain_graph=True, materialize_grads=True)
        return [
            image.detach() + factor * part for image, factor, part in zip(images, decay, vector, strict=True)
        ]

    if solver.solver == "cg":
        solution = conjugate_gradients(product, right, solver.terms, solver.tolerance)
    else:
        rates = [group["lr"] for group in groups]
        solution = neumann(product, right, rates, solver.terms, solver.tolerance)
    # d score / d weight_decay = -v . parameters, group by group
    by_number = dict.fromkeys(numbers, 0.0)
    for name, part, weight in zip(weights, solution, flat, strict=True):
        key = (group_of[name], "weight_decay")
        if key in by_number:
            by_number[key] -= float((part * weight.detach()).sum())
    return score.item(), by_number


def _refuse_numbers(rule: Rule, numbers: Mapping[Key, float]) -> None:
    """Refuse optimizers whose stationary point is not known, and numbers that do not enter it."""
    if not isinstance(rule, SGD):
        raise StudyError(
            "form='implicit' knows the stationary point of torch.optim.SGD alone; use form='unrolled'"
        )
    refused = sorted({entry for _, entry in numbers if entry != "weight_decay"})
    if refused:
        raise StudyError(
            f"{', '.join(refused)}: the stationary point of SGD does not depend on it, so its implicit "
            "hypergradient is zero; only weight_decay enters. Use form='unrolled'"
        )


def _mean_gradient(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, weights: Tensors, buffers: Tensors
) -> Vector:
    """Return the gradient of the training loss, which can be differentiated once more."""
    losses = [call(model, on(batch, loss), weights, buffers) for batch in batches]
    slopes = torch.autograd.grad(
        torch.stack(losses).mean(), list(weights.values()), create_graph=True, materialize_grads=True
    )
    refuse_once(slopes)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise StudyError(
                f"the buffer {name} follows the activations, which form='implicit' does not differentiate; "
                "put the model in eval mode, or use form='unrolled'"
            )
    return list(slopes)


def _check_stationary(slopes: Vector, pull: Vector, tolerance: float) -> None:
    """Refuse a model at which the gradient of the loss and weight decay do not cancel."""
    force, size = norm(add(slopes, pull, 1.0)), norm(pull)
    if not force <= tolerance * size:
        raise StudyError(
            f"the model is not at a stationary point: the gradient of loss and weight decay has the norm "
            f"{force:.2g}, that of weight decay alone {size:.2g}; train it further, or raise tolerance="
        )


def conjugate_gradients(product: Product, right: Vector, terms: int, tolerance: float) -> Vector:
    """Solve with a symmetric positive definite matrix.

    Args:
        product: Multiplies by it.
        right: The right side.
        terms: Largest number of products.
        tolerance: Of the residual, relative to the right side.

    Raises:
        StudyError: A direction of negative curvature, or not enough terms.
    """
    x = [torch.zeros_like(part) for part in right]
    residual, direction = list(right), list(right)
    square, target = dot(residual, residual), tolerance * norm(right)
    for _ in range(terms):
        if square**0.5 <= target:
            break
        image = product(direction)
        curvature = dot(direction, image)
        if curvature <= 0:
            raise StudyError(
                "the Hessian with weight decay has a direction of negative curvature: this is no minimum; "
                "train further, or use form='unrolled'"
            )
        # Hestenes and Stiefel (1952): the exact step along each of a set of conjugate directions.
        step = square / curvature
        x = add(x, direction, step)
        residual = add(residual, image, -step)
        square, before = dot(residual, residual), square
        direction = add(residual, direction, square / before)
    if not square**0.5 <= target:
        raise StudyError(
            f"conjugate gradients leave {square**0.5 / norm(right):.1e} after {terms} terms; allow more terms"
        )
    return x


def neumann(product: Product, right: Vector, rates: Sequence[float], terms: int, tolerance: float) -> Vector:
    """Sum ``sum_j (1 - R M)^j R right``, with R the learning rates: ``M^-1 right`` where it converges.

    Args:
        product: Multiplies by M.
        right: The right side.
        rates: Learning rate of each tensor.
        terms: Largest number of terms.
        tolerance: Of the residual, relative to the right side.

    Raises:
        StudyError: The series diverges, or has not converged.
    """
    x = [torch.zeros_like(part) for part in right]
    residual, size = list(right), norm(right)
    for _ in range(terms):
        if norm(residual) <= tolerance * size:
            break
        # x <- x + R (right - M x)
        x = [part + rate * left for part, left, rate in zip(x, residual, rates, strict=True)]
        residual = add(right, product(x), -1.0)
        # What is left grows instead of shrinking.
        if not norm(residual) <= 1e3 * size:
            raise StudyError(
                "the Neumann series diverges: its learning rate is beyond 2 / curvature; take a smaller lr"
            )
    if not norm(residual) <= tolerance * size:
        raise StudyError(
            f"the Neumann series leaves {norm(residual) / size:.1e} after {terms} terms; allow more, or cg"
        )
    return x


def add(x: Vector, y: Vector, factor: float) -> Vector:
    """Return ``x + factor y``.

    Args:
        x: Tensors.
        y: Tensors of the same shapes.
        factor: The factor.
    """
    return [first + factor * second for first, second in zip(x, y, strict=True)]


def dot(x: Vector, y: Vector) -> float:
    """Return the inner product.

    Args:
        x: Tensors.
        y: Tensors of the same shapes.
    """
    return sum(float((first * second).sum()) for first, second in zip(x, y, strict=True))


def norm(x: Vector) -> float:
    """Return the Euclidean norm.

    Args:
        x: Tensors.
    """
    return float(dot(x, x) ** 0.5)
