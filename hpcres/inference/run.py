"""The rank loop: ranks paint tiles into whole shards of one store, make the pyramid, and note shards in their journals.

A shard that exists as its journal line says is done: zarr renames it into place whole. Running the same command
again makes what is missing. A job whose weights, input, seed or tiles differ from the store's is refused.
"""

from __future__ import annotations

import errno
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcres.conditions import Conditions
from hpcres.counting import counts, totals
from hpcres.counting.named import Named, described, spread
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.geometry import Tile
from hpcres.inference.generate import Painter
from hpcres.inference.identity import prepare
from hpcres.inference.job import Job
from hpcres.inference.journal import Journal, StoreLock, open_stores, total_counts
from hpcres.inference.ranks import Ranks
from hpcres.inference.tasks import Dispatcher, Shard, WorkQueue
from hpcres.lengths import cubic
from hpcres.memory import keep_freed_memory
from hpcres.progress import Show, progress_display
from hpcres.signals import handling_signals
from hpcres.volumes.stores import LabelStore, code_chunks

log = logging.getLogger("hpcres.infer")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_POLL_SECONDS = 0.02
"""How often a rank looks for messages: far less than a tile takes, and a thousandth of a core."""


@dataclass(frozen=True)
class Painted:
    """How a job ended: tiles painted now, all tiles, seconds of the painting, ranks."""

    store: Path
    painted: int
    tiles: int
    seconds: float
    ranks: int
    parts: dict[str, float]
    """Seconds of all threads of all ranks, by part of the work: read, noise, network, write."""


def infer(
    job: Job, ranks: Ranks, *, overwrite: bool = False, store_lock: StoreLock | None = None, live: bool = False
) -> Painted:
    """Paint every tile that is missing, and make the pyramid meanwhile.

    Collective: every rank of `ranks` calls it.

    Parameters
    ----------
    job
        What to paint.
    ranks
        Ranks of the job.
    overwrite
        Paint a store that exists anew.
    store_lock
        Lock of the store, where the caller has taken it.
    live
        Whether to show a bar, if stderr is a terminal, in place of lines to the logger hpcres.infer.

    Returns
    -------
    Painted
        Numbers of tiles, and seconds.

    Raises
    ------
    InputError
        Where the job does not fit what exists, another job paints the store, or the input changes meanwhile.
    Stopped
        After the tiles in hand, on a signal to any rank.
    Unfinished
        Where some tiles could not be read or written.
    OSError
        On every rank, where the disk is full.
    """
    with nullcontext(store_lock) if store_lock is not None else StoreLock(job.output) as held:
        return _infer(job, ranks, overwrite, held, live)


