"""Chords: runs of one phase along an axis, stitched exactly across blocks (Dahari 2022, fig. 10).

`runs_of` finds the runs of a block and counts those that end inside it; `stitch` carries the open run of every line
from block to block along an axis. A chord that touches an outer face of the volume is cut there, its true length
unknown: it is counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcres.compiled import compiled
from hpcres.simd.words import popcount, trailing_zeros


class Ends(NamedTuple):
    """First and last run of every line of a block along an axis.

    The phases are uint8 and the lengths int32. Each array has the shape of the block's face.
    """

    first_phase: np.ndarray
    first: np.ndarray
    last_phase: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Runs along x.

    Row r = z · rows + y holds the runs index[r] … index[r + 1] − 1. Each run has a phase (uint8) and a start (int32).
    `changed`, uint64 (z, y, word), has a bit where a run begins that is not the first of its row.
    """

    start: np.ndarray
    index: np.ndarray
    phase: np.ndarray
    changed: np.ndarray


@compiled
def _changes(planes, z, y, before_z, before_y, w):
    """Find the voxels of a word whose phase differs from that of the voxel beside them in another row."""
    found = np.uint64(0)
    for p in range(planes.shape[0]):
        found |= planes[p, z, y, w] ^ planes[p, before_z, before_y, w]
    return found


@compiled
def _down(block, planes, axis, chords, first, last):
    """Count the chords (phase, length) inside a block along z (axis 0) or y (axis 1).

    `first` and `last` (line) receive the lengths of the open ends.
    """
    slices, rows, words = block.shape[0], block.shape[1], planes.shape[3]
    columns = block.shape[2]
    begun = np.zeros((rows if axis == 0 else 1, columns), np.int32)
    first[:] = np.int32(block.shape[axis])
    for z in range(slices):
        if axis == 1:
            begun[:] = np.int32(0)
        for y in range(rows):
            at = z if axis == 0 else y
            if at == 0:
                continue
            line, side = (y, y) if axis == 0 else (0, z)
            bz, by = (z - 1, y) if axis == 0 else (z, y - 1)
            for w in range(words):
                bits = _changes(planes, z, y, bz, by, w)
                while bits:
                    x = 64 * w + int(trailing_zeros(bits))
                    bits &= bits - np.uint64(1)
                    if x >= columns:
                        break
                    length = at - begun[line, x]
                    if begun[line, x] == 0:
                        first[side, x] = length
                    else:
                        chords[block[bz, by, x], length] += 1
                    begun[line, x] = at
        if axis == 1:
            for x in range(columns):
                last[z, x] = rows - begun[0, x]
    if axis == 0:
        for y in range(rows):
            for x in range(columns):
                last[y, x] = slices - begun[y, x]


@compiled
def _count_runs(planes, columns):
    """Find the changes of phase along the rows, and count the runs of each row.

    The changes leave out the first run of a row. Element r + 1 of the count is the number of runs in row r.
    """
    n, slices, rows, words = planes.shape
    changed, count = np.zeros((slices, rows, words), np.uint64), np.zeros(slices * rows + 1, np.int64)
    rest = np.uint64(columns % 64)
    last = (np.uint64(1) << rest) - np.uint64(1) if columns % 64 else ~np.uint64(0)
    for z in range(slices):
        for y in range(rows):
            for p in range(n):
                carry = planes[p, z, y, 0] & np.uint64(1)
                for w in range(words):
                    word = planes[p, z, y, w]
                    changed[z, y, w] |= word ^ ((word << np.uint64(1)) | carry)
                    carry = word >> np.uint64(63)
            changed[z, y, words - 1] &= last
            found = 1
            for w in range(words):
                bits = changed[z, y, w]
                while bits:
                    bits &= bits - np.uint64(1)
                    found += 1
            count[z * rows + y + 1] = found
    return changed, count


@compiled
def _row_runs(block, changed, index, start, phase, chords, first, last):
    slices, rows, columns = block.shape
    for z in range(slices):
        for y in range(rows):
            at, begun = index[z * rows + y], 0
            start[at], phase[at] = 0, block[z, y, 0]
            for w in range(changed.shape[2]):
                bits = changed[z, y, w]
                while bits:
                    x = 64 * w + int(trailing_zeros(bits))
                    bits &= bits - np.uint64(1)
                    if begun:
                        chords[block[z, y, x - 1], x - begun] += 1
                    else:
                        first[z, y] = x
                    at += 1
                    start[at], phase[at] = x, block[z, y, x]
                    begun = x
            if begun == 0:
                first[z, y] = columns
            last[z, y] = columns - begun


