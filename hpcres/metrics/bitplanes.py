"""Labels as bit planes, 64 voxels a word: what correlations, chords and clusters are counted from."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic


def _trailing_zeros_instruction(typing_context, word):
    def build(context, builder, signature, args):
        return builder.cttz(args[0], context.get_constant(types.boolean, 0))

    return types.uint64(types.uint64), build


trailing_zeros: Any = intrinsic(_trailing_zeros_instruction)
"""Position of the lowest set bit of a word that is not 0."""


@numba.njit(cache=True, nogil=True)
def _pack_row(row, bits, planes, z, y):
    """Row (x) of phases below 2^bits into planes[p, z, y]; bits beyond its end stay 0."""
    whole, last = row.shape[0] // 64, row.shape[0] % 64
    eights = row[: 64 * whole].view(np.uint64)
    lowest, gather = np.uint64(0x0101010101010101), np.uint64(0x0102040810204080)
    for word in range(whole + (last > 0)):
        b0, b1, b2, b3 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        valid = ~np.uint64(0)
        if word < whole:
            # The product brings the lowest bit of each of eight bytes into the topmost byte, in their order.
            for k in range(8):
                eight, at = eights[8 * word + k], np.uint64(8 * k)
                b0 |= (((eight & lowest) * gather) >> np.uint64(56)) << at
                if bits > 1:
                    b1 |= ((((eight >> np.uint64(1)) & lowest) * gather) >> np.uint64(56)) << at
                if bits > 2:
                    b2 |= ((((eight >> np.uint64(2)) & lowest) * gather) >> np.uint64(56)) << at
                    b3 |= ((((eight >> np.uint64(3)) & lowest) * gather) >> np.uint64(56)) << at
        else:
            valid = (np.uint64(1) << np.uint64(last)) - np.uint64(1)
            for k in range(last):
                value, at = np.uint64(row[64 * whole + k]), np.uint64(k)
                b0 |= (value & np.uint64(1)) << at
                b1 |= ((value >> np.uint64(1)) & np.uint64(1)) << at
                b2 |= ((value >> np.uint64(2)) & np.uint64(1)) << at
                b3 |= ((value >> np.uint64(3)) & np.uint64(1)) << at
        for p in range(planes.shape[0]):
            plane = valid & (b0 if p & 1 else ~b0)
            if bits > 1:
                plane &= b1 if p & 2 else ~b1
            if bits > 2:
                plane &= (b2 if p & 4 else ~b2) & (b3 if p & 8 else ~b3)
            planes[p, z, y, word] = plane


@numba.njit(cache=True, nogil=True)
def _pack_block(block, bits, planes):
    for z in range(block.shape[0]):
        for y in range(block.shape[1]):
            _pack_row(block[z, y], bits, planes, z, y)


def pack(index: np.ndarray, phases: int, words: int | None = None) -> np.ndarray:
    """uint64 (p, z, y, word): bit x of a row tells whether the voxel is phase p, for all but the last of `phases`.

    index: uint8 (z, y, x), every value below `phases` ≤ 16. words: per row, by default as many as x needs.
    """
    assert index.dtype == np.uint8, index.dtype
    assert index.flags.c_contiguous
    assert 1 <= phases <= 16, phases
    least = -(-index.shape[2] // 64)
    planes = np.zeros((max(phases - 1, 1), *index.shape[:2], words or least), np.uint64)
    _pack_block(index, 1 if phases <= 2 else 2 if phases <= 4 else 4, planes)
    return planes
