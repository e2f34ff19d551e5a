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
        plain = [p for p in parameters if not is_sharded(p) and p.is_leaf and p.numel() > 1]
        kinds = ([p for p in plain if p.dim() < 2], [p for p in plain if p.dim() > 1])
        self._watched = [min(kind, key=lambda p: p.numel()) for kind in kinds if kind]
        self._copies: list[Tensor | None] = [None for _ in self._watched]
        for number, p in enumerate(self._watched):
            handle = p.register_post_accumulate_grad_hook(_Copy(weakref.ref(self), number))  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove)

    def note(self, number: int, gradient: Tensor | None) -> None:
        """Keep a copy of a gradient.

        Args:
            number: Of the probe.
            gradient: As autograd left it.
        """
        self._copies[number] = None if gradient is None else _entries(gradient).clone()

    def take(self, ranks: int) -> Tensor | None:
        """Return the factor, on the device, and forget the copies; None where nothing was noted.

        Args:
            ranks: Number of ranks over which gradients were averaged since.
        """
        pairs = [
            (_entries(p.grad), copy)
            for p, copy in zip(self._watched, self._copies, strict=True)
            if copy is not None and p.grad is not None and not is_sharded(p.grad)
        ]
        self._copies = [None for _ in self._watched]
        if ranks > 1 and pairs:
            copies = sum_over_ranks([copy for _, copy in pairs])
            pairs = [(now, copy / ranks) for (now, _), copy in zip(pairs, copies, strict=True)]
        if not pairs:
            return None
        device = pairs[0][0].device
        found = [_ratio(now.to(device), then.to(device)) for now, then in pairs]
        ratios, known = (torch.stack(part) for part in zip(*found, strict=True))
        largest = torch.where(known, ratios, 0.0).amax()
        smallest = torch.where(known, ratios, torch.inf).amin()
        clipped = known.any() & (smallest > 0) & (largest - smallest <= ALIKE * largest)
        return torch.where(clipped & largest.isfinite(), largest, 1.0)


def _ratio(now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Return what multiple of its copy a gradient is, -1 for none, and whether the copy tells anything."""
    scale = then.abs().amax()
    a, b = now / scale, then / scale
    along = a @ b / (b @ b)
    same = (a - along * b).abs().amax() <= ALIKE * along.abs()
    return torch.where(same, along, -1.0), (scale > 0) & scale.isfinite() & now.isfinite().all()


def _entries(gradient: Tensor) -> Tensor:
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
