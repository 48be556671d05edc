"""Recognition of the axes z, y, x of a file's array; an array whose axes are not clear is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, triple

_UNNAMED = ("", "i", "q", "?")
"""Names that tifffile and vigra give an axis whose meaning the file does not state."""
_AUTOMATIC = re.compile(r"^(phony_)?(dim|axis)_?\d+$")
"""Names that xarray and netCDF make up for axes without names."""
_CHANNELS, _TIMES = ("c", "s", "channel", "channels", "sample", "samples"), ("t", "time", "frame", "frames")


def times(shape: Sequence[int]) -> str:
    """Format a shape as `2 × 3 × 4`."""
    return " × ".join(map(str, shape))


@dataclass(frozen=True)
class Arrangement:
    """Assignment of the axes of a file's array to z, y, x of the volume; all other axes have length 1."""

    full: tuple[int, ...]
    """Shape of the array."""
    places: tuple[int | None, int | None, int | None]
    """The array's axis for z, y, x; None where the array lacks it, and the volume is one voxel thick."""

    @property
    def shape(self) -> Triple:
        """Shape of the volume (z, y, x)."""
        return triple([1 if place is None else self.full[place] for place in self.places])

    @property
    def plane(self) -> tuple[int, ...]:
        """Shape of one plane (row) of an array without chunks, which is contiguous in the file.

        The first of three axes has length 1.
        """
        first = sorted(place for place in self.places if place is not None)[:-2]
        return tuple(1 if axis in first else n for axis, n in enumerate(self.full))

    def of_axes(self, values: Sequence[int]) -> Triple:
        """Reorder values of the array's axes, such as chunk lengths, to z, y, x.

        Parameters
        ----------
        values
            One value for each axis of the array.

        Returns
        -------
        Triple
            The values for z, y, x; 1 for an axis that the array lacks.
        """
        return triple([1 if place is None else values[place] for place in self.places])

    def index(self, box: Box) -> tuple[slice | int, ...]:
        """Return the index of the array that selects `box` (z, y, x)."""
        by_axis = {place: part for place, part in zip(self.places, box.slices, strict=True) if place is not None}
        return tuple(by_axis.get(axis, 0) for axis in range(len(self.full)))

    def to_zyx(self, part: np.ndarray, box: Box) -> np.ndarray:
        """Reorder the axes of the part of the array that `index` selects, and give it the shape of `box`.

        Parameters
        ----------
        part
            The array at `index(box)`.
        box
            Box of the volume (z, y, x).

        Returns
        -------
        numpy.ndarray
            The voxels (z, y, x) of the box.
        """
        order = [place for place in self.places if place is not None]
        return part.transpose(np.argsort(np.argsort(order))).reshape(box.shape)


def arranged(path: str, shape: Sequence[int], names: Sequence[str] | None = None, flat: bool = False) -> Arrangement:
    """Find z, y, x among the axes of an array.

    Parameters
    ----------
    path
        File, for messages.
    shape
        Shape of the array.
    names
        One name for each axis as the file has it, or None. Axes without names are in the order z, y, x; axes of length
        1 before, behind or between them are dropped if only one reading is left.
    flat
        Read training images: an image is a stack of one slice, and one axis of any name but channels may count the
        slices.

    Returns
    -------
    Arrangement
        The array's shape, and its axis for each of z, y, x.

    Raises
    ------
    InputError
        Where any other axis is longer than 1, z, y and x are not clear, or the array has no voxels.
    """
    shape = tuple(int(n) for n in shape)
    given = [] if names is None else [_AUTOMATIC.sub("", str(name).strip().lower()) for name in names]
    named = any(name not in _UNNAMED for name in given)
    places = _by_name(path, shape, given, flat) if named else _by_order(path, shape, flat)
    if 0 in shape:
        raise InputError(f"{path}: has no voxels ({times(shape)}); write it again")
    return Arrangement(shape, places)


def _by_order(path: str, shape: tuple[int, ...], flat: bool) -> tuple[int | None, int, int]:
    axes = list(range(len(shape)))
    if flat:
        while len(axes) > 2 and shape[axes[-1]] == 1:
            axes.pop()
    if len(axes) == 2 and flat:
        return None, axes[0], axes[1]
    if len(axes) < 3:
        what = "2D image" if len(axes) == 2 else f"{len(axes)}D array"
        raise InputError(f"{path}: is a {what} ({times(shape)}) where a 3D volume is due; give the whole stack")
    long = [axis for axis in axes if shape[axis] != 1]
    if len(long) > 3:
        raise InputError(
            f"{path}: has {len(shape)} axes ({times(shape)}) where z, y, x are due; save one time and channel of it"
        )
    if len(long) == 3:
        return long[0], long[1], long[2]
    windows = [axes[i : i + 3] for i in range(len(axes) - 2) if set(long) <= set(axes[i : i + 3])]
    if flat:
        windows = windows[-1:]
    if len({tuple(shape[axis] for axis in window) for window in windows}) != 1:
        raise InputError(
            f"{path}: has {len(shape)} axes ({times(shape)}) without names, and which are z, y, x is not clear; save "
            "it with three axes"
        )
    z, y, x = windows[0]
    return z, y, x


def _by_name(path: str, shape: tuple[int, ...], names: list[str], flat: bool) -> tuple[int | None, int, int]:
    if len(names) != len(shape):
        raise InputError(f"{path}: names {len(names)} axes ({', '.join(names)}) of {times(shape)}; correct them")
    # Every ImageJ and OME file names up to six axes; channels and frames of length 1 are no news.
    told = [k for k, name in enumerate(names) if shape[k] != 1 or name in AXES or len(shape) <= 3]
    axes = f"axes {', '.join(names[k] or '?' for k in told)} of {times([shape[k] for k in told])}"
    found = {axis: names.index(axis) for axis in AXES if axis in names}
    others = [k for k in range(len(shape)) if k not in found.values()]
    long = [k for k in others if shape[k] != 1]
    if len(found) < sum(name in AXES for name in names):
        raise InputError(f"{path}: has {axes}, one of them twice; name them z, y and x")
    if "z" not in found or (flat and long and shape[found["z"]] == 1):
        free = [k for k in (long or others) if names[k] in _UNNAMED or (flat and names[k] not in _CHANNELS)]
        if len(free) == 1:
            found["z"] = free[0]
            long = [k for k in long if k != free[0]]
    for k in long:
        what = "channels" if names[k] in _CHANNELS else "frames" if names[k] in _TIMES else f"elements along {names[k]}"
        remedy = f"save one {'channel' if what == 'channels' else 'of them'}"
        if "z" not in found or shape[found["z"]] == 1:
            remedy += f"; if they are the slices of a volume, save it with axis {names[k]} named z"
        raise InputError(f"{path}: has {axes}, that is {shape[k]} {what}, where z, y, x are due; {remedy}")
    if "y" not in found or "x" not in found or ("z" not in found and not flat):
        what = "is a 2D image" if {"y", "x"} <= set(found) else "has other axes"
        raise InputError(f"{path}: {what} ({axes}) where a 3D volume is due with axes z, y, x; give the whole stack")
    return found.get("z"), found["y"], found["x"]
