"""One row for each optimizer: all that the project knows of it, but for the code of its steps.

A row says how large a step and its small numbers are in width and depth (`mupass._scales.scales` turns that
into powers), what the print of a plan shows, how ``torch.optim`` reads parameter groups, how studies make the
optimizer from its name, and what a check of coordinates suspects when its updates scale with width. To add
an optimizer, add a row to `OPTIMIZERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mupass._errors import PlanError, check_choice, is_number

LARGEST = 8.0  # of a power; 1 undoes a factor altogether
ALIGNMENTS = ("full", "none", "measured")


@dataclass(frozen=True)
class Step:
    """Size of one step in width: ``dW = B^-e_out delta h^T A^-e_in``, with ``A ~ |h|^2``, ``B ~ |delta|^2``.

    Attributes:
        e_in: Total power that divides the input side, ``h``; 1/2 where its size drops out.
        e_out: Total power that divides the output side, ``delta``; 1/2 where its size drops out.
        entrywise: Whether each entry, not the whole matrix, has size 1: ``dW = sign(delta) sign(h)^T``.
        relative: Whether the step is multiplied by the root mean square of the weight.
    """

    e_in: float
    e_out: float
    entrywise: bool = False
    relative: bool = False

    @property
    def gradient_power(self) -> float:
        """Power of the gradient's size in the size of the step: 1 for SGD, 0 where the size drops out."""
        return 1 - 2 * self.e_out


# SGD: the gradient delta h^T as it is.
GRADIENT = Step(0.0, 0.0)
SIGN = Step(0.5, 0.5, entrywise=True)
ORTHOGONAL = Step(0.5, 0.5)
# Whose magnitude Shampoo's update may be given. RMSprop is Adam without the average of gradients.
GRAFT_STEPS = {"sgd": GRADIENT, "adam": SIGN, "rmsprop": SIGN, "spectral": ORTHOGONAL}
GRAFTS = ("none", *GRAFT_STEPS)


@dataclass(frozen=True)
class Order:
    """Order of what a small number is added to: ``|h|^h |delta|^delta d_in^per_input d_out^per_output``.

    Attributes:
        h: Power of ``|h|``, the norm of the activation that the parameter is multiplied with.
        delta: Power of ``|delta|``, the norm of the gradient of what the parameter puts out.
        per_input: Power of the number of inputs.
        per_output: Power of the number of outputs.
    """

    h: float
    delta: float
    per_input: float = 0.0
    per_output: float = 0.0


NOTHING = Order(0.0, 0.0)
INPUT_FACTOR = Order(2.0, 0.0)  # A = sum of h h^T
OUTPUT_FACTOR = Order(0.0, 2.0)  # B = sum of delta delta^T
GRAM_MATRIX = Order(2.0, 2.0)  # R = G^T G and L = G G^T share their non-zero eigenvalues, |delta|^2 |h|^2
# |delta| |h|, the norm of delta h^T.
GRADIENT_NORM = Order(1.0, 1.0)
# One of d_out d_in entries of that norm: its root mean square.
GRADIENT_ENTRY = Order(1.0, 1.0, -0.5, -0.5)
# An orthogonal matrix has entries of order 1 / sqrt(d_out d_in), whatever the gradient.
ORTHOGONAL_ENTRY = Order(0.0, 0.0, -0.5, -0.5)


@dataclass(frozen=True)
class Recipe:
    """How a study makes an optimizer from its name.

    Attributes:
        made_by: ``module:Class``, imported when the optimizer is made. A class of mupass takes the model,
            any other the groups of `mupass.param_groups`.
        defaults: Arguments where the study gives none. A class that is not of mupass takes no others.
        for_check: Further arguments in a check of coordinates.
        fallback_at_lr: Whether the fallback has the learning rate of the optimizer.
    """

    made_by: str
    defaults: Mapping[str, Any]
    for_check: Mapping[str, Any] = field(default_factory=dict)
    fallback_at_lr: bool = False


