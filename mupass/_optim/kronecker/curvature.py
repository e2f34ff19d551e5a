"""Curvature of one step: what the taps summed, turned into expectations, on one rank or over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._parallel import sum_over_ranks
from mupass._taps.blocks import Cover, Factor, Place, Tied
from mupass._taps.factors import factor_dtype
from mupass._taps.intercept import intercept
from mupass._taps.leaves import Once, Sums, Tap
from mupass._taps.passes import Passes
from mupass._taps.taps import tap_of
from mupass._taps.terms import terms_tap_of


@dataclass(frozen=True)
class Loss:
    """How the loss is made of terms.

    Attributes:
        terms: Number of terms that it averages over, or a function giving it; None counts them.
        mean: Whether it is their mean, or their sum.
    """

    terms: int | Callable[[], int] | None
    mean: bool


class Curvature:
    """Taps of a model, and the factors that they see."""

    def __init__(
        self, root: nn.Module, cover: Cover, sides: tuple[bool, bool], loss: Loss, ranks: int
    ) -> None:
        self.loss, self.ranks, self.sides = loss, ranks, sides
        self.taps: dict[Place, Tap] = {}
        parameters = dict(root.named_parameters())
        device = next(iter(parameters.values())).device
        for place, layer in cover.layers.items():
            weight = parameters[place.parameter] if place.parameter else _any_parameter(root, place)
            tap = _tap(root, place)
            tap.open(layer, weight.device, factor_dtype(weight), *sides)
            self.taps[place] = tap
            device = weight.device
        self.together = cover.together
        for group in cover.together:
            once = Once()
            for place in group:
                self.taps[place].once = once
        terms = terms_tap_of(root)
        if terms is None:
            raise OptimizerError("the model has lost its taps; transform it again")
        self.terms = terms
        if self.taps and sides[1] and loss.terms is None:
            terms.open(device)
        self.passes = Passes(self.taps, terms, _readers(cover, parameters))

    def rescale(self, bases: Mapping[Place, Sequence[Tensor]]) -> None:
        """Collect second moments as well.

        Args:
            bases: Tap -> basis of its input, then of the output of every matrix.
        """
        for place, own in bases.items():
            self.taps[place].rescale(own)

    def collect(self, on: bool) -> None:
        """Collect factors in the passes that follow, or stop.

        Args:
            on: Whether to collect.
        """
        self.terms.collect(on)
        for tap in self.taps.values():
            tap.collect(on)

    def differentiate(self, loss: Tensor) -> None:
        """Add the factors of a loss to what was summed, without touching the gradients of parameters.

        Args:
            loss: Computed while factors were collected.
        """
        self.clear()
        leaves = [leaf for tap in self.taps.values() for leaf in tap.leaves]
        leaves += [] if self.terms.count is None else [self.terms.count]
        self.passes.watching = False
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            leaf.grad = grad

    def clear(self) -> None:
        """Forget what was summed."""
        self.passes.restart()
        self.terms.clear()
        for tap in self.taps.values():
            tap.clear()

    def take(self, scale: Tensor | float = 1.0) -> dict[Place, Sums]:
        """Take what was summed since the last call: A over rows, B over loss terms; empty if nothing was.

        Args:
            scale: What the loss was multiplied by (by a gradient scaler); B carries its square.
        """
        self.passes.drop_cleared()
        before = dict(self.passes.before)
        self.passes.restart()
        sums = {place: found for place, tap in self.taps.items() if (found := tap.take()) is not None}
        if self.ranks > 1:
            sums = self._on_all_ranks(sums)
        if not sums:
            self.terms.clear()
            return {}
        terms = self._count_terms() if self.sides[1] else torch.ones(())
        if self.ranks > 1:
            sums, terms, before = self._over_ranks(sums, terms, before)
            if not float(terms):
                raise _no_terms()
        for place, found in sums.items():
            own = terms - before[place].to(terms) if place in before else terms
            # In place: the gradients of the leaves are ours. Without a row, as of an expert that got no
            # sample, there is nothing to divide: `observed` says that the tap took no part.
            if found.a is not None:
                found.a.div_(found.rows.clamp(min=1))
            for m in (*found.b, *found.moments):
                if m is not None:
                    share = _like(own, m)
                    # Each rank's mean divides by its own share of terms.
                    share = share / self.ranks**2 if self.loss.mean else 1 / share
                    m.mul_(share / _like(scale, m) ** 2)
        return sums

    def _on_all_ranks(self, sums: Mapping[Place, Sums]) -> dict[Place, Sums]:
        """Add zeros of taps that took part on other ranks only: not every layer runs on every rank."""
        like = next(iter(self.taps.values())).rows
        assert like is not None
        (present,) = sum_over_ranks([like.new_tensor([float(place in sums) for place in self.taps])])
        taking = [place for place, count in zip(self.taps, present.tolist(), strict=True) if count]
        return {place: sums[place] if place in sums else self.taps[place].zeros() for place in taking}

    def _copies(self, sums: Mapping[Place, Sums]) -> dict[Place, Place]:
        """Return taps whose input factor is that of another one on all ranks: tap -> the other one."""
        pairs = [(other, group[0]) for group in self.together for other in group[1:]]
        pairs = [(other, first) for other, first in pairs if other in sums and first in sums]
        if not pairs or not self.sides[0]:
            return {}
        differing = [torch.ne(sums[other].a, sums[first].a).any() for other, first in pairs]  # type: ignore[arg-type]
        (counts,) = sum_over_ranks([torch.stack(differing).float()])
        return {other: first for (other, first), n in zip(pairs, counts.tolist(), strict=True) if not n}

    def _over_ranks(
        self, sums: Mapping[Place, Sums], terms: Tensor, before: Mapping[Place, Tensor]
    ) -> tuple[dict[Place, Sums], Tensor, dict[Place, Tensor]]:
        """Sum raw factors, rows and loss terms over all ranks: the factors of the whole batch."""
        copies = self._copies(sums)
        rows = next(iter(sums.values())).rows
        # Which taps forgot passes may differ between ranks: one number for each, most often 0.
        numbers = _numbers([terms, *before.values()])
        own = dict(zip(before, numbers[1:], strict=True))
        counts = rows.new_tensor([numbers[0], *(own.get(place, 0.0) for place in sums)])
        # Moments are not symmetric: sent flat, as all of their entries.
        flat = [
            m
            for place, s in sums.items()
            for m in (None if place in copies else s.a, *s.b, s.rows, *(m.flatten(1) for m in s.moments))
            if m is not None
        ]
        *flat, counts = sum_over_ranks([*flat, counts])
        rest = iter(flat)

        def summed(m: Tensor | None) -> Tensor | None:
            return None if m is None else next(rest)

        found: dict[Place, Sums] = {}
        for place, s in sums.items():
            a = s.a if place in copies else summed(s.a)
            b, count = tuple(summed(m) for m in s.b), next(rest)
            found[place] = Sums(a, b, count, tuple(next(rest).view_as(m) for m in s.moments))
        for place, other in copies.items():
            found[place] = found[place]._replace(a=found[other].a.clone())  # type: ignore[union-attr]
        total, *dropped = counts.unbind()
        return found, total, dict(zip(sums, dropped, strict=True))

    def _count_terms(self) -> Tensor:
        terms = self.loss.terms
        if terms is not None:
            return torch.tensor(float(terms() if callable(terms) else terms), dtype=torch.float64)
        counted = self.terms.take()
        if counted is None and self.ranks == 1:
            raise _no_terms()
        return torch.zeros(()) if counted is None else counted


def _like(number: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a number in the precision of a tensor, and where that is."""
    return number.to(like) if isinstance(number, Tensor) else number


