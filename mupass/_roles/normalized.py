"""Readouts whose output is normalized afterwards, so that the scale of the weight drops out.

A readout ``u = W h`` starts at ``1/m_in``, and what comes out of it is small. A normalizer divides by the
size of ``u`` and undoes that: one step changes the result by ``sqrt(m_in)`` more than planned, and the
gradient that goes back through ``W`` is larger by as much. A start at ``1/sqrt(m_in)`` makes the readout's
own step flat, and leaves the gradient below it as it is: no scale of the parameter keeps all layers flat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait, traits

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
        found = _Walk(captured, solved).run(start)
        if found is not None:
            return f"{operator_name(found.target)} in {captured.owners.get(found, '') or 'the root module'}"
    return ""


def _operators(captured: Capture, solved: Inference, parameter: str) -> Iterator[Node]:
    """Yield the operators in which a parameter, or what is made of parameters, meets an activation."""
    todo = [node for node, name in captured.parameters.items() if name == parameter]
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            value = solved.engine.env.get(user)
            if user in seen or not isinstance(value, Value):
                continue
            seen.add(user)
            if value.static:
                todo.append(user)
            else:
                yield user


class _Walk:
    """Follows a readout's output by the power of its scale that each tensor holds."""

    def __init__(self, captured: Capture, solved: Inference):
        self.captured, self.solved = captured, solved
        self.power: dict[Node, float] = {}
        self.bent: set[Node] = set()  # elementwise functions of the output, whatever they are

    def run(self, start: Node) -> Node | None:
        """Return the operator that divides the scale out, or None."""
        self.power[start] = 1.0
        self.bent.add(start)
        order = {node: i for i, node in enumerate(self.captured.nodes)}
        todo = {user for user in start.users if user in order}
        while todo:
            node = min(todo, key=order.__getitem__)
            todo.remove(node)
            if self._normalizes(node) or self._cancels(node):
                return node
            if node in self.power or node in self.bent:
                todo |= {user for user in node.users if user in order}
        return None

    def _normalizes(self, node: Node) -> bool:
        """Whether it is a normalization of something that follows the scale."""
        known, sources = traits(operator_name(node.target)), node.all_input_nodes
        if known & Trait.NORMALIZES:
            return sources[0] in self.bent or self.power.get(sources[0], 0.0) > 0
        return bool(known & Trait.DIVIDES_BY_SIZE) and any(self.power.get(n, 0.0) > 0 for n in sources[:2])

    def _cancels(self, node: Node) -> bool:
        """Note the power that an operator's result holds; True where powers cancel, as in ``u / |u|``."""
        operands = [n for n in node.all_input_nodes if n in self.power]
        others = [n for n in node.all_input_nodes if n not in operands and not self._is_static(n)]
        power = self._power(node, [self.power[n] for n in operands], bool(others)) if operands else None
        if power is not None and power != 0:
            self.power[node] = power
        # f(u + b): after a mean is subtracted and a deviation divided out, little is left of f and b
        sources = node.all_input_nodes
        unary = torch.Tag.pointwise in getattr(node.target, "tags", ())
        unary = unary or bool(traits(operator_name(node.target)) & SAME_ORDER)
        if unary and all(n in self.bent or self._is_static(n) for n in sources):
            self.bent.add(node)
        return power == 0

    def _power(self, node: Node, known: list[float], others: bool) -> float | None:
        """Return the power of an operator's result, or None where it has none."""
        name, operator = _name(node), traits(operator_name(node.target))
        if name in POWERS:
            return known[0] * POWERS[name]
        if operator & (SAME_ORDER | Trait.LINEAR_AT_ZERO):
            return known[0]
        if others:
            return None
        alone = len(node.all_input_nodes) == 1
        if operator & PRODUCTS:  # of two tensors that follow the scale: u u^T
            full = len(known) == len(node.all_input_nodes)
            return sum(known) * (2 if alone else 1) if full else None
        if operator & Trait.MULTIPLIES:
            return sum(known) * (2 if alone and node.args[0] is node.args[1] else 1)
        if operator & Trait.DIVIDES:
            above, below = (self.power.get(n, 0.0) if isinstance(n, Node) else 0.0 for n in node.args[:2])
            return above - below
        if name == "pow" and isinstance(node.args[1], (int, float)):
            return known[0] * node.args[1]
        # A bias or an epsilon is dwarfed, or is there to be.
        return max(known) if name in ("add", "sub", "rsub") else None

    def _is_static(self, node: Node) -> bool:
        value = self.solved.engine.env.get(node)
        return isinstance(value, Value) and value.static


def _name(node: Node) -> str:
    return operator_name(node.target).removeprefix("aten.").removesuffix("_")
