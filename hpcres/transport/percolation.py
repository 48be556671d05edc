"""Percolation: the clusters of conducting voxels that touch both faces.

They are found before any solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcres.counting.disjoint_sets import merge, root
from hpcres.simd.words import popcount
from hpcres.transport.cells import AGGREGATE, AGGREGATES, find_cells
from hpcres.transport.compiling import compiled
from hpcres.transport.threads import Threads

_SLABS = 16


@compiled
def _count(cells, counts, z0, z1):
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            n = 0
            for x in range(cells.shape[2]):
                n += AGGREGATES[cells[z, y, x]]
            counts[z, y] = n


@compiled
def _join_cells(up, cell, own, other, beyond, bit, near):
    """Join the aggregates of two neighbouring cells that touch.

    The aggregates begin at `own` and `beyond`; `other` lies in + direction.
    """
    touching = cell >> bit & other & near
    if AGGREGATES[cell] == 1 and AGGREGATES[other] == 1:
        if touching:
            merge(up, own, beyond)
        return
    for i in range(8):
        if touching >> i & 1:
            merge(up, own + AGGREGATE[cell, i + bit], beyond + AGGREGATE[other, i])


@compiled
def _join_rows(cells, starts, up, z0, z1, only_across):
    """Join aggregates in planes z0 … z1 - 1 of cells; or, `only_across`, those of plane z0 with the plane before."""
    _, rows, columns = cells.shape
    for z in range(z0, z1):
        for y in range(rows):
            here = starts[z * rows + y]
            above = starts[(z - 1) * rows + y] if z else np.int64(0)
            before = starts[z * rows + y - 1] if y else np.int64(0)
            back = z > z0 or only_across
            for x in range(columns):
                cell = np.int64(cells[z, y, x])
                number = np.int64(AGGREGATES[cell])
                if cell:
                    if not only_across:
                        for aggregate in range(number):
                            up[here + aggregate] = here + aggregate
                        if x and cells[z, y, x - 1]:
                            other = np.int64(cells[z, y, x - 1])
                            _join_cells(up, other, here - AGGREGATES[other], cell, here, 1, 0x55)
                        if y and cells[z, y - 1, x]:
                            _join_cells(up, np.int64(cells[z, y - 1, x]), before, cell, here, 2, 0x33)
                    if back and cells[z - 1, y, x]:
                        _join_cells(up, np.int64(cells[z - 1, y, x]), above, cell, here, 4, 0x0F)
                here += number
                if y:
                    before += AGGREGATES[cells[z, y - 1, x]]
                if back:
                    above += AGGREGATES[cells[z - 1, y, x]]


@compiled
def _line(cells, starts, z, y, columns, aggregates):
    """Set `aggregates` to the aggregates of a row of voxels, -1 where they insulate."""
    at = starts[(z >> 1) * cells.shape[1] + (y >> 1)]
    for x in range(columns):
        cell = cells[z >> 1, y >> 1, x >> 1]
        place = 4 * (z & 1) + 2 * (y & 1) + (x & 1)
        aggregates[x] = at + AGGREGATE[cell, place] if cell >> place & 1 else -1
        if x & 1:
            at += AGGREGATES[cell]


@compiled
def _join_sides(cells, starts, up, shape, axis):
    """Join the aggregates that meet across the two sides normal to `axis`."""
    a, b = np.empty(shape[2], np.int64), np.empty(shape[2], np.int64)
    for i in range(shape[1 if axis == 0 else 0]):
        if axis == 2:
            for j in range(shape[1]):
                _line(cells, starts, i, j, shape[2], a)
                if a[0] >= 0 and a[-1] >= 0:
                    merge(up, a[0], a[-1])
            continue
        if axis == 0:
            _line(cells, starts, 0, i, shape[2], a)
            _line(cells, starts, shape[0] - 1, i, shape[2], b)
        else:
            _line(cells, starts, i, 0, shape[2], a)
            _line(cells, starts, i, shape[1] - 1, shape[2], b)
        for x in range(shape[2]):
            if a[x] >= 0 and b[x] >= 0:
                merge(up, a[x], b[x])


@compiled
def _flatten(up, begin, end):
    """Point every aggregate at its root; the number of a root is never above those of its aggregates."""
    for i in range(begin, end):
        up[i] = root(up, i)


@compiled
def _mark_faces(cells, starts, up, shape, touches):
    """Set the bits of touches[root]: bit 2 a for the first face normal to axis a, bit 2 a + 1 for the last."""
    line, rows, columns = np.empty(shape[2], np.int64), cells.shape[1], cells.shape[2]
    for z in range(shape[0]):
        for y in range(shape[1]):
            edge = 0
            if z == 0:
                edge |= 1
            if z == shape[0] - 1:
                edge |= 2
            if y == 0:
                edge |= 4
            if y == shape[1] - 1:
                edge |= 8
            if edge:
                _line(cells, starts, z, y, shape[2], line)
                for x in range(shape[2]):
                    if line[x] >= 0:
                        touches[up[line[x]]] |= edge
            row, place = (z >> 1) * rows + (y >> 1), 4 * (z & 1) + 2 * (y & 1)
            cell = cells[z >> 1, y >> 1, 0]
            if cell >> place & 1:
                touches[up[starts[row] + AGGREGATE[cell, place]]] |= 16
            cell, place = cells[z >> 1, y >> 1, columns - 1], place + (shape[2] - 1 & 1)
            if cell >> place & 1:
                touches[up[starts[row + 1] - AGGREGATES[cell] + AGGREGATE[cell, place]]] |= 32


@compiled
def _select(cells, starts, up, touches, both, bits, z0, z1):
    """Set the bits of the clusters that touch both faces; return the number of voxels of the others."""
    left_out = 0
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            at = starts[z * cells.shape[1] + y]
            for x in range(cells.shape[2]):
                cell = np.int64(cells[z, y, x])
                if not cell:
                    continue
                kept = 0
                for i in range(8):
                    if cell >> i & 1 and touches[up[at + AGGREGATE[cell, i]]] & both == both:
                        kept |= 1 << i
                at += AGGREGATES[cell]
                left_out += popcount(cell & ~kept)
                k, shift = (x >> 3) + 1, 2 * (x & 7)
                for d in range(4):
                    bits[2 * z + 1 + (d >> 1), 2 * y + 1 + (d & 1), k] |= (kept >> 2 * d & 3) << shift
    return left_out


@compiled
def _count_roots(up, touches, both, begin, end):
    """Count the clusters that do not touch both faces."""
    n = 0
    for i in range(begin, end):
        n += up[i] == i and touches[i] & both != both
    return n


@compiled
def _name(cells, starts, up, z, numbers):
    """Set `numbers` (y, x) to the root of each voxel of plane z, -1 where nothing conducts."""
    line = np.empty(numbers.shape[1], np.int64)
    for y in range(numbers.shape[0]):
        _line(cells, starts, z, y, numbers.shape[1], line)
        for x in range(numbers.shape[1]):
            numbers[y, x] = up[line[x]] if line[x] >= 0 else -1


@dataclass(frozen=True)
class Through:
    """The voxels whose clusters touch both faces, and the number of clusters and voxels left out."""

    bits: np.ndarray
    voxels: int
    clusters_left_out: int
    voxels_left_out: int


class Clusters:
    """The 6-connected clusters of conducting voxels (bits as in `rows`), found once for several directions.

    Clusters go on across the sides that meet (`periodic` z, y, x).
    """

    def __init__(self, bits: np.ndarray, shape: Sequence[int], periodic: Sequence[bool], threads: Threads) -> None:
        self._threads, self._shape = threads, bits.shape
        each = threads.each
        self._cells = np.empty(tuple(-(-n // 2) for n in shape), np.uint8)
        deep = self._cells.shape[0]
        step = max(1, -(-deep // _SLABS))
        self.voxels = sum(each(lambda a, b: find_cells(bits, (2, 2, 2), self._cells, a, b), deep, step))
        counts = np.empty(self._cells.shape[:2], np.int64)
        each(lambda a, b: _count(self._cells, counts, a, b), deep, step)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        aggregates = int(self._starts[-1])
        self._up = np.empty(aggregates, np.int32 if aggregates < 2**31 else np.int64)
        each(lambda a, b: _join_rows(self._cells, self._starts, self._up, a, b, False), deep, step)
        for z in range(step, deep, step):
            _join_rows(self._cells, self._starts, self._up, z, z + 1, True)
        size: Any = tuple(shape)
        self._size = size
        for axis in range(3):
            if periodic[axis]:
                _join_sides(self._cells, self._starts, self._up, size, axis)
        _flatten(self._up, 0, aggregates)
        self._touches = np.zeros(aggregates, np.uint8)
        _mark_faces(self._cells, self._starts, self._up, size, self._touches)

    @property
    def touches(self) -> np.ndarray:
        """Faces each cluster touches, by its number: bit 2 a for the first normal to axis a, 2 a + 1 for the last."""
        return self._touches

    @property
    def planes(self) -> int:
        """Number of planes of voxels."""
        return self._size[0]

    def plane(self, z: int) -> np.ndarray:
        """Return the number of the cluster of each voxel of a plane (y, x), -1 where nothing conducts."""
        numbers = np.empty(self._size[1:], np.int64)
        _name(self._cells, self._starts, self._up, z, numbers)
        return numbers

    def is_slab(self, first: bool, last: bool) -> None:
        """Say whether the first and the last plane are faces of the volume; by default both are."""
        self._touches &= np.uint8(60 | first | 2 * last)

    def through(self, axis: int) -> Through:
        """Find what conducts from one face normal to `axis` to the other."""
        both = 3 << 2 * axis
        bits = np.zeros(self._shape, np.uint16)
        deep, each = self._cells.shape[0], self._threads.each
        shared = (self._cells, self._starts, self._up, self._touches, both)
        out = sum(each(lambda a, b: _select(*shared, bits, a, b), deep, max(1, -(-deep // _SLABS))))
        clusters = sum(each(lambda a, b: _count_roots(self._up, self._touches, both, a, b), len(self._up), 1 << 20))
        return Through(bits, self.voxels - out, clusters, out)


# ---- percolation across slabs ------------------------------------------------------------------------------


@compiled
def _groups(a, b, up):
    """Set `up` to the first member of every node's group, where a[i] and b[i] are in one group."""
    for i in range(len(up)):
        up[i] = i
    for i in range(len(a)):
        merge(up, a[i], b[i])
    for i in range(len(up)):
        up[i] = root(up, i)


