"""Feeds: the modules that put out what a tied readout reads, where its multiplier can go."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._records import Geometry, Use
from mupass._roles.branches import modules_behind, why_shared
from mupass._roles.sites import readers_of
from mupass._walks import walk


def with_feeds(geometry: Geometry, captured: Capture) -> Geometry:
    """Note at each readout use of a tied parameter which modules put out what it reads.

    Args:
        geometry: Of any parameter; one without readout uses is returned as it is.
        captured: The graph.
    """
    if not geometry.readout_uses:
        return geometry
    fed_use: dict[Use, Use] = {}
    for use in geometry.readout_uses:
        # (z @ codebook.T).argmin(-1) tells a place, which no multiplier changes, and has no gradient.
        if not _only_ranked(geometry.name, use, captured):
            fed_use[use] = _fed(geometry.name, use, captured)
    # A readout use is one of all uses: both records are to say the same.
    uses = tuple(fed_use.get(use, use) for use in geometry.uses)
    return replace(geometry, uses=uses, readout_uses=tuple(fed_use.values()))


def _only_ranked(parameter: str, use: Use, captured: Capture) -> bool:
    """Whether nothing but places of the largest or smallest entries comes of a use."""
    readers = [reader for reader, _ in readers_of(captured, parameter, use)]
    reached = walk(readers, lambda node: [] if _is_place(node) else node.users)
    outputs = {node for _, node in captured.outputs if not _is_place(node)}
    return bool(readers) and outputs.isdisjoint(reached)


def _is_place(node: Node) -> bool:
    """Whether a node makes whole numbers, as argmin, argmax and argsort do: behind it is no gradient."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _fed(parameter: str, use: Use, captured: Capture) -> Use:
    """Return a readout use with the modules that feed it, or with the reason why there are none."""
    readers = readers_of(captured, parameter, use)
    if not readers:
        return replace(use, unfed="it is no plain product with one activation")
    modules: list[str] = []
    for reader, activation in readers:
        feeding, reason = modules_behind(activation, reader, captured.owners)
        reason = reason or why_shared(feeding, captured)
        if reason:
            return replace(use, unfed=reason)
        modules += feeding.values()
    return replace(use, fed_by=tuple(dict.fromkeys(modules)))
