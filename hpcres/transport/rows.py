"""The finest level: voxels, of which vectors hold only the conducting ones, in the order z, y, x.

Bits say which voxels conduct. A kernel works on a unit, a box of whole z and y ranges. It marches along z with a few
planes of its rows spread out into scratch memory, where a row is a plain array with zeros at insulating voxels.
Red voxels are those with even z + y + x. A sweep updates one colour from the other, so no order of units can change a
bit of the result. A sweep from zero and its reverse need no vector between them: what lies in between follows from the
residual and the coarse correction.

geometry, a tuple of ints: planes, rows (both padded to even), columns, words of 16 columns, periodic z, y, x (0, 1),
axis, first and last index along the axis (where the faces at potential 0 and 1 are; -9 where they are elsewhere).
bits: uint16 (planes + 2, rows + 2, words + 2), bit i of word k + 1 is column 16 k + i; the outermost planes and rows
repeat the opposite ones where the axis is periodic. g: conductances of a face between voxels of conductivity 1, z, y,
x. With several conductivities `labels` (z, y, x) and `resistance` (half a voxel's, by label) are arrays, else None.
"""

from __future__ import annotations

import numpy as np

from hpcres.simd.masks import keep, spread
from hpcres.simd.registers import SIXTEEN, add, divide, fma, load, multiply, splat, store
from hpcres.simd.words import popcount
from hpcres.transport.cells import wrapped
from hpcres.transport.compiling import compiled, inlined

PAD = 16  # floats before and after a row in scratch memory, of which one is used
RING = 4  # planes of scratch memory
MARGIN = 3  # rows of scratch memory beyond a unit
EVEN, ODD = 0x5555, 0xAAAA


def scratch_floats(rows: int, words: int) -> int:
    """Return the elements of one scratch array of a unit of so many rows.

    A kernel has five such arrays, and three more for conductances.
    """
    return (rows + 2 * MARGIN) * (2 * PAD + 16 * words) * RING


