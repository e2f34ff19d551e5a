"""K-FAC as a function of parameters, gradients, state and the numbers in its groups.

The optimizer itself computes directions, from what autograd can follow: taps note what they see instead of
hanging leaves on it, gradients of outputs come with their graph, and banks make new tensors at every step
where the optimizer's own overwrite theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupass._hyper.planned import PlannedRule
from mupass._hyper.roots import damped_root
from mupass._hyper.rules import Key, State, Tensors
from mupass._optim.banks import Bank
from mupass._optim.kfac import KFAC
from mupass._study.batches import StudyError
from mupass._study.jobs import quiet
from mupass._taps.intercept import look_out_for
from mupass._taps.leaves import Tap
from mupass._taps.terms import TermsTap

STATE = ("factors", "roots", "weight", "rooted")


class KFACRule(PlannedRule):
    """`mupass.KFAC` with its fallbacks, on one rank, without sampled targets and second moments."""

    def __init__(self, optimizer: KFAC, names: Mapping[Tensor, str]) -> None:
        super().__init__(optimizer, names)
        self.made = optimizer
        self.kronecker, self.curvature = optimizer._kronecker, optimizer._curvature
        self.seen: list[Tap | TermsTap] = [*self.curvature.taps.values(), self.curvature.terms]
        self.blank = {}
        for i, bank in enumerate(self.kronecker._all):  # the optimizer was made for this rule alone
            bank.__class__, bank.likely = _Following, {}  # copied roots would be changed in place
            self.blank[f"\0{i}"] = {key: getattr(bank, key) for key in STATE}
        self.blank["\0rho"] = dict(self.kronecker.unit_rho)

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise where the optimizer has an option that the rule does not follow, see `Rule`.

        Args:
            optimizer: The optimizer.

        Raises:
            StudyError: It has.
        """
        assert isinstance(optimizer, KFAC)
        for found, option, reason, instead in (
            (
                optimizer.sampled,
                "fisher='sampled'",
                "its factors come from draws that observe() makes, which no study calls",
                "use fisher='empirical'",
            ),
            (
                optimizer.ekfac,
                "ekfac=True",
                "eigenbases have no derivative where eigenvalues coincide",
                "use ekfac=False",
            ),
            (
                optimizer._ranks > 1,
                "data_parallel=True",
                "sums over ranks have no second derivative",
                "pass data_parallel=False",
            ),
        ):
            if found:
                raise StudyError(f"{option} of KFAC cannot be differentiated here: {reason}; {instead}")

    def watch(self, forward: Callable[[Tensors], Tensor], parameters: Tensors) -> tuple[Tensor, Tensors]:
        """Run the model with taps that note the outputs of layers, see `Rule`."""
        real, seen = self.made._parameters, self.seen
        self.curvature.clear()
        self.curvature.collect(False)  # making the optimizer switched its own collection on
        for tap in seen:
            tap.uses = []
        try:
            loss = forward({n: look_out_for(p, real[n]) for n, p in parameters.items()})  # type: ignore[arg-type]
            self.uses: list[Sequence[tuple[Any, ...]]] = [tap.uses or [] for tap in seen]
        finally:
            for tap in seen:
                tap.uses = None
        outputs = {
            f"\0{i}.{j}": output for i, uses in enumerate(self.uses) for j, (output, *_) in enumerate(uses)
        }
        return loss, outputs

    def directions(
        self, count: int, gradients: Tensors, state: State, numbers: Mapping[Key, Tensor]
    ) -> Tensors:
        """Return gradients between their roots, see `Rule`."""
        made = self.made
        self._load(count, state, numbers)
        if made.factors_due:
            self._fill(gradients)
        for name, p in made._parameters.items():
            p.grad = gradients.get(name)
        with quiet():
            directions = made._directions()
        for p in made._parameters.values():
            p.grad = None
        if made.factors_due:
            raise StudyError(
                "no layer that KFAC takes took part in the loss, so a step has no factors and cannot be "
                "differentiated; use every layer in each step, or leave them out with exclude=[...]"
            )
        for i, bank in enumerate(self.kronecker._all):
            state[f"\0{i}"] = {key: getattr(bank, key) for key in STATE}
        state["\0rho"] = dict(self.kronecker.unit_rho)
        return {**gradients, **{n: directions[p] for n, p in made._parameters.items() if p in directions}}

    def _load(self, count: int, state: State, numbers: Mapping[Key, Tensor]) -> None:
        """Bring the optimizer to the state after some steps, with tensors for numbers of its groups."""
        made, kronecker = self.made, self.kronecker
        state = state if count else self.blank
        for i, bank in enumerate(kronecker._all):
            for key, value in state[f"\0{i}"].items():
                setattr(bank, key, value)
            bank._traces = None
        kronecker.unit_rho = dict(state["\0rho"])
        kronecker.rooted, kronecker.moved = count > 0, False
        made._steps, made._amp_scale = count, 1.0
        made._due = bool(made._cover.blocks) and count % made.factor_every == 0
        for (i, key), value in numbers.items():
            made.param_groups[i][key] = value

    def _fill(self, gradients: Tensors) -> None:
        """Put factors and the number of loss terms where a backward pass would leave them."""
        for i, (tap, uses) in enumerate(zip(self.seen, self.uses, strict=True)):
            tap.uses = list(uses)
            tap.fill([gradients.get(f"\0{i}.{j}") for j in range(len(uses))])


class _Following(Bank):
    """A bank whose averages and roots are new tensors at every change."""

    def average(self, new: Mapping[object, Tensor], decay: float) -> list[object]:
        """Add one observation of each factor to the moving averages, see `Bank`.

        Out of place, one by one: autograd cannot follow several changes of views into one tensor.
        """
        self._traces = None
        factors, weights = list(self.factors.unbind()), list(self.weight.unbind())
        for key, found in new.items():
            several = found if found.dim() == self.factors.dim() else found[None]
            for i, one in enumerate(several, self.slot[key]):
                factors[i] = factors[i].lerp(one.to(self.factors.dtype), 1 - decay)
                weights[i] = decay * weights[i] + (1 - decay)
        self.factors, self.weight = torch.stack(factors), torch.stack(weights)
        return []

    def refresh(
        self, damping: Tensor, power: float, at: Tensor, relative: bool = False, ranks: int = 1
    ) -> Tensor:
        """Recompute inverse roots, see `Bank`."""
        self.roots, self.rooted = self.roots.clone(), self.rooted.clone()
        if self.diagonal:
            return super().refresh(damping, power, at, relative, ranks)
        self.rooted[at] = self.traces()[at]
        fresh = damped_root(self.value(at), damping[at], power, relative)
        self.roots = self.roots.index_copy(0, at, fresh)
        return torch.zeros(len(at), dtype=torch.bool)
