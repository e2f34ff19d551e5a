"""What all planned optimizers share: checks, groups, momentum, decay, fallback, state."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import MupassWarning, OptimizerError
from mupass._optim.checks import Coverage, Covered, check_choice, check_number
from mupass._optim.fallback import (
    Fallback,
    adam_rate,
    average_state,
    averages,
    fallback_directions,
    fallback_rate,
    fallback_state,
    heavy_ball,
    real,
    state_dtype,
    sum_state,
)
from mupass._optim.model_bound import BoundOptimizer
from mupass._optim.rounding import check_rounded, drawn_seed, mixed, to_bfloat16
from mupass._optim.saved import check_state, copy_state, saved_kind
from mupass._parallel import exchange, from_rank, is_sharded, local, sharded_like, sum_over_ranks, whole
from mupass._scales.plan import OptimizerSpec, Plan, plan_of

MOMENTUM_OF = ("gradients", "directions")
DECAYED = ("all", "matrices")
OVERRIDES = ("lr", "weight_decay", "damping")
EMPTY = "none"  # treatment of a parameter without entries
NO_ENTRIES = "it has no entries"


class PlannedOptimizer(BoundOptimizer):
    """Base of optimizers that precondition some parameters and hand the rest to a named fallback.

    A ``GradScaler`` hands its scale over (``_step_supports_amp_scaling``) instead of unscaling by itself.
    Width factors are the group key ``mupass_scale`` and multiply at each step, so that a scheduler may set
    ``lr`` to anything. Decoupled weight decay uses ``lr`` without the width factor: it is the same at all
    widths.

    A step in which a gradient is NaN or infinite changes nothing: it counts with the weight zero in every
    average. Whether it is one stays on the device, and so do the counts of what goes wrong; they are read
    once in ``report_every`` steps.
    """

    _step_supports_amp_scaling = True
    smooths = True  # whether gradients are averaged here, or the subclass does it
    report_every = 10
    _ranks = 1

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        lr: float | None,
        damping: float,
        *,
        momentum: float,
        momentum_of: str = "gradients",
        weight_decay: float,
        decay: str = "all",
        overrides: Mapping[str, Mapping[str, float]] | None = None,
        fallback: str | Fallback,
        fallback_lr: float | None,
        strict: bool,
        stochastic_rounding: bool = False,
    ) -> None:
        if lr is not None:
            check_number("lr", lr)
        check_number("damping", damping)
        check_number("momentum", momentum, 0, 1)
        check_number("weight_decay", weight_decay)
        check_choice("decay", decay, DECAYED)
        self.momentum_of = check_choice("momentum_of", momentum_of, MOMENTUM_OF)
        self.fallback = Fallback.of(fallback, fallback_lr)
        self.root, plan = plan_of(model)
        self.plan: Plan = plan.for_optimizer(spec)
        self.plan.check(self.root)
        self.spec = spec
        every = {n: p for n, p in self.root.named_parameters()}
        self.names: dict[Tensor, str] = {p: n for n, p in every.items() if p.requires_grad}
        self._frozen: dict[Tensor, str] = {p: n for n, p in every.items() if not p.requires_grad}
        if not self.names:
            raise OptimizerError("every parameter of the model is frozen")
        if stochastic_rounding:
            check_rounded(self.names)
        self._seed = drawn_seed(self._ranks, self._device) if stochastic_rounding else None
        self._numbers = {name: number for number, name in enumerate(every)}
        self._overrides = _checked_overrides(overrides, every)
        self._decay_of = decay
        self._steps = 0
        self._stats: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._skipped: Tensor | None = None  # steps since the last report, on the device
        self._watching = True  # whether the next step is reported at once, because the last one was skipped
        reasons = {name: _unfit(p) for p, name in self.names.items()}
        self._unfit = {name: reason for name, reason in reasons.items() if reason}
        own, found = self._assign()
        # No subclass takes these; one without entries is nothing else.
        reasons = {**self._unfit, **found, **{n: w for n, w in self._unfit.items() if w == NO_ENTRIES}}
        self._coverage = Coverage(self._covered(n, own, reasons) for n in self.names.values())
        left = [c for c in self._coverage if c.parameter not in own and c.treatment != EMPTY]
        if not own and left and self._wanted():
            warnings.warn(
                f"mupass.{type(self).__name__} can take no parameter of this model; all go to "
                f"{self.fallback.name}. First reason: {left[0].parameter}: {left[0].reason}",
                MupassWarning,
                stacklevel=3,
            )
        if strict and left:
            raise OptimizerError("strict=True, but these fall back:\n" + str(Coverage(left)))
        lr = self._default_rate() if lr is None else lr
        shared = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "damping": damping}
        groups = self._groups(spec.name, own, shared)
        others = [c.parameter for c in left]
        groups += self._groups(self.fallback.name, others, self._fallback_settings(weight_decay))
        # OneCycleLR cycles momentum where the defaults have it.
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._members = [[self.names[p] for p in g["params"]] for g in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(self._first_state(p, group))
        self._complete = True

    def _default_rate(self) -> float:
        """Return the learning rate at the base width where none is given: that of Adam."""
        return adam_rate(self.plan.base_width)

    def _fallback_settings(self, weight_decay: float) -> dict[str, Any]:
        fallback = self.fallback
        own_decay = fallback.weight_decay
        return {
            "lr": fallback_rate(fallback, self.plan.base_width),
            "weight_decay": weight_decay if own_decay is None else own_decay,
            "momentum": fallback.momentum,
            "betas": tuple(fallback.betas),
            "eps": fallback.eps,
        }

    def _covered(self, name: str, own: Mapping[str, str], reasons: Mapping[str, str]) -> Covered:
        reason = reasons.get(name, "")
        if reason == NO_ENTRIES:
            return Covered(name, EMPTY, reason)
        return Covered(name, own.get(name, self.fallback.name), reason)

    def _first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a parameter's state before the first step: a distributed checkpoint is loaded into it."""
        if group["algorithm"] != self.spec.name:
            return fallback_state(parameter, group)
        return {**self._momentum_state(parameter, group), **self._own_state(self.names[parameter])}  # type: ignore[index]

    def _momentum_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if not self.smooths or not group["momentum"]:
            return {}
        if self.momentum_of == "directions":
            return sum_state(parameter)
        return average_state(parameter, "momentum")

    def _own_state(self, name: str) -> dict[str, Tensor]:
        """Return the subclass's own state of a parameter, as views of what it works with.

        On the meta device where another rank keeps it.
        """
        return {}

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return own parameters -> block type, none of them unfit, and the others -> reason."""
        raise NotImplementedError

    def _wanted(self) -> bool:
        """Return whether it is a surprise when no parameter is taken."""
        return True

    def _directions(
        self, gradients: Mapping[str, Tensor], means: Mapping[str, Tensor], ok: Tensor
    ) -> dict[str, Tensor]:
        """Return the direction of every own parameter that has a gradient, and whose owner this rank is.

        Args:
            gradients: Gradient of each own parameter that has one, whole; zeros where the step does not
                count.
            means: Their moving averages, or the same again where the subclass averages by itself.
            ok: 1, or 0 for a step that does not count.
        """
        raise NotImplementedError

    def _groups(
        self, algorithm: str, names: Iterable[str], settings: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Merge parameters of equal scales and settings into groups."""
        mine = algorithm == self.spec.name
        plan = self.plan if mine else self.plan.for_optimizer(algorithm)
        wanted = set(names)
        groups: dict[Any, dict[str, Any]] = {}
        for parameter, name in self.names.items():
            if name not in wanted:
                continue
            scales = plan[name].scales
            factor = scales.lr * (self._correction(name) if mine else 1.0)
            chosen = {**settings, **self._overridden(name, settings)}
            if self._decay_of == "matrices" and not self._decays(name):
                chosen["weight_decay"] = 0.0
            epsilon = scales.epsilon if algorithm == "adamw" else 1.0
            # Twelve digits: base sizes that are not whole numbers leave rounding errors in the last ones.
            key = (float(f"{factor:.12g}"), float(f"{epsilon:.12g}"), *chosen.values())
            fresh = {
                "params": [],
                **chosen,
                "algorithm": algorithm,
                "mupass_scale": factor,
                "mupass_epsilon": scales.epsilon,
                "mupass_kind": saved_kind(type(self).__name__, str(self.spec)),
                "mupass_steps": 0,
                **({} if self._seed is None else {"mupass_seed": self._seed}),
            }
            groups.setdefault(key, fresh)["params"].append(parameter)
        return list(groups.values())

    def _overridden(self, name: str, settings: Mapping[str, Any]) -> dict[str, float]:
        """Return the settings that the first fitting pattern changes."""
        for pattern, values in self._overrides.items():
            if fnmatchcase(name, pattern):
                return {key: value for key, value in values.items() if key in settings}
        return {}

    def _decays(self, name: str) -> bool:
        """Return whether a parameter is a matrix in the sense of weight decay: no vector, no table."""
        geometry = self.plan[name].geometry
        table = any(use.kind == "embedding" for use in geometry.uses)
        return bool(geometry.fan_in_axes and geometry.fan_out_axes) and not table

    def _correction(self, name: str) -> float:
        """Return a further factor on the learning rate, for what the scale table cannot know."""
        return 1.0

    @property
    def ranks(self) -> int:
        """Number of ranks that share the work."""
        return self._ranks

    def coverage(self) -> Coverage:
        """Return how every parameter is treated, and why."""
        return self._coverage

    def stats(self) -> dict[str, int]:
        """Return counts of what went wrong and was survived, with the number of steps taken."""
        self._report()
        return {"steps": self._steps - self._stats["skipped_steps"], **self._stats}

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
            warnings.warn(
                f"mupass.{type(self).__name__}: {what.replace('_', ' ')}: {where}",
                MupassWarning,
                stacklevel=3,
            )

    def _incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """Return what may have gone wrong where, and tensors that count it; these start anew then."""
        return [], []

    def _report(self) -> None:
        """Read the counts of what went wrong from the device, all at once, and warn of what is new."""
        told, counts = self._incidents()
        if self._skipped is not None:
            told.append(("skipped_steps", "a gradient holds NaN or infinity"))
            counts.append(self._skipped.reshape(1))
            self._skipped = None
        if not counts:
            return
        device = counts[0].device
        numbers = torch.cat([c.to(device, torch.float32) for c in counts]).tolist()
        skipped = False
        for (what, where), number in zip(told, numbers, strict=True):
            if number:
                self.count(what, where, int(number))
                skipped |= what == "skipped_steps"
        self._watching = skipped
        if skipped:
            self._make_up()

    def _make_up(self) -> None:
        """Do at the next step what was due at steps that were skipped."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Runs the model once, forward and backward, and returns the loss; it is called once,
                with gradients enabled, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            OptimizerError: A group holds a number that no step can be taken with, or a gradient is sparse or
                of another shape than its parameter. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adopt_swapped()
        self._adopt_thawed()
        self._check_groups()
        self._check_gradients()
        self._unscale()
        ok = self._gradients_are_finite()
        if ok is not None:
            self._step(ok)
        self._prepare_next()
        return loss

    def _step(self, ok: Tensor) -> None:
        """Take a step that counts or, where ``ok`` is zero, does not."""
        skipped = 1 - ok
        self._skipped = skipped if self._skipped is None else self._skipped + skipped
        gradients, means = {}, {}
        for group in self._own_groups():
            some = [p for p in group["params"] if p.grad is not None]
            found = [self._gradient(p, ok) for p in some]
            averaged = self._averaged(some, found, group, ok)
            for p, gradient, mean in zip(some, found, averaged, strict=True):
                name = self.names[p]
                gradients[name] = self._whole(gradient, p)
                means[name] = gradients[name] if mean is gradient else self._whole(mean, p)
        directions = self._from_owners(self._directions(gradients, means, ok), gradients)
        for group in self.param_groups:
            some = [p for p in group["params"] if p.grad is not None and p.numel()]
            if group["algorithm"] == self.spec.name:
                some = [p for p in some if self.names[p] in directions]
                updates = [self._own_update(p, directions[self.names[p]], group, ok) for p in some]
            else:
                found = [self._gradient(p, ok) for p in some]
                states = [self._local_state(p) for p in some]
                updates = fallback_directions(found, states, group, ok) if some else []
            self._move(some, updates, group, ok)
        self._steps += 1
        for group in self.param_groups:
            group["mupass_steps"] = self._steps
        if self._steps % self.report_every == 0 or self._watching:
            self._report()

    def _own_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the parameters that the subclass takes."""
        return [g for g in self.param_groups if g["algorithm"] == self.spec.name]

    def _from_owners(
        self, directions: dict[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the directions that all ranks have found, of parameters that have a gradient here."""
        owner = self._owner
        if owner:
            own = {n: p for p, n in self.names.items() if n in owner}
            like = {n: torch.empty(p.shape, dtype=state_dtype(p), device="meta") for n, p in own.items()}
            directions = exchange(directions, owner, like, self._ranks, self._device)
        return {n: d for n, d in directions.items() if n in gradients}

    def _gradient(self, p: Tensor, ok: Tensor) -> Tensor:
        """Return this rank's part of a gradient in the precision of the state; zeros in a skipped step."""
        assert p.grad is not None
        grad = real(local(p.grad)).to(state_dtype(p))
        return torch.where(
            ok.to(grad.device) > 0, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)
        )

    @staticmethod
    def _whole(part: Tensor, p: Tensor) -> Tensor:
        """Return all of a tensor of which this rank has the part that it has of a parameter."""
        if not is_sharded(p):
            return part
        from torch.distributed.tensor import DTensor

        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        tensor = DTensor.from_local(part, mesh, placements, shape=p.shape, stride=p.stride())
        return whole(tensor)

    def _averaged(
        self, some: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any], ok: Tensor
    ) -> list[Tensor]:
        """Return the moving averages of gradients where these are what momentum is of."""
        if not self.smooths or not group["momentum"] or self.momentum_of == "directions" or not some:
            return gradients
        states = [self._local_state(p) for p in some]
        return averages(gradients, states, "momentum", group["momentum"], ok)

    def _local_state(self, p: Tensor) -> dict[str, Tensor]:
        return {name: local(value) for name, value in self.state[p].items()}

    def _own_update(self, p: Tensor, direction: Tensor, group: Mapping[str, Any], ok: Tensor) -> Tensor:
        """Return this rank's part of an own parameter's update, in the precision of the state."""
        part = local(sharded_like(direction.to(state_dtype(p)), p))
        if not self.smooths or self.momentum_of == "gradients" or not group["momentum"]:
            return part
        return heavy_ball(part, self._local_state(p), group["momentum"], ok)

    def _move(self, some: list[Tensor], updates: list[Tensor], group: Mapping[str, Any], ok: Tensor) -> None:
        """Subtract updates, after decay, from the parameters of a group."""
        if not some:
            return
        rate, decay = group["lr"] * group["mupass_scale"], group["lr"] * group["weight_decay"]
        for p, update in zip(some, updates, strict=True):
            target, count = real(local(p)), ok.to(update)
            # Half precision knows no factor between 0.998 and 1: it is rounded once, after the whole step.
            moved = target if target.dtype == update.dtype else target.to(update.dtype)
            if group["weight_decay"]:
                moved.mul_(1 - decay * count)
            moved.sub_(update * (rate * count))
            if target.dtype == torch.bfloat16 and "mupass_seed" in group:
                turn = (self._steps, self._numbers[self.names[p]])
                moved = to_bfloat16(moved, mixed(int(group["mupass_seed"]), turn))
            if moved is not target:
                target.copy_(moved)

    def _adopt_swapped(self) -> None:
        """Follow a trainer that put other tensors of the same parameters into the groups."""
        for group, members in zip(self.param_groups, self._members, strict=True):
            if len(group["params"]) != len(members):
                raise OptimizerError(
                    f"a group has {len(group['params'])} parameters where the plan has {len(members)}; "
                    "make the optimizer anew"
                )
            for p, name in zip(group["params"], members, strict=True):
                if p not in self.names:
                    self._adopt(p, name)

    def _adopt(self, new: Tensor, name: str) -> None:
        old = next(p for p, n in self.names.items() if n == name)
        if old.shape != new.shape:
            raise OptimizerError(
                f"{name} was replaced in the optimizer's groups by a tensor of shape {tuple(new.shape)}, not "
                f"{tuple(old.shape)}; make the optimizer anew"
            )
        self.names = {new if p is old else p: n for p, n in self.names.items()}
        state = self.state.pop(old, {})
        self.state[new] = {
            key: _placed_like(value, new) if "." not in key and value.shape == old.shape else value
            for key, value in state.items()
        }
        self._replaced(name, new)

    def _replaced(self, name: str, new: Tensor) -> None:
        """Take notice of a parameter that is another tensor now."""

    def _adopt_thawed(self) -> None:
        """Let the fallback train parameters that were frozen when the optimizer was made."""
        thawed = {p: n for p, n in self._frozen.items() if p.requires_grad and p.grad is not None}
        for p, name in thawed.items():
            del self._frozen[p]
            self._add_to_fallback(p, name, "it was frozen when the optimizer was made")
            warnings.warn(
                f"mupass.{type(self).__name__}: {name} was frozen when the optimizer was made; "
                f"{self.fallback.name} trains it from now on. Make the optimizer anew to have it "
                "preconditioned",
                MupassWarning,
                stacklevel=4,
            )

    def _add_to_fallback(self, p: Tensor, name: str, reason: str) -> None:
        self.names[p] = name
        decay = next((g["weight_decay"] for g in self.param_groups), 0.0)
        (group,) = self._groups(self.fallback.name, [name], self._fallback_settings(decay))
        self._complete = False
        self.add_param_group(group)
        self._complete = True
        self._members.append([name])
        self.state[p].update(self._first_state(p, self.param_groups[-1]))
        self._coverage = Coverage([*self._coverage, Covered(name, self.fallback.name, reason)])

    def _check_groups(self) -> None:
        """Refuse numbers, as a scheduler may have set them, that would destroy weights."""
        bounds = {"lr": math.inf, "weight_decay": math.inf, "damping": math.inf, "momentum": 1.0}
        for number, group in enumerate(self.param_groups):
            for key, high in bounds.items():
                if key in group and not isinstance(group[key], Tensor):
                    check_number(f"{key} of group {number} ({self._members[number][0]})", group[key], 0, high)
            if group["momentum"] and self._lacks_momentum(group):
                raise OptimizerError(
                    f"the momentum of group {number} ({self._members[number][0]}) was set to "
                    f"{group['momentum']:g}, but the optimizer was made with momentum=0 and has no average; "
                    "make it with momentum, or pass cycle_momentum=False to the scheduler"
                )

    def _lacks_momentum(self, group: Mapping[str, Any]) -> bool:
        """Return whether momentum was switched on after the state of a group was made without."""
        mine = group["algorithm"] == self.spec.name and self.smooths
        if not mine and group["algorithm"] != "sgd":
            return False
        return any("momentum" not in self.state[p] for p in group["params"])

    def _check_gradients(self) -> None:
        for p, name in self.names.items():
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise OptimizerError(
                    f"the gradient of {name} is sparse, and mupass.{type(self).__name__} needs dense ones: "
                    "make its module with sparse=False"
                )
            if p.grad.shape != p.shape:
                raise OptimizerError(
                    f"the gradient of {name} has shape {tuple(p.grad.shape)}, the parameter {tuple(p.shape)}"
                )

    def _unscale(self) -> None:
        """Take a gradient scaler's factor out; it leaves it on the optimizer for the time of a step."""
        scale = getattr(self, "grad_scale", None)
        self._amp_scale: Tensor | float = 1.0 if scale is None else scale
        if scale is not None:
            for p in self.names:
                if p.grad is not None:
                    local(p.grad).div_(scale.to(p.grad.device))

    def _gradients_are_finite(self) -> Tensor | None:
        """Return 1, or 0 where a gradient holds NaN or infinity, on the device; None without any gradient."""
        parts = [real(local(p.grad)) for p in self.names if p.grad is not None]
        grads = [part for part in parts if part.numel()]  # a rank's shard may be empty
        sharded = any(is_sharded(p) for p in self.names)
        if not grads and not sharded:
            return None
        device = grads[0].device if grads else local(next(iter(self.names))).device
        fine = torch.ones((), dtype=torch.bool, device=device)
        if grads:
            fine = torch.stack([n.isfinite().to(device) for n in torch._foreach_norm(grads, math.inf)]).all()
        if sharded:
            broken = sum_over_ranks([(~fine).to(torch.float32)])[0]
            return (broken == 0).to(torch.float32)
        return fine.to(torch.float32)

    def _prepare_next(self) -> None:
        """Set up statistics for the passes that come before the next step."""

    def _dampings(self) -> dict[str, float]:
        """Return the damping of every own parameter."""
        return self._setting("damping")

    def _setting(self, key: str) -> dict[str, float]:
        """Return a number of every own parameter's group; a schedule may have changed it."""
        return {self.names[p]: g[key] for g in self._own_groups() for p in g["params"]}

    @property
    def _owner(self) -> Mapping[str, int]:
        """Own parameter -> the rank that keeps its preconditioner; empty where every rank has all."""
        return {}

    def _collected(self, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return a state with what other ranks keep of it."""
        owner = self._owner
        if not owner:
            return state
        ids = {name: i for i, name in enumerate(n for members in self._members for n in members)}
        found = dict(state)
        for name, rank in owner.items():
            kept = self._own_state(name)
            values = {key: from_rank(tensor, rank, self._device) for key, tensor in kept.items()}
            found[ids[name]] = {**state[ids[name]], **values}
        return found

    @property
    def _device(self) -> torch.device:
        return local(next(iter(self.names))).device

    def state_dict(self) -> dict[str, Any]:
        """Return the state, factors and schedule included: a resumed run goes on bit for bit.

        All of it is kept by parameter, where torch's checkpoint functions look for it. Where ranks share the
        preconditioner, all of them must call this: each returns the whole state.
        """
        found = super().state_dict()
        return {**found, "state": self._collected(found["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state_dict: Result of `state_dict`, of an optimizer of the same kind on the same model.

        Raises:
            OptimizerError: It is the state of another optimizer, of another version, or damaged. This
                optimizer is then as it was.
        """
        copy_state(self, *check_state(self, state_dict))
        self._steps = self.param_groups[0]["mupass_steps"]
        self._loaded()
        self._prepare_next()

    def _loaded(self) -> None:
        """Take notice that the state was written from outside."""


def _placed_like(value: Tensor, new: Tensor) -> Tensor:
    """Return a part of the state on the device, and in the shards, of a parameter's new tensor."""
    if value.device.type == "meta":
        return value
    return sharded_like(value.to(local(new).device), new)


def _checked_overrides(
    overrides: Mapping[str, Mapping[str, float]] | None, parameters: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return rates, decays and dampings by pattern of names, every number checked."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise OptimizerError(f"overrides must map patterns of names to settings, not {overrides!r}")
    names, found = list(parameters), {}
    for pattern, settings in overrides.items():
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(f"the pattern {pattern!r} in overrides fits no parameter")
        if not isinstance(settings, Mapping) or not settings:
            raise OptimizerError(f"overrides[{pattern!r}] must map {', '.join(OVERRIDES)} to numbers")
        for key, value in settings.items():
            check_choice(f"key of overrides[{pattern!r}]", key, OVERRIDES)
            check_number(f"{key} of overrides[{pattern!r}]", value)
        found[pattern] = {key: float(value) for key, value in settings.items()}
    return found


def _unfit(parameter: Tensor) -> str:
    """Return why no preconditioner can work with a parameter's numbers, or nothing."""
    if parameter.numel() == 0:
        return NO_ENTRIES
    return "its entries are complex numbers" if parameter.is_complex() else ""