_SLAB = 1 << 44  # above any number of aggregates of one slab


def join_clusters(place: Any, found: list[Clusters], periodic: bool) -> list[int]:
    """Mark which faces of the volume the clusters of each slab touch through other slabs.

    Parameters
    ----------
    place : slabs.Place
        Where the slabs are.
    found : list of Clusters
        The clusters of each slab here.
    periodic : bool
        Whether the first and the last slab meet.

    Returns
    -------
    list of int
        For each axis, how many clusters were counted in more than one slab, of those that do not touch both faces.
    """
    last = [one.plane(one.planes - 1) for one in found]
    pairs, flags = [], []
    for number, one, before in zip(place.here, found, place.next_planes(last, periodic), strict=True):
        own = one.plane(0)
        both = np.empty((2, 0), np.int64)
        if before is not None:
            meet = (own >= 0) & (before >= 0)
            earlier = (number - 1) % len(place.extents)
            both = np.unique(np.stack([before[meet] + earlier * _SLAB, own[meet] + number * _SLAB]), axis=1)
        pairs.append(both)
        edge = np.unique(np.concatenate([own.reshape(-1), last[number - place.here[0]].reshape(-1)]))
        edge = edge[edge >= 0]
        flags.append((edge + number * _SLAB, one.touches[edge]))
    all_pairs, all_flags = place.everyone(pairs), place.everyone(flags)
    names = np.concatenate([names for names, _ in all_flags])
    touches = np.concatenate([touches for _, touches in all_flags])
    a, b = (np.searchsorted(names, np.concatenate([pair[i] for pair in all_pairs])) for i in range(2))
    up = np.empty(len(names), np.int64)
    _groups(a, b, up)
    together = np.zeros(len(names), np.uint8)
    np.bitwise_or.at(together, up, touches)
    members = np.bincount(up, minlength=len(names))
    for number, one in zip(place.here, found, strict=True):
        mine = slice(*np.searchsorted(names, [number * _SLAB, (number + 1) * _SLAB]))
        one.touches[names[mine] - number * _SLAB] = together[up[mine]]
    several = members > 1
    return [int((members[several & (together & both != both)] - 1).sum()) for both in (3, 12, 48)]
