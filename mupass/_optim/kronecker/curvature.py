"""Curvature of one step: what the taps summed, turned into expectations, on one rank or over all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupass._errors import OptimizerError
from mupass._optim.kronecker.settings import Loss
from mupass._optim.vocabulary import Tensors
from mupass._parallel import sum_over_ranks
from mupass._taps.blocks import Cover, Factor, Place, Tied
from mupass._taps.factors import by_group, factor_dtype
from mupass._taps.intercept import intercept, note_hook
from mupass._taps.leaves import Once, Sums, Tap
from mupass._taps.loss_form import FORM
from mupass._taps.passes import Passes
from mupass._taps.taps import keep_in_front, tap_of
from mupass._taps.terms import terms_tap_of

SUMMED = 2.0  # a loss that is more than so many means of cross-entropies is summed, or multiplied
MANY = 0.25  # part of the loss terms that may be without a gradient by chance
MORE = 1.5  # loss terms to a row of the readouts, beyond which an output was made flat
# Distance of an output from the target of a squared error beyond which `target_scale` is asked for: there
# K-FAC's bounds leave a loss many times that of targets of size 1 (benchmarks/target_units.py).
FAR = 8.0


class Curvature:
    """Taps of a model, and the factors that they see.

    Attributes:
        slope: Mean over loss terms of the squared gradient by the model's output, of the step whose factors
            were taken last: the sum over all entries of the output that terms are counted on. 0 where no loss
            passed through it, as where the model returns its loss.
        doubtful: What speaks against how the loss is taken -> in how many steps or passes, on the device:
            ``idle_loss_terms`` (many terms had no gradient), ``summed_loss`` (it was no mean),
            ``classes_elsewhere`` (on another axis), ``flat_output`` (a vector of more entries than readouts
            have rows), ``far_targets`` (of a squared error).
    """

    def __init__(
        self,
        root: nn.Module,
        cover: Cover,
        sides: tuple[bool, bool],
        loss: Loss,
        ranks: int,
        readouts: Collection[str],
    ) -> None:
        self.loss, self.ranks, self.sides = loss, ranks, sides
        parameters = dict(root.named_parameters())
        self.taps: dict[Place, Tap] = {}
        weight: Tensor = next(iter(parameters.values()))
        for place, layer in cover.layers.items():
            weight = _tapped_weight(root, parameters, place)
            tap = self.taps[place] = _tap(root, place)
            tap.open(layer, weight.device, factor_dtype(weight), *sides)
        # Taps that read one activation compute its factor once.
        self.together = cover.together
        for group in cover.together:
            once = Once()
            for place in group:
                self.taps[place].once = once
        terms = terms_tap_of(root)
        if terms is None:
            raise OptimizerError("the model has lost its taps; transform it again")
        self.terms = terms
        self.slope = torch.zeros(())
        self.doubtful: dict[str, Tensor] = {}
        # Outputs are looked at only where B is collected.
        if self.taps and sides[1]:
            terms.open(weight.device, factor_dtype(weight), counts=loss.loss_terms is None)
        self.passes = Passes(self.taps, terms, _readers(cover, parameters))
        self._readouts = _readout_taps(cover, readouts)
        self._hooked = [root.get_submodule(place.module) for place in self.taps if place.module is not None]
        for module in self._hooked:
            note_hook(module)

    def rescale(self, bases: Mapping[Place, Sequence[Tensor]]) -> None:
        """Collect second moments as well.

        Args:
            bases: Tap -> basis of its input, then of the output of every matrix.
        """
        for place, tap_bases in bases.items():
            self.taps[place].rescale(tap_bases)

    def collect(self, on: bool) -> None:
        """Collect factors in the passes that follow, or stop.

        Args:
            on: Whether to collect.
        """
        self.terms.collect(on)
        if on:
            self.passes.await_first()
        for tap in self.taps.values():
            tap.collect(on)
        for module in self._hooked:
            keep_in_front(module)

    def differentiate(self, loss: Tensor) -> None:
        """Add the factors of a loss to what was summed, without touching the gradients of parameters.

        Args:
            loss: Computed while factors were collected.
        """
        self.clear()
        leaves: list[Tensor] = []
        for tap in self.taps.values():
            leaves += tap.leaves
        if self.terms.count is not None:
            leaves.append(self.terms.count)
        # Gradients of this loss are no step's, so that clearing them means nothing.
        self.passes.watching = False
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient

    def clear(self) -> None:
        """Forget what was summed."""
        self.passes.restart()
        self.passes.stale.clear()
        self.terms.clear()
        for tap in self.taps.values():
            tap.clear()
        # The model may have got hooks since the last step.
        for module in self._hooked:
            keep_in_front(module)

    def take(self, scale: Tensor | float = 1.0, clipped: Tensor | None = None) -> dict[Place, Sums]:
        """Take what was summed since the last call: A over rows, B over loss terms; empty if nothing was.

        Args:
            scale: What the loss was multiplied by (by a gradient scaler); B carries its square.
            clipped: What gradients were multiplied by since. The curvature of a loss that is a multiple is
                that multiple.
        """
        # Passes whose gradients were cleared since do not belong to this step.
        self.passes.drop_cleared()
        before = dict(self.passes.before)
        self.passes.restart()
        sums = self._take_sums()
        if not sums:
            self.terms.clear()
            return {}
        terms, squares = torch.ones(()), torch.zeros(())
        # Read before the terms are taken, with which these are forgotten.
        reach, is_vector, elsewhere = self.terms.reach, self.terms.is_vector, self.terms.elsewhere
        if self.sides[1]:
            self._look_at_the_loss(scale)
            terms, squares = self._count_terms()
        if self.ranks > 1:
            sums, terms, squares, before = self._over_ranks(sums, terms, squares, before)
            if not float(terms):
                raise _no_terms()
        if is_vector and elsewhere is not None:
            self._look_for_flat_output(sums, terms, elsewhere)
        # As what taps see, but without the clipping that came later.
        self.slope = squares * self._per_term(terms, scale, squares)
        if reach is not None and self.loss.target_scale is None and self.loss.mean:
            distance = self.slope.sqrt() * reach.to(self.slope)
            self._doubt("far_targets", distance.isfinite() & (distance > FAR))
        for place, raw in sums.items():
            own_terms = terms
            # Terms of passes that a tap has forgotten are none of its own.
            if place in before:
                own_terms = terms - before[place].to(terms)
            self._average(raw, own_terms, scale, clipped)
        return sums

    def _take_sums(self) -> dict[Place, Sums]:
        """Return what taps have summed, on any rank."""
        sums: dict[Place, Sums] = {}
        for place, tap in self.taps.items():
            taken = tap.take()
            if taken is not None:
                sums[place] = taken
        return self._on_all_ranks(sums) if self.ranks > 1 else sums

    def _look_for_flat_output(self, sums: Mapping[Place, Sums], terms: Tensor, elsewhere: Tensor) -> None:
        """Count a vector of outputs with more entries, each taken for a term, than readouts have rows."""
        rows = [sums[place].rows.sum() for place in self._readouts if place in sums]
        if rows:
            flat = MORE * torch.stack(rows).sum() < _like(terms, rows[0])
            self._doubt("flat_output", flat & (elsewhere == 0))

    def _per_term(self, terms: Tensor, scale: Tensor | float, like: Tensor) -> Any:
        """Return what turns a sum of squared gradients of the loss into a mean over squares of its terms.

        Args:
            terms: Number of terms.
            scale: What the loss was multiplied by.
            like: Of the precision of the result.
        """
        count = _like(terms, like)
        # The gradient of a mean over T terms is 1/T of that of each: T^2 / T.
        # Each rank's mean divides by its own share of terms.
        factor = count / self.ranks**2 if self.loss.mean else 1 / count
        # A loss that is scaled by s has gradients that are s times as large, and B goes with s^2.
        # Where outputs are measured in units of u, B is divided by u^2: its inverse times the gradient is
        # then a change of outputs in these units.
        return factor / (_like(scale, like) * self.loss.unit) ** 2

    def _average(self, sums: Sums, terms: Tensor, scale: Tensor | float, clipped: Tensor | None) -> None:
        """Divide sums by numbers of rows and of loss terms.

        In place: the gradients of the leaves are ours. Without a row, as of an expert that got no sample,
        there is nothing to divide: `observed` says that the tap took no part.
        """
        # A is a mean over rows, whatever multiplies the loss.
        if sums.a is not None:
            sums.a.div_(by_group(sums.rows, sums.a).clamp(min=1))
        factor: Any = None
        for matrix in (*sums.b, *sums.moments):
            if matrix is None:
                continue
            if factor is None:
                factor = self._per_term(terms, scale, matrix)
                if clipped is not None:
                    factor = factor * clipped.to(matrix)
            matrix.mul_(factor)

    def _on_all_ranks(self, sums: Mapping[Place, Sums]) -> dict[Place, Sums]:
        """Add zeros of taps that took part on other ranks only: not every layer runs on every rank."""
        # One flag for each tap: does it have sums on any rank?
        like = next(iter(self.taps.values())).rows
        assert like is not None
        (present,) = sum_over_ranks([like.new_tensor([float(place in sums) for place in self.taps])])
        taking = [place for place, count in zip(self.taps, present.tolist(), strict=True) if count]
        return {place: sums[place] if place in sums else self.taps[place].zeros() for place in taking}

    def _copies(self, sums: Mapping[Place, Sums]) -> dict[Place, Place]:
        """Return taps whose input factor is that of another one on all ranks: tap -> the other one."""
        if not self.sides[0]:
            return {}
        pairs: list[tuple[Place, Place]] = []
        differing = []
        for first, *others in self.together:
            for other in others:
                # The same input on this rank may still differ on another one.
                if first in sums and other in sums:
                    pairs.append((other, first))
                    differing.append(torch.ne(sums[other].a, sums[first].a).any())  # type: ignore[arg-type]
        if not pairs:
            return {}
        (counts,) = sum_over_ranks([torch.stack(differing).float()])
        return {
            other: first for (other, first), count in zip(pairs, counts.tolist(), strict=True) if not count
        }

    def _over_ranks(
        self, sums: Mapping[Place, Sums], terms: Tensor, squares: Tensor, before: Mapping[Place, Tensor]
    ) -> tuple[dict[Place, Sums], Tensor, Tensor, dict[Place, Tensor]]:
        """Sum raw factors, rows, loss terms and squares over all ranks: those of the whole batch."""
        copies = self._copies(sums)
        # All in one message: factors, rows, and the numbers of terms.
        rows = next(iter(sums.values())).rows
        # Which taps forgot passes may differ between ranks: one number for each, most often 0.
        total, square, *dropped = _numbers([terms, squares, *before.values()])
        dropped_by_place = dict(zip(before, dropped, strict=True))
        counts = rows.new_tensor([total, square, *(dropped_by_place.get(place, 0.0) for place in sums)])
        message: list[Tensor] = []
        for place, raw in sums.items():
            if raw.a is not None and place not in copies:
                message.append(raw.a)
            message += [matrix for matrix in raw.b if matrix is not None]
            message.append(raw.rows)
            # Moments are not symmetric: sent flat, as all of their entries.
            message += [moments.flatten(1) for moments in raw.moments]
        # Taken apart below in the order in which it was put together.
        *parts, counts = sum_over_ranks([*message, counts])
        received = iter(parts)
        summed: dict[Place, Sums] = {}
        for place, raw in sums.items():
            input_factor = raw.a
            if input_factor is not None and place not in copies:
                input_factor = next(received)
            output_factors = tuple(None if matrix is None else next(received) for matrix in raw.b)
            own_rows = next(received)
            moments = tuple(next(received).view_as(like) for like in raw.moments)
            summed[place] = Sums(input_factor, output_factors, own_rows, moments)
        # What was left out of the message is a copy of what was sent for the other tap.
        for place, other in copies.items():
            summed[place] = summed[place]._replace(a=summed[other].a.clone())  # type: ignore[union-attr]
        all_terms, all_squares, *dropped_by_all = counts.unbind()
        return summed, all_terms, all_squares, dict(zip(sums, dropped_by_all, strict=True))

    def _look_at_the_loss(self, scale: Tensor | float) -> None:
        """Note whether the loss is a sum where its mean is expected; the form of a few losses tells.

        Args:
            scale: What the loss was multiplied by.
        """
        elsewhere = self.terms.elsewhere
        if elsewhere is not None:
            self._doubt("classes_elsewhere", elsewhere)
        multiple = self.terms.multiple
        if multiple is None or not self.loss.mean:
            return
        self._doubt("summed_loss", multiple / _like(scale, multiple) > SUMMED * (1 + FORM))

    def _doubt(self, kind: str, found: Tensor) -> None:
        """Count what speaks against how the loss is taken, without waiting for the device."""
        number = found.to(torch.float32)
        self.doubtful[kind] = self.doubtful[kind] + number if kind in self.doubtful else number

    def _count_terms(self) -> tuple[Tensor, Tensor]:
        """Return the number of loss terms of this rank, told or counted, and the squares at the output."""
        left_out, seen = self.terms.left_out, self.terms.take()
        counted, squares = (None, torch.zeros(())) if seen is None else seen.unbind()
        terms = self.loss.terms_now()
        if terms is not None:
            return torch.tensor(terms, dtype=torch.float64), squares
        if counted is None:
            if self.ranks == 1:
                raise _no_terms()
            return torch.zeros(()), squares  # another rank may have some
        if left_out is not None:
            self._doubt("idle_loss_terms", left_out > MANY * counted)
        return counted, squares


def _tapped_weight(root: nn.Module, parameters: Tensors, place: Place) -> Tensor:
    """Return what tells the device and precision of a tap: its parameter, or the first of a hooked module."""
    if place.parameter:
        return parameters[place.parameter]
    return next(root.get_submodule(place.module or "").parameters(recurse=False))


def _readout_taps(cover: Cover, readouts: Collection[str]) -> list[Place]:
    """Return the taps on the output side of readouts, each once."""
    places: dict[Place, None] = {}
    for block in cover.blocks:
        if block.parameter in readouts:
            for factor in block.b:
                places.update(dict.fromkeys(factor.places))
    return list(places)


def _like(number: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a number in the precision of a tensor, and where that is."""
    return number.to(like) if isinstance(number, Tensor) else number


