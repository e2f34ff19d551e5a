"""Fallback capture: records the operators of one concrete run, for models that branch on values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from mupass._capture.draws import settled_draws
from mupass._capture.graph import (
    Capture,
    LateParameterError,
    attributes_kept,
    fresh_copy,
    number_in,
    path_text,
    plain_outputs,
    quiet,
    runs_vmap,
)
from mupass._capture.whole_slices import drop_whole_slices
from mupass._errors import CaptureError


def record(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    canonical: Mapping[str, str],
    aliases: Mapping[str, tuple[str, ...]],
    reason: Exception,
) -> Capture:
    """Record one run on real tensors; only the branch that these inputs take is seen.

    Args:
        model: The module; its buffers and random state are left as they were.
        args: Positional inputs.
        kwargs: Keyword inputs.
        canonical: Parameter name -> first name of the same tensor.
        aliases: First name -> further names.
        reason: Why export failed.

    Returns:
        The recorded graph.

    Raises:
        CaptureError: When the model fails on these inputs, or lives on the meta device, where no branch can
            be taken.
    """
    name = type(model).__name__
    first_line = _first_line(reason) or type(reason).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CaptureError(f"torch.export cannot capture {name} on the meta device: {first_line}") from reason
    # Of a tied parameter one tensor is enough: `tie_weights` gives it to the other names.
    firsts = set(canonical.values())
    state = {key: parameter.detach() for key, parameter in model.named_parameters() if key in firsts}
    buffers = {key: buffer.detach().clone() for key, buffer in model.named_buffers()}
    # A trace takes a flat list of tensors: other arguments are put back in their places.
    leaves, spec = tree_flatten(fresh_copy((tuple(args), dict(kwargs))))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    paths: list[str] = []

    def run(parameters: dict[str, Tensor], states: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for position, tensor in zip(tensors, inputs, strict=True):
            filled[position] = tensor
        positional, keywords = tree_unflatten(filled, spec)
        output = torch.func.functional_call(
            model, {**parameters, **states}, positional, keywords, tie_weights=True
        )
        # What the model returns besides tensors has no place in a graph.
        recorded = [(path, x) for path, x in tree_flatten_with_path(output)[0] if isinstance(x, Tensor)]
        paths[:] = [path_text(path) for path, _ in recorded]
        return [x for _, x in recorded]

    def recording(pre_dispatch: bool) -> _Recording:
        callers: dict[str, str] = {}
        backward: set[str] = set()
        # Above the dispatcher (pre_dispatch) composite operators such as linear stay whole.
        tracer = make_fx(
            run, tracing_mode="real", pre_dispatch=pre_dispatch, _error_on_data_dependent_ops=False
        )
        # Some operators have derivatives of second order only where gradients are enabled.
        with quiet(), settled_draws(), plain_outputs(model), torch.set_grad_enabled(not pre_dispatch):
            with attributes_kept(model), _callers(model, callers), _run_backwards(backward):
                module = tracer(state, buffers, [leaves[number] for number in tensors])
        return _Recording(module, callers, backward, not pre_dispatch)

    try:
        recorded = _above_or_below_transforms(recording)
    except LateParameterError:
        raise
    except Exception as error:
        within = ""
        if _raised_in_transforms(error):
            within = ", under a transform of torch.func (vmap, grad, jvp)"
        raise CaptureError(
            f"{name} fails on its example inputs{within}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    warning = f"torch.export cannot capture {name} ({first_line}); one concrete run was recorded instead"
    return _from_recording(recorded, list(state), list(buffers), paths, aliases, warning)


def _above_or_below_transforms(recording: Callable[[bool], _Recording]) -> _Recording:
    """Record a run above the dispatcher, or below it where transforms of torch.func hide the flow of data.

    Args:
        recording: Runs the model; called with whether to record above the dispatcher.
    """
    try:
        above = recording(True)
    except Exception as error:
        if not _raised_in_transforms(error):
            raise
        return recording(False)
    if _lost_in_transforms(above.module):
        return recording(False)
    return above


@dataclass(frozen=True)
class _Recording:
    """The operators of one run.

    Attributes:
        module: The graph.
        callers: Name of a node -> name of the module that called it.
        backward: Names of nodes that a derivative in the forward pass runs backwards.
        transformed: Whether the graph was taken below the transforms of torch.func.
    """

    module: GraphModule
    callers: Mapping[str, str]
    backward: set[str]
    transformed: bool


def _lost_in_transforms(module: GraphModule) -> bool:
    """Whether transforms of torch.func hide the flow of data: their tensors stand in the graph as constants.

    Above the dispatcher an operator sees the wrapped tensors of vmap, grad and jvp, which no recorded
    operator made. torch 2.11 records the calls that wrap them. Below it the transforms are done, and
    operators see plain tensors.
    """
    if runs_vmap(module.graph.nodes):
        return True
    # Tensors that the trace has not made stand in the graph as attributes.
    constants = [getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    # Forward-mode derivatives wrap a tensor together with its tangent.
    duals = (torch.ops.aten._make_dual.default, torch.ops.aten._unpack_dual.default)
    return any(isinstance(x, Tensor) and wrapped(x) for x in constants) or any(
        node.target in duals for node in module.graph.nodes
    )


def _raised_in_transforms(error: Exception) -> bool:
    """Whether an error comes out of a function that a transform of torch.func called."""
    files = {frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)}
    return any(file.endswith(("_functorch/eager_transforms.py", "_functorch/vmap.py")) for file in files)


def _recorded() -> int:
    """Return how many nodes the recording under way has so far."""
    mode = get_proxy_mode()
    return 0 if mode is None else len(mode.tracer.graph.nodes)


@contextmanager
def _run_backwards(found: set[str]) -> Iterator[None]:
    """Note which nodes of a recording compute derivatives backwards: by torch.autograd.grad, or torch.func.

    Args:
        found: Filled with the names of nodes while the model runs.
    """
    original_grad = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        # All nodes that are recorded during the call are the backward pass.
        start = _recorded()
        result = original_grad(*args, **kwargs)
        mode = get_proxy_mode()
        nodes = mode.tracer.graph.nodes if mode is not None else ()
        found.update(node.name for node in islice(nodes, start, None))
        return result

    with patch.object(torch.autograd, "grad", grad):
        yield


def _first_line(error: Exception) -> str:
    """Return the first line of what an exception says, ``""`` if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


