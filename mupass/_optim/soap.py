"""SOAP with width-aware learning rates: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mupass._errors import OptimizerError
from mupass._keywords import Keywords, takes
from mupass._optim.checks import check_flag, check_number, check_period
from mupass._optim.fallback import EPSILON
from mupass._optim.linalg.packed import packed_size, unpack
from mupass._optim.linalg.roots import eigenbases
from mupass._optim.matrix.base import Layout, LayoutOptions, MatrixOptimizer, wide
from mupass._optim.matrix.block_stack import Stack
from mupass._optim.matrix.mode_products import Schedule, add_weight, along, observe
from mupass._optim.training import Training, TrainingOptions
from mupass._optim.vocabulary import State
from mupass._scales.plan import OptimizerSpec


class SOAPOptions(TrainingOptions, LayoutOptions, total=False):
    """Keywords of `SOAP` that records hold, for type checkers and editors."""

    spectral: bool
    factor_decay: float
    basis_every: int
    eigh_every: int
    staggered: bool


@dataclass(frozen=True)
class Bases:
    """How factors are averaged, and when bases follow them.

    Attributes:
        factor_decay: Weight of the past in the averages.
        basis_every: Steps between orthogonal iterations.
        eigh_every: After how many of these a basis is computed anew; 0 is never.
        staggered: Whether bases are spread over the steps of a period.
    """

    factor_decay: float = 0.95
    basis_every: int = 10
    eigh_every: int = 0
    staggered: bool = True

    def __post_init__(self) -> None:
        check_number("factor_decay", self.factor_decay, 0, 1)
        check_period("basis_every", self.basis_every)
        if self.eigh_every:
            check_period("eigh_every", self.eigh_every)
        check_flag("staggered", self.staggered)


class SOAP(MatrixOptimizer):
    """SOAP: Adam on ``Q_L^T G Q_R``, turned back, with the eigenbases of Shampoo's ``L`` and ``R``.

    Vyas et al., arXiv 2409.11321. The bases are those of past gradients only: the first gradient of a block
    starts them and does not move it. They follow the factors by one step of orthogonal iteration every
    ``basis_every`` steps; averages are turned with them. Matrices are ``[fan_out, fan_in]`` by the plan's
    axes, whatever the layout; fused parameters (qkv) are split into their matrices.

    Blocks of fixed size keep Adam's rate ``1/m_in``. In general it is ``sqrt(b_out b_in) / d_in`` for blocks
    ``b_out x b_in`` (Qiu et al., arXiv 2512.05620). Blocks that grow with the width follow this for one step,
    but rates do not transfer over training: leave ``block_size`` at ``base``, or give the same number at all
    widths that is no larger than the base width, or set ``spectral``.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        momentum: Weight of the past in the average of gradients, Adam's first beta.
        beta2: Weight of the past in the average of squares in the eigenbasis.
        factor_decay: Weight of the past in Shampoo's factors.
        basis_every: Steps between orthogonal iterations.
        eigh_every: After how many orthogonal iterations the basis is computed anew; 0 is never.
        staggered: Whether bases are spread over ``basis_every`` steps, a part of the blocks at each.
        block_size: Largest side of a block. ``base`` makes blocks as large as the matrices are at the base
            width, so that they are the same at all widths; sides above 256 are cut into equal parts, and
            blocks are not made smaller than 32.
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

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> optimizer = mupass.SOAP(net, lr=3e-3, block_size=64)
        >>> net(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()
        {'steps': 1}
    """

    smooths = False  # the momentum is in the stacks

    @takes(SOAPOptions, Bases, Layout, Training)
    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        block_size: int | Literal["base"] = "base",
        **options: Unpack[SOAPOptions],
    ) -> None:
        self.beta2 = check_number("beta2", beta2, 0, 1)
        keywords = Keywords(SOAP, options, OptimizerError)
        bases = keywords.record(Bases)
        self.factor_decay, self.eigh_every = float(bases.factor_decay), bases.eigh_every
        self.basis_every = self.report_every = bases.basis_every
        self._staggered = bases.staggered
        layout = keywords.record(Layout, block_size=block_size)
        training = keywords.record(Training, momentum=momentum)
        super().__init__(model, OptimizerSpec("soap"), lr, training, layout)

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        super()._set_up(parameters)
        self._sides = [_every_side(stack) for stack in self._stacks]
        self._schedule = Schedule(self._stacks, self._remote, _every_side, self.basis_every, self._staggered)
        self._epsilons = [EPSILON * stack.each(self._epsilon) for stack in self._stacks]
        # Slots that have a basis.
        self._started: list[set[int]] = [set() for _ in self._stacks]

    def _first_stack_state(self, stack: Stack) -> State:
        state = {name: stack.zeros(*stack.shape) for name in ("mean", "square")}
        state |= {"weight": stack.zeros(), "weights": stack.zeros(2)}
        for side, size in enumerate(stack.shape):
            state[f"factor{side}"] = stack.zeros(packed_size(size))
            state[f"basis{side}"] = stack.zeros(size, size)
        return state

    def _correction(self, name: str) -> float:
        return float(self._growth(name) ** -0.5)

    def _epsilon(self, name: str) -> float:
        # The norm of a block's gradient is that of the whole over the root of the number of blocks.
        return float(self.plan[name].scales.epsilon * self._growth(name) ** -0.5)

    def _update(self) -> Callable[..., Tensor]:
        return _turned_adam

    def _loaded(self) -> None:
        # A slot of any weight has been observed, and so has a basis.
        for number, stack in enumerate(self._stacks):
            observed = stack.state["weight"].nonzero().flatten()
            self._started[number] = set(observed.tolist())

    def _make_up(self) -> None:
        # A basis that was started by a gradient that did not count is none.
        self._loaded()

    def _arguments(
        self, number: int, at: slice, gradient: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        stack = self._stacks[number]
        bases = tuple(stack.state[f"basis{side}"][at] for side in self._sides[number])
        momentum = stack.each(self._setting("momentum").__getitem__)[at]
        betas = torch.stack([momentum, torch.full_like(momentum, self.beta2)], 1)
        state = stack.state
        averages = Averages(
            mean=state["mean"][at],
            square=state["square"][at],
            weights=state["weights"][at],
            weight=state["weight"][at],
            betas=betas,
            epsilon=self._epsilons[number][at],
            counts=counts,
        )
        return mean, bases, averages

    def _observe(self, number: int, at: slice, gradient: Tensor, counts: Tensor) -> None:
        state = self._stacks[number].state
        for side in self._sides[number]:
            observe(state[f"factor{side}"][at], gradient, side, self.factor_decay, counts)
        add_weight(state["weight"][at], self.factor_decay, counts)

    def _finish(self, number: int, runs: Sequence[slice]) -> None:
        """Start the bases of slots that were seen for the first time, and turn those that are due."""
        started = self._started[number]
        # Slots that had a gradient in this step.
        observed: set[int] = set()
        for run in runs:
            observed.update(range(run.start, run.stop))
        first_seen = sorted(observed - started)
        started |= observed
        for side in self._sides[number]:
            # A basis starts at the eigenvectors of the first factor.
            if first_seen:
                self._start(number, side, first_seen)
            if self._steps > 0:
                due_slots = [
                    slot for slot in self._schedule.due(self._steps, number, side) if slot in started
                ]
                if due_slots:
                    self._turn(number, side, due_slots)

    def _start(self, number: int, side: int, slots: Sequence[int]) -> None:
        """Compute the first basis of some slots; what has no decomposition keeps the axes."""
        stack = self._stacks[number]
        size, indices = stack.shape[side], torch.tensor(slots, device=stack.device)
        _, vectors, converged = eigenbases(unpack(stack.state[f"factor{side}"][indices], size))
        # Descending eigenvalues, as orthogonal iteration orders them.
        axes = torch.eye(size, dtype=stack.dtype, device=stack.device)
        stack.state[f"basis{side}"][indices] = torch.where(converged[:, None, None], vectors.flip(-1), axes)
        stack.note("failed_bases", ~converged, indices, f"side {side} of ")

    def _turn(self, number: int, side: int, slots: Sequence[int]) -> None:
        """Let some bases follow their factors, and the averages follow the bases."""
        stack = self._stacks[number]
        state, indices = stack.state, torch.tensor(slots, device=stack.device)
        old_basis = state[f"basis{side}"][indices]
        factor = unpack(state[f"factor{side}"][indices], stack.shape[side])
        # Columns as rows, which are sorted faster and decomposed without a copy.
        turned = old_basis.mT @ factor
        # q^T A q estimates the eigenvalue of each column.
        column_order = (old_basis.mT * turned).sum(-1).argsort(-1, descending=True)
        turned = turned.gather(1, column_order[:, :, None].expand_as(turned)).mT
        # Every so often a full decomposition, which orthogonal iteration approaches only.
        if self.eigh_every and self._steps // self.basis_every % self.eigh_every == 0:
            _, vectors, converged = eigenbases(factor)
            turned = torch.where(converged[:, None, None], vectors.flip(-1), turned)
        # No `torch.linalg.qr`: that makes R, too.
        # Orthogonal iteration: Q <- qr(A Q).
        new_basis = torch.linalg.householder_product(*torch.geqrf(turned))
        state[f"basis{side}"][indices] = new_basis
        # One after the other: together they are a product of two squares, which takes longer.
        state["mean"][indices] = along(along(state["mean"][indices], old_basis, side), new_basis.mT, side)
        # Squares cannot be turned: they go along with the order of the columns only.
        square = state["square"][indices].movedim(side + 1, 1)
        rows = column_order.view(*column_order.shape, *[1] * (square.dim() - 2)).expand_as(square)
        state["square"][indices] = square.gather(1, rows).movedim(1, side + 1)


def _every_side(stack: Stack) -> tuple[int, ...]:
    return tuple(range(len(stack.shape)))


class Averages(NamedTuple):
    """Adam's averages of some slots in their bases, changed in place.

    Attributes:
        mean: ``[k, *shape]``, of gradients.
        square: ``[k, *shape]``, of their squares.
        weights: ``[k, 2]``, total weights of the two, which correct for the start from zero.
        weight: ``[k]``, total weight of the factors; 0 where there is no basis yet. Not changed.
        betas: ``[k, 2]``, weights of the past.
        epsilon: ``[k]``, added to the root.
        counts: ``[k]``, 1, or 0 where the averages stay as they are.
    """

    mean: Tensor
    square: Tensor
    weights: Tensor
    weight: Tensor
    betas: Tensor
    epsilon: Tensor
    counts: Tensor


def _turned_adam(gradient: Tensor, bases: tuple[Tensor, ...], averages: Averages) -> Tensor:
    """Return Adam's direction in the bases, turned back; averages are changed in place.

    A block without a basis yet (``weight`` 0) is not counted, and its direction is zero.
    """
    mean, square, weights, weight, betas, epsilon, counts = averages
    # Q_L^T G Q_R
    turned = gradient
    for side, basis in enumerate(bases):
        turned = along(turned, basis.mT, side)
    # A block without a basis is not counted: its weight stays zero.
    new_weight = (1 - betas) * ((weight > 0) * counts)[:, None]
    betas = 1 - (1 - betas) * counts[:, None]
    weights.lerp_(torch.ones_like(weights), new_weight)
    mean.lerp_(turned, wide(1 - betas[:, 0], gradient))
    square.mul_(wide(betas[:, 1], gradient)).addcmul_(turned, turned * wide(1 - betas[:, 1], gradient))
    # (mean / w_1) / (sqrt(square / w_2) + epsilon), with corrections as one number a block.
    total = weights.clamp(min=torch.finfo(gradient.dtype).tiny)
    root = total[:, 1].sqrt()
    direction = square.sqrt().add_(wide(epsilon * root, gradient))
    torch.div(mean, direction, out=direction).mul_(wide(root / total[:, 0], gradient))
    for side, basis in enumerate(bases):
        direction = along(direction, basis, side)
    return direction
