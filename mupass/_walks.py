"""Walks through graphs, and up a module tree."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Vertex = TypeVar("Vertex", bound=Hashable)


def ancestors(path: str) -> Iterator[str]:
    """Yield the path of a module, and those of all modules around it, the root ``""`` last.

    Args:
        path: Qualified name of the module.
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def walk(starts: Iterable[Vertex], onward: Callable[[Vertex], Iterable[Vertex]]) -> Iterator[Vertex]:
    """Yield the nodes of a graph that some nodes lead to, these themselves included, each once.

    Args:
        starts: Where to begin.
        onward: The nodes that a node leads to.
    """
    visited: set[Vertex] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in visited:
            visited.add(node)
            yield node
            waiting += onward(node)
