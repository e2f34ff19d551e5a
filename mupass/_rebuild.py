"""Builds a model at new sizes and proves it: every operator must have the shape that the terms predict.

A Hugging Face model is built anew from its rewritten configuration, any other is copied with its numbers
rewritten. Which number stands for which dimension is searched for: a run that goes wrong points at a module,
and other options of the numbers near it are tried for as long as the run gets further.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from mupass._attributes import Attributes, Slot, nearest, rewrite_config, rewrite_modules
from mupass._capture import Capture, export, fresh_copy, parameter_names, quiet
from mupass._dims.facts import Value
from mupass._dims.graph import operator_name, shape_of
from mupass._errors import CaptureError, ResizeError
from mupass._inputs import try_forward
from mupass._record import record
from mupass._sizes import NewSizes

# Moves between devices and layouts may differ from device to device; they compute nothing.
MOVES = (
    "aten.to",
    "aten._to_copy",
    "aten._assert_tensor_metadata",
    "aten.contiguous",
    "aten.clone",
    "aten.detach",
)
# Operators whose further results have sizes that depend on the device.
FIRST_ONLY = ("aten.embedding_bag", "aten._embedding_bag")
TRIES = 60

Shapes = list[tuple[int | None, ...]]
Builder = Callable[[Mapping[Slot, int]], nn.Module]


@dataclass(frozen=True)
class Failure:
    """How far a candidate got: parameters that fit, whether it ran, operators that fit; what went wrong."""

    parameters: int
    ran: bool
    operators: int
    where: str
    message: str

    @property
    def score(self) -> tuple[int, bool, int]:
        """Order of failures; more is nearer to success."""
        return self.parameters, self.ran, self.operators


@dataclass(frozen=True)
class Target:
    """What the resized model must look like.

    Attributes:
        shapes: Parameter -> shape.
        operators: Shapes of every operator's results; None for a size that cannot be told.
        owners: Module of every operator.
        inputs: Positional and keyword inputs, on the new model's device.
        exported: Whether torch.export captured the source.
    """

    shapes: Mapping[str, tuple[int, ...]]
    operators: list[Shapes]
    owners: list[str]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    exported: bool

    def failure(self, candidate: nn.Module) -> Failure | None:
        """Run a candidate and compare shapes; None when all are as predicted.

        Args:
            candidate: The resized model, on a real device.
        """
        got = {n: tuple(p.shape) for n, p in candidate.named_parameters()}
        wrong = [n for n, shape in self.shapes.items() if got.get(n) != shape]
        if wrong or len(got) != len(self.shapes):
            name = wrong[0] if wrong else next(n for n in got if n not in self.shapes)
            message = f"{name} has shape {got.get(name)}, not {self.shapes.get(name)}"
            return Failure(len(self.shapes) - len(wrong), False, 0, name.rpartition(".")[0], message)
        try:
            with quiet():
                again = self._captured(candidate)
        except Exception as error:  # a wrong number may raise anything
            where = _blamed(candidate, error)
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"{type(error).__name__} in {where or 'the root module'}: {text}"
            with quiet():
                return Failure(len(got), False, self._progress(candidate), where, message)
        return self._difference(again)

    def _captured(self, candidate: nn.Module) -> Capture:
        args, kwargs = self.inputs
        if self.exported:
            return export(candidate, args, kwargs)
        reason = CaptureError("recorded as the source was")
        return record(candidate, args, kwargs, *parameter_names(candidate), reason)

    def _progress(self, candidate: nn.Module) -> int:
        """Return the number of operators up to the last module that a failing run completes."""
        done: set[str] = set()
        handles = [
            module.register_forward_hook(lambda *_, path=path: done.add(path))
            for path, module in candidate.named_modules()
        ]
        args, kwargs = self.inputs
        try:
            if self.exported:
                try_forward(candidate, args, kwargs)
            else:
                state = {n: t.detach().clone() for n, t in candidate.state_dict(keep_vars=True).items()}
                torch.func.functional_call(candidate, state, *fresh_copy((args, kwargs)), tie_weights=True)
        except Exception:  # that it fails is known
            pass
        finally:
            for handle in handles:
                handle.remove()
        return max((at + 1 for at, owner in enumerate(self.owners) if owner in done), default=0)

    def _difference(self, again: Capture) -> Failure | None:
        nodes, count = computing(again), len(self.shapes)
        for at, (node, want) in enumerate(zip(nodes, self.operators, strict=False)):
            have = [shape_of(t) for t in _tensors(node)]
            if not _fit(have, want):
                where = again.owners.get(node, "")
                message = (
                    f"{operator_name(node.target)} in {where or 'the root module'} gives {have}, not {want}"
                )
                return Failure(count, True, at, where, message)
        if len(nodes) != len(self.operators):
            message = f"it runs {len(nodes)} operators instead of {len(self.operators)} at the new width"
            return Failure(count, True, min(len(nodes), len(self.operators)), "", message)
        return None


def target_of(
    model: nn.Module, captured: Capture, sizes: NewSizes, inputs: Any, device: torch.device
) -> Target:
    """Predict the shapes of the resized model.

    Args:
        model: The source.
        captured: Its graph.
        sizes: The new sizes.
        inputs: Positional and keyword inputs of the source.
        device: Device of the resized model.
    """
    shapes = {n: tuple(sizes.of_axis(n, i) for i in range(p.dim())) for n, p in model.named_parameters()}
    nodes = computing(captured)
    env = sizes.solved.engine.env
    predicted = []
    for node in nodes:
        values = [v for v in tree_leaves(env.get(node)) if isinstance(v, Value)]
        values = values[:1] if operator_name(node.target) in FIRST_ONLY else values
        predicted.append([tuple(sizes.predicted(a.dim) for a in v.axes) for v in values])
    owners = [captured.owners.get(n, "") for n in nodes]
    moved = tree_map(lambda x: _moved(x, device) if isinstance(x, Tensor) else x, inputs)
    return Target(shapes, predicted, owners, moved, captured.method == "export")


def rebuild(build: Builder, attributes: Attributes, target: Target, name: str) -> nn.Module:
    """Search for the numbers with which the model runs as predicted.

    Args:
        build: Builds a candidate from a choice of options.
        attributes: The options.
        target: What it must look like.
        name: The model's class, for the error.

    Returns:
        The resized model.

    Raises:
        ResizeError: None was found.
    """
    choice: dict[Slot, int] = {}
    candidate = build(choice)
    failure = target.failure(candidate)
    first, tries = failure, 0
    while failure is not None:
        for trial in _trials(attributes, choice, failure.where):
            tries += 1
            candidate = build(trial)
            found = target.failure(candidate)
            if found is None or found.score > failure.score:
                choice, failure = trial, found
                break
            if tries >= TRIES:
                break
        else:
            tries = TRIES
        if failure is not None and tries >= TRIES:
            raise ResizeError(
                f"{name} cannot be resized, for its code holds a size that no attribute tells: "
                f"{failure.message}"
                + (f" (at first: {first.message})" if first and first.message != failure.message else "")
            )
    return candidate


def _trials(attributes: Attributes, choice: Mapping[Slot, int], where: str) -> list[dict[Slot, int]]:
    """Return the choices that differ from the present one in a slot, those near the blamed module first."""
    trials = []
    for slot in nearest(attributes.slots, where):
        for option in range(len(slot.options)):
            if option != choice.get(slot, 0):
                trials.append({**choice, slot: option})
    return trials


def by_copy(model: nn.Module, attributes: Attributes, tensors: Mapping[str, Tensor]) -> Builder:
    """Return a builder that copies the model around new tensors.

    Args:
        model: The source.
        attributes: Options for its numbers.
        tensors: New parameters and buffers by name.
    """

    def build(choice: Mapping[Slot, int]) -> nn.Module:
        memo: dict[int, Any] = {}
        for name, old in [*model.named_parameters(), *model.named_buffers()]:
            memo[id(old)] = tensors[name]
        for module in model.modules():
            for value in vars(module).values():  # such as the product of weight_norm, remade by its hook
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        try:
            candidate = copy.deepcopy(model, memo)
        except (TypeError, RuntimeError) as error:
            raise ResizeError(f"{type(model).__name__} cannot be copied: {error}") from error
        rewrite_modules(candidate, attributes.pick(choice))
        return candidate

    return build


def has_constructor(model: nn.Module) -> bool:
    """Tell whether a Hugging Face model is what its class makes of its configuration, and no more.

    Args:
        model: The module.
    """
    config = getattr(model, "config", None)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    of_family = hasattr(model, "_init_weights") and type(config).__module__.split(".")[0] == "transformers"
    if hooked or not of_family:
        return False
    try:
        with quiet(), torch.device("meta"):
            twin = type(model)(copy.deepcopy(config))  # type: ignore[call-arg]
    except Exception:  # whatever its constructor wants, it is not the configuration alone
        return False
    return _layout(twin) == _layout(model)


def by_config(
    model: nn.Module,
    attributes: Attributes,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    seed: int | None,
) -> Builder:
    """Return a builder that makes the model anew from its configuration.

    Args:
        model: The source, of which `has_constructor` is true.
        attributes: Options for the numbers of its configuration.
        tensors: New parameters by name; where there are none, the constructor's are kept.
        device: Device to build on.
        seed: Seed of the constructor; the global random state is left alone when given.
    """
    attributes.take_hints(model)

    def build(choice: Mapping[Slot, int]) -> nn.Module:
        changed = rewrite_config(copy.deepcopy(model.config), attributes.pick(choice))
        try:
            with quiet(), torch.device(device), torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                candidate: nn.Module = type(model)(changed)
        except Exception as error:
            return _Broken(error)
        _install(candidate, model, tensors)
        return candidate

    return build


class _Broken(nn.Module):
    """Stands for a candidate whose constructor failed; it fits nothing."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error


