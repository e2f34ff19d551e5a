"""Blocks: the records that say which parameters K-FAC preconditions, and where their factors come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mupass._roles.matrices import Matrices
from mupass._taps.factors import Layer


@dataclass(frozen=True)
class Place:
    """Where a tap sits.

    Attributes:
        module: Qualified name of the hooked module, or None for a tap inside a parameter.
        parameter: The parameter, by the name that the plan knows it by.
        key: Kind of use, for taps inside parameters.
    """

    module: str | None
    parameter: str
    key: str = ""


@dataclass(frozen=True)
class Factor:
    """One Kronecker factor, by where its raw sums come from.

    Attributes:
        side: ``a`` or ``b``.
        places: Taps that add to it.
        piece: Which of a tap's output factors; 0 for ``a``.
        scale: What the sums are multiplied by.
    """

    side: str
    places: tuple[Place, ...]
    piece: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Tied:
    """Factors of a weight with two transposed uses (an embedding that is also the readout).

    Its curvature ``A1 (x) B1 + B2 (x) A2`` is replaced by the nearest Kronecker product.

    Attributes:
        first: (A, B) of the use whose fan_in and fan_out are the parameter's.
        second: (A, B) of the other use, in its own sense.
    """

    first: tuple[Factor, Factor]
    second: tuple[Factor, Factor]


@dataclass(frozen=True)
class Block:
    """A parameter that K-FAC preconditions.

    Attributes:
        parameter: Its name.
        kind: What it is, for the coverage table.
        matrices: How it splits into matrices.
        a: Input factor of every matrix; empty for vectors, whose input factor is the number 1.
        b: Output factor of every matrix.
        tied: Set for two transposed uses; ``a`` and ``b`` are then those of the first.
    """

    parameter: str
    kind: str
    matrices: Matrices
    a: tuple[Factor, ...]
    b: tuple[Factor, ...]
    tied: Tied | None = None

    @property
    def standardized(self) -> bool:
        """Whether it is a kernel whose rows are standardized before they are convolved with."""
        return self.kind == "standardized"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All factors that it needs."""
        return (*self.a, *self.b, *(self.tied.second if self.tied else ()))


@dataclass(frozen=True)
class Cover:
    """What K-FAC takes of a model.

    Attributes:
        blocks: One for each parameter that it preconditions.
        layers: Shapes of every tap that these need.
        reasons: Parameter -> why K-FAC does not take it.
        together: Groups of taps that read one activation in the captured pass. Each has an input factor of
            its own, since not all of them take part in every step; where they do, it is computed once.
    """

    blocks: tuple[Block, ...]
    layers: Mapping[Place, Layer]
    reasons: Mapping[str, str]
    together: tuple[tuple[Place, ...], ...] = ()


@dataclass(frozen=True)
class Options:
    """Choices that shape the factors.

    Attributes:
        reduce: The reduce setting for shared weights.
        diagonal_above: Finite sides larger than this (vocabularies) keep a diagonal factor only.
        norms: Whether gains and shifts are preconditioned.
        exclude: Patterns of parameters to leave out.
        block: Largest block of a factor; 0 for whole factors.
    """

    reduce: bool = False
    diagonal_above: int = 8192
    norms: bool = True
    exclude: tuple[str, ...] = ()
    block: int = 0
