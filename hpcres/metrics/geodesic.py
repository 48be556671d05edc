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
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres.compiled import compiled
from hpcres.counting import counts
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, triple
from hpcres.metrics.schedule import Source, block_shape, block_voxels, finished, follow, submit, threads_of
from hpcres.progress import progress_display
from hpcres.signals import half_made
from hpcres.volumes.files import atomic_write
from hpcres.volumes.formats import map_npy, read_npz
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

UNIT = 4096
"""Integer length of the shortest voxel edge."""
BLOCK_VOXELS = 2**23
_UNREACHED = np.uint32(2**32 - 1)
_OUTSIDE = np.uint8(255)
_NEVER = np.int64(2**62)
_AROUND = [step for step in product((-1, 0, 1), repeat=3) if any(step)]


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
        near = [(step, triple([k + s for k, s in zip(at, step, strict=True)])) for step in _AROUND]
        return [
            (step, to)
            for step, to in near
            if step in self.steps and all(0 <= k < g for k, g in zip(to, grid, strict=True))
        ]

    def file(self, side: int, at: Triple, what: str) -> Path:
        return Path(self.folder) / f"{'low' if side == 0 else 'high'}-{'-'.join(map(str, at))}.{what}"


def lengths_of_steps(neighbours: int, spacing: Sequence[float]) -> tuple[tuple[Triple, ...], tuple[int, ...]]:
    """Return the steps to the neighbours, and their lengths.

    Parameters
    ----------
    neighbours : int
        6 or 26.
    spacing : sequence of float
        Voxel edges z, y, x.

    Returns
    -------
    steps : tuple of Triple
        Steps z, y, x of -1, 0 or 1 voxel.
    weights : tuple of int
        Their lengths in units of the shortest voxel edge / UNIT.
    """
    steps = [s for s in _AROUND if neighbours == 26 or sum(map(abs, s)) == 1]
    shortest = min(spacing)
    weights = [round(UNIT * sqrt(sum((k * h / shortest) ** 2 for k, h in zip(s, spacing, strict=True)))) for s in steps]
    return tuple(triple(s) for s in steps), tuple(weights)


@compiled
def _enter(halo_label, halo_distance, label, distance, places, offsets, weights):
    """Take the steps from halo voxels (`places`) into the block that shorten a path; return the voxels they reach."""
    reached = np.empty(max(places.size, 16), np.int64)
    count = 0
    for place in places:
        for k in range(offsets.size):
            to = place + offsets[k]
            if 0 <= to < label.size and label[to] == halo_label[place]:
                length = np.int64(halo_distance[place]) + weights[k]
                if length < distance[to]:
                    distance[to] = length
                    if count == reached.size:
                        more = np.empty(2 * count, np.int64)
                        more[:count] = reached
                        reached = more
                    reached[count] = to
                    count += 1
    return reached[:count]


@compiled
def _spread(label, distance, seeds, offsets, weights, queue_of, queues, onward):
    """Run Dijkstra's method from `seeds` inside each phase, and return the length of the longest path.

    `seeds` are places in the order of their distance. There is one first-in-first-out queue for each length of step.
    What enters a queue is never shorter than what entered it before, so the nearest voxel is at the head of some queue.
    `onward` is the table of `_onward`.
    """
    # An entry is a place × 32 + the step that led there.
    size, last, first = 1024, np.int64(31), np.int64(offsets.size)
    entry, length = np.empty((queues, size), np.int64), np.empty((queues, size), np.int64)
    head, tail, nearest = np.zeros(queues, np.int64), np.zeros(queues, np.int64), np.full(queues, _NEVER)
    seed, longest = 0, np.int64(0)
    while True:
        at, best, own, came = np.int64(-1), _NEVER, -1, first
        if seed < seeds.size:
            at, best = seeds[seed], np.int64(distance[seeds[seed]])
        for q in range(queues):
            if nearest[q] < best:
                best, own = nearest[q], q
        if own >= 0:
            both = entry[own, head[own] & (size - 1)]
            at, came = both >> 5, both & last
            head[own] += 1
            nearest[own] = length[own, head[own] & (size - 1)] if head[own] < tail[own] else _NEVER
        elif at >= 0:
            seed += 1
        else:
            return longest
        if distance[at] != best:  # a shorter path has come since
            continue
        longest = best
        phase = label[at]
        for i in range(1, onward[came, 0] + 1):
            k = onward[came, i]
            # Places are never negative; numba need not look for such as count from the end.
            to = np.uint64(at + offsets[k])
            further = best + weights[k]
            if further < np.int64(distance[to]) and label[to] == phase:
                distance[to] = further
                q = queue_of[k]
                if tail[q] - head[q] == size:
                    more_entry = np.empty((queues, 2 * size), np.int64)
                    more_length = np.empty((queues, 2 * size), np.int64)
                    for p in range(queues):
                        for j in range(head[p], tail[p]):
                            more_entry[p, j & (2 * size - 1)] = entry[p, j & (size - 1)]
                            more_length[p, j & (2 * size - 1)] = length[p, j & (size - 1)]
                    entry, length, size = more_entry, more_length, 2 * size
                entry[q, tail[q] & (size - 1)] = (np.int64(to) << 5) | k
                length[q, tail[q] & (size - 1)] = further
                tail[q] += 1
                if nearest[q] == _NEVER:
                    nearest[q] = further


