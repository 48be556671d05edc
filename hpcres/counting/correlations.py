"""Two-point correlations along the axes as exact pair counts (Lu & Torquato 1990; Dahari 2022, fig. 10).

S2_ij(r) = P(x in i and x + r in j): pairs of voxels r apart along an axis of which the first is phase i and the second
phase j, over all pairs that fit into the volume. Pairs inside a block are counted with the block. Pairs between blocks
are counted where the last planes of one meet the first planes of the next. The sum over any partition is that of the
whole. Pairs are counted 64 at a time for all phases but the last. The pairs of the last phase follow from the number of
voxels of each phase in each plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcres.compiled import compiled
from hpcres.simd.words import popcount

_STRIP = 512
"""Words compared at a time, so that a strip of every lag stays in the nearest caches."""


@compiled
def _add_together(a, at, b, to, words, found):
    """Add to found[i, j] the bits set both in a[i] and in b[j], over `words` words.

    The words of a[i] start at `at`, and those of b[j] at `to`.
    """
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


@compiled
def _inside(planes, outer, words, pairs):
    """Count the pairs of rows within each set of rows.

    `planes` is (p, word) and holds `outer` sets of rows, each row of `words` words.
    """
    size = planes.shape[1] // outer
    rows, step = size // words, max(_STRIP // words, 1)
    for start in range(0, planes.shape[1], size):
        for column in range(0, words, _STRIP):
            count = min(_STRIP, words - column)  # all of a row where more than one is taken at a time
            for row in range(0, rows, step):
                at, last = start + row * words + column, min(row + step, rows)
                for r in range(1, min(pairs.shape[0], rows - row)):
                    taken = (min(last, rows - r) - row - 1) * words + count
                    _add_together(planes, at, planes, at + r * words, taken, pairs[r])


@compiled
def _across(tail, head, outer, words, pairs):
    """Count the pairs of a row of `tail` and a row of `head`, which follows it; both are laid out as in `_inside`."""
    before, after = tail.shape[1] // outer // words, head.shape[1] // outer // words
    step = max(_STRIP // words, 1)
    for k in range(outer):
        at, to = k * before * words, k * after * words
        for column in range(0, words, _STRIP):
            count = min(_STRIP, words - column)
            for row in range(0, before, step):
                for r in range(before - min(row + step, before) + 1, min(pairs.shape[0], before - row + after)):
                    first, last = max(row, before - r), min(row + step, before, before - r + after)
                    second = to + (first + r - before) * words + column
                    taken = (last - first - 1) * words + count
                    _add_together(tail, at + first * words + column, head, second, taken, pairs[r])


def rows_along(planes: np.ndarray, turned: np.ndarray) -> list[np.ndarray]:
    """View bit planes as sets of rows along each axis.

    Rows are paired only within their set.

    Parameters
    ----------
    planes : np.ndarray
        Bit planes of `bitplanes.pack`.
    turned : np.ndarray
        Bit planes of `bitplanes.transposed`.

    Returns
    -------
    list of np.ndarray
        For z, y and x, a view (p, set, row, word). The planes normal to the axis are the rows.
    """
    n, slices = planes.shape[:2]
    return [planes.reshape(n, 1, slices, -1), planes, turned]


def pairs_inside(rows: Sequence[np.ndarray], lags: int) -> np.ndarray:
    """Count the pairs inside a block, for all phases but the last.

    Parameters
    ----------
    rows : sequence of np.ndarray
        The block as `rows_along` gives it.
    lags : int
        Largest distance of a pair, in voxels.

    Returns
    -------
    np.ndarray
        int64 (axis, lag 0 … lags, i, j). Lag 0 is left at 0.
    """
    n = len(rows[0])
    pairs = np.zeros((3, lags + 1, n, n), np.int64)
    for of, found in zip(rows, pairs, strict=True):
        _inside(of.reshape(n, -1), of.shape[1], of.shape[3], found)
    return pairs


def pairs_across(tail: np.ndarray, head: np.ndarray, lags: int) -> np.ndarray:
    """Count the pairs whose first voxel is in `tail` and whose second voxel is in `head`.

    Parameters
    ----------
    tail, head : np.ndarray
        Rows (p, set, row, word) on the two sides of a boundary between blocks; `head` follows `tail` along the axis.
    lags : int
        Largest distance of a pair, in voxels.

    Returns
    -------
    np.ndarray
        int64 (lag 0 … lags, i, j), for all phases but the last.
    """
    n, outer, _, words = tail.shape
    pairs = np.zeros((lags + 1, n, n), np.int64)
    _across(tail.reshape(n, -1), head.reshape(n, -1), outer, words, pairs)
    return pairs


def tail_of(before: np.ndarray | None, own: np.ndarray, lags: int) -> np.ndarray:
    """Return the last rows, at most `lags` of them, of the block `own` and of the rows `before` it."""
    if before is not None and own.shape[2] < lags:
        own = np.concatenate([before, own], axis=2)
    return np.ascontiguousarray(own[:, :, max(0, own.shape[2] - lags) :])


def complete(pairs: np.ndarray, in_planes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Complete S2 for every phase.

    Parameters
    ----------
    pairs : np.ndarray
        int64 (axis, lag, i, j): the sum of `pairs_inside` and `pairs_across` over all blocks.
    in_planes : sequence of np.ndarray
        Per axis, int64 (phase, plane): voxels of each phase in each plane of the volume.

    Returns
    -------
    counts : np.ndarray
        int64 (axis, lag, i, j): pairs of every two phases.
    fitting : np.ndarray
        int64 (axis, lag): how many pairs fit into the volume.
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
