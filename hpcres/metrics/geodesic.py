"""Mean geodesic tortuosity: the shortest paths inside a phase from one face of the volume to the other.

d(v) is the length of the shortest path through voxels of one phase from a voxel to a face of the volume, from centre to
centre. Steps go through faces (6 neighbours), or also through edges and corners (26). Each step has its Euclidean
length, rounded to 1/4096 of the shortest voxel edge (at most 1.2e-4 of a step). The thickness is that of the straight
path, (n − 1) h, so that a straight channel has exactly 1.

    inlet   mean over the phase's voxels in the first plane of d to the last plane / thickness (Furat 2025, 2.3.3)
    outlet  the same from the last plane to the first
    whole   mean over all its voxels of (d to the first plane + d to the last) / thickness (Barman 2021, full volume)

Voxels without a path to the face, or to both, are in no mean and are counted.

Distances are integers. Every block is swept by Dijkstra's method from the distances that its neighbours know. It is
swept again whenever they learn of shorter paths, until nothing changes. The distances then are those of the whole
volume for any partition into blocks. They lie block by block in a scratch folder that all workers see, 8 bytes a voxel;
a worker holds one block and the outer planes of its neighbours.

metrics.json holds the result under `statistics.geodesic`: neighbours, and by axis and phase {inlet, outlet, whole},
each {tau (null where no path is), voxels, unreachable}.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres.counting import counts
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, triple
from hpcres.metrics.schedule import Source, block_shape, block_voxels, finished, follow, submit, threads_of
from hpcres.metrics.shortest_paths import AROUND, OUTSIDE, UNIT, UNREACHED, lengths_of_steps, sweep
from hpcres.progress import progress_display
from hpcres.signals import half_made
from hpcres.volumes.files import atomic_write
from hpcres.volumes.formats import map_npy, read_npz
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

BLOCK_VOXELS = 2**23


@dataclass(frozen=True)
class Paths:
    """Sum of path lengths over the voxels of a mean.

    `voxels` is the number of voxels in the mean. `total` is the sum of their path lengths in units of the shortest
    voxel edge / UNIT. `unreachable` is the number of voxels without a path.
    """

    voxels: int
    total: int
    unreachable: int

    def __add__(self, other: Paths) -> Paths:
        """Add the sums of two sets of voxels."""
        return Paths(self.voxels + other.voxels, self.total + other.total, self.unreachable + other.unreachable)


@dataclass(frozen=True)
class _Job:
    """Settings that all tasks of an axis share; blocks are named by their place in the grid."""

    source: Source
    labels: tuple[int, ...]
    shape: Triple
    block: Triple
    axis: int
    steps: tuple[Triple, ...]
    weights: tuple[int, ...]
    folder: str

    def box(self, at: Triple) -> Box:
        start = triple([k * b for k, b in zip(at, self.block, strict=True)])
        stop = triple([a + b for a, b in zip(start, self.block, strict=True)])
        return Box(start, stop).clipped(Box.whole(self.shape))

    @property
    def places(self) -> list[Triple]:
        return [triple(at) for at in product(*(range(-(-n // b)) for n, b in zip(self.shape, self.block, strict=True)))]

    def beside(self, at: Triple) -> list[tuple[Triple, Triple]]:
        """Return the directions in which a step can leave a block, and the block that it meets."""
        grid = [-(-n // b) for n, b in zip(self.shape, self.block, strict=True)]
        near = [(step, triple([k + s for k, s in zip(at, step, strict=True)])) for step in AROUND]
        return [
            (step, to)
            for step, to in near
            if step in self.steps and all(0 <= k < g for k, g in zip(to, grid, strict=True))
        ]

    def file(self, side: int, at: Triple, what: str) -> Path:
        return Path(self.folder) / f"{'low' if side == 0 else 'high'}-{'-'.join(map(str, at))}.{what}"


def _place(step: Triple) -> tuple[int | slice, ...]:
    """Index the neighbour in a direction in an array with a margin of one voxel."""
    return tuple(0 if s < 0 else -1 if s > 0 else slice(1, -1) for s in step)


def _facing(step: Triple) -> tuple[int | slice, ...]:
    """Index the part of a block that its neighbour in a direction sees."""
    return tuple(0 if s < 0 else -1 if s > 0 else slice(None) for s in step)


def _relax(at: Triple, job: _Job, side: int) -> tuple[int, dict[Triple, bytes]]:
    """Sweep one block, and return how many of its voxels have a path, and a digest for each neighbour.

    A neighbour has to look again where its digest changes. The digest is empty while the neighbour sees no path.
    """
    box = job.box(at)
    index, _ = counts.indexed(job.source.open().read(box), job.labels)
    inner, padded = (slice(1, -1),) * 3, [n + 2 for n in box.shape]
    label, halo_label = np.full(padded, OUTSIDE), np.full(padded, OUTSIDE)
    distance, halo = np.full(padded, UNREACHED), np.full(padded, UNREACHED)
    label[inner] = index
    known, seeds = job.file(side, at, "npy"), np.zeros(0, np.int64)
    if known.exists():
        distance[inner] = map_npy(known)
    elif (box.start, box.stop)[side][job.axis] == (0, job.shape[job.axis])[side]:
        plane: list[int | slice] = list(inner)
        plane[job.axis] = -2 if side else 1
        distance[tuple(plane)] = 0
        seeds = np.flatnonzero(distance.ravel() == 0)
    for step, near in job.beside(at):
        rim = job.file(side, near, "rim.npz")
        if rim.exists():
            key, where = _key(triple([-s for s in step])), _place(step)
            halo[where], halo_label[where] = read_npz(rim, f"distance{key}", f"label{key}")
    sweep(label, distance, halo_label, halo, seeds, job.steps, job.weights)
    found = distance[inner]
    shown: dict[str, np.ndarray] = {}
    digests: dict[Triple, bytes] = {}
    for step, _ in job.beside(at):
        part = found[_facing(step)].copy()
        shown |= {f"distance{_key(step)}": part, f"label{_key(step)}": index[_facing(step)]}
        reached = bool((part != UNREACHED).any())
        digests[step] = hashlib.blake2b(part.tobytes(), digest_size=16).digest() if reached else b""
    # Whole or not at all, each: a task that dies in between is run again and then shows what the file already knows.
    _save(known, lambda file: np.save(file, found))
    _save(job.file(side, at, "rim.npz"), lambda file: np.savez(file, allow_pickle=False, **shown))
    return int(np.count_nonzero(found != UNREACHED)), digests


def _key(step: Triple) -> str:
    return "".join("-0+"[s + 1] for s in step)


def _save(target: Path, write: Any) -> None:
    with atomic_write(target) as temporary, temporary.open("wb") as file:
        write(file)


def _sum(at: Triple, job: _Job) -> list[dict[str, Paths]]:
    """Sum the paths of one block by phase: of its voxels in the first plane, in the last plane, and of all."""
    box, axis = job.box(at), job.axis
    index, _ = counts.indexed(job.source.open().read(box), job.labels)
    to = []
    for side in (0, 1):
        file = job.file(side, at, "npy")
        to.append(map_npy(file) if file.exists() else np.full(box.shape, UNREACHED))
    low, high = to
    found: list[dict[str, Paths]] = []
    for phase in range(len(job.labels)):
        own = index == phase
        parts = {}
        for name, distance, place, present in (
            ("inlet", high, 0, box.start[axis] == 0),
            ("outlet", low, -1, box.stop[axis] == job.shape[axis]),
        ):
            if present:
                plane: np.ndarray = np.take(distance, place, axis)
                plane = plane[np.take(own, place, axis)]
                parts[name] = _paths(plane[plane != UNREACHED], len(plane))
        both = own & (low != UNREACHED) & (high != UNREACHED)
        lengths = low[both].astype(np.uint64) + high[both]
        found.append({**parts, "whole": _paths(lengths, int(np.count_nonzero(own)))})
    return found


def _paths(lengths: np.ndarray, voxels: int) -> Paths:
    return Paths(lengths.size, int(lengths.sum(dtype=np.uint64)), voxels - lengths.size)


def _solve(client: Client, job: _Job, side: int, what: str, progress: bool) -> None:
    """Sweep blocks from one face of the volume until no block shows its neighbours anything new."""
    first = (max if side else min)(at[job.axis] for at in job.places)
    active = {at for at in job.places if at[job.axis] == first}
    known: dict[tuple[Triple, Triple], bytes] = {}
    reached, sweeps, voxels = dict.fromkeys(job.places, 0), 0, prod(job.shape)
    with progress_display(what, voxels, shown=progress) as show:
        while active:
            places, active, waiting = sorted(active), set(), len(active)
            futures = submit(client, _relax, places, job=job, side=side)
            place_of = dict(zip((future.key for future in futures), places, strict=True))
            for future in finished(futures, what):
                at = place_of[future.key]
                reached[at], digests = future.result()
                for step, near in job.beside(at):
                    if known.get((at, step), b"") != digests[step]:
                        known[at, step] = digests[step]
                        active.add(near)
                sweeps, waiting, total = sweeps + 1, waiting - 1, sum(reached.values())
                # How many sweeps it takes nobody knows; nor how many voxels no path reaches.
                blocks = f"blocks swept: {sweeps}, known to come: {waiting + len(active)}"
                show(total, f"{100 * total / voxels:.1f} % of the voxels reached, {blocks}")


@contextmanager
def _scratch(where: Path) -> Iterator[str]:
    """Make a folder that is removed afterwards.

    It is removed also where a signal ends the run while tasks write to it or while it is being removed.
    """
    folder = str(where / f"hpcres-geodesic-{secrets.token_hex(6)}")
    with half_made(Path(folder)):
        try:
            os.mkdir(folder, 0o700)
            yield folder
        finally:
            _remove(folder)


def _remove(folder: str) -> None:
    for _ in range(600):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)  # until who still writes there has no place to
    shutil.rmtree(folder)


def geodesic(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int],
    neighbours: int = 26,
    lengths: tuple[float, float, float] = (1.0, 1.0, 1.0),
    block: Triple | None = None,
    scratch: Path | None = None,
    progress: bool = True,
) -> dict[str, list[dict[str, Paths]]]:
    """Find the shortest paths from face to face inside each phase, along each axis.

    The result is the same for any `block`.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int
        Labels of the phases.
    neighbours : int
        6 or 26.
    lengths : tuple of float
        Voxel edges z, y, x.
    block : Triple, optional
        Shape of a block; by default one that follows from chunks and threads.
    scratch : Path, optional
        An existing folder for the distances, seen by all workers; by default the system's temporary one.
    progress : bool
        Whether to show progress.

    Returns
    -------
    dict
        {axis: per phase {inlet, outlet, whole}}.

    Raises
    ------
    InputError
        The scratch folder has less free space than the distances need, 8 bytes a voxel.
    """
    limit = min(BLOCK_VOXELS, block_voxels(volume.shape, volume.dtype.itemsize, threads_of(client)))
    shape, cut_into = volume.shape, block or block_shape(volume.shape, volume.chunks, limit)
    steps, weights = lengths_of_steps(neighbours, lengths)
    where = Path(scratch or tempfile.gettempdir())
    free, needed = shutil.disk_usage(where).free, 8 * prod(shape)
    if free < needed:
        raise InputError(
            f"{where}: geodesic distances need {needed / 2**30:.1f} GiB of scratch space, {free / 2**30:.1f} GiB are "
            f"free; set TMPDIR, or leave geodesic out"
        )
    result: dict[str, list[dict[str, Paths]]] = {}
    for axis, name in enumerate(AXES):
        with _scratch(where) as folder:
            source = Source.of(volume)
            job = _Job(source, tuple(labels), shape, triple(cut_into), axis, steps, weights, folder)
            for side in (0, 1):
                what = f"geodesic paths along {name} {'back' if side else 'forth'}, part {2 * axis + side + 1} of 6"
                _solve(client, job, side, what, progress)
            futures = submit(client, _sum, job.places, job=job)
            follow(futures, f"geodesic tortuosity along {name}", progress)
            total = [{form: Paths(0, 0, 0) for form in ("inlet", "outlet", "whole")} for _ in labels]
            for part in client.gather(futures):
                for phase, forms in enumerate(part):
                    for form, paths in forms.items():
                        total[phase][form] += paths
            result[name] = total
    return result


def described(
    found: Mapping[str, Sequence[Mapping[str, Paths]]],
    names: Sequence[str],
    shape: Sequence[int],
    lengths: Sequence[float],
    neighbours: int,
) -> dict[str, Any]:
    """Return the paths as metrics.json has them.

    Parameters
    ----------
    found : mapping
        What `geodesic` returns.
    names : sequence of str
        Names of the phases.
    shape : sequence of int
        Shape of the volume.
    lengths : sequence of float
        Voxel edges z, y, x.
    neighbours : int
        6 or 26.

    Returns
    -------
    dict
        The entry `statistics.geodesic`.
    """
    result: dict[str, Any] = {"neighbours": neighbours}
    for axis, (key, phases) in enumerate(found.items()):
        thickness = (shape[axis] - 1) * lengths[axis] / min(lengths) * UNIT
        result[key] = {
            name: {
                form: {
                    "tau": paths.total / paths.voxels / thickness if paths.voxels and thickness else None,
                    "voxels": paths.voxels,
                    "unreachable": paths.unreachable,
                }
                for form, paths in forms.items()
            }
            for name, forms in zip(names, phases, strict=True)
        }
    return result
