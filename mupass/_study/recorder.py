"""Recorder: sees every operator of one forward pass that mixes a parameter with anything else.

A function mode sees the operators that the model calls, whether modules or raw tensors make them. In the
first pass each is kept with all it was given; a later pass runs it on those same inputs with the parameter's
new values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mupass._walks import walk

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
class Call:
    """An operator of the first pass: what it was given (copies), where its parameters stand in that."""

    func: Callable[..., Any]
    given: list[Any]
    spec: Any
    at: dict[int, Site]

    def run(self, index: int, new: Tensor) -> Tensor:
        """Return its output with one parameter changed."""
        # The operator of the first pass, on what it was given then, with one parameter as it is now.
        leaves = [*self.given[:index], new.detach(), *self.given[index + 1 :]]
        if _works_in_place(self.func):  # what was given is needed again at the next step
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        result = _first(_seeded(self.func, args, kwargs))
        assert result is not None  # as in the first pass
        return result


class Recorder(TorchFunctionMode):
    """Sees all functions of one forward pass; of a later one it tells what the updates did."""

    def __init__(self, model: nn.Module, first: Recorder | None = None) -> None:
        super().__init__()
        self.first = first
        self.calls: dict[tuple[Site, ...], Call] = {}
        self.made: dict[Site, Tensor] = {}
        self.slopes: dict[Site, Tensor] = {}  # gradient of the loss
        self.origins: dict[Any, tuple[Site, ...]] = {}  # node of the autograd graph -> its operator
        self.updates: dict[Site, Tensor] = {}
        self.head_dims: dict[Site, int] = {}
        self.reach: dict[Site, float] = {}
        self.stack = [""]
        self.seen: Counter[tuple[str, str, str]] = Counter()
        # What is computed from parameters alone (views, transposes, concatenations) stands for them.
        self.weights = {id(parameter): name for name, parameter in model.named_parameters()}
        self.alive: list[Tensor] = list(model.parameters())

    def enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.stack.append(name)

    def leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        weights = [tensor for tensor in tensors if id(tensor) in self.weights]
        # operator(weight, activation): what is measured.
        if weights and len(weights) < len(tensors) and not _is_bookkeeping(func):
            call = self._call(func, leaves, spec)
            out = _seeded(func, args, kwargs)
            self._record(call, leaves, out)
            return out
        self._scores(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        # operator(weight, weight), such as a transpose or a concatenation: stands for the weights.
        if weights and len(weights) == len(tensors):
            self._derive(weights, out)
        return out

    def _call(self, func: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> Call:
        sites = {}
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) in self.weights:
                sites[index] = self._site(func, self.weights[id(leaf)])
        given = list(leaves)
        if self.first is None:  # kept for later passes: whatever comes next may write into it
            given = [value.detach().clone() if isinstance(value, Tensor) else value for value in leaves]
        return Call(func, given, spec, sites)

    def _site(self, func: Callable[..., Any], parameter: str = "") -> Site:
        # One module may call a function on one parameter several times: the calls are counted.
        key = (self.stack[-1], _name(func), parameter)
        self.seen[key] += 1
        return Site(*key, self.seen[key] - 1)

    def _record(self, call: Call, leaves: Sequence[Any], out: Any) -> None:
        result = _first(out)
        if result is None:
            return
        key = tuple(call.at.values())
        self.calls[key] = call
        output = result.detach().clone()
        self.made.update(dict.fromkeys(key, output))
        if result.grad_fn is not None:
            # Not self: it holds the graph that holds the hook, and no collector sees through autograd.
            slopes = self.slopes
            result.register_hook(lambda slope: slopes.update(dict.fromkeys(key, slope.detach())))  # type: ignore[no-untyped-call]
            self.origins[result.grad_fn] = key
        # A later pass: the operator of the first one with the new parameter, less what it made then.
        if self.first is not None and key in self.first.calls:
            first_call = self.first.calls[key]
            for index, site in call.at.items():
                self.updates[site] = first_call.run(index, leaves[index]) - self.first.made[site]

    def before(self, sites: set[Site], strictly: bool) -> set[Site]:
        """Return the places that some others depend on.

        Args:
            sites: The others.
            strictly: Whether to leave out those that none of the others depends on.
        """
        ends = {node for node, places in self.origins.items() if not sites.isdisjoint(places)}
        # Strictly below: what the others were computed from, and not these themselves.
        if strictly:
            ends = set[Any]().union(*map(_parents, ends))
        # Down the graph of autograd, whose nodes point to what they were computed from.
        dependencies: set[Site] = set()
        for node in walk(ends, _parents):
            dependencies.update(self.origins.get(node, ()))
        return dependencies

    def _derive(self, named: Sequence[Tensor], out: Any) -> None:
        # A tensor that is made of several parameters has all their names.
        name = "+".join(dict.fromkeys(self.weights[id(tensor)] for tensor in named))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.weights[id(leaf)] = name
                self.alive.append(leaf)  # an id is only good while its tensor lives

    def _scores(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Record the logits of attention, which no module shows."""
        name = _name(func)
        if name == ATTENTION:
            logits, reach = _attention_scores(*args, **kwargs)
            head_dim = tensors[0].shape[-1]
        # Attention written by hand: its logits are what a softmax reads.
        elif name == "softmax" and tensors and tensors[0].is_floating_point():
            logits, reach, head_dim = tensors[0].detach(), 0.0, 0
        else:
            return
        site = self._site(func)
        self.head_dims[site], self.reach[site] = head_dim, reach
        # Masked scores are huge negative numbers, and no logits.
        self.made[site] = torch.where(logits.abs() < MASKED, logits, 0.0)


def _parents(node: Any) -> set[Any]:
    """Return the nodes of autograd's graph that a node was computed from."""
    return {parent for parent, _ in node.next_functions if parent is not None}


def _seeded(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator that may hold dropout, with the same mask every time."""
    torch.manual_seed(0)
    return func(*args, **kwargs)


def _attention_scores(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """Return the logits, and how large they are where a query and a key point the same way.

    At the start they are unrelated; training aligns them (Yang et al., arXiv 2203.03466, definition 4.1).
    """
    q, k = q.detach(), k.detach()
    if k.dim() > 2 and k.shape[-3] != q.shape[-3]:  # several heads of queries share one of keys
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = kwargs.get("scale")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    reach = float(scale * q.norm(dim=-1).mean() * k.norm(dim=-1).mean())
    return q @ k.transpose(-1, -2) * scale, abs(reach)


def _first(out: Any) -> Tensor | None:
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
    return None


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


def _is_bookkeeping(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__setitem__", "__delete__")


def _works_in_place(func: Callable[..., Any]) -> bool:
    # Norms write their running averages; add_ and __iadd__ say by their names that they write.
    name = getattr(func, "__name__", "")
    return name in ("batch_norm", "instance_norm") or (
        name.startswith("__i") if name.endswith("__") else name.endswith("_")
    )
