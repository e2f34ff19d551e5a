"""Carriers: the plain parameters that can hold a factor which a hook puts on a value of the forward pass.

A factor on a value is pushed backwards through the operators that made it, until parameters hold it: through
a linear layer into its weight and bias, through a norm into its gain and shift, through dropout, reshapes and
sums as they are. Nothing else that reads the model may notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import flatten, is_getitem, operator_name
from mupass._dims.operator_traits import PRODUCT_ARGUMENTS, Trait, traits
from mupass._records import Carrier, Geometry
from mupass._roles.sites import readers_of

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
SUMS = {"add": (0, 1), "sub": (0, 1), "index_add": (0, 3), "scatter_add": (0, 3), "where": (1, 2)}
ATTENTION = "scaled_dot_product"  # linear in the values, its third argument
FIRST_OF_SEVERAL = ("native_", "_fused_rms_norm", "max_pool2d_with_indices", "_scaled_dot_product", "cudnn_")
ZEROS = ("aten.zeros", "aten.new_zeros", "aten.zeros_like")
# Readers that take the shape or the type of a tensor and none of its values.
BLIND = ("sym_size", "zeros_like", "ones_like", "empty_like", "new_", "full_like", "_assert", "rand_like")
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
        self.outputs = {node for _, node in captured.outputs}
        self.operators = set(captured.nodes)
        self.activations = set(captured.inputs)  # what depends on the model's input
        for node in captured.nodes:
            if not self.activations.isdisjoint(node.all_input_nodes):
                self.activations.add(node)

    def scaled(self, node: Node, readers: frozenset[Node]) -> tuple[Held, ...]:
        """Return parameters that make a value ``c`` times itself, for these readers and no other.

        Raises:
            Blocked: There are none.
        """
        if node in self.captured.parameters:
            return self._parameter(node, readers)
        if node not in self.operators:
            raise Blocked(f"{node} is data, which no parameter scales")
        if node in self.outputs:
            raise Blocked(f"the result of {self._say(node)} is an output of the model as well")
        held: tuple[Held, ...] = ()
        for other in node.users:
            if other not in readers and not _is_blind(other):
                held += self._compensated(node, other)
        return held + self._made(node)

    def _parameter(self, node: Node, readers: frozenset[Node]) -> tuple[Held, ...]:
        reader = next(iter(readers))
        for other in node.users:
            # A module that is called again reads its weight by the same operator: counted at the end.
            if other not in readers and not _is_blind(other) and self._place(other) != self._place(reader):
                raise Blocked(f"{self.captured.parameters[node]} is also read by {self._say(other)}")
        return tuple(Held(node, reader) for reader in readers)

    def _compensated(self, node: Node, other: Node) -> tuple[Held, ...]:
        """Return the weight of another layer that reads the value, to be divided by the factor.

        Raises:
            Blocked: The other reader is no such layer.
        """
        name = _short(other)
        if name in WEIGHTED and other.args[0] is node and isinstance(other.args[1], Node):
            try:
                found = self.scaled(other.args[1], frozenset([other]))
            except Blocked:
                found = ()
            if found:
                return tuple(replace(h, inverse=True) for h in found)
        raise Blocked(f"the result of {self._say(node)} is also read by {self._say(other)}")

    def _made(self, node: Node) -> tuple[Held, ...]:
        """Push the factor into the operands of an operator."""
        if is_getitem(node):
            return self._first_of_several(node)
        name, full_name = _short(node), operator_name(node.target)
        if full_name.rstrip("_") in ZEROS:
            return ()
        if traits(full_name) & (Trait.HOMOGENEOUS | Trait.DIVIDES) or name == "embedding":
            return self._operand(node, 0)
        if name in {"constant_pad_nd", "pad", "masked_fill"}:
            # pad(x, sizes, 0), masked_fill(x, mask, 0): zeros stay zeros.
            if any(isinstance(a, (int, float)) and a != 0 for a in node.args[2:]):
                raise Blocked(f"{self._say(node)} puts in a constant")
            return self._operand(node, 0)
        if name in PRODUCT_ARGUMENTS or name == "einsum":
            return self._product(node, name)
        if name in NORMS:
            return self._norm(node, name)
        if name in SUMS:
            return self._sum(node, name)
        if name in {"cat", "concat", "stack"}:
            tensors = [x for x in flatten([node.args[0]]) if isinstance(x, Node)]
            return self._all_of(tensors, node)
        if ATTENTION in name:  # attention(q, k, v): linear in v
            return self._operand(node, 2)
        raise Blocked(f"{self._say(node)} is not linear in what it reads")

    def _norm(self, node: Node, name: str) -> tuple[Held, ...]:
        """Push into the gain and the shift of a norm, which forgets the size of what it reads."""
        operands = [node.args[position] for position in NORMS[name] if position < len(node.args)]
        tensors = [x for x in operands if isinstance(x, Node)]
        if not tensors:
            raise Blocked(f"{self._say(node)} has no gain")
        return self._all_of(tensors, node)

    def _all_of(self, tensors: Iterable[Node], reader: Node) -> tuple[Held, ...]:
        """Push into every operand of a sum or a concatenation."""
        held: tuple[Held, ...] = ()
        for tensor in tensors:
            held += self.scaled(tensor, frozenset([reader]))
        return held

    def _operand(self, node: Node, position: int) -> tuple[Held, ...]:
        operand = node.args[position]
        if not isinstance(operand, Node):
            raise Blocked(f"{self._say(node)} reads a constant")
        return self.scaled(operand, frozenset([node]))

    def _first_of_several(self, node: Node) -> tuple[Held, ...]:
        """Push through ``op(...)[0]`` of an operator whose other results nothing reads."""
        source, index = node.args[0], node.args[1]
        if not isinstance(source, Node) or index != 0 or not _short(source).startswith(FIRST_OF_SEVERAL):
            raise Blocked(f"{self._say(node)} takes one of several results")
        if any(user is not node and user.users for user in source.users):
            raise Blocked(f"other results of {self._say(source)} are read too")
        return self._made(source)

    def _product(self, node: Node, name: str) -> tuple[Held, ...]:
        """Push into one operand, weights before activations, and into what is added to the product."""
        if name == "einsum":
            operands, added = flatten([node.args[1]]), None
        else:
            first, second, third = PRODUCT_ARGUMENTS[name]
            operands = [node.args[first], node.args[second]]
            added = node.args[third] if third is not None and len(node.args) > third else None
        tensors = [x for x in operands if isinstance(x, Node)]
        if len(set(tensors)) < len(tensors):
            raise Blocked(f"{self._say(node)} multiplies a value with itself")
        reasons = []
        for operand in sorted(tensors, key=self.activations.__contains__):
            try:
                held = self.scaled(operand, frozenset([node]))
                more = self.scaled(added, frozenset([node])) if isinstance(added, Node) else ()
                return held + more
            except Blocked as reason:
                reasons.append(str(reason))
        raise Blocked(reasons[-1] if reasons else f"{self._say(node)} reads constants alone")

    def _sum(self, node: Node, name: str) -> tuple[Held, ...]:
        operands = [node.args[p] for p in SUMS[name] if len(node.args) > p]
        tensors = [x for x in operands if isinstance(x, Node)]
        numbers = [x for x in operands if isinstance(x, (int, float)) and x != 0]
        held = self._all_of(tensors, node)
        if not numbers:
            return held
        # add(gain, 1): a gain that is stored as its distance from a constant.
        if name == "add" and len(tensors) == 1 and self._is_parameter(tensors[0]):
            return tuple(replace(h, offset=float(numbers[0])) for h in held)
        raise Blocked(f"{self._say(node)} adds a constant")

    def _is_parameter(self, node: Node) -> bool:
        """Return whether a value is a parameter as it is, or converted."""
        while traits(operator_name(node.target)) & Trait.COPIES:
            if not node.args or not isinstance(node.args[0], Node):
                break
            node = node.args[0]
        return node in self.captured.parameters

    def _place(self, node: Node) -> tuple[str, str]:
        return operator_name(node.target), self.captured.owners.get(node, "")

    def _say(self, node: Node) -> str:
        name, module = self._place(node)
        return f"{name} in {module or 'the root module'}"


def carriers(captured: Capture, requests: Sequence[tuple[Node, Iterable[Node]]]) -> list[Carrier]:
    """Find what can hold one common factor on several values.

    Args:
        captured: The graph.
        requests: Values with the readers that are to see them multiplied.

    Returns:
        One carrier for each request; with a reason where there is none.
    """
    push = _Push(captured)
    found: list[tuple[Held, ...] | str] = []
    for node, readers in requests:
        try:
            found.append(tuple(dict.fromkeys(push.scaled(node, frozenset(readers)))))
        except Blocked as reason:
            found.append(str(reason))
    # A weight that several requests share is multiplied once: their readers must be all that it has.
    covered: dict[Node, set[Node]] = {}
    for held in found:
        for h in held if not isinstance(held, str) else ():
            covered.setdefault(h.parameter, set()).add(h.reader)
    return [_carrier(captured, held, covered) for held in found]


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
            for node, x in readers_of(captured, geometry.name, use):
                inputs.setdefault(x, []).append(node)
        found = carriers(captured, list(inputs.items()))
        result.append(replace(_joined(found), tied=geometry.name))
    return tuple(result)


def _joined(parts: Sequence[Carrier]) -> Carrier:
    """Return one carrier that stands for several of the same factor."""
    if not parts:
        return Carrier(reason="the readout is not in the captured graph")
    reason = next((p.reason for p in parts if p.reason), "")
    if reason:
        return Carrier(reason=reason)
    return Carrier(
        parameters=tuple(dict.fromkeys(n for p in parts for n in p.parameters)),
        divided=tuple(dict.fromkeys(n for p in parts for n in p.divided)),
        offsets=tuple(dict.fromkeys(o for p in parts for o in p.offsets)),
    )


def _carrier(captured: Capture, held: tuple[Held, ...] | str, covered: dict[Node, set[Node]]) -> Carrier:
    if isinstance(held, str):
        return Carrier(reason=held)
    if not held:
        return Carrier(reason="no parameter is read on the way")
    names = captured.parameters
    for share in held:
        readers = covered[share.parameter]
        left = [user for user in share.parameter.users if user not in readers and not _is_blind(user)]
        if left:
            return Carrier(reason=f"{names[share.parameter]} is also read by {operator_name(left[0].target)}")
    multiplied, divided, offsets = [], [], []
    for share in held:
        name = names[share.parameter]
        if share.inverse:
            divided.append(name)
        else:
            multiplied.append(name)
        if share.offset:
            offsets.append((name, share.offset))
    both = [name for name in multiplied if name in divided]
    if both:
        return Carrier(reason=f"{both[0]} would have to be multiplied and divided")
    return Carrier(
        parameters=tuple(dict.fromkeys(multiplied)),
        divided=tuple(dict.fromkeys(divided)),
        offsets=tuple(dict.fromkeys(offsets)),
    )


def _short(node: Node) -> str:
    """Return ``add`` for ``aten.add_.Tensor``."""
    return operator_name(node.target).rpartition(".")[2].rstrip("_")


def _is_blind(node: Node) -> bool:
    """Return whether a reader does not see values: it reads a size, or nothing reads it."""
    name = _short(node)
    return name.startswith(BLIND) or (is_getitem(node) and not node.users)
