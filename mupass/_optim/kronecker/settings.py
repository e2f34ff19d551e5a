"""Keywords of K-FAC in records, each with its own checks; `mupass.KFAC` explains them at length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mupass._errors import OptimizerError
from mupass._optim.checks import check_choice, check_flag, check_number, check_period, check_words
from mupass._optim.kronecker.damping import MODES
from mupass._optim.training import TrainingOptions


class KFACOptions(TrainingOptions, total=False):
    """Keywords of `mupass.KFAC` that the records below hold, for type checkers and editors."""

    momentum_of: str
    e_a: float
    e_b: float
    root_every: int
    stagger: bool
    ekfac: bool
    block_size: int | None
    damping_mode: str
    damping_floor: float
    damping_memory: float
    factor_decay: float
    factor_every: int
    fisher: str
    sharing: str
    step_bound: float | None
    kl_clip: float | None
    variance_adaptation: bool
    diagonal_above: int
    norms: bool
    exclude: Sequence[str]
    loss_terms: int | Callable[[], int] | None
    loss_reduction: str
    loss_scale: float | Callable[[], float] | None
    target_scale: float | None


@dataclass(frozen=True)
class Loss:
    """How the loss is made of terms.

    Attributes:
        loss_terms: Number of terms that it averages over, or a function giving it; None counts them.
        loss_reduction: ``mean``, or ``sum`` where it is their sum.
        loss_scale: What it is multiplied by before ``backward``, or a function giving it.
        target_scale: Size of the targets of a squared error; None for 1, and for a look at the first losses.
    """

    loss_terms: int | Callable[[], int] | None = None
    loss_reduction: str = "mean"
    loss_scale: float | Callable[[], float] | None = None
    target_scale: float | None = None

    def __post_init__(self) -> None:
        check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        if self.loss_terms is not None and not callable(self.loss_terms):
            check_period("loss_terms", self.loss_terms)
        scale = self.loss_scale
        if scale is not None and not callable(scale) and not check_number("loss_scale", scale):
            raise OptimizerError("loss_scale must be a number above 0, or a function that returns one")
        if self.target_scale is not None and not check_number("target_scale", self.target_scale):
            raise OptimizerError("target_scale must be a number above 0")

    def terms_now(self) -> float | None:
        """Return the number of terms that the caller tells; None where they are counted.

        Raises:
            OptimizerError: The caller's function returns something else.
        """
        if not callable(self.loss_terms):
            return self.loss_terms
        return told_number("loss_terms", self.loss_terms())

    @property
    def mean(self) -> bool:
        """Whether the loss is the mean of its terms."""
        return self.loss_reduction == "mean"

    @property
    def unit(self) -> float:
        """What outputs are measured in."""
        return 1.0 if self.target_scale is None else float(self.target_scale)


def told_number(name: str, value: Any) -> float:
    """Return a number that a function of the caller's has returned, as it is or in a tensor or an array.

    Args:
        name: Keyword that the function was given as.
        value: What it returned; zero terms are those of a rank, or of a batch, without targets.

    Raises:
        OptimizerError: It is no finite number, or negative.
    """
    if hasattr(value, "item") and prod(value.shape) == 1:
        value = value.item()
    return check_number(f"what the function {name} returned", value)


@dataclass(frozen=True)
class Statistics:
    """How factors are collected and averaged.

    Attributes:
        factor_decay: Weight of the past in the averages.
        factor_every: Steps between collections.
        fisher: ``empirical``, or ``sampled``: from a loss with targets drawn from the model.
        sharing: ``expand`` or ``reduce``: what a weight used at many positions is.
    """

    factor_decay: float = 0.95
    factor_every: int = 1
    fisher: str = "empirical"
    sharing: str = "expand"

    def __post_init__(self) -> None:
        check_number("factor_decay", self.factor_decay, 0, 1)
        check_period("factor_every", self.factor_every)
        check_choice("fisher", self.fisher, ("empirical", "sampled"))
        check_choice("sharing", self.sharing, ("expand", "reduce"))


@dataclass(frozen=True)
class Selection:
    """Which parameters are taken, and with whole factors.

    Attributes:
        diagonal_above: Sides of fixed size above this keep the diagonal of their factor only.
        norms: Whether gains and shifts are taken.
        exclude: Patterns of parameters that are left to the fallback.
    """

    diagonal_above: int = 8192
    norms: bool = True
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_period("diagonal_above", self.diagonal_above)
        check_flag("norms", self.norms)
        check_words("exclude", self.exclude)


@dataclass(frozen=True)
class Bounds:
    """How long a step is.

    Attributes:
        step_bound: Root mean square of the change of a layer's outputs; None for no bound.
            Chosen by `benchmarks/defaults.py`.
        kl_clip: About twice the KL divergence between predictions before and after; None for no bound.
        variance_adaptation: Whether steps are as long as the signal in the average of gradients.
    """

    step_bound: float | None = 0.2
    kl_clip: float | None = 1e-3
    variance_adaptation: bool = False

    def __post_init__(self) -> None:
        for name, bound in {"step_bound": self.step_bound, "kl_clip": self.kl_clip}.items():
            if bound is not None and not check_number(name, bound):
                raise OptimizerError(f"{name}=0 would let nothing move: None is no bound")
        check_flag("variance_adaptation", self.variance_adaptation)


@dataclass(frozen=True)
class Roots:
    """How factors are damped and become roots, and when.

    Attributes:
        e_a: Power of A.
        e_b: Power of B.
        root_every: Steps between recomputations of a root.
        stagger: Whether roots are spread over the steps of a period.
        ekfac: Whether gradients are scaled by their second moments in the eigenbases.
        block_size: Largest block of a factor; None for whole ones.
        damping_mode: Mode of damping, see `mupass._optim.kronecker.damping.damp`.
        damping_floor: Smallest trace of B that damping reckons with, relative to the largest one.
        damping_memory: What a step leaves of the largest trace of B seen, to which damping is relative.
    """

    e_a: float = 1.0
    e_b: float = 1.0
    root_every: int = 10
    stagger: bool = True
    ekfac: bool = False
    block_size: int | None = None
    damping_mode: str = "trace"
    damping_floor: float = 0.1
    damping_memory: float = 0.99

    def __post_init__(self) -> None:
        check_choice("damping_mode", self.damping_mode, MODES)
        check_number("damping_floor", self.damping_floor)
        check_number("damping_memory", self.damping_memory, 0, 1)
        check_number("e_a", self.e_a)
        check_number("e_b", self.e_b)
        check_period("root_every", self.root_every)
        check_flag("stagger", self.stagger)
        check_flag("ekfac", self.ekfac)
        pi = self.damping_mode == "pi"
        if self.ekfac and (self.powers != (1, 1) or pi):
            raise OptimizerError(
                f"ekfac=True divides by second moments: e_a and e_b must be 1, not {self.e_a:g} and "
                f"{self.e_b:g}, and damping_mode not 'pi', which gives a factor several roots"
            )
        if self.block_size is None:
            return
        if self.ekfac or pi:
            option = "ekfac=True" if self.ekfac else "damping_mode='pi'"
            raise OptimizerError(
                f"block_size cuts factors, and {option} needs whole ones: leave one of them out"
            )
        check_period("block_size", self.block_size)

    @property
    def powers(self) -> tuple[float, float]:
        """Powers of A and of B."""
        return float(self.e_a), float(self.e_b)

    @property
    def has_floor(self) -> bool:
        """Whether the largest trace of B over all layers has a part in the damping of each."""
        return self.damping_mode == "trace" and self.damping_floor > 0

    def power(self, side: str) -> float:
        """Return the power of one side.

        Args:
            side: ``a`` or ``b``.
        """
        return self.powers["ab".index(side)]
