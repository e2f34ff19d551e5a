"""SOAP with width-aware learning rates: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from mupass._optim.checks import check_choice, check_number, check_period
from mupass._optim.fallback import EPSILON
from mupass._optim.matrix import ROLES, MatrixOptimizer, pick, wide
from mupass._optim.parallel import divided
from mupass._optim.roots import eigenbases, symmetric
from mupass._optim.shampoo import KERNELS
from mupass._optim.sides import Schedule, add_weight, along, observe
from mupass._optim.stacks import Stack
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
        fallback: ``adamw``, ``adam_atan2`` or ``sgd``, for vectors, tables that no activation is contracted
            with, and other roles.
        fallback_lr: Learning rate of the fallback at the base width.
        compile: Whether the update of each shape is compiled with `torch.compile`.
        data_parallel: Whether ranks hold the same gradients, so that bases are divided over them. By default
            yes where torch.distributed runs with several ranks.
        strict: Raise when any parameter falls back.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    smooths = False  # the momentum is in the stacks

    def __init__(
        self,
        model: nn.Module,
        lr: float,
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
        fallback: str = "adamw",
        fallback_lr: float = 1e-3,
        compile: bool = False,
        data_parallel: bool | None = None,
        strict: bool = False,
    ) -> None:
        self.beta2 = check_number("beta2", beta2, 0, 1)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.basis_every = check_period("basis_every", basis_every)
        self.eigh_every = check_period("eigh_every", eigh_every) if eigh_every else 0
        check_choice("kernels", kernels, KERNELS)
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
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        self._sides = [tuple(range(len(stack.shape))) for stack in self._stacks]
        self._schedule = Schedule(self._stacks, self._sides, basis_every, staggered)
        for stack in self._stacks:
            stack.state |= {k: stack.zeros(*stack.shape) for k in ("mean", "square")}
            stack.state |= {"weight": stack.zeros(), "weights": stack.zeros(2)}
            for side, n in enumerate(stack.shape):
                stack.state |= {f"factor{side}": stack.zeros(n, n), f"basis{side}": stack.zeros(n, n)}
        self._epsilons = [EPSILON * stack.each(self._epsilon) for stack in self._stacks]

    def _correction(self, name: str) -> float:
        return float(self._blockings[name].growth() ** -0.5)

    def _epsilon(self, name: str) -> float:
        # The norm of a block's gradient is that of the whole over the root of the number of blocks.
        return float(self.plan[name].scales.epsilon * self._blockings[name].growth() ** -0.5)

    def _update(self) -> Callable[..., Tensor]:
        return _turned_adam

    def _advance(self, stack: Stack, g: Tensor, at: Tensor | None) -> Sequence[Tensor]:
        number = self._stacks.index(stack)
        state = stack.view(at)
        bases = tuple(state[f"basis{side}"] for side in self._sides[number])
        momentum = pick(stack.each(self._setting("momentum").__getitem__), at)
        betas = torch.stack([momentum, torch.full_like(momentum, self.beta2)], 1)
        epsilon = pick(self._epsilons[number], at)
        averages = (state[k] for k in ("mean", "square", "weights", "weight"))
        direction = self._run(stack, at, g, bases, *averages, betas, epsilon)
        for side in self._sides[number]:
            observe(state[f"factor{side}"], g, side, self.factor_decay)
        new = state["weight"] == 0
        add_weight(state["weight"], self.factor_decay)
        stack.put(at, state)
        if self._steps == 0 or at is not None or bool(new.any()):
            slots = torch.arange(len(stack.slots), device=g.device) if at is None else at
            for side in self._sides[number]:
                self._start(stack, side, slots[new])
        if self._steps > 0:
            for side in self._sides[number]:
                self._turn(number, side)
        return direction

    def _start(self, stack: Stack, side: int, slots: Tensor) -> None:
        """Compute the first basis of some slots; what has no decomposition keeps the axes."""
        factors, bases = stack.state[f"factor{side}"], stack.state[f"basis{side}"]
        _, vectors, found = eigenbases(symmetric(factors[slots]))
        axes = torch.eye(factors.shape[-1], dtype=stack.dtype, device=stack.device)
        bases[slots] = torch.where(found[:, None, None], vectors.flip(-1), axes)
        for i in (~found).nonzero().flatten().tolist():
            self.count("failed_bases", "side {} of {}, block {}".format(side, *stack.slots[int(slots[i])]))

    def _turn(self, number: int, side: int) -> None:
        """Let the bases that are due follow their factors, and the averages follow the bases."""
        due = self._schedule.due(self._steps, number, side)
        if due is None:
            return
        state = self._stacks[number].state
        due = due[state["weight"][due] > 0]
        old = state[f"basis{side}"][due]
        factor = symmetric(state[f"factor{side}"][due])
        turned = old.mT @ factor  # columns as rows, which are sorted faster and decomposed without a copy
        order = (old.mT * turned).sum(-1).argsort(-1, descending=True)
        turned = turned.gather(1, order[:, :, None].expand_as(turned)).mT
        exact = self.eigh_every and self._steps // self.basis_every % self.eigh_every == 0

        def compute(at: Tensor) -> tuple[Tensor]:
            basis = turned[at]
            if exact:
                _, vectors, found = eigenbases(factor[at])
                basis = torch.where(found[:, None, None], vectors.flip(-1), basis)
            # No `torch.linalg.qr`: that makes R, too.
            return (torch.linalg.householder_product(*torch.geqrf(basis)),)

        (new,) = divided(torch.arange(len(due), device=due.device), self._ranks, compute, symmetric=False)
        state[f"basis{side}"][due] = new
        # One after the other: together they are a product of two squares, which takes longer.
        state["mean"][due] = along(along(state["mean"][due], old, side), new.mT, side)
        square = state["square"][due].movedim(side + 1, 1)
        rows = order.view(*order.shape, *[1] * (square.dim() - 2)).expand_as(square)
        state["square"][due] = square.gather(1, rows).movedim(1, side + 1)


def _turned_adam(
    g: Tensor,
    bases: tuple[Tensor, ...],
    mean: Tensor,
    square: Tensor,
    weights: Tensor,
    weight: Tensor,
    betas: Tensor,
    epsilon: Tensor,
) -> Tensor:
    """Return Adam's direction in the bases, turned back; averages are changed in place.

    A block without a basis yet (``weight`` 0) is not counted, and its direction is zero.
    """
    turned = g
    for side, basis in enumerate(bases):
        turned = along(turned, basis.mT, side)
    fresh = (1 - betas) * (weight > 0)[:, None]
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
