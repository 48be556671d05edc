"""The two halves of the preconditioner on voxels: from zero down to the aggregates of level 1, and back up."""

from __future__ import annotations

import numpy as np

from hpcres.simd.masks import gathered, inverse, keep, spread, store_few
from hpcres.simd.registers import SIXTEEN, add, add_product, fma, load, multiply, no_sum, store, total
from hpcres.simd.words import popcount
from hpcres.transport.cells import prolong_row, restrict_row, wrapped
from hpcres.transport.compiling import compiled, inlined
from hpcres.transport.rows import (
    EVEN,
    MARGIN,
    ODD,
    PAD,
    RING,
    close_row,
    fill_conductances,
    fill_diagonal,
    sum_around,
    zero_row,
)


@inlined
def _invert_row(bits, rows, r, z, y, geometry, g, labels, resistance, width, c, size, few, here, front, R, D):
    """Spread a row of r into R, and write the inverse of its diagonal to D."""
    at = rows[z * geometry[1] + y]
    for k in range(geometry[3]):
        d, own = fill_diagonal(
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
        fill_conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            fill_conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
        zz = wrapped(z, planes, geometry[4])
        here, front = (z & 3) * plane, (z + 1 & 3) * plane
        for j in range(1, height + 5):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                zero_row(D, here + at, words)
                zero_row(A, here + at, words)
                continue
            _invert_row(
                bits, rows, r, zz, y, geometry, g, labels, resistance, width, c, size, few, here + at, front + at, R, D
            )
            red = ODD if zz + y & 1 else EVEN
            for k in range(words):
                o = here + at + 16 * k
                store(A, o, keep(multiply(load(R, o, SIXTEEN), load(D, o, SIXTEEN)), red))
            close_row(A, here + at, columns, geometry[6])
        if z < z0:
            continue
        here, front, back = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane
        zz = wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                zero_row(B, here + at, words)
                continue
            black = EVEN if zz + y & 1 else ODD
            for k in range(words):
                o = at + 16 * k
                s = add(load(R, here + o, SIXTEEN), sum_around(A, back + o, here + o, front + o, width, g, c, size))
                store(B, here + o, keep(multiply(s, load(D, here + o, SIXTEEN)), black))
            close_row(B, here + at, columns, geometry[6])
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
                store(S, here + o, keep(sum_around(B, back + o, here + o, front + o, width, g, c, size), red & own))
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
        fill_conductances(z0 - 2, y0, height, geometry, g, labels, resistance, c, size, width)
    for z in range(z0 - 2, z1 + 2):
        if labels is not None:
            fill_conductances(z + 1, y0, height, geometry, g, labels, resistance, c, size, width)
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
                zero_row(D, here + at, words)
                zero_row(A, here + at, words)
                continue
            _invert_row(
                bits, rows, r, zz, y, geometry, g, labels, resistance, width, c, size, few, here + at, front + at, R, D
            )
            red = ODD if zz + y & 1 else EVEN
            for k in range(words):
                o = here + at + 16 * k
                own = np.int64(bits[zz + 1, y + 1, k + 1])
                store(A, o, keep(fma(load(R, o, SIXTEEN), load(D, o, SIXTEEN), load(E, o, SIXTEEN)), red & own))
            close_row(A, here + at, columns, geometry[6])
        if z < z0:
            continue
        here, front, back = (z - 1 & 3) * plane, (z & 3) * plane, (z - 2 & 3) * plane
        zz = wrapped(z - 1, planes, geometry[4])
        for j in range(2, height + 4):
            y = wrapped(y0 + j - MARGIN, rows_all, geometry[5])
            at = j * width + PAD
            if zz < 0 or y < 0:
                zero_row(B, here + at, words)
                continue
            black = EVEN if zz + y & 1 else ODD
            for k in range(words):
                o = at + 16 * k
                s = add(load(R, here + o, SIXTEEN), sum_around(A, back + o, here + o, front + o, width, g, c, size))
                store(B, here + o, keep(multiply(s, load(D, here + o, SIXTEEN)), black))
            close_row(B, here + at, columns, geometry[6])
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
                s = add(load(R, here + o, SIXTEEN), sum_around(B, back + o, here + o, front + o, width, g, c, size))
                value = add(keep(multiply(s, load(D, here + o, SIXTEEN)), red), load(B, here + o, SIXTEEN))
                sums = add_product(sums, value, load(R, here + o, SIXTEEN))
                number = popcount(own)
                store_few(z_out, out, gathered(value, own), number)
                out += number
    return total(sums)
