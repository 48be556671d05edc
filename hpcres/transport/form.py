"""The form in which a system is solved: how cells grow from level to level, and in which floating-point type.

The plain form is for voxels that are about cubic and conductivities that differ little. Voxels far from cubic and
conductivities far apart need the robust form. Both use the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

WIDEST_PITCH = 2.0
"""The largest pitch of an axis that is coarsened, over the smallest pitch; and of the plain form."""
LEAST_CONTRAST = 0.1
"""The least ratio of conductivities, lowest over highest, of the plain form."""
WIDEST_RANGE = 1e5
"""The largest ratio of conductances that float32 is used for. Beyond it, the rounding error of a correction in a good
conductor dissipates more than the correction gains in a poor one."""
PLAIN_CORRECTION = 2.0
"""Factor of a coarse correction in the plain form: aggregates are about twice as stiff as the voxels they stand for."""
ROBUST_CORRECTION = 1.5
"""Factor of a coarse correction in the robust form. The coarse operator is exact for some fields (a particle of
constant potential, an axis that is not coarsened) and too stiff by 2 for others. A factor between 1 and 2 reduces the
error of both."""
BYTES_PER_AGGREGATE = 108
"""Memory of one aggregate on its level, the set-up of the level included, float32."""


@dataclass(frozen=True)
class Form:
    """Form in which a system is solved.

    Attributes
    ----------
    pitch : tuple of float
        Edge lengths z, y, x of a cell of this level; those of a voxel on the finest level. Any unit.
    robust : bool
        Whether cells grow only along axes of small pitch, aggregates follow strong edges, and residuals are sums of
        currents.
    dtype : type
        np.float32 or np.float64, of vectors and conductances.
    several : bool
        Whether conductivities differ.
    """

    pitch: tuple[float, float, float]
    robust: bool = False
    dtype: Any = np.float32
    several: bool = False

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        voxel_size: Sequence[float],
        resistance: np.ndarray | None = None,
        in_float64: bool = False,
    ) -> Form:
        """Choose the form for a volume.

        Parameters
        ----------
        shape : sequence of int
            Voxels along z, y, x.
        voxel_size : sequence of float
            Voxel edge lengths z, y, x; any unit.
        resistance : ndarray of float, shape (256,), optional
            Half a voxel's resistance by label, inf where a label does not conduct. None for one conductivity.
        in_float64 : bool
            Use the robust form in float64 whatever voxels and conductivities are.

        Returns
        -------
        Form
        """
        z, y, x = map(float, voxel_size)
        several = [h for h, n in zip((z, y, x), shape, strict=True) if n > 1] or [1.0]
        aspect, apart = max(several) / min(several), contrast(resistance)
        robust = in_float64 or aspect > WIDEST_PITCH * (1 + 1e-9) or apart < LEAST_CONTRAST
        wide = in_float64 or aspect**2 / apart > WIDEST_RANGE
        return cls((z, y, x), robust, np.float64 if wide else np.float32, resistance is not None)

    def step(self, cells: Sequence[int]) -> tuple[int, int, int]:
        """Return how many cells of this level make one of the next along z, y, x: 1 or 2 each.

        Parameters
        ----------
        cells : sequence of int
            Number of cells along each axis.

        Returns
        -------
        tuple of int
        """
        if not self.robust:
            return 2, 2, 2
        left = [h for h, n in zip(self.pitch, cells, strict=True) if n > 1]
        widest = WIDEST_PITCH * (1 + 1e-9) * min(left, default=0.0)
        z, y, x = (2 if n > 1 and h <= widest else 1 for h, n in zip(self.pitch, cells, strict=True))
        return z, y, x

    def after(self, step: Sequence[int]) -> Form:
        """Return the form on the next level."""
        z, y, x = (h * s for h, s in zip(self.pitch, step, strict=True))
        return Form((z, y, x), self.robust, self.dtype, self.several)

    @property
    def correction(self) -> float:
        """Factor of a coarse correction."""
        return ROBUST_CORRECTION if self.robust else PLAIN_CORRECTION

    @property
    def two_floats(self) -> bool:
        """Whether the solution is the sum of two float32 vectors."""
        return self.robust and self.dtype is np.float32

    @property
    def bytes_of_vectors(self) -> int:
        """Bytes of x, r, p and z for a conducting voxel."""
        return 32 if self.dtype is np.float64 else 20 if self.robust else 16

    def bytes_of_levels(self, shape: Sequence[int]) -> float:
        """Return the bytes of all coarse levels and their set-up for a conducting voxel of a volume, at most.

        A cell of v voxels holds about 1.25 aggregates; with several conductivities in the robust form, twice as many.
        """
        cells, form, share, aggregates = tuple(shape), self, 1.0, 0.0
        while max(cells) > 1:
            step = form.step(cells)
            cells = tuple(-(-n // s) for n, s in zip(cells, step, strict=True))
            form, share = form.after(step), share / prod(step)
            aggregates += share
        per_cell = 2.5 if self.robust and self.several else 1.25
        size = 1.6 if self.dtype is np.float64 else 1.0
        return BYTES_PER_AGGREGATE * per_cell * size * min(aggregates, 2.0)


def contrast(resistance: np.ndarray | None) -> float:
    """Return the lowest conductivity over the highest."""
    if resistance is None:
        return 1.0
    finite = resistance[np.isfinite(resistance)]
    return float(finite.min() / finite.max())
