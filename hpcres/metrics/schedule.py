"""The Dask side of measuring: a client, tasks by place, their progress. Kernels know nothing of it."""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from dask import delayed
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, as_completed
from distributed.comm import CommClosedError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box, Triple, triple
from hpcres.memory import keep_freed_memory
from hpcres.study import RawHeader
from hpcres.volumes import Volume, open_volume

BLOCK_BYTES = 64 * 2**20
_SLAB_BYTES = 16 * 2**20
"""Of a block that are held at a time: what a core's share of cache has room for."""
_LINE_SECONDS = 5.0


@contextmanager
def connect(scheduler: str | None = None, threads: int | None = None) -> Iterator[Client]:
    """A Dask client: threads of this process by default (the kernels release the GIL), else a running scheduler.

    `scheduler` is an address (tcp://host:port) or a scheduler file; InputError where nobody answers or works.
    Unfinished where it is lost on the way, or workers die of one and the same task again and again.
    """
    for name in ("distributed", "distributed.client"):  # what ends a run is said here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    where = scheduler or "this machine"
    try:
        with _client(scheduler, threads) as client:
            yield client
    except KilledWorker as error:
        raise Unfinished(
            f"{where}: one block killed {error.allowed_failures + 1} workers in turn, the last "
            f"{error.last_worker.address}; nothing is written: give them more memory or see their logs, then run again"
        ) from None
    except (CancelledError, CommClosedError):
        raise Unfinished(
            f"{where}: the Dask scheduler is lost; nothing is written: start it and its workers, then run again"
        ) from None


@contextmanager
def _client(scheduler: str | None, threads: int | None) -> Iterator[Client]:
    if scheduler is None:
        # Threads share the address space, so results and open files are never copied between processes.
        threads = threads or len(os.sched_getaffinity(0))
        with (
            LocalCluster(
                n_workers=1, threads_per_worker=threads, processes=False, dashboard_address=":0", memory_limit=None
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    is_file = "://" not in scheduler
    if is_file and not Path(scheduler).is_file():
        raise InputError(f"--scheduler {scheduler}: no such scheduler file; give one, or an address as tcp://host:8786")
    try:
        client = Client(scheduler_file=scheduler, timeout=20) if is_file else Client(scheduler, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"--scheduler {scheduler}: no scheduler answers ({reason}); start one, or drop it") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=60)
        except TimeoutError:
            raise InputError(f"--scheduler {scheduler}: it has no workers; start some with `dask worker`") from None
        yield client


@dataclass(frozen=True)
class Source:
    """A volume as tasks name it: every worker opens the path once and keeps it open."""

    path: str
    raw: RawHeader | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, volume: Volume) -> Source:
        return cls(os.path.abspath(volume.path), volume.raw)

    def open(self) -> Volume:
        return _opened(self)


@lru_cache(maxsize=8)
def _opened(source: Source) -> Volume:
    keep_freed_memory(shared_by_threads=True)  # slab after slab lands in the same pages
    return open_volume(source.path, source.raw)


def block_shape(shape: Sequence[int], chunks: Sequence[int], voxels: int) -> Triple:
    """Whole chunks, as near a cube as they allow, of at most `voxels` (or one chunk, halved until it fits)."""
    edges = [min(c, n) for c, n in zip(chunks, shape, strict=True)]
    while prod(edges) > max(voxels, 1):
        axis = edges.index(max(edges))
        edges[axis] = -(-edges[axis] // 2)
    while True:
        growing = [a for a in range(3) if edges[a] < shape[a]]
        axis = min(growing, key=lambda a: edges[a], default=-1)
        if axis < 0 or prod(edges) * 2 > voxels:
            return triple(edges)
        edges[axis] = min(edges[axis] * 2, shape[axis])


def block_voxels(shape: Sequence[int], itemsize: int, threads: int) -> int:
    """Voxels per block: bounded bytes, and a few blocks for every thread."""
    return max(1, min(BLOCK_BYTES // itemsize, max(2**23, prod(shape) // (4 * threads))))


def slabs(box: Box, chunks: Sequence[int], itemsize: int) -> list[Box]:
    """A block cut along z into slabs of whole chunks that are read one after the other."""
    _, y, x = box.shape
    layer = min(chunks[0], box.shape[0])
    thickness = layer * max(1, _SLAB_BYTES // (layer * y * x * itemsize))
    return [
        Box((z, *box.start[1:]), (min(z + thickness, box.stop[0]), *box.stop[1:]))
        for z in range(box.start[0], box.stop[0], thickness)
    ]


def threads_of(client: Client) -> int:
    return max(1, sum(client.nthreads().values()))


def submit(client: Client, task: Callable[..., Any], *columns: Sequence[Any], **fixed: Any) -> list[Future]:
    # The store may have changed since an equal call, so results are never shared between calls (pure=False).
    return client.map(task, *columns, pure=False, **fixed)


def submit_with_neighbours(
    client: Client, first: Callable[..., Any], then: Callable[..., Any], items: Sequence[Any],
    neighbours: Sequence[Mapping[Any, int]], first_fixed: Mapping[str, Any], then_fixed: Mapping[str, Any],
) -> list[Future]:  # fmt: skip
    """One `then(own, {key: neighbour})` per item over results of `first(item)`, `neighbours` giving positions.

    A result of `first` is dropped as soon as the last that needs it is done, so few are held at any time.
    """
    # One graph, so that Dask sees at once what becomes of each result and goes through it depth first.
    leaves = [delayed(first, pure=False)(item, **first_fixed) for item in items]
    joined = [
        delayed(then, pure=False)(leaf, {key: leaves[at] for key, at in near.items()}, **then_fixed)
        for leaf, near in zip(leaves, neighbours, strict=True)
    ]
    return client.compute(joined)


def follow(futures: Sequence[Future], what: str, progress: bool = True) -> None:
    """Wait for all, showing how many are done; the first exception of a task ends the rest and is raised."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not (progress and console.is_terminal), transient=True,
    )  # fmt: skip
    said = time.monotonic()
    with bar:
        job = bar.add_task(what, total=len(futures))
        for done, future in enumerate(as_completed(futures), 1):
            if future.status == "cancelled":  # by a scheduler that is gone
                raise CancelledError(what)
            if future.status != "finished":
                error = future.exception()
                for other in futures:
                    other.cancel()
                raise error
            bar.advance(job)
            if progress and not console.is_terminal and time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                print(f"{what}: {done} of {len(futures)}", file=sys.stderr, flush=True)
