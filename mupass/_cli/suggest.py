"""Suggests what a misspelt word may mean."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


def suggestion(word: str, known: Collection[str]) -> str:
    """Return ``; did you mean ...?``, or nothing where no word is near.

    Args:
        word: What was written.
        known: What may be written.
    """
    matches = get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
