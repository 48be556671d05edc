"""Checks of a painted store: whether it is whole, and free of seams.

Every shard is read back: file, checksum, index, labels; --repair paints what is damaged. --audit paints some tiles
again, cut half a tile later, and counts the labels that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box, Tile, TilePlan, high_res_shape, tiles_of_rank
from hpcres.inference.generate import Painter
from hpcres.inference.identity import refuse_changed
from hpcres.inference.job import Job, JobOptions, open_job
from hpcres.inference.journal import StoreLock, file_crc32, open_stores, read_journal, refuse_without_journal
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import choose_device
from hpcres.lengths import RELATIVE, Length
from hpcres.signals import end_if_signalled
from hpcres.study import RawHeader, parse_boundary
from hpcres.volumes.stores import LabelStore

MOST_FLIPS = 4e-6
"""Share of labels that rounding alone may change between two tilings in fp32; more is a seam or damage."""


@dataclass(frozen=True)
class Fault:
    """One shard that cannot be trusted, and why."""

    level: int
    box: Box
    why: str
    volume: str = "labels"

    def __str__(self) -> str:
        """Return a line that names the shard and the reason."""
        return f"{self.volume}, level {self.level}, {self.box}: {self.why}"


def find_faults(
    path: Path, progress: Callable[[int, int], None] | None = None, store_lock: StoreLock | None = None
) -> list[Fault]:
    """Check every shard of every level of a store that hpcres infer made.

    Parameters
    ----------
    path
        Path of the labels.
    progress
        Called as progress(done, all) with numbers of shards.
    store_lock
        Lock that is taken first, for a caller that goes on to repair.

    Returns
    -------
    list of Fault
        One for each faulty shard of each store of the job.

    Raises
    ------
    InputError
        Where a store cannot be opened; with `store_lock`, where another job has the store, or its journal is missing.
    """
    stores = open_stores(path)
    if store_lock is not None:
        refuse_without_journal(path)
        store_lock.take()
    phases = len(stores[0].volume.phases or ())
    noted = read_journal(path)
    shards = [(level, box) for level in range(len(stores[0].levels)) for box in stores[0].shard_boxes(level)]
    faults = []
    for number, (level, box) in enumerate(shards):
        end_if_signalled()
        known = noted.get((level, box.start))
        for place, store in enumerate(stores):
            crc32 = known.files[place][1] if known and place < len(known.files) else None
            if why := _fault(store, level, box, phases, crc32):
                faults.append(Fault(level, box, why, store.kind))
        if progress:
            progress(number + 1, len(shards))
    return faults


def _fault(store: LabelStore, level: int, box: Box, phases: int, crc32: int | None) -> str:
    file = store.shard_path(level, box)
    if not file.is_file():
        return "missing"
    # Blosc does not check what it decodes, so the checksum of the whole file comes first.
    if crc32 is not None and file_crc32(file) != crc32:
        return "damaged, its checksum differs from the journal's"
    try:
        labels = store.read(level, box)
    except InputError:
        return "damaged, cannot be decoded"
    if (labels == store.unwritten).any():
        return "incomplete, parts were never written"
    highest = int(labels.max())
    if store.kind == "labels" and highest >= phases:
        return f"damaged, label {highest} where the phases are 0 to {phases - 1}"
    return ""


def remove_faulty(path: Path, faults: list[Fault]) -> int:
    """Delete the files of faulty shards, and of every coarser shard made from them, in every store of the job.

    Parameters
    ----------
    path
        Path of the labels.
    faults
        Faulty shards.

    Returns
    -------
    int
        Number of tiles (level 0) that are faulty.
    """
    for store in open_stores(path):
        for fault in faults:
            box = fault.box
            store.shard_path(fault.level, box).unlink(missing_ok=True)
            for level in range(fault.level + 1, len(store.levels)):
                edges = store.levels[level].shard
                start = [a // 2 // e * e for a, e in zip(box.start, edges, strict=True)]
                box = next(b for b in store.shard_boxes(level) if list(b.start) == start)
                store.shard_path(level, box).unlink(missing_ok=True)
        store.set_provenance(complete=False)
    return len({fault.box for fault in faults if fault.level == 0})


def repair_job(path: Path, command: str = "") -> Job:
    """Return the job that painted a store, from the store's provenance: its checkpoint, input, seed and tiles.

    Parameters
    ----------
    path
        Path of the labels.
    command
        Command line, for the provenance.

    Returns
    -------
    Job
        The job.

    Raises
    ------
    InputError
        Where hpcres infer did not make the store, or the checkpoint has other weights now.
    """
    provenance = LabelStore.open(path).provenance
    if provenance.get("stage") != "infer":
        raise InputError(f"{path}: not made by hpcres infer, so there is nothing to paint it from; convert it again")
    headers = provenance["raw"] if isinstance(provenance["raw"], list) else [provenance["raw"]]
    job = open_job(
        None,
        JobOptions(
            checkpoint=provenance["checkpoint"],
            low_res=provenance["low_res"],
            output=str(path),
            seed=provenance["seed"],
            device="auto",
            command=command,
            raw=[RawHeader(**header) if header else None for header in headers],
            inference={
                "tiles": tuple(provenance["tiles"]),
                "chunk_voxels": provenance["chunk_voxels"],
                "boundary": parse_boundary(provenance["boundary"]),
                "precision": provenance["precision"],
                "codec": provenance["codec"],
                "ensemble": provenance["ensemble"],
                **_output_voxels(provenance),
            },
            voxel_size=LabelStore.open(path).volume.edges.x or Length(1.0, RELATIVE),
        ),
    )
    if job.checkpoint.sha256 != provenance["weights_sha256"]:
        raise InputError(
            f"{job.checkpoint.path}: has other weights ({job.checkpoint.sha256[:12]}…) than painted {path} "
            f"({provenance['weights_sha256'][:12]}…); put that checkpoint back, or paint anew: hpcres infer --overwrite"
        )
    return job


def _output_voxels(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the setting of the output's size where no low-res volume gives it."""
    if "lattice" not in provenance:
        return {}
    return {"output_voxels": high_res_shape(provenance["lattice"], Fraction(provenance["scale_factor"]))}