def _no_terms() -> OptimizerError:
    return OptimizerError(
        "cannot tell how many terms the loss averages over: the model returns a scalar, or the loss "
        "is not computed from its output. Pass loss_terms=, a number or a function of no arguments "
        "(samples for a classifier, tokens for a language model)"
    )


Observation = tuple[Tensor, Tensor]  # a factor, and whether any row was observed


def observed(factor: Factor, taken: Mapping[Place, Sums]) -> Observation | None:
    """Return one factor of this step, and whether it has a row at all; None where no tap took part.

    Args:
        factor: Where it comes from.
        taken: Result of `Curvature.take`.
    """
    raw = [taken[p] for p in factor.places if p in taken]
    if factor.side == "b":
        found = [m for sums in raw if (m := sums.b[factor.piece]) is not None]
        if not found:
            return None
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        return total if factor.scale == 1 else total * factor.scale, _any_row(raw)
    pairs = [(sums.a, sums.rows) for sums in raw if sums.a is not None]
    if len(pairs) < 2:
        return (pairs[0][0], pairs[0][1] > 0) if pairs else None
    rows = torch.stack([n for _, n in pairs]).sum(0)
    return torch.stack([a * n for a, n in pairs]).sum(0) / rows.clamp(min=1), rows > 0


def observed_moments(factor: Factor, taken: Mapping[Place, Sums]) -> Observation | None:
    """Return the second moments of this step, as `observed` does.

    Args:
        factor: Output factor of their matrix, which knows its taps.
        taken: Result of `Curvature.take`.
    """
    raw = [taken[p] for p in factor.places if p in taken]
    if not raw:
        return None
    found = [sums.moments[factor.piece] for sums in raw]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0), _any_row(raw)


