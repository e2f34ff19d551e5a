"""Results as tables for other tools: rows, data frames, CSV, and HTML in notebooks."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mupass._errors import StudyError


class Tabular:
    """A result that is also a table."""

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record for each measurement or run."""
        raise NotImplementedError

    def verdict(self) -> str:
        """Return the result in one sentence."""
        raise NotImplementedError

    def _tables(self) -> Sequence[str]:
        """Return tables as HTML, for notebooks."""
        raise NotImplementedError

    def to_frame(self) -> Any:
        """Return `records` as a data frame.

        Raises:
            StudyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise StudyError(
                "to_frame() needs pandas: pip install pandas; or take records() or to_csv()"
            ) from error
        return pandas.DataFrame(self.records())

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return `records` as CSV, or write them.

        Args:
            path: File to write.

        Returns:
            The text, or the path that was written.
        """
        rows = self.records()
        # The columns of all records, in the order in which they are met first.
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if path is None:
            return text.getvalue()
        Path(path).write_text(text.getvalue(), encoding="utf-8")
        return str(path)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return f"<p><b>{html.escape(self.verdict())}</b></p>" + "".join(self._tables())
