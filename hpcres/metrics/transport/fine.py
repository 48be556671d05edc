"""The finest level: voxels, of which vectors hold only the conducting ones, in the order z, y, x.

Bits say which voxels conduct. A kernel works on a unit, a box of whole z and y ranges: it marches along z with a few
planes of its rows spread out into scratch memory, where a row is a plain array with zeros at insulating voxels.
Red voxels are those with even z + y + x; a sweep updates one colour from the other, so no order of units can change a
bit of the result. A sweep from zero and its reverse need no vector between them: what lies in between follows from the
residual and the coarse correction.

geometry, a tuple of ints: planes, rows (both padded to even), columns, words of 16 columns, periodic z, y, x (0, 1),
axis, first and last index along the axis (where the faces at potential 0 and 1 are; -9 where they are elsewhere).
bits: uint16 (planes + 2, rows + 2, words + 2), bit i of word k + 1 is column 16 k + i; the outermost planes and rows
repeat the opposite ones where the axis is periodic. g: conductances of a face between voxels of conductivity 1, z, y,
x. With several conductivities `labels` (z, y, x) and `resistance` (half a voxel's, by label) are arrays, else None.

A cell is a block of step[0] × step[1] × step[2] voxels, each step 1 or 2: axes along which voxels are coupled weakly
are not coarsened. Its number is the key of three tables: how many parts it has, the part of each of its 8 places
4 dz + 2 dy + dx, and the mask of its conducting places. Where parts are the connected components of the mask, the
number is the mask (`TABLES`); where conductivities split parts, it is the rank of the partition (`partition_tables`).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from hpcres.metrics.transport.vectors import (
    add,
    add_product,
    compiled,
    fma,
    gathered,
    inlined,
    inverse,
    keep,
    load,
    load_few,
    lowest,
    multiply,
    no_sum,
    popcount,
    splat,
    spread,
    store,
    store_few,
    subtract,
    total,
)  # fmt: skip

PAD = 16  # floats before and after a row in scratch memory, of which one is used
RING = 4  # planes of scratch memory
MARGIN = 3  # rows of scratch memory beyond a unit
EVEN, ODD = 0x5555, 0xAAAA


def scratch_floats(rows: int, words: int) -> int:
    """Scratch memory of one array of a unit of so many rows; a kernel has five, and three for conductances."""
    return (rows + 2 * MARGIN) * (2 * PAD + 16 * words) * RING


@compiled
def _components() -> tuple[np.ndarray, np.ndarray]:
    """For each of the 256 blocks of 2×2×2 voxels: how many connected parts, and the part of each voxel."""
    number, part = np.zeros(256, np.uint8), np.zeros((256, 8), np.uint8)
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
                    part[mask, i] = found
            found += 1
            left &= ~grown
        number[mask] = found
    return number, part


PARTS, PART = _components()
TABLES = (PARTS, PART, np.arange(256, dtype=np.uint8))


@compiled
def _completions():
    """[k, m]: in how many ways k more places can be partitioned where m parts are begun, absent places being one."""
    number = np.ones((9, 10), np.int64)
    for k in range(1, 9):
        for m in range(9 - k, -1, -1):
            number[k, m] = (m + 1) * number[k - 1, m] + number[k - 1, m + 1]
    return number


COMPLETIONS = _completions()


@compiled
def _fill_partitions(completions, numbers, part, mask):
    for rank in range(len(numbers)):
        left, begun = rank, 0
        for i in range(8):
            one = completions[7 - i, begun]
            which = min(left // one, begun + 1)
            left -= which * one
            begun = max(begun, which)
            if which:
                part[rank, i] = which - 1
                mask[rank] |= 1 << i
        numbers[rank] = begun


@cache
def partition_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of all 21147 partitions of the conducting ones of 8 places, by rank; as `TABLES` otherwise."""
    number = int(COMPLETIONS[8, 0])
    tables = np.zeros(number, np.uint8), np.zeros((number, 8), np.uint8), np.zeros(number, np.uint8)
    _fill_partitions(COMPLETIONS, *tables)
    return tables


