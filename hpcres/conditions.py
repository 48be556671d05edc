"""Conditions: what a generator is given at each voxel of its lattice, which is labels, probabilities or nothing.

The lattice is the low-res volume. For a generator fed by latents alone it is a grid whose shape follows from the shape
of the output. Training and inference read the lattice through the same two classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import Boundaries, Box, Triple, blocks, triple
from hpcres.study import LowRes, Study
from hpcres.volumes.phases import PhaseMap, open_low_res
from hpcres.volumes.volume import Volume, read_beyond


@dataclass(frozen=True)
class Held:
    """Conditions of a box of the lattice, held in memory.

    A voxel takes one byte if it has a label, and four bytes for each probability.
    """

    box: Box
    values: np.ndarray
    """uint8 (z, y, x), the number of the channel that is 1; or float32 (z, y, x, channel)."""
    channels: int

    def read(self, box: Box, out: np.ndarray) -> None:
        """Write the conditions of a box into the first channels of an array.

        Labels are written one-hot. All channels of a voxel are 0 where nothing is known.

        Parameters
        ----------
        box : Box
            Box of the lattice that lies inside `self.box`.
        out : ndarray
            float32 (z, y, x, channel), with at least `channels` channels. The others are left as they are.
        """
        assert box.clipped(self.box) == box, f"the network reads {box}, of the conditions {self.box} are held"
        inner = self.values[box.relative_to(self.box.start).slices]
        for channel in range(self.channels):  # all of them are 0 where nothing is known
            out[..., channel] = inner == channel if inner.ndim == 3 else inner[..., channel]


class Conditions:
    """Conditions of every voxel of the lattice, read from a file.

    Parameters
    ----------
    channels : int
        Channels of the generator's input; 0 if the generator is given nothing.
    shape : tuple of int
        Shape of the lattice, (z, y, x) voxels.
    volume : Volume, optional
        Volume that the conditions are read from; None for a generator that is given nothing.
    phase_map : PhaseMap, optional
        Map from the volume's labels to channels.
    about : object, optional
        Meaning of the channels, which is part of the digest.

    Examples
    --------
    >>> nothing = Conditions.none((2, 2, 2))
    >>> nothing.channels, nothing.read(Box.whole((2, 2, 2))).shape
    (0, (2, 2, 2, 0))
    """

    def __init__(
        self,
        channels: int,
        shape: Triple,
        volume: Volume | None = None,
        phase_map: PhaseMap | None = None,
        about: Any = None,
    ) -> None:
        assert (volume is None) == (channels == 0), (channels, volume)
        self.channels, self.shape, self.volume = channels, shape, volume
        self._phase_map, self._about = phase_map, about

    @classmethod
    def none(cls, shape: Triple) -> Conditions:
        """Return the conditions of a lattice of which nothing is known."""
        return cls(0, shape)

    @classmethod
    def of(cls, low_res: LowRes, volume: Volume | None = None) -> Conditions:
        """Return the conditions that a study's section `low_res` describes.

        Parameters
        ----------
        low_res : LowRes
            Section of the study.
        volume : Volume, optional
            Labels or probabilities; by default the volume that the section names.
        """
        volume = open_low_res(low_res) if volume is None else volume
        about = low_res.groups if low_res.channels else sorted(low_res.phases.items())
        return cls(len(low_res.groups), volume.shape, volume, PhaseMap.of(low_res, volume.path), about)

    def values(self, box: Box) -> np.ndarray:
        """Read the conditions of a box inside the lattice.

        Returns
        -------
        ndarray
            As `Held.values`: uint8 (z, y, x), the number of the channel that is 1; or float32 (z, y, x, channel).

        Raises
        ------
        InputError
            A label has no phase.
        """
        if self.volume is None:
            return np.zeros((*box.shape, 0), np.float32)
        assert self._phase_map is not None
        return self._phase_map.index(self.volume.read(box))

    def hold(self, box: Box, boundaries: Boundaries) -> Held:
        """Read a box into memory; along an axis without ends it may reach beyond the lattice."""
        return Held(box, read_beyond(self.values, box, self.shape, boundaries), self.channels)

    def read(self, box: Box) -> np.ndarray:
        """Read a box inside the lattice as float32 (z, y, x, channel)."""
        out = np.empty((*box.shape, self.channels), np.float32)
        Held(box, self.values(box), self.channels).read(box, out)
        return out

    def remembering(self) -> Conditions:
        """Return the same conditions, reading each box only once, for a tile that is painted with several seeds."""
        return _Remembering(self)

    def digest(self) -> str:
        """Return the SHA-256 of all values and their meaning.

        This reads the whole volume once, which also finds a label without a phase.
        """
        found = hashlib.sha256(f"{self.shape} {self._about}".encode())
        if self.volume is not None:
            slab = max(1, 2**18 // (self.shape[1] * self.shape[2]))  # small, because malloc keeps the hole
            for box in blocks(self.shape, triple([slab, *self.shape[1:]])):
                found.update(self.values(box).tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Describe the files for the attributes of a store.

        Returns
        -------
        dict
            `low_res` is a path, or a list of paths. `raw` is the header of a file without one of its own, or a list of
            headers. If there is no file both are None, and `lattice` is the shape of the lattice.
        """
        if self.volume is None:
            return {"low_res": None, "raw": None, "lattice": list(self.shape)}
        files = self.volume.parts or (self.volume,)
        raw = [part.raw.model_dump() if part.raw else None for part in files]
        several = bool(self.volume.parts)
        return {
            "low_res": [part.path for part in files] if several else self.volume.path,
            "raw": raw if several else raw[0],
        }

    @property
    def paths(self) -> list[str]:
        """Paths of the files; empty if there is no file."""
        if self.volume is None:
            return []
        return [part.path for part in self.volume.parts or (self.volume,)]

    @property
    def volumes(self) -> list[Volume]:
        """The volume as a list of one; empty if there is no volume."""
        return [] if self.volume is None else [self.volume]

    def stamp(self) -> Any:
        """Return a value that changes when a file is written to; None if there is no file.

        Raises
        ------
        InputError
            A file no longer exists.
        """
        return None if self.volume is None else self.volume.stamp()


