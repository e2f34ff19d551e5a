"""Weight norm, ``W = g v / |v|``: the order of the weight is that of its length ``g``, whatever ``v`` is.

A readout needs ``W ~ 1/m_in``, that is ``g ~ 1/sqrt(m_in)``; a hidden weight ``g ~ 1``.
With ``|v| ~ 1`` at all widths, ``v`` is a weight of which the code multiplies the output by ``g/|v| ~ g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import flatten, operator_name
from mupass._dims.infer import Inference
from mupass._records import Geometry
from mupass._roles.sites import root_of

NORMED = ("aten._weight_norm", "aten._weight_norm_interface")


def with_lengths(geometries: Sequence[Geometry], captured: Capture) -> list[Geometry]:
    """Note which parameters are directions and lengths of weights under weight norm.

    Args:
        geometries: Of all parameters.
        captured: The graph.
    """
    lengths: dict[str, str] = {}
    for node in captured.nodes:
        if operator_name(node.target) in NORMED:
            direction, length = (captured.parameters.get(root_of(n)) for n in node.args[:2])
            if direction and length:
                lengths[direction] = length
    by_name = {g.name: g for g in geometries}
    directions = {length: by_name[direction] for direction, length in lengths.items()}
    found = []
    for g in geometries:
        if g.name in directions:
            of = directions[g.name]
            readout = of.role == "output"
            g = replace(g, direction=of.name, m_direction=of.m_in if readout else 1.0)
        found.append(replace(g, length=lengths.get(g.name, "")))
    return found


def self_divided(captured: Capture, solved: Inference, parameter: str) -> str:
    """Return where a parameter is divided by a number or a vector made of itself, or ``""``.

    Spectral norm, and weights of unit length (a classifier by cosines).

    Args:
        captured: The graph.
        solved: Its inference.
        parameter: The weight.
    """
    made = {node for node, name in captured.parameters.items() if name == parameter}
    for node in captured.nodes:
        value = solved.engine.env.get(node)
        sources = [n for n in node.all_input_nodes if n in made]
        if not sources or not all(v.static for v in flatten([value]) if isinstance(v, Value)):
            continue
        made.add(node)
        # div(w, sigma), where sigma is computed from w
        if operator_name(node.target) in ("aten.div", "aten.true_divide") and len(sources) == 2:
            return f"{operator_name(node.target)} in {captured.owners.get(node, '') or 'the root module'}"
    return ""
