"""sweep: where the best hyperparameters are, at several widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from mupass._errors import StudyError, is_number
from mupass._keywords import Keywords, takes
from mupass._runs.batches import Data, Loss, cross_entropy, read_batches
from mupass._runs.checks import check_counts, check_functions
from mupass._runs.copies import Copies, CopyKeywords, CopyOptions, Source, Width, make_copies
from mupass._runs.fingerprint import called, digest
from mupass._runs.jobs import Evaluate, Identity, Job, Work, bar_of, check_jobs, run_all
from mupass._runs.plain import untransformed
from mupass._runs.recipes import Make, check_names, recipe
from mupass._runs.store import Store
from mupass._study.sweep_result import Sweep
from mupass._study.trials import Point, Trial

Grid = Mapping[str, Sequence[float]] | Sequence[float]


class StudyKeywords(CopyKeywords, total=False):
    """What `sweep` and `transfer` both take, for type checkers and editors."""

    store: str | Path | None
    jobs: int | Executor
    progress: bool


@dataclass(frozen=True)
class Running:
    """Where the runs of a study are made and kept.

    Attributes:
        store: File that keeps results; None for none.
        jobs: Number of processes, or what runs them.
        progress: Whether to show progress.
    """

    store: str | Path | None = None
    jobs: int | Executor = 1
    progress: bool = True


@takes(StudyKeywords, CopyOptions, Running)
def sweep(
    model: Source,
    data: Data,
    grid: Grid,
    widths: Sequence[Width] | None = None,
    *,
    loss: Loss = cross_entropy,
    optimizer: str | Make = "adam",
    steps: int = 100,
    seeds: int = 1,
    evaluate: Evaluate | None = None,
    base: Any = None,
    dtype: torch.dtype | None = None,
    **options: Unpack[StudyKeywords],
) -> Sweep:
    """Train resized copies of a model over a grid of hyperparameters, and find the optimum of each width.

    Hyperparameters are those of the narrowest width. Under maximal-update parameterization their optimum
    should stay where it is.

    Args:
        model: As for `mupass.coord_check`.
        data: As for `mupass.coord_check`; fewer batches than steps are used in turn.
        grid: Positive values of hyperparameters by name, all combinations of which are tried; or values of
            ``lr`` alone.
        widths: As for `mupass.coord_check`, one being enough.
        loss: As for `mupass.coord_check`.
        optimizer: A name, or a function of a transformed model and the names of the grid, such as
            ``lambda model, lr, damping: mupass.KFAC(model, lr=lr, damping=damping)``.
        steps: Number of steps of each run.
        seeds: Number of initializations of each point.
        evaluate: Score of a trained model (a validation loss, say): a function of the model in eval mode. If
            left out the mean training loss over the last tenth of the steps.
        parameterization: ``mup``, ``standard``, ``ntk`` or ``mean_field``.
        base: As for `mupass.transform`; the narrowest copy if left out.
        dims: As for `mupass.transform`.
        prepare: Function applied to each transformed copy.
        init: As for `mupass.transform`.
        store: File that keeps results: a sweep that was killed goes on where it was, and a larger one takes
            over what is known; processes on one file share the runs. Needs the same initial weights and data,
            so seed them.
        jobs: Number of processes (more than one needs loky), of one thread each; or any
            ``concurrent.futures.Executor`` (of the standard library, Dask, Ray, submitit, loky), which you
            shut down.
        progress: Whether to show a progress bar (needs tqdm).
        dtype: Precision of the copies; that of the model if left out.

    Returns:
        All losses, and the optimum of each width with an interval.

    Raises:
        StudyError: A grid that is empty or not positive, or names what the optimizer does not take; no batch,
            an unknown optimizer, a store of another study, or several processes without loky.
        MupassError: The model cannot be resized or transformed.

    Example:
        >>> import mupass, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> data = [(torch.randn(16, 6), torch.randint(3, (16,)))]
        >>> found = mupass.sweep(model, data, [0.001, 0.1, 10.0], [64, 128], steps=20, progress=False)
        >>> found.best()
        {'lr': 0.1}
    """
    keywords = Keywords(sweep, options, StudyError)
    training = Training(loss, optimizer, steps, evaluate)
    copying, running = keywords.record(CopyOptions, base=base, dtype=dtype), keywords.record(Running)
    # What is wrong is told before models are made, which may take minutes.
    points = training.points(grid)
    check_counts(seeds=seeds)
    check_jobs(running.jobs)
    study = Study.of(model, data, widths, training, copying)
    plan = []
    for index in range(len(study.copies.widths)):
        plan += all_seeds(index, points, seeds)
    with Store(running.store) as opened:
        study.claim(opened)
        trials = study.run(plan, opened, running.jobs, running.progress)
    return study.result(trials)


def all_seeds(index: int, points: Iterable[Point], seeds: int) -> list[Job]:
    """Return the runs of some points at one width.

    Args:
        index: Which width.
        points: The points.
        seeds: Number of initializations of each.
    """
    jobs = []
    for point in points:
        jobs += [Job(index, point, seed) for seed in range(seeds)]
    return jobs


@dataclass(frozen=True)
class Training:
    """How every copy is trained and scored: what `sweep` and `transfer` are given alike.

    Attributes:
        loss: Function of the model's output and the targets.
        optimizer: Name of a recipe, or a function of a transformed model and hyperparameters by name.
        steps: Number of optimizer steps.
        evaluate: Score of a trained model; None for the mean training loss over the last tenth of the steps.
    """

    loss: Loss
    optimizer: str | Make
    steps: int
    evaluate: Evaluate | None

    def points(self, grid: Grid) -> list[Point]:
        """Return all points of a grid.

        Args:
            grid: See `sweep`.

        Raises:
            StudyError: It is empty, a value is not positive, or the optimizer takes no such hyperparameter.
        """
        points = points_of(grid)
        check_names(recipe(self.optimizer), dict(points[0]))
        return points


@dataclass(frozen=True)
class Study:
    """A model at several widths with all that its runs share; `sweep` and the searches are made of it.

    Attributes:
        copies: The models.
        work: What their runs share.
        name: Of the optimizer, for the reader.
        notes: What was made of the model given.
    """

    copies: Copies
    work: Work
    name: str
    notes: tuple[str, ...]

    @staticmethod
    def of(
        model: Source,
        data: Data,
        widths: Sequence[Width] | None,
        training: Training,
        options: CopyOptions,
    ) -> Study:
        """Read what `sweep` is given.

        Args:
            model: See `sweep`.
            data: See `sweep`.
            widths: See `sweep`.
            training: How copies are trained.
            options: How they are transformed.

        Raises:
            StudyError: As `sweep`.
        """
        loss, steps, evaluate = training.loss, training.steps, training.evaluate
        check_counts(steps=steps)
        check_functions(loss=loss, evaluate=evaluate)
        make = recipe(training.optimizer)
        model, notes = untransformed(model)
        examples = read_batches(data, steps)
        # Hashed as they were given, before anything is moved or trained.
        contents = [(batch.args, batch.kwargs, batch.targets) for batch in examples]
        copies, batches = make_copies(model, widths, examples, options, least=1)

        def identity() -> Identity:
            # Weights of another seed make it another start of one study; all else makes another study.
            code = digest(model, values=False)
            settings = digest(loss, make, steps, evaluate, options.parameterization)
            structure = digest((code, settings), options.prepare, options.dtype, options.init, options.dims)
            return Identity(structure, digest(model, contents))

        work = Work(copies, batches, loss, make, steps, evaluate, identity)
        name = training.optimizer if isinstance(training.optimizer, str) else called(make)
        return Study(copies, work, name, notes)

    def claim(self, store: Store) -> None:
        """Refuse a store that holds this study with other weights or data.

        Args:
            store: The store.
        """
        if store.kept:
            store.claim(self.work.identity.structure, self.work.identity.values)

    def run(
        self, jobs: Sequence[Job], store: Store, processes: int | Executor, shown: bool
    ) -> tuple[Trial, ...]:
        """Run jobs, and return trials in the order of the jobs.

        Args:
            jobs: The jobs.
            store: Where results are kept.
            processes: Number of processes, or what runs them.
            shown: Whether to show progress.
        """
        scores = {}
        progress = bar_of(len(jobs), shown)
        try:
            for job, score in run_all(self.work, jobs, store, processes):
                scores[job] = score
                width = self.copies.widths[job.index]
                progress.set_postfix_str(f"width {width} loss {score:.3g}", refresh=False)
                progress.update()
        finally:
            progress.close()
        widths = self.copies.widths
        # In the order of the jobs, whichever was done first.
        return tuple(Trial(widths[job.index], job.point, job.seed, scores[job]) for job in jobs)

    def result(self, trials: Iterable[Trial], driver: str = "grid") -> Sweep:
        """Return the record.

        Args:
            trials: All runs.
            driver: What chose the points.
        """
        evaluate = self.work.evaluate
        score = "training loss" if evaluate is None else called(evaluate)
        parameterization = self.copies.plans[0].parameterization
        trials = tuple(trials)
        name = self.name
        if "<lambda>" in name:  # the class says more
            optimizer = self.work.make(self.copies.draw(0, 0), **dict(trials[0].point))
            name = type(optimizer).__name__
        return Sweep(trials, name, parameterization, self.work.steps, score, driver, self.notes)


def points_of(grid: Grid) -> list[Point]:
    """Return all points of a grid.

    Args:
        grid: See `sweep`.

    Raises:
        StudyError: It is empty, or a value is not positive.
    """
    axes = dict(grid) if isinstance(grid, Mapping) else {"lr": grid}
    if not axes:
        raise StudyError("grid names no hyperparameter")
    rows = []
    for name, values in axes.items():
        listed = _listed(values)
        if not listed:
            raise StudyError(f"grid[{name!r}] must be a list of values, not {values!r}")
        for value in listed:
            if not is_number(value) or not 0 < value < math.inf:
                raise StudyError(f"grid[{name!r}] must hold positive numbers, not {value!r}")
        # Each value once, in order.
        rows.append([(name, float(value)) for value in sorted(set(listed))])
    return list(itertools.product(*rows))


def _listed(values: Any) -> list[Any]:
    """Return values as a list, which is empty for a text and for what cannot be gone through."""
    if isinstance(values, str):
        return []
    try:
        return list(values)
    except TypeError:
        return []
