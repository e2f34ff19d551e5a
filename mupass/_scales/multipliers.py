"""Multipliers of a plan by name pattern, for trainers that build parameter groups of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mupass._scales.entry import Entry
from mupass._scales.scales import SCALES

Row = dict[str, Any]


def multiplier_rows(entries: Iterable[Entry]) -> dict[str, Row]:
    """Return the role and the factors of every parameter, by each of its names.

    Args:
        entries: Those of a plan.
    """
    rows = {}
    for entry in entries:
        row = {"role": entry.geometry.role, **{name: getattr(entry.scales, name) for name in SCALES}}
        # Decay that an optimizer multiplies by its rate has the rate's factor in it, which is divided out.
        row["weight_decay_times_lr"] = entry.scales.weight_decay / entry.scales.lr
        for name in entry.geometry.names:
            rows[name] = row
    return rows


def by_pattern(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Merge names that differ in numbers only and have equal rows; no name fits two patterns.

    Args:
        rows: Values by qualified name.
    """
    names_of: dict[str, list[str]] = {}
    for name in rows:
        # layers.0.mlp.weight and layers.7.mlp.weight fall under layers.<number>.mlp.weight.
        names_of.setdefault(_pattern(name), []).append(name)
    merged: dict[str, Row] = {}
    for pattern, names in names_of.items():
        first = rows[names[0]]
        if all(rows[name] == first for name in names):
            merged[pattern] = first
        else:  # such as blocks of which the first is wider
            merged.update({re.escape(name): rows[name] for name in names})
    return merged


def _pattern(name: str) -> str:
    """Return a regular expression: the parts of a qualified name that are numbers stand for any number."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
