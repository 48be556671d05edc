"""Fluxes between voxels: the energy of a potential, what flows out of each voxel, and sums of vectors."""

from __future__ import annotations

import numpy as np

from hpcres.simd.masks import gathered, keep, load_few, store_few
from hpcres.simd.registers import SIXTEEN, add, add_product, fma, load, multiply, no_sum, splat, subtract, total
from hpcres.simd.words import popcount, trailing_zeros
from hpcres.transport.compiling import compiled, inlined
from hpcres.transport.rows import (
    MARGIN,
    PAD,
    RING,
    at_end_faces,
    face_conductance,
    fill_conductances,
    fill_diagonal,
    row_masks,
    spread_plane,
    sum_around,
)


@inlined
def _drop(V, L, low, to, from_):
    """Return the differences of the potentials of 16 voxels at `to` and those at `from_`.

    The potential is V + L, or V where `low` is None.
    """
    drop = subtract(load(V, to, SIXTEEN), load(V, from_, SIXTEEN))
    return drop if low is None else add(drop, subtract(load(L, to, SIXTEEN), load(L, from_, SIXTEEN)))


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
        fill_conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0, z1 + 1):
        spread_plane(v, low, rows, bits, z, y0, 0, height, geometry, V, L, plane, width)
        if z == z0:
            continue
        if labels is not None:
            fill_conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, zz = (z - 1 & 3) * plane, (z & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            for k in range(words):
                o = at + 16 * k
                own, _, right = row_masks(bits, zz, y, k, geometry)
                value = load(V, here + o, SIXTEEN)
                dx = keep(_drop(V, L, low, here + o + 1, here + o), right)
                dy = keep(_drop(V, L, low, here + o + width, here + o), own & np.int64(bits[zz + 1, y + 2, k + 1]))
                dz = keep(_drop(V, L, low, front + o, here + o), own & np.int64(bits[zz + 2, y + 1, k + 1]))
                if c is None:
                    gx, gy, gz = add_product(gx, dx, dx), add_product(gy, dy, dy), add_product(gz, dz, dz)
                else:
                    gx = add_product(gx, dx, multiply(dx, load(c, here + o + 1, SIXTEEN)))
                    gy = add_product(gy, dy, multiply(dy, load(c, size + here + o + width, SIXTEEN)))
                    gz = add_product(gz, dz, multiply(dz, load(c, 2 * size + front + o, SIXTEEN)))
                at_first, at_last = at_end_faces(zz, y, k, geometry)
                if at_first | at_last:
                    face = face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                    drop = keep(value, own & at_first)
                    faces = add_product(faces, drop, multiply(drop, face))
                    drop = subtract(splat(scratch.dtype.type(end), SIXTEEN), value)
                    if low is not None:
                        drop = subtract(drop, load(L, here + o, SIXTEEN))
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
                    out[z - z0, y, 16 * k + trailing_zeros(left)] = v[at]
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
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha), SIXTEEN)
    if labels is not None:
        fill_conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        spread_plane(p, None, rows, bits, z, y0, 1, height, geometry, V, V, plane, width)
        if z <= z0:
            continue
        if labels is not None:
            fill_conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, back, zz = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            out = rows[zz * rows_all + y]
            for k in range(words):
                o = at + 16 * k
                d, own = fill_diagonal(
                    bits, zz, y, k, here + o, front + o, geometry, g, labels, resistance, width, c, size, few
                )
                q = subtract(
                    multiply(d, load(V, here + o, SIXTEEN)),
                    sum_around(V, back + o, here + o, front + o, width, g, c, size),
                )
                if end:
                    _, at_last = at_end_faces(zz, y, k, geometry)
                    if at_last:
                        face = face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                        q = subtract(q, keep(multiply(face, splat(scratch.dtype.type(end), SIXTEEN)), at_last))
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
    few, by = np.zeros(16, scratch.dtype), splat(r.dtype.type(-alpha), SIXTEEN)
    if labels is not None:
        fill_conductances(z0, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 1, z1 + 1):
        spread_plane(p, low, rows, bits, z, y0, 1, height, geometry, V, L, plane, width)
        if z <= z0:
            continue
        if labels is not None:
            fill_conductances(z, y0, height, geometry, g, labels, resistance, c, size, width)
        here, front, back, zz = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane, z - 1
        for j in range(MARGIN, height + MARGIN):
            y, at = y0 + j - MARGIN, j * width + PAD
            out = rows[zz * rows_all + y]
            for k in range(words):
                o = here + at + 16 * k
                own, left, right = row_masks(bits, zz, y, k, geometry)
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
                    q = multiply(splat(g[2], SIXTEEN), add(xs[0], xs[1]))
                    q = fma(splat(g[1], SIXTEEN), add(ys[0], ys[1]), fma(splat(g[0], SIXTEEN), add(zs[0], zs[1]), q))
                else:
                    q = fma(load(c, o, SIXTEEN), xs[0], multiply(load(c, o + 1, SIXTEEN), xs[1]))
                    q = fma(load(c, size + o, SIXTEEN), ys[0], fma(load(c, size + o + width, SIXTEEN), ys[1], q))
                    q = fma(load(c, 2 * size + o, SIXTEEN), zs[0], fma(load(c, 2 * size + after, SIXTEEN), zs[1], q))
                at_first, at_last = at_end_faces(zz, y, k, geometry)
                if at_first | at_last:
                    face = face_conductance(zz, y, k, geometry, g, labels, resistance, few)
                    value, over = (
                        load(V, o, SIXTEEN),
                        subtract(load(V, o, SIXTEEN), splat(scratch.dtype.type(end), SIXTEEN)),
                    )
                    if low is not None:
                        value, over = add(value, load(L, o, SIXTEEN)), add(over, load(L, o, SIXTEEN))
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
                    place = z if axis == 0 else y if axis == 1 else 16 * k + trailing_zeros(left)
                    v[at] = (place - first + 0.5) / (last - first + 1)
                    left &= left - 1
                    at += 1


@compiled
def add_scaled(y, x, scale_y, scale_x, begin, end):
    """Set y = scale_y · y + scale_x · x, elements begin … end - 1."""
    for i in range(begin, end):
        y[i] = scale_y * y[i] + scale_x * x[i]
