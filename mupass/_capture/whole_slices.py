"""Drops slices that take all of an axis: versions of torch differ in whether the graph has them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.fx import GraphModule


def drop_whole_slices(module: GraphModule) -> None:
    """Put the tensor itself in the place of ``x[:]``, as torch 2.11 and later do.

    Args:
        module: A captured graph; changed in place.
    """
    for node in list(module.graph.nodes):
        # aten.slice(x), aten.slice(x, dim)
        if node.target is torch.ops.aten.slice.Tensor and _is_whole(*node.args, **node.kwargs):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_whole(source: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice has no bounds; with one, it may be a part at another width."""
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1
