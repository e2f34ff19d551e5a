"""coord_check: does the update of every parameter move its operator's output alike at every width?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from mupass._errors import StudyError
from mupass._keywords import Keywords, takes
from mupass._optim.base import PlannedOptimizer
from mupass._records import PRODUCT_AND_SUM, Geometry
from mupass._runs.batches import Batch, Data, Loss, cross_entropy, read_batches
from mupass._runs.checks import check_counts, check_functions
from mupass._runs.copies import Copies, CopyKeywords, CopyOptions, Source, Width, make_copies
from mupass._runs.plain import untransformed
from mupass._runs.recipes import Make, check_names, optimizer_of, recipe
from mupass._scales.optimizers import OptimizerSpec
from mupass._study.causes import cause, is_readout, spec_of
from mupass._study.coords import NAMES, CoordCheck, Coordinate
from mupass._study.dimmed import dimmed_places, gradient_power, relative
from mupass._study.probe import Probe, Seen
from mupass._study.recorder import OUTPUT, SCORES, Site
from mupass._study.slopes import Slope, fit

# An update that is a smaller part of the activation than this is rounding.
FLOOR = {torch.float64: 1e-10, torch.complex128: 1e-10}
COARSE_FLOOR = 1e-5
CONFIDENCE = 0.99  # of each interval: a large model has hundreds of them

Key = tuple[Site, str, int]  # place, quantity, step
Values = list[list[float]]  # for each width those of all seeds


@takes(CopyKeywords, CopyOptions)
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
    base: Any = None,
    tolerance: float = 0.25,
    dtype: torch.dtype | None = torch.float64,
    **options: Unpack[CopyKeywords],
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

    Example:
        >>> import mupass, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> data = [(torch.randn(16, 6), torch.randint(3, (16,)))]
        >>> mupass.coord_check(model, data, widths=[64, 128, 256]).ok
        True
    """
    keywords = Keywords(coord_check, options, StudyError)
    check_counts(steps=steps, seeds=seeds)
    check_functions(loss=loss)
    make = recipe(optimizer, for_check=True)
    model, notes = untransformed(model)
    hyperparameters = {} if lr is None else {"lr": lr}
    check_names(make, hyperparameters)
    copying = keywords.record(CopyOptions, base=base, dtype=dtype)
    copies, batches = make_copies(model, widths, read_batches(data, steps), copying)
    if len(copies.widths) * seeds < 3:
        raise StudyError("an interval needs three points: more widths or more seeds")
    runs = _Runs(copies, batches, loss, steps)
    for index in range(len(copies.widths)):
        for seed in range(seeds):
            # A new copy, optimizer and probe for every run: nothing of one run is in another.
            trained = copies.draw(index, seed)
            instance = optimizer_of(make, trained, hyperparameters)
            probe = runs.train(index, trained, instance)
        runs.note_head_dims(probe)
    # What does not depend on width or seed is read off the last run, of the widest copy.
    judge = _Judge(runs, tolerance, trained, instance, probe)
    rows, silent = judge.judge()
    checked = CoordCheck(
        widths=copies.widths,
        optimizer=optimizer if isinstance(optimizer, str) else type(instance).__name__,
        parameterization=copying.parameterization,
        steps=steps,
        seeds=seeds,
        tolerance=tolerance,
        rows=rows,
        silent=silent,
        dimmed=tuple(site for site in judge.dimmed if site.parameter),
        blame="",
        notes=notes,
    )
    if not any(row.quantity == "update" for row in rows):
        raise StudyError("no parameter moved the output of its operator; is all frozen, or lr zero?")
    if checked.first is None:
        return checked
    return replace(checked, blame=judge.blame(checked.first))


