"""K-FAC with width-aware learning rates and damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.banks import Bank
from mupass._optim.base import PlannedOptimizer
from mupass._optim.checks import check_choice, check_number, check_period
from mupass._optim.curvature import Curvature, Loss
from mupass._optim.damping import MODES
from mupass._optim.eigen import not_rescaled
from mupass._optim.kronecker import NO_GRADIENT, Kronecker
from mupass._optim.parallel import sharded_like, whole, world_size
from mupass._scales.plan import OptimizerSpec
from mupass._taps.blocks import Options
from mupass._taps.cover import cover
from mupass._taps.factors import factor_dtype


class KFAC(PlannedOptimizer):
    """Kronecker-factored approximate curvature, ``dW = -lr (B + rho_B)^-e_b G (A + rho_A)^-e_a``.

    ``A = E[x x^T]`` averages over batch and positions; ``B = E[delta delta^T]`` averages over loss terms and
    sums over the positions that share one, with ``delta`` the gradient of one loss term (Ishikawa & Karakida,
    arXiv 2312.12226, eq. 2). Learning rates carry the width factors of the plan. Biases are blocks of their
    own, with the layer's B and ``A = 1``: folded into A, a hidden bias would learn like 1/width.

    Momentum accumulates preconditioned directions. Factors are moving averages, corrected for their start.
    The loss must be a mean over its terms (the default of PyTorch's losses) unless ``loss_reduction="sum"``.
    Under a ``GradScaler`` that steps this optimizer, B's scale is taken out; where gradients were unscaled
    before (to clip them), pass ``loss_scale=scaler.get_scale``.

    ``lr`` and ``damping`` are keys of the parameter groups, for schedules. Steps in which a gradient is NaN
    or infinite are skipped and counted in `stats`, and what was due at them is done at the next.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width.
        damping: Damping; by default relative to the trace of each factor, so it means the same at all widths.
        e_a: Power of A; 0 leaves the input side out (and does not collect it).
        e_b: Power of B; ``e_a=1, e_b=0`` is FOOF.
        momentum: Weight of past directions.
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        factor_decay: Weight of past factors in the moving averages.
        factor_every: Steps between collections of factors; steps in between run the cheap graph.
        root_every: Steps between recomputations of the inverses.
        root_drift: A root is recomputed out of turn once its factor's trace has changed by this ratio; in the
            first steps of training factors grow by orders of magnitude.
        stagger: Spread the roots over the steps of a period instead of computing all at once.
        damping_mode: ``trace``, ``eigen`` (relative to the largest eigenvalue), ``absolute`` or ``pi``
            (`mupass` docs: scale table).
        damping_floor: Smallest trace of B that trace damping reckons with, relative to the largest one; for
            queries and keys, whose gradients are small at first, and branches behind a gate of zero.
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
        fallback: ``adamw`` or ``sgd``, for parameters that K-FAC does not take (see `coverage`).
        fallback_lr: Learning rate of the fallback at the base width.
        loss_terms: Number of terms that the loss averages over, or a function of no arguments giving it. By
            default counted on the model's first output, its class axis left out: samples for a classifier,
            tokens for a language model. Needed where the model returns its loss, or where the loss skips
            many entries (``ignore_index``).
        loss_reduction: ``mean`` or ``sum``.
        loss_scale: What the loss is multiplied by before ``backward``, or a function giving it.
        strict: Raise when any parameter falls back.
        data_parallel: Whether ranks train on parts of one batch, so that factors are summed over them. By
            default yes where torch.distributed runs with several ranks.

    Raises:
        OptimizerError: An argument is out of range, a word is unknown, or ``strict`` finds a fallback.
        PlanError: The model was not transformed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float = 1e-3,
        *,
        e_a: float = 1.0,
        e_b: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        factor_every: int = 1,
        root_every: int = 1,
        root_drift: float = 2.0,
        stagger: bool = True,
        damping_mode: str = "trace",
        damping_floor: float = 0.1,
        kl_clip: float | None = None,
        fisher: str = "empirical",
        sharing: str = "expand",
        ekfac: bool = False,
        diagonal_above: int = 8192,
        block_size: int | None = None,
        norms: bool = True,
        exclude: Sequence[str] = (),
        fallback: str = "adamw",
        fallback_lr: float = 1e-3,
        loss_terms: int | Callable[[], int] | None = None,
        loss_reduction: str = "mean",
        loss_scale: float | Callable[[], float] | None = None,
        strict: bool = False,
        data_parallel: bool | None = None,
    ) -> None:
        check_number("e_a", e_a)
        check_number("e_b", e_b)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.factor_every = check_period("factor_every", factor_every)
        self.root_every = check_period("root_every", root_every)
        self.root_drift = check_number("root_drift", root_drift, 1.0)
        self.damping_mode = check_choice("damping_mode", damping_mode, MODES)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
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
        self._options = Options(
            sharing == "reduce",
            check_period("diagonal_above", diagonal_above),
            norms,
            tuple(exclude),
            0 if block_size is None else check_period("block_size", block_size),
        )
        super().__init__(
            model,
            OptimizerSpec("kfac", e_a=e_a, e_b=e_b),
            lr,
            damping,
            momentum=momentum,
            weight_decay=weight_decay,
            fallback=fallback,
            fallback_lr=fallback_lr,
            strict=strict,
        )
        loss = Loss(loss_terms, loss_reduction == "mean")
        self._curvature = Curvature(self.root, self._cover, (e_a > 0, e_b > 0), loss, self._ranks)
        self._kronecker = Kronecker(
            self._cover.blocks,
            self._cover.layers,
            self._parameters,
            (e_a, e_b),
            damping_mode,
            {e.geometry.name: e for e in self.plan.entries},
            stagger,
            check_number("damping_floor", damping_floor),
            ekfac,
            self._options.block,
            self._cover.together,
        )
        self._curvature.rescale(self._kronecker.moments.bases())
        self._all_seen = self._due = False
        self._prepare_next()

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        self._parameters = {n: p for p, n in self.names.items()}
        self._cover = cover(self.root, self.plan, self._options, frozenset(self._parameters))
        plain = {b.parameter: not_rescaled(b, self._cover.layers) for b in self._cover.blocks if self.ekfac}
        own = {
            b.parameter: f"kfac {b.kind}" if plain.get(b.parameter, "kfac") else f"ekfac {b.kind}"
            for b in self._cover.blocks
        }
        return own, {**self._cover.reasons, **plain}

    @property
    def _banks(self) -> dict[str, list[Bank]]:
        return self._kronecker.banks

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
        return float(self._kronecker.quadratic(moves))

    def _discard(self) -> None:
        self._curvature.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the factors that were collected with them.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        # What `observe` collected is not of these gradients; torch calls this before there is anything.
        if hasattr(self, "_curvature") and not self.sampled:
            self._discard()

    def _directions(self) -> dict[Tensor, Tensor]:
        kronecker = self._kronecker
        if self._due and self._cover.blocks:
            self._average()
        if kronecker.rooted or not self._due:
            spare = self.stagger and self.factor_every > 1 and self.root_every % self.factor_every == 0
            due = kronecker.due(self._steps, self.root_every, self.root_drift, spare)
            if due:
                kronecker.refresh(self._dampings(), self.count, self._ranks, due)
        grads = {n: whole(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        directions = kronecker.directions(grads)
        factor = self._clip(directions, grads)
        if factor is not None:
            directions = {n: d * factor.to(d.dtype) for n, d in directions.items()}
        parameters = self._parameters
        return {parameters[n]: sharded_like(d, parameters[n]) for n, d in directions.items()}

    def _average(self) -> None:
        """Add what the taps summed to the averages, and let go of it before roots need the memory."""
        taken = self._curvature.take(1.0 if self.sampled else self._scale_of_loss())
        if taken:
            self._kronecker.average(taken, self.factor_decay, self.count)
            self._due = False
            self._refuse_unseen()
        else:  # made up for at the next step
            what = "observe() was not called" if self.sampled else "no tapped layer took part"
            self.count("steps_without_factors", what)

    def _clip(self, directions: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor | None:
        """Return the factor that keeps the predictions from moving further than the bound."""
        if self.kl_clip is None or not directions:
            return None
        moves = []
        for group in self.param_groups:
            for name in (self.names[p] for p in group["params"]):
                if name in directions:
                    dot = (directions[name] * grads[name]).sum(dtype=factor_dtype(self._parameters[name]))
                    moves.append(dot * (group["lr"] ** 2 * group["mupass_scale"]))
        return (self.kl_clip / torch.stack(moves).sum().clamp(min=1e-30)).sqrt().clamp(max=1.0)

    def _refuse_unseen(self) -> None:
        """Refuse to leave a parameter at rest because its gradient came past its tap."""
        if self._all_seen:
            return
        unseen = self._kronecker.unseen()
        self._all_seen = not unseen
        taps = {b.parameter: {p for f in b.b for p in f.places} for b in self._cover.blocks}
        silent = set(self._curvature.without_gradient)
        for name in unseen:
            if taps[name] & silent:  # a bias has the tap of its weight, which is named already
                silent -= taps[name]
                self.count("zero_traces", NO_GRADIENT.format(name))
            grad = self._parameters[name].grad
            if grad is not None and bool(whole(grad).any()):
                raise OptimizerError(
                    f"{name} has a gradient, but its tap saw no operator that uses it: the code took another "
                    f"path than in the captured pass, or replaced the parameter. Pass exclude=['{name}'] to "
                    "leave it to the fallback"
                )

    def _scale_of_loss(self) -> float:
        """Return what the loss was multiplied by: told, or left here by a gradient scaler."""
        given = self.loss_scale
        if given is not None:
            return float(given() if callable(given) else given)
        if hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None:
            raise OptimizerError(
                "the gradient scaler unscaled the gradients before this step, so its scale, whose square "
                "is in the factors, cannot be told: pass loss_scale=scaler.get_scale"
            )
        return self._amp_scale

    def _layout(self) -> Any:
        return self._kronecker.layout()

    def _extra_state(self) -> dict[str, Any]:
        return {**self._kronecker.state_dict(), "due": self._due}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self._kronecker.load_state_dict(state)
        self._due = state["due"]
