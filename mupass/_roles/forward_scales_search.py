"""Numbers in the forward pass that hold the width: multipliers ``size**p`` and normalization to unit length.

A model that multiplies by ``d_model**-0.5`` scales with its width by itself, on top of the plan. Sizes are
compared here, so a number that merely equals a power of a width is found too. What is certain, and read by a
weight, the plan takes into account (`mupass._roles.forward_scales`); all else is named and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isclose, prod
from typing import Any

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import flatten, is_getitem, operator_name
from mupass._dims.infer import Inference

POWERS = (-1.0, -0.5, 0.5, 1.0)
SMALLEST = 8  # powers of smaller sizes are numbers like 1/2 and 2, which are written for other reasons
MULTIPLY, DIVIDE = ("aten.mul", "aten.multiply"), ("aten.div", "aten.divide", "aten.true_divide")
PRODUCTS = ("aten.matmul", "aten.mm", "aten.bmm", "aten.einsum", "aten.linear", "aten.addmm", "aten.baddbmm")
NORMS = ("aten.linalg_vector_norm", "aten.norm", "aten.frobenius_norm")
# What passes a product, a length or a unit vector on, up to its shape.
PASSING = {
    f"aten.{n}"
    for n in (
        *(
            "view",
            "reshape",
            "permute",
            "transpose",
            "unsqueeze",
            "squeeze",
            "expand",
            "expand_as",
            "flatten",
        ),
        *(
            "to",
            "_to_copy",
            "type_as",
            "clone",
            "contiguous",
            "clamp",
            "clamp_min",
            "add",
            "maximum",
            "dropout",
        ),
    )
}
SUMMING = {"aten.add", "aten.maximum"}


@dataclass(frozen=True)
class Constant:
    """One number, or one normalization, that follows the width.

    Attributes:
        where: Operator and module.
        what: ``multiplies by``, ``multiplies a weight by``, ``multiplies attention by`` or ``unit length``.
        value: The multiplier; 1 for unit length.
        power: Which power of the size it is.
        dims: The dimensions whose sizes it holds; their product is the size.
        node: The operator.
    """

    where: str
    what: str
    value: float
    power: float
    dims: tuple[int, ...]
    node: Node = field(compare=False, repr=False)


def find_constants(captured: Capture, solved: Inference) -> list[Constant]:
    """Find the numbers in a forward pass that equal a power of a growing size.

    Args:
        captured: The graph.
        solved: Its inference.

    Returns:
        One record a place, in execution order. Means over an axis are none of them.
    """
    return list(_Search(captured, solved).run())


def multiplier(captured: Capture, node: Node) -> tuple[float, Sequence[Any]] | None:
    """Return the number that an operator multiplies by, and the operands; None for other operators.

    Args:
        captured: The graph.
        node: The operator.
    """
    operator, operands = operator_name(node.target).removesuffix("_"), node.args[:2]
    if operator == "aten.baddbmm" and isinstance(alpha := node.kwargs.get("alpha"), (int, float)):
        return (float(alpha), [node]) if alpha else None
    if operator in MULTIPLY and len(operands) == 2:
        number = next((x for a in operands if (x := _number(captured, a)) is not None), None)
        return None if number is None else (number, operands)
    if operator in DIVIDE and len(operands) == 2 and (number := _number(captured, operands[1])):
        return 1 / number, operands[:1]
    return None


def _number(captured: Capture, value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value in captured.numbers:
        return captured.numbers[value]
    operator, args = operator_name(value.target).removesuffix("_"), value.args
    if operator in ("aten.full", "aten.scalar_tensor") and getattr(value.meta.get("val"), "ndim", 1) == 0:
        return _number(captured, args[-1])
    if operator in ("aten.to", "aten._to_copy", "aten.detach", "aten.lift_fresh_copy", "aten.sqrt"):
        inner = _number(captured, args[0])
        return inner**0.5 if operator == "aten.sqrt" and inner is not None and inner >= 0 else inner
    return None


class _Search:
    def __init__(self, captured: Capture, solved: Inference):
        self.captured, self.solved, self.env = captured, solved, solved.engine.env
        self.space = solved.engine.space
        self.inner = {self.space.find(d) for b in solved.engine.facts.bilinear for d in b.inner}
        self.summed: dict[Node, tuple[int, ...]] = {}  # dims that the product behind a tensor contracted
        self.length: dict[Node, tuple[int, ...]] = {}  # dims that a tensor is the length along
        self.unit: dict[Node, Constant] = {}

    def run(self) -> Iterator[Constant]:
        for node in [n for n in self.env if n.op == "call_function"]:
            operator = operator_name(node.target).removesuffix("_")
            if operator in PRODUCTS:
                self.summed[node] = self._contracted(node)
            elif operator in NORMS and not self._static(node):
                self.length[node] = self._gone(node)
            elif operator in PASSING or is_getitem(node):
                for table in (self.summed, self.length, self.unit):
                    self._pass_on(table, node)
            yield from self._multiplier(node)
            yield from self._unit_length(node, operator)

    def _pass_on(self, table: dict[Node, Any], node: Node) -> None:
        for source in node.all_input_nodes:
            if source in table:
                table[node] = table[source]

    def _multiplier(self, node: Node) -> Iterator[Constant]:
        found = multiplier(self.captured, node)
        if found is None:
            return
        value, sources = found
        source = next((n for n in sources if _number(self.captured, n) is None), None)
        here = self.env.get(node)
        if not isinstance(here, Value) or source is None or here.static and not here.parametric:
            return  # tables of positions, computed from numbers alone
        if source in self.summed:
            self.summed[node] = self.summed[source]
        candidates = [*self._fan_in(here), *((d,) for d in self._dims(here, self.summed.get(source, ())))]
        for dims in candidates:
            for power in POWERS:
                if self._is_width(dims) and isclose(abs(value), self._size(dims) ** power, rel_tol=1e-5):
                    what = self._what(node, here, source, dims)
                    if what != "multiplies attention by" or power != -1:
                        yield Constant(self._where(node), what, value, power, dims, node)
                    return

    def _what(self, node: Node, value: Value, source: Any, dims: tuple[int, ...]) -> str:
        if value.parametric:
            return "multiplies a weight by"
        logits = dims[0] in self.summed.get(source, ()) and self.inner.issuperset(dims)
        return "multiplies attention by" if logits or self._is_compared(node, dims) else "multiplies by"

    def _is_compared(self, node: Node, dims: tuple[int, ...]) -> bool:
        """Whether a tensor is a query or key: a product with another activation contracts the axis."""
        for user in node.users:
            operator = operator_name(user.target).removesuffix("_")
            moving = not any(self._parametric(n) for n in user.all_input_nodes)
            if operator in PRODUCTS and moving and set(dims) <= set(self._contracted(user)):
                return True
            if operator in PASSING - SUMMING and self._is_compared(user, dims):
                return True
        return False

    def _unit_length(self, node: Node, operator: str) -> Iterator[Constant]:
        """A tensor divided by its own length; it counts where a weight or a gain then reads it."""
        below = node.args[1] if operator in DIVIDE and len(node.args) > 1 else None
        if isinstance(below, Node) and below in self.length:
            dims = tuple(d for d in self.length[below] if self._is_width((d,)))
            if dims:
                self.unit[node] = Constant(self._where(node), "unit length", 1.0, -0.5, dims, node)
        used = any(map(self._parametric, node.all_input_nodes))
        for source in node.all_input_nodes if used else ():
            if source in self.unit:
                yield self.unit.pop(source)

    def _contracted(self, node: Node) -> tuple[int, ...]:
        here = self.env.get(node)
        kept = set(self._dims(here)) if isinstance(here, Value) else set()
        values = [v for n in node.all_input_nodes if isinstance(v := self.env.get(n), Value)]
        dims = [d for v in values for d in self._dims(v)]
        return tuple(dict.fromkeys(d for d in dims if dims.count(d) > 1 and d not in kept))

    def _gone(self, node: Node) -> tuple[int, ...]:
        here, source = self.env.get(node), self.env.get(node.all_input_nodes[0])
        kept = set(self._dims(here)) if isinstance(here, Value) else set()
        return tuple(d for d in self._dims(source) if d not in kept) if isinstance(source, Value) else ()

    def _fan_in(self, value: Value) -> list[tuple[int, ...]]:
        """Return the axes of a weight behind the first: its fan_in in the usual layout, taken together."""
        dims = [self.space.find(a.dim) for a in value.axes[1:]]
        return [tuple(dims)] if value.parametric and len(dims) > 1 else []

    def _dims(self, value: Value, more: Sequence[int] = ()) -> list[int]:
        return list(dict.fromkeys([*(self.space.find(a.dim) for a in value.axes), *more]))

    def _is_width(self, dims: Sequence[int]) -> bool:
        """Whether some axes together are a width; batch x heads, say, is none."""
        verdicts = self.solved.verdicts
        factors = {m for d in dims for term in self.space.terms_of(d, "product") for m in term}
        mixed = len(dims) == 1 and any(
            (v := verdicts.get(m)) and not (v.infinite or v.policy) for m in factors
        )
        return self._size(dims) >= SMALLEST and any(map(verdicts.grows, dims)) and not mixed

    def _size(self, dims: Sequence[int]) -> int:
        return prod(map(self.space.size, dims))

    def _static(self, node: Node) -> bool:
        return all(
            v.static for v in flatten([self.env.get(n) for n in node.all_input_nodes]) if v is not None
        )

    def _parametric(self, node: Node) -> bool:
        value = self.env.get(node)
        return isinstance(value, Value) and value.parametric

    def _where(self, node: Node) -> str:
        module = self.captured.owners.get(node, "")
        return f"{operator_name(node.target)} in {module or 'the root module'}"


def constant_notes(
    constants: Sequence[Constant], name: Callable[[int], str], base: Callable[[int], float]
) -> tuple[str, ...]:
    """Say in words what each number does and what to write instead.

    Args:
        constants: What `find_constants` found.
        name: Name of a dimension.
        base: Base size of a dimension.
    """
    return tuple(dict.fromkeys(_note(c, name, base) for c in constants))


def _note(c: Constant, name: Callable[[int], str], base: Callable[[int], float]) -> str:
    term = "*".join(map(name, c.dims))
    term = f"an axis of size {term}" if term.isdigit() else term
    if c.what == "unit length":
        return (
            f"{c.where}: normalizes to unit length along {term}, which grows, so its entries shrink like one "
            "over the square root of that size, on top of the plan; multiply by the root, or use an RMS norm"
        )
    at_base = prod(map(base, c.dims))
    holds = f"{c.where}: {c.what} {c.value:.6g}, which is the size of {term} to the power {c.power:g}"
    if c.what == "multiplies attention by":
        return (
            f"{holds}; it grows, so logits must scale as one over that size, not over its square root: write "
            f"{at_base**0.5:.6g} / size in its place"
        )
    number = (1 if c.value > 0 else -1) * at_base**c.power
    return (
        f"{holds}; if it is computed from the width, it comes on top of the plan: write the number of the "
        f"base width, {number:.6g}, in its place"
    )
