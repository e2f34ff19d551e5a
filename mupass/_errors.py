"""Every error that mupass raises on purpose, and how it warns."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Collection, Generator, Iterable, Sequence
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path
from typing import TypeGuard


class MupassError(Exception):
    """Base class of all mupass errors; catching it catches every refusal by this package."""


class CaptureError(MupassError):
    """The model could not be captured as a graph (bad example inputs, no parameters)."""


class InferenceError(MupassError):
    """Width inference met something it must not guess (unknown operator, nothing infinite)."""


class PlanError(MupassError, ValueError):
    """A plan is invalid, unreadable, or belongs to another model."""


class TransformError(MupassError):
    """The model cannot be rewritten (transformed twice, no module to hold a multiplier)."""


class ResizeError(MupassError):
    """The model cannot be built at the width asked for; the message names the dimensions."""


class OptimizerError(MupassError, ValueError):
    """An optimizer was given an argument it cannot use."""


class StudyError(MupassError):
    """A study cannot be run as asked; the message says what to change."""


class MupassWarning(UserWarning):
    """Something changes a result or asks for an answer: which parameter or operator, why, what to write."""


def kind_of(thing: object) -> str:
    """Return a thing's kind, for an error that says what was given instead of what was asked for.

    Args:
        thing: What was given.
    """
    return "None" if thing is None else repr(thing) if isinstance(thing, str) else f"a {type(thing).__name__}"


def suggestion(word: str, known: Collection[str]) -> str:
    """Return ``; did you mean ...?``, or nothing where no word is near.

    Args:
        word: What was written.
        known: What may be written.
    """
    matches = get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether something is a number; True and False are none, although Python counts with them.

    Args:
        value: What was given.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether something is a whole number, and no truth value.

    Args:
        value: What was given.
    """
    return isinstance(value, int) and not isinstance(value, bool)


def check_flags(error: type[MupassError], **flags: object) -> None:
    """Refuse what is neither True nor False: the text ``"no"`` would count as yes.

    Args:
        error: What to raise.
        **flags: Flags by the name of their argument.

    Raises:
        MupassError: Of the kind asked for; one is something else.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise error(f"{name} must be True or False, not {flag!r}")


def check_choice(error: type[MupassError], name: str, value: object, known: Collection[str]) -> None:
    """Refuse what is none of the words that are known.

    Args:
        error: What to raise.
        name: What the word stands for.
        value: What was given.
        known: The words.

    Raises:
        MupassError: Of the kind asked for; it is another word, or no text at all.
    """
    if not isinstance(value, str) or value not in known:
        raise error(f"unknown {name} {value!r}; known: {', '.join(known)}")


def some(names: Sequence[str]) -> str:
    """Return a few names, and how many more there are.

    Args:
        names: All names.
    """
    remainder = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + remainder


_PACKAGE = str(Path(__file__).parent / "_")[:-1]
_SAID: ContextVar[set[str] | None] = ContextVar("said", default=None)


def warn(messages: Iterable[str]) -> None:
    """Warn of each matter, at the line outside of mupass that led here.

    Args:
        messages: What changes a result or asks for an answer, one text a matter.
    """
    # Up to the first frame outside of this package.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)):
        level, frame = level + 1, frame.f_back
    said = _SAID.get()
    for message in messages:
        matter = re.sub(r"\d[\d.e+-]*", "#", message)  # the same at another width is the same matter
        if said is None or matter not in said:
            warnings.warn(message, MupassWarning, stacklevel=level)
        if said is not None:
            said.add(matter)


@contextlib.contextmanager
def each_matter_once() -> Generator[None, None, None]:
    """Warn of a matter once, however many copies of a model it concerns.

    Yields:
        Nothing.
    """
    # Inside of another such block the texts already said stay said.
    token = _SAID.set(set() if _SAID.get() is None else _SAID.get())
    try:
        yield
    finally:
        _SAID.reset(token)
