"""Cells of voxels, and the aggregates of each: the aggregates of the first coarse level.

A cell is a block of step[0] × step[1] × step[2] voxels. A step is 1 along an axis that is not coarsened, else 2. Places
within a cell are numbered 4 dz + 2 dy + dx. `tables` are three arrays whose index is a cell's number: the number of its
aggregates, the aggregate of each place, and the mask of the conducting places. In the plain form aggregates are the
connected components of the mask, and the number of a cell is its mask (`TABLES`). Where conductivities separate
aggregates, the number of a cell is the rank of its partition among all partitions (`partition_tables`).

Arrays, `geometry`, `bits` and `g` are those of `rows`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from hpcres.simd.registers import SIXTEEN, add, load, store
from hpcres.simd.words import popcount
from hpcres.transport.compiling import compiled, inlined


@compiled
def _components() -> tuple[np.ndarray, np.ndarray]:
    """Count the aggregates of each of the 256 blocks of 2×2×2 voxels, and find the one of each voxel."""
    number, aggregate = np.zeros(256, np.uint8), np.zeros((256, 8), np.uint8)
    for mask in range(256):
        left, found = mask, 0
        while left:
            grown = left & -left
            while True:
                more = grown
                for i in range(8):
                    if grown >> i & 1:
                        more |= 1 << (i ^ 1) | 1 << (i ^ 2) | 1 << (i ^ 4)
                more &= mask
                if more == grown:
                    break
                grown = more
            for i in range(8):
                if grown >> i & 1:
                    aggregate[mask, i] = found
            found += 1
            left &= ~grown
        number[mask] = found
    return number, aggregate


# The step of most volumes: a constant, so that the kernels of a row are compiled for it without its tests.
CUBE = (2, 2, 2)
AGGREGATES, AGGREGATE = _components()
TABLES = (AGGREGATES, AGGREGATE, np.arange(256, dtype=np.uint8))


@compiled
def _completions():
    """Tabulate the number of ways to partition k more places where m aggregates exist, as [k, m].

    A place may also insulate, which is one more choice.
    """
    number = np.ones((9, 10), np.int64)
    for k in range(1, 9):
        for m in range(9 - k, -1, -1):
            number[k, m] = (m + 1) * number[k - 1, m] + number[k - 1, m + 1]
    return number


COMPLETIONS = _completions()


@compiled
def _fill_partitions(completions, numbers, aggregate, mask):
    for rank in range(len(numbers)):
        left, begun = rank, 0
        for i in range(8):
            per_choice = completions[7 - i, begun]
            which = min(left // per_choice, begun + 1)
            left -= which * per_choice
            begun = max(begun, which)
            if which:
                aggregate[rank, i] = which - 1
                mask[rank] |= 1 << i
        numbers[rank] = begun


@cache
def partition_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tables of all 21147 partitions of the conducting places of a cell, by rank.

    Returns
    -------
    numbers : ndarray of uint8, shape (21147,)
        Aggregates of each partition.
    aggregate : ndarray of uint8, shape (21147, 8)
        Aggregate of each place; 0 where a place insulates.
    mask : ndarray of uint8, shape (21147,)
        Bit i is set where place i conducts.
    """
    number = int(COMPLETIONS[8, 0])
    tables = np.zeros(number, np.uint8), np.zeros((number, 8), np.uint8), np.zeros(number, np.uint8)
    _fill_partitions(COMPLETIONS, *tables)
    return tables


@inlined
def wrapped(i, n, periodic):
    """Return the index that stands for i, or -1 where i is outside and the axis is not periodic."""
    if 0 <= i < n:
        return i
    return (i + n) % n if periodic else -1


@inlined
def _mask_of_cell(bits, z, y, x, step):
    """Return the mask of the conducting places of a cell."""
    first = step[2] * x
    k, i, columns = (first >> 4) + 1, first & 15, (1 << step[2]) - 1
    mask = np.int64(0)
    for dz in range(step[0]):
        for dy in range(step[1]):
            word = np.int64(bits[step[0] * z + dz + 1, step[1] * y + dy + 1, k])
            mask |= (word >> i & columns) << 4 * dz + 2 * dy
    return mask


@compiled
def find_cells(bits, step, cells, z0, z1):
    """Set `cells` (z, y, x) to the mask of each cell in planes z0 … z1 - 1; return the number of conducting voxels."""
    voxels = 0
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                mask = _mask_of_cell(bits, z, y, x, step)
                cells[z, y, x] = mask
                voxels += popcount(mask)
    return voxels


