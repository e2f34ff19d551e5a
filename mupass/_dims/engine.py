"""Runs the dimension rules over a captured graph, one operator at a time.

The engine knows no operator. It looks the target up in the registry, hands the rule a `Call`, checks the
shape that comes back against the shape that capture recorded, and collects what rules say: uses of
parameters, seeds of finiteness, evidence of width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node

from mupass._dims.space import Space
from mupass._errors import InferenceError
from mupass._geometry import Use

Origin = frozenset[tuple[str, int]]
NOWHERE: Origin = frozenset()


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one tensor.

    Attributes:
        dim: Dimension handle in the space.
        size: Its size.
        origin: Parameter axes that this axis still *is*, for tensors computed from parameters alone.
    """

    dim: int
    size: int
    origin: Origin = NOWHERE


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as inference sees it.

    Attributes:
        axes: Its axes.
        static: Whether it is computed from parameters, buffers and constants alone.
    """

    axes: tuple[Axis, ...]
    static: bool = False

    @property
    def parametric(self) -> bool:
        """Whether some axis is still an axis of a parameter."""
        return self.static and any(a.origin for a in self.axes)


@dataclass(frozen=True)
class ParameterUse:
    """A use of one parameter, with the dimensions it met."""

    parameter: str
    use: Use


@dataclass(frozen=True)
class Bilinear:
    """A product of two activations: dims in both operands and the output, and all the others."""

    batch: tuple[int, ...]
    inner: tuple[int, ...]
    where: str


@dataclass
class Facts:
    """What the rules have found, next to the space itself."""

    uses: list[ParameterUse] = field(default_factory=list)
    finite: dict[int, str] = field(default_factory=dict)  # dim -> why, certain
    literal: dict[int, str] = field(default_factory=dict)  # dim -> why, used to break ties
    fan_in: dict[int, str] = field(default_factory=dict)  # dims that weights contract
    fan_out: dict[int, str] = field(default_factory=dict)  # dims that weights make
    enumerated: dict[int, str] = field(
        default_factory=dict
    )  # finite dims whose positions are separate things
    groups: dict[int, str] = field(default_factory=dict)  # group counts of grouped convolutions
    bilinear: list[Bilinear] = field(default_factory=list)
    attention: list[tuple[int, float | None, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
        return [v for v in _flatten(self.arguments.values()) if isinstance(v, Value)]

    @property
    def static(self) -> bool:
        """Whether no tensor argument depends on the model's inputs."""
        return all(v.static for v in self.values)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all output tensors, flattened."""
        outputs = _flatten([self.node.meta.get("val")])
        return [tuple(int(s) for s in t.shape) for t in outputs if isinstance(t, torch.Tensor)]

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
        self.finite(axis, why)
        self.facts.enumerated.setdefault(axis.dim, why)

    def literal(self, axis: Axis, why: str) -> None:
        """Record a hint, used only where the constraints leave a choice."""
        self.facts.literal.setdefault(axis.dim, f"{why} ({self.where})")

    def use(self, kind: str, fan_in: Iterable[Axis], fan_out: Iterable[Axis], weight: Value) -> None:
        """Record that a weight contracts the fan_in axes and makes the fan_out axes."""
        fan_in, fan_out = tuple(fan_in), tuple(fan_out)
        for axis in fan_in:
            self.facts.fan_in.setdefault(axis.dim, self.where)
        for axis in fan_out:
            self.facts.fan_out.setdefault(axis.dim, self.where)
        rows = {p: ([], []) for a in weight.axes for p, _ in a.origin}  # type: ignore[var-annotated]
        for side, axes in enumerate((fan_in, fan_out)):
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

    def placeholder(self, node: Node, shape: Sequence[int], parameter: str | None, static: bool) -> Value:
        """Bind a parameter, buffer, constant or input."""
        axes = []
        for index, size in enumerate(shape):
            origin = frozenset({(parameter, index)}) if parameter else NOWHERE
            axes.append(Axis(self.space.new(int(size)), int(size), origin))
        self.env[node] = Value(tuple(axes), static)
        return self.env[node]

    def run(self, nodes: Iterable[Node]) -> None:
        """Apply a rule to every operator."""
        for node in nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
        self.space.where = "slices"
        self.space.close_slices()

    def _call(self, node: Node) -> Result:
        if _is_getitem(node):
            source, index = self._lookup(node.args[0]), node.args[1]
            return source[index] if isinstance(source, (tuple, list)) else None
        call = Call(self, node, self._arguments(node))
        self.space.where = call.where
        outputs = [t for t in _flatten([node.meta.get("val")]) if isinstance(t, torch.Tensor)]
        if not outputs:
            return None
        for value in call.values:
            if any(a.size == 0 for a in value.axes):
                raise InferenceError(
                    f"{call.where}: a tensor with an axis of size 0 carries no width; "
                    "give example inputs and a model without empty tensors"
                )
        result = self._apply(call)
        self._check(call, result)
        return result

    def _apply(self, call: Call) -> Result:
        target = call.node.target
        found = RULES.get(call.operator) or RULES.get(call.operator.removesuffix("_"))
        if found:
            return found(call)
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return RULES["pointwise"](call)
        if not call.values:
            return RULES["create"](call)
        return self._unknown(call)

    def _unknown(self, call: Call) -> Result:
        """Treat by shape what looks pointwise; refuse the rest, or leave it open when not strict."""
        sizes = [tuple(a.size for a in v.axes) for v in call.values]
        if len(call.shapes) == 1 and call.shape in sizes and all(_broadcasts(s, call.shape) for s in sizes):
            self.facts.warnings.append(f"{call.where}: no dimension rule; treated as pointwise by its shapes")
            return RULES["pointwise"](call)
        message = f"{call.where}: no dimension rule for this operator"
        if self.strict:
            raise InferenceError(
                f"{message}. Pass base= a second instance of the model at another width, or strict=False to "
                "leave what depends on it ambiguous, or register a rule with mupass.rule"
            )
        self.facts.warnings.append(f"{message}; what depends on it is ambiguous")
        outputs = [call.value([call.new(s) for s in shape]) for shape in call.shapes]
        return outputs[0] if len(outputs) == 1 else outputs

    def _check(self, call: Call, result: Result) -> None:
        got = [tuple(a.size for a in v.axes) for v in _flatten([result]) if isinstance(v, Value)]
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


def operator_name(target: Any) -> str:
    """Return ``aten.linear`` for ``aten.linear.default``; other callables give their own name."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem" and not hasattr(node.target, "_schema")


def _broadcasts(small: tuple[int, ...], big: tuple[int, ...]) -> bool:
    return len(small) <= len(big) and all(s in (1, b) for s, b in zip(small[::-1], big[::-1], strict=False))


def _flatten(items: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for item in items:
        if isinstance(item, (tuple, list)):
            flat += _flatten(item)
        elif isinstance(item, dict):
            flat += _flatten(item.values())
        else:
            flat.append(item)
    return flat


def product_of(axes: Sequence[Axis]) -> int:
    """Return the number of elements along several axes."""
    return prod(a.size for a in axes)
