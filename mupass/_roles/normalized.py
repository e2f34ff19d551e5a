"""Readouts whose output is normalized afterwards, so that the scale of the weight drops out.

A readout ``u = W h`` starts at ``1/m_in``, and what comes out of it is small. A normalizer divides by the
size of ``u`` and undoes that: one step changes the result by ``sqrt(m_in)`` more than planned, and the
gradient that goes back through ``W`` is larger by as much. A start at ``1/sqrt(m_in)`` makes the readout's
own step flat, and leaves the gradient below it as it is: no scale of the parameter keeps all layers flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait
from mupass._roles.nodes import place_of, placeholders_of, traits_of

PRODUCTS = Trait.MATRIX_PRODUCT | Trait.INNER_PRODUCT
# What has the order of its argument.
SAME_ORDER = Trait.HOMOGENEOUS | Trait.SAME_ORDER
POWERS = {"square": 2.0, "var": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


def find_normalized(captured: Capture, solved: Inference, parameter: str) -> str:
    """Return where the output of a readout is normalized, or ``""``.

    Args:
        captured: The graph.
        solved: Its inference.
        parameter: The weight.
    """
    for start in _operators(captured, solved, parameter):
        normalizer = _Walk(captured, solved).run(start)
        if normalizer is not None:
            return place_of(normalizer, captured.owners)
    return ""


def _operators(captured: Capture, solved: Inference, parameter: str) -> Iterator[Node]:
    """Yield the operators in which a parameter, or what is made of parameters, meets an activation."""
    waiting = placeholders_of(captured, parameter)
    visited = set(waiting)
    while waiting:
        for reader in waiting.pop().users:
            value = solved.engine.env.get(reader)
            if reader in visited or not isinstance(value, Value):
                continue
            visited.add(reader)
            if value.static:
                waiting.append(reader)
            else:
                yield reader


class _Walk:
    """Follows a readout's output by the power of its scale that each tensor holds."""

    def __init__(self, captured: Capture, solved: Inference):
        self.captured, self.solved = captured, solved
        self.powers: dict[Any, float] = {}  # of operators; other operands, such as numbers, hold none
        self.bent: set[Node] = set()  # elementwise functions of the output, whatever they are

    def run(self, start: Node) -> Node | None:
        """Return the operator that divides the scale out, or None."""
        self.powers[start] = 1.0
        self.bent.add(start)
        operators = set(self.captured.nodes)
        waiting = operators.intersection(start.users)
        while waiting:
            operator = min(waiting)  # in the order of the graph
            waiting.remove(operator)
            if self._normalizes(operator) or self._cancels(operator):
                return operator
            if operator in self.powers or operator in self.bent:
                waiting |= operators.intersection(operator.users)
        return None

    def _normalizes(self, operator: Node) -> bool:
        """Whether it is a normalization of something that follows the scale."""
        operator_traits, sources = traits_of(operator), operator.all_input_nodes
        # F.layer_norm(f(u + b), ...): the bias b drops out with the mean, so that any f of u will do.
        if operator_traits & Trait.NORMALIZES:
            return sources[0] in self.bent or self.powers.get(sources[0], 0.0) > 0
        # F.rms_norm(u, ...), F.cosine_similarity(u, v): nothing is subtracted, so u must be bare.
        powers = [self.powers.get(source, 0.0) for source in sources[:2]]
        return bool(operator_traits & Trait.DIVIDES_BY_SIZE) and max(powers) > 0

    def _cancels(self, operator: Node) -> bool:
        """Note the power that an operator's result holds; True where powers cancel, as in ``u / |u|``."""
        sources = operator.all_input_nodes
        moving = [source for source in sources if not self._is_static(source)]
        followed = [self.powers[source] for source in sources if source in self.powers]
        power = None
        if followed:
            power = self._power(operator, followed, alone=all(source in self.powers for source in moving))
        if power is not None and power != 0:
            self.powers[operator] = power
        # f(u + b): after a mean is subtracted and a deviation divided out, little is left of f and b
        elementwise = torch.Tag.pointwise in getattr(operator.target, "tags", ())
        if elementwise or traits_of(operator) & SAME_ORDER:
            if self.bent.issuperset(moving):
                self.bent.add(operator)
        return power == 0

    def _power(self, operator: Node, followed: Sequence[float], alone: bool) -> float | None:
        """Return the power of an operator's result, or None where it has none.

        Args:
            operator: The operator.
            followed: Powers of those operands that follow the scale.
            alone: Whether all other operands are static.
        """
        name, operator_traits = _name(operator), traits_of(operator)
        # u.square(), u.var(), (u * u).sum().sqrt()
        if name in POWERS:
            return followed[0] * POWERS[name]
        # u.sum(), relu(u), u.norm(); tanh(u), where u is small
        if operator_traits & (SAME_ORDER | Trait.LINEAR_AT_ZERO):
            return followed[0]
        if not alone:
            return None
        single_operand = len(operator.all_input_nodes) == 1
        # u @ u.T. Of u @ w the scale is that of another layer, which is not followed.
        if operator_traits & PRODUCTS:
            if len(followed) < len(operator.all_input_nodes):
                return None
            return 2 * followed[0] if single_operand else sum(followed)
        # u * u, u * 0.5
        if operator_traits & Trait.MULTIPLIES:
            squared = single_operand and operator.args[0] is operator.args[1]
            return 2 * followed[0] if squared else sum(followed)
        # u / u.norm()
        if operator_traits & Trait.DIVIDES:
            # A number, or another tensor, holds no power of the scale.
            numerator, denominator = (self.powers.get(operand, 0.0) for operand in operator.args[:2])
            return numerator - denominator
        # u ** 2
        if name == "pow" and isinstance(operator.args[1], (int, float)):
            return followed[0] * operator.args[1]
        # u + b, u.var() + eps: a bias or an epsilon is dwarfed, or is there to be.
        return max(followed) if name in ("add", "sub", "rsub") else None

    def _is_static(self, node: Node) -> bool:
        value = self.solved.engine.env.get(node)
        return isinstance(value, Value) and value.static


def _name(operator: Node) -> str:
    return operator_name(operator.target).removeprefix("aten.").removesuffix("_")
