"""Every volume file: label volumes of many formats in, OME-Zarr label stores in and out.

Axes are z, y, x. Opening reads headers only; voxels are read box by box, so nothing here holds a whole volume.
No other module imports zarr, tifffile or h5py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import re
import shutil
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import h5py
import numba
import numpy as np
import tifffile
import zarr
import zarr.codecs
import zarr.storage
from PIL import Image

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import AXES, Box, Triple, blocks, triple, wrapped
from hpcres.study import OME_UNITS, LowRes, RawHeader

Spacing = tuple[float, float, float]
UNWRITTEN = 255
"""Fill value of every label store, so that a missing shard is never read as phase 0."""
_RESULTS = ("measured", "spread")
"""What `hpcres infer` found out while it painted; no part of where a store is from."""
_TOP_VOXELS = 256
"""Edge that the coarsest pyramid level stays within."""
_SLAB_BYTES = 2**30
_TIFF, _HDF5, _RAW = (".tif", ".tiff", ".btf", ".tf8"), (".h5", ".hdf5", ".hdf", ".he5", ".nxs"), (".raw", ".bin")
_ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
_READS = "reads .tif, .npy, .h5:/dataset, .zarr, and .raw with its header in the study"


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
            raise InputError(f"{self.path}: {box} leaves the volume of {_times(self.shape)} voxels; ask inside it")
        return np.ascontiguousarray(read(box))

    def stamp(self) -> tuple[int, ...]:
        """What changes when the file is replaced or written to; InputError where it is gone.

        Of a zarr it is the file that describes it: chunks are not looked at one by one.
        """
        if self.parts:
            return tuple(number for part in self.parts for number in part.stamp())
        parts = _hdf5_parts(self.path)
        place = Path(parts[0] if parts else self.path)
        place = next((place / name for name in _ZARR_FILES if (place / name).is_file()), place)
        try:
            status = place.stat()
        except OSError as error:
            raise InputError(f"{self.path}: has gone ({error.strerror}); put it back") from None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def __reduce__(self) -> tuple[Callable[..., Volume], tuple[Any, ...]]:
        if self.parts:
            return probabilities, (self.parts,)
        return open_volume, (self.path, self.raw, self.dtype.kind == "f")


def open_volume(path: str | Path, raw: RawHeader | None = None, grey: bool = False) -> Volume:
    """Open `x.zarr`, `x.zarr/array`, `x.tif`, `x.npy`, `x.h5:/dataset`, or a raw file with its header.

    Floats are refused unless `grey`.
    """
    volume = _open(str(path), raw)
    return volume if grey else _of_labels(volume)


def _open(path: str, raw: RawHeader | None) -> Volume:
    if raw is not None:
        return _open_raw(path, raw)
    if _hdf5_parts(path):
        return _open_hdf5(path)
    place, suffix = _existing(path), Path(path).suffix.lower()
    if place.is_dir():
        return _open_zarr(path)
    if suffix in _TIFF:
        return _open_tiff(path)
    if suffix == ".npy":
        return _open_npy(path)
    if suffix in _RAW:
        raise InputError(f"{path}: a raw file has no header; give its shape and dtype as low_res.raw in the study")
    raise InputError(f"{path}: {suffix or 'no suffix'} is no volume format that hpcres knows; it {_READS}")


def read_around(read: Callable[[Box], np.ndarray], box: Box, shape: Triple) -> np.ndarray:
    """What `read` gives for a box (z, y, x) that may reach around the periodic axes of a volume of `shape` voxels."""
    pieces = [(place, read(source)) for source, place in wrapped(box, shape)]
    if len(pieces) == 1:
        return pieces[0][1]
    window = np.empty((*box.shape, *pieces[0][1].shape[3:]), pieces[0][1].dtype)
    for place, part in pieces:
        window[place.slices] = part
    return window


def read_images(path: str | Path) -> np.ndarray:
    """The slices of one image file as an integer array (slice, row, column): TIFF, PNG, .npy or .h5:/dataset."""
    path = str(path)
    suffix = Path(path).suffix.lower()
    if _hdf5_parts(path):
        volume = _open_hdf5(path, flat=True)
    elif _existing(path).is_dir():
        raise InputError(f"{path}: is a folder where an image is due; name the file in it")
    elif suffix in _TIFF:
        volume = _open_tiff(path, flat=True)
    elif suffix == ".npy":
        volume = _open_npy(path, flat=True)
    elif suffix == ".png":
        return _read_png(path)
    else:
        raise InputError(f"{path}: {suffix or 'no suffix'} is no image format that hpcres knows; use .tif or .png")
    return _of_labels(volume).read(Box.whole(volume.shape))


def array_volume(labels: np.ndarray, name: str) -> Volume:
    """A volume over an array (z, y, x) in memory; `name` stands where a file has its path. It does not pickle."""
    return _of_labels(_array_volume(name, labels, False))


def write_images(path: str | Path, stack: np.ndarray) -> None:
    """Write slices (slice, row, column) as a deflated TIFF stack, whole or not at all."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        tifffile.imwrite(temporary, stack, compression="zlib", photometric="minisblack", metadata={"axes": "QYX"})
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- what every reader asks of its file --------------------------------------------------------------------


def _existing(path: str) -> Path:
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if place.is_file() and place.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes); write it again")
    return place


def _corrupt(path: str, why: object) -> NoReturn:
    raise InputError(f"{path}: truncated or corrupt ({' '.join(str(why).split())[:160]}); copy or write it again")


def _of_labels(volume: Volume) -> Volume:
    if volume.dtype.kind == "f":
        raise InputError(
            f"{volume.path}: has {volume.dtype} grey values where labels are due; segment it first, one integer a phase"
        )
    return volume


