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

from hpcres.transport.cells import prolong_row, restrict_row, wrapped
from hpcres.transport.vectors import (
    add,
    add_product,
    compiled,
    divide,
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
)

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
def pack(labels, conducts, bits, z0, z1):
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
def _zero_row(buffer, at, words):
    nothing = splat(buffer.dtype.type(0))
    store(buffer, at - 16, nothing)
    for k in range(words + 1):
        store(buffer, at + 16 * k, nothing)


@inlined
def _close_row(buffer, at, columns, periodic):
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
    _close_row(buffer, at, geometry[2], geometry[6])


@inlined
def _spread_plane(v, low, rows, bits, z, y0, below, height, geometry, V, L, plane, width):
    """Spread plane z of v into the ring V, and that of `low`, where it is not None, into the ring L.

    The rows are `below` rows before the unit's own rows, these, and one row after.
    """
    zz = wrapped(z, geometry[0], geometry[4])
    for j in range(MARGIN - below, height + MARGIN + 1):
        y, o = wrapped(y0 + j - MARGIN, geometry[1], geometry[5]), (z & 3) * plane + j * width + PAD
        if zz < 0 or y < 0:
            _zero_row(V, o, geometry[3])
            if low is not None:
                _zero_row(L, o, geometry[3])
        else:
            _spread_row(v, rows, bits, zz, y, geometry, V, o)
            if low is not None:
                _spread_row(low, rows, bits, zz, y, geometry, L, o)


@inlined
def _masks(bits, z, y, k, geometry):
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
def _faces(z, y, k, geometry):
    """Return which of 16 voxels lie at the face of potential 0, and which at that of potential 1."""
    axis, first, last = geometry[7], geometry[8], geometry[9]
    if axis == 0:
        return (0xFFFF if z == first else 0), (0xFFFF if z == last else 0)
    if axis == 1:
        return (0xFFFF if y == first else 0), (0xFFFF if y == last else 0)
    return (1 << first - 16 * k if first >> 4 == k else 0), (1 << last - 16 * k if last >> 4 == k else 0)


@compiled
def _face_conductance(z, y, k, geometry, g, labels, resistance, buffer):
    """Return the conductances from 16 voxel centres to a face half a voxel away."""
    if labels is None:
        return splat(g[geometry[7]] + g[geometry[7]])
    for i in range(16):
        x = 16 * k + i
        inside = x < geometry[2] and z < labels.shape[0] and y < labels.shape[1]
        buffer[i] = g[geometry[7]] / resistance[labels[z, y, x]] if inside else resistance.dtype.type(0)
    return load(buffer, 0)


@compiled
def _conductances(z, y0, rows, geometry, g, labels, resistance, buffer, size, width):
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
                _zero_row(buffer, ring * size + at, geometry[3])
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
            own = load(buffer, o)
            store(buffer, o, divide(splat(g[2]), add(own, load(buffer, o - 1))))
            store(buffer, size + o, divide(splat(g[1]), add(own, load(buffer, size + o))))
            store(buffer, 2 * size + o, divide(splat(g[0]), add(own, load(buffer, 2 * size + o))))
        if before < 0:
            _zero_row(buffer, size + at, geometry[3])
        if below < 0:
            _zero_row(buffer, 2 * size + at, geometry[3])
        buffer[at + columns] = buffer[at] if geometry[6] else np.float32(0)


@inlined
def _around(v, back, here, front, width, g, c, size):
    """Sum conductance × v over the six neighbours, at 16 voxels.

    `back`, `here` and `front` are offsets of the three planes in the ring.
    """
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
    """Sum the conductances at 16 voxels, those to the faces included, and return which of the voxels conduct."""
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
    """Spread a row of r into R, and write the inverse of its diagonal to D."""
    at = rows[z * geometry[1] + y]
    for k in range(geometry[3]):
        d, own = _diagonal(
            bits, z, y, k, here + 16 * k, front + 16 * k, geometry, g, labels, resistance, width, c, size, few
        )
        store(R, here + 16 * k, spread(r, at, own))
        store(D, here + 16 * k, inverse(d, own))
        at += popcount(own)


@compiled
def sweep_down(
    unit, geometry, g, bits, rows, cells, tables, step, aggregates, labels, resistance, r, coarse, scratch, c
):
    """Sweep from zero and set `coarse` to the rest of the residual r, summed over each aggregate.

    The sweep is Gauss–Seidel, red then black. The rest is what it leaves of r.
    """
    z0, z1, y0, y1 = unit
    planes, rows_all, columns, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    R, D, A, B, S = (
        scratch[:size],
        scratch[size : 2 * size],
        scratch[2 * size : 3 * size],
        scratch[3 * size : 4 * size],
        scratch[4 * size : 5 * size],
    )
    few, pair = np.zeros(16, scratch.dtype), np.zeros(16, scratch.dtype)
    if labels is not None:
        _conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            _conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
        zz = wrapped(z, planes, geometry[4])
        here, front = (z & 3) * plane, (z + 1 & 3) * plane
        for j in range(1, height + 5):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
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
        zz = wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
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
                restrict_row(
                    cells, tables, step, aggregates, zz // step[0], y, S, first + at, here + at, width, coarse, pair
                )


