"""What the code itself scales with the width before a weight reads it, so that the plan can undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isclose, prod

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.second_instance import Second
from mupass._records import Geometry
from mupass._roles.forward_scales_search import PASS_ONE, Constant, multiplier
from mupass._roles.nodes import traits_of
from mupass._roles.sites import root_of

# What the plan can undo, for it stands on an activation that a weight reads.
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
        if constant.what == "unit length":
            certain.append(constant)
            continue
        counterpart = second.twins.get(constant.node)
        if counterpart is None or second.captured is None:
            doubtful.append(constant)
            continue
        twin_number = multiplier(second.captured, counterpart)
        # A number that is the same at both widths only happens to equal a power of this one.
        if twin_number is None or isclose(twin_number[0], constant.value):
            continue
        size = prod(second.sizes.get(dim, 0) for dim in constant.dims)
        if size > 0 and isclose(abs(twin_number[0]), size**constant.power, rel_tol=1e-5):
            certain.append(constant)
        else:
            doubtful.append(constant)
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
    constant_at = {constant.node: constant for constant in constants if constant.what in UNDONE}
    nodes = {str(node): node for node in (*captured.nodes, *captured.inputs)}
    noted = []
    for geometry in geometries:
        behind = _behind(geometry, constant_at, nodes)
        if behind and _follow(geometry, behind, growth):
            geometry = _with_given(geometry, behind)
        noted.append(geometry)
    names = {geometry.name for geometry in noted if geometry.given}
    unaccounted = []
    for constant in constants:
        if constant.node not in constant_at or not _undone(constant.node, captured, names):
            unaccounted.append(constant)
    return noted, unaccounted


def _follow(geometry: Geometry, constants: Iterable[Constant], growth: Callable[[int], float]) -> bool:
    """Return whether constants grow with the fan that the plan scales a parameter by."""
    fan_growth = geometry.m_in
    # F.linear(h, table) of a tied embedding sums over its fan_out; a gain has no fan_in.
    if geometry.readout_uses or not geometry.fan_in_axes:
        fan_growth = geometry.m_out
    for constant in constants:
        if not isclose(prod(map(growth, constant.dims)), fan_growth, rel_tol=1e-9):
            return False
    return True


def _with_given(geometry: Geometry, constants: Sequence[Constant]) -> Geometry:
    facts = []
    for constant in constants:
        facts.append(f"what it multiplies holds the width to the power {constant.power:g}: {constant.where}")
    power = sum(constant.power for constant in constants)
    return replace(geometry, given=power, evidence=(*geometry.evidence, *facts))


def _behind(
    geometry: Geometry, constant_at: Mapping[Node, Constant], nodes: Mapping[str, Node]
) -> list[Constant]:
    """Return the constants behind all that a parameter multiplies; none where its uses differ."""
    if geometry.role == "scalar" or any(site.kind not in KNOWN for site in geometry.sites):
        return []
    chains = []
    for site in geometry.sites:
        if site.kind in READS:
            for source in site.sources:
                chains.append(list(_chain(nodes.get(source), constant_at)))
    # x @ w and (y * d**-0.5) @ w: no one scale of w suits both.
    powers = {tuple(sorted((constant.power, constant.dims) for constant in chain)) for chain in chains}
    return chains[0] if len(powers) == 1 else []


def _chain(tensor: Node | None, constant_at: Mapping[Node, Constant]) -> Iterator[Constant]:
    """Yield the constants that a tensor carries, the last first."""
    # F.dropout(x * d**-0.5).flatten(1): back from the result through what keeps factors.
    while tensor is not None and (tensor in constant_at or _passes(tensor)):
        if tensor in constant_at:
            yield constant_at[tensor]
        sources = [
            source
            for source in tensor.all_input_nodes
            if source.op == "call_function" or source in constant_at
        ]
        tensor = sources[0] if sources else None


def _passes(operator: Node) -> bool:
    return operator.op == "call_function" and bool(traits_of(operator) & PASS_ONE)


def _undone(tensor: Node, captured: Capture, names: set[str]) -> bool:
    """Return whether all that a tensor is read by are parameters of these names."""
    for reader in tensor.users:
        if _passes(reader):
            undone = _undone(reader, captured, names)
        else:
            roots = map(root_of, reader.all_input_nodes)
            undone = not names.isdisjoint(captured.parameters.get(root) for root in roots)
        if not undone:
            return False
    return bool(tensor.users)
