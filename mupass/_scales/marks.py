"""Transformed models that are alive, their copies among them: where an optimizer looks for its parameters."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet, ref

from torch import nn

NAME = "_mupass_mark"
_roots: WeakSet[nn.Module] = WeakSet()


class Mark:
    """What a transformed module holds so that a copy of it, or what it is unpickled to, is known as well."""

    def __init__(self, root: nn.Module) -> None:
        self.root = ref(root)

    def __reduce__(self) -> Any:
        """Copy and pickle as the mark of the module that it is then in."""
        # A module is there before its attributes are, for copy.deepcopy and for pickle.
        return _marked, (self.root(),)


def mark(root: nn.Module) -> None:
    """Make a transformed module known.

    Args:
        root: The module that holds the plan.
    """
    setattr(root, NAME, _marked(root))


def unmark(root: nn.Module) -> None:
    """Take the mark off a module that is no longer a transformed one.

    Args:
        root: The module.
    """
    vars(root).pop(NAME, None)
    _roots.discard(root)


def marked_models() -> list[nn.Module]:
    """Return the transformed modules that are alive."""
    return list(_roots)


def _marked(root: nn.Module) -> Mark:
    _roots.add(root)
    return Mark(root)
