"""Probe: what every operator of a model makes, and what the update of its parameter does to that.

A function mode sees every operator that the model calls, whether modules or raw tensors make it. An operator
that mixes a parameter with anything else is kept from the first pass with all it was given. In a later pass
it is run on those same inputs with the parameter's new values: the difference is ``dW h`` of that parameter
alone, at the activations of the start. Faults of other layers are not in it.

Its part along the gradient of the loss is measured too. With more rows (samples times positions) than width,
``dW h`` is mostly a sum of unrelated terms, which shrinks like ``1/sqrt(width)`` however right the learning
rate is; that sum is orthogonal to the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mupass._study.batches import Batch, Loss, StudyError, logits_of

MASKED = 1e9  # attention scores beyond are masks
ATTENTION = "scaled_dot_product_attention"
SCORES = (ATTENTION, "softmax")  # operators that are judged by the scores they are given
OUTPUT = "output of the model"


@dataclass(frozen=True)
class Site:
    """A place in the model.

    Attributes:
        module: Qualified name of the module whose forward is running; ``""`` is the root.
        operator: Name of the function that it calls.
        parameter: Name of the parameter that the function reads, or ``""``.
        call: How many times the module had called the function on the parameter before.
    """

    module: str
    operator: str
    parameter: str = ""
    call: int = 0

    def __str__(self) -> str:
        """Return the place in words."""
        if self.operator == OUTPUT:
            return self.operator
        again = f" (call {self.call + 1})" if self.call else ""
        what = f"{self.operator}{again} in {self.module or 'the root module'}"
        return f"{self.parameter}: {what}" if self.parameter else what


@dataclass(frozen=True)
class _Call:
    """An operator of the first pass: what it was given (copies), where its parameters stand in that."""

    func: Callable[..., Any]
    given: list[Any]
    spec: Any
    at: dict[int, Site]

    def run(self, index: int, new: Tensor) -> Tensor:
        """Return its output with one parameter changed."""
        leaves = [*self.given[:index], new.detach(), *self.given[index + 1 :]]
        if _works_in_place(self.func):
            leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        result = _first(_seeded(self.func, args, kwargs))
        assert result is not None  # as in the first pass
        return result


class Probe:
    """Measures one model, before and while it is trained.

    Args:
        model: The model, at its start.
        batch: What it is run on, always the same.
        loss: Of its output and the batch's targets.
    """

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss) -> None:
        self.model, self.batch = model, batch
        self.names = {module: name for name, module in model.named_modules()}
        self.first = _Recorder(model)
        self._pass(self.first, loss)
        self.start, self.head_dims = self.first.made, self.first.head_dims

    def at_start(self) -> Iterator[tuple[Site, str, float]]:
        """Yield (place, quantity, RMS) before the first step.

        ``activation`` is an operator's output, ``input`` the largest activation that it was given, ``weight``
        its parameter.
        """
        for site, value in self.start.items():
            yield site, "activation", rms(value)
        for call in self.first.calls.values():
            others = [x for i, x in enumerate(call.given) if i not in call.at and _is_real(x)]
            for i, site in call.at.items():
                yield site, "weight", rms(call.given[i])
                if others:
                    yield site, "input", max(map(rms, others))

    def now(self) -> Iterator[tuple[Site, str, float]]:
        """Yield (place, quantity, RMS) of how an operator's output moved since the start.

        ``update`` is dW h, ``aligned`` the part of it along the gradient at the start, ``change`` all of it.

        Raises:
            StudyError: The model calls other operators than at the start.
        """
        later = _Recorder(self.model, self.first)
        self._pass(later)
        if later.made.keys() != self.start.keys():
            odd = next(iter(later.made.keys() ^ self.start.keys()))
            raise StudyError(f"the model calls other operators than before the first step: {odd}")
        for site, update in later.updates.items():
            yield site, "update", rms(update)
            if site in self.first.slopes:
                yield site, "aligned", _along(update, self.first.slopes[site])
        for site, value in later.made.items():
            yield site, "change", rms(value - self.start[site])

    def _pass(self, recorder: _Recorder, loss: Loss | None = None) -> None:
        """Run the model under a recorder; with a loss, find the gradient at every output too."""
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        handles = []
        for module, name in self.names.items():
            handles.append(module.register_forward_pre_hook(recorder.enter(name)))
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        try:
            with torch.set_grad_enabled(loss is not None), torch.random.fork_rng(devices=list(devices)):
                torch.manual_seed(0)
                with recorder:
                    output = self.batch.run(self.model)
                if loss is not None:
                    trained = [p for p in self.model.parameters() if p.requires_grad]
                    torch.autograd.grad(loss(output, self.batch.targets), trained, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])
        recorder.made[Site("", OUTPUT)] = logits_of(output).detach().clone()


class _Recorder(TorchFunctionMode):
    """Sees all functions of one forward pass; of a later one it tells what the updates did."""

    def __init__(self, model: nn.Module, first: _Recorder | None = None) -> None:
        super().__init__()
        self.first = first
        self.calls: dict[tuple[Site, ...], _Call] = {}
        self.made: dict[Site, Tensor] = {}
        self.slopes: dict[Site, Tensor] = {}  # gradient of the loss
        self.updates: dict[Site, Tensor] = {}
        self.head_dims: dict[Site, int] = {}
        self.stack = [""]
        self.seen: Counter[tuple[str, str, str]] = Counter()
        # What is computed from parameters alone (views, transposes, concatenations) stands for them.
        self.weights = {id(p): n for n, p in model.named_parameters()}
        self.alive: list[Tensor] = list(model.parameters())

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(name)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        named = [x for x in tensors if id(x) in self.weights]
        call = None
        if named and len(named) < len(tensors) and not _is_bookkeeping(func):
            call = self._call(func, leaves, spec)
        if not call:
            self._scores(func, args, kwargs or {}, tensors)
        run = _seeded if call else _plain
        out = run(func, args, kwargs or {})
        if call:
            self._record(call, leaves, out)
        elif named and len(named) == len(tensors):
            self._derive(named, out)
        return out

    def _call(self, func: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> _Call:
        at = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) in self.weights:
                at[i] = self._site(func, self.weights[id(leaf)])
        given = list(leaves)
        if self.first is None:  # kept for later passes: whatever comes next may write into it
            given = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        return _Call(func, given, spec, at)

    def _site(self, func: Callable[..., Any], parameter: str = "") -> Site:
        key = (self.stack[-1], _name(func), parameter)
        self.seen[key] += 1
        return Site(*key, self.seen[key] - 1)

    def _record(self, call: _Call, leaves: Sequence[Any], out: Any) -> None:
        result = _first(out)
        if result is None:
            return
        key = tuple(call.at.values())
        self.calls[key] = call
        kept = result.detach().clone()
        self.made.update(dict.fromkeys(key, kept))
        if self.first is None:
            if result.requires_grad:
                result.register_hook(lambda slope: self.slopes.update(dict.fromkeys(key, slope.detach())))
        elif key in self.first.calls:
            old = self.first.calls[key]
            for i, site in call.at.items():
                self.updates[site] = old.run(i, leaves[i]) - self.first.made[site]

    def _derive(self, named: Sequence[Tensor], out: Any) -> None:
        name = "+".join(dict.fromkeys(self.weights[id(x)] for x in named))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.weights[id(leaf)] = name
                self.alive.append(leaf)  # an id is only good while its tensor lives

    def _scores(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Record the logits of attention, which no module shows."""
        name = _name(func)
        if name == ATTENTION:
            found, head_dim = _attention_scores(*args, **kwargs), tensors[0].shape[-1]
        elif name == "softmax" and tensors and tensors[0].is_floating_point():
            found, head_dim = tensors[0].detach(), 0
        else:
            return
        site = self._site(func)
        self.head_dims[site] = head_dim
        self.made[site] = torch.where(found.abs() < MASKED, found, 0.0)


def _plain(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _seeded(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator that may hold dropout, with the same mask every time."""
    torch.manual_seed(0)
    return func(*args, **kwargs)


def rms(x: Tensor) -> float:
    """Root mean square of all entries.

    Args:
        x: Any tensor.
    """
    return x.double().square().mean().sqrt().item()


def _along(update: Tensor, slope: Tensor) -> float:
    """RMS of the part of an update along a direction."""
    length = slope.double().norm().item()
    part = (update.double() * slope.double()).sum().abs().item()
    return part / length / update.numel() ** 0.5 if length else 0.0


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def _attention_scores(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    q, k = q.detach(), k.detach()
    if k.dim() > 2 and k.shape[-3] != q.shape[-3]:  # grouped queries
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = kwargs.get("scale")
    return q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _first(out: Any) -> Tensor | None:
    return next((x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()), None)


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


def _is_bookkeeping(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__setitem__", "__delete__")


def _works_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("batch_norm", "instance_norm") or (
        name.startswith("__i") if name.endswith("__") else name.endswith("_")
    )