def _voxel_dtype(path: str, dtype: np.dtype) -> np.dtype:
    """The type that voxels are handed out in: the file's own, native byte order, bits as uint8."""
    if dtype.kind not in "iubf":
        raise InputError(f"{path}: holds {dtype}, not integer labels; save it as uint8")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def _zyx(path: str, shape: Sequence[int], flat: bool) -> Triple:
    """The last three axes; leading ones of length 1 fall away. `flat` takes an image for a stack of one."""
    full = tuple(shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 2 and flat:
        shape = (1, *shape)
    if len(shape) > 3:
        raise InputError(
            f"{path}: has {len(full)} axes ({_times(full)}) where z, y, x are due; save one time and channel of it"
        )
    if len(shape) < 3:
        what = "2D image" if len(shape) == 2 else f"{len(shape)}D array"
        raise InputError(f"{path}: is a {what} ({_times(full)}) where a 3D volume is due; give the whole stack")
    if 0 in shape:
        raise InputError(f"{path}: has no voxels ({_times(full)}); write it again")
    return triple(shape)


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _spacing(values: Sequence[float]) -> Spacing | None:
    z, y, x = (float(v) for v in values)
    return (z, y, x) if min(z, y, x) > 0 and max(z, y, x) < float("inf") else None


def _array_volume(path: str, array: Any, flat: bool, chunks: Sequence[int] | None = None, **more: Any) -> Volume:
    """A volume of anything that has shape and dtype and is sliced like an array."""
    dtype, shape = _voxel_dtype(path, np.dtype(array.dtype)), _zyx(path, array.shape, flat)
    lead = (0,) * max(0, len(array.shape) - 3)
    pages = array.base if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None

    def read(box: Box) -> np.ndarray:
        place = box.slices[1:] if len(array.shape) == 2 else (*lead, *box.slices)
        try:
            voxels = np.asarray(array[place])
        except (OSError, RuntimeError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
            _corrupt(path, error)
        if pages is not None:
            # A copy, and what the system has mapped of the file given back: a rank must not come to hold all of it.
            voxels = np.array(voxels)
            if hasattr(pages, "madvise"):
                pages.madvise(mmap.MADV_DONTNEED)
        return voxels.reshape(box.shape).astype(dtype, copy=False)

    return Volume(path, shape, dtype, triple((1, 1, 1, *(chunks or shape[1:]))[-3:]), read, **more)


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
        _corrupt(path, error)
    return _array_volume(path, array, flat)


def _open_raw(path: str, raw: RawHeader) -> Volume:
    place = _existing(path)
    if place.is_dir():
        raise InputError(f"{path}: is a folder where a raw file is due; drop low_res.raw or name the file")
    dtype = np.dtype(raw.dtype).newbyteorder("<" if raw.byte_order == "little" else ">")
    due, size = prod(raw.shape) * dtype.itemsize + raw.offset_bytes, place.stat().st_size
    _zyx(path, raw.shape, False)
    if due != size:
        raise InputError(
            f"{path}: has {size} bytes, but raw.shape {_times(raw.shape)} of {raw.dtype} after {raw.offset_bytes} "
            f"bytes of header needs {due}; correct shape, dtype or offset_bytes"
        )
    array = np.memmap(path, dtype, "r", raw.offset_bytes, raw.shape)
    return _array_volume(path, array, False, raw=raw)


def _hdf5_parts(path: str) -> tuple[str, str] | None:
    """File and dataset of `file.h5:/dataset`; the dataset is empty where the path names none."""
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, _HDF5))}))(?::(.*))?", path, re.IGNORECASE)
    return (match.group(1), (match.group(2) or "").strip("/")) if match else None


def _open_hdf5(path: str, flat: bool = False) -> Volume:
    parts = _hdf5_parts(path)
    assert parts
    name, dataset = parts
    if _existing(name).is_dir():
        raise InputError(f"{name}: is a folder where an HDF5 file is due; check the path")
    try:
        file = h5py.File(name, "r")
    except OSError as error:
        _corrupt(name, error)
    found: list[str] = []
    file.visititems(lambda key, item: found.append(key) if isinstance(item, h5py.Dataset) else None)
    if dataset not in found:
        candidates = ", ".join(f"/{key}" for key in found[:8]) or "none at all"
        what = f"no dataset /{dataset} in it" if dataset else "names no dataset"
        raise InputError(f"{path}: {what}; it has {candidates}; write {name}:{'/' + found[0] if found else '/NAME'}")
    array = file[dataset]
    # ilastik and BigDataViewer write the voxel size so.
    size = array.attrs.get("element_size_um")
    spacing = _spacing(size) if size is not None and len(size) == 3 else None
    return _array_volume(path, array, flat, array.chunks, voxel_size=spacing, unit=spacing and "micrometer")


def _read_png(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                _refuse_colour(path)
            return np.array(image).astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)[None]
    except OSError as error:
        _corrupt(path, error)


def _refuse_colour(path: str) -> NoReturn:
    raise InputError(f"{path}: is a colour image where labels are due; save one integer a phase, single channel")


# ---- TIFF --------------------------------------------------------------------------------------------------


class _Complaints(logging.Filter):
    """tifffile logs what it finds broken and goes on with fewer pages; we must not. Hears its own thread only."""

    def __init__(self) -> None:
        super().__init__()
        self.fatal: list[str] = []
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        message = record.getMessage()
        if any(sign in message for sign in ("invalid page offset", "failed to reshape", "invalid offset")):
            self.fatal.append(message)
        return False


@contextlib.contextmanager
def _tifffile_complaints() -> Iterator[_Complaints]:
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    logger.addFilter(complaints)
    try:
        yield complaints
    finally:
        logger.removeFilter(complaints)


