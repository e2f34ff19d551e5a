"""Example inputs: the caller's, or those that the model itself reveals."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mupass._capture.graph import attributes_kept
from mupass._errors import CaptureError

BATCH, LENGTH = 2, 8
IMAGE_SIZES = (32, 28, 64, 224, 96, 128, 256, 299, 384, 512)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring example inputs into the form (args, kwargs).

    Args:
        example_inputs: A tensor; a tuple or list of positional inputs; a mapping of keyword inputs; or a
            pair ``(args, kwargs)``.

    Returns:
        Positional and keyword inputs.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        pair = tuple(example_inputs)
        # model(**inputs)
        if len(pair) == 2 and isinstance(pair[0], (tuple, list)) and isinstance(pair[1], Mapping):
            return tuple(pair[0]), dict(pair[1])
        return pair, {}
    return (example_inputs,), {}


def find_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find inputs that the model runs on.

    Tried in order: Hugging Face's ``dummy_inputs``, timm's ``pretrained_cfg``, then the first layer's
    features, channels (at common image sizes) or table length. A candidate counts when a forward pass on
    fake tensors (no memory, no arithmetic) succeeds.

    Args:
        model: The module.

    Returns:
        Positional and keyword inputs.

    Raises:
        CaptureError: When no candidate runs; the message shows the call to write.
    """
    failures = []
    for args, kwargs in _candidates(model):
        error = try_forward(model, args, kwargs)
        # The first candidate that runs is taken: they come in the order of trust.
        if error is None:
            return args, kwargs
        failures.append(f"{describe((args, kwargs))}: {error}")
    tried = "\n  ".join(failures[:3]) or "the model has no layer that tells its input"
    raise CaptureError(
        f"cannot tell what {type(model).__name__} takes. Write "
        f"mupass.transform(model, example_inputs=(x,)) with a batch of your data, or a dict for keyword "
        f"inputs. Tried:\n  {tried}"
    )


def try_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Run the model on fake tensors; return the first line of the error, or None."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Fake tensors have shapes and no data, so that a wrong guess costs no memory.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with mode, torch.no_grad(), torch.random.fork_rng(devices=[]), attributes_kept(model):
            fake: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
            inputs = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs))
            torch.func.functional_call(model, fake, *inputs, tie_weights=True)
    except Exception as error:  # any failure means: not these inputs
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def describe(inputs: Any) -> str:
    """Return shapes and types of inputs as one short line."""
    descriptions = [
        f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in tree_leaves(inputs) if isinstance(x, Tensor)
    ]
    return ", ".join(descriptions)


def _candidates(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(floating, torch.float32)
    dummy = getattr(model, "dummy_inputs", None)
    # transformers.PreTrainedModel.dummy_inputs, with and without a cache of keys and values.
    if isinstance(dummy, Mapping):
        # A cache is an output that export cannot take apart.
        no_cache = {"use_cache": False} if _accepts(model, "use_cache") else {}
        on_device = {}
        for name, value in dummy.items():
            on_device[name] = value.to(device) if isinstance(value, Tensor) else value
        yield (), {**on_device, **no_cache}
        yield (), on_device
    # timm models say what images they were made for.
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        yield (torch.zeros(BATCH, *config["input_size"], device=device, dtype=dtype),), {}
    # Other models are asked by their first layer.
    for first in _first_layers(model):
        for x in _for_layer(first, device, dtype):
            yield (x,), {}


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _first_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the first layer that reads data; registration order is the best guess there is."""
    layer_classes = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.RNNBase)
    yield from [module for module in model.modules() if isinstance(module, layer_classes)][:1]


def _for_layer(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device, dtype=dtype)

    if isinstance(layer, nn.Linear):
        # Rows, or tokens of a sequence.
        yield zeros(BATCH, layer.in_features)
        yield zeros(BATCH, LENGTH, layer.in_features)
    elif isinstance(layer, nn.RNNBase):
        yield zeros(BATCH, LENGTH, layer.input_size)
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        yield torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        rank = len(layer.kernel_size)
        # Convolutions run at many sizes, but a head behind a flatten fits one of them.
        for size in IMAGE_SIZES if rank == 2 else (64, 32, 16, 256, 1024):
            yield zeros(BATCH, layer.in_channels, *[size] * rank)