class _Remembering(Conditions):
    def __init__(self, conditions: Conditions) -> None:
        super().__init__(
            conditions.channels, conditions.shape, conditions.volume, conditions._phase_map, conditions._about
        )
        self._known: dict[Box, np.ndarray] = {}
        self._values: Callable[[Box], np.ndarray] = conditions.values

    def values(self, box: Box) -> np.ndarray:
        if box not in self._known:
            self._known[box] = self._values(box)
        return self._known[box]


def lattice_of(output_voxels: Triple, scale: Fraction) -> Triple:
    """Return the shape of the lattice whose output has the given number of voxels.

    Parameters
    ----------
    output_voxels : tuple of int
        Shape of the output, (z, y, x) high-res voxels.
    scale : Fraction
        High-res voxels per voxel of the lattice along an axis.

    Raises
    ------
    InputError
        No whole number of lattice voxels fills the output.

    Examples
    --------
    >>> lattice_of((64, 64, 32), Fraction(16))
    (4, 4, 2)
    """
    p, q = scale.numerator, scale.denominator
    if any(n % p for n in output_voxels):
        nearest = "x".join(str(max(p, round(n / p) * p)) for n in output_voxels)
        raise InputError(
            f"inference.output_voxels: {'x'.join(map(str, output_voxels))} are no whole voxels of the lattice at scale "
            f"factor {scale}; use multiples of {p}, for example {nearest}"
        )
    return triple([n // p * q for n in output_voxels])


def conditions_volume(study: Study) -> Volume | None:
    """Open the study's low-res volume of labels or probabilities; None if the study has none."""
    return None if study.low_res is None else open_low_res(study.low_res)


def conditions_of(study: Study) -> Conditions:
    """Return the conditions that the study's generator is given.

    The lattice is that of the study's low-res volume. If there is none, it follows from the output that the study asks
    for.

    Raises
    ------
    InputError
        The study has neither `low_res` nor `inference.output_voxels`.
    """
    if study.low_res is not None:
        return Conditions.of(study.low_res)
    if study.inference.output_voxels is None:
        raise InputError(
            "inference.output_voxels: not set, and without low_res no file gives the size of the output; set it, for "
            "example to 512x512x512"
        )
    return Conditions.none(lattice_of(study.inference.output_voxels, study.scale_factor))