@compiled
def find_split_cells(bits, labels, strong, step, completions, cells, z0, z1):
    """Set `cells` (z, y, x) to the rank of each cell's partition in planes z0 … z1 - 1 of cells.

    Two neighbouring voxels are in one aggregate only where strong[axis, label, label]. Returns the number of conducting
    voxels.
    """
    voxels, aggregate = 0, np.zeros(8, np.int64)
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                mask = _mask_of_cell(bits, z, y, x, step)
                voxels += popcount(mask)
                for i in range(8):
                    aggregate[i] = i
                for axis in range(3):
                    bit = 4 >> axis
                    for i in range(8):
                        if i & bit or not mask >> i & 1 or not mask >> (i | bit) & 1:
                            continue
                        j = i | bit
                        here = labels[step[0] * z + (i >> 2), step[1] * y + (i >> 1 & 1), step[2] * x + (i & 1)]
                        there = labels[step[0] * z + (j >> 2), step[1] * y + (j >> 1 & 1), step[2] * x + (j & 1)]
                        if strong[axis, here, there]:
                            low, high = min(aggregate[i], aggregate[j]), max(aggregate[i], aggregate[j])
                            for other in range(8):
                                if aggregate[other] == high:
                                    aggregate[other] = low
                rank, begun = np.int64(0), 0
                for i in range(8):
                    if mask >> i & 1:
                        # aggregate[i] is the first place of its aggregate, whose entry already holds minus the
                        # aggregate's number.
                        if aggregate[i] == i:
                            rank += (begun + 1) * completions[7 - i, begun]
                            begun += 1
                            aggregate[i] = -begun
                        else:
                            aggregate[i] = aggregate[aggregate[i]]
                            rank += -aggregate[i] * completions[7 - i, begun]
                cells[z, y, x] = rank
    return voxels


@compiled
def count_aggregates(cells, tables, counts, z0, z1):
    """Count the aggregates of red and black cells of each row of cells into `counts` (2, planes, rows of cells)."""
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            both = np.zeros(2, np.int64)
            for x in range(cells.shape[2]):
                both[(z + y + x) & 1] += tables[0][cells[z, y, x]]
            counts[0, z, y], counts[1, z, y] = both[0], both[1]


@compiled
def restrict_row(cells, tables, step, aggregates, z, y, S, back, here, width, coarse, pair):
    """Set `coarse` to the sums over the aggregates of a row of cells.

    `back` and `here` are the places in S where the rows of voxels of the row of cells begin.
    """
    if step == CUBE:
        _restrict_row(cells, tables, CUBE, aggregates, z, y, S, back, here, width, coarse, pair)
    else:
        _restrict_row(cells, tables, step, aggregates, z, y, S, back, here, width, coarse, pair)


@inlined
def _restrict_row(cells, tables, step, aggregates, z, y, S, back, here, width, coarse, pair):
    rows, numbers, aggregate, mask = cells.shape[1], tables[0], tables[1], tables[2]
    places = (aggregates[0, z * rows + y], aggregates[1, z * rows + y])
    even, odd = (places[1], places[0]) if z + y & 1 else places
    wide, flat = step[2] - 1, 15 >> step[2] - 1
    for x in range(cells.shape[2]):
        if not x & flat:
            o = step[2] * x
            s = load(S, back + o, SIXTEEN)
            if step[1] == 2:
                s = add(s, load(S, back + width + o, SIXTEEN))
            if step[0] == 2:
                t = load(S, here + o, SIXTEEN)
                if step[1] == 2:
                    t = add(t, load(S, here + width + o, SIXTEEN))
                s = add(s, t)
            store(pair, 0, s)
        cell = cells[z, y, x]
        if not cell:
            continue
        place, number = odd if x & 1 else even, numbers[cell]
        if number == 1:
            if wide:
                coarse[place] = pair[2 * (x & 7)] + pair[2 * (x & 7) + 1]
            else:
                coarse[place] = pair[x & 15]
        else:
            for n in range(number):
                coarse[place + n] = np.float32(0)
            for i in range(8):
                if mask[cell] >> i & 1:
                    at = (here if i >> 2 else back) + (width if i >> 1 & 1 else 0) + step[2] * x + (i & 1)
                    coarse[place + aggregate[cell, i]] += S[at]
        if x & 1:
            odd += number
        else:
            even += number


