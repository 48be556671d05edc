"""A volume of any format; a box of it is read on request, so the whole volume is never held.

The second part of the module holds what the reader of every format asks of its file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import Boundaries, Box, Triple, pieces_of, triple
from hpcres.lengths import UNKNOWN, EdgeLengths, VoxelEdges
from hpcres.study import RawHeader
from hpcres.volumes.axes import Arrangement, arranged, times

_PEEK_VOXELS = 2**20
"""Of floats, looked at before a run begins, so that grey values are refused then."""


class NotALabel(InputError):
    """A float with a fraction, or beyond int32, where a label is due."""


@dataclass(frozen=True)
class Volume:
    """A lazily read volume of any format: labels, or probabilities.

    It pickles as its path and may be read from many threads.
    """

    path: str
    shape: Triple
    dtype: np.dtype
    chunks: Triple
    """Shape in which reading is cheap."""
    _read: Callable[[Box], np.ndarray] = field(repr=False)
    edges: VoxelEdges = UNKNOWN
    """Of a voxel, as far as the file says."""
    phases: tuple[str, ...] | None = None
    """Names of the labels 0, 1, 2, … where the file knows them."""
    provenance: dict[str, Any] = field(default_factory=dict)
    raw: RawHeader | None = None
    _read_unwritten: Callable[[Box], np.ndarray] | None = field(default=None, repr=False)
    parts: tuple[Volume, ...] = ()
    """Of `probabilities`, the volume of each channel."""
    files: tuple[str, ...] = ()
    """Those that `stamp` looks at."""
    _reopen: tuple[Callable[..., Volume], tuple[Any, ...]] | None = field(default=None, repr=False)
    """What opens it in another process."""

    @property
    def voxel_size(self) -> EdgeLengths | None:
        """Edge lengths z, y, x in `unit`; None where the file does not state all three."""
        return self.lengths()[0] if all(self.edges.each) else None

    @property
    def unit(self) -> str | None:
        """OME-Zarr's name of the unit of length; None where the file does not state one for all three edges."""
        return self.lengths()[1] if self.edges.known else None

    def lengths(self) -> tuple[EdgeLengths, str]:
        """Return the edge lengths z, y, x and their unit, as `VoxelEdges.lengths`.

        Raises
        ------
        InputError
            Where some edges are unknown.
        """
        return self.edges.lengths(self.path)

    def read(self, box: Box) -> np.ndarray:
        """Read the voxels of a box.

        Parameters
        ----------
        box
            Box inside the volume (z, y, x).

        Returns
        -------
        numpy.ndarray
            (z, y, x) in the file's type, or float32 (z, y, x, channel) of probabilities.

        Raises
        ------
        InputError
            Where the file is damaged, or the box leaves the volume.
        """
        return self._inside(self._read, box)

    def read_unwritten(self, box: Box) -> np.ndarray:
        """Read as `read` does, but give 255 where a store of hpcres was never written.

        This is for a caller who refuses that label: to look for it here is one more pass over memory.
        """
        return self._inside(self._read_unwritten or self._read, box)

    def _inside(self, read: Callable[[Box], np.ndarray], box: Box) -> np.ndarray:
        if box.clipped(Box.whole(self.shape)) != box:
            raise InputError(f"{self.path}: {box} leaves the volume of {times(self.shape)} voxels; ask inside it")
        return np.ascontiguousarray(read(box))

    def stamp(self) -> tuple[int, ...]:
        """Return numbers that change when a file of the volume is replaced or written to.

        Of a Zarr array only the file that describes it is looked at, not each chunk.

        Returns
        -------
        tuple of int
            Inode, bytes and time of modification in ns of each file.

        Raises
        ------
        InputError
            Where a file is gone.
        """
        found: list[int] = []
        for file in self.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise InputError(f"{file}: has gone ({error.strerror}); put it back") from None
            found += status.st_ino, status.st_size, status.st_mtime_ns
        return tuple(found)

    @property
    def place(self) -> str:
        """Absolute path; for an array in memory, its name."""
        return self.path if self.in_memory else os.path.abspath(self.path)

    @property
    def in_memory(self) -> bool:
        """Whether only this process can read the volume."""
        return self._reopen is None and not self.parts

    def __getitem__(self, key: Any) -> np.ndarray:
        """Index like an array with integers, slices and an ellipsis; only the box that holds the voxels is read."""
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys = (*keys[:at], *(slice(None),) * (len(self.shape) + 1 - len(keys)), *keys[at + 1 :])
        if len(keys) > len(self.shape):
            raise IndexError(f"{len(keys)} indices for a volume of {len(self.shape)} axes")
        starts, stops, within = [], [], list[int | slice]()
        for one, n in zip((*keys, *(slice(None),) * (len(self.shape) - len(keys))), self.shape, strict=True):
            found = range(n)[one]
            places = found if isinstance(found, range) else range(found, found + 1)
            starts.append(min(places, default=0))
            stops.append(max(places, default=0) + 1)
            within.append(0 if found is not places else slice(None, None, places.step) if places else slice(0))
        return self.read(Box(triple(starts), triple(stops)))[tuple(within)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the whole volume into a new array."""
        if copy is False:
            raise ValueError(f"{self.path}: is read into a new array; ask for a copy")
        voxels = self.read(Box.whole(self.shape))
        return voxels if dtype is None else voxels.astype(dtype)

    def __reduce__(self) -> tuple[Callable[..., Volume], tuple[Any, ...]]:
        """Pickle the volume as the call that opens it again."""
        assert self._reopen, f"{self.path} is in memory only"
        return self._reopen


def read_beyond(read: Callable[[Box], np.ndarray], box: Box, shape: Triple, boundaries: Boundaries) -> np.ndarray:
    """Read a box that may reach beyond the volume on its axes without ends.

    Parameters
    ----------
    read
        Function that reads a box inside the volume.
    box
        Box to read (z, y, x).
    shape
        Voxels of the volume along z, y, x.
    boundaries
        Boundary of each axis.

    Returns
    -------
    numpy.ndarray
        What `read` gives, in the shape of the box.
    """
    pieces = pieces_of(box, shape, boundaries)
    parts = [read(piece.source)[tuple(slice(None, None, step) for step in piece.steps)] for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    window = np.empty((*box.shape, *parts[0].shape[3:]), parts[0].dtype)
    for piece, part in zip(pieces, parts, strict=True):
        window[piece.place.slices] = part
    return window


def array_volume(labels: np.ndarray, name: str) -> Volume:
    """Make a volume over an array (z, y, x) in memory; it does not pickle.

    Parameters
    ----------
    labels
        Labels (z, y, x).
    name
        Name that stands where a file has its path.

    Returns
    -------
    Volume
        The volume.
    """
    return of_labels(volume_over(name, labels))


# ---- what the reader of any format asks of its file -------------------------------------------------------


def existing(path: str) -> Path:
    """Return the path of a file or folder; InputError where it does not exist or is an empty file."""
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if place.is_file() and place.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes); write it again")
    return place


def corrupt(path: str, why: object) -> NoReturn:
    """Raise InputError: the file is truncated or corrupt, with the reason `why`."""
    raise InputError(f"{path}: truncated or corrupt ({' '.join(str(why).split())[:160]}); copy or write it again")


def of_labels(volume: Volume) -> Volume:
    """Return the volume with floats read as labels: whole numbers, checked in every box that is read.

    Parameters
    ----------
    volume
        Volume of any type; one without floats is returned as it is.

    Returns
    -------
    Volume
        Volume of int32 where the file has floats. A sample of it is read now.

    Raises
    ------
    NotALabel
        Where a float of the sample, or later of a box that is read, is not a whole number within int32.
    """
    if volume.dtype.kind != "f":
        return volume
    inner, path = volume._read, volume.path

    def read(box: Box) -> np.ndarray:
        values = inner(box)
        with np.errstate(invalid="ignore"):
            labels = values.astype(np.int32)
            wrong = labels != values
        if wrong.any():
            z, y, x = (int(a + b) for a, b in zip(np.argwhere(wrong)[0], box.start, strict=True))
            raise NotALabel(
                f"{path}: holds {values[wrong][0]:.6g} at voxel z {z}, y {y}, x {x}, {volume.dtype} grey values where "
                "labels are due; segment it first, one whole number a phase"
            )
        return labels

    peek = [min(n, c) for n, c in zip(volume.shape, volume.chunks, strict=True)]
    while np.prod(peek) > _PEEK_VOXELS:
        peek[peek.index(max(peek))] //= 2
    read(Box.whole(peek))
    return replace(volume, dtype=np.dtype(np.int32), _read=read)


def refuse_colour(path: str) -> NoReturn:
    """Raise InputError: the file is a colour image where labels are due."""
    raise InputError(f"{path}: is a colour image where labels are due; save one integer a phase, single channel")


def voxel_dtype(path: str, dtype: np.dtype) -> np.dtype:
    """Return the type in which voxels are read: the file's own, in native byte order; bits as uint8.

    Raises
    ------
    InputError
        For types that are neither integers, bits nor floats.
    """
    if dtype.kind in "OSUTV":
        what = {"O": "Python objects or strings", "V": "records of several fields"}.get(dtype.kind, "text")
        raise InputError(f"{path}: holds {what} ({dtype}), not integer labels; save one whole number a voxel, as uint8")
    if dtype.kind not in "iubf":
        raise InputError(f"{path}: holds {dtype}, not integer labels; save it as uint8")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def volume_over(
    path: str,
    array: Any,
    chunks: Sequence[int] | None = None,
    *,
    names: Sequence[str] | None = None,
    flat: bool = False,
    arrangement: Arrangement | None = None,
    why: Callable[[Exception], NoReturn] | None = None,
    **more: Any,
) -> Volume:
    """Make a volume of anything that has shape and dtype and is sliced like an array.

    Parameters
    ----------
    path
        File, for messages.
    array
        Array-like object.
    chunks, names
        Chunk lengths and names of the array's axes, in its order.
    flat
        As of `arranged`.
    arrangement
        Result of `arranged`, in place of `names` and `flat`.
    why
        Refuses the file where reading failed with an error; by default as `corrupt` does.
    **more
        Further fields of the volume.

    Returns
    -------
    Volume
        The volume.

    Raises
    ------
    InputError
        Where z, y, x are not clear, or the array holds neither integers, bits nor floats.
    """
    place = arrangement or arranged(path, array.shape, names, flat)
    dtype = voxel_dtype(path, np.dtype(array.dtype))
    pages = array.base if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None

    def read(box: Box) -> np.ndarray:
        try:
            voxels = np.asarray(array[place.index(box)])
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            (why or partial(corrupt, path))(error)
        if pages is not None:
            # A copy, and what the system has mapped of the file given back: a rank must not come to hold all of it.
            voxels = np.array(voxels)
            if hasattr(pages, "madvise"):
                pages.madvise(mmap.MADV_DONTNEED)
        return place.to_zyx(voxels, box).astype(dtype, copy=False)

    cheap = place.of_axes(chunks or place.plane)
    return Volume(path, place.shape, dtype, cheap, read, **more)
