"""The shapes of an LSTM's last states in an exported graph: torch before 2.13 has them wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def right_lstm_states() -> Iterator[None]:
    """Give an LSTM's last states the shapes in an exported graph that they have in a run.

    The export of torch before 2.13 leaves an axis of size 1 in them: ``[layers, 1, batch, hidden]``. All
    operators that follow would have wrong shapes too.
    """
    if torch.__version__ >= "2.13":
        yield
        return
    from torch._decomp import decompositions

    layer = _with_states_of_two_axes(decompositions.one_layer_lstm)
    with patch.object(decompositions, "one_layer_lstm", layer):
        yield


def _with_states_of_two_axes(layer: Callable[..., Any]) -> Callable[..., Any]:
    def right(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, (hidden, cell) = layer(*args, **kwargs)
        return output, (hidden.flatten(0, -2), cell.flatten(0, -2))  # [batch, hidden]

    return right
