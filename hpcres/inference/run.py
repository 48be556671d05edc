"""The rank loop: ranks paint tiles into whole shards of one store, make the pyramid, and note shards in their journals.

A shard that exists as its journal line says is done: zarr renames it into place whole. Running the same command
again makes what is missing. A job whose weights, input, seed or tiles differ from the store's is refused.
"""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcres import __version__
from hpcres.checkpoint import Checkpoint, load_checkpoint
from hpcres.conditions import Conditions, conditions_of
from hpcres.counting import counts, totals
from hpcres.counting.named import Named, described, spread
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.geometry import AXES, Tile, TilePlan, plan_tiles
from hpcres.inference.generate import Painter, halo_of
from hpcres.inference.journal import (
    Journal,
    StoreLock,
    agreement_path,
    missing_shards,
    open_stores,
    refuse_without_journal,
    total_counts,
)
from hpcres.inference.ranks import Ranks
from hpcres.inference.tasks import Dispatcher, Shard, WorkQueue
from hpcres.lengths import Length, cubic
from hpcres.memory import keep_freed_memory
from hpcres.outputs import LABELS, refuse_output
from hpcres.signals import handling_signals
from hpcres.study import Inference, LowRes, RawHeader, Study, parse_grid
from hpcres.volumes.files import clear_leftovers
from hpcres.volumes.sizes import compare_sizes, refuse_other_size
from hpcres.volumes.stores import AgreementStore, LabelStore, Layout, code_chunks

log = logging.getLogger("hpcres.infer")
_IDENTITY = (
    "weights_sha256",
    "input_sha256",
    "seed",
    "ensemble",
    "scale_factor",
    "boundary",
    "tile_voxels",
    "chunk_voxels",
    "arithmetic",
)
"""What decides every byte of a store; a rerun must agree in all of it."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_LINE_SECONDS = 5.0
_POLL_SECONDS = 0.02
"""How often a rank looks for messages: far less than a tile takes, and a thousandth of a core."""


@dataclass(frozen=True)
class Job:
    """What to paint, from what, and where; pure data but for the generator and the lazily read volume."""

    checkpoint: Checkpoint
    conditions: Conditions
    output: Path
    plan: TilePlan
    seed: int
    settings: Inference
    device: str
    command: str
    voxel_size: Length
    """Of the output."""
    notes: tuple[str, ...] = ()
    """Lines for the user, before anything is painted."""
    any_voxel_size: bool = False
    """Go on in a store of another voxel size."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the ensemble; the labels are those of the first."""
        return [(self.seed + number) % 2**64 for number in range(self.settings.ensemble)]


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


def chunk_edge(shape: Sequence[int], scale: Fraction, settings: Inference) -> int:
    """Return the edge of the store's inner chunk, in voxels.

    It is the setting `chunk_voxels`, or by default 128 where the shortest axis has at least 512 voxels, else 64.
    """
    return settings.chunk_voxels or (128 if min(shape) >= 512 else 64)


def plan_job(checkpoint: Checkpoint, lattice: Sequence[int], settings: Inference) -> TilePlan:
    """Plan the tiles of a lattice, with the halo of the loaded network.

    Parameters
    ----------
    checkpoint
        Checkpoint of the generator.
    lattice
        Voxels of the lattice along z, y, x.
    settings
        Settings of the inference. Where they have no boundary, that of the training is used.

    Returns
    -------
    TilePlan
        The tiles.
    """
    scale = checkpoint.scale
    shape = [int(n * scale) for n in lattice]
    return plan_tiles(
        lattice,
        scale,
        settings.tiles,
        halo_of(checkpoint.generator),
        chunk_edge(shape, scale, settings),
        settings.boundary or checkpoint.study.training.boundaries,
    )


