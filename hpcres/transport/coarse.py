"""The coarse levels: graphs of aggregates, and a multigrid cycle over them.

Cells of level 1 are 2×2×2 voxels, those of the next level 2×2×2 cells, and so on. An aggregate is a connected part of
the conducting voxels of one cell. An edge joins aggregates of cells that share a face, so the graph has two colours,
those of the cells' parity, unless a periodic axis has an odd number of cells. Red aggregates come first; aggregates of
one colour are in the order of rows of cells (z, y), then x. `aggregation` makes a level from the one below it.

In the robust form an edge may join aggregates of one cell, which have one colour. A sweep then updates both from their
old values. The conductances of such edges are added to the diagonal a second time, so that the sweep converges (l1
smoothing: Baker, Falgout, Kolev & Yang, SIAM J. Sci. Comput. 33, 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcres.transport.compiling import compiled, inlined
from hpcres.transport.form import PLAIN_CORRECTION, Form

SLOTS = 6  # neighbours of an aggregate that are stored with it; few have more
CHUNK = 1 << 14  # aggregates that one thread takes at a time


@dataclass
class Graph:
    """Graph of the aggregates of a level.

    Aggregate i has the neighbours places[starts[i] … starts[i + 1] - 1], over the conductances `values` at the same
    indices.
    """

    starts: np.ndarray
    places: np.ndarray
    values: np.ndarray
    to_faces: np.ndarray  # conductance of each aggregate to the two outer faces
    numbers: np.ndarray  # aggregates of each cell (z, y, x)


@dataclass
class Level:
    """A level: the graph of its aggregates as cycles read it.

    `places` and `values` hold six neighbours of every aggregate, with value 0 where there are fewer. `more` holds the
    remaining neighbours, in the order of aggregates.
    """

    rows: np.ndarray  # (2, rows of cells + 1), int64: where the aggregates of a row begin, red and black
    cells: tuple[int, int, int]
    mixed: (
        bool  # edges between aggregates of one colour: in a cell, or across a periodic axis with an odd number of cells
    )
    diagonal: np.ndarray
    places: np.ndarray
    values: np.ndarray
    more: tuple[np.ndarray, np.ndarray, np.ndarray]
    to_faces: np.ndarray | None = None  # in the robust form, whose residuals are sums of currents
    step: tuple[int, int, int] = (2, 2, 2)  # cells of this level in one of the next, z, y, x
    correction: float = PLAIN_CORRECTION
    parent: np.ndarray | None = None  # the aggregate of the next level that each is in
    inverse: np.ndarray | None = None
    factors: Any = None  # LU factors of the last level's matrix, where `inverse` is None

    def __post_init__(self) -> None:
        """Allocate b and x and, for a mixed level, spare."""
        sizes = (self.aggregates, self.aggregates, self.aggregates * self.mixed)
        self.b, self.x, self.spare = (np.zeros(n, self.diagonal.dtype) for n in sizes)

    @property
    def aggregates(self) -> int:
        """Number of aggregates."""
        return len(self.diagonal)

    @property
    def red(self) -> int:
        """Number of red aggregates."""
        return int(self.rows[1, 0])

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [self.rows, self.diagonal, self.places, self.values, *self.more, self.b, self.x, self.spare]
        return sum(a.nbytes for a in (*arrays, self.to_faces, self.parent, self.inverse) if a is not None)


# ---- a cycle -----------------------------------------------------------------------------------------------


@compiled
def relax_from_zero(b, diagonal, x, begin, end):
    """Relax aggregates begin … end - 1 from x = 0."""
    for i in range(begin, end):
        x[i] = b[i] / diagonal[i]


@inlined
def _first_after(numbers, i):
    """Return the first place in sorted numbers whose number is not below i."""
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
    """Relax the aggregates begin … end - 1 of one colour from the values of the other."""
    for i in range(begin, end):
        out[i] = (b[i] + _neighbours(places, values, x, i)) / diagonal[i]
    k = _first_after(more_of, begin)
    while k < len(more_of) and more_of[k] < end:
        i = more_of[k]
        out[i] += more_values[k] * x[more_places[k]] / diagonal[i]
        k += 1


@compiled
def restrict(
    places,
    values,
    more_of,
    more_places,
    more_values,
    diagonal,
    b,
    x,
    to_faces,
    parent,
    rows,
    rows_next,
    cells,
    cells_next,
    step,
    colours,
    row0,
    row1,
    coarse,
):
    """Set `coarse` to the residual of `colours` colours, summed over each aggregate of the next level.

    `colours` is 1 for red alone, the only colour with a residual after a sweep. The kernel works on the rows row0 …
    row1 - 1 of the next level's cells, which no other thread writes. Where to_faces is not None, the residual is a sum
    of currents, which is exactly 0 inside a particle of constant potential.
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
    """Add scale × the value of each aggregate's parent to x, for aggregates begin … end - 1."""
    for i in range(begin, end):
        x[i] += scale * coarse[parent[i]]


@compiled
def multiply_dense(matrix, b, x):
    """Set x to the product of a dense matrix and b."""
    for i in range(len(x)):
        s = matrix.dtype.type(0)
        for j in range(len(b)):
            s += matrix[i, j] * b[j]
        x[i] = s