@compiled
def pack(labels, conducts, bits, z0, z1):
    """bits of the planes z0 … z1 - 1 of labels (z, y, x): those voxels whose label `conducts`."""
    rows, columns = labels.shape[1:]
    for z in range(z0, z1):
        for y in range(rows):
            for k in range((columns + 15) // 16):
                word = np.int64(0)
                for i in range(min(16, columns - 16 * k)):
                    word |= np.int64(conducts[labels[z, y, 16 * k + i]]) << i
                bits[z + 1, y + 1, k + 1] = word


@inlined
def _mask_of_cell(bits, z, y, x, step):
    """Which places of a cell conduct."""
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
    """cells (z, y, x): the mask of each in planes z0 … z1 - 1 of cells. Returns the number of conducting voxels."""
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
    """As `find_cells`, where two neighbours are in one part only if strong[axis, label, label]: ranks of partitions."""
    voxels, part = 0, np.zeros(8, np.int64)
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                mask = _mask_of_cell(bits, z, y, x, step)
                voxels += popcount(mask)
                for i in range(8):
                    part[i] = i
                for axis in range(3):
                    bit = 4 >> axis
                    for i in range(8):
                        if i & bit or not mask >> i & 1 or not mask >> (i | bit) & 1:
                            continue
                        j = i | bit
                        here = labels[step[0] * z + (i >> 2), step[1] * y + (i >> 1 & 1), step[2] * x + (i & 1)]
                        there = labels[step[0] * z + (j >> 2), step[1] * y + (j >> 1 & 1), step[2] * x + (j & 1)]
                        if strong[axis, here, there]:
                            low, high = min(part[i], part[j]), max(part[i], part[j])
                            for other in range(8):
                                if part[other] == high:
                                    part[other] = low
                rank, begun = np.int64(0), 0
                for i in range(8):
                    if mask >> i & 1:
                        # A part is named by its first place; it has been given its number there.
                        if part[i] == i:
                            rank += (begun + 1) * completions[7 - i, begun]
                            begun += 1
                            part[i] = -begun
                        else:
                            part[i] = part[part[i]]
                            rank += -part[i] * completions[7 - i, begun]
                cells[z, y, x] = rank
    return voxels


@compiled
def count_rows(bits, counts, z0, z1):
    """counts (planes, rows): conducting voxels of each row."""
    for z in range(z0, z1):
        for y in range(counts.shape[1]):
            n = 0
            for k in range(bits.shape[2] - 2):
                n += popcount(bits[z + 1, y + 1, k + 1])
            counts[z, y] = n


@compiled
def count_parts(cells, tables, counts, z0, z1):
    """counts (2, planes, rows of cells): parts of red and black cells of each row of cells."""
    for z in range(z0, z1):
        for y in range(cells.shape[1]):
            both = np.zeros(2, np.int64)
            for x in range(cells.shape[2]):
                both[(z + y + x) & 1] += tables[0][cells[z, y, x]]
            counts[0, z, y], counts[1, z, y] = both[0], both[1]


# ---- rows in scratch memory --------------------------------------------------------------------------------


@inlined
def _wrapped(i, n, periodic):
    """The index that stands for i, or -1."""
    if 0 <= i < n:
        return i
    return (i + n) % n if periodic else -1


@inlined
def _zero_row(buffer, at, words):
    nothing = splat(buffer.dtype.type(0))
    store(buffer, at - 16, nothing)
    for k in range(words + 1):
        store(buffer, at + 16 * k, nothing)


@inlined
def _close_row(buffer, at, columns, periodic):
    """The voxels before the first and after the last."""
    buffer[at - 1] = buffer[at + columns - 1] if periodic else np.float32(0)
    buffer[at + columns] = buffer[at] if periodic else np.float32(0)


@inlined
def _spread_row(vector, rows, bits, z, y, geometry, buffer, at):
    here, words = rows[z * geometry[1] + y], geometry[3]
    for k in range(words):
        mask = np.int64(bits[z + 1, y + 1, k + 1])
        store(buffer, at + 16 * k, spread(vector, here, mask))
        here += popcount(mask)
    _close_row(buffer, at, geometry[2], geometry[6])


@inlined
def _masks(bits, z, y, k, geometry):
    """Which of 16 voxels conduct, and which conduct and have a conducting neighbour at x - 1 and x + 1."""
    own = np.int64(bits[z + 1, y + 1, k + 1])
    left = (own << 1 | np.int64(bits[z + 1, y + 1, k]) >> 15) & own
    right = (own >> 1 | (np.int64(bits[z + 1, y + 1, k + 2]) & 1) << 15) & own
    if geometry[6]:
        columns = geometry[2]
        if k == 0:
            left |= np.int64(bits[z + 1, y + 1, (columns - 1 >> 4) + 1]) >> (columns - 1 & 15) & own & 1
        if k == geometry[3] - 1:
            right |= (np.int64(bits[z + 1, y + 1, 1]) & 1) << (columns - 1 & 15) & own
    return own, left, right


@inlined
def _faces(z, y, k, geometry):
    """Which of 16 voxels lie at the face of potential 0, and of potential 1."""
    axis, first, last = geometry[7], geometry[8], geometry[9]
    if axis == 0:
        return (0xFFFF if z == first else 0), (0xFFFF if z == last else 0)
    if axis == 1:
        return (0xFFFF if y == first else 0), (0xFFFF if y == last else 0)
    return (1 << first - 16 * k if first >> 4 == k else 0), (1 << last - 16 * k if last >> 4 == k else 0)


@compiled
def _face_conductance(z, y, k, geometry, g, labels, resistance, buffer):
    """From 16 voxel centres to a face half a voxel away."""
    if labels is None:
        return splat(g[geometry[7]] + g[geometry[7]])
    for i in range(16):
        x = 16 * k + i
        inside = x < geometry[2] and z < labels.shape[0] and y < labels.shape[1]
        buffer[i] = g[geometry[7]] / resistance[labels[z, y, x]] if inside else resistance.dtype.type(0)
    return load(buffer, 0)


@compiled
def _conductances(z, y0, rows, geometry, g, labels, resistance, buffer, size, width):
    """With several conductivities: of the faces towards x - 1, y - 1 and z - 1 of plane z, three rings of `buffer`."""
    columns, nothing, infinite = geometry[2], resistance.dtype.type(0), resistance.dtype.type(np.inf)
    here, below = _wrapped(z, labels.shape[0], geometry[4]), _wrapped(z - 1, labels.shape[0], geometry[4])
    for j in range(rows + 2 * MARGIN):
        y = _wrapped(y0 + j - MARGIN, labels.shape[1], geometry[5])
        before = _wrapped(y0 + j - MARGIN - 1, labels.shape[1], geometry[5])
        at = (z & 3) * (size >> 2) + j * width + PAD
        if here < 0 or y < 0:
            for ring in range(3):
                _zero_row(buffer, ring * size + at, geometry[3])
            continue
        last = resistance[labels[here, y, columns - 1]] if geometry[6] else infinite
        for x in range(columns):
            own = resistance[labels[here, y, x]]
            buffer[at + x] = g[2] / (own + last)
            last = own
            buffer[size + at + x] = g[1] / (own + resistance[labels[here, before, x]]) if before >= 0 else nothing
            buffer[2 * size + at + x] = g[0] / (own + resistance[labels[below, y, x]]) if below >= 0 else nothing
        buffer[at + columns] = buffer[at] if geometry[6] else np.float32(0)


@inlined
def _around(v, back, here, front, width, g, c, size):
    """Sum over the six neighbours of conductance × v, at 16 voxels; offsets of the three planes in the ring."""
    if c is None:
        x = add(load(v, here - 1), load(v, here + 1))
        y = add(load(v, here - width), load(v, here + width))
        z = add(load(v, back), load(v, front))
        return fma(splat(g[2]), x, fma(splat(g[1]), y, multiply(splat(g[0]), z)))
    s = fma(load(c, here), load(v, here - 1), multiply(load(c, here + 1), load(v, here + 1)))
    s = fma(load(c, size + here), load(v, here - width), s)
    s = fma(load(c, size + here + width), load(v, here + width), s)
    s = fma(load(c, 2 * size + here), load(v, back), s)
    return fma(load(c, 2 * size + front), load(v, front), s)


@inlined
def _diagonal(bits, z, y, k, here, front, geometry, g, labels, resistance, width, c, size, few):
    """Sum of the conductances at 16 voxels, those to the faces included, and which of them conduct."""
    own, left, right = _masks(bits, z, y, k, geometry)
    if c is None:
        d = add(keep(splat(g[2]), left), keep(splat(g[2]), right))
        gy, gz = splat(g[1]), splat(g[0])
        d = add(d, keep(gy, np.int64(bits[z + 1, y, k + 1])))
        d = add(d, keep(gy, np.int64(bits[z + 1, y + 2, k + 1])))
        d = add(d, keep(gz, np.int64(bits[z, y + 1, k + 1])))
        d = add(d, keep(gz, np.int64(bits[z + 2, y + 1, k + 1])))
    else:
        d = add(load(c, here), load(c, here + 1))
        d = add(d, add(load(c, size + here), load(c, size + here + width)))
        d = add(d, add(load(c, 2 * size + here), load(c, 2 * size + front)))
    at_first, at_last = _faces(z, y, k, geometry)
    if at_first | at_last:
        face = _face_conductance(z, y, k, geometry, g, labels, resistance, few)
        d = add(d, add(keep(face, at_first), keep(face, at_last)))
    return d, own


# ---- the preconditioner's two halves -----------------------------------------------------------------------


@inlined
def _invert_row(bits, rows, r, z, y, geometry, g, labels, resistance, width, c, size, few, here, front, R, D):
    """Spread a row of r, and the inverse of its diagonal."""
    at = rows[z * geometry[1] + y]
    for k in range(geometry[3]):
        d, own = _diagonal(
            bits, z, y, k, here + 16 * k, front + 16 * k, geometry, g, labels, resistance, width, c, size, few
        )
        store(R, here + 16 * k, spread(r, at, own))
        store(D, here + 16 * k, inverse(d, own))
        at += popcount(own)


@compiled
def sweep_down(unit, geometry, g, bits, rows, cells, tables, step, parts, labels, resistance, r, coarse, scratch, c):
    """coarse = what a red then black Gauss–Seidel sweep from zero leaves of the residual r, summed over each part."""
    z0, z1, y0, y1 = unit
    planes, rows_all, columns, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    R, D, A, B, S = scratch[:size], scratch[size : 2 * size], scratch[2 * size : 3 * size], scratch[3 * size : 4 * size], scratch[4 * size : 5 * size]  # noqa: E501
    few, pair = np.zeros(16, scratch.dtype), np.zeros(16, scratch.dtype)
    if labels is not None:
        _conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            _conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
        zz = _wrapped(z, planes, geometry[4])
        here, front = (z & 3) * plane, (z + 1 & 3) * plane
        for j in range(1, height + 5):
            y = _wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(D, here + at, words)
                _zero_row(A, here + at, words)
                continue
            _invert_row(
                bits, rows, r, zz, y, geometry, g, labels, resistance, width, c, size, few, here + at, front + at, R, D
            )
            red = ODD if zz + y & 1 else EVEN
            for k in range(words):
                o = here + at + 16 * k
                store(A, o, keep(multiply(load(R, o), load(D, o)), red))
            _close_row(A, here + at, columns, geometry[6])
        if z < z0:
            continue
        here, front, back = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane
        zz = _wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = _wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(B, here + at, words)
                continue
            black = EVEN if zz + y & 1 else ODD
            for k in range(words):
                o = at + 16 * k
                s = add(load(R, here + o), _around(A, back + o, here + o, front + o, width, g, c, size))
                store(B, here + o, keep(multiply(s, load(D, here + o)), black))
            _close_row(B, here + at, columns, geometry[6])
        if z < z0 + 2:
            continue
        here, front, back = (z - 2 & 3) * plane, (z - 1 & 3) * plane, (z - 3 & 3) * plane
        zz = z - 2
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            red = ODD if zz + y & 1 else EVEN
            for k in range(words):
                o = at + 16 * k
                own = np.int64(bits[zz + 1, y + 1, k + 1])
                store(S, here + o, keep(_around(B, back + o, here + o, front + o, width, g, c, size), red & own))
        if step[0] == 1 or zz & 1:
            first = here if step[0] == 1 else back
            for j in range(MARGIN, height + MARGIN, step[1]):
                at, y = j * width + PAD, (y0 + j - MARGIN) // step[1]
                _restrict_row(
                    cells, tables, step, parts, zz // step[0], y, S, first + at, here + at, width, coarse, pair
                )


@compiled
def _restrict_row(cells, tables, step, parts, z, y, S, back, here, width, coarse, pair):
    rows, numbers, part, mask = cells.shape[1], tables[0], tables[1], tables[2]
    places = (parts[0, z * rows + y], parts[1, z * rows + y])
    even, odd = (places[1], places[0]) if z + y & 1 else places
    wide, flat = step[2] - 1, 15 >> step[2] - 1
    for x in range(cells.shape[2]):
        if not x & flat:
            o = step[2] * x
            s = load(S, back + o)
            if step[1] == 2:
                s = add(s, load(S, back + width + o))
            if step[0] == 2:
                t = load(S, here + o)
                if step[1] == 2:
                    t = add(t, load(S, here + width + o))
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
                    coarse[place + part[cell, i]] += S[at]
        if x & 1:
            odd += number
        else:
            even += number


@compiled
def _prolong_row(cells, tables, step, parts, z, y, coarse, scale, E, back, here, width):
    """The rows of a row of cells: scale × the values of the parts; insulating voxels of a cell hold anything."""
    rows, numbers, part = cells.shape[1], tables[0], tables[1]
    places = (parts[0, z * rows + y], parts[1, z * rows + y])
    even, odd = (places[1], places[0]) if z + y & 1 else places
    wide = step[2] - 1
    for x in range(cells.shape[2]):
        cell = cells[z, y, x]
        place, number = odd if x & 1 else even, numbers[cell]
        if x & 1:
            odd += number
        else:
            even += number
        at = step[2] * x
        if number <= 1:
            value = scale * coarse[place] if number else np.float32(0)
            E[back + at] = value
            E[back + at + wide] = value
            if step[1] == 2:
                E[back + width + at] = value
                E[back + width + at + wide] = value
            if step[0] == 2:
                E[here + at] = value
                E[here + at + wide] = value
                if step[1] == 2:
                    E[here + width + at] = value
                    E[here + width + at + wide] = value
        else:
            for i in range(8):
                if (i >> 2) < step[0] and (i >> 1 & 1) < step[1] and (i & 1) < step[2]:
                    to = (here if i >> 2 else back) + (width if i >> 1 & 1 else 0) + at + (i & 1)
                    E[to] = scale * coarse[place + part[cell, i]]


@compiled
def sweep_up(
    unit, geometry, g, bits, rows, cells, tables, step, parts, labels, resistance, r, coarse, scale, z_out, scratch, c
):  # fmt: skip
    """z_out = the sweep of `sweep_down` plus scale × the coarse correction, after its reverse; returns r · z_out."""
    z0, z1, y0, y1 = unit
    planes, rows_all, columns, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    R, D, A, B, E = scratch[:size], scratch[size : 2 * size], scratch[2 * size : 3 * size], scratch[3 * size : 4 * size], scratch[4 * size : 5 * size]  # noqa: E501
    few, sums = np.zeros(16, scratch.dtype), no_sum()
    if labels is not None:
        _conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            _conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
        zz = _wrapped(z, planes, geometry[4])
        here, front = (z & 3) * plane, (z + 1 & 3) * plane
        if zz >= 0 and (step[0] == 1 or not z & 1):
            for j in range(1, height + 5, step[1]):
                y = _wrapped(y0 + j - MARGIN, rows_all, geometry[5])
                if y >= 0:
                    at = j * width + PAD
                    _prolong_row(
                        cells, tables, step, parts, zz // step[0], y // step[1], coarse, scale, E, here + at,
                        front + at, width,
                    )  # fmt: skip
        for j in range(1, height + 5):
            y = _wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(D, here + at, words)
                _zero_row(A, here + at, words)
                continue
            _invert_row(
                bits, rows, r, zz, y, geometry, g, labels, resistance, width, c, size, few, here + at, front + at, R, D
            )
            red = ODD if zz + y & 1 else EVEN
            for k in range(words):
                o = here + at + 16 * k
                own = np.int64(bits[zz + 1, y + 1, k + 1])
                store(A, o, keep(fma(load(R, o), load(D, o), load(E, o)), red & own))
            _close_row(A, here + at, columns, geometry[6])
        if z < z0:
            continue
        here, front, back = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane
        zz = _wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = _wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(B, here + at, words)
                continue
            black = EVEN if zz + y & 1 else ODD
            for k in range(words):
                o = at + 16 * k
                s = add(load(R, here + o), _around(A, back + o, here + o, front + o, width, g, c, size))
                store(B, here + o, keep(multiply(s, load(D, here + o)), black))
            _close_row(B, here + at, columns, geometry[6])
        if z < z0 + 2:
            continue
        here, front, back = (z - 2 & 3) * plane, (z - 1 & 3) * plane, (z - 3 & 3) * plane
        zz = z - 2
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            red, out = ODD if zz + y & 1 else EVEN, rows[zz * rows_all + y]
            for k in range(words):
                o = at + 16 * k
                own = np.int64(bits[zz + 1, y + 1, k + 1])
                s = add(load(R, here + o), _around(B, back + o, here + o, front + o, width, g, c, size))
                value = add(keep(multiply(s, load(D, here + o)), red), load(B, here + o))
                sums = add_product(sums, value, load(R, here + o))
                number = popcount(own)
                store_few(z_out, out, gathered(value, own), number)
                out += number
    return total(sums)


# ---- the operator ------------------------------------------------------------------------------------------


@inlined
def _drop(V, L, low, to, from_):
    """V[to …] - V[from_ …] of 16 voxels, what float32 leaves out of V included."""
    drop = subtract(load(V, to), load(V, from_))
    return drop if low is None else add(drop, subtract(load(L, to), load(L, from_)))


@compiled
def energy(unit, geometry, g, bits, rows, labels, resistance, v, low, end, scratch, c):
    """Dissipated by v in the unit's voxels and the faces on their + sides, with the last face at potential `end`.

    low: None, or what float32 leaves out of v. The difference of two nearly equal floats is exact, so that v + low has
    differences as precise as those of small numbers.
    """
    z0, z1, y0, y1 = unit
    planes, rows_all, _, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V, L = scratch[:size], scratch[size : 2 * size]
    few = np.zeros(16, scratch.dtype)
    gz, gy, gx, faces = no_sum(), no_sum(), no_sum(), no_sum()
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0, z1 + 1):
        zz = _wrapped(z, planes, geometry[4])
        for j in range(MARGIN, height + MARGIN + 1):
            y, o = _wrapped(y0 + j - MARGIN, rows_all, geometry[5]), (z & 3) * plane + j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(V, o, words)
                if low is not None:
                    _zero_row(L, o, words)
            else:
                _spread_row(v, rows, bits, zz, y, geometry, V, o)
                if low is not None:
                    _spread_row(low, rows, bits, zz, y, geometry, L, o)
        if z == z0:
            continue
        if labels is not None:
            _conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, zz = (z - 1 & 3) * plane, (z & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            for k in range(words):
                o = at + 16 * k
                own, _, right = _masks(bits, zz, y, k, geometry)
                value = load(V, here + o)
                dx = keep(_drop(V, L, low, here + o + 1, here + o), right)
                dy = keep(_drop(V, L, low, here + o + width, here + o), own & np.int64(bits[zz + 1, y + 2, k + 1]))
                dz = keep(_drop(V, L, low, front + o, here + o), own & np.int64(bits[zz + 2, y + 1, k + 1]))
                if c is None:
                    gx, gy, gz = add_product(gx, dx, dx), add_product(gy, dy, dy), add_product(gz, dz, dz)
                else:
                    gx = add_product(gx, dx, multiply(dx, load(c, here + o + 1)))
                    gy = add_product(gy, dy, multiply(dy, load(c, size + here + o + width)))
                    gz = add_product(gz, dz, multiply(dz, load(c, 2 * size + front + o)))
                at_first, at_last = _faces(zz, y, k, geometry)
                if at_first | at_last:
                    face = _face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                    drop = keep(value, own & at_first)
                    faces = add_product(faces, drop, multiply(drop, face))
                    drop = subtract(splat(scratch.dtype.type(end)), value)
                    if low is not None:
                        drop = subtract(drop, load(L, here + o))
                    drop = keep(drop, own & at_last)
                    faces = add_product(faces, drop, multiply(drop, face))
    if c is None:
        return total(gz) * g[0] + total(gy) * g[1] + total(gx) * g[2] + total(faces)
    return total(gz) + total(gy) + total(gx) + total(faces)


@compiled
def unpack(geometry, bits, rows, v, z0, out):
    """Planes z0 … of v as out (z, y, x), insulating voxels left as they are."""
    for z in range(z0, z0 + out.shape[0]):
        for y in range(out.shape[1]):
            at = rows[z * geometry[1] + y]
            for k in range(geometry[3]):
                left = np.int64(bits[z + 1, y + 1, k + 1])
                while left:
                    out[z - z0, y, 16 * k + lowest(left)] = v[at]
                    left &= left - 1
                    at += 1


@compiled
def subtract_applied(unit, geometry, g, bits, rows, labels, resistance, p, alpha, end, r, scratch, c):
    """r -= alpha × (A p - b), where b is what the last face at potential `end` sends in."""
    z0, z1, y0, y1 = unit
    planes, rows_all, _, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V = scratch[:size]
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha))
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        zz = _wrapped(z, planes, geometry[4])
        for j in range(MARGIN - 1, height + MARGIN + 1):
            y, o = _wrapped(y0 + j - MARGIN, rows_all, geometry[5]), (z & 3) * plane + j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(V, o, words)
            else:
                _spread_row(p, rows, bits, zz, y, geometry, V, o)
        if z <= z0:
            continue
        if labels is not None:
            _conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, back, zz = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            out = rows[zz * rows_all + y]
            for k in range(words):
                o = at + 16 * k
                d, own = _diagonal(
                    bits, zz, y, k, here + o, front + o, geometry, g, labels, resistance, width, c, size, few
                )
                q = subtract(
                    multiply(d, load(V, here + o)),
                    _around(V, back + o, here + o, front + o, width, g, c, size),
                )
                if end:
                    _, at_last = _faces(zz, y, k, geometry)
                    if at_last:
                        face = _face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                        q = subtract(q, keep(multiply(face, splat(scratch.dtype.type(end))), at_last))
                number = popcount(own)
                store_few(r, out, fma(by, gathered(q, own), load_few(r, out, number)), number)
                out += number