def _onward(steps: Sequence[Triple], weights: Sequence[int]) -> np.ndarray:
    """Tabulate how many steps are worth trying from a voxel, and which, by the step that led to it.

    The last row is for voxels that no step led to. A step is left out where the voxel before can reach its end in one
    step that is no longer than both together.
    """
    length = dict(zip(steps, weights, strict=True))
    table = np.zeros((len(steps) + 1, len(steps) + 1), np.int64)
    for row, (came, before) in enumerate([*length.items(), ((0, 0, 0), 0)]):
        found = []
        for k, (step, own) in enumerate(length.items()):
            direct = triple([a + b for a, b in zip(came, step, strict=True)])
            reached = direct == (0, 0, 0) or length.get(direct, before + own + 1) <= before + own
            if not any(came) or not reached:
                found.append(k)
        table[row, : len(found) + 1] = len(found), *found
    return table


def sweep(
    label: np.ndarray,
    distance: np.ndarray,
    halo_label: np.ndarray,
    halo_distance: np.ndarray,
    seeds: np.ndarray,
    steps: Sequence[Triple],
    weights: Sequence[int],
) -> None:
    """Shorten `distance` inside a block until no step from within it or its halo shortens it further.

    All arrays have a margin of one voxel.

    Parameters
    ----------
    label : np.ndarray
        Labels of the block; 255 in the margin.
    distance : np.ndarray
        uint32, changed in place.
    halo_label, halo_distance : np.ndarray
        What is known of the margin, and nothing within.
    seeds : np.ndarray
        Places (flat) whose distance was set by the caller.
    steps : sequence of Triple
        Steps to the neighbours.
    weights : sequence of int
        Their lengths.
    """
    strides = np.array([label.shape[1] * label.shape[2], label.shape[2], 1])
    offsets, lengths = np.array(steps, np.int64) @ strides, np.array(weights, np.int64)
    outer = np.flatnonzero(halo_distance != _UNREACHED)
    flat = label.ravel(), distance.ravel()
    reached = _enter(halo_label.ravel(), halo_distance.ravel(), *flat, outer, offsets, lengths)
    seeds = np.unique(np.concatenate([seeds, reached]))
    seeds = seeds[np.argsort(flat[1][seeds], kind="stable")]
    known, queue_of = np.unique(lengths, return_inverse=True)
    longest = _spread(*flat, seeds, offsets, lengths, queue_of, len(known), _onward(steps, weights))
    assert longest + int(lengths.max()) < int(_UNREACHED), "a path of more than a million voxel edges"


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
    label, halo_label = np.full(padded, _OUTSIDE), np.full(padded, _OUTSIDE)
    distance, halo = np.full(padded, _UNREACHED), np.full(padded, _UNREACHED)
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
        reached = bool((part != _UNREACHED).any())
        digests[step] = hashlib.blake2b(part.tobytes(), digest_size=16).digest() if reached else b""
    # Whole or not at all, each: a task that dies in between is run again and then shows what the file already knows.
    _save(known, lambda file: np.save(file, found))
    _save(job.file(side, at, "rim.npz"), lambda file: np.savez(file, allow_pickle=False, **shown))
    return int(np.count_nonzero(found != _UNREACHED)), digests


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
        to.append(map_npy(file) if file.exists() else np.full(box.shape, _UNREACHED))
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
                parts[name] = _paths(plane[plane != _UNREACHED], len(plane))
        both = own & (low != _UNREACHED) & (high != _UNREACHED)
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
