"""Patches of the high-res images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.study import Study
from hpcres.training.data.draws import CHOICE, CRITIC, CriticDraw, critic_counts, generator
from hpcres.training.diagonals import as_unsharp, pick_diagonals
from hpcres.training.visible import Correction, patch_weights
from hpcres.volumes.formats import read_images
from hpcres.volumes.phases import PhaseMap

_BAND_PIXELS = 2**24
"""Images are counted by bands of this many pixels. A pixel takes 16 bytes."""
_EVERY_PATCH = 4
"""Distance, in pixels, between the places at which weighted patches begin."""


def _bands(image: Tensor, height: int) -> Iterator[Tensor]:
    """Yield rows of an image a band at a time, so that each `height` consecutive rows are in exactly one band."""
    step = max(1, _BAND_PIXELS // image.shape[1])
    for top in range(0, len(image) - height + 1, step):
        yield image[top : top + step + height - 1]


class RealSlices:
    """Patches of the high-res images, by the axis z, y or x that is normal to them.

    Images are drawn in proportion to their area. Patches take the 8 mirrors and rotations, or the 4 that keep rows
    along rows, if their image allows them. Rows and columns of a patch are the two other axes in the order z, y, x.

    Parameters
    ----------
    study : Study
        The study, whose images are read.
    device : torch.device
        Device of the patches.
    correction : Correction or None
        Correction of images that are not typical of the volume. With a correction, patches are drawn by weights.
    """

    def __init__(self, study: Study, device: torch.device, correction: Correction | None = None) -> None:
        self.correction = correction
        self.seed, self.phases = study.seed, len(study.phases)
        self.edge = study.training.slice_voxels
        self._settings, self.slices_per_axis = study.training, study.training.slices_per_axis
        self.pattern_spacings, self.pattern_pixels = study.training.pattern_spacings, study.training.pattern_pixels
        if self.slices_per_axis is not None and self.slices_per_axis > self.edge:
            raise InputError(
                f"training.slices_per_axis: {self.slices_per_axis} of only {self.edge} slices per axis that are left "
                f"after the crop; use at most {self.edge}, or leave it out for all"
            )
        self._planes = 6 if study.training.diagonal_slices else 3
        self._isotropic = isotropic = study.high_res.isotropic
        phases = PhaseMap(list(study.high_res.phases), "")
        pixels: list[np.ndarray] = []
        tables: list[list[tuple[int, int, int, bool, bool]]] = [[], [], []]
        offset = 0
        for image in study.high_res.images:
            phases.where = image.path
            stack = phases.index(read_images(image.path))
            self._refuse_small(image.path, stack)
            augment = isotropic if image.augment is None else image.augment
            for plane in ("yx",) if isotropic else dict.fromkeys(image.planes):
                rows, columns = (AXES.index(axis) for axis in plane)
                turned = stack if rows < columns else stack.transpose(0, 2, 1)
                for one in turned:
                    tables[3 - rows - columns].append((offset, *one.shape, bool(augment), augment is True))
                    pixels.append(one.ravel())
                    offset += one.size
        if isotropic:  # one set of slices stands for all three planes
            tables = [tables[0]] * 3
        self._tables = [np.array(table, np.int64) for table in tables]
        self._pixels = torch.from_numpy(np.concatenate(pixels)).to(device)
        self._tilt = correction.patterns(self.pattern_pixels, self.pattern_pixels // 2) if correction else None
        own = self._tables[:1] if isotropic else self._tables
        self._weighted = [self._weigh(table, correction) for table in own] * (3 // len(own)) if correction else None

    def _refuse_small(self, path: str, stack: np.ndarray) -> None:
        if min(stack.shape[1:]) < self.edge:
            raise InputError(
                f"{path}: {stack.shape[1]} x {stack.shape[2]} pixels, but the critic looks at patches of "
                f"{self.edge} x {self.edge}; use a larger image or a larger training.crop_voxels"
            )

    def missing_phases(self) -> list[int]:
        """Return the phases that no image shows."""
        return np.flatnonzero(torch.bincount(self._pixels, minlength=self.phases).cpu().numpy() == 0).tolist()

    def fractions(self) -> np.ndarray:
        """Return the wanted share of each phase: that in all images together, or what a correction makes of it."""
        if self.correction is not None:
            return self.correction.fractions
        counts = torch.bincount(self._pixels, minlength=self.phases).cpu().numpy()
        return counts / counts.sum()

    @cached_property
    def patterns(self) -> Tensor:
        """What losses.pattern_shares would return for the images, mirrored and rotated as their patches are."""
        tables = self._tables[:1] if self._isotropic else self._tables
        found = []
        for apart in self.pattern_spacings:
            found += [self._patterns_of(table, apart) for table in tables] * (3 // len(tables))
        return torch.cat(found).float().to(self._pixels.device)

    def wanted_patterns(self, ours: Tensor) -> Tensor:
        """Return the shares of patterns that generated slices should have.

        Parameters
        ----------
        ours : Tensor
            Shares of patterns that the slices have, as losses.pattern_shares returns them.

        Returns
        -------
        Tensor
            The shares of the images, or what a correction makes of them.
        """
        if self._tilt is None:
            return self.patterns
        return self._tilt.moved(self.patterns, ours, self.pattern_spacings).to(ours)

    def _patterns_of(self, table: np.ndarray, apart: int) -> Tensor:
        """Return the shares of patterns in all images of a table, (shape, phases ** pixels)."""
        across = self.pattern_pixels // 2
        along_rows = list(range(across))
        reversed_rows = [*along_rows[::-1], *(across + k for k in along_rows[::-1])]
        exchanged_rows = [*(across + k for k in along_rows), *along_rows]
        together = torch.zeros((2, *[self.phases] * self.pattern_pixels), dtype=torch.float64)
        for image, mirrors, rotations in self._images(table):
            windows = torch.stack([self._windows(lines, apart, across) for lines in (image, image.T)])
            if mirrors:
                for places in (reversed_rows, exchanged_rows):
                    windows = (windows + windows.permute(0, *(1 + place for place in places))) / 2
            if rotations:
                windows = (windows + windows.flip(0)) / 2
            together += windows
        shares = together.flatten(1) / together.flatten(1).sum(1, keepdim=True)
        return shares[: 1 if across == 2 else 2]

    def _windows(self, lines: Tensor, apart: int, across: int) -> Tensor:
        """Return how often each pattern of 2 × `across` pixels is in an image, by its labels."""
        seen = torch.zeros(self.phases ** (2 * across), dtype=torch.int64)
        width = lines.shape[1] - (across - 1) * apart
        for rows in _bands(lines, 1 + apart):
            place = torch.zeros_like(rows[apart:, :width], dtype=torch.int32)
            for line in (rows[:-apart], rows[apart:]):
                for k in range(across):
                    place = place * self.phases + line[:, k * apart : k * apart + width]
            seen += torch.bincount(place.flatten(), minlength=len(seen)).cpu()
        return seen.view([self.phases] * (2 * across)).double()

    def _images(self, table: np.ndarray) -> Iterator[tuple[Tensor, bool, bool]]:
        """Yield labels (rows, columns) of each image of a table, and whether it may be mirrored, and rotated."""
        for offset, rows, columns, mirrors, rotations in table.tolist():
            yield self._pixels[offset : offset + rows * columns].view(rows, columns), bool(mirrors), bool(rotations)

    @cached_property
    def thin(self) -> Tensor:
        """What losses.thin_shares would return for the images, mirrored and rotated as their patches are."""
        found = torch.stack([share for table in self._tables for share in self._thin_of(table)])
        return torch.stack([found, 1 - found], dim=1).float().to(self._pixels.device)

    def _thin_of(self, table: np.ndarray) -> Tensor:
        thin, pixels = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for image, _, rotations in self._images(table):
            for direction, lines in enumerate((image, image.T)):
                seen = 0
                for rows in _bands(lines, 3):
                    before, here, after = rows[:-2], rows[1:-1], rows[2:]
                    seen += int(((before == after) & (here != after)).sum())
                for to in (0, 1) if rotations else (direction,):
                    thin[to] += seen
                    pixels[to] += (len(lines) - 2) * lines.shape[1]
        return thin / pixels

    def draw(self, step: int, critic_step: int, cubes: range) -> CriticDraw:
        """Return the draws of one critic step.

        Parameters
        ----------
        step : int
            Number of the generator step.
        critic_step : int
            Number of the critic step in it.
        cubes : range
            Numbers of the cubes.

        Returns
        -------
        CriticDraw
            The draws for these cubes.
        """
        device = self._pixels.device
        chosen, origin, mix, pairs = ([list[np.ndarray]() for _ in range(self._planes)] for _ in range(4))
        drawn = np.zeros(3, np.int64)
        for cube in cubes:
            random = generator(self.seed, step, CRITIC, critic_step, cube)
            slices, patches, penalties = critic_counts(self._settings, cube)
            for axis in range(self._planes):
                chosen[axis].append(self._pick(random, axis))
                origin[axis].append(self._patches(random, axis % 3, patches))
                mix[axis].append(random.random(penalties, np.float32))
                some = np.arange(slices) if penalties == slices else random.permutation(slices)[:penalties]
                pairs[axis].append(np.stack([drawn[1] + np.arange(penalties), drawn[0] + some]))
            drawn += slices, patches, penalties
        every = np.sum([critic_counts(self._settings, cube) for cube in range(self._settings.cubes)], axis=0)
        shares = drawn * self._settings.cubes / (every * len(cubes))
        return CriticDraw(
            self._chosen(chosen),
            tuple(self._cut(np.concatenate(o)) for o in origin[:3])
            + tuple(as_unsharp(self._cut(np.concatenate(o))) for o in origin[3:]),
            tuple(torch.from_numpy(np.concatenate(m)).to(device) for m in mix),
            None
            if drawn[0] == drawn[1] == drawn[2]
            else (tuple(torch.from_numpy(np.concatenate(p, axis=1)).to(device) for p in pairs)),
            (float(shares[1]), float(shares[2])),
        )

    def choose(self, step: int, cubes: range) -> tuple[Tensor | None, ...]:
        """Return which slices the critics judge in the generator step, as CriticDraw.chosen."""
        picks = [list[np.ndarray]() for _ in range(self._planes)]
        for cube in cubes:
            random = generator(self.seed, step, CHOICE, cube)
            for axis in range(self._planes):
                picks[axis].append(self._pick(random, axis))
        return self._chosen(picks)

    def _pick(self, random: np.random.Generator, axis: int) -> np.ndarray:
        if axis > 2:
            return pick_diagonals(random, self.edge, self.slices_per_axis or self.edge)
        return random.permutation(self.edge)[: self.slices_per_axis]

    def _chosen(self, picks: list[list[np.ndarray]]) -> tuple[Tensor | None, ...]:
        """Return the picks of each axis and cube as tensors, or None for all slices."""
        return tuple(
            torch.from_numpy(np.stack(pick)).to(self._pixels.device) if self.slices_per_axis or axis > 2 else None
            for axis, pick in enumerate(picks)
        )

    def _patches(self, random: np.random.Generator, axis: int, count: int) -> np.ndarray:
        """Draw patches, and return the pixel of their first corner and the strides of their rows and columns.

        The array is (count, 3). A mirrored or rotated patch is the same square, read from another corner or with its
        strides exchanged.
        """
        offset, rows, columns, mirrors, rotations = self._tables[axis].T
        if self._weighted is None:
            area = np.cumsum(rows * columns)
            image = np.searchsorted(area, random.integers(0, area[-1], count), side="right")
            row = random.integers(0, rows[image] - self.edge, endpoint=True)
            column = random.integers(0, columns[image] - self.edge, endpoint=True)
        else:
            places, weights, _ = self._weighted[axis]
            image, row, column = places[np.searchsorted(weights, random.random(count), side="right")].T
        allowed = np.stack([mirrors, mirrors, rotations])[:, image].astype(bool)
        flip_rows, flip_columns, exchange = random.integers(0, 2, (3, count)).astype(bool) & allowed
        last, width = self.edge - 1, columns[image]
        corner = offset[image] + (row + flip_rows * last) * width + column + flip_columns * last
        down, across = np.where(flip_rows, -width, width), np.where(flip_columns, -1, 1)
        return np.stack([corner, np.where(exchange, across, down), np.where(exchange, down, across)], axis=1)

    def _weigh(self, table: np.ndarray, correction: Correction) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the patches of the images of a table, (image, row, column), with the running sum of their weights.

        The third returned value is how far the weights bring the patches' phase fractions to the wanted ones, 0 to 1.
        """
        places, found, area = [], [], 0
        for number, (image, _, _) in enumerate(self._images(table)):
            area += image.numel()
            grid = [np.arange(0, n - self.edge + 1, _EVERY_PATCH) for n in image.shape]
            places.append(
                np.stack(
                    [np.full(grid[0].size * grid[1].size, number), *map(np.ravel, np.meshgrid(*grid, indexing="ij"))],
                    axis=1,
                )
            )
            found.append(np.stack([self._share_of(image == phase, grid) for phase in range(self.phases)], axis=1))
        fractions = np.concatenate(found)
        weights, reached = patch_weights(fractions, correction.fractions, area / self.edge**2)
        return np.concatenate(places), np.cumsum(weights)[:-1], reached

    def _share_of(self, phase: Tensor, grid: Sequence[np.ndarray]) -> np.ndarray:
        """Return the share of pixels of the phase in the patches that begin on the grid."""
        sums = np.pad(phase.cpu().numpy().cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
        top, left = grid[0][:, None], grid[1][None]
        bottom, right = top + self.edge, left + self.edge
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return np.asarray(inside.ravel() / self.edge**2)

    @property
    def reached(self) -> float:
        """How far the patches' phase fractions are on the way from the images' to the wanted ones, 0 to 1."""
        return 1.0 if self._weighted is None else min(weighted[2] for weighted in self._weighted)

    def _cut(self, patches: np.ndarray) -> Tensor:
        """Return one-hot patches (patches, phases, edge, edge), float32."""
        corner, down, across = torch.from_numpy(patches).to(self._pixels.device).unbind(1)
        place = torch.arange(self.edge, device=corner.device)
        walk = corner[:, None, None] + down[:, None, None] * place[:, None] + across[:, None, None] * place
        labels = self._pixels[walk]
        return torch.stack([labels == phase for phase in range(self.phases)], dim=1).float()
