"""Counting of faces and edges of more than four phases: where neighbours differ, label by label."""

from __future__ import annotations

import numpy as np

from hpcres.compiled import compiled
from hpcres.simd.words import fourth_bits, low_bits, popcount, second_bits, third_bits, trailing_zeros


@compiled
def _add_voxels(planes, owned, n, voxels):
    for p in range(n):
        # Flips the bits that phase p has not.
        f0, f1 = np.uint64(0) - np.uint64(~p & 1), np.uint64(0) - np.uint64(~p >> 1 & 1)
        f2, f3 = np.uint64(0) - np.uint64(~p >> 2 & 1), np.uint64(0) - np.uint64(~p >> 3 & 1)
        b0, b1, b2, b3 = planes[0], planes[1], planes[2], planes[3]
        found = np.uint64(0)
        for w in range(owned.shape[0]):
            found += popcount((b0[w] ^ f0) & (b1[w] ^ f1) & (b2[w] ^ f2) & (b3[w] ^ f3) & owned[w])
        voxels[p] += np.int64(found)


@compiled
def _next_along_x(bits, out):
    for w in range(bits.shape[0] - 1):
        out[w] = (bits[w] >> np.uint64(1)) | (bits[w + 1] << np.uint64(63))


@compiled
def pack_bits(row, planes, first):
    """Set bit x of the words planes[k, first:] to bit k of row[x], for k below 4."""
    whole = row.shape[0] // 64
    for word in range(whole):
        planes[0, first + word] = low_bits(row, 64 * word)
        planes[1, first + word] = second_bits(row, 64 * word)
        planes[2, first + word] = third_bits(row, 64 * word)
        planes[3, first + word] = fourth_bits(row, 64 * word)
    if row.shape[0] % 64:
        for k in range(4):
            bits = np.uint64(0)
            for x in range(64 * whole, row.shape[0]):
                bits |= np.uint64((row[x] >> k) & 1) << np.uint64(x & 63)
            planes[k, first + whole] = bits