@dataclass(frozen=True)
class Audit:
    """Labels compared and labels that differ, in all and within one low-res voxel of the store's tile faces."""

    tiles: int
    voxels: int
    flips: int
    face_voxels: int
    face_flips: int
    limit: float
    """Share that rounding may change."""

    @property
    def share(self) -> float:
        """Share of the compared labels that differ."""
        return self.flips / self.voxels

    def __str__(self) -> str:
        """Return the numbers in words: in all, near tile faces, and elsewhere."""
        parts = [
            (f"{self.tiles} tiles painted again half a tile later, labels that differ", self.flips, self.voxels),
            ("within one low-res voxel of tile faces", self.face_flips, self.face_voxels),
            ("elsewhere", self.flips - self.face_flips, self.voxels - self.face_voxels),
        ]
        return "; ".join(f"{what} {flips} of {among} ({flips / max(1, among):.2g})" for what, flips, among in parts)

    def refuse_seams(self, path: Path) -> None:
        """Refuse a store of which more labels differ than rounding explains.

        Parameters
        ----------
        path
            Path of the labels, for the message.

        Raises
        ------
        Unfinished
            Where more labels differ. The message says whether they gather at tile faces.
        """
        if self.share <= self.limit:
            return
        elsewhere = (self.flips - self.face_flips) / max(1, self.voxels - self.face_voxels)
        seam = self.face_flips / max(1, self.face_voxels) > 2 * elsewhere
        where = "they gather at tile faces, which is a seam" if seam else "they do not gather at tile faces"
        raise Unfinished(
            f"{path}: {self.share:.2g} of the audited labels differ, more than the {self.limit:.2g} that rounding may "
            f"change; {where}; do not use it, paint it anew with hpcres infer --overwrite"
        )