def open_job(
    study: Study | None,
    *,
    checkpoint: str | None = None,
    low_res: str | Sequence[str] | None = None,
    output: str | None = None,
    tiles: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    command: str = "",
    raw: Sequence[RawHeader | None] = (),
    inference: Mapping[str, Any] | None = None,
    voxel_size: Length | None = None,
) -> Job:
    """Collect a job from a study, or from a checkpoint and a low-res volume alone.

    Parameters
    ----------
    study
        Study of the job; None for a checkpoint alone, whose own study is used.
    checkpoint
        Path of the checkpoint; by default that of the study.
    low_res
        Path of a volume of labels, or paths of volumes of probabilities, one for each channel.
    output
        Path of the store. It is needed and used where there is no study.
    tiles
        Tiles along z, y, x, as of the option --tiles.
    seed
        Seed of the noise; by default that of the study.
    device
        Device; by default that of the study.
    command
        Command line, for the provenance.
    raw
        Headers of the low-res volumes that have none of their own.
    inference
        Settings that take precedence over the study's.
    voxel_size
        Voxel size of a store that exists; nothing is then compared with the study's.

    Returns
    -------
    Job
        The job, with no voxel painted yet.

    Raises
    ------
    InputError
        Where study, checkpoint and low-res volume disagree, or something is missing.
    """
    if study is None:
        if checkpoint is None or output is None:
            raise InputError("infer: without a study, a checkpoint and an output are needed; give both")
        loaded = load_checkpoint(checkpoint)
        basis, store = loaded.study, Path(output)
        if low_res is None and basis.low_res is not None:
            raise InputError(f"infer: the network of {checkpoint} is given a low-res volume; name one, or give a study")
    else:
        loaded = load_checkpoint(checkpoint or study.checkpoint_path)
        _refuse_other_study(loaded, study)
        basis, store = study, study.labels_path
    source = basis.low_res
    if low_res:
        paths = [low_res] if isinstance(low_res, str) else low_res
        if source is None:
            raise InputError(f"{', '.join(paths)}: the network of {loaded.path} is given no low-res volume; name none")
        source = source.at(paths, raw or [None] * len(paths))
    settings = basis.inference.model_copy(update=dict(inference or {}))
    if tiles is not None:
        try:
            settings = settings.model_copy(update={"tiles": parse_grid(tiles)})
        except ValueError as error:
            raise InputError(f"`tiles`: {error}") from None
    conditions = conditions_of(basis.model_copy(update={"low_res": source, "inference": settings}))
    plan = plan_job(loaded, conditions.shape, settings)
    chosen = basis.seed if seed is None else seed
    notes = [] if voxel_size else compare_sizes(basis, low_res=conditions.volume)
    size = voxel_size or basis.high_res.voxel_size
    return Job(
        loaded,
        conditions,
        store,
        plan,
        chosen,
        settings,
        device or basis.device,
        command,
        size,
        tuple(notes),
        basis.allow_voxel_size_mismatch,
    )


def _refuse_other_study(checkpoint: Checkpoint, study: Study) -> None:
    theirs = checkpoint.study
    if checkpoint.family != study.network.family:
        raise InputError(
            f"{checkpoint.path}: its network is of the family {checkpoint.family}, the study's of "
            f"{study.network.family}; train anew, or give the study it was trained with"
        )
    _refuse_other_low_res(checkpoint, theirs.low_res, study.low_res)
    for what, old, new in (
        ("phases", ", ".join(theirs.phases), ", ".join(study.phases)),
        ("scale factor", checkpoint.scale, study.scale_factor),
    ):
        _refuse_other(checkpoint, what, old, new)
    refuse_other_size(
        checkpoint.path, cubic(theirs.high_res.voxel_size), study.high_res.voxel_size, study.allow_voxel_size_mismatch
    )


def _refuse_other_low_res(checkpoint: Checkpoint, theirs: LowRes | None, ours: LowRes | None) -> None:
    _refuse_other(checkpoint, "a low-res volume of", _holds(theirs), _holds(ours))
    if theirs is None or ours is None:
        return
    if ours.channels:
        _refuse_other(checkpoint, "low-res channels", theirs.groups, ours.groups)
    else:
        _refuse_other(checkpoint, "low-res phases", dict(theirs.phases), dict(ours.phases))
    _refuse_other(checkpoint, "unknown low-res labels", list(theirs.unknown), list(ours.unknown))


def _holds(low_res: LowRes | None) -> str:
    return "nothing" if low_res is None else low_res.holds


def _refuse_other(checkpoint: Checkpoint, what: str, old: Any, new: Any) -> None:
    if old != new:
        raise InputError(
            f"{checkpoint.path}: was trained with {what} {old}, the study has {new}; train anew, or give the "
            "study it was trained with"
        )


def infer(job: Job, ranks: Ranks, *, overwrite: bool = False, store_lock: StoreLock | None = None) -> Painted:
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
        return _infer(job, ranks, overwrite, held)


def _infer(job: Job, ranks: Ranks, overwrite: bool, store_lock: StoreLock) -> Painted:
    # Half precision is computed by torch, layer after layer into fresh memory; fp32 on a CPU in arrays that are kept.
    keep_freed_memory(shared_by_threads=True, large=job.settings.precision != "fp32")
    device = choose_device(job.device, ranks)
    threads = job.settings.threads or ranks.cores
    code_chunks(threads)
    painter = Painter(job.checkpoint.generator, job.plan, job.seed, device, threads, job.settings.precision)
    try:
        missing = ranks.from_first(lambda: _prepare(job, painter, overwrite, store_lock))
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
            outcome = ranks.everyone(_make(missing, _Maker(job, painter, stores, journal, stop), ranks, stop))
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


def _make(missing: Sequence[Shard], maker: _Maker, ranks: Ranks, stop: _Stop) -> tuple[int, list[str]]:
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
    started = said = time.monotonic()
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
            now = time.monotonic()
            if tasks is not None and tasks.tiles_done and now - said > _LINE_SECONDS:
                said, rate = now, tasks.voxels_done / (now - started)
                log.info(f"{tasks.tiles_done} of {tiles} tiles, {rate / 1e6:.3g} M voxels/s on all ranks together")


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


