"""From one level to the next: which aggregates are joined to one, and the conductances between the joined aggregates.

In the robust form two aggregates are joined only by a strong edge: one whose conductance is not below STRONG times the
largest conductance of either aggregate. Two particles in one cell that are separated by a poor conductor so keep a
potential of their own. Cells grow as `form.Form.step` says (semi-coarsening).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcres.counting.disjoint_sets import merge, root
from hpcres.transport.coarse import CHUNK, Each, Graph, Level, accumulated, index_type, running
from hpcres.transport.compiling import compiled
from hpcres.transport.form import Form

STRONG = 0.1  # of the largest conductance of an aggregate


@compiled
def count_members(numbers, cells_next, step, row0, row1):
    """Return the largest number of aggregates in one cell of the next level."""
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
    """List the aggregates of the cells below one cell of the next level; `place` (4, 2) moves on along the rows."""
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
def find_largest(starts, values, to_faces, largest, begin, end):
    """Set largest[i] to the largest conductance of aggregate i, including that to the outer faces."""
    for i in range(begin, end):
        largest[i] = to_faces[i]
        for k in range(starts[i], starts[i + 1]):
            largest[i] = max(largest[i], values[k])


COUPLED, FACE_DOMINATED = 1, 2  # bits of an aggregate's kind


@compiled
def find_kinds(starts, places, values, to_faces, largest, kinds, begin, end):
    """Set kinds[i] to the kind of aggregate i.

    The kind is COUPLED | FACE_DOMINATED where all edges of the aggregate are weak compared with its conductance to the
    outer faces. It is COUPLED where the aggregate has an edge that is strong for both of its aggregates. Else it is 0.
    """
    for i in range(begin, end):
        most = values.dtype.type(0)
        coupled = 0
        for k in range(starts[i], starts[i + 1]):
            most = max(most, values[k])
            if values[k] >= STRONG * max(largest[i], largest[places[k]]):
                coupled = COUPLED
        kinds[i] = COUPLED | FACE_DOMINATED if most < STRONG * to_faces[i] else coupled


@compiled
def join_aggregates(
    starts,
    places,
    values,
    numbers,
    rows,
    cells_next,
    step,
    most,
    largest,
    kinds,
    row0,
    row1,
    parent,
    numbers_next,
    counts,
):
    """Join the aggregates of a level within each cell of the next level.

    `parent` receives, for each aggregate, the number within its next cell (0, 1, …) of the aggregate that it is joined
    to. `numbers_next` receives the number of aggregates of each next cell.

    In the plain form `largest` is None, and all that is connected within the next cell becomes one aggregate. In the
    robust form, aggregates that strong edges connect become one aggregate. All face-dominated aggregates of the next
    cell become one, since relaxation alone finds their potentials. An aggregate of kind 0, such as a pocket of a poor
    conductor in a good one, is joined to the neighbour of its strongest edge, since it would otherwise remain on every
    level.
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
            dominated = -1
            for m in range(n):
                i = members[m]
                for k in range(starts[i], starts[i + 1]):
                    j = places[k]
                    # Where another thread works, `parent` may be anything; only our own members are where it says.
                    other = parent[j]
                    if 0 <= other < n and members[other] == j:
                        if largest is None or values[k] >= STRONG * max(largest[i], largest[j]):
                            merge(up, m, other)
                if largest is not None and kinds[i] & FACE_DOMINATED:
                    if dominated >= 0:
                        merge(up, m, dominated)
                    dominated = m
            if largest is not None:
                for m in range(n):
                    i = members[m]
                    if kinds[i]:
                        continue
                    strongest, to = np.float64(STRONG * largest[i]), -1
                    for k in range(starts[i], starts[i + 1]):
                        j = places[k]
                        other = parent[j]
                        if 0 <= other < n and members[other] == j and kinds[j] and values[k] >= strongest:
                            if to < 0 or values[k] > strongest:
                                strongest, to = np.float64(values[k]), other
                    if to >= 0:
                        merge(up, m, to)
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
def number_aggregates(numbers, rows, step, rows_next, numbers_next, most, row0, row1, parent):
    """Change `parent` from the number within a cell to the number within the level."""
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
    starts,
    places,
    values,
    to_faces,
    numbers,
    rows,
    step,
    numbers_next,
    rows_next,
    parent,
    most,
    row0,
    row1,
    degrees,
    to_faces_next,
):
    """Find the neighbours of the next level's aggregates in some rows of cells.

    Returns, for red and for black aggregates, the places of the neighbours and the sums of conductances to them. Sets
    degrees[i + 1] to the number of neighbours of aggregate i, and adds the conductances to the outer faces to
    `to_faces_next`.
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


def couplings_of(graph: Graph, form: Form, each: Each) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Compute the arguments `largest` and `kinds` of `join_aggregates`; None, None in the plain form."""
    if not form.robust:
        return None, None
    aggregates = len(graph.to_faces)
    largest, kinds = np.empty(aggregates, graph.values.dtype), np.empty(aggregates, np.uint8)
    each(lambda a, b: find_largest(graph.starts, graph.values, graph.to_faces, largest, a, b), aggregates, CHUNK)
    csr = (graph.starts, graph.places, graph.values)
    each(lambda a, b: find_kinds(*csr, graph.to_faces, largest, kinds, a, b), aggregates, CHUNK)
    return largest, kinds


