"""A training run as a function of an optimizer's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from mupass._errors import StudyError
from mupass._hyper.functional_model import call, derivatives
from mupass._hyper.rules import Key, Moment, Rule, State, Tensors
from mupass._runs.batches import Batch, Loss
from mupass._runs.jobs import Evaluate, Work, diverged
from mupass._walks import walk


@contextmanager
def twice() -> Iterator[None]:
    """Let second derivatives through, and say by name what has none.

    Raises:
        StudyError: An operator has no second derivative.
    """
    # What torch says where a second derivative is missing.
    phrases = ("derivative for", "does not support", "not implemented", "not differentiable")
    with derivatives("second derivative, which hypergradients need", phrases, StudyError):
        yield


def gradients(
    loss: Tensor, parameters: Tensors, watched: Sequence[Tensor] = ()
) -> tuple[Tensors, list[Tensor | None]]:
    """Return gradients that can be differentiated.

    Args:
        loss: The loss.
        parameters: The parameters.
        watched: Other tensors that the loss may depend on.

    Returns:
        Gradients by parameter, without what the loss does not depend on, and those of the other tensors.
    """
    # create_graph: the step is differentiated in turn.
    inputs = [*parameters.values(), *watched]
    slopes = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    named = {name: slope for name, slope in zip(parameters, slopes, strict=False) if slope is not None}
    return named, list(slopes[len(parameters) :])


def refuse_once(gradients: Iterable[Tensor]) -> None:
    """Raise where a function of the model is marked as differentiable once.

    Autograd leaves its path out without a word when it is asked for derivatives by given inputs.

    Args:
        gradients: Gradients of the loss, with their graph.

    Raises:
        StudyError: One is.
    """
    # The graph of the gradients; a tensor without a derivative has None for its node.
    starts = [gradient.grad_fn for gradient in gradients]
    for node in walk(starts, lambda node: [source for source, _ in node.next_functions] if node else []):
        # once_differentiable leaves a node of this name in the graph.
        if node is not None and node.name().endswith("Error"):
            raise StudyError(
                "an autograd function of the model has no second derivative, which hypergradients need: it "
                "is marked with @once_differentiable"
            )


def refuse_buffers(before: Tensors, after: Tensors) -> None:
    """Raise where a buffer follows the activations but not in a way that autograd sees.

    Args:
        before: Buffers before a forward pass.
        after: The same afterwards.

    Raises:
        StudyError: One does.
    """
    for name, buffer in after.items():
        # Counts are no real numbers, and buffers that autograd follows have a derivative.
        real = buffer.is_floating_point() and not buffer.requires_grad
        if real and not torch.equal(buffer, before[name]):
            raise StudyError(
                f"the buffer {name} changes in the forward pass without a derivative, so hypergradients "
                "would miss what depends on it; update it outside of torch.no_grad and without detach"
            )


@dataclass(frozen=True)
class Unrolled:
    """A training run as a function of numbers of the optimizer.

    Attributes:
        work: Batches, loss, steps and score.
        model: The model with its initial weights, which is not changed.
        rule: How the optimizer steps.
    """

    work: Work
    model: nn.Module
    rule: Rule

    def score(self, numbers: Mapping[Key, Tensor], cut: bool) -> Tensor | None:
        """Train, and return the score as `Work.run` defines it, or None when the run diverged.

        Args:
            numbers: Entries of groups, that require gradients or carry tangents.
            cut: Whether only tangents are kept from step to step: the graph of one step is freed at the next.
        """
        work, model = self.work, self.model
        parameters = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        buffers = dict(model.named_buffers())
        state: State = {}
        losses: list[Tensor] = []
        for count in range(work.steps):
            if cut:
                # Forward mode: values and tangents go on, the graph behind them is let go.
                parameters, buffers, state = tree_map(_seal, (parameters, buffers, state))
            else:
                parameters = {
                    name: parameter if parameter.requires_grad else parameter.requires_grad_()
                    for name, parameter in parameters.items()
                }
            # Norms write into their buffers, and those of the step before belong to its graph.
            before, buffers = buffers, {name: buffer.clone() for name, buffer in buffers.items()}
            batch = work.batches[count % len(work.batches)]
            loss, watched = self.rule.watch(partial(call, model, on(batch, work.loss), buffers), parameters)
            losses.append(loss)
            # A run that diverges has no derivative.
            if diverged(loss.item(), losses[0].item()):
                return None
            slopes, others = gradients(loss, parameters, watched)
            # The graph has the same operators at every step: one look is enough.
            if count == 0:
                refuse_once([*slopes.values(), *(gradient for gradient in others if gradient is not None)])
                refuse_buffers(before, buffers)
            parameters, state = self.rule.step(Moment(count, slopes, numbers, others), parameters, state)
        if work.evaluate is None:
            # The mean over the last tenth of the steps, as in a sweep.
            tail = losses[-max(1, work.steps // 10) :]
            return torch.stack(tail).mean()
        score = score_of(model, work.evaluate, parameters, buffers)
        return score if math.isfinite(score.item()) else None


def score_of(model: nn.Module, evaluate: Evaluate, *tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the score of a model in eval mode.

    Args:
        model: The model.
        evaluate: Score of a model.
        *tensors: Values of its parameters and buffers by name.

    Raises:
        StudyError: The score is no tensor of one number, or does not depend on the parameters.
    """
    # eval() is for the score alone.
    modes = [(module, module.training) for module in model.modules()]
    score = call(model, lambda model: evaluate(model.eval()), *tensors)
    for module, training in modes:
        module.training = training
    if not isinstance(score, Tensor) or score.numel() != 1 or not score.requires_grad:
        raise StudyError(
            "evaluate= must return the score as a tensor of one number that autograd can follow, not "
            f"{type(score).__name__}: no .item(), no torch.no_grad()"
        )
    return score.reshape(())


def on(batch: Batch, loss: Loss) -> Callable[[nn.Module], Tensor]:
    """Return the loss on a batch as a function of the model.

    Args:
        batch: The batch.
        loss: Of output and targets.
    """
    return lambda model: loss(batch.run(model), batch.targets)


def _seal(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    primal, tangent = parts(x)
    primal = primal.detach().requires_grad_()
    return primal if tangent is None else dual(primal, tangent.detach())


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """Return a tensor with a tangent.

    Args:
        primal: The tensor.
        tangent: Its derivative.
    """
    return forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call,no-any-return]


def parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tensor and its tangent, if it has one.

    Args:
        x: The tensor.
    """
    return tuple(forward_ad.unpack_dual(x))  # type: ignore[no-untyped-call,return-value]
