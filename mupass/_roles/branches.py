"""Residual branches: the sums ``x + f(x)`` of a captured model, and the parameters behind each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.fx import Node

from mupass._capture.graph import Capture
from mupass._dims.graph import flatten, is_getitem, operator_name, shape_of
from mupass._dims.operator_traits import Trait, traits
from mupass._records import Branch
from mupass._roles.carriers import carriers

DERIVED = (
    "the forward pass takes derivatives (torch.func, torch.autograd.grad), and gradients and tangents add up "
    "like branches; transform a module that returns the function's value, and take the derivative in the loss"
)
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
    before = _ancestors(order)
    number = {node: i for i, node in enumerate(order)}
    origin: dict[Node, Node] = {}  # a residual sum -> where its stream began
    ends: dict[Node, Node] = {}  # branch -> the sum it goes into
    weighted = _weighted(captured, before)
    for node in captured.nodes:
        found = _branch_of(node, before, number, origin)
        if found:
            stream, start, end = found
            origin[node] = origin.get(stream, stream)
            # Without a weight on the way it is arithmetic, such as a hand-written activation.
            if any(before[n] >> number[start] & 1 and before[end] >> number[n] & 1 for n in weighted):
                ends[end] = node
    outputs = {node for _, node in captured.outputs}
    reached = _reached(order, outputs, ends)
    # A branch whose sum reaches nothing but one other branch is part of that one.
    ends = {e: into for e, into in ends.items() if len(reached[e]) != 1 or None in reached[e]}
    reached = _reached(order, outputs, ends)
    parameters = {name: reached[node] for node, name in captured.parameters.items()}
    found_branches = []
    held = carriers(captured, [(end, (into,)) for end, into in ends.items()])
    for (end, into), carrier in zip(ends.items(), held, strict=True):
        own = tuple(name for name, ways in parameters.items() if ways == {end})
        modules, reason = modules_behind(end, into, captured.owners)
        reason = reason or why_shared(modules, captured)
        if captured.transformed or captured.derivatives:
            reason = DERIVED
        found_branches.append(Branch(tuple(dict.fromkeys(modules.values())), own, reason, carrier))
    return tuple(found_branches)


def _ancestors(order: Iterable[Node]) -> dict[Node, int]:
    """Return every node -> a set of the nodes it depends on, as bits."""
    before: dict[Node, int] = {}
    for i, node in enumerate(order):
        bits = 1 << i
        for source in node.all_input_nodes:
            bits |= before.get(source, 0)
        before[node] = bits
    return before


def _weighted(captured: Capture, before: Mapping[Node, int]) -> list[Node]:
    """Return the operators with an operand that is made of parameters and no input."""
    inputs, parameters = (
        sum(before[node] for node in group) for group in (captured.inputs, captured.parameters)
    )

    def weight(operand: Node) -> bool:
        return bool(before.get(operand, 0) & parameters) and not before[operand] & inputs

    return [node for node in captured.nodes if any(map(weight, node.all_input_nodes))]


def _branch_of(
    node: Node, before: Mapping[Node, int], number: Mapping[Node, int], origin: Mapping[Node, Node]
) -> tuple[Node, Node, Node] | None:
    """Return (stream, where the branch leaves it, branch) of a residual sum, or None for another operator."""
    operands = [x for x in node.args[:2] if isinstance(x, Node)]
    if not traits(operator_name(node.target)) & Trait.ADDS or len(operands) < 2:
        return None
    values = [x.meta.get("val") for x in (*operands, node)]
    if len({shape_of(v) if isinstance(v, Tensor) else None for v in values}) > 1:
        return None
    for stream, branch in (operands, operands[::-1]):
        for start in (stream, origin.get(stream, stream)):
            if start is not branch and before[branch] >> number[start] & 1:
                return stream, start, branch
    return None


def _reached(
    order: list[Node], outputs: set[Node], ends: Mapping[Node, Node]
) -> dict[Node, frozenset[Node | None]]:
    """Return every node -> the ends of branches that it reaches first on its ways; None is an output.

    Args:
        order: Nodes in the order of execution.
        outputs: Outputs of the model.
        ends: The branches' last nodes.
    """
    known: dict[Node, frozenset[Node | None]] = {}
    for node in reversed(order):
        found: set[Node | None] = {None} if node in outputs else set()
        for user in node.users:
            found |= {user} if user in ends else known.get(user, frozenset())
        known[node] = frozenset(found)
    return known


def modules_behind(end: Node, into: Node, owners: Mapping[Node, str]) -> tuple[dict[Node, str], str]:
    """Walk back from a value to the nodes it is made of that are outputs of modules.

    Args:
        end: The value, such as the end of a branch.
        into: Its one reader, such as the sum that the branch goes into.
        owners: Module of every node.

    Returns:
        Node -> module, and the reason why there is none.
    """
    here, module = owners.get(into, ""), owners.get(end, "")
    others = [user for user in end.users if user is not into]
    if others:
        return {}, f"it is also read by {operator_name(others[0].target)} ({others[0]})"
    if module != here and (module.startswith(f"{here}.") or not here):
        return {end: module}, ""
    sources = _passed_on(end, owners)
    if not sources:
        name = operator_name(end.target)
        return {}, f"it ends with {name} in {module or 'the root module'}, and no module holds that alone"
    modules: dict[Node, str] = {}
    reasons = []
    for source in sources:
        found, reason = modules_behind(source, end, owners)
        modules.update(found)
        reasons.append(reason)
    return modules, next(filter(None, reasons), "")


def _passed_on(end: Node, owners: Mapping[Node, str]) -> list[Node]:
    """Return the operands whose factor an operator keeps: both of a sum, the one of a linear function."""
    sources = [x for x in flatten(end.args) if isinstance(x, Node) and x in owners]
    traits_of_end = traits(operator_name(end.target))
    if len(sources) == 2 and traits_of_end & Trait.ADDS:
        return sources
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
        if module in modules.values() and node not in modules:
            if any(not f"{captured.owners.get(u, '')}.".startswith(f"{module}.") for u in node.users):
                return f"{module} has other outputs or calls ({node})"
    return ""
