"""The rank loop: each rank paints its tiles into whole shards of one store and notes them in its journal.

A shard's file is the mark of a tile being done: zarr renames it into place whole. Running the same command again
paints what is missing; a job whose weights, input, seed or tiles differ from the store's is refused.
"""

from __future__ import annotations

import errno
import hashlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hpcres import __version__
from hpcres.checkpoint import Checkpoint, load_checkpoint
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.geometry import AXES, Box, Tile, TilePlan, blocks, plan_tiles, tiles_of_rank, triple
from hpcres.inference.generate import Painter, halo_of
from hpcres.inference.journal import Claim, Journal, read_journal
from hpcres.inference.ranks import Ranks
from hpcres.memory import keep_freed_memory
from hpcres.signals import noted_signals
from hpcres.study import Inference, RawHeader, Study, VoxelSize, parse_grid
from hpcres.volumes import LabelStore, PhaseMap, Volume, open_volume, refuse_existing

_IDENTITY = (
    "weights_sha256", "input_sha256", "seed", "scale_factor", "boundary", "tile_voxels", "chunk_voxels", "arithmetic",
)  # fmt: skip
"""What decides every byte of a store; a rerun must agree in all of it."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What to paint, from what, where; pure data but for the generator and the lazily read volume."""

    checkpoint: Checkpoint
    low_res: Volume
    output: Path
    plan: TilePlan
    seed: int
    settings: Inference
    device: str
    command: str

    @property
    def voxel_size(self) -> VoxelSize:
        return self.checkpoint.study.high_res.voxel_size


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
    """Edge of the store's inner chunk: 128 voxels, or 64 where the volume is small or needs it."""
    return settings.chunk_voxels or (128 if min(shape) >= 512 else 64)


def plan_job(checkpoint_scale: Fraction, halo_low_res: int, low_res: Volume, settings: Inference) -> TilePlan:
    """The tiles of a low-res volume, with the halo of the loaded network."""
    shape = [int(n * checkpoint_scale) for n in low_res.shape]
    return plan_tiles(
        low_res.shape, checkpoint_scale, settings.tiles, halo_low_res, chunk_edge(shape, checkpoint_scale, settings),
        settings.periodic,
    )  # fmt: skip


def open_job(
    study: Study | None, *, checkpoint: str | None = None, low_res: str | None = None, output: str | None = None,
    tiles: str | None = None, seed: int | None = None, device: str | None = None, command: str = "",
    raw: RawHeader | None = None, inference: Mapping[str, Any] | None = None,
) -> Job:  # fmt: skip
    """Collect a job from a study, or from a checkpoint and a low-res volume alone; InputError where they disagree.

    `raw` is the header of a `low_res` without one; `inference` holds settings that go before the study's.
    """
    if study is None:
        if checkpoint is None or low_res is None or output is None:
            raise InputError("infer: without a study, --checkpoint, --low-res and --output are needed; give all three")
        loaded = load_checkpoint(checkpoint)
        basis, store = loaded.study, Path(output)
        volume = open_volume(low_res, raw)
    else:
        loaded = load_checkpoint(checkpoint or study.checkpoint_path)
        _refuse_other_study(loaded, study)
        basis, store = study, study.labels_path
        volume = open_volume(low_res or study.low_res.path, study.low_res.raw if low_res is None else raw)
    settings = basis.inference.model_copy(update=dict(inference or {}))
    if tiles is not None:
        try:
            settings = settings.model_copy(update={"tiles": parse_grid(tiles)})
        except ValueError as error:
            raise InputError(f"--tiles: {error}") from None
    plan = plan_job(loaded.scale, halo_of(loaded.generator), volume, settings)
    chosen = basis.seed if seed is None else seed
    return Job(loaded, volume, store, plan, chosen, settings, device or basis.device, command)


def _refuse_other_study(checkpoint: Checkpoint, study: Study) -> None:
    theirs = checkpoint.study
    for what, old, new in (
        ("phases", ", ".join(theirs.phases), ", ".join(study.phases)),
        ("scale factor", checkpoint.scale, study.scale_factor),
        ("low-res phases", dict(theirs.low_res.phases), dict(study.low_res.phases)),
    ):
        if old != new:
            raise InputError(
                f"{checkpoint.path}: was trained with {what} {old}, the study has {new}; train anew, or give the "
                "study it was trained with"
            )


