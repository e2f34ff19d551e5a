"""Settings of K-FAC, each record with its own checks; the keywords are explained at `mupass.KFAC`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mupass._errors import OptimizerError
from mupass._optim.checks import check_choice, check_flag, check_number, check_period
from mupass._optim.kronecker.damping import MODES


@dataclass(frozen=True)
class Loss:
    """How the loss is made of terms.

    Attributes:
        terms: Number of terms that it averages over, or a function giving it; None counts them.
        reduction: ``mean``, or ``sum`` where it is their sum.
    """

    terms: int | Callable[[], int] | None
    reduction: str

    def __post_init__(self) -> None:
        check_choice("loss_reduction", self.reduction, ("mean", "sum"))
        if self.terms is not None and not callable(self.terms):
            check_period("loss_terms", self.terms)

    @property
    def mean(self) -> bool:
        """Whether the loss is the mean of its terms."""
        return self.reduction == "mean"


@dataclass(frozen=True)
class Statistics:
    """How factors are collected and averaged.

    Attributes:
        decay: Weight of the past in the averages.
        every: Steps between collections.
        fisher: ``empirical``, or ``sampled``: from a loss with targets drawn from the model.
        sharing: ``expand`` or ``reduce``: what a weight used at many positions is.
    """

    decay: float
    every: int
    fisher: str
    sharing: str

    def __post_init__(self) -> None:
        check_number("factor_decay", self.decay, 0, 1)
        check_period("factor_every", self.every)
        check_choice("fisher", self.fisher, ("empirical", "sampled"))
        check_choice("sharing", self.sharing, ("expand", "reduce"))


@dataclass(frozen=True)
class Damping:
    """What is added to the factors before they are inverted.

    Attributes:
        mode: Mode of damping, see `mupass._optim.kronecker.damping.damp`.
        floor: Smallest trace of B that damping reckons with, relative to the largest one.
        memory: What a step leaves of the largest trace of B seen so far, to which damping is relative.
    """

    mode: str
    floor: float
    memory: float

    def __post_init__(self) -> None:
        check_choice("damping_mode", self.mode, MODES)
        check_number("damping_floor", self.floor)
        check_number("damping_memory", self.memory, 0, 1)

    @property
    def has_floor(self) -> bool:
        """Whether the largest trace of B over all layers has a part in the damping of each."""
        return self.mode == "trace" and self.floor > 0


@dataclass(frozen=True)
class Bounds:
    """How far a step may go.

    Attributes:
        step: Root mean square of the change of a layer's outputs; None for no bound.
        kl: About twice the KL divergence between predictions before and after; None for no bound.
    """

    step: float | None
    kl: float | None

    def __post_init__(self) -> None:
        for name, bound in {"step_bound": self.step, "kl_clip": self.kl}.items():
            if bound is not None and not check_number(name, bound):
                raise OptimizerError(f"{name}=0 would let nothing move: None is no bound")


@dataclass(frozen=True)
class Roots:
    """How factors become roots, and when.

    Attributes:
        power_a: Power of A.
        power_b: Power of B.
        every: Steps between recomputations of a root.
        stagger: Whether roots are spread over the steps of a period.
        ekfac: Whether gradients are scaled by their second moments in the eigenbases.
        block: Largest block of a factor; None for whole ones.
        damping: What is added to the factors.
    """

    power_a: float
    power_b: float
    every: int
    stagger: bool
    ekfac: bool
    block: int | None
    damping: Damping

    def __post_init__(self) -> None:
        check_number("e_a", self.power_a)
        check_number("e_b", self.power_b)
        check_period("root_every", self.every)
        check_flag("stagger", self.stagger)
        check_flag("ekfac", self.ekfac)
        pi = self.damping.mode == "pi"
        if self.ekfac and (self.powers != (1, 1) or pi):
            raise OptimizerError(
                f"ekfac=True divides by second moments: e_a and e_b must be 1, not {self.power_a:g} and "
                f"{self.power_b:g}, and damping_mode not 'pi', which gives a factor several roots"
            )
        if self.block is None:
            return
        if self.ekfac or pi:
            option = "ekfac=True" if self.ekfac else "damping_mode='pi'"
            raise OptimizerError(
                f"block_size cuts factors, and {option} needs whole ones: leave one of them out"
            )
        check_period("block_size", self.block)

    @property
    def powers(self) -> tuple[float, float]:
        """Powers of A and of B."""
        return float(self.power_a), float(self.power_b)

    def power(self, side: str) -> float:
        """Return the power of one side.

        Args:
            side: ``a`` or ``b``.
        """
        return self.powers["ab".index(side)]
