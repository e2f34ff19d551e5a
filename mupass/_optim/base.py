"""What all planned optimizers share: checks, groups, momentum, decay, fallback, state."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mupass._errors import MupassWarning, OptimizerError, kind_of, warn
from mupass._optim.checks import (
    Coverage,
    Covered,
    check_betas,
    check_choice,
    check_number,
)
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
from mupass._optim.made_groups import told_of_fold
from mupass._optim.model_bound import BoundOptimizer, tell_left_out
from mupass._optim.rounding import check_rounded, drawn_seed, mixed, to_bfloat16
from mupass._optim.saved import NAMES, THAWED, check_state, copy_state, saved_kind
from mupass._optim.training import BOUNDS, Training
from mupass._optim.vocabulary import Group, State, Tensors
from mupass._parallel import (
    exchange,
    from_rank,
    is_sharded,
    local,
    sharded_like,
    sum_over_ranks,
    whole,
    world_size,
)
from mupass._rewrite import MULTIPLIED, tell_lost_multipliers
from mupass._scales.drawn_again import tell_drawn_again
from mupass._scales.plan import ATTRIBUTE, OptimizerSpec, Plan, plan_of
from mupass._scales.scales import rounded
from mupass._taps.factors import without_autocast

OVERRIDES = ("lr", "weight_decay", "damping")
FOLDED, JOINED = "fold", "join"  # among what was told
EMPTY = "none"  # treatment of a parameter without entries
OUT_OF_RANGE = (
    "would have left the range of float16, which ends at 65504, and keeps its values: "
    "lower lr, raise damping, or hold weights in float32 and use autocast"
)
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
    state_format = 7  # that of states which are loaded
    _ranks = 1

    @staticmethod
    def _sharing(model: nn.Module, data_parallel: bool | None) -> int:
        """Return over how many ranks factors are summed: a stage of a pipeline shares none."""
        # Ranks of a pipeline have other parameters each, so that sums over them would mix stages.
        if not plan_of(model)[1].stage:
            return world_size(data_parallel)
        if data_parallel:
            raise OptimizerError(
                "data_parallel=True sums over all ranks, and those of a pipeline have other stages: "
                "leave it out"
            )
        return 1

    def __init__(
        self, model: nn.Module, spec: OptimizerSpec, lr: float | None, damping: float, training: Training
    ) -> None:
        if lr is not None:
            check_number("lr", lr)
        check_number("damping", damping)
        self._training = training
        self.momentum_of = training.momentum_of
        self.fallback = Fallback.of(training.fallback, training.fallback_lr)
        self._wrapper = model
        self.root, plan = plan_of(model)
        tell_left_out(model, self.root)
        self.plan: Plan = plan.for_optimizer(spec)
        # The model may have been changed since it was transformed.
        self.plan.check(self.root)
        tell_drawn_again(self.root, self.plan)
        self.spec = spec
        self._steps = 0
        self._stats: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._skipped: Tensor | None = None  # steps since the last report, on the device
        self._overflows: dict[str, Tensor] = {}  # parameter -> its steps out of range, on the device
        self._idle: frozenset[str] = frozenset()  # parameters without a gradient in the last step
        self._strangers: set[str] = set()  # parameters that were told not to be trained
        if tell_lost_multipliers(self.root):
            self._strangers.add(MULTIPLIED)
        self._watching = True  # whether the next step is reported at once, because the last one was skipped
        self._find_parameters()
        treatments, reasons = self._assign()
        # strict= is refused before torch makes the groups.
        fallen = self._cover_parameters(treatments, reasons)
        if lr is None:
            lr = self._default_rate()
        self._make_groups(treatments, fallen, lr, damping)
        self._complete = True

    def _find_parameters(self) -> None:
        """Name the parameters, and find those that no preconditioner can work with."""
        self.names: dict[Tensor, str] = {}
        self._holders: dict[str, tuple[nn.Module, str]] = {}  # parameter -> its module, and its name there
        self._frozen: dict[Tensor, str] = {}
        self._numbers: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        parameter: Tensor
        for number, (name, parameter) in enumerate(self.root.named_parameters()):
            self._numbers[name] = number
            self._shapes[name] = parameter.shape
            path, _, key = name.rpartition(".")
            self._holders[name] = (self.root.get_submodule(path), key)
            if parameter.requires_grad:
                self.names[parameter] = name
            else:
                self._frozen[parameter] = name
        if not self.names:
            raise OptimizerError("every parameter of the model is frozen")
        self._seed: int | None = None
        if self._training.stochastic_rounding:
            check_rounded(self.names)
            self._seed = drawn_seed(self._ranks, self._device)
        self._overrides = _checked_overrides(self._training.overrides, self._numbers)
        self._unfit: dict[str, str] = {}
        for parameter, name in self.names.items():
            if _overlaps(parameter):
                raise OptimizerError(
                    f"{name} is expanded: entries share memory and cannot be moved apart. Make the parameter "
                    "of tensor.expand(...).clone()"
                )
            reason = _unfit(parameter)
            if reason:
                self._unfit[name] = reason

    def _all_names(self) -> dict[Tensor, str]:
        """Return the names of all parameters, frozen ones behind the others."""
        return {**self.names, **self._frozen}

    def _cover_parameters(self, treatments: Mapping[str, str], reasons: Mapping[str, str]) -> list[str]:
        """Write the table of coverage, and return the parameters that fall back.

        Args:
            treatments: Own parameter -> block type.
            reasons: Parameter -> why the subclass does not take it, or not in full.
        """
        # What no preconditioner can take has its own reason, but the subclass may know a better one.
        reasons = {**self._unfit, **reasons}
        table, fallen = [], []
        for name in self.names.values():
            treatment, reason = treatments.get(name, self.fallback.name), reasons.get(name, "")
            if self._unfit.get(name) == NO_ENTRIES:
                treatment, reason = EMPTY, NO_ENTRIES
            table.append(Covered(name, treatment, reason))
            # An empty parameter has neither a preconditioner nor a fallback.
            if name not in treatments and treatment != EMPTY:
                fallen.append(table[-1])
        self._coverage = Coverage(table)
        if fallen and not treatments and self._wanted():
            text = (
                f"mupass.{type(self).__name__} can take no parameter of this model; all go to "
                f"{self.fallback.name}. First reason: {fallen[0].parameter}: {fallen[0].reason}"
            )
            warn([text])
        if fallen and self._training.strict:
            raise OptimizerError("strict=True, but these fall back:\n" + str(Coverage(fallen)))
        return [covered.parameter for covered in fallen]

    def _make_groups(
        self, treatments: Mapping[str, str], fallen: Sequence[str], lr: float, damping: float
    ) -> None:
        """Make the parameter groups, own ones first, and the state before the first step."""
        # OneCycleLR cycles momentum where the defaults have it.
        defaults = {
            "lr": lr,
            "weight_decay": self._training.weight_decay,
            "momentum": self._training.momentum,
        }
        groups = self._groups(self.spec.name, treatments, {**defaults, "damping": damping})
        settings = self._fallback_settings(self._training.weight_decay)
        # Frozen parameters have places from the start: a scheduler knows the groups that it was made with.
        frozen = [name for parameter, name in self._frozen.items() if parameter.numel()]
        groups += self._groups(self.fallback.name, [*fallen, *frozen], settings)
        super().__init__(groups, defaults)
        # What schedulers add later, such as initial_lr, may be missing in a state.
        self._settings = frozenset().union(*self.param_groups)
        self._members: list[list[str]] = []
        for group in self.param_groups:
            self._members.append(list(group[NAMES]))
            for parameter in group["params"]:
                # A frozen one has an empty state, which torch's checkpoint functions ask for.
                first_state = self._first_state(parameter, group) if parameter in self.names else {}
                self.state[parameter].update(first_state)

    def _default_rate(self) -> float:
        """Return the learning rate at the base width where none is given: that of Adam."""
        return adam_rate(self.plan.base_width)

    def _fallback_settings(self, weight_decay: float) -> dict[str, Any]:
        """Return the numbers of the fallback's groups; the decay is the optimizer's unless it has its own."""
        fallback = self.fallback
        if fallback.weight_decay is not None:
            weight_decay = fallback.weight_decay
        return {
            "lr": fallback_rate(fallback, self.plan.base_width),
            "weight_decay": weight_decay,
            "momentum": fallback.momentum,
            "betas": tuple(fallback.betas),
            "eps": fallback.eps,
        }

    def _first_state(self, parameter: Tensor, group: Group) -> dict[str, Any]:
        """Return a parameter's state before the first step: a distributed checkpoint is loaded into it."""
        if group["algorithm"] != self.spec.name:
            return fallback_state(parameter, group)
        return {**self._momentum_state(parameter, group), **self._own_state(self.names[parameter])}  # type: ignore[index]

    def _momentum_state(self, parameter: Tensor, group: Group) -> State:
        if not self.smooths or not group["momentum"]:
            return {}
        if self.momentum_of == "directions":
            return sum_state(parameter)
        return average_state(parameter, "momentum")

    def _own_state(self, name: str) -> State:
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

    def _directions(self, gradients: Tensors, means: Tensors, ok: Tensor) -> Tensors:
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
        is_own = algorithm == self.spec.name
        plan = self.plan
        if not is_own:
            plan = plan.for_optimizer(algorithm)
        requested = set(names)
        groups: dict[Any, dict[str, Any]] = {}
        for parameter, name in self._all_names().items():
            if name not in requested:
                continue
            scales = plan[name].scales
            scale = scales.lr
            if is_own:
                scale *= self._correction(name)
            # Patterns may set rates, decays and dampings of single parameters.
            chosen = {**settings, **self._overridden(name, settings)}
            if self._training.decay == "matrices" and not self._is_matrix(name):
                chosen["weight_decay"] = 0.0
            # Parameters with equal numbers share a group, so that a schedule sees few of them.
            key = [rounded(scale), *chosen.values()]
            if algorithm == "adamw":  # the only one whose steps depend on epsilon
                key.append(rounded(scales.epsilon))
            group = groups.setdefault(tuple(key), {"params": [], **chosen})
            if not group["params"]:
                group["algorithm"] = algorithm
                group["mupass_scale"], group["mupass_epsilon"] = scale, scales.epsilon
                group["mupass_kind"] = saved_kind(type(self).__name__, str(self.spec), self.state_format)
                group["mupass_steps"], group[NAMES], group[THAWED] = 0, [], []
                group.update(self._waiting())
                if self._seed is not None:
                    group["mupass_seed"] = self._seed
            group["params"].append(parameter)
            group[NAMES].append(name)
        return list(groups.values())

    def _overridden(self, name: str, settings: Mapping[str, Any]) -> dict[str, float]:
        """Return the settings that the first fitting pattern changes."""
        for pattern, values in self._overrides.items():
            if fnmatchcase(name, pattern):
                return {key: value for key, value in values.items() if key in settings}
        return {}

    def _is_matrix(self, name: str) -> bool:
        """Return whether a parameter is a matrix in the sense of weight decay: no vector, no table."""
        geometry = self.plan[name].geometry
        # A table's rows are rare: decay would shrink those that are not read.
        if any(use.kind == "embedding" for use in geometry.uses):
            return False
        return bool(geometry.fan_in_axes and geometry.fan_out_axes)

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
        incidents, counts = self._incidents()
        if self._skipped is not None:
            incidents.append(("skipped_steps", "a gradient holds NaN or infinity"))
            counts.append(self._skipped.reshape(1))
            self._skipped = None
        for name, count in self._overflows.items():
            incidents.append(("overflowing_steps", f"{name} {OUT_OF_RANGE}"))
            counts.append(count.reshape(1))
        self._overflows = {}
        if not counts:
            return
        # One message from the device for all counts: each read by itself would wait for it.
        device = counts[0].device
        numbers = torch.cat([count.to(device, torch.float32) for count in counts]).tolist()
        self._watching = False
        for (kind, place), number in zip(incidents, numbers, strict=True):
            if number:
                self.count(kind, place, int(number))
                self._watching |= kind == "skipped_steps"
        if self._watching:
            self._make_up()

    def _make_up(self) -> None:
        """Do at the next step what was due at steps that were skipped."""

    # Traced with the loop around it, K-FAC would find no factors; `compile=` compiles what is worth it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        # With a closure the gradients are made now, and checked like any others.
        loss = None
        self._tell_join()
        if closure is not None:
            if not callable(closure):
                raise OptimizerError(
                    f"step() takes a function that runs the model and returns the loss, or nothing, not "
                    f"{kind_of(closure)}"
                )
            with torch.enable_grad():
                loss = closure()
        # A loop may have all of a step inside of autocast: products would be rounded to half precision. State
        # that is made in inference mode could not be changed outside of it.
        with without_autocast(self._device), torch.inference_mode(False), torch.no_grad():
            self._adopt_swapped()
            # What has no entries is in no group.
            thawed = [p for p in self._frozen if p.requires_grad and p.grad is not None and p.numel()]
            self._adopt_thawed(thawed)
            self._tell_replaced()
            self._check_groups()
            self._check_gradients()
            self._unscale()
            ok = self._gradients_are_finite()
            if ok is not None:
                self._step(ok)
            self._prepare_next()
        return loss

    def _tell_join(self) -> None:
        """Warn of steps that ranks may leave out, which would be waited for without an end."""
        join = getattr(self._wrapper, "_join_config", None)  # stays as it is behind the context
        if self._ranks == 1 or join is None or not join.enable or JOINED in self._strangers:
            return
        self._strangers.add(JOINED)
        name = type(self).__name__
        text = (
            f"mupass.{name} shares its work over all ranks in every step: where one of them has fewer "
            "batches, as model.join() allows, the others wait for it without an end, or fail. Give all ranks "
            "equally many batches (a DistributedSampler does)"
        )
        warnings.warn(text, MupassWarning, stacklevel=4)

    def _step(self, ok: Tensor) -> None:
        """Take a step that counts or, where ``ok`` is zero, does not."""
        skipped = 1 - ok
        if self._skipped is not None:
            skipped = self._skipped + skipped
        self._skipped = skipped
        gradients, means = self._own_gradients(ok)
        # Only parameters whose block this rank keeps have a direction here; the others come from their ranks.
        directions = self._from_owners(self._directions(gradients, means, ok), gradients)
        # No parameter moves before all directions are there.
        for group in self.param_groups:
            if group["algorithm"] == self.spec.name:
                self._move_own(group, directions, ok)
            else:
                self._move_fallen(group, ok)
        self._steps += 1
        for group in self.param_groups:
            group["mupass_steps"] = self._steps
        if self._steps % self.report_every == 0 or self._watching:
            self._report()

    def _waiting(self) -> dict[str, bool]:
        """Return what waits for the next step, for a saved state: whether steps are looked at one by one."""
        return {"mupass_watching": self._watching}

    def _own_gradients(self, ok: Tensor) -> tuple[Tensors, Tensors]:
        """Return the whole gradients of own parameters, and their moving averages, by name."""
        gradients, means = {}, {}
        for group in self._own_groups():
            parameters = _with_gradient(group)
            parts = self._parts(parameters, ok)
            averaged = self._averaged(parameters, parts, group, ok)
            # FSDP2 gives shards: averages are kept of shards, preconditioners see whole gradients.
            for parameter, part, mean in zip(parameters, parts, averaged, strict=True):
                name = self.names[parameter]
                gradients[name] = means[name] = self._whole(part, parameter)
                if mean is not part:
                    means[name] = self._whole(mean, parameter)
        return gradients, means

    def _move_own(self, group: Group, directions: Tensors, ok: Tensor) -> None:
        """Move the parameters of a group that have a direction along it."""
        parameters, updates = [], []
        for parameter in _with_gradient(group):
            direction = directions.get(self.names[parameter])
            if direction is not None and parameter.numel():
                parameters.append(parameter)
                updates.append(self._own_update(parameter, direction, group, ok))
        self._move(parameters, updates, group, ok)

    def _move_fallen(self, group: Group, ok: Tensor) -> None:
        """Let the fallback move the parameters of one of its groups."""
        parameters = [parameter for parameter in _with_gradient(group) if parameter.numel()]
        if not parameters:
            return
        gradients = self._parts(parameters, ok)
        states = [self._local_state(parameter) for parameter in parameters]
        self._move(parameters, fallback_directions(gradients, states, group, ok), group, ok)

    def _own_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the parameters that the subclass takes."""
        return [group for group in self.param_groups if group["algorithm"] == self.spec.name]

    def _from_owners(self, directions: Tensors, gradients: Tensors) -> Tensors:
        """Return the directions that all ranks have found, of parameters that have a gradient here."""
        owner = self._owner
        if owner:
            # Tensors of the right shape say what comes from which rank; no memory is needed for it.
            templates = {}
            for parameter, name in self.names.items():
                if name in owner:
                    dtype = state_dtype(parameter)
                    templates[name] = torch.empty(parameter.shape, dtype=dtype, device="meta")
            directions = exchange(directions, owner, templates, self._ranks, self._device)
        return {name: direction for name, direction in directions.items() if name in gradients}

    @staticmethod
    def _parts(parameters: Sequence[Tensor], ok: Tensor) -> list[Tensor]:
        """Return this rank's parts of gradients in the precision of the state; zeros in a skipped step."""
        parts = []
        numbers_of: dict[Any, list[int]] = {}
        for number, parameter in enumerate(parameters):
            assert parameter.grad is not None
            # A gradient in bfloat16 is averaged in float32: small parts would be lost.
            part = real(local(parameter.grad)).to(state_dtype(parameter))
            # NaN times zero is NaN. On a CPU this takes a quarter of the time of `torch.where`.
            parts.append(part.nan_to_num(0.0, 0.0, 0.0))
            numbers_of.setdefault((part.device, part.dtype), []).append(number)
        for kind, numbers in numbers_of.items():
            torch._foreach_mul_([parts[number] for number in numbers], ok.to(*kind))
        return parts

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
        self, parameters: Sequence[Tensor], gradients: list[Tensor], group: Group, ok: Tensor
    ) -> list[Tensor]:
        """Return the moving averages of gradients where these are what momentum is of."""
        if not self._smooths_with(group) or self.momentum_of == "directions" or not parameters:
            return gradients
        states = [self._local_state(parameter) for parameter in parameters]
        return averages(gradients, states, "momentum", group["momentum"], ok)

    def _smooths_with(self, group: Group) -> bool:
        """Return whether this class, not the subclass, keeps the momentum of a group."""
        return bool(self.smooths and group["momentum"])

    def _local_state(self, p: Tensor) -> State:
        return {name: local(value) for name, value in self.state[p].items()}

    def _own_update(self, p: Tensor, direction: Tensor, group: Group, ok: Tensor) -> Tensor:
        """Return this rank's part of an own parameter's update, in the precision of the state."""
        # Directions are whole: each rank cuts out the shard that it has of the parameter.
        part = local(sharded_like(direction.to(state_dtype(p)), p))
        if not self._smooths_with(group) or self.momentum_of == "gradients":
            return part
        return heavy_ball(part, self._local_state(p), group["momentum"], ok)

    def _move(
        self, parameters: Sequence[Tensor], updates: Sequence[Tensor], group: Group, ok: Tensor
    ) -> None:
        """Subtract updates, after decay, from the parameters of a group."""
        # W <- (1 - lr decay) W - lr scale D: decay leaves the width factor out.
        rate = group["lr"] * group["mupass_scale"]
        decay = group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        # Weights that have the precision of their updates are moved together.
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, update in zip(parameters, updates, strict=True):
            weight = real(local(parameter))
            if weight.dtype == update.dtype:
                weights, own_updates = alike.setdefault((update.device, update.dtype), ([], []))
                weights.append(weight)
                own_updates.append(update)
                continue
            # Half precision knows no factor between 0.998 and 1: it is rounded once, after the whole step.
            moved = weight.to(update.dtype)
            _subtract([moved], [update], rate, decay, ok)
            if weight.dtype == torch.bfloat16 and "mupass_seed" in group:
                # A seed of the step and the parameter: the same on all ranks, and after a restart.
                turn = (self._steps, self._numbers[self.names[parameter]])
                moved = to_bfloat16(moved, mixed(int(group["mupass_seed"]), turn))
            if weight.dtype == torch.float16:
                moved = self._in_range(moved, weight, self.names[parameter])
            weight.copy_(moved)
        for weights, own_updates in alike.values():
            _subtract(weights, own_updates, rate, decay, ok)

    def _in_range(self, moved: Tensor, weight: Tensor, name: str) -> Tensor:
        """Return a weight after a step in float16, or as it was where an entry would leave its range."""
        rounded = moved.half()
        fits = rounded.isfinite().all()
        lost = (~fits).to(torch.float32)
        self._overflows[name] = self._overflows[name] + lost if name in self._overflows else lost
        return torch.where(fits, rounded, weight)

    def _adopt_swapped(self) -> None:
        """Follow a trainer that put other tensors of the same parameters into the groups."""
        for group, members in zip(self.param_groups, self._members, strict=True):
            if len(group["params"]) != len(members):
                raise OptimizerError(
                    f"a group has {len(group['params'])} parameters where the plan has {len(members)}; "
                    "make the optimizer anew"
                )
            for parameter, name in zip(group["params"], members, strict=True):
                if parameter not in self.names and parameter not in self._frozen:
                    self._adopt(parameter, name)

    def _adopt(self, new: Tensor, name: str) -> None:
        """Let a new tensor take the place of a parameter, with its state."""
        replaced = next(parameter for parameter, its_name in self._all_names().items() if its_name == name)
        if replaced.shape != new.shape:
            raise OptimizerError(
                f"{name} was replaced in the optimizer's groups by a tensor of shape {tuple(new.shape)}, not "
                f"{tuple(replaced.shape)}; make the optimizer anew"
            )
        if replaced in self._frozen:
            del self._frozen[replaced]
            self._frozen[new] = name
        else:
            names: dict[Tensor, str] = {}  # in the same order
            for parameter, its_name in self.names.items():
                names[new if parameter is replaced else parameter] = its_name
            self.names = names
        state = self.state.pop(replaced, {})
        for key, value in state.items():
            # A dot is in the keys of what belongs to the preconditioner, which is views of its own tensors.
            if "." not in key and value.shape == replaced.shape:
                state[key] = _placed_like(value, new)
        self.state[new] = state
        self._replaced(name, new)

    def _replaced(self, name: str, new: Tensor) -> None:
        """Take notice of a parameter that is another tensor now."""

    def _adopt_thawed(self, thawed: Iterable[Tensor]) -> None:
        """Let the fallback train parameters that were frozen when the optimizer was made."""
        for parameter in thawed:
            name = self.names[parameter] = self._frozen.pop(parameter)
            group = self._group_with(name)
            group[THAWED] = [*group[THAWED], name]
            self.state[parameter].update(self._first_state(parameter, group))
            covered = Covered(name, self.fallback.name, "it was frozen when the optimizer was made")
            self._coverage = Coverage([*self._coverage, covered])
            warnings.warn(
                f"mupass.{type(self).__name__}: {name} was frozen when the optimizer was made; "
                f"{self.fallback.name} trains it from now on. Make the optimizer anew to have it "
                "preconditioned",
                MupassWarning,
                stacklevel=4,
            )

    def _group_with(self, name: str) -> dict[str, Any]:
        """Return the group that a parameter is in."""
        return next(group for group in self.param_groups if name in group[NAMES])

    def _tell_replaced(self) -> None:
        """Warn of parameters that came into the model after the optimizer was made: it does not move them.

        The model is looked through where a known parameter has no gradient, as one that was replaced has
        none, in the first ``report_every`` steps, and once in as many later.
        """
        self._tell_folded()
        idle = frozenset(name for p, name in self.names.items() if p.grad is None)
        if idle == self._idle and self._steps >= self.report_every and self._steps % self.report_every:
            return
        self._idle = idle
        if MULTIPLIED not in self._strangers and tell_lost_multipliers(self.root):
            self._strangers.add(MULTIPLIED)
        self._tell_tied()
        self._tell_computed()
        for name, parameter in self.root.named_parameters():
            known = parameter in self.names or parameter in self._frozen
            if known or parameter.grad is None or name in self._strangers:
                continue
            self._strangers.add(name)
            came = "was replaced" if name in self._numbers else "was added to the model"
            warnings.warn(
                f"mupass.{type(self).__name__}: {name} {came} after the optimizer was made, which does not "
                f"train it: make the optimizer anew{'' if name in self._numbers else ', after transform'}",
                MupassWarning,
                stacklevel=4,
            )

    def _tell_tied(self) -> None:
        """Warn of parameters in whose place the model has another one of its parameters by now."""
        now = dict(self.root.named_parameters(remove_duplicate=False))
        for parameter, name in self.names.items():
            other = self.names.get(now.get(name, parameter), name)
            if other == name or name in self._strangers:
                continue
            self._strangers.add(name)
            warnings.warn(
                f"mupass.{type(self).__name__}: {name} was tied to {other} after the optimizer was made, "
                f"which takes {other} for what it was: tie first, then transform, then make the optimizer",
                MupassWarning,
                stacklevel=5,
            )

    def _tell_folded(self) -> None:
        """Warn where `mupass.fold` has put multipliers into weights whose rates are of before."""
        plan: Plan | None = vars(self.root).get(ATTRIBUTE)
        if plan is None or plan.folded == self.plan.folded or FOLDED in self._strangers:
            return
        self._strangers.add(FOLDED)
        text = told_of_fold(plan, f"mupass.{type(self).__name__}", "the optimizer was")
        if text:
            warnings.warn(text, MupassWarning, stacklevel=5)

    def _tell_computed(self) -> None:
        """Warn of own parameters that a module makes its weight of by now, where it held them as they are."""
        for group in self._own_groups():
            for parameter in group["params"]:
                name = self.names[parameter]
                module, key = self._holders[name]
                held = module._parameters.get(key)
                # prune.l1_unstructured(module, "weight") keeps the parameter under another name.
                if held is not None or name in self._strangers or not self._minds_computed(module, key):
                    continue
                if not any(parameter is other for other in module.parameters()):
                    continue
                self._strangers.add(name)
                warnings.warn(
                    f"mupass.{type(self).__name__}: {name} was parametrized, or pruned, after the optimizer "
                    "was made, which takes it for the weight itself: its statistics and width factors are "
                    "of before. Do so first, then transform, then make the optimizer",
                    MupassWarning,
                    stacklevel=5,
                )

    def _minds_computed(self, module: nn.Module, key: str) -> bool:
        """Return whether a weight that is computed of a parameter has other scales or statistics than that.

        Args:
            module: The module that has the weight.
            key: Its name there.
        """
        # A mask changes no width factor, and gradients are those of the parameter.
        return is_parametrized(module, key)

    def _check_groups(self) -> None:
        """Refuse numbers, as a scheduler may have set them, that would destroy weights."""
        for number, group in enumerate(self.param_groups):
            description = f"of group {number} ({self._members[number][0]})"
            for key, high in BOUNDS.items():
                check_number(f"{key} {description}", _readable(group.get(key, 0.0)), 0, high)
            if "betas" in group:
                betas = group["betas"]
                if isinstance(betas, (list, tuple)):
                    betas = [_readable(beta) for beta in betas]
                check_betas(f"betas {description}", betas)
            # A scheduler such as OneCycleLR may set momentum on a group that was made without it.
            if group["momentum"] and self._lacks_momentum(group):
                raise OptimizerError(
                    f"the momentum {description} was set to {group['momentum']:g}, but the optimizer was "
                    "made with momentum=0 and has no average; "
                    "make it with momentum, or pass cycle_momentum=False to the scheduler"
                )

    def _lacks_momentum(self, group: Group) -> bool:
        """Return whether momentum was switched on after the state of a group was made without."""
        # Momentum is a state of own groups and of SGD's; Adam's first beta is no momentum.
        keeps_own = group["algorithm"] == self.spec.name and self.smooths
        if not keeps_own and group["algorithm"] != "sgd":
            return False
        trained = [parameter for parameter in group["params"] if parameter in self.names]
        return any("momentum" not in self.state[parameter] for parameter in trained)

    def _check_gradients(self) -> None:
        """Refuse gradients that no step can be taken with."""
        for parameter, name in self.names.items():
            if parameter.grad is None:
                continue
            planned = self._shapes[name]
            if parameter.shape != planned:
                raise OptimizerError(
                    f"{name} has shape {tuple(parameter.shape)}, and had {tuple(planned)} when the optimizer "
                    "was made: transform the new model, and make the optimizer anew"
                )
            if parameter.grad.layout != torch.strided:
                raise OptimizerError(
                    f"the gradient of {name} is sparse, and mupass.{type(self).__name__} needs dense ones: "
                    "make its module with sparse=False"
                )
            if parameter.grad.shape != parameter.shape:
                raise OptimizerError(
                    f"the gradient of {name} has shape {tuple(parameter.grad.shape)}, the parameter "
                    f"{tuple(parameter.shape)}"
                )

    def _unscale(self) -> None:
        """Take a gradient scaler's factor out; it leaves it on the optimizer for the time of a step."""
        scale = getattr(self, "grad_scale", None)
        self._amp_scale: Tensor | float = 1.0
        if scale is None:
            return
        self._amp_scale = scale
        for parameter in self.names:
            if parameter.grad is not None:
                local(parameter.grad).div_(scale.to(parameter.grad.device))

    def _gradients_are_finite(self) -> Tensor | None:
        """Return 1, or 0 where a gradient holds NaN or infinity, on the device; None without any gradient."""
        gradients, sharded = [], False
        for parameter in self.names:
            sharded |= is_sharded(parameter)
            if parameter.grad is not None:
                part = real(local(parameter.grad))
                if part.numel():  # a rank's shard may be empty
                    gradients.append(part)
        if not gradients and not sharded:
            return None
        # A rank whose shards are all empty still takes part in the sum below.
        device = gradients[0].device if gradients else self._device
        all_finite = torch.ones((), dtype=torch.bool, device=device)
        if gradients:
            # NaN or infinity in any entry shows in the extremes.
            extremes = [number.to(device) for number in _extremes(gradients)]
            all_finite = torch.stack(extremes).isfinite().all()
        if sharded:
            # All ranks skip the step where the shard of one is broken.
            broken = sum_over_ranks([(~all_finite).to(torch.float32)])[0]
            all_finite = broken == 0
        return all_finite.to(torch.float32)

    def _prepare_next(self) -> None:
        """Set up statistics for the passes that come before the next step."""

    def _dampings(self) -> dict[str, float]:
        """Return the damping of every own parameter."""
        return self._setting("damping")

    def _setting(self, key: str) -> dict[str, float]:
        """Return a number of every own parameter's group; a schedule may have changed it."""
        setting_of = {}
        for group in self._own_groups():
            for parameter in group["params"]:
                setting_of[self.names[parameter]] = group[key]
        return setting_of

    @property
    def _owner(self) -> Mapping[str, int]:
        """Own parameter -> the rank that keeps its preconditioner; empty where every rank has all."""
        return {}

    def _collected(self, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return a state with what other ranks keep of it."""
        owner = self._owner
        if not owner:
            return state
        # torch numbers parameters through all groups.
        order = chain.from_iterable(self._members)
        numbers = {name: number for number, name in enumerate(order)}
        collected = dict(state)
        for name, rank in owner.items():
            # What this rank keeps itself is there; the rest comes from its owner.
            entries = dict(state[numbers[name]])
            for key, tensor in self._own_state(name).items():
                entries[key] = from_rank(tensor, rank, self._device)
            collected[numbers[name]] = entries
        return collected

    @property
    def _device(self) -> torch.device:
        return local(next(iter(self.names))).device

    def state_dict(self) -> dict[str, Any]:
        """Return the state, factors and schedule included: a resumed run goes on bit for bit.

        All of it is kept by parameter, where torch's checkpoint functions look for it. Where ranks share the
        preconditioner, all of them must call this: each returns the whole state.
        """
        for group in self.param_groups:
            group.update(self._waiting())
        own_state = super().state_dict()
        return {**own_state, "state": self._collected(own_state["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state.

        Args:
            state_dict: Result of `state_dict`, of an optimizer of the same kind on the same model.

        Raises:
            OptimizerError: It is the state of another optimizer, of another version, or damaged. This
                optimizer is then as it was.
        """
        # As torch does: a hook may give another state to be loaded.
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, state_dict)
            state_dict = state_dict if given is None else given
        # All is checked before anything is copied.
        thawed = self._thawed_states()
        settings, states = check_state(self, self._all_names(), thawed, self._settings, state_dict)
        self._adopt_thawed([parameter for parameter in thawed if states[parameter]])
        copy_state(self, settings, states)
        self._steps = self.param_groups[0]["mupass_steps"]
        self._watching = self.param_groups[0]["mupass_watching"]
        self._loaded()
        self._prepare_next()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _thawed_states(self) -> dict[Tensor, State]:
        """Return the state that parameters would have which were frozen, and are no more."""
        states: dict[Tensor, State] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._frozen and parameter.requires_grad:
                    states[parameter] = self._first_state(parameter, group)
        return states

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
    names = list(parameters)
    checked: dict[str, dict[str, float]] = {}
    for pattern, settings in overrides.items():
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            raise OptimizerError(f"the pattern {pattern!r} in overrides fits no parameter")
        if not isinstance(settings, Mapping) or not settings:
            raise OptimizerError(f"overrides[{pattern!r}] must map {', '.join(OVERRIDES)} to numbers")
        checked[pattern] = {}
        for key, value in settings.items():
            check_choice(f"key of overrides[{pattern!r}]", key, OVERRIDES)
            checked[pattern][key] = check_number(f"{key} of overrides[{pattern!r}]", value)
    return checked


