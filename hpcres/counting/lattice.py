"""Faces between phases by their place on the low-res lattice: what the lattice left in a high-res volume."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hpcres.geometry import Box, triple


def changed_faces(window: np.ndarray, own: Box, period: int) -> np.ndarray:
    """int64 (changed or all, axis, position modulo `period`): faces between voxel i and i + 1 along each axis, i in
    `own` (voxels of the window) and i + 1 in the window; position i + 1, counted from own's start."""
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


def lattice_imprint(changed: np.ndarray, every: np.ndarray) -> float:
    """Largest departure of the share of `changed_faces` at a position from its axis's mean, as a share of that mean; of
    the positions that have faces."""
    shares = np.ma.masked_array(changed / np.maximum(every, 1), every == 0)
    mean = shares.mean(1, keepdims=True)
    return float((np.ma.abs(shares - mean) / np.ma.where(mean, mean, 1)).filled(0).max())