def infer(job: Job, ranks: Ranks, *, overwrite: bool = False, claim: Claim | None = None) -> Painted:
    """Paint every tile that is missing, then the pyramid. Collective: every rank of `ranks` calls it.

    claim: the store's, where the caller has taken it. InputError where the job does not fit what is there, another
    job paints it, or the input changes meanwhile; Stopped after the tiles in hand on SIGTERM or SIGUSR1 of any rank;
    Unfinished where some tiles could not be read or written; OSError, on every rank, where the disk is full.
    """
    with nullcontext(claim) if claim is not None else Claim(job.output) as held:
        return _infer(job, ranks, overwrite, held)


def _infer(job: Job, ranks: Ranks, overwrite: bool, claim: Claim) -> Painted:
    keep_freed_memory()
    device = choose_device(job.device, ranks)
    phase_map = PhaseMap(tuple(job.checkpoint.study.low_res.phases), job.low_res.path)
    threads = job.settings.threads or ranks.cores
    painter = Painter(job.checkpoint.generator, job.plan, phase_map, job.seed, device, threads)
    try:
        missing = ranks.from_first(lambda: _prepare(job, painter, phase_map, overwrite, claim))
        store = LabelStore.open(job.output)
        mine = [missing[i] for i in tiles_of_rank(len(missing), ranks.rank, ranks.size)]
        if ranks.rank == 0:
            _say(_opening(job, len(missing), ranks, device, threads))
            if not claim.certain:
                _say(f"{job.output}: its file system has no locks; see that no other job paints it meanwhile")
        started = time.monotonic()
        failed: list[str] = []
        with noted_signals() as received, Journal(job.output, ranks.rank) as journal:
            stop = _Stop(ranks, received, job.low_res)
            done = 0
            said = time.monotonic()
            for tile, seconds, error in _paint_in_flight(job, painter, store, ranks, mine, stop):
                if error is None:
                    error = stop.unless_room(
                        partial(journal.note, store, 0, tile.write, tile=tile.index, seconds=round(seconds, 3))
                    )
                if error is not None:
                    failed.append(f"tile {tile.index} ({tile.write}): {error}")
                    continue
                done += 1
                if ranks.rank == 0 and (time.monotonic() - said > _LINE_SECONDS or done == len(mine)):
                    said = time.monotonic()
                    rate = done * tile.write.voxels / (said - started)
                    _say(f"rank 0: {done} of {len(mine)} tiles, {rate / 1e6:.3g} M voxels/s on each rank")
            outcome = ranks.everyone((done, failed))
            painted = sum(part[0] for part in outcome)
            failures = [line for part in outcome for line in part[1]]
            stop.end_here_if_asked(job.output, f"{painted} of {len(missing)} missing tiles are painted")
            if failures:
                more = f" and {len(failures) - 20} more" if len(failures) > 20 else ""
                raise Unfinished(
                    f"infer: {len(failures)} of {len(missing)} tiles failed: {'; '.join(failures[:20])}{more}; "
                    "run the same command to try them again"
                )
            _pyramid(job, store, ranks, journal, stop)
        seconds = time.monotonic() - started
        if ranks.rank == 0 and not store.provenance.get("complete"):
            store.set_provenance(complete=True, ranks=ranks.size, seconds=round(seconds, 3))
        spent = ranks.everyone(painter.seconds)
        parts = {part: sum(one[part] for one in spent) for part in painter.seconds}
        return Painted(job.output, painted, len(job.plan.tiles), seconds, ranks.size, parts)
    finally:
        painter.close()


