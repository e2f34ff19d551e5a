"""Batches: what a study trains on, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mupass._capture.inputs import as_call
from mupass._errors import StudyError

Loss = Callable[[Any, Any], Tensor]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional ones, and those by keyword


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        targets: What the loss compares the output with; None where the model computes its own loss.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any

    @property
    def inputs(self) -> Inputs:
        """Positional and keyword inputs."""
        return self.args, self.kwargs

    def run(self, model: nn.Module) -> Any:
        """Return the model's output.

        Args:
            model: The model.
        """
        return model(*self.args, **self.kwargs)


Data = Callable[[], Iterable[Any]] | Iterable[Any] | Batch


def read_batches(data: Data, count: int) -> list[Batch]:
    """Take batches from the caller's data.

    Args:
        data: An iterable of batches, or a function of no arguments that returns one. A batch is a pair
            ``(inputs, targets)``, with inputs in any form that `mupass.analyze` takes, or a mapping of
            keyword inputs for a model that returns its own loss. A single batch (a tuple or a mapping) is
            used at every step.
        count: Number of batches wanted.

    Returns:
        The first batches, at most `count`.

    Raises:
        StudyError: No data, or something that is not a batch.
    """
    try:
        source: Any = data() if callable(data) else data
    except Exception as error:
        raise StudyError(f"the function that returns the data fails: {error}") from error
    # One batch is used at every step; a list of batches is an iterable of them.
    if isinstance(source, (Batch, tuple, Mapping)):
        source = [source]
    elif isinstance(source, Tensor) or not isinstance(source, Iterable):
        raise StudyError(
            "data must be batches (inputs, targets), or a function that returns them, not "
            f"{type(source).__name__}"
        )
    batches = [_batch(item) for item in islice(source, count)]
    if not batches:
        raise StudyError("data holds no batch; a generator that was used up must be given as a function")
    return batches


def _batch(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    # A mapping of keyword inputs: the model computes its own loss.
    if isinstance(item, Mapping):
        return Batch((), dict(item), None)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return Batch(*as_call(item[0]), targets=item[1])
    raise StudyError(
        f"a batch must be a pair (inputs, targets) or a mapping of keyword inputs, not {type(item).__name__}"
        + (f" of length {len(item)}" if isinstance(item, (tuple, list)) else "")
    )


def move(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """Return a batch on a device, its real and complex numbers in a precision.

    Args:
        batch: The batch.
        device: Where to.
        dtype: Precision of floating-point tensors; None leaves them.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return in_precision(leaf.to(device), dtype)

    return Batch(*tree_map(one, (batch.args, batch.kwargs, batch.targets)))


def in_precision(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor with its numbers in a precision; numbers of tokens and classes keep their type.

    Args:
        tensor: The tensor.
        dtype: Type of real numbers; complex ones take the type with parts of that type. None leaves them.
    """
    if dtype is not None and tensor.is_complex():
        return tensor.to(dtype.to_complex())
    if dtype is not None and tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor


def logits_of(output: Any) -> Tensor:
    """Return what a model predicts: its ``logits``, or its first floating-point tensor that is no scalar.

    Args:
        output: Output of a model.

    Raises:
        StudyError: There is none.
    """
    # Hugging Face's outputs name their predictions.
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    # A tuple or a dict of any depth: the first real tensor that is no loss.
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
            return leaf
    raise StudyError(f"the model's output ({type(output).__name__}) holds no tensor of predictions")


def cross_entropy(output: Any, targets: Any) -> Tensor:
    """Return the mean cross-entropy, the default loss of a study.

    Args:
        output: The model's output: logits ``[batch, classes]``, ``[batch, classes, height, width]`` or
            ``[batch, tokens, classes]``, alone or first in a nest; or an output with a ``loss``.
        targets: Class numbers without the class axis; None to take the output's own ``loss``.

    Raises:
        StudyError: Targets are no class numbers, or are missing where the model gives no loss.
    """
    if targets is None:
        own_loss = getattr(output, "loss", None)
        if not isinstance(own_loss, Tensor):
            raise StudyError(
                "a batch without targets needs a model that returns its loss; give (inputs, targets)"
            )
        return own_loss
    logits = logits_of(output)
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        kind = str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise StudyError(
            f"targets are {kind}, and the default loss needs class numbers; give loss=, a function of the "
            "model's output and the targets"
        )
    # logits [batch, tokens, classes] or [batch, classes]
    if logits.dim() == targets.dim() + 1 and logits.shape[:-1] == targets.shape:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    # logits [batch, classes, height, width], as torch takes them
    if logits.dim() == targets.dim() + 1 and logits.shape[:1] + logits.shape[2:] == targets.shape:
        return F.cross_entropy(logits, targets)
    raise StudyError(
        f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit the default loss; "
        "give loss="
    )


def random_batch(model: nn.Module, inputs: Inputs, size: int) -> Batch:
    """Return a batch of random numbers with random classes: enough to check coordinates, not to tune.

    Args:
        model: The model; its output tells the classes, its first embedding the range of token numbers.
        inputs: Positional and keyword inputs of the right form.
        size: Number of samples.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            # What has no batch axis stays as it is.
            return x
        shape = (size, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=x.dtype)
        # Masks and flags of the example are kept: random ones may be refused.
        if x.dtype == torch.bool or not tables or bool((x == 1).all()):  # a mask
            return x[:1].expand(shape).cpu().clone()
        # Token numbers must be within the first table.
        return torch.randint(tables[0], shape, generator=generator)

    args, kwargs = tree_map(one, inputs)
    with torch.no_grad():
        logits = logits_of(Batch(args, kwargs, None).run(model))
    # Images have their classes on axis 1, all else on the last.
    classes = 1 if logits.dim() >= 4 else logits.dim() - 1
    shape = [size for axis, size in enumerate(logits.shape) if axis != classes]
    return Batch(args, kwargs, torch.randint(logits.shape[classes], shape, generator=generator))