@compiled
def subtract_outflow(unit, geometry, g, bits, rows, labels, resistance, p, low, alpha, end, r, scratch, c):
    """As `subtract_applied`, from differences between neighbours and with what float32 leaves out of p, `low` or None.

    Where conductances differ by many orders of magnitude, diagonal × p minus its neighbours is rounding alone; the sum
    of the currents is as precise as its largest.
    """
    z0, z1, y0, y1 = unit
    planes, rows_all, _, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V, L = scratch[:size], scratch[size : 2 * size]
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha))
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        zz = _wrapped(z, planes, geometry[4])
        for j in range(MARGIN - 1, height + MARGIN + 1):
            y, o = _wrapped(y0 + j - MARGIN, rows_all, geometry[5]), (z & 3) * plane + j * width + PAD
            if zz < 0 or y < 0:
                _zero_row(V, o, words)
                if low is not None:
                    _zero_row(L, o, words)
            else:
                _spread_row(p, rows, bits, zz, y, geometry, V, o)
                if low is not None:
                    _spread_row(low, rows, bits, zz, y, geometry, L, o)
        if z <= z0:
            continue
        if labels is not None:
            _conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, back, zz = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            out = rows[zz * rows_all + y]
            for k in range(words):
                o = here + at + 16 * k
                own, left, right = _masks(bits, zz, y, k, geometry)
                xs = keep(_drop(V, L, low, o, o - 1), left), keep(_drop(V, L, low, o, o + 1), right)
                ys = (
                    keep(_drop(V, L, low, o, o - width), own & np.int64(bits[zz + 1, y, k + 1])),
                    keep(_drop(V, L, low, o, o + width), own & np.int64(bits[zz + 1, y + 2, k + 1])),
                )
                before, after = back + at + 16 * k, front + at + 16 * k
                zs = (
                    keep(_drop(V, L, low, o, before), own & np.int64(bits[zz, y + 1, k + 1])),
                    keep(_drop(V, L, low, o, after), own & np.int64(bits[zz + 2, y + 1, k + 1])),
                )
                if c is None:
                    q = multiply(splat(g[2]), add(xs[0], xs[1]))
                    q = fma(splat(g[1]), add(ys[0], ys[1]), fma(splat(g[0]), add(zs[0], zs[1]), q))
                else:
                    q = fma(load(c, o), xs[0], multiply(load(c, o + 1), xs[1]))
                    q = fma(load(c, size + o), ys[0], fma(load(c, size + o + width), ys[1], q))
                    q = fma(load(c, 2 * size + o), zs[0], fma(load(c, 2 * size + after), zs[1], q))
                at_first, at_last = _faces(zz, y, k, geometry)
                if at_first | at_last:
                    face = _face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                    value, over = load(V, o), subtract(load(V, o), splat(scratch.dtype.type(end)))
                    if low is not None:
                        value, over = add(value, load(L, o)), add(over, load(L, o))
                    q = add(q, multiply(face, add(keep(value, own & at_first), keep(over, own & at_last))))
                number = popcount(own)
                store_few(r, out, fma(by, gathered(q, own), load_few(r, out, number)), number)
                out += number


