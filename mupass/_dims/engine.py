"""Runs the dimension rules over a captured graph, one operator at a time.

The engine knows no operator. It looks the target up in the registry, hands the rule a `Call`, checks the
shape that comes back against the shape that capture recorded, and collects what rules say: uses of
parameters, seeds of finiteness, evidence of width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from mupass._dims.facts import NOWHERE, Axis, Facts, ParameterUse, Value
from mupass._dims.graph import broadcasts, flatten, is_getitem, is_graph, operator_name, shape_of, subgraphs
from mupass._dims.space import Space
from mupass._dims.straight import keeps_straight
from mupass._errors import InferenceError
from mupass._geometry import Use

Result = Any  # a Value, or a tuple or list of results, or None for outputs that are no tensors
Rule = Callable[["Call"], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators named without overload, such as ``aten.linear``."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise AssertionError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


class Call:
    """One operator call: arguments by schema name, output shapes, and the space."""

    def __init__(self, engine: Engine, node: Node, arguments: dict[str, Any]):
        self.engine, self.node, self.arguments = engine, node, arguments
        self.space, self.facts = engine.space, engine.facts
        self.operator = operator_name(node.target)
        self.module = engine.module_of(node)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by schema name, or a default where the operator has none of it."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def where(self) -> str:
        """Operator and module, for evidence."""
        return f"{self.operator} in {self.module or 'the root module'}"

    @property
    def values(self) -> list[Value]:
        """All tensor arguments, lists flattened, in order."""
        return [v for v in flatten(self.arguments.values()) if isinstance(v, Value)]

    @property
    def static(self) -> bool:
        """Whether no tensor argument depends on the model's inputs."""
        return all(v.static for v in self.values)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all output tensors, flattened."""
        outputs = flatten([self.node.meta.get("val")])
        return [shape_of(t) for t in outputs if isinstance(t, torch.Tensor)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the single output tensor."""
        return self.shapes[0]

    def new(self, size: int) -> Axis:
        """Return an axis about which nothing is known."""
        return Axis(self.space.new(size), size)

    def derive(self, axis: Axis, size: int) -> Axis:
        """Return an axis of another size that grows when the given one does."""
        return Axis(self.space.derive(axis.dim, size), size, axis.origin)

    def value(self, axes: Iterable[Axis], static: bool | None = None) -> Value:
        """Return an output; parameter origins survive only in static tensors."""
        static = self.static if static is None else static
        axes = tuple(axes)
        return Value(axes if static else tuple(Axis(a.dim, a.size) for a in axes), static)

    def unify(self, a: Axis, b: Axis) -> None:
        """State that two axes agree; a size of 1 broadcasts and states nothing."""
        if a.size == b.size and a.size != 1:
            self.space.unify(a.dim, b.dim)

    def finite(self, axis: Axis, why: str) -> None:
        """Record certain evidence that an axis does not grow."""
        self.facts.finite.setdefault(axis.dim, f"{why} ({self.where})")

    def enumerate(self, axis: Axis, why: str) -> None:
        """Record that positions along an axis are separate things, such as query, key and value."""
        if self.node.users:  # a pick that nothing reads was made for its shape only
            self.finite(axis, why)
            self.facts.enumerated.setdefault(axis.dim, why)

    def alternative(self, axis: Axis, why: str) -> None:
        """Record that entries along an axis compete, such as experts or memory slots."""
        self.facts.alternatives.setdefault(axis.dim, f"{why} ({self.where})")

    def literal(self, axis: Axis, why: str) -> None:
        """Record a hint, used only where the constraints leave a choice."""
        self.facts.literal.setdefault(axis.dim, f"{why} ({self.where})")

    def use(
        self,
        kind: str,
        fan_in: Iterable[Axis],
        fan_out: Iterable[Axis],
        weight: Value,
        basis: bool = False,
        beside: Iterable[Axis] = (),
    ) -> None:
        """Record that a weight contracts the fan_in axes and makes the fan_out axes.

        With ``basis``, what it is contracted with is a parameter too. Axes ``beside`` each other are made as
        well (a batch of weights that all read the same), which is no sign that they grow.
        """
        fan_in, fan_out = tuple(fan_in), tuple(fan_out)
        if not self.static:
            straight = any(map(self.engine.is_straight, self.node.all_input_nodes))
            (self.facts.straight if straight else self.facts.bent).update(a.dim for a in fan_in)
        self.facts.weights.append((tuple(a.dim for a in fan_in), tuple(a.dim for a in fan_out)))
        for axis in fan_in:
            (self.facts.basis if basis else self.facts.fan_in).setdefault(axis.dim, self.where)
        for axis in fan_out:
            self.facts.fan_out.setdefault(axis.dim, self.where)
        rows = {p: ([], []) for a in weight.axes for p, _ in a.origin}  # type: ignore[var-annotated]
        for side, axes in enumerate((fan_in, (*fan_out, *beside))):
            for parameter, index in sorted({o for a in axes for o in a.origin}):
                rows[parameter][side].append(index)
        for parameter, (i, o) in rows.items():
            use = Use(str(self.node.target), self.module, kind, tuple(i), tuple(o))
            self.facts.uses.append(ParameterUse(parameter, use))

    def pointwise_use(self, kind: str, parameter: Value) -> None:
        """Record that a parameter multiplies or shifts an activation elementwise."""
        self.use(kind, (), (), parameter)


class Engine:
    """Interprets a graph in the domain of axes."""

    def __init__(self, module_of: Callable[[Node], str], strict: bool = True):
        self.space, self.facts = Space(), Facts()
        self.module_of, self.strict = module_of, strict
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
        self.env[node] = Value(tuple(axes), static)
        return self.env[node]

    def run(self, nodes: Iterable[Node]) -> None:
        """Apply a rule to every operator, then close the books."""
        self._interpret(nodes)
        self.space.where = "slices"
        self.space.close_slices()

    def _interpret(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)

    def _call(self, node: Node) -> Result:
        if is_getitem(node):
            source, index = self._lookup(node.args[0]), node.args[1]
            self._straight.update({node} if node.args[0] in self._straight else ())
            return source[index] if isinstance(source, (tuple, list)) and isinstance(index, int) else None
        call = Call(self, node, self._arguments(node))
        self.space.where = call.where
        graphs = subgraphs(node) if call.operator not in RULES else []
        if not call.shapes and not graphs:
            return None
        if any(a.size == 0 for v in call.values for a in v.axes):
            return self._empty(call)
        weights = len(self.facts.weights)
        result = self._nested(call, graphs) if graphs else self._apply(call)
        self._check(call, result)
        made = any(out for _, out in self.facts.weights[weights:])
        pointwise = RULES.get(call.operator.removesuffix("_")) is RULES["pointwise"]
        if not call.static and keeps_straight(node, call.operator, call.values, pointwise):
            if made or any(map(self.is_straight, node.all_input_nodes)):
                self._straight.add(node)
        return result

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
            bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            bound |= {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
            bound |= node.kwargs
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
