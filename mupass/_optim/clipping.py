"""Clipped gradients: the factor that a training loop multiplied gradients by, between backward and step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mupass._parallel import is_sharded, sum_over_ranks

ENTRIES = 4096  # of a probe that are compared
ALIKE = 1e-3  # how far the ratios of the probes may be apart; half precision rounds by this much


class GradientScale:
    """Tells by what factor all gradients were multiplied since the backward pass, as by ``clip_grad_norm_``.

    A copy of a few small gradients is taken when autograd has accumulated them. Where every one of them is
    the same multiple of its copy in the step, that is the factor; anything else (noise, clipping by value,
    gradients that autograd did not make) is none, and counts as 1.

    Args:
        parameters: Candidates; the smallest vector and the smallest matrix are watched.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # Probes that every rank has whole, and that autograd accumulates into.
        candidates = [
            parameter
            for parameter in parameters
            if not is_sharded(parameter) and parameter.is_leaf and parameter.numel() > 1
        ]
        vectors = [parameter for parameter in candidates if parameter.dim() < 2]
        matrices = [parameter for parameter in candidates if parameter.dim() > 1]
        # Two of them: what changes vectors and matrices differently is no common factor.
        self._watched = [min(kind, key=Tensor.numel) for kind in (vectors, matrices) if kind]
        self._copies: list[Tensor | None] = [None for _ in self._watched]
        for number, parameter in enumerate(self._watched):
            handle = parameter.register_post_accumulate_grad_hook(_Copy(weakref.ref(self), number))  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    def note(self, number: int, gradient: Tensor | None) -> None:
        """Keep a copy of a gradient.

        Args:
            number: Of the probe.
            gradient: As autograd left it.
        """
        self._copies[number] = None
        if gradient is not None:
            self._copies[number] = _entries(gradient).clone()

    def saw_all(self) -> bool:
        """Return whether autograd has made all gradients of the probes since the copies were used last.

        Others are those of a step before or of a pass before the optimizer was made, and what was written
        into ``.grad``. Zeros are none.
        """
        for parameter, copy in zip(self._watched, self._copies, strict=True):
            if copy is None and parameter.grad is not None and bool(parameter.grad.any()):
                return False
        return True

    def take(self, ranks: int) -> Tensor | None:
        """Return the factor, on the device, and forget the copies; None where nothing was noted.

        Args:
            ranks: Number of ranks over which gradients were averaged since.
        """
        noted = self._copies
        # A copy is of one backward pass, so it is used once.
        self._copies = [None for _ in self._watched]
        if ranks > 1:
            noted = self._averaged(noted, ranks)
        # A probe that got no gradient in this step tells nothing.
        present, copies = [], []
        for parameter, copy in zip(self._watched, noted, strict=True):
            if copy is not None and parameter.grad is not None and not is_sharded(parameter.grad):
                present.append(_entries(parameter.grad))
                copies.append(copy)
        if not copies:
            return None
        device = present[0].device
        ratios, telling = [], []
        for gradient, copied in zip(present, copies, strict=True):
            ratio, tells = _ratio(gradient.to(device), copied.to(device))
            ratios.append(ratio)
            telling.append(tells)
        all_ratios, all_known = torch.stack(ratios), torch.stack(telling)
        # Of the probes that tell something, the largest and the smallest factor must agree.
        largest = torch.where(all_known, all_ratios, 0.0).amax()
        smallest = torch.where(all_known, all_ratios, torch.inf).amin()
        clipped = all_known.any() & (smallest > 0) & (largest - smallest <= ALIKE * largest)
        return torch.where(clipped & largest.isfinite(), largest, 1.0)

    def _averaged(self, noted: Sequence[Tensor | None], ranks: int) -> list[Tensor | None]:
        """Return the copies as DistributedDataParallel averages gradients, after autograd has accumulated.

        All ranks send as much: a probe may have got its gradient on some of them alone. Of one that got none
        on any there are zeros, which tell nothing.

        Args:
            noted: Copies on this rank; None where autograd has left no gradient.
            ranks: Number of ranks.
        """
        message = []
        for parameter, copy in zip(self._watched, noted, strict=True):
            message.append(torch.zeros_like(_entries(parameter)) if copy is None else copy)
        return [total / ranks for total in sum_over_ranks(message)]


def _ratio(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Return what multiple of its copy a gradient is, -1 for none, and whether the copy tells anything."""
    scale = then.abs().amax()
    # In units of the largest entry, so that no product overflows.
    now_scaled, then_scaled = now / scale, then / scale
    # The multiple with the smallest sum of squares of what is left.
    multiple = now_scaled @ then_scaled / (then_scaled @ then_scaled)
    is_multiple = (now_scaled - multiple * then_scaled).abs().amax() <= ALIKE * multiple.abs()
    return torch.where(is_multiple, multiple, -1.0), (scale > 0) & scale.isfinite() & now.isfinite().all()


def _entries(gradient: Tensor) -> Tensor:
    """Return the first entries, in float32 or better."""
    entries = gradient.detach().reshape(-1)[:ENTRIES]
    return entries.to(torch.promote_types(entries.dtype, torch.float32))


class _Copy:
    """Hook on a parameter, which does not keep the optimizer alive."""

    def __init__(self, owner: weakref.ref[GradientScale], number: int) -> None:
        self.owner, self.number = owner, number

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, parameter: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.note(self.number, parameter.grad)

    def __reduce__(self) -> Any:
        """Copies of a model do not take the hook's owner along."""
        return _Copy, (_nobody, self.number)


def _nobody() -> None:
    return None
