"""Multipliers of a plan by name pattern, for trainers that build parameter groups of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mupass._scales.scales import SCALES

if TYPE_CHECKING:
    from mupass._scales.plan import Plan

Row = dict[str, Any]


def multipliers(plan: Plan) -> dict[str, Any]:
    """Return what `Plan.multipliers` does.

    Args:
        plan: The plan.
    """
    rows = {}
    for entry in plan.entries:
        row = {"role": entry.geometry.role, **{name: getattr(entry.scales, name) for name in SCALES}}
        row["weight_decay_times_lr"] = entry.scales.weight_decay / entry.scales.lr
        for name in (entry.geometry.name, *entry.geometry.aliases):
            rows[name] = row
    return {
        "optimizer": str(plan.optimizer),
        "parameterization": plan.parameterization,
        "width": plan.width,
        "base_width": plan.base_width,
        "parameters": by_pattern(rows),
        "branches": by_pattern({name: {"multiplier": 1 / plan.depth} for name in plan.branches}),
    }


def by_pattern(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Merge names that differ in numbers only and have equal rows; no name fits two patterns.

    Args:
        rows: Values by qualified name.
    """
    alike: dict[str, list[str]] = {}
    for name in rows:
        alike.setdefault(_pattern(name), []).append(name)
    merged: dict[str, Row] = {}
    for pattern, names in alike.items():
        if _equal(rows[name] for name in names):
            merged[pattern] = rows[names[0]]
        else:  # such as blocks of which the first is wider
            merged.update({re.escape(name): rows[name] for name in names})
    return merged


def _equal(rows: Iterable[Row]) -> bool:
    first, *others = rows
    return all(row == first for row in others)


def _pattern(name: str) -> str:
    """Return a regular expression: the parts of a qualified name that are numbers stand for any number."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
