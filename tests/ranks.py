"""Two gloo processes, for the tests of distributed training."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def one_of_two(rank: int, port: int) -> Iterator[None]:
    """Be one of two ranks while the context lasts."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    try:
        yield
        dist.barrier()  # a rank whose peer is gone may abort while it closes its threads
    finally:
        dist.destroy_process_group()