def _with_gradient(group: Group) -> list[Tensor]:
    """Return the parameters of a group that have a gradient."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _subtract(
    weights: list[Tensor], updates: list[Tensor], rate: float, decay: float | None, ok: Tensor
) -> None:
    """Subtract updates from weights in place, all on one device and in one precision.

    Args:
        weights: The weights.
        updates: What is subtracted, times the rate.
        rate: Learning rate with its width factor.
        decay: Which part of a weight a step takes first; None for nothing.
        ok: 1, or 0 for a step that does not count.
    """
    # As tensors on the device, nothing of which is read here.
    count = ok.to(updates[0])
    if decay is not None:
        torch._foreach_mul_(weights, 1 - decay * count)
    step = rate * count
    torch._foreach_addcmul_(weights, updates, [step] * len(updates), value=-1)


def _extremes(gradients: list[Tensor]) -> list[Tensor]:
    """Return numbers that are NaN or infinite where an entry of a gradient is."""
    if all(gradient.is_cpu for gradient in gradients):
        extremes: list[Tensor] = []
        for gradient in gradients:
            extremes += torch.aminmax(gradient)
        return extremes
    # One kernel for many gradients; on a CPU it takes ten times as long as the other.
    return list(torch._foreach_norm(gradients, math.inf))


def _readable(value: Any) -> Any:
    """Return the number in a tensor on the CPU; zero where an accelerator would be waited for.

    A vector of one entry is none: products with it have another shape.
    """
    if not isinstance(value, Tensor) or value.dim():
        return value
    return value.item() if value.device.type == "cpu" else 0.0


def _overlaps(parameter: Tensor) -> bool:
    """Return whether several entries of a parameter are one place in memory."""
    part = local(parameter)
    pairs = zip(part.shape, part.stride(), strict=True)
    return bool(part.numel()) and any(size > 1 and not stride for size, stride in pairs)


def _unfit(parameter: Tensor) -> str:
    """Return why no preconditioner can work with a parameter's numbers, or nothing."""
    if parameter.numel() == 0:
        return NO_ENTRIES
    if parameter.is_complex():
        return "its entries are complex numbers"
    return ""