def _prepare(job: Job, painter: Painter, overwrite: bool, store_lock: StoreLock) -> list[Shard]:
    """Create or check the store, and list the shards that are to be made. Rank 0 only."""
    going_on, agreement = not overwrite and job.output.exists(), agreement_path(job.output)
    if going_on:
        _existing_provenance(job.output)
        refuse_other_size(str(job.output), LabelStore.open(job.output).volume.edges, job.voxel_size, job.any_voxel_size)
        refuse_without_journal(job.output)
    else:
        inputs = [*job.conditions.paths, job.checkpoint.path]
        refuse_output(job.output, LABELS, inputs=inputs, overwrite=overwrite)
        if len(job.seeds) > 1:
            refuse_output(agreement, LABELS, inputs=inputs, overwrite=overwrite and _is_agreement(agreement))
    store_lock.take()
    for path in (job.output, agreement):
        clear_leftovers(path)
    if going_on:
        refuse_changed(job, painter)
    else:
        identity = _identity(job, painter)
        # Before the store: what a journal says of another store's shards must never meet this one's.
        store_lock.forget_journals()
        if overwrite and _is_agreement(agreement):
            shutil.rmtree(agreement)
        LabelStore.create(
            job.output,
            _layout(job),
            voxel_size=job.voxel_size.length,
            unit=job.voxel_size.unit,
            phases=job.checkpoint.phases,
            provenance={**identity, **_origin(job)},
            overwrite=overwrite,
        )
    if len(job.seeds) > 1 and not agreement.exists():  # a kill can come between the two stores
        _create_agreement(job, agreement)
    return missing_shards(open_stores(job.output), len(job.seeds))


def _layout(job: Job) -> Layout:
    return Layout(job.plan.shape, job.plan.tile_voxels, job.plan.chunk_voxels, job.settings.codec)


def _create_agreement(job: Job, path: Path) -> None:
    about = {
        "stage": "infer",
        "agreement": f"255 times the share of the seeds whose label is that of {job.output.name}, rounded",
        "seeds": job.seeds,
        "complete": False,
    }
    AgreementStore.create(
        path, _layout(job), voxel_size=job.voxel_size.length, unit=job.voxel_size.unit, phases=(), provenance=about
    )


def _is_agreement(path: Path) -> bool:
    try:
        AgreementStore.open(path)
    except InputError:
        return False
    return True


def refuse_changed(job: Job, painter: Painter, besides: Sequence[str] = ()) -> None:
    """Refuse a job that differs from the one that painted the store, in what decides the bytes of the store.

    Parameters
    ----------
    job
        Job on the store at job.output.
    painter
        Painter of the job.
    besides
        Keys of _IDENTITY that may differ.

    Raises
    ------
    InputError
        Where a key differs, or the store was not made by hpcres infer.
    """
    provenance = _existing_provenance(job.output)
    identity = _identity(job, painter)
    for key in (key for key in _IDENTITY if key not in besides):
        old, new = provenance.get(key), identity[key]
        if old != new:
            raise InputError(
                f"{job.output}: was painted with {key} {old}, this job has {new}; use `overwrite` to paint it "
                "anew, or another `output`"
            )


def _existing_provenance(output: Path) -> dict[str, Any]:
    provenance = LabelStore.open(output).provenance
    if provenance.get("stage") != "infer":
        raise InputError(f"{output}: is there already and not made by hpcres infer; choose another `output`")
    return provenance


def _identity(job: Job, painter: Painter) -> dict[str, Any]:
    """Return the values of _IDENTITY.

    The whole low-res volume is read once, which also finds any unknown label.
    """
    return {
        "weights_sha256": job.checkpoint.sha256,
        "input_sha256": job.conditions.digest(),
        "seed": job.seed,
        "ensemble": len(job.seeds),
        "scale_factor": str(job.plan.scale),
        "boundary": dict(zip(AXES, job.plan.boundaries, strict=True)),
        "tile_voxels": list(job.plan.tile_voxels),
        "chunk_voxels": job.plan.chunk_voxels,
        "arithmetic": painter.arithmetic,
    }


def _origin(job: Job) -> dict[str, Any]:
    return {
        "stage": "infer",
        "checkpoint": str(Path(job.checkpoint.path).resolve()),
        **job.conditions.describe(),
        "step": job.checkpoint.step,
        "halo_low_res": job.plan.halo_low_res,
        "codec": job.settings.codec,
        "precision": job.settings.precision,
        "tiles": list(job.plan.grid),
        "versions": {**job.checkpoint.versions, "hpcres": __version__, "torch": str(torch.__version__)},
        "command": job.command,
        "complete": False,
    }


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
