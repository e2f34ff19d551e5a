"""Data parallelism: factors summed over ranks, so that every rank takes the same step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor

from mupass._errors import OptimizerError

Key = TypeVar("Key", bound=Hashable)


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


def shared_memory(parameters: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return two parameters that have an entry in one place in memory, or None.

    Args:
        parameters: By name, each of them once.
    """
    parts_of: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters.items():
        part = local(parameter).detach()
        if part.is_meta or isinstance(part, FakeTensor) or not part.numel():
            continue
        parts_of.setdefault(part.untyped_storage().data_ptr(), []).append((name, part))
    for parts in parts_of.values():
        # Parts of one buffer, as recurrent layers have them, mostly lie one behind the other.
        ranges = sorted(_bytes_of(part) for _, part in parts)
        if all(first[1] <= second[0] for first, second in pairwise(ranges)):
            continue
        size = parts[0][1].untyped_storage().nbytes()
        owner = torch.full((size,), -1)
        for number, (name, part) in enumerate(parts):
            # The first byte of every entry, wherever the strides put it.
            strides = [stride * part.element_size() for stride in part.stride()]
            places = torch.arange(size).as_strided(part.shape, strides, _bytes_of(part)[0])
            found = int(owner[places].max())
            if found >= 0:
                return parts[found][0], name
            owner[places] = number
    return None


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's first entry begins in its storage, and where its last one ends."""
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * size
    return start, start + (int(last) + 1) * size


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


def largest_over_ranks(values: Sequence[Tensor], ranks: int) -> Tensor | None:
    """Return the largest of some scalars on all ranks.

    Args:
        values: Those of this rank; may be none where other ranks have some.
        ranks: Number of ranks.
    """
    if ranks == 1:
        return torch.stack([value.to(values[0]) for value in values]).amax() if values else None
    # A rank may have no values of its own and still take part.
    device = values[0].device if values else _message_device()
    own_values = [value.to(device, torch.float64) for value in values]
    largest = (
        torch.stack(own_values).amax() if own_values else torch.zeros((), dtype=torch.float64, device=device)
    )
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def _message_device() -> torch.device:
    """Return a device that the process group can send from."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def rank_of(ranks: int) -> int:
    """Return the number of this rank among those that share the work.

    Args:
        ranks: Their number.
    """
    return dist.get_rank() if ranks > 1 else 0


def deal(costs: Mapping[Key, int], ranks: int) -> dict[Key, int]:
    """Return the rank that does each piece of work: largest first, to the rank with the least so far.

    Args:
        costs: Piece -> its cost; among equals the first goes first.
        ranks: Number of ranks.
    """
    load, rank_of_piece = [0] * ranks, {}
    for piece in sorted(costs, key=lambda piece: -costs[piece]):
        rank = min(range(ranks), key=load.__getitem__)
        load[rank] += costs[piece]
        rank_of_piece[piece] = rank
    return rank_of_piece


def sum_of(values: Sequence[Tensor], ranks: int) -> Tensor:
    """Return the sum of scalars over all ranks.

    Args:
        values: Those of this rank.
        ranks: Number of ranks.
    """
    total = torch.stack([value.to(values[0].device) for value in values]).sum()
    return sum_over_ranks([total.reshape(1)])[0][0] if ranks > 1 else total


def exchange(
    found: Mapping[str, Tensor],
    owner: Mapping[str, int],
    like: Mapping[str, Tensor],
    ranks: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return what each rank found for its own names, on all of them.

    Args:
        found: What this rank found; its own names that are missing count as zeros.
        owner: Name -> the rank that finds it, the same on every rank.
        like: Name -> a tensor of the shape and precision of the result.
        ranks: Number of ranks.
        device: Where the results are put.
    """
    if ranks == 1:
        return dict(found)
    result, rank = {}, dist.get_rank()
    # One message for each owner and precision.
    for source, dtype in dict.fromkeys((owner[key], like[key].dtype) for key in owner):
        names = [key for key in owner if (owner[key], like[key].dtype) == (source, dtype)]
        sizes = [like[key].numel() for key in names]
        message = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = torch.split(message, sizes)
        # The owner fills the message, the others receive it.
        for name, part in zip(names, parts, strict=True):
            if source == rank and name in found:
                part.copy_(found[name].reshape(-1))
        dist.broadcast(message, src=source)
        result.update({key: part.view(like[key].shape) for key, part in zip(names, parts, strict=True)})
    return result


def from_rank(tensor: Tensor, rank: int, device: torch.device) -> Tensor:
    """Return a tensor of another rank.

    Args:
        tensor: It, on that rank; its like on the meta device on others.
        rank: Number of the rank.
        device: Where to put it.
    """
    is_owner = dist.get_rank() == rank
    received = tensor.detach().clone() if is_owner else torch.empty_like(tensor, device=device)
    received = received.contiguous()
    dist.broadcast(received, src=rank)
    return received


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over all ranks, in one message for each precision and device.

    Square matrices are taken for symmetric: one half of them is sent.

    Args:
        tensors: The same shapes in the same order on every rank.

    Returns:
        The sums, in the same order.
    """
    sums: list[Tensor] = list(tensors)
    # Tensors of different precision cannot be in one message.
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for kind in kinds:
        positions = [
            position for position, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind
        ]
        halves = [_half(tensors[position]) for position in positions]
        packed = torch.cat([matrix.reshape(-1) for matrix in halves])
        dist.all_reduce(packed)
        parts = torch.split(packed, [matrix.numel() for matrix in halves])
        for position, part, half in zip(positions, parts, halves, strict=True):
            sums[position] = _whole(part.reshape(half.shape), tensors[position].shape)
    return sums


def _square(shape: Sequence[int]) -> bool:
    return len(shape) > 2 and shape[-1] == shape[-2] > 1


def _half(t: Tensor) -> Tensor:
    if not _square(t.shape):
        # Symmetric matrices are sent as the triangle on and above the diagonal.
        return t
    rows, columns = torch.triu_indices(t.shape[-1], t.shape[-1], device=t.device)
    return t[..., rows, columns]


def _whole(half: Tensor, shape: Sequence[int]) -> Tensor:
    if not _square(shape):
        return half
    rows, columns = torch.triu_indices(shape[-1], shape[-1], device=half.device)
    matrix = half.new_empty(shape)
    matrix[..., rows, columns] = half
    matrix[..., columns, rows] = half
    return matrix
