"""Settles the random draws of Python code while a model is captured: the graph depends on the model alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

# Just below the upper end of a draw from [0, 1).
HIGH = 1.0 - 2.0**-24


@contextmanager
def settled_draws() -> Iterator[None]:
    """Make every single uniform draw come out at its upper end, and other draws repeat.

    A model in train mode that drops whole layers (LayerDrop, arXiv 1909.11556) draws a number for each and
    skips it when the number lies below a rate, with ``random``, ``numpy.random`` or ``torch.rand([])``. A
    graph captured under real draws would lack those layers, and another run would lack others. Draws of more
    than one number, such as masks, are data: they start from seed 0. The caller's generators are left as they
    were.
    """
    numpy = sys.modules.get("numpy")  # no model draws from a module that is not loaded
    state = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        # Code looks these functions up when it draws, so that patches on the modules reach it.
        for owner, name, replacement in _places(numpy):
            stack.enter_context(patch.object(owner, name, replacement(getattr(owner, name))))
        random.seed(0)
        torch.default_generator.manual_seed(0)
        if numpy:
            numpy.random.seed(0)
        try:
            yield
        finally:
            # Draws of the capture leave no trace in the caller's random state.
            random.setstate(state[0])
            if numpy:
                numpy.random.set_state(state[1])


def _places(numpy: Any) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (random, "random", _unit),
        (random, "uniform", _between),
        (torch, "rand", _tensor),
    ]
    if numpy:
        places += [(numpy.random, name, _unit) for name in ("random", "rand", "random_sample")]
        places += [(numpy.random, "uniform", _between)]
    return places


def _unit(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(*size: Any, **kwargs: Any) -> Any:
        # random.random(), numpy.random.rand(): one number, compared with a rate.
        return draw(*size, **kwargs) if size or kwargs else HIGH

    return drawn


def _between(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(*bounds: Any, **kwargs: Any) -> Any:
        value = draw(*bounds, **kwargs)
        if not isinstance(value, float) or kwargs:
            return value
        # random.uniform(low, high), numpy.random.uniform(): the upper end of its own range.
        low = bounds[0] if bounds else 0.0
        high = bounds[1] if len(bounds) > 1 else 1.0
        return float(low + HIGH * (high - low))

    return drawn


def _tensor(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(*size: Any, **kwargs: Any) -> Any:
        # torch.rand([]), torch.rand(()): one number, compared with a rate.
        if size and all(isinstance(x, (tuple, list)) and not x for x in size):
            # A constant, so that the comparison with the rate can be taken without a run on real values.
            return torch.tensor(HIGH, dtype=kwargs.get("dtype"))
        return draw(*size, **kwargs)

    return drawn
