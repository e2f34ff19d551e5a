"""SOAP with width-aware learning rates: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._optim.checks import check_choice, check_number, check_period
from mupass._optim.fallback import EPSILON, Fallback
from mupass._optim.linalg.packed import packed_size, unpack
from mupass._optim.linalg.roots import eigenbases
from mupass._optim.matrix.base import ROLES, MatrixOptimizer, wide
from mupass._optim.matrix.block_stack import Stack
from mupass._optim.matrix.mode_products import Schedule, add_weight, along, observe
from mupass._optim.shampoo import KERNELS
from mupass._scales.plan import OptimizerSpec


class SOAP(MatrixOptimizer):
    """SOAP: Adam on ``Q_L^T G Q_R``, turned back, with the eigenbases of Shampoo's ``L`` and ``R``.

    Vyas et al., arXiv 2409.11321. The bases are those of past gradients only: the first gradient of a block
    starts them and does not move it. They follow the factors by one step of orthogonal iteration every
    ``basis_every`` steps; averages are turned with them. Matrices are ``[fan_out, fan_in]`` by the plan's
    axes, whatever the layout; fused parameters (qkv) are split into their matrices.

    Blocks of fixed size keep Adam's rate ``1/m_in``. In general it is ``sqrt(b_out b_in) / d_in`` for blocks
    ``b_out x b_in`` (Qiu et al., arXiv 2512.05620). Without blocks the rows of one step hold, but rates do
    not transfer over training: keep ``block_size`` small and the same at all widths, or set ``spectral``.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        momentum: Weight of the past in the average of gradients, Adam's first beta.
        beta2: Weight of the past in the average of squares in the eigenbasis.
        factor_decay: Weight of the past in Shampoo's factors.
        basis_every: Steps between orthogonal iterations.
        eigh_every: After how many orthogonal iterations the basis is computed anew; 0 is never.
        staggered: Whether bases are spread over ``basis_every`` steps, a part of the blocks at each.
        block_size: Largest side of a block.
        kernels: ``matrix`` flattens the kernel axes of a convolution into fan_in; ``modes`` gives every
            axis a basis of its own.
        spectral: Whether every block of the update is divided by its spectral norm. It is then no larger than
            Muon's, and does not grow over training with the width of blocks.
        roles: Roles that SOAP takes.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        decay: ``all``, or ``matrices``: no decay of vectors (biases, gains), numbers and embedding tables.
        overrides: Other settings by pattern of names (as in `fnmatch`; the first that fits), such as
            ``{"head.*": {"lr": 1e-3, "weight_decay": 0.0}}``; keys are ``lr``, ``weight_decay``, ``damping``.
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
    """

    smooths = False  # the momentum is in the stacks

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        factor_decay: float = 0.95,
        basis_every: int = 10,
        eigh_every: int = 0,
        staggered: bool = True,
        block_size: int = 256,
        kernels: str = "matrix",
        spectral: bool = False,
        roles: Collection[str] = ROLES,
        weight_decay: float = 0.0,
        decay: str = "all",
        overrides: Mapping[str, Mapping[str, float]] | None = None,
        fallback: str | Fallback = "adamw",
        fallback_lr: float | None = None,
        compile: bool | None = None,
        data_parallel: bool | None = None,
        stochastic_rounding: bool = False,
        strict: bool = False,
    ) -> None:
        self.beta2 = check_number("beta2", beta2, 0, 1)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.basis_every = check_period("basis_every", basis_every)
        self.eigh_every = check_period("eigh_every", eigh_every) if eigh_every else 0
        check_choice("kernels", kernels, KERNELS)
        self._staggered, self.report_every = staggered, self.basis_every
        super().__init__(
            model,
            OptimizerSpec("soap"),
            lr,
            roles=roles,
            block_size=check_period("block_size", block_size),
            modes=kernels == "modes",
            spectral=spectral,
            compile=compile,
            data_parallel=data_parallel,
            momentum=momentum,
            weight_decay=weight_decay,
            decay=decay,
            overrides=overrides,
            fallback=fallback,
            fallback_lr=fallback_lr,
            stochastic_rounding=stochastic_rounding,
            strict=strict,
        )

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        super()._set_up(parameters)
        self._sides = [_every_side(stack) for stack in self._stacks]
        self._schedule = Schedule(self._stacks, self._remote, _every_side, self.basis_every, self._staggered)
        self._epsilons = [EPSILON * stack.each(self._epsilon) for stack in self._stacks]
        # Slots that have a basis.
        self._started: list[set[int]] = [set() for _ in self._stacks]

    def _first_stack_state(self, stack: Stack) -> dict[str, Tensor]:
        state = {name: stack.zeros(*stack.shape) for name in ("mean", "square")}
        state |= {"weight": stack.zeros(), "weights": stack.zeros(2)}
        for side, n in enumerate(stack.shape):
            state |= {f"factor{side}": stack.zeros(packed_size(n)), f"basis{side}": stack.zeros(n, n)}
        return state

    def _correction(self, name: str) -> float:
        return float(self._blockings[name].growth() ** -0.5)

    def _epsilon(self, name: str) -> float:
        # The norm of a block's gradient is that of the whole over the root of the number of blocks.
        return float(self.plan[name].scales.epsilon * self._blockings[name].growth() ** -0.5)

    def _update(self) -> Callable[..., Tensor]:
        return _turned_adam

    def _loaded(self) -> None:
        # A slot of any weight has been observed, and so has a basis.
        self._started = [
            {i for i, weight in enumerate(stack.state["weight"].tolist()) if weight > 0}
            for stack in self._stacks
        ]

    def _make_up(self) -> None:
        # A basis that was started by a gradient that did not count is none.
        self._loaded()

    def _arguments(
        self, number: int, at: slice, g: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        stack = self._stacks[number]
        bases = tuple(stack.state[f"basis{side}"][at] for side in self._sides[number])
        momentum = stack.each(self._setting("momentum").__getitem__)[at]
        betas = torch.stack([momentum, torch.full_like(momentum, self.beta2)], 1)
        averages = (stack.state[k][at] for k in ("mean", "square", "weights", "weight"))
        return mean, bases, *averages, betas, self._epsilons[number][at], counts

    def _observe(self, number: int, at: slice, g: Tensor, counts: Tensor) -> None:
        state = self._stacks[number].state
        for side in self._sides[number]:
            observe(state[f"factor{side}"][at], g, side, self.factor_decay, counts)
        add_weight(state["weight"][at], self.factor_decay, counts)

    def _finish(self, number: int, runs: Sequence[slice]) -> None:
        """Start the bases of slots that were seen for the first time, and turn those that are due."""
        started = self._started[number]
        seen = {i for run in runs for i in range(run.start, run.stop)}
        new = sorted(seen - started)
        started |= seen
        for side in self._sides[number]:
            if new:
                self._start(number, side, new)
            if self._steps > 0:
                due = [i for i in self._schedule.due(self._steps, number, side) if i in started]
                if due:
                    self._turn(number, side, due)

    def _start(self, number: int, side: int, slots: Sequence[int]) -> None:
        """Compute the first basis of some slots; what has no decomposition keeps the axes."""
        stack = self._stacks[number]
        n, at = stack.shape[side], torch.tensor(slots, device=stack.device)
        _, vectors, found = eigenbases(unpack(stack.state[f"factor{side}"][at], n))
        axes = torch.eye(n, dtype=stack.dtype, device=stack.device)
        stack.state[f"basis{side}"][at] = torch.where(found[:, None, None], vectors.flip(-1), axes)
        stack.note("failed_bases", ~found, at, f"side {side} of ")

    def _turn(self, number: int, side: int, slots: Sequence[int]) -> None:
        """Let some bases follow their factors, and the averages follow the bases."""
        stack = self._stacks[number]
        state, at = stack.state, torch.tensor(slots, device=stack.device)
        old = state[f"basis{side}"][at]
        factor = unpack(state[f"factor{side}"][at], stack.shape[side])
        turned = old.mT @ factor  # columns as rows, which are sorted faster and decomposed without a copy
        order = (old.mT * turned).sum(-1).argsort(-1, descending=True)
        turned = turned.gather(1, order[:, :, None].expand_as(turned)).mT
        if self.eigh_every and self._steps // self.basis_every % self.eigh_every == 0:
            _, vectors, found = eigenbases(factor)
            turned = torch.where(found[:, None, None], vectors.flip(-1), turned)
        # No `torch.linalg.qr`: that makes R, too.
        new = torch.linalg.householder_product(*torch.geqrf(turned))
        state[f"basis{side}"][at] = new
        # One after the other: together they are a product of two squares, which takes longer.
        state["mean"][at] = along(along(state["mean"][at], old, side), new.mT, side)
        square = state["square"][at].movedim(side + 1, 1)
        rows = order.view(*order.shape, *[1] * (square.dim() - 2)).expand_as(square)
        state["square"][at] = square.gather(1, rows).movedim(1, side + 1)


def _every_side(stack: Stack) -> tuple[int, ...]:
    return tuple(range(len(stack.shape)))


def _turned_adam(
    g: Tensor,
    bases: tuple[Tensor, ...],
    mean: Tensor,
    square: Tensor,
    weights: Tensor,
    weight: Tensor,
    betas: Tensor,
    epsilon: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return Adam's direction in the bases, turned back; averages are changed in place.

    A block without a basis yet (``weight`` 0) is not counted, and its direction is zero.
    """
    turned = g
    for side, basis in enumerate(bases):
        turned = along(turned, basis.mT, side)
    fresh = (1 - betas) * ((weight > 0) * counts)[:, None]
    betas = 1 - (1 - betas) * counts[:, None]
    weights.lerp_(torch.ones_like(weights), fresh)
    mean.lerp_(turned, wide(1 - betas[:, 0], g))
    square.mul_(wide(betas[:, 1], g)).addcmul_(turned, turned * wide(1 - betas[:, 1], g))
    # Corrections for the start from zero are one number a block.
    total = weights.clamp(min=torch.finfo(g.dtype).tiny)
    root = total[:, 1].sqrt()
    direction = square.sqrt().add_(wide(epsilon * root, g))
    torch.div(mean, direction, out=direction).mul_(wide(root / total[:, 0], g))
    for side, basis in enumerate(bases):
        direction = along(direction, basis, side)
    return direction
