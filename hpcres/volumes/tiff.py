"""TIFF: stacks and volumes in, of which only the strips or tiles that a box touches are read; image stacks out."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.study import OME_UNITS
from hpcres.volumes.files import made_whole
from hpcres.volumes.volume import (
    Spacing,
    Volume,
    corrupt,
    refuse_colour,
    spacing_of,
    times,
    volume_over,
    voxel_dtype,
    zyx,
)


def open_tiff(path: str, flat: bool = False) -> Volume:
    """A stack or volume; `flat` takes a single image for a stack of one."""
    with _complaints() as complaints:
        try:
            tiff: Any = tifffile.TiffFile(path)
            series = list(tiff.series)
            pages: list[Any] = [page for one in series for page in one.pages]
        except Exception as error:  # tifffile raises whatever its parsing stumbles over
            corrupt(path, error)
        if complaints.fatal:
            corrupt(path, re.sub(r"<.*?> ?", "", complaints.fatal[0]))
        if not pages or None in pages:
            corrupt(path, "pages are missing")
        voxel_size, unit = _voxel_size(tiff, pages[0])
    key = pages[0].keyframe
    if key.samplesperpixel > 1 or key.photometric in (
        tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB,
    ):  # fmt: skip
        refuse_colour(path)
    dtype = voxel_dtype(path, key.dtype)
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
        corrupt(path, f"its pages end at byte {end}, the file at {tiff.filehandle.size}")
    stacked = series[0].shape if len(series) == 1 else (len(series) * prod(series[0].shape[:-2]), *series[0].shape[-2:])
    if len(series) == 1 and series[0].dataoffset is not None:
        # Uncompressed and contiguous: the system pages in what a box touches.
        array = np.memmap(path, key.dtype.newbyteorder(tiff.byteorder), "r", series[0].dataoffset, tuple(stacked))
        if len(pages) == 1 and len(stacked) == 3 and stacked[0] == 1 and not flat:
            stacked = stacked[1:]
        zyx(path, stacked, flat)
        return volume_over(path, array, flat, voxel_size=voxel_size, unit=unit)
    shape = zyx(path, stacked, flat)
    reader = _Pages(path, tiff, pages, shape, dtype)
    volume = Volume(path, shape, dtype, reader.segment, reader.read, voxel_size, unit)
    reader.read(Box((0, 0, 0), (1, 1, 1)))  # a codec that is not there should say so now
    return volume


def write_images(path: str | Path, stack: np.ndarray) -> None:
    """Write slices (slice, row, column) as a deflated TIFF stack, whole or not at all."""
    path = Path(path)
    with made_whole(path) as temporary:
        tifffile.imwrite(temporary, stack, compression="zlib", photometric="minisblack", metadata={"axes": "QYX"})


class _Pages:
    """Reads only the strips or tiles that a box touches, page by page."""

    def __init__(self, path: str, tiff: Any, pages: list[Any], shape: Triple, dtype: np.dtype) -> None:
        self.path, self.tiff, self.pages, self.shape, self.dtype = path, tiff, pages, shape, dtype
        self.key = pages[0].keyframe
        _, depth, rows, columns, _ = self.key.shaped
        if (rows, columns) != shape[1:] or depth * len(pages) != shape[0]:
            corrupt(path, f"{len(pages)} pages of {depth} × {rows} × {columns} are not {times(shape)}")
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
            corrupt(self.path, f"page {number} ends early")
        try:
            segment, _, _ = page.keyframe.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec has exceptions of its own
            if "imagecodecs" in str(error):
                what = f"{self.path}: {self.key.compression.name} compression needs a package more"
                raise InputError(f"{what}; pip install imagecodecs, or save it as deflate") from None
            corrupt(self.path, f"page {number}: {error or type(error).__name__}")
        if segment is None:  # a sparse tile: nothing was stored
            return np.full(self.segment, self.key.nodata, self.dtype)
        return segment[..., 0].astype(self.dtype, copy=False)


def _voxel_size(tiff: Any, page: Any) -> tuple[Spacing | None, str | None]:
    """Voxel size where ImageJ or OME-XML metadata give all three edges; dots per inch say nothing of a sample."""
    units = {**OME_UNITS, "micron": "micrometer", "microns": "micrometer", "\\u00B5m": "micrometer"}
    imagej = tiff.imagej_metadata or {}
    if imagej.get("spacing") and imagej.get("unit") in units:
        per_unit = [page.tags.valueof(tag) for tag in ("YResolution", "XResolution")]
        if all(r and r[0] for r in per_unit):
            spacing = spacing_of([imagej["spacing"], *(r[1] / r[0] for r in per_unit)])
            return spacing, spacing and units[imagej["unit"]]
    if tiff.is_ome:
        try:
            pixels = ElementTree.fromstring(tiff.ome_metadata).find(".//{*}Pixels")
        except ElementTree.ParseError:
            pixels = None
        given = {} if pixels is None else pixels.attrib
        named = {units.get(given.get(f"PhysicalSize{a}Unit", "µm")) for a in "ZYX"}
        if all(f"PhysicalSize{a}" in given for a in "ZYX") and len(named) == 1 and (unit := named.pop()):
            return spacing_of([float(given[f"PhysicalSize{a}"]) for a in "ZYX"]), unit
    return None, None


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
def _complaints() -> Iterator[_Complaints]:
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    logger.addFilter(complaints)
    try:
        yield complaints
    finally:
        logger.removeFilter(complaints)
