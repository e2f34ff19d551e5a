"""Levenberg-Marquardt: damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mupass._errors import OptimizerError
from mupass._optim.checks import check_number, check_period
from mupass._optim.kfac import KFAC
from mupass._parallel import whole


class LevenbergMarquardt:
    """Adapts K-FAC's damping (Martens & Grosse, arXiv 1503.05671, section 6.5).

    Every few steps the loss of the batch is evaluated before and after the step. Where it falls by more than
    three quarters of what the quadratic model ``g d + d^T F d / 2`` predicts, damping is lowered; by less
    than a quarter, raised. Damping stays relative to traces, so that it means the same at all widths.

    Args:
        optimizer: A K-FAC optimizer that has both factors (``e_a`` and ``e_b`` above 0).
        every: Steps between adaptations.
        omega: Damping is multiplied or divided by ``omega ** every``.
        smallest: Lower bound of damping.
        largest: Upper bound of damping.

    Raises:
        OptimizerError: An argument is out of range, or the optimizer leaves one side out.
    """

    def __init__(
        self,
        optimizer: KFAC,
        every: int = 5,
        omega: float = 0.95,
        smallest: float = 1e-8,
        largest: float = 1.0,
    ) -> None:
        if optimizer.spec.e_a == 0 or optimizer.spec.e_b == 0:
            raise OptimizerError("the quadratic model needs both factors: e_a and e_b above 0")
        self.optimizer = optimizer
        self.every = check_period("every", every)
        self.omega = check_number("omega", omega, 0.0, 1.0)
        self.bounds = (check_number("smallest", smallest), check_number("largest", largest, smallest))
        self.steps = 0
        self.ratio = float("nan")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        """Take the optimizer's step, and adapt damping when it is time.

        Args:
            closure: Returns the loss of the batch that the gradients are of; runs without gradients.
        """
        self.steps += 1
        if self.steps % self.every:
            self.optimizer.step()
            return
        before, old = float(closure()), {p: p.detach().clone() for p in self.optimizer.names}
        grads = {p: p.grad for p in old if p.grad is not None}
        self.optimizer.step()
        moves = {self.optimizer.names[p]: whole(p - old[p]) for p in grads}
        linear = sum(float((whole(g) * moves[self.optimizer.names[p]]).sum()) for p, g in grads.items())
        predicted = linear + self.optimizer.curvature_along(moves) / 2
        if predicted < 0:
            self.ratio = (float(closure()) - before) / predicted
            self._adapt()

    def _adapt(self) -> None:
        factor = self.omega**self.every
        for group in self.optimizer.param_groups:
            if "damping" in group:
                damping = group["damping"]
                damping = damping * factor if self.ratio > 0.75 else damping
                damping = damping / factor if self.ratio < 0.25 else damping
                group["damping"] = min(max(damping, self.bounds[0]), self.bounds[1])

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps; damping is in the optimizer's groups."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        self.steps = state["steps"]