def audit(job: Job, count: int, ranks: Ranks, progress: Callable[[int, int], None] | None = None) -> Audit:
    """Paint some tiles of the store at job.output again, half a tile later along each axis, and compare the labels.

    The tiles are random in even parts of the volume, the same for the same store. Collective: the ranks share them.

    Parameters
    ----------
    job
        Job that painted the store.
    count
        Number of tiles.
    ranks
        Ranks of the job.
    progress
        Called as progress(done, all) with numbers of this rank's tiles.

    Returns
    -------
    Audit
        Numbers of labels, of all ranks together.

    Raises
    ------
    InputError
        Where the job is not the store's, or its tiles cannot be shifted.
    """
    device = choose_device(job.device, ranks)
    painter = Painter(
        job.checkpoint.generator,
        job.plan,
        job.seed,
        device,
        job.settings.threads or ranks.cores,
        job.settings.precision,
    )
    try:
        # Rounding is what is audited, so a CPU may audit what a GPU painted.
        ranks.from_first(lambda: refuse_changed(job, painter, besides=("arithmetic",)))
        # Blocks of another size, or half a tile could bring the same ones again.
        painter.block_voxels = painter.block_voxels * 3 // 4
        chosen = _spread(job.plan.shifted(), count, job.seed)
        if not chosen:
            raise InputError(
                f"{job.output}: tiles of {' x '.join(map(str, job.plan.tile_voxels))} voxels are too small to be "
                f"shifted at scale factor {job.plan.scale}, so nothing can be audited; use fewer, larger tiles"
            )
        store, counted = LabelStore.open(job.output), [(0, 0, 0, 0, 0)]
        mine = tiles_of_rank(len(chosen), ranks.rank, ranks.size)
        for done, number in enumerate(mine):
            tile = chosen[number]
            differ = painter.paint(tile, job.conditions) != store.read(0, tile.write)
            away = _away_from_faces(job.plan, tile.write)
            flips, flips_away = int(np.count_nonzero(differ)), int(np.count_nonzero(differ[np.ix_(*away)]))
            voxels_away = prod(int(along.sum()) for along in away)
            counted.append((1, differ.size, flips, differ.size - voxels_away, flips - flips_away))
            if progress:
                progress(done + 1, len(mine))
        total = zip(*(line for lines in ranks.everyone(counted) for line in lines), strict=True)
        # What half precision changed against fp32 it may change against itself.
        known = store.provenance.get("flips", {}).get("share", 0.0)
        tiles, voxels, flips, face_voxels, face_flips = map(sum, total)
        return Audit(tiles, voxels, flips, face_voxels, face_flips, max(MOST_FLIPS, known))
    finally:
        painter.close()


def _spread(tiles: list[Tile], count: int, seed: int) -> list[Tile]:
    """Choose one random tile from each of `count` even parts of the list."""
    count = min(count, len(tiles))
    ends = [len(tiles) * part // count for part in range(count + 1)] if count else []
    random = np.random.default_rng(seed)
    return [tiles[random.integers(first, last)] for first, last in pairwise(ends)]


def _away_from_faces(plan: TilePlan, box: Box) -> list[np.ndarray]:
    """Return, per axis, which voxels of a high-res box lie away from every face between two tiles.

    These are voxels more than one low-res voxel from the face.
    """
    reach, away = ceil(plan.scale), []
    for axis, n in enumerate(plan.shape):
        place, edge = np.arange(box.start[axis], box.stop[axis]), plan.tile_voxels[axis]
        far = np.ones(place.size, bool)
        # The ends of a periodic axis are a face between its last tile and its first.
        for face in (*range(edge, n, edge), *((0, n) if plan.boundaries[axis] == "periodic" else ())):
            far &= (place < face - reach) | (place >= face + reach)
        away.append(far)
    return away
