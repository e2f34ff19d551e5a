"""Width inference: dimensions as terms, one small rule an operator, verdicts with evidence."""

from mupass._dims import (
    attention,
    backward,
    contract,
    cut,
    elementwise,
    linalg,
    lookup,
    positions,
    recurrent,
    reduce,
    shape,
    signal,
)

# Importing a module of rules registers them.
__all__ = [
    "attention",
    "backward",
    "contract",
    "cut",
    "elementwise",
    "linalg",
    "lookup",
    "positions",
    "recurrent",
    "reduce",
    "shape",
    "signal",
]
