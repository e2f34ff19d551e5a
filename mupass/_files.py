"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object], refuse: type[Exception]) -> None:
    """Write a file beside its place and move it there, so that a kill leaves the old one or the new one.

    Args:
        path: Where the file is to be.
        write: Writes it at the path that it is given.
        refuse: What to raise where the file cannot be written.

    Raises:
        Exception: Of the kind asked for; the old file is as it was.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise refuse(f"a path of a file is needed, not {path!r}")
    path = Path(path)
    try:
        # In the same folder, since a move between file systems is a copy.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        beside = Path(name)
        try:
            write(beside)
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            # mkstemp makes files for their owner only: the usual mode is set, or that of the old file.
            mask = os.umask(0)
            os.umask(mask)
            beside.chmod(path.stat().st_mode if path.exists() else 0o666 & ~mask)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise refuse(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: str | Path, text: str, refuse: type[Exception]) -> None:
    """Write text as a whole.

    Args:
        path: Where the file is to be.
        text: What it holds.
        refuse: What to raise where it cannot be written.
    """
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"), refuse)
