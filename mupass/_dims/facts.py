"""What inference knows of tensors, and what the rules find out about dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from mupass._records import Use

Origin = frozenset[tuple[str, int]]
NOWHERE: Origin = frozenset()


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one tensor.

    Attributes:
        dim: Dimension handle in the space.
        size: Its size.
        origin: Parameter axes that this axis still *is*, for tensors computed from parameters alone.
    """

    dim: int
    size: int
    origin: Origin = NOWHERE


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as inference sees it.

    Attributes:
        axes: Its axes.
        static: Whether it is computed from parameters, buffers and constants alone.
    """

    axes: tuple[Axis, ...]
    static: bool = False

    @property
    def parametric(self) -> bool:
        """Whether some axis is still an axis of a parameter."""
        return self.static and any(axis.origin for axis in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class ParameterUse:
    """A use of one parameter, with the dimensions it met."""

    parameter: str
    use: Use


@dataclass(frozen=True)
class Bilinear:
    """A product of two activations: dims in both operands and the output, and all the others."""

    batch: tuple[int, ...]
    inner: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Between:
    """A weight that contracts dims with each of several activations, and what it makes of them."""

    sides: tuple[tuple[int, ...], ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class MadeWeight:
    """A product in which an activation stands as a weight: what it sums over, and what else it brings."""

    summed: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """A fused kernel of attention.

    Attributes:
        dim: Its head_dim.
        scale: What it multiplies scores by; None for ``1/sqrt(head_dim)``.
        where: Operator and module.
        node: The operator.
    """

    dim: int
    scale: float | None
    where: str
    node: Node = field(compare=False, repr=False)


@dataclass
class Facts:
    """What the rules have found, next to the space itself."""

    # Of parameters.
    uses: list[ParameterUse] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)  # dims along which parameters are concatenated
    parts: list[int] = field(default_factory=list)  # dims of what activations are joined of
    carried: dict[tuple[str, int], int] = field(default_factory=dict)  # parameter axis -> dim
    frozen: frozenset[str] = frozenset()  # those that are not trained
    written: dict[int, str] = field(default_factory=dict)  # dims of sizes that code writes out -> its class

    # Evidence on single dimensions; strings say where it was met, or why it counts.
    finite: dict[int, str] = field(default_factory=dict)  # certain
    literal: dict[int, str] = field(default_factory=dict)  # used to break ties

    # Weights: the dims that each contracts, and those that it makes.
    weights: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    straight: set[int] = field(default_factory=set)  # dims that a weight reads just as another made them
    bent: set[int] = field(default_factory=set)  # dims that a weight reads behind a nonlinearity
    positions: set[int] = field(default_factory=set)  # dims that convolutions slide along
    at_positions: set[int] = field(default_factory=set)  # dims that weights make at each position
    ranked: list[int] = field(default_factory=list)  # dims of which the best entries are picked
    multiplied: dict[int, str] = field(default_factory=dict)  # dims of products over another axis
    filters: dict[int, str] = field(default_factory=dict)  # dims of weights whose entries the code computes
    drawn: set[int] = field(default_factory=set)  # dims of deviations that normal noise is multiplied with
    windows: list[tuple[int, int]] = field(default_factory=list)  # dim of a kernel or window, its step
    reordered: list[tuple[int, int]] = field(
        default_factory=list
    )  # dims: of a parameter, of a fixed index on it
    rows: list[int] = field(default_factory=list)  # dims of the rows of lookup tables
    fan_in: dict[int, str] = field(default_factory=dict)  # dims that weights contract
    fan_out: dict[int, str] = field(default_factory=dict)  # dims that weights make

    # What counts things apart from each other.
    enumerated: dict[int, str] = field(default_factory=dict)  # finite dims, positions are separate things
    picks: list[tuple[int, int, str]] = field(default_factory=list)  # dim, the one position taken, where
    repeated: dict[int, str] = field(default_factory=dict)  # dims that count copies of an axis of length 1
    stacked: set[int] = field(default_factory=set)  # dims that count the tensors of a stack
    spread: set[int] = field(default_factory=set)  # dims of vectors in outer products with data: frequencies
    groups: dict[int, str] = field(default_factory=dict)  # group counts of grouped convolutions
    alternatives: dict[int, str] = field(default_factory=dict)  # dims that are softmaxed or picked by index
    softmaxed: set[int] = field(default_factory=set)  # those of them that are softmaxed
    counted: set[int] = field(default_factory=set)  # dims of which the values tell the size
    basis: dict[int, str] = field(default_factory=dict)  # dims summed between parameters alone

    # Products of activations, and weights that a sample makes for itself.
    bilinear: list[Bilinear] = field(default_factory=list)
    blocks: list[Bilinear] = field(default_factory=list)  # the same for a weight that is a batch of weights
    made_weights: list[MadeWeight] = field(default_factory=list)
    between: list[Between] = field(default_factory=list)
    mixtures: dict[int, str] = field(default_factory=dict)  # dims that count weights mixed into one
    attention: list[Attention] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def bare(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Return the axes without the parameters that they came from."""
    return tuple(Axis(axis.dim, axis.size) for axis in axes)
