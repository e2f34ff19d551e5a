"""Weight norm, ``W = g v / |v|``: the order of the weight is that of its length ``g``, whatever ``v`` is.

A readout needs ``W ~ 1/m_in``, that is ``g ~ 1/sqrt(m_in)``; a hidden weight ``g ~ 1``.
With ``|v| ~ 1`` at all widths, ``v`` is a weight of which the code multiplies the output by ``g/|v| ~ g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mupass._capture.graph import Capture
from mupass._dims.graph import operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait
from mupass._records import Geometry
from mupass._roles.nodes import all_static, place_of, placeholders_of, traits_of
from mupass._roles.sites import root_of

NORMED = ("aten._weight_norm", "aten._weight_norm_interface")


def with_lengths(geometries: Sequence[Geometry], captured: Capture) -> list[Geometry]:
    """Note which parameters are directions and lengths of weights under weight norm.

    Args:
        geometries: Of all parameters.
        captured: The graph.
    """
    lengths: dict[str, str] = {}
    for operator in captured.nodes:
        # torch.nn.utils.parametrizations.weight_norm calls torch._weight_norm(v, g).
        if operator_name(operator.target) in NORMED:
            direction, length = (captured.parameters.get(root_of(operand)) for operand in operator.args[:2])
            if direction and length:
                lengths[direction] = length
    by_name = {geometry.name: geometry for geometry in geometries}
    directions = {length: by_name[direction] for direction, length in lengths.items()}
    noted = []
    for geometry in geometries:
        direction_of = directions.get(geometry.name)
        if direction_of is not None:
            # Only a readout's weight shrinks with the width, and so does its length.
            growth = direction_of.m_in if direction_of.role == "output" else 1.0
            geometry = replace(geometry, direction=direction_of.name, m_direction=growth)
        noted.append(replace(geometry, length=lengths.get(geometry.name, "")))
    return noted


def self_divided(captured: Capture, solved: Inference, parameter: str) -> str:
    """Return where a parameter is divided by a number or a vector made of itself, or ``""``.

    Spectral norm, and weights of unit length (a classifier by cosines). What is multiplied with another
    weight first is a factor of what is divided, and no matter: an adapter in ``(W + B A) / |W + B A|``.

    Args:
        captured: The graph.
        solved: Its inference.
        parameter: The weight.
    """
    derived = set(placeholders_of(captured, parameter))
    itself = set(derived)  # not multiplied with another weight
    for operator in captured.nodes:
        sources = [source for source in operator.all_input_nodes if source in derived]
        if not sources or not all_static([solved.engine.env.get(operator)]):
            continue
        derived.add(operator)
        operator_traits = traits_of(operator)
        if not operator_traits & (Trait.MATRIX_PRODUCT | Trait.INNER_PRODUCT) and not itself.isdisjoint(
            sources
        ):
            itself.add(operator)
        # w / w.norm(dim=1, keepdim=True); w / sigma, where sigma is computed from w
        if operator_traits & Trait.DIVIDES and len(sources) == 2 and operator.args[0] in itself:
            return place_of(operator, captured.owners)
    return ""
