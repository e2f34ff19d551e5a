"""Data parallelism: factors summed over ranks, so that every rank takes the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mupass._errors import OptimizerError


def world_size(choice: bool | None) -> int:
    """Return over how many ranks factors are summed.

    Args:
        choice: True or False; None means yes exactly where torch.distributed runs with several ranks.

    Raises:
        OptimizerError: True, but torch.distributed is not initialized.
    """
    running = dist.is_available() and dist.is_initialized()
    if choice and not running:
        raise OptimizerError("data_parallel=True needs torch.distributed.init_process_group first")
    return dist.get_world_size() if running and choice is not False else 1


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a shard only (a DTensor, as FSDP2 and tensor parallelism make them).

    Args:
        tensor: A parameter, or its gradient.
    """
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor.

    Args:
        tensor: Sharded or not.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, collected from the ranks that hold its shards.

    Args:
        tensor: Sharded or not.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that all ranks hold in the placement of another.

    Args:
        tensor: The same on every rank.
        like: A parameter, sharded or not.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No rank is the source: each cuts its own part out of its own copy.
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def share(slots: Tensor, ranks: int) -> Tensor:
    """Return the part of some work that this rank does.

    Args:
        slots: All of it.
        ranks: Number of ranks that share it.
    """
    return slots if ranks == 1 else slots[dist.get_rank() :: ranks]


def divided(
    slots: Tensor, ranks: int, compute: Callable[[Tensor], tuple[Tensor, ...]], symmetric: bool = True
) -> tuple[Tensor, ...]:
    """Compute results ``[len(slots), ...]`` of some slots, each rank its share, and give all to all.

    Args:
        slots: What is to be computed.
        ranks: Number of ranks that share the work.
        compute: Slots -> results of these.
        symmetric: Whether results that are square matrices are symmetric: one half of them is sent.
    """
    if ranks == 1:
        return compute(slots)
    parts = compute(share(slots, ranks))
    whole = [part.new_zeros(len(slots), *part.shape[1:]) for part in parts]
    for full, part in zip(whole, parts, strict=True):
        share(full, ranks).copy_(part)
    sent = whole if symmetric else [full.reshape(len(full), -1) for full in whole]
    return tuple(s.view_as(full) for s, full in zip(sum_over_ranks(sent), whole, strict=True))


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over all ranks, in one message for each precision and device.

    Square matrices are taken for symmetric: one half of them is sent.

    Args:
        tensors: The same shapes in the same order on every rank.

    Returns:
        The sums, in the same order.
    """
    sums: list[Tensor] = list(tensors)
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    for kind in kinds:
        at = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
        halves = [_half(tensors[i]) for i in at]
        packed = torch.cat([h.reshape(-1) for h in halves])
        dist.all_reduce(packed)
        parts = torch.split(packed, [h.numel() for h in halves])
        for i, part, half in zip(at, parts, halves, strict=True):
            sums[i] = _whole(part.reshape(half.shape), tensors[i].shape)
    return sums


def _square(shape: Sequence[int]) -> bool:
    return len(shape) > 2 and shape[-1] == shape[-2] > 1


def _half(t: Tensor) -> Tensor:
    if not _square(t.shape):
        return t
    rows, columns = torch.triu_indices(t.shape[-1], t.shape[-1], device=t.device)
    return t[..., rows, columns]


def _whole(half: Tensor, shape: Sequence[int]) -> Tensor:
    if not _square(shape):
        return half
    rows, columns = torch.triu_indices(shape[-1], shape[-1], device=half.device)
    whole = half.new_empty(shape)
    whole[..., rows, columns] = half
    whole[..., columns, rows] = half
    return whole
