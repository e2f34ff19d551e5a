"""One operator call as dimension rules see it, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mupass._dims.facts import Axis, ParameterUse, Value
from mupass._dims.graph import flatten, operator_name, shape_of
from mupass._roles.geometry import Use

if TYPE_CHECKING:
    from mupass._dims.engine import Engine

Result = Any  # a Value, or a tuple or list of results, or None for outputs that are no tensors
Rule = Callable[["Call"], Result]
RULES: dict[str, Rule] = {}
# Operators with an argument that lends its type, device or shape, and none of its values.
LENDERS = dict.fromkeys(("aten.type_as", "aten.to", "aten.view_as", "aten.reshape_as"), "other")
PICKED = "its positions are taken one by one"


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
    def backward(self) -> bool:
        """Whether the operator belongs to a derivative that the forward pass takes."""
        return self.node in self.engine.derivatives

    @property
    def values(self) -> list[Value]:
        """All tensor arguments in order, lists flattened, but for those that lend their type or shape."""
        lender = LENDERS.get(self.operator)
        lent = [v for name, v in self.arguments.items() if name != lender]
        return [v for v in flatten(lent) if isinstance(v, Value)]

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

    def pick(self, axis: Axis, index: object) -> None:
        """Record that positions are taken one by one; a single one may also be split off the rest."""
        if isinstance(index, int) and self.node.users:
            self.facts.picks.append((axis.dim, index % axis.size, self.where))
        else:
            self.enumerate(axis, PICKED)

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
