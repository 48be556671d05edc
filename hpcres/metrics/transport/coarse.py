"""The coarse levels: graphs of aggregates. An aggregate is a connected part of conducting voxels of one cell.

Cells of level 1 are 2×2×2 voxels, those of the next level 2×2×2 cells, and so on. An edge joins parts of cells that
share a face, so the graph has two colours, those of the cells' parity, unless a periodic axis has an odd number of
cells. Red parts come first; parts of one colour are in the order of rows of cells (z, y), then x.

Voxels far from cubic and conductivities far apart need more (`Coarsening.robust`). Cells grow only along axes whose
pitch is at most twice the smallest, so that what is relaxed point by point and what is coarsened fit (semi-coarsening).
Members of a cell are one aggregate only where both ends of an edge find it strong: not below STRONG of the largest
conductance that either has. Else two particles that touch a poor conductor in one cell would have one potential. An
edge may then join parts of one cell, which have one colour; these are relaxed together, with the conductances between
them added to their diagonals once more, so that a sweep converges (l1 smoothing: Baker, Falgout, Kolev & Yang 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcres.metrics.transport.vectors import compiled, inlined

OVERCORRECTION = 2.0  # a coarse operator times one half: aggregates are stiffer than what they stand for
# A robust coarse operator stands for some fields exactly (particles of one potential, an axis that is not coarsened)
# and is too stiff by 2 for others. Between 1 and 2, a correction reduces both.
ROBUST_CORRECTION = 1.5
STRONG = 0.1  # of the largest conductance of a part
WIDEST_PITCH = 2.0  # of an axis that is coarsened, over the smallest pitch
SLOTS = 6  # neighbours of a part that are stored with it; few have more
CHUNK = 1 << 14  # parts that one thread takes at a time
DENSE = 160  # parts of a level that is solved by its inverse
FACTORED = 4000  # parts of a robust level of one cell that is solved by its factors, and the most of any
MOST_FACTORED = 50000


@dataclass(frozen=True)
class Coarsening:
    """How cells grow from one level to the next. pitch: edges z, y, x of a cell (a voxel on the finest level)."""

    pitch: tuple[float, float, float]
    robust: bool = False

    def step(self, cells: Sequence[int]) -> tuple[int, int, int]:
        """Cells of this level that make one of the next along z, y, x: 1 or 2."""
        if not self.robust:
            return 2, 2, 2
        left = [h for h, n in zip(self.pitch, cells, strict=True) if n > 1]
        widest = WIDEST_PITCH * (1 + 1e-9) * min(left, default=0.0)
        z, y, x = (2 if n > 1 and h <= widest else 1 for h, n in zip(self.pitch, cells, strict=True))
        return z, y, x

    def after(self, step: Sequence[int]) -> Coarsening:
        z, y, x = (h * s for h, s in zip(self.pitch, step, strict=True))
        return Coarsening((z, y, x), self.robust)


@dataclass
class Graph:
    """Part i has neighbours places[starts[i] … starts[i + 1]] over conductances values."""

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
    mixed: bool  # edges between parts of one colour: in a cell, or across a periodic axis with an odd number of cells
    diagonal: np.ndarray
    places: np.ndarray
    values: np.ndarray
    more: tuple[np.ndarray, np.ndarray, np.ndarray]
    to_faces: np.ndarray | None = None  # of a robust level, whose residuals are sums of currents
    step: tuple[int, int, int] = (2, 2, 2)  # of its cells, to one of the next level
    correction: float = OVERCORRECTION
    parent: np.ndarray | None = None  # the part of the next level that each is in
    inverse: np.ndarray | None = None
    factors: Any = None  # of the matrix of the last level where it has no inverse

    def __post_init__(self) -> None:
        sizes = (self.parts, self.parts, self.parts * self.mixed)
        self.b, self.x, self.spare = (np.zeros(n, self.diagonal.dtype) for n in sizes)

    @property
    def parts(self) -> int:
        return len(self.diagonal)

    @property
    def red(self) -> int:
        return int(self.rows[1, 0])

    @property
    def bytes(self) -> int:
        arrays = [self.rows, self.diagonal, self.places, self.values, *self.more, self.b, self.x, self.spare]
        return sum(a.nbytes for a in (*arrays, self.to_faces, self.parent, self.inverse) if a is not None)


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
    s = values.dtype.type(0)
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
    places, values, more_of, more_places, more_values, diagonal, b, x, to_faces, parent, rows, rows_next, cells,
    cells_next, step, colours, row0, row1, coarse,
):  # fmt: skip
    """coarse = the residual of `colours` colours (1: red, which is all there is after a sweep), summed over each part.

    For the rows row0 … row1 - 1 of the next level's cells, which nobody else writes. With to_faces the residual is a
    sum of currents: a particle of one potential leaves none in its inside, however well it conducts.
    """
    for row in range(row0, row1):
        for colour in range(2):
            coarse[rows_next[colour, row] : rows_next[colour, row + 1]] = 0
        z, y = row // cells_next[1], row % cells_next[1]
        for d in range(4):
            zz, yy = step[0] * z + (d >> 1), step[1] * y + (d & 1)
            if d >> 1 >= step[0] or d & 1 >= step[1] or zz >= cells[0] or yy >= cells[1]:
                continue
            at = zz * cells[1] + yy
            for colour in range(colours):
                begin, end = rows[colour, at], rows[colour, at + 1]
                if to_faces is None:
                    for i in range(begin, end):
                        coarse[parent[i]] += b[i] - diagonal[i] * x[i] + _neighbours(places, values, x, i)
                else:
                    for i in range(begin, end):
                        current = b[i] - to_faces[i] * x[i]
                        for k in range(SLOTS):
                            current += values[i, k] * (x[places[i, k]] - x[i])
                        coarse[parent[i]] += current
                k = _first_after(more_of, begin)
                while k < len(more_of) and more_of[k] < end:
                    i = more_of[k]
                    if to_faces is None:
                        coarse[parent[i]] += more_values[k] * x[more_places[k]]
                    else:
                        coarse[parent[i]] += more_values[k] * (x[more_places[k]] - x[i])
                    k += 1


@compiled
def prolong(coarse, parent, x, scale, begin, end):
    for i in range(begin, end):
        x[i] += scale * coarse[parent[i]]


@compiled
def multiply_dense(matrix, b, x):
    for i in range(len(x)):
        s = matrix.dtype.type(0)
        for j in range(len(b)):
            s += matrix[i, j] * b[j]
        x[i] = s


# ---- set-up ------------------------------------------------------------------------------------------------


@compiled
def count_members(numbers, cells_next, step, row0, row1):
    """The largest number of parts in one cell of the next level."""
    most = 0
    for row in range(row0, row1):
        z, y = row // cells_next[1], row % cells_next[1]
        for x in range(cells_next[2]):
            n = 0
            for zz in range(step[0] * z, min(step[0] * (z + 1), numbers.shape[0])):
                for yy in range(step[1] * y, min(step[1] * (y + 1), numbers.shape[1])):
                    for xx in range(step[2] * x, min(step[2] * (x + 1), numbers.shape[2])):
                        n += numbers[zz, yy, xx]
            most = max(most, n)
    return most


@compiled
def _gather_members(numbers, rows, step, place, z, y, x, members):
    """Parts of the cells below; `place` (4, 2) moves on along the rows."""
    n = 0
    for d in range(4):
        zz, yy = step[0] * z + (d >> 1), step[1] * y + (d & 1)
        if d >> 1 >= step[0] or d & 1 >= step[1] or zz >= numbers.shape[0] or yy >= numbers.shape[1]:
            continue
        for xx in range(step[2] * x, min(step[2] * (x + 1), numbers.shape[2])):
            colour = zz + yy + xx & 1
            for _ in range(numbers[zz, yy, xx]):
                members[n] = place[d, colour]
                place[d, colour] += 1
                n += 1
    return n


@compiled
def _start_rows(rows, cells, step, z, y, place):
    for d in range(4):
        zz, yy = step[0] * z + (d >> 1), step[1] * y + (d & 1)
        if d >> 1 < step[0] and d & 1 < step[1] and zz < cells[0] and yy < cells[1]:
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
def find_largest(starts, values, to_faces, largest, begin, end):
    """largest[i]: of the conductances of each part, that to the outer faces included."""
    for i in range(begin, end):
        largest[i] = to_faces[i]
        for k in range(starts[i], starts[i + 1]):
            largest[i] = max(largest[i], values[k])


HELD, BOUND = 1, 2  # has a strong edge, or hangs on the outer faces; of the latter, on nothing else


@compiled
def find_bonds(starts, places, values, to_faces, largest, bonds, begin, end):
    """bonds[i]: HELD where a part has an edge that both ends find strong; HELD | BOUND where all its edges are weak
    beside its conductance to the outer faces; 0 where its strong edges lead to parts that find them weak."""
    for i in range(begin, end):
        most = values.dtype.type(0)
        held = 0
        for k in range(starts[i], starts[i + 1]):
            most = max(most, values[k])
            if values[k] >= STRONG * max(largest[i], largest[places[k]]):
                held = HELD
        bonds[i] = HELD | BOUND if most < STRONG * to_faces[i] else held


@inlined
def _union(up, a, b):
    a, b = root(up, a), root(up, b)
    if a != b:
        up[max(a, b)] = min(a, b)


@compiled
def join_parts(
    starts, places, values, numbers, rows, cells_next, step, most, largest, bonds, row0, row1, parent, numbers_next,
    counts,
):  # fmt: skip
    """parent = which aggregate of its next cell each part is in (0, 1, …); numbers_next, how many each cell has.

    Without `largest` all that is connected within the cell is one aggregate. With it, what strong edges connect; parts
    that hang on the outer faces are one more, since relaxing alone finds their potentials; and a part whose strong
    edges lead only to parts that find them weak, such as a pocket of a poor conductor in a good one, joins the
    strongest of these, so that it does not stay a part for ever.
    """
    members, up = np.empty(most, np.int64), np.empty(most, np.int64)
    place = np.zeros((4, 2), np.int64)
    for row in range(row0, row1):
        z, y = row // cells_next[1], row % cells_next[1]
        _start_rows(rows, numbers.shape, step, z, y, place)
        both = np.zeros(2, np.int64)
        for x in range(cells_next[2]):
            n = _gather_members(numbers, rows, step, place, z, y, x, members)
            for m in range(n):
                parent[members[m]] = m
                up[m] = m
            bound = -1
            for m in range(n):
                i = members[m]
                for k in range(starts[i], starts[i + 1]):
                    j = places[k]
                    # Where another thread works, `parent` may be anything; only our own members are where it says.
                    other = parent[j]
                    if 0 <= other < n and members[other] == j:
                        if largest is None or values[k] >= STRONG * max(largest[i], largest[j]):
                            _union(up, m, other)
                if largest is not None and bonds[i] & BOUND:
                    if bound >= 0:
                        _union(up, m, bound)
                    bound = m
            if largest is not None:
                for m in range(n):
                    i = members[m]
                    if bonds[i]:
                        continue
                    strongest, to = np.float64(STRONG * largest[i]), -1
                    for k in range(starts[i], starts[i + 1]):
                        j = places[k]
                        other = parent[j]
                        if 0 <= other < n and members[other] == j and bonds[j] and values[k] >= strongest:
                            if to < 0 or values[k] > strongest:
                                strongest, to = np.float64(values[k]), other
                    if to >= 0:
                        _union(up, m, to)
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
def number_parts(numbers, rows, step, rows_next, numbers_next, most, row0, row1, parent):
    """parent: from the number within a cell to the number within the level."""
    members, place, begin = np.empty(most, np.int64), np.zeros((4, 2), np.int64), np.zeros(2, np.int64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        _start_rows(rows, numbers.shape, step, z, y, place)
        begin[0], begin[1] = rows_next[0, row], rows_next[1, row]
        for x in range(numbers_next.shape[2]):
            n = _gather_members(numbers, rows, step, place, z, y, x, members)
            for m in range(n):
                parent[members[m]] += begin[z + y + x & 1]
            begin[z + y + x & 1] += numbers_next[z, y, x]


@compiled
def connect(
    starts, places, values, to_faces, numbers, rows, step, numbers_next, rows_next, parent, most, row0, row1, degrees,
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
            zz, yy = step[0] * z + (d >> 1), step[1] * y + (d & 1)
            if d >> 1 < step[0] and d & 1 < step[1] and zz < numbers.shape[0] and yy < numbers.shape[1]:
                at = zz * numbers.shape[1] + yy
                for colour in range(2):
                    # A red cell below may lie in a black one of the next level.
                    room += starts[rows[colour, at + 1]] - starts[rows[colour, at]]
    red, black = (np.empty(room[0], places.dtype), np.empty(room[1], places.dtype))
    red_values, black_values = (np.empty(room[0], values.dtype), np.empty(room[1], values.dtype))
    used = np.zeros(2, np.int64)
    for row in range(row0, row1):
        z, y = row // numbers_next.shape[1], row % numbers_next.shape[1]
        _start_rows(rows, numbers.shape, step, z, y, place)
        begin[0], begin[1] = rows_next[0, row], rows_next[1, row]
        for x in range(numbers_next.shape[2]):
            n = _gather_members(numbers, rows, step, place, z, y, x, members)
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
def fill_slots(starts, places, values, to_faces, red, mixed, diagonal, slots, slot_values, begin, end):
    """The first six neighbours of each part, and the sum of all its conductances; returns how many more there are.

    `mixed`: a part with neighbours of its own colour is a neighbour of itself, with the sum of the conductances to
    these, which so stands in the diagonal twice.
    """
    more = 0
    for i in range(begin, end):
        s, own = np.float64(to_faces[i]), np.float64(0)
        for k in range(starts[i], starts[i + 1]):
            s += values[k]
            if mixed and (places[k] < red) == (i < red):
                own += values[k]
        degree = starts[i + 1] - starts[i]
        number = min(SLOTS, degree)
        for k in range(number):
            slots[i, k], slot_values[i, k] = places[starts[i] + k], values[starts[i] + k]
        for k in range(number, SLOTS):
            slots[i, k], slot_values[i, k] = slots[i, 0] if number else i, 0
        if own > 0 and number < SLOTS:
            slots[i, number], slot_values[i, number] = i, own
        diagonal[i] = s + own
        more += degree - number + (own > 0 and number == SLOTS)
    return more


@compiled
def fill_more(starts, places, values, red, mixed, more_of, more_places, more_values, at, begin, end):
    for i in range(begin, end):
        own = np.float64(0)
        for k in range(starts[i], starts[i + 1]):
            if mixed and (places[k] < red) == (i < red):
                own += values[k]
        for k in range(starts[i] + SLOTS, starts[i + 1]):
            more_of[at], more_places[at], more_values[at] = i, places[k], values[k]
            at += 1
        if own > 0 and starts[i + 1] - starts[i] >= SLOTS:
            more_of[at], more_places[at], more_values[at] = i, i, own
            at += 1


@compiled
def count_of_one_colour(starts, places, red, begin, end):
    """Edges between parts of one colour."""
    n = 0
    for i in range(begin, end):
        for k in range(starts[i], starts[i + 1]):
            n += (places[k] < red) == (i < red)
    return n


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


def as_level(
    graph: Graph, rows: np.ndarray, periodic: Sequence[bool], robust: bool, each: Each, mixed: bool | None = None
) -> Level:
    """The form that cycles use. mixed: whether there may be edges within cells; without, a robust graph is searched."""
    parts, kind, red = len(graph.to_faces), graph.places.dtype, int(rows[1, 0])
    real = graph.values.dtype
    diagonal = np.empty(parts, real)
    places, values = np.empty((parts, SLOTS), kind), np.empty((parts, SLOTS), real)
    csr = (graph.starts, graph.places, graph.values)
    cells: Any = graph.numbers.shape
    odd = any(p and n % 2 for p, n in zip(periodic, cells, strict=True))
    if mixed is None:
        mixed = robust and sum(each(lambda a, b: count_of_one_colour(*csr[:2], red, a, b), parts, CHUNK)) > 0
    twice = robust and (mixed or odd)
    found = each(
        lambda a, b: fill_slots(*csr, graph.to_faces, red, twice, diagonal, places, values, a, b), parts, CHUNK
    )
    before = np.concatenate([[0], np.cumsum(found)]).astype(np.int64)
    more = np.empty(before[-1], kind), np.empty(before[-1], kind), np.empty(before[-1], real)
    each(lambda a, b: fill_more(*csr, red, twice, *more, before[a // CHUNK], a, b), parts, CHUNK)
    level = Level(rows, cells, mixed or odd, diagonal, places, values, more)
    if robust:
        level.to_faces, level.correction = graph.to_faces, ROBUST_CORRECTION
    return level


def bonds_of(graph: Graph, robust: bool, each: Each) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What `join_parts` needs to know strong edges from weak ones: the largest conductance of each part, and its
    bonds."""
    if not robust:
        return None, None
    parts = len(graph.to_faces)
    largest, bonds = np.empty(parts, graph.values.dtype), np.empty(parts, np.uint8)
    each(lambda a, b: find_largest(graph.starts, graph.values, graph.to_faces, largest, a, b), parts, CHUNK)
    csr = (graph.starts, graph.places, graph.values)
    each(lambda a, b: find_bonds(*csr, graph.to_faces, largest, bonds, a, b), parts, CHUNK)
    return largest, bonds