def _no_terms() -> OptimizerError:
    return OptimizerError(
        "cannot tell how many terms the loss averages over: the model returns a scalar, or an object of a "
        "class of its own, or the loss is not computed from the output of its forward(). Pass loss_terms=, "
        "a number or a function of no arguments (samples for a classifier, tokens for a language model)"
    )


Observation = tuple[Tensor, Tensor]  # a factor, and the number of rows of it, or of every group


def observed(factor: Factor, taken: Mapping[Place, Sums]) -> Observation | None:
    """Return one factor of this step, and its number of rows; None where no tap took part.

    Args:
        factor: Where it comes from.
        taken: Result of `Curvature.take`.
    """
    taken_sums = [taken[place] for place in factor.places if place in taken]
    if factor.side == "b":
        return _observed_output(factor, taken_sums)
    inputs = [(sums.a, sums.rows) for sums in taken_sums if sums.a is not None]
    if not inputs:
        return None
    if len(inputs) == 1:
        mean, rows = inputs[0]
        return mean, rows
    # The mean over the rows of all taps.
    rows = _sum([rows for _, rows in inputs])
    total = _sum([mean * by_group(own_rows, mean) for mean, own_rows in inputs])
    return total / by_group(rows, total).clamp(min=1), rows


def _observed_output(factor: Factor, raw: Sequence[Sums]) -> Observation | None:
    """Return a factor B: the sum over taps, since each loss term has gradients at all of them."""
    matrices = []
    for sums in raw:
        matrix = sums.b[factor.piece]
        if matrix is not None:
            matrices.append(matrix)
    if not matrices:
        return None
    total = _sum(matrices)
    if factor.scale != 1:
        total = total * factor.scale
    return total, _rows(raw)


