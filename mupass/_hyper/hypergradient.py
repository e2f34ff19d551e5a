"""hypergradient: how the score of a training run changes with its hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import Unpack

from mupass._capture.copying import deepcopy
from mupass._errors import StudyError, check_choice
from mupass._hyper.implicit import Solver, SolverKeywords, implicit
from mupass._hyper.numbers import Numbers, read_numbers
from mupass._hyper.rules import Key
from mupass._hyper.run import Unrolled, dual, parts, twice
from mupass._keywords import Keywords, takes
from mupass._runs.batches import Batch, Data, Loss, cross_entropy, move, read_batches
from mupass._runs.checks import check_counts, check_functions, check_point
from mupass._runs.copies import Copies
from mupass._runs.jobs import Evaluate, Work
from mupass._runs.plain import is_transformed
from mupass._runs.recipes import Make, check_names, recipe
from mupass._runs.tabular import Tabular
from mupass._scales.plan import plan_of
from mupass._transform import transform

FORMS = ("unrolled", "implicit")
MODES = ("reverse", "forward")


@dataclass(frozen=True)
class GroupGradient:
    """Derivative by one number of one parameter group.

    Attributes:
        parameters: The group's members.
        entry: Name of the number: ``lr``, ``momentum``, ...
        value: The number.
        gradient: Derivative of the score by it.
    """

    parameters: tuple[str, ...]
    entry: str
    value: float
    gradient: float


@dataclass(frozen=True)
class HyperGradient(Tabular):
    """Derivative of a score by hyperparameters; prints as a table.

    Attributes:
        loss: The score, infinite when the run diverged.
        point: Hyperparameters by name.
        gradient: Derivative by each; NaN when the run diverged.
        groups: The same for the numbers of every parameter group by itself; empty in forward mode.
        notes: What was made of the model given.
    """

    loss: float
    point: Mapping[str, float]
    gradient: Mapping[str, float]
    groups: tuple[GroupGradient, ...]
    notes: tuple[str, ...] = ()

    @property
    def logarithmic(self) -> dict[str, float]:
        """Derivative by the logarithm of each hyperparameter."""
        # d score / d log h = h d score / d h
        return {name: self.point[name] * derivative for name, derivative in self.gradient.items()}

    def verdict(self) -> str:
        """Return the score and its derivatives by the logarithms of the hyperparameters."""
        slopes = ", ".join(f"{name} {derivative:+.4g}" for name, derivative in self.logarithmic.items())
        return f"score {self.loss:.6g}; by the logarithm of {slopes}"

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each number of a group; in forward mode for each hyperparameter."""
        if not self.groups:
            return [
                {"entry": name, "value": self.point[name], "gradient": gradient}
                for name, gradient in self.gradient.items()
            ]
        return [
            {
                "entry": number.entry,
                "value": number.value,
                "gradient": number.gradient,
                "parameters": " ".join(number.parameters),
            }
            for number in self.groups
        ]

    def _tables(self) -> list[str]:
        return [f"<pre>{escape(str(self))}</pre>"]

    def __str__(self) -> str:
        """Return the score, and one line for each hyperparameter and each number of a group."""
        lines = [f"score {self.loss:.6g}"]
        for name, slope in self.gradient.items():
            lines.append(
                f"{name} = {self.point[name]:.4g}: d score / d {name} {slope:+.4g}, by its logarithm "
                f"{self.logarithmic[name]:+.4g}"
            )
        for group in self.groups:
            members = ", ".join(group.parameters[:3])
            if len(group.parameters) > 3:
                members += ", ..."
            logarithmic = group.value * group.gradient
            lines.append(
                f"  {group.entry} = {group.value:.4g} of {members}: by its logarithm {logarithmic:+.4g}"
            )
        return "\n".join([*lines, *self.notes])


