"""transfer: tune a narrow proxy, and set up the full model with what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from mupass._analyze import analyze
from mupass._errors import StudyError, check_choice, each_matter_once
from mupass._files import write_text
from mupass._keywords import Keywords, takes
from mupass._page import folded, listing
from mupass._resize.resize import resize
from mupass._runs.batches import Data, Loss, cross_entropy, read_batches
from mupass._runs.checks import check_counts
from mupass._runs.copies import CopyOptions, Width, halved
from mupass._runs.jobs import Evaluate, check_jobs
from mupass._runs.plain import undo, untransformed
from mupass._runs.recipes import Make, optimizer_of
from mupass._runs.store import Store
from mupass._runs.tabular import Tabular
from mupass._scales.plan import plan_of
from mupass._study.page import Page, write
from mupass._study.search import DRIVERS, Search, search
from mupass._study.sweep import Grid, Running, Study, StudyKeywords, Training
from mupass._study.sweep_result import Sweep, facts_of, figure, sections
from mupass._transform import transform


@dataclass(frozen=True)
class Transfer(Tabular):
    """A full model that is ready to be trained, and how its hyperparameters were found; prints as a report.

    Attributes:
        model: The transformed full model.
        optimizer: Its optimizer.
        hyperparameters: What the optimizer was made with: those of the proxy.
        proxy_width: Width at which they were tuned, the base width of the model.
        width: Width of the model.
        search: All runs on the proxy.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    hyperparameters: Mapping[str, float]
    proxy_width: int
    width: int
    search: Sweep

    def verdict(self) -> str:
        """Return what was found, and first of all what is not bracketed."""
        chosen = ", ".join(f"{name} = {value:.4g}" for name, value in self.hyperparameters.items())
        result = f"{chosen}, tuned at width {self.proxy_width}, for a model of width {self.width}"
        parts = self.search.verdict().split("; ")
        # What is not bracketed comes first: the reader must not miss it.
        warnings = [part for part in parts if part.startswith("NOT BRACKETED")]
        return "; ".join([*warnings, result])

    def record(self) -> dict[str, Any]:
        """Return how the hyperparameters were found, as plain values for a JSON file or a pull request."""
        search = self.search
        optima = [search.optimum(self.proxy_width, name) for name in search.names]
        trials = search.records()
        for trial in trials:
            del trial["width"]  # all of them are of the proxy
        return {
            "hyperparameters": dict(self.hyperparameters),
            "intervals": {optimum.name: [optimum.low, optimum.high] for optimum in optima},
            "bracketed": not search.open_ends(),
            "proxy_width": self.proxy_width,
            "width": self.width,
            "optimizer": search.optimizer,
            "parameterization": search.parameterization,
            "steps": search.steps,
            "seeds": search.seeds,
            "score": search.score,
            "driver": search.driver,
            "trials": trials,
        }

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each run on the proxy."""
        return self.search.records()

    def _tables(self) -> list[str]:
        return self.search._tables()

    def __str__(self) -> str:
        """Return the report as text."""
        return f"{self.verdict()}\n\n{self.search}"

    def _page(self) -> Page:
        """Return what a page of several studies shows of this one."""
        mark = "doubt" if self.search.open_ends() else "good"
        facts = {"full model": type(self.model).__name__, **facts_of(self.search)}
        # An optimizer of this package has the plan with its own scales.
        plan = getattr(self.optimizer, "plan", plan_of(self.model)[1])
        scales = folded("Scales of every parameter", listing(str(plan)))
        return Page("Transfer", mark, self.verdict(), facts, (*sections(self.search), scales))

    def report(self, path: str | Path | None = None) -> str:
        """Return the report as text, or write it.

        Args:
            path: File to write: ``.html`` for one self-contained page, ``.json`` for the record, ``.png`` for
                the curves (needs matplotlib), else text.

        Returns:
            The text, or the path that was written.
        """
        if path is not None and Path(path).suffix == ".json":
            write_text(path, json.dumps(self.record(), indent=1), StudyError)
            return str(path)
        return write(path, lambda: str(self), self._page, lambda: figure(self.search))


@each_matter_once()
@takes(StudyKeywords, CopyOptions, Running)
def transfer(
    model: nn.Module,
    data: Data,
    target: Width | None = None,
    *,
    grid: Grid,
    proxy: Width | None = None,
    loss: Loss = cross_entropy,
    optimizer: str | Make = "adam",
    steps: int = 100,
    seeds: int = 1,
    evaluate: Evaluate | None = None,
    driver: str = "grid",
    trials: int = 32,
    **options: Unpack[StudyKeywords],
) -> Transfer:
    """Tune hyperparameters on a narrow copy of a model, and make the full model and its optimizer with them.

    The copy is made by `mupass.resize`. Its width is the base width of the full model, so that the values
    found are used as they are.

    Args:
        model: The full model with its initial weights, which is transformed **in place** once the search is
            done; if `target` is given a model of any width, which is not changed. If it is transformed
            already that is undone first, and the result says so.
        data: As for `mupass.sweep`.
        target: Width of the full model, built by `mupass.resize`; that of `model` if left out.
        grid: As for `mupass.sweep`; for the other drivers the smallest and the largest value of each
            hyperparameter are the bounds.
        proxy: Width of the copy that is tuned, as for `mupass.resize`; if left out the model's own, halved
            while it is at least 128.
        loss: As for `mupass.sweep`.
        optimizer: As for `mupass.sweep`.
        steps: Number of steps of each run.
        seeds: Number of initializations of each point.
        evaluate: As for `mupass.sweep`; for ``driver="gradient"`` it must return a tensor of one number.
        driver: ``grid``; ``optuna`` (which must be installed), a seeded TPE sampler; or ``gradient``, descent
            by `mupass.hypergradient` for the optimizers that it knows.
        trials: Number of points that ``optuna`` and ``gradient`` try.
        parameterization: ``mup``, ``ntk`` or ``mean_field``; under ``standard`` nothing transfers.
        dims: As for `mupass.transform`.
        prepare: Function applied to the transformed copy and to the transformed full model.
        init: As for `mupass.transform`.
        store: As for `mupass.sweep`: a search that was killed goes on where it was.
        jobs: As for `mupass.sweep`.
        progress: As for `mupass.sweep`.

    Returns:
        The model, its optimizer and the record.

    Raises:
        StudyError: As `mupass.sweep`; the proxy is not narrower than the full model, every run diverged, the
            driver is unknown or not installed.
        MupassError: The model cannot be resized or transformed.

    Example:
        >>> import mupass, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 256), torch.nn.ReLU(), torch.nn.Linear(256, 3))
        >>> data = [(torch.randn(16, 6), torch.randint(3, (16,)))]
        >>> ready = mupass.transfer(model, data, grid=[0.001, 0.1, 10.0], steps=20, progress=False)
        >>> ready.proxy_width, ready.width, ready.hyperparameters
        (64, 256, {'lr': 0.1})
    """
    keywords = Keywords(transfer, options, StudyError)
    copying, running = keywords.record(CopyOptions), keywords.record(Running)
    check_jobs(running.jobs)
    # Of a transformed model a copy is tuned, with the transform undone.
    original = model
    model, notes = untransformed(model)
    if copying.parameterization == "standard":
        raise StudyError("hyperparameters do not transfer under the standard parameterization; use mup")
    check_counts(seeds=seeds, trials=trials)
    check_choice(StudyError, "driver", driver, DRIVERS)
    training = Training(loss, optimizer, steps, evaluate)
    points = training.points(grid)
    inputs = read_batches(data, 1)[0].inputs
    width = analyze(model, inputs, dims=copying.dims).width
    study = Study.of(model, data, [halved(width) if proxy is None else proxy], training, copying)
    proxy_width = study.copies.widths[0]
    full_width = width if target is None else target
    if isinstance(full_width, int) and full_width <= proxy_width:
        raise StudyError(
            f"the proxy (width {proxy_width}) must be narrower than the full model (width {full_width}); "
            "give proxy=, or tune the model itself with mupass.sweep"
        )
    with Store(running.store) as opened:
        settings = Search(driver, trials, seeds, opened, running.jobs, running.progress)
        searched = replace(search(study, points, settings), notes=notes)
    best = searched.best()
    if not searched.optimum(proxy_width, searched.names[0]).loss < math.inf:
        raise StudyError(
            f"every run on the proxy diverged; try smaller values of {', '.join(searched.names)}"
        )
    # A model of another width is built anew from this one, with weights of its own.
    if target is not None:
        model = resize(
            model, target, example_inputs=inputs, dims=copying.dims, init=copying.init, seed=0, fresh=True
        )
    elif notes:
        # `model` is the copy that the study took; the caller's own is what is asked for.
        undo(original)
        model = original
    # The narrow copy is the base: what was found there is used as it is.
    full_model = transform(
        model,
        inputs,
        base=study.copies.narrow,
        parameterization=copying.parameterization,
        init=copying.init,
        inplace=True,
    )
    if copying.prepare is not None:
        full_model = copying.prepare(full_model)
    trainer = optimizer_of(study.work.make, full_model, best)
    return Transfer(full_model, trainer, best, proxy_width, plan_of(full_model)[1].width, searched)