@compiled
def _unequal(a, b, shift, out):
    """Mark in `out` the voxels whose phase in `a` differs from that in `b`, `shift` words further on."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0, shift:], b[1, shift:], b[2, shift:], b[3, shift:]
    for w in range(out.shape[0]):
        out[w] = (a0[w] ^ b0[w]) | (a1[w] ^ b1[w]) | (a2[w] ^ b2[w]) | (a3[w] ^ b3[w])


@compiled
def _unequal_in_slice(labels, followed, planes, along_x, along_y):
    """Pack the bits of a slice's phases, and mark where a voxel's phase differs from the next along x and along y."""
    rows, length = labels.shape
    words, one, rest = (length + 63) // 64, np.uint64(1), np.uint64(63)
    if length % 64:
        for y in range(rows):
            pack_bits(labels[y], planes, y * words)
    else:
        pack_bits(labels.reshape(labels.size), planes, 0)
    size = rows * words
    for k in range(4):
        here = planes[k, : size + 1]
        for w in range(size):
            step = here[w] ^ ((here[w] >> one) | (here[w + 1] << rest))
            along_x[w] = (step if k == 0 else along_x[w] | step) & followed[w]
    _unequal(planes, planes, words, along_y[: size - words])


@compiled
def _crossings(a, b, c, d, out):
    """Mark where three of the four steps around an edge, from voxel to voxel, change the phase.

    Fewer than three changes do not show three phases. Steps a and b are opposite each other, and so are c and d.
    """
    for w in range(out.shape[0]):
        out[w] = (a[w] & b[w] & (c[w] | d[w])) | (c[w] & d[w] & (a[w] | b[w]))


@compiled
def _places(found, owned, length, places):
    """List the positions in a flat slice (rows of `length`) where `found` and `owned` have a bit; return how many."""
    words, one, n = (length + 63) // 64, np.uint64(1), 0
    for y in range(owned.shape[0] // words):
        for word in range(words):
            w = y * words + word
            bits = found[w] & owned[w]
            start, end = np.uint64(y * length + 64 * word), n + int(popcount(bits))
            # Eight at a time whether there are as many or not: a branch a bit would be guessed wrong once a word.
            while True:
                for k in range(8):
                    places[n + k] = start + trailing_zeros(bits)
                    bits &= bits - one
                n += 8
                if n >= end:
                    break
            n = end
    return n


@compiled
def _add_faces_at(places, found, near, far, shift, n, faces):
    """Add the faces between voxels of the flat slices `near` and `far` at the first `found` places.

    The voxel of `far` lies `shift` further on than that of `near`.
    """
    further, phases = np.uint64(shift), np.uint64(n)
    for k in range(found):
        at = places[k]
        faces[k & 1, np.uint64(near[at]) * phases + np.uint64(far[at + further])] += 1


@compiled
def _add_edges_at(places, found, near, far, shift, edges):
    """Add the edges between two voxels of `near` and two of `far`, `shift` apart in either."""
    phase, further = np.uint64(1), np.uint64(shift)
    for k in range(found):
        at, beside = places[k], places[k] + further
        shown = (phase << near[at]) | (phase << near[beside]) | (phase << far[at]) | (phase << far[beside])
        edges[shown] += 1


@compiled
def count_many(block, nz, ny, nx, n, voxels, faces, edges):
    """Count up to sixteen phases: 64 voxels at a time where no phase changes, one by one where one does.

    The owned shape is (nz, ny, nx). `voxels` is (n), `faces` (3, n·n) by ordered pair, and `edges` (3, 2ⁿ) by set of
    phases.
    """
    rows, length = block.shape[1], block.shape[2]
    words = (length + 63) // 64
    size, owned_words = (rows + 1) * words, ny * words
    here, there = np.zeros((4, size), np.uint64), np.zeros((4, size), np.uint64)
    # Beyond the ends nothing changes: these stay 0 there.
    here_x, there_x = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    here_y, there_y = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    along_z, beside, crossings = np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(owned_words, np.uint64)
    owned, followed = np.zeros(owned_words, np.uint64), np.zeros(rows * words, np.uint64)
    for x in range(length):
        bit = np.uint64(1) << np.uint64(x & 63)
        if x < nx:
            owned[x >> 6 :: words] |= bit
        if x + 1 < length:
            followed[x >> 6 :: words] |= bit
    places = np.empty(owned_words * 64 + 8, np.uint64)  # unsigned: no place is looked at from the end
    pairs = np.zeros((3, 2, n * n), np.int64)  # turn by turn, since one counter cannot be added to at every cycle
    _unequal_in_slice(block[0], followed, here, here_x, here_y)
    for z in range(nz):
        last = z + 1 == block.shape[0]
        near = block[z].reshape(rows * length)
        far = near if last else block[z + 1].reshape(rows * length)
        if last:
            along_z[:] = np.uint64(0)
        else:
            _unequal_in_slice(block[z + 1], followed, there, there_x, there_y)
            _unequal(here, there, 0, along_z[: rows * words])
        _add_voxels(here, owned, n, voxels)
        _add_faces_at(places, _places(along_z, owned, length, places), near, far, 0, n, pairs[0])
        _add_faces_at(places, _places(here_y, owned, length, places), near, near, length, n, pairs[1])
        _add_faces_at(places, _places(here_x, owned, length, places), near, near, 1, n, pairs[2])
        _next_along_x(here_y, beside)
        _crossings(here_x, here_x[words:], here_y, beside, crossings)
        _add_edges_at(places, _places(crossings, owned, length, places), near, near[length:], 1, edges[0])
        if not last:
            _next_along_x(along_z, beside)
            _crossings(here_x, there_x, along_z, beside, crossings)
            _add_edges_at(places, _places(crossings, owned, length, places), near, far, 1, edges[1])
            _crossings(here_y, there_y, along_z, along_z[words:], crossings)
            _add_edges_at(places, _places(crossings, owned, length, places), near, far, length, edges[2])
        here, there = there, here
        here_x, there_x = there_x, here_x
        here_y, there_y = there_y, here_y
    for axis in range(3):
        faces[axis] += pairs[axis, 0] + pairs[axis, 1]
    for shown in range(1 << n):
        rest = shown & (shown - 1)
        if rest & (rest - 1) == 0:
            edges[:, shown] = 0  # fewer than three after all
    return True
