"""Muon with width-aware learning rates."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mupass._errors import OptimizerError
from mupass._keywords import Keywords, takes
from mupass._optim.checks import check_choice, check_flag, check_number, check_period
from mupass._optim.linalg.polar import Quintic, orthogonalize, product_dtype, quintics
from mupass._optim.linalg.spectral import with_norm_of
from mupass._optim.matrix.base import Layout, MatrixOptimizer, wide
from mupass._optim.matrix.block_stack import Stack
from mupass._optim.training import Training, TrainingOptions
from mupass._optim.vocabulary import State
from mupass._scales.plan import OptimizerSpec

EPSILON = 1e-7  # at the base width; of the norm that a matrix is divided by
ADAPTIVE_EPSILON = 1e-8
LR = 0.04  # chosen by `benchmarks/defaults.py`
ADJUST = ("spectral", "original", "match_rms_adamw")
ADAM_RMS = 0.2  # root mean square of AdamW's usual updates (Liu et al., arXiv 2502.16982)


class MuonOptions(TrainingOptions, total=False):
    """Keywords of `Muon` that records hold, for type checkers and editors."""

    adaptive: bool
    normuon: bool
    beta2: float
    adjust: str | None


@dataclass(frozen=True)
class Entries:
    """What is done to the entries of an orthogonal matrix.

    Attributes:
        adaptive: AdaMuon: each is divided by its own average size.
        normuon: NorMuon: each row is.
        beta2: Weight of the past in these averages of squares.
        adjust: One of `ADJUST`: how long steps of a shape are; None for the usual.
    """

    adaptive: bool = False
    normuon: bool = False
    beta2: float = 0.95
    adjust: str | None = None

    def __post_init__(self) -> None:
        check_flag("adaptive", self.adaptive)
        check_flag("normuon", self.normuon)
        check_number("beta2", self.beta2, 0, 1)
        if self.adaptive and (self.normuon or self.adjust not in (None, "spectral")):
            raise OptimizerError(
                "adaptive=True is AdaMuon, which brings every entry to 1 and has Adam's rates already: leave "
                "out normuon and adjust, or adaptive"
            )
        check_choice("adjust", self.adjusted, ADJUST)

    @property
    def adjusted(self) -> str:
        """One of `ADJUST`."""
        if self.adjust is not None:
            return self.adjust
        return "spectral" if self.adaptive else "original"


class Muon(MatrixOptimizer):
    """Muon, ``dW = -lr U V^T`` of the momentum ``U S V^T``, for hidden matrices.

    Momentum is a moving average, with Nesterov's look-ahead. Its singular values are brought to 1 by
    polynomials in the matrix; each is the best of its kind for what the ones before leave (Amsel et al.,
    arXiv 2505.16932). Matrices are ``[fan_out, fan_in]`` by the plan's axes, whatever the layout: kernels
    are flattened into fan_in, fused parameters (qkv) are split into their matrices. Embeddings, readouts
    and vectors go to the fallback, by their role in the plan.

    The learning rate carries ``sqrt(m_out / m_in)`` and epsilon its inverse (Qiu et al., arXiv 2512.05620).
    With ``adaptive=True`` the orthogonal matrix is divided by the root of the moving average of its
    squared entries (AdaMuon), whose rates are Adam's, ``1 / m_in``.

    With ``normuon=True`` every row of it, a neuron, is divided by the root of the moving average of its mean
    square, and the whole keeps its norm (NorMuon, arXiv 2510.05491). The norm is Muon's, and so is the row of
    the scale table. Steps of tall matrices are ``sqrt(rows / columns)`` times as long, with the rows and
    columns of the base width (``adjust="original"``, as in `torch.optim.Muon`). With
    ``adjust="match_rms_adamw"`` all are ``0.2 sqrt(max(rows, columns))`` times as long: at the base width
    they have the root mean square of AdamW's, whose rate serves. At other widths both follow Muon's row, as
    the spectral norm has to.

    Args:
        model: A transformed model, compiled or wrapped or not.
        lr: Learning rate at the base width: the spectral norm of one step, without momentum and decay, before
            it is adjusted; with ``adjust="match_rms_adamw"`` that of AdamW.
        momentum: Weight of the past in the moving average.
        nesterov: Whether the present gradient is mixed in once more.
        steps: Number of polynomials. Singular values above 0.003 of the Schatten 4-norm come to within 20 %
            of 1 with 4, and 0.5 % with 5.
        adaptive: AdaMuon.
        normuon: NorMuon.
        beta2: Weight of the past in AdaMuon's and NorMuon's squares.
        adjust: ``original`` or ``match_rms_adamw``, as in `torch.optim.Muon`, or ``spectral`` for steps of
            spectral norm ``lr`` whatever the shape. None is ``original``, and with ``adaptive=True`` nothing.
        roles: Roles that Muon takes; ``input`` and ``output`` have their rows too.
        product_dtype: Precision of the matrix products; by default that of the factors, or bfloat16 for
            float32 factors on CUDA, and for larger ones on CPUs with instructions for it (AVX512-BF16, AMX).
        weight_decay: Decoupled decay; a step multiplies weights by ``1 - lr * weight_decay`` at any width.
        decay: ``all``, or ``matrices``: no decay of vectors (biases, gains), numbers and embedding tables.
        overrides: Other settings by pattern of names (as in `fnmatch`; the first that fits), such as
            ``{"head.*": {"lr": 1e-3, "weight_decay": 0.0}}``; keys are ``lr``, ``weight_decay``, ``damping``.
        fallback: ``adamw``, ``adam_atan2`` or ``sgd``, for all other parameters. A `Fallback` sets betas,
            epsilon, momentum and decay, too.
        fallback_lr: Learning rate of the fallback at the base width.
        compile: Whether the update of each shape is compiled with `torch.compile`. None compiles on CUDA
            where Triton is there, and nothing on CPU.
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
        >>> optimizer = mupass.Muon(net, roles=("hidden", "input"), fallback_lr=3e-3)
        >>> net(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.stats()
        {'steps': 1}
    """

    smooths = False  # the momentum is in the stacks

    @takes(MuonOptions, Entries, Training)
    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 4,
        roles: Collection[str] = ("hidden",),
        product_dtype: torch.dtype | None = None,
        compile: bool | None = None,
        **options: Unpack[MuonOptions],
    ) -> None:
        self.nesterov = check_flag("nesterov", nesterov)
        keywords = Keywords(Muon, options, OptimizerError)
        entries = keywords.record(Entries)
        self.adaptive, self.normuon, self.beta2 = entries.adaptive, entries.normuon, float(entries.beta2)
        self.adjust = entries.adjusted
        self.product_dtype = product_dtype
        self._polynomials = quintics(check_period("steps", steps))
        training = keywords.record(Training, momentum=momentum)
        spec = OptimizerSpec("adamuon" if self.adaptive else "muon")
        super().__init__(model, spec, lr, training, Layout(roles, compile))

    def _default_rate(self) -> float:
        if self.adaptive or self.adjust == "match_rms_adamw":
            # Steps are of the size of Adam's.
            return super()._default_rate()
        return LR

    def _set_up(self, parameters: dict[str, Tensor]) -> None:
        super()._set_up(parameters)
        if self.adaptive and torch.__version__ < "2.11" and self._compiles_on_cpu():
            raise OptimizerError(
                f"inductor of torch {torch.__version__} writes past the end of a buffer in the compiled "
                "update of adaptive=True on CPU: leave compile out, or take torch 2.11 or newer"
            )
        # Both rows are there, whichever of the two classes this is: epsilon of norms, and of entries.
        norms, entries = self.plan.for_optimizer("muon"), self.plan.for_optimizer("adamuon")
        self._epsilons, self._matching = [], []
        for stack in self._stacks:
            of_norms = EPSILON * stack.each(lambda name: norms[name].scales.epsilon)
            of_entries = ADAPTIVE_EPSILON * stack.each(lambda name: entries[name].scales.epsilon)
            self._epsilons.append((of_norms, of_entries))
            self._matching.append(stack.each(partial(self._matched, stack)))

    def _compiles_on_cpu(self) -> bool:
        pairs = zip(self._stacks, self._compiled, strict=True)
        return any(stack.device.type == "cpu" and function is not None for stack, function in pairs)

    def _matched(self, stack: Stack, name: str) -> float:
        """Return by what steps are longer than of spectral norm 1, by the shape at the base width."""
        geometry = self.plan[name].geometry
        rows, columns = map(float, stack.shape)
        if self.plan.parameterization != "standard":  # where rates follow no width, steps are torch's
            rows, columns = rows / geometry.m_out, columns / geometry.m_in
        # A tall matrix takes longer steps, as in torch.optim.Muon.
        if self.adjust == "original":
            return sqrt(max(1.0, rows / columns))
        return ADAM_RMS * sqrt(max(rows, columns))

    def _first_stack_state(self, stack: Stack) -> State:
        state = {"average": stack.zeros(*stack.shape)}
        if self.adaptive:
            state |= {"square": stack.zeros(*stack.shape), "weight": stack.zeros()}
        elif self.normuon:
            state |= {"square": stack.zeros(stack.shape[0], 1), "weight": stack.zeros()}
        return state

    def _update(self) -> Callable[..., Tensor]:
        if self.normuon:
            return _by_neuron
        return _adaptive if self.adaptive else _orthogonal

    def _call(self, number: int, at: slice, *arguments: Any) -> Tensor:
        direction = super()._call(number, at, *arguments)
        # Spectral norm 1 is what the plan's rates are for.
        if self.adjust == "spectral":
            return direction
        return direction * wide(self._matching[number][at], direction)

    def _arguments(
        self, number: int, at: slice, gradient: Tensor | None, mean: Tensor, counts: Tensor
    ) -> tuple[Any, ...]:
        stack = self._stacks[number]
        momentum = stack.each(self._setting("momentum").__getitem__)[at]
        # An epsilon for the norm of the whole, and one for each entry.
        norm_epsilon, epsilon = (epsilons[at] for epsilons in self._epsilons[number])
        entries = len(stack.slots) * min(stack.shape) ** 2
        dtype = self.product_dtype or product_dtype(stack.dtype, stack.device, entries)
        average = stack.state["average"][at]
        polar = Polar(average, momentum, norm_epsilon, self._polynomials, self.nesterov, dtype, counts)
        if not self.adaptive and not self.normuon:
            return mean, polar
        beta2 = 1 - (1 - self.beta2) * counts
        return mean, polar, Squares(stack.state["square"][at], stack.state["weight"][at], beta2, epsilon)


class Polar(NamedTuple):
    """What brings the singular values of some slots' momentum to 1.

    Attributes:
        average: ``[k, rows, columns]``, the momentum; changed in place.
        momentum: ``[k]``, weight of the past in it.
        epsilon: ``[k]``, added to the norm that it is divided by.
        polynomials: Result of `quintics`.
        nesterov: Whether the present gradient is mixed in once more.
        dtype: Precision of the products.
        counts: ``[k]``, 1, or 0 where the average stays as it is.
    """

    average: Tensor
    momentum: Tensor
    epsilon: Tensor
    polynomials: tuple[Quintic, ...]
    nesterov: bool
    dtype: torch.dtype
    counts: Tensor


class Squares(NamedTuple):
    """The average of squares by which AdaMuon and NorMuon divide, for some slots.

    Attributes:
        average: ``[k, rows, columns]``, or ``[k, rows, 1]`` for NorMuon; changed in place.
        weight: ``[k]``, its total weight; changed in place.
        beta2: ``[k]``, weight of the past.
        epsilon: ``[k]``, added to the root.
    """

    average: Tensor
    weight: Tensor
    beta2: Tensor
    epsilon: Tensor


def _orthogonal(gradient: Tensor, polar: Polar) -> Tensor:
    """Return ``U V^T`` of the momentum, all ``[K, rows, columns]``; the average is changed in place."""
    past = wide(polar.momentum, gradient)
    polar.average.lerp_(gradient, wide((1 - polar.momentum) * polar.counts, gradient))
    # Nesterov looks ahead by mixing the present gradient in once more.
    looked_ahead = torch.lerp(gradient, polar.average, past) if polar.nesterov else polar.average
    return orthogonalize(looked_ahead, polar.epsilon, polar.polynomials, polar.dtype)


def _adaptive(gradient: Tensor, polar: Polar, squares: Squares) -> Tensor:
    """Return ``U V^T`` over the root of the average of its squares, corrected for the start from zero."""
    turned = _orthogonal(gradient, polar)
    return _divided(turned, turned.square(), squares)


def _by_neuron(gradient: Tensor, polar: Polar, squares: Squares) -> Tensor:
    """Return ``U V^T`` with rows over the root of the average of their mean squares, and the norm it had."""
    turned = _orthogonal(gradient, polar)
    return with_norm_of(turned, _divided(turned, turned.square().mean(-1, keepdim=True), squares))


def _divided(turned: Tensor, square: Tensor, squares: Squares) -> Tensor:
    """Add squares to their average, and divide by its root."""
    squares.average.lerp_(square, 1 - wide(squares.beta2, turned))
    squares.weight.lerp_(torch.ones_like(squares.weight), 1 - squares.beta2)
    # turned / (sqrt(average / weight) + epsilon); before the first step that counts the weight is zero
    weight = squares.weight.clamp(min=torch.finfo(turned.dtype).tiny)
    root = (squares.average / wide(weight, turned)).sqrt()
    return turned / (root + wide(squares.epsilon, turned))
