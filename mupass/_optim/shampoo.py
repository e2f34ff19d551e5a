"""Shampoo with width-aware learning rates and damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mupass._errors import OptimizerError
from mupass._keywords import Keywords, takes
from mupass._optim.checks import check_choice, check_flag, check_number, check_period
from mupass._optim.kronecker.factor_stack import AT_ONCE, growth
from mupass._optim.linalg.packed import pack, packed_diagonal, packed_size, unpack
from mupass._optim.linalg.roots import inverse_roots
from mupass._optim.linalg.spectral import with_norm_of
from mupass._optim.matrix.base import Layout, LayoutOptions, MatrixOptimizer, wide
from mupass._optim.matrix.block_stack import Stack
from mupass._optim.matrix.blocking import Blocking
from mupass._optim.matrix.mode_products import SIDES, Schedule, active_sides, add_weight, along, observe
from mupass._optim.training import Training, TrainingOptions
from mupass._optim.vocabulary import State
from mupass._scales.optimizers import GRAFTS
from mupass._scales.plan import OptimizerSpec

MODES = ("relative", "absolute", "trace")
ADAPTIVE = {"adam", "rmsprop"}  # grafts that average squares
# Default rates of grafts that are not Adam's, chosen by `benchmarks/defaults.py`.
RATES = {"none": 0.04, "spectral": 0.02, "sgd": 0.1}


class ShampooOptions(TrainingOptions, LayoutOptions, total=False):
    """Keywords of `Shampoo` that records hold, for type checkers and editors."""

    momentum_of: str
    factor_decay: float
    root_every: int
    staggered: bool
    damping_mode: str
    damping_memory: float
    sides: str
    graft: str
    graft_beta2: float
    graft_eps: float
    start_step: int


@dataclass(frozen=True)
class Factors:
    """How factors are averaged and damped, and when they become roots.

    Attributes:
        factor_decay: Weight of the past in the averages; 1 sums without forgetting.
        root_every: Steps between recomputations of a root.
        staggered: Whether roots are spread over the steps of a period.
        damping_mode: One of `MODES`: what damping is relative to.
        damping_memory: What a step leaves of the largest trace seen so far, to which damping is relative.
        sides: One of `SIDES`: those that are preconditioned.
    """

    factor_decay: float = 0.95
    root_every: int = 10
    staggered: bool = True
    damping_mode: str = "relative"
    damping_memory: float = 0.99
    sides: str = "both"

    def __post_init__(self) -> None:
        check_number("factor_decay", self.factor_decay, 0, 1.0000001)
        check_period("root_every", self.root_every)
        check_flag("staggered", self.staggered)
        check_choice("damping_mode", self.damping_mode, MODES)
        check_number("damping_memory", self.damping_memory, 0, 1)
        check_choice("sides", self.sides, SIDES)


@dataclass(frozen=True)
class Graft:
    """Whose norm an update has.

    Attributes:
        graft: One of `GRAFTS`; ``none`` for Shampoo's own norm.
        graft_beta2: Weight of the past in the squares of Adam's and RMSprop's.
        graft_eps: Their epsilon at the base width.
        start_step: Number of first steps that are the graft's own.
    """

    graft: str = "adam"
    graft_beta2: float = 0.999
    graft_eps: float = 1e-8
    start_step: int = 0

    def __post_init__(self) -> None:
        check_choice("graft", self.graft, GRAFTS)
        check_number("graft_beta2", self.graft_beta2, 0, 1)
        check_number("graft_eps", self.graft_eps)
        if not self.start_step:
            return
        check_period("start_step", self.start_step)
        if self.graft not in {"sgd", "adam", "rmsprop"}:
            raise OptimizerError(
                f"until start_step the step is the graft's, and graft={self.graft!r} has none of its own: "
                "use adam, rmsprop or sgd"
            )


class Shampoo(MatrixOptimizer):
    """Shampoo, ``dW = -lr (L + rho_L)^(-e/2) G (R + rho_R)^(-e/2)``, ``L = avg G G^T``, ``R = avg G^T G``.

    ``e`` is the total power (Ishikawa & Karakida, arXiv 2312.12226, eq. 3): 1/2 is the usual quarter power
    on each side. Matrices are ``[fan_out, fan_in]`` by the plan's axes, whatever the layout; fused
    parameters (qkv) are split into their matrices. Matrices larger than ``block_size`` are cut into blocks;
    the plan's learning rate is corrected by ``(blocks at base width / blocks)^e`` (Qiu et al., arXiv
    2512.05620, table of learning rates), so keep ``block_size`` the same at all widths.

    With a graft every block of the update keeps its direction and takes the norm that SGD's, Adam's or
    RMSprop's update of the block has, or with ``graft="spectral"`` the spectral norm 1 of Muon's. The rate
    is then that of the graft, in value and in its row of the scale table. Norms need no correction for
    blocks; of spectral norms it is ``sqrt(blocks at base width / blocks)``.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        damping: Damping; by default relative to the largest eigenvalue of each factor.
        e: Total power, shared equally by the sides that are preconditioned.
        momentum: Weight of the past in the average of gradients, which is then preconditioned.
        momentum_of: ``gradients`` averages them, corrected for the start from zero, before they are
            preconditioned; ``directions`` adds up preconditioned gradients, as `torch.optim.SGD` does, which
            makes steps up to ``1 / (1 - momentum)`` times as long.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        decay: ``all``, or ``matrices``: no decay of vectors (biases, gains), numbers and embedding tables.
        overrides: Other settings by pattern of names (as in `fnmatch`; the first that fits), such as
            ``{"head.*": {"lr": 1e-3, "weight_decay": 0.0}}``; keys are ``lr``, ``weight_decay``, ``damping``.
        factor_decay: Weight of past factors in their moving average; 1 sums them without forgetting.
        root_every: Steps between recomputations of the roots.
        staggered: Whether recomputations are spread over ``root_every`` steps, a part of the blocks at each,
            instead of all at one step. All are computed at the first step.
        damping_mode: ``relative``, ``absolute`` (times the plan's factor) or ``trace``.
        damping_memory: What a step leaves of the largest trace of a factor seen so far. Damping is larger by
            the ratio of this trace to the present one, ``absolute`` damping excepted. 0 forgets at once.
        block_size: Largest side of a block. ``base`` makes blocks as large as the matrices are at the base
            width, so that they are the same at all widths; sides above 256 are cut into equal parts, and
            blocks are not made smaller than 32.
        sides: ``both``, ``left`` (fan_out), ``right`` (fan_in) or ``smaller``.
        kernels: ``matrix`` flattens the kernel axes of a convolution into fan_in; ``modes`` gives every
            axis a factor of its own, with powers that add up to the same ``e``.
        graft: ``none``, ``sgd``, ``adam``, ``rmsprop`` or ``spectral``.
        graft_beta2: Weight of the past in the squares of Adam's and RMSprop's graft; Adam's first beta is
            ``momentum``.
        graft_eps: Their epsilon at the base width.
        start_step: Number of first steps that are the graft's own, while factors are collected; with the
            grafts ``sgd``, ``adam`` and ``rmsprop``.
        roles: Roles that Shampoo takes.
        fallback: ``adamw``, ``adam_atan2`` or ``sgd``, for vectors, tables that no activation is contracted
            with, and other roles. A `Fallback` sets betas, epsilon, momentum and decay, too.
        fallback_lr: Learning rate of the fallback at the base width.
        compile: Whether the update of each shape is compiled with `torch.compile`. None compiles on CUDA
            where Triton is there, and nothing on CPU.
        data_parallel: Whether ranks hold the same gradients, so that each keeps the state of some parameters
            and computes their directions. By default yes where torch.distributed runs with several ranks.
        stochastic_rounding: Whether weights in bfloat16 are rounded up or down at random, so that the mean is
            that of an exact step; rounding to the nearest loses steps below 1/256 of a weight. Draws follow
            `torch.manual_seed` at construction, and are the same on all ranks.
        strict: Raise when any parameter falls back.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> optimizer = mupass.Shampoo(net, graft="adam")
        >>> net(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()
        {'steps': 1}
    """

    @takes(ShampooOptions, Factors, Graft, Layout, Training)
    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        damping: float = 1e-6,
        *,
        e: float = 0.5,
        momentum: float = 0.9,
        block_size: int | Literal["base"] = 1024,
        **options: Unpack[ShampooOptions],
    ) -> None:
        check_number("e", e)
        keywords = Keywords(Shampoo, options, OptimizerError)
        factors, graft = keywords.record(Factors), keywords.record(Graft)
        self.factor_decay, self.damping_memory = float(factors.factor_decay), float(factors.damping_memory)
        self.root_every = self.report_every = factors.root_every
        self.damping_mode, self._staggered = factors.damping_mode, factors.staggered
        self.sides = factors.sides
        self.graft_beta2, self._graft_eps = float(graft.graft_beta2), float(graft.graft_eps)
        self.start_step = graft.start_step
        self._needs_gradient = graft.graft == "rmsprop"
        layout = keywords.record(Layout, block_size=block_size, spectral=graft.graft == "spectral")
        training = keywords.record(Training, momentum=momentum)
        spec = OptimizerSpec("shampoo", e=e, graft=graft.graft)
        super().__init__(model, spec, lr, training, layout, damping)

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        super()._set_up(parameters)
        self._sides = [self._active(stack) for stack in self._stacks]
        self._schedule = Schedule(self._stacks, self._remote, self._active, self.root_every, self._staggered)
        self._epsilons = [self._graft_eps * stack.each(self._epsilon) for stack in self._stacks]

    def _epsilon(self, name: str) -> float:
        """Return the width factor on the graft's epsilon."""
        return self.plan[name].scales.epsilon

    def _default_rate(self) -> float:
        return RATES.get(self.spec.graft) or super()._default_rate()

    def work(self) -> Work:
        """Return what the optimizer works on, and when."""
        scales = []
        for stack in self._stacks:
            scales.append([self._damping_scale(stack, side) for side in range(len(stack.shape))])
        return Work(self._blockings, self._stacks, self._sides, self._schedule, scales, self._epsilons)

    def _active(self, stack: Stack) -> tuple[int, ...]:
        """Return the sides of a stack's blocks that are preconditioned."""
        if self.spec.e == 0:
            return ()
        return active_sides(self.sides, stack.shape)

    def _first_stack_state(self, stack: Stack) -> State:
        state = {"weight": stack.zeros()}
        for side in self._active(stack):
            packed = packed_size(stack.shape[side])
            state |= {f"factor{side}": stack.zeros(packed), f"root{side}": stack.zeros(packed)}
            state |= {f"peak{side}": stack.zeros(), f"rooted{side}": stack.zeros()}
        if self.spec.graft in ADAPTIVE:
            state |= {"square": stack.zeros(*stack.shape), "square_weight": stack.zeros()}
        return state

    def _correction(self, name: str) -> float:
        # Adam's and SGD's norms of all blocks make up that of the whole; spectral norms of 1 do not.
        # (blocks at base width / blocks)^power; Qiu et al., arXiv 2512.05620.
        power = {"none": self.spec.e, "spectral": 0.5}.get(self.spec.graft, 0.0)
        return float(self._growth(name) ** -power)

    def _update(self) -> Callable[..., Tensor]:
        update_of: dict[str, Callable[..., Tensor]] = {
            "none": _plain,
            "spectral": _precondition,
            "sgd": _graft_sgd,
        }
        return update_of.get(self.spec.graft, _graft_adaptive)

    def _observe(self, number: int, at: slice, gradient: Tensor, counts: Tensor) -> None:
        state = self._stacks[number].state
        # The total weight corrects the averages for their start from zero.
        add_weight(state["weight"][at], self.factor_decay, counts)
        if self.spec.graft in ADAPTIVE:
            add_weight(state["square_weight"][at], self.graft_beta2, counts)
            # The graft's magnitude follows the squares of gradients, whatever Shampoo's direction is.
            new_weight = wide((1 - self.graft_beta2) * counts, gradient)
            state["square"][at].lerp_(gradient.square(), new_weight)
        for side in self._sides[number]:
            observe(state[f"factor{side}"][at], gradient, side, self.factor_decay, counts)
            # The largest trace so far, of which damping_memory is kept in a step that counts.
            peak = state[f"peak{side}"][at]
            decay = 1 - (1 - self.damping_memory) * counts
            torch.maximum(peak * decay, self._trace(number, side, at), out=peak)

    def _trace(self, number: int, side: int, at: slice | Tensor) -> Tensor:
        """Return the traces of the averages of some slots."""
        stack = self._stacks[number]
        diagonal = packed_diagonal(stack.state[f"factor{side}"][at], stack.shape[side])
        return diagonal.sum(-1) / stack.state["weight"][at].clamp(min=torch.finfo(stack.dtype).tiny)

    def _prepare(self, number: int) -> None:
        """Recompute the roots that are due."""
        for side in self._sides[number]:
            due_slots = self._schedule.due(self._steps, number, side)
            if due_slots:
                self._refresh(number, side, torch.tensor(due_slots, device=self._stacks[number].device))

    def _refresh(self, number: int, side: int, due: Tensor) -> None:
        """Recompute the roots of one side of some slots; a root that fails stays as it was.

        Args:
            number: Of the stack.
            side: Number of the side.
            due: The slots.
        """
        stack = self._stacks[number]
        size = stack.shape[side]
        factors, roots, weight = (stack.state[key] for key in (f"factor{side}", f"root{side}", "weight"))
        traces = self._trace(number, side, due)
        damping = self._present_damping(number, side, due, traces)
        # Few at a time: each needs room for several copies of itself.
        for indices in torch.split(torch.arange(len(due), device=due.device), max(1, AT_ONCE // size**2)):
            slots = due[indices]
            # A slot that was never observed has no weight yet.
            total_weight = weight[slots].clamp(min=torch.finfo(weight.dtype).tiny)
            average = unpack(factors[slots] / total_weight[:, None], size)
            relative = self.damping_mode == "relative"
            computed, failed = inverse_roots(average, damping[indices], self._power(number), relative)
            # What fails keeps its old root.
            roots[slots] = torch.where(failed[:, None], roots[slots], pack(computed))
            stack.note("failed_roots", failed, slots, f"side {side} of ")
        stack.state[f"rooted{side}"][due] = traces

    def _present_damping(self, number: int, side: int, due: Tensor, traces: Tensor) -> Tensor:
        """Return the damping of some slots, larger by what the trace has fallen from its peak."""
        stack = self._stacks[number]
        damping = self._damping(stack, side)[due]
        if self.damping_mode == "absolute":
            return damping
        # Damping is relative to the largest trace seen, so that it does not fade with the gradients.
        peak = torch.maximum(stack.state[f"peak{side}"][due], traces)
        if self.damping_mode == "trace":
            return damping * peak
        return damping * (peak / traces.clamp(min=torch.finfo(traces.dtype).tiny))

    def _power(self, number: int) -> float:
        """Return the power of one side: the total power is shared equally."""
        return self.spec.e / len(self._sides[number])

    def _grown(self, number: int, side: int, at: slice) -> Tensor:
        """Return by what a root is too large since its factor has grown, ``[k]``, at least 1."""
        traces, rooted_traces = self._trace(number, side, at), self._stacks[number].state[f"rooted{side}"][at]
        return growth(traces, rooted_traces).pow(self._power(number))

    def _arguments(
        self, number: int, at: slice, gradient: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        stack = self._stacks[number]
        state, sides = stack.state, self._sides[number]
        if self._steps < self.start_step:  # the graft's own steps
            sides = ()
        roots = tuple(unpack(state[f"root{side}"][at], stack.shape[side]) for side in sides)
        if self.spec.graft == "none":
            growths = torch.ones_like(counts)
            for side in sides:
                growths = growths * self._grown(number, side, at)
            return mean, sides, roots, growths
        if self.spec.graft not in ADAPTIVE:
            return mean, sides, roots
        # Adam's step is that of the average, RMSprop's that of the gradient.
        grafted = mean if self.spec.graft == "adam" else gradient
        squares = Squares(state["square"][at], state["square_weight"][at], self._epsilons[number][at])
        return mean, sides, roots, grafted, squares

    def _damping(self, stack: Stack, side: int) -> Tensor:
        return stack.each(self._dampings().__getitem__) * self._damping_scale(stack, side)

    def _damping_scale(self, stack: Stack, side: int) -> Tensor:
        """Return the width factor on the damping of every slot."""
        if self.damping_mode != "absolute":
            return stack.each(lambda name: 1.0)
        # Side 0 is fan_out with the factor L; the others are fan_in.
        key = "damping_out" if side == 0 else "damping_in"

        def scale(name: str) -> float:
            # A block's gradient is one of so many: its factors are smaller by their number.
            return float(getattr(self.plan[name].scales, key) / self._growth(name))

        return stack.each(scale)


class Squares(NamedTuple):
    """The average of squares in Adam's and RMSprop's graft, for some slots.

    Attributes:
        average: ``[k, *shape]``, not corrected for its start.
        weight: ``[k]``, its total weight.
        epsilon: ``[k]``, added to the root.
    """

    average: Tensor
    weight: Tensor
    epsilon: Tensor


@dataclass(frozen=True)
class Work:
    """What Shampoo works on, and when.

    Attributes:
        blockings: How each parameter is cut.
        stacks: Blocks of equal shape.
        sides: Those of each stack that are preconditioned.
        schedule: When roots are due.
        damping_scales: Width factor on the damping of every slot, by stack and side.
        epsilons: The graft's epsilon of every slot, by stack.
    """

    blockings: Mapping[str, Blocking]
    stacks: Sequence[Stack]
    sides: Sequence[tuple[int, ...]]
    schedule: Schedule
    damping_scales: Sequence[Sequence[Tensor]]
    epsilons: Sequence[Tensor]


def _precondition(blocks: Tensor, sides: tuple[int, ...], roots: tuple[Tensor, ...]) -> Tensor:
    """Multiply every side by its root, ``[K, *shape]``."""
    for side, root in zip(sides, roots, strict=True):
        blocks = along(blocks, root, side)
    return blocks


def _plain(mean: Tensor, sides: tuple[int, ...], roots: tuple[Tensor, ...], grown: Tensor) -> Tensor:
    """Return the preconditioned average, smaller where factors have grown since their roots."""
    return _precondition(mean, sides, roots) / wide(grown, mean)


def _graft_sgd(mean: Tensor, sides: tuple[int, ...], roots: tuple[Tensor, ...]) -> Tensor:
    """Return the preconditioned average with the norm of the average itself."""
    return with_norm_of(mean, _precondition(mean, sides, roots))


def _graft_adaptive(
    mean: Tensor,
    sides: tuple[int, ...],
    roots: tuple[Tensor, ...],
    wanted: Tensor,
    squares: Squares,
) -> Tensor:
    """Graft Adam's norm, or RMSprop's where what is wanted is the gradient."""
    # wanted / (sqrt(square / weight) + epsilon)
    # Corrected for the start from zero, by one number for each block.
    correction = squares.weight.clamp(min=torch.finfo(mean.dtype).tiny).rsqrt()
    root = squares.average.sqrt().mul_(wide(correction, mean)).add_(wide(squares.epsilon, mean))
    magnitude = torch.div(wanted, root, out=root)
    if not sides:
        return magnitude
    return with_norm_of(magnitude, _precondition(mean, sides, roots))
