"""Finished runs on disk, one line of JSON each, so that a benchmark that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class LogError(ValueError):
    """A line of a log is not what this benchmark writes."""


class Log:
    """Lines of JSON by key; several processes may append to one file.

    Args:
        path: The file; it need not be there.
        key: Names of the fields that tell one run from another.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take up what is on disk, other processes' lines too."""
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[self.key_of(row)] = row
            except json.JSONDecodeError:  # a process was killed while it wrote
                if line:
                    print(f"{self.path}, line {number} is not whole: that run is done again", file=sys.stderr)
            except (KeyError, TypeError) as error:
                raise LogError(
                    f"{self.path}, line {number} is no run of this benchmark: {error!r}"
                ) from error

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def add(self, row: dict[str, Any]) -> None:
        """Append one run in one write: either it is on disk, or it is not."""
        self.rows[self.key_of(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        start = b"\n" if before and not before.endswith(b"\n") else b""  # behind a line that is not whole
        blob = start + json.dumps(row).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, blob)
        finally:
            os.close(file)

    def get(self, **fields: Any) -> dict[str, Any] | None:
        """Return the run with this key, if it is done."""
        return self.rows.get(self.key_of(fields))

    def some(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the runs that have these values in these fields."""
        return [row for row in self.rows.values() if all(row[k] == v for k, v in fields.items())]


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short hash of settings; a run under other settings is another run."""
    text = json.dumps(settings, sort_keys=True, default=_text)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _text(value: Any) -> Any:
    """Write what JSON cannot hold, the same in every process: no addresses, no order of a set."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return getattr(value, "__qualname__", None) or repr(value)


@cache
def commit() -> str:
    """Return the commit that runs, with ``+`` where files differ from it; ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    found = []
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "unknown"
        if done.returncode:
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + ("+" if found[1] else "")
