"""Residual branches: the sums ``x + f(x)`` of a captured model, and the parameters behind each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import flatten, is_getitem, operator_name, shape_of
from mupass._dims.operator_traits import Trait
from mupass._records import Branch
from mupass._roles.carriers import carriers
from mupass._roles.nodes import Owners, is_inside, leaves, made_of, place_of, tensors_among, traits_of

DERIVED = (
    "the forward pass takes derivatives (torch.func, torch.autograd.grad), and gradients and tangents add up "
    "like branches; transform a module that returns the function's value, and take the derivative in the loss"
)
# Ends of branches; None is an output of the model.
Ends = frozenset[Node | None]
# Operators on one activation that leave a factor on it alone.
KEEP_FACTOR = Trait.HOMOGENEOUS | Trait.MULTIPLIES | Trait.DIVIDES


def find_branches(captured: Capture) -> tuple[Branch, ...]:
    """Find the residual branches of a model, in the order of execution.

    A sum is residual when one operand is computed from the other, or from what a stream was before the sum
    that the other is (parallel branches). The computed one is the branch, if there is a weight in it.
    Branches inside branches belong to the outer one.

    Args:
        captured: The graph.
    """
    order = [*captured.parameters, *captured.inputs, *captured.states, *captured.nodes]
    outputs = {node for _, node in captured.outputs}
    sum_after = _residual_sums(captured, order)
    sum_after = _outermost(sum_after, _next_ends(order, outputs, sum_after))
    # Once more: what led into a branch inside of another one leads into the outer one now.
    reached = _next_ends(order, outputs, sum_after)
    holders = carriers(captured, [(end, (total,)) for end, total in sum_after.items()])
    branches = []
    for (end, total), carrier in zip(sum_after.items(), holders, strict=True):
        # A parameter that reaches the output past the branch too is not scaled with it.
        own_parameters = tuple(name for node, name in captured.parameters.items() if reached[node] == {end})
        modules, reason = modules_behind(end, total, captured.owners)
        reason = reason or why_shared(modules, captured)
        if captured.transformed or captured.derivatives:
            reason = DERIVED
        branches.append(Branch(tuple(dict.fromkeys(modules.values())), own_parameters, reason, carrier))
    return tuple(branches)


class _Dependencies:
    """Tells which nodes a node is computed from; every node holds a set of them as bits of one number."""

    def __init__(self, order: Iterable[Node]) -> None:
        self._number = {node: number for number, node in enumerate(order)}
        self._sources: dict[Node, int] = {}
        for node, number in self._number.items():
            bits = 1 << number
            for source in node.all_input_nodes:
                bits |= self._sources.get(source, 0)
            self._sources[node] = bits

    def depends(self, node: Node, source: Node) -> bool:
        """Return whether a node is computed from another one, or is it."""
        return bool(self._sources[node] >> self._number[source] & 1)


def _residual_sums(captured: Capture, order: Iterable[Node]) -> dict[Node, Node]:
    """Return the end of every branch -> the sum that it goes into."""
    dependencies = _Dependencies(order)
    weighted = _weighted(captured)
    origin: dict[Node, Node] = {}  # a residual sum -> where its stream began
    sum_after: dict[Node, Node] = {}
    for node in captured.nodes:
        branch = _branch_of(node, dependencies, origin)
        if branch is None:
            continue
        stream, start, end = branch
        origin[node] = origin.get(stream, stream)
        # Without a weight on the way it is arithmetic: x + 0.5 * x**2, say, in a hand-written activation.
        for operator in weighted:
            if dependencies.depends(operator, start) and dependencies.depends(end, operator):
                sum_after[end] = node
                break
    return sum_after


def _weighted(captured: Capture) -> list[Node]:
    """Return the operators with an operand that is made of parameters and no input."""
    weights = made_of(captured.parameters, captured) - made_of(captured.inputs, captured)
    return [node for node in captured.nodes if not weights.isdisjoint(node.all_input_nodes)]


def _branch_of(
    node: Node, dependencies: _Dependencies, origin: Mapping[Node, Node]
) -> tuple[Node, Node, Node] | None:
    """Return (stream, where the branch leaves it, branch) of a residual sum, or None for another operator."""
    operands = tensors_among(node.args[:2])
    if not traits_of(node) & Trait.ADDS or len(operands) < 2:
        return None
    # x + bias is no branch: a sum of tensors of different shapes broadcasts one of them.
    shapes = set()
    for tensor in (*operands, node):
        value = tensor.meta.get("val")
        shapes.add(shape_of(value) if isinstance(value, Tensor) else None)
    if len(shapes) > 1:
        return None
    for stream, branch in (operands, operands[::-1]):
        # x + f(x): the branch leaves the stream x as it stands here.
        # (x + f(x)) + g(x): g leaves the stream where it began, before f was added.
        for origin_node in (stream, origin.get(stream, stream)):
            if origin_node is not branch and dependencies.depends(branch, origin_node):
                return stream, origin_node, branch
    return None


def _next_ends(order: list[Node], outputs: set[Node], sums: Mapping[Node, Node]) -> dict[Node, Ends]:
    """Return every node -> the ends of branches that it reaches first on its ways; None is an output.

    Args:
        order: Nodes in the order of execution.
        outputs: Outputs of the model.
        sums: The branches' ends, and the sums that they go into.
    """
    reached_from: dict[Node, Ends] = {}
    for node in reversed(order):
        reached: set[Node | None] = set()
        if node in outputs:
            reached.add(None)
        for user in node.users:
            if user in sums:
                reached.add(user)
            else:
                reached |= reached_from.get(user, frozenset())
        reached_from[node] = frozenset(reached)
    return reached_from


def _outermost(sums: Mapping[Node, Node], reached: Mapping[Node, Ends]) -> dict[Node, Node]:
    """Return the branches that are not part of another one.

    A branch whose sum reaches nothing but the end of another one is part of that: f in ``x + g(h + f(h))``.
    """
    outermost = {}
    for end, total in sums.items():
        if len(reached[end]) != 1 or None in reached[end]:
            outermost[end] = total
    return outermost


def modules_behind(end: Node, into: Node, owners: Owners) -> tuple[dict[Node, str], str]:
    """Walk back from a value to the nodes it is made of that are outputs of modules.

    Args:
        end: The value, such as the end of a branch.
        into: Its one reader, such as the sum that the branch goes into.
        owners: Module of every node.

    Returns:
        Node -> module, and the reason why there is none.
    """
    reader_module, module = owners.get(into, ""), owners.get(end, "")
    # A multiplier on it would reach them too.
    others = [reader for reader in end.users if reader is not into]
    if others:
        return {}, f"it is also read by {operator_name(others[0].target)} ({others[0]})"
    # x + self.mlp(x): the value leaves a module that the reader's module calls.
    if is_inside(module, reader_module):
        return {end: module}, ""
    sources = _passed_on(end, owners)
    if not sources:
        return {}, f"it ends with {place_of(end, owners)}, and no module holds that alone"
    modules: dict[Node, str] = {}
    reasons = []
    for source in sources:
        behind_source, reason = modules_behind(source, end, owners)
        modules.update(behind_source)
        reasons.append(reason)
    return modules, next(filter(None, reasons), "")


def _passed_on(end: Node, owners: Owners) -> list[Node]:
    """Return the operands whose factor an operator keeps: both of a sum, the one of a linear function."""
    sources = [tensor for tensor in tensors_among(flatten(end.args)) if tensor in owners]
    traits_of_end = traits_of(end)
    # self.attention(x) + self.mlp(x): a factor on both is one on the sum.
    if len(sources) == 2 and traits_of_end & Trait.ADDS:
        return sources
    # self.mlp(x) * 0.5, self.mlp(x).flatten(1), self.lstm(x)[0]
    if len(sources) == 1 and (is_getitem(end) or traits_of_end & KEEP_FACTOR):
        return sources
    return []


def why_shared(modules: Mapping[Node, str], captured: Capture) -> str:
    """Return why a multiplier on the outputs of these modules would reach further than one value.

    Args:
        modules: Nodes that the value is made of, with the modules that put them out.
        captured: The graph.
    """
    for node, module in captured.owners.items():
        other = module in modules.values() and node not in modules
        if other and leaves(node, module, captured.owners):
            return f"{module} has other outputs or calls ({node})"
    return ""
