"""The registry of dimension rules: which function handles which operator."""

from __future__ import annotations

from collections.abc import Callable

from mupass._dims.call import Call, Result

Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators named without overload, such as ``aten.linear``."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise AssertionError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register
