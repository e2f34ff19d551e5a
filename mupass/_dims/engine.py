"""Runs the dimension rules over a captured graph, one operator at a time.

The engine knows no operator. It looks the target up in the registry, hands the rule a `Call`, checks the
shape that comes back against the shape that capture recorded, and collects what rules say: uses of
parameters, seeds of finiteness, evidence of width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from mupass._dims.call import PICKED, RULES, Call, Result
from mupass._dims.facts import NOWHERE, Axis, Facts, Origin, Value, bare
from mupass._dims.graph import (
    broadcasts,
    flatten,
    is_getitem,
    is_graph,
    subgraphs,
    viewed,
    written,
)
from mupass._dims.space import Space
from mupass._dims.straight import keeps_straight
from mupass._errors import InferenceError

COUNTED = "it counts equal parts, each of which the code takes on its own"


class Engine:
    """Interprets a graph in the domain of axes."""

    def __init__(
        self,
        module_of: Callable[[Node], str],
        strict: bool = True,
        mixed: Origin = NOWHERE,
        derivatives: Container[Node] = (),
    ):
        self.space, self.facts = Space(), Facts()
        self.module_of, self.strict = module_of, strict
        self.derivatives = derivatives  # operators that run backwards
        self.mixed = mixed  # parameter axes along which whole weights are mixed into one a sample
        self.env: dict[Node, Result] = {}
        self._straight: set[Node] = set()  # what linear operators made of the output of a weight

    def is_straight(self, node: Node) -> bool:
        """Whether a tensor comes from a weight with no nonlinearity in between."""
        return node in self._straight

    def placeholder(self, node: Node, shape: Sequence[int], parameter: str | None, static: bool) -> Value:
        """Bind a parameter, buffer, constant or input."""
        axes = []
        for index, size in enumerate(shape):
            origin = frozenset({(parameter, index)}) if parameter else NOWHERE
            axes.append(Axis(self.space.new(int(size)), int(size), origin))
            if parameter:
                self.facts.carried[parameter, index] = axes[-1].dim
        self.env[node] = Value(tuple(axes), static)
        return self.env[node]

    def run(self, nodes: Iterable[Node]) -> None:
        """Apply a rule to every operator, then close the books."""
        self._interpret(nodes)
        self.space.where = "slices"
        self._close_picks()
        self.space.close_slices()
        for dim, where in self.space.counts.items():
            self.facts.finite.setdefault(dim, f"{COUNTED} ({where})")
            self.facts.enumerated.setdefault(dim, COUNTED)

    def _close_picks(self) -> None:
        """Positions taken alone are separate things, but where weights read all the others: then a part."""
        read = {self.space.find(d) for d in self.facts.fan_in}
        for whole, parts in self.space.terms("sum"):
            read |= set(parts) if whole in read else set()
        for dim, index, where in self.facts.picks:
            if self.space.others(dim, index) in read:
                self.space.part(dim, index, index + 1)
            else:
                self.facts.finite.setdefault(dim, f"{PICKED} ({where})")
                self.facts.enumerated.setdefault(dim, PICKED)

    def _interpret(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)

    def _call(self, node: Node) -> Result:
        if is_getitem(node):
            source, index = self._lookup(node.args[0]), node.args[1]
            self._straight.update({node} if node.args[0] in self._straight else ())
            return source[index] if isinstance(source, (tuple, list)) and isinstance(index, int) else None
        arguments = self._arguments(node)
        if node in self.derivatives:  # sizes must agree, but no weight is used that was not used forwards
            arguments = {name: _as_data(value) for name, value in arguments.items()}
        call = Call(self, node, arguments)
        self.space.where = call.where
        graphs = subgraphs(node) if call.operator not in RULES else []
        if not call.shapes and not graphs:
            return None
        if any(a.size == 0 for v in call.values for a in v.axes):
            return self._empty(call)
        weights = len(self.facts.weights)
        result = self._nested(call, graphs) if graphs else self._apply(call)
        self._check(call, result)
        if isinstance(result, Value) and not result.static:
            self._unsettle(written(node))
        made = any(out for _, out in self.facts.weights[weights:])
        pointwise = RULES.get(call.operator.removesuffix("_")) is RULES["pointwise"]
        if not call.static and keeps_straight(node, call.operator, call.values, pointwise):
            if made or any(map(self.is_straight, node.all_input_nodes)):
                self._straight.add(node)
        return result

    def _unsettle(self, target: Node | None) -> None:
        """What was written into a tensor, or into a view of it, depends on the inputs from then on."""
        while target and target.op == "call_function":
            value = self.env.get(target)
            if isinstance(value, Value) and value.static:
                self.env[target] = Value(bare(value.axes))
            target = viewed(target)

    def _empty(self, call: Call) -> Result:
        """An empty tensor says nothing; joined to others it is left out, and no weight may act on it."""
        full = [v for v in call.values if all(a.size for a in v.axes)]
        if any(v.parametric for v in full):
            raise InferenceError(
                f"{call.where}: a tensor with an axis of size 0 carries no width; "
                "give example inputs and a model without empty tensors"
            )
        if call.operator == "aten.cat" and full:
            call.arguments = {k: full if k == "tensors" else v for k, v in call.arguments.items()}
            return self._apply(call)
        outputs = [call.value([call.new(s) for s in shape]) for shape in call.shapes]
        return outputs[0] if len(outputs) == 1 else outputs

    def _nested(self, call: Call, graphs: Sequence[torch.fx.GraphModule]) -> Result:
        """Interpret the subgraphs of a higher-order operator (no_grad, autocast, checkpoint, cond, scan)."""
        last = max(i for i, a in enumerate(call.node.args) if is_graph(call.node, a))
        operands = [x for x in flatten(call.node.args[last + 1 :]) if isinstance(x, Node)]
        results = []
        for graph in graphs:
            holes = [n for n in graph.graph.nodes if n.op == "placeholder"]
            for hole, operand in zip(holes, operands, strict=False):
                self.env[hole] = self._element(hole, self.env.get(operand))
            self._interpret(graph.graph.nodes)
            output = next(n for n in graph.graph.nodes if n.op == "output")
            results.append([v for v in flatten([self._lookup(output.args[0])]) if isinstance(v, Value)])
        for branch in results[1:]:
            for left, right in zip(results[0], branch, strict=True):
                for a, b in zip(left.axes, right.axes, strict=True):
                    call.unify(a, b)
        return [
            value if len(value.axes) == len(shape) else call.value([call.new(shape[0]), *value.axes])
            for value, shape in zip(results[0], call.shapes, strict=True)
        ]

    def _element(self, hole: Node, value: Result) -> Result:
        """A scan hands its body one element of the sequence."""
        meta = hole.meta.get("val")
        if isinstance(value, Value) and isinstance(meta, torch.Tensor) and meta.dim() == len(value.axes) - 1:
            return Value(value.axes[1:], value.static)
        return value

    def _apply(self, call: Call) -> Result:
        target = call.node.target
        found = RULES.get(call.operator) or RULES.get(call.operator.removesuffix("_"))
        if found:
            return found(call)
        if not call.values:
            return RULES["create"](call)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return RULES["pointwise"](call)
        if call.backward and "_backward" in call.operator:
            return RULES["backward"](call)
        return self._unknown(call)

    def _unknown(self, call: Call) -> Result:
        """Treat by shape what looks pointwise; refuse the rest, or leave it open when not strict."""
        sizes = [tuple(a.size for a in v.axes) for v in call.values]
        if len(call.shapes) == 1 and call.shape in sizes and all(broadcasts(s, call.shape) for s in sizes):
            self.facts.warnings.append(f"{call.where}: no dimension rule; treated as pointwise by its shapes")
            return RULES["pointwise"](call)
        message = f"{call.where}: no dimension rule for this operator"
        if self.strict:
            raise InferenceError(
                f"{message}. Pass strict=False to leave what depends on it ambiguous, together with base= a "
                "second instance of the model at another width, which settles it"
            )
        self.facts.warnings.append(f"{message}; what depends on it is ambiguous")
        outputs = [call.value([call.new(s) for s in shape]) for shape in call.shapes]
        return outputs[0] if len(outputs) == 1 else outputs

    def _check(self, call: Call, result: Result) -> None:
        got = [tuple(a.size for a in v.axes) for v in flatten([result]) if isinstance(v, Value)]
        if got != call.shapes:
            raise InferenceError(f"{call.where}: the rule gave shapes {got}, the operator {call.shapes}")

    def _arguments(self, node: Node) -> dict[str, Any]:
        """Bind arguments to the names of the operator's schema."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            bound: dict[str, Any] = {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
        else:
            given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
            bound = {  # in the schema's order: what is transformed comes before its options
                a.name: given.get(a.name, a.default_value)
                for a in schema.arguments
                if a.name in given or a.has_default_value()
            }
        return {name: self._lookup(value) for name, value in bound.items()}

    def _lookup(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self.env.get(value)
        if isinstance(value, (tuple, list)):
            return (
                type(value)(self._lookup(v) for v in value)
                if type(value) in (tuple, list)
                else [self._lookup(v) for v in value]
            )
        return value


def _as_data(value: Any) -> Any:
    """Return an argument with tensors of parameters as tensors of data."""
    if isinstance(value, Value):
        return Value(bare(value.axes))
    if isinstance(value, (tuple, list)):
        return [_as_data(v) for v in value]
    return value