def _open_tiff(path: str, flat: bool = False) -> Volume:
    with _tifffile_complaints() as complaints:
        try:
            tiff: Any = tifffile.TiffFile(path)
            series = list(tiff.series)
            pages: list[Any] = [page for one in series for page in one.pages]
        except Exception as error:  # tifffile raises whatever its parsing stumbles over
            _corrupt(path, error)
        if complaints.fatal:
            _corrupt(path, re.sub(r"<.*?> ?", "", complaints.fatal[0]))
        if not pages or None in pages:
            _corrupt(path, "pages are missing")
        voxel_size, unit = _tiff_voxel_size(tiff, pages[0])
    key = pages[0].keyframe
    if key.samplesperpixel > 1 or key.photometric in (
        tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB,
    ):  # fmt: skip
        _refuse_colour(path)
    dtype = _voxel_dtype(path, key.dtype)
    if "C" in series[0].axes:
        raise InputError(f"{path}: has channels (axes {series[0].axes}) where z, y, x are due; save one channel")
    shapes = {tuple(one.shape) for one in series}
    if len(shapes) > 1 or any(page.keyframe.dtype != key.dtype for page in pages):
        raise InputError(f"{path}: holds images of different sizes or types; save each stack as a file of its own")
    end = max(
        max((o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0),
        *(one.dataoffset + prod(one.shape) * key.dtype.itemsize for one in series if one.dataoffset is not None), 0,
    )  # fmt: skip
    if end > tiff.filehandle.size:
        _corrupt(path, f"its pages end at byte {end}, the file at {tiff.filehandle.size}")
    stacked = series[0].shape if len(series) == 1 else (len(series) * prod(series[0].shape[:-2]), *series[0].shape[-2:])
    if len(series) == 1 and series[0].dataoffset is not None:
        # Uncompressed and contiguous: the system pages in what a box touches.
        array = np.memmap(path, key.dtype.newbyteorder(tiff.byteorder), "r", series[0].dataoffset, tuple(stacked))
        if len(pages) == 1 and len(stacked) == 3 and stacked[0] == 1 and not flat:
            stacked = stacked[1:]
        _zyx(path, stacked, flat)
        return _array_volume(path, array, flat, voxel_size=voxel_size, unit=unit)
    shape = _zyx(path, stacked, flat)
    reader = _TiffPages(path, tiff, pages, shape, dtype)
    volume = Volume(path, shape, dtype, reader.segment, reader.read, voxel_size, unit)
    reader.read(Box((0, 0, 0), (1, 1, 1)))  # a codec that is not there should say so now
    return volume


class _TiffPages:
    """Reads only the strips or tiles that a box touches, page by page."""

    def __init__(self, path: str, tiff: Any, pages: list[Any], shape: Triple, dtype: np.dtype) -> None:
        self.path, self.tiff, self.pages, self.shape, self.dtype = path, tiff, pages, shape, dtype
        self.key = pages[0].keyframe
        _, depth, rows, columns, _ = self.key.shaped
        if (rows, columns) != shape[1:] or depth * len(pages) != shape[0]:
            _corrupt(path, f"{len(pages)} pages of {depth} × {rows} × {columns} are not {_times(shape)}")
        self.depth = depth
        if self.key.is_tiled:
            self.segment: Triple = (max(1, self.key.tiledepth), self.key.tilelength, self.key.tilewidth)
        else:
            self.segment = (1, min(self.key.rowsperstrip or rows, rows), columns)
        self.grid = triple([-(-n // s) for n, s in zip((depth, rows, columns), self.segment, strict=True)])

    def read(self, box: Box) -> np.ndarray:
        out = np.zeros(box.shape, self.dtype)
        for number in range(box.start[0] // self.depth, -(-box.stop[0] // self.depth) if out.size else 0):
            first = number * self.depth
            here = box.relative_to((first, 0, 0)).clipped(Box.whole((self.depth, *self.shape[1:])))
            ranges = [
                range(a // s, -(-b // s)) for a, b, s in zip(here.start, here.stop, self.segment, strict=True)
            ]
            for position in product(*ranges):
                held = self._segment(number, position)
                start = triple([i * s for i, s in zip(position, self.segment, strict=True)])
                extent = Box(start, triple([a + n for a, n in zip(start, held.shape, strict=True)]))
                part = extent.clipped(here)
                into = part.relative_to((box.start[0] - first, box.start[1], box.start[2]))
                out[into.slices] = held[part.relative_to(start).slices]
        return out

    def _segment(self, number: int, position: tuple[int, ...]) -> np.ndarray:
        """One decoded strip or tile (z, y, x)."""
        page, (_, rows, columns) = self.pages[number], self.grid
        index = (position[0] * rows + position[1]) * columns + position[2]
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        # pread keeps no position, so threads need no lock.
        data = os.pread(page.parent.filehandle.fileno(), size, offset)
        if len(data) < size:
            _corrupt(self.path, f"page {number} ends early")
        try:
            segment, _, _ = page.keyframe.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec has exceptions of its own
            if "imagecodecs" in str(error):
                what = f"{self.path}: {self.key.compression.name} compression needs a package more"
                raise InputError(f"{what}; pip install imagecodecs, or save it as deflate") from None
            _corrupt(self.path, f"page {number}: {error or type(error).__name__}")
        if segment is None:  # a sparse tile: nothing was stored
            return np.full(self.segment, self.key.nodata, self.dtype)
        return segment[..., 0].astype(self.dtype, copy=False)


def _tiff_voxel_size(tiff: Any, page: Any) -> tuple[Spacing | None, str | None]:
    """Voxel size where ImageJ or OME-XML metadata give all three edges; dots per inch say nothing of a sample."""
    units = {**OME_UNITS, "micron": "micrometer", "microns": "micrometer", "\\u00B5m": "micrometer"}
    imagej = tiff.imagej_metadata or {}
    if imagej.get("spacing") and imagej.get("unit") in units:
        per_unit = [page.tags.valueof(tag) for tag in ("YResolution", "XResolution")]
        if all(r and r[0] for r in per_unit):
            spacing = _spacing([imagej["spacing"], *(r[1] / r[0] for r in per_unit)])
            return spacing, spacing and units[imagej["unit"]]
    if tiff.is_ome:
        try:
            pixels = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        except ElementTree.ParseError:
            pixels = None
        given = {} if pixels is None else pixels.attrib
        named = {units.get(given.get(f"PhysicalSize{a}Unit", "µm")) for a in "ZYX"}
        if all(f"PhysicalSize{a}" in given for a in "ZYX") and len(named) == 1 and (unit := named.pop()):
            return _spacing([float(given[f"PhysicalSize{a}"]) for a in "ZYX"]), unit
    return None, None


# ---- Zarr in -----------------------------------------------------------------------------------------------


def _zarr_node(path: str, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Array | zarr.Group, dict[str, Any]]:
    """The array or group at `path`, and its attributes."""
    if not any((_existing(path) / name).is_file() for name in _ZARR_FILES):
        raise InputError(f"{path}: is no zarr array or group ({', '.join(_ZARR_FILES)} are not in it); check the path")
    try:
        node = zarr.open(path, mode=mode)
        return node, dict(node.attrs)
    except Exception as error:  # broken JSON, missing keys, unknown codecs: zarr has no common exception
        _corrupt(path, error)


def _open_zarr(path: str) -> Volume:
    node, attributes = _zarr_node(path)
    if isinstance(node, zarr.Array):
        return _array_volume(path, node, False, node.chunks)
    ome: Any = attributes.get("ome", attributes)
    if not ome.get("multiscales"):
        arrays = ", ".join(sorted(name for name, _ in node.arrays())[:8]) or "none"
        raise InputError(f"{path}: is a zarr group without OME multiscales; name an array in it, of {arrays}")
    try:
        return _open_multiscale(path, node, attributes, ome)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        _corrupt(path, f"OME metadata: {error!r}")


def _open_multiscale(path: str, group: zarr.Group, attributes: dict[str, Any], ome: Any) -> Volume:
    image = ome["multiscales"][0]
    first = image["datasets"][0]
    array = group[first["path"]]
    if not isinstance(array, zarr.Array):
        _corrupt(path, f"level {first['path']} is no array")
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
    volume = _array_volume(
        path, array, False, array.chunks, voxel_size=_spacing(scale[-3:]) if transformations else None, unit=unit,
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

    return Volume(
        path, volume.shape, volume.dtype, volume.chunks, read, volume.voxel_size, unit, volume.phases, provenance,
        _read_unwritten=inner,
    )  # fmt: skip


# ---- the low-res volume of a study -------------------------------------------------------------------------


_ONE = {"u1": 255, "u2": 65535}
"""What stands for a probability of 1."""
_SUM_OFF = 0.02
"""By how much probabilities of a voxel may miss 1, besides the rounding of many channels to uint8."""


def open_low_res(low_res: LowRes) -> Volume:
    """The labels, or the probabilities, that a study's generator is to be given."""
    if low_res.channels:
        return probabilities([open_volume(each.path, each.raw, grey=True) for each in low_res.channels])
    assert low_res.path is not None
    return open_volume(low_res.path, low_res.raw)


def probabilities(parts: Sequence[Volume]) -> Volume:
    """A volume of float32 (z, y, x, channel) from a file for each channel: floats 0 … 1, uint8 / 255 or uint16 / 65535.

    They are divided by their sum, which must be 1 within 2 %; where all are 0, nothing is known of the voxel.
    InputError for files of different shapes or other types, and on reading for values that are no probabilities.
    """
    first, path = parts[0], ", ".join(part.path for part in parts)
    for part in parts:
        if part.shape != first.shape:
            raise InputError(f"{part.path}: has {_times(part.shape)} voxels, {first.path} {_times(first.shape)}; "
                             "channels are of one volume, cut them alike")  # fmt: skip
        if part.dtype.kind != "f" and part.dtype.str[1:] not in _ONE:
            raise InputError(f"{part.path}: holds {part.dtype}, which is no probability; save floats 0 … 1, uint8 "
                             "0 … 255 or uint16 0 … 65535")  # fmt: skip
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
                raise InputError(f"{part.path}: {value:.4g} {at(box, bad)} is no probability; correct it, or make all "
                                 "channels 0 where nothing is known")  # fmt: skip
            np.maximum(here, 0, out=here)
            total += here
        known = total > 0
        if (bad := known & ~(np.abs(total - 1) <= most_off)).any():
            raise InputError(f"{path}: probabilities {at(box, bad)} add up to {total[bad][0]:.4g}, not 1; give each "
                             "phase its channel, as floats 0 … 1, uint8 0 … 255 or uint16 0 … 65535")  # fmt: skip
        np.divide(found, total[..., None], out=found, where=known[..., None])
        return found

    return Volume(
        path, first.shape, np.dtype(np.float32), first.chunks, read, first.voxel_size, first.unit, parts=tuple(parts)
    )


def likeliest(low_res: np.ndarray) -> np.ndarray:
    """uint8 positions (z, y, x) of what PhaseMap.index gives: of probabilities the largest, the first of equals, and
    the number of channels where nothing is known."""
    if low_res.dtype.kind != "f":
        return low_res
    return np.where(low_res.any(-1), low_res.argmax(-1), low_res.shape[-1]).astype(np.uint8)


# ---- labels ------------------------------------------------------------------------------------------------


class PhaseMap:
    """Label values of a file → their position in the list of phases; len(values) where the label is in `unknown`."""

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
        return cls(low_res.labels, where, low_res.unknown)

    def index(self, array: np.ndarray) -> np.ndarray:
        """uint8 positions, in the shape of `array`; InputError naming the first label that has no phase.

        Probabilities (z, y, x, channel) have their channels by position and are given back.
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
        """Position of every value of an 8- or 16-bit type, indexed by its bits."""
        if dtype not in self._tables:
            table = np.full(1 << 8 * dtype.itemsize, UNWRITTEN, np.uint8)
            limits = np.iinfo(dtype)
            for value, position in self._position.items():
                if limits.min <= value <= limits.max:
                    table[value % len(table)] = position
            self._tables[dtype] = table
        return self._tables[dtype]


@numba.njit(cache=True, nogil=True)
def _mode(fine: np.ndarray, coarse: np.ndarray) -> None:
    nz, ny, nx = fine.shape
    seen = np.empty(8, np.uint8)
    for z in range(coarse.shape[0]):
        z0, z1 = 2 * z, min(2 * z + 2, nz)
        for y in range(coarse.shape[1]):
            y0, y1 = 2 * y, min(2 * y + 2, ny)
            for x in range(coarse.shape[2]):
                x0, x1 = 2 * x, min(2 * x + 2, nx)
                first = fine[z0, y0, x0]
                # Most blocks are of one phase: an odd end's voxels count twice here, which changes nothing then.
                other = fine[z0, y0, x1 - 1] ^ first
                other |= (fine[z0, y1 - 1, x0] ^ first) | (fine[z0, y1 - 1, x1 - 1] ^ first)
                other |= (fine[z1 - 1, y0, x0] ^ first) | (fine[z1 - 1, y0, x1 - 1] ^ first)
                other |= (fine[z1 - 1, y1 - 1, x0] ^ first) | (fine[z1 - 1, y1 - 1, x1 - 1] ^ first)
                if other == 0:
                    coarse[z, y, x] = first
                    continue
                n = 0
                for i in range(z0, z1):
                    for j in range(y0, y1):
                        for k in range(x0, x1):
                            seen[n] = fine[i, j, k]
                            n += 1
                best, most = seen[0], 0
                for a in range(n):
                    count = 0
                    for b in range(n):
                        count += seen[a] == seen[b]
                    if count > most or (count == most and seen[a] < best):
                        best, most = seen[a], count
                coarse[z, y, x] = best


def coarsen_by_mode(labels: np.ndarray) -> np.ndarray:
    """The most frequent label of every 2×2×2 block, ties to the lowest; blocks at odd ends are smaller."""
    coarse = np.empty([-(-n // 2) for n in labels.shape], np.uint8)
    _mode(labels, coarse)
    return coarse


@numba.njit(cache=True, nogil=True)
def _mean(fine: np.ndarray, coarse: np.ndarray) -> None:
    nz, ny, nx = fine.shape
    for z in range(coarse.shape[0]):
        for y in range(coarse.shape[1]):
            for x in range(coarse.shape[2]):
                total, n = 0, 0
                for i in range(2 * z, min(2 * z + 2, nz)):
                    for j in range(2 * y, min(2 * y + 2, ny)):
                        for k in range(2 * x, min(2 * x + 2, nx)):
                            total += fine[i, j, k]
                            n += 1
                coarse[z, y, x] = (2 * total + n) // (2 * n)


def coarsen_by_mean(values: np.ndarray) -> np.ndarray:
    """The mean of every 2×2×2 block of a uint8 volume, halves rounded up; blocks at odd ends are smaller."""
    coarse = np.empty([-(-n // 2) for n in values.shape], np.uint8)
    _mean(values, coarse)
    return coarse


# ---- the label store ---------------------------------------------------------------------------------------

PHASE_COLOURS = (
    (38, 44, 58), (235, 164, 50), (86, 156, 214), (201, 82, 96), (110, 176, 105), (155, 118, 190), (222, 205, 120),
    (90, 190, 185), (150, 105, 70), (230, 140, 180), (120, 130, 140), (60, 110, 80), (200, 220, 240), (170, 60, 140),
    (90, 90, 160), (240, 240, 230),
)  # fmt: skip


@dataclass(frozen=True)
class LevelInfo:
    """One pyramid level: voxels per axis, voxels per shard, and voxel edge lengths in the store's unit."""

    shape: Triple
    shard: Triple
    voxel_size: Spacing


def code_chunks(at_once: int) -> None:
    """Let zarr compress or decompress that many chunks of a shard at once in this process, instead of ten.

    Each takes twice a chunk's bytes, and ten threads make nothing faster on one core.
    """
    zarr.config.set({"async.concurrency": at_once})


class LabelStore:
    """An OME-Zarr 0.5 label image on Zarr v3, sharded, with a pyramid by mode: labels 0, 1, 2, … as uint8.

    A write owns whole shards, and a shard is one file: writers in different processes need no locks, and a file
    that is there is whole. What was never written reads as 255. Pickles as its path.
    """

    unwritten = UNWRITTEN
    kind, method = "labels", "mode of 2×2×2 blocks"
    coarsen: Callable[[np.ndarray], np.ndarray] = staticmethod(coarsen_by_mode)

    def __init__(self, path: str | Path, group: zarr.Group) -> None:
        self.path = Path(path)
        ome: Any = group.attrs["ome"]
        self._arrays: list[Any] = []
        self.levels: list[LevelInfo] = []
        for dataset in ome["multiscales"][0]["datasets"]:
            array = group[dataset["path"]]
            assert isinstance(array, zarr.Array)
            self._arrays.append(array.with_config({"write_empty_chunks": True}))
            z, y, x = dataset["coordinateTransformations"][0]["scale"]
            self.levels.append(LevelInfo(triple(array.shape), triple(array.shards or array.chunks), (z, y, x)))
        self.chunk: Triple = triple(self._arrays[0].chunks)

    @classmethod
    def create(
        cls, path: str | Path, shape: Sequence[int], *, shard: Sequence[int], chunk_voxels: int,
        voxel_size: float | Sequence[float], unit: str, phases: Sequence[str],
        codec: Literal["zstd", "lz4"] = "zstd", provenance: Mapping[str, Any], overwrite: bool = False,
    ) -> Self:  # fmt: skip
        """Write the metadata of all levels beside `path` and rename it into place; no voxel is written yet.

        shape, shard: z, y, x voxels; shard is a multiple of the inner chunk's edge `chunk_voxels`.
        voxel_size: edge length in `unit` (an OME unit name), one or three. A store that is there already is an
        InputError unless `overwrite`, which removes it last of all.
        """
        path, shape = Path(path), triple(shape)
        refuse_existing(path, overwrite)
        _zyx(str(path), shape, False)
        if any(edge % chunk_voxels or edge < 1 for edge in shard):
            raise InputError(f"{path}: shard {_times(triple(shard))} is not whole chunks of {chunk_voxels}³ voxels")
        edges = (voxel_size,) * 3 if isinstance(voxel_size, int | float) else tuple(voxel_size)
        spacing = _spacing(edges)
        if spacing is None:
            raise InputError(f"{path}: voxel size {edges} is not positive; give for example 65 nm")
        temporary = temporary_beside(path)
        try:
            cls._write_template(temporary, shape, triple(shard), chunk_voxels, spacing, unit, phases, codec, provenance)
            move_into_place(temporary, path)
        except OSError as error:
            error.filename = str(path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store of ours; InputError for anything else."""
        group, attributes = _zarr_node(str(path), "r+" if os.access(path, os.W_OK) else "r")
        if not isinstance(group, zarr.Group) or not {"hpcres", "ome"} <= set(attributes):
            raise InputError(f"{path}: is no label store of hpcres; make one with hpcres convert or hpcres infer")
        try:
            found: Any = attributes["ome"]
            if (other := found["multiscales"][0]["name"]) != cls.kind:
                raise InputError(f"{path}: holds {other} where {cls.kind} are due; name the other store")
            return cls(path, group)
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
            _corrupt(str(path), f"metadata: {error!r}")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return type(self).open, (self.path,)

    @property
    def volume(self) -> Volume:
        """Level 0 as a Volume, which refuses to read what was never written."""
        return open_volume(self.path)

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self._attributes()["hpcres"])

    def write(self, level: int, box: Box, labels: np.ndarray) -> None:
        """Write whole shards: `labels` uint8 (z, y, x) of `box`, which starts and ends where shards do.

        InputError where it does not. Values are none of `unwritten`.
        """
        here = self.levels[level]
        assert labels.shape == box.shape, (labels.shape, box)
        assert labels.dtype == np.uint8, labels.dtype
        assert self.unwritten in (0, 255), self.unwritten  # so that no mask as large as the labels is needed
        assert self.unwritten not in (labels.min(), labels.max()), f"{self.unwritten} means unwritten"
        whole = Box.whole(here.shape)
        for axis, start, stop, edge, end in zip(AXES, box.start, box.stop, here.shard, whole.stop, strict=True):
            cut = start if start % edge else stop if stop % edge and stop != end else None
            if cut is not None or stop > end or start == stop:
                first = (start if cut is None else cut) // edge * edge
                what = f"cuts shard {first}:{min(first + edge, end)}" if cut is not None else f"is not inside 0:{end}"
                raise InputError(
                    f"{self.path}: tile writes {axis} {start}:{stop}, which {what}; use --tiles with a multiple of "
                    f"{edge} voxels per tile"
                )
        # A shard that is written again is written from nothing: zarr would merge it with one that may be damaged.
        for shard in self._shards_in(level, box):
            self.shard_path(level, shard).unlink(missing_ok=True)
        self._arrays[level][box.slices] = labels

    def read(self, level: int, box: Box) -> np.ndarray:
        """uint8 (z, y, x); `unwritten` where nothing was."""
        try:
            return np.asarray(self._arrays[level][box.slices])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            _corrupt(f"{self.path}: level {level}, {box}", error)

    def shard_boxes(self, level: int) -> list[Box]:
        """The box of every shard of a level, z-major, clipped at the volume's end."""
        return blocks(self.levels[level].shape, self.levels[level].shard)

    def shard_path(self, level: int, box: Box) -> Path:
        """The file of the shard that starts where `box` starts."""
        index = [start // edge for start, edge in zip(box.start, self.levels[level].shard, strict=True)]
        return self.path / str(level) / "c" / "/".join(map(str, index))

    def is_written(self, level: int, box: Box) -> bool:
        """Whether every shard that `box` touches has its file."""
        return all(self.shard_path(level, shard).is_file() for shard in self._shards_in(level, box))

    def shards_below(self, level: int, box: Box) -> list[Box]:
        """The shards of `level` - 1 that a shard of `level` ≥ 1 is made from."""
        return self._shards_in(level - 1, self._finer(level, box))

    def write_coarser(self, level: int, box: Box) -> None:
        """Write one shard of `level` ≥ 1 from the level below, by `coarsen`; Unfinished where that has gaps.

        Needs the memory of one shard and of a chunk.
        """
        assert level >= 1, level
        finer = self._finer(level, box)
        if not self.is_written(level - 1, finer):
            missing = [b for b in self._shards_in(level - 1, finer) if not self.is_written(level - 1, b)]
            raise Unfinished(
                f"{self.path}: level {level}, {box}: {len(missing)} shards of level {level - 1} are missing, the first "
                f"is {missing[0]}; run hpcres verify --repair"
            )
        labels = np.empty(box.shape, np.uint8)
        for part in blocks(box.shape, triple([-(-n // 2) for n in self.chunk])):  # each of one finer chunk
            place = Box(
                triple([a + o for a, o in zip(part.start, box.start, strict=True)]),
                triple([b + o for b, o in zip(part.stop, box.start, strict=True)]),
            )
            labels[part.slices] = self.coarsen(self.read(level - 1, self._finer(level, place)))
        self.write(level, box, labels)

    def set_provenance(self, **items: Any) -> None:
        """Add to the attribute `hpcres`; the metadata file is replaced as a whole. One process at a time."""
        metadata = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        metadata["attributes"]["hpcres"].update(items)
        self._replace_metadata(metadata)

    def _replace_metadata(self, metadata: dict[str, Any]) -> None:
        temporary = temporary_beside(self.path / "zarr.json")
        temporary.write_text(json.dumps(metadata, indent=2), encoding="utf-8")
        os.replace(temporary, self.path / "zarr.json")

    def _attributes(self) -> dict[str, Any]:
        return json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))["attributes"]

    def _name_labels(self, phases: Mapping[int, str | None]) -> None:
        metadata = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        metadata["attributes"]["ome"]["image-label"] = _image_label(phases)
        self._replace_metadata(metadata)

    def _finer(self, level: int, box: Box) -> Box:
        """The voxels of level - 1 under a box of `level`."""
        return Box(triple([2 * a for a in box.start]), triple([2 * b for b in box.stop])).clipped(
            Box.whole(self.levels[level - 1].shape)
        )

    def _shards_in(self, level: int, box: Box) -> list[Box]:
        edges = self.levels[level].shard
        starts = product(*(range(a // e * e, b, e) for a, b, e in zip(box.start, box.stop, edges, strict=True)))
        whole = Box.whole(self.levels[level].shape)
        return [Box(triple(s), triple([a + e for a, e in zip(s, edges, strict=True)])).clipped(whole) for s in starts]

    @classmethod
    def _write_template(
        cls, path: Path, shape: Triple, shard: Triple, chunk: int, spacing: Spacing, unit: str, phases: Sequence[str],
        codec: Literal["zstd", "lz4"], provenance: Mapping[str, Any],
    ) -> None:  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        axes: list[dict[str, str]] = [{"name": axis, "type": "space"} for axis in AXES]
        for axis in axes:
            axis |= {"unit": unit} if unit != "voxel" else {}
        levels = pyramid(shape)
        datasets: list[dict[str, Any]] = []
        for level, (_, step) in enumerate(levels):
            edges = [v * s for v, s in zip(spacing, step, strict=True)]
            # The centre of a coarse voxel is the centre of the fine ones under it.
            centre = [v * (s - 1) / 2 for v, s in zip(spacing, step, strict=True)]
            placed = [{"type": "scale", "scale": edges}, {"type": "translation", "translation": centre}]
            datasets.append({"path": str(level), "coordinateTransformations": placed})
        multiscale = {"name": cls.kind, "axes": axes, "datasets": datasets, "type": cls.method}
        attributes = {
            "ome": {"version": "0.5", "multiscales": [multiscale], **cls._look(phases)},
            "hpcres": dict(provenance),
        }
        group = zarr.create_group(zarr.storage.LocalStore(path), zarr_format=3, attributes=attributes)
        level_of = {"zstd": 3, "lz4": 5}
        blosc = zarr.codecs.BloscCodec(typesize=1, cname=codec, clevel=level_of[codec], shuffle="bitshuffle")
        for level, (extent, _) in enumerate(levels):
            group.create_array(
                str(level), shape=extent, dtype="uint8", chunks=(chunk,) * 3, fill_value=cls.unwritten,
                compressors=blosc,
                shards=triple([min(s, -(-n // chunk) * chunk) for s, n in zip(shard, extent, strict=True)]),
                dimension_names=tuple(AXES), config={"write_empty_chunks": True},
            )  # fmt: skip

    @classmethod
    def _look(cls, phases: Sequence[str]) -> dict[str, Any]:
        return {"image-label": _image_label(dict(enumerate(phases)))}


class AgreementStore(LabelStore):
    """The same for an image of shares: 255 times the share, which is never 0, so that 0 is what was never written.

    Its pyramid is by mean, and it is no label image.
    """

    unwritten = 0
    kind, method = "agreement", "mean of 2×2×2 blocks"
    coarsen = staticmethod(coarsen_by_mean)

    @classmethod
    def _look(cls, phases: Sequence[str]) -> dict[str, Any]:
        return {}


class FieldStore:
    """float32 fields of one volume in a plain Zarr v3 group, (z, y, x) or (component, z, y, x); NaN where none is.

    It appears at `path` when the block of `with` ends without an error. Attributes say spacing, unit and what it is.
    Several processes may write it: shared(make) is what `make` gives on the first of them, on every one.
    """

    def __init__(
        self, path: str | Path, shape: Triple, attributes: Mapping[str, Any], overwrite: bool = False,
        shared: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:  # fmt: skip
        refuse_existing(path, overwrite)
        self.path, self.shape = Path(path), shape
        self._shared = shared or (lambda make: make())
        self._attributes = dict(attributes)

    def __enter__(self) -> Self:
        def make() -> Path:
            temporary = temporary_beside(self.path)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            zarr.create_group(zarr.storage.LocalStore(temporary), zarr_format=3, attributes=self._attributes)
            return temporary

        self._temporary: Path = self._shared(make)
        self._group = zarr.open_group(zarr.storage.LocalStore(self._temporary), mode="r+")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        def finish() -> None:
            move_into_place(self._temporary, self.path)

        try:
            if kind is None:
                self._shared(lambda: None)  # when all have written
                self._shared(finish)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, name: str, components: int | None = None) -> zarr.Array:
        """An array to be written in slabs of whole 64 planes."""
        self._shared(lambda: self._create(name, components) and None)
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def _create(self, name: str, components: int | None) -> zarr.Array:
        first: tuple[int, ...] = () if components is None else (components,)
        chunks = (*((1,) * len(first)), *(min(64, n) for n in self.shape))
        return self._group.create_array(
            name, shape=(*first, *self.shape), dtype="float32", chunks=chunks, fill_value=float("nan"),
            compressors=zarr.codecs.BloscCodec(typesize=4, cname="zstd", clevel=1, shuffle="shuffle"),
            dimension_names=(*(("component",) * len(first)), *AXES),
        )  # fmt: skip


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """InputError where `path` is there already and may not be replaced, or its folder could not be written."""
    path = Path(path)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{path}: cannot be written, because {nearest} is a file; write elsewhere with --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written, no permission in {nearest}; write elsewhere with --output")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; remove it, write elsewhere with --output, or give --overwrite")
    if path.exists() and not any((path / name).is_file() for name in _ZARR_FILES):
        raise InputError(f"{path}: exists and is no zarr, so --overwrite will not remove it; write elsewhere")


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, hidden and of this thread alone, to be renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")


def clear_leftovers(path: Path) -> None:
    """Remove what a killed process left half-made in a store and beside it. Only while nobody else writes it."""
    for half in [*path.rglob("*.partial"), *path.glob(".zarr.json.*")]:
        half.unlink()
    for beside in path.absolute().parent.iterdir():
        if beside.name.startswith(f".{path.name}."):
            shutil.rmtree(beside, ignore_errors=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`; what was there is removed after that."""
    if not path.is_dir():
        os.replace(temporary, path)
        return
    old = temporary_beside(path.with_name(path.name + ".old"))
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def pyramid(shape: Triple) -> list[tuple[Triple, Triple]]:
    """Voxels per axis of every level of a store, finest first, and how many voxels of level 0 each is wide."""
    levels = [(shape, (1, 1, 1))]
    while max(levels[-1][0]) > _TOP_VOXELS:
        extent, step = levels[-1]
        coarser = triple([s * (2 if n > 1 else 1) for s, n in zip(step, extent, strict=True)])
        levels.append((triple([-(-n // 2) for n in extent]), coarser))
    return levels


def _image_label(phases: Mapping[int, str | None]) -> dict[str, Any]:
    colours = [
        {"label-value": label, "rgba": [*PHASE_COLOURS[place % len(PHASE_COLOURS)], 255]}
        for place, label in enumerate(phases)
    ]
    named = [{"label-value": label, "name": name} for label, name in phases.items() if name is not None]
    return {"colors": colours, **({"properties": named} if named else {})}


# ---- conversion --------------------------------------------------------------------------------------------


def convert(
    source: Volume, output: str | Path, *, phases: Mapping[int, str] | None = None,
    voxel_size: float | Sequence[float] | None = None, unit: str | None = None, chunk_voxels: int | None = None,
    codec: Literal["zstd", "lz4"] = "zstd", provenance: Mapping[str, Any] | None = None, overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LabelStore:  # fmt: skip
    """Stream any readable volume into a label store, shard row by shard row (at most 1 GiB at a time).

    phases: label in the source → name; the store's labels are 0, 1, 2, … in this order. By default those that the
    source itself names; where it names none, the values are kept, and must lie in 0 … 254.
    voxel_size, unit: those of the source where not given, else 1 voxel.
    progress(done, all): shards. The store appears at `output` when it is complete.
    """
    output = Path(output)
    refuse_existing(output, overwrite)
    if voxel_size is None and source.voxel_size is not None:
        voxel_size, unit = source.voxel_size, source.unit
    chunk = chunk_voxels or (128 if max(source.shape) >= 512 else 64)
    shard = (chunk * (2 if max(source.shape) <= 2048 else 4),) * 3
    if phases is None and source.phases:
        phases = dict(enumerate(source.phases))
    phase_map = PhaseMap(tuple(phases), source.path) if phases else None
    names: Sequence[str] = tuple(phases.values()) if phases else ()
    temporary = temporary_beside(output)
    try:
        store = LabelStore.create(
            temporary, source.shape, shard=shard, chunk_voxels=chunk,
            voxel_size=1.0 if voxel_size is None else voxel_size, unit=unit or "voxel", phases=names, codec=codec,
            provenance={"source": source.path, **(provenance or {})},
        )  # fmt: skip
        done, total = 0, sum(len(store.shard_boxes(level)) for level in range(len(store.levels)))
        edges = store.levels[0].shard
        row = (edges[0], edges[1], source.shape[2])
        slab = (edges[0], *source.shape[1:])
        seen: set[int] = set()
        for block in blocks(source.shape, slab if prod(slab) * source.dtype.itemsize <= _SLAB_BYTES else row):
            labels = source.read(block)
            if phase_map is not None:
                labels = phase_map.index(labels)
            else:
                labels = _kept(source.path, labels)
                seen.update(np.flatnonzero(np.bincount(labels.ravel(), minlength=UNWRITTEN)).tolist())
            for shard_box in store._shards_in(0, block):
                store.write(0, shard_box, labels[shard_box.relative_to(block.start).slices])
                done += 1
                if progress:
                    progress(done, total)
        for level in range(1, len(store.levels)):
            for shard_box in store.shard_boxes(level):
                store.write_coarser(level, shard_box)
                done += 1
                if progress:
                    progress(done, total)
        if phase_map is None:
            store._name_labels(dict.fromkeys(sorted(seen)))
        move_into_place(temporary, output)
    except OSError as error:
        error.filename = str(output)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return LabelStore.open(output)


def _kept(path: str, labels: np.ndarray) -> np.ndarray:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= UNWRITTEN:
        raise InputError(
            f"{path}: label {low if low < 0 else high} does not fit a store of 0 … 254; map the labels with "
            f"--phases, for example --phases \"{low}=pore,{high}=solid\""
        )
    return labels.astype(np.uint8, copy=False)
