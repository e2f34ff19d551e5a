"""Store: results of runs on disk, each written once and for good."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mupass._study.batches import StudyError

TABLES = (
    "create table if not exists studies (structure text primary key, values_ text not null)",
    "create table if not exists runs (key text primary key, job text not null, loss real, seconds real)",
)


class Store:
    """An SQLite file (or memory) that holds the loss of every finished run under the hash of its job.

    A result is committed before the next one is begun, so a killed process loses only what it was computing.

    Args:
        path: The file, made when missing; None keeps results in memory.

    Raises:
        StudyError: The file is something else.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = str(path or ":memory:")
        self.connection = sqlite3.connect(self.path, timeout=60)
        try:
            for table in TABLES:
                self.connection.execute(table)
            self.connection.commit()
        except sqlite3.DatabaseError as error:
            self.connection.close()
            raise StudyError(f"{self.path} is not a store of mupass: {error}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def claim(self, structure: str, values: str) -> None:
        """Make sure that a study goes on with the model and data that it was begun with.

        Args:
            structure: Hash of what names the study.
            values: Hash of initial weights and data.

        Raises:
            StudyError: The store holds this study with other values.
        """
        self.connection.execute("insert or ignore into studies values (?, ?)", (structure, values))
        self.connection.commit()
        query = "select values_ from studies where structure = ?"
        (known,) = self.connection.execute(query, (structure,)).fetchone()
        if known != values:
            raise StudyError(
                f"{self.path} holds this study with other initial weights or other data, so its results do "
                "not fit: call torch.manual_seed before building the model and the data, or use another file"
            )

    def get(self, key: str) -> float | None:
        """Return the loss of a finished run (infinite when it diverged), or None.

        Args:
            key: Hash of the job.
        """
        row = self.connection.execute("select loss from runs where key = ?", (key,)).fetchone()
        return None if row is None else math.inf if row[0] is None else float(row[0])

    def note(self, key: str) -> dict[str, Any]:
        """Return what was written of a finished run for the reader.

        Args:
            key: Hash of the job.
        """
        (text,) = self.connection.execute("select job from runs where key = ?", (key,)).fetchone()
        return dict(json.loads(text))

    def put(self, key: str, job: Mapping[str, Any], loss: float, seconds: float) -> None:
        """Write the result of a run.

        Args:
            key: Hash of the job.
            job: What was run, for the reader.
            loss: Its loss.
            seconds: How long it took.
        """
        value = loss if math.isfinite(loss) else None
        with self.connection:
            self.connection.execute(
                "insert or replace into runs values (?, ?, ?, ?)", (key, json.dumps(job), value, seconds)
            )


def digest(*parts: Any) -> str:
    """Return a hash of tensors and plain values, the same in every process.

    Args:
        *parts: Nests of tensors, numbers, strings and functions.
    """
    state = hashlib.sha256()
    for leaf in tree_leaves(parts):
        if isinstance(leaf, Tensor):
            state.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            if not leaf.is_meta:
                state.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            state.update(repr(describe(leaf)).encode())
        state.update(b";")
    return state.hexdigest()


def describe(thing: Any) -> Any:
    """Return what tells one function or value from another, across processes.

    Args:
        thing: A function, a partial, or a plain value.
    """
    if isinstance(thing, partial):
        return ("partial", describe(thing.func), *map(describe, thing.args), sorted(thing.keywords.items()))
    code = getattr(thing, "__code__", None)
    if code is None:
        if isinstance(thing, (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)):
            return thing
        kind = thing if isinstance(thing, type) or callable(thing) else type(thing)
        name = getattr(kind, "__qualname__", type(kind).__qualname__)
        return f"{getattr(kind, '__module__', '')}.{name}"
    cells = [_content(c) for c in (thing.__closure__ or ())]
    return (thing.__qualname__, _code(code), *map(describe, cells), *map(describe, thing.__defaults__ or ()))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = (_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return (code.co_code.hex(), *constants, *code.co_names)


def called(function: Callable[..., Any]) -> str:
    """Return a function's name for the reader.

    Args:
        function: The function.
    """
    return str(getattr(function, "__qualname__", type(function).__qualname__))