@compiled
def add_in_two(high, low, p, alpha, begin, end):
    """high + low, two floats for one number, += alpha · p; elements begin … end - 1."""
    for i in range(begin, end):
        value = np.float64(high[i]) + np.float64(low[i]) + alpha * np.float64(p[i])
        high[i] = value
        low[i] = value - np.float64(high[i])


@compiled
def fill_ramp(geometry, bits, rows, v, z0, z1):
    """The potential of a uniform volume, voxels of planes z0 … z1 - 1."""
    axis, first, last = geometry[7], geometry[8], geometry[9]
    for z in range(z0, z1):
        for y in range(geometry[1]):
            at = rows[z * geometry[1] + y]
            for k in range(geometry[3]):
                left = np.int64(bits[z + 1, y + 1, k + 1])
                while left:
                    place = z if axis == 0 else y if axis == 1 else 16 * k + lowest(left)
                    v[at] = (place - first + 0.5) / (last - first + 1)
                    left &= left - 1
                    at += 1


@compiled
def add_scaled(y, x, scale_y, scale_x, begin, end):
    """y = scale_y · y + scale_x · x, elements begin … end - 1."""
    for i in range(begin, end):
        y[i] = scale_y * y[i] + scale_x * x[i]


# ---- the first coarse level --------------------------------------------------------------------------------

