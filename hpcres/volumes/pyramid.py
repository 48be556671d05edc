"""Pyramids: the extent of their levels, and the labels or shares of one level from the level below."""

from __future__ import annotations

import numpy as np

from hpcres.compiled import compiled
from hpcres.geometry import Triple, triple

_TOP_VOXELS = 256
"""Edge that the coarsest pyramid level stays within."""


def pyramid(shape: Triple) -> list[tuple[Triple, Triple]]:
    """Return the levels of a store's pyramid, finest first.

    Parameters
    ----------
    shape
        Voxels of level 0 along z, y, x.

    Returns
    -------
    list of (Triple, Triple)
        Voxels per axis of each level, and how many voxels of level 0 one of its voxels is wide along each axis. The
        last level has at most 256 voxels along each axis.
    """
    levels = [(shape, (1, 1, 1))]
    while max(levels[-1][0]) > _TOP_VOXELS:
        extent, step = levels[-1]
        coarser = triple([s * (2 if n > 1 else 1) for s, n in zip(step, extent, strict=True)])
        levels.append((triple([-(-n // 2) for n in extent]), coarser))
    return levels


@compiled
def _mode(fine: np.ndarray, coarse: np.ndarray) -> None:
    nz, ny, nx = fine.shape
    seen = np.empty(8, np.uint8)
    for z in range(coarse.shape[0]):
        z0, z1 = 2 * z, min(2 * z + 2, nz)
        for y in range(coarse.shape[1]):
            y0, y1 = 2 * y, min(2 * y + 2, ny)
            for x in range(coarse.shape[2]):
                x0, x1 = 2 * x, min(2 * x + 2, nx)
                first = fine[z0, y0, x0]
                # Most blocks are of one phase: an odd end's voxels count twice here, which changes nothing then.
                other = fine[z0, y0, x1 - 1] ^ first
                other |= (fine[z0, y1 - 1, x0] ^ first) | (fine[z0, y1 - 1, x1 - 1] ^ first)
                other |= (fine[z1 - 1, y0, x0] ^ first) | (fine[z1 - 1, y0, x1 - 1] ^ first)
                other |= (fine[z1 - 1, y1 - 1, x0] ^ first) | (fine[z1 - 1, y1 - 1, x1 - 1] ^ first)
                if other == 0:
                    coarse[z, y, x] = first
                    continue
                n = 0
                for i in range(z0, z1):
                    for j in range(y0, y1):
                        for k in range(x0, x1):
                            seen[n] = fine[i, j, k]
                            n += 1
                best, most = seen[0], 0
                for a in range(n):
                    count = 0
                    for b in range(n):
                        count += seen[a] == seen[b]
                    if count > most or (count == most and seen[a] < best):
                        best, most = seen[a], count
                coarse[z, y, x] = best


def coarsen_by_mode(labels: np.ndarray) -> np.ndarray:
    """Return the most frequent label of every 2×2×2 block, the lowest of equally frequent ones.

    Parameters
    ----------
    labels
        uint8 labels (z, y, x).

    Returns
    -------
    numpy.ndarray
        uint8 labels, ⌈n / 2⌉ along each axis. Blocks at odd ends are smaller.
    """
    coarse = np.empty([-(-n // 2) for n in labels.shape], np.uint8)
    _mode(labels, coarse)
    return coarse


@compiled
def _mean(fine: np.ndarray, coarse: np.ndarray) -> None:
    nz, ny, nx = fine.shape
    for z in range(coarse.shape[0]):
        for y in range(coarse.shape[1]):
            for x in range(coarse.shape[2]):
                total, n = 0, 0
                for i in range(2 * z, min(2 * z + 2, nz)):
                    for j in range(2 * y, min(2 * y + 2, ny)):
                        for k in range(2 * x, min(2 * x + 2, nx)):
                            total += fine[i, j, k]
                            n += 1
                coarse[z, y, x] = (2 * total + n) // (2 * n)


def coarsen_by_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of every 2×2×2 block of a uint8 volume, halves rounded up.

    Parameters
    ----------
    values
        uint8 values (z, y, x).

    Returns
    -------
    numpy.ndarray
        uint8 means, ⌈n / 2⌉ along each axis. Blocks at odd ends are smaller.
    """
    coarse = np.empty([-(-n // 2) for n in values.shape], np.uint8)
    _mean(values, coarse)
    return coarse
