"""What a voxel says of the phases: a label, or a probability of each phase.

Labels of a file are mapped to positions in the list of phases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.study import LowRes
from hpcres.volumes.axes import times
from hpcres.volumes.formats import open_volume
from hpcres.volumes.volume import Volume

UNWRITTEN = 255
"""Fill value of every label store, so that a missing shard is never read as phase 0."""
PHASE_COLOURS = (
    (38, 44, 58),
    (235, 164, 50),
    (86, 156, 214),
    (201, 82, 96),
    (110, 176, 105),
    (155, 118, 190),
    (222, 205, 120),
    (90, 190, 185),
    (150, 105, 70),
    (230, 140, 180),
    (120, 130, 140),
    (60, 110, 80),
    (200, 220, 240),
    (170, 60, 140),
    (90, 90, 160),
    (240, 240, 230),
)
_ONE = {"u1": 255, "u2": 65535}
"""What stands for a probability of 1."""
_SUM_OFF = 0.02
"""By how much probabilities of a voxel may miss 1, besides the rounding of many channels to uint8."""


def open_low_res(low_res: LowRes) -> Volume:
    """Open the labels, or the probabilities, that a study's generator is given.

    Parameters
    ----------
    low_res
        Low-res part of the study.

    Returns
    -------
    Volume
        Labels (z, y, x), or float32 probabilities (z, y, x, channel) where the study lists channels.

    Raises
    ------
    InputError
        Where a file cannot be opened, or channels do not fit together.
    """
    if low_res.channels:
        return probabilities([open_volume(each.path, each.raw, grey=True) for each in low_res.channels])
    assert low_res.path is not None
    return open_volume(low_res.path, low_res.raw)


def probabilities(parts: Sequence[Volume]) -> Volume:
    """Combine a file for each channel into a volume of float32 (z, y, x, channel).

    Floats 0 … 1, uint8 / 255 or uint16 / 65535 are probabilities. They are divided by their sum, which must be 1 within
    2 %. The tolerance is larger for many channels, because of their rounding to uint8. Where all channels are 0,
    nothing is known of the voxel. Reading raises InputError for values that are no probabilities.

    Parameters
    ----------
    parts
        Volume of each channel.

    Returns
    -------
    Volume
        The probabilities.

    Raises
    ------
    InputError
        For files of different shapes or other types.
    """
    first, path = parts[0], ", ".join(part.path for part in parts)
    for part in parts:
        if part.shape != first.shape:
            raise InputError(
                f"{part.path}: has {times(part.shape)} voxels, {first.path} {times(first.shape)}; "
                "channels are of one volume, cut them alike"
            )
        if part.dtype.kind != "f" and part.dtype.str[1:] not in _ONE:
            raise InputError(
                f"{part.path}: holds {part.dtype}, which is no probability; save floats 0 … 1, uint8 "
                "0 … 255 or uint16 0 … 65535"
            )
    most_off = max(_SUM_OFF, len(parts) / (2 * 255) + 1e-4)

    def at(box: Box, bad: np.ndarray) -> str:
        place = np.argwhere(bad)[0]
        z, y, x = (int(a + b) for a, b in zip(place, box.start, strict=True))
        more = int(np.count_nonzero(bad)) - 1
        return f"at voxel z {z}, y {y}, x {x}" + (f" (and {more} more near it)" if more else "")

    def read(box: Box) -> np.ndarray:
        found = np.empty((*box.shape, len(parts)), np.float32)
        total = np.zeros(box.shape, np.float32)
        for channel, part in enumerate(parts):
            here = found[..., channel]
            with np.errstate(over="ignore"):
                here[...] = part.read(box)
            here /= np.float32(_ONE.get(part.dtype.str[1:], 1))
            if (bad := ~(here >= -1e-6)).any():
                value = here[bad][0]
                raise InputError(
                    f"{part.path}: {value:.4g} {at(box, bad)} is no probability; correct it, or make all "
                    "channels 0 where nothing is known"
                )
            np.maximum(here, 0, out=here)
            total += here
        known = total > 0
        if (bad := known & ~(np.abs(total - 1) <= most_off)).any():
            raise InputError(
                f"{path}: probabilities {at(box, bad)} add up to {total[bad][0]:.4g}, not 1; give each "
                "phase its channel, as floats 0 … 1, uint8 0 … 255 or uint16 0 … 65535"
            )
        np.divide(found, total[..., None], out=found, where=known[..., None])
        return found

    return Volume(
        path,
        first.shape,
        np.dtype(np.float32),
        first.chunks,
        read,
        first.edges,
        parts=tuple(parts),
        files=tuple(file for part in parts for file in part.files),
        _reopen=(probabilities, (tuple(parts),)),
    )


class PhaseMap:
    """Map from the label values of a file to their positions in the list of phases.

    The position is len(values) where the label is in `unknown`.

    Parameters
    ----------
    values
        Label of each phase in the file.
    where
        Path of the file, for messages.
    unknown
        Labels of voxels of which nothing is known.
    """

    def __init__(self, values: Sequence[int], where: str, unknown: Sequence[int] = ()) -> None:
        every = (*values, *unknown)
        assert len(set(every)) == len(every), every
        assert len(values) < UNWRITTEN, values
        self.values, self.where = tuple(int(v) for v in values), where
        self._position = {int(v): min(i, len(values)) for i, v in enumerate(every)}
        self._sorted = np.array(sorted(self._position), np.int64)
        self._order = np.array([self._position[v] for v in sorted(self._position)])
        self._tables: dict[np.dtype, np.ndarray] = {}

    @classmethod
    def of(cls, low_res: LowRes, where: str) -> PhaseMap:
        """Make the map of a study's low-res volume; `where` is the path for messages."""
        return cls(low_res.labels, where, low_res.unknown)

    def index(self, array: np.ndarray) -> np.ndarray:
        """Map labels to positions.

        Parameters
        ----------
        array
            Integer labels of any shape, or probabilities (z, y, x, channel) as floats. Probabilities have their
            channels by position and are returned as they are.

        Returns
        -------
        numpy.ndarray
            uint8 positions in the shape of `array`.

        Raises
        ------
        InputError
            Where a label has no phase. The message names the lowest such label.
        """
        if array.dtype.kind == "f":
            return array
        if array.dtype.itemsize <= 2:
            unsigned = np.dtype(f"u{array.dtype.itemsize}")
            position = self._table(array.dtype)[array.view(unsigned)]
        else:
            place = np.searchsorted(self._sorted, array).clip(0, len(self._sorted) - 1)
            position = np.where(self._sorted[place] == array, self._order[place], UNWRITTEN).astype(np.uint8)
        unknown = position == UNWRITTEN
        if count := int(np.count_nonzero(unknown)):
            found, counts = np.unique(array[unknown], return_counts=True)
            value = int(found[0])
            more = f" (and {len(found) - 1} other labels, {count - counts[0]} voxels)" if len(found) > 1 else ""
            raise InputError(
                f"{self.where}: label {value} occurs in {counts[0]} voxels{more} and has no phase; known are "
                f"{', '.join(map(str, self.values))}; add `{value}: NAME` to phases"
            )
        return position

    def _table(self, dtype: np.dtype) -> np.ndarray:
        """Return the position of every value of an 8- or 16-bit type, indexed by the bits of the value."""
        if dtype not in self._tables:
            table = np.full(1 << 8 * dtype.itemsize, UNWRITTEN, np.uint8)
            limits = np.iinfo(dtype)
            for value, position in self._position.items():
                if limits.min <= value <= limits.max:
                    table[value % len(table)] = position
            self._tables[dtype] = table
        return self._tables[dtype]


def likeliest(low_res: np.ndarray) -> np.ndarray:
    """Reduce what `PhaseMap.index` gives to uint8 positions (z, y, x).

    Parameters
    ----------
    low_res
        uint8 positions (z, y, x), returned as they are, or float probabilities (z, y, x, channel).

    Returns
    -------
    numpy.ndarray
        Of probabilities the channel with the largest, the first of equals; the number of channels where nothing is
        known.
    """
    if low_res.dtype.kind != "f":
        return low_res
    return np.where(low_res.any(-1), low_res.argmax(-1), low_res.shape[-1]).astype(np.uint8)
