"""What a tap tells while a model runs: who listens decides which statistics count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Watcher(Protocol):
    """Told of forward and backward passes by the taps; `mupass._taps.passes.Passes` is the one there is."""

    def begin(self) -> None:
        """A backward pass has reached a tap."""

    def begin_late(self, gradient: Tensor) -> None:
        """A backward pass has reached a leaf, behind all of a compiled graph.

        Args:
            gradient: That of the leaf, which is left alone.
        """

    def enter(self) -> None:
        """The model runs forward."""

    def differentiated(self, tap: object) -> None:
        """A loss depends on the gradient at a tap's output, whose backward pass read the parameter again.

        Args:
            tap: The tap.
        """

    def repeated(self, tap: object) -> None:
        """A second backward pass has run through one forward pass.

        Args:
            tap: The tap.
        """

    def leaves_out(self, tap: object, leaf: Tensor | None) -> bool:
        """Return whether the pass that runs adds to parameters' gradients, but not to those of leaves.

        Args:
            tap: The tap, whose parameters are asked for; of what is no tap all are.
            leaf: One of its leaves.
        """

    def miss(self, tap: object, how: str) -> None:
        """A tap cannot see a use of its parameter.

        Args:
            tap: The tap.
            how: What use it is.
        """

    def look_through(self, outputs: Sequence[Tensor]) -> None:
        """The model has made its outputs.

        Args:
            outputs: All tensors among them.
        """
