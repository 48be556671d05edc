"""Absent chunk files of a zarr: they are read as the fill value, whether the writer left them out or a copy lost them.

Stores that hpcres wrote are not checked here: it writes every chunk, and reading refuses an absent one.
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
from hpcres.volumes.formats import open_volume
from hpcres.volumes.ome_zarr import zarr_node
from hpcres.volumes.volume import Volume


@dataclass(frozen=True)
class Absent:
    """How many of an array's chunk files are absent, and the fill value that their voxels are read as."""

    path: str
    absent: int
    chunks: int
    fill_value: Any

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.absent} of {self.chunks} chunk files are absent, and their voxels are read as the "
            f"fill value {self.fill_value}; if its writer does not leave out such chunks, copy the store again"
        )

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "absent": self.absent, "chunks": self.chunks, "fill_value": self.fill_value}


def absent_chunks(*volumes: Volume) -> list[Absent]:
    """Count the absent chunk files of each volume, and of each part of one that has parts.

    Parameters
    ----------
    volumes
        Open volumes of any format. Only zarr in a local folder that hpcres did not write is checked.

    Returns
    -------
    list of Absent
        One for each array that lacks chunk files. Files are counted by name, none is opened; a shard is one file.
    """
    arrays = [part for volume in volumes for part in volume.parts or (volume,)]
    return [found for array in arrays if (found := _absent_of(array)) is not None]


def absent_chunks_of_study(study: Study, *volumes: Volume) -> list[Absent]:
    """`absent_chunks` of the volumes, and of the study's low-res volume and reference where they are there."""
    paths = [path for path in (*study.low_res.paths, study.reference.volume) if path is not None]
    return absent_chunks(*volumes, *(open_volume(path, grey=True) for path in paths if Path(path).is_dir()))


def _absent_of(volume: Volume) -> Absent | None:
    place = Path(volume.path)
    if not place.is_dir():
        return None
    node: Any
    node, attributes = zarr_node(volume.path)
    if not hasattr(node, "shape"):  # a group
        if "hpcres" in attributes:
            return None
        ome: Any = attributes.get("ome", attributes)
        place = place / ome["multiscales"][0]["datasets"][0]["path"]
        node, _ = zarr_node(str(place))
    grid = [-(-n // edge) for n, edge in zip(node.shape, node.shards or node.chunks, strict=True)]
    absent = prod(grid) - sum(1 for _ in _chunk_files(place, grid))
    fill = np.asarray(0 if node.fill_value is None else node.fill_value).item()
    return Absent(volume.path, absent, prod(grid), fill) if absent else None


def _chunk_files(place: Path, grid: list[int]) -> Iterator[str]:
    """Files of an array that are named as chunks of its grid: 0.0.0, 0/0/0, c/0/0/0 or c.0.0.0."""
    for folder, _, names in os.walk(place):
        inner = os.path.relpath(folder, place).replace(os.sep, ".")
        for name in names:
            if name in METADATA_FILES:
                continue
            key = f"{inner}.{name}".removeprefix("..").removeprefix("c.").split(".")
            if len(key) == len(grid) and all(k.isdigit() and int(k) < n for k, n in zip(key, grid, strict=True)):
                yield name
