"""One operator call as dimension rules see it: its arguments by name, and what a rule can state of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

from mupass._dims.facts import NOWHERE, Axis, Facts, Origin, ParameterUse, Value, bare
from mupass._dims.graph import flatten, operator_name, output_shapes
from mupass._dims.space import Space
from mupass._records import PRODUCT_AND_SUM, Use

Result = Any  # a Value, or a tuple or list of results, or None for outputs that are no tensors
# Operators with an argument that lends its type, device or shape, and none of its values.
LENDERS = dict.fromkeys(("aten.type_as", "aten.to", "aten.view_as", "aten.reshape_as"), "other")
PICKED = "its positions are taken one by one"


def one_or_all(outputs: Sequence[Value]) -> Result:
    """Return a single output alone, and several as a tuple, as operators do."""
    if len(outputs) == 1:
        return outputs[0]
    return tuple(outputs)


class Call:
    """One operator call: arguments by schema name, output shapes, and the books that rules write into.

    Attributes:
        node: The operator in the graph.
        arguments: Arguments by their name in the operator's schema, in its order.
        space: Dimensions and what is known of their sizes.
        facts: What rules record.
        operator: Name without overload, such as ``aten.linear``.
        module: Qualified name of the module whose forward called it.
        straight: Whether an operand comes from a weight with no nonlinearity in between.
        mixed: Parameter axes along which whole weights are mixed into one a sample.
        backward: Whether the operator belongs to a derivative that the forward pass takes.
    """

    def __init__(
        self,
        node: Node,
        arguments: dict[str, Any],
        space: Space,
        facts: Facts,
        module: str,
        straight: bool = False,
        mixed: Origin = NOWHERE,
        backward: bool = False,
    ):
        self.node, self.arguments = node, arguments
        self.space, self.facts = space, facts
        self.operator = operator_name(node.target)
        self.module = module
        self.straight, self.mixed = straight, mixed
        self.backward = backward

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by schema name, or a default where the operator has none of it."""
        value = self.arguments.get(name)
        if value is None:
            return default
        return value

    @property
    def where(self) -> str:
        """Operator and module, for evidence."""
        return f"{self.operator} in {self.module or 'the root module'}"

    @property
    def values(self) -> list[Value]:
        """All tensor arguments in order, lists flattened, but for those that lend their type or shape."""
        # x.type_as(w) takes the type of w: no axis of w meets one of x.
        lender = LENDERS.get(self.operator)
        others = [argument for name, argument in self.arguments.items() if name != lender]
        return [item for item in flatten(others) if isinstance(item, Value)]

    @property
    def static(self) -> bool:
        """Whether no tensor argument depends on the model's inputs."""
        return all(value.static for value in self.values)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all output tensors, flattened."""
        return output_shapes(self.node)

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

    def resized(self, axis: Axis, size: int) -> Axis:
        """Return an axis itself where it has that size already, else one that grows when it does."""
        if axis.size == size:
            return axis
        return self.derive(axis, size)

    def unknown(self, shape: Iterable[int]) -> Value:
        """Return an output about whose axes nothing is known."""
        return self.value([self.new(size) for size in shape])

    def value(self, axes: Iterable[Axis], static: bool | None = None) -> Value:
        """Return an output; parameter origins survive only in static tensors."""
        if static is None:
            static = self.static
        if static:
            return Value(tuple(axes), static)
        # A result that depends on the inputs has axes of its own, unlike w.t(), which has those of w.
        return Value(bare(axes), static)

    def unify(self, first: Axis, second: Axis) -> None:
        """State that two axes agree; a size of 1 broadcasts and states nothing."""
        # Where x is [1, n] and y is [m, n], the 1 says nothing about m.
        if first.size == second.size != 1:
            self.space.unify(first.dim, second.dim)

    def finite(self, axis: Axis, why: str) -> None:
        # The first reason stays: later ones say the same of the same dimension.
        """Record certain evidence that an axis does not grow."""
        self.facts.finite.setdefault(axis.dim, f"{why} ({self.where})")

    def enumerate(self, axis: Axis, why: str) -> None:
        """Record that positions along an axis are separate things, such as query, key and value."""
        if self.node.users:  # a pick that nothing reads was made for its shape only
            self.finite(axis, why)
            self.facts.enumerated.setdefault(axis.dim, why)

    def pick(self, axis: Axis, index: object) -> None:
        """Record that positions are taken one by one; a single one may also be split off the rest."""
        # x[:, 0] may be split off x[:, 1:]: whether weights read those shows at the end of the graph.
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
        contracted, produced = tuple(axis.dim for axis in fan_in), tuple(axis.dim for axis in fan_out)
        facts = self.facts
        # A weight right behind another one may read a bottleneck; behind a nonlinearity it reads features.
        if not self.static:
            (facts.straight if self.straight else facts.bent).update(contracted)
        facts.weights.append((contracted, produced))
        for dim in contracted:
            (facts.basis if basis else facts.fan_in).setdefault(dim, self.where)
        for dim in produced:
            facts.fan_out.setdefault(dim, self.where)
        # [batch, position, units]: beside the units there are several axes.
        axes_of_result = [size for size in self.shape if size > 1]
        units = [axis for axis in fan_out if axis.size > 1]
        if kind != PRODUCT_AND_SUM and len(axes_of_result) - len(units) > 1:
            facts.at_positions.update(produced)
        # A weight may be computed from several parameters: each has the axes that are still its own.
        inputs, outputs = _origins(fan_in), _origins((*fan_out, *beside))
        if not inputs:
            self._note_filters(fan_in, units)
        for parameter in _origins(weight.axes):
            use = Use(str(self.node.target), self.module, kind, inputs[parameter], outputs[parameter])
            facts.uses.append(ParameterUse(parameter, use))

    def _note_filters(self, fan_in: Iterable[Axis], units: Iterable[Axis]) -> None:
        """Note filters that the code computes, as many as a parameter has numbers: it has no axis read."""
        if any(axis.size > 1 for axis in fan_in):
            self.facts.filters.update({axis.dim: self.where for axis in units if axis.origin})

    def pointwise_use(self, kind: str, parameter: Value) -> None:
        """Record that a parameter multiplies or shifts an activation elementwise."""
        self.use(kind, (), (), parameter)


def _origins(axes: Iterable[Axis]) -> dict[str, tuple[int, ...]]:
    """Return for every parameter which of its axes are among some axes."""
    positions: dict[str, set[int]] = defaultdict(set)
    for axis in axes:
        for parameter, position in axis.origin:
            positions[parameter].add(position)
    return defaultdict(tuple, {parameter: tuple(sorted(axes_of)) for parameter, axes_of in positions.items()})
