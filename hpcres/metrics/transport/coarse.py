"""The coarse levels: graphs of aggregates. An aggregate is a connected part of conducting voxels of one cell.

Cells of level 1 are 2×2×2 voxels, those of the next level 2×2×2 cells, and so on. An edge joins parts of cells that
share a face, so the graph has two colours, those of the cells' parity, unless a periodic axis has an odd number of
cells. Red parts come first; parts of one colour are in the order of rows of cells (z, y), then x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")
inlined: Any = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
OVERCORRECTION = 2.0  # a coarse operator times one half: aggregates are stiffer than what they stand for
SLOTS = 6  # neighbours of a part that are stored with it; few have more
CHUNK = 1 << 14  # parts that one thread takes at a time
DENSE = 160  # parts of a level that is solved by its inverse


@dataclass
class Graph:
    """Part i has neighbours places[starts[i] … starts[i + 1]] over conductances values (float32)."""

    starts: np.ndarray
    places: np.ndarray
    values: np.ndarray
    to_faces: np.ndarray  # conductance of each part to the two outer faces
    numbers: np.ndarray  # parts of each cell (z, y, x)


@dataclass
class Level:
    """The same graph as cycles read it: six neighbours of every part (with value 0 where there are fewer), then the
    rest, in the order of parts."""

    rows: np.ndarray  # (2, rows of cells + 1), int64: where the parts of a row begin, red and black
    cells: tuple[int, int, int]
    odd: bool  # edges between parts of one colour: across a periodic axis with an odd number of cells
    diagonal: np.ndarray
    places: np.ndarray
    values: np.ndarray
    more: tuple[np.ndarray, np.ndarray, np.ndarray]
    parent: np.ndarray | None = None  # the part of the next level that each is in
    inverse: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.b, self.x, self.spare = (np.zeros(n, np.float32) for n in (self.parts, self.parts, self.parts * self.odd))

    @property
    def parts(self) -> int:
        return len(self.diagonal)

    @property
    def red(self) -> int:
        return int(self.rows[1, 0])

    @property
    def bytes(self) -> int:
        arrays = [self.rows, self.diagonal, self.places, self.values, *self.more, self.b, self.x, self.spare]
        return sum(a.nbytes for a in (*arrays, self.parent, self.inverse) if a is not None)


# ---- a cycle -----------------------------------------------------------------------------------------------


@compiled
def relax_from_zero(b, diagonal, x, begin, end):
    for i in range(begin, end):
        x[i] = b[i] / diagonal[i]


@inlined
def _first_after(numbers, i):
    """The first place in sorted numbers whose number is not below i."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) >> 1
        if numbers[middle] < i:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _neighbours(places, values, x, i):
    s = np.float32(0)
    for k in range(SLOTS):
        s += values[i, k] * x[places[i, k]]
    return s


@compiled
def relax(places, values, more_of, more_places, more_values, diagonal, b, x, out, begin, end):
    """One colour from the other."""
    for i in range(begin, end):
        out[i] = (b[i] + _neighbours(places, values, x, i)) / diagonal[i]
    k = _first_after(more_of, begin)
    while k < len(more_of) and more_of[k] < end:
        i = more_of[k]
        out[i] += more_values[k] * x[more_places[k]] / diagonal[i]
        k += 1


