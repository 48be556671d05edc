"""A volume of any format: a box of it is read when it is asked for, so nothing holds a whole one.

Below it, what the reader of every format asks of its file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import Boundaries, Box, Triple, pieces_of, triple
from hpcres.study import RawHeader

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Volume:
    """A lazily read volume of any format: labels, or probabilities. It pickles as its path and may be read from many
    threads."""

    path: str
    shape: Triple
    dtype: np.dtype
    chunks: Triple
    """Shape in which reading is cheap."""
    _read: Callable[[Box], np.ndarray] = field(repr=False)
    voxel_size: Spacing | None = None
    """Edge lengths z, y, x in `unit`; None where the file does not say."""
    unit: str | None = None
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

    def read(self, box: Box) -> np.ndarray:
        """The voxels of `box`, (z, y, x) in the file's type, or float32 (z, y, x, channel) of probabilities; InputError
        where the file is damaged."""
        return self._inside(self._read, box)

    def read_unwritten(self, box: Box) -> np.ndarray:
        """`read`, which gives 255 where a store of ours was never written: for a caller who refuses that label.

        Looking for it here is one more pass over memory.
        """
        return self._inside(self._read_unwritten or self._read, box)

    def _inside(self, read: Callable[[Box], np.ndarray], box: Box) -> np.ndarray:
        if box.clipped(Box.whole(self.shape)) != box:
            raise InputError(f"{self.path}: {box} leaves the volume of {times(self.shape)} voxels; ask inside it")
        return np.ascontiguousarray(read(box))

    def stamp(self) -> tuple[int, ...]:
        """What changes when a file of it is replaced or written to; InputError where it is gone.

        Of a zarr it is the file that describes it: chunks are not looked at one by one.
        """
        found: list[int] = []
        for file in self.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise InputError(f"{file}: has gone ({error.strerror}); put it back") from None
            found += status.st_ino, status.st_size, status.st_mtime_ns
        return tuple(found)

    def __reduce__(self) -> tuple[Callable[..., Volume], tuple[Any, ...]]:
        assert self._reopen, f"{self.path} is in memory only"
        return self._reopen


def read_beyond(read: Callable[[Box], np.ndarray], box: Box, shape: Triple, boundaries: Boundaries) -> np.ndarray:
    """What `read` gives for a box (z, y, x) that may reach beyond a volume of `shape` voxels on its axes without
    ends."""
    pieces = pieces_of(box, shape, boundaries)
    parts = [read(piece.source)[tuple(slice(None, None, step) for step in piece.steps)] for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    window = np.empty((*box.shape, *parts[0].shape[3:]), parts[0].dtype)
    for piece, part in zip(pieces, parts, strict=True):
        window[piece.place.slices] = part
    return window


def array_volume(labels: np.ndarray, name: str) -> Volume:
    """A volume over an array (z, y, x) in memory; `name` stands where a file has its path. It does not pickle."""
    return of_labels(volume_over(name, labels, False))


# ---- what the reader of any format asks of its file -------------------------------------------------------


def existing(path: str) -> Path:
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if place.is_file() and place.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes); write it again")
    return place


def corrupt(path: str, why: object) -> NoReturn:
    raise InputError(f"{path}: truncated or corrupt ({' '.join(str(why).split())[:160]}); copy or write it again")


def of_labels(volume: Volume) -> Volume:
    if volume.dtype.kind == "f":
        raise InputError(
            f"{volume.path}: has {volume.dtype} grey values where labels are due; segment it first, one integer a phase"
        )
    return volume


def refuse_colour(path: str) -> NoReturn:
    raise InputError(f"{path}: is a colour image where labels are due; save one integer a phase, single channel")


def voxel_dtype(path: str, dtype: np.dtype) -> np.dtype:
    """The type that voxels are handed out in: the file's own, native byte order, bits as uint8."""
    if dtype.kind not in "iubf":
        raise InputError(f"{path}: holds {dtype}, not integer labels; save it as uint8")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def zyx(path: str, shape: Sequence[int], flat: bool) -> Triple:
    """The last three axes; leading ones of length 1 fall away. `flat` takes an image for a stack of one."""
    full = tuple(shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 2 and flat:
        shape = (1, *shape)
    if len(shape) > 3:
        raise InputError(
            f"{path}: has {len(full)} axes ({times(full)}) where z, y, x are due; save one time and channel of it"
        )
    if len(shape) < 3:
        what = "2D image" if len(shape) == 2 else f"{len(shape)}D array"
        raise InputError(f"{path}: is a {what} ({times(full)}) where a 3D volume is due; give the whole stack")
    if 0 in shape:
        raise InputError(f"{path}: has no voxels ({times(full)}); write it again")
    return triple(shape)


def times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def spacing_of(values: Sequence[float]) -> Spacing | None:
    z, y, x = (float(v) for v in values)
    return (z, y, x) if min(z, y, x) > 0 and max(z, y, x) < float("inf") else None


def volume_over(path: str, array: Any, flat: bool, chunks: Sequence[int] | None = None, **more: Any) -> Volume:
    """A volume of anything that has shape and dtype and is sliced like an array."""
    dtype, shape = voxel_dtype(path, np.dtype(array.dtype)), zyx(path, array.shape, flat)
    lead = (0,) * max(0, len(array.shape) - 3)
    pages = array.base if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None

    def read(box: Box) -> np.ndarray:
        place = box.slices[1:] if len(array.shape) == 2 else (*lead, *box.slices)
        try:
            voxels = np.asarray(array[place])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            corrupt(path, error)
        if pages is not None:
            # A copy, and what the system has mapped of the file given back: a rank must not come to hold all of it.
            voxels = np.array(voxels)
            if hasattr(pages, "madvise"):
                pages.madvise(mmap.MADV_DONTNEED)
        return voxels.reshape(box.shape).astype(dtype, copy=False)

    return Volume(path, shape, dtype, triple((1, 1, 1, *(chunks or shape[1:]))[-3:]), read, **more)
