"""A case is an architecture with a width multiplier; its truth is read off two instances.

Build it at two multipliers: the parameter axes whose sizes differ are the infinite ones. Attention widens by
heads at a fixed head_dim; data, classes, kernels, codebooks, experts and states keep their sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
VOCAB, LENGTH = 96, 12


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: Its name.
        build: Width multiplier -> model.
        inputs: Positional and keyword inputs, the same at every width.
        ambiguous: Regular expression over ``parameter:axis`` for axes that are a matter of convention.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Inputs
    ambiguous: str = ""

    def truth(self) -> dict[tuple[str, int], bool]:
        """Return (parameter, axis) -> whether it grows."""
        narrow, wide = (dict(self.build(k).named_parameters()) for k in (1, 2))
        assert list(narrow) == list(wide), f"{self.name}: parameter names depend on width"
        return {
            (name, axis): size != wide[name].shape[axis]
            for name, p in narrow.items()
            for axis, size in enumerate(p.shape)
        }

    def conventional(self, parameter: str, axis: int) -> bool:
        """Tell whether the truth of an axis is a matter of convention."""
        return bool(self.ambiguous) and re.search(self.ambiguous, f"{parameter}:{axis}") is not None


class Cases(dict[str, Case]):
    """Cases by name; calling it gives the decorator that files a builder."""

    def __call__(self, inputs: Inputs, ambiguous: str = "") -> Callable[[Callable[[int], nn.Module]], Case]:
        """File a function of the width multiplier as a case."""

        def file(build: Callable[[int], nn.Module]) -> Case:
            self[build.__name__] = Case(build.__name__, build, inputs, ambiguous)
            return self[build.__name__]

        return file


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Return fixed integers below ``high``."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int) -> Inputs:
    """Return inputs that are one tensor of normal numbers."""
    return lambda: ((randn(*shape),), {})


def image(size: int = 32, channels: int = 3) -> Inputs:
    """Return inputs that are two images."""
    return normal(2, channels, size, size)


def tokens(**more: Any) -> Inputs:
    """Return inputs that are token ids."""
    return lambda: ((randint(VOCAB, 2, LENGTH),), dict(more))


def keywords(**values: Any) -> Inputs:
    """Return keyword inputs; functions are called for fresh values."""
    return lambda: ((), {k: v() if callable(v) else v for k, v in values.items()})


def merged(*groups: Mapping[str, Case]) -> dict[str, Case]:
    """Merge modules of cases."""
    return {name: case for group in groups for name, case in group.items()}
