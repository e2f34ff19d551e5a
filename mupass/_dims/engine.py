"""Runs the dimension rules over a captured graph, one operator at a time.

The engine knows no operator. It looks the target up in the registry, hands the rule a `Call`, checks the
shape that comes back against the shape that capture recorded, and collects what rules say: uses of
parameters, seeds of finiteness, evidence of width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence, Set
from typing import Any

import torch
from torch.fx import Node

from mupass._dims.call import PICKED, Call, Result, one_or_all
from mupass._dims.facts import NOWHERE, Axis, Facts, Origin, Value, bare
from mupass._dims.graph import (
    broadcasts,
    flatten,
    graph_of,
    is_getitem,
    keeps_straight,
    output_shapes,
    subgraphs,
    viewed,
    written,
)
from mupass._dims.rules import RULES
from mupass._dims.space import Space
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
        # Slices become cuts when all of them are known: x[:, :3] and x[:, 3:] are one cut together.
        self.space.where = "slices"
        self._close_picks()
        self.space.close_slices()
        # q, k, v = split(3 * heads * head_dim): the 3 counts parts
        for dim, where in self.space.counts.items():
            self.facts.finite.setdefault(dim, f"{COUNTED} ({where})")
            self.facts.enumerated.setdefault(dim, COUNTED)

    def _close_picks(self) -> None:
        """Positions taken alone are separate things, but where weights read all the others: then a part."""
        read_by_weights = self.space.find_all(self.facts.fan_in)
        # A weight that reads a concatenation reads its parts.
        for whole, parts in self.space.terms("sum"):
            if whole in read_by_weights:
                read_by_weights.update(parts)
        cut = self._cut_between_positions(read_by_weights)
        for dim, index, where in self.facts.picks:
            # The other positions are read as features, so that the one taken is a part like them.
            if self.space.others(dim, index) in read_by_weights:
                self.space.part(dim, index, index + 1)
            elif self.space.find(dim) not in cut:
                self.facts.finite.setdefault(dim, f"{PICKED} ({where})")
                self.facts.enumerated.setdefault(dim, PICKED)

    def _cut_between_positions(self, read_by_weights: Set[int]) -> set[int]:
        """Cut dimensions at the positions taken alone, where weights read what lies between; return these.

        As ``key, strength = x[:, :d], x[:, d]``: the slices and the positions make up all of x.
        """
        read = set(read_by_weights)
        for whole, members in self.space.terms("product"):
            if whole in read_by_weights:
                read.update(members)
        positions: dict[int, set[int]] = defaultdict(set)
        for dim, index, _ in self.facts.picks:
            positions[self.space.find(dim)].add(index)
        cut: set[int] = set()
        for dim, indices in positions.items():
            if not read.isdisjoint(self.space.between(dim, indices)):
                cut.add(dim)
                for index in indices:
                    self.space.part(dim, index, index + 1)
        return cut

    def _interpret(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op != "call_function":
                continue
            self.env[node] = self._pick(node) if is_getitem(node) else self._call(node)

    def _pick(self, node: Node) -> Result:
        """Return one of several results."""
        source, index = node.args[:2]
        if source in self._straight:
            self._straight.add(node)
        results = self._lookup(source)
        if isinstance(results, (tuple, list)) and isinstance(index, int):
            return results[index]
        # An operator without a rule that returns a list of one tensor.
        is_lone = isinstance(results, Value) and isinstance(source, Node) and len(output_shapes(source)) == 1
        return results if is_lone else None

    def _call(self, node: Node) -> Result:
        """Apply the rule of an operator, and follow what it does to values."""
        straight = any(map(self.is_straight, node.all_input_nodes))
        module = self.module_of(node)
        arguments = self._arguments(node)
        backward = node in self.derivatives
        if backward:  # sizes must agree, but no weight is used that was not used forwards
            arguments = {name: _as_data(value) for name, value in arguments.items()}
        call = Call(node, arguments, self.space, self.facts, module, straight, self.mixed, backward)
        self.space.where = call.where
        # Higher-order operators with a rule of their own (flex_attention) are not entered.
        graphs = subgraphs(node) if call.operator not in RULES else []
        if not call.shapes and not graphs:
            return None
        if any(0 in value.sizes for value in call.values):
            return self._empty(call)
        known_weights = len(self.facts.weights)
        result = self._nested(call, graphs) if graphs else self._apply(call)
        self._check(call, result)
        # buffer[:, t].copy_(x): the buffer is no constant any more
        if isinstance(result, Value) and not result.static:
            self._unsettle(written(node))
        self._keep_straight(call, known_weights)
        return result

    def _keep_straight(self, call: Call, known_weights: int) -> None:
        """Follow a line of linear operators, which starts at a weight and ends at the first nonlinearity."""
        makes_axes = any(fan_out for _, fan_out in self.facts.weights[known_weights:])
        if (makes_axes or call.straight) and self._is_linear(call):
            self._straight.add(call.node)

    def _is_linear(self, call: Call) -> bool:
        """Whether an operator on data is linear in its operands."""
        rule = RULES.get(call.operator.removesuffix("_"))
        # Products have a rule of their own, for those that a sum follows.
        pointwise = rule in (RULES["pointwise"], RULES["aten.mul"])
        return not call.static and keeps_straight(call.node, call.operator, call.values, pointwise)

    def _unsettle(self, target: Node | None) -> None:
        """What was written into a tensor, or into a view of it, depends on the inputs from then on."""
        while target and target.op == "call_function":
            value = self.env.get(target)
            if isinstance(value, Value) and value.static:
                self.env[target] = Value(bare(value.axes))
            target = viewed(target)

    def _empty(self, call: Call) -> Result:
        """An empty tensor says nothing; joined to others it is left out, and no weight may act on it."""
        not_empty = [value for value in call.values if 0 not in value.sizes]
        # torch.cat([empty, x]), a cache of keys and values before its first token: it is x, and as straight.
        if call.operator == "aten.cat" and call.straight:
            self._straight.add(call.node)
        if call.operator == "aten.cat" and not_empty:
            call.arguments = {**call.arguments, "tensors": not_empty}
            return self._apply(call)
        if any(value.parametric for value in not_empty):
            raise InferenceError(
                f"{call.where}: a tensor with an axis of size 0 carries no width; "
                "give example inputs and a model without empty tensors"
            )
        return one_or_all(list(map(call.unknown, call.shapes)))

    def _nested(self, call: Call, graphs: Sequence[torch.fx.GraphModule]) -> Result:
        """Interpret the subgraphs of a higher-order operator (no_grad, autocast, checkpoint, cond, scan)."""
        arguments = call.node.args
        # Operands stand behind the last subgraph, whatever the operator takes ahead of it.
        last_graph = max(
            position
            for position, argument in enumerate(arguments)
            if graph_of(call.node, argument) is not None
        )
        operands = [item for item in flatten(arguments[last_graph + 1 :]) if isinstance(item, Node)]
        of_first, *branches = [self._run_graph(graph, operands) for graph in graphs]
        for branch in branches:  # of a condition: whichever runs, the results are the same tensors
            for left, right in zip(of_first, branch, strict=True):
                for axis, other_axis in zip(left.axes, right.axes, strict=True):
                    call.unify(axis, other_axis)
        results = []
        for value, shape in zip(of_first, call.shapes, strict=True):
            if len(value.axes) != len(shape):  # a scan stacks what its body returns
                value = call.value([call.new(shape[0]), *value.axes])
            results.append(value)
        return results

    def _run_graph(self, graph: torch.fx.GraphModule, operands: Sequence[Node]) -> list[Value]:
        """Interpret a subgraph on operands of the outer graph."""
        placeholders = graph.graph.find_nodes(op="placeholder")
        for placeholder, operand in zip(placeholders, operands, strict=False):
            self.env[placeholder] = self._element(placeholder, self.env.get(operand))
        self._interpret(graph.graph.nodes)
        outputs = flatten([self._lookup(graph.graph.output_node().args[0])])
        return [value for value in outputs if isinstance(value, Value)]

    def _element(self, hole: Node, value: Result) -> Result:
        """A scan hands its body one element of the sequence."""
        meta = hole.meta.get("val")
        if isinstance(value, Value) and isinstance(meta, torch.Tensor) and meta.dim() == len(value.axes) - 1:
            return Value(value.axes[1:], value.static)
        return value

    def _apply(self, call: Call) -> Result:
        # add_ falls back on the rule of add.
        rule = RULES.get(call.operator) or RULES.get(call.operator.removesuffix("_"))
        if rule:
            return rule(call)
        if not call.values:
            return RULES["create"](call)
        if torch.Tag.pointwise in getattr(call.node.target, "tags", ()):
            return RULES["pointwise"](call)
        if call.backward and "_backward" in call.operator:
            return RULES["backward"](call)
        return self._unknown(call)

    def _unknown(self, call: Call) -> Result:
        """Treat by shape what looks pointwise; refuse the rest, or leave it open when not strict."""
        shapes = [value.sizes for value in call.values]
        if (
            len(call.shapes) == 1
            and call.shape in shapes
            and all(broadcasts(shape, call.shape) for shape in shapes)
        ):
            self.facts.warnings.append(f"{call.where}: no dimension rule; treated as pointwise by its shapes")
            return RULES["pointwise"](call)
        message = f"{call.where}: no dimension rule for this operator"
        if self.strict:
            raise InferenceError(
                f"{message}. Pass strict=False to leave what depends on it ambiguous, together with base= a "
                "second instance of the model at another width, which settles it"
            )
        self.facts.warnings.append(f"{message}; what depends on it is ambiguous")
        return one_or_all(list(map(call.unknown, call.shapes)))

    def _check(self, call: Call, result: Result) -> None:
        """Refuse a rule's result that has other shapes than the operator's."""
        shapes = [value.sizes for value in flatten([result]) if isinstance(value, Value)]
        if shapes != call.shapes:
            raise InferenceError(f"{call.where}: the rule gave shapes {shapes}, the operator {call.shapes}")

    def _arguments(self, node: Node) -> dict[str, Any]:
        """Bind arguments to the names of the operator's schema."""
        schema = getattr(node.target, "_schema", None)
        bound: dict[str, Any] = {}
        # getitem and arithmetic on sizes are Python functions, without a schema.
        if schema is None:
            bound.update({str(position): value for position, value in enumerate(node.args)})
            bound.update(node.kwargs)
        else:  # in the schema's order: what is transformed comes before its options
            for position, argument in enumerate(schema.arguments):
                if argument.name in node.kwargs:
                    bound[argument.name] = node.kwargs[argument.name]
                elif position < len(node.args):
                    bound[argument.name] = node.args[position]
                elif argument.has_default_value():
                    bound[argument.name] = argument.default_value
        return {name: self._lookup(value) for name, value in bound.items()}

    def _lookup(self, value: Any) -> Any:
        """Return what is known of an argument, nodes within lists included."""
        if isinstance(value, Node):
            return self.env.get(value)
        if isinstance(value, (tuple, list)):
            items = [self._lookup(item) for item in value]
            return tuple(items) if type(value) is tuple else items
        return value


def _as_data(value: Any) -> Any:
    """Return an argument with tensors of parameters as tensors of data."""
    if isinstance(value, Value):
        return Value(bare(value.axes))
    if isinstance(value, (tuple, list)):
        return [_as_data(item) for item in value]
    return value
