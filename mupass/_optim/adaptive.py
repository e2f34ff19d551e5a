"""Levenberg-Marquardt: damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mupass._errors import OptimizerError, kind_of
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

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> optimizer = mupass.KFAC(net)
        >>> adaptive = mupass.LevenbergMarquardt(optimizer, every=2)
        >>> x = torch.randn(4, 8)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     net(x).square().mean().backward()
        ...     adaptive.step(lambda: net(x).square().mean())
    """

    def __init__(
        self,
        optimizer: KFAC,
        every: int = 5,
        omega: float = 0.95,
        smallest: float = 1e-8,
        largest: float = 1.0,
    ) -> None:
        if not isinstance(optimizer, KFAC):
            raise OptimizerError(f"LevenbergMarquardt takes a mupass.KFAC, not {kind_of(optimizer)}")
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
        # The closure gives the loss of the same batch before and after the step.
        before = float(closure())
        moving = [parameter for parameter in self.optimizer.names if parameter.grad is not None]
        before_step = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in moving]
        self.optimizer.step()
        moves, linear = {}, 0.0
        for parameter, weight, gradient in before_step:
            assert gradient is not None
            move = whole(parameter - weight)
            moves[self.optimizer.names[parameter]] = move
            # g d, the part of the model that is linear in the move.
            linear += float((whole(gradient) * move).sum())
        # g d + d^T F d / 2
        predicted = linear + self.optimizer.curvature_along(moves) / 2
        # Where the model predicts no fall, the ratio says nothing about it.
        if predicted < 0:
            self.ratio = (float(closure()) - before) / predicted
            self._adapt()

    def _adapt(self) -> None:
        """Lower damping where the model predicts well, and raise it where it promises too much."""
        factor = 1.0
        if self.ratio > 0.75:
            factor = self.omega**self.every
        smallest, largest = self.bounds
        for group in self.optimizer.param_groups:
            if "damping" not in group:
                continue
            damping = group["damping"] * factor
            # The loss fell by less than a quarter of what the model promised: it is trusted less.
            if self.ratio < 0.25:
                damping = damping / self.omega**self.every
            group["damping"] = min(max(damping, smallest), largest)

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps; damping is in the optimizer's groups."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a saved state.

        Args:
            state: Result of `state_dict`.
        """
        self.steps = state["steps"]
