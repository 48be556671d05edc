"""Records beside a store: a journal of each rank on its shards, and the lock of the job that paints the store.

`labels.zarr.journal/rank-00000.jsonl` has one line a shard; `lock` names the process that paints now.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from hpcres.counting import totals
from hpcres.counting.totals import Counts
from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.volumes.stores import AgreementStore, LabelStore

_HELD = (errno.EAGAIN, errno.EACCES)  # local file systems say the one, some NFS the other
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_DYING_SECONDS = 2.0
_LEFT_OVER_SECONDS = 10.0
"""How long the ranks of a job that has just been killed may take to end."""


def journal_folder(output: Path) -> Path:
    """Return the folder of the journals and the lock of a store.

    It is beside the store, because zarr readers have trouble with unknown files inside a store.
    """
    return output.with_name(output.name + ".journal")


def agreement_path(output: Path) -> Path:
    """Return the path of the agreement of an ensemble, beside its labels."""
    return output.with_name(f"{output.stem}-agreement{output.suffix}")


def open_stores(output: Path) -> tuple[LabelStore, ...]:
    """Open the labels, and the agreement where the labels are of an ensemble.

    Parameters
    ----------
    output
        Path of the labels.

    Returns
    -------
    tuple of LabelStore
        The labels, and the agreement where there is one.

    Raises
    ------
    InputError
        Where a store does not exist.
    """
    labels = LabelStore.open(output)
    several = labels.provenance.get("ensemble", 1) > 1
    return (labels, AgreementStore.open(agreement_path(output))) if several else (labels,)


# ---- one job at a time -------------------------------------------------------------------------------------


def _lock(file: IO[bytes]) -> bool | None:
    """Lock `file` and return whether it is locked for this process now; None where its file system has no locks.

    The kernel keeps such a lock with the open file and drops it when its process ends, however it ends, so nothing
    is left to clear after SIGKILL. NFS and Lustre (mounted with flock) carry it to every node, and drop it when a
    node is lost. A lock by the mere existence of a file could do neither.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _lock_within(file: IO[bytes], seconds: float) -> bool | None:
    deadline = time.monotonic() + seconds
    while (locked := _lock(file)) is False and time.monotonic() < deadline:
        time.sleep(0.05)
    return locked


