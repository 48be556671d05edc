"""Labels as bit planes, 64 voxels a word, from which correlations, chords and clusters are counted."""

from __future__ import annotations

import numpy as np

from hpcres.compiled import compiled
from hpcres.counting.few_phases import pack_phases
from hpcres.counting.many_phases import pack_bits


@compiled
def _pack_block(block, planes):
    slices, rows, length = block.shape
    n, words = planes.shape[0], planes.shape[3]
    flat = planes.reshape(n, slices * rows * words)
    bits = np.zeros((4, words), np.uint64)
    for z in range(slices):
        for y in range(rows):
            if n < 4:
                pack_phases(block[z, y], flat, (z * rows + y) * words, n)
                continue
            pack_bits(block[z, y], bits, 0)
            for p in range(n):
                # Flips the bits that phase p has not.
                f0, f1 = np.uint64(0) - np.uint64(~p & 1), np.uint64(0) - np.uint64(~p >> 1 & 1)
                f2, f3 = np.uint64(0) - np.uint64(~p >> 2 & 1), np.uint64(0) - np.uint64(~p >> 3 & 1)
                for w in range((length + 63) // 64):
                    planes[p, z, y, w] = (bits[0, w] ^ f0) & (bits[1, w] ^ f1) & (bits[2, w] ^ f2) & (bits[3, w] ^ f3)
            if length % 64:  # beyond a row's end is no phase, not even the one without a bit
                planes[0, z, y, length // 64] &= (np.uint64(1) << np.uint64(length % 64)) - np.uint64(1)


def pack(index: np.ndarray, phases: int, words: int | None = None) -> np.ndarray:
    """Pack labels into one bit plane for each phase but the last.

    Parameters
    ----------
    index : np.ndarray
        uint8 (z, y, x), C-contiguous, every value below `phases`.
    phases : int
        Number of phases, from 1 to 16.
    words : int, optional
        Words per row; by default as many as x needs.

    Returns
    -------
    np.ndarray
        uint64 (p, z, y, word). Bit x of a row tells whether the voxel is phase p. There is always at least one plane.
    """
    assert index.dtype == np.uint8, index.dtype
    assert index.flags.c_contiguous
    assert 1 <= phases <= 16, phases
    least = -(-index.shape[2] // 64)
    planes = np.zeros((max(phases - 1, 1), *index.shape[:2], words or least), np.uint64)
    _pack_block(index, planes)
    return planes


@compiled
def _transpose(square):
    """Transpose 64 words in place: bit k of word i becomes bit i of word k."""
    half, low = 32, np.uint64(0xFFFFFFFF)
    while half:
        shift = np.uint64(half)
        for first in range(0, 64, 2 * half):
            for i in range(first, first + half):
                swapped = ((square[i] >> shift) ^ square[i + half]) & low
                square[i] ^= swapped << shift
                square[i + half] ^= swapped
        half >>= 1
        low ^= low << np.uint64(half)


@compiled
def _transpose_rows(planes, out):
    square = np.empty(64, np.uint64)
    for p in range(planes.shape[0]):
        for z in range(planes.shape[1]):
            for first in range(0, planes.shape[2], 64):
                rows = min(64, planes.shape[2] - first)
                for w in range(planes.shape[3]):
                    for i in range(rows):
                        square[i] = planes[p, z, first + i, w]
                    square[rows:] = np.uint64(0)
                    _transpose(square)
                    for x in range(min(64, out.shape[2] - 64 * w)):
                        out[p, z, 64 * w + x, first // 64] = square[x]


def transposed(planes: np.ndarray, columns: int) -> np.ndarray:
    """Turn bit planes (p, z, y, word of x) of `columns` columns into uint64 (p, z, x, word of y)."""
    out = np.empty((*planes.shape[:2], columns, -(-planes.shape[2] // 64)), np.uint64)
    _transpose_rows(planes, out)
    return out
