"""Gloo processes, for the tests of distributed training."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def one_of(ranks: int, rank: int, port: int) -> Iterator[None]:
    """Be one of some ranks while the context lasts; a rank that got through leaves its process here.

    It leaves without the interpreter's shutdown: meshes and wrapped models keep gloo's threads alive until
    then, and a thread that frees a tensor during the shutdown aborts the process (pytorch#179291).
    """
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    try:
        yield
        dist.barrier()  # so that no rank waits for one that left
    except BaseException:
        dist.destroy_process_group()
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def one_of_two(rank: int, port: int) -> AbstractContextManager[None]:
    """Be one of two ranks, see `one_of`."""
    return one_of(2, rank, port)
