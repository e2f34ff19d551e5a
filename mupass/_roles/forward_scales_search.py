"""Numbers in the forward pass that hold the width: multipliers ``size**p`` and normalization to unit length.

A model that multiplies by ``d_model**-0.5`` scales with its width by itself, on top of the plan. Sizes are
compared here, so a number that merely equals a power of a width is found too. What is certain, and read by a
weight, the plan takes into account (`mupass._roles.forward_scales`); all else is named and left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import copysign, isclose, prod
from typing import Any

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.facts import Value
from mupass._dims.graph import is_getitem, operator_name
from mupass._dims.infer import Inference
from mupass._dims.operator_traits import Trait, traits
from mupass._errors import is_number
from mupass._roles.nodes import all_static, inner_dims, is_parametric, place_of, traits_of

Dims = tuple[int, ...]  # dimensions whose sizes are multiplied
POWERS = (-1.0, -0.5, 0.5, 1.0)
SMALLEST = 8  # powers of smaller sizes are numbers like 1/2 and 2, which are written for other reasons
PRODUCTS = Trait.MATRIX_PRODUCT | Trait.AFFINE
# What passes a product, a length or a unit vector on: one operand, up to its shape, or one of two.
PASS_ONE = Trait.COPIES | Trait.RESHAPES | Trait.DROPS_OUT | Trait.LIMITS
PASS_EITHER = Trait.ADDS | Trait.LARGER


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
    dims: Dims
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
    name = operator_name(node.target).removesuffix("_")
    # torch.baddbmm(bias, q, k, alpha=d**-0.5)
    if name == "aten.baddbmm":
        alpha = node.kwargs.get("alpha")
        return (float(alpha), [node]) if isinstance(alpha, (int, float)) and alpha else None
    operator_traits, operands = traits(name), node.args[:2]
    if not operator_traits & (Trait.MULTIPLIES | Trait.DIVIDES) or len(operands) < 2:
        return None
    first, second = (_number(captured, operand) for operand in operands)
    # x * d**-0.5, in either order
    if operator_traits & Trait.MULTIPLIES:
        number = second if first is None else first
        return None if number is None else (number, operands)
    # x / d**0.5
    return (1 / second, operands[:1]) if second else None


def _number(captured: Capture, value: Any) -> float | None:
    """Return the number that an operand is, or None for a tensor."""
    if is_number(value):
        return float(value)
    if not isinstance(value, Node):
        return None
    # A buffer of one number.
    if value in captured.numbers:
        return captured.numbers[value]
    name, arguments = operator_name(value.target).removesuffix("_"), value.args
    # torch.full((), 8.0)
    if name in ("aten.full", "aten.scalar_tensor") and getattr(value.meta.get("val"), "ndim", 1) == 0:
        return _number(captured, arguments[-1])
    if traits(name) & (Trait.COPIES | Trait.DETACHES):
        return _number(captured, arguments[0])
    # torch.sqrt(torch.tensor(d))
    if name == "aten.sqrt":
        inner = _number(captured, arguments[0])
        return inner**0.5 if inner is not None and inner >= 0 else inner
    return None


class _Search:
    """Goes through a graph in the order of execution, and carries along what is known of its tensors."""

    def __init__(self, captured: Capture, solved: Inference):
        self.captured, self.solved, self.values = captured, solved, solved.engine.env
        self.space = solved.engine.space
        self.inner = inner_dims(solved)
        self.summed: dict[Node, Dims] = {}  # dims that the product behind a tensor contracted
        self.length: dict[Node, Dims] = {}  # dims that a tensor is the length along
        self.unit: dict[Node, Constant] = {}

    def run(self) -> Iterator[Constant]:
        """Yield what is found, in the order of execution."""
        for operator in list(self.values):
            if operator.op != "call_function":
                continue
            operator_traits = traits_of(operator)
            # x @ w: the axes that the product sums over are kept in mind for a multiplier behind it.
            if operator_traits & PRODUCTS:
                self.summed[operator] = self._contracted(operator)
            # x.norm(dim=-1): a division by it gives unit length; lengths of weights are left out.
            elif operator_traits & Trait.LENGTH:
                if not all_static(map(self.values.get, operator.all_input_nodes)):
                    self.length[operator] = self._reduced(operator)
            elif operator_traits & (PASS_ONE | PASS_EITHER) or is_getitem(operator):
                # x.clamp(min=eps), dropout(x), x.view(...): all that is known of x holds of the result.
                for known_dims in (self.summed, self.length, self.unit):
                    self._pass_on(known_dims, operator)
            yield from self._multiplier(operator)
            yield from self._unit_length(operator, operator_traits)

    def _pass_on(self, table: dict[Node, Any], operator: Node) -> None:
        """Note of a result what is known of an operand: of the first one, or of any where operands add up."""
        operands = operator.all_input_nodes
        if not traits_of(operator) & PASS_EITHER:
            operands = operands[:1]
        for source in operands:
            if source in table:
                table[operator] = table[source]

    def _multiplier(self, operator: Node) -> Iterator[Constant]:
        """Yield a multiplication by a number that equals a power of a width."""
        multiplication = multiplier(self.captured, operator)
        if multiplication is None:
            return
        number, operands = multiplication
        tensors = [operand for operand in operands if _number(self.captured, operand) is None]
        result = self.values.get(operator)
        # Tables of positions are computed from numbers alone.
        if not isinstance(result, Value) or not tensors or result.static and not result.parametric:
            return
        # (x @ w) * d**-0.5 * mask: what the product summed over stays known behind the multiplier.
        source = tensors[0]
        if source in self.summed:
            self.summed[operator] = self.summed[source]
        # The fan_in of a weight, an axis of the result, or one that the product behind it summed over.
        candidates = self._fan_in(result)
        candidates += [(dim,) for dim in (*self._dims(result), *self.summed.get(source, ()))]
        dims, power = self._width_in(abs(number), candidates)
        if not power:
            return
        subject = self._what(operator, result, source, dims)
        # Logits divided by head_dim are as they should be.
        if subject != "multiplies attention by" or power != -1:
            location = place_of(operator, self.captured.owners)
            yield Constant(location, subject, number, power, dims, operator)

    def _width_in(self, number: float, candidates: Iterable[Dims]) -> tuple[Dims, float]:
        """Return the first width of which a number is a power, and the power; 0 where it is none."""
        for dims in candidates:
            # The first fit is taken: sizes with one value cannot be told apart by a number.
            if self._is_width(dims):
                for power in POWERS:
                    if isclose(number, self._size(dims) ** power, rel_tol=1e-5):
                        return dims, power
        return (), 0.0

    def _what(self, operator: Node, result: Value, source: Any, dims: Dims) -> str:
        if result.parametric:
            return "multiplies a weight by"
        # (q @ k.mT) * d**-0.5: the sum over head_dim is behind the multiplication.
        logits = dims[0] in self.summed.get(source, ()) and self.inner.issuperset(dims)
        # (q * d**-0.5) @ k.mT: it is ahead.
        if logits or self._is_compared(operator, dims):
            return "multiplies attention by"
        return "multiplies by"

    def _is_compared(self, tensor: Node, dims: Dims) -> bool:
        """Whether a tensor is a query or key: a product with another activation contracts the axis."""
        for reader in tensor.users:
            reader_traits = traits_of(reader)
            moving = not self._reads_weights(reader)
            # q @ k.mT sums over the axis, and neither factor is made of parameters.
            if reader_traits & PRODUCTS and moving and set(dims) <= set(self._contracted(reader)):
                return True
            if reader_traits & PASS_ONE and self._is_compared(reader, dims):
                return True
        return False

    def _reads_weights(self, operator: Node) -> bool:
        return any(is_parametric(source, self.solved) for source in operator.all_input_nodes)

    def _unit_length(self, operator: Node, known: Trait) -> Iterator[Constant]:
        """Yield a tensor divided by its own length, where a weight or a gain reads it."""
        # x / x.norm(dim=-1, keepdim=True)
        divisor = operator.args[1] if known & Trait.DIVIDES and len(operator.args) > 1 else None
        if isinstance(divisor, Node) and divisor in self.length:
            dims = tuple(dim for dim in self.length[divisor] if self._is_width((dim,)))
            if dims:
                location = place_of(operator, self.captured.owners)
                self.unit[operator] = Constant(location, "unit length", 1.0, -0.5, dims, operator)
        # A unit vector matters where a weight or a gain reads it; then it is told once.
        if self._reads_weights(operator):
            for source in operator.all_input_nodes:
                if source in self.unit:
                    yield self.unit.pop(source)

    def _contracted(self, product: Node) -> Dims:
        """Return the dimensions that both factors of a product have, and its result has not."""
        remaining = self._dims(self.values.get(product))
        # An axis of both factors that is not in the result: the sum over it.
        counts: Counter[int] = Counter()
        for source in product.all_input_nodes:
            counts.update(self._dims(self.values.get(source)))
        return tuple(dim for dim, count in counts.items() if count > 1 and dim not in remaining)

    def _reduced(self, reduction: Node) -> Dims:
        """Return the dimensions that a reduction takes away."""
        remaining = self._dims(self.values.get(reduction))
        source = self.values.get(reduction.all_input_nodes[0])
        return tuple(dim for dim in self._dims(source) if dim not in remaining)

    def _fan_in(self, value: Value) -> list[Dims]:
        """Return the axes of a weight behind the first: its fan_in in the usual layout, taken together."""
        dims = tuple(self.space.find(axis.dim) for axis in value.axes[1:])
        return [dims] if value.parametric and len(dims) > 1 else []

    def _dims(self, value: Any) -> list[int]:
        """Return the dimensions of a tensor, each once; none where an operator has several results."""
        if not isinstance(value, Value):
            return []
        return list(dict.fromkeys(self.space.find(axis.dim) for axis in value.axes))

    def _is_width(self, dims: Sequence[int]) -> bool:
        """Whether some axes together are a width; batch x heads, say, is none."""
        if self._size(dims) < SMALLEST or not any(map(self.solved.verdicts.grows, dims)):
            return False
        return len(dims) > 1 or not self._is_mixed(dims[0])

    def _is_mixed(self, dim: int) -> bool:
        """Whether a dimension is a product with a factor that is surely fixed."""
        # heads * head_dim with a fixed head_dim is no width of its own.
        for factors in self.space.terms_of(dim, "product"):
            for factor in factors:
                verdict = self.solved.verdicts.get(factor)
                if verdict is not None and not (verdict.infinite or verdict.policy):
                    return True
        return False

    def _size(self, dims: Sequence[int]) -> int:
        return prod(map(self.space.size, dims))


def constant_notes(
    constants: Sequence[Constant], name: Callable[[int], str], base: Callable[[int], float]
) -> tuple[str, ...]:
    """Say in words what each number does and what to write instead.

    Args:
        constants: What `find_constants` found.
        name: Name of a dimension.
        base: Base size of a dimension.
    """
    return tuple(dict.fromkeys(_note(constant, name, base) for constant in constants))


def _note(constant: Constant, name: Callable[[int], str], base: Callable[[int], float]) -> str:
    where, power = constant.where, constant.power
    term = "*".join(map(name, constant.dims))
    if term.isdigit():  # a dimension without a name
        term = f"an axis of size {term}"
    if constant.what == "unit length":
        return (
            f"{where}: normalizes to unit length along {term}, which grows, so its entries shrink like one "
            "over the square root of that size, on top of the plan; multiply by the root, or use an RMS norm"
        )
    at_base = prod(map(base, constant.dims))
    holds = (
        f"{where}: {constant.what} {constant.value:.6g}, which is the size of {term} to the power {power:g}"
    )
    # q and k align in training: q @ k is of order head_dim then, and not of its root (arXiv 2203.03466).
    if constant.what == "multiplies attention by":
        return (
            f"{holds}; it grows, so logits must scale as one over that size, not over its square root: write "
            f"{at_base**0.5:.6g} / size in its place"
        )
    number = copysign(at_base**power, constant.value)
    return (
        f"{holds}; if it is computed from the width, it comes on top of the plan: write the number of the "
        f"base width, {number:.6g}, in its place"
    )
