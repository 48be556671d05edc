"""What a generator is given of each voxel of the lattice it is computed from: labels, probabilities, or nothing.

The lattice is the low-res volume, or, for a generator fed by latents alone, a grid of the shape that its output asks
for. Training and inference read it through the same two classes.
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
    """The conditions of a box of the lattice in memory: a byte a voxel of labels, four for each probability."""

    box: Box
    values: np.ndarray
    """uint8 (z, y, x), the number of the channel that is 1; or float32 (z, y, x, channel)."""
    channels: int

    def read(self, box: Box, out: np.ndarray) -> None:
        """Write the conditions of a box within this one into float32 `out` (z, y, x, channel), its first channels."""
        assert box.clipped(self.box) == box, f"the network reads {box}, of the conditions {self.box} are held"
        inner = self.values[box.relative_to(self.box.start).slices]
        for channel in range(self.channels):  # all of them are 0 where nothing is known
            out[..., channel] = inner == channel if inner.ndim == 3 else inner[..., channel]


class Conditions:
    """What a file says of every voxel of the lattice.

    Parameters
    ----------
    channels : int
        Of the generator's input; 0 where it is given nothing.
    shape : tuple of int
        The lattice, (z, y, x) voxels.
    volume : Volume, optional
        Where they are read from; none for a generator that is given nothing.
    phase_map : PhaseMap, optional
        From the volume's labels to channels.
    about : object, optional
        What the channels mean, for the digest.

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
        """Of a lattice of which nothing is known."""
        return cls(0, shape)

    @classmethod
    def of(cls, low_res: LowRes, volume: Volume | None = None) -> Conditions:
        """Labels or probabilities of `volume`, by default the one that the study's section names."""
        volume = open_low_res(low_res) if volume is None else volume
        about = low_res.groups if low_res.channels else sorted(low_res.phases.items())
        return cls(len(low_res.groups), volume.shape, volume, PhaseMap.of(low_res, volume.path), about)

    def values(self, box: Box) -> np.ndarray:
        """Those of a box inside the lattice, as `Held.values` has them; InputError for a label without a phase."""
        if self.volume is None:
            return np.zeros((*box.shape, 0), np.float32)
        assert self._phase_map is not None
        return self._phase_map.index(self.volume.read(box))

    def hold(self, box: Box, boundaries: Boundaries) -> Held:
        """A box, which along an axis without ends may reach beyond the lattice, in memory."""
        return Held(box, read_beyond(self.values, box, self.shape, boundaries), self.channels)

    def read(self, box: Box) -> np.ndarray:
        """float32 (z, y, x, channel) of a box inside the lattice."""
        out = np.empty((*box.shape, self.channels), np.float32)
        Held(box, self.values(box), self.channels).read(box, out)
        return out

    def remembering(self) -> Conditions:
        """The same, that reads each box once: for one tile, painted with several seeds."""
        return _Remembering(self)

    def digest(self) -> str:
        """SHA-256 of all values and what they mean; reads the whole volume once, which also finds an unknown label."""
        found = hashlib.sha256(f"{self.shape} {self._about}".encode())
        if self.volume is not None:
            slab = max(1, 2**18 // (self.shape[1] * self.shape[2]))  # small, because malloc keeps the hole
            for box in blocks(self.shape, triple([slab, *self.shape[1:]])):
                found.update(self.values(box).tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The files, for a store's attributes: paths, and the headers of those without one; empty without files."""
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
        if self.volume is None:
            return []
        return [part.path for part in self.volume.parts or (self.volume,)]

    @property
    def volumes(self) -> list[Volume]:
        return [] if self.volume is None else [self.volume]

    def stamp(self) -> Any:
        """What changes when a file is written to; InputError where one has gone."""
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
    """The lattice whose output has that many voxels; InputError where no whole number of its voxels fills it.

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
    """The study's low-res volume, of labels or probabilities; None where it has none."""
    return None if study.low_res is None else open_low_res(study.low_res)


def conditions_of(study: Study) -> Conditions:
    """What the study's generator is given, and on which lattice: of its low-res volume, or of the output it asks for.

    InputError where it says neither.
    """
    if study.low_res is not None:
        return Conditions.of(study.low_res)
    if study.inference.output_voxels is None:
        raise InputError(
            "inference.output_voxels: not set, and without low_res no file gives the size of the output; set it, for "
            "example to 512x512x512"
        )
    return Conditions.none(lattice_of(study.inference.output_voxels, study.scale_factor))
