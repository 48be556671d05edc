"""Which chunk files a zarr lacks: it reads them as the fill value, left out by the writer or lost by a copy.

Stores of ours are never asked: they write every chunk, and what they lack is refused where it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.volumes.files import METADATA_FILES
from hpcres.volumes.ome_zarr import zarr_node
from hpcres.volumes.volume import Volume


@dataclass(frozen=True)
class Absent:
    """Chunk files that are not there, of how many, and what their voxels are read as."""

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


def absent_chunks(volume: Volume) -> Absent | None:
    """Of the array that `volume` reads; None where none is absent, and for what is no zarr, or one of ours.

    Counts the files of local folders, of which none is opened. A shard is one file.
    """
    for part in volume.parts:
        if (found := absent_chunks(part)) is not None:
            return found
    if volume.parts or not Path(volume.path).is_dir():
        return None
    node: Any
    node, attributes = zarr_node(volume.path)
    if not hasattr(node, "shape"):  # a group
        if "hpcres" in attributes:
            return None
        ome: Any = attributes.get("ome", attributes)
        place = Path(volume.path) / ome["multiscales"][0]["datasets"][0]["path"]
        node, _ = zarr_node(str(place))
    else:
        place = Path(volume.path)
    grid = [-(-n // edge) for n, edge in zip(node.shape, node.shards or node.chunks, strict=True)]
    there = sum(1 for _ in _chunk_files(place, grid))
    missing = prod(grid) - there
    fill = np.asarray(0 if node.fill_value is None else node.fill_value).item()
    return Absent(volume.path, missing, prod(grid), fill) if missing else None


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