@dataclass(frozen=True)
class OptimizerRow:
    """All that is known of one optimizer.

    Attributes:
        name: By which it is called everywhere.
        source: Where its powers of width are from.
        step: Size of one step, from which the factors on learning rates follow.
        columns: Scales that it reads, with the heading of each in the print of a plan.
        options: Fields of `OptimizerSpec` that matter to it. With ``alignment`` it has rates by alignment.
        step_powers: Fields of `OptimizerSpec` that hold ``e_in`` and ``e_out`` of its step; () if fixed.
        fixed: Fields of `OptimizerSpec` that may have one value only.
        general: The optimizer that takes other values, as one writes it.
        damping_in: Order of the eigenvalues that the input side is damped against.
        damping_out: Order of those of the output side.
        epsilon: Order of what epsilon is added to; None where a step has no epsilon.
        has_fallback: Whether it leaves parameters to a fallback, which has scales of its own.
        in_summary: Whether the print of a plan shows its rates while no optimizer is decided.
        torch_class: The class of ``torch.optim`` that steps so; ``""`` if there is none. Classes of other
            libraries whose name contains it are taken for it.
        alike: Other classes of ``torch.optim`` that step as large.
        takes_eps: Whether groups of `mupass.param_groups` hold ``eps`` for it.
        normalizes_decay: Whether it adds weight decay to the gradient before it normalizes the step.
        recipe: How studies make it; None for those that they do not know by name.
        cause_if_growing: Likely cause where its rates are right but its updates grow with width.
        cause_if_shrinking: The same where they shrink.
        cause_if_dimmed: Where the gradient starts near zero and a step follows no one power of its size, the
            likely cause of updates that grow; ``""`` where `Step.gradient_power` holds there.
    """

    name: str
    source: str
    step: Step
    columns: Mapping[str, str]
    options: tuple[str, ...] = ()
    step_powers: tuple[str, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    general: str = ""
    damping_in: Order = NOTHING
    damping_out: Order = NOTHING
    epsilon: Order | None = GRADIENT_ENTRY
    has_fallback: bool = False
    in_summary: bool = False
    torch_class: str = ""
    alike: tuple[str, ...] = ()
    takes_eps: bool = False
    normalizes_decay: bool = False
    recipe: Recipe | None = None
    cause_if_growing: str = ""
    cause_if_shrinking: str = ""
    cause_if_dimmed: str = ""


RATE_ONLY = {"lr": "lr"}
WITH_EPSILON = {"lr": "lr", "epsilon": "epsilon"}
FEW_ROWS = (
    "its damping is so small that the width, not the batch, limits the rank of the factors: larger "
    "damping or larger widths would tell"
)
OVERDAMPED = "its damping is absolute, or too large for the wider layers"
YANG = "Yang et al., arXiv 2203.03466, table 3"
ISHIKAWA = "Ishikawa & Karakida, arXiv 2312.12226, table 1"
QIU = "Qiu et al., arXiv 2512.05620"

# K-FAC preconditions both sides, FOOF the input side alone; all else they share.
_KFAC = OptimizerRow(
    "kfac",
    source=ISHIKAWA,
    step=Step(1.0, 1.0),
    columns={"lr": "lr", "damping_in": "damping A", "damping_out": "damping B"},
    options=("e_a", "e_b"),
    step_powers=("e_a", "e_b"),
    damping_in=INPUT_FACTOR,
    damping_out=OUTPUT_FACTOR,
    epsilon=None,
    has_fallback=True,
    cause_if_growing=FEW_ROWS,
    cause_if_shrinking=OVERDAMPED,
)

# Powers of width are those of any damping. A check shows where the damping, not the width, limits the rank of
# a factor: at once when it is 1 relative to the trace, only beyond width 1/damping when there are more rows
# than that. Relative to the largest eigenvalue the rank still shows: it grows with the width up to the rows.
# SOAP's rows are those of blocks, and a check may be narrower than those of training. Bounds on K-FAC's steps
# would hide how they grow.
_ROWS = (
    OptimizerRow(
        "sgd",
        source=YANG,
        step=GRADIENT,
        columns=RATE_ONLY,
        options=("alignment",),
        epsilon=None,
        in_summary=True,
        torch_class="SGD",
        alike=("ASGD",),
        recipe=Recipe("torch.optim:SGD", {"lr": 0.01, "momentum": 0.0}),
    ),
    OptimizerRow(
        "adam",
        source=YANG,
        step=SIGN,
        columns=WITH_EPSILON,
        options=("alignment",),
        torch_class="Adam",
        alike=("Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"),
        takes_eps=True,
        normalizes_decay=True,
        recipe=Recipe("torch.optim:Adam", {"lr": 1e-3, "eps": 1e-8}),
    ),
    OptimizerRow(
        "adamw",
        source=YANG,
        step=SIGN,
        columns=WITH_EPSILON,
        options=("alignment",),
        in_summary=True,
        torch_class="AdamW",
        takes_eps=True,
        recipe=Recipe("torch.optim:AdamW", {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8}),
    ),
    OptimizerRow(
        "adam_atan2",
        source="Everett et al., arXiv 2407.05872: Adam without an epsilon",
        step=SIGN,
        columns=RATE_ONLY,
        options=("alignment",),
    ),
    OptimizerRow(
        "adamuon",
        source=QIU,
        step=SIGN,
        columns=WITH_EPSILON,
        epsilon=ORTHOGONAL_ENTRY,
        has_fallback=True,
    ),
    OptimizerRow(
        "adafactor",
        source="Everett et al., arXiv 2407.05872, table 1: Adam times the root mean square of the weight",
        step=replace(SIGN, relative=True),
        columns=RATE_ONLY,
        options=("alignment",),
        torch_class="Adafactor",
    ),
    OptimizerRow(
        "lion",
        source="Chen et al., arXiv 2302.06675, program 1: the sign of a mean of gradients, Adam's step",
        step=SIGN,
        columns=RATE_ONLY,
        options=("alignment",),
        epsilon=None,
        torch_class="Lion",
    ),
    replace(
        _KFAC,
        in_summary=True,
        recipe=Recipe(
            "mupass._optim.kfac:KFAC",
            {"lr": 0.01, "damping": 1e-2, "momentum": 0.0, "fallback": "sgd"},
            for_check={"damping": 1.0, "step_bound": None, "kl_clip": None, "root_every": 1},
            fallback_at_lr=True,
        ),
        cause_if_dimmed=(
            "a readout in the middle of the model hides the loss from it at the start; K-FAC divides by the "
            "square of a gradient near zero, so its first step grows: give it a damping_floor="
        ),
    ),
    replace(_KFAC, name="foof", fixed={"e_a": 1.0, "e_b": 0.0}, general="kfac(e_a, e_b)"),
    OptimizerRow(
        "shampoo",
        source=ISHIKAWA,
        step=ORTHOGONAL,
        columns={"lr": "lr", "damping_in": "damping R", "damping_out": "damping L"},
        options=("e", "graft"),
        step_powers=("e", "e"),
        damping_in=GRAM_MATRIX,
        damping_out=GRAM_MATRIX,
        has_fallback=True,
        in_summary=True,
        recipe=Recipe(
            "mupass._optim.shampoo:Shampoo",
            {
                "lr": 0.01,
                "damping": 1e-4,
                "graft": "none",  # Shampoo's own steps, not those of a graft
                "root_every": 1,
                "momentum": 0.0,
                "fallback": "sgd",
            },
            for_check={"damping": 1.0, "damping_mode": "trace"},
            fallback_at_lr=True,
        ),
        cause_if_growing=FEW_ROWS,
        cause_if_shrinking=OVERDAMPED,
    ),
    OptimizerRow(
        "soap",
        source=QIU,
        step=ORTHOGONAL,  # Adam in the basis of singular vectors, where delta h^T has one entry
        columns=WITH_EPSILON,
        epsilon=GRADIENT_NORM,
        has_fallback=True,
        in_summary=True,
        recipe=Recipe("mupass._optim.soap:SOAP", {"lr": 1e-3}, fallback_at_lr=True),
    ),
    OptimizerRow(
        "muon",
        source=QIU,
        step=ORTHOGONAL,
        columns=WITH_EPSILON,
        epsilon=GRADIENT_NORM,
        has_fallback=True,
        in_summary=True,
        torch_class="Muon",
        recipe=Recipe("mupass._optim.muon:Muon", {"lr": 0.01}),
    ),
)
OPTIMIZERS: dict[str, OptimizerRow] = {known.name: known for known in _ROWS}


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as a plan sees it: its row, by name, and the powers that the caller may choose.

    Attributes:
        name: ``sgd``, ``adam``, ``adamw``, ``adam_atan2``, ``adafactor``, ``lion``, ``kfac``,
            ``foof``, ``shampoo``, ``soap``, ``muon`` or ``adamuon``. ``foof`` is K-FAC that preconditions
            the input side only: it fixes ``e_a = 1`` and ``e_b = 0``. ``adafactor`` is Adam times the root
            mean square of the weight.
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

    Example:
        >>> import mupass
        >>> print(mupass.OptimizerSpec("shampoo", e=1, graft="adam"))
        shampoo(e=1, graft=adam)

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
        for field_name in ("name", "graft"):
            value = getattr(self, field_name)
            if not isinstance(value, str):
                raise PlanError(f"{field_name} of an optimizer must be a text, not {value!r:.80}")
        check_choice(PlanError, "optimizer", self.name, OPTIMIZERS)
        check_choice(PlanError, "graft", self.graft, GRAFTS)
        self._check_alignment()
        for field_name in ("e_a", "e_b", "e"):
            object.__setattr__(self, field_name, _power(field_name, getattr(self, field_name)))
        self._fix_powers()

    def _check_alignment(self) -> None:
        """Refuse an alignment that is unknown, incomplete or not for this optimizer.

        Raises:
            PlanError: It is.
        """
        if self.alignment is not None:
            check_choice(PlanError, "alignment", self.alignment, ALIGNMENTS)
        if (self.alignment == "measured") != bool(self.exponents):
            raise PlanError("alignment='measured' needs exponents, and exponents need alignment='measured'")
        for parameter, exponent in self.exponents:
            if not 0.5 <= exponent <= 1:
                raise PlanError(
                    f"the alignment exponent of {parameter} must be from 1/2 to 1, not {exponent!r}"
                )
        if self.alignment and "alignment" not in self.row.options:
            aligned = [
                candidate.name for candidate in OPTIMIZERS.values() if "alignment" in candidate.options
            ]
            raise PlanError(f"alignment= has rows for {', '.join(aligned)}, not for {self.name}")

    def _fix_powers(self) -> None:
        """Set powers that the row fixes, which may be left at their defaults.

        Raises:
            PlanError: One has been chosen.
        """
        defaults = type(self).__dataclass_fields__
        # foof(e_a=1, e_b=0) may be written out; another power contradicts the name.
        chosen = [name for name, value in self.row.fixed.items() if getattr(self, name) != value]
        if any(getattr(self, name) != defaults[name].default for name in chosen):
            fixed = " and ".join(f"{name}={value:g}" for name, value in self.row.fixed.items())
            raise PlanError(f"{self.name} fixes {fixed}; for other powers use {self.row.general}")
        for name, value in self.row.fixed.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of(optimizer: "str | OptimizerSpec") -> "OptimizerSpec":
        """Return the spec itself, or the one with default powers that a name stands for."""
        if isinstance(optimizer, OptimizerSpec):
            return optimizer
        return OptimizerSpec(optimizer)

    @property
    def row(self) -> OptimizerRow:
        """All that is known of the optimizer of this name."""
        return OPTIMIZERS[self.name]

    @property
    def grafted(self) -> bool:
        """Whether the update has the magnitude of another optimizer's."""
        return "graft" in self.row.options and self.graft != "none"

    @property
    def step(self) -> Step:
        """Size of one step, with the powers of this spec."""
        # A grafted step has the size of what is grafted, whatever Shampoo's own powers.
        if self.grafted:
            return GRAFT_STEPS[self.graft]
        if not self.row.step_powers:
            return self.row.step
        e_in, e_out = (getattr(self, name) for name in self.row.step_powers)
        return replace(self.row.step, e_in=e_in, e_out=e_out)

    def __str__(self) -> str:
        """Return the name with the powers that matter to it."""
        options = []
        for name in self.row.options:
            value = getattr(self, name)
            if isinstance(value, float):
                options.append(f"{name}={value:g}")
            elif value and not (name == "graft" and value == "none"):
                options.append(f"{name}={value}")
        return f"{self.name}({', '.join(options)})" if options else self.name


def _power(name: str, power: Any) -> float:
    """Return a power as a float.

    Raises:
        PlanError: It is no number from 0 to `LARGEST`.
    """
    if not is_number(power):
        raise PlanError(f"{name} must be a number, not {power!r}")
    if not 0 <= power <= LARGEST:
        raise PlanError(f"{name} must be finite and >= 0, at most {LARGEST:g}, not {power!r}")
    return float(power)
