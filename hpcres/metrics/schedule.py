"""The Dask side of measuring: a client, tasks by place, and their progress.

Kernels do not depend on it. Dask is imported by the functions that use it, since training counts slices without it and
the import takes about a second.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from hpcres.cores import cores
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.geometry import Box, Triple, triple
from hpcres.memory import keep_freed_memory
from hpcres.progress import progress_display
from hpcres.signals import end_if_signalled
from hpcres.study import RawHeader
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import probabilities
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client, Future

BLOCK_BYTES = 64 * 2**20
_SLAB_BYTES = 16 * 2**20
"""Of a block that are held at a time: what a core's share of cache has room for."""
_POLL_SECONDS = 0.1
WORKER_WAIT_SECONDS = 900.0
"""How long a run waits for a worker once none is left: as long as a batch system may take to start another."""


@contextmanager
def connect(
    scheduler: str | None = None, threads: int | None = None, worker_wait: float = WORKER_WAIT_SECONDS
) -> Iterator[Client]:
    """Connect to Dask: threads of this process by default (the kernels release the GIL), else a running scheduler.

    Parameters
    ----------
    scheduler : str, optional
        An address (tcp://host:port) or a scheduler file.
    threads : int, optional
        Threads of this process; by default all cores.
    worker_wait : float
        Seconds to wait for a worker once none is left.

    Yields
    ------
    Client

    Raises
    ------
    InputError
        No scheduler answers, or it has no workers.
    Unfinished
        The scheduler is lost during the run, workers die of one and the same task again and again, or there are none
        for `worker_wait` seconds.
    """
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    for name in ("distributed", "distributed.client"):  # what ends a run is said here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    where, given_up = scheduler or "this machine", threading.Event()
    try:
        with _client(scheduler, threads) as client:
            with nullcontext() if scheduler is None else _watched(client, where, worker_wait, given_up):
                yield client
    except KilledWorker as error:
        end_if_signalled()
        raise Unfinished(
            f"{where}: one block killed {error.allowed_failures + 1} workers in turn, the last "
            f"{error.last_worker.address}; nothing is written: give them more memory or see their logs, then run again"
        ) from None
    except (CancelledError, CommClosedError):
        end_if_signalled()  # Ctrl-C also ends workers started from the same terminal
        if given_up.is_set():
            raise Unfinished(
                f"{where}: no worker for {worker_wait:.0f} s; nothing is written: {_start_workers(where)}, then run "
                f"again, or wait longer with `worker_wait`"
            ) from None
        raise Unfinished(
            f"{where}: the Dask scheduler is lost; nothing is written: start it and its workers, then run again"
        ) from None