_NEAR = (0x0F, 0x33, 0x55)  # the half of a cell that is first along each axis
_TOWARDS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))


@compiled
def _half_at(labels, resistance, step, z, y, x, i):
    """Half the resistance of the voxel at place i of a cell."""
    if labels is None:
        return np.float64(0.5)
    return np.float64(resistance[labels[step[0] * z + (i >> 2), step[1] * y + (i >> 1 & 1), step[2] * x + (i & 1)]])


@compiled
def connect_parts(
    cells, tables, step, parts, geometry, g, labels, resistance, starts, places, values, to_faces, row0, row1, fill
):  # fmt: skip
    """Conductances between parts of neighbouring cells, and of one cell, rows of cells row0 … row1 - 1 (z × rows + y).

    First, not `fill`: starts[i + 1] = the number of neighbours of part i. Then, with starts the running sum: places
    and values of the neighbours of each, and to_faces, the conductance to the two outer faces.
    """
    deep, rows, columns = cells.shape
    numbers, part, mask = tables
    axis, first, last = geometry[7], geometry[8], geometry[9]
    between = np.zeros((8, 8), np.float64)
    written = np.zeros(8, np.int64)
    # Where the parts of the next cell start, of colours 0 and 1, in this row and the four beside it.
    place = np.zeros((5, 2), np.int64)
    near = np.zeros(5, np.int64)
    for row in range(row0, row1):
        z, y = row // rows, row % rows
        near[4] = row
        for side in range(4):
            zz = _wrapped(z + _TOWARDS[side][0], deep, geometry[4])
            yy = _wrapped(y + _TOWARDS[side][1], rows, geometry[5])
            near[side] = zz * rows + yy if zz >= 0 and yy >= 0 else -1
        for side in range(5):
            if near[side] >= 0:
                place[side, 0], place[side, 1] = parts[0, near[side]], parts[1, near[side]]
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
                        zz, yy, xx = z, y, _wrapped(x + _TOWARDS[side][2], columns, geometry[6])
                        if xx < 0:
                            continue
                        neighbour, there = cells[z, y, xx], z + y + xx & 1
                        if xx == x + 1:
                            other = place[4, there] + (number if there == colour else 0)
                        elif xx == x - 1:
                            other = place[4, there] - numbers[neighbour]
                        elif xx == 0:
                            other = parts[there, row]
                        else:
                            other = parts[there, row + 1] - numbers[neighbour]
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
                        between[part[cell, i], part[neighbour, j]] += g[along] / h
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
                            if not own_mask >> i & 1 or not own_mask >> j & 1 or part[cell, i] == part[cell, j]:
                                continue
                            h = _half_at(labels, resistance, step, z, y, x, i)
                            h += _half_at(labels, resistance, step, z, y, x, j)
                            between[part[cell, i], part[cell, j]] += g[along] / h
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
                                to_faces[own + part[cell, i]] += ends * g[axis] / h
                if not fill:
                    for a in range(number):
                        starts[own + a + 1] = written[a]
            for side in range(5):
                if near[side] >= 0:
                    zz, yy = near[side] // rows, near[side] % rows
                    place[side, zz + yy + x & 1] += numbers[cells[zz, yy, x]]
