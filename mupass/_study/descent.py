"""Descent: search by hypergradients, from the middle of the bounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from mupass._hyper.hypergradient import unrolled
from mupass._study.batches import StudyError
from mupass._study.jobs import Job, quiet
from mupass._study.store import Store, digest
from mupass._study.sweep import Study
from mupass._study.trials import Trial, mean

GROW, SHRINK = 1.2, 0.5  # of Rprop
CLOSE = 0.02  # a step of so few natural logarithms ends the search
OF_ONE = ("momentum", "beta1", "beta2")  # searched by the logarithm of what they lack to 1
Point = tuple[tuple[str, float], ...]
Vector = dict[str, float]


def descend(
    study: Study, bounds: Mapping[str, Sequence[float]], trials: int, seeds: int, store: Store
) -> Iterator[Trial]:
    """Follow the sign of each derivative with a step of its own (Rprop, Riedmiller & Braun 1993).

    Coordinates are logarithms, and derivatives those of the mean log score over the seeds. A step grows while
    its derivative keeps its sign, and halves when the sign changes. Where a run diverges,
    or is worse than the best one with derivatives that point further away, the search goes half of the way
    back to the best point.

    Args:
        study: The study, whose first width is searched.
        bounds: Smallest and largest value by name.
        trials: Largest number of points.
        seeds: Number of initializations of each point.
        store: Where results are kept.

    Raises:
        StudyError: A bound of momentum that is not below 1, or a derivative that is not finite.
    """
    for name in OF_ONE:
        if max(bounds.get(name, [0.0])) >= 1:
            raise StudyError(f"grid[{name!r}] must be below 1")
    low, high = ({n: to(n, f(v)) for n, v in bounds.items()} for f in (min, max))
    steps = {n: (high[n] - low[n]) / 4 for n in low}
    x = {n: (high[n] + low[n]) / 2 for n in low}
    first = next(iter(low))
    # Before any point is good, less of the first: of lr, in the usual order.
    best, lowest = {**x, first: low[first]}, math.inf
    signs = dict.fromkeys(low, 0.0)
    for _ in range(trials):
        point = tuple((n, back(n, value)) for n, value in x.items())
        runs = [_run(study, point, seed, store) for seed in range(seeds)]
        yield from (Trial(study.copies.widths[0], point, seed, loss) for seed, (loss, _) in enumerate(runs))
        loss = mean([loss for loss, _ in runs])
        now = _signs(dict(point), runs)
        away = sum(now[n] * (x[n] - best[n]) for n in x) < 0
        if math.isinf(loss) or (loss > lowest and away):
            x = {n: (x[n] + best[n]) / 2 for n in x}
            steps, signs = {n: step * SHRINK for n, step in steps.items()}, dict.fromkeys(low, 0.0)
        else:
            if loss < lowest:
                best, lowest = x, loss
            for n in x:
                steps[n] *= {1.0: GROW, -1.0: SHRINK}.get(now[n] * signs[n], 1.0)
            x, signs = {n: min(max(x[n] - now[n] * steps[n], low[n]), high[n]) for n in x}, now
        if max(abs(x[n] - to(n, value)) for n, value in point) < CLOSE:
            return


def _signs(point: Vector, runs: Sequence[tuple[float, Vector]]) -> Vector:
    """Return the signs of the derivatives of the mean log score by the coordinates."""
    slopes = {
        n: math.fsum(gradient[n] / (abs(loss) or 1.0) for loss, gradient in runs) * chain(n, value)
        for n, value in point.items()
    }
    return {n: math.copysign(1.0, slope) if slope else 0.0 for n, slope in slopes.items()}


def _run(study: Study, point: Point, seed: int, store: Store) -> tuple[float, Vector]:
    """Return the score of a run and its derivatives, from the store where it has them."""
    key = digest(study.work.key(Job(0, point, seed)), "gradient")
    known = store.get(key)
    if known is None:
        begin = time.perf_counter()
        with quiet():
            found = unrolled(study.work, study.copies.draw(0, seed), dict(point), "reverse", seed)
        seconds = time.perf_counter() - begin
        gradient = {n: g if math.isfinite(g) else 0.0 for n, g in found.gradient.items()}
        if gradient != dict(found.gradient) and math.isfinite(found.loss):
            raise StudyError(
                f"the hypergradient is not finite at {dict(point)}, where the loss is {found.loss:.3g}"
            )
        note = {"width": study.copies.widths[0], "seed": seed, **dict(point), "gradient": gradient}
        store.put(key, note, found.loss, seconds)
        return found.loss, gradient
    return known, store.note(key)["gradient"]


def to(name: str, value: float) -> float:
    """Return the coordinate of a hyperparameter.

    Args:
        name: The hyperparameter.
        value: Its value.
    """
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