def _infer(job: Job, ranks: Ranks, overwrite: bool, store_lock: StoreLock, live: bool) -> Painted:
    # Half precision is computed by torch, layer after layer into fresh memory; fp32 on a CPU in arrays that are kept.
    keep_freed_memory(shared_by_threads=True, large=job.settings.precision != "fp32")
    device = choose_device(job.device, ranks)
    threads = job.settings.threads or ranks.cores
    code_chunks(threads)
    painter = Painter(job.checkpoint.generator, job.plan, job.seed, device, threads, job.settings.precision)
    try:
        missing = ranks.from_first(lambda: prepare(job, painter, overwrite, store_lock))
        if job.settings.precision != "fp32" and missing:
            ranks.from_first(lambda: _compare_with_fp32(job, painter))
        stores, tiles = open_stores(job.output), sum(level == 0 for level, _ in missing)
        for store in stores:  # like the painter's, kernels are fetched before the clock starts
            store.coarsen(np.zeros((2, 2, 2), np.uint8))
        counts.count(np.zeros((2, 2, 2), np.uint8), labels=range(len(job.checkpoint.phases)))
        if ranks.rank == 0:
            for note in job.notes:
                log.info(note)
            log.info(_opening(job, tiles, ranks, device, threads))
            if not store_lock.certain:
                log.info(f"{job.output}: its file system has no locks; see that no other job paints it meanwhile")
        started = time.monotonic()
        again = "run it without overwriting to go on" if overwrite else "run the same command to go on"
        kept = f"what is painted is kept in {job.output}; {again}"
        with handling_signals("infer", kept) as received, Journal(job.output, ranks.rank) as journal:
            stop = _Stop(ranks, received, job.conditions, again)
            with progress_display("infer", tiles, shown=ranks.rank == 0, bar=live, line=log.info) as show:
                maker = _Maker(job, painter, stores, journal, stop)
                outcome = ranks.everyone(_make(missing, maker, ranks, stop, show))
            painted = sum(part[0] for part in outcome)
            stop.end_here_if_asked(job.output, f"{painted} of {tiles} missing tiles are painted")
            _end_if_failed(tiles, [line for part in outcome for line in part[1]])
        seconds = time.monotonic() - started
        if ranks.rank == 0 and not stores[0].provenance.get("complete"):
            # Where a tile's margin may differ from its neighbour by rounding, the counts would be off by as much.
            found = _measured(job, stores[0]) if painter.network.same_bits else {}
            for store, more in zip(stores, (found, {}), strict=False):
                store.set_provenance(complete=True, ranks=ranks.size, seconds=round(seconds, 3), **more)
        spent = ranks.everyone(painter.seconds)
        parts = {part: sum(one[part] for one in spent) for part in painter.seconds}
        return Painted(job.output, painted, len(job.plan.tiles), seconds, ranks.size, parts)
    finally:
        painter.close()


def _compare_with_fp32(job: Job, painter: Painter) -> None:
    """Report how many labels half precision changes and how fast it is, on rank 0 only.

    The store's attributes keep the number of labels that change.
    """
    sample, precision = painter.compare_with_fp32(job.checkpoint.generator, job.conditions), job.settings.precision
    log.info(f"{precision} changes {sample.share:.2%} of {sample.labels} labels of a sample, compared with fp32")
    if sample.speed < 1:
        log.info(
            f"warning: inference.precision: {precision} has {sample.speed:.2g} times the speed of fp32 on this "
            "machine; set fp32, which changes no label, and run with `overwrite`"
        )
    LabelStore.open(job.output).set_provenance(
        flips={"labels": sample.labels, "differ": sample.differ, "share": sample.share}
    )


class _Maker:
    """Makes one shard at a time, and notes it; threads share it."""

    def __init__(self, job: Job, painter: Painter, stores: Sequence[LabelStore], journal: Journal, stop: _Stop) -> None:
        self.stores, self.painter = stores, painter
        self._job, self._journal, self._stop = job, journal, stop
        self._tiles = {tile.write: tile for tile in job.plan.tiles}

    def name(self, shard: Shard) -> str:
        level, box = shard
        return f"level {level}, {box}" if level else f"tile {self._tiles[box].index} ({box})"

    def make(self, shard: Shard) -> InputError | Unfinished | OSError | None:
        """Paint a tile, or write a coarser shard; return the error where something could not be read or written."""
        level, box = shard
        if level == 0:
            return self._paint(self._tiles[box])
        try:
            with self.painter.timed("write"):
                writes = [partial(store.write_coarser, level, box) for store in self.stores]
                return self._written(writes) or self._note(shard)
        except (InputError, Unfinished) as fault:
            return fault

    def _paint(self, tile: Tile) -> InputError | OSError | None:
        started = time.monotonic()
        error: InputError | OSError | None = None
        try:
            volumes, counted = self._volumes(tile)
        except InputError as fault:
            error = fault
        # After the reading, because a volume of many files loses some of them before the one we look at.
        error = self._stop.unless_input_changed() or error
        if error is not None:
            return error
        with self.painter.timed("write"):
            writes = [partial(s.write, 0, tile.write, v) for s, v in zip(self.stores, volumes, strict=True)]
            seconds = round(time.monotonic() - started, 3)
            return self._written(writes) or self._note(
                (0, tile.write), tile=tile.index, seconds=seconds, counts=counted
            )

    def _volumes(self, tile: Tile) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        """Return what is to be stored of a tile, labels and agreement, and the counts of each seed's labels."""
        phases, own = range(len(self._job.checkpoint.phases)), tile.write.relative_to(tile.write.start).slices
        conditions = self._job.conditions.remembering()
        counted, labels, agree = [], np.empty(0, np.uint8), np.zeros(tile.write.shape, np.uint8)
        for number, seed in enumerate(self._job.seeds):
            # With the first voxels of the tiles on its + sides, to which its last faces and edges belong.
            painted = self.painter.paint(tile, conditions, seed=seed, more=1)
            with self.painter.timed("count"):
                counted.append(totals.to_json(counts.count(painted, tile.write.shape, phases)))
                labels = labels if number else painted[own]
                if len(self._job.seeds) > 1:
                    agree += painted[own] == labels
        if len(self._job.seeds) == 1:
            return [labels], counted
        return [labels, shares(len(self._job.seeds))[agree]], counted

    def _written(self, writes: Sequence[Callable[[], None]]) -> OSError | None:
        return next((error for write in writes if (error := self._stop.unless_room(write))), None)

    def _note(self, shard: Shard, **more: Any) -> OSError | None:
        return self._stop.unless_room(partial(self._journal.note, self.stores, *shard, **more))


