"""Search on one width: the grid, or within its bounds by Optuna or by hypergradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from mupass._errors import StudyError
from mupass._runs.store import Store
from mupass._study.descent import descend
from mupass._study.sweep import Study, all_seeds
from mupass._study.sweep_result import Sweep
from mupass._study.trials import Point, Trial, mean

DRIVERS = ("grid", "optuna", "gradient")


@dataclass(frozen=True)
class Search:
    """How hyperparameters are searched for.

    Attributes:
        driver: One of `DRIVERS`.
        trials: Number of points that are tried, but for ``grid``.
        seeds: Number of initializations of each point.
        store: Where results are kept.
        jobs: Number of processes, or what runs them.
        progress: Whether to show progress.
    """

    driver: str
    trials: int
    seeds: int
    store: Store
    jobs: int | Executor
    progress: bool


def search(study: Study, points: Sequence[Point], settings: Search) -> Sweep:
    """Find hyperparameters of the first width of a study.

    Args:
        study: The study.
        points: Those of the grid; but for ``grid`` their smallest and largest values are the bounds.
        settings: How to search.

    Raises:
        StudyError: Optuna is missing, or hypergradients cannot be had.
    """
    driver, store = settings.driver, settings.store
    # Before any work: a store of another study is refused.
    study.claim(store)
    if driver == "grid":
        plan = all_seeds(0, points, settings.seeds)
        return study.result(study.run(plan, store, settings.jobs, settings.progress))
    if settings.trials < 1:
        raise StudyError(f"trials must be at least 1, not {settings.trials}")
    bounds = _bounds(points)
    if driver == "optuna":
        return study.result(_by_optuna(study, bounds, settings), driver)
    # Each point of a descent depends on the one before.
    if settings.jobs != 1:
        raise StudyError("driver='gradient' goes from point to point in one process; leave jobs=1")
    return study.result(descend(study, bounds, settings.trials, settings.seeds, store), driver)


def _bounds(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of every hyperparameter.

    Raises:
        StudyError: They are the same.
    """
    bounds = {}
    # Points have one order of names: a column holds the values of one of them.
    for column in zip(*points, strict=True):
        name, lowest = min(column)
        _, highest = max(column)
        if lowest == highest:
            raise StudyError(f"grid[{name!r}] must hold two different values, the bounds of the search")
        bounds[name] = (lowest, highest)
    return bounds


def _by_optuna(study: Study, bounds: Mapping[str, tuple[float, float]], settings: Search) -> Iterator[Trial]:
    """Ask Optuna for one point after the other.

    Its sampler is seeded: a search that was killed asks for the same points, which the store knows.
    """
    try:
        import optuna
    except ImportError as error:
        raise StudyError("driver='optuna' needs Optuna: pip install 'mupass[sweep]'") from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampled = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        for _ in range(settings.trials):
            trial = sampled.ask()
            point = []
            for name, (low, high) in bounds.items():
                point.append((name, trial.suggest_float(name, low, high, log=True)))
            plan = all_seeds(0, [tuple(point)], settings.seeds)
            runs = study.run(plan, settings.store, settings.jobs, False)
            yield from runs
            score = mean([run.loss for run in runs])
            # Optuna takes no infinite score: a run that diverged is told as failed.
            if math.isfinite(score):
                sampled.tell(trial, score)
            else:
                sampled.tell(trial, state=optuna.trial.TrialState.FAIL)
    finally:
        optuna.logging.set_verbosity(before)
