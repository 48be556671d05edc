"""Stores of images that hpcres writes, of labels and of shares: OME-Zarr with a pyramid, written shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import zarr
import zarr.codecs
import zarr.storage

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import AXES, Box, Triple, blocks, triple
from hpcres.lengths import RELATIVE, EdgeLengths
from hpcres.outputs import LABELS, refuse_output
from hpcres.volumes.axes import arranged, times
from hpcres.volumes.files import atomic_write
from hpcres.volumes.formats import open_volume
from hpcres.volumes.ome_zarr import zarr_node
from hpcres.volumes.phases import PHASE_COLOURS, UNWRITTEN
from hpcres.volumes.pyramid import coarsen_by_mean, coarsen_by_mode, pyramid
from hpcres.volumes.volume import Volume, corrupt


@dataclass(frozen=True)
class Layout:
    """How the voxels of a store lie in its files.

    Parameters
    ----------
    shape
        Voxels along z, y, x.
    shard
        Voxels of a shard along z, y, x; each is a multiple of `chunk_voxels`.
    chunk_voxels
        Edge of the inner chunks in voxels.
    codec
        Compressor of the chunks.
    """

    shape: Sequence[int]
    shard: Sequence[int]
    chunk_voxels: int
    codec: Literal["zstd", "lz4"] = "zstd"

    def refuse_unfit(self, path: Path) -> None:
        """Raise InputError if a store cannot be laid out so."""
        arranged(str(path), triple(self.shape))
        if any(edge % self.chunk_voxels or edge < 1 for edge in self.shard):
            shard = times(triple(self.shard))
            raise InputError(f"{path}: shard {shard} is not whole chunks of {self.chunk_voxels}³ voxels")


@dataclass(frozen=True)
class LevelInfo:
    """One pyramid level: voxels per axis, voxels per shard, and voxel edge lengths in the store's unit."""

    shape: Triple
    shard: Triple
    voxel_size: EdgeLengths


def code_chunks(at_once: int) -> None:
    """Set how many chunks of a shard zarr compresses or decompresses at once in this process, in place of ten.

    Each chunk in work takes twice its bytes, and ten threads make nothing faster on one core.
    """
    zarr.config.set({"async.concurrency": at_once})


