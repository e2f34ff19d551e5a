"""Store: results of runs on disk, each written once and for good."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from mupass._errors import StudyError

TABLES = (
    "create table if not exists studies (structure text primary key, values_ text not null)",
    "create table if not exists runs (key text primary key, job text not null, loss real, seconds real)",
    "create table if not exists claims (key text primary key, owner text not null, until real not null)",
)
COLUMNS = {
    "studies": ("structure", "values_"),
    "runs": ("key", "job", "loss", "seconds"),
    "claims": ("key", "owner", "until"),
}
LEASE = 60.0  # seconds after which the claim of a process that was killed is void
# A claim: new, one's own, or in the place of one that is void; none where the result is there already.
CLAIM = """
insert into claims select ?1, ?2, ?3 where not exists (select 1 from runs where key = ?1)
on conflict (key) do update set owner = excluded.owner, until = excluded.until
where claims.until < ?4 or claims.owner = excluded.owner
"""


class Store:
    """An SQLite file (or memory) that holds the loss of every finished run under the hash of its job.

    A result is committed before the next one is begun, so a killed process loses only what it was computing.
    A file that cannot be written is read: a complete study can be looked up on a read-only disk.
    Several processes share the work of a file: each run is claimed before it is begun. Claims are renewed
    while their process lives and void `LEASE` seconds after it was killed; clocks must agree to that.

    Args:
        path: The file, made when missing; None keeps results in memory.

    Raises:
        StudyError: The file is something else, or its folder is missing.
    """

    def __init__(self, path: str | Path | None) -> None:
        # SQLite takes an empty path for a file that goes away.
        if path is not None and (not isinstance(path, (str, PathLike)) or not str(path)):
            raise StudyError(f"store must be a path, or None to keep results in memory, not {path!r}")
        self.kept = path is not None
        self.path = str(path) if self.kept else ":memory:"
        # Claims are told apart by the process that made them.
        self.owner = uuid.uuid4().hex
        folder = Path(self.path).absolute().parent
        if self.kept and not folder.is_dir():
            raise StudyError(f"store {self.path}: the folder {folder} does not exist")
        self.connection = self._opened()

    def _opened(self) -> sqlite3.Connection:
        """Open the file and make its tables; a file that cannot be written is opened to be read.

        Raises:
            StudyError: It is no database, or cannot be made.
        """
        try:
            connection = sqlite3.connect(self.path, timeout=60)
        except (sqlite3.Error, ValueError) as error:
            raise StudyError(f"store {self.path} cannot be opened: {error}") from error
        # Tables are made where they are missing: an older file may have some. Another program's gets none.
        try:
            self._check(connection, complete=False)
            for table in TABLES:
                connection.execute(table)
            connection.commit()
            return connection
        except StudyError:
            connection.close()
            raise
        # A read-only file or folder: what is there can still be looked up.
        except sqlite3.OperationalError as error:
            connection.close()
            if "readonly" not in str(error) and "unable to open" not in str(error):
                raise StudyError(f"store {self.path} cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            connection.close()
            raise StudyError(f"{self.path} is not a store of mupass: {error}") from error
        # immutable: SQLite needs no journal beside a file that nobody writes.
        try:
            connection = sqlite3.connect(
                f"{Path(self.path).absolute().as_uri()}?mode=ro&immutable=1", uri=True
            )
            try:
                self._check(connection, complete=True)
            except BaseException:
                connection.close()
                raise
            return connection
        except sqlite3.Error as error:
            raise StudyError(f"store {self.path} can be neither written nor read: {error}") from error

    def _check(self, connection: sqlite3.Connection, complete: bool) -> None:
        """Refuse a database with other tables, before anything is written into it.

        Args:
            connection: To the file.
            complete: Whether tables must be there.

        Raises:
            StudyError: Tables or columns are missing, or others are there.
        """
        tables = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
        foreign = [name for (name,) in tables if name not in COLUMNS and not name.startswith("sqlite_")]
        if foreign:
            raise StudyError(f"{self.path} is not a store of mupass: it has a table {foreign[0]}")
        for table, columns in COLUMNS.items():
            # Column names are the version of the file.
            rows = connection.execute(f"pragma table_info({table})").fetchall()
            present_columns = tuple(row[1] for row in rows)
            # A new file, or one of before there were claims, on a read-only disk.
            absent = not present_columns and (table == "claims" or not complete)
            if present_columns != columns and not absent:
                raise StudyError(
                    f"{self.path} is not a store of this version of mupass: its table {table} has the "
                    f"columns ({', '.join(present_columns)}), not ({', '.join(columns)}); use another file"
                )

    def _ask(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a query.

        Raises:
            StudyError: The disk is full, read-only or broken; what was written before stays.
        """
        try:
            # A transaction for each query: what was written before stays.
            with self.connection:
                return self.connection.execute(query, values)
        except sqlite3.Error as error:
            raise StudyError(
                f"store {self.path}: {error}; all results written before are kept, and the same call goes on "
                "from there once the file can be written"
            ) from error

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
        query = "select values_ from studies where structure = ?"
        row = self._ask(query, (structure,)).fetchone()
        if row is None:
            # Another process may be first: what is there then counts.
            self._ask("insert or ignore into studies values (?, ?)", (structure, values))
            row = self._ask(query, (structure,)).fetchone()
        stored = row[0]
        if stored != values:
            raise StudyError(
                f"{self.path} holds this study with other initial weights or other data, so its results do "
                "not fit: call torch.manual_seed before building the model and the data, or use another file"
            )

    def get(self, key: str) -> float | None:
        """Return the loss of a finished run (infinite when it diverged), or None.

        Args:
            key: Hash of the job.

        Raises:
            StudyError: The store is damaged.
        """
        row = self._ask("select loss from runs where key = ?", (key,)).fetchone()
        if row is None:
            return None
        # NULL is a run that diverged; anything else but a number is damage.
        if row[0] is not None and not isinstance(row[0], float):
            raise StudyError(f"store {self.path} is damaged: a loss is {row[0]!r}")
        return math.inf if row[0] is None else row[0]

    def note(self, key: str) -> dict[str, Any]:
        """Return what was written of a finished run for the reader.

        Args:
            key: Hash of the job.

        Raises:
            StudyError: The store is damaged.
        """
        row = self._ask("select job from runs where key = ?", (key,)).fetchone()
        try:
            return dict(json.loads(row[0]))
        except (TypeError, ValueError) as error:
            raise StudyError(f"store {self.path} is damaged: the note of a run is {row!r}") from error

    def put(self, key: str, job: Mapping[str, Any], loss: float, seconds: float) -> None:
        """Write the result of a run.

        Args:
            key: Hash of the job.
            job: What was run, for the reader.
            loss: Its loss.
            seconds: How long it took.
        """
        # SQLite has no infinity of its own: NULL is a run that diverged.
        value = loss if math.isfinite(loss) else None
        self._ask("insert or replace into runs values (?, ?, ?, ?)", (key, json.dumps(job), value, seconds))
        # The result is there, so that nobody needs the claim.
        self._ask("delete from claims where key = ?", (key,))

    def reserve(self, key: str) -> bool:
        """Claim a run, and return whether it is ours: not while another process is at it or has done it.

        Args:
            key: Hash of the job.

        Raises:
            StudyError: The file cannot be written.
        """
        if not self.kept:
            return True
        now = time.time()
        return self._ask(CLAIM, (key, self.owner, now + LEASE, now)).rowcount == 1

    @contextmanager
    def claims_renewed(self) -> Iterator[None]:
        """Renew claims from a thread, however long a run takes, and give them back at the end."""
        if not self.kept:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._renew, args=(over,), name="mupass-claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            # After an error that is being raised; claims that cannot be given back become void by themselves.
            with contextlib.suppress(StudyError):
                self._ask("delete from claims where owner = ?", (self.owner,))

    def _renew(self, over: threading.Event) -> None:
        """Renew claims until told to stop; where that fails a run may be done twice, with one result."""
        # Four times in a lease, so that a slow disk voids none.
        while not over.wait(LEASE / 4):
            until = time.time() + LEASE
            # The main thread raises what is wrong with the file when it writes its next result.
            with (
                contextlib.suppress(sqlite3.Error),
                closing(sqlite3.connect(self.path, timeout=60)) as connection,
            ):
                connection.execute("update claims set until = ? where owner = ?", (until, self.owner))
                connection.commit()