class StoreLock:
    """The right to paint one store.

    Every rank makes the object; rank 0 takes the lock and holds it until the job is over.

    Parameters
    ----------
    output
        Path of the store.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._file: IO[bytes] | None = None
        self.certain = True
        """False where the file system has no locks, so that another job would not be noticed."""

    def take(self) -> None:
        """Take the lock; nothing happens where this object has it already.

        Raises
        ------
        InputError
            Where another job has the store; the message names the holder.
        """
        if self._file is not None:
            return
        path = journal_folder(self._output) / "lock"
        while self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
            try:
                self._take(file)
                # Whoever had it before us may have removed it, and a third could lock what is there now.
                if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    self._file = file
            finally:
                if self._file is None:
                    file.close()

    def _take(self, file: IO[bytes]) -> None:
        # A process that was killed lives on until its memory is given back, and so does its lock.
        locked = _lock_within(file, _DYING_SECONDS)
        if locked is False:
            file.seek(0)
            raise InputError(
                f"{self._output}: another job is painting it ({_holder(file.read())}); wait for its end or stop it, or "
                "give another `output`"
            )
        self.certain = bool(locked)
        # Ranks outlive a rank 0 that was killed by some seconds; what they still write must not meet what we write.
        for journal in sorted(self._output_journals()):
            with journal.open("ab", buffering=0) as other:
                if _lock_within(other, _LEFT_OVER_SECONDS) is False:
                    raise InputError(
                        f"{self._output}: a rank of an earlier job still paints it ({journal.name} is locked); stop "
                        "that job (scancel, kill), then run this command again"
                    )
        file.truncate(0)
        file.write(json.dumps(_ourselves()).encode() + b"\n")

    def _output_journals(self) -> list[Path]:
        return list(journal_folder(self._output).glob("rank-*.jsonl"))

    def forget_journals(self) -> None:
        """Remove the journals of a store that is painted anew; the lock stays."""
        assert self._file is not None
        for journal in self._output_journals():
            journal.unlink()

    def __enter__(self) -> StoreLock:
        """Return the lock, which is not yet taken."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock where it is taken.

        Where there is no store, the job was refused before it made one, and the lock's file is removed.
        """
        if self._file is not None:
            if not self._output.exists():  # refused before there was a store: leave nothing
                with suppress(OSError):
                    Path(self._file.name).unlink()
                    journal_folder(self._output).rmdir()
            else:  # nobody paints it now, as far as this file tells
                with suppress(OSError):
                    self._file.truncate(0)
            self._file.close()
            self._file = None


def _ourselves() -> dict[str, Any]:
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
    job = next((os.environ[name] for name in names if name in os.environ), None)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "process": os.getpid(), "job": job, "since": since}


def _holder(content: bytes) -> str:
    try:
        told = json.loads(content)
        job = f"job {told['job']}, " if told["job"] else ""
        return f"{job}process {told['process']} on {told['host']} since {told['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock, but has not yet written who it is
        return "it has only just begun"


# ---- what was written --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noted:
    """What a journal says of a shard."""

    files: tuple[tuple[int, int], ...]
    """Bytes and checksum in each store of the job, in the order of `open_stores`."""
    counts: tuple[Mapping[str, Any], ...]
    """Of a tile: voxels, faces and edges as `counting.totals.to_json` has them, of each seed."""


class Journal:
    """Journal of one rank: one JSON line a shard, appended by the rank that wrote the shard.

    A line has level, place, and the file's size and checksum; of a tile also seconds and counts. Threads may share the
    journal.

    Parameters
    ----------
    output
        Path of the store.
    rank
        Number of the rank.

    Raises
    ------
    InputError
        Where another living process writes the same journal.
    """

    def __init__(self, output: Path, rank: int) -> None:
        folder = journal_folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a line is in the file or its write has failed.
        self._file = (folder / f"rank-{rank:05d}.jsonl").open("ab+", buffering=0)
        self._turn = threading.Lock()
        if _lock(self._file) is False:
            self._file.close()
            raise InputError(f"{output}: another job is painting it (rank {rank} has its journal); wait for its end")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a kill cut the last line short
                self._file.write(b"\n")

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def note(self, stores: Sequence[LabelStore], level: int, box: Box, **more: Any) -> None:
        """Note a shard that was just written to all stores of the job, when the disk has it.

        Parameters
        ----------
        stores
            Stores of the job.
        level
            Pyramid level of the shard.
        box
            Box of the shard.
        **more
            Further items of the line.

        Raises
        ------
        OSError
            Where the shard or the line is not written.
        """
        files = [_size_and_crc32(store.shard_path(level, box), settle=True) for store in stores]
        entry = {"level": level, "start": list(box.start), "files": files, "time": time.time(), **more}
        line = (json.dumps(entry) + "\n").encode()
        with self._turn:
            written = self._file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)


def file_crc32(path: Path) -> int:
    """Return the CRC-32 checksum of a file."""
    return _size_and_crc32(path)[1]


def _size_and_crc32(path: Path, settle: bool = False) -> tuple[int, int]:
    """Return bytes and checksum of a file; with `settle`, not before the file would survive a loss of power."""
    size = crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            size, crc = size + len(part), zlib.crc32(part, crc)
        if settle:
            os.fsync(file.fileno())
    return size, crc


def read_journal(output: Path) -> dict[tuple[int, Triple], Noted]:
    """Read what was last noted of each shard.

    A line that a kill cut short is skipped.

    Parameters
    ----------
    output
        Path of the store.

    Returns
    -------
    dict
        Noted by level and start of the shard.
    """
    noted: dict[tuple[int, Triple], tuple[float, Noted]] = {}
    for file in sorted(journal_folder(output).glob("rank-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                key = (int(entry["level"]), triple(entry["start"]))
                files = tuple((int(size), int(crc32)) for size, crc32 in entry["files"])
                value = (float(entry["time"]), Noted(files, tuple(entry.get("counts", ()))))
            except (ValueError, KeyError, TypeError):
                continue
            if key not in noted or noted[key][0] <= value[0]:
                noted[key] = value
    return {key: value for key, (_, value) in noted.items()}


def total_counts(store: LabelStore, seeds: int) -> list[Counts]:
    """Sum the counts of the tiles to counts of the whole volume, for each seed.

    Parameters
    ----------
    store
        Labels, which must miss no tile.
    seeds
        Number of seeds of the ensemble.

    Returns
    -------
    list of Counts
        One for each seed.
    """
    noted = read_journal(store.path)
    lines = [noted[0, box.start].counts for box in store.shard_boxes(0)]
    total = [totals.add_all([totals.from_json(line[seed]) for line in lines]) for seed in range(seeds)]
    assert all(sum(one.voxels.values()) == prod(store.levels[0].shape) for one in total)
    return total


def missing_shards(stores: Sequence[LabelStore], seeds: int) -> list[tuple[int, Box]]:
    """List the shards that are to be made.

    Only what a journal confirms is trusted. Where a shard has no line, a kill came before the line was written. A shard
    of another size than noted has lost bytes when its machine lost power.

    Parameters
    ----------
    stores
        Stores of the job; the labels come first.
    seeds
        Number of seeds of the ensemble.

    Returns
    -------
    list of tuple
        Level and box of each shard, finest level first, z-major.
    """
    labels, missing = stores[0], []
    noted = read_journal(labels.path)
    for level in range(len(labels.levels)):
        for box in labels.shard_boxes(level):
            known = noted.get((level, box.start))
            sizes = [_size(store.shard_path(level, box)) for store in stores]
            if (
                known is None
                or [size for size, _ in known.files] != sizes
                or (level == 0 and len(known.counts) != seeds)
            ):
                missing.append((level, box))
    return missing


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def refuse_without_journal(output: Path) -> None:
    """Raise InputError for a store that came without its journal, since nothing in it could be trusted."""
    folder = journal_folder(output)
    if not folder.is_dir():
        raise InputError(
            f"{output}: its journal {folder.name} is not beside it, so every shard would be painted anew; put it back, "
            "or say so with hpcres infer --overwrite"
        )
