"""Fallback capture: records the operators of one concrete run, for models that branch on values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from mupass._capture.draws import settled_draws
from mupass._capture.graph import Capture, fresh_copy, number_in, path_text, plain_outputs, quiet
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
    if any(p.is_meta for p in model.parameters()):
        raise CaptureError(f"torch.export cannot capture {name} on the meta device: {first_line}") from reason
    firsts = set(canonical.values())
    state = {n: p.detach() for n, p in model.named_parameters() if n in firsts}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    leaves, spec = tree_flatten(fresh_copy((tuple(args), dict(kwargs))))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    paths: list[str] = []

    def run(parameters: dict[str, Tensor], states: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for place, tensor in zip(tensors, inputs, strict=True):
            filled[place] = tensor
        given, named = tree_unflatten(filled, spec)
        output = torch.func.functional_call(model, {**parameters, **states}, given, named, tie_weights=True)
        found = [(path, x) for path, x in tree_flatten_with_path(output)[0] if isinstance(x, Tensor)]
        paths[:] = [path_text(path) for path, _ in found]
        return [x for _, x in found]

    callers: dict[str, str] = {}
    try:
        with quiet(), settled_draws(), plain_outputs(model), _callers(model, callers), torch.no_grad():
            module = make_fx(run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(
                state, buffers, [leaves[place] for place in tensors]
            )
    except Exception as error:
        text = f"{type(error).__name__}: {_first_line(error)}"
        raise CaptureError(f"{name} fails on its example inputs: {text}") from error
    warning = f"torch.export cannot capture {name} ({first_line}); one concrete run was recorded instead"
    return _from_recording(module, callers, list(state), list(buffers), paths, aliases, warning)


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

    def nodes() -> Any:
        mode = get_proxy_mode()
        return () if mode is None else mode.tracer.graph.nodes

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(len(nodes()))

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for node in islice(nodes(), starts.pop(), None):
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
    module: torch.fx.GraphModule,
    callers: Mapping[str, str],
    parameters: list[str],
    buffers: list[str],
    paths: list[str],
    aliases: Mapping[str, tuple[str, ...]],
    warning: str,
) -> Capture:
    # Placeholders come in the order of the arguments of `run`: parameters, buffers, inputs.
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    held = len(parameters) + len(buffers)
    named = dict(zip(placeholders, parameters, strict=False))
    states = placeholders[len(parameters) : held]
    filled = dict(zip(states, buffers, strict=True))
    inputs = {node: f"input {number}" for number, node in enumerate(placeholders[held:])}
    for node in module.graph.nodes:
        if node.op == "get_attr":  # a constant made in the forward pass
            node.meta["val"] = getattr(module, node.target)
            states.append(node)
    output = next(n for n in module.graph.nodes if n.op == "output")
    nodes = [n for n in torch.fx.node.map_arg(output.args[0], lambda n: n) if isinstance(n, Node)]
    operators = tuple(n for n in module.graph.nodes if n.op == "call_function")
    owners = {n: callers.get(n.name, "") for n in operators}
    outputs = tuple(zip(paths, nodes, strict=False))
    numbers = {}
    for node in states:
        number = number_in(node.meta.get("val"))
        if number is not None:
            numbers[node] = number
    return Capture(
        operators,
        named,
        tuple(states),
        inputs,
        outputs,
        aliases,
        "recorded run",
        owners,
        (warning,),
        buffers=filled,
        numbers=numbers,
    )
