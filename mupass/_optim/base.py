"""What all planned optimizers share: checks, groups, momentum, decay, fallback, state."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import MupassWarning, OptimizerError
from mupass._optim.bound import BoundOptimizer
from mupass._optim.checks import Coverage, Covered, check_choice, check_number
from mupass._optim.fallback import FALLBACKS, average, fallback_state, fallback_step, follow, momentum_state
from mupass._optim.parallel import is_sharded, local, sum_over_ranks, whole
from mupass._scales.plan import OptimizerSpec, Plan, plan_of


class PlannedOptimizer(BoundOptimizer):
    """Base of optimizers that precondition some parameters and hand the rest to a named fallback.

    A ``GradScaler`` hands its scale over (``_step_supports_amp_scaling``) instead of unscaling by itself.
    Width factors are the group key ``mupass_scale`` and multiply at each step, so that a scheduler may set
    ``lr`` to anything. Decoupled weight decay uses ``lr`` without the width factor: it is the same at all
    widths.
    """

    _step_supports_amp_scaling = True
    smooths = True  # whether momentum is added to directions here, or they have it already

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        lr: float,
        damping: float,
        *,
        momentum: float,
        weight_decay: float,
        fallback: str,
        fallback_lr: float,
        strict: bool,
    ) -> None:
        check_number("lr", lr)
        check_number("damping", damping)
        check_number("momentum", momentum, 0, 1)
        check_number("weight_decay", weight_decay)
        check_number("fallback_lr", fallback_lr)
        check_choice("fallback", fallback, FALLBACKS)
        self.root, plan = plan_of(model)
        self.plan: Plan = plan.for_optimizer(spec)
        self.plan.check(self.root)
        self.spec = spec
        self.names = {p: n for n, p in self.root.named_parameters() if p.requires_grad}
        if not self.names:
            raise OptimizerError("every parameter of the model is frozen")
        self._steps = 0
        self._stats: Counter[str] = Counter()
        self._warned: set[str] = set()
        own, reasons = self._assign()
        self._coverage = Coverage(
            Covered(n, own.get(n, fallback), reasons.get(n, "")) for n in self.names.values()
        )
        left = [c for c in self._coverage if c.parameter not in own]
        if not own and self._wanted():
            warnings.warn(
                f"mupass.{type(self).__name__} can take no parameter of this model; all go to {fallback}. "
                f"First reason: {left[0].parameter}: {left[0].reason}",
                MupassWarning,
                stacklevel=3,
            )
        if strict and left:
            raise OptimizerError("strict=True, but these fall back:\n" + str(Coverage(left)))
        groups = self._groups(spec.name, own, lr, weight_decay, momentum)
        for group in groups:
            group["damping"] = damping
        others = {c.parameter for c in left}
        groups += self._groups(fallback, others, fallback_lr, weight_decay, momentum)
        # OneCycleLR cycles momentum where the defaults have it.
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(self._first_state(p, group))
        self._complete = True

    def _first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter's state before the first step: a distributed checkpoint is loaded into it."""
        if group["algorithm"] == self.spec.name:
            return momentum_state(parameter, group) if self.smooths else {}
        return fallback_state(parameter, group)

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return own parameters -> block type, and the others -> reason."""
        raise NotImplementedError

    def _wanted(self) -> bool:
        """Return whether it is a surprise when no parameter is taken."""
        return True

    def _directions(self) -> dict[Tensor, Tensor]:
        """Return the preconditioned gradient of every own parameter that has a gradient."""
        raise NotImplementedError

    def _groups(
        self, algorithm: str, names: Iterable[str], lr: float, weight_decay: float, momentum: float
    ) -> list[dict[str, Any]]:
        """Merge parameters of equal scales into groups."""
        plan = self.plan if algorithm == self.spec.name else self.plan.for_optimizer(algorithm)
        wanted = set(names)
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for parameter, name in self.names.items():
            if name not in wanted:
                continue
            scales = plan[name].scales
            factor = scales.lr * (self._correction(name) if algorithm == self.spec.name else 1.0)
            key = (float(f"{factor:.12g}"), float(f"{scales.epsilon:.12g}") if algorithm == "adamw" else 1.0)
            group = groups.setdefault(
                key,
                {
                    "params": [],
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "momentum": momentum,
                    "algorithm": algorithm,
                    "mupass_scale": factor,
                    "mupass_epsilon": scales.epsilon,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def _correction(self, name: str) -> float:
        """Return a further factor on the learning rate, for what the scale table cannot know."""
        return 1.0

    def coverage(self) -> Coverage:
        """Return how every parameter is treated, and why."""
        return self._coverage

    def stats(self) -> dict[str, int]:
        """Return counts of what went wrong and was survived, with the number of steps taken."""
        return {"steps": self._steps, **self._stats}

    def count(self, what: str, where: str, times: int = 1) -> None:
        """Count an incident, and warn at the first of its kind and place.

        Args:
            what: Kind of incident, a key of `stats`.
            where: Parameter or factor.
            times: How many.
        """
        self._stats[what] += times
        if f"{what}:{where}" not in self._warned:
            self._warned.add(f"{what}:{where}")
            message = f"mupass.{type(self).__name__}: {what.replace('_', ' ')}: {where}"
            warnings.warn(message, MupassWarning, stacklevel=3)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Not supported: factors belong to exactly one forward and backward pass.

        Raises:
            OptimizerError: A closure is given.
        """
        if closure is not None:
            raise OptimizerError(
                f"{type(self).__name__} takes no closure: run forward and backward once, then call step()"
            )
        self._unscale()
        if self._gradients_are_finite():
            directions = self._directions()
            for group in self.param_groups:
                self._apply(group, directions)
            self._steps += 1  # a skipped step is made up for: what was due at it is due at the next
        else:
            self._discard()
            self.count("skipped_steps", "a gradient holds NaN or infinity")
        self._prepare_next()

    def _unscale(self) -> None:
        """Take a gradient scaler's factor out; it leaves it on the optimizer for the time of a step."""
        scale = getattr(self, "grad_scale", None)
        self._amp_scale = 1.0 if scale is None else float(scale)
        if scale is not None:
            for p in self.names:
                if p.grad is not None:
                    p.grad.div_(self._amp_scale)

    def _gradients_are_finite(self) -> bool:
        grads = [p.grad for p in self.names if p.grad is not None]
        if not grads:
            return True
        sums = torch.stack([local(g).sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads])
        if any(is_sharded(g) for g in grads):
            sums = sum_over_ranks([sums])[0]
        if bool(sums.isfinite().all()):
            return True
        return all(bool(whole(g).isfinite().all()) for g in grads)  # a sum of finite numbers may overflow

    def _discard(self) -> None:
        """Forget statistics of a step that is skipped."""

    def _prepare_next(self) -> None:
        """Set up statistics for the passes that come before the next step."""

    def _apply(self, group: dict[str, Any], directions: Mapping[Tensor, Tensor]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = follow(self.state[p], p)
            if group["algorithm"] == self.spec.name:
                if p not in directions:
                    continue
                update = average(directions[p], state, group["momentum"] if self.smooths else 0.0)
            else:
                update = fallback_step(p.grad, state, group)
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * group["mupass_scale"])

    def _dampings(self) -> dict[str, float]:
        """Return the damping of every own parameter."""
        return self._setting("damping")

    def _setting(self, key: str) -> dict[str, float]:
        """Return a number of every own parameter's group; a schedule may have changed it."""
        own = [g for g in self.param_groups if g["algorithm"] == self.spec.name]
        return {self.names[p]: g[key] for g in own for p in g["params"]}

    def _extra_state(self) -> dict[str, Any]:
        """Return the subclass's own state."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the subclass's own state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, factors and schedule included: a resumed run goes on bit for bit."""
        extra = {
            "kind": self._kind(),
            "steps": self._steps,
            "stats": [list(item) for item in self._stats.items()],
            **self._extra_state(),
        }
        return {**super().state_dict(), "mupass": extra}

    def _kind(self) -> list[Any]:
        """Return what a saved state must have in common with this optimizer: its class, and who is in it."""
        groups = [[g["algorithm"], *(self.names[p] for p in g["params"])] for g in self.param_groups]
        return [type(self).__name__, str(self.spec), groups, self._layout()]

    def _layout(self) -> Any:
        """Return a description of the subclass's own state; states of another one do not fit."""
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state_dict: Result of `state_dict`, of an optimizer of the same kind on the same model.

        Raises:
            OptimizerError: It is the state of another optimizer.
        """
        if "mupass" not in state_dict:
            raise OptimizerError(f"not a state of mupass.{type(self).__name__}: key 'mupass' is missing")
        extra = state_dict["mupass"]
        # Checked before the first change: a refused state leaves this optimizer as it was.
        ours, theirs = self._kind(), extra.get("kind")
        if ours != theirs:
            saved = " ".join(map(str, theirs[:2])) if theirs else "an unknown optimizer"
            what = "other parameters, groups or factors" if theirs and theirs[:2] == ours[:2] else saved
            raise OptimizerError(f"state of {what}; this is {ours[0]} {ours[1]}")
        # A copy, where torch would go on in the caller's tensors.
        super().load_state_dict(deepcopy({k: v for k, v in state_dict.items() if k != "mupass"}))
        self._steps, self._stats = extra["steps"], Counter(dict(extra["stats"]))
        self._load_extra_state(extra)
        self._prepare_next()
