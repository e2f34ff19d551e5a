"""The captured graph as a record, and what both ways of capturing share."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from mupass._errors import CaptureError, kind_of, some

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
        frozen: Names of the parameters that are not trained.
        written: Parameter -> sizes that the code writes out for what its layer makes, and where.
        permutations: Placeholders of buffers that are permutation matrices, identities among them.
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
    frozen: frozenset[str] = frozenset()
    written: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    permutations: frozenset[Node] = frozenset()

    @property
    def trained(self) -> set[Node]:
        """Placeholders of the parameters that are trained."""
        return {node for node, name in self.parameters.items() if name not in self.frozen}


def first_names(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return every name -> the first name of its tensor: two names of one tensor are one parameter or buffer.

    Args:
        named: Names with tensors, each as often as it has names.
    """
    first_name_of: dict[int, str] = {}
    return {name: first_name_of.setdefault(id(tensor), name) for name, tensor in named}


def parameter_names(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return every parameter name -> its first name, and the first names' further names.

    Args:
        model: The module.

    Raises:
        CaptureError: It is no module, has no parameters, or some that have no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a model (an nn.Module) is needed, not {kind_of(model)}")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(
                f"{name} has no shape yet (a lazy module); "
                "run the model once on example inputs, then call mupass"
            )
    canonical = first_names(model.named_parameters(remove_duplicate=False))
    if not canonical:
        raise CaptureError(f"{type(model).__name__} has no parameters, so there is nothing to scale")
    aliases: dict[str, tuple[str, ...]] = {}
    for name, first_name in canonical.items():
        if name != first_name:
            aliases[first_name] = (*aliases.get(first_name, ()), name)
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
        # The tensors that the loss is made of, and what export takes besides them.
        if isinstance(value, (Tensor, *KNOWN)):
            return value
        # ModelOutput of transformers and the like: every field by itself.
        if dataclasses.is_dataclass(value):
            return {
                field.name: tree_map(plain, getattr(value, field.name)) for field in dataclasses.fields(value)
            }
        attributes = getattr(value, "__dict__", {})
        return {name: entry for name, entry in attributes.items() if isinstance(entry, Tensor)} or None

    handle = model.register_forward_hook(lambda module, args, output: tree_map(plain, output))
    try:
        yield
    finally:
        handle.remove()


class LateParameterError(CaptureError):
    """The forward pass makes parameters, which a capture would lose."""


# The tables of a module itself, which captures leave as they are.
TABLES = frozenset(vars(nn.Module()))


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Take back what a forward pass writes into modules: a tensor that it caches belongs to the trace.

    Args:
        model: Attributes of its modules, and what is in their dicts and lists, are as before afterwards.

    Raises:
        LateParameterError: The pass made parameters.
    """
    kept = []
    for module in model.modules():
        attributes = {name: value for name, value in vars(module).items() if name not in TABLES}
        # self.cache[device] = table writes into the very dict.
        containers = {name: copy.copy(v) for name, v in attributes.items() if type(v) in (dict, list)}
        kept.append((module, attributes, containers))
    try:
        with _parameters_kept(model):
            yield
    finally:
        for module, attributes, containers in kept:
            for name in vars(module).keys() - TABLES - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            for name, contents in containers.items():
                attributes[name].clear()
                # Both take what they held.
                if isinstance(contents, dict):
                    attributes[name].update(contents)
                else:
                    attributes[name].extend(contents)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Take back the parameters that a forward pass makes, and refuse it.

    Raises:
        LateParameterError: There are some.
    """
    names = {name for name, _ in model.named_parameters()}
    parts = [(module, set(module._parameters), set(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        late = [name for name, _ in model.named_parameters() if name not in names]
        if late:
            for module, own_parameters, own_modules in parts:
                for name in module._parameters.keys() - own_parameters:
                    del module._parameters[name]
                for name in module._modules.keys() - own_modules:
                    del module._modules[name]
            raise LateParameterError(
                f"{some(late)}: the forward pass of {type(model).__name__} makes parameters when it runs for "
                "the first time. Run the model once before"
            )


def path_text(path: Any) -> str:
    """Name an output by its place in what the model returns, such as ``logits``; a single one is ``output``.

    Args:
        path: Keys of ``tree_flatten_with_path``.
    """
    return "".join(map(str, path)).strip(".[]'\"") or "output"


def number_in(tensor: Any) -> float | None:
    """Return the value of a tensor that is one real number and is there to be read."""
    if not isinstance(tensor, Tensor) or tensor.numel() != 1 or tensor.is_meta or tensor.is_complex():
        return None
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return float(tensor)


def runs_vmap(nodes: Iterable[Node]) -> bool:
    """Whether operators are framed by calls of vmap of torch.func, which hide an axis from them.

    Args:
        nodes: Nodes of a graph.
    """
    # vmap wraps its argument by this function, which export and make_fx record as a node.
    return any(getattr(node.target, "__name__", "") == "_add_batch_dim" for node in nodes)


def fresh_copy(value: Any) -> Any:
    """Copy inputs so that a model that writes into them leaves the caller's alone."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.copy(x), value)
