"""Two-point correlations along the axes as exact pair counts (Lu & Torquato 1990; Dahari 2022, fig. 10).

S2_ij(r) = P(x in i and x + r in j): pairs of voxels r apart along an axis of which the first is phase i and the second
phase j, over all pairs that fit into the volume. A block owns the pairs whose first voxel it holds; the sum over any
partition is that of the whole. Pairs are counted 64 at a time for all phases but the last, whose own follow from how
many voxels of each phase stand in each plane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np

from hpcres.metrics.bitplanes import pack
from hpcres.metrics.counts import popcount

_STRIP = 512
"""Words compared at a time, so that a strip of every lag stays in the nearest caches."""


@numba.njit(cache=True, nogil=True)
def _add_together(a, at, b, to, words, found):
    """found[i, j] += bits set in both of `words` words of a[i] from `at` on and of b[j] from `to` on."""
    if a.shape[0] == 2:  # three phases: every word is fetched once
        a0, a1, b0, b1 = a[0, at : at + words], a[1, at : at + words], b[0, to : to + words], b[1, to : to + words]
        c00, c01, c10, c11 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        for w in range(words):
            c00 += popcount(a0[w] & b0[w])
            c01 += popcount(a0[w] & b1[w])
            c10 += popcount(a1[w] & b0[w])
            c11 += popcount(a1[w] & b1[w])
        found[0, 0] += np.int64(c00)
        found[0, 1] += np.int64(c01)
        found[1, 0] += np.int64(c10)
        found[1, 1] += np.int64(c11)
        return
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            ai, bj, both = a[i, at : at + words], b[j, to : to + words], np.uint64(0)
            for w in range(words):
                both += popcount(ai[w] & bj[w])
            found[i, j] += np.int64(both)


@numba.njit(cache=True, nogil=True)
def _along_z(planes, words, owned, pairs):
    """planes (p, slices of `words`): the first `owned` slices with those up to the last lag beyond."""
    slices = planes.shape[1] // words
    for first in range(0, words, _STRIP):
        count = min(_STRIP, words - first)
        for z in range(owned):
            for r in range(1, min(pairs.shape[0], slices - z)):
                _add_together(planes, z * words + first, planes, (z + r) * words + first, count, pairs[r])


@numba.njit(cache=True, nogil=True)
def _along_y(planes, slices, words, owned, pairs):
    """planes (p, `slices` of rows of `words`): the first `owned` rows of a slice with those beyond."""
    size = planes.shape[1] // slices
    for start in range(0, slices * size, size):
        for first in range(0, owned * words, _STRIP):
            last = min(first + _STRIP, owned * words)
            for r in range(1, min(pairs.shape[0], (size - first - 1) // words + 1)):
                count = min(last, size - r * words) - first
                _add_together(planes, start + first, planes, start + first + r * words, count, pairs[r])


@numba.njit(cache=True, nogil=True)
def _along_x(planes, words, owned, pairs):
    """planes (p, rows of `words`) whose rows hold `owned` voxels, those beyond, and nothing for the last lag's length:
    so what is shifted in at a row's end meets nothing there."""
    n, size, lags = planes.shape[0], planes.shape[1], pairs.shape[0]
    mask = np.zeros(words, np.uint64)
    for x in range(owned):
        mask[x >> 6] |= np.uint64(1) << np.uint64(x & 63)
    whole = max(_STRIP // words, 1) * words
    mine = np.zeros((n, whole), np.uint64)
    other = np.zeros((n, whole + lags // 64 + 2), np.uint64)
    shifted = np.zeros((n, whole), np.uint64)
    for first in range(0, size, whole):
        count = min(whole, size - first)
        for p in range(n):
            for w in range(count):
                other[p, w] = planes[p, first + w]
            for row in range(0, count, words):
                for w in range(words):
                    mine[p, row + w] = other[p, row + w] & mask[w]
        for r in range(1, lags):
            low = np.uint64(r % 64)
            high = np.uint64(64) - low
            for p in range(n):
                source, target = other[p, r // 64 : r // 64 + count + 1], shifted[p, :count]
                if r % 64:
                    for w in range(count):
                        target[w] = (source[w] >> low) | (source[w + 1] << high)
                else:
                    for w in range(count):
                        target[w] = source[w]
            _add_together(mine, 0, shifted, 0, count, pairs[r])


@numba.njit(cache=True, nogil=True)
def _rows_together(own, columns, beyond, words):
    """Rows of `columns` bits and those beyond, as rows of `words` words."""
    n, slices, rows = own.shape[:3]
    out = np.zeros((n, slices, rows, words), np.uint64)
    at, low = columns // 64, np.uint64(columns % 64)
    for p in range(n):
        for z in range(slices):
            for y in range(rows):
                row = out[p, z, y]
                row[: own.shape[3]] = own[p, z, y]
                for k in range(beyond.shape[3]):
                    bits = beyond[p, z, y, k]
                    row[at + k] |= bits << low
                    if low and at + k + 1 < words:
                        row[at + k + 1] |= bits >> (np.uint64(64) - low)
    return out


def count_pairs(
    block: np.ndarray, own: np.ndarray, beyond: Callable[[int], np.ndarray], lags: int
) -> np.ndarray:  # fmt: skip
    """int64 (axis, lag 0 … lags, i, j): pairs whose first voxel is in `block`, for all phases but the last; lag 0
    is left at 0.

    block: uint8 (z, y, x); own: what `bitplanes.pack` makes of it; beyond(axis): what follows it in the volume along
    an axis, up to `lags` voxels, fewer at the volume's end.
    """
    n, words, (slices, rows, columns) = own.shape[0], own.shape[3], block.shape
    phases = n + 1
    pairs = np.zeros((3, lags + 1, n, n), np.int64)
    planes = np.concatenate([own, pack(beyond(0), phases)], axis=1)
    _along_z(planes.reshape(n, -1), rows * words, slices, pairs[0])
    planes = np.concatenate([own, pack(beyond(1), phases)], axis=2)
    _along_y(planes.reshape(n, -1), slices, words, rows, pairs[1])
    words = -(-(columns + lags) // 64)
    planes = _rows_together(own, columns, pack(beyond(2), phases), words)
    _along_x(planes.reshape(n, -1), words, columns, pairs[2])
    return pairs


def complete(pairs: np.ndarray, in_planes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All of S2: int64 counts (axis, lag, i, j) for every phase, and how many pairs fit (axis, lag).

    pairs: the sum of `count_pairs` over all blocks; in_planes: per axis, int64 (phase, plane) voxels.
    """
    lags, phases = pairs.shape[1] - 1, in_planes[0].shape[0]
    counts, fitting = np.zeros((3, lags + 1, phases, phases), np.int64), np.zeros((3, lags + 1), np.int64)
    for axis, voxels in enumerate(in_planes):
        length = voxels.shape[1]
        for r in range(min(lags + 1, length)):
            first, second = voxels[:, : length - r].sum(1), voxels[:, r:].sum(1)
            fitting[axis, r] = first.sum()
            s2 = counts[axis, r]
            if r == 0:
                np.fill_diagonal(s2, first)
                continue
            known = s2[: phases - 1, : phases - 1]
            known[...] = pairs[axis, r, : phases - 1, : phases - 1]
            s2[:-1, -1] = first[:-1] - known.sum(1)
            s2[-1, :] = second - s2[:-1, :].sum(0)
    return counts, fitting
