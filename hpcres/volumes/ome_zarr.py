"""Reading of Zarr: bare arrays, and OME-Zarr images (NGFF 0.1 to 0.5) with their axes, voxel sizes and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import zarr

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box
from hpcres.lengths import VoxelEdges, edges_of
from hpcres.volumes.axes import arranged, times
from hpcres.volumes.files import ZARR_FILES
from hpcres.volumes.volume import Volume, corrupt, existing, volume_over

_RESULTS = ("measured", "spread")
"""What `hpcres infer` found out while it painted; no part of where a store is from."""
_IMPLIED = "tczyx"
"""Axes of NGFF 0.1 and 0.2, which name none."""


def zarr_node(path: str, mode: Literal["r", "r+"] = "r") -> tuple[zarr.Array[Any] | zarr.Group, dict[str, Any]]:
    """Open the array or group at `path`.

    Parameters
    ----------
    path
        Folder of the array or group.
    mode
        Open for reading, or for reading and writing.

    Returns
    -------
    node : zarr.Array or zarr.Group
        The array or group.
    attributes : dict
        Its attributes.

    Raises
    ------
    InputError
        Where there is no Zarr array or group, or its metadata cannot be read.
    """
    if not any((existing(path) / name).is_file() for name in ZARR_FILES):
        raise InputError(f"{path}: is no zarr array or group ({', '.join(ZARR_FILES)} are not in it); check the path")
    try:
        node = zarr.open(path, mode=mode)
        return node, dict(node.attrs)
    except Exception as error:  # broken JSON, missing keys, unknown codecs: zarr has no common exception
        _refuse(path, error)


def _refuse(path: str, error: Exception) -> NoReturn:
    said = " ".join(str(error).split())
    if "codec" in said.lower() and not isinstance(error, KeyError | OSError):
        raise InputError(
            f"{path}: is compressed with a codec that is not installed ({said[:120]}); install it, or write it again "
            "with zstd or gzip"
        ) from None
    corrupt(path, error)


def open_zarr(path: str, chosen: str = "") -> Volume:
    """Open a bare array, or the finest level of an OME-Zarr image.

    Parameters
    ----------
    path
        Folder of the array or group.
    chosen
        Number or name of the image, where a group has several.

    Returns
    -------
    Volume
        The volume. Reading it raises InputError for voxels of a store of hpcres that were never written.

    Raises
    ------
    InputError
        Where the group is no OME-Zarr image, the image is not clear, or the metadata is damaged.
    """
    node, attributes = zarr_node(path)
    if isinstance(node, zarr.Array):
        return _open_array(path, node, attributes)
    ome: Any = attributes.get("ome", attributes)
    if not ome.get("multiscales"):
        found = [*(name for name, _ in node.arrays()), *(name for name, _ in node.groups())]
        members = ", ".join(sorted(found)[:8]) or "none"
        raise InputError(f"{path}: is a zarr group without OME multiscales; name an array or image in it, of {members}")
    try:
        return _open_multiscale(path, node, attributes, chosen_image(path, ome["multiscales"], chosen), 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        corrupt(path, f"OME metadata: {error!r}")


def chosen_image(path: str, images: Sequence[Mapping[str, Any]], chosen: str) -> Mapping[str, Any]:
    """Return the image that is `chosen` by number or name, or the only one.

    Parameters
    ----------
    path
        Path of the group, for messages.
    images
        The multiscales of the group.
    chosen
        Number from 0 or name of the image; empty for the only one.

    Returns
    -------
    Mapping
        One of `images`.

    Raises
    ------
    InputError
        Where the image does not exist, or several exist and none is chosen.
    """
    named = [str(image.get("name", "")) for image in images]
    if chosen in named and named.count(chosen) == 1:
        return images[named.index(chosen)]
    if chosen.isdecimal() and int(chosen) < len(images):
        return images[int(chosen)]
    listed = ", ".join(f"{path}:{k}" + (f" ({name})" if name else "") for k, name in enumerate(named))
    if chosen:
        raise InputError(f"{path}: no image {chosen} in it; it has {listed}")
    if len(images) > 1:
        raise InputError(f"{path}: holds {len(images)} images; name one of {listed}")
    return images[0]


def _open_array(path: str, array: zarr.Array[Any], attributes: Mapping[str, Any]) -> Volume:
    """Open an array by itself, or as a level of the OME-Zarr image in the folder above it."""
    place = Path(path).absolute()
    if any((place.parent / name).is_file() for name in ZARR_FILES):
        group, above = zarr_node(str(place.parent))
        ome: Any = above.get("ome", above)
        for image in ome.get("multiscales") or ():
            levels = [str(dataset.get("path")) for dataset in image.get("datasets", ())]
            if isinstance(group, zarr.Group) and place.name in levels:
                return _open_multiscale(path, group, above, image, levels.index(place.name))
    # Zarr 3 has names of dimensions; xarray writes them so into Zarr 2.
    names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    return volume_over(path, array, array.chunks, names=names and [str(name or "") for name in names])


def _open_multiscale(
    path: str, group: zarr.Group, attributes: dict[str, Any], image: Mapping[str, Any], level: int
) -> Volume:
    first = image["datasets"][level]
    array = group[first["path"]]
    if not isinstance(array, zarr.Array):
        corrupt(path, f"level {first['path']} is no array")
    if "coordinateSystems" in image:
        raise InputError(
            f"{path}: has coordinateSystems (OME-Zarr 0.6), whose axes and sizes are not read; write it as 0.5"
        )
    axes: Sequence[Any] = image.get("axes") or (_IMPLIED if array.ndim == 5 else AXES[-array.ndim :])
    described = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    if len(described) != array.ndim:
        raise InputError(f"{path}: names {len(described)} axes of an array of {times(array.shape)}; correct the names")
    for axis in described:
        if axis.get("type", "space") == "space" and axis["name"].lower() not in (*AXES, "c", "t"):
            raise InputError(f"{path}: has an axis {axis['name']} of space where z, y, x are due; name its axes so")
    place = arranged(path, array.shape, [axis["name"] for axis in described])
    edges = _edges(path, image, first, described)
    ome: Any = attributes.get("ome", attributes)
    named = {
        int(each["label-value"]): each["name"]
        for each in ome.get("image-label", {}).get("properties", [])
        if "name" in each
    }
    phases = tuple(named[label] for label in range(len(named))) if set(named) == set(range(len(named))) else ()
    provenance = {key: value for key, value in attributes.get("hpcres", {}).items() if key not in _RESULTS}
    volume = volume_over(
        path, array, array.chunks, arrangement=place, edges=edges, phases=phases or None, provenance=provenance
    )
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


def _edges(
    path: str, image: Mapping[str, Any], dataset: Mapping[str, Any], axes: Sequence[Mapping[str, Any]]
) -> VoxelEdges:
    """Multiply the scales of the level and of the image, and give each the unit of its axis."""
    every = [*(dataset.get("coordinateTransformations") or ()), *(image.get("coordinateTransformations") or ())]
    scale, scaled = [1.0] * len(axes), False
    for each in every:
        if each["type"] == "scale" and "scale" in each:
            if len(each["scale"]) != len(axes):
                raise InputError(f"{path}: scale has {len(each['scale'])} numbers for {len(axes)} axes; correct it")
            scale, scaled = [a * float(b) for a, b in zip(scale, each["scale"], strict=True)], True
        elif each["type"] not in ("translation", "identity"):
            raise InputError(
                f"{path}: has a coordinate transformation of type {each['type']}, which is not read as a voxel size; "
                "write scales alone"
            )
    by_name = {axis["name"].lower(): (h, axis.get("unit")) for axis, h in zip(axes, scale, strict=True)}
    given = [by_name.get(axis, (None, None)) for axis in AXES]
    return edges_of([h if scaled else None for h, _ in given], [unit for _, unit in given])