@compiled
def prolong_row(cells, tables, step, aggregates, z, y, coarse, scale, E, back, here, width, few):
    """Set the rows of voxels of a row of cells to scale × the values of the aggregates.

    The values at insulating voxels of a cell have no meaning.
    """
    if step == CUBE:
        _prolong_row(cells, tables, CUBE, aggregates, z, y, coarse, scale, E, back, here, width, few)
    else:
        _prolong_row(cells, tables, step, aggregates, z, y, coarse, scale, E, back, here, width, few)


@inlined
def _prolong_row(cells, tables, step, aggregates, z, y, coarse, scale, E, back, here, width, few):
    rows, numbers, aggregate = cells.shape[1], tables[0], tables[1]
    places = (aggregates[0, z * rows + y], aggregates[1, z * rows + y])
    even, odd = (places[1], places[0]) if z + y & 1 else places
    wide, flat = step[2] - 1, 15 >> step[2] - 1
    for first in range(0, cells.shape[2], flat + 1):
        begin, several = (even, odd), False
        for x in range(first, min(first + flat + 1, cells.shape[2])):
            place, number = odd if x & 1 else even, numbers[cells[z, y, x]]
            if x & 1:
                odd += number
            else:
                even += number
            several |= number > 1
            at = step[2] * (x - first)
            few[at] = few[at + wide] = scale * coarse[place] if number else np.float32(0)
        values, at = load(few, 0, SIXTEEN), step[2] * first
        store(E, back + at, values)
        if step[1] == 2:
            store(E, back + width + at, values)
        if step[0] == 2:
            store(E, here + at, values)
            if step[1] == 2:
                store(E, here + width + at, values)
        if not several:
            continue
        for x in range(first, min(first + flat + 1, cells.shape[2])):
            cell = cells[z, y, x]
            place, number = begin[x & 1], numbers[cell]
            begin = (begin[0], begin[1] + number) if x & 1 else (begin[0] + number, begin[1])
            for i in range(8 if number > 1 else 0):
                if (i >> 2) < step[0] and (i >> 1 & 1) < step[1] and (i & 1) < step[2]:
                    to = (here if i >> 2 else back) + (width if i >> 1 & 1 else 0) + step[2] * x + (i & 1)
                    E[to] = scale * coarse[place + aggregate[cell, i]]


# ---- the first coarse level --------------------------------------------------------------------------------

_NEAR = (0x0F, 0x33, 0x55)  # the half of a cell that is first along each axis
_TOWARDS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))


@compiled
def _half_at(labels, resistance, step, z, y, x, i):
    """Return half the resistance of the voxel at place i of a cell."""
    if labels is None:
        return np.float64(0.5)
    return np.float64(resistance[labels[step[0] * z + (i >> 2), step[1] * y + (i >> 1 & 1), step[2] * x + (i & 1)]])


