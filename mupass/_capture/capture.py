"""Captures a model as a graph of ATen operators, on fake tensors, without touching the model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path, tree_map

from mupass._capture.draws import settled_draws
from mupass._capture.inline import inline_contexts
from mupass._errors import CaptureError, kind_of

# Leaves of an output that torch.export takes as they are.
KNOWN = (int, float, bool, str, complex, torch.dtype, torch.device)


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        nodes: Operators in execution order; ``meta["val"]`` holds the (fake) result.
        parameters: Placeholder -> qualified name of the parameter (the first, for a tied one).
        states: Placeholders of buffers and constants.
        inputs: Placeholder -> readable path of the input.
        outputs: (readable path, node) of every output tensor.
        aliases: Qualified name -> further names of the same parameter.
        method: ``export`` or ``recorded run``.
        owners: Node -> qualified name of the module that called the operator.
        warnings: What the reader of a report must know.
        buffers: Placeholder -> qualified name, for those states that are buffers.
        numbers: Placeholder -> value, for those states that are single numbers.
        derivatives: Operators that a derivative taken in the forward pass runs backwards, through weights
            that the forward operators among ``nodes`` use already.
        transformed: Whether the forward pass runs transforms of torch.func (vmap, grad, jvp).
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[Node, str]
    states: tuple[Node, ...]
    inputs: Mapping[Node, str]
    outputs: tuple[tuple[str, Node], ...]
    aliases: Mapping[str, tuple[str, ...]]
    method: str
    owners: Mapping[Node, str] = field(repr=False)
    warnings: tuple[str, ...] = ()
    buffers: Mapping[Node, str] = field(default_factory=dict)
    numbers: Mapping[Node, float] = field(default_factory=dict)
    derivatives: frozenset[Node] = frozenset()
    transformed: bool = False


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
        from mupass._capture.record import record

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


def parameter_names(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return every parameter name -> its first name, and the first names' further names.

    Args:
        model: The module.

    Raises:
        CaptureError: It is no module, has no parameters, or some that have no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a model (an nn.Module) is needed, not {kind_of(model)}")
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(
                f"{name} has no shape yet (a lazy module); "
                "run the model once on example inputs, then call mupass"
            )
        canonical[name] = first.setdefault(id(parameter), name)
    if not canonical:
        raise CaptureError(f"{type(model).__name__} has no parameters, so there is nothing to scale")
    aliases: dict[str, tuple[str, ...]] = {}
    for name, head in canonical.items():
        if name != head:
            aliases[head] = (*aliases.get(head, ()), name)
    return canonical, aliases


@contextmanager
def quiet() -> Any:
    """Silence what export says of models that it handles; errors are errors, warnings are noise here."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Make the model return tensors and plain values alone, which is all that export takes.

    An object that PyTorch cannot take apart (a distribution, a cache of keys and values) gives way to the
    tensors among its attributes.

    Args:
        model: Its output is changed while the context lasts.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (Tensor, *KNOWN)):
            return value
        if dataclasses.is_dataclass(value):
            return {f.name: tree_map(plain, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {n: x for n, x in getattr(value, "__dict__", {}).items() if isinstance(x, Tensor)} or None

    handle = model.register_forward_hook(lambda module, args, output: tree_map(plain, output))
    try:
        yield
    finally:
        handle.remove()


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


def number_in(tensor: Any) -> float | None:
    """Return the value of a tensor that is one real number and is there to be read."""
    if not isinstance(tensor, Tensor) or tensor.numel() != 1 or tensor.is_meta or tensor.is_complex():
        return None
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return float(tensor)


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


def fresh_copy(value: Any) -> Any:
    """Copy inputs so that a model that writes into them leaves the caller's alone."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.copy(x), value)
