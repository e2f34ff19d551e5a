"""Visits: what one backward pass came by, until it is known whether the pass is one that counts."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Visits(Generic[Item]):
    """Items of the backward pass that runs.

    A pass that only asks for gradients of inputs runs the same functions as one that reaches the leaves.
    Which it is shows at the leaves, whose hooks run behind all functions: they take what the pass noted.
    """

    def __init__(self) -> None:
        self._task = -1
        self._items: list[Item] = []

    def note(self, item: Item) -> None:
        """Keep an item of the pass that runs, and forget those of earlier ones.

        Args:
            item: The item.
        """
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._items = task, []
        self._items.append(item)

    def take(self) -> list[Item]:
        """Return what the pass that runs has noted, and forget it."""
        items, self._items = self._items, []
        return items if torch._C._current_graph_task_id() == self._task else []
