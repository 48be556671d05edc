"""TIFF: reading of stacks and volumes, writing of image stacks.

Only the strips or tiles that a box touches are read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.lengths import VoxelEdges
from hpcres.volumes.axes import Arrangement, arranged, times
from hpcres.volumes.calibration import ome_pixels, tiff_edges
from hpcres.volumes.files import atomic_write
from hpcres.volumes.volume import Volume, corrupt, existing, refuse_colour, volume_over, voxel_dtype

_BROKEN = ("invalid page offset", "failed to reshape", "invalid offset", "ImageJ series metadata invalid")
"""tifffile's warnings about a file of which it reads less than was written."""
SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")


def tiff_parts(path: str) -> tuple[str, str] | None:
    """Split `file.tif:1` into file and image.

    The image is a number from 0 or a name, and empty where the path names none. The result is None where the file has
    none of SUFFIXES.
    """
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, SUFFIXES))}))(?::(.+))?", path, re.IGNORECASE)
    return (match.group(1), match.group(2) or "") if match else None


def open_tiff(path: str, flat: bool = False) -> Volume:
    """Open a volume of a TIFF without reading it.

    Parameters
    ----------
    path
        `file.tif`, or `file.tif:1` where the file has several images.
    flat
        Read training images: a single image is a stack of one slice, and several images of one size are a stack.

    Returns
    -------
    Volume
        The volume.

    Raises
    ------
    InputError
        Where the file is damaged, holds several volumes, or holds none.
    """
    parts = tiff_parts(path)
    assert parts
    name, chosen = parts
    if existing(name).is_dir():
        raise InputError(f"{name}: is a folder where a TIFF file is due; check the path")
    with _complaints() as complaints:
        try:
            tiff: Any = tifffile.TiffFile(name)
            series = list(tiff.series)
            pages_of: list[list[Any]] = [list(one.pages) for one in series]
        except Exception as error:  # tifffile raises whatever its parsing stumbles over
            corrupt(name, error)
        if complaints.fatal:
            corrupt(name, re.sub(r"<.*?> ?", "", complaints.fatal[0]))
        if not series:
            corrupt(name, "no pages")
        layout = partial(_layout, tiff, ome_pixels(tiff), flat)
        number = _chosen(path, name, series, chosen, flat, layout)
        used = series if number is None else [series[number]]
        pages = [page for k, every in enumerate(pages_of) if number in (None, k) for page in every]
        if complaints.gone and None in pages:
            raise InputError(f"{name}: {complaints.gone}; put it beside this one")
        if not pages or None in pages:
            corrupt(name, "pages are missing")
    key = pages[0].keyframe
    if key.samplesperpixel > 1 or key.photometric in (
        tifffile.PHOTOMETRIC.RGB,
        tifffile.PHOTOMETRIC.YCBCR,
        tifffile.PHOTOMETRIC.CIELAB,
    ):
        refuse_colour(path)
    dtype = voxel_dtype(path, key.dtype)
    end = max(
        max((o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0),
        *(one.dataoffset + prod(one.shape) * key.dtype.itemsize for one in used if one.dataoffset is not None),
        0,
    )
    if end > tiff.filehandle.size and {page.parent for page in pages} == {tiff}:
        corrupt(name, f"its pages end at byte {end}, the file at {tiff.filehandle.size}")
    edges, shape, place = layout(path, used, number or 0)
    if len(used) == 1 and used[0].dataoffset is not None:
        # Uncompressed and contiguous: the system pages in what a box touches.
        array = np.memmap(name, key.dtype.newbyteorder(tiff.byteorder), "r", used[0].dataoffset, shape)
        return volume_over(path, array, arrangement=place, edges=edges)
    reader = _Pages(path, tiff, pages, shape, dtype)
    volume = volume_over(path, reader, reader.chunks, arrangement=place, edges=edges)
    volume.read(Box((0, 0, 0), (1, 1, 1)))  # so that a missing codec is an error now
    return volume


def _chosen(
    path: str, name: str, series: list[Any], chosen: str, flat: bool, layout: Callable[[str, list[Any], int], object]
) -> int | None:
    """Return the number of the image to read, or None for all of them: single pages of one stack.

    Raises
    ------
    InputError
        Where the file has several images and none is chosen, or not the one that is chosen.
    """
    about = [f"{one.axes} {times(one.shape)}" + (f", {one.name}" if one.name else "") for one in series]
    listed = [f"{name}:{k} ({text})" for k, text in enumerate(about)]
    if chosen:
        named = [one.name for one in series]
        if chosen in named and named.count(chosen) == 1:
            return named.index(chosen)
        if chosen.isdecimal() and int(chosen) < len(series):
            return int(chosen)
        raise InputError(f"{path}: no image {chosen} in it; it has {', '.join(listed[:8])}")
    if len(series) == 1:
        return 0
    shapes = {tuple(n for n in one.shape if n != 1) if flat else tuple(one.shape) for one in series}
    types = {one.dtype for one in series}
    # OME-XML describes each as an image of its own; other writers of single pages mean a stack.
    if len(shapes) == len(types) == 1 and len(next(iter(shapes))) <= 2 and (flat or series[0].kind != "ome"):
        return None
    what = "images" if len(shapes) == len(types) == 1 else "images of different sizes or types"
    reasons = []
    for k, one in enumerate(series):
        try:
            layout(f"{name}:{k}", [one], k)
            reasons.append("")
        except InputError as error:
            reasons.append(str(error))
    kind = "a stack of slices" if flat else "a volume"
    if all(reasons):
        raise InputError(f"{name}: holds {len(series)} {what}, none of them {kind}; {reasons[0]}")
    fit = [text for text, reason in zip(listed, reasons, strict=True) if not reason]
    more = f", … {len(fit) - 8} more" if len(fit) > 8 else ""
    more += f"; the others are not {kind}" if len(fit) < len(series) else ""
    raise InputError(f"{name}: holds {len(series)} {what}; name one of {', '.join(fit[:8])}{more}")


def _layout(
    tiff: Any, described: Sequence[Mapping[str, str]], flat: bool, path: str, series: list[Any], image: int
) -> tuple[VoxelEdges, tuple[int, ...], Arrangement]:
    """Return the voxel edges of an image, its shape with all its axes, and which of them are z, y, x.

    Raises
    ------
    InputError
        Where z, y, x are not clear.
    """
    edges = tiff_edges(tiff, series[0].keyframe, image, described)
    shape, names = _axes(tiff, series, image, edges, described)
    return edges, shape, arranged(path, shape, names, flat)


def _axes(
    tiff: Any, series: list[Any], image: int, edges: VoxelEdges, described: Sequence[Mapping[str, str]]
) -> tuple[tuple[int, ...], Sequence[str] | None]:
    """Return the shape of an image with all its axes, and their names where the file states them."""
    one = series[0]
    if len(series) > 1:
        return (len(series), *one.keyframe.shape[:2]), None
    shape = tuple(one.get_shape(False))
    names: str | None = one.get_axes(False)
    if one.kind == "shaped":
        # tifffile makes up names where its description has none.
        metadata = tiff.shaped_metadata[image] if image < len(tiff.shaped_metadata or ()) else {}
        return shape, names if len(metadata.get("axes", "")) == len(shape) else None
    if tiff.is_ome and one.kind != "ome" and image < len(described):
        # tifffile could not lay out the image by its OME-XML, which happens for planes of one column.
        pixels = described[image]
        sizes = {axis: int(pixels.get(f"Size{axis}", 1)) for axis in "CTZ"}
        if len(shape) == 4 and max(sizes["C"], sizes["T"]) == 1 and sizes["Z"] == shape[0]:
            return shape, "ZYXS"
        names = "".join(axis for axis in reversed(pixels.get("DimensionOrder", "XYCZT")) if axis in "CTZ") + "YX"
        return (*(sizes[axis] for axis in names[:3]), *shape[-3:-1]), names
    if prod(shape) == prod(one.keyframe.shape[:2]) and edges.z is None:
        # One plane without an edge length along z is an image.
        kept = [k for k, axis in enumerate(names or "") if axis in "YX"]
        return tuple(shape[k] for k in kept), [names[k] for k in kept] if names else None
    return shape, names


def write_images(path: str | Path, stack: np.ndarray) -> None:
    """Write slices (slice, row, column) as a deflated TIFF stack, whole or not at all."""
    path = Path(path)
    with atomic_write(path) as temporary:
        tifffile.imwrite(temporary, stack, compression="zlib", photometric="minisblack", metadata={"axes": "QYX"})


class _Pages:
    """Image of `shape` that reads only the strips or tiles that a box touches, page by page."""

    def __init__(self, path: str, tiff: Any, pages: list[Any], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.tiff, self.pages, self.shape, self.dtype = path, tiff, pages, shape, dtype
        self.key = pages[0].keyframe
        _, depth, rows, columns, _ = self.key.shaped
        self.stored: Triple = (depth * len(pages), rows, columns)
        self._long = [axis for axis, n in enumerate(shape) if n != 1]
        """Axes of the image that are axes of what is stored, in the same order; the others have one element."""
        if [shape[axis] for axis in self._long] != [n for n in self.stored if n != 1]:
            corrupt(path, f"{len(pages)} pages of {depth} × {rows} × {columns} are not {times(shape)}")
        self.depth = depth
        if self.key.is_tiled:
            self.segment: Triple = (max(1, self.key.tiledepth), self.key.tilelength, self.key.tilewidth)
        else:
            self.segment = (1, min(self.key.rowsperstrip or rows, rows), columns)
        self.grid = triple([-(-n // s) for n, s in zip((depth, rows, columns), self.segment, strict=True)])
        cheap = iter(s for s, n in zip(self.segment, self.stored, strict=True) if n != 1)
        self.chunks = tuple(1 if n == 1 else next(cheap) for n in shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """Index like an array: a slice keeps an axis, a number drops it."""
        ends = [(i.start, i.stop) if isinstance(i, slice) else (i, i + 1) for i in index]
        stored = iter([ends[axis] for axis in self._long])
        start, stop = zip(*((0, 1) if n == 1 else next(stored) for n in self.stored), strict=True)
        kept = [b - a for (a, b), i in zip(ends, index, strict=True) if isinstance(i, slice)]
        if 0 in kept:
            return np.empty(kept, self.dtype)
        return self.read(Box(triple(start), triple(stop))).reshape(kept)

    def read(self, box: Box) -> np.ndarray:
        out = np.zeros(box.shape, self.dtype)
        for number in range(box.start[0] // self.depth, -(-box.stop[0] // self.depth)):
            first = number * self.depth
            here = box.relative_to((first, 0, 0)).clipped(Box.whole((self.depth, *self.stored[1:])))
            ranges = [range(a // s, -(-b // s)) for a, b, s in zip(here.start, here.stop, self.segment, strict=True)]
            for position in product(*ranges):
                held = self._segment(number, position)
                start = triple([i * s for i, s in zip(position, self.segment, strict=True)])
                extent = Box(start, triple([a + n for a, n in zip(start, held.shape, strict=True)]))
                part = extent.clipped(here)
                into = part.relative_to((box.start[0] - first, box.start[1], box.start[2]))
                out[into.slices] = held[part.relative_to(start).slices]
        return out

    def _segment(self, number: int, position: tuple[int, ...]) -> np.ndarray:
        """Decode one strip or tile (z, y, x)."""
        page, (_, rows, columns) = self.pages[number], self.grid
        index = (position[0] * rows + position[1]) * columns + position[2]
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        data = _bytes(page.parent.filehandle, offset, size)
        if len(data) < size:
            corrupt(self.path, f"page {number} ends early")
        try:
            segment, _, _ = page.keyframe.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec has exceptions of its own
            if "imagecodecs" in str(error):
                what = f"{self.path}: no codec for {self.key.compression.name} compression ({error})"
                raise InputError(f"{what}; pip install imagecodecs, or save it as deflate") from None
            corrupt(self.path, f"page {number}: {error or type(error).__name__}")
        if segment is None:  # a sparse tile: nothing was stored
            return np.full(self.segment, self.key.nodata, self.dtype)
        return segment[..., 0].astype(self.dtype, copy=False)


def _bytes(handle: Any, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file at `offset`.

    tifffile closes all but the first file of an image that spans several files, so a closed file is opened again.
    """
    if not handle.closed:
        return os.pread(handle.fileno(), size, offset)  # keeps no position, so threads need no lock
    file = os.open(handle.path, os.O_RDONLY)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


class _Complaints(logging.Filter):
    """Filter that collects tifffile's warnings of one thread.

    tifffile logs that a file is broken and continues with fewer pages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fatal: list[str] = []
        self.gone = ""
        """Message on the first file of the image that is missing."""
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        message = record.getMessage()
        if any(sign in message for sign in _BROKEN):
            self.fatal.append(message)
        if missing := re.search(r"failed to read ('[^']*')", message):
            self.gone = self.gone or f"the file {missing.group(1)} that it names is missing"
        return False


@contextlib.contextmanager
def _complaints() -> Iterator[_Complaints]:
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    logger.addFilter(complaints)
    try:
        yield complaints
    finally:
        logger.removeFilter(complaints)
