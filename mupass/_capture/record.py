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
from mupass._capture.graph import Capture, fresh_copy, number_in, plain_outputs, quiet
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
    first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    if any(p.is_meta for p in model.parameters()):
        raise CaptureError(f"torch.export cannot capture {name} on the meta device: {first_line}") from reason
    heads = sorted(set(canonical.values()), key=list(canonical).index)
    state = {n: p.detach() for n, p in model.named_parameters() if n in heads}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    leaves, spec = tree_flatten(fresh_copy((tuple(args), dict(kwargs))))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    paths: list[str] = []

    def run(parameters: dict[str, Tensor], states: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for i, x in zip(tensors, inputs, strict=True):
            filled[i] = x
        a, k = tree_unflatten(filled, spec)
        output = torch.func.functional_call(model, {**parameters, **states}, a, k, tie_weights=True)
        found = [(p, x) for p, x in tree_flatten_with_path(output)[0] if isinstance(x, Tensor)]
        paths[:] = ["".join(map(str, p)).strip(".[]'\"") or "output" for p, _ in found]
        return [x for _, x in found]

    callers: dict[str, str] = {}
    try:
        with quiet(), settled_draws(), plain_outputs(model), _callers(model, callers), torch.no_grad():
            module = make_fx(run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(
                state, buffers, [leaves[i] for i in tensors]
            )
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(f"{name} fails on its example inputs: {type(error).__name__}: {text}") from error
    warning = f"torch.export cannot capture {name} ({first_line}); one concrete run was recorded instead"
    return _from_recording(module, callers, list(state), list(buffers), paths, aliases, warning)


@contextmanager
def _callers(model: nn.Module, found: dict[str, str]) -> Iterator[None]:
    """Note which module calls each operator of a recording: name of the node -> name of the module.

    Args:
        model: Its modules carry hooks while the context lasts.
        found: Filled while the model runs.
    """
    starts: list[int] = []

    def count() -> int:
        mode = get_proxy_mode()
        return 0 if mode is None else len(mode.tracer.graph.nodes)

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(count())

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        start, mode = starts.pop(), get_proxy_mode()
        for node in islice(mode.tracer.graph.nodes, start, None) if mode is not None else ():
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
    holes = [n for n in module.graph.nodes if n.op == "placeholder"]
    named = dict(zip(holes, parameters, strict=False))
    states = [*holes[len(parameters) : len(parameters) + len(buffers)]]
    filled = dict(zip(states, buffers, strict=True))
    inputs = {n: f"input {i}" for i, n in enumerate(holes[len(parameters) + len(buffers) :])}
    for node in module.graph.nodes:
        if node.op == "get_attr":  # a constant made in the forward pass
            node.meta["val"] = getattr(module, node.target)
            states.append(node)
    output = next(n for n in module.graph.nodes if n.op == "output")
    nodes = [n for n in torch.fx.node.map_arg(output.args[0], lambda n: n) if isinstance(n, Node)]
    operators = tuple(n for n in module.graph.nodes if n.op == "call_function")
    owners = {n: callers.get(n.name, "") for n in operators}
    outputs = tuple(zip(paths, nodes, strict=False))
    numbers = {n: x for n in states if (x := number_in(n.meta.get("val"))) is not None}
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