@compiled
def connect_aggregates(
    cells, tables, step, aggregates, geometry, g, labels, resistance, starts, places, values, to_faces, row0, row1, fill
):
    """Find the conductances between aggregates of neighbouring cells, and of one cell.

    The kernel works on the rows of cells row0 … row1 - 1 (z × rows + y). It is run twice. First, without `fill`, it
    sets starts[i + 1] to the number of neighbours of aggregate i. Then, with `starts` the running sum, it sets `places`
    and `values` of the neighbours of each aggregate, and `to_faces`, the conductance to the two outer faces.
    """
    deep, rows, columns = cells.shape
    numbers, aggregate, mask = tables
    axis, first, last = geometry[7], geometry[8], geometry[9]
    between = np.zeros((8, 8), np.float64)
    written = np.zeros(8, np.int64)
    # Where the aggregates of the next cell start, of colours 0 and 1, in this row and the four beside it.
    place = np.zeros((5, 2), np.int64)
    near = np.zeros(5, np.int64)
    for row in range(row0, row1):
        z, y = row // rows, row % rows
        near[4] = row
        for side in range(4):
            zz = wrapped(z + _TOWARDS[side][0], deep, geometry[4])
            yy = wrapped(y + _TOWARDS[side][1], rows, geometry[5])
            near[side] = zz * rows + yy if zz >= 0 and yy >= 0 else -1
        for side in range(5):
            if near[side] >= 0:
                place[side, 0], place[side, 1] = aggregates[0, near[side]], aggregates[1, near[side]]
        for x in range(columns):
            cell = cells[z, y, x]
            colour = z + y + x & 1
            own = place[4, colour]
            number, own_mask = np.int64(numbers[cell]), np.int64(mask[cell])
            if cell:
                written[:] = 0
                for side in range(6):
                    if side < 4:
                        if near[side] < 0:
                            continue
                        zz, yy, xx = near[side] // rows, near[side] % rows, x
                        other = place[side, zz + yy + xx & 1]
                        neighbour = cells[zz, yy, xx]
                    else:
                        zz, yy, xx = z, y, wrapped(x + _TOWARDS[side][2], columns, geometry[6])
                        if xx < 0:
                            continue
                        neighbour, there = cells[z, y, xx], z + y + xx & 1
                        if xx == x + 1:
                            other = place[4, there] + (number if there == colour else 0)
                        elif xx == x - 1:
                            other = place[4, there] - numbers[neighbour]
                        elif xx == 0:
                            other = aggregates[there, row]
                        else:
                            other = aggregates[there, row + 1] - numbers[neighbour]
                    if not neighbour:
                        continue
                    along = side >> 1
                    bit = 4 >> along if step[along] == 2 else 0  # of the axis within a cell
                    amount, other_mask = np.int64(numbers[neighbour]), np.int64(mask[neighbour])
                    if labels is None:
                        if not bit:
                            touching = own_mask & other_mask
                        elif side & 1:
                            touching = own_mask >> bit & other_mask & _NEAR[along]
                        else:
                            touching = own_mask & other_mask >> bit & _NEAR[along]
                        if not touching:
                            continue
                        if number == 1 and amount == 1:
                            if own != other:
                                if fill:
                                    places[starts[own] + written[0]] = other
                                    values[starts[own] + written[0]] = np.float32(popcount(touching)) * g[along]
                                written[0] += 1
                            continue
                    for a in range(number):
                        for b in range(amount):
                            between[a, b] = 0
                    for i in range(8):
                        if not own_mask >> i & 1 or (bit and ((i & bit) != 0) != (side & 1)):
                            continue
                        j = i ^ bit
                        # The last cell of an odd axis holds one voxel; its neighbour across a periodic side is even.
                        if not other_mask >> j & 1:
                            continue
                        h = _half_at(labels, resistance, step, z, y, x, i) + _half_at(
                            labels, resistance, step, zz, yy, xx, j
                        )
                        between[aggregate[cell, i], aggregate[neighbour, j]] += g[along] / h
                    for a in range(number):
                        for b in range(amount):
                            if between[a, b] > 0 and own + a != other + b:
                                if fill:
                                    places[starts[own + a] + written[a]] = other + b
                                    values[starts[own + a] + written[a]] = between[a, b]
                                written[a] += 1
                if labels is not None and number > 1:
                    for a in range(number):
                        for b in range(number):
                            between[a, b] = 0
                    for i in range(8):
                        for along in range(3):
                            j = i ^ (4 >> along)
                            if (
                                not own_mask >> i & 1
                                or not own_mask >> j & 1
                                or aggregate[cell, i] == aggregate[cell, j]
                            ):
                                continue
                            h = _half_at(labels, resistance, step, z, y, x, i)
                            h += _half_at(labels, resistance, step, z, y, x, j)
                            between[aggregate[cell, i], aggregate[cell, j]] += g[along] / h
                    for a in range(number):
                        for b in range(number):
                            if between[a, b] > 0:
                                if fill:
                                    places[starts[own + a] + written[a]] = own + b
                                    values[starts[own + a] + written[a]] = between[a, b]
                                written[a] += 1
                edge = step[axis] * (z if axis == 0 else y if axis == 1 else x)
                if fill and (edge == first or edge + step[axis] - 1 >= last):
                    for i in range(8):
                        if own_mask >> i & 1:
                            at = edge + (i >> 2 - axis & 1)
                            ends = (at == first) + (at == last)
                            if ends:
                                h = _half_at(labels, resistance, step, z, y, x, i)
                                to_faces[own + aggregate[cell, i]] += ends * g[axis] / h
                if not fill:
                    for a in range(number):
                        starts[own + a + 1] = written[a]
            for side in range(5):
                if near[side] >= 0:
                    zz, yy = near[side] // rows, near[side] % rows
                    place[side, zz + yy + x & 1] += numbers[cells[zz, yy, x]]