def _paint_in_flight(
    job: Job, painter: Painter, store: LabelStore, ranks: Ranks, mine: list[int], stop: _Stop
) -> Iterator[tuple[Tile, float, InputError | OSError | None]]:
    """Paint and write this rank's tiles, a few at a time so that one is read or compressed while others compute.

    Yields each tile that is done with its seconds, and the error where its input could not be read or its shard not
    be written. Once any rank is to stop, no new tile is begun.
    """

    def work(tile: Tile) -> tuple[Tile, float, InputError | OSError | None]:
        started = time.monotonic()
        error: InputError | OSError | None = None
        try:
            labels = painter.paint(tile, job.low_res.read)
        except InputError as fault:
            error = fault
        # After the reading, because a volume of many files loses some of them before the one we look at.
        error = stop.unless_input_changed() or error
        if error is None:
            with painter.timed("write"):
                error = stop.unless_room(partial(store.write, 0, tile.write, labels))
        return tile, time.monotonic() - started, error

    queue = iter(mine)
    with ThreadPoolExecutor(painter.tiles_in_flight) as pool:
        begun = {pool.submit(work, job.plan.tiles[i]): i for i in islice(queue, painter.tiles_in_flight)}
        while begun:
            finished, _ = wait(begun, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                number = begun.pop(future)
                with _naming(ranks, f"tile {number} ({job.plan.tiles[number].write})"):
                    result = future.result()
                yield result
                for following in islice(queue, 0 if stop.asked() else 1):
                    begun[pool.submit(work, job.plan.tiles[following])] = following


class _Stop:
    """Whether to begin nothing new: a signal, a disk that takes no more, or an input that changed, on any rank."""

    def __init__(self, ranks: Ranks, received: list[int], low_res: Volume) -> None:
        self._ranks, self._received, self._low_res = ranks, received, low_res
        self._stamp = low_res.stamp()
        self._fault: OSError | InputError | None = None

    def asked(self) -> bool:
        if self._received or self._fault:
            self._ranks.stop_all()
        return self._ranks.asked_to_stop()

    def unless_room(self, write: Callable[[], None]) -> OSError | None:
        """Write; the error if that failed. A full disk is every tile's error, so it also stops the job."""
        try:
            write()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._fault = error
            return error
        return None

    def unless_input_changed(self) -> InputError | None:
        """The error where the low-res volume is not the one that the job began with: no tile of it can be trusted."""
        try:
            if self._low_res.stamp() == self._stamp:
                return None
            state = "was written to"
        except InputError:
            state = "has gone"
        self._fault = InputError(f"{self._low_res.path}: {state} while the job read it")
        return self._fault

    def end_here_if_asked(self, output: Path, state: str) -> None:
        """Raise the same on every rank where any of them was to stop. Collective."""
        told = self._ranks.everyone((self._received[:1], self._fault))
        if faults := [error for _, error in told if error is not None]:
            first = faults[0]
            if isinstance(first, OSError):
                raise OSError(first.errno, first.strerror, str(output))
            raise InputError(f"{first}; {state} in {output}; put it back as it was and run the same command to go on")
        if signals := [number for numbers, _ in told for number in numbers]:
            raise Stopped(
                f"infer: stopped by {signal.Signals(signals[0]).name}; {state} in {output}; run the same command to "
                "go on"
            )


def choose_device(device: str, ranks: Ranks) -> torch.device:
    """The CPU, or the GPU of this rank by its place on the node."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda asked for, but torch finds no GPU here; use cpu, or a CUDA build of torch")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def _prepare(job: Job, painter: Painter, phase_map: PhaseMap, overwrite: bool, claim: Claim) -> list[int]:
    """Create or check the store, and list the tiles to paint. Rank 0 only."""
    going_on = not overwrite and job.output.exists()
    if going_on:
        _existing_provenance(job.output)
    else:
        refuse_existing(job.output, overwrite)
    claim.take()
    if going_on:
        refuse_changed(job, painter, phase_map)
        # A killed rank can leave a half-written file beside the shard it was about to become.
        for leftover in job.output.rglob("*.partial"):
            leftover.unlink()
        store = LabelStore.open(job.output)
    else:
        identity = _identity(job, painter, phase_map)
        # Before the store: what a journal says of another store's shards must never meet this one's.
        claim.forget_journals()
        store = LabelStore.create(
            job.output, job.plan.shape, shard=job.plan.tile_voxels, chunk_voxels=job.plan.chunk_voxels,
            voxel_size=job.voxel_size.length, unit=job.voxel_size.unit, phases=job.checkpoint.phases,
            codec=job.settings.codec, provenance={**identity, **_origin(job)}, overwrite=overwrite,
        )  # fmt: skip
    missing = {box.start for box in _missing_shards(store, 0, len(job.checkpoint.phases))}
    return [tile.index for tile in job.plan.tiles if tile.write.start in missing]


def refuse_changed(job: Job, painter: Painter, phase_map: PhaseMap, besides: Sequence[str] = ()) -> None:
    """InputError where what decides the bytes of the store at job.output, `besides` some, differs from the job's."""
    provenance = _existing_provenance(job.output)
    identity = _identity(job, painter, phase_map)
    for key in (key for key in _IDENTITY if key not in besides):
        old, new = provenance.get(key), identity[key]
        if old != new:
            raise InputError(
                f"{job.output}: was painted with {key} {old}, this job has {new}; use --overwrite to paint it "
                "anew, or another --output"
            )


def _existing_provenance(output: Path) -> dict[str, Any]:
    provenance = LabelStore.open(output).provenance
    if provenance.get("stage") != "infer":
        raise InputError(f"{output}: is there already and not made by hpcres infer; choose another --output")
    return provenance


def _identity(job: Job, painter: Painter, phase_map: PhaseMap) -> dict[str, Any]:
    """The values of _IDENTITY; reads the whole low-res volume once, which also finds any unknown label."""
    digest = hashlib.sha256(f"{job.low_res.shape} {sorted(job.checkpoint.study.low_res.phases.items())}".encode())
    slab = max(1, 2**26 // (job.low_res.shape[1] * job.low_res.shape[2]))
    for box in blocks(job.low_res.shape, triple([slab, *job.low_res.shape[1:]])):
        digest.update(phase_map.index(job.low_res.read(box)).tobytes())
    return {
        "weights_sha256": job.checkpoint.sha256, "input_sha256": digest.hexdigest(), "seed": job.seed,
        "scale_factor": str(job.plan.scale), "boundary": dict(zip(AXES, job.settings.boundary, strict=True)),
        "tile_voxels": list(job.plan.tile_voxels),
        "chunk_voxels": job.plan.chunk_voxels, "arithmetic": painter.arithmetic,
    }  # fmt: skip


def _origin(job: Job) -> dict[str, Any]:
    return {
        "stage": "infer", "checkpoint": str(Path(job.checkpoint.path).resolve()), "low_res": job.low_res.path,
        "raw": job.low_res.raw.model_dump() if job.low_res.raw else None,
        "step": job.checkpoint.step, "halo_low_res": job.plan.halo_low_res, "codec": job.settings.codec,
        "tiles": list(job.plan.grid), "versions": {**job.checkpoint.versions, "hpcres": __version__,
        "torch": str(torch.__version__)}, "command": job.command, "complete": False,
    }  # fmt: skip


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


def _pyramid(job: Job, store: LabelStore, ranks: Ranks, journal: Journal, stop: _Stop) -> None:
    """Every coarser level, its shards shared by the ranks, each level after the one below it is whole."""
    for level in range(1, len(store.levels)):
        missing = ranks.from_first(partial(_missing_shards, store, level, len(job.checkpoint.phases)))
        for number in tiles_of_rank(len(missing), ranks.rank, ranks.size):
            if stop.asked():
                break
            with _naming(ranks, f"level {level}, {missing[number]}"):
                box = missing[number]
                error = stop.unless_room(partial(store.write_coarser, level, box)) or stop.unless_room(
                    partial(journal.note, store, level, box)
                )
                if error is not None and not stop.asked():
                    raise Unfinished(f"{store.path}: level {level}, {box}: {error}; run the same command to go on")
        stop.end_here_if_asked(store.path, f"all tiles are painted, but not the pyramid from level {level} on")


def _missing_shards(store: LabelStore, level: int, phases: int) -> list[Box]:
    """The shards to paint. Rank 0 only, while nobody paints.

    A shard that is there but in no journal was finished as a kill struck: it is read back, and noted if it is whole.
    One that a loss of power cut short has another size than its journal says.
    """
    noted, missing = read_journal(store.path), []
    with Journal(store.path, 0) as journal:
        for box in store.shard_boxes(level):
            known = noted.get((level, box.start))
            if not store.is_written(level, box):
                missing.append(box)
            elif known is not None:
                if store.shard_path(level, box).stat().st_size != known.size:
                    missing.append(box)
            else:
                try:
                    whole = int(store.read(level, box).max()) < phases
                except InputError:
                    whole = False
                if whole:
                    journal.note(store, level, box)
                else:
                    missing.append(box)
    return missing


@contextmanager
def _naming(ranks: Ranks, what: str) -> Iterator[None]:
    """An error in the middle of a rank's work: say whose it is, and end the job, so that nobody waits for this rank."""
    try:
        yield
    except (InputError, Unfinished):
        raise
    except BaseException as error:
        _say(f"rank {ranks.rank}, {what}: {type(error).__name__}: {error}")
        if ranks.size > 1:
            traceback.print_exc()
            ranks.abort(1)
        raise


def _say(message: str) -> None:
    Console(stderr=True).print(f"infer: {message}", highlight=False, markup=False, soft_wrap=True)
    sys.stderr.flush()