def coarser(level: Level, graph: Graph, step: tuple[int, int, int], robust: bool, each: Each) -> tuple[Graph, Any]:
    """The graph of the next level, and its rows; sets `parent`."""
    numbers = graph.numbers.astype(np.int32, copy=False)
    below: Any = tuple(-(-n // s) for n, s in zip(level.cells, step, strict=True))
    rows = below[0] * below[1]
    at_once = max(1, rows // 64)
    most = max(each(lambda a, b: count_members(numbers, below, step, a, b), rows, at_once))
    numbers_next, counts = np.zeros(below, np.int32), np.zeros((2, rows), np.int64)
    parent = np.full(level.parts, -1, graph.places.dtype)
    csr = (graph.starts, graph.places, graph.values)
    known = bonds_of(graph, robust, each)
    each(
        lambda a, b: join_parts(
            *csr, numbers, level.rows, below, step, most, *known, a, b, parent, numbers_next, counts
        ),
        rows, at_once,
    )  # fmt: skip
    rows_next, parts = accumulated(counts)
    each(
        lambda a, b: number_parts(numbers, level.rows, step, rows_next, numbers_next, most, a, b, parent), rows, at_once
    )
    degrees, to_faces = np.zeros(parts + 1, np.int32), np.zeros(parts, graph.to_faces.dtype)
    found = each(
        lambda a, b: connect(
            *csr, graph.to_faces, numbers, level.rows, step, numbers_next, rows_next, parent, most, a, b, degrees,
            to_faces,
        ),
        rows, at_once,
    )  # fmt: skip
    # Units come in the order of rows, so red ones one after the other, then black ones, are in the order of parts.
    kind = index_type(parts)
    places = np.concatenate([part[0] for part in found] + [part[2] for part in found]).astype(kind, copy=False)
    values = np.concatenate([part[1] for part in found] + [part[3] for part in found])
    level.parent, level.step = parent, step
    return Graph(running(degrees), places, values, to_faces, numbers_next), rows_next


def cycle(levels: list[Level], at: int, each: Each, visits: int = 2) -> None:
    """levels[at].x ≈ A⁻¹ b by `visits` W-cycles from zero, each symmetric: red, black, the coarse part, black, red."""
    level = levels[at]
    if at + 1 == len(levels):
        if level.factors is not None:
            level.x[:] = level.factors.solve(level.b.astype(np.float64))
        elif level.inverse is not None:
            multiply_dense(level.inverse, level.b, level.x)
        else:
            each(lambda a, b: relax_from_zero(level.b, level.diagonal, level.x, a, b), level.parts, CHUNK)
        return
    below = levels[at + 1]
    red, parts, x, b = level.red, level.parts, level.x, level.b
    graph = (level.places, level.values, *level.more, level.diagonal, b)
    rows = below.cells[0] * below.cells[1]
    scale = level.diagonal.dtype.type(level.correction)

    def sweep(begin: int, end: int) -> None:
        if level.mixed:
            spare = level.spare
            each(lambda i, j: relax(*graph, x, spare, begin + i, begin + j), end - begin, CHUNK)
            x[begin:end] = spare[begin:end]
        else:
            each(lambda i, j: relax(*graph, x, x, begin + i, begin + j), end - begin, CHUNK)

    for visit in range(visits):
        if visit == 0:
            each(lambda i, j: relax_from_zero(b, level.diagonal, x, i, j), red, CHUNK)
            x[red:] = 0
        elif level.mixed:
            sweep(0, red)
        sweep(red, parts)
        each(
            lambda i, j: restrict(
                *graph, x, level.to_faces, level.parent, level.rows, below.rows, level.cells, below.cells, level.step,
                2 if level.mixed else 1, i, j, below.b,
            ),
            rows, max(1, rows // 64) if parts > CHUNK else rows,
        )  # fmt: skip
        cycle(levels, at + 1, each)
        each(lambda i, j: prolong(below.x, level.parent, x, scale, i, j), parts if level.mixed else red, CHUNK)
        sweep(red, parts)
        sweep(0, red)