@contextmanager
def _callers(model: nn.Module, found: dict[str, str]) -> Iterator[None]:
    """Note which module calls each operator of a recording: name of the node -> name of the module.

    Args:
        model: Its modules carry hooks while the context lasts.
        found: Filled while the model runs.
    """
    starts: list[int] = []

    # Hooks frame the forward of every module: what is recorded between them it has called.
    def enter(module: nn.Module, args: Any) -> None:
        starts.append(_recorded())

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        start, mode = starts.pop(), get_proxy_mode()
        nodes = () if mode is None else mode.tracer.graph.nodes
        for node in islice(nodes, start, None):
            found.setdefault(node.name, name)  # modules inside of this one have left before

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _from_recording(
    found: _Recording,
    parameters: list[str],
    buffers: list[str],
    paths: list[str],
    aliases: Mapping[str, tuple[str, ...]],
    warning: str,
) -> Capture:
    """Put the operators of one run into the record that all captures give."""
    module = found.module
    drop_whole_slices(module)
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in module.graph.nodes:
        nodes[node.op].append(node)
    # Placeholders come in the order of the arguments of `run`: parameters, buffers, inputs.
    placeholders, operators = nodes["placeholder"], nodes["call_function"]
    number_of_states = len(parameters) + len(buffers)
    parameter_of = dict(zip(placeholders, parameters, strict=False))
    states = placeholders[len(parameters) : number_of_states]
    filled = dict(zip(states, buffers, strict=True))
    inputs = {node: f"input {number}" for number, node in enumerate(placeholders[number_of_states:])}
    # Constants that the forward pass makes.
    for node in nodes["get_attr"]:
        node.meta["val"] = getattr(module, str(node.target))
        states.append(node)
    (output,) = nodes["output"]
    results: Any = output.args[0]
    returned = [result for result in results if isinstance(result, Node)]
    numbers = {}
    # A buffer or a constant of one number may be a multiplier such as d**-0.5.
    for node in states:
        number = number_in(node.meta.get("val"))
        if number is not None:
            numbers[node] = number
    return Capture(
        tuple(operators),
        parameter_of,
        tuple(states),
        inputs,
        tuple(zip(paths, returned, strict=False)),
        aliases,
        "recorded run",
        {node: found.callers.get(node.name, "") for node in operators},
        (warning,),
        buffers=filled,
        numbers=numbers,
        derivatives=frozenset(node for node in operators if node.name in found.backward),
        transformed=found.transformed,
    )
