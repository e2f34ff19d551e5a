"""FoMoH: a second-order step in a few random directions, by forward-mode differentiation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError, is_whole
from mupass._hyper.functional_model import call, derivatives
from mupass._optim.checks import check_choice, check_number
from mupass._optim.linalg.roots import symmetric
from mupass._optim.model_bound import BoundOptimizer, tell_left_out
from mupass._parallel import is_sharded, world_size
from mupass._scales.plan import plan_of

LAWS = ("plan", "normal")
Closure = Callable[[], Tensor]


class FoMoH(BoundOptimizer):
    """Newton's step in the plane of K random directions (Cobb et al., arXiv 2408.10419, FoMoH-KD).

    With directions ``V = [v_1 ... v_K]`` the slopes ``g_j = v_j . grad`` and the curvature
    ``H_jk = v_j . Hessian . v_k`` come from duals of second order (nested `torch.func.jvp`): no backward
    pass and no memory for activations. The step is ``V kappa`` with ``kappa = -lr (|H| + rho)^-1 g``, where
    ``|H|`` has the absolute eigenvalues of H, so that a saddle is left and not approached, and
    ``rho = damping * largest |eigenvalue|``. The loss is more than its parabola: the step is halved until the
    loss is no larger than before, at most ``halvings`` times, and not taken if it is larger then.

    Directions are drawn anew at each step. Under ``law="plan"`` the entries of a parameter have the standard
    deviation ``m_in^(-1/2)``, with m_in its fan_in relative to the base width, so that a direction moves the
    output of every layer by the same at all widths; ``normal`` draws all alike, as in the paper.

    ``step`` needs a closure that returns the loss and does not call ``backward``::

        optimizer.step(lambda: F.cross_entropy(model(x), y))

    Args:
        model: A transformed model.
        lr: Part of the step to the minimum of the plane that is taken; 1 is Newton's step.
        directions: Number of directions K. A step takes K (K + 1) / 2 evaluations with duals of second order.
        damping: Damping relative to the largest curvature in the plane.
        halvings: How often a step may be halved.
        law: ``plan`` or ``normal``.
        seed: Seed of the directions.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, every parameter is frozen, or sharded.
        PlanError: The model was not transformed.

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> optimizer = mupass.FoMoH(net, directions=2)
        >>> x = torch.randn(4, 8)
        >>> loss = optimizer.step(lambda: net(x).square().mean())
        >>> optimizer.stats()["steps"] + optimizer.stats()["skipped_steps"]
        1
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        directions: int = 4,
        damping: float = 1e-3,
        *,
        halvings: int = 10,
        law: str = "plan",
        seed: int = 0,
    ) -> None:
        check_number("lr", lr)
        check_number("damping", damping)
        check_choice("law", law, LAWS)
        for name, number, least in (("directions", directions, 1), ("halvings", halvings, 0)):
            if not is_whole(number) or number < least:
                raise OptimizerError(f"{name} must be a whole number >= {least}, not {number!r}")
        if world_size(None) > 1:
            raise OptimizerError("FoMoH runs on one process: its slopes are not averaged over ranks")
        self.root, self.plan = plan_of(model)
        tell_left_out(model, self.root)
        self.plan.check(self.root)
        self.law, self.directions, self.halvings = law, directions, halvings
        parameters = dict(self.root.named_parameters())
        named = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not named:
            raise OptimizerError("every parameter of the model is frozen")
        sharded = next((name for name, parameter in named.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise OptimizerError(f"{sharded} is sharded; FoMoH needs whole parameters on one process")
        self._named = named
        # Standard deviation of a direction's entries.
        self._scales = dict.fromkeys(named, 1.0)
        if law == "plan":
            self._scales = {name: self.plan[name].geometry.m_in ** -0.5 for name in named}
        self._generator = torch.Generator().manual_seed(seed)
        self._steps, self._skipped = 0, 0
        self.slopes = torch.zeros(directions)
        self.curvature = torch.zeros(directions, directions)
        super().__init__(list(named.values()), {"lr": lr, "damping": damping})
        self._complete = True

    def stats(self) -> dict[str, int]:
        """Return the number of steps taken, and of those skipped because all parts of them raise the loss."""
        return {"steps": self._steps, "skipped_steps": self._skipped}

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns the loss at the model's present parameters; it is called several times.

        Returns:
            The loss before the step.

        Raises:
            OptimizerError: There is no closure, the loss is no number that depends on the parameters, or an
                operator has no forward derivative.
        """
        if closure is None:
            raise OptimizerError(
                "FoMoH needs a closure that returns the loss without backward: "
                "optimizer.step(lambda: loss(model(x), y))"
            )
        group = self.param_groups[0]
        # Every evaluation of this step has the same masks of dropout and the same buffers.
        tangents = [self._draw() for _ in range(self.directions)]
        states = _random_states(self._named.values())
        buffers = {name: buffer.clone() for name, buffer in self.root.named_buffers()}
        loss = _scalar(closure())  # what moves with every forward pass moves once
        states_after = _random_states(self._named.values())

        def at(*shifts: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
            """Return the loss beside the present parameters, with everything random as it was."""
            _set_random_states(states)
            still_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            # p + sum of c_j v_j, where each c_j is a dual number.
            moved_parameters = {
                name: sum(
                    (number.to(parameter) * tangent[name] for number, tangent in shifts),
                    start=parameter.detach(),
                )
                for name, parameter in self._named.items()
            }
            # Some forward derivatives (SiLU) can be differentiated again only where gradients are on.
            with torch.enable_grad():
                return _scalar(call(self.root, lambda _: closure(), moved_parameters, still_buffers))

        with derivatives("forward derivative, which FoMoH needs", ("forward", "Forward"), OptimizerError):
            self.slopes, self.curvature = plane(at, tangents)
            # A closure of another model has neither slopes nor curvature here.
            if not self._steps and not (self.slopes.any() or self.curvature.any()):
                raise OptimizerError("the closure's loss does not depend on the parameters of FoMoH's model")
            self._move(at, loss, tangents, group)
        _set_random_states(states_after)
        return loss

    def _move(
        self,
        at: Callable[..., Tensor],
        loss: Tensor,
        tangents: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        """Take the longest step, of the one to the minimum and its halves, that does not raise the loss."""
        if self.slopes.isfinite().all() and self.curvature.isfinite().all():
            weights = minimizer(self.slopes, self.curvature, group["damping"]) * group["lr"]
            for _ in range(self.halvings + 1):
                # The comparison is with the same masks and the same batch.
                if at(*zip(weights, tangents, strict=True)) <= loss:
                    for name, parameter in self._named.items():
                        for weight, tangent in zip(weights.tolist(), tangents, strict=True):
                            parameter.add_(tangent[name], alpha=weight)
                    self._steps += 1
                    return
                # Back-tracking: the loss is more than its parabola.
                weights = weights / 2
        self._skipped += 1

    def _draw(self) -> dict[str, Tensor]:
        """Return one direction; drawn on the CPU, so that it is the same on every device."""
        direction = {}
        for name, parameter in self._named.items():
            noise = torch.randn(parameter.shape, generator=self._generator, dtype=torch.float32)
            direction[name] = (self._scales[name] * noise).to(parameter.device, parameter.dtype)
        return direction

    def _identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with the first."""
        return {"law": self.law, "directions": self.directions, "names": list(self._named)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: a resumed run draws the directions that the first would have drawn."""
        own_state = {
            **self._identity(),
            "steps": self._steps,
            "skipped": self._skipped,
            "generator": self._generator.get_state(),
        }
        return {**super().state_dict(), "mupass": own_state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take over a saved state.

        Args:
            state_dict: Result of `state_dict`, of a FoMoH with the same directions on the same model.

        Raises:
            OptimizerError: It is the state of another optimizer.
        """
        own_state = state_dict.get("mupass", {})
        expected = self._identity()
        if {key: own_state.get(key) for key in expected} != expected:
            raise OptimizerError("not a state of FoMoH with this model, law and number of directions")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mupass"})
        self._steps, self._skipped = own_state["steps"], own_state["skipped"]
        self._generator.set_state(own_state["generator"].cpu())


def plane(at: Callable[..., Tensor], tangents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return slopes ``[K]`` and curvature ``[K, K]`` of a function along tangents, by nested duals.

    Args:
        at: Function of pairs ``(number, tangent)``, at the sum of whose products it is.
        tangents: The tangents.
    """
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    slopes = torch.zeros(len(tangents), dtype=torch.float64)
    curvature = torch.zeros(len(tangents), len(tangents), dtype=torch.float64)

    # The inner dual gives the slope along v as a function of the shift along w.
    def slope(second: Tensor, v: Any, w: Any) -> Tensor:
        return _jvp(lambda first: at((first, v), (second, w)), zero, one)[1]

    for row, v in enumerate(tangents):
        # The curvature is symmetric: its lower triangle is enough.
        for column, w in enumerate(tangents[: row + 1]):
            # The outer dual gives the slope itself, and its derivative along w.
            slopes[row], curvature[row, column] = _jvp(partial(slope, v=v, w=w), zero, one)
    return slopes, symmetric(curvature)


def minimizer(slopes: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """Return ``-(|H| + rho)^-1 g``: the minimizer of the quadratic model where H is positive.

    Args:
        slopes: ``[K]``.
        curvature: ``[K, K]`` symmetric.
        damping: Damping relative to the largest absolute eigenvalue.

    Raises:
        OptimizerError: The loss is linear in the plane, so that no step is the right one.
    """
    # |H| has the absolute eigenvalues: saddles are left.
    values, vectors = torch.linalg.eigh(curvature)
    magnitude = values.abs()
    # rho is relative to the largest curvature, so that it means the same in every plane.
    damped = magnitude + damping * magnitude.max()
    if not damped.min() > 0:
        raise OptimizerError(
            "the loss has no curvature along some direction, so FoMoH knows no step; damping > 0 or fewer "
            "directions may help"
        )
    return -(vectors @ ((vectors.T @ slopes) / damped))


def _jvp(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(function, (at,), (along,))  # type: ignore[return-value]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptimizerError(
            f"the closure must return the loss as a tensor of one number, not {type(loss).__name__}"
        )
    return loss.reshape(()).double()


def _random_states(parameters: Iterable[Tensor]) -> list[tuple[torch.device, Tensor]]:
    """Return the states of the generators that a forward pass may draw from."""
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + [(device, torch.cuda.get_rng_state(device)) for device in devices]


def _set_random_states(states: Iterable[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
