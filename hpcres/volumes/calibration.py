"""How long a TIFF says that its voxels are: ImageJ's description, OME-XML, or resolution tags.

ImageJ: ij.io.FileOpener.decodeDescriptionString and setCalibration, ij.io.FileSaver.getDescriptionString (the spacing
is left out where it is 1, yunit and zunit where they are the unit of x). OME-XML: schema 2016-06, Pixels (units of
PhysicalSizeX, Y, Z are µm where they are left out).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from hpcres.lengths import MICROMETERS, RELATIVE, UNKNOWN, Length, VoxelEdges, edges_of, unit_name

PRINT_MICROMETERS = 10.0
"""ImageJ takes resolution tags for the size of a sample from this pixel on down; above it they are dots of a print."""
_TAG_UNITS = {2: "inch", 3: "centimeter"}


def tiff_edges(tiff: Any, page: Any, image: int) -> VoxelEdges:
    """Edges of the voxels of an `image`, by number, whose first page is `page`; unknown where the file does not say."""
    if tiff.is_ome:
        pixels = ome_pixels(tiff, image)
        if pixels is not None and any(f"PhysicalSize{axis}" in pixels for axis in "XYZ"):
            return _physical(pixels)
    elif tiff.is_imagej and (said := tiff.imagej_metadata) and ("unit" in said or "spacing" in said):
        return _imagej(said, page)
    elif tiff.is_shaped and (every := tiff.shaped_metadata):
        said = every[min(image, len(every) - 1)]
        if any(f"PhysicalSize{axis}" in said for axis in "XYZ"):
            return _physical(said)
        if "unit" in said:
            return _imagej({"spacing": None, **said}, page)
    return _tags(page)


def ome_pixels(tiff: Any, image: int) -> Mapping[str, str] | None:
    """The attributes of Pixels of an image, by number; None where the OME-XML is broken or has fewer."""
    try:
        every = ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image/{*}Pixels")
    except ElementTree.ParseError:
        return None
    return every[image].attrib if image < len(every) else None


def _physical(said: Mapping[str, Any]) -> VoxelEdges:
    keys = [f"PhysicalSize{axis}" for axis in "ZYX"]
    return edges_of([said.get(key) for key in keys], [said.get(f"{key}Unit", "µm") for key in keys])


def _imagej(said: Mapping[str, Any], page: Any) -> VoxelEdges:
    """spacing None: z is unknown."""
    unit_x = str(said.get("unit", ""))
    units = [str(said.get(key, unit_x)) for key in ("zunit", "yunit", "unit")]
    y, x = _per_pixel(page)
    if unit_name(unit_x) == "micrometer" and page.tags.valueof("ResolutionUnit") == 3:
        y, x = (edge and 1e4 * edge for edge in (y, x))  # as ImageJ does, for cm and µm alone
    spacing = said.get("spacing", 1.0)
    spacing = abs(spacing) if isinstance(spacing, int | float) else None
    return edges_of((spacing, y, x), units)


def _per_pixel(page: Any) -> tuple[float | None, float | None]:
    """Resolution units a pixel along y and x, 1 where the tags are missing."""
    edges = []
    for tag in ("YResolution", "XResolution"):
        number, per = page.tags.valueof(tag, default=(1, 1))
        edges.append(per / number if number else None)
    return edges[0], edges[1]


def _tags(page: Any) -> VoxelEdges:
    """z is unknown; of a print, pixels that are not square have a ratio."""
    y, x = _per_pixel(page)
    if y is None or x is None:
        return UNKNOWN
    unit = _TAG_UNITS.get(int(page.tags.valueof("ResolutionUnit", default=2)), RELATIVE)
    if unit != RELATIVE and max(y, x) * MICROMETERS[unit] <= PRINT_MICROMETERS:
        return VoxelEdges.of([None, Length(y, unit), Length(x, unit)])
    note = f"resolution tags of {1 / x:.4g} a {unit} are of a print" if unit != RELATIVE and (y, x) != (1, 1) else ""
    return VoxelEdges.of([None, Length(y, RELATIVE), Length(x, RELATIVE)], note)