def coarser(level: Level, graph: Graph, form: Form, each: Each) -> tuple[Graph, Any]:
    """Make the graph of the next level.

    `parent` and `step` of `level` are set.

    Parameters
    ----------
    level : Level
        A level.
    graph : Graph
        The graph of the level.
    form : Form
        The form on the level.
    each : Each
        Runs kernels in parallel.

    Returns
    -------
    graph : Graph
        The graph of the next level.
    rows : np.ndarray
        Where the aggregates of each row of cells of the next level begin, as `Level.rows`.
    """
    step = form.step(level.cells)
    numbers = graph.numbers.astype(np.int32, copy=False)
    below: Any = tuple(-(-n // s) for n, s in zip(level.cells, step, strict=True))
    rows = below[0] * below[1]
    at_once = max(1, rows // 64)
    most = max(each(lambda a, b: count_members(numbers, below, step, a, b), rows, at_once))
    numbers_next, counts = np.zeros(below, np.int32), np.zeros((2, rows), np.int64)
    parent = np.full(level.aggregates, -1, graph.places.dtype)
    csr = (graph.starts, graph.places, graph.values)
    couplings = couplings_of(graph, form, each)
    each(
        lambda a, b: join_aggregates(
            *csr, numbers, level.rows, below, step, most, *couplings, a, b, parent, numbers_next, counts
        ),
        rows,
        at_once,
    )
    rows_next, aggregates = accumulated(counts)
    each(
        lambda a, b: number_aggregates(numbers, level.rows, step, rows_next, numbers_next, most, a, b, parent),
        rows,
        at_once,
    )
    degrees, to_faces = np.zeros(aggregates + 1, np.int32), np.zeros(aggregates, graph.to_faces.dtype)
    found = each(
        lambda a, b: connect(
            *csr,
            graph.to_faces,
            numbers,
            level.rows,
            step,
            numbers_next,
            rows_next,
            parent,
            most,
            a,
            b,
            degrees,
            to_faces,
        ),
        rows,
        at_once,
    )
    # Units come in the order of rows, so red ones one after the other, then black ones, are in the order of aggregates.
    kind = index_type(aggregates)
    places = np.concatenate([part[0] for part in found] + [part[2] for part in found]).astype(kind, copy=False)
    values = np.concatenate([part[1] for part in found] + [part[3] for part in found])
    level.parent, level.step = parent, step
    return Graph(running(degrees), places, values, to_faces, numbers_next), rows_next