def _any_row(raw: Sequence[Sums]) -> Tensor:
    rows = [sums.rows for sums in raw]
    return (rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)) > 0


def nearest_product(tied: Tied, taken: Mapping[Place, Sums]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Return the Kronecker product nearest to ``A1 (x) B1 + B2 (x) A2`` in the Frobenius norm.

    Its factors lie in the spans of (A1, B2) and (B1, A2), so that alternating least squares works on two
    coefficients each (Van Loan & Pitsianis, 1993). The first factor is scaled to the trace of A1.

    Args:
        tied: The two uses.
        taken: Result of `Curvature.take`.
    """
    seen = [[observed(f, taken) for f in pair] for pair in (tied.first, tied.second)]
    first, second = ([o[0] for o in pair if o is not None] for pair in seen)
    rows = [o[1] for pair in seen for o in pair if o is not None]
    if len(first) < 2 or len(second) < 2:  # one of the uses did not take part: the other is the curvature
        pair = first if len(first) == 2 else second[::-1]
        return ((pair[0], pair[1]), torch.stack(rows).any(0)) if len(pair) == 2 else None
    left, right = torch.stack([first[0], second[1]]), torch.stack([first[1], second[0]])
    gram_left, gram_right = (m.flatten(1) @ m.flatten(1).T for m in (left, right))
    y = torch.ones(2, dtype=left.dtype, device=left.device)
    tiny = torch.finfo(left.dtype).tiny
    for _ in range(20):
        x = gram_right @ y / (y @ gram_right @ y).clamp(min=tiny)
        y = gram_left @ x / (x @ gram_left @ x).clamp(min=tiny)
    p, q = (torch.tensordot(c, m, 1) for c, m in ((x, left), (y, right)))
    scale = _trace(p) / _trace(left[0]).clamp(min=tiny)
    return (p / scale.clamp(min=tiny), q * scale), torch.stack(rows).any(0)


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1).sum()


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of tensors of one entry, fetched together from the device of the last one."""
    device = tensors[-1].device
    return torch.cat([t.reshape(1).to(device) for t in tensors]).tolist()  # type: ignore[no-any-return]


def _readers(cover: Cover, parameters: Mapping[str, Tensor]) -> dict[Place, list[Tensor]]:
    """Return tap -> the parameters whose factors it adds to."""
    found: dict[Place, list[Tensor]] = {place: [] for place in cover.layers}
    for block in cover.blocks:
        second = block.tied.second if block.tied else ()
        for place in dict.fromkeys(p for f in (*block.a, *block.b, *second) for p in f.places):
            found[place].append(parameters[block.parameter])
    return found


def _tap(root: nn.Module, place: Place) -> Tap:
    if place.module is None:
        return intercept(root, place.parameter, place.key)
    tap = tap_of(root.get_submodule(place.module))
    if tap is None:
        raise OptimizerError(f"{place.module} has lost its tap; transform the model again")
    return tap


def _any_parameter(root: nn.Module, place: Place) -> Tensor:
    return next(root.get_submodule(place.module or "").parameters(recurse=False))
