"""A file of any format as a volume, or as a stack of images: what it is says its name."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import zarr
from PIL import Image

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box
from hpcres.study import RawHeader
from hpcres.volumes.files import ZARR_FILES
from hpcres.volumes.tiff import open_tiff
from hpcres.volumes.volume import (
    Volume,
    corrupt,
    existing,
    of_labels,
    refuse_colour,
    spacing_of,
    times,
    volume_over,
    zyx,
)

_TIFF, _HDF5, _RAW = (".tif", ".tiff", ".btf", ".tf8"), (".h5", ".hdf5", ".hdf", ".he5", ".nxs"), (".raw", ".bin")
_READS = "reads .tif, .npy, .h5:/dataset, .zarr, and .raw with its header in the study"
_RESULTS = ("measured", "spread")
"""What `hpcres infer` found out while it painted; no part of where a store is from."""


def open_volume(path: str | Path, raw: RawHeader | None = None, grey: bool = False) -> Volume:
    """Open `x.zarr`, `x.zarr/array`, `x.tif`, `x.npy`, `x.h5:/dataset`, or a raw file with its header.

    Floats are refused unless `grey`.
    """
    path = str(path)
    volume = _open(path, raw)
    return replace(
        volume if grey else of_labels(volume), files=(_described_in(path),), _reopen=(open_volume, (path, raw, grey))
    )


def _open(path: str, raw: RawHeader | None) -> Volume:
    if raw is not None:
        return _open_raw(path, raw)
    if _hdf5_parts(path):
        return _open_hdf5(path)
    place, suffix = existing(path), Path(path).suffix.lower()
    if place.is_dir():
        return _open_zarr(path)
    if suffix in _TIFF:
        return open_tiff(path)
    if suffix == ".npy":
        return _open_npy(path)
    if suffix in _RAW:
        raise InputError(f"{path}: a raw file has no header; give its shape and dtype as low_res.raw in the study")
    raise InputError(f"{path}: {suffix or 'no suffix'} is no volume format that hpcres knows; it {_READS}")


def _described_in(path: str) -> str:
    parts = _hdf5_parts(path)
    place = Path(parts[0] if parts else path)
    return str(next((place / name for name in ZARR_FILES if (place / name).is_file()), place))


def read_images(path: str | Path) -> np.ndarray:
    """The slices of one image file as an integer array (slice, row, column): TIFF, PNG, .npy or .h5:/dataset."""
    path = str(path)
    suffix = Path(path).suffix.lower()
    if _hdf5_parts(path):
        volume = _open_hdf5(path, flat=True)
    elif existing(path).is_dir():
        raise InputError(f"{path}: is a folder where an image is due; name the file in it")
    elif suffix in _TIFF:
        volume = open_tiff(path, flat=True)
    elif suffix == ".npy":
        volume = _open_npy(path, flat=True)
    elif suffix == ".png":
        return _read_png(path)
    else:
        raise InputError(f"{path}: {suffix or 'no suffix'} is no image format that hpcres knows; use .tif or .png")
    return of_labels(volume).read(Box.whole(volume.shape))


# ---- NPY, raw, HDF5, PNG -----------------------------------------------------------------------------------


_header = threading.Lock()


def map_npy(path: str | Path) -> np.ndarray:
    """The array of an NPY file, mapped. One at a time: Python (3.11.7) now and then fails to parse its header while
    another thread does so ("AST constructor recursion depth mismatch"; see cpython issue 106905)."""
    with _header:
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_npz(path: str | Path, *names: str) -> list[np.ndarray]:
    """Arrays of an NPZ file, one file at a time, as `map_npy`."""
    with _header, np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in names]


def _open_npy(path: str, flat: bool = False) -> Volume:
    try:
        array = map_npy(path)
    except (ValueError, EOFError, OSError) as error:
        corrupt(path, error)
    return volume_over(path, array, flat)


def _open_raw(path: str, raw: RawHeader) -> Volume:
    place = existing(path)
    if place.is_dir():
        raise InputError(f"{path}: is a folder where a raw file is due; drop low_res.raw or name the file")
    dtype = np.dtype(raw.dtype).newbyteorder("<" if raw.byte_order == "little" else ">")
    due, size = prod(raw.shape) * dtype.itemsize + raw.offset_bytes, place.stat().st_size
    zyx(path, raw.shape, False)
    if due != size:
        raise InputError(
            f"{path}: has {size} bytes, but raw.shape {times(raw.shape)} of {raw.dtype} after {raw.offset_bytes} "
            f"bytes of header needs {due}; correct shape, dtype or offset_bytes"
        )
    array = np.memmap(path, dtype, "r", raw.offset_bytes, raw.shape)
    return volume_over(path, array, False, raw=raw)


def _hdf5_parts(path: str) -> tuple[str, str] | None:
    """File and dataset of `file.h5:/dataset`; the dataset is empty where the path names none."""
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, _HDF5))}))(?::(.*))?", path, re.IGNORECASE)
    return (match.group(1), (match.group(2) or "").strip("/")) if match else None


def _open_hdf5(path: str, flat: bool = False) -> Volume:
    parts = _hdf5_parts(path)
    assert parts
    name, dataset = parts
    if existing(name).is_dir():
        raise InputError(f"{name}: is a folder where an HDF5 file is due; check the path")
    try:
        file = h5py.File(name, "r")
    except OSError as error:
        corrupt(name, error)
    found: list[str] = []
    file.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None)
    if dataset not in found:
        candidates = ", ".join(f"/{key}" for key in found[:8]) or "none at all"
        what = f"no dataset /{dataset} in it" if dataset else "names no dataset"
        raise InputError(f"{path}: {what}; it has {candidates}; write {name}:{'/' + found[0] if found else '/NAME'}")
    array = file[dataset]
    # ilastik and BigDataViewer write the voxel size so.
    size = array.attrs.get("element_size_um")
    spacing = spacing_of(size) if size is not None and len(size) == 3 else None
    return volume_over(path, array, flat, array.chunks, voxel_size=spacing, unit=spacing and "micrometer")


def _read_png(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                refuse_colour(path)
            return np.array(image).astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)[None]
    except OSError as error:
        corrupt(path, error)


# ---- Zarr in -----------------------------------------------------------------------------------------------


def zarr_node(path: str, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Array | zarr.Group, dict[str, Any]]:
    """The array or group at `path`, and its attributes."""
    if not any((existing(path) / name).is_file() for name in ZARR_FILES):
        raise InputError(f"{path}: is no zarr array or group ({', '.join(ZARR_FILES)} are not in it); check the path")
    try:
        node = zarr.open(path, mode=mode)
        return node, dict(node.attrs)
    except Exception as error:  # broken JSON, missing keys, unknown codecs: zarr has no common exception
        corrupt(path, error)


def _open_zarr(path: str) -> Volume:
    node, attributes = zarr_node(path)
    if isinstance(node, zarr.Array):
        return volume_over(path, node, False, node.chunks)
    ome: Any = attributes.get("ome", attributes)
    if not ome.get("multiscales"):
        arrays = ", ".join(sorted(name for name, _ in node.arrays())[:8]) or "none"
        raise InputError(f"{path}: is a zarr group without OME multiscales; name an array in it, of {arrays}")
    try:
        return _open_multiscale(path, node, attributes, ome)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        corrupt(path, f"OME metadata: {error!r}")


def _open_multiscale(path: str, group: zarr.Group, attributes: dict[str, Any], ome: Any) -> Volume:
    image = ome["multiscales"][0]
    first = image["datasets"][0]
    array = group[first["path"]]
    if not isinstance(array, zarr.Array):
        corrupt(path, f"level {first['path']} is no array")
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in image.get("axes", AXES[-array.ndim :])]
    if len(axes) != array.ndim or "".join(axes[-3:]) != AXES:
        raise InputError(f"{path}: has axes {', '.join(axes)} where z, y, x are due, in this order; reorder it")
    scale = [1.0] * array.ndim
    transformations = [*first.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]
    for each in transformations:
        if each["type"] == "scale":
            scale = [a * b for a, b in zip(scale, each["scale"], strict=True)]
    units = {axis.get("unit") for axis in image.get("axes", [])[-3:] if isinstance(axis, dict)}
    unit = units.pop() if len(units) == 1 else None
    named = {
        int(each["label-value"]): each["name"]
        for each in ome.get("image-label", {}).get("properties", []) if "name" in each
    }  # fmt: skip
    phases = tuple(named[label] for label in range(len(named))) if set(named) == set(range(len(named))) else ()
    provenance = {key: value for key, value in attributes.get("hpcres", {}).items() if key not in _RESULTS}
    volume = volume_over(
        path, array, False, array.chunks, voxel_size=spacing_of(scale[-3:]) if transformations else None, unit=unit,
        phases=phases or None, provenance=provenance,
    )  # fmt: skip
    if "hpcres" not in attributes:
        return volume
    # What reads as the fill value in one of our own stores was never written, and must not be measured.
    inner, unwritten = volume._read, array.fill_value

    def read(box: Box) -> np.ndarray:
        labels = inner(box)
        if missing := int(np.count_nonzero(labels == unwritten)):
            raise InputError(f"{path}: {missing} voxels of {box} were never written; run hpcres verify --repair first")
        return labels

    return replace(volume, _read=read, _read_unwritten=inner)
