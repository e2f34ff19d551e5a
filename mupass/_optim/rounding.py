"""Stochastic rounding to bfloat16: right in the mean, where rounding to the nearest loses small steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mupass._errors import OptimizerError
from mupass._parallel import from_rank

LOW_BITS = 16  # of a float32 that a bfloat16 does not have
MIXER = 0x9E3779B97F4A7C15  # odd, far from all simple ratios


def check_rounded(parameters: Mapping[Tensor, str]) -> None:
    """Raise where there is nothing to round stochastically, or no way to do it.

    Args:
        parameters: Those that are trained, with their names.

    Raises:
        OptimizerError: One is in float16, or none is in bfloat16.
    """
    for parameter, name in parameters.items():
        if parameter.dtype == torch.float16:
            raise OptimizerError(
                f"stochastic_rounding=True is for bfloat16, and {name} is in float16: use model.bfloat16()"
            )
    if not any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        raise OptimizerError(
            "stochastic_rounding=True needs weights in bfloat16, and there are none: leave it out, or use "
            "model.bfloat16()"
        )


def drawn_seed(ranks: int, device: torch.device) -> int:
    """Return a seed from torch's own generator (`torch.manual_seed`), that of rank 0 on all ranks.

    Args:
        ranks: Number of ranks that must take the same steps.
        device: Of the parameters.
    """
    seed = torch.randint(2**31, ())
    if ranks > 1:
        seed = from_rank(seed.to(device), 0, device)
    return int(seed)


def mixed(seed: int, numbers: Iterable[int]) -> int:
    """Return a seed that depends on a seed and some whole numbers.

    Args:
        seed: The seed.
        numbers: The numbers; their order matters.
    """
    for number in numbers:
        # Multiplication carries low bits up, the shift brings high ones down again.
        seed = (seed ^ (number + 1)) * MIXER % 2**63
        seed ^= seed >> 29
    return seed


def to_bfloat16(values: Tensor, seed: int) -> Tensor:
    """Round to one of the two neighbours in bfloat16, with odds by which the mean is the value.

    Args:
        values: In float32.
        seed: Seed of the odds.
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    size = {"size": values.shape, "dtype": torch.int32, "device": values.device}
    # Uniform noise in the bits that are cut off: the odds of a carry are their value.
    noise = torch.randint(0, 1 << LOW_BITS, generator=generator, **size)  # type: ignore[call-overload]
    # The bits of a float, but for the sign, order as its magnitude does: a carry leads to the next number.
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << LOW_BITS)
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
