"""Passes: which statistics belong to the gradients that a step will use.

Leaves sum over backward passes, as gradients do. Gradients may be cleared in between by other means than the
optimizer's ``zero_grad``: after an adversarial pass, or to look at the gradients of one loss alone. What was
summed before belongs to no step then. At the end of each pass the gradients are marked, and at the beginning
of the next one, before it adds to any of them, taps whose parameters have lost theirs forget their sums.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mupass._errors import MupassWarning
from mupass._parallel import local
from mupass._taps.blocks import Place
from mupass._taps.functions import read_by_functions, will_add_to
from mupass._taps.leaves import Tap
from mupass._taps.terms import TermsTap

LOOKED_AT = 10  # first passes before which gradients are looked for that no one cleared


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
        gradient = self.parameter.grad
        return gradient is None or (late and gradient is not self.gradient())

    def is_touched(self, by_data: bool) -> bool:
        """Return whether the gradient was changed in place.

        Args:
            by_data: Whether all gradients were, by ``gradient.data``, which leaves their versions alone.
        """
        gradient = self.parameter.grad
        if gradient is None or gradient is not self.gradient():
            return False
        return by_data or gradient._version != self.version


class Passes:
    """Backward passes since the last step.

    Attributes:
        before: Tap -> loss terms of the passes that it forgot and that others remember.
        watching: Whether the sums are of the gradients that a step uses, and not of a loss of their own.
    """

    def __init__(
        self, taps: Mapping[Place, Tap], terms: TermsTap, readers: Mapping[Place, Sequence[Tensor]]
    ) -> None:
        self.taps, self.terms = taps, terms
        self.readers = {place: list(parameters) for place, parameters in readers.items()}
        self.before: dict[Place, Tensor] = {}
        self.watching = True
        self._marks: dict[Place, list[Mark]] = {}
        self._running = False
        self._leaves_left_out = (-1, False)  # a pass, and whether it was given inputs= without the leaves
        self.derived: set[str] = set()  # parameters that a derivative in the loss read again
        self.twice: set[str] = set()  # parameters whose forward pass was run backwards more than once
        self.missed = ""  # what use a tap has met that it cannot see, if any
        self.looked_through = False  # whether a forward pass was looked through for such uses
        # See `GradientScale.saw_all`. Taps outlive their optimizer, which is not kept by them.
        self.accumulated: weakref.WeakMethod[Callable[[], bool]] | None = None
        self._awaits_first = False  # whether no pass was collected yet
        self._to_look_at = LOOKED_AT
        # The smallest gradient, and whether it was other than zero when it was marked, on its device.
        self._probe: tuple[Mark, Tensor] | None = None
        self._probes_to_look_at = LOOKED_AT
        self.stale: set[Place] = set()  # taps whose parameters had older gradients when a pass began
        for tap in taps.values():
            tap.watch(self)
        terms.passes = self

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Look at the gradients of another tensor from now on.

        Args:
            old: What a parameter was.
            new: What it is.
        """
        for readers in self.readers.values():
            readers[:] = [new if reader is old else reader for reader in readers]

    def differentiated(self, tap: object) -> None:
        """Keep in mind that a loss depends on a gradient that was made with a tap's parameter.

        Args:
            tap: The tap.
        """
        # torch.autograd.grad hands its gradients to the caller: no step sees a Hessian product, say.
        if self.watching and any(will_add_to(reader) for reader in self._readers_of(tap)):
            self.derived.add(self._name(tap))

    def repeated(self, tap: object) -> None:
        """Keep in mind that a second backward pass has run through one forward pass.

        Args:
            tap: The tap.
        """
        if self.watching:
            self.twice.add(self._name(tap))

    def leaves_out(self, tap: object, leaf: Tensor | None) -> bool:
        """Return whether the pass that runs adds to parameters' gradients, but not to those of leaves.

        Args:
            tap: The tap, whose parameters are asked for; of what is no tap all are.
            leaf: One of its leaves.
        """
        if not self.watching or leaf is None:
            return False
        # backward(inputs=list(model.parameters())) knows nothing of leaves.
        task = torch._C._current_graph_task_id()
        if task != self._leaves_left_out[0]:
            self._leaves_left_out = (task, leaf.requires_grad and will_add_to(leaf) is False)
        if not self._leaves_left_out[1]:
            return False
        return any(will_add_to(reader) for reader in self._readers_of(tap))

    def _readers_of(self, tap: object) -> list[Tensor]:
        """Return the parameters that a tap has factors of; of what is no tap all."""
        found: list[Tensor] = []
        for place, readers in self.readers.items():
            if tap is self.terms or tap is self.taps[place]:
                found += readers
        return found

    def _name(self, tap: object) -> str:
        """Return the parameter that a tap watches, or its module."""
        place = next(place for place, other in self.taps.items() if other is tap)
        return place.parameter or place.module or ""

    def miss(self, tap: object, how: str) -> None:
        """Warn, once, of a use that a tap cannot see.

        Args:
            tap: The tap.
            how: What use it is.
        """
        # A pass for a loss of its own, whose gradients no step uses, may use any transform.
        if not self.missed and self.watching:
            self.missed = how
            name = self._name(tap)
            warnings.warn(
                f"{name} is used {how}: K-FAC takes no statistics of that use. Where its gradients reach the "
                f"step, use it as in the captured pass, or leave it to the fallback with exclude=['{name}*']",
                MupassWarning,
                stacklevel=4,
            )

    def look_through(self, outputs: Sequence[Tensor]) -> None:
        """Warn, once, of tapped parameters that an autograd function of the caller's reads as they are.

        Its inside is hidden from taps, and so is that use, which may be one beside others: a fused loss that
        is given the table of a tied readout.

        Args:
            outputs: Of the model.
        """
        if self.looked_through or not self.watching:
            return
        self.looked_through = True
        for parameter, function in read_by_functions(outputs):
            for place, readers in self.readers.items():
                if any(parameter is reader for reader in readers):
                    self.miss(self.taps[place], f"by {function}, a torch.autograd.Function")

    def await_first(self) -> None:
        """Look, before the next pass, whether there are gradients that no pass of this step has made."""
        self._awaits_first = True

    def _look_for_old(self) -> None:
        """Note gradients that were not cleared, or written: a step uses them, and they left no statistics."""
        first, self._awaits_first = self._awaits_first, False
        if not first or not self._to_look_at or self.accumulated is None:
            return
        self._to_look_at -= 1
        saw_all = self.accumulated()
        if saw_all is None or saw_all():
            return
        for place, readers in self.readers.items():
            if any(reader.grad is not None and bool(local(reader.grad).any()) for reader in readers):
                self.stale.add(place)

    def take_stale(self, places: Collection[Place]) -> list[str]:
        """Return parameters whose gradients held older ones, among those that a step has statistics of.

        Args:
            places: Taps that took part.
        """
        names = [self._name(self.taps[place]) for place in self.taps if place in self.stale & set(places)]
        self.stale.clear()
        if names:
            self._to_look_at = 0  # it is told
        return list(dict.fromkeys(names))

    def restart(self) -> None:
        """Forget all passes: what they summed was taken or dropped."""
        # A pass that an exception stopped has no end.
        self._marks, self.before, self._running = {}, {}, False
        self._probe = None

    def begin(self, late: bool = False) -> None:
        """Look for cleared gradients if a backward pass has just begun, and have its end marked.

        Args:
            late: Whether the pass may have added to gradients already, as a compiled graph may.
        """
        # Every tap that a pass reaches calls this; the first call begins it.
        if self._running or not self.watching:
            return
        self._running = True
        if not late:  # zeros may have been added to already
            self._look_for_old()
        # Behind a compiled graph the new gradients may be there already.
        self.drop_cleared(late, by_data=not late and self._zeroed_by_data())
        # Called when the pass has added all gradients.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]

    def enter(self) -> None:
        """Look for cleared gradients: the model runs forward, so no pass that counts is under way."""
        # Inside of a backward pass it is a checkpoint that runs forward.
        stopped = self._running and torch._C._current_graph_task_id() == -1
        self._running = False
        if self.watching:
            self.drop_cleared()
            if stopped:
                self._drop_stopped()

    def _drop_stopped(self) -> None:
        """Make taps forget what a pass summed that an exception stopped, if its gradients were cleared.

        Such a pass has marked nothing.
        """
        for place, tap in self.taps.items():
            if not tap.has_sums or place in self._marks:
                continue
            gradients = [parameter.grad for parameter in self.readers[place] if parameter.grad is not None]
            if not any(bool(gradient.any()) for gradient in gradients):
                tap.clear()
        if not any(tap.has_sums for tap in self.taps.values()):
            self.terms.clear()

    def begin_late(self, gradient: Tensor) -> None:
        """Begin from a hook on a leaf, which runs behind all of a compiled graph.

        Args:
            gradient: That of the leaf, which is left alone.
        """
        self.begin(late=True)

    def drop_cleared(self, late: bool = False, by_data: bool = False) -> None:
        """Make taps forget their sums where the gradients of their parameters were cleared.

        Args:
            late: See `begin`.
            by_data: See `Mark.is_touched`.
        """
        if not self._marks:
            return
        zeroed = self._zeroed(by_data)
        cleared = []
        for place, marks in self._marks.items():
            # optimizer.zero_grad(), optimizer.zero_grad(set_to_none=False)
            if all(mark.is_gone(late) or (zeroed and mark.is_touched(by_data)) for mark in marks):
                cleared.append(place)
        for place in cleared:
            self.taps[place].clear()
            self.stale.discard(place)
            del self._marks[place]
        counted = self.terms.counted
        if not self._marks:
            self.terms.clear()
            self.before = {}
        elif counted is not None:
            # The count goes on for the others: what it is now does not belong to these.
            for place in cleared:
                self.before[place] = counted.clone()

    def _zeroed_by_data(self) -> bool:
        """Whether a gradient became zero by ``gradient.data.zero_()``, which autograd does not count.

        It waits for the device, so it is asked for before the first passes, and then only if it was met.
        """
        probe, self._probe = self._probe, None
        if probe is None or not self._probes_to_look_at:
            return False
        mark, was_there = probe
        if mark.is_gone(late=True) or mark.is_touched(by_data=False):
            return False
        self._probes_to_look_at -= 1
        found = bool(was_there) and not bool(local(mark.parameter.grad).any())  # type: ignore[arg-type]
        if found:
            self._probes_to_look_at = LOOKED_AT
        return found

    def _zeroed(self, by_data: bool) -> bool:
        """Whether gradients were set to zero in place.

        Zeros in some and not in others are no clearing: gradients may vanish by themselves.
        """
        touched = []
        for marks in self._marks.values():
            touched += [mark.parameter.grad for mark in marks if mark.is_touched(by_data)]
        return bool(touched) and not any(bool(gradient.any()) for gradient in touched)  # type: ignore[union-attr]

    def _end(self) -> None:
        """Mark the gradients of all taps that have summed something."""
        self._running = False
        self._marks = {}
        smallest: Mark | None = None
        for place, tap in self.taps.items():
            if not tap.has_sums:
                continue
            marks = []
            for parameter in self.readers[place]:
                # Frozen since, or without a part in this loss.
                gradient = parameter.grad
                if gradient is not None:
                    marks.append(Mark(parameter, weakref.ref(gradient), gradient._version))
            if marks:
                self._marks[place] = marks
            for mark in marks:
                if smallest is None or mark.parameter.numel() < smallest.parameter.numel():
                    smallest = mark
        if smallest is not None and self._probes_to_look_at:
            self._probe = (smallest, local(smallest.parameter.grad).any())  # type: ignore[arg-type]
