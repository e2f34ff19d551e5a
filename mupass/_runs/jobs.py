"""Jobs: single training runs of a sweep, in this process or in several."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mupass._errors import StudyError, is_whole
from mupass._runs.batches import Batch, Loss
from mupass._runs.copies import Copies
from mupass._runs.fingerprint import digest
from mupass._runs.recipes import Make, optimizer_of
from mupass._runs.store import Store

Evaluate = Callable[[nn.Module], Any]  # a number, or a tensor of one number
PAUSE = 0.1  # seconds between looks at what other processes on the store have done
DIVERGED = 1e3  # a loss beyond this many times the first one is given up


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        index: Which width.
        point: Hyperparameters by name.
        seed: Number of the initialization.
    """

    index: int
    point: tuple[tuple[str, float], ...]
    seed: int


@dataclass(frozen=True)
class Identity:
    """What tells one study from another in a store.

    Attributes:
        structure: Hash of the model's code, the loss, the optimizer and all settings.
        values: Hash of initial weights and data.
    """

    structure: str
    values: str


@dataclass(frozen=True)
class Work:
    """What all runs of a sweep share.

    Attributes:
        copies: Models by width.
        batches: Batches, used in turn.
        loss: The loss.
        make: Makes the optimizer.
        steps: Number of steps.
        evaluate: Score of a trained model; None for the mean training loss over the last tenth of the steps.
        identify: Hashes the study; only a store on disk needs that.
    """

    copies: Copies
    batches: Sequence[Batch]
    loss: Loss
    make: Make
    steps: int
    evaluate: Evaluate | None
    identify: Callable[[], Identity] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process needs to run jobs: all but the hashes."""
        return {**vars(self), "identify": None}

    @cached_property
    def identity(self) -> Identity:
        """What tells the study from others, taken once: what a run changes in an object comes after it."""
        assert self.identify is not None
        return self.identify()

    def key(self, job: Job, kept: bool) -> str:
        """Return the hash of all that the result of a job depends on.

        Args:
            job: The job.
            kept: Whether the store outlives the study; otherwise the job alone tells.
        """
        if not kept:
            return repr(job)
        plan = self.copies.plans[job.index].to_json()
        return digest(plan, self.identity.structure, self.identity.values, job.point, job.seed)

    def run(self, job: Job) -> tuple[float, float]:
        """Train once.

        Args:
            job: The job.

        Returns:
            The score, infinite when the run diverged, and the seconds that it took.
        """
        started = time.perf_counter()
        # Seeded alike, whichever process runs the job.
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(job.seed)
            score = self._train(job)
        return score, time.perf_counter() - started

    def _train(self, job: Job) -> float:
        model = self.copies.draw(job.index, job.seed)
        optimizer = optimizer_of(self.make, model, dict(job.point))
        losses: list[float] = []
        for step in range(self.steps):
            # Batches are used in turn, however many steps there are.
            batch = self.batches[step % len(self.batches)]
            optimizer.zero_grad()
            error = self.loss(batch.run(model), batch.targets)
            losses.append(error.item())
            # An infinite score ends a run early, and is worse than any other.
            if diverged(losses[-1], losses[0]):
                return math.inf
            error.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if self.evaluate is None:
            # The last tenth of the losses, whose mean has less noise than the last one.
            tail = losses[-max(1, self.steps // 10) :]
            return sum(tail) / len(tail)
        model.eval()
        with torch.no_grad():
            score = float(self.evaluate(model))
        return score if math.isfinite(score) else math.inf


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of runs that diverge; their score says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def diverged(loss: float, first: float) -> bool:
    """Return whether a run is given up.

    Args:
        loss: Its loss.
        first: Its loss before the first step.
    """
    # A first loss near zero would make any other one look like a divergence.
    return not math.isfinite(loss) or abs(loss) > DIVERGED * max(abs(first), 1e-3)


def check_jobs(jobs: Any) -> None:
    """Refuse what cannot run jobs.

    Args:
        jobs: Number of processes, or an executor.

    Raises:
        StudyError: It is neither.
    """
    is_count = is_whole(jobs) and jobs >= 1
    if not is_count and not callable(getattr(jobs, "submit", None)):
        raise StudyError(f"jobs must be at least 1, or a concurrent.futures.Executor, not {jobs!r}")


def run_all(
    work: Work, jobs: Sequence[Job], store: Store, processes: int | Executor
) -> Iterator[tuple[Job, float]]:
    """Run what the store does not hold yet, and yield every job with its score as it is known.

    Args:
        work: What they share.
        jobs: The jobs.
        store: Where results are kept.
        processes: Number of processes; 1 runs in this one. Or an executor.

    Raises:
        StudyError: Several processes without loky.
    """
    # The hash of each job is taken once, before anything runs.
    keys = {job: work.key(job, store.kept) for job in jobs}
    unknown = []
    for job in jobs:
        score = store.get(keys[job])
        if score is None:
            unknown.append(job)
        else:
            yield job, score
    with store.claims_renewed(), _pool(work, processes) as pool:
        yield from _share(work, unknown, keys, store, pool)


@dataclass(frozen=True)
class _Pool:
    """What runs jobs.

    Attributes:
        submit: Begins a job and returns its future.
        room: How many jobs run at once: as many are claimed, so that other processes on the store find some.
    """

    submit: Callable[[Job], Any]
    room: float


@contextmanager
def _pool(work: Work, processes: int | Executor) -> Iterator[_Pool]:
    """Make what runs jobs.

    Args:
        work: What they share.
        processes: Number of processes, or an executor of the user's.

    Raises:
        StudyError: Several processes without loky.
    """
    if not isinstance(processes, int):
        # An executor that does not tell its size may be a cluster: it is given all at once.
        room = getattr(processes, "_max_workers", None) or math.inf
        yield _Pool(lambda job: processes.submit(_run_there, work, job, os.getpid()), room)
    elif processes > 1:
        try:
            import loky
        except ImportError as error:
            raise StudyError("jobs > 1 needs loky: pip install 'mupass[sweep]'") from error
        # loky rather than concurrent.futures: functions of a notebook or a script travel too.
        with loky.ProcessPoolExecutor(processes, initializer=_begin, initargs=(work,)) as pool:
            yield _Pool(lambda job: pool.submit(_run_here, job), processes)
    else:
        # One process runs jobs one after the other, each of them done when it is returned.
        yield _Pool(lambda job: _known(work.run(job)), 1)


def _known(result: tuple[float, float]) -> Future[tuple[float, float]]:
    """Return a future that is done."""
    future: Future[tuple[float, float]] = Future()
    future.set_result(result)
    return future


def _share(
    work: Work, jobs: Sequence[Job], keys: Mapping[Job, str], store: Store, pool: _Pool
) -> Iterator[tuple[Job, float]]:
    """Run the jobs that no other process has claimed, wait for those of others, and yield all with scores."""
    running: dict[Any, Job] = {}
    waiting = list(jobs)
    try:
        while waiting or running:
            # Fill the pool with jobs that are not done and that no other process is at.
            claimed = []  # by other processes
            while waiting and len(running) < pool.room:
                job = waiting.pop(0)
                # Another process may have finished it since.
                stored_score = store.get(keys[job])
                if stored_score is not None:
                    yield job, stored_score
                elif store.reserve(keys[job]):
                    running[pool.submit(job)] = job
                else:
                    claimed.append(job)
            waiting = claimed + waiting
            # With nothing of its own to wait for, a process looks again at what others claimed.
            if not running:
                time.sleep(PAUSE if waiting else 0)
            # With claims of others around, a look at the store now and then; else as long as a job takes.
            for future in _finished(running, PAUSE if claimed else None):
                job = running.pop(future)
                score, seconds = future.result()
                note = {"width": work.copies.widths[job.index], "seed": job.seed, **dict(job.point)}
                store.put(keys[job], note, score, seconds)
                yield job, score
    finally:
        # After an error, or when the caller stops asking: nothing more is begun.
        for future in running:
            future.cancel()


def _finished(running: Mapping[Any, Job], limit: float | None) -> list[Any]:
    """Return futures that are done, or none when the time is over.

    Args:
        running: Futures.
        limit: How long to wait at most, in seconds; None for as long as it takes.
    """
    if all(isinstance(future, Future) for future in running):
        return list(wait(running, limit, FIRST_COMPLETED).done)
    # Executors of clusters may have futures of their own kind, which are waited for in their order.
    return [next(iter(running))]


_WORK: list[Work] = []  # of a worker process
_ONE = threading.Lock()


def _run_there(work: Work, job: Job, origin: int) -> tuple[float, float]:
    # A worker process has one thread for each job; the caller's own process keeps its threads.
    if os.getpid() != origin:
        torch.set_num_threads(1)
    with _ONE:  # threads of one process share torch's random numbers
        return work.run(job)


def _begin(work: Work) -> None:
    # Jobs of other processes use the other cores.
    torch.set_num_threads(1)
    _WORK[:] = [work]


def _run_here(job: Job) -> tuple[float, float]:
    return _WORK[0].run(job)


def bar_of(total: int, shown: bool) -> Any:
    """Return a progress bar, or something that takes its calls where tqdm is missing.

    Args:
        total: Number of runs.
        shown: Whether to show it.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return _Quiet()
    return tqdm(total=total, unit="run", disable=not shown, dynamic_ncols=True)


class _Quiet:
    def update(self) -> None:
        """Do nothing."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
