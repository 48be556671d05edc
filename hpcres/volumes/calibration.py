"""Voxel edge lengths of a TIFF, from ImageJ's description, OME-XML or resolution tags.

ImageJ: ij.io.FileOpener.decodeDescriptionString and setCalibration, ij.io.FileSaver.getDescriptionString (a spacing of
1 is not written, nor are yunit and zunit if they are the unit of x). OME-XML: schema 2016-06, Pixels (the default unit
of PhysicalSizeX, Y, Z is µm).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

from hpcres.lengths import MICROMETERS, RELATIVE, UNKNOWN, Length, VoxelEdges, edges_of, unit_name

PRINT_MICROMETERS = 10.0
"""Largest pixel that is read from resolution tags alone. Coarser tags (72, 300, 2400 dots per inch) are those of a
screen or a printer, which software writes by default."""
_TAG_UNITS = {2: "inch", 3: "centimeter"}


def tiff_edges(tiff: Any, page: Any, image: int, described: Sequence[Mapping[str, str]]) -> VoxelEdges:
    """Read the voxel edges of one image of a TIFF.

    Parameters
    ----------
    tiff : tifffile.TiffFile
        Open file.
    page : tifffile.TiffPage
        First page of the image.
    image
        Number of the image, from 0.
    described
        `ome_pixels` of the file.

    Returns
    -------
    VoxelEdges
        The edges along z, y, x; unknown where the file does not state them.
    """
    if tiff.is_ome:
        pixels = described[image] if image < len(described) else {}
        if any(f"PhysicalSize{axis}" in pixels for axis in "XYZ"):
            return _physical(pixels)
    elif tiff.is_imagej and (metadata := tiff.imagej_metadata) and ("unit" in metadata or "spacing" in metadata):
        return _imagej(metadata, page)
    elif tiff.is_shaped and (every := tiff.shaped_metadata):
        metadata = every[min(image, len(every) - 1)]
        if any(f"PhysicalSize{axis}" in metadata for axis in "XYZ"):
            return _physical(metadata)
        if "unit" in metadata:
            return _imagej({"spacing": None, **metadata}, page)
    return _tags(page)


def ome_pixels(tiff: Any) -> list[Mapping[str, str]]:
    """Read the attributes of Pixels for each image of an OME-TIFF.

    Parameters
    ----------
    tiff : tifffile.TiffFile
        Open file.

    Returns
    -------
    list of Mapping
        One for each image; empty for other files, and where the XML is broken.
    """
    try:
        root = ElementTree.fromstring(tiff.ome_metadata) if tiff.is_ome else None
    except ElementTree.ParseError:
        return []
    return [] if root is None else [pixels.attrib for pixels in root.findall("{*}Image/{*}Pixels")]


def _physical(metadata: Mapping[str, Any]) -> VoxelEdges:
    keys = [f"PhysicalSize{axis}" for axis in "ZYX"]
    return edges_of([metadata.get(key) for key in keys], [metadata.get(f"{key}Unit", "µm") for key in keys])


def _imagej(metadata: Mapping[str, Any], page: Any) -> VoxelEdges:
    """Read edges from ImageJ's description; with a `spacing` of None the edge along z is unknown."""
    unit_x = str(metadata.get("unit", ""))
    units = [str(metadata.get(key, unit_x)) for key in ("zunit", "yunit", "unit")]
    y, x = _per_pixel(page)
    if unit_name(unit_x) == "micrometer" and page.tags.valueof("ResolutionUnit") == 3:
        y, x = (edge and 1e4 * edge for edge in (y, x))  # ImageJ converts cm to µm, and no other units
    spacing = metadata.get("spacing", 1.0)
    spacing = abs(spacing) if isinstance(spacing, int | float) else None
    return edges_of((spacing, y, x), units)


def _per_pixel(page: Any) -> tuple[float | None, float | None]:
    """Return pixel edges y, x in the resolution unit; 1 where the tags are missing, None where they are 0."""
    edges = []
    for tag in ("YResolution", "XResolution"):
        number, per = page.tags.valueof(tag, default=(1, 1))
        edges.append(per / number if number else None)
    return edges[0], edges[1]


def _tags(page: Any) -> VoxelEdges:
    """Read edges from resolution tags: the edge along z is unknown.

    Tags coarser than PRINT_MICROMETERS give only the ratio of y and x.
    """
    y, x = _per_pixel(page)
    if y is None or x is None:
        return UNKNOWN
    unit = _TAG_UNITS.get(int(page.tags.valueof("ResolutionUnit", default=2)), RELATIVE)
    if unit != RELATIVE and max(y, x) * MICROMETERS[unit] <= PRINT_MICROMETERS:
        return VoxelEdges.of([None, Length(y, unit), Length(x, unit)])
    coarse = unit != RELATIVE and (y, x) != (1, 1)
    note = f"resolution tags of {1 / x:.4g} pixels per {unit} are taken for those of a print" if coarse else ""
    return VoxelEdges.of([None, Length(y, RELATIVE), Length(x, RELATIVE)], note)
