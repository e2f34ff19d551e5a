"""Passes: which statistics belong to the gradients that a step will use.

Leaves sum over backward passes, as gradients do. Gradients may be cleared in between by other means than the
optimizer's ``zero_grad``: after an adversarial pass, or to look at the gradients of one loss alone. What was
summed before belongs to no step then. At the end of each pass the gradients are marked, and at the beginning
of the next one, before it adds to any of them, taps whose parameters have lost theirs forget their sums.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mupass._errors import MupassWarning
from mupass._taps.blocks import Place
from mupass._taps.leaves import Tap
from mupass._taps.terms import TermsTap


class Mark(NamedTuple):
    """The gradient of a parameter at the end of a backward pass.

    Attributes:
        parameter: The parameter.
        gradient: Its gradient, not kept alive.
        version: How often that was changed in place.
    """

    parameter: Tensor
    gradient: weakref.ref[Tensor]
    version: int

    def is_gone(self, late: bool) -> bool:
        """Return whether the parameter has no gradient any more, or got a first one since.

        Args:
            late: Whether the pass that just runs may have added its gradients already. Otherwise a new tensor
                was put there by hand, in place of the old one.
        """
        now = self.parameter.grad
        return now is None or (late and now is not self.gradient())

    def is_touched(self) -> bool:
        """Return whether the gradient was changed in place."""
        now = self.parameter.grad
        return now is not None and now is self.gradient() and now._version != self.version


class Passes:
    """Backward passes since the last step.

    Attributes:
        before: Tap -> loss terms of the passes that it forgot and that others remember.
        watching: Whether the sums are of the gradients that a step uses, and not of a loss of their own.
    """

    def __init__(
        self, taps: Mapping[Place, Tap], terms: TermsTap, readers: Mapping[Place, Sequence[Tensor]]
    ) -> None:
        self.taps, self.terms, self.readers = taps, terms, readers
        self.before: dict[Place, Tensor] = {}
        self.watching = True
        self._marks: dict[Place, list[Mark]] = {}
        self._running = False
        self._warned = False
        for tap in taps.values():
            tap.watch(self)
        terms.passes = self

    def miss(self, tap: object) -> None:
        """Warn, once, of a use that a tap cannot see.

        Args:
            tap: The tap.
        """
        if not self._warned and self.watching:
            self._warned = True
            place = next(place for place, own in self.taps.items() if own is tap)
            name = place.parameter or place.module
            warnings.warn(
                f"{name} is used under a transform of torch.func (vmap, grad, jvp): K-FAC takes no "
                "statistics of that use. Where its gradients reach the step, call the model directly "
                f"instead, or leave the parameter to the fallback with exclude=['{name}*']",
                MupassWarning,
                stacklevel=4,
            )

    def restart(self) -> None:
        """Forget all passes: what they summed was taken or dropped."""
        self._marks, self.before, self._running = {}, {}, False

    def begin(self, late: bool = False) -> None:
        """Look for cleared gradients if a backward pass has just begun, and have its end marked.

        Args:
            late: Whether the pass may have added to gradients already, as a compiled graph may.
        """
        if self._running or not self.watching:
            return
        self._running = True
        self.drop_cleared(late)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]

    def enter(self) -> None:
        """Look for cleared gradients: the model runs forward, so no pass that counts is under way."""
        self._running = False
        if self.watching:
            self.drop_cleared()

    def begin_late(self, gradient: Tensor) -> None:
        """Begin from a hook on a leaf, which runs behind all of a compiled graph.

        Args:
            gradient: That of the leaf, which is left alone.
        """
        self.begin(late=True)

    def drop_cleared(self, late: bool = False) -> None:
        """Make taps forget their sums where the gradients of their parameters were cleared.

        Args:
            late: See `begin`.
        """
        if not self._marks:
            return
        touched = [m for marks in self._marks.values() for m in marks if m.is_touched()]
        # Zeros in some and not in others are no clearing: gradients may vanish by themselves.
        zeroed = bool(touched) and not any(bool(m.parameter.grad.any()) for m in touched)  # type: ignore[union-attr]
        gone = [
            place
            for place, marks in self._marks.items()
            if all(m.is_gone(late) or (zeroed and m.is_touched()) for m in marks)
        ]
        for place in gone:
            self.taps[place].clear()
            del self._marks[place]
        count = self.terms.counted
        if not self._marks:
            self.terms.clear()
            self.before = {}
        elif count is not None:
            self.before.update({place: count.clone() for place in gone})

    def _end(self) -> None:
        """Mark the gradients of all taps that have summed something."""
        self._running = False
        self._marks = {}
        for place, tap in self.taps.items():
            if tap.has_sums:
                found = [(p, p.grad) for p in self.readers[place]]
                self._marks[place] = [Mark(p, weakref.ref(g), g._version) for p, g in found if g is not None]
        self._marks = {place: marks for place, marks in self._marks.items() if marks}
