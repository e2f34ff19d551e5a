"""Implicit form: how the point that training stays at moves with what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mupass._hyper.functional_model import call
from mupass._hyper.rules import SGD, Key, Rule
from mupass._hyper.run import gradients, on, refuse_once, score_of
from mupass._study.batches import Batch, Loss, StudyError
from mupass._study.jobs import Evaluate

SOLVERS = ("cg", "neumann")
Vector = list[Tensor]
Product = Callable[[Vector], Vector]


def implicit(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss,
    rule: Rule,
    numbers: Mapping[Key, float],
    evaluate: Evaluate,
    *,
    solver: str,
    terms: int,
    tolerance: float,
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
        solver: One of `SOLVERS`.
        terms: Largest number of products with the Hessian.
        tolerance: Largest norm of F relative to its parts, and of what the solver leaves of the right side.

    Returns:
        The score and its derivatives.

    Raises:
        StudyError: The optimizer's stationary point is not known, or a number does not enter it, or the model
            is not there, or the solver does not converge.
    """
    if solver not in SOLVERS:
        raise StudyError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if not isinstance(rule, SGD):
        raise StudyError(
            "form='implicit' knows the stationary point of torch.optim.SGD alone; use form='unrolled'"
        )
    still = sorted({key for _, key in numbers if key != "weight_decay"})
    if still:
        raise StudyError(
            f"{', '.join(still)}: the stationary point of SGD does not depend on it, so its implicit "
            "hypergradient is zero; only weight_decay enters. Use form='unrolled'"
        )
    group_of = {name: i for i, members in enumerate(rule.members) for name in members}
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    decay = [rule.groups[group_of[name]]["weight_decay"] for name in weights]
    flat = list(weights.values())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    parts = [call(model, on(batch, loss), weights, buffers) for batch in batches]
    found, _ = gradients(torch.stack(parts).mean(), weights)
    refuse_once(found.values())
    moved = next((n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])), None)
    if moved is not None:
        raise StudyError(
            f"the buffer {moved} follows the activations, which form='implicit' does not differentiate; put "
            "the model in eval mode, or use form='unrolled'"
        )
    slopes = [found.get(name, torch.zeros_like(p)) for name, p in weights.items()]
    force = [g.detach() + d * p.detach() for g, d, p in zip(slopes, decay, flat, strict=True)]
    size = norm([d * p.detach() for d, p in zip(decay, flat, strict=True)])
    if not norm(force) <= tolerance * size:
        raise StudyError(
            f"the model is not at a stationary point: the gradient of loss and weight decay has the norm "
            f"{norm(force):.2g}, that of weight decay alone {size:.2g}; train it further, or raise tolerance="
        )
    score = score_of(model, evaluate, weights, buffers)
    right = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(flat, torch.autograd.grad(score, flat, allow_unused=True), strict=True)
    ]

    def product(v: Vector) -> Vector:
        """Return ``(Hessian + weight decay) v``."""
        hv = torch.autograd.grad(slopes, flat, v, retain_graph=True, allow_unused=True)
        return [d * x if h is None else h + d * x for h, d, x in zip(hv, decay, v, strict=True)]

    if solver == "cg":
        v = conjugate_gradients(product, right, terms, tolerance)
    else:
        rates = [rule.groups[group_of[name]]["lr"] for name in weights]
        v = neumann(product, right, rates, terms, tolerance)
    by_number = dict.fromkeys(numbers, 0.0)
    for name, x, p in zip(weights, v, flat, strict=True):
        key = (group_of[name], "weight_decay")
        if key in by_number:
            by_number[key] -= float((x * p.detach()).sum())
    return score.item(), by_number


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
    x = [torch.zeros_like(b) for b in right]
    residual, direction = list(right), list(right)
    square, wanted = dot(residual, residual), tolerance * norm(right)
    for _ in range(terms):
        if square**0.5 <= wanted:
            return x
        image = product(direction)
        bend = dot(direction, image)
        if bend <= 0:
            raise StudyError(
                "the Hessian with weight decay has a direction of negative curvature: this is no minimum; "
                "train further, or use form='unrolled'"
            )
        step = square / bend
        x = add(x, direction, step)
        residual = add(residual, image, -step)
        square, before = dot(residual, residual), square
        direction = add(residual, direction, square / before)
    if square**0.5 <= wanted:
        return x
    raise StudyError(
        f"conjugate gradients leave {square**0.5 / norm(right):.1e} after {terms} terms; allow more terms"
    )


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
    x, residual, size = [torch.zeros_like(b) for b in right], list(right), norm(right)
    for _ in range(terms):
        if norm(residual) <= tolerance * size:
            return x
        x = [a + rate * r for a, r, rate in zip(x, residual, rates, strict=True)]
        residual = add(right, product(x), -1.0)
        if not norm(residual) <= 1e3 * size:
            raise StudyError(
                "the Neumann series diverges: its learning rate is beyond 2 / curvature; take a smaller lr"
            )
    if norm(residual) <= tolerance * size:
        return x
    raise StudyError(
        f"the Neumann series leaves {norm(residual) / size:.1e} after {terms} terms; allow more, or cg"
    )


def add(x: Vector, y: Vector, factor: float) -> Vector:
    """Return ``x + factor y``.

    Args:
        x: Tensors.
        y: Tensors of the same shapes.
        factor: The factor.
    """
    return [a + factor * b for a, b in zip(x, y, strict=True)]


def dot(x: Vector, y: Vector) -> float:
    """Return the inner product.

    Args:
        x: Tensors.
        y: Tensors of the same shapes.
    """
    return sum(float((a * b).sum()) for a, b in zip(x, y, strict=True))


def norm(x: Vector) -> float:
    """Return the Euclidean norm.

    Args:
        x: Tensors.
    """
    return float(dot(x, x) ** 0.5)
