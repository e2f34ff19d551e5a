"""The shapes that every operator of a resized model must have, and what a candidate lacks of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mupass._capture.capture import export
from mupass._capture.graph import Capture, fresh_copy, parameter_names, quiet
from mupass._capture.inputs import try_forward
from mupass._capture.record import record
from mupass._dims.facts import Value
from mupass._dims.graph import computing, operator_name, shape_of
from mupass._errors import CaptureError
from mupass._resize.counts import SamePlaces, counts_no_width, grows, limits
from mupass._resize.sizes import NewSizes

# Operators whose further results have sizes that depend on the device.
FIRST_ONLY = ("aten.embedding_bag", "aten._embedding_bag")

Shapes = list[tuple[int | None, ...]]


@dataclass(frozen=True)
class Failure:
    """How far a candidate got: parameters that fit, whether it ran, operators that fit; what went wrong.

    Of one that did not run, `operators` are those up to the last module that was completed, and `calls` all
    that were called, in code between modules too.
    """

    parameters: int
    ran: bool
    operators: int
    where: str
    message: str
    calls: int = 0

    @property
    def score(self) -> tuple[int, bool, int, int]:
        """Order of failures; more is nearer to success."""
        return self.parameters, self.ran, self.operators, self.calls


@dataclass(frozen=True)
class Target:
    """What the resized model must look like.

    Attributes:
        shapes: Parameter -> shape.
        operators: Shapes of every operator's results; None for a size that cannot be told.
        owners: Module of every operator.
        inputs: Positional and keyword inputs, on the new model's device.
        exported: Whether torch.export captured the source.
        limits: Of every operator the numbers that it holds counts of no width against.
        places: Of a recorded source, what its run found; None where no values tell a size.
    """

    shapes: Mapping[str, tuple[int, ...]]
    operators: list[Shapes]
    owners: list[str]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    exported: bool
    limits: list[list[int]]
    places: SamePlaces | None = None

    def failure(self, candidate: nn.Module) -> Failure | None:
        """Run a candidate and compare shapes; None when all are as predicted.

        Args:
            candidate: The resized model, on a real device.
        """
        # Parameters first: their shapes tell most wrong numbers without a run.
        shapes = {name: tuple(parameter.shape) for name, parameter in candidate.named_parameters()}
        mismatched = [name for name, shape in self.shapes.items() if shapes.get(name) != shape]
        if mismatched or len(shapes) != len(self.shapes):
            surplus = [name for name in shapes if name not in self.shapes]
            name = (mismatched or surplus)[0]
            message = f"{name} has shape {shapes.get(name)}, not {self.shapes.get(name)}"
            return Failure(len(self.shapes) - len(mismatched), False, 0, name.rpartition(".")[0], message)
        try:
            # Captured in the same way as the source, so that operators can be compared one by one.
            with quiet():
                recaptured = self._captured(candidate)
        except Exception as error:  # a wrong number may raise anything
            # The traceback names the module whose code raised.
            module_path = _blamed(candidate, error)
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"{type(error).__name__} in {module_path or 'the root module'}: {text}"
            with quiet():
                operators, calls = self._progress(candidate)
            return Failure(len(shapes), False, operators, module_path, message, calls)
        return self._difference(recaptured)

    def _captured(self, candidate: nn.Module) -> Capture:
        args, kwargs = self.inputs
        if self.exported:
            return export(candidate, args, kwargs)
        with self.places or nullcontext():
            return _recorded(candidate, args, kwargs)

    def _progress(self, candidate: nn.Module) -> tuple[int, int]:
        """Return how many operators the last complete module ends with, and how many ran in all."""
        passed: set[str] = set()
        handles = [
            module.register_forward_hook(lambda *_, path=path: passed.add(path))
            for path, module in candidate.named_modules()
        ]
        args, kwargs = self.inputs
        counter = _Counter()
        try:
            with counter:
                if self.exported:
                    try_forward(candidate, args, kwargs)
                else:
                    state = {
                        key: tensor.detach().clone()
                        for key, tensor in candidate.state_dict(keep_vars=True).items()
                    }
                    torch.func.functional_call(
                        candidate, state, *fresh_copy((args, kwargs)), tie_weights=True
                    )
        except Exception:  # that it fails is known
            pass
        finally:
            for handle in handles:
                handle.remove()
        # The last operator of a module that has run tells how far the run came.
        completed = max((index + 1 for index, owner in enumerate(self.owners) if owner in passed), default=0)
        return completed, counter.calls

    def _difference(self, again: Capture) -> Failure | None:
        nodes, count = computing(again.nodes), len(self.shapes)
        for index, (node, expected_shapes) in enumerate(zip(nodes, self.operators, strict=False)):
            actual_shapes = [shape_of(tensor) for tensor in _tensors(node)]
            wrong = ""
            if not _fit(actual_shapes, expected_shapes):
                wrong = f"gives {actual_shapes}, not {expected_shapes}"
            elif self.limits[index] not in ([], limits(node)):
                wrong = f"holds counts against {limits(node)}, not {self.limits[index]}"
            if wrong:
                module_path = again.owners.get(node, "")
                message = f"{operator_name(node.target)} in {module_path or 'the root module'} {wrong}"
                return Failure(count, True, index, module_path, message)
        if len(nodes) != len(self.operators):
            message = f"it runs {len(nodes)} operators instead of {len(self.operators)} at the new width"
            return Failure(count, True, min(len(nodes), len(self.operators)), "", message)
        return None


class _Counter(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


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
    shapes = {
        name: tuple(sizes.of_axis(name, index) for index in range(parameter.dim()))
        for name, parameter in model.named_parameters()
    }
    nodes = computing(captured.nodes)
    env = sizes.solved.engine.env
    predicted = []
    for node in nodes:
        values = [value for value in tree_leaves(env.get(node)) if isinstance(value, Value)]
        values = values[:1] if operator_name(node.target) in FIRST_ONLY else values
        # A size is None where a term is contested: nothing certain is known of it.
        predicted.append([tuple(sizes.predicted(axis.dim) for axis in value.axes) for value in values])
    owners = [captured.owners.get(node, "") for node in nodes]
    moved_inputs = tree_map(lambda x: _moved(x, device) if isinstance(x, Tensor) else x, inputs)

    def has_width(node: Node) -> bool:
        return grows(env.get(node), sizes.solved.verdicts.grows)

    # Limits of counts stay, though they may equal a width: no shape shows them.
    kept = []
    for node in nodes:
        numbers = limits(node)
        kept.append(numbers if numbers and counts_no_width(node, has_width) else [])
    exported, places = captured.method == "export", None
    if not exported and sizes.solved.engine.facts.counted:
        places = SamePlaces()
        with quiet(), places:
            _recorded(model, *inputs)
    return Target(shapes, predicted, owners, moved_inputs, exported, kept, places)


def _recorded(model: nn.Module, args: Any, kwargs: Any) -> Capture:
    reason = CaptureError("recorded as the source was")
    return record(model, args, kwargs, *parameter_names(model), reason)


def _tensors(node: Node) -> list[Tensor]:
    return [tensor for tensor in tree_leaves(node.meta.get("val")) if isinstance(tensor, Tensor)]


def _fit(have: list[tuple[int, ...]], want: Shapes) -> bool:
    if not want:  # no tensors, or nothing known of them
        return True
    pairs = zip(have, want, strict=False)
    return len(have) >= len(want) and all(
        len(shape) == len(expected)
        and all(wanted in (None, size) for size, wanted in zip(shape, expected, strict=True))
        for shape, expected in pairs
    )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Move an input to the new model's device; one without values becomes zeros."""
    return torch.zeros_like(x, device=device) if x.is_meta else x.to(device)


def _blamed(candidate: nn.Module, error: BaseException) -> str:
    """Return the module in whose code an exception was raised."""
    paths = {id(module): path for path, module in candidate.named_modules()}
    chain: list[BaseException] = [error]
    # The first cause in the chain is the most telling one.
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    blamed = ""
    for link in reversed(chain):
        trace = link.__traceback__
        # The innermost frame whose `self` is a module of the candidate.
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            blamed = paths.get(id(owner), blamed) if isinstance(owner, nn.Module) else blamed
            trace = trace.tb_next
        if blamed:
            break
    return blamed
