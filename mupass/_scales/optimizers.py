"""What the scale table must know of an optimizer."""

from dataclasses import dataclass

from mupass._errors import PlanError

ENTRYWISE = ("adam", "adamw", "adam_atan2", "adamuon")  # every entry of an update is of order 1
GRAFTS = ("none", "sgd", "adam", "rmsprop", "spectral")
ALIGNED = ("sgd", "adam", "adamw", "adam_atan2", "adafactor")  # rows of Everett et al.
OPTIMIZERS = ("sgd", *ENTRYWISE, "adafactor", "kfac", "foof", "shampoo", "soap", "muon")
# Scales that an optimizer reads, with the heading each has there.
COLUMNS = {
    "sgd": {"lr": "lr"},
    "adam": {"lr": "lr", "epsilon": "epsilon"},
    "adamw": {"lr": "lr", "epsilon": "epsilon"},
    "adam_atan2": {"lr": "lr"},
    "adafactor": {"lr": "lr"},
    "adamuon": {"lr": "lr", "epsilon": "epsilon"},
    "kfac": {"lr": "lr", "damping_in": "damping A", "damping_out": "damping B"},
    "foof": {"lr": "lr", "damping_in": "damping A", "damping_out": "damping B"},
    "shampoo": {"lr": "lr", "damping_in": "damping R", "damping_out": "damping L"},
    "soap": {"lr": "lr", "epsilon": "epsilon"},
    "muon": {"lr": "lr", "epsilon": "epsilon"},
}
LARGEST = 8.0  # of a power; 1 undoes a factor altogether


@dataclass(frozen=True)
class OptimizerSpec:
    """What the scale table must know of an optimizer: its family and the powers it applies.

    Attributes:
        name: ``sgd``, ``adam``, ``adamw``, ``adam_atan2``, ``adafactor``, ``kfac``, ``foof``,
            ``shampoo``, ``soap``, ``muon`` or ``adamuon``. ``foof`` is K-FAC that preconditions the input
            side only: it fixes ``e_a = 1`` and ``e_b = 0``. ``adafactor`` is Adam times the root mean
            square of the weight.
        e_a: K-FAC power of the input factor A.
        e_b: K-FAC power of the output factor B.
        e: Shampoo's TOTAL power, ``e/2`` on each side; 1/2 is the usual quarter power a side.
        graft: Whose magnitude Shampoo's update is given: ``none``, ``sgd``, ``adam``, ``rmsprop``, or Muon's:
            ``spectral``.
        alignment: ``full`` or ``none`` for the largest rates at which every layer is stable when updates and
            activations are aligned so (Everett et al., arXiv 2407.05872): SGD and Adam families, any
            parameterization; ``measured`` for the `exponents` of each parameter. None for the rates of the
            parameterization itself.
        exponents: Parameter and its exponent, from 1/2 (``none``) to 1 (``full``), for ``measured``; those
            left out count as aligned. `mupass.measured_exponents` makes them.

    Raises:
        PlanError: Unknown name; a power that is NaN, infinite or negative; an alignment for an optimizer
            that has none; exponents out of range, or without ``measured``.
    """

    name: str
    e_a: float = 1.0
    e_b: float = 1.0
    e: float = 0.5
    graft: str = "none"
    alignment: str | None = None
    exponents: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "graft"):
            if not isinstance(getattr(self, field), str):
                raise PlanError(f"{field} of an optimizer must be a text, not {getattr(self, field)!r:.80}")
        if self.alignment is not None and not isinstance(self.alignment, str):
            raise PlanError(f"unknown alignment {self.alignment!r}; known: full, none, measured")
        if self.name not in OPTIMIZERS:
            raise PlanError(f"unknown optimizer {self.name!r}; known: {', '.join(OPTIMIZERS)}")
        if self.graft not in GRAFTS:
            raise PlanError(f"unknown graft {self.graft!r}; known: {', '.join(GRAFTS)}")
        if self.alignment not in {None, "full", "none", "measured"}:
            raise PlanError(f"unknown alignment {self.alignment!r}; known: full, none, measured")
        if (self.alignment == "measured") != bool(self.exponents):
            raise PlanError("alignment='measured' needs exponents, and exponents need alignment='measured'")
        for name, power in self.exponents:
            if not 0.5 <= power <= 1:
                raise PlanError(f"the alignment exponent of {name} must be from 1/2 to 1, not {power!r}")
        if self.alignment and self.name not in ALIGNED:
            raise PlanError(f"alignment= has rows for {', '.join(ALIGNED)}, not for {self.name}")
        for field in ("e_a", "e_b", "e"):
            power = getattr(self, field)
            if isinstance(power, bool) or not isinstance(power, (int, float)):
                raise PlanError(f"{field} must be a number, not {power!r}")
            if not 0 <= power <= LARGEST:
                raise PlanError(f"{field} must be finite and >= 0, at most {LARGEST:g}, not {power!r}")
            object.__setattr__(self, field, float(power))
        if self.name == "foof":
            if (self.e_a, self.e_b) not in {(1.0, 1.0), (1.0, 0.0)}:
                raise PlanError("foof fixes e_a=1 and e_b=0; for other powers use kfac(e_a, e_b)")
            object.__setattr__(self, "e_b", 0.0)

    @staticmethod
    def of(optimizer: "str | OptimizerSpec") -> "OptimizerSpec":
        """Return the spec itself, or the one with default powers that a name stands for."""
        return optimizer if isinstance(optimizer, OptimizerSpec) else OptimizerSpec(optimizer)

    def __str__(self) -> str:
        """Return the name with the powers that matter to it."""
        if self.name in {"kfac", "foof"}:
            return f"{self.name}(e_a={self.e_a:g}, e_b={self.e_b:g})"
        if self.name == "shampoo":
            return f"shampoo(e={self.e:g}{f', graft={self.graft}' if self.graft != 'none' else ''})"
        return f"{self.name}(alignment={self.alignment})" if self.alignment else self.name
