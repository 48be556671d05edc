"""Samples of a training step: cubes of the low-res volume, noise, and patches of the high-res images.

Every draw is a function of (seed, step, cube), and not of the process that makes it. So any number of processes trains
on the same samples, and a resumed run continues them without any stored random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, product
from math import prod

import numpy as np
import torch
from torch import Tensor

from hpcres.conditions import Conditions
from hpcres.counting.counts import count, count_inner, count_rim
from hpcres.counting.totals import MAX_PHASES, Counts, add
from hpcres.errors import InputError
from hpcres.geometry import AXES, MIRROR, Box, triple
from hpcres.imaging import one_hot
from hpcres.networks.resampling import center_crop
from hpcres.noise import NOISE_VOXELS, gaussian_taps, noise_of, smoothed
from hpcres.study import Study, Training
from hpcres.training.diagonals import as_unsharp, pick_diagonals
from hpcres.training.visible import Correction, patch_weights
from hpcres.volumes.formats import read_images
from hpcres.volumes.phases import PhaseMap, likeliest
from hpcres.volumes.volume import read_beyond

_HELD_BYTES = 2**29
"""Low-res volumes up to this size are held in memory, with one byte per voxel or four per probability. Larger ones are
read cube by cube."""
_BAND_PIXELS = 2**24
"""Images are counted by bands of this many pixels. A pixel takes 16 bytes."""
_CUBE, _CRITIC, _CHOICE = range(3)
_RECALIBRATION = 2**31
"""Kind of draw of the cubes before a generator is saved. Training uses the kinds up to its critic steps."""
_REACH = 5
"""Low-res voxels that padding reaches into a cube, at most (docs/recipes.md, Context)."""
_EVERY_PATCH = 4
"""Distance, in pixels, between the places at which weighted patches begin."""
_CANDIDATES = 12
"""Number of cubes that are drawn for each cube of a typical set."""


def _generator(seed: int, step: int, what: int, *which: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step, what, *which))))


def _bands(image: Tensor, height: int) -> Iterator[Tensor]:
    """Yield rows of an image a band at a time, so that each `height` consecutive rows are in exactly one band."""
    step = max(1, _BAND_PIXELS // image.shape[1])
    for top in range(0, len(image) - height + 1, step):
        yield image[top : top + step + height - 1]


class LowResCubes:
    """Cubes of d³ voxels from the low-res volume, with their context and channels of noise.

    The edge d is such that d · scale factor = training.cube_voxels. A cube has training.context low-res voxels around
    it. Beyond the volume, they are its mirror image.
    """

    def __init__(self, study: Study) -> None:
        self.seed = study.seed
        self.channels = len(study.low_res.groups)
        self.isotropic = study.high_res.isotropic
        self.edge = int(study.training.cube_voxels / study.scale_factor)
        self.context = study.training.context
        q = study.scale_factor.denominator
        self.whole_context = max(self.context, -(-_REACH // q) * q)
        """Low-res voxels around a cube with which no padding changes what is generated, as inside a volume."""
        self.reach_faces = study.training.reach_faces
        self._noise_taps = [gaussian_taps(sigma, study.scale_factor) for sigma in study.network.noise_sigma_voxels]
        self._conditions = Conditions.of(study.low_res)
        self._where = ", ".join(self._conditions.paths)
        for axis, size in zip(AXES, self._conditions.shape, strict=True):
            if size < self.edge:
                raise InputError(
                    f"{self._where}: {size} voxels along {axis}, but a training cube needs {self.edge} at scale "
                    f"factor {study.scale_factor}; use a larger volume or a larger scale factor"
                )
        self.unknown_share = 0.0
        self._content = np.zeros(0)
        """`_shares` of the whole volume."""
        self._held = self._check_and_hold()
        self._typical: dict[tuple[int, int], list[int]] = {}

    def _check_and_hold(self) -> np.ndarray | None:
        """Look at every voxel once, slab by slab, and return the volume if it is small enough to be held in memory.

        An unknown label thus stops the run before it starts.
        """
        shape, volume = self._conditions.shape, self._conditions.volume
        assert volume is not None
        kind, each = (np.float32, (self.channels,)) if volume.parts else (np.uint8, ())
        held_bytes = prod((*shape, *each)) * np.dtype(kind).itemsize
        held = np.empty((*shape, *each), kind) if held_bytes <= _HELD_BYTES else None
        thick = max(1, min(volume.chunks[0], 2**26 // prod((*shape[1:], *each))))

        def slabs() -> Iterator[np.ndarray]:
            for z in range(0, shape[0], thick):
                slab = Box((z, 0, 0), triple([min(z + thick, shape[0]), *shape[1:]]))
                index = self._conditions.values(slab)
                if held is not None:
                    held[slab.slices] = index
                labels = likeliest(index)
                if self.channels == MAX_PHASES and (labels == self.channels).any():
                    raise InputError(
                        f"{self._where}: unknown voxels beside {self.channels} groups of phases, but at most "
                        f"{MAX_PHASES} labels, unknown among them, can be counted; merge two groups in low_res.phases"
                    )
                yield labels

        inner, rim = count_inner(slabs())
        found = add(inner, count_rim(rim, {}))
        self.unknown_share = found.voxels.get(self.channels, 0) / prod(shape)
        if self.unknown_share == 1:
            raise InputError(
                f"{self._where}: every voxel is unknown, so there is nothing to learn from; see low_res.unknown"
            )
        self._content = self._shares(found)
        return held

    def _shares(self, found: Counts) -> np.ndarray:
        """Return the shares of the channels in the known voxels, and the shares of the faces between two channels.

        The first are known voxels by channel, as shares of all known voxels. The others are faces between two channels
        over all faces, divided by the known share of the voxels. The faces of an anisotropic material are those of each
        axis.
        """
        voxels = np.array([found.voxels.get(channel, 0) for channel in range(self.channels)])
        between = [found.faces.get(pair, (0, 0, 0)) for pair in combinations(range(self.channels), 2)]
        by_axis = np.array(between).reshape(-1, 3)
        seen = by_axis.sum(axis=1) if self.isotropic else by_axis.ravel()
        known = max(1, voxels.sum())
        return np.concatenate([voxels, seen * sum(found.voxels.values()) / sum(found.all_faces)]) / known

    def typical(self, cubes: int, kind: int) -> list[int]:
        """Return which cubes to draw so that together they are most like the volume.

        They are compared in phase fractions and in interphase areas; the areas of an anisotropic material are those of
        each direction. Without this choice, a generator is blamed for what a few cubes are: phase fractions of eight
        cubes drawn at random can be several points off the volume's, and areas a tenth. One cube after the other is
        exchanged for a better one until there is none.

        Parameters
        ----------
        cubes : int
            Number of cubes.
        kind : int
            Kind of draw, of step 0.

        Returns
        -------
        list of int
            Numbers of the cubes, in ascending order.
        """
        if (cubes, kind) not in self._typical:
            self._typical[cubes, kind] = self._exchanged(cubes, kind)
        return self._typical[cubes, kind]

    def _exchanged(self, cubes: int, kind: int) -> list[int]:
        found = [count(likeliest(self._cube(self.start(0, kind, cube)[1]))) for cube in range(_CANDIDATES * cubes)]
        off = np.array([self._shares(one) for one in found]) - self._content
        off /= np.maximum(off.std(axis=0), 1e-12)
        chosen = list(range(cubes))
        least, better = np.square(off[chosen].sum(axis=0)).sum(), True
        while better:
            better = False
            for place in range(cubes):
                others = chosen[:place] + chosen[place + 1 :]
                sums = np.square(off[others].sum(axis=0) + off).sum(axis=1)
                sums[others] = np.inf
                if sums.min() < least * (1 - 1e-9):
                    chosen[place], least, better = int(sums.argmin()), sums.min(), True
        return sorted(chosen)

    def recalibration_inputs(
        self, cubes: int, at_once: int, device: torch.device, context: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the generator's input of cubes that stand for the volume, some at a time.

        If at most `cubes` cubes can hold every voxel, they are the volume that will be painted: a grid over it, with
        the noise that it is painted with. Cubes drawn anywhere inside hardly hold the faces of the volume, which are
        much of a small volume, and phase fractions change with the noise. If more cubes would be needed, `cubes`
        typical ones are drawn.

        Parameters
        ----------
        cubes : int
            Largest number of cubes.
        at_once : int
            Number of cubes at a time.
        device : torch.device
            Device of the tensors.
        context : int or None
            Low-res voxels around each cube, by default training.context.

        Yields
        ------
        Tensor
            The generator's input, as of `draw`.
        """
        axes = [np.linspace(0, n - self.edge, -(-n // self.edge)).round().astype(int) for n in self._conditions.shape]
        if prod(map(len, axes)) > cubes:
            chosen = self.typical(cubes, _RECALIBRATION)
            chosen_cubes = (self._drawn(*self.start(0, _RECALIBRATION, cube), context=context) for cube in chosen)
        else:
            chosen_cubes = (self._to_be_painted(np.array(corner), context) for corner in product(*axes))
        while some := list(islice(chosen_cubes, at_once)):
            yield self._given(some, device)[1]

    def start(self, step: int, kind: int, cube: int) -> tuple[np.random.Generator, np.ndarray]:
        """Return the place at which a cube is drawn, and the random generator in its state after that.

        If every place inside the volume is equally likely, then along each axis the outermost voxel of the volume is in
        one possible cube and an inner voxel is in d. The faces of the volume are hardly learned then. With
        training.reach_faces a cube is drawn from all that hold a voxel of the volume and then moved inside. No voxel is
        then in fewer than d cubes, nor in as many as 2 d.

        Parameters
        ----------
        step, kind, cube : int
            Step, kind of draw and number of the cube.

        Returns
        -------
        random : numpy.random.Generator
            Generator for the further draws of this cube.
        start : ndarray
            (3,): first voxel of the cube along z, y, x.
        """
        random = _generator(self.seed, step, _CUBE, kind, cube)
        last = np.array(self._conditions.shape) - self.edge
        if not self.reach_faces:
            return random, random.integers(0, last, endpoint=True)
        return random, np.clip(random.integers(1 - self.edge, last + self.edge - 1, endpoint=True), 0, last)

    def _box(self, start: np.ndarray, around: int = 0) -> Box:
        """Return the cube at `start` with `around` voxels more on each side."""
        whole = Box(triple(start.tolist()), triple((start + self.edge).tolist()))
        return whole.grown(around, around)

    def _cube(self, start: np.ndarray, around: int = 0) -> np.ndarray:
        return read_beyond(self._read, self._box(start, around), self._conditions.shape, MIRROR)

    def _read(self, box: Box) -> np.ndarray:
        return self._conditions.values(box) if self._held is None else self._held[box.slices]

    def draw(
        self,
        step: int,
        cubes: Sequence[int],
        device: torch.device,
        kind: int = 0,
        masked_fraction: float = 0.0,
        context: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw what is known of cubes, and the generator's input of them.

        Parameters
        ----------
        step : int
            Number of the step.
        cubes : sequence of int
            Numbers of the cubes.
        device : torch.device
            Device of the tensors.
        kind : int
            Kind of draw. Each kind gives independent draws of the same step.
        masked_fraction : float
            Mean share of a cube that a random box makes unknown, in each cube.
        context : int or None
            Low-res voxels s around each cube, by default training.context.

        Returns
        -------
        low_res : Tensor
            What is known: labels, uint8 (cubes, d, d, d), or probabilities, float32 (cubes, channels, d, d, d). The
            label of an unknown voxel is `channels`, and its probabilities are 0.
        given : Tensor
            The generator's input, float32 (cubes, channels + noises, d + 2s, d + 2s, d + 2s). All channels of an
            unknown voxel but those of noise are 0.
        """
        drawn = [self._drawn(*self.start(step, kind, cube), masked_fraction, context) for cube in cubes]
        low_res, given = self._given(drawn, device)
        return center_crop(low_res, self._around(context)), given

    def _around(self, context: int | None) -> int:
        return self.context if context is None else context

    def around(self, step: int, cubes: Sequence[int], device: torch.device, kind: int = 0) -> Tensor:
        """Return what is known of the cubes of `draw`, with one low-res voxel more on each side.

        Parameters
        ----------
        step : int
            Number of the step.
        cubes : sequence of int
            Numbers of the cubes.
        device : torch.device
            Device of the tensor.
        kind : int
            Kind of draw.

        Returns
        -------
        Tensor
            One-hot or probabilities, (cubes, channels, d + 2, d + 2, d + 2).
        """
        seen = np.stack([self._cube(self.start(step, kind, cube)[1], 1) for cube in cubes])
        labels = torch.from_numpy(seen).to(device)
        return one_hot(labels if seen.ndim == 4 else labels.movedim(4, 1).contiguous(), self.channels)

    @property
    def fractions(self) -> np.ndarray:
        """Share of each channel's label in all known voxels of the volume."""
        return self._content[: self.channels]

    def _drawn(
        self, random: np.random.Generator, start: np.ndarray, masked_fraction: float = 0.0, context: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is known of a cube and its context, and noise for it."""
        edge = self.edge + 2 * self._around(context)
        seen = self._cube(start, self._around(context))
        white = [random.standard_normal([edge + len(t) - 1] * 3, np.float32) for t in self._noise_taps]
        noise = np.stack([smoothed(one, taps) for one, taps in zip(white, self._noise_taps, strict=True)])
        if masked_fraction:
            hidden = round(edge * float(random.uniform(0, 2 * masked_fraction)) ** (1 / 3))
            z, y, x = random.integers(0, edge - hidden, 3, endpoint=True)
            seen = seen.copy()
            seen[z : z + hidden, y : y + hidden, x : x + hidden] = 0 if seen.ndim == 4 else self.channels
        return seen, noise

    def _to_be_painted(self, start: np.ndarray, context: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return a cube with its context, and the noise that inference by default has there."""
        box, ends = self._box(start, self._around(context)), (NOISE_VOXELS,) * 3
        noise = [noise_of(self.seed, channel, taps, box, ends) for channel, taps in enumerate(self._noise_taps)]
        return self._cube(start, self._around(context)), np.stack(noise)

    def _given(self, drawn: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cubes with their context, and the generator's input that they make."""
        seen, noise = (torch.from_numpy(np.stack(some)).to(device) for some in zip(*drawn, strict=True))
        low_res = seen if seen.ndim == 4 else seen.movedim(4, 1).contiguous()
        return low_res, torch.cat([one_hot(low_res, self.channels), noise], dim=1)


@dataclass(frozen=True)
class CriticDraw:
    """What one critic step draws.

    Tuples are per axis z, y, x. With training.diagonal_slices they also have entries for slices at 45° that contain z,
    y, x. `shares` is not per axis.

    Attributes
    ----------
    chosen : tuple of Tensor or None
        (cubes, slices): which slices of each cube; None for all. For slices at 45° (cubes, slices, 2), as
        pick_diagonals returns them.
    real : tuple of Tensor
        Patches of the images, one-hot (patches, phases, edge, edge). Patches beside slices at 45° are as unsharp as
        these.
    mix : tuple of Tensor
        (penalties,): weight of the patch in each mixture whose gradient is penalised.
    pairs : tuple of Tensor, or None
        (2, penalties): the patch and the generated slice of each mixture. None pairs the first with the first, and so
        on.
    shares : tuple of float
        Numbers of patches and of penalties of these cubes, each divided by the mean number of as many cubes. Means over
        the processes of (share × mean) are means over all.
    """

    chosen: tuple[Tensor | None, ...]
    real: tuple[Tensor, ...]
    mix: tuple[Tensor, ...]
    pairs: tuple[Tensor, ...] | None
    shares: tuple[float, float]


def critic_counts(settings: Training, cube: int) -> tuple[int, int, int]:
    """Return the numbers of generated slices, patches and penalties of a cube, for each axis and critic step.

    A number that the study gives for all cubes is divided among them, so that a cube has the same with any number of
    processes.

    Parameters
    ----------
    settings : Training
        Training settings of the study.
    cube : int
        Number of the cube.

    Returns
    -------
    slices, patches, penalties : int
        Generated slices, patches of the images, and mixtures whose gradient is penalised.
    """
    slices = settings.slices_per_axis or settings.slice_voxels

    def part(number: int | str) -> int:
        if isinstance(number, str):
            return slices
        number = max(number, settings.cubes)
        return (cube + 1) * number // settings.cubes - cube * number // settings.cubes

    patches = part(settings.real_patches)
    return slices, patches, min(slices, patches, part(settings.penalties))


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
            random = _generator(self.seed, step, _CRITIC, critic_step, cube)
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
            random = _generator(self.seed, step, _CHOICE, cube)
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
