"""K-FAC with width-aware learning rates and damping."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mupass._errors import OptimizerError, some
from mupass._keywords import Keywords, takes
from mupass._optim.base import PlannedOptimizer
from mupass._optim.checks import check_flag
from mupass._optim.clipping import GradientScale
from mupass._optim.kronecker.curvature import Curvature
from mupass._optim.kronecker.damping import RELATIVE
from mupass._optim.kronecker.ekfac import not_rescaled
from mupass._optim.kronecker.factor_stack import FactorStack
from mupass._optim.kronecker.preconditioner import Kronecker, Ranks
from mupass._optim.kronecker.settings import (
    Bounds,
    KFACOptions,
    Loss,
    Roots,
    Selection,
    Statistics,
    told_number,
)
from mupass._optim.kronecker.signal import SignalShare, Slopes
from mupass._optim.kronecker.slope import OutputSlope
from mupass._optim.kronecker.update import Compiled
from mupass._optim.training import Training
from mupass._optim.vocabulary import State, Tensors
from mupass._parallel import rank_of, sum_of
from mupass._scales.plan import OptimizerSpec, plan_of
from mupass._taps.blocks import Options, Place
from mupass._taps.cover import cover
from mupass._taps.factors import factor_dtype
from mupass._taps.intercept import pass_on
from mupass._taps.leaves import Tap
from mupass._taps.sharded import ranks_of_a_batch
from mupass._taps.terms import TermsTap, terms_tap_of

# Chosen by `benchmarks/defaults.py`.
LR = 0.1
DAMPING = 1e-3
MOMENTUM = 0.8
NUMBERS_KEPT = 8  # sets of step sizes on the device: a schedule makes new ones in every step

IDLE_TERMS = (
    "more than a quarter of the rows of the model's output have a gradient of exactly zero, and count as "
    "terms of a mean loss. Where the loss leaves them out (ignore_index, a mask, all but one position), B is "
    "too large: pass loss_terms=, a function that returns the number of terms that it averages over, or that "
    "number"
)
SUMMED = (
    "the gradient at the model's output is that of a cross-entropy which is summed, or multiplied, and not "
    "averaged over the terms that the output has: B is too large, and steps are too short where kl_clip does "
    "not set their length. With reduction='sum' pass loss_reduction='sum'; where passes are accumulated, "
    "divide each loss by their number; where the loss divides by another "
    "number, as by samples instead of tokens, pass it as loss_terms=; where it is multiplied, pass that as "
    "loss_scale="
)
FAR = (
    "the gradient at the model's output is that of a mean squared error whose targets are 8 or more away "
    "from the outputs, as a root mean square. K-FAC's bounds on a step are in units of outputs, and get "
    "there late or never. Pass target_scale=, the deviation of the targets summed over outputs, "
    "float(targets.var(0).sum().sqrt()), or divide the targets by it. target_scale=1 leaves the bounds as "
    "they are: for another loss, and for errors that are summed over outputs, of targets that are near. "
    "Where they are summed over samples, pass loss_reduction='sum'"
)
NO_LAYER = (
    "no backward pass ran through a tapped layer since the last step. Directions follow the factors of "
    "before. Gradients that are written into .grad bring no factors: call backward() on a loss of this "
    "model, or take an optimizer that needs gradients alone, as mupass.SOAP(model). In a compiled model "
    "backward(inputs=...) leaves factors out: call backward() there, with what is not to be trained frozen"
)
ELSEWHERE = (
    "the loss is a cross-entropy over another axis of the model's output than the one that is taken for "
    "classes (axis 1 of four or more, else the last one; a vector has none), so that its terms are "
    "miscounted, and B is off by as much: pass loss_terms=, the number of terms that it averages over (1 for "
    "one sample)"
)
FLAT = (
    "the model puts out a vector with more entries than its readouts have rows, as logits that were made "
    "flat, and each entry counts as a term of the loss: B is too large where several of them belong to one "
    "sample. Put out [batch, classes], and flatten in the loss; or pass loss_terms=, the number of samples "
    "(of entries, if each is a sample of its own)"
)
# What speaks against how the loss is taken, see `Curvature.doubtful`.
DOUBTS = {
    "idle_loss_terms": IDLE_TERMS,
    "summed_loss": SUMMED,
    "far_targets": FAR,
    "classes_elsewhere": ELSEWHERE,
    "flat_output": FLAT,
}
REPEATED = (
    "several backward passes ran through one forward pass (retain_graph=True). Their gradients add up, and "
    "statistics take them for those of separate samples: add the losses up, and run backward once"
)
OLDER_GRADIENTS = (
    "{} had gradients already when the first pass began whose statistics K-FAC collects (of a pass before "
    "the optimizer was made, of the last step, or written into .grad). The step takes their sum, and "
    "statistics are those of the new passes alone: call zero_grad() before"
)
PAST_ITS_TAP = (
    "{0} has a gradient in a step in which its tap saw no operator that uses it (its module or the code was "
    "replaced, or another term of the loss reads it alone), and its factors are of earlier steps: make the "
    "optimizer anew, or leave it to the fallback with exclude=['{0}']"
)
IN_DERIVATIVES = (
    "the loss depends on a gradient that was taken with create_graph=True (forces, a gradient penalty). The "
    "backward pass that makes it reads the weights again, of which K-FAC has no statistics: where that part "
    "of the loss is the larger one, factors are too small and steps are held by step_bound alone. Take "
    "mupass.SOAP(model) there, or leave weights to the fallback with exclude="
)


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
            None is 1e-3, and on sides that grow with width ``1e-3 (256 / rows)^2``, up to 1.6e-2, in layers
            that see fewer than 256 rows in a step (samples, or their positions), tables apart. Directions
            are then longer, by ``(256 / rows)^(1/4)`` for each such side. A number is taken as it is,
            as those of ``overrides`` are. In the absolute modes None is 1e-3.
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
            which damping of B is relative: without it, steps grow as the loss goes to zero. It does not fade
            below 1e-4 of the largest one ever. 0 forgets it at once.
        step_bound: Bound on the root mean square of the change that a step makes to a layer's outputs by its
            weight, or by its bias, as A tells it; longer directions are shortened. It means the same at all
            widths. Parameters without a factor A (``e_a=0``) have none. None turns it off.
        kl_clip: Bound on ``sum over parameters of lr^2 scale <direction, gradient>``, about twice the KL
            divergence between the predictions before and after the step; directions are shortened to meet
            it. It is told for a squared gradient of 0.5 by the model's output (of one loss term, all entries
            together), and goes with that: predictions change by as much whatever multiplies the loss. Where
            it is below a quarter of its largest (of 0.5 at most) the bound falls with it once more (`mupass`
            docs: scale table). It is the bound itself where the model returns its loss, puts out a size
            that grows, or is a stage of a pipeline, and with ``fisher="sampled"``.
            Every term is Theta(1) in width under ``mup``, so a bound means the same at all widths. 1e-3
            is a usual value; None turns it off. Where it sets the length of steps, the rate has no part in
            it, and a schedule that lowers the rate none at first.
        variance_adaptation: Whether steps are as long as the signal in the average of gradients, in the
            metric of the factors: the slopes along a direction by the average and by its last gradient alone
            tell what is signal and what the noise of batches. Directions are multiplied by the root of the
            signal's share, one number for all parameters, between 0.1 and 1 (as Balles & Hennig, arXiv
            1705.07774, shorten Adam's, one for each). Steps become shorter by themselves where batches are
            noise, or long steps overshoot. Without effect where momentum is 0 or that of directions.
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
        loss_terms: Number of terms that the loss of a step averages over, or a function of no arguments
            giving it: those of this rank, accumulated passes together. By default counted on the model's
            first output, its class axis left out: samples for a classifier, tokens for a language model.
            Needed where the model returns its loss, or where the loss skips many entries (``ignore_index``).
        loss_reduction: ``mean`` or ``sum``.
        loss_scale: What the loss is multiplied by before ``backward``, or a function giving it.
        target_scale: Size of the targets of a squared error, the root of the sum of their variances over a
            sample's outputs. `step_bound` of readouts and `kl_clip` are in these units, and B is that of
            targets divided by it. By default 1, and a warning where the first losses show that it is far
            from that.
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

    Example:
        >>> import mupass, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> net = mupass.transform(net, torch.randn(4, 8))
        >>> optimizer = mupass.KFAC(net, lr=0.1, damping=1e-3)
        >>> net(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> print(optimizer.coverage()[0])
        Covered(parameter='0.weight', treatment='kfac linear', reason='')
    """

    state_format = 8
    _due = True

    @takes(KFACOptions, Roots, Statistics, Bounds, Selection, Loss, Training)
    def __init__(
        self,
        model: nn.Module,
        lr: float = LR,
        damping: float | None = None,
        *,
        momentum: float = MOMENTUM,
        compile: bool | None = None,
        data_parallel: bool | None = None,
        **options: Unpack[KFACOptions],
    ) -> None:
        keywords = Keywords(KFAC, options, OptimizerError)
        statistics, bounds = keywords.record(Statistics), keywords.record(Bounds)
        selection, training = keywords.record(Selection), keywords.record(Training, momentum=momentum)
        roots = self._roots = keywords.record(Roots)
        loss = self._loss = keywords.record(Loss)
        self._options = Options(
            reduce=statistics.sharing == "reduce",
            diagonal_above=selection.diagonal_above,
            norms=selection.norms,
            exclude=tuple(selection.exclude),
            block=roots.block_size or 0,
        )
        # Those below may be changed while the model is trained; the records are for what is made once.
        self.factor_decay, self.factor_every = float(statistics.factor_decay), statistics.factor_every
        self.sampled = statistics.fisher == "sampled"
        self.root_every = self.report_every = roots.root_every
        self.stagger, self.ekfac = roots.stagger, roots.ekfac
        self.damping_mode, self.damping_memory = roots.damping_mode, float(roots.damping_memory)
        self.step_bound, self.kl_clip = bounds.step_bound, bounds.kl_clip
        self._adapts = bounds.variance_adaptation
        self._weights: Tensors | None = None  # of averages that are kept elsewhere
        self.loss_scale = loss.loss_scale
        self._ranks = self._sharing(model, data_parallel)
        if roots.e_b and None in (loss.loss_terms, loss.loss_scale) and plan_of(model)[1].stage:
            raise OptimizerError(
                "a stage of a pipeline may see no loss: pass loss_terms=, the number of terms that it "
                "averages over (samples for a classifier, tokens for a language model), and loss_scale=, the "
                "number of micro-batches if the schedule divides gradients by it (torch's do), or else 1"
            )
        self._compiled = Compiled(compile if compile is None else check_flag("compile", compile))
        # Whether the default applies, which looks at the number of rows.
        self._by_rows = damping is None and self.damping_mode in RELATIVE
        damping = DAMPING if damping is None else damping
        spec = OptimizerSpec("kfac", e_a=roots.e_a, e_b=roots.e_b)
        super().__init__(model, spec, lr, damping, training)
        self._numbers_there: dict[Any, Tensor] = {}
        self._prepare_next()

    def _assign(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        self._parameters = {
            name: parameter for parameter, name in self.names.items() if name not in self._unfit
        }
        self._cover = cover(self.root, self.plan, self._options, frozenset(self._parameters))
        self._of_readouts = self._readouts()
        # A side with the power 0 is not collected.
        sides = (self.spec.e_a > 0, self.spec.e_b > 0)
        self._curvature = Curvature(self.root, self._cover, sides, self._loss, self._ranks, self._of_readouts)
        self._kronecker = self._factors(FactorStack)
        self._signal = SignalShare(self._of_blocks())
        self._slope = self._output_slope()
        self._curvature.rescale(self._kronecker.moments.bases())
        self._watch_clipping()
        self._all_seen = False
        # Parameters that took no part in the last collection, and those that had a gradient since.
        self._missed: set[str] = set()
        self._owed: set[str] = set()
        treatments, reasons = {}, dict(self._cover.reasons)
        for block in self._cover.blocks:
            method = "kfac"
            # EKFAC takes weights with two full factors; other blocks stay K-FAC's, and the table says why.
            if self.ekfac:
                reasons[block.parameter] = not_rescaled(block, self._cover.layers)
                if not reasons[block.parameter]:
                    method = "ekfac"
            treatments[block.parameter] = f"{method} {block.kind}"
        return treatments, reasons

    def _readouts(self) -> set[str]:
        """Return the weights of readouts, and what has no growing axis in the same modules: their biases."""
        role_of = {entry.geometry.name: entry.geometry.role for entry in self.plan.entries}
        modules = {name.rpartition(".")[0] for name, role in role_of.items() if role == "output"}
        return {
            name
            for name, role in role_of.items()
            if role == "output" or (role == "scalar" and name.rpartition(".")[0] in modules)
        }

    def _factors(self, bank: type[FactorStack]) -> Kronecker:
        entries = {entry.geometry.name: entry for entry in self.plan.entries}
        # Ranks of tensor parallelism see the same batch, so that their rows are counted once.
        same_batch = ranks_of_a_batch(self.root) if self._ranks > 1 else 1
        ranks = Ranks(self._ranks, rank_of(self._ranks), same_batch)
        by_rows: set[str] = set()
        # The default damping is a rule for sides of few rows; a number of the caller's is taken as it is.
        if self._by_rows:
            settings = {"damping": DAMPING}
            by_rows = {name for name in self._parameters if not self._overridden(name, settings)}
        return Kronecker(
            self._cover, self._parameters, self._roots, entries, ranks, bank, self._compiled, by_rows
        )

    def _output_slope(self, in_place: bool = True) -> OutputSlope:
        """Return what `kl_clip` is measured by."""
        precision = torch.float32
        for parameter in self._of_blocks().values():
            precision = torch.promote_types(precision, factor_dtype(parameter))
        return OutputSlope(precision, self._device, self.spec.e_b, in_place)

    @property
    def _bound_stands(self) -> bool:
        """Whether `kl_clip` is the bound itself, whatever the gradients at the output.

        Targets that are drawn from the model tell the Fisher itself. A stage of a pipeline may see gradients
        of activations instead of outputs, and those of outputs that grow fall with the width.
        """
        return self.sampled or self.plan.stage or self.plan.open_output

    def _watch_clipping(self) -> None:
        self._clipping = GradientScale([self._parameters[block.parameter] for block in self._cover.blocks])
        self._curvature.passes.accumulated = weakref.WeakMethod(self._clipping.saw_all)

    @property
    def taps(self) -> list[Tap | TermsTap]:
        """What collects factors, and the number of loss terms."""
        return [*self._curvature.taps.values(), self._curvature.terms]

    def functional(self, bank: type[FactorStack]) -> Functional:
        """Return the computation of directions as a function of a state; this optimizer is used up by it.

        Args:
            bank: Kind of bank, one that writes to no tensor of its state.
        """
        self._compiled = Compiled(False)
        self._kronecker = self._factors(bank)
        self._signal = SignalShare(self._of_blocks(), in_place=False)
        self._slope = self._output_slope(in_place=False)
        return Functional(self)

    def _of_blocks(self) -> Tensors:
        """Return the parameters that K-FAC takes, those of other ranks too."""
        return {block.parameter: self._parameters[block.parameter] for block in self._cover.blocks}

    def _own_state(self, name: str) -> State:
        entries = self._kronecker.entries(name)
        if self._adapts:
            entries |= self._signal.entries(name)
        # One for the whole model, the same on all ranks: kept at the first parameter.
        if name == self._cover.blocks[0].parameter:
            entries["slope"] = self._slope.numbers
        return entries

    @property
    def _owner(self) -> Mapping[str, int]:
        if self._ranks == 1 or self.ekfac:
            return {}
        return self._kronecker.owner

    def _replaced(self, name: str, new: Tensor) -> None:
        if name in self._parameters:
            # The tap inside the parameter goes over to its new tensor.
            pass_on(self.root, name, self._parameters[name])
            self._curvature.passes.replace(self._parameters[name], new)
            self._parameters[name] = new
            self._watch_clipping()

    def _prepare_next(self) -> None:
        """Collect factors in the passes before a step that uses them."""
        # Stays due after a step that had no factors, until one has; and where a layer takes part in other
        # steps than those that collect, as one of two tasks in turn, until it has been seen.
        self._due |= self._steps % self.factor_every == 0 or bool(self._owed)
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
        own_part = self._kronecker.quadratic(moves).reshape(()).to(self._device)
        return float(sum_of([own_part], self._sharing_ranks))

    @property
    def _sharing_ranks(self) -> int:
        """Number of ranks that each have blocks of their own."""
        return self._ranks if self._owner else 1

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

    def _directions(self, gradients: Tensors, means: Tensors, ok: Tensor) -> Tensors:
        # Average, invert what is due, precondition, bound.
        kronecker = self._kronecker
        # The training loop may have clipped gradients, which the factors have not seen.
        clipped = self._clipped()
        if self._due and self._cover.blocks:
            self._average(gradients, ok, clipped)
        else:
            self._owed |= self._moving(self._missed - self._owed, gradients)
        if kronecker.rooted or not self._due:
            # Factors are collected at the first step of a period: roots, as much work, wait for the next.
            keep_free = self.stagger and self.factor_every > 1 and self.root_every % self.factor_every == 0
            due_slots = kronecker.due(self._steps, self.root_every, keep_free)
            if due_slots:
                kronecker.refresh(self._dampings(), due_slots)
                # Adapters start at zero, and what is below them has no gradient in the first step.
                if self.plan.trained and self._steps == 0:
                    kronecker.excuse_vanished()
        directions, changes = kronecker.directions(means)
        if self._missed:
            # With absolute damping alone, a factor that nothing was seen of would make the step.
            unseen = kronecker.unseen()
            still = {name: torch.zeros_like(directions[name]) for name in unseen if name in directions}
            directions = {**directions, **still}
        if not directions and self._sharing_ranks == 1:
            return directions
        move = Move(directions, changes, gradients, means, self._step_sizes(), clipped)
        signal = self._signal_of(move, ok)
        factors = self._bounds(move, signal)
        if signal is not None:
            _shorten(factors, directions, signal)
        return _multiplied(directions, factors)

    def _average(self, gradients: Tensors, ok: Tensor, clipped: Tensor | None) -> None:
        """Add what the taps summed to the averages, and let go of it before roots need the memory."""
        scale: Tensor | float = 1.0  # `observe` was given the loss itself
        if not self.sampled:
            scale = self._scale_of_loss()
        observed = self._curvature.take(scale, clipped)
        self._tell_passes(observed)
        if not observed:  # made up for at the next step
            self._refuse_lost_taps()
            moved = any(bool(gradient.any()) for gradient in gradients.values())
            if moved and not self.sampled and not self._kronecker.seen:
                self._refuse_without_factors()
            self.count("steps_without_factors", "observe() was not called" if self.sampled else NO_LAYER)
            return
        # The memory of the largest trace fades once for each collection, not for each step.
        memory = self.damping_memory**self.factor_every
        self._kronecker.average(observed, self.factor_decay, memory, ok)
        if not self._bound_stands:
            self._slope.note(self._curvature.slope, self.factor_decay, ok > 0)
        self._due = False
        self._missed = {
            block.parameter
            for block in self._cover.blocks
            if all(observed.keys().isdisjoint(factor.places) for factor in block.factors)
        }
        self._owed &= self._missed
        self._refuse_unseen(gradients)
        for name in sorted(self._moving(self._missed, gradients)):
            self.count("gradients_without_statistics", PAST_ITS_TAP.format(name))

    def _refuse_lost_taps(self) -> None:
        """Refuse to go on where `mupass.fold` has taken the taps off the model."""
        if terms_tap_of(self.root) is not self._curvature.terms:
            raise OptimizerError(
                "the model has lost its taps since the optimizer was made, as by mupass.fold, so that K-FAC "
                "sees no layer: make the optimizer anew"
            )

    def _clipped(self) -> Tensor | None:
        """Return the factor that the training loop multiplied this step's gradients by, as clipping does.

        A sum over terms may be divided by their number there, which is no change of the loss.
        """
        factor = self._clipping.take(self._ranks)
        if factor is None or not self._loss.mean:
            return None
        # Gradients were unscaled, too, since the backward pass.
        scale = self._scale_of_loss()
        if isinstance(scale, Tensor):
            scale = scale.to(factor)
        return factor * scale

    def _bounds(self, move: Move, signal: Tensor | None) -> dict[str, Tensor]:
        """Return what directions are to be multiplied by where the step would leave its bounds.

        Where directions add up, each of them is held to the part of the bound that their sum then keeps.
        """
        factors: dict[str, Tensor] = {}
        if self.step_bound is not None:
            factors = self._within_step_bound(self.step_bound, move, signal)
        if self.kl_clip is not None:
            total = self._divergence(move, factors)
            # The divergence is quadratic in the step: the root of the ratio shortens it to the bound.
            bound = self.kl_clip * self._loss.unit**2 * self._slope.factor().to(total)
            shrink = (bound / total.clamp(min=1e-30)).sqrt().clamp(max=1.0)
            _shorten(factors, move.directions, shrink)
        return factors

    def _signal_of(self, move: Move, ok: Tensor) -> Tensor | None:
        """Return the length of the signal in the averages of gradients, in that of the averages; or None.

        It needs averages of several gradients, each with noise of its own.
        """
        if not self._adapts or self.momentum_of == "directions":
            return None
        names = [name for name in move.directions if move.sizes[name].momentum]
        # All ranks take part in the sum, those without parameters too.
        if not names and self._sharing_ranks == 1:
            return None
        like = self._signal.state
        slopes: list[list[Tensor]] = [[], [], []]
        weights, momenta = [], []
        for name in names:
            size, direction = move.sizes[name], move.directions[name].reshape(-1)
            fresh = (1 - size.momentum) / self._weight_of_average(name).clamp(min=1e-30)
            found = move.gradients[name].to(direction).reshape(-1)
            numbers = (torch.dot(direction, move.means[name].reshape(-1)), torch.dot(direction, found), fresh)
            for of_kind, number in zip(slopes, numbers, strict=True):
                of_kind.append(number.to(like))
            weights.append(size.lr**2 * size.scale)
            momenta.append(size.momentum)
        if names:
            momentum = self._on_device(momenta, like.dtype, like.device)
            along_mean, along_last, fresh = map(torch.stack, slopes)
            self._signal.note(names, Slopes(along_mean, along_last, fresh, momentum), ok > 0)
        weight = self._on_device(weights, like.dtype, like.device)
        return self._signal.factor(names, weight, self._sharing_ranks)

    def _weight_of_average(self, name: str) -> Tensor:
        """Return the total weight of what the average of a gradient has seen."""
        if self._weights is not None:
            return self._weights[name]
        return self._local_state(self._parameters[name])["momentum_weight"]

    def _within_step_bound(self, bound: float, move: Move, signal: Tensor | None) -> dict[str, Tensor]:
        """Return what directions are to be multiplied by so that no output changes by more than a bound.

        They are multiplied by the signal besides, which counts here.
        """
        factors: dict[str, Tensor] = {}
        for (dtype, device), names in _alike(move.changes).items():
            rates, limits = [], []
            for name in names:
                size = move.sizes[name]
                # Changes of outputs are squares here, and so are rates and limits.
                rates.append((size.lr * size.scale) ** 2)
                unit = self._loss.unit if name in self._of_readouts else 1.0
                # What fold put into a parameter is in its change, too.
                limits.append((bound * size.rest * unit * self.plan[name].geometry.folded) ** 2)
            change = torch.stack([move.changes[name] for name in names])
            if signal is not None:
                change = change * signal.to(change).square()
            rate, limit = (self._on_device(numbers, dtype, device) for numbers in (rates, limits))
            # Squares, for the derivative where nothing changes.
            factor = (limit / (change * rate).clamp(min=1e-30)).clamp(max=1.0).sqrt()
            factors.update(zip(names, factor.unbind(), strict=True))
        return factors

    def _divergence(self, move: Move, factors: Tensors) -> Tensor:
        """Return what `kl_clip` bounds, of directions that are each multiplied by a factor."""
        # sum of lr^2 scale <direction, gradient> over parameters
        sums = []
        for (dtype, device), names in _alike(move.directions).items():
            weights, products = [], []
            for name in names:
                size = move.sizes[name]
                weights.append(size.lr**2 * size.scale / size.rest**2)
                products.append(torch.dot(move.directions[name].reshape(-1), move.means[name].reshape(-1)))
            product = torch.stack(products)
            if factors:
                lengths = [
                    factors[name].to(product) if name in factors else product.new_ones(()) for name in names
                ]
                product = product * torch.stack(lengths)
            sums.append((product * self._on_device(weights, dtype, device)).sum())
        total = sum_of(sums or [torch.zeros((), device=self._device)], self._sharing_ranks)
        if move.clipped is not None:
            # Predictions change as they do without clipping, whose factor is in the gradients.
            total = total / move.clipped.to(total)
        return total

    def _on_device(self, numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return numbers as a tensor, copied to the device when they have changed."""
        if any(isinstance(number, Tensor) for number in numbers):
            # Hypergradients differentiate by them.
            return torch.stack([torch.as_tensor(number).to(device, dtype) for number in numbers])
        key = (tuple(numbers), dtype, device)
        if key not in self._numbers_there:
            # A schedule makes new numbers in every step: old ones are dropped.
            if len(self._numbers_there) > NUMBERS_KEPT:
                self._numbers_there.clear()
            self._numbers_there[key] = torch.tensor(numbers, dtype=dtype, device=device)
        return self._numbers_there[key]

    def _step_sizes(self) -> dict[str, StepSize]:
        """Return what the direction of every own parameter is multiplied by."""
        size_of = {}
        for group in self._own_groups():
            rest = 1.0
            if self.momentum_of == "directions":
                rest = 1 - group["momentum"]
            size = StepSize(group["lr"], group["mupass_scale"], rest, group["momentum"])
            size_of.update(dict.fromkeys((self.names[parameter] for parameter in group["params"]), size))
        return size_of

    def _incidents(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        incidents, counts = self._kronecker.incidents()
        found = self._curvature.doubtful
        for kind, text in DOUBTS.items():
            if kind in found and not (kind == "far_targets" and self.plan.open_output):
                incidents.append((kind, text))
                counts.append(found[kind].reshape(1))
        found.clear()
        return incidents, counts

    def _tell_passes(self, observed: Collection[Place]) -> None:
        """Count, and warn once, of backward passes whose statistics are not those of the loss."""
        passes = self._curvature.passes
        stale = passes.take_stale(observed)
        if stale:
            self.count("older_gradients", OLDER_GRADIENTS.format(some(stale)))
        for kind, text, names in (
            ("derivatives_in_the_loss", IN_DERIVATIVES, passes.derived),
            ("repeated_passes", REPEATED, passes.twice),
        ):
            if names:
                self.count(kind, text)
                names.clear()

    @staticmethod
    def _moving(names: Iterable[str], gradients: Tensors) -> set[str]:
        """Return the parameters among some that have a gradient in this step other than zeros."""
        present = [name for name in names if name in gradients]
        if not present:
            return set()
        # One message from the device for all.
        moving = torch.stack([gradients[name].any().cpu() for name in present]).tolist()
        return {name for name, moves in zip(present, moving, strict=True) if moves}

    def _refuse_unseen(self, gradients: Tensors) -> None:
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
                    "leave it to the fallback. A weight that only a derivative of the model reads "
                    "(forces, as the gradient of an energy) has no statistics either"
                )

    def _refuse_without_factors(self) -> None:
        """Refuse a first step that would leave all weights at rest, though they have gradients."""
        missed = self._curvature.passes.missed
        if missed:
            raise OptimizerError(
                f"every weight that has a gradient is used {missed}, of which K-FAC takes no statistics, so "
                "that no step can be taken. Take another optimizer, as mupass.SOAP(model), or leave all to "
                "the fallback with exclude=['*']. Derivatives may be taken by torch.autograd.grad(..., "
                "create_graph=True)"
            )
        raise OptimizerError(
            "weights have gradients, but no backward pass ran through this model's layers: they were "
            "written into .grad, as those of torch.autograd.grad, of a copy of the model or of another "
            "package. K-FAC takes its statistics from backward(). Call backward() on a loss of this model, "
            "or take an optimizer that needs gradients alone, as mupass.SOAP(model)"
        )

    def _scale_of_loss(self) -> Tensor | float:
        """Return what the loss was multiplied by: told, or left here by a gradient scaler."""
        if callable(self.loss_scale):
            scale = told_number("loss_scale", self.loss_scale())
            if not scale:
                raise OptimizerError("the function loss_scale returned 0: the loss is multiplied by nothing")
            return scale
        if self.loss_scale is not None:
            return float(self.loss_scale)
        if hasattr(self, "found_inf") and getattr(self, "grad_scale", None) is None:
            raise OptimizerError(
                "the gradient scaler unscaled the gradients before this step, so its scale, which is in the "
                "factors, or in what clipping did, cannot be told: pass loss_scale=scaler.get_scale"
            )
        return self._amp_scale

    def _make_up(self) -> None:
        self._due = True

    def _waiting(self) -> dict[str, bool]:
        # Factors that were due in a step that did not count are made up for.
        return {**super()._waiting(), "mupass_due": self._due}

    def _minds_computed(self, module: nn.Module, key: str) -> bool:
        return True

    def _loaded(self) -> None:
        self._due = self.param_groups[0]["mupass_due"]
        self._missed, self._owed = set(), set()
        self._kronecker.loaded(self._steps)


class Functional:
    """K-FAC's directions as a function of a state, see `KFAC.functional`.

    Attributes:
        start: State before the first step.
    """

    def __init__(self, optimizer: KFAC) -> None:
        self._optimizer = optimizer
        self.start = self._state()

    def directions(
        self,
        step: int,
        state: Mapping[str, State],
        gradients: Tensors,
        means: Tensors,
        weights: Tensors,
    ) -> tuple[Tensors, dict[str, State]]:
        """Return the directions of one step, and the state after it.

        What the taps have collected is taken; other numbers are read from the optimizer's groups.

        Args:
            step: Number of steps taken before.
            state: State after them.
            gradients: Gradient of each parameter that has one.
            means: Their moving averages.
            weights: Total weights of what these have seen.
        """
        optimizer, kronecker = self._optimizer, self._optimizer._kronecker
        kronecker.take_state(state, step)
        optimizer._signal.state, optimizer._weights = state["signal"]["numbers"], weights
        optimizer._slope.numbers = state["slope"]["numbers"]
        optimizer._steps, optimizer._amp_scale = step, 1.0
        optimizer._due = bool(optimizer._cover.blocks) and step % optimizer.factor_every == 0
        own_parameters = optimizer._parameters
        gradients = {name: gradient for name, gradient in gradients.items() if name in own_parameters}
        means = {name: mean for name, mean in means.items() if name in own_parameters}
        counts = torch.ones((), device=optimizer._device)
        return optimizer._directions(gradients, means, counts), self._state()

    def _state(self) -> dict[str, State]:
        optimizer = self._optimizer
        signal, slope = {"numbers": optimizer._signal.state}, {"numbers": optimizer._slope.numbers}
        return {**optimizer._kronecker.state(), "signal": signal, "slope": slope}


class StepSize(NamedTuple):
    """What a direction is multiplied by in a step.

    Attributes:
        lr: Learning rate at the base width.
        scale: Width factor on it.
        rest: Part of a bound that one direction may take up, where directions add up to their sum.
        momentum: Weight of the past in the average of gradients.
    """

    lr: float
    scale: float
    rest: float
    momentum: float


class Move(NamedTuple):
    """A step before it is bounded, with what bounds look at; by parameter.

    Attributes:
        directions: Preconditioned averages of gradients.
        changes: Mean square of the change that a direction makes to an output; not of every parameter.
        gradients: Gradients of this step.
        means: Averages of gradients, which the directions are made of.
        sizes: What directions are multiplied by.
        clipped: What the training loop multiplied all gradients by; None where it left them alone.
    """

    directions: Tensors
    changes: Tensors
    gradients: Tensors
    means: Tensors
    sizes: Mapping[str, StepSize]
    clipped: Tensor | None


def _shorten(factors: dict[str, Tensor], names: Iterable[str], by: Tensor) -> None:
    """Multiply the factors of all names by a number; those that have none yet get it."""
    for name in names:
        factors[name] = factors[name] * by.to(factors[name]) if name in factors else by


def _multiplied(directions: Tensors, factors: Tensors) -> Tensors:
    """Return directions, those that have a factor multiplied by it."""
    names = [name for name in directions if name in factors]
    if not names:
        return dict(directions)
    lengths = [factors[name].to(directions[name]) for name in names]
    shortened = torch._foreach_mul([directions[name] for name in names], lengths)
    return {**directions, **dict(zip(names, shortened, strict=True))}


def _alike(tensors: Tensors) -> dict[tuple[torch.dtype, torch.device], list[str]]:
    """Return the names of tensors by their precision and device."""
    names_of: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault((tensor.dtype, tensor.device), []).append(name)
    return names_of
