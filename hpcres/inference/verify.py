"""Is a painted store whole? Every shard is read back: file, checksum, index, labels; --repair paints what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.inference.run import Job, file_crc32, open_job, read_journal
from hpcres.study import RawHeader, parse_boundary
from hpcres.volumes import LabelStore


@dataclass(frozen=True)
class Fault:
    """One shard that cannot be trusted, and why."""

    level: int
    box: Box
    why: str

    def __str__(self) -> str:
        return f"level {self.level}, {self.box}: {self.why}"


def find_faults(path: Path, progress: Callable[[int, int], None] | None = None) -> list[Fault]:
    """Check every shard of every level of a store that hpcres infer made."""
    store = LabelStore.open(path)
    phases = len(store.volume.phases or ())
    noted = read_journal(path)
    shards = [(level, box) for level in range(len(store.levels)) for box in store.shard_boxes(level)]
    faults = []
    for number, (level, box) in enumerate(shards):
        why = _fault(store, level, box, phases, noted.get((level, box.start)))
        if why:
            faults.append(Fault(level, box, why))
        if progress:
            progress(number + 1, len(shards))
    return faults


def _fault(store: LabelStore, level: int, box: Box, phases: int, crc: int | None) -> str:
    file = store.shard_path(level, box)
    if not file.is_file():
        return "missing"
    # Blosc does not check what it decodes, so the checksum of the whole file comes first.
    if crc is not None and file_crc32(file) != crc:
        return "damaged, its checksum differs from the journal's"
    try:
        labels = store.read(level, box)
    except InputError:
        return "damaged, cannot be decoded"
    highest = int(labels.max())
    if highest == 255:
        return "incomplete, parts were never written"
    if highest >= phases:
        return f"damaged, label {highest} where the phases are 0 to {phases - 1}"
    return ""


def remove_faulty(path: Path, faults: list[Fault]) -> int:
    """Delete the files of faulty shards and of every coarser shard made from them, so that infer paints them anew.

    Returns how many tiles (level 0) that concerns.
    """
    store = LabelStore.open(path)
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
    """The job that painted a store, from what the store knows of itself: its checkpoint, input, seed and tiles."""
    provenance = LabelStore.open(path).provenance
    if provenance.get("stage") != "infer":
        raise InputError(f"{path}: not made by hpcres infer, so there is nothing to paint it from; convert it again")
    raw = provenance["raw"]
    job = open_job(
        None, checkpoint=provenance["checkpoint"], low_res=provenance["low_res"], output=str(path),
        seed=provenance["seed"], device="auto", command=command, raw=RawHeader(**raw) if raw else None,
        inference={
            "tiles": tuple(provenance["tiles"]), "chunk_voxels": provenance["chunk_voxels"],
            "boundary": parse_boundary(provenance["boundary"]),
        },
    )  # fmt: skip
    if job.checkpoint.sha256 != provenance["weights_sha256"]:
        raise InputError(
            f"{job.checkpoint.path}: has other weights ({job.checkpoint.sha256[:12]}…) than painted {path} "
            f"({provenance['weights_sha256'][:12]}…); put that checkpoint back, or paint anew: hpcres infer --overwrite"
        )
    return job
