"""The coarse levels: graphs of aggregates. An aggregate is a connected part of conducting voxels of one cell.

Cells of level 1 are 2×2×2 voxels, those of the next level 2×2×2 cells, and so on. An edge joins parts of cells that
share a face, so the graph has two colours, those of the cells' parity, unless a periodic axis has an odd number of
cells. Red parts come first; parts of one colour are in the order of rows of cells (z, y), then x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np

compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")
CHUNK = 1 << 15  # parts that one thread takes at a time
DENSE = 160  # parts of a level that is solved by its inverse


@dataclass
class Level:
    """A weighted graph: part i has neighbours places[starts[i] … starts[i + 1]]; all conductances in float32."""

    cells: tuple[int, int, int]
    rows: np.ndarray  # (2, rows of cells + 1), int64: where the parts of a row begin, red and black
    starts: np.ndarray
    places: np.ndarray
    values: np.ndarray
    diagonal: np.ndarray
    odd: bool  # edges between parts of one colour: across a periodic axis with an odd number of cells
    parent: np.ndarray | None = None  # the part of the next level that each is in
    inverse: np.ndarray | None = None
    b: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    x: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    spare: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def parts(self) -> int:
        return len(self.diagonal)

    @property
    def red(self) -> int:
        return int(self.rows[1, 0])

    @property
    def bytes(self) -> int:
        arrays = (self.rows, self.starts, self.places, self.values, self.diagonal, self.b, self.x, self.spare)
        return sum(a.nbytes for a in arrays) + sum(a.nbytes for a in (self.parent, self.inverse) if a is not None)

    def take_vectors(self) -> None:
        self.b, self.x = np.zeros(self.parts, np.float32), np.zeros(self.parts, np.float32)
        if self.odd:
            self.spare = np.zeros(self.parts, np.float32)


# ---- a cycle -----------------------------------------------------------------------------------------------


@compiled
def relax_from_zero(b, diagonal, x, begin, end):
    for i in range(begin, end):
        x[i] = b[i] / diagonal[i]


@compiled
def relax(starts, places, values, diagonal, b, x, out, begin, end):
    """One colour from the other."""
    for i in range(begin, end):
        s = b[i]
        for k in range(starts[i], starts[i + 1]):
            s += values[k] * x[places[k]]
        out[i] = s / diagonal[i]


@compiled
def residual(starts, places, values, diagonal, b, x, i):
    s = b[i] - diagonal[i] * x[i]
    for k in range(starts[i], starts[i + 1]):
        s += values[k] * x[places[k]]
    return s


@compiled
def restrict(
    starts, places, values, diagonal, b, x, parent, rows, rows_next, cells, cells_next, colours, row0, row1, coarse
):  # fmt: skip
    """coarse = the residual of `colours` colours (1: red, which is all there is after a sweep), summed over each part.

    For the rows row0 … row1 - 1 of the next level's cells, which nobody else writes.
    """
    for row in range(row0, row1):
        for colour in range(2):
            coarse[rows_next[colour, row] : rows_next[colour, row + 1]] = 0
        z, y = row // cells_next[1], row % cells_next[1]
        for d in range(4):
            zz, yy = 2 * z + (d >> 1), 2 * y + (d & 1)
            if zz >= cells[0] or yy >= cells[1]:
                continue
            at = zz * cells[1] + yy
            for colour in range(colours):
                for i in range(rows[colour, at], rows[colour, at + 1]):
                    coarse[parent[i]] += residual(starts, places, values, diagonal, b, x, i)


@compiled
def prolong(coarse, parent, x, scale, begin, end):
    for i in range(begin, end):
        x[i] += scale * coarse[parent[i]]


@compiled
def multiply_dense(matrix, b, x):
    for i in range(len(x)):
        s = np.float32(0)
        for j in range(len(b)):
            s += matrix[i, j] * b[j]
        x[i] = s


# ---- set-up ------------------------------------------------------------------------------------------------


@compiled
def count_members(numbers, cells_next, row0, row1):
    """The largest number of parts in one cell of the next level."""
    most = 0
    for row in range(row0, row1):
        z, y = row // cells_next[1], row % cells_next[1]
        for x in range(cells_next[2]):
            n = 0
            for zz in range(2 * z, min(2 * z + 2, numbers.shape[0])):
                for yy in range(2 * y, min(2 * y + 2, numbers.shape[1])):
                    for xx in range(2 * x, min(2 * x + 2, numbers.shape[2])):
                        n += numbers[zz, yy, xx]
            most = max(most, n)
    return most


@compiled
def _gather_members(numbers, rows, place, z, y, x, members):
    """Parts of the 8 cells below; `place` (4, 2) moves on along the rows."""
    n = 0
    for d in range(4):
        zz, yy = 2 * z + (d >> 1), 2 * y + (d & 1)
        if zz >= numbers.shape[0] or yy >= numbers.shape[1]:
            continue
        for xx in range(2 * x, min(2 * x + 2, numbers.shape[2])):
            colour = zz + yy + xx & 1
            for _ in range(numbers[zz, yy, xx]):
                members[n] = place[d, colour]
                place[d, colour] += 1
                n += 1
    return n


@compiled
def _start_rows(rows, cells, z, y, place):
    for d in range(4):
        zz, yy = 2 * z + (d >> 1), 2 * y + (d & 1)
        if zz < cells[0] and yy < cells[1]:
            for colour in range(2):
                place[d, colour] = rows[colour, zz * cells[1] + yy]


@compiled
def _root(up, i):
    while up[i] != i:
        up[i] = up[up[i]]
        i = up[i]
    return i


@compiled
def join_parts(starts, places, numbers, rows, cells_next, most, row0, row1, parent, numbers_next, counts):
    """parent = which connected part of its next cell each is in (0, 1, …); numbers_next, how many each cell has."""
    members, up = np.empty(most, np.int64), np.empty(most, np.int64)
    place = np.zeros((4, 2), np.int64)
    for row in range(row0, row1):
        z, y = row // cells_next[1], row % cells_next[1]
        _start_rows(rows, numbers.shape, z, y, place)
        both = np.zeros(2, np.int64)
        for x in range(cells_next[2]):
            n = _gather_members(numbers, rows, place, z, y, x, members)
            for m in range(n):
                parent[members[m]] = m
                up[m] = m
            for m in range(n):
                i = members[m]
                for k in range(starts[i], starts[i + 1]):
                    j = places[k]
                    # Where another thread works, `parent` may be anything; only our own members are where it says.
                    other = parent[j]
                    if 0 <= other < n and members[other] == j:
                        a, b = _root(up, m), _root(up, other)
                        if a != b:
                            up[max(a, b)] = min(a, b)
            found = 0
            for m in range(n):
                if up[m] == m:
                    found += 1
            # Numbered in the order of their first members.
            label = 0
            for m in range(n):
                if up[m] == m:
                    parent[members[m]] = label
                    label += 1
                else:
                    parent[members[m]] = parent[members[_root(up, m)]]
            numbers_next[z, y, x] = found
            both[z + y + x & 1] += found
        counts[0, row], counts[1, row] = both[0], both[1]


@compiled
def number_parts(numbers, rows, rows_next, numbers_next, most, row0, row1, parent):
    """parent: from the number within a cell to the number within the level."""
    members, place, begin = np.empty(most, np.int64), np.zeros((4, 2), np.int64), np.zeros(2, np.int64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        _start_rows(rows, numbers.shape, z, y, place)
        begin[0], begin[1] = rows_next[0, row], rows_next[1, row]
        for x in range(numbers_next.shape[2]):
            n = _gather_members(numbers, rows, place, z, y, x, members)
            for m in range(n):
                parent[members[m]] += begin[z + y + x & 1]
            begin[z + y + x & 1] += numbers_next[z, y, x]


@compiled
def connect(
    starts, places, values, to_faces, numbers, rows, numbers_next, rows_next, parent, most, row0, row1,
    starts_next, places_next, values_next, to_faces_next, fill,
):  # fmt: skip
    """As `connect_parts`, from a level to the next: sums of the conductances between members of two parts."""
    members, place, begin = np.empty(most, np.int64), np.zeros((4, 2), np.int64), np.zeros(2, np.int64)
    near, sums = np.empty(64, np.int64), np.empty(64, np.float64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        _start_rows(rows, numbers.shape, z, y, place)
        begin[0], begin[1] = rows_next[0, row], rows_next[1, row]
        for x in range(numbers_next.shape[2]):
            n = _gather_members(numbers, rows, place, z, y, x, members)
            colour = z + y + x & 1
            for own in range(begin[colour], begin[colour] + numbers_next[z, y, x]):
                found = 0
                for m in range(n):
                    i = members[m]
                    if parent[i] != own:
                        continue
                    if fill:
                        to_faces_next[own] += to_faces[i]
                    for k in range(starts[i], starts[i + 1]):
                        other = parent[places[k]]
                        if other == own:
                            continue
                        at = 0
                        while at < found and near[at] != other:
                            at += 1
                        if at == found:
                            if found == len(near):
                                near, sums = np.append(near, near), np.append(sums, sums)
                            near[found], sums[found] = other, 0
                            found += 1
                        sums[at] += values[k]
                if fill:
                    for at in range(found):
                        places_next[starts_next[own] + at] = near[at]
                        values_next[starts_next[own] + at] = sums[at]
                else:
                    starts_next[own + 1] = found
            begin[colour] += numbers_next[z, y, x]


@compiled
def sum_diagonal(starts, values, to_faces, diagonal, begin, end):
    for i in range(begin, end):
        s = np.float64(to_faces[i])
        for k in range(starts[i], starts[i + 1]):
            s += values[k]
        diagonal[i] = s


Each = Callable[[Callable[..., Any], int, int], list[Any]]
"""each(function(begin, end), number, at a time): runs it over 0 … number, in parallel; results in order."""


def accumulated(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """(2, rows) counts as where each row begins, red before black: (2, rows + 1) and the total."""
    ends = np.cumsum(counts.reshape(-1), dtype=np.int64)
    starts = np.concatenate([[0], ends])
    rows = counts.shape[1]
    return np.stack([starts[: rows + 1], starts[rows:]]), int(starts[-1])


def index_type(number: int) -> Any:
    return np.int32 if number < 2**31 else np.int64


def running(starts: np.ndarray) -> np.ndarray:
    """Counts in starts[1:] summed up in place, as 32-bit numbers where they fit."""
    np.cumsum(starts, out=starts, dtype=np.int64)
    return starts.astype(np.int32) if starts[-1] < 2**31 else starts


def coarser(level: Level, numbers: np.ndarray, to_faces: np.ndarray, periodic: tuple[bool, ...], each: Each) -> (
    tuple[Level, np.ndarray, np.ndarray]
):  # fmt: skip
    """The next level, how many parts each of its cells has, and their conductances to the faces."""
    cells: Any = tuple(-(-n // 2) for n in level.cells)
    rows = cells[0] * cells[1]
    step = max(1, rows // 64)
    most = max(each(lambda a, b: count_members(numbers, cells, a, b), rows, step))
    numbers_next, counts = np.zeros(cells, np.int32), np.zeros((2, rows), np.int64)
    parent = np.full(level.parts, -1, index_type(level.parts))
    graph = (level.starts, level.places)
    each(
        lambda a, b: join_parts(*graph, numbers, level.rows, cells, most, a, b, parent, numbers_next, counts), rows,
        step,
    )  # fmt: skip
    rows_next, parts = accumulated(counts)
    each(lambda a, b: number_parts(numbers, level.rows, rows_next, numbers_next, most, a, b, parent), rows, step)
    starts, nothing = np.zeros(parts + 1, np.int64), (np.empty(0, level.places.dtype), np.empty(0, np.float32))
    to_faces_next = np.zeros(parts, np.float32)
    shared = (
        *graph, level.values, to_faces, numbers, level.rows, numbers_next, rows_next, parent, most,
    )  # fmt: skip
    each(lambda a, b: connect(*shared, a, b, starts, *nothing, to_faces_next, False), rows, step)
    starts = running(starts)
    places, values = np.empty(starts[-1], index_type(parts)), np.empty(starts[-1], np.float32)
    each(lambda a, b: connect(*shared, a, b, starts, places, values, to_faces_next, True), rows, step)
    diagonal = np.empty(parts, np.float32)
    each(lambda a, b: sum_diagonal(starts, values, to_faces_next, diagonal, a, b), parts, CHUNK)
    level.parent = parent
    odd = any(p and n % 2 for p, n in zip(periodic, cells, strict=True))
    return Level(cells, rows_next, starts, places, values, diagonal, odd), numbers_next, to_faces_next


def cycle(levels: list[Level], at: int, each: Each, visits: int = 2) -> None:
    """levels[at].x ≈ A⁻¹ b by `visits` W-cycles from zero, each symmetric: red, black, the coarse part, black, red."""
    level = levels[at]
    if at + 1 == len(levels):
        if level.inverse is not None:
            multiply_dense(level.inverse, level.b, level.x)
        else:
            each(lambda a, b: relax_from_zero(level.b, level.diagonal, level.x, a, b), level.parts, CHUNK)
        return
    below = levels[at + 1]
    red, parts, x, b = level.red, level.parts, level.x, level.b
    graph = (level.starts, level.places, level.values, level.diagonal, b)
    rows = below.cells[0] * below.cells[1]
    scale = np.float32(2.0)

    def sweep(begin: int, end: int) -> None:
        if level.odd:
            spare = level.spare
            each(lambda i, j: relax(*graph, x, spare, begin + i, begin + j), end - begin, CHUNK)
            x[begin:end] = spare[begin:end]
        else:
            each(lambda i, j: relax(*graph, x, x, begin + i, begin + j), end - begin, CHUNK)

    for visit in range(visits):
        if visit == 0:
            each(lambda i, j: relax_from_zero(b, level.diagonal, x, i, j), red, CHUNK)
            x[red:] = 0
        elif level.odd:
            sweep(0, red)
        sweep(red, parts)
        each(
            lambda i, j: restrict(
                *graph, x, level.parent, level.rows, below.rows, level.cells, below.cells, 2 if level.odd else 1, i, j,
                below.b,
            ),
            rows, max(1, rows // 64) if parts > CHUNK else rows,
        )  # fmt: skip
        cycle(levels, at + 1, each)
        each(lambda i, j: prolong(below.x, level.parent, x, scale, i, j), parts if level.odd else red, CHUNK)
        sweep(red, parts)
        sweep(0, red)
