"""Checks of what a study is given, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mupass._errors import StudyError, is_number, is_whole, kind_of


def check_counts(**counts: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Args:
        **counts: Numbers by the name of their argument.

    Raises:
        StudyError: One is something else.
    """
    for name, value in counts.items():
        if not is_whole(value) or value < 1:
            raise StudyError(f"{name} must be at least 1, and a whole number, not {value!r}")


def check_functions(**functions: Any) -> None:
    """Refuse what cannot be called; None stands for no function, but for the loss.

    Args:
        **functions: Functions by the name of their argument.

    Raises:
        StudyError: One is something else.
    """
    for name, value in functions.items():
        if not callable(value) and (value is not None or name == "loss"):
            raise StudyError(f"{name} must be a function, not {kind_of(value)}")


def check_widths(source: Any, widths: Any) -> None:
    """Refuse what is no model, or no sequence of widths.

    Args:
        source: Model, or a function that builds one.
        widths: As for `mupass.sweep`.

    Raises:
        StudyError: One is something else.
    """
    if not isinstance(source, nn.Module) and not callable(source):
        raise StudyError(f"a model is needed, or a function that builds one, not {kind_of(source)}")
    if widths is not None and (isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence)):
        raise StudyError(f"widths must be a list of widths, such as [64, 128, 256], not {kind_of(widths)}")


def check_point(point: Any) -> None:
    """Refuse what are no hyperparameters by name.

    Args:
        point: Hyperparameters.

    Raises:
        StudyError: No mapping from text to number.
    """
    if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
        raise StudyError(f"point must be hyperparameters by name, such as {{'lr': 0.1}}, not {point!r:.80}")
    for name, value in point.items():
        # NaN fails every comparison.
        if not is_number(value) or not abs(value) < 1e300:
            raise StudyError(f"point[{name!r}] must be a finite number, not {value!r:.80}")
