"""Carriers: the plain parameters that can hold a factor which a hook puts on a value of the forward pass.

A factor on a value is pushed backwards through the operators that made it, until parameters hold it: through
a linear layer into its weight and bias, through a norm into its gain and shift, through dropout, reshapes and
sums as they are. Nothing else that reads the model may notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import flatten, is_getitem, operator_name
from mupass._dims.operator_traits import PRODUCT_ARGUMENTS, Trait
from mupass._records import Carrier, Geometry
from mupass._roles.nodes import behind_copies, made_of, place_of, tensors_among, traits_of
from mupass._roles.sites import readers_of

# F.layer_norm(x, shape, gain, shift), F.batch_norm(x, gain, shift, ...)
# Positions of gain and shift.
NORMS = {
    "layer_norm": (2, 3),
    "native_layer_norm": (2, 3),
    "rms_norm": (2,),
    "_fused_rms_norm": (2,),
    "group_norm": (2, 3),
    "native_group_norm": (1, 2),
    "batch_norm": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "instance_norm": (1, 2),
}
# Positions of what is added up: add(x, y), index_add(x, dim, index, y), where(mask, x, y).
SUMS = {"add": (0, 1), "sub": (0, 1), "index_add": (0, 3), "scatter_add": (0, 3), "where": (1, 2)}
ATTENTION = "scaled_dot_product"  # linear in the values, its third argument
# Operators with several results, of which the first takes the factor: a norm gives its statistics as well.
FIRST_OF_SEVERAL = ("native_", "_fused_rms_norm", "max_pool2d_with_indices", "_scaled_dot_product", "cudnn_")
ZEROS = ("aten.zeros", "aten.new_zeros", "aten.zeros_like")
# Readers that take the shape or the type of a tensor and none of its values.
BLIND = ("sym_size", "zeros_like", "ones_like", "empty_like", "new_", "full_like", "_assert", "rand_like")
# Layers whose weight can undo a factor on what they read.
WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Held:
    """One parameter that takes a share in holding a factor.

    Attributes:
        parameter: Its placeholder.
        reader: The operator through which it holds the factor.
        inverse: Whether it is divided by the factor, since what it is multiplied with grows by it.
        offset: Constant that the code adds to the parameter.
    """

    parameter: Node
    reader: Node
    inverse: bool = False
    offset: float = 0.0


class Blocked(Exception):
    """No parameters can hold the factor; the text says why."""


class _Push:
    """Pushes factors backwards through one graph."""

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self.outputs = {output for _, output in captured.outputs}
        self.operators = set(captured.nodes)
        self.activations = made_of(captured.inputs, captured)

    def scaled(self, value: Node, readers: frozenset[Node]) -> tuple[Held, ...]:
        """Return parameters that make a value ``c`` times itself, for these readers and no other.

        Raises:
            Blocked: There are none.
        """
        # A parameter holds the factor itself.
        if value in self.captured.parameters:
            return self._parameter(value, readers)
        if value not in self.operators:
            raise Blocked(f"{value} is data, which no parameter scales")
        # What the model returns must stay as it is.
        if value in self.outputs:
            raise Blocked(f"the result of {self._say(value)} is an output of the model as well")
        shares: tuple[Held, ...] = ()
        # h = norm(x), read by the branch and by a gate: the gate's weight can be divided by the factor.
        for other in value.users:
            if other not in readers and not _is_blind(other):
                shares += self._compensated(value, other)
        return shares + self._made(value)

    def _parameter(self, parameter: Node, readers: frozenset[Node]) -> tuple[Held, ...]:
        reader = next(iter(readers))
        for other in parameter.users:
            # A module that is called again reads its weight by the same operator: counted at the end.
            if other not in readers and not _is_blind(other) and self._say(other) != self._say(reader):
                name = self.captured.parameters[parameter]
                raise Blocked(f"{name} is also read by {self._say(other)}")
        return tuple(Held(parameter, reader) for reader in readers)

    def _compensated(self, value: Node, other: Node) -> tuple[Held, ...]:
        """Return the weight of another layer that reads the value, to be divided by the factor.

        Raises:
            Blocked: The other reader is no such layer.
        """
        # F.linear(c * h, w / c) is F.linear(h, w).
        if _short(other) in WEIGHTED and other.args[0] is value and isinstance(other.args[1], Node):
            try:
                shares = self.scaled(other.args[1], frozenset([other]))
            except Blocked:
                shares = ()
            if shares:
                return tuple(replace(share, inverse=True) for share in shares)
        raise Blocked(f"the result of {self._say(value)} is also read by {self._say(other)}")

    def _made(self, operator: Node) -> tuple[Held, ...]:
        """Push the factor into the operands of an operator."""
        name = _short(operator)
        # native_layer_norm(x, ...)[0]: behind it are the statistics.
        if is_getitem(operator):
            return self._first_of_several(operator)
        # torch.zeros(n): c times nothing is nothing.
        if operator_name(operator.target).rstrip("_") in ZEROS:
            return ()
        # c (w x + b) = (c w) x + (c b)
        if name in PRODUCT_ARGUMENTS or name == "einsum":
            return self._product(operator, name)
        # c (gain * normalized(x) + shift): what is normalized forgets the size of x.
        if name in NORMS:
            return self._norm(operator, name)
        # c (x + y) = c x + c y
        if name in SUMS:
            return self._sum(operator, name)
        # torch.cat([x, y])
        if name in {"cat", "concat", "stack"}:
            return self._all_of(tensors_among(flatten([operator.args[0]])), operator)
        position = self._linear_in(operator, name)
        if position is None:
            raise Blocked(f"{self._say(operator)} is not linear in what it reads")
        operand = operator.args[position]
        if not isinstance(operand, Node):
            raise Blocked(f"{self._say(operator)} reads a constant")
        return self.scaled(operand, frozenset([operator]))

    def _linear_in(self, operator: Node, name: str) -> int | None:
        """Return the place of the one operand whose factor is one on the result, or None.

        Raises:
            Blocked: A constant stands beside that operand in the result.
        """
        # relu(c x) = c relu(x) for c > 0, (c x) / y = c (x / y), embedding(c table, tokens)
        operator_traits = traits_of(operator)
        if operator_traits & (Trait.HOMOGENEOUS | Trait.DIVIDES) or name == "embedding":
            return 0
        # pad(x, sizes, 0), masked_fill(x, mask, 0): zeros stay zeros.
        if name in {"constant_pad_nd", "pad", "masked_fill"}:
            if any(isinstance(constant, (int, float)) and constant != 0 for constant in operator.args[2:]):
                raise Blocked(f"{self._say(operator)} puts in a constant")
            return 0
        # attention(q, k, v) averages the rows of v
        return 2 if ATTENTION in name else None

    def _norm(self, operator: Node, name: str) -> tuple[Held, ...]:
        """Push into the gain and the shift of a norm, which forgets the size of what it reads."""
        tensors = tensors_among(_at(operator, NORMS[name]))
        if not tensors:
            raise Blocked(f"{self._say(operator)} has no gain")
        return self._all_of(tensors, operator)

    def _all_of(self, tensors: Iterable[Node], reader: Node) -> tuple[Held, ...]:
        """Push into every operand of a sum or a concatenation."""
        shares: tuple[Held, ...] = ()
        for tensor in tensors:
            shares += self.scaled(tensor, frozenset([reader]))
        return shares

    def _first_of_several(self, choice: Node) -> tuple[Held, ...]:
        """Push through ``op(...)[0]`` of an operator whose other results nothing reads."""
        source, index = choice.args[0], choice.args[1]
        if not isinstance(source, Node) or index != 0 or not _short(source).startswith(FIRST_OF_SEVERAL):
            raise Blocked(f"{self._say(choice)} takes one of several results")
        # op(x)[1] may be the statistics of a norm, which somebody reads.
        if any(reader is not choice and reader.users for reader in source.users):
            raise Blocked(f"other results of {self._say(source)} are read too")
        return self._made(source)

    def _product(self, operator: Node, name: str) -> tuple[Held, ...]:
        """Push into one operand, weights before activations, and into what is added to the product."""
        # Of a product one factor is enough; what is added to it must be multiplied too.
        addends: list[Node] = []
        if name == "einsum":
            tensors = tensors_among(flatten([operator.args[1]]))
        else:
            *factors, bias = PRODUCT_ARGUMENTS[name]
            tensors = tensors_among(_at(operator, factors))
            addends = tensors_among(_at(operator, [bias]))
        if len(set(tensors)) < len(tensors):
            raise Blocked(f"{self._say(operator)} multiplies a value with itself")
        reason = f"{self._say(operator)} reads constants alone"
        # Weights come first: an activation would send the factor further back.
        for tensor in sorted(tensors, key=lambda tensor: tensor in self.activations):
            try:
                return self._all_of([tensor, *addends], operator)
            except Blocked as blocked:
                reason = str(blocked)
        raise Blocked(reason)

    def _sum(self, operator: Node, name: str) -> tuple[Held, ...]:
        operands = _at(operator, SUMS[name])
        tensors = tensors_among(operands)
        numbers = [operand for operand in operands if isinstance(operand, (int, float)) and operand != 0]
        shares = self._all_of(tensors, operator)
        if not numbers:
            return shares
        # add(gain, 1): a gain that is stored as its distance from a constant.
        # So is one that is converted first: w.to(torch.bfloat16) + 1.
        if name == "add" and len(tensors) == 1 and behind_copies(tensors[0]) in self.captured.parameters:
            return tuple(replace(share, offset=float(numbers[0])) for share in shares)
        raise Blocked(f"{self._say(operator)} adds a constant")

    def _say(self, operator: Node) -> str:
        return place_of(operator, self.captured.owners)


def _at(operator: Node, places: Iterable[int | None]) -> list[Any]:
    """Return the arguments at these places, of those that the operator is called with."""
    count = len(operator.args)
    return [operator.args[place] for place in places if place is not None and place < count]


def carriers(captured: Capture, requests: Sequence[tuple[Node, Iterable[Node]]]) -> list[Carrier]:
    """Find what can hold one common factor on several values.

    Args:
        captured: The graph.
        requests: Values with the readers that are to see them multiplied.

    Returns:
        One carrier for each request; with a reason where there is none.
    """
    pusher = _Push(captured)
    outcomes: list[tuple[Held, ...] | str] = []
    # A weight that several requests share is multiplied once: their readers must be all that it has.
    covered: dict[Node, set[Node]] = defaultdict(set)
    for value, readers in requests:
        try:
            held = tuple(dict.fromkeys(pusher.scaled(value, frozenset(readers))))
        except Blocked as reason:
            outcomes.append(str(reason))
            continue
        for share in held:
            covered[share.parameter].add(share.reader)
        outcomes.append(held)
    return [_carrier(captured, shares, covered) for shares in outcomes]


def readout_carriers(captured: Capture, geometries: Iterable[Geometry]) -> tuple[Carrier, ...]:
    """Find what can hold the multiplier on the input of tied readouts.

    Args:
        captured: The graph.
        geometries: Parameters; those without a readout use are left out.

    Returns:
        One carrier for each tied parameter, with its name.
    """
    placeholders = {name: node for node, name in captured.parameters.items()}
    result = []
    for geometry in geometries:
        if not geometry.readout_uses or geometry.name not in placeholders:
            continue
        inputs: dict[Node, list[Node]] = {}
        for use in geometry.readout_uses:
            for reader, activation in readers_of(captured, geometry.name, use):
                inputs.setdefault(activation, []).append(reader)
        per_input = carriers(captured, list(inputs.items()))
        result.append(replace(_joined(per_input), tied=geometry.name))
    return tuple(result)


def _joined(parts: Sequence[Carrier]) -> Carrier:
    """Return one carrier that stands for several of the same factor."""
    if not parts:
        return Carrier(reason="the readout is not in the captured graph")
    multiplied: list[str] = []
    divided: list[str] = []
    offsets: list[tuple[str, float]] = []
    for part in parts:
        if part.reason:
            return Carrier(reason=part.reason)
        multiplied += part.parameters
        divided += part.divided
        offsets += part.offsets
    return _without_repeats(multiplied, divided, offsets)


def _without_repeats(
    multiplied: Iterable[str], divided: Iterable[str], offsets: Iterable[tuple[str, float]]
) -> Carrier:
    return Carrier(
        parameters=tuple(dict.fromkeys(multiplied)),
        divided=tuple(dict.fromkeys(divided)),
        offsets=tuple(dict.fromkeys(offsets)),
    )


def _carrier(captured: Capture, held: tuple[Held, ...] | str, covered: Mapping[Node, set[Node]]) -> Carrier:
    """Return what holds one factor, given all readers through which each parameter holds one."""
    if isinstance(held, str):
        return Carrier(reason=held)
    if not held:
        return Carrier(reason="no parameter is read on the way")
    names = captured.parameters
    # Readers beyond those that were asked for would see the factor as well.
    for share in held:
        for reader in share.parameter.users:
            if reader not in covered[share.parameter] and not _is_blind(reader):
                name = names[share.parameter]
                return Carrier(reason=f"{name} is also read by {operator_name(reader.target)}")
    multiplied, divided, offsets = [], [], []
    for share in held:
        name = names[share.parameter]
        if share.inverse:
            divided.append(name)
        else:
            multiplied.append(name)
        if share.offset:
            offsets.append((name, share.offset))
    for name in multiplied:
        if name in divided:
            return Carrier(reason=f"{name} would have to be multiplied and divided")
    return _without_repeats(multiplied, divided, offsets)


def _short(node: Node) -> str:
    """Return ``add`` for ``aten.add_.Tensor``."""
    return operator_name(node.target).rpartition(".")[2].rstrip("_")


def _is_blind(node: Node) -> bool:
    """Return whether a reader does not see values: it reads a size, or nothing reads it."""
    name = _short(node)
    return name.startswith(BLIND) or (is_getitem(node) and not node.users)
