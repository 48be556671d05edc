"""The processes of a distributed training: started quickly, joined to a process group, and out of it again.

This module imports little, because every process that is started imports it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from hpcres.training.distributed import processes


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def as_rank(rank: int, size: int, port: int) -> None:
    """Set the variables that torchrun sets for each process."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], size: int, join: bool = True) -> Any:
    """torch.multiprocessing.spawn, but processes are forked from one that has imported torch and the training."""
    multiprocessing.set_forkserver_preload(["hpcres.training.run"])
    return torch.multiprocessing.start_processes(work, arguments, size, join, start_method="forkserver")


def leave(rank: int, port: int) -> None:
    as_rank(rank, 2, port)
    with processes("cpu", 1) as group:
        model = group.parallel(torch.nn.Linear(50, 50))  # freed after the group, as a model is that a traceback holds
        model(torch.ones(4, 50)).sum().backward()
        assert group.mean(torch.tensor([1.0, rank])).tolist() == [1, 0.5]


def leave_again_and_again(rank: int, ports: list[int]) -> None:
    for port in ports:
        leave(rank, port)
