"""A job: what to paint, from what, and where, collected from a study, a checkpoint and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from hpcres.checkpoint import Checkpoint, load_checkpoint
from hpcres.conditions import Conditions, conditions_of
from hpcres.errors import InputError
from hpcres.geometry import TilePlan, plan_tiles
from hpcres.inference.generate import halo_of
from hpcres.lengths import Length, cubic
from hpcres.study import Inference, LowRes, RawHeader, Study, parse_grid
from hpcres.volumes.sizes import compare_sizes, refuse_other_size


@dataclass(frozen=True)
class Job:
    """What to paint, from what, and where; pure data but for the generator and the lazily read volume."""

    checkpoint: Checkpoint
    conditions: Conditions
    output: Path
    plan: TilePlan
    seed: int
    settings: Inference
    device: str
    command: str
    voxel_size: Length
    """Of the output."""
    notes: tuple[str, ...] = ()
    """Lines for the user, before anything is painted."""
    any_voxel_size: bool = False
    """Go on in a store of another voxel size."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the ensemble; the labels are those of the first."""
        return [(self.seed + number) % 2**64 for number in range(self.settings.ensemble)]


def chunk_edge(shape: Sequence[int], scale: Fraction, settings: Inference) -> int:
    """Return the edge of the store's inner chunk, in voxels.

    It is the setting `chunk_voxels`, or by default 128 where the shortest axis has at least 512 voxels, else 64.
    """
    return settings.chunk_voxels or (128 if min(shape) >= 512 else 64)


def plan_job(checkpoint: Checkpoint, lattice: Sequence[int], settings: Inference) -> TilePlan:
    """Plan the tiles of a lattice, with the halo of the loaded network.

    Parameters
    ----------
    checkpoint
        Checkpoint of the generator.
    lattice
        Voxels of the lattice along z, y, x.
    settings
        Settings of the inference. Where they have no boundary, that of the training is used.

    Returns
    -------
    TilePlan
        The tiles.
    """
    scale = checkpoint.scale
    shape = [int(n * scale) for n in lattice]
    return plan_tiles(
        lattice,
        scale,
        settings.tiles,
        halo_of(checkpoint.generator),
        chunk_edge(shape, scale, settings),
        settings.boundary or checkpoint.study.training.boundaries,
    )


@dataclass(frozen=True)
class JobOptions:
    """What a job takes besides its study, or in place of what the study says.

    Parameters
    ----------
    checkpoint : str, optional
        Path of the checkpoint; by default that of the study.
    low_res : str or sequence of str, optional
        Path of a volume of labels, or paths of volumes of probabilities, one for each channel.
    output : str, optional
        Path of the store. It is needed and used where there is no study.
    tiles : str, optional
        Tiles along z, y, x, as of the option --tiles.
    seed : int, optional
        Seed of the noise; by default that of the study.
    device : str, optional
        Device; by default that of the study.
    command : str
        Command line, for the provenance.
    raw : sequence of RawHeader or None
        Headers of the low-res volumes that have none of their own.
    inference : mapping, optional
        Settings that take precedence over the study's.
    voxel_size : Length, optional
        Voxel size of a store that exists; nothing is then compared with the study's.
    """

    checkpoint: str | None = None
    low_res: str | Sequence[str] | None = None
    output: str | None = None
    tiles: str | None = None
    seed: int | None = None
    device: str | None = None
    command: str = ""
    raw: Sequence[RawHeader | None] = ()
    inference: Mapping[str, Any] | None = None
    voxel_size: Length | None = None


def open_job(study: Study | None, options: JobOptions | None = None) -> Job:
    """Collect a job from a study, or from a checkpoint and a low-res volume alone.

    Parameters
    ----------
    study : Study or None
        Study of the job; None for a checkpoint alone, whose own study is used.
    options : JobOptions, optional
        What differs from the study.

    Returns
    -------
    Job
        The job, with no voxel painted yet.

    Raises
    ------
    InputError
        Where study, checkpoint and low-res volume disagree, or something is missing.
    """
    options = options or JobOptions()
    checkpoint, low_res, output = options.checkpoint, options.low_res, options.output
    if study is None:
        if checkpoint is None or output is None:
            raise InputError("infer: without a study, a checkpoint and an output are needed; give both")
        loaded = load_checkpoint(checkpoint)
        basis, store = loaded.study, Path(output)
        if low_res is None and basis.low_res is not None:
            raise InputError(f"infer: the network of {checkpoint} is given a low-res volume; name one, or give a study")
    else:
        loaded = load_checkpoint(checkpoint or study.checkpoint_path)
        _refuse_other_study(loaded, study)
        basis, store = study, study.labels_path
    source = basis.low_res
    if low_res:
        paths = [low_res] if isinstance(low_res, str) else low_res
        if source is None:
            raise InputError(f"{', '.join(paths)}: the network of {loaded.path} is given no low-res volume; name none")
        source = source.at(paths, options.raw or [None] * len(paths))
    settings = basis.inference.model_copy(update=dict(options.inference or {}))
    if options.tiles is not None:
        try:
            settings = settings.model_copy(update={"tiles": parse_grid(options.tiles)})
        except ValueError as error:
            raise InputError(f"`tiles`: {error}") from None
    conditions = conditions_of(basis.model_copy(update={"low_res": source, "inference": settings}))
    plan = plan_job(loaded, conditions.shape, settings)
    chosen = basis.seed if options.seed is None else options.seed
    notes = [] if options.voxel_size else compare_sizes(basis, low_res=conditions.volume)
    size = options.voxel_size or basis.high_res.voxel_size
    return Job(
        loaded,
        conditions,
        store,
        plan,
        chosen,
        settings,
        options.device or basis.device,
        options.command,
        size,
        tuple(notes),
        basis.allow_voxel_size_mismatch,
    )


def _refuse_other_study(checkpoint: Checkpoint, study: Study) -> None:
    theirs = checkpoint.study
    if checkpoint.family != study.network.family:
        raise InputError(
            f"{checkpoint.path}: its network is of the family {checkpoint.family}, the study's of "
            f"{study.network.family}; train anew, or give the study it was trained with"
        )
    _refuse_other_low_res(checkpoint, theirs.low_res, study.low_res)
    for what, old, new in (
        ("phases", ", ".join(theirs.phases), ", ".join(study.phases)),
        ("scale factor", checkpoint.scale, study.scale_factor),
    ):
        _refuse_other(checkpoint, what, old, new)
    refuse_other_size(
        checkpoint.path, cubic(theirs.high_res.voxel_size), study.high_res.voxel_size, study.allow_voxel_size_mismatch
    )


def _refuse_other_low_res(checkpoint: Checkpoint, theirs: LowRes | None, ours: LowRes | None) -> None:
    _refuse_other(checkpoint, "a low-res volume of", _holds(theirs), _holds(ours))
    if theirs is None or ours is None:
        return
    if ours.channels:
        _refuse_other(checkpoint, "low-res channels", theirs.groups, ours.groups)
    else:
        _refuse_other(checkpoint, "low-res phases", dict(theirs.phases), dict(ours.phases))
    _refuse_other(checkpoint, "unknown low-res labels", list(theirs.unknown), list(ours.unknown))


def _holds(low_res: LowRes | None) -> str:
    return "nothing" if low_res is None else low_res.holds


def _refuse_other(checkpoint: Checkpoint, what: str, old: Any, new: Any) -> None:
    if old != new:
        raise InputError(
            f"{checkpoint.path}: was trained with {what} {old}, the study has {new}; train anew, or give the "
            "study it was trained with"
        )