@compiled
def pack_planes(labels, conducts, bits, z0, z1):
    """Set the bits of the planes z0 … z1 - 1 of labels (z, y, x) where `conducts` holds for a voxel's label."""
    rows, columns = labels.shape[1:]
    for z in range(z0, z1):
        for y in range(rows):
            for k in range((columns + 15) // 16):
                word = np.int64(0)
                for i in range(min(16, columns - 16 * k)):
                    word |= np.int64(conducts[labels[z, y, 16 * k + i]]) << i
                bits[z + 1, y + 1, k + 1] = word


@compiled
def count_rows(bits, counts, z0, z1):
    """Count the conducting voxels of each row into `counts` (planes, rows)."""
    for z in range(z0, z1):
        for y in range(counts.shape[1]):
            n = 0
            for k in range(bits.shape[2] - 2):
                n += popcount(bits[z + 1, y + 1, k + 1])
            counts[z, y] = n


# ---- rows in scratch memory --------------------------------------------------------------------------------


@inlined
def zero_row(buffer, at, words):
    """Set a row of scratch memory to zero, and the floats before and after it."""
    nothing = splat(buffer.dtype.type(0), SIXTEEN)
    store(buffer, at - 16, nothing)
    for k in range(words + 1):
        store(buffer, at + 16 * k, nothing)


@inlined
def close_row(buffer, at, columns, periodic):
    """Set the voxels before the first and after the last: those of the opposite end, or 0."""
    buffer[at - 1] = buffer[at + columns - 1] if periodic else np.float32(0)
    buffer[at + columns] = buffer[at] if periodic else np.float32(0)


@inlined
def _spread_row(vector, rows, bits, z, y, geometry, buffer, at):
    here, words = rows[z * geometry[1] + y], geometry[3]
    for k in range(words):
        mask = np.int64(bits[z + 1, y + 1, k + 1])
        store(buffer, at + 16 * k, spread(vector, here, mask))
        here += popcount(mask)
    close_row(buffer, at, geometry[2], geometry[6])


@inlined
def spread_plane(v, low, rows, bits, z, y0, below, height, geometry, V, L, plane, width):
    """Spread plane z of v into the ring V, and that of `low`, where it is not None, into the ring L.

    The rows are `below` rows before the unit's own rows, these, and one row after.
    """
    zz = wrapped(z, geometry[0], geometry[4])
    for j in range(MARGIN - below, height + MARGIN + 1):
        y, o = wrapped(y0 + j - MARGIN, geometry[1], geometry[5]), (z & 3) * plane + j * width + PAD
        if zz < 0 or y < 0:
            zero_row(V, o, geometry[3])
            if low is not None:
                zero_row(L, o, geometry[3])
        else:
            _spread_row(v, rows, bits, zz, y, geometry, V, o)
            if low is not None:
                _spread_row(low, rows, bits, zz, y, geometry, L, o)


@inlined
def row_masks(bits, z, y, k, geometry):
    """Return which of 16 voxels conduct, and which conduct and have a conducting neighbour at x - 1 and at x + 1."""
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
def at_end_faces(z, y, k, geometry):
    """Return which of 16 voxels lie at the face of potential 0, and which at that of potential 1."""
    axis, first, last = geometry[7], geometry[8], geometry[9]
    if axis == 0:
        return (0xFFFF if z == first else 0), (0xFFFF if z == last else 0)
    if axis == 1:
        return (0xFFFF if y == first else 0), (0xFFFF if y == last else 0)
    return (1 << first - 16 * k if first >> 4 == k else 0), (1 << last - 16 * k if last >> 4 == k else 0)


@compiled
def face_conductance(z, y, k, geometry, g, labels, resistance, buffer):
    """Return the conductances from 16 voxel centres to a face half a voxel away."""
    if labels is None:
        return splat(g[geometry[7]] + g[geometry[7]], SIXTEEN)
    for i in range(16):
        x = 16 * k + i
        inside = x < geometry[2] and z < labels.shape[0] and y < labels.shape[1]
        buffer[i] = g[geometry[7]] / resistance[labels[z, y, x]] if inside else resistance.dtype.type(0)
    return load(buffer, 0, SIXTEEN)


@compiled
def fill_conductances(z, y0, rows, geometry, g, labels, resistance, buffer, size, width):
    """Fill three rings of `buffer` with conductances of plane z, for several conductivities.

    The rings hold those of the faces towards x - 1, y - 1 and z - 1.
    """
    columns, infinite = geometry[2], resistance.dtype.type(np.inf)
    here, below = wrapped(z, labels.shape[0], geometry[4]), wrapped(z - 1, labels.shape[0], geometry[4])
    for j in range(rows + 2 * MARGIN):
        y = wrapped(y0 + j - MARGIN, labels.shape[1], geometry[5])
        before = wrapped(y0 + j - MARGIN - 1, labels.shape[1], geometry[5])
        at = (z & 3) * (size >> 2) + j * width + PAD
        if here < 0 or y < 0:
            for ring in range(3):
                zero_row(buffer, ring * size + at, geometry[3])
            continue
        # First the resistances of each voxel and of its neighbours, then sixteen divisions at a time.
        buffer[at - 1] = resistance[labels[here, y, columns - 1]] if geometry[6] else infinite
        for x in range(columns):
            buffer[at + x] = resistance[labels[here, y, x]]
        for x in range(columns, 16 * geometry[3]):
            buffer[at + x] = infinite
        if before >= 0:
            for x in range(columns):
                buffer[size + at + x] = resistance[labels[here, before, x]]
        if below >= 0:
            for x in range(columns):
                buffer[2 * size + at + x] = resistance[labels[below, y, x]]
        for k in range(geometry[3] - 1, -1, -1):  # the voxel at x - 1 is read before its resistance is replaced
            o = at + 16 * k
            own = load(buffer, o, SIXTEEN)
            store(buffer, o, divide(splat(g[2], SIXTEEN), add(own, load(buffer, o - 1, SIXTEEN))))
            store(buffer, size + o, divide(splat(g[1], SIXTEEN), add(own, load(buffer, size + o, SIXTEEN))))
            store(buffer, 2 * size + o, divide(splat(g[0], SIXTEEN), add(own, load(buffer, 2 * size + o, SIXTEEN))))
        if before < 0:
            zero_row(buffer, size + at, geometry[3])
        if below < 0:
            zero_row(buffer, 2 * size + at, geometry[3])
        buffer[at + columns] = buffer[at] if geometry[6] else np.float32(0)


@inlined
def sum_around(v, back, here, front, width, g, c, size):
    """Sum conductance × v over the six neighbours, at 16 voxels.

    `back`, `here` and `front` are offsets of the three planes in the ring.
    """
    if c is None:
        x = add(load(v, here - 1, SIXTEEN), load(v, here + 1, SIXTEEN))
        y = add(load(v, here - width, SIXTEEN), load(v, here + width, SIXTEEN))
        z = add(load(v, back, SIXTEEN), load(v, front, SIXTEEN))
        return fma(splat(g[2], SIXTEEN), x, fma(splat(g[1], SIXTEEN), y, multiply(splat(g[0], SIXTEEN), z)))
    s = fma(
        load(c, here, SIXTEEN),
        load(v, here - 1, SIXTEEN),
        multiply(load(c, here + 1, SIXTEEN), load(v, here + 1, SIXTEEN)),
    )
    s = fma(load(c, size + here, SIXTEEN), load(v, here - width, SIXTEEN), s)
    s = fma(load(c, size + here + width, SIXTEEN), load(v, here + width, SIXTEEN), s)
    s = fma(load(c, 2 * size + here, SIXTEEN), load(v, back, SIXTEEN), s)
    return fma(load(c, 2 * size + front, SIXTEEN), load(v, front, SIXTEEN), s)


@inlined
def fill_diagonal(bits, z, y, k, here, front, geometry, g, labels, resistance, width, c, size, few):
    """Sum the conductances at 16 voxels, those to the faces included, and return which of the voxels conduct."""
    own, left, right = row_masks(bits, z, y, k, geometry)
    if c is None:
        d = add(keep(splat(g[2], SIXTEEN), left), keep(splat(g[2], SIXTEEN), right))
        gy, gz = splat(g[1], SIXTEEN), splat(g[0], SIXTEEN)
        d = add(d, keep(gy, np.int64(bits[z + 1, y, k + 1])))
        d = add(d, keep(gy, np.int64(bits[z + 1, y + 2, k + 1])))
        d = add(d, keep(gz, np.int64(bits[z, y + 1, k + 1])))
        d = add(d, keep(gz, np.int64(bits[z + 2, y + 1, k + 1])))
    else:
        d = add(load(c, here, SIXTEEN), load(c, here + 1, SIXTEEN))
        d = add(d, add(load(c, size + here, SIXTEEN), load(c, size + here + width, SIXTEEN)))
        d = add(d, add(load(c, 2 * size + here, SIXTEEN), load(c, 2 * size + front, SIXTEEN)))
    at_first, at_last = at_end_faces(z, y, k, geometry)
    if at_first | at_last:
        face = face_conductance(z, y, k, geometry, g, labels, resistance, few)
        d = add(d, add(keep(face, at_first), keep(face, at_last)))
    return d, own
