"""Descent: search by hypergradients, from several starts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mupass._errors import StudyError
from mupass._hyper.hypergradient import unrolled
from mupass._runs.fingerprint import digest
from mupass._runs.jobs import Job, quiet
from mupass._runs.store import Store
from mupass._study.sweep import Study
from mupass._study.trials import Point, Trial, mean

CLOSE = 0.05  # a step of so few natural logarithms ends a descent
OF_ONE = ("momentum", "beta1", "beta2")  # searched by the logarithm of what they lack to 1


def descend(
    study: Study, bounds: Mapping[str, Sequence[float]], trials: int, seeds: int, store: Store
) -> Iterator[Trial]:
    """Follow derivatives to a minimum from the middle of the bounds, then from other values of the first.

    The loss of a run is rugged at large steps, so that one descent may end beside a lower valley. Those that
    follow begin at 1/4, 3/4, 1/8, ... of the first hyperparameter's bounds (lr, in the usual order).

    Args:
        study: The study, whose first width is searched.
        bounds: Smallest and largest value by name.
        trials: Number of points.
        seeds: Number of initializations of each point.
        store: Where results are kept.

    Raises:
        StudyError: A bound of momentum that is not below 1, or a derivative that is not finite.
    """
    for name in OF_ONE:
        if max(bounds.get(name, [0.0])) >= 1:
            raise StudyError(f"grid[{name!r}] must be below 1")
    # Coordinates are logarithms, of which the bounds are a box too.
    low = torch.tensor([to(name, min(values)) for name, values in bounds.items()]).double()
    high = torch.tensor([to(name, max(values)) for name, values in bounds.items()]).double()
    search = _Search(study, list(bounds), low, high, seeds, store)
    trials_left = trials
    for number in itertools.count(1):
        start = (low + high) / 2
        start[0] = low[0] + (high[0] - low[0]) * _fraction(number)
        for runs in search.descend(start, trials_left):
            yield from runs
            trials_left -= 1
        if not trials_left:
            return


@dataclass(frozen=True)
class _Search:
    """What all descents share; vectors are coordinates in the order of the names."""

    study: Study
    names: list[str]
    low: Tensor
    high: Tensor
    seeds: int
    store: Store

    def descend(self, x: Tensor, trials: int) -> Iterator[list[Trial]]:
        """Follow derivatives by a quasi-Newton method (BFGS), one point for each step.

        Coordinates are logarithms. The first step is a quarter of the bounds in each, and none is longer.
        Where a run diverges, or is worse than the best one with derivatives that point further away, the next
        point lies half of the way back to the best one.

        Args:
            x: Where to begin.
            trials: Largest number of points.
        """
        longest = (self.high - self.low) / 4
        # Until a run ends well the best is the lowest learning rate: a start that diverges steps towards it.
        best = x.clone()
        best[0] = self.low[0]
        lowest, slope, inverse = math.inf, torch.zeros_like(x), torch.eye(len(x)).double()
        for _ in range(trials):
            runs, loss, slope_here = self._measure(x)
            yield runs
            displacement = x - best
            # A run that diverged, or a worse one whose derivatives point away from the best: halfway back.
            if math.isinf(loss) or (loss >= lowest and slope_here @ displacement < 0):
                x = (x + best) / 2
            else:
                if math.isinf(lowest):
                    # The first step is the longest one in every coordinate.
                    inverse = torch.diag(longest / slope_here.abs().clamp(min=1e-12))
                else:
                    inverse = _bfgs(inverse, displacement, slope_here - slope)
                if loss < lowest:
                    best, lowest, slope = x, loss, slope_here
                # A quasi-Newton step from the best point, of at most a quarter of the bounds per coordinate.
                step = inverse @ slope
                excess = max(1.0, float((step.abs() / longest).max()))
                x = (best - step / excess).clamp(self.low, self.high)
            # Steps that hardly move any coordinate have arrived.
            if (x - best).abs().max() < CLOSE:
                return

    def _measure(self, x: Tensor) -> tuple[list[Trial], float, Tensor]:
        """Return the runs of a point, their mean score, and the derivatives of its logarithm."""
        values = map(back, self.names, x.tolist())
        point = tuple(zip(self.names, values, strict=True))
        runs = [_run(self.study, point, seed, self.store) for seed in range(self.seeds)]
        width = self.study.copies.widths[0]
        trials = [Trial(width, point, seed, loss) for seed, (loss, _) in enumerate(runs)]
        return trials, mean([loss for loss, _ in runs]), _slope(point, runs)


def _fraction(index: int) -> float:
    """Return 1/2, 1/4, 3/4, 1/8, 5/8, ... (van der Corput)."""
    return sum((index >> i & 1) / 2 ** (i + 1) for i in range(index.bit_length()))


def _slope(point: Point, runs: Sequence[tuple[float, dict[str, float]]]) -> Tensor:
    """Return the derivatives of the mean log score by the coordinates."""
    slopes = []
    for name, value in point:
        # d log(loss) = d loss / |loss|, averaged over the seeds.
        terms = [1 / (len(runs) * (abs(loss) or 1.0)) * gradient[name] for loss, gradient in runs]
        slopes.append(sum(terms) * chain(name, value))
    return torch.tensor(slopes, dtype=torch.float64)


def _bfgs(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Return the next estimate of the inverse Hessian; where the curvature is negative, a larger one.

    BFGS: ``H <- (I - s y^T / s.y) H (I - y s^T / s.y) + s s^T / s.y`` for a move s that changes the
    derivatives by y.
    """
    curvature = s @ y
    if curvature <= 0:
        return 2 * inverse
    left = torch.eye(len(s)).double() - torch.outer(s, y) / curvature
    return left @ inverse @ left.T + torch.outer(s, s) / curvature


def _run(study: Study, point: Point, seed: int, store: Store) -> tuple[float, dict[str, float]]:
    """Return the score of a run and its derivatives, from the store where it has them."""
    key = digest(study.work.key(Job(0, point, seed), store.kept), "gradient")
    stored_score = store.get(key)
    if stored_score is None:
        started = time.perf_counter()
        with quiet():
            run = unrolled(study.work, study.copies.draw(0, seed), dict(point), "reverse", seed)
        seconds = time.perf_counter() - started
        gradient = dict(run.gradient)
        for name, slope in run.gradient.items():
            if not math.isfinite(slope):
                if math.isfinite(run.loss):
                    raise StudyError(
                        f"the hypergradient is not finite at {dict(point)}, where the loss is {run.loss:.3g}"
                    )
                gradient[name] = 0.0  # of a run that diverged: the search goes back and does not ask for it
        note = {"width": study.copies.widths[0], "seed": seed, **dict(point), "gradient": gradient}
        store.put(key, note, run.loss, seconds)
        return run.loss, gradient
    return stored_score, store.note(key)["gradient"]


def to(name: str, value: float) -> float:
    """Return the coordinate of a hyperparameter.

    Args:
        name: The hyperparameter.
        value: Its value.
    """
    # What momentum lacks to 1 is what scales: 0.9 to 0.99 is as far as 0.99 to 0.999.
    return -math.log1p(-value) if name in OF_ONE else math.log(value)


def back(name: str, coordinate: float) -> float:
    """Return the value that a coordinate stands for.

    Args:
        name: The hyperparameter.
        coordinate: Its coordinate.
    """
    return -math.expm1(-coordinate) if name in OF_ONE else math.exp(coordinate)


def chain(name: str, value: float) -> float:
    """Return the derivative of a value by its coordinate.

    Args:
        name: The hyperparameter.
        value: Its value.
    """
    return 1 - value if name in OF_ONE else value