def shares(seeds: int) -> np.ndarray:
    """Return the values of the agreement volume where n of `seeds` seeds agree, indexed by n.

    The values are round(255 · n / seeds), uint8.
    """
    return ((2 * 255 * np.arange(seeds + 1) + seeds) // (2 * seeds)).astype(np.uint8)


def _make(missing: Sequence[Shard], maker: _Maker, ranks: Ranks, stop: _Stop, show: Show) -> tuple[int, list[str]]:
    """Make shards until none is left; return the number of tiles that this rank painted, and what failed.

    A few shards are in work at a time, so that one is read or compressed while others compute. Once any rank is to
    stop, none is begun.
    """

    def below(shard: Shard) -> list[Shard]:
        level, box = shard
        return [(level - 1, part) for part in maker.stores[0].shards_below(level, box)]

    tasks = WorkQueue(missing, below, ranks.size) if ranks.rank == 0 else None
    dispatcher = Dispatcher(ranks, tasks, maker.painter.tiles_in_flight)
    pause = _POLL_SECONDS if ranks.size > 1 else 0.5
    tiles = sum(level == 0 for level, _ in missing)
    painted, failed = 0, list[str]()
    started = time.monotonic()
    begun: dict[Future[InputError | Unfinished | OSError | None], Shard] = {}
    with ThreadPoolExecutor(maker.painter.tiles_in_flight) as pool:
        while True:
            for shard in dispatcher.exchange(stop.asked()):
                begun[pool.submit(maker.make, shard)] = shard
            if dispatcher.may_leave():
                return painted, failed
            if not begun:
                time.sleep(pause)
                continue
            for future in wait(begun, pause, FIRST_COMPLETED).done:
                shard = begun.pop(future)
                with _naming(ranks, maker.name(shard)):
                    error = future.result()
                if error is not None:
                    failed.append(f"{maker.name(shard)}: {error}")
                elif shard[0] == 0:
                    painted += 1
                dispatcher.done(shard, error is None)
            if tasks is not None and tasks.tiles_done:
                rate = tasks.voxels_done / (time.monotonic() - started)
                words = f"{tasks.tiles_done} of {tiles} tiles, {rate / 1e6:.3g} M voxels/s on all ranks together"
                show(tasks.tiles_done, words)


def _measured(job: Job, store: LabelStore) -> dict[str, Any]:
    """Return what `hpcres metrics` would measure of the store, from the counts of its tiles.

    For an ensemble, the result also says how the measures vary with the seed.
    """
    names = Named(dict(enumerate(job.checkpoint.phases)), *cubic(job.voxel_size).lengths(str(job.output)))
    found = [described(total, names) for total in total_counts(store, len(job.seeds))]
    return {"measured": found[0], **({"spread": {"seeds": job.seeds, **spread(found)}} if len(found) > 1 else {})}


def _end_if_failed(tiles: int, failures: list[str]) -> None:
    if failures:
        among = f"{len(failures)} of {tiles} tiles" if any(f.startswith("tile") for f in failures) else len(failures)
        more = f" and {len(failures) - 20} more" if len(failures) > 20 else ""
        raise Unfinished(
            f"infer: {among} failed: {'; '.join(failures[:20])}{more}; run the same command to try them again"
        )


class _Stop:
    """Whether to begin nothing new: a signal, a disk that takes no more data, or an input that changed, on any rank."""

    def __init__(self, ranks: Ranks, received: list[int], conditions: Conditions, again: str) -> None:
        self._ranks, self._received, self._conditions, self._again = ranks, received, conditions, again
        self._stamp = conditions.stamp()
        self._fault: OSError | InputError | None = None

    def asked(self) -> bool:
        if self._received or self._fault:
            self._ranks.stop_all()
        return self._ranks.asked_to_stop()

    def unless_room(self, write: Callable[[], None]) -> OSError | None:
        """Write, and return the error if that failed.

        A full disk is an error of every tile, so it also stops the job.
        """
        try:
            write()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._fault = error
            return error
        return None

    def unless_input_changed(self) -> InputError | None:
        """Return the error where the low-res volume is not the one that the job began with.

        No tile of a changed input can be trusted.
        """
        try:
            if self._conditions.stamp() == self._stamp:
                return None
            state = "was written to"
        except InputError:
            state = "has gone"
        self._fault = InputError(f"{', '.join(self._conditions.paths)}: {state} while the job read it")
        return self._fault

    def end_here_if_asked(self, output: Path, state: str) -> None:
        """Raise the same error on every rank where any of them was to stop. Collective."""
        told = self._ranks.everyone((self._received[:1], self._fault))
        if faults := [error for _, error in told if error is not None]:
            first = faults[0]
            if isinstance(first, OSError):
                raise OSError(first.errno, first.strerror, str(output))
            raise InputError(f"{first}; {state} in {output}; put it back as it was and {self._again}")
        if signals := [number for numbers, _ in told for number in numbers]:
            raise Stopped(f"infer: stopped by {signal.Signals(signals[0]).name}; {state} in {output}; {self._again}")


def choose_device(device: str, ranks: Ranks) -> torch.device:
    """Return the CPU, or the GPU of this rank by its place on the node.

    Parameters
    ----------
    device
        'cpu', 'cuda' or 'auto', which takes a GPU where there is one.
    ranks
        Ranks of the job.

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    InputError
        Where cuda is asked for and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch finds no GPU here; use cpu, or a CUDA build of torch")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def _opening(job: Job, missing: int, ranks: Ranks, device: torch.device, threads: int) -> str:
    plan = job.plan
    if not missing:
        return f"{job.output}: all {len(plan.tiles)} tiles are there already, nothing to paint"
    asked, grid = job.settings.tiles, plan.grid
    edges = "×".join(map(str, plan.tile_voxels))
    text = (
        f"{missing} of {len(plan.tiles)} tiles ({'x'.join(map(str, grid))}, {edges} voxels each) to paint "
        f"over {ranks.size} rank{'s' * (ranks.size > 1)} on {device.type}, {threads} threads each"
    )
    if tuple(asked) != tuple(grid):
        text += f"; asked for {'x'.join(map(str, asked))}, but a tile is whole chunks of {plan.chunk_voxels} voxels"
    if ranks.size > missing:
        text += f"; {ranks.size - missing} ranks have no tile"
    return text


@contextmanager
def _naming(ranks: Ranks, what: str) -> Iterator[None]:
    """Report an error in the middle of a rank's work, and end the job.

    The message says whose error it is. The job ends, because the other ranks would wait for this rank.
    """
    try:
        yield
    except (InputError, Unfinished):
        raise
    except BaseException as error:
        log.info(f"rank {ranks.rank}, {what}: {type(error).__name__}: {error}")
        if ranks.size > 1:
            traceback.print_exc()
            ranks.abort(1)
        raise