@compiled
def fill_slots(starts, places, values, to_faces, red, mixed, diagonal, slots, slot_values, begin, end):
    """Fill the first six neighbours of each aggregate and the sum of all its conductances; return how many more it has.

    With `mixed` an aggregate with neighbours of its own colour is made a neighbour of itself, with the sum of the
    conductances to these. The sum is added to the diagonal too, so that the product of matrix and vector does not
    change.
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
    """Fill the neighbours of the aggregates begin … end - 1 beyond their first six, from place `at` on."""
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
    """Count the edges between aggregates of one colour."""
    n = 0
    for i in range(begin, end):
        for k in range(starts[i], starts[i + 1]):
            n += (places[k] < red) == (i < red)
    return n


Each = Callable[[Callable[..., Any], int, int], list[Any]]
"""each(function(begin, end), number, at a time): runs it over 0 … number, in parallel; results in order."""


def accumulated(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Turn (2, rows) counts into where each row begins, red before black.

    Parameters
    ----------
    counts : np.ndarray
        Integers (2, rows).

    Returns
    -------
    starts : np.ndarray
        int64 (2, rows + 1).
    total : int
        Sum of all counts.
    """
    ends = np.cumsum(counts.reshape(-1), dtype=np.int64)
    starts = np.concatenate([[0], ends])
    rows = counts.shape[1]
    return np.stack([starts[: rows + 1], starts[rows:]]), int(starts[-1])


def index_type(number: int) -> Any:
    """Return the integer type of indices below `number`: int32 where they fit, else int64."""
    return np.int32 if number < 2**31 else np.int64


def running(starts: np.ndarray) -> np.ndarray:
    """Sum up the counts in starts[1:], as 32-bit numbers where they fit."""
    sums = np.cumsum(starts, dtype=np.int64)
    return sums.astype(np.int32) if sums[-1] < 2**31 else sums


def as_level(
    graph: Graph, rows: np.ndarray, periodic: Sequence[bool], form: Form, each: Each, mixed: bool | None = None
) -> Level:
    """Make the form of a graph that cycles read.

    Parameters
    ----------
    graph : Graph
        The graph of the level.
    rows : np.ndarray
        int64 (2, rows of cells + 1), where the aggregates of a row begin, red and black.
    periodic : sequence of bool
        Axes z, y, x whose sides meet.
    form : Form
        The form on the level.
    each : Each
        Runs kernels in parallel.
    mixed : bool, optional
        Whether edges may join aggregates of one cell; None to find out.

    Returns
    -------
    Level
    """
    aggregates, kind, red = len(graph.to_faces), graph.places.dtype, int(rows[1, 0])
    diagonal = np.empty(aggregates, form.dtype)
    places, values = np.empty((aggregates, SLOTS), kind), np.empty((aggregates, SLOTS), form.dtype)
    csr = (graph.starts, graph.places, graph.values)
    cells: Any = graph.numbers.shape
    odd = any(p and n % 2 for p, n in zip(periodic, cells, strict=True))
    if mixed is None:
        mixed = form.robust and sum(each(lambda a, b: count_of_one_colour(*csr[:2], red, a, b), aggregates, CHUNK)) > 0
    l1 = form.robust and (mixed or odd)
    found = each(
        lambda a, b: fill_slots(*csr, graph.to_faces, red, l1, diagonal, places, values, a, b), aggregates, CHUNK
    )
    before = np.concatenate([[0], np.cumsum(found)]).astype(np.int64)
    more = np.empty(before[-1], kind), np.empty(before[-1], kind), np.empty(before[-1], form.dtype)
    each(lambda a, b: fill_more(*csr, red, l1, *more, before[a // CHUNK], a, b), aggregates, CHUNK)
    to_faces = graph.to_faces if form.robust else None
    return Level(rows, cells, mixed or odd, diagonal, places, values, more, to_faces, correction=form.correction)


def cycle(levels: list[Level], at: int, each: Each, visits: int = 2) -> None:
    """Set levels[at].x ≈ A⁻¹ b by `visits` W-cycles from zero.

    Each cycle is symmetric: red, black, the coarse part, black, red.

    Parameters
    ----------
    levels : list of Level
        The hierarchy, the finest level first.
    at : int
        Position of the level to solve.
    each : Each
        Runs kernels in parallel.
    visits : int
        Number of cycles.
    """
    level = levels[at]
    if at + 1 == len(levels):
        if level.factors is not None:
            level.x[:] = level.factors.solve(level.b.astype(np.float64))
        elif level.inverse is not None:
            multiply_dense(level.inverse, level.b, level.x)
        else:
            each(lambda a, b: relax_from_zero(level.b, level.diagonal, level.x, a, b), level.aggregates, CHUNK)
        return
    below = levels[at + 1]
    red, aggregates, x, b = level.red, level.aggregates, level.x, level.b
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
        sweep(red, aggregates)
        each(
            lambda i, j: restrict(
                *graph,
                x,
                level.to_faces,
                level.parent,
                level.rows,
                below.rows,
                level.cells,
                below.cells,
                level.step,
                2 if level.mixed else 1,
                i,
                j,
                below.b,
            ),
            rows,
            max(1, rows // 64) if aggregates > CHUNK else rows,
        )
        cycle(levels, at + 1, each)
        each(lambda i, j: prolong(below.x, level.parent, x, scale, i, j), aggregates if level.mixed else red, CHUNK)
        sweep(red, aggregates)
        sweep(0, red)
