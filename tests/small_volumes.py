"""Random label volumes and boxes, and what brute force says of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from hpcres.counting import totals
from hpcres.geometry import Box, triple

SHAPE = (21, 50, 67)


def labels(shape=SHAPE, dtype=np.uint8, values=(0, 1, 2), seed=0) -> np.ndarray:
    return np.array(values, dtype)[np.random.default_rng(seed).integers(0, len(values), shape)]


def mode_by_counting(array: np.ndarray) -> np.ndarray:
    out = np.empty([-(-n // 2) for n in array.shape], np.uint8)
    for place in np.ndindex(out.shape):
        block = array[tuple(slice(2 * p, 2 * p + 2) for p in place)]
        out[place] = np.bincount(block.ravel()).argmax()  # the first, so the lowest, of equal counts
    return out


def random_boxes(shape, count=12, seed=1) -> list[Box]:
    rng = np.random.default_rng(seed)
    boxes = [Box.whole(shape), Box((0, 0, 0), (1, 1, 1)), Box(triple([n - 1 for n in shape]), shape)]
    for _ in range(count):
        ends = np.sort([rng.integers(0, n + 1, 2) for n in shape], axis=1)
        boxes.append(Box(triple(ends[:, 0]), triple(ends[:, 1])))
    return boxes


def plain_counts(a: np.ndarray, periodic=(False, False, False)) -> totals.Counts:
    """The same counts by whole-array slicing; nothing of the code under test."""
    if any(periodic):
        # One more plane where the sides meet, less what that plane alone would add.
        shown = np.pad(a, [(0, int(wraps)) for wraps in periodic], mode="wrap")
        return plain_owned(shown, a.shape)
    return plain_owned(a, a.shape)


def plain_owned(a: np.ndarray, owned: tuple[int, int, int]) -> totals.Counts:
    """Of voxels, faces and edges whose first voxel lies within `owned`."""
    labels = [int(v) for v in np.unique(a)]
    faces: dict[tuple[int, int], list[int]] = {}
    edges: dict[tuple[int, ...], list[int]] = {}
    all_faces, all_edges = [0, 0, 0], [0, 0, 0]
    for axis in range(3):
        b = np.moveaxis(a, axis, 0)
        length, (rows, columns) = owned[axis], (owned[k] for k in range(3) if k != axis)
        low, high = b[: min(length, len(b) - 1), :rows, :columns], b[1 : length + 1, :rows, :columns]
        all_faces[axis] = low.size
        for i, j in combinations(labels, 2):
            n = np.count_nonzero(((low == i) & (high == j)) | ((low == j) & (high == i)))
            faces.setdefault((i, j), [0, 0, 0])[axis] = n
        c = b[:length, : rows + 1, : columns + 1]
        four = np.stack([c[:, :-1, :-1], c[:, 1:, :-1], c[:, :-1, 1:], c[:, 1:, 1:]])
        all_edges[axis] = four[0].size
        for size in (3, 4):
            for some in combinations(labels, size):
                shown = np.stack([(four == i).any(0) for i in some])
                n = np.count_nonzero(shown.all(0) & np.isin(four, some).all(0))
                edges.setdefault(some, [0, 0, 0])[axis] = n
    return totals.Counts(
        {i: int(np.count_nonzero(a[tuple(map(slice, owned))] == i)) for i in labels},
        {k: tuple(v) for k, v in faces.items() if any(v)},
        {k: tuple(v) for k, v in edges.items() if any(v)},
        tuple(all_faces),
        tuple(all_edges),
    )
