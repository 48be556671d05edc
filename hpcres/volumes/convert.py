"""Conversion of any readable volume to a label store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import blocks
from hpcres.lengths import MICROMETERS, RELATIVE, VoxelEdges
from hpcres.outputs import LABELS, refuse_output
from hpcres.signals import end_if_signalled
from hpcres.volumes.files import atomic_write
from hpcres.volumes.phases import UNWRITTEN, PhaseMap
from hpcres.volumes.stores import LabelStore, Layout
from hpcres.volumes.volume import Volume

_SLAB_BYTES = 2**30


def convert(
    source: Volume,
    output: str | Path,
    *,
    phases: Mapping[int, str] | None = None,
    voxel_size: VoxelEdges | None = None,
    chunk_voxels: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LabelStore:
    """Stream any readable volume into a label store, shard row by shard row.

    At most 1 GiB is read at a time. The store appears at `output` when it is complete.

    Parameters
    ----------
    source
        Volume of labels.
    output
        Path of the store.
    phases
        Name of each label of the source; the store's labels are 0, 1, 2, … in this order. By default the phases that
        the source itself names. Where it names none, the values are kept, and they must lie in 0 … 254.
    voxel_size
        Edges of a voxel. By default those of the source, or 1 voxel where the source states none.
    chunk_voxels
        Edge of the inner chunks in voxels. By default 128 where the longest axis has at least 512 voxels, else 64.
    provenance
        Further items of the store's attribute `hpcres`.
    overwrite
        Replace a store that exists at `output`.
    progress
        Called as progress(done, all) with numbers of shards.

    Returns
    -------
    LabelStore
        The complete store.

    Raises
    ------
    InputError
        Where only some of the voxel edges are known, or where a label does not fit.
    """
    output = Path(output)
    refuse_output(output, LABELS, inputs=[source.path], overwrite=overwrite)
    lengths, unit = (voxel_size or source.edges).lengths(source.path)
    chunk = chunk_voxels or (128 if max(source.shape) >= 512 else 64)
    shard = (chunk * (2 if max(source.shape) <= 2048 else 4),) * 3
    if phases is None and source.phases:
        phases = dict(enumerate(source.phases))
    phase_map = PhaseMap(tuple(phases), source.path) if phases else None
    names: Sequence[str] = tuple(phases.values()) if phases else ()
    with atomic_write(output) as temporary:
        store = LabelStore.create(
            temporary,
            Layout(source.shape, shard, chunk),
            voxel_size=lengths,
            unit=unit if unit in MICROMETERS else RELATIVE,
            phases=names,
            provenance={"source": source.path, **(provenance or {})},
        )
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
            for shard_box in store.shards_in(0, block):
                end_if_signalled()
                store.write(0, shard_box, labels[shard_box.relative_to(block.start).slices])
                done += 1
                if progress:
                    progress(done, total)
        for level in range(1, len(store.levels)):
            for shard_box in store.shard_boxes(level):
                end_if_signalled()
                store.write_coarser(level, shard_box)
                done += 1
                if progress:
                    progress(done, total)
        if phase_map is None:
            store.name_labels(dict.fromkeys(sorted(seen)))
    return LabelStore.open(output)


def _kept(path: str, labels: np.ndarray) -> np.ndarray:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= UNWRITTEN:
        raise InputError(
            f"{path}: label {low if low < 0 else high} does not fit a store of 0 … 254; map the labels with "
            f'`phases`, for example "{low}=pore,{high}=solid"'
        )
    return labels.astype(np.uint8, copy=False)