@compiled
def restrict(
    places, values, more_of, more_places, more_values, diagonal, b, x, parent, rows, rows_next, cells, cells_next,
    colours, row0, row1, coarse,
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
                begin, end = rows[colour, at], rows[colour, at + 1]
                for i in range(begin, end):
                    coarse[parent[i]] += b[i] - diagonal[i] * x[i] + _neighbours(places, values, x, i)
                k = _first_after(more_of, begin)
                while k < len(more_of) and more_of[k] < end:
                    coarse[parent[more_of[k]]] += more_values[k] * x[more_places[k]]
                    k += 1


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
def root(up, i):
    """Of a forest in which up[i] is nearer to the root; shortens the way as it goes."""
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
                        a, b = root(up, m), root(up, other)
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
                    parent[members[m]] = parent[members[root(up, m)]]
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
    starts, places, values, to_faces, numbers, rows, numbers_next, rows_next, parent, most, row0, row1, degrees,
    to_faces_next,
):  # fmt: skip
    """Neighbours of the next level's parts in some rows of cells, by colour: places and sums of conductances.

    degrees[i + 1] = the number of neighbours of part i.
    """
    members, place, begin = np.empty(most, np.int64), np.zeros((4, 2), np.int64), np.zeros(2, np.int64)
    room = np.zeros(2, np.int64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        for d in range(4):
            zz, yy = 2 * z + (d >> 1), 2 * y + (d & 1)
            if zz < numbers.shape[0] and yy < numbers.shape[1]:
                at = zz * numbers.shape[1] + yy
                for colour in range(2):
                    # A red cell below may lie in a black one of the next level.
                    room += starts[rows[colour, at + 1]] - starts[rows[colour, at]]
    red, black = (np.empty(room[0], places.dtype), np.empty(room[1], places.dtype))
    red_values, black_values = (np.empty(room[0], np.float32), np.empty(room[1], np.float32))
    used = np.zeros(2, np.int64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        _start_rows(rows, numbers.shape, z, y, place)
        begin[0], begin[1] = rows_next[0, row], rows_next[1, row]
        for x in range(numbers_next.shape[2]):
            n = _gather_members(numbers, rows, place, z, y, x, members)
            colour = z + y + x & 1
            near, sums = (black, black_values) if colour else (red, red_values)
            for own in range(begin[colour], begin[colour] + numbers_next[z, y, x]):
                first = used[colour]
                last = first
                for m in range(n):
                    i = members[m]
                    if parent[i] != own:
                        continue
                    to_faces_next[own] += to_faces[i]
                    for k in range(starts[i], starts[i + 1]):
                        other = parent[places[k]]
                        if other == own:
                            continue
                        at = first
                        while at < last and near[at] != other:
                            at += 1
                        if at == last:
                            near[at], sums[at] = other, 0
                            last += 1
                        sums[at] += values[k]
                degrees[own + 1] = last - first
                used[colour] = last
            begin[colour] += numbers_next[z, y, x]
    return red[: used[0]].copy(), red_values[: used[0]].copy(), black[: used[1]].copy(), black_values[: used[1]].copy()


@compiled
def fill_slots(starts, places, values, to_faces, diagonal, slots, slot_values, begin, end):
    """The first six neighbours of each part, and the sum of all its conductances; returns how many more there are."""
    more = 0
    for i in range(begin, end):
        s = np.float64(to_faces[i])
        for k in range(starts[i], starts[i + 1]):
            s += values[k]
        diagonal[i] = s
        number = min(SLOTS, starts[i + 1] - starts[i])
        for k in range(number):
            slots[i, k], slot_values[i, k] = places[starts[i] + k], values[starts[i] + k]
        for k in range(number, SLOTS):
            slots[i, k], slot_values[i, k] = slots[i, 0] if number else i, 0
        more += starts[i + 1] - starts[i] - number
    return more


@compiled
def fill_more(starts, places, values, more_of, more_places, more_values, at, begin, end):
    for i in range(begin, end):
        for k in range(starts[i] + SLOTS, starts[i + 1]):
            more_of[at], more_places[at], more_values[at] = i, places[k], values[k]
            at += 1


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
    """Counts in starts[1:] summed up, as 32-bit numbers where they fit."""
    sums = np.cumsum(starts, dtype=np.int64)
    return sums.astype(np.int32) if sums[-1] < 2**31 else sums


def as_level(graph: Graph, rows: np.ndarray, periodic: Sequence[bool], each: Each) -> Level:
    """The form that cycles use."""
    parts, kind = len(graph.to_faces), graph.places.dtype
    diagonal = np.empty(parts, np.float32)
    places, values = np.empty((parts, SLOTS), kind), np.empty((parts, SLOTS), np.float32)
    csr = (graph.starts, graph.places, graph.values)
    found = each(
        lambda a, b: fill_slots(*csr, graph.to_faces, diagonal, places, values, a, b), parts, CHUNK
    )
    before = np.concatenate([[0], np.cumsum(found)]).astype(np.int64)
    more = np.empty(before[-1], kind), np.empty(before[-1], kind), np.empty(before[-1], np.float32)
    each(lambda a, b: fill_more(*csr, *more, before[a // CHUNK], a, b), parts, CHUNK)
    cells: Any = graph.numbers.shape
    odd = any(p and n % 2 for p, n in zip(periodic, cells, strict=True))
    return Level(rows, cells, odd, diagonal, places, values, more)


def coarser(level: Level, graph: Graph, each: Each) -> tuple[Graph, np.ndarray]:
    """The graph of the next level, and its rows; sets `parent`."""
    numbers, below = graph.numbers.astype(np.int32, copy=False), tuple(-(-n // 2) for n in level.cells)
    rows = below[0] * below[1]
    step = max(1, rows // 64)
    most = max(each(lambda a, b: count_members(numbers, below, a, b), rows, step))
    numbers_next, counts = np.zeros(below, np.int32), np.zeros((2, rows), np.int64)
    parent = np.full(level.parts, -1, graph.places.dtype)
    csr = (graph.starts, graph.places)
    each(
        lambda a, b: join_parts(*csr, numbers, level.rows, below, most, a, b, parent, numbers_next, counts), rows, step
    )
    rows_next, parts = accumulated(counts)
    each(lambda a, b: number_parts(numbers, level.rows, rows_next, numbers_next, most, a, b, parent), rows, step)
    degrees, to_faces = np.zeros(parts + 1, np.int32), np.zeros(parts, np.float32)
    found = each(
        lambda a, b: connect(
            *csr, graph.values, graph.to_faces, numbers, level.rows, numbers_next, rows_next, parent, most, a, b,
            degrees, to_faces,
        ),
        rows, step,
    )  # fmt: skip
    # Units come in the order of rows, so red ones one after the other, then black ones, are in the order of parts.
    kind = index_type(parts)
    places = np.concatenate([part[0] for part in found] + [part[2] for part in found]).astype(kind, copy=False)
    values = np.concatenate([part[1] for part in found] + [part[3] for part in found])
    level.parent = parent
    return Graph(running(degrees), places, values, to_faces, numbers_next), rows_next


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
    graph = (level.places, level.values, *level.more, level.diagonal, b)
    rows = below.cells[0] * below.cells[1]
    scale = np.float32(OVERCORRECTION)

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