def _layout(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, tuple(p.shape)) for n, p in model.named_parameters()]


def _install(candidate: nn.Module, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the new parameters in, where they fit, and take over modes and data types."""
    own = {id(p): n for n, p in candidate.named_parameters()}
    for module in candidate.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                new = tensors.get(own[id(parameter)])
                if new is not None and new.shape == parameter.shape:
                    module._parameters[leaf] = new  # type: ignore[assignment]
    twins = dict(candidate.named_modules())
    for name, module in model.named_modules():
        twin = twins.get(name)
        if twin is None:  # a wrong number of blocks, which the comparison of parameters will tell
            return
        twin.training = module.training
        for leaf, buffer in module._buffers.items():
            made = twin._buffers.get(leaf)
            if buffer is not None and made is not None:
                twin._buffers[leaf] = made.to(buffer.dtype)


def computing(captured: Capture) -> list[Node]:
    """Return the operators of a graph that compute.

    Args:
        captured: The graph.
    """
    return [n for n in captured.nodes if operator_name(n.target) not in MOVES]


def _tensors(node: Node) -> list[Tensor]:
    return [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def _fit(have: list[tuple[int, ...]], want: Shapes) -> bool:
    if not want:  # no tensors, or nothing known of them
        return True
    pairs = zip(have, want, strict=False)
    return len(have) >= len(want) and all(
        len(h) == len(w) and all(b in (None, a) for a, b in zip(h, w, strict=True)) for h, w in pairs
    )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Move an input to the new model's device; one without values becomes zeros."""
    return torch.zeros_like(x, device=device) if x.is_meta else x.to(device)


def _blamed(candidate: nn.Module, error: BaseException) -> str:
    """Return the module in whose code an exception was raised."""
    paths = {id(m): n for n, m in candidate.named_modules()}
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    found = ""
    for link in reversed(chain):
        trace = link.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            found = paths.get(id(owner), found) if isinstance(owner, nn.Module) else found
            trace = trace.tb_next
        if found:
            break
    return found
