"""Search on one width: the grid, or within its bounds by Optuna or by hypergradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor

from mupass._errors import StudyError
from mupass._runs.jobs import Job
from mupass._runs.store import Store
from mupass._study.descent import descend
from mupass._study.sweep import Grid, Study
from mupass._study.sweep_result import Sweep
from mupass._study.trials import Trial, mean

DRIVERS = ("grid", "optuna", "gradient")


def search(
    study: Study,
    grid: Grid,
    *,
    driver: str,
    trials: int,
    seeds: int,
    store: Store,
    jobs: int | Executor,
    progress: bool,
) -> Sweep:
    """Find hyperparameters of the first width of a study.

    Args:
        study: The study.
        grid: Values by name; but for ``grid`` their smallest and largest are the bounds.
        driver: One of `DRIVERS`.
        trials: Number of points that are tried, but for ``grid``.
        seeds: Number of initializations of each point.
        store: Where results are kept.
        jobs: Number of processes.
        progress: Whether to show progress.

    Raises:
        StudyError: Unknown driver, Optuna is missing, or hypergradients cannot be had.
    """
    if driver not in DRIVERS:
        raise StudyError(f"unknown driver {driver!r}; known: {', '.join(DRIVERS)}")
    points = study.points(grid)
    study.claim(store)
    if driver == "grid":
        plan = [Job(0, point, seed) for point in points for seed in range(seeds)]
        return study.result(study.run(plan, store, jobs, progress))
    if trials < 1:
        raise StudyError(f"trials must be at least 1, not {trials}")
    bounds = {name: [dict(p)[name] for p in points] for name, _ in points[0]}
    flat = next((name for name, values in bounds.items() if min(values) == max(values)), None)
    if flat is not None:
        raise StudyError(f"grid[{flat!r}] must hold two different values, the bounds of the search")
    if driver == "optuna":
        return study.result(list(_by_optuna(study, bounds, trials, seeds, store, jobs)), driver)
    if jobs != 1:
        raise StudyError("driver='gradient' goes from point to point in one process; leave jobs=1")
    return study.result(list(descend(study, bounds, trials, seeds, store)), driver)


def _by_optuna(
    study: Study,
    bounds: Mapping[str, Sequence[float]],
    trials: int,
    seeds: int,
    store: Store,
    jobs: int | Executor,
) -> Iterator[Trial]:
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
        asked = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        for _ in range(trials):
            trial = asked.ask()
            point = tuple((n, trial.suggest_float(n, min(v), max(v), log=True)) for n, v in bounds.items())
            runs = study.run([Job(0, point, seed) for seed in range(seeds)], store, jobs, False)
            yield from runs
            score = mean([run.loss for run in runs])
            failed = optuna.trial.TrialState.FAIL
            asked.tell(trial, score) if math.isfinite(score) else asked.tell(trial, state=failed)
    finally:
        optuna.logging.set_verbosity(before)
