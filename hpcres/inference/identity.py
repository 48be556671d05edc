"""What decides the bytes of a store: written into a new one, and compared with that of a store that exists."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.inference.generate import Painter
from hpcres.inference.job import Job
from hpcres.inference.journal import StoreLock, agreement_path, missing_shards, open_stores, refuse_without_journal
from hpcres.inference.tasks import Shard
from hpcres.outputs import LABELS, refuse_output
from hpcres.volumes.files import clear_leftovers
from hpcres.volumes.sizes import refuse_other_size
from hpcres.volumes.stores import AgreementStore, LabelStore, Layout

_IDENTITY = (
    "weights_sha256",
    "input_sha256",
    "seed",
    "ensemble",
    "scale_factor",
    "boundary",
    "tile_voxels",
    "chunk_voxels",
    "arithmetic",
)
"""What decides every byte of a store; a rerun must agree in all of it."""


def prepare(job: Job, painter: Painter, overwrite: bool, store_lock: StoreLock) -> list[Shard]:
    """Create or check the store, and list the shards that are to be made. Rank 0 only."""
    going_on, agreement = not overwrite and job.output.exists(), agreement_path(job.output)
    if going_on:
        _existing_provenance(job.output)
        refuse_other_size(str(job.output), LabelStore.open(job.output).volume.edges, job.voxel_size, job.any_voxel_size)
        refuse_without_journal(job.output)
    else:
        inputs = [*job.conditions.paths, job.checkpoint.path]
        refuse_output(job.output, LABELS, inputs=inputs, overwrite=overwrite)
        if len(job.seeds) > 1:
            refuse_output(agreement, LABELS, inputs=inputs, overwrite=overwrite and _is_agreement(agreement))
    store_lock.take()
    for path in (job.output, agreement):
        clear_leftovers(path)
    if going_on:
        refuse_changed(job, painter)
    else:
        identity = _identity(job, painter)
        # Before the store: what a journal says of another store's shards must never meet this one's.
        store_lock.forget_journals()
        if overwrite and _is_agreement(agreement):
            shutil.rmtree(agreement)
        LabelStore.create(
            job.output,
            _layout(job),
            voxel_size=job.voxel_size.length,
            unit=job.voxel_size.unit,
            phases=job.checkpoint.phases,
            provenance={**identity, **_origin(job)},
            overwrite=overwrite,
        )
    if len(job.seeds) > 1 and not agreement.exists():  # a kill can come between the two stores
        _create_agreement(job, agreement)
    return missing_shards(open_stores(job.output), len(job.seeds))


def _layout(job: Job) -> Layout:
    return Layout(job.plan.shape, job.plan.tile_voxels, job.plan.chunk_voxels, job.settings.codec)


def _create_agreement(job: Job, path: Path) -> None:
    about = {
        "stage": "infer",
        "agreement": f"255 times the share of the seeds whose label is that of {job.output.name}, rounded",
        "seeds": job.seeds,
        "complete": False,
    }
    AgreementStore.create(
        path, _layout(job), voxel_size=job.voxel_size.length, unit=job.voxel_size.unit, phases=(), provenance=about
    )


def _is_agreement(path: Path) -> bool:
    try:
        AgreementStore.open(path)
    except InputError:
        return False
    return True


def refuse_changed(job: Job, painter: Painter, besides: Sequence[str] = ()) -> None:
    """Refuse a job that differs from the one that painted the store, in what decides the bytes of the store.

    Parameters
    ----------
    job
        Job on the store at job.output.
    painter
        Painter of the job.
    besides
        Keys of _IDENTITY that may differ.

    Raises
    ------
    InputError
        Where a key differs, or the store was not made by hpcres infer.
    """
    provenance = _existing_provenance(job.output)
    identity = _identity(job, painter)
    for key in (key for key in _IDENTITY if key not in besides):
        old, new = provenance.get(key), identity[key]
        if old != new:
            raise InputError(
                f"{job.output}: was painted with {key} {old}, this job has {new}; use `overwrite` to paint it "
                "anew, or another `output`"
            )


def _existing_provenance(output: Path) -> dict[str, Any]:
    provenance = LabelStore.open(output).provenance
    if provenance.get("stage") != "infer":
        raise InputError(f"{output}: is there already and not made by hpcres infer; choose another `output`")
    return provenance


def _identity(job: Job, painter: Painter) -> dict[str, Any]:
    """Return the values of _IDENTITY.

    The whole low-res volume is read once, which also finds any unknown label.
    """
    return {
        "weights_sha256": job.checkpoint.sha256,
        "input_sha256": job.conditions.digest(),
        "seed": job.seed,
        "ensemble": len(job.seeds),
        "scale_factor": str(job.plan.scale),
        "boundary": dict(zip(AXES, job.plan.boundaries, strict=True)),
        "tile_voxels": list(job.plan.tile_voxels),
        "chunk_voxels": job.plan.chunk_voxels,
        "arithmetic": painter.arithmetic,
    }


def _origin(job: Job) -> dict[str, Any]:
    return {
        "stage": "infer",
        "checkpoint": str(Path(job.checkpoint.path).resolve()),
        **job.conditions.describe(),
        "step": job.checkpoint.step,
        "halo_low_res": job.plan.halo_low_res,
        "codec": job.settings.codec,
        "precision": job.settings.precision,
        "tiles": list(job.plan.grid),
        "versions": {**job.checkpoint.versions, "hpcres": __version__, "torch": str(torch.__version__)},
        "command": job.command,
        "complete": False,
    }
