"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import warnings
from pathlib import Path

import pytest

import mupass

ROOT = Path(mupass.__file__).parent


def with_examples() -> list[str]:
    """Return the modules whose docstrings have examples."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text(encoding="utf-8"):
            found.append(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings_run(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