class LabelStore:
    """OME-Zarr 0.5 label image on Zarr v3, sharded, with a pyramid by mode: labels 0, 1, 2, … as uint8.

    A write covers whole shards, and a shard is one file. So writers in different processes need no locks, and a file
    that exists is whole. Voxels that were never written read as 255. The store pickles as its path.

    Attributes
    ----------
    path : Path
        Folder of the store.
    levels : list of LevelInfo
        Levels of the pyramid, finest first.
    chunk : Triple
        Voxels of an inner chunk of level 0.
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
        cls,
        path: str | Path,
        layout: Layout,
        *,
        voxel_size: float | Sequence[float],
        unit: str,
        phases: Sequence[str],
        provenance: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Self:
        """Write the metadata of all levels beside `path` and rename it into place; no voxel is written yet.

        Parameters
        ----------
        path
            Folder of the store.
        layout
            Shape, shards, chunks and compressor.
        voxel_size
            Edge length in `unit`, one for all axes or three for z, y, x.
        unit
            OME unit name.
        phases
            Names of the labels 0, 1, 2, ….
        provenance
            Content of the attribute `hpcres`.
        overwrite
            Replace a store that exists at `path`; the old store is removed last of all.

        Returns
        -------
        LabelStore
            The open store.

        Raises
        ------
        InputError
            Where a store exists and `overwrite` is not set, `shard` is not whole chunks, or a voxel size is not
            positive.
        """
        path = Path(path)
        refuse_output(path, LABELS, overwrite=overwrite)
        layout.refuse_unfit(path)
        z, y, x = (voxel_size,) * 3 if isinstance(voxel_size, int | float) else tuple(voxel_size)
        edges = (float(z), float(y), float(x))
        if not (min(edges) > 0 and max(edges) < float("inf")):
            raise InputError(f"{path}: voxel size {edges} is not positive; give for example 65 nm")
        with atomic_write(path) as temporary:
            cls._write_template(temporary, layout, edges, unit, phases, provenance)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store that hpcres wrote.

        Parameters
        ----------
        path
            Folder of the store. It is opened for reading alone where this process may not write it.

        Returns
        -------
        LabelStore
            The open store.

        Raises
        ------
        InputError
            For anything else than a store of this kind.
        """
        group, attributes = zarr_node(str(path), "r+" if os.access(path, os.W_OK) else "r")
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
            corrupt(str(path), f"metadata: {error!r}")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        """Pickle the store as its path, from which `open` makes it again."""
        return type(self).open, (self.path,)

    @property
    def volume(self) -> Volume:
        """Level 0 as a Volume, which refuses to read voxels that were never written."""
        return open_volume(self.path)

    @property
    def provenance(self) -> dict[str, Any]:
        """Content of the attribute `hpcres`, read from the file now."""
        return dict(self._attributes()["hpcres"])

    def write(self, level: int, box: Box, labels: np.ndarray) -> None:
        """Write whole shards.

        Parameters
        ----------
        level
            Pyramid level.
        box
            Box of the level that starts and ends where shards do.
        labels
            uint8 (z, y, x) of the box; no value is `unwritten`.

        Raises
        ------
        InputError
            Where the box cuts a shard or leaves the volume.
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
                    f"{self.path}: tile writes {axis} {start}:{stop}, which {what}; use `tiles` with a multiple of "
                    f"{edge} voxels per tile"
                )
        # A shard that is written again is written from nothing: zarr would merge it with one that may be damaged.
        for shard in self.shards_in(level, box):
            self.shard_path(level, shard).unlink(missing_ok=True)
        self._arrays[level][box.slices] = labels

    def read(self, level: int, box: Box) -> np.ndarray:
        """Read a box of a level.

        Parameters
        ----------
        level
            Pyramid level.
        box
            Box of the level (z, y, x).

        Returns
        -------
        numpy.ndarray
            uint8 (z, y, x); `unwritten` where nothing was written.

        Raises
        ------
        InputError
            Where a shard is damaged.
        """
        try:
            return np.asarray(self._arrays[level][box.slices])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            corrupt(f"{self.path}: level {level}, {box}", error)

    def shard_boxes(self, level: int) -> list[Box]:
        """Return the box of every shard of a level, z-major, clipped at the volume's end."""
        return blocks(self.levels[level].shape, self.levels[level].shard)

    def shards_in(self, level: int, box: Box) -> list[Box]:
        """Return the box of every shard that `box` touches, z-major, clipped at the volume's end."""
        edges = self.levels[level].shard
        starts = product(*(range(a // e * e, b, e) for a, b, e in zip(box.start, box.stop, edges, strict=True)))
        whole = Box.whole(self.levels[level].shape)
        return [Box(triple(s), triple([a + e for a, e in zip(s, edges, strict=True)])).clipped(whole) for s in starts]

    def shard_path(self, level: int, box: Box) -> Path:
        """Return the file of the shard that starts where `box` starts."""
        index = [start // edge for start, edge in zip(box.start, self.levels[level].shard, strict=True)]
        return self.path / str(level) / "c" / "/".join(map(str, index))

    def is_written(self, level: int, box: Box) -> bool:
        """Return whether every shard that `box` touches has its file."""
        return all(self.shard_path(level, shard).is_file() for shard in self.shards_in(level, box))

    def shards_below(self, level: int, box: Box) -> list[Box]:
        """Return the boxes of the shards of `level` - 1 that a shard of `level` ≥ 1 is made from."""
        return self.shards_in(level - 1, self._finer(level, box))

    def write_coarser(self, level: int, box: Box) -> None:
        """Write one shard of `level` ≥ 1 from the level below, by `coarsen`.

        The memory needed is that of one shard and of a chunk.

        Parameters
        ----------
        level
            Pyramid level, at least 1.
        box
            Box of the shard.

        Raises
        ------
        Unfinished
            Where shards of the level below are missing.
        """
        assert level >= 1, level
        finer = self._finer(level, box)
        if not self.is_written(level - 1, finer):
            missing = [b for b in self.shards_in(level - 1, finer) if not self.is_written(level - 1, b)]
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
        """Add items to the attribute `hpcres`; the metadata file is replaced as a whole.

        Only one process may do this at a time.
        """
        metadata = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        metadata["attributes"]["hpcres"].update(items)
        self._replace_metadata(metadata)

    def name_labels(self, phases: Mapping[int, str | None]) -> None:
        """Write which labels there are, and their names where these are known."""
        metadata = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        metadata["attributes"]["ome"]["image-label"] = _image_label(phases)
        self._replace_metadata(metadata)

    def _replace_metadata(self, metadata: dict[str, Any]) -> None:
        with atomic_write(self.path / "zarr.json") as temporary:
            temporary.write_text(json.dumps(metadata, indent=2), encoding="utf-8")

    def _attributes(self) -> dict[str, Any]:
        return json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))["attributes"]

    def _finer(self, level: int, box: Box) -> Box:
        """Return the voxels of level - 1 under a box of `level`."""
        return Box(triple([2 * a for a in box.start]), triple([2 * b for b in box.stop])).clipped(
            Box.whole(self.levels[level - 1].shape)
        )

    @classmethod
    def _write_template(
        cls,
        path: Path,
        layout: Layout,
        voxel_size: EdgeLengths,
        unit: str,
        phases: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        axes: list[dict[str, str]] = [{"name": axis, "type": "space"} for axis in AXES]
        for axis in axes:
            axis |= {"unit": unit} if unit != RELATIVE else {}
        levels = pyramid(triple(layout.shape))
        datasets: list[dict[str, Any]] = []
        for level, (_, step) in enumerate(levels):
            edges = [v * s for v, s in zip(voxel_size, step, strict=True)]
            # The centre of a coarse voxel is the centre of the fine ones under it.
            centre = [v * (s - 1) / 2 for v, s in zip(voxel_size, step, strict=True)]
            placed = [{"type": "scale", "scale": edges}, {"type": "translation", "translation": centre}]
            datasets.append({"path": str(level), "coordinateTransformations": placed})
        multiscale = {"name": cls.kind, "axes": axes, "datasets": datasets, "type": cls.method}
        attributes = {
            "ome": {"version": "0.5", "multiscales": [multiscale], **cls._look(phases)},
            "hpcres": dict(provenance),
        }
        group = zarr.create_group(zarr.storage.LocalStore(path), zarr_format=3, attributes=attributes)
        codec, chunk = layout.codec, layout.chunk_voxels
        level_of = {"zstd": 3, "lz4": 5}
        blosc = zarr.codecs.BloscCodec(typesize=1, cname=codec, clevel=level_of[codec], shuffle="bitshuffle")
        for level, (extent, _) in enumerate(levels):
            group.create_array(
                str(level),
                shape=extent,
                dtype="uint8",
                chunks=(chunk,) * 3,
                fill_value=cls.unwritten,
                compressors=blosc,
                shards=triple([min(s, -(-n // chunk) * chunk) for s, n in zip(layout.shard, extent, strict=True)]),
                dimension_names=tuple(AXES),
                config={"write_empty_chunks": True},
            )

    @classmethod
    def _look(cls, phases: Sequence[str]) -> dict[str, Any]:
        return {"image-label": _image_label(dict(enumerate(phases)))}


class AgreementStore(LabelStore):
    """Store of an image of shares, otherwise like LabelStore.

    A value is 255 times the share. A share is never 0, so 0 stands for voxels that were never written. The pyramid is
    by mean, and the image is no label image.
    """

    unwritten = 0
    kind, method = "agreement", "mean of 2×2×2 blocks"
    coarsen = staticmethod(coarsen_by_mean)

    @classmethod
    def _look(cls, phases: Sequence[str]) -> dict[str, Any]:
        return {}


def _image_label(phases: Mapping[int, str | None]) -> dict[str, Any]:
    colours = [
        {"label-value": label, "rgba": [*PHASE_COLOURS[place % len(PHASE_COLOURS)], 255]}
        for place, label in enumerate(phases)
    ]
    named = [{"label-value": label, "name": name} for label, name in phases.items() if name is not None]
    return {"colors": colours, **({"properties": named} if named else {})}
