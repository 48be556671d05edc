"""Which voxels of a phase conduct at all: the clusters that touch both faces. Settled before any solve."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


class Clusters:
    """The 6-connected clusters of a phase, mask (z, y, x), found once for all directions."""

    def __init__(self, mask: np.ndarray) -> None:
        self.labels = np.empty(mask.shape, np.int32 if mask.size < 2**31 else np.int64)
        self.number = int(ndimage.label(mask, output=self.labels))

    def percolating(self, axis: int) -> np.ndarray:
        """Mask of the clusters that touch both faces normal to `axis`."""
        first, last = (np.unique(np.take(self.labels, at, axis=axis)) for at in (0, -1))
        through = np.zeros(self.number + 1, bool)
        through[np.intersect1d(first, last)] = True
        through[0] = False
        return through[self.labels]