@contextmanager
def local_client(threads: int | None = None) -> Iterator[Client]:
    """Start a Dask client of threads of this process, all cores by default."""
    import dask.config
    from distributed import Client, LocalCluster

    with (
        # A computer that slept longer than the first has a worker still. The profiler calls sys._current_frames, in
        # which CPython 3.11 waits for itself for ever if the garbage collector frees a threading.local there.
        dask.config.set({"distributed.scheduler.worker-ttl": None, "distributed.worker.profile.enabled": False}),
        # Threads share the address space, so results and open files are never copied between processes.
        LocalCluster(
            n_workers=1,
            threads_per_worker=threads or cores(),
            processes=False,
            dashboard_address=":0",
            memory_limit=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _client(scheduler: str | None, threads: int | None) -> Iterator[Client]:
    from distributed import Client

    if scheduler is None:
        keep_freed_memory(shared_by_threads=True)  # before there are threads, each with an arena of its own
        with local_client(threads) as client:
            yield client
        return
    is_file = "://" not in scheduler
    if is_file:
        _refuse_scheduler_file(scheduler)
    try:
        client = Client(scheduler_file=scheduler, timeout=20) if is_file else Client(scheduler, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"`scheduler` {scheduler}: no scheduler answers ({reason}); start one, or drop it") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=60)
        except TimeoutError:
            raise InputError(f"`scheduler` {scheduler}: it has no workers; start some with `dask worker`") from None
        yield client


def _refuse_scheduler_file(path: str) -> None:
    """Raise InputError if the file does not exist, or if it is not a valid scheduler file after one second.

    A scheduler that starts at the same time may still write it.
    """
    deadline = time.monotonic() + 1.0
    if not Path(path).is_file():
        raise InputError(f"`scheduler` {path}: no such scheduler file; give one, or an address as tcp://host:8786")
    while True:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if "://" in found["address"]:
                return
            why = "holds no address of a scheduler"
        except (ValueError, KeyError, TypeError):
            why = "is empty, half-written or not a file of `dask scheduler --scheduler-file`"
        if time.monotonic() > deadline:
            raise InputError(f"`scheduler` {path}: {why}; start the scheduler again, or give its address")
        time.sleep(0.05)


def _start_workers(where: str) -> str:
    return f"start some with `dask worker {where if '://' in where else f'--scheduler-file {where}'}`"


@contextmanager
def _watched(client: Client, where: str, limit: float, given_up: threading.Event) -> Iterator[None]:
    """Tell the user while `client` has no workers; after `limit` seconds of that, cancel all it waits for."""
    from distributed import Future

    ended = threading.Event()

    def watch() -> None:
        lone, due = 0.0, min(30.0, limit / 2)  # seconds without a worker; when to say so next
        last = time.monotonic()
        while not ended.wait(1.0):
            before, last = last, time.monotonic()
            try:
                working = bool(client.nthreads())
            except Exception:  # a scheduler that does not answer is seen, and told, by who waits for results
                working = True
            if working:
                if lone >= min(30.0, limit / 2) and not given_up.is_set():
                    print(f"{where}: workers again, after {lone:.0f} s", file=sys.stderr, flush=True)
                lone, due = 0.0, min(30.0, limit / 2)
                continue
            lone += min(last - before, 10.0)  # not what this process itself slept
            if lone >= limit:
                given_up.set()
                with suppress(Exception):
                    client.cancel([Future(key, client) for key in list(client.futures)], force=True)
            elif lone >= due:
                due *= 2
                waited = f"waited {lone:.0f} s of at most {limit:.0f} s"
                print(f"{where}: no worker is left, {waited}; {_start_workers(where)}", file=sys.stderr, flush=True)

    watcher = threading.Thread(target=watch, name="hpcres-workers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=5)


_HELD: WeakValueDictionary[str, Volume] = WeakValueDictionary()
"""Volumes in the memory of this process, by the token of their source."""


@dataclass(frozen=True)
class Source:
    """A volume as tasks name it: every worker opens the path once and keeps it open."""

    path: str
    raw: RawHeader | None = None
    parts: tuple[Source, ...] = ()
    """Of probabilities, a file for each channel."""
    in_memory: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, volume: Volume) -> Source:
        """Name a volume; one in memory is held for the tasks of this process while it exists."""
        if volume.in_memory:
            source = cls(volume.path, in_memory=True)
            _HELD[source.token] = volume
            return source
        path = volume.path if volume.parts else os.path.abspath(volume.path)
        return cls(path, volume.raw, tuple(cls.of(part) for part in volume.parts))

    def open(self) -> Volume:
        """Open the volume, or return it where it is in memory.

        Raises
        ------
        InputError
            The volume is in the memory of another process.
        """
        if not self.in_memory:
            return _opened(self)
        held = _HELD.get(self.token)
        if held is None:
            raise InputError(
                f"{self.path}: is in the memory of another process than this worker; write it to a file that all "
                "workers see, or let the client have threads of its own process"
            )
        return held


@lru_cache(maxsize=8)
def _opened(source: Source) -> Volume:
    keep_freed_memory(shared_by_threads=True)  # slab after slab lands in the same pages
    if source.parts:
        return probabilities([open_volume(part.path, part.raw, grey=True) for part in source.parts])
    return open_volume(source.path, source.raw)


def block_shape(shape: Sequence[int], chunks: Sequence[int], voxels: int) -> Triple:
    """Choose a block of whole chunks, as near a cube as they allow, of at most `voxels` voxels.

    Where one chunk has more voxels, the block is a chunk that is halved until it fits.

    Parameters
    ----------
    shape : sequence of int
        Shape of the volume.
    chunks : sequence of int
        Shape of a chunk.
    voxels : int
        Largest number of voxels.

    Returns
    -------
    Triple
    """
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
    """Choose the number of voxels per block: bounded bytes, and a few blocks for every thread."""
    return max(1, min(BLOCK_BYTES // itemsize, max(2**23, prod(shape) // (4 * threads))))


def slabs(box: Box, chunks: Sequence[int], itemsize: int) -> list[Box]:
    """Cut a block along z into slabs of whole chunks that are read one after the other."""
    _, y, x = box.shape
    layer = min(chunks[0], box.shape[0])
    thickness = layer * max(1, _SLAB_BYTES // (layer * y * x * itemsize))
    return [
        Box((z, *box.start[1:]), (min(z + thickness, box.stop[0]), *box.stop[1:]))
        for z in range(box.start[0], box.stop[0], thickness)
    ]


def threads_of(client: Client) -> int:
    """Count the threads of all workers of a client; at least 1."""
    return max(1, sum(client.nthreads().values()))


def submit(client: Client, task: Callable[..., Any], *columns: Sequence[Any], **fixed: Any) -> list[Future[Any]]:
    """Submit one task for each item of the columns; results are never shared between calls."""
    # The store may have changed since an equal call, so results are never shared between calls (pure=False).
    return client.map(task, *columns, pure=False, **fixed)


def submit_with_neighbours(
    client: Client,
    first: Callable[..., Any],
    then: Callable[..., Any],
    items: Sequence[Any],
    neighbours: Sequence[Mapping[Any, int]],
    first_fixed: Mapping[str, Any],
    then_fixed: Mapping[str, Any],
) -> list[Future[Any]]:
    """Submit `then(own, {key: neighbour})` for each item, over results of `first(item)`.

    A result of `first` is dropped as soon as the last task that needs it is done, so few are held at any time.

    Parameters
    ----------
    client : Client
        Dask client.
    first, then : callable
        The two functions.
    items : sequence
        Arguments of `first`.
    neighbours : sequence of mapping
        For each item the positions of its neighbours in `items`, by key.
    first_fixed, then_fixed : mapping
        More keyword arguments of the two functions.

    Returns
    -------
    list of Future
        Results of `then`, in the order of the items.
    """
    from dask.delayed import delayed

    # One graph, so that Dask sees at once what becomes of each result and goes through it depth first.
    leaves = [delayed(first, pure=False)(item, **first_fixed) for item in items]
    joined = [
        delayed(then, pure=False)(leaf, {key: leaves[at] for key, at in near.items()}, **then_fixed)
        for leaf, near in zip(leaves, neighbours, strict=True)
    ]
    return client.compute(joined)


def finished(futures: Sequence[Future[Any]], what: str) -> Iterator[Future[Any]]:
    """Yield futures as they finish; the first exception of a task, or a signal, ends the rest and is raised."""
    from distributed import CancelledError, as_completed

    waiting = as_completed(futures)
    try:
        while not waiting.is_empty():
            end_if_signalled()
            if not waiting.has_ready():
                with waiting.thread_condition:  # as its __next__ does, with a timeout to check for signals
                    waiting.thread_condition.wait(timeout=_POLL_SECONDS)
                continue
            future = next(waiting)
            if future.status == "cancelled":  # by a scheduler that is gone, or for want of workers
                raise CancelledError(what)
            if future.status != "finished":
                error = future.exception()
                for other in futures:
                    other.cancel()
                raise error
            yield future
    except Stopped:
        futures[0].client.cancel(list(futures))
        raise


def follow(futures: Sequence[Future[Any]], what: str, progress: bool = True) -> None:
    """Wait for all futures and show how many are done; the first exception of a task ends the rest and is raised."""
    with progress_display(what, len(futures), shown=progress) as show:
        for done, _ in enumerate(finished(futures, what), 1):
            show(done)
