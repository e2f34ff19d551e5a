"""Captures a model as a graph of ATen operators, on fake tensors, without touching the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path

from mupass._capture.draws import settled_draws
from mupass._capture.graph import (
    Capture,
    LateParameterError,
    attributes_kept,
    first_names,
    number_in,
    parameter_names,
    path_text,
    plain_outputs,
    quiet,
    runs_vmap,
)
from mupass._capture.inline import inline_contexts
from mupass._capture.lstm_states import right_lstm_states
from mupass._capture.record import record
from mupass._capture.whole_slices import drop_whole_slices
from mupass._capture.written import written_sizes
from mupass._errors import CaptureError

LARGEST = 4096  # sides of matrices whose entries are looked at


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], failed: Exception | None = None
) -> Capture:
    """Capture one forward pass.

    torch.export sees the whole model without running it. A model whose control flow depends on values is
    recorded from one concrete run instead, and the result says so.

    Args:
        model: Any module, in train or eval mode, on any device, meta included.
        args: Positional inputs.
        kwargs: Keyword inputs.
        failed: Why an exported graph is of no use, to record a concrete run at once.

    Returns:
        The graph with parameters, inputs and outputs named.

    Raises:
        CaptureError: When the model has no parameters or fails on these inputs.
    """
    canonical, aliases = parameter_names(model)
    try:
        if failed is not None:
            raise failed
        # torch.func.vmap hides the batch axis from the operators: their shapes would lack an axis.
        captured = export(model, args, kwargs)
        if runs_vmap(captured.nodes):
            raise CaptureError("it runs vmap of torch.func")
    except LateParameterError:
        raise
    except Exception as error:  # whatever it is, a concrete run decides whether the model is at fault
        captured = record(model, args, kwargs, canonical, aliases, error)
    # Frozen parameters are in the graph as all others; optimizers ask for them by name.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = dict(model.named_buffers(remove_duplicate=False))
    permutations = [node for node, name in captured.buffers.items() if is_permutation(buffers.get(name))]
    return replace(
        captured,
        frozen=frozenset(frozen),
        permutations=frozenset(permutations),
        written=written_sizes(model),
    )


def is_permutation(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a matrix of zeros with a single one in each row and column.

    Args:
        tensor: A buffer, or None.
    """
    if tensor is None or tensor.dim() != 2 or len(set(tensor.shape)) > 1 or not 2 <= len(tensor) <= LARGEST:
        return False
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor) or tensor.is_complex():
        return False
    ones = tensor == 1
    return bool(((tensor == 0) | ones).all() and (ones.sum(0) == 1).all() and (ones.sum(1) == 1).all())


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Capture with torch.export alone; what it raises is not wrapped.

    Args:
        model: Any module.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    canonical, aliases = parameter_names(model)
    with quiet(), settled_draws(), attributes_kept(model), plain_outputs(model), right_lstm_states():
        program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    # A buffer of a module that is kept at several places has its first name, as a parameter has.
    canonical |= first_names(model.named_buffers(remove_duplicate=False))
    return _from_export(program, canonical, aliases)


def _from_export(
    program: Any, canonical: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]]
) -> Capture:
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    parameters, buffers = {}, {}
    for name, parameter in signature.inputs_to_parameters.items():
        # Placeholders of all names of a tied parameter stand for its first name.
        parameters[placeholders[name]] = canonical[parameter]
    for name, buffer in signature.inputs_to_buffers.items():
        buffers[placeholders[name]] = canonical.get(buffer, buffer)
    # Inputs that are no tensors are constants, which have no placeholder.
    tensors = [name for name in signature.user_inputs if isinstance(name, str) and name in placeholders]
    inputs = {placeholders[name]: name for name in tensors}
    states = tuple(node for node in placeholders.values() if node not in parameters and node not in inputs)
    # This inlines graphs, and so changes which operators there are: it comes first.
    outputs = _outputs(program)
    operators = tuple(node for node in program.graph.nodes if node.op == "call_function")
    owners = {node: _owner(node) for node in operators}
    numbers = _numbers(program, placeholders)
    return Capture(
        operators, parameters, states, inputs, outputs, aliases, "export", owners, (), buffers, numbers
    )


def _outputs(program: Any) -> tuple[tuple[str, Node], ...]:
    """Name what the model returns among all outputs, and tidy the graph on the way."""
    user_outputs = program.graph_signature.user_outputs
    paths = _output_paths(program, len(user_outputs))
    # Outputs also hold buffers that the model updates: those have no path.
    path_of = dict(zip(map(str, user_outputs), paths, strict=False))
    output = next(node for node in program.graph.nodes if node.op == "output")
    output_positions = []
    for position, node in enumerate(output.args[0]):
        if isinstance(node, Node) and node.name in path_of:
            output_positions.append((position, path_of[node.name]))
    # The nodes of outputs change, not their places.
    inline_contexts(program.graph_module)
    drop_whole_slices(program.graph_module)
    return tuple((path, output.args[0][position]) for position, path in output_positions)


def _numbers(program: Any, placeholders: Mapping[str, Node]) -> dict[Node, float]:
    """Return the buffers and constants that hold a single number."""
    signature = program.graph_signature
    values = {**program.state_dict, **program.constants}
    # A number in the code, torch.tensor(0.5) say, is lifted to a constant; so d**-0.5 may stand in a buffer.
    sources = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    numbers = {}
    for name, source in sources.items():
        number = number_in(values.get(source))
        if number is not None:
            numbers[placeholders[name]] = number
    return numbers


def _owner(node: Node) -> str:
    """Return the innermost module that called an operator; a module called again is ``name@1`` there."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    # The stack goes from the root inwards.
    name = list(stack.values())[-1][0]
    return str(name).split("@")[0]


def _output_paths(program: Any, count: int) -> list[str]:
    """Name outputs by their place in the returned structure, such as ``logits`` or ``[1]``."""
    try:
        spec = program.call_spec.out_spec
        paths, _ = tree_flatten_with_path(torch.utils._pytree.tree_unflatten(list(range(count)), spec))
        return [path_text(path) for path, _ in paths]
    except (ValueError, TypeError, AttributeError):  # structures that only their owner can rebuild
        return [f"output {number}" for number in range(count)]
