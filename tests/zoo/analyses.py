"""Analyses of cases, captured once for all tests of a worker; tests of one case share a worker (conftest)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

import mupass
from zoo.case import Case


@contextmanager
def third_party() -> Iterator[None]:
    """Builders are other people's code; their warnings are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def alone(case: Case, width: int, mode: str) -> mupass.Analysis:
    """What one model of that width tells, in the mode ``train`` or ``eval``."""
    with third_party():
        torch.manual_seed(0)
        return mupass.analyze(case.build(width).train(mode == "train"), case.inputs())


@cache
def beside_a_second(case: Case) -> mupass.Analysis:
    """What a model of twice the width tells beside one of the width."""
    with third_party():
        torch.manual_seed(0)
        return mupass.analyze(case.build(2), case.inputs(), base=case.build(1))


@cache
def truth(case: Case) -> dict[tuple[str, int], bool]:
    """`Case.truth`, built once."""
    with third_party():
        return case.truth()
