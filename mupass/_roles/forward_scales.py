"""What the code itself scales with the width before a weight reads it, so that the plan can undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isclose, prod

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import operator_name
from mupass._dims.second_instance import Second
from mupass._records import Geometry
from mupass._roles.forward_scales_search import PASSING, SUMMING, Constant, multiplier
from mupass._roles.sites import root_of

UNDONE = ("unit length", "multiplies by")
READS = ("linear", "contraction", "conv", "gain")  # kinds of sites where a weight multiplies an activation
KNOWN = (*READS, "embedding", "bias", "shift")


def settle(constants: Sequence[Constant], second: Second) -> tuple[list[Constant], list[Constant]]:
    """Tell constants that surely follow the width from those that may; drop those that surely do not.

    A division by a tensor's own length is what it is. Of a number only a second instance can tell.

    Args:
        constants: What was found in the first instance.
        second: What the second instance tells.

    Returns:
        The certain ones, and the others.
    """
    certain, doubtful = [], []
    for constant in constants:
        twin = second.twins.get(constant.node)
        if constant.what == "unit length":
            certain.append(constant)
        elif twin is None or second.captured is None:
            doubtful.append(constant)
        elif (found := multiplier(second.captured, twin)) and not isclose(found[0], constant.value):
            size = prod(second.sizes.get(d, 0) for d in constant.dims)
            fits = size > 0 and isclose(abs(found[0]), size**constant.power, rel_tol=1e-5)
            (certain if fits else doubtful).append(constant)
    return certain, doubtful


def account(
    geometries: Sequence[Geometry],
    constants: Sequence[Constant],
    captured: Capture,
    growth: Callable[[int], float],
) -> tuple[list[Geometry], list[Constant]]:
    """Note at each parameter the power of width that the code gives what it multiplies.

    Args:
        geometries: The parameters, with their sites.
        constants: What surely follows the width.
        captured: The graph.
        growth: Size of a dimension relative to its base size.

    Returns:
        The geometries, and the constants that other readers than these parameters see.
    """
    table = {c.node: c for c in constants if c.what in UNDONE}
    nodes = {str(n): n for n in (*captured.nodes, *captured.inputs)}
    done = []
    for geometry in geometries:
        found = _behind(geometry, table, nodes)
        grown = geometry.m_out if geometry.readout_uses or not geometry.fan_in_axes else geometry.m_in
        if found and all(isclose(prod(map(growth, c.dims)), grown, rel_tol=1e-9) for c in found):
            facts = (f"what it multiplies holds the width to the power {c.power:g}: {c.where}" for c in found)
            power = sum(c.power for c in found)
            geometry = replace(geometry, given=power, evidence=(*geometry.evidence, *facts))
        done.append(geometry)
    names = {g.name for g in done if g.given}
    left = [c for c in constants if c.node not in table or not _undone(c.node, captured, names)]
    return done, left


def _behind(geometry: Geometry, table: Mapping[Node, Constant], nodes: Mapping[str, Node]) -> list[Constant]:
    """Return the constants behind all that a parameter multiplies; none where its uses differ."""
    if geometry.role == "scalar" or any(s.kind not in KNOWN for s in geometry.sites):
        return []
    sources = [source for s in geometry.sites if s.kind in READS for source in s.sources]
    chains = [list(_chain(nodes[source], table)) if source in nodes else [] for source in sources]
    powers = {tuple(sorted((c.power, c.dims) for c in chain)) for chain in chains}
    return chains[0] if len(powers) == 1 else []


def _chain(node: Node, table: Mapping[Node, Constant]) -> Iterator[Constant]:
    """Yield the constants that a tensor carries, the last first."""
    while node in table or _passes(node):
        if node in table:
            yield table[node]
        sources = [n for n in node.all_input_nodes if n.op == "call_function" or n in table]
        if not sources:
            return
        node = sources[0]


def _passes(node: Node) -> bool:
    operator = operator_name(node.target).removesuffix("_")
    return node.op == "call_function" and operator in PASSING - SUMMING


def _undone(node: Node, captured: Capture, names: set[str]) -> bool:
    """Whether all that a tensor is read by are parameters of these names."""
    for user in node.users:
        roots = [captured.parameters.get(root_of(n)) for n in user.all_input_nodes]
        if not (_undone(user, captured, names) if _passes(user) else names & set(roots)):
            return False
    return bool(node.users)
