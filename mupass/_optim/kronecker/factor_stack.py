"""Stacks of Kronecker factors: those of equal shape in one tensor, averaged and inverted together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupass._optim.kronecker.update import Average, Root, by_root, whole
from mupass._optim.linalg.packed import blend, pack, packed_diagonal, packed_size
from mupass._optim.linalg.roots import diagonal_roots, inverse_roots
from mupass._optim.vocabulary import State

# Entries of the matrices that are inverted together: large ones gain nothing from company, and each needs
# room for several copies of itself.
AT_ONCE = 2**21
# The same for what is only read and multiplied: as much as stays in a cache.
IN_CACHE = 2**18
# The largest trace that is remembered fades, but not below this part of the largest one ever.
# An empirical B falls with the square of the gradient, so a direction grows like the inverse of the gradient:
# without memory a network that has solved its task is thrown out of its minimum, however late.
# The part is small: nothing changes until gradients have fallen by a factor of 100.
NEVER_BELOW = 1e-4
Slots = slice | Tensor


class FactorStack:
    """Moving averages of equally shaped factors, and their inverse roots.

    Nothing here waits for the device: what is not finite, or was never observed, is masked.

    Attributes:
        keys: What each slot belongs to.
        size: Size of the factors.
        diagonal: Whether they are diagonal.
        state: Tensors whose first axis counts slots; all of them belong to the saved state.
            ``factor`` are the averages, packed (see `mupass._optim.linalg.packed`) or diagonals, not
            corrected for their start from zero; ``root`` inverse roots of the same shape; ``weight`` the
            total weight of what was averaged; ``rows`` the number of rows of the last observation; ``peak``
            the largest trace of an average, and ``recent`` that of a single observation, both of which fade;
            ``highest`` the largest trace of an average ever, which does not;
            ``rooted`` the trace, and ``rho`` the damping, when the root was computed.
        failed: ``[K]`` number of factorizations that failed, and ``overflowed`` of observations that were
            not finite, since they were last reported; ``vanished`` of roots that were computed of a factor
            whose every observation was zero.
        fresh: Slots whose root is that of the present average.
    """

    def __init__(
        self, keys: list[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = keys
        self.slot = {key: number for number, key in enumerate(keys)}
        self.size, self.diagonal = shape[-1], len(shape) == 1
        self.dtype, self.device = dtype, device
        numbers = {
            name: self._zeros() for name in ("weight", "rows", "peak", "highest", "recent", "rooted", "rho")
        }
        self.state = {**self._matrices(), **numbers}
        self.failed, self.overflowed, self.vanished = self._zeros(), self._zeros(), self._zeros()
        self.fresh: set[int] = set()
        self._traces: Tensor | None = None  # until the averages change, and so for the next
        self._divisors: Tensor | None = None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.keys), *shape, dtype=self.dtype, device=self.device)

    def _matrices(self) -> State:
        """Return the averages and roots before the first step."""
        numbers = self.size if self.diagonal else packed_size(self.size)
        return {"factor": self._zeros(numbers), "root": self._zeros(numbers)}

    def average(
        self,
        new: Mapping[Any, tuple[Tensor, Tensor]],
        decay: float,
        memory: float = 0.0,
        ok: Tensor | None = None,
    ) -> None:
        """Add one observation of each factor to the moving averages.

        A factor with no observation, or with one that is not finite (an overflow), keeps its average: one bad
        batch must not stay in it for good.

        Args:
            new: Key -> observed factor, or several stacked, for the slots from that key on; and in how many
                rows it was observed, 0 where it was not: a tensor of one entry, or of one for each of as many
                groups.
            decay: Weight of the past; 0 keeps only the new ones.
            memory: What is left of the largest trace seen so far.
            ok: Whether the observations count at all; a scalar on the device.
        """
        self.changed()
        for at, observed, rows in self._runs(new):
            self.fresh -= set(range(at.start, at.stop))
            # A factor is semi-definite: no entry is larger than the trace, and NaN or inf is on the diagonal.
            traces = _trace(observed)
            finite, there = traces.isfinite(), rows > 0
            if ok is not None:
                there = there & ok
            counts = finite & there
            self.overflowed[at] += ~finite & there
            # average <- decay average + (1 - decay) factor; where nothing counts it stays.
            kept = counts.to(self.dtype)
            fresh = kept * (1 - decay)
            self._blend(at, observed, fresh)
            weight = self.state["weight"][at]
            weight.lerp_(torch.ones_like(weight), fresh)
            self.state["rows"][at] = torch.where(counts, rows, self.state["rows"][at])
            self._divisors = None
            # Both peaks fade, each at its own pace, unless the new trace is larger.
            peak, highest, trace = self.state["peak"][at], self.state["highest"][at], self._trace(at)
            torch.maximum(peak * (1 - (1 - memory) * kept), trace, out=peak)
            torch.maximum(highest, trace, out=highest)
            recent = self.state["recent"][at]
            jump = torch.where(counts, traces, 0.0)
            torch.maximum(recent * (1 - (1 - decay) * kept), jump, out=recent)

    def _runs(self, new: Mapping[Any, tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield observations of slots that stand together, so many at a time as are worth it.

        Each comes as the slots, the factors ``[k, n, n]`` or ``[k, n]``, and their numbers of rows, ``[k]``.
        """
        room = max(1, IN_CACHE // self.size ** (self._dims - 1))
        start = 0
        parts: list[Tensor] = []
        numbers: list[Tensor] = []
        for key in sorted(new, key=self.slot.__getitem__):
            observed, rows = new[key]
            if observed.dim() == self._dims - 1:
                observed = observed[None]
            end = start + len(numbers)
            if parts and (self.slot[key] != end or len(numbers) + len(observed) > room):
                yield slice(start, end), joined(parts), torch.stack(numbers)
                parts, numbers = [], []
            if not parts:
                start = self.slot[key]
            parts.append(observed.to(self.dtype))
            rows = rows.to(self.dtype)
            if rows.numel() == 1:
                numbers += [rows.reshape(())] * len(observed)
            else:  # of every group, which may have several blocks
                numbers += rows.repeat_interleave(len(observed) // len(rows)).unbind()
        if parts:
            yield slice(start, start + len(numbers)), joined(parts), torch.stack(numbers)

    @property
    def _dims(self) -> int:
        """Number of axes of several factors: ``[K, n, n]`` or ``[K, n]``."""
        return 2 if self.diagonal else 3

    def _blend(self, at: slice, observed: Tensor, fresh: Tensor) -> None:
        """Move the averages of some slots towards new factors, each by its own fraction."""
        factor = self.state["factor"][at]
        if self.diagonal:
            factor.lerp_(observed.nan_to_num(0.0, 0.0, 0.0), fresh[:, None])
            return
        blend(factor, observed, fresh)

    def value(self, at: Slots = slice(None)) -> Tensor:
        """Return the averages, whole and corrected for the start from zero; zeros for what was never seen.

        Args:
            at: Slots; all by default.
        """
        kept = self.state["factor"][at]
        return whole(kept / _along(self._weights()[at], kept), self._packed)

    def _weights(self) -> Tensor:
        """Return what the sums are to be divided by; 1 for what was never seen."""
        if self._divisors is None:
            weight = self.state["weight"]
            self._divisors = torch.where(weight > 0, weight, 1.0)
        return self._divisors

    def _trace(self, at: slice = slice(None)) -> Tensor:
        """Return the traces of the averages of some slots."""
        return self._diagonal(at).sum(-1) / self._weights()[at]

    def _diagonal(self, at: slice) -> Tensor:
        """Return the diagonals of the sums of some slots, ``[K, n]``."""
        factor = self.state["factor"][at]
        if self.diagonal:
            return factor
        return packed_diagonal(factor, self.size)

    def changed(self) -> None:
        """Take notice that averages have changed."""
        self._traces = self._divisors = None

    def traces(self) -> Tensor:
        """Return the trace of every factor, ``[K]``."""
        if self._traces is None:
            self._traces = self._trace()
        return self._traces

    def forget(self) -> None:
        """Take notice that the state was written from outside."""
        self.changed()
        # A root is that of the present average where the trace is still what it was.
        same = (self.traces() == self.state["rooted"]) & (self.state["weight"] > 0)
        self.fresh = set(same.nonzero().flatten().tolist())

    def remembered(self) -> Tensor:
        """Return the largest trace of every factor so far, ``[K]``, as far as it has not faded."""
        lasting = NEVER_BELOW * self.state["highest"]
        return torch.maximum(torch.maximum(self.traces(), self.state["peak"]), lasting)

    def memory(self) -> Tensor:
        """Return by how much the largest trace remembered exceeds the present one, ``[K]``, at least 1."""
        now, peak = self.traces(), self.remembered()
        # Divided where it is taken only: a quotient by zero has the derivative NaN even where it is left out.
        alive, one = now > 0, torch.ones_like(now)
        return torch.where(alive, peak / torch.where(alive, now, one), one).clamp(min=1.0)

    def grown(self, jumps: bool = False) -> Tensor:
        """Return by how much every factor has grown since its root was computed, ``[K]``, at least 1.

        It is infinite for a factor that was zero then: its root says nothing.

        Args:
            jumps: Whether a single observation counts as much as their average, where it is larger: a
                gradient that jumps is in the mean of gradients sooner than in that of its squares.
        """
        now = self.traces()
        if jumps:
            now = torch.maximum(now, self.state["recent"])
        return growth(now, self.state["rooted"])

    def _begin(self, slots: Sequence[int]) -> Tensor:
        """Note from what roots are computed, and return the slots on the device."""
        at = torch.tensor(slots, device=self.device)
        self.fresh.update(slots)
        traces = self.traces()[at]
        self.state["rooted"][at] = traces
        self.vanished[at] += (traces <= 0) & (self.state["weight"][at] > 0)
        return at

    def refresh(self, damping: Tensor, power: float, slots: Sequence[int], relative: bool = False) -> None:
        """Recompute inverse roots; a factor whose factorization fails keeps the root that it had.

        Args:
            damping: ``[K]``.
            power: Power of the inverse.
            slots: Those to recompute.
            relative: Whether damping is relative to each factor's largest eigenvalue.
        """
        at = self._begin(slots)
        if self.diagonal:
            value, rho = self.value(at), damping[at]
            if relative:
                rho = rho * value.amax(-1)
            self.state["root"][at] = diagonal_roots(value, rho, power)
            self.state["rho"][at] = rho
            return
        for part in torch.split(at, max(1, AT_ONCE // self.size**2)):
            rho = damping[part]
            root, failed = inverse_roots(self.value(part), rho, power, relative)
            # What fails keeps its old root, with the damping that this has.
            self._put("root", part, pack(root.to(self.dtype)), failed)
            self._put("rho", part, rho, failed)
            self.failed[part] += failed

    def _put(self, name: str, at: Tensor, new: Tensor, failed: Tensor) -> None:
        """Write a part of the state of some slots, but for those that failed."""
        old = self.state[name][at]
        self.state[name][at] = torch.where(_along(failed, new), old, new)

    def is_fresh(self, first: int, count: int) -> bool:
        """Return whether the roots of some slots are those of their present averages.

        Args:
            first: First slot.
            count: Number of slots.
        """
        return self.fresh.issuperset(range(first, first + count))

    def root(self, at: Slots, grown: Tensor, power: float) -> Root:
        """Return the roots of some slots.

        Args:
            at: The slots.
            grown: Result of `grown` for all slots.
            power: Power of the inverse.
        """
        return Root(by_root, (self.state["root"][at],), self._packed, grown[at], power)

    def mean(self, at: Slots) -> Average:
        """Return the averages of some slots.

        Args:
            at: The slots.
        """
        return Average(self.state["factor"][at], self._packed, self._weights()[at])

    @property
    def _packed(self) -> int:
        """Size of the matrices that are kept packed, or 0."""
        return 0 if self.diagonal else self.size


def growth(now: Tensor, then: Tensor) -> Tensor:
    """Return by how much traces have grown, at least 1; infinite for those that were zero.

    Args:
        now: The traces.
        then: What they were.
    """
    known = then > 0
    # Divided where it is known only, for the derivative.
    ratio = now / torch.where(known, then, torch.ones_like(then))
    grown = torch.where(now > then, ratio, torch.ones_like(now))
    return torch.where((now > then) & ~known, torch.inf, grown)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return stacks as one; of one that stack, which may be large.

    Args:
        parts: The stacks.
    """
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _along(numbers: Tensor, factors: Tensor) -> Tensor:
    """Return ``[K]`` numbers in a form that goes with ``[K]``, ``[K, n, n]`` or ``[K, n]``."""
    return numbers.view(-1, *[1] * (factors.dim() - 1))


def _trace(factors: Tensor) -> Tensor:
    """Return the traces of ``[K, n, n]`` matrices or ``[K, n]`` diagonals."""
    if factors.dim() == 3:
        factors = factors.diagonal(dim1=-2, dim2=-1)
    return factors.sum(-1)
