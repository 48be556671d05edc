"""Cubes of the low-res volume, and the high-res cubes that are painted from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from hpcres.study import Study
from hpcres.training.data.draws import CUBE, RECALIBRATION, generator
from hpcres.volumes.phases import likeliest
from hpcres.volumes.volume import read_beyond

_HELD_BYTES = 2**29
"""Low-res volumes up to this size are held in memory, with one byte per voxel or four per probability. Larger ones are
read cube by cube."""
_REACH = 5
"""Low-res voxels that padding reaches into a cube, at most (docs/recipes.md, Context)."""
_CANDIDATES = 12
"""Number of cubes that are drawn for each cube of a typical set."""


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
            chosen = self.typical(cubes, RECALIBRATION)
            chosen_cubes = (self._drawn(*self.start(0, RECALIBRATION, cube), context=context) for cube in chosen)
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
        random = generator(self.seed, step, CUBE, kind, cube)
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
