"""Two ways to build a model at new sizes: a copy with its numbers rewritten, or anew from its config."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupass._capture.copying import deepcopy
from mupass._capture.graph import quiet
from mupass._errors import ResizeError
from mupass._resize.attributes import Attributes, Slot, rewrite_config, rewrite_modules

Builder = Callable[[Mapping[Slot, int]], nn.Module]


def by_copy(model: nn.Module, attributes: Attributes, tensors: Mapping[str, Tensor]) -> Builder:
    """Return a builder that copies the model around new tensors.

    Args:
        model: The source.
        attributes: Options for its numbers.
        tensors: New parameters and buffers by name.
    """

    def build(choice: Mapping[Slot, int]) -> nn.Module:
        memo: dict[int, Any] = {}
        # deepcopy takes tensors of the memo instead of copying: the new ones go in where the old ones were.
        for name, old_tensor in [*model.named_parameters(), *model.named_buffers()]:
            memo[id(old_tensor)] = tensors[name]
        for module in model.modules():
            for value in vars(module).values():  # such as the product of weight_norm, remade by its hook
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        try:
            candidate = deepcopy(model, memo)
        except (TypeError, RuntimeError) as error:
            raise ResizeError(f"{type(model).__name__} cannot be copied: {error}") from error
        # The copy has the new tensors; what is left are the numbers of its modules.
        rewrite_modules(candidate, attributes.pick(choice))
        return candidate

    return build


def has_constructor(model: nn.Module) -> bool:
    """Tell whether a Hugging Face model is what its class makes of its configuration, and no more.

    Args:
        model: The module.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "_init_weights") or type(config).__module__.split(".")[0] != "transformers":
        return False
    try:
        # On the meta device: names and shapes tell whether the constructor makes this very model.
        with quiet(), torch.device("meta"):
            twin = type(model)(copy.deepcopy(config))  # type: ignore[call-arg]
    except Exception:  # whatever its constructor wants, it is not the configuration alone
        return False
    # Hooks of the user would be lost with a new object; those of the constructor itself are made again.
    return _layout(twin) == _layout(model) and _hooks(twin) == _hooks(model)


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
        # A wrong number may fail in the constructor: another option is tried then.
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


def _hooks(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Return for every module that has hooks of its forward pass the names of their functions."""
    hooks = []
    for path, module in model.named_modules():
        functions = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        names = [getattr(function, "__qualname__", type(function).__qualname__) for function in functions]
        if names:
            hooks.append((path, names))
    return hooks


def _layout(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _install(candidate: nn.Module, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the new parameters in, where they fit, and take over modes and data types."""
    own_names = {id(parameter): name for name, parameter in candidate.named_parameters()}
    for module in candidate.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                tensor = tensors.get(own_names[id(parameter)])
                # A shape that does not fit shows in the comparison of parameters.
                if tensor is not None and tensor.shape == parameter.shape:
                    module._parameters[leaf] = tensor  # type: ignore[assignment]
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
