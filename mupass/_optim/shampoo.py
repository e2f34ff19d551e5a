"""Shampoo with width-aware learning rates and damping."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from mupass._optim.checks import check_choice, check_number, check_period
from mupass._optim.fallback import BETAS, EPSILON
from mupass._optim.matrix import ROLES, MatrixOptimizer, pick, wide
from mupass._optim.parallel import divided
from mupass._optim.roots import inverse_roots, symmetric
from mupass._optim.sides import SIDES, Schedule, active_sides, add_weight, along, observe
from mupass._optim.stacks import Stack
from mupass._scales.plan import OptimizerSpec
from mupass._scales.spec import GRAFTS

MODES = ("relative", "absolute", "trace")
KERNELS = ("matrix", "modes")


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
        momentum: Weight of past directions.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        factor_decay: Weight of past factors in their moving average; 1 sums them without forgetting.
        root_every: Steps between recomputations of the roots.
        staggered: Whether recomputations are spread over ``root_every`` steps, a part of the blocks at each,
            instead of all at one step. All are computed at the first step.
        damping_mode: ``relative``, ``absolute`` (times the plan's factor) or ``trace``.
        block_size: Largest side of a block.
        sides: ``both``, ``left`` (fan_out), ``right`` (fan_in) or ``smaller``.
        kernels: ``matrix`` flattens the kernel axes of a convolution into fan_in; ``modes`` gives every
            axis a factor of its own, with powers that add up to the same ``e``.
        graft: ``none``, ``sgd``, ``adam``, ``rmsprop`` or ``spectral``.
        roles: Roles that Shampoo takes.
        fallback: ``adamw``, ``adam_atan2`` or ``sgd``, for vectors, tables that no activation is contracted
            with, and other roles.
        fallback_lr: Learning rate of the fallback at the base width.
        compile: Whether the update of each shape is compiled with `torch.compile`.
        data_parallel: Whether ranks hold the same gradients, so that roots are divided over them. By default
            yes where torch.distributed runs with several ranks.
        strict: Raise when any parameter falls back.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float = 1e-6,
        *,
        e: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        root_every: int = 1,
        staggered: bool = True,
        damping_mode: str = "relative",
        block_size: int = 1024,
        sides: str = "both",
        kernels: str = "matrix",
        graft: str = "none",
        roles: Collection[str] = ROLES,
        fallback: str = "adamw",
        fallback_lr: float = 1e-3,
        compile: bool = False,
        data_parallel: bool | None = None,
        strict: bool = False,
    ) -> None:
        check_number("e", e)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1.0000001)
        self.root_every = check_period("root_every", root_every)
        self.damping_mode = check_choice("damping_mode", damping_mode, MODES)
        self.sides = check_choice("sides", sides, SIDES)
        check_choice("kernels", kernels, KERNELS)
        check_choice("graft", graft, GRAFTS)
        super().__init__(
            model,
            OptimizerSpec("shampoo", e=e, graft=graft),
            lr,
            damping,
            roles=roles,
            block_size=check_period("block_size", block_size),
            modes=kernels == "modes",
            spectral=graft == "spectral",
            compile=compile,
            data_parallel=data_parallel,
            momentum=momentum,
            weight_decay=weight_decay,
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        self._sides = [active_sides(sides, stack.shape) if e > 0 else () for stack in self._stacks]
        self._schedule = Schedule(self._stacks, self._sides, root_every, staggered)
        for stack, active in zip(self._stacks, self._sides, strict=True):
            stack.state |= {"weight": stack.zeros()}
            for side in active:
                n = stack.shape[side]
                stack.state |= {f"factor{side}": stack.zeros(n, n), f"root{side}": stack.zeros(n, n)}
            if graft in {"adam", "rmsprop"}:
                stack.state |= {"square": stack.zeros(*stack.shape), "weights": stack.zeros(2)}
            if graft == "adam":
                stack.state["mean"] = stack.zeros(*stack.shape)
        self._epsilons = [
            EPSILON * stack.each(lambda name: self.plan[name].scales.epsilon) for stack in self._stacks
        ]

    def _correction(self, name: str) -> float:
        # Adam's and SGD's norms of all blocks make up that of the whole; spectral norms of 1 do not.
        power = {"none": self.spec.e, "spectral": 0.5}.get(self.spec.graft, 0.0)
        return float(self._blockings[name].growth() ** -power)

    def _update(self) -> Callable[..., Tensor]:
        return {"none": _precondition, "spectral": _precondition, "sgd": _graft_sgd}.get(
            self.spec.graft, _graft_adaptive
        )

    def _advance(self, stack: Stack, g: Tensor, at: Tensor | None) -> Sequence[Tensor]:
        number = self._stacks.index(stack)
        sides = self._sides[number]
        state = stack.view(at)
        for side in sides:
            observe(state[f"factor{side}"], g, side, self.factor_decay)
        add_weight(state["weight"], self.factor_decay)
        stack.put(at, state)
        for side in sides:
            self._refresh(number, side)
        state = stack.view(at)
        roots = tuple(state[f"root{side}"] for side in sides)
        if self.spec.graft in {"adam", "rmsprop"}:
            epsilon = pick(self._epsilons[number], at)
            mean, square, weights = (state.get(k) for k in ("mean", "square", "weights"))
            direction = self._run(stack, at, g, sides, roots, mean, square, weights, epsilon)
        else:
            direction = self._run(stack, at, g, sides, roots)
        stack.put(at, state)
        return direction

    def _refresh(self, number: int, side: int) -> None:
        """Recompute the roots that are due."""
        due = self._schedule.due(self._steps, number, side)
        if due is None:
            return
        stack = self._stacks[number]
        factors, roots, weight = (stack.state[k] for k in (f"factor{side}", f"root{side}", "weight"))
        damping, tiny = self._damping(stack, side), torch.finfo(weight.dtype).tiny
        power, relative = self.spec.e / len(self._sides[number]), self.damping_mode == "relative"

        def compute(at: Tensor) -> tuple[Tensor, Tensor]:
            average = symmetric(factors[at]) / weight[at].clamp(min=tiny)[:, None, None]
            rho = damping[at]
            if self.damping_mode == "trace":
                rho = rho * average.diagonal(dim1=-2, dim2=-1).sum(-1)
            found, failed = inverse_roots(average, rho, power, roots[at], relative)
            return found, failed.to(weight.dtype)

        roots[due], failed = divided(due, self._ranks, compute)
        for i in failed.nonzero().flatten().tolist():
            name, block = stack.slots[int(due[i])]
            self.count("failed_roots", f"side {side} of {name}, block {block}")

    def _damping(self, stack: Stack, side: int) -> Tensor:
        return stack.each(self._dampings().__getitem__) * self._damping_scale(stack, side)

    def _damping_scale(self, stack: Stack, side: int) -> Tensor:
        """Return the width factor on the damping of every slot."""
        if self.damping_mode != "absolute":
            return stack.each(lambda name: 1.0)
        # A block's gradient is one of so many: its factors are smaller by their number.
        key = "damping_out" if side == 0 else "damping_in"
        return stack.each(lambda name: getattr(self.plan[name].scales, key) / self._blockings[name].growth())


def _precondition(g: Tensor, sides: tuple[int, ...], roots: tuple[Tensor, ...]) -> Tensor:
    """Multiply every side by its root, ``[K, *shape]``."""
    for side, root in zip(sides, roots, strict=True):
        g = along(g, root, side)
    return g


def _graft_sgd(g: Tensor, sides: tuple[int, ...], roots: tuple[Tensor, ...]) -> Tensor:
    return _with_norm_of(g, torch.ones_like(g[:, 0, 0]), _precondition(g, sides, roots))


def _graft_adaptive(
    g: Tensor,
    sides: tuple[int, ...],
    roots: tuple[Tensor, ...],
    mean: Tensor | None,
    square: Tensor,
    weights: Tensor,
    epsilon: Tensor,
) -> Tensor:
    """Graft Adam's norm, or RMSprop's when there is no mean; averages are changed in place."""
    first, second = BETAS
    weights.mul_(weights.new_tensor(BETAS)).add_(1 - weights.new_tensor(BETAS))
    square.mul_(second).addcmul_(g, g, value=1 - second)
    # Corrections for the start from zero are one number a block: they are left to the norm.
    root = weights[:, 1].sqrt()
    scaled = square.sqrt().add_(wide(epsilon * root, g))
    if mean is None:
        torch.div(g, scaled, out=scaled)
    else:
        torch.div(mean.lerp_(g, 1 - first), scaled, out=scaled)
        root = root / weights[:, 0]
    return _with_norm_of(scaled, root, _precondition(g, sides, roots))


def _with_norm_of(magnitude: Tensor, factor: Tensor, direction: Tensor) -> Tensor:
    """Return the directions with the norm of other blocks times a factor; a zero direction stays zero."""
    wanted = torch.linalg.vector_norm(magnitude.flatten(1), dim=1) * factor
    norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    return direction.mul_(wide(torch.where(norm > 0, wanted / norm, torch.zeros_like(norm)), direction))