@takes(SolverKeywords, Solver)
def hypergradient(
    model: nn.Module,
    data: Data,
    point: Mapping[str, float],
    *,
    loss: Loss = cross_entropy,
    optimizer: str | Make = "adam",
    steps: int = 20,
    evaluate: Evaluate | None = None,
    form: str = "unrolled",
    mode: str = "reverse",
    seed: int = 0,
    **options: Unpack[SolverKeywords],
) -> HyperGradient:
    """Differentiate the score of a training run by its hyperparameters.

    ``unrolled`` differentiates through ``steps`` steps of the optimizer from the model's initial weights:
    learning rate, momentum, betas, epsilon, weight decay and damping, one by one for every parameter group.
    ``implicit`` takes a model that is trained to a stationary point, and differentiates that point by what
    enters it, weight decay. Derivatives are exact in both; what is random in the model is drawn alike at
    every call.

    Args:
        model: A transformed model, which is not changed. In its precision everything is computed. Of one that
            is not transformed a copy is, with the default base width, and the result says so.
        data: As for `mupass.sweep`; for ``implicit`` all batches, which together are the training loss.
        point: Hyperparameters by name, as `optimizer` takes them.
        loss: As for `mupass.sweep`.
        optimizer: As for `mupass.sweep`; `torch.optim.SGD`, Adam, AdamW, `mupass.Shampoo` and
            `mupass.KFAC` are known.
        steps: Number of steps that are differentiated through.
        evaluate: Score of the trained model (a validation loss): a function of the model in eval mode that
            returns a tensor of one number. If left out the mean training loss over the last tenth of the
            steps.
        form: ``unrolled`` or ``implicit``.
        mode: ``reverse`` keeps all steps in memory and gives all derivatives at once; ``forward`` keeps one
            step and takes one run for each hyperparameter.
        solver: For ``implicit``: ``cg`` or ``neumann``.
        terms: For ``implicit``: largest number of products with the Hessian.
        tolerance: For ``implicit``: how far from stationary the model, and from exact the solution, may be.
        seed: Seed of what is random in the model.

    Returns:
        The score and its derivatives.

    Raises:
        StudyError: An optimizer, option or hyperparameter that cannot be differentiated by; an operator
            without second derivative; a score that is no tensor; a model that is not at a stationary point.
        MupassError: The model cannot be transformed.

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> data = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(2)]
        >>> found = mupass.hypergradient(net, data, {"lr": 0.01}, optimizer="adam", steps=3)
        >>> list(found.logarithmic)
        ['lr']
    """
    solver = Keywords(hypergradient, options, StudyError).record(Solver)
    check_choice(StudyError, "form", form, FORMS)
    check_choice(StudyError, "mode", mode, MODES)
    check_counts(steps=steps)
    check_functions(loss=loss, evaluate=evaluate)
    check_point(point)
    notes: tuple[str, ...] = ()
    if not is_transformed(model):
        # A batch of the data tells the model's input.
        model = transform(model, read_batches(data, 1)[0].inputs, inplace=False)
        base = plan_of(model)[1].base_width
        notes = (f"the model given is not transformed: a copy was, under mup with base width {base:g}",)
    plan = plan_of(model)[1]
    make = recipe(optimizer)
    check_names(make, point)
    # A stationary point is one of the whole data, however many batches that is.
    batches = read_batches(data, steps if form == "unrolled" else 1 << 30)
    device = next(model.parameters()).device
    # The run changes buffers and taps: it has a copy of its own.
    trained = deepcopy(model)
    copies = Copies((plan.width,), (trained,), trained)
    work = Work(copies, [move(batch, device, None) for batch in batches], loss, make, steps, evaluate)
    # Data that the model does not take is told before anything is differentiated.
    _try(deepcopy(trained), work.batches[0])
    if form == "unrolled":
        return replace(unrolled(work, trained, dict(point), mode, seed), notes=notes)
    if evaluate is None:
        raise StudyError("form='implicit' needs evaluate=: at a minimum the training loss does not change")
    numbers = read_numbers(work.make, trained, point)
    with twice(), torch.random.fork_rng():
        torch.manual_seed(seed)
        score, slopes = implicit(trained, work.batches, loss, numbers.rule, numbers.values, evaluate, solver)
    return replace(_result(score, dict(point), numbers, slopes), notes=notes)


def unrolled(work: Work, model: nn.Module, point: Mapping[str, float], mode: str, seed: int) -> HyperGradient:
    """Differentiate through a run.

    Args:
        work: Batches, loss, steps and score.
        model: A copy for this run alone.
        point: Hyperparameters by name.
        mode: ``reverse`` or ``forward``.
        seed: Seed of what is random in the model.
    """
    numbers = read_numbers(work.make, model, point)
    run = Unrolled(work, model, numbers.rule)
    with twice(), torch.random.fork_rng():
        if mode == "forward":
            return _forward(run, numbers, point, seed)
        torch.manual_seed(seed)
        # Derivatives by the entries of groups, all at once; the chain rule does the rest.
        leaves = {key: _number(value).requires_grad_() for key, value in numbers.values.items()}
        score = run.score(leaves, cut=False)
        if score is None:
            return _diverged(point)
        slopes = torch.autograd.grad(score, list(leaves.values()), materialize_grads=True)
        by_number = {key: slope.item() for key, slope in zip(leaves, slopes, strict=True)}
    return _result(score.item(), point, numbers, by_number)


def _forward(run: Unrolled, numbers: Numbers, point: Mapping[str, float], seed: int) -> HyperGradient:
    gradient: dict[str, float] = {}
    # One run for each hyperparameter, whose tangent goes along all steps.
    for name, slopes in numbers.slopes.items():
        torch.manual_seed(seed)
        with forward_ad.dual_level():
            duals = {
                key: dual(_number(value), _number(slopes.get(key, 0.0)))
                for key, value in numbers.values.items()
            }
            score = run.score(duals, cut=True)
            if score is None:
                return _diverged(point)
            primal, tangent = parts(score)
            gradient[name] = 0.0 if tangent is None else tangent.item()
    return HyperGradient(primal.item(), point, gradient, ())


def _result(
    score: float, point: Mapping[str, float], numbers: Numbers, by_number: Mapping[Key, float]
) -> HyperGradient:
    # Chain rule: entries of groups by the hyperparameters that set them.
    gradient = {
        name: math.fsum(slope * by_number[key] for key, slope in slopes.items())
        for name, slopes in numbers.slopes.items()
    }
    members = numbers.rule.members
    groups = tuple(
        GroupGradient(tuple(members[group]), key, numbers.values[group, key], derivative)
        for (group, key), derivative in by_number.items()
    )
    return HyperGradient(score, point, gradient, groups)


def _diverged(point: Mapping[str, float]) -> HyperGradient:
    return HyperGradient(math.inf, point, dict.fromkeys(point, math.nan), ())


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _try(model: nn.Module, batch: Batch) -> None:
    """Refuse data that the model does not take.

    Raises:
        StudyError: It fails on the first batch.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng():
            batch.run(model)
    except Exception as error:
        raise StudyError(f"the model fails on the first batch: {error}") from error
