"""Statistics of slices, by which volumes and high-res images are compared without a true volume.

Volumes and images have them alike. They are fractions, faces, triple points, two-point correlations and the patterns of
3 × 3 pixels, as integer counts that add.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import numpy as np

from hpcres.compiled import compiled
from hpcres.study import HighRes

_LAGS = 16
_RARE = 1e-3
"""Interphase areas below this share of all faces say little of a few cubes and are left out of the worst."""
_MAX_PATTERN_PHASES = 4
_SPACINGS = (1, 4)


@dataclass(frozen=True)
class SliceStatistics:
    """Counts in a set of 2D label images, which add.

    Directions are along the rows' index (down) and along the columns' index (across).
    """

    pixels: np.ndarray
    """(phase,)"""
    faces: np.ndarray
    """(direction, pair), and of any pair in `all_faces` (direction,)."""
    all_faces: np.ndarray
    together: np.ndarray
    """(direction, phase, lag from 1 on) pairs of pixels of the phase, and of all that fit in `all_pairs`."""
    all_pairs: np.ndarray
    corners: np.ndarray
    """Inner corners of pixels where at least three phases meet, and all of them."""
    windows: dict[int, np.ndarray]
    """Spacing → (phases⁹,) windows of 3 × 3 pixels by their labels, the first pixel of nine the highest digit."""

    def __add__(self, other: SliceStatistics) -> SliceStatistics:
        """Add the counts of two sets of images."""
        mine, theirs = vars(self), vars(other)
        windows = {spacing: found + other.windows[spacing] for spacing, found in self.windows.items()}
        return SliceStatistics(**{key: mine[key] + theirs[key] for key in mine if key != "windows"}, windows=windows)

    @property
    def volume_fraction(self) -> np.ndarray:
        """Share of the pixels of each phase, (phase,)."""
        return self.pixels / self.pixels.sum()

    @property
    def interphase_area(self) -> np.ndarray:
        """Faces between two phases / all faces of that direction, (direction, pair)."""
        return self.faces / np.maximum(self.all_faces, 1)[:, None]

    @property
    def correlations(self) -> np.ndarray:
        """P(both pixels a lag apart are of the phase), (direction, phase, lag)."""
        return self.together / np.maximum(self.all_pairs, 1)[:, None]

    @property
    def tpb(self) -> float:
        """Normalised TPB of isotropic matter."""
        return float(self.corners[0] / max(1, self.corners[1]))

    @property
    def patterns(self) -> dict[int, np.ndarray]:
        """Spacing → share of each pattern of 3 × 3 pixels, (phases⁹,)."""
        return {spacing: found / max(1, found.sum()) for spacing, found in self.windows.items()}


@compiled
def _count_windows(stack, phases, spacing, found):
    rows, columns = stack.shape[1] - 2 * spacing, stack.shape[2] - 2 * spacing
    for image in stack:
        for row in range(rows):
            for column in range(columns):
                code = 0
                for down in range(row, row + 3 * spacing, spacing):
                    for across in range(column, column + 3 * spacing, spacing):
                        code = code * phases + image[down, across]
                found[code] += 1


@compiled
def _count_together(lines, together):
    """Add the pairs of equal labels on `lines` (line, place) to `together` (phase, lag from 1 on)."""
    for line in lines:
        for lag in range(1, min(together.shape[1], len(line) - 1) + 1):
            for place in range(len(line) - lag):
                if line[place] == line[place + lag]:
                    together[line[place], lag - 1] += 1


def slice_statistics(stacks: Iterable[np.ndarray], phases: int) -> SliceStatistics:
    """Count the statistics of stacks of slices; every pixel, face and pair counts the same.

    Parameters
    ----------
    stacks : iterable of np.ndarray
        Labels (slice, row, column), uint8, below `phases`.
    phases : int
        Number of phases.

    Returns
    -------
    SliceStatistics
    """
    pairs = list(combinations(range(phases), 2))
    pixels = np.zeros(phases, np.int64)
    faces, all_faces = np.zeros((2, len(pairs)), np.int64), np.zeros(2, np.int64)
    together, all_pairs = np.zeros((2, phases, _LAGS), np.int64), np.zeros((2, _LAGS), np.int64)
    corners = np.zeros(2, np.int64)
    spacings = _SPACINGS if phases <= _MAX_PATTERN_PHASES else ()
    windows = {spacing: np.zeros(phases**9, np.int64) for spacing in spacings}
    for stack in stacks:
        stack = np.ascontiguousarray(stack, np.uint8)
        pixels += np.bincount(stack.ravel(), minlength=phases)
        bits = np.left_shift(np.uint16(1), stack, dtype=np.uint16)
        for direction in range(2):
            turned = np.moveaxis(bits, 1 + direction, 0)
            both = turned[1:] | turned[:-1]
            all_faces[direction] += both.size
            found = np.bincount(both.ravel(), minlength=1 << phases)
            faces[direction] += [found[1 << i | 1 << j] for i, j in pairs]
            length = stack.shape[1 + direction]
            lines = np.ascontiguousarray(np.moveaxis(stack, 1 + direction, 2)).reshape(-1, length)
            _count_together(lines, together[direction])
            all_pairs[direction] += len(lines) * np.maximum(length - np.arange(1, _LAGS + 1), 0)
        here = bits[:, 1:, 1:] | bits[:, 1:, :-1] | bits[:, :-1, 1:] | bits[:, :-1, :-1]
        rest = here & (here - np.uint16(1))
        corners += [int(np.count_nonzero(rest & (rest - np.uint16(1)))), here.size]
        for spacing, found in windows.items():
            _count_windows(stack, phases, spacing, found)
    return SliceStatistics(pixels, faces, all_faces, together, all_pairs, corners, windows)


def errors_between(ours: SliceStatistics, images: SliceStatistics, isotropic: bool) -> dict[str, float]:
    """Compare the statistics of a volume's slices with those of images.

    Parameters
    ----------
    ours : SliceStatistics
        Statistics of the volume.
    images : SliceStatistics
        Statistics of the images.
    isotropic : bool
        Whether the material is isotropic. Then directions are averaged, and windows with their mirrors and rotations.

    Returns
    -------
    dict
        fraction_error: largest difference. area_error: relative, of the worst pair. tpb_error: relative; left out where
        the images have no TPB. correlation_error: root mean square. tv1, tv4: total-variation distance of the patterns
        at spacing 1 and 4.
    """

    def over_directions(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=0, keepdims=True) if isotropic else values

    areas, wanted = over_directions(ours.interphase_area), over_directions(images.interphase_area)
    common = wanted > _RARE
    apart = over_directions(ours.correlations) - over_directions(images.correlations)
    found = {
        "fraction_error": float(np.abs(ours.volume_fraction - images.volume_fraction).max()),
        "area_error": float(np.abs(areas[common] / wanted[common] - 1).max()) if common.any() else 0.0,
        "correlation_error": float(np.sqrt(np.square(apart).mean())),
    }
    if images.tpb:
        found["tpb_error"] = abs(ours.tpb / images.tpb - 1)
    for spacing, histogram in images.patterns.items():
        apart = ours.patterns[spacing] - histogram
        found[f"tv{spacing}"] = float(np.abs(_symmetric(apart) if isotropic else apart).sum() / 2)
    return found


def _symmetric(histogram: np.ndarray) -> np.ndarray:
    """Average a histogram of windows over its mirrors and rotations.

    The histogram of isotropic matter does not change under these. The average reduces the influence of
    chance to a third.
    """
    phases = round(len(histogram) ** (1 / 9))
    by_pixel, pixels = histogram.reshape((phases,) * 9), np.arange(9).reshape(3, 3)
    turns = [np.rot90(side, k).ravel() for side in (pixels, pixels.T) for k in range(4)]
    return np.mean([by_pixel.transpose(turn) for turn in turns], axis=0).ravel()


def planes_of(high_res: HighRes) -> tuple[str, ...]:
    """Return the groups of planes that are compared with the images, in the order of the normal axes z, y, x.

    The group is `all` for an isotropic material.
    """
    return ("all",) if high_res.isotropic else ("yx", "zx", "zy")


def plane_statistics(cubes: Iterable[np.ndarray], high_res: HighRes) -> dict[str, SliceStatistics]:
    """Count the statistics of the slices of cubes (z, y, x), by plane.

    Parameters
    ----------
    cubes : iterable of np.ndarray
        Labels (z, y, x) below the number of phases.
    high_res : HighRes
        The study's description of the phases, and whether they are isotropic.

    Returns
    -------
    dict
        SliceStatistics for each of `planes_of`.
    """
    phases = len(high_res.phases)
    by_axis = [slice_statistics((np.moveaxis(cube, axis, 0),), phases) for cube in cubes for axis in range(3)]
    if high_res.isotropic:
        return {"all": reduce(SliceStatistics.__add__, by_axis)}
    return {plane: reduce(SliceStatistics.__add__, by_axis[axis::3]) for axis, plane in enumerate(planes_of(high_res))}