def observed_moments(factor: Factor, taken: Mapping[Place, Sums]) -> Observation | None:
    """Return the second moments of this step, as `observed` does.

    Args:
        factor: Output factor of their matrix, which knows its taps.
        taken: Result of `Curvature.take`.
    """
    taken_sums = [taken[place] for place in factor.places if place in taken]
    if not taken_sums:
        return None
    return _sum([sums.moments[factor.piece] for sums in taken_sums]), _rows(taken_sums)


def _rows(raw: Sequence[Sums]) -> Tensor:
    return _sum([sums.rows for sums in raw])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum; of one tensor that tensor, which may be large."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack(list(tensors)).sum(0)


def nearest_product(tied: Tied, taken: Mapping[Place, Sums]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Return the Kronecker product nearest to ``A1 (x) B1 + B2 (x) A2`` in the Frobenius norm.

    Its factors lie in the spans of (A1, B2) and (B1, A2), so that alternating least squares works on two
    coefficients each (Van Loan & Pitsianis, 1993). The first factor is scaled to the trace of A1.

    Args:
        tied: The two uses.
        taken: Result of `Curvature.take`.
    """
    first = [observed(factor, taken) for factor in tied.first]
    second = [observed(factor, taken) for factor in tied.second]
    rows = [observation[1] for observation in (*first, *second) if observation is not None]
    if None in first or None in second:  # one of the uses did not take part: the other is the curvature
        a, b = second[::-1] if None in first else first
        if a is None or b is None:
            return None
        return (a[0], b[0]), torch.stack(rows).amax(0)
    (a1, _), (b1, _), (a2, _), (b2, _) = (*first, *second)  # type: ignore[misc]
    # A1 (x) B1 + B2 (x) A2 is of rank 2 in the rearranged form, in which a Kronecker product has rank 1.
    left, right = torch.stack([a1, b2]), torch.stack([b1, a2])
    # Inner products of the four factors are all that the iteration needs.
    gram_left, gram_right = left.flatten(1) @ left.flatten(1).T, right.flatten(1) @ right.flatten(1).T
    # P = x_1 A1 + x_2 B2 and Q = y_1 B1 + y_2 A2; each step is the best x or y for the other one.
    y = torch.ones(2, dtype=left.dtype, device=left.device)
    tiny = torch.finfo(left.dtype).tiny
    for _ in range(20):
        x = gram_right @ y / (y @ gram_right @ y).clamp(min=tiny)
        y = gram_left @ x / (x @ gram_left @ x).clamp(min=tiny)
    p, q = torch.tensordot(x, left, 1), torch.tensordot(y, right, 1)
    scale = _trace(p) / _trace(a1).clamp(min=tiny)
    return (p / scale.clamp(min=tiny), q * scale), torch.stack(rows).amax(0)


def _trace(factor: Tensor) -> Tensor:
    """Return the trace of ``[K, n]`` diagonals or of ``[K, n, n]`` matrices, over all K."""
    if factor.dim() == 2:
        return factor.sum()
    return factor.diagonal(dim1=-2, dim2=-1).sum()


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Return the values of tensors of one entry, fetched together from the device of the last one."""
    device = tensors[-1].device
    return torch.cat([tensor.reshape(1).to(device) for tensor in tensors]).tolist()  # type: ignore[no-any-return]


def _readers(cover: Cover, parameters: Tensors) -> dict[Place, list[Tensor]]:
    """Return tap -> the parameters whose factors it adds to."""
    readers_of: dict[Place, list[Tensor]] = {place: [] for place in cover.layers}
    for block in cover.blocks:
        factors = [*block.a, *block.b]
        if block.tied:
            # A tied weight has taps at both of its uses.
            factors += block.tied.second
        places: dict[Place, None] = {}  # each once, in order
        for factor in factors:
            places.update(dict.fromkeys(factor.places))
        for place in places:
            readers_of[place].append(parameters[block.parameter])
    return readers_of


def _tap(root: nn.Module, place: Place) -> Tap:
    """Return the tap of a place; inside a parameter it is put there now."""
    if place.module is None:
        return intercept(root, place.parameter, place.key)
    tap = tap_of(root.get_submodule(place.module))
    if tap is None:
        raise OptimizerError(f"{place.module} has lost its tap; transform the model again")
    return tap
