"""Opening of a file of any format as a volume, or as a stack of images, by the name of the file."""

from __future__ import annotations

import threading
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.lengths import UNKNOWN, Length, VoxelEdges
from hpcres.study import RawHeader
from hpcres.volumes.axes import arranged, times
from hpcres.volumes.calibration import PRINT_MICROMETERS
from hpcres.volumes.files import ZARR_FILES
from hpcres.volumes.hdf5 import hdf5_parts, open_hdf5
from hpcres.volumes.ome_zarr import open_zarr
from hpcres.volumes.tiff import SUFFIXES as TIFF_SUFFIXES
from hpcres.volumes.tiff import open_tiff, tiff_parts
from hpcres.volumes.volume import Volume, corrupt, existing, of_labels, refuse_colour, volume_over

_RAW = (".raw", ".bin")
_READS = "reads .tif, .npy, .h5:/dataset, .zarr, and .raw with its header in the study"


def open_volume(path: str | Path, raw: RawHeader | None = None, grey: bool = False) -> Volume:
    """Open `x.zarr`, `x.zarr/array`, `x.tif`, `x.npy`, `x.h5:/dataset`, or a raw file with its header.

    Parameters
    ----------
    path
        File or folder; the path may name a dataset or image in it.
    raw
        Header of a raw file.
    grey
        Keep floats. By default floats are read as labels, and floats that are not whole numbers are refused.

    Returns
    -------
    Volume
        The volume, of which no more is read than its header and a sample.

    Raises
    ------
    InputError
        Where the file is missing, damaged, of another format or not a 3D volume.
    """
    path = str(path)
    volume = _open(path, raw)
    return replace(
        volume if grey else of_labels(volume), files=(_described_in(path),), _reopen=(open_volume, (path, raw, grey))
    )


def _open(path: str, raw: RawHeader | None) -> Volume:
    if raw is not None:
        return _open_raw(path, raw)
    if hdf5_parts(path):
        return open_hdf5(path)
    if tiff_parts(path) and not Path(path).is_dir():
        return open_tiff(path)
    if part := zarr_parts(path):
        return replace(open_zarr(*part), path=path)
    place, suffix = existing(path), Path(path).suffix.lower()
    if place.is_dir():
        return open_zarr(path)
    if suffix == ".npy":
        return _open_npy(path)
    if suffix in _RAW:
        raise InputError(f"{path}: a raw file has no header; give its shape and dtype as low_res.raw in the study")
    raise InputError(f"{path}: {suffix or 'no suffix'} is no volume format that hpcres knows; it {_READS}")


def zarr_parts(path: str) -> tuple[str, str] | None:
    """Split `file.zarr:1` into folder and image.

    The result is None for other paths, and where a file or folder of that whole name exists.
    """
    folder, colon, chosen = path.rpartition(":")
    return (folder, chosen) if colon and chosen and not Path(path).exists() and Path(folder).is_dir() else None


def file_of(path: str) -> Path:
    """Return the file or folder of a path that may name a dataset or image in it."""
    parts = hdf5_parts(path) or tiff_parts(path) or zarr_parts(path)
    return Path(path if parts is None or Path(path).exists() else parts[0])


def _described_in(path: str) -> str:
    place = file_of(path)
    return str(next((place / name for name in ZARR_FILES if (place / name).is_file()), place))


def read_images(path: str | Path) -> np.ndarray:
    """Read the slices of one image file: TIFF, PNG, .npy or .h5:/dataset.

    Parameters
    ----------
    path
        File, or dataset of an HDF5 file.

    Returns
    -------
    numpy.ndarray
        Integers (slice, row, column).

    Raises
    ------
    InputError
        As of `open_images`, and where the file is damaged.
    """
    images = open_images(path)
    return images.read(Box.whole(images.shape))


def open_images(path: str | Path) -> Volume:
    """Open the slices of one image file as a volume (slice, row, column).

    Rows and columns have sizes where the file states them.

    Parameters
    ----------
    path
        File, or dataset of an HDF5 file.

    Returns
    -------
    Volume
        The slices, as integers.

    Raises
    ------
    InputError
        Where the file is missing, a folder, of another format, or a colour image.
    """
    path = str(path)
    suffix = file_of(path).suffix.lower()
    if hdf5_parts(path):
        volume = open_hdf5(path, flat=True)
    elif existing(str(file_of(path))).is_dir():
        raise InputError(f"{path}: is a folder where an image is due; name the file in it")
    elif suffix in TIFF_SUFFIXES:
        volume = open_tiff(path, flat=True)
    elif suffix == ".npy":
        volume = _open_npy(path, flat=True)
    elif suffix == ".png":
        volume = _open_png(path)
    else:
        raise InputError(f"{path}: {suffix or 'no suffix'} is no image format that hpcres knows; use .tif or .png")
    return of_labels(volume)


# ---- NPY, raw, HDF5, PNG -----------------------------------------------------------------------------------


_header = threading.Lock()


def map_npy(path: str | Path) -> np.ndarray:
    """Memory-map the array of an NPY file, one file at a time.

    Python (3.11.7) now and then fails to parse the header of a file while another thread does so ("AST constructor
    recursion depth mismatch"; see cpython issue 106905).
    """
    with _header:
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_npz(path: str | Path, *names: str) -> list[np.ndarray]:
    """Read the named arrays of an NPZ file, one file at a time, as `map_npy` does."""
    with _header, np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in names]


def _open_npy(path: str, flat: bool = False) -> Volume:
    try:
        array = map_npy(path)
    except (ValueError, EOFError, OSError) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(
                f"{path}: holds Python objects, not integer labels; save one whole number a voxel, as uint8"
            ) from None
        corrupt(path, error)
    return volume_over(path, array, flat=flat)


def _open_raw(path: str, raw: RawHeader) -> Volume:
    place = existing(path)
    if place.is_dir():
        raise InputError(f"{path}: is a folder where a raw file is due; drop low_res.raw or name the file")
    dtype = np.dtype(raw.dtype).newbyteorder("<" if raw.byte_order == "little" else ">")
    due, size = prod(raw.shape) * dtype.itemsize + raw.offset_bytes, place.stat().st_size
    arranged(path, raw.shape)
    if due != size:
        raise InputError(
            f"{path}: has {size} bytes, but raw.shape {times(raw.shape)} of {raw.dtype} after {raw.offset_bytes} "
            f"bytes of header needs {due}; correct shape, dtype or offset_bytes"
        )
    array = np.memmap(path, dtype, "r", raw.offset_bytes, raw.shape)
    return volume_over(path, array, raw=raw)


def _open_png(path: str) -> Volume:
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                refuse_colour(path)
            pixels = np.array(image).astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)
            return volume_over(path, pixels, flat=True, edges=_dots(image.info.get("dpi")))
    except OSError as error:
        corrupt(path, error)


def _dots(per_inch: tuple[float, float] | None) -> VoxelEdges:
    """Return the pixel edges of a PNG whose resolution is finer than a print's, as for the tags of a TIFF."""
    if per_inch is None or min(per_inch) <= 25400 / PRINT_MICROMETERS:
        return UNKNOWN
    return VoxelEdges.of([None, Length(1 / per_inch[1], "inch"), Length(1 / per_inch[0], "inch")])
