"""Clusters of each phase: voxels joined by faces (6-neighbours), found run by run and joined across blocks.

`clusters_of` labels a block. `touching` says which of its clusters meet those of the next block. `join` is the
union–find over the whole volume. Numbers of voxels and clusters have 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcres.compiled import compiled
from hpcres.counting.chords import Rows
from hpcres.counting.disjoint_sets import merge, root
from hpcres.simd.words import popcount

_LOW, _HIGH = (1, 2, 4), (8, 16, 32)
"""Bits of a face: the first and the last plane along z, y, x."""
_BLOCK = np.int64(2**32)


@dataclass(frozen=True)
class Clusters:
    """Clusters of a block that reach one of its faces; of the others only their number and the largest, per phase.

    `name` is int64: number of the block × 2³² + number in the block. `phase` is uint8 and `voxels` is int64. `faces`
    (uint8) has a bit for each outer face of the volume that the cluster touches. `first` and `last` hold, per axis, the
    numbers in the block's first and last plane (int32). Those of `last` are compared with the next block's `first`.
    """

    name: np.ndarray
    phase: np.ndarray
    voxels: np.ndarray
    faces: np.ndarray
    inside: np.ndarray
    largest_inside: np.ndarray
    first: tuple[np.ndarray, ...]
    last: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Connected:
    """Connectivity of one phase: its voxels, its clusters, and the voxels of the largest cluster.

    `percolating` holds, per axis z, y, x, the voxels of all clusters that reach from face to face.
    """

    voxels: int
    clusters: int
    largest: int
    percolating: tuple[int, int, int]


@compiled
def _join_rows(planes, row, other, changed, index, number, parent):
    """Give the runs of a row the numbers of the runs of the same phase beside them in the row `other`.

    Where a run lies beside several runs of its phase, their numbers are merged in `parent`.
    """
    n, words, one = planes.shape[0], planes.shape[2], np.uint64(1)
    run, beside = index[row], index[other]
    for w in range(words):
        unequal = np.uint64(0)
        for p in range(n):
            unequal |= planes[p, row, w] ^ planes[p, other, w]
        own, others = changed[row, w], changed[other, w]
        # Where two runs of one phase begin to lie beside each other, one of them begins.
        bits = (own | others | np.uint64(w == 0)) & ~unequal
        while bits:
            up_to = bits ^ (bits - one)
            bits &= bits - one
            a, b = run + np.int64(popcount(own & up_to)), beside + np.int64(popcount(others & up_to))
            mine, theirs = number[a], number[b]
            mine = theirs if mine < 0 else mine
            number[a] = mine
            if parent[mine] != parent[theirs]:
                merge(parent, mine, theirs)
        run += np.int64(popcount(own))
        beside += np.int64(popcount(others))


@compiled
def _label(planes, rows, index, changed, number, parent):
    """Set `number` to the number of each run's cluster, and return how many clusters there are.

    Clusters are numbered in the order of their first runs. `planes` is (p, row, word), `rows` is the number of its rows
    in a slice, and `parent` has as many elements as there are runs.
    """
    given = 0
    for row in range(planes.shape[1]):
        for run in range(index[row], index[row + 1]):
            number[run] = -1
        if row % rows:
            _join_rows(planes, row, row - 1, changed, index, number, parent)
        if row >= rows:
            _join_rows(planes, row, row - rows, changed, index, number, parent)
        for run in range(index[row], index[row + 1]):
            if number[run] < 0:
                number[run] = parent[given] = given
                given += 1
    count = 0
    for k in range(given):
        # The smallest number of a cluster is its root, so the parents of later ones are already told apart by sign.
        above = parent[k]
        if above == k:
            parent[k] = -1 - count
            count += 1
        else:
            parent[k] = parent[above]
    for run in range(number.size):
        number[run] = -1 - parent[number[run]]
    return count


@compiled
def _measure(columns, start, index, phase, number, voxels, of_phase):
    for row in range(index.size - 1):
        for run in range(index[row], index[row + 1]):
            stop = start[run + 1] if run + 1 < index[row + 1] else columns
            voxels[number[run]] += stop - start[run]
            of_phase[number[run]] = phase[run]


@compiled
def _paint(start, index, number, first_row, step, plane):
    """Write the number of every voxel of the rows first_row, first_row + step, … into `plane`."""
    columns = plane.shape[1]
    for k in range(plane.shape[0]):
        row = first_row + k * step
        for run in range(index[row], index[row + 1]):
            stop = start[run + 1] if run + 1 < index[row + 1] else columns
            plane[k, start[run] : stop] = number[run]


def clusters_of(
    runs: Rows, planes: np.ndarray, shape: Sequence[int], phases: int, place: int, outer: Sequence[tuple[bool, bool]]
) -> Clusters:
    """Find the clusters of a block from its runs.

    Parameters
    ----------
    runs : Rows
        The runs of the block along x.
    planes : np.ndarray
        What `bitplanes.pack` makes of the block.
    shape : sequence of int
        Shape of the block (z, y, x).
    phases : int
        Number of phases.
    place : int
        Number of the block in the volume.
    outer : sequence of (bool, bool)
        Per axis, whether the block's first and its last plane are those of the volume.

    Returns
    -------
    Clusters
    """
    slices, rows, columns = shape
    assert runs.start.size < 2**31
    number = np.empty(runs.start.size, np.int32)
    by_row, changed = planes.reshape(len(planes), slices * rows, -1), runs.changed.reshape(slices * rows, -1)
    count = _label(by_row, rows, runs.index, changed, number, np.empty_like(number))
    voxels, of_phase = np.zeros(count, np.int64), np.zeros(count, np.uint8)
    _measure(columns, runs.start, runs.index, runs.phase, number, voxels, of_phase)

    def painted(first_row: int, step: int, lines: int) -> np.ndarray:
        plane = np.empty((lines, columns), np.int32)
        _paint(runs.start, runs.index, number, first_row, step, plane)
        return plane

    rows_of = number[runs.index[:-1]], number[runs.index[1:] - 1]
    first = painted(0, 1, rows), painted(0, rows, slices), rows_of[0].reshape(slices, rows)
    last = (painted((slices - 1) * rows, 1, rows), painted(rows - 1, rows, slices), rows_of[1].reshape(slices, rows))
    faces = np.zeros(count, np.uint8)
    for sides, bits in ((first, _LOW), (last, _HIGH)):
        for plane, bit in zip(sides, bits, strict=True):
            met = np.zeros(count, bool)
            met[plane.ravel()] = True
            faces[met] |= bit
    open_ = np.flatnonzero(faces)
    shut = faces == 0
    at_ends = sum(_LOW[axis] * low + _HIGH[axis] * high for axis, (low, high) in enumerate(outer))
    largest = np.zeros(phases, np.int64)
    np.maximum.at(largest, of_phase[shut], voxels[shut])
    return Clusters(
        place * _BLOCK + open_,
        of_phase[open_],
        voxels[open_],
        faces[open_] & np.uint8(at_ends),
        np.bincount(of_phase[shut], minlength=phases),
        largest,
        first,
        last,
    )


def touching(
    phases: tuple[np.ndarray, np.ndarray], numbers: tuple[np.ndarray, np.ndarray], places: tuple[int, int]
) -> np.ndarray:
    """Find the clusters that meet where one block ends and the next begins.

    Parameters
    ----------
    phases : tuple of np.ndarray
        Phases of the last plane of the first block, and of the first plane of the second block.
    numbers : tuple of np.ndarray
        Numbers of the clusters in the same two planes.
    places : tuple of int
        Numbers of the two blocks in the volume.

    Returns
    -------
    np.ndarray
        int64 (pairs, 2): names of clusters of the same phase that meet.
    """
    same = phases[0] == phases[1]
    # A pair of numbers below 2³¹ in one word sorts faster than rows do.
    both = np.unique(numbers[0][same].astype(np.int64) * _BLOCK + numbers[1][same])
    return np.stack([both // _BLOCK + places[0] * _BLOCK, both % _BLOCK + places[1] * _BLOCK], axis=1)


@compiled
def _join(parent, pairs):
    for k in range(pairs.shape[0]):
        merge(parent, pairs[k, 0], pairs[k, 1])
    for i in range(parent.size):
        parent[i] = root(parent, i)


def join(blocks: Sequence[Clusters], pairs: Sequence[np.ndarray], voxels: np.ndarray) -> list[Connected]:
    """Unite the clusters of all blocks that meet, and describe the connectivity of each phase.

    Parameters
    ----------
    blocks : sequence of Clusters
        The clusters of each block. Only `name`, `phase`, `voxels`, `faces`, `inside` and `largest_inside` are used.
    pairs : sequence of np.ndarray
        int64 (pairs, 2) each: names of clusters that meet, as `touching` returns them.
    voxels : np.ndarray
        Voxels of each phase in the volume.

    Returns
    -------
    list of Connected
        One for each phase.
    """
    phases = len(voxels)
    name, phase, size, faces = (
        np.concatenate([getattr(b, what) for b in blocks]) for what in ("name", "phase", "voxels", "faces")
    )
    order = np.argsort(name)
    name, phase, size, faces = name[order], phase[order], size[order], faces[order]
    parent = np.arange(name.size, dtype=np.int64)
    met = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    _join(parent, np.searchsorted(name, met))
    joined, touched = np.zeros(name.size, np.int64), np.zeros(name.size, np.uint8)
    np.add.at(joined, parent, size)
    np.bitwise_or.at(touched, parent, faces)
    root = parent == np.arange(name.size)
    found = []
    for p in range(phases):
        own = root & (phase == p)
        through = [(touched & (low | high)) == low | high for low, high in zip(_LOW, _HIGH, strict=True)]
        z, y, x = (int(joined[own & one].sum()) for one in through)
        found.append(
            Connected(
                voxels=int(voxels[p]),
                clusters=int(own.sum()) + sum(int(b.inside[p]) for b in blocks),
                largest=max(int(joined[own].max(initial=0)), *(int(b.largest_inside[p]) for b in blocks)),
                percolating=(z, y, x),
            )
        )
    return found