@compiled
def sweep_up(
    unit,
    geometry,
    g,
    bits,
    rows,
    cells,
    tables,
    step,
    aggregates,
    labels,
    resistance,
    r,
    coarse,
    scale,
    z_out,
    scratch,
    c,
):
    """Set z_out to the sweep of `sweep_down` plus scale × the coarse correction, then the reverse sweep.

    Returns the sum of r · z_out.
    """
    z0, z1, y0, y1 = unit
    planes, rows_all, columns, words = geometry[:4]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    R, D, A, B, E = (
        scratch[:size],
        scratch[size : 2 * size],
        scratch[2 * size : 3 * size],
        scratch[3 * size : 4 * size],
        scratch[4 * size : 5 * size],
    )
    few, sums = np.zeros(16, scratch.dtype), no_sum()
    if labels is not None:
        _conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            _conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
        zz = wrapped(z, planes, geometry[4])
        here, front = (z & 3) * plane, (z + 1 & 3) * plane
        if zz >= 0 and (step[0] == 1 or not z & 1):
            for j in range(1, height + 5, step[1]):
                y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
                if y >= 0:
                    at = j * width + PAD
                    prolong_row(
                        cells,
                        tables,
                        step,
                        aggregates,
                        zz // step[0],
                        y // step[1],
                        coarse,
                        scale,
                        E,
                        here + at,
                        front + at,
                        width,
                        few,
                    )
        for j in range(1, height + 5):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
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
        zz = wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
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
    """Return the differences of the potentials of 16 voxels at `to` and those at `from_`.

    The potential is V + L, or V where `low` is None.
    """
    drop = subtract(load(V, to), load(V, from_))
    return drop if low is None else add(drop, subtract(load(L, to), load(L, from_)))


@compiled
def energy(unit, geometry, g, bits, rows, labels, resistance, v, low, end, scratch, c):
    """Return the energy that v dissipates in the unit's voxels and the faces on their + sides.

    The last face is at potential `end`. `low` is None, or the second of two float32 vectors whose sum is the potential.
    float32 subtracts two nearly equal numbers without error, so a difference of v plus a difference of low has seven
    digits.
    """
    z0, z1, y0, y1 = unit
    words = geometry[3]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V, L = scratch[:size], scratch[size : 2 * size]
    few = np.zeros(16, scratch.dtype)
    gz, gy, gx, faces = no_sum(), no_sum(), no_sum(), no_sum()
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0, z1 + 1):
        _spread_plane(v, low, rows, bits, z, y0, 0, height, geometry, V, L, plane, width)
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
    """Write planes z0 … of v to `out` (z, y, x), with insulating voxels left as they are."""
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
    """Set r -= alpha × (A p - b), where b is what the last face at potential `end` sends in."""
    z0, z1, y0, y1 = unit
    rows_all, words = geometry[1], geometry[3]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V = scratch[:size]
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha))
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        _spread_plane(p, None, rows, bits, z, y0, 1, height, geometry, V, V, plane, width)
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
                    multiply(d, load(V, here + o)), _around(V, back + o, here + o, front + o, width, g, c, size)
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
    """Compute as `subtract_applied`, from differences of potentials; of p, or p + low where low is not None.

    Where conductances differ by many orders of magnitude, diagonal × p minus the sum over neighbours has no correct
    digit. The sum of the currents to the neighbours has the precision of the largest current.
    """
    z0, z1, y0, y1 = unit
    rows_all, words = geometry[1], geometry[3]
    width, height = 2 * PAD + 16 * words, y1 - y0
    plane = (height + 2 * MARGIN) * width
    size = RING * plane
    V, L = scratch[:size], scratch[size : 2 * size]
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha))
    if labels is not None:
        _conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        _spread_plane(p, low, rows, bits, z, y0, 1, height, geometry, V, L, plane, width)
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
def add_two_floats(high, low, p, alpha, begin, end):
    """Add alpha · p to high + low, elements begin … end - 1; high holds the sum as float32, low the remainder."""
    for i in range(begin, end):
        value = np.float64(high[i]) + np.float64(low[i]) + alpha * np.float64(p[i])
        high[i] = value
        low[i] = value - np.float64(high[i])


@compiled
def fill_ramp(geometry, bits, rows, v, z0, z1):
    """Set v to the potential of a uniform volume, voxels of planes z0 … z1 - 1."""
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
    """Set y = scale_y · y + scale_x · x, elements begin … end - 1."""
    for i in range(begin, end):
        y[i] = scale_y * y[i] + scale_x * x[i]
