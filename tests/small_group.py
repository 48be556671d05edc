"""The processes of a distributed training: started quickly, joined to a process group, and out of it again.

This module imports little, because every process that is started imports it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from typing import Any

import torch

from hpcres.training.distributed import processes


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens.

    They are below the ports that systems give to a socket that asks for any (from 32768 on Linux), so that no socket
    that another test opens meanwhile is given one of them.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def as_rank(rank: int, size: int, port: int) -> None:
    """Set the variables that torchrun sets for each process."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], size: int, join: bool = True) -> Any:
    """torch.multiprocessing.spawn, but processes are forked from one that has imported torch and the training."""
    multiprocessing.set_forkserver_preload(["hpcres.training.loop"])
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