@dataclass(frozen=True)
class _Runs:
    """All runs of a check, and what they measured.

    Attributes:
        copies: The copies.
        batches: What they are trained on; the first is also what is measured on.
        loss: Function of the model's output and the targets.
        steps: Number of optimizer steps.
        log: What the probe saw.
        rates: Learning rate of every parameter, width factors included.
        head_dims: Size of one attention head at each width, by place.
    """

    copies: Copies
    batches: Sequence[Batch]
    loss: Loss
    steps: int
    log: dict[Key, Values] = field(default_factory=dict)
    rates: dict[str, Values] = field(default_factory=dict)
    head_dims: dict[Site, list[int]] = field(default_factory=lambda: defaultdict(list))

    def train(self, index: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Probe:
        """Train one copy, write down what the probe sees before the first step and after each.

        Args:
            index: Which width.
            model: The copy, changed in place.
            optimizer: Its optimizer.

        Returns:
            The probe.

        Raises:
            StudyError: The loss is not finite.
        """
        # Measured on the first batch throughout, so that steps are compared on the same inputs.
        probe = Probe(model, self.batches[0], self.loss)
        self._note(index, 0, probe.at_start())
        for step in range(1, self.steps + 1):
            batch = self.batches[(step - 1) % len(self.batches)]
            optimizer.zero_grad()
            error = self.loss(batch.run(model), batch.targets)
            if not error.isfinite():
                raise StudyError(f"the loss is {error.item()} at step {step}: give a smaller lr")
            error.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            self._note(index, step, probe.now())
        for name, rate in _rates(model, optimizer).items():
            self.rates.setdefault(name, self._empty())[index].append(rate)
        return probe

    def _note(self, index: int, step: int, seen: Iterator[Seen]) -> None:
        for site, quantity, value in seen:
            self.log.setdefault((site, quantity, step), self._empty())[index].append(value)

    def _empty(self) -> Values:
        return [[] for _ in self.copies.widths]

    def note_head_dims(self, probe: Probe) -> None:
        """Write down the sizes of attention heads, which seeds do not change.

        Args:
            probe: Of one copy.
        """
        for site, size in probe.head_dims.items():
            self.head_dims[site].append(size)


class _Judge:
    """Fits and judges all that the runs measured.

    Args:
        runs: The runs.
        tolerance: Largest power that counts as flat.
        model: The widest copy.
        optimizer: Its optimizer.
        probe: Its probe.
    """

    def __init__(
        self, runs: _Runs, tolerance: float, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe
    ) -> None:
        self.runs, self.tolerance, self.optimizer = runs, tolerance, optimizer
        self.log, self.widths, self.plans = runs.log, runs.copies.widths, runs.copies.plans
        self.plan = self.plans[-1]
        self.seeds = max(map(len, chain.from_iterable(self.log.values())))
        self.parameters = dict(model.named_parameters())
        # Rounding is relative to activations, and finer in double precision.
        precision = next(iter(self.parameters.values())).dtype
        self.floor = FLOOR.get(precision, COARSE_FLOOR)
        # Place below a readout in the middle of the model -> how the optimizer treats its parameter.
        self.dimmed = {site: self._spec(site) for site in dimmed_places(probe, self.plan)}

    def judge(self) -> tuple[tuple[Coordinate, ...], tuple[Site, ...]]:
        """Fit and judge all quantities; tell apart the places where nothing is learned.

        Returns:
            The quantities, and the places whose parameter did not move the output at some width.

        Raises:
            StudyError: A place is not met at every width, or a quantity is not finite.
        """
        rows: list[Coordinate] = []
        silent: dict[Site, None] = {}  # a set that keeps its order
        for (site, quantity, step), values in self.log.items():
            if quantity not in NAMES:
                continue
            # A place that some seed or width lacks cannot be fitted.
            if any(len(of_width) < self.seeds for of_width in values):
                raise StudyError(
                    f"{site} does not run at every width; control flow must not depend on values"
                )
            if not all(map(math.isfinite, chain(*values))):
                raise StudyError(f"{site}: the {quantity} is not finite at step {step}; give a smaller lr")
            if self._exceeds_rounding(site, values):
                rows += self._coordinates(site, quantity, step, values)
            # An update below rounding is no measurement; one of exactly zero is that of a frozen parameter.
            elif quantity == "update" and any(chain(*values)):
                silent[site] = None
        return tuple(rows), tuple(silent)

    def _exceeds_rounding(self, site: Site, values: Values) -> bool:
        activations = chain(*self.log[site, "activation", 0])
        pairs = zip(chain(*values), activations, strict=True)
        return all(value > self.floor * activation for value, activation in pairs)

    def _coordinates(self, site: Site, quantity: str, step: int, values: Values) -> Iterator[Coordinate]:
        """Yield a quantity, and for a readout that is normalized its update relative to the output."""
        slope = fit(self.widths, values, CONFIDENCE)
        rule = self._rule(site, quantity, step)
        # Below a readout in the middle only growth is a fault, unless the gradient explains the size.
        if site in self.dimmed and rule == "flat" and step and slope.power < self.tolerance:
            rule = "shown"
            explained = self._relative_to_gradient(site, step, values)
            if explained is not None:
                values, rule = explained, "relative"
                slope = fit(self.widths, values, CONFIDENCE)
        # The graph proves the fault of such a readout, so its estimate alone is enough.
        normalized = step > 0 and self._is_normalized(site)
        verdict = self._verdict(slope, rule, normalized)
        yield Coordinate(site, quantity, step, slope, rule, verdict)
        if quantity == "update" and normalized:
            slope = fit(self.widths, _ratios(values, self.log[site, "activation", 0]), CONFIDENCE)
            yield Coordinate(site, "share", step, slope, "flat", self._verdict(slope, "flat", normalized))

    def _relative_to_gradient(self, site: Site, step: int, values: Values) -> Values | None:
        """Return an update divided by what the size of the gradient before that step explains of it.

        None where that gradient was not measured in all runs (it is at the start, and later only at the first
        step with one), or where no one power of it is in the size of a step.
        """
        power = gradient_power(self.dimmed[site])
        gradients = self.log.get((site, "gradient", step - 1), [])
        # A gradient that some run has not measured cannot be divided by.
        complete = sum(map(len, gradients)) == self.seeds * len(values)
        if power is None or not complete or not all(chain(*gradients)):
            return None
        return relative(values, gradients, site.parameter, self.plans, power)

    def _geometry(self, site: Site) -> Geometry | None:
        """Return the geometry of the parameter that is read at a place, if the plan has it."""
        return self.plan[site.parameter].geometry if site.parameter in self.plan else None

    def _is_normalized(self, site: Site) -> bool:
        """Whether a place is a readout whose output the model divides by its own size."""
        geometry = self._geometry(site)
        return geometry is not None and bool(geometry.normalized)

    def _rule(self, site: Site, quantity: str, step: int) -> str:
        """Return how a quantity is judged: see `Coordinate.rule`."""
        if quantity == "update":
            # With more rows than width most of dW h is noise, which shrinks: its part along the gradient
            # is what must be flat.
            return "bounded" if (site, "aligned", step) in self.log else "flat"
        if quantity == "aligned":
            may_shrink = self._grows_in_entries(site) or self._is_starved(site) or self._is_summed(site)
            return "bounded" if may_shrink else "flat"
        if site.operator in SCORES or site.operator == OUTPUT:
            return "bounded"
        geometry = self._geometry(site)
        if quantity == "change" or geometry is None:
            return "shown"
        # Readouts may shrink at the start, as they should: only growth is a fault.
        if is_readout(site, geometry) or self._is_summed(site):
            return "bounded"
        return "flat" if geometry.role in ("input", "hidden") else "shown"

    def _grows_in_entries(self, site: Site) -> bool:
        """Whether a parameter of fixed shape acts on more entries at larger widths, as a norm of all heads.

        At the start its gradient is a sum of unrelated terms from them, and its update is along few of them.
        """
        geometry, entries = self._geometry(site), self.log[site, "entries", 0]
        fixed = geometry is not None and not any(geometry.infinite)
        return fixed and entries[-1][0] > entries[0][0]

    def _is_summed(self, site: Site) -> bool:
        """Whether a place makes the products of ``(x * w).sum(-1)``, whose sum over a width must be flat."""
        geometry = self._geometry(site)
        uses = geometry.uses if geometry is not None else ()
        summing = any(use.kind == PRODUCT_AND_SUM and use.module == site.module for use in uses)
        return summing and site.operator in ("mul", "multiply")

    def _is_starved(self, site: Site) -> bool:
        """Whether what an operator is given shrinks at the start, as what comes out of a readout does.

        Then so does its update for a while. A fault above it shows in the activation there.
        """
        geometry, inputs = self._geometry(site), self.log.get((site, "input", 0), [])
        if geometry is None or not inputs or not all(chain(*inputs)) or is_readout(site, geometry):
            return False
        return fit(self.widths, inputs).power < geometry.given - self.tolerance

    def _verdict(self, slope: Slope, rule: str, proven: bool) -> str:
        """Judge a slope by its interval, or by its estimate where the graph proves the fault."""
        if rule == "shown":
            return ""
        beyond, surely = slope.power > self.tolerance, slope.low > self.tolerance
        if rule != "bounded":  # to shrink is a fault too
            beyond = beyond or slope.power < -self.tolerance
            surely = surely or slope.high < -self.tolerance
        if surely or (proven and beyond):
            return "FAIL"
        return "unclear" if beyond else "ok"

    def _spec(self, site: Site) -> OptimizerSpec | None:
        return spec_of(self.optimizer, self.parameters.get(site.parameter))

    def blame(self, row: Coordinate) -> str:
        """Return the likely cause of a fault, by the powers of width that were measured at its place.

        Args:
            row: The quantity that fails.
        """
        site = row.site
        evidence = {name: self.log.get((site, name, 0), []) for name in ("input", "weight")}
        evidence["rate"] = self.runs.rates.get(site.parameter, [])
        powers = {}
        # A power is fitted to positive values alone: zeros have no logarithm.
        for name, values in evidence.items():
            if values and all(value > 0 for value in chain(*values)):
                powers[name] = fit(self.widths, values).power
        head_dims = tuple(self.runs.head_dims.get(site, ()))
        return cause(row, powers, self.plan, self._spec(site), head_dims, site in self.dimmed)


def _ratios(updates: Values, outputs: Values) -> Values:
    """Return the sizes of updates relative to what they are added to."""
    ratios = []
    for of_width, before in zip(updates, outputs, strict=True):
        ratios.append([update / output for update, output in zip(of_width, before, strict=True)])
    return ratios


def _rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of every parameter, width factors included."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        if isinstance(optimizer, PlannedOptimizer):  # these keep the width factor apart from lr
            rate *= group["mupass_scale"]
        for parameter in group["params"]:
            if parameter in names:
                rates[names[parameter]] = rate
    return rates
