"""Faces between phases by their position on the low-res lattice.

They show what the lattice left in a high-res volume.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hpcres.geometry import Box, triple


def changed_faces(window: np.ndarray, own: Box, period: int) -> np.ndarray:
    """Count the faces of a window by their position on the low-res lattice.

    A face lies between voxel i and voxel i + 1 along an axis, with i in `own` and i + 1 in the window. Its position is
    i + 1, counted from the start of `own`, modulo `period`.

    Parameters
    ----------
    window : np.ndarray
        Labels (z, y, x).
    own : Box
        Voxels of the window whose faces on the + side are counted.
    period : int
        Period of the lattice in high-res voxels.

    Returns
    -------
    np.ndarray
        int64 (2, axis, position): first the faces between two phases, then all faces.
    """
    found = np.zeros((2, 3, period), np.int64)
    for axis in range(3):
        stop = list(own.stop)
        stop[axis] = min(stop[axis] + 1, window.shape[axis])
        part = np.moveaxis(window[Box(own.start, triple(stop)).slices], axis, 0)
        changed = [int(np.count_nonzero(a != b)) for a, b in pairwise(part)]
        position = np.arange(1, len(part)) % period
        found[0, axis] = np.bincount(position, changed, period)
        found[1, axis] = np.bincount(position, minlength=period) * part[0].size
    return found


def grid_artefact(changed: np.ndarray, every: np.ndarray) -> float:
    """Return the largest relative departure of the share of changed faces at a position from its axis's mean.

    Only positions that have faces are compared. A departure is a share of the mean over the axis.

    Parameters
    ----------
    changed, every : np.ndarray
        (axis, position): faces between two phases and all faces, as `changed_faces` counts them.

    Returns
    -------
    float
    """
    shares = np.ma.masked_array(changed / np.maximum(every, 1), every == 0)
    mean = shares.mean(1, keepdims=True)
    return float((np.ma.abs(shares - mean) / np.ma.where(mean, mean, 1)).filled(0).max())
