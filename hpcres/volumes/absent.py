"""Absent chunks of a Zarr or HDF5 array, which are read as the fill value.

Voxels of an absent chunk are read as the fill value, whether the writer left the chunk out or the chunk was lost.
Stores that hpcres wrote are not checked here: hpcres writes every chunk, and reading refuses an absent one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.study import Study
from hpcres.volumes.files import METADATA_FILES
from hpcres.volumes.formats import file_of, open_volume, zarr_parts
from hpcres.volumes.hdf5 import hdf5_parts, unwritten_chunks
from hpcres.volumes.ome_zarr import chosen_image, zarr_node
from hpcres.volumes.volume import Volume


@dataclass(frozen=True)
class Absent:
    """Number of an array's chunks that are absent, and the fill value that their voxels are read as.

    Attributes
    ----------
    path : str
        Path of the volume.
    absent, chunks : int
        Number of absent chunks with this fill value, and of all chunks of the array.
    fill_value : Any
        Value that the voxels of absent chunks are read as.
    """

    path: str
    absent: int
    chunks: int
    fill_value: Any

    def __str__(self) -> str:
        """Return a message with the path, the counts, the fill value and a remedy."""
        what, remedy = ("chunk files are absent", "copy the store again")
        if hdf5_parts(self.path):  # a copy cannot lose a chunk of a file
            what, remedy = ("chunks were never written", "write the dataset again")
        return (
            f"{self.path}: {self.absent} of {self.chunks} {what}, and their voxels are read as the fill value "
            f"{self.fill_value}; if its writer does not leave out such chunks, {remedy}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return {"path": self.path, "absent": self.absent, "chunks": self.chunks, "fill_value": self.fill_value}


def absent_chunks(*volumes: Volume) -> list[Absent]:
    """Count the absent chunks of each volume, and of each part of a volume that has parts.

    Parameters
    ----------
    *volumes
        Open volumes of any format. Only HDF5 is checked, and Zarr in a local folder that hpcres did not write.

    Returns
    -------
    list of Absent
        One for each array that lacks chunks, and for each fill value in it. In Zarr, files are counted by name and none
        is opened; a shard is one file.
    """
    arrays = [part for volume in volumes for part in volume.parts or (volume,)]
    return [found for array in arrays for found in _absent_of(array)]


def absent_chunks_of_study(study: Study, *volumes: Volume) -> list[Absent]:
    """Count the absent chunks of volumes, and of the study's low-res volume and reference where they exist.

    Parameters
    ----------
    study
        Study whose low-res volume and reference volume are opened where they are folders or HDF5 files.
    *volumes
        Open volumes to check as well.

    Returns
    -------
    list of Absent
        As of `absent_chunks`.
    """
    given = () if study.low_res is None else study.low_res.paths
    paths = [path for path in (*given, study.reference.volume) if path is not None]
    there = [path for path in paths if file_of(path).is_dir() or (hdf5_parts(path) and file_of(path).exists())]
    return absent_chunks(*volumes, *(open_volume(path, grey=True) for path in there))


def _absent_of(volume: Volume) -> list[Absent]:
    if hdf5_parts(volume.path):
        unwritten, chunks = unwritten_chunks(volume.path)
        return [Absent(volume.path, count, chunks, fill) for fill, count in unwritten.items()]
    folder, chosen = zarr_parts(volume.path) or (volume.path, "")
    place = Path(folder)
    if not place.is_dir():
        return []
    node: Any
    node, attributes = zarr_node(folder)
    if not hasattr(node, "shape"):  # a group
        if "hpcres" in attributes:
            return []
        ome: Any = attributes.get("ome", attributes)
        place = place / chosen_image(folder, ome["multiscales"], chosen)["datasets"][0]["path"]
        node, _ = zarr_node(str(place))
    grid = [-(-n // edge) for n, edge in zip(node.shape, node.shards or node.chunks, strict=True)]
    absent = prod(grid) - sum(1 for _ in _chunk_files(place, grid))
    fill = np.asarray(0 if node.fill_value is None else node.fill_value).item()
    return [Absent(volume.path, absent, prod(grid), fill)] if absent else []


def _chunk_files(place: Path, grid: list[int]) -> Iterator[str]:
    """Yield the names of files that are chunks of an array's grid: 0.0.0, 0/0/0, c/0/0/0 or c.0.0.0."""
    for folder, _, names in os.walk(place):
        inner = os.path.relpath(folder, place).replace(os.sep, ".")
        for name in names:
            if name in METADATA_FILES:
                continue
            key = f"{inner}.{name}".removeprefix("..").removeprefix("c.").split(".")
            if len(key) == len(grid) and all(k.isdigit() and int(k) < n for k, n in zip(key, grid, strict=True)):
                yield name
