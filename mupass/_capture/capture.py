"""Captures a model as a graph of ATen operators, on fake tensors, without touching the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path

from mupass._capture.draws import settled_draws
from mupass._capture.graph import Capture, number_in, parameter_names, plain_outputs, quiet
from mupass._capture.inline import inline_contexts
from mupass._capture.record import record
from mupass._errors import CaptureError


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
        found = export(model, args, kwargs)
        if any(getattr(n.target, "__name__", "") == "_add_batch_dim" for n in found.nodes):
            raise CaptureError("it runs vmap of torch.func")
        return found
    except Exception as error:  # whatever it is, a concrete run decides whether the model is at fault
        return record(model, args, kwargs, canonical, aliases, error)


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Capture with torch.export alone; what it raises is not wrapped.

    Args:
        model: Any module.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    canonical, aliases = parameter_names(model)
    with quiet(), settled_draws(), plain_outputs(model):
        program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    return _from_export(program, canonical, aliases)


def _from_export(
    program: Any, canonical: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]]
) -> Capture:
    signature = program.graph_signature
    by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    parameters = {by_name[k]: canonical[v] for k, v in signature.inputs_to_parameters.items()}
    user = [name for name in signature.user_inputs if isinstance(name, str) and name in by_name]
    inputs = {by_name[n]: n for n in user}
    states = tuple(n for n in by_name.values() if n not in parameters and n not in inputs)
    output = next(n for n in program.graph.nodes if n.op == "output")
    paths = _output_paths(program, len(signature.user_outputs))
    named = dict(zip(map(str, signature.user_outputs), paths, strict=False))
    places = {
        i: named[n.name] for i, n in enumerate(output.args[0]) if isinstance(n, Node) and n.name in named
    }
    inline_contexts(program.graph_module)  # the nodes of outputs change, not their places
    outputs = tuple((path, output.args[0][i]) for i, path in places.items())
    operators = tuple(n for n in program.graph.nodes if n.op == "call_function")
    owners = {n: _owner(n) for n in operators}
    buffers = {by_name[k]: v for k, v in signature.inputs_to_buffers.items()}
    known = {**program.state_dict, **program.constants}
    sources = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    numbers = {by_name[k]: x for k, v in sources.items() if (x := number_in(known.get(v))) is not None}
    return Capture(
        operators, parameters, states, inputs, outputs, aliases, "export", owners, (), buffers, numbers
    )


def _owner(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    name = list(stack.values())[-1][0] if stack else ""
    return str(name).split("@")[0]


def _output_paths(program: Any, count: int) -> list[str]:
    """Name outputs by their place in the returned structure, such as ``logits`` or ``[1]``."""
    try:
        spec = program.call_spec.out_spec
        paths, _ = tree_flatten_with_path(torch.utils._pytree.tree_unflatten(list(range(count)), spec))
        return ["".join(map(str, p)).strip(".[]'\"") or "output" for p, _ in paths]
    except (ValueError, TypeError, AttributeError):  # structures that only their owner can rebuild
        return [f"output {i}" for i in range(count)]
