"""Curvature of one step: what the taps summed, turned into expectations, on one rank or over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.parallel import sum_over_ranks
from mupass._taps.blocks import Block, Cover, Factor, Place, Tied
from mupass._taps.factors import factor_dtype
from mupass._taps.intercept import intercept
from mupass._taps.leaves import Sums, Tap
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
        followers = _followers(cover)
        parameters = dict(root.named_parameters())
        device = next(iter(parameters.values())).device
        for place, layer in cover.layers.items():
            weight = parameters[place.parameter] if place.parameter else _any_parameter(root, place)
            tap = _tap(root, place)
            tap.open(
                layer, weight.device, factor_dtype(weight), sides[0] and place not in followers, sides[1]
            )
            self.taps[place] = tap
            device = weight.device
        terms = terms_tap_of(root)
        if terms is None:
            raise OptimizerError("the model has lost its taps; transform it again")
        self.terms = terms
        if self.taps and sides[1] and loss.terms is None:
            terms.open(device)

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
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            leaf.grad = grad

    def clear(self) -> None:
        """Forget what was summed."""
        self.terms.clear()
        for tap in self.taps.values():
            tap.clear()

    def take(self, scale: Tensor | float = 1.0) -> dict[Place, Sums]:
        """Take what was summed since the last call: A over rows, B over loss terms; empty if nothing was.

        Args:
            scale: What the loss was multiplied by (by a gradient scaler); B carries its square.
        """
        sums = {place: found for place, tap in self.taps.items() if (found := tap.take()) is not None}
        if not sums:
            return {}
        terms = self._count_terms() if self.sides[1] else 1.0
        if self.ranks > 1:
            sums, terms = self._over_ranks(sums, terms)
        # In place: the gradients of the leaves are ours. Each rank's mean divides by its own share of terms.
        for found in sums.values():
            if found.a is not None:
                found.a.div_(found.rows)
            for m in (*found.b, *found.moments):
                if m is not None:
                    own = _like(terms, m)
                    own = own / self.ranks**2 if self.loss.mean else 1 / own
                    m.mul_(own / _like(scale, m) ** 2)
        return sums

    def _over_ranks(
        self, sums: Mapping[Place, Sums], terms: Tensor | float
    ) -> tuple[dict[Place, Sums], Tensor]:
        """Sum raw factors, rows and loss terms over all ranks: the factors of the whole batch."""
        rows = next(iter(sums.values())).rows
        # Moments are not symmetric: sent flat, as all of their entries.
        flat = [
            m
            for s in sums.values()
            for m in (s.a, *s.b, s.rows, *(m.flatten(1) for m in s.moments))
            if m is not None
        ]
        *flat, total = sum_over_ranks([*flat, torch.as_tensor(terms, dtype=rows.dtype, device=rows.device)])
        rest = iter(flat)

        def summed(m: Tensor | None) -> Tensor | None:
            return None if m is None else next(rest)

        found = {}
        for place, s in sums.items():
            a, b, count = summed(s.a), tuple(summed(m) for m in s.b), next(rest)
            found[place] = Sums(a, b, count, tuple(next(rest).view_as(m) for m in s.moments))
        return found, total

    def _count_terms(self) -> Tensor | float:
        terms = self.loss.terms
        if terms is not None:
            return float(terms() if callable(terms) else terms)
        counted = self.terms.take()
        if counted is None:
            raise OptimizerError(
                "cannot tell how many terms the loss averages over: the model returns a scalar, or the loss "
                "is not computed from its first output. Pass loss_terms=, a number or a function of no "
                "arguments (samples for a classifier, tokens for a language model)"
            )
        return counted


def _like(number: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a number in the precision of a tensor, and where that is."""
    return number.to(like) if isinstance(number, Tensor) else number


def observed(factor: Factor, taken: Mapping[Place, Sums]) -> Tensor | None:
    """Return one factor of this step, or None where none of its taps took part.

    Args:
        factor: Where it comes from.
        taken: Result of `Curvature.take`.
    """
    raw = [taken[p] for p in factor.places if p in taken]
    if factor.side == "b":
        return _sum([m for sums in raw if (m := sums.b[factor.piece]) is not None])
    pairs = [(sums.a, sums.rows) for sums in raw if sums.a is not None]
    if len(pairs) < 2:
        return pairs[0][0] if pairs else None
    return torch.stack([a * n for a, n in pairs]).sum(0) / torch.stack([n for _, n in pairs]).sum(0)


def observed_moments(factor: Factor, taken: Mapping[Place, Sums]) -> Tensor | None:
    """Return the second moments of this step, or None where none of their taps took part.

    Args:
        factor: Output factor of their matrix, which knows its taps.
        taken: Result of `Curvature.take`.
    """
    return _sum([taken[p].moments[factor.piece] for p in factor.places if p in taken])


def _sum(found: list[Tensor]) -> Tensor | None:
    return None if not found else found[0] if len(found) == 1 else torch.stack(found).sum(0)


def nearest_product(tied: Tied, taken: Mapping[Place, Sums]) -> tuple[Tensor, Tensor] | None:
    """Return the Kronecker product nearest to ``A1 (x) B1 + B2 (x) A2`` in the Frobenius norm.

    Its factors lie in the spans of (A1, B2) and (B1, A2), so that alternating least squares works on two
    coefficients each (Van Loan & Pitsianis, 1993). The first factor is scaled to the trace of A1.

    Args:
        tied: The two uses.
        taken: Result of `Curvature.take`.
    """
    first, second = ([observed(f, taken) for f in pair] for pair in (tied.first, tied.second))
    if None in (*first, *second):  # one of the uses did not take part: the other is the curvature
        pair = first if None not in first else second[::-1]
        return None if None in pair else (pair[0], pair[1])  # type: ignore[return-value]
    left = torch.stack([first[0], second[1]])  # type: ignore[list-item]
    right = torch.stack([first[1], second[0]])  # type: ignore[list-item]
    gram_left, gram_right = (m.flatten(1) @ m.flatten(1).T for m in (left, right))
    y = torch.ones(2, dtype=left.dtype, device=left.device)
    tiny = torch.finfo(left.dtype).tiny
    for _ in range(20):
        x = gram_right @ y / (y @ gram_right @ y).clamp(min=tiny)
        y = gram_left @ x / (x @ gram_left @ x).clamp(min=tiny)
    p, q = (torch.tensordot(c, m, 1) for c, m in ((x, left), (y, right)))
    scale = _trace(p) / _trace(left[0]).clamp(min=tiny)
    return p / scale.clamp(min=tiny), q * scale


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1).sum()


def _followers(cover: Cover) -> set[Place]:
    """Return taps whose own input factor no block reads: another weight's serves."""
    read = {p for block in cover.blocks for f in _inputs(block) for p in f.places}
    return set(cover.layers) - read


def _inputs(block: Block) -> Iterable[Factor]:
    return (*block.a, *((block.tied.second[0],) if block.tied else ()))


def _tap(root: nn.Module, place: Place) -> Tap:
    if place.module is None:
        return intercept(root, place.parameter, place.key)
    tap = tap_of(root.get_submodule(place.module))
    if tap is None:
        raise OptimizerError(f"{place.module} has lost its tap; transform the model again")
    return tap


def _any_parameter(root: nn.Module, place: Place) -> Tensor:
    return next(root.get_submodule(place.module or "").parameters(recurse=False))
