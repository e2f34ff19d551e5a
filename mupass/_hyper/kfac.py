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

from mupass._errors import StudyError
from mupass._hyper.planned import PlannedRule
from mupass._hyper.roots import damped_root
from mupass._hyper.rules import Moment, State, Tensors
from mupass._optim.kfac import KFAC
from mupass._optim.kronecker.factor_stack import FactorStack
from mupass._optim.linalg.roots import diagonal_roots
from mupass._optim.matrix.base import wide
from mupass._runs.jobs import quiet
from mupass._taps.intercept import look_out_for


class KFACRule(PlannedRule):
    """`mupass.KFAC` with its fallbacks, on one rank, without sampled targets and second moments."""

    def __init__(self, optimizer: KFAC, names: Mapping[Tensor, str]) -> None:
        super().__init__(optimizer, names)
        self.made = optimizer
        self.taps = optimizer.taps
        self.real = dict(optimizer.root.named_parameters())
        self.functional = optimizer.functional(FollowingStack)

    def options(self, optimizer: KFAC) -> dict[str, tuple[bool, str, str]]:
        """Return the options that the rule does not follow, see `PlannedRule`."""
        standardized = [block.parameter for block in optimizer._cover.blocks if block.standardized]
        return {
            "fisher='sampled'": (
                optimizer.sampled,
                "its factors come from draws that observe() makes, which no study calls",
                "use fisher='empirical'",
            ),
            "ekfac=True": (
                optimizer.ekfac,
                "eigenbases have no derivative where eigenvalues coincide",
                "use ekfac=False",
            ),
            "a standardized kernel": (
                bool(standardized),
                "its direction depends on the present kernel, which the rule does not carry along",
                f"pass exclude={standardized}",
            ),
        }

    def watch(self, forward: Callable[[Tensors], Tensor], parameters: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Run the model with taps that note the outputs of layers, see `Rule`."""
        for tap in self.taps:
            tap.clear()
            tap.collect(False)  # making the optimizer switched its own collection on
            tap.uses = []
        try:
            # Copies that carry taps stand in for the parameters, so that the model uses them.
            watched = {name: look_out_for(tensor, self.real[name]) for name, tensor in parameters.items()}  # type: ignore[arg-type]
            loss = forward(watched)
            self.uses: list[Sequence[tuple[Any, ...]]] = [tap.uses or [] for tap in self.taps]
        finally:
            for tap in self.taps:
                tap.uses = None
        outputs: list[Tensor] = []
        for uses in self.uses:
            outputs += [output for output, *_ in uses]
        return loss, outputs

    def preconditioned(self, now: Moment, means: Tensors, shared: State) -> Tensors:
        """Return averages between their roots, see `PlannedRule`."""
        for (i, key), value in now.numbers.items():
            if key in self.made.param_groups[i]:  # parts of betas are those of the fallback alone
                # The optimizer reads its groups: the tensors that are differentiated by are put there.
                self.made.param_groups[i][key] = value
        # Factors are collected at the optimizer's own intervals.
        if now.count % self.made.factor_every == 0:
            self._fill(now.watched)
        averages = shared["averages"]
        weights = {name: averages[name]["mean_weight"] for name in means if name in averages}
        # The state before the first step has no graph.
        state = shared["factors"] if now.count else self.functional.start
        with quiet():
            directions, shared["factors"] = self.functional.directions(
                now.count, state, now.gradients, means, weights
            )
        if self.made.factors_due:
            raise StudyError(
                "no layer that KFAC takes took part in the loss, so a step has no factors and cannot be "
                "differentiated; use every layer in each step, or leave them out with exclude=[...]"
            )
        return dict(directions)

    def _fill(self, watched: list[Tensor | None]) -> None:
        """Put factors and the number of loss terms where a backward pass would leave them."""
        # One gradient for each output that a tap has noted.
        rest = iter(watched)
        for tap, uses in zip(self.taps, self.uses, strict=True):
            tap.uses = list(uses)
            tap.fill([next(rest) for _ in uses])


class FollowingStack(FactorStack):
    """A bank of whole matrices whose averages and roots are new tensors at every change."""

    def _matrices(self) -> dict[str, Tensor]:
        shape = (self.size,) if self.diagonal else (self.size, self.size)
        return {"factor": self._zeros(*shape), "root": self._zeros(*shape)}

    @property
    def _packed(self) -> int:
        return 0

    def _diagonal(self, at: slice) -> Tensor:
        factor = self.state["factor"][at]
        return factor if self.diagonal else factor.diagonal(dim1=-2, dim2=-1)

    def average(
        self,
        new: Mapping[Any, tuple[Tensor, Tensor]],
        decay: float,
        memory: float = 0.0,
        ok: Tensor | None = None,
    ) -> None:
        """Add one observation of each factor to the moving averages, see `FactorStack`.

        Out of place: autograd cannot follow several changes of views into one tensor.
        """
        # Averages change, so that no root is that of its average.
        self.fresh.clear()
        factor, weight = self.state["factor"], self.state["weight"]
        matrices, counts = list(factor.unbind()), list(torch.zeros_like(weight).unbind())
        # A tap may give the factors of several groups, for as many slots in a row.
        for key, (observed, number) in new.items():
            own = observed if observed.dim() == factor.dim() else observed[None]
            slots = slice(self.slot[key], self.slot[key] + len(own))
            matrices[slots] = own.to(self.dtype).unbind()
            counts[slots] = number.reshape(-1).repeat_interleave(len(own) // number.numel()).to(self.dtype)
        observation, rows = torch.stack(matrices), torch.stack(counts)
        # Slots that were not observed keep what is remembered of them: lerp by 0 changes nothing.
        seen = rows > 0
        share = (1 - decay) * seen.to(self.dtype)
        diagonals = observation if self.diagonal else observation.diagonal(dim1=-2, dim2=-1)
        recent = torch.maximum(self.state["recent"] * (1 - share), diagonals.sum(-1))
        self.state |= {
            "factor": factor.lerp(observation, wide(share, factor)),
            "weight": weight + share * (1 - weight),
        }
        self.changed()
        peak, highest, traces = self.state["peak"], self.state["highest"], self.traces()
        self.state |= {
            "peak": torch.where(seen, torch.maximum(peak * memory, traces), peak),
            "highest": torch.maximum(highest, traces),
            "recent": torch.where(seen, recent, self.state["recent"]),
            "rows": torch.where(seen, rows, self.state["rows"]),
        }

    def refresh(self, damping: Tensor, power: float, slots: Sequence[int], relative: bool = False) -> None:
        """Recompute inverse roots, see `FactorStack`."""
        indices = torch.tensor(slots, device=self.device)
        self.fresh.update(slots)
        value, rho = self.value(indices), damping[indices]
        if self.diagonal:
            rho = rho * value.amax(-1) if relative else rho
            root = diagonal_roots(value, rho, power)
        else:
            root = damped_root(value, rho, power, relative)
        # index_copy makes new tensors, for the graph of the step before needs the old ones.
        changed = {"root": root, "rho": rho, "rooted": self.traces()[indices]}
        self.state |= {name: self.state[name].index_copy(0, indices, part) for name, part in changed.items()}
