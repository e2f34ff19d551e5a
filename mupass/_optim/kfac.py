"""K-FAC with width-aware learning rates and damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.base import PlannedOptimizer
from mupass._optim.checks import check_choice, check_number, check_period, check_words
from mupass._optim.clipping import GradientScale
from mupass._optim.fallback import Fallback
from mupass._optim.kronecker.curvature import Curvature, Loss
from mupass._optim.kronecker.damping import MODES
from mupass._optim.kronecker.ekfac import not_rescaled
from mupass._optim.kronecker.factor_stack import Bank
from mupass._optim.kronecker.preconditioner import Kronecker, Rules
from mupass._optim.kronecker.update import Compiled, shorten
from mupass._parallel import rank_of, sum_of, world_size
from mupass._scales.plan import OptimizerSpec
from mupass._taps.blocks import Options, Place
from mupass._taps.cover import cover
from mupass._taps.intercept import pass_on
from mupass._taps.leaves import Sums, Tap
from mupass._taps.terms import TermsTap

# Chosen by `benchmarks/defaults.py`.
LR = 0.1
DAMPING = 1e-3
MOMENTUM = 0.8
STEP_BOUND = 0.2
KL_CLIP = 1e-3


class KFAC(PlannedOptimizer):
    """Kronecker-factored approximate curvature, ``dW = -lr (B + rho_B)^-e_b G (A + rho_A)^-e_a``.

    ``A = E[x x^T]`` averages over batch and positions; ``B = E[delta delta^T]`` averages over loss terms and
    sums over the positions that share one, with ``delta`` the gradient of one loss term (Ishikawa & Karakida,
    arXiv 2312.12226, eq. 2). Learning rates carry the width factors of the plan. Biases are blocks of their
    own, with the layer's B and ``A = 1``: folded into A, a hidden bias would learn like 1/width.

    Momentum is the moving average of gradients, which is then preconditioned. Averages are corrected for
    their start. Where all gradients were multiplied by one factor between the backward pass and the step, as
    ``clip_grad_norm_`` does, B takes this factor, too: curvature then fits the gradient that it divides.
    The loss must be a mean over its terms (the default of PyTorch's losses) unless ``loss_reduction="sum"``.
    Under a ``GradScaler`` that steps this optimizer, B's scale is taken out; where gradients were unscaled
    before (to clip them), pass ``loss_scale=scaler.get_scale``.

    ``lr`` and ``damping`` are keys of the parameter groups, for schedules. Steps in which a gradient is NaN
    or infinite change nothing and are counted in `stats`.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        damping: Damping; by default relative to the trace of each factor, so it means the same at all widths.
        e_a: Power of A; 0 leaves the input side out (and does not collect it).
        e_b: Power of B; ``e_a=1, e_b=0`` is FOOF.
        momentum: Weight of the past in the average of gradients.
        momentum_of: ``gradients`` averages them, corrected for the start from zero, before they are
            preconditioned; ``directions`` adds up preconditioned gradients, as `torch.optim.SGD` does, which
            makes steps up to ``1 / (1 - momentum)`` times as long.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        decay: ``all``, or ``matrices``: no decay of vectors (biases, gains), numbers and embedding tables.
        overrides: Other settings by pattern of names (as in `fnmatch`; the first that fits), such as
            ``{"head.*": {"lr": 1e-3, "weight_decay": 0.0}}``; keys are ``lr``, ``weight_decay``, ``damping``.
        factor_decay: Weight of past factors in the moving averages.
        factor_every: Steps between collections of factors; steps in between run the cheap graph.
        root_every: Steps between recomputations of the inverses.
            In the first period all are computed at steps 1, 2, 4, 8 and so on; a root whose factor has grown
            since is made smaller by as much.
        stagger: Spread the roots over the steps of a period instead of computing all at once.
        damping_mode: ``trace``, ``eigen`` (relative to the largest eigenvalue), ``absolute`` or ``pi``
            (`mupass` docs: scale table).
        damping_floor: Smallest trace of B that trace damping reckons with, relative to the largest one; for
            queries and keys, whose gradients are small at first, and branches behind a gate of zero.
        damping_memory: What a step leaves of the largest trace (``eigen``: eigenvalue) of B seen so far, to
            which damping of B is relative: without it, steps grow as the loss goes to zero. 0 forgets it.
        step_bound: Bound on the root mean square of the change that a step makes to a layer's outputs by its
            weight, or by its bias, as A tells it; longer directions are shortened. It means the same at all
            widths. Parameters without a factor A (``e_a=0``) have none. None turns it off.
        kl_clip: Bound on ``sum over parameters of lr^2 scale <direction, gradient>``, about twice the KL
            divergence between the predictions before and after the step; directions are shortened to meet
            it. Every term is Theta(1) in width under ``mup``, so a bound means the same at all widths. 1e-3
            is a usual value; None turns it off.
        fisher: ``empirical`` takes B from the gradients of the loss; ``sampled`` from a loss with targets
            drawn from the model, see `observe` and `mupass.sample_targets`.
        sharing: What a weight used at many positions is: ``expand`` takes every position for a sample,
            ``reduce`` averages inputs and sums gradients over the positions of a sample (arXiv 2311.00636).
        ekfac: Scale the gradient in the eigenbases of A and B by its own second moments there instead of the
            products of eigenvalues (EKFAC; George et al., arXiv 1806.03884), see `mupass` docs: scale table.
            For weights with two full factors; the others keep K-FAC, and `coverage` says why. ``e_a`` and
            ``e_b`` must be 1.
        diagonal_above: Sides of fixed size (a vocabulary) above this keep the diagonal of their factor only;
            sides that grow with the width never do, because that would change the exponents.
        block_size: Longer sides are cut into equal blocks of at most this size, and their factors keep what
            is inside the blocks. Steps are divided by what the number of blocks has grown since the base
            width (to the powers ``e_a`` and ``e_b``), so that exponents stay. None keeps factors whole.
        norms: Whether gains and shifts (of norms, or in code) are preconditioned; else they fall back.
        exclude: Patterns (as in `fnmatch`) of parameters that are left to the fallback.
        fallback: ``adamw``, ``adam_atan2`` or ``sgd``, for parameters that K-FAC does not take (see
            `coverage`). A `Fallback` sets betas, epsilon, momentum and decay, too.
        fallback_lr: Learning rate of the fallback at the base width.
        loss_terms: Number of terms that the loss averages over, or a function of no arguments giving it. By
            default counted on the model's first output, its class axis left out: samples for a classifier,
            tokens for a language model. Needed where the model returns its loss, or where the loss skips
            many entries (``ignore_index``).
        loss_reduction: ``mean`` or ``sum``.
        loss_scale: What the loss is multiplied by before ``backward``, or a function giving it.
        stochastic_rounding: Whether weights in bfloat16 are rounded up or down at random, so that the mean is
            that of an exact step; rounding to the nearest loses steps below 1/256 of a weight. Draws follow
            `torch.manual_seed` at construction, and are the same on all ranks.
        strict: Raise when any parameter falls back.
        data_parallel: Whether ranks train on parts of one batch, so that factors are summed over them, and
            each rank keeps the factors and roots of some parameters (EKFAC: of all). By default yes where
            torch.distributed runs with several ranks.
        compile: Whether the update of each shape is compiled with `torch.compile`, but for what EKFAC
            rescales. None compiles on CUDA where Triton is there, and nothing on CPU.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = LR,
        damping: float = DAMPING,
        *,
        e_a: float = 1.0,
        e_b: float = 1.0,
        momentum: float = MOMENTUM,
        momentum_of: str = "gradients",
        weight_decay: float = 0.0,
        decay: str = "all",
        overrides: Mapping[str, Mapping[str, float]] | None = None,
        factor_decay: float = 0.95,
        factor_every: int = 1,
        root_every: int = 10,
        stagger: bool = True,
        damping_mode: str = "trace",
        damping_floor: float = 0.1,
        damping_memory: float = 0.99,
        step_bound: float | None = STEP_BOUND,
        kl_clip: float | None = KL_CLIP,
        fisher: str = "empirical",
        sharing: str = "expand",
        ekfac: bool = False,
        diagonal_above: int = 8192,
        block_size: int | None = None,
        norms: bool = True,
        exclude: Sequence[str] = (),
        fallback: str | Fallback = "adamw",
        fallback_lr: float | None = None,
        loss_terms: int | Callable[[], int] | None = None,
        loss_reduction: str = "mean",
        loss_scale: float | Callable[[], float] | None = None,
        stochastic_rounding: bool = False,
        strict: bool = False,
        data_parallel: bool | None = None,
        compile: bool | None = None,
    ) -> None:
        check_number("e_a", e_a)
        check_number("e_b", e_b)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.factor_every = check_period("factor_every", factor_every)
        self.root_every = self.report_every = check_period("root_every", root_every)
        self.damping_memory = check_number("damping_memory", damping_memory, 0, 1)
        self.damping_mode = check_choice("damping_mode", damping_mode, MODES)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        self.step_bound = None if step_bound is None else check_number("step_bound", step_bound)
        self.kl_clip = None if kl_clip is None else check_number("kl_clip", kl_clip)
        self.sampled = check_choice("fisher", fisher, ("empirical", "sampled")) == "sampled"
        check_choice("sharing", sharing, ("expand", "reduce"))
        self.ekfac = ekfac
        if ekfac and ((e_a, e_b) != (1, 1) or damping_mode == "pi"):
            raise OptimizerError(
                f"ekfac=True divides by second moments: e_a and e_b must be 1, not {e_a:g} and {e_b:g}, and "
                "damping_mode not 'pi', which gives a factor several roots"
            )
        if block_size is not None and (ekfac or damping_mode == "pi"):
            what = "ekfac=True" if ekfac else "damping_mode='pi'"
            raise OptimizerError(
                f"block_size cuts factors, and {what} needs whole ones: leave one of them out"
            )
        self.loss_scale = loss_scale
        self.stagger = stagger
        if loss_terms is not None and not callable(loss_terms):
            check_period("loss_terms", loss_terms)
        self._ranks = world_size(data_parallel)
        self._compiled = Compiled(compile)
        self._options = Options(
            sharing == "reduce",
            check_period("diagonal_above", diagonal_above),
            norms,
            check_words("exclude", exclude),
            0 if block_size is None else check_period("block_size", block_size),
        )
        self._rules = Rules(
            powers=(float(e_a), float(e_b)),
            mode=damping_mode,
            floor=check_number("damping_floor", damping_floor),
            memory=self.damping_memory,
            stagger=stagger,
            ekfac=ekfac,
            block=self._options.block,
        )
        self._mean_loss = loss_reduction == "mean"
        self._loss = Loss(loss_terms, self._mean_loss)
        super().__init__(
            model,
            OptimizerSpec("kfac", e_a=e_a, e_b=e_b),
            lr,
            damping,
            momentum=momentum,
            momentum_of=momentum_of,
            weight_decay=weight_decay,
            decay=decay,
            overrides=overrides,
            fallback=fallback,
            fallback_lr=fallback_lr,
            stochastic_rounding=stochastic_rounding,
            strict=strict,
        )
        self._due = False
        self._prepare_next()

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        taken = {n: p for p, n in self.names.items() if n not in self._unfit}
        self._parameters = taken
        self._cover = cover(self.root, self.plan, self._options, frozenset(taken))
        self._curvature = Curvature(
            self.root, self._cover, (self.spec.e_a > 0, self.spec.e_b > 0), self._loss, self._ranks
        )
        self._kronecker = self._factors(Bank)
        self._curvature.rescale(self._kronecker.moments.bases())
        self._clipping = GradientScale([taken[b.parameter] for b in self._cover.blocks])
        self._all_seen = False
        plain = {b.parameter: not_rescaled(b, self._cover.layers) for b in self._cover.blocks if self.ekfac}
        own = {
            b.parameter: f"kfac {b.kind}" if plain.get(b.parameter, "kfac") else f"ekfac {b.kind}"
            for b in self._cover.blocks
        }
        return own, {**self._cover.reasons, **plain}

    def _factors(self, bank: type[Bank]) -> Kronecker:
        return Kronecker(
            self._cover.blocks,
            self._cover.layers,
            self._parameters,
            self._rules,
            {e.geometry.name: e for e in self.plan.entries},
            self._ranks,
            rank_of(self._ranks),
            bank,
            self._compiled,
        )

    @property
    def taps(self) -> list[Tap | TermsTap]:
        """What collects factors, and the number of loss terms."""
        return [*self._curvature.taps.values(), self._curvature.terms]

    def functional(self, bank: type[Bank]) -> Functional:
        """Return the computation of directions as a function of a state; this optimizer is used up by it.

        Args:
            bank: Kind of bank, one that writes to no tensor of its state.
        """
        self._compiled = Compiled(False)
        self._kronecker = self._factors(bank)
        return Functional(self)

    def _own_state(self, name: str) -> dict[str, Tensor]:
        return self._kronecker.entries(name)

    @property
    def _owner(self) -> Mapping[str, int]:
        return self._kronecker.owner if self._ranks > 1 and not self.ekfac else {}

    def _replaced(self, name: str, new: Tensor) -> None:
        if name in self._parameters:
            pass_on(self.root, name, self._parameters[name])
            self._parameters[name] = new
            self._clipping = GradientScale([self._parameters[b.parameter] for b in self._cover.blocks])

    def _prepare_next(self) -> None:
        """Collect factors in the passes before a step that uses them."""
        self._due |= self._steps % self.factor_every == 0
        self._curvature.collect(self._due and not self.sampled)

    @property
    def factors_due(self) -> bool:
        """Whether the next step adds to the factors: with ``fisher="sampled"``, call `observe` before it."""
        return self._due

    def observe(self, closure: Callable[[], Tensor]) -> None:
        """Collect the factors of the next step from a loss of its own; does nothing where none are due.

        For ``fisher="sampled"``: ``optimizer.observe(lambda: loss(out := model(x), sample_targets(out)))``.
        Gradients of parameters are neither computed nor changed. Under DistributedDataParallel run
        ``model.module`` in the closure, which needs no communication of gradients.

        Args:
            closure: Runs the model and returns the loss.

        Raises:
            OptimizerError: The factors come from the ordinary backward passes.
        """
        if not self.sampled:
            raise OptimizerError('observe() belongs to fisher="sampled"')
        if not self._due:
            return
        self._curvature.collect(True)
        with torch.enable_grad():
            self._curvature.differentiate(closure())
        self._curvature.collect(False)

    def curvature_along(self, moves: Mapping[str, Tensor]) -> float:
        """Return ``d^T F d`` of a move, with K-FAC's F (block-diagonal, undamped).

        Args:
            moves: Change of each parameter; those that K-FAC does not take count nothing.
        """
        own = self._kronecker.quadratic(moves).reshape(()).to(self._device)
        return float(sum_of([own], self._ranks if self._owner else 1))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the factors that were collected with them.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        # What `observe` collected is not of these gradients; torch calls this before there is anything.
        if hasattr(self, "_curvature") and not self.sampled:
            self._curvature.clear()
        if hasattr(self, "_members"):  # before the pass whose factors the new tensors' taps are to see
            self._adopt_swapped()

    def _directions(
        self, gradients: Mapping[str, Tensor], means: Mapping[str, Tensor], ok: Tensor
    ) -> dict[str, Tensor]:
        kronecker = self._kronecker
        clipped = self._clipped()
        if self._due and self._cover.blocks:
            self._average(gradients, ok, clipped)
        if kronecker.rooted or not self._due:
            spare = self.stagger and self.factor_every > 1 and self.root_every % self.factor_every == 0
            due = kronecker.due(self._steps, self.root_every, spare)
            if due:
                kronecker.refresh(self._dampings(), due)
        directions, changes = kronecker.directions(means)
        self._bound(directions, changes, means, clipped)
        return directions

    def _average(self, gradients: Mapping[str, Tensor], ok: Tensor, clipped: Tensor | None) -> None:
        """Add what the taps summed to the averages, and let go of it before roots need the memory."""
        taken = self._curvature.take(1.0 if self.sampled else self._scale_of_loss())
        if taken:
            if clipped is not None:
                _scale_outputs(taken, clipped)
            memory = self.damping_memory**self.factor_every
            self._kronecker.average(taken, self.factor_decay, memory, ok)
            self._due = False
            self._refuse_unseen(gradients)
        else:  # made up for at the next step
            what = "observe() was not called" if self.sampled else "no tapped layer took part"
            self.count("steps_without_factors", what)

    def _clipped(self) -> Tensor | None:
        """Return the factor that the training loop multiplied this step's gradients by, as clipping does.

        A sum over terms may be divided by their number there, which is no change of the loss.
        """
        factor = self._clipping.take(self._ranks)
        if factor is None or not self._mean_loss:
            return None
        # Gradients were unscaled, too, since the backward pass.
        scale = self._scale_of_loss()
        return factor * (scale.to(factor) if isinstance(scale, Tensor) else scale)

    def _bound(
        self,
        directions: dict[str, Tensor],
        changes: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        clipped: Tensor | None,
    ) -> None:
        """Shorten directions so that the step stays within its bounds.

        Where directions add up, each of them is held to the part of the bound that their sum then keeps.
        """
        lrs, scales, momenta = (self._setting(key) for key in ("lr", "mupass_scale", "momentum"))
        rates = {n: (lrs[n], scales[n], momenta[n]) for n in lrs}
        rest = {n: 1 - m if self.momentum_of == "directions" else 1.0 for n, (_, _, m) in rates.items()}
        if self.step_bound is not None:
            for name, change in changes.items():
                lr, scale, _ = rates[name]
                # What fold put into a parameter is in its change, too.
                limit = self.step_bound * rest[name] * self.plan[name].geometry.folded
                squares: list[Any] = [(lr * scale) ** 2, limit**2]
                if self._compiled.on(change.device):  # as tensors: other numbers need no other graph
                    squares = [change.new_full((), square) for square in squares]
                directions[name] = self._compiled(shorten, directions[name], change, *squares)
        if self.kl_clip is not None:
            moves = []
            for name, direction in directions.items():
                lr, scale, _ = rates[name]
                moves.append((direction * means[name]).sum() * (lr**2 * scale / rest[name] ** 2))
            total = sum_of(moves or [torch.zeros((), device=self._device)], self._ranks if self._owner else 1)
            # Predictions change as they do without clipping, whose factor is in the gradients.
            total = total if clipped is None else total / clipped.to(total)
            factor = (self.kl_clip / total.clamp(min=1e-30)).sqrt().clamp(max=1.0)
            for name, direction in directions.items():
                directions[name] = direction * factor.to(direction.device, direction.dtype)

    def _incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        return self._kronecker.incidents()

    def _refuse_unseen(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuse to leave a parameter at rest because its gradient came past its tap."""
        if self._all_seen:
            return
        unseen = self._kronecker.unseen()
        self._all_seen = not unseen
        for name in unseen:
            if name in gradients and bool(gradients[name].any()):
                raise OptimizerError(
                    f"{name} has a gradient, but its tap saw no operator that uses it: the code took another "
                    f"path than in the captured pass, or replaced the parameter. Pass exclude=['{name}'] to "
                    "leave it to the fallback"
                )

    def _scale_of_loss(self) -> Tensor | float:
        """Return what the loss was multiplied by: told, or left here by a gradient scaler."""
        given = self.loss_scale
        if given is not None:
            return float(given() if callable(given) else given)
        if hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None:
            raise OptimizerError(
                "the gradient scaler unscaled the gradients before this step, so its scale, which is in the "
                "factors, or in what clipping did, cannot be told: pass loss_scale=scaler.get_scale"
            )
        return self._amp_scale

    def _make_up(self) -> None:
        self._due = True

    def _loaded(self) -> None:
        self._due = False
        self._kronecker.loaded(self._steps)


class Functional:
    """K-FAC's directions as a function of a state, see `KFAC.functional`.

    Attributes:
        start: State before the first step.
    """

    def __init__(self, optimizer: KFAC) -> None:
        self._optimizer = optimizer
        self.start = optimizer._kronecker.state()

    def directions(
        self,
        step: int,
        state: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return the directions of one step, and the state after it.

        What the taps have collected is taken; other numbers are read from the optimizer's groups.

        Args:
            step: Number of steps taken before.
            state: State after them.
            gradients: Gradient of each parameter that has one.
            means: Their moving averages.
        """
        made, kronecker = self._optimizer, self._optimizer._kronecker
        kronecker.take_state(state, step)
        made._steps, made._amp_scale = step, 1.0
        made._due = bool(made._cover.blocks) and step % made.factor_every == 0
        own = made._parameters
        gradients, means = ({n: g for n, g in some.items() if n in own} for some in (gradients, means))
        found = made._directions(gradients, means, torch.ones((), device=made._device))
        return found, kronecker.state()


def _scale_outputs(taken: Mapping[Place, Sums], factor: Tensor) -> None:
    """Multiply the factors B of one step: the curvature of a loss that is a multiple is that multiple."""
    for sums in taken.values():
        for m in (*sums.b, *sums.moments):
            if m is not None:
                m.mul_(factor.to(m))
