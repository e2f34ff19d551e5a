"""coord_check: does the update of every parameter move its operator's output alike at every width?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from mupass._optim.base import PlannedOptimizer
from mupass._scales.init import InitChoice
from mupass._scales.optimizers import OptimizerSpec
from mupass._study.batches import Batch, Data, Loss, StudyError, cross_entropy, read_batches
from mupass._study.causes import cause, is_readout, spec_of
from mupass._study.checks import check_counts, check_functions
from mupass._study.coords import NAMES, CoordCheck, Coordinate
from mupass._study.copies import Copies, Prepare, Source, Width, make_copies
from mupass._study.dimmed import dimmed_places, gradient_power, relative
from mupass._study.plain import untransformed
from mupass._study.probe import Probe
from mupass._study.recipes import Make, check_names, optimizer_of, recipe
from mupass._study.recorder import OUTPUT, SCORES, Site
from mupass._study.slopes import Slope, fit

# An update that is a smaller part of the activation than this is rounding.
FLOOR = {torch.float64: 1e-10}
COARSE_FLOOR = 1e-5
CONFIDENCE = 0.99  # of each interval: a large model has hundreds of them
Key = tuple[Site, str, int]
Log = dict[Key, list[list[float]]]


def coord_check(
    model: Source,
    data: Data,
    *,
    loss: Loss = cross_entropy,
    optimizer: str | Make = "adam",
    lr: float | None = None,
    widths: Sequence[Width] | None = None,
    steps: int = 3,
    seeds: int = 3,
    parameterization: str = "mup",
    base: Any = None,
    dims: Mapping[str, str] | None = None,
    init: InitChoice = "auto",
    tolerance: float = 0.25,
    prepare: Prepare | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> CoordCheck:
    """Train resized copies of a model for a few steps, and fit how the update of every parameter scales.

    Under maximal-update parameterization the update of each parameter moves its operator's output by an
    amount that does not depend on width, ``RMS(dW h) ~ width^0`` (Yang et al., arXiv 2203.03466; Ishikawa &
    Karakida, arXiv 2312.12226, conditions 11-13). Judged are: at every step, that all of it does not grow and
    that its part along the gradient is flat (the rest is noise, which shrinks); activations before
    the first step (readouts and attention scores may shrink, as they should); and the growth of attention
    scores and of the model's output. Operators are seen whether a module or raw tensors call them.

    A quantity fails when its whole 99 % interval lies beyond `tolerance`: the powers of a wrong
    parameterization are multiples of 1/2. Below width 64, effects of finite width can look like such a power.

    Args:
        model: The model, with its initial weights; it is not changed. Of a transformed one a copy is taken
            with that undone, and the result says so. Or a function of a width that builds it.
        data: Batches ``(inputs, targets)``, a function that returns them, or one batch. The first batch is
            also what is measured on. Fewer batches than steps are used in turn.
        loss: Function of the model's output and the targets.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``kfac``, ``shampoo``, ``soap``, ``muon``, or a function of a
            transformed model and ``lr``, such as ``lambda model, lr: mupass.KFAC(model, lr=lr)``.
        lr: Learning rate at the base width, such that a few steps do not fit the batch; by default the
            recipe's own.
        widths: At least two, as for `mupass.resize`, or what the function takes. If left out three that are
            the model's own width times powers of two, the narrowest at least 64.
        steps: Number of optimizer steps.
        seeds: Number of initializations.
        parameterization: ``mup`` should pass, ``standard`` should fail.
        base: As for `mupass.transform`; the narrowest copy if left out.
        dims: As for `mupass.transform`.
        init: As for `mupass.transform`.
        tolerance: Largest power that counts as flat.
        prepare: Function applied to each transformed copy, for rewriting of your own.
        dtype: Precision of the copies: float64, so that rounding is never taken for an update. None keeps
            that of the model.

    Returns:
        Slopes and verdicts.

    Raises:
        StudyError: Fewer than two widths, no batch, an unknown optimizer or one without `lr`, or nothing is
            trained.
        MupassError: The model cannot be resized or transformed.
    """
    check_counts(steps=steps, seeds=seeds)
    check_functions(loss=loss)
    make = recipe(optimizer, for_check=True)
    model, notes = untransformed(model)
    check_names(make, [] if lr is None else ["lr"])
    copies, batches = make_copies(
        model, widths, read_batches(data, steps), parameterization=parameterization, base=base, dims=dims,
        prepare=prepare, init=init, dtype=dtype,
    )  # fmt: skip
    if len(copies.widths) * seeds < 3:
        raise StudyError("an interval needs three points: more widths or more seeds")
    log: Log = defaultdict(lambda: [[] for _ in copies.widths])
    rates: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in copies.widths])
    head_dims: dict[Site, list[int]] = defaultdict(list)
    for i in range(len(copies.widths)):
        for seed in range(seeds):
            trained = copies.draw(i, seed)
            made = optimizer_of(make, trained, {} if lr is None else {"lr": lr})
            probe = Probe(trained, batches[0], loss)
            for key, value in _train(trained, made, probe, batches, loss, steps):
                log[key][i].append(value)
            for name, rate in _rates(trained, made).items():
                rates[name][i].append(rate)
        for site, size in probe.head_dims.items():
            head_dims[site].append(size)
    floor = FLOOR.get(next(p.dtype for p in trained.parameters()), COARSE_FLOOR)
    parameters = dict(trained.named_parameters())
    dimmed = {s: spec_of(made, parameters.get(s.parameter)) for s in dimmed_places(probe, copies.plans[-1])}
    rows, silent = _judge(log, copies, tolerance, floor, dimmed)
    found = CoordCheck(
        widths=copies.widths,
        optimizer=optimizer if isinstance(optimizer, str) else type(made).__name__,
        parameterization=parameterization,
        steps=steps,
        seeds=seeds,
        tolerance=tolerance,
        rows=rows,
        silent=silent,
        dimmed=tuple(s for s in dimmed if s.parameter),
        blame="",
        notes=notes,
    )
    if not any(r.quantity == "update" for r in rows):
        raise StudyError("no parameter moved the output of its operator; is all frozen, or lr zero?")
    row = found.first
    if row is None:
        return found
    evidence = {q: log[row.site, q, 0] for q in ("input", "weight") if (row.site, q, 0) in log}
    evidence["rate"] = rates.get(row.site.parameter, [[0.0]])
    measured = {
        name: fit(copies.widths, table).power
        for name, table in evidence.items()
        if all(v > 0 for values in table for v in values)
    }
    sizes = tuple(head_dims.get(row.site, ()))
    spec = spec_of(made, parameters.get(row.site.parameter))
    blame = cause(row, measured, copies.plans[-1], spec, sizes, row.site in dimmed)
    return replace(found, blame=blame)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    probe: Probe,
    batches: Sequence[Batch],
    loss: Loss,
    steps: int,
) -> Iterator[tuple[Key, float]]:
    """Take the steps, and yield what the probe sees before the first and after each."""
    for site, quantity, value in probe.at_start():
        yield (site, quantity, 0), value
    for step in range(1, steps + 1):
        batch = batches[(step - 1) % len(batches)]
        optimizer.zero_grad()
        error = loss(batch.run(model), batch.targets)
        if not error.isfinite():
            raise StudyError(f"the loss is {error.item()} at step {step}: give a smaller lr")
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for site, quantity, value in probe.now():
            yield (site, quantity, step), value


def _judge(
    log: Log,
    copies: Copies,
    tolerance: float,
    floor: float,
    dimmed: Mapping[Site, OptimizerSpec | None],
) -> tuple[tuple[Coordinate, ...], tuple[Site, ...]]:
    """Fit and judge all quantities; tell apart the places where nothing is learned."""
    rows, silent = [], []
    seeds = max(len(values) for table in log.values() for values in table)
    for (site, quantity, step), table in log.items():
        if quantity not in NAMES:
            continue
        if any(len(values) < seeds for values in table):
            raise StudyError(f"{site} does not run at every width; control flow must not depend on values")
        if not all(map(math.isfinite, chain(*table))):
            raise StudyError(f"{site}: the {quantity} is not finite at step {step}; give a smaller lr")
        pairs = zip(chain(*table), chain(*log[site, "activation", 0]), strict=True)
        if all(value > floor * activation for value, activation in pairs):
            slope = fit(copies.widths, table, CONFIDENCE)
            rule = _rule((site, quantity, step), log, copies, tolerance)
            if site in dimmed and rule == "flat" and step and slope.power < tolerance:
                # There is one before its first step only, except at the start.
                power, gradients = gradient_power(dimmed[site]), log.get((site, "gradient", step - 1), [])
                rule = "shown"
                if (
                    power is not None
                    and all(chain(*gradients))
                    and sum(map(len, gradients)) == seeds * len(table)
                ):
                    table = relative(table, gradients, site.parameter, copies.plans, power)
                    slope, rule = fit(copies.widths, table, CONFIDENCE), "relative"
            known = step > 0 and _is_normalized(site, copies)
            rows.append(
                Coordinate(site, quantity, step, slope, rule, _verdict(slope, rule, tolerance, known))
            )
            if quantity == "update" and known:
                slope = fit(copies.widths, _shares(table, log[site, "activation", 0]), CONFIDENCE)
                verdict = _verdict(slope, "flat", tolerance, known)
                rows.append(Coordinate(site, "share", step, slope, "flat", verdict))
        elif quantity == "update" and any(chain(*table)):
            silent.append(site)
    return tuple(rows), tuple(dict.fromkeys(silent))


def _is_normalized(site: Site, copies: Copies) -> bool:
    """Whether a place is a readout whose output the model divides by its own size."""
    plan = copies.plans[-1]
    return site.parameter in plan and bool(plan[site.parameter].geometry.normalized)


def _shares(updates: list[list[float]], outputs: list[list[float]]) -> list[list[float]]:
    """Return the sizes of updates relative to what they are added to."""
    pairs = zip(updates, outputs, strict=True)
    return [[u / y for u, y in zip(row, before, strict=True)] for row, before in pairs]


def _rule(key: Key, log: Log, copies: Copies, tolerance: float) -> str:
    """Return how a quantity is judged: see `Coordinate.rule`."""
    site, quantity, step = key
    if quantity == "update":
        return "bounded" if (site, "aligned", step) in log else "flat"
    if quantity == "aligned":
        return "bounded" if _shared(site, log, copies) or _starved(site, log, copies, tolerance) else "flat"
    if site.operator in SCORES or site.operator == OUTPUT:
        return "bounded"
    plan = copies.plans[-1]
    if quantity == "change" or site.parameter not in plan:
        return "shown"
    geometry = plan[site.parameter].geometry
    if is_readout(site, geometry):
        return "bounded"
    return "flat" if geometry.role in ("input", "hidden") else "shown"


def _shared(site: Site, log: Log, copies: Copies) -> bool:
    """Whether a parameter of fixed shape acts on more entries the wider the model is, as a norm of all heads.

    At the start its gradient is a sum of unrelated terms from them, and its update is along few of them.
    """
    plan, entries = copies.plans[-1], log[site, "entries", 0]
    fixed = site.parameter in plan and not any(plan[site.parameter].geometry.infinite)
    return fixed and entries[-1][0] > entries[0][0]


def _starved(site: Site, log: Log, copies: Copies, tolerance: float) -> bool:
    """Whether what an operator is given shrinks at the start, as what comes out of a readout does.

    Then so does its update for a while. A fault above it shows in the activation there.
    """
    plan, given = copies.plans[-1], log.get((site, "input", 0), [])
    if site.parameter not in plan or not given or not all(chain(*given)):
        return False
    geometry = plan[site.parameter].geometry
    return not is_readout(site, geometry) and fit(copies.widths, given).power < geometry.given - tolerance


def _verdict(slope: Slope, rule: str, tolerance: float, known: bool = False) -> str:
    """Judge a slope by its interval, or by its estimate where the graph proves the fault."""
    if rule == "shown":
        return ""
    beyond, surely = slope.power > tolerance, slope.low > tolerance
    if rule != "bounded":
        beyond, surely = beyond or slope.power < -tolerance, surely or slope.high < -tolerance
    return "FAIL" if surely or known and beyond else "unclear" if beyond else "ok"


def _rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of every parameter, width factors included."""
    names = {p: n for n, p in model.named_parameters()}
    apart = isinstance(optimizer, PlannedOptimizer)  # these keep the width factor apart from lr
    return {
        names[p]: float(group["lr"]) * (group["mupass_scale"] if apart else 1.0)
        for group in optimizer.param_groups
        for p in group["params"]
        if p in names
    }