def runs_of(block: np.ndarray, planes: np.ndarray, phases: int) -> tuple[list[np.ndarray], list[Ends], Rows]:
    """Find the runs of a block, and count the chords that touch none of its faces.

    Parameters
    ----------
    block : np.ndarray
        uint8 (z, y, x), every value below `phases`.
    planes : np.ndarray
        What `bitplanes.pack` makes of the block.
    phases : int
        Number of phases.

    Returns
    -------
    inside : list of np.ndarray
        Per axis, int64 (phase, length): chords that begin and end inside the block and touch none of its faces.
    ends : list of Ends
        Per axis, the first and the last run of every line.
    rows : Rows
        The runs along x.
    """
    inside = [np.zeros((phases, n + 1), np.int64) for n in block.shape]
    first, last = ([np.zeros(np.delete(block.shape, axis), np.int32) for axis in range(3)] for _ in range(2))
    for axis in (0, 1):
        _down(block, planes, axis, inside[axis], first[axis], last[axis])
    changed, count = _count_runs(planes, block.shape[2])
    index = np.cumsum(count)
    rows = Rows(np.empty(index[-1], np.int32), index, np.empty(index[-1], np.uint8), changed)
    _row_runs(block, changed, index, rows.start, rows.phase, inside[2], first[2], last[2])
    faces = [(block.take(0, axis), block.take(-1, axis)) for axis in range(3)]
    ends = [Ends(low, f, high, b) for (low, high), f, b in zip(faces, first, last, strict=True)]
    return inside, ends, rows


@compiled
def _add_rows(planes, in_z, in_y):
    for p in range(planes.shape[0]):
        for z in range(planes.shape[1]):
            for y in range(planes.shape[2]):
                found, row = np.uint64(0), planes[p, z, y]
                for w in range(row.shape[0]):
                    found += popcount(row[w])
                in_z[p, z] += np.int64(found)
                in_y[p, y] += np.int64(found)


def in_planes(block: np.ndarray, planes: np.ndarray, turned: np.ndarray, phases: int) -> list[np.ndarray]:
    """Count the voxels of each phase in the planes of a block normal to z, y and x.

    Parameters
    ----------
    block : np.ndarray
        Labels (z, y, x); only its shape and size are used.
    planes, turned : np.ndarray
        What `bitplanes.pack` and `bitplanes.transposed` make of the block.
    phases : int
        Number of phases.

    Returns
    -------
    list of np.ndarray
        Per axis, int64 (phase, plane).
    """
    found = [np.zeros((phases, n), np.int64) for n in block.shape]
    _add_rows(planes[: phases - 1], found[0], found[1])
    _add_rows(turned[: phases - 1], np.zeros_like(found[0]), found[2])
    for axis, of in enumerate(found):
        of[-1] = block.size // block.shape[axis] - of[:-1].sum(0)
    return found


@compiled
def _stitch(open_phase, open_length, first_phase, first, last_phase, last, position, thickness, whole, cut):
    for line in range(first.size):
        phase, length = first_phase[line], first[line]
        goes_on = length == thickness
        if position and open_phase[line] == phase:
            length += open_length[line]
        elif position:
            run = open_length[line]
            if run == position:  # it began at the volume's face
                cut[open_phase[line], run] += 1
            else:
                whole[open_phase[line], run] += 1
        if goes_on:
            open_phase[line], open_length[line] = phase, length
        else:
            if length == position + first[line]:
                cut[phase, length] += 1
            else:
                whole[phase, length] += 1
            open_phase[line], open_length[line] = last_phase[line], last[line]


@dataclass(frozen=True)
class Carry:
    """State of a column of blocks along an axis: the open run of every line, and the chords closed so far.

    `position` is the number of voxels covered along the axis. `phase` (uint8) and `length` (int32) are per line.
    `whole` and `cut` are int64 (phase, length 0 … axis length).
    """

    position: int
    phase: np.ndarray
    length: np.ndarray
    whole: np.ndarray
    cut: np.ndarray


def stitch(before: Carry | None, ends: Ends, inside: np.ndarray, thickness: int, axis_length: int) -> Carry:
    """Append the next block of a column to `before`.

    At the far face of the volume, the open runs are counted as cut.

    Parameters
    ----------
    before : Carry or None
        The column so far; None at the volume's first face.
    ends : Ends
        First and last runs of the next block along the axis.
    inside : np.ndarray
        int64 (phase, length): chords inside the next block.
    thickness : int
        Voxels of the next block along the axis.
    axis_length : int
        Voxels of the volume along the axis.

    Returns
    -------
    Carry
        The column with the next block; `before` is not changed.
    """
    phases = inside.shape[0]
    if before is None:
        lines = ends.first.size
        position, phase, length = 0, np.zeros(lines, np.uint8), np.zeros(lines, np.int32)
        whole, cut = (np.zeros((phases, axis_length + 1), np.int64) for _ in range(2))
    else:
        position, phase, length = before.position, before.phase.copy(), before.length.copy()
        whole, cut = before.whole.copy(), before.cut.copy()
    whole[:, : thickness + 1] += inside
    first_phase, first, last_phase, last = (np.ascontiguousarray(one).ravel() for one in ends)
    _stitch(phase, length, first_phase, first, last_phase, last, position, thickness, whole, cut)
    position += thickness
    if position == axis_length:
        np.add.at(cut, (phase, length), 1)
        phase, length = phase[:0], length[:0]
    return Carry(position, phase, length, whole, cut)
