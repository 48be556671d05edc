"""Counting of faces and edges of up to four phases, 64 voxels at a time, with one plane of bits for each phase."""

from __future__ import annotations

import numpy as np

from hpcres.compiled import compiled
from hpcres.simd.words import above_three, low_bits, popcount, second_bits


@compiled
def pack_phases(row, planes, first, n):
    """Set bit x of the words planes[p, first:] where row[x] is phase p < n, for n up to four.

    The result is not 0 if a voxel is none of the n phases.
    """
    whole, strange = row.shape[0] // 64, np.uint64(0)
    for word in range(whole):
        low, high = low_bits(row, 64 * word), second_bits(row, 64 * word)
        strange |= above_three(row, 64 * word)
        if n < 4:
            strange |= low & high
        if n < 3:
            strange |= high
        if n < 2:
            strange |= low
        planes[0, first + word] = ~(low | high)
        if n > 1:
            planes[1, first + word] = low & ~high
        if n > 2:
            planes[2, first + word] = high & ~low
        if n > 3:
            planes[3, first + word] = low & high
    if row.shape[0] % 64:
        for x in range(64 * whole, row.shape[0]):
            strange |= np.uint64(row[x] >= n)
        for p in range(n):
            bits = np.uint64(0)
            for x in range(64 * whole, row.shape[0]):
                bits |= np.uint64(row[x] == p) << np.uint64(x & 63)
            planes[p, first + whole] = bits
    return strange


@compiled
def _pack_slice(labels, owned, followed, voxels, beside, pairs, n):
    """Pack a slice into bit planes (n, words): its voxels, the voxels one further along x, and either of the two.

    Only voxels that are owned along x have bits. `owned` has a bit for every owned voxel, and `followed` for every
    owned voxel that has a next one along x. The result is False where a voxel is none of the n phases.
    """
    rows, length = labels.shape
    words, one, rest = (length + 63) // 64, np.uint64(1), np.uint64(63)
    strange = np.uint64(0)
    if length % 64:
        for y in range(rows):
            strange |= pack_phases(labels[y], voxels, y * words, n)
    else:
        strange = pack_phases(labels.reshape(labels.size), voxels, 0, n)
    size = rows * words
    for p in range(n):
        here, there, either = voxels[p, : size + 1], beside[p, :size], pairs[p, :size]
        for w in range(size):
            there[w] = ((here[w] >> one) | (here[w + 1] << rest)) & followed[w]
        for w in range(size):
            here[w] &= owned[w]
            either[w] = here[w] | there[w]
    return strange == 0


@compiled
def _either(a, b, out, n):
    for p in range(n):
        one, other, both = a[p], b[p], out[p]
        for w in range(both.shape[0]):
            both[w] = one[w] | other[w]


@compiled
def _add_faces(a, b, shift, words, n, faces):
    """Add the faces between the phases of `words` words of `a` and those of `b`, `shift` words further on."""
    for i in range(n):
        for j in range(i + 1, n):
            ai, aj, bi, bj = a[i, :words], a[j, :words], b[i, shift : shift + words], b[j, shift : shift + words]
            found = np.uint64(0)
            for w in range(words):
                found += popcount((ai[w] & bj[w]) | (aj[w] & bi[w]))
            faces[i * n + j] += np.int64(found)


@compiled
def _add_edges(a, b, shift, words, n, edges):
    """Add the edges whose four voxels are a pair in `a` and a pair in `b`, `shift` words further on.

    `a` and `b` hold the phases of the two voxels of a pair together.
    """
    a0, a1, a2 = a[0, :words], a[1, :words], a[2, :words]
    end = shift + words
    b0, b1, b2 = b[0, shift:end], b[1, shift:end], b[2, shift:end]
    if n == 3:
        found = np.uint64(0)
        for w in range(words):
            found += popcount((a0[w] | b0[w]) & (a1[w] | b1[w]) & (a2[w] | b2[w]))
        edges[0b0111] += np.int64(found)
        return
    a3, b3 = a[3, :words], b[3, shift:end]
    no0, no1, no2, no3, four = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for w in range(words):
        e0, e1, e2, e3 = a0[w] | b0[w], a1[w] | b1[w], a2[w] | b2[w], a3[w] | b3[w]
        no0 += popcount(e1 & e2 & e3 & ~e0)
        no1 += popcount(e0 & e2 & e3 & ~e1)
        no2 += popcount(e0 & e1 & e3 & ~e2)
        no3 += popcount(e0 & e1 & e2 & ~e3)
        four += popcount(e0 & e1 & e2 & e3)
    edges[0b1110] += np.int64(no0)
    edges[0b1101] += np.int64(no1)
    edges[0b1011] += np.int64(no2)
    edges[0b0111] += np.int64(no3)
    edges[0b1111] += np.int64(four)


@compiled
def count_few(block, nz, ny, nx, n, voxels, faces, edges):
    """Count up to four phases, 64 voxels at a time.

    A slice is one bit plane per phase, and counts are population counts. The owned shape is (nz, ny, nx). `voxels` is
    (n), `faces` (3, n·n) by pair, and `edges` (3, 2ⁿ) by set of phases. The result is False where a voxel is none of 0
    … n - 1; the counts are then of no use.
    """
    rows, words = block.shape[1], (block.shape[2] + 63) // 64
    # Beyond its end a row, a slice and the volume have no phase at all (the last row and slice of zeros), so nothing
    # is counted against what is not there, and fewer than three phases are left for an edge.
    size, owned_words = (rows + 1) * words, ny * words
    here, there = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    here_pairs, there_pairs = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    beside, there_beside = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    columns = np.zeros((n, size), np.uint64)
    owned, followed = np.zeros(rows * words, np.uint64), np.zeros(rows * words, np.uint64)
    for x in range(nx):
        bit = np.uint64(1) << np.uint64(x & 63)
        owned[x >> 6 :: words] |= bit
        if x + 1 < block.shape[2]:
            followed[x >> 6 :: words] |= bit
    known = _pack_slice(block[0], owned, followed, here, beside, here_pairs, n)
    for z in range(nz):
        if z + 1 < block.shape[0]:
            known &= _pack_slice(block[z + 1], owned, followed, there, there_beside, there_pairs, n)
        else:
            there[:] = np.uint64(0)
            there_pairs[:] = np.uint64(0)
        for p in range(n):
            found, plane = np.uint64(0), here[p, :owned_words]
            for w in range(owned_words):
                found += popcount(plane[w])
            voxels[p] += np.int64(found)
        _add_faces(here, there, 0, owned_words, n, faces[0])
        _add_faces(here, here, words, owned_words, n, faces[1])
        _add_faces(here, beside, 0, owned_words, n, faces[2])
        if n > 2:
            _add_edges(here_pairs, here_pairs, words, owned_words, n, edges[0])
            _add_edges(here_pairs, there_pairs, 0, owned_words, n, edges[1])
            _either(here, there, columns, n)
            _add_edges(columns, columns, words, owned_words, n, edges[2])
        here, there = there, here
        here_pairs, there_pairs = there_pairs, here_pairs
        beside, there_beside = there_beside, beside
    return known
