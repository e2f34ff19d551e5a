"""Dimension rules, one file for each kind of operator."""

from mupass._dims.registry import RULES
from mupass._dims.rules import (
    attention,
    backward,
    contract,
    elementwise,
    indexing,
    join_split,
    linalg,
    pooling,
    recurrent,
    reduction,
    reshape,
    signal,
)

# Importing a module of rules registers them.
__all__ = [
    "RULES",
    "attention",
    "backward",
    "contract",
    "elementwise",
    "indexing",
    "join_split",
    "linalg",
    "pooling",
    "recurrent",
    "reduction",
    "reshape",
    "signal",
]
