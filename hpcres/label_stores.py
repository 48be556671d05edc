"""The label stores that stages make: labels.zarr, which is painted, and volumes that are converted.

Each function opens its inputs, refuses what does not fit, works, and returns the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcres.errors import InputError
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inputs import DEFAULT_STUDY, Given, is_study, refuse_settings, study_for, voxel_edges_of
from hpcres.lengths import VoxelEdges, cubic
from hpcres.progress import progress_display
from hpcres.study import Study
from hpcres.study.file import load_study, save_study
from hpcres.volumes.absent import absent_chunks
from hpcres.volumes.convert import convert
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import open_low_res
from hpcres.volumes.sizes import compare_sizes
from hpcres.volumes.volume import Volume

Warn = Callable[[Iterable[object]], None]
"""Called with what a user should know before the work begins, such as absent chunks; often with nothing."""


@dataclass(frozen=True)
class PaintOptions:
    """What is painted in place of what the study says; None for the study's own.

    Parameters
    ----------
    checkpoint : str, optional
        Path of the checkpoint.
    low_res : str or sequence of str, optional
        Path of a volume of labels, or paths of volumes of probabilities, one for each channel.
    tiles : str, optional
        `4x4x4`: tiles along z, y and x.
    seed : int, optional
        Seed of the noise.
    ensemble : int, optional
        Number of seeds to paint.
    device : str, optional
        auto, cpu or cuda.
    """

    checkpoint: str | None = None
    low_res: str | Sequence[str] | None = None
    tiles: str | None = None
    seed: int | None = None
    ensemble: int | None = None
    device: str | None = None


def paint(given: Given, options: PaintOptions, ranks: Ranks, warn: Warn) -> Path:
    """Paint the volume of a study file, or of a checkpoint and a low-res volume alone; every rank calls this function.

    Parameters
    ----------
    given : Given
        Study file, and the folder of results. Where the file is not there and a checkpoint is given, the checkpoint and
        the low-res volume are all that is needed, and `output` is the store.
    options : PaintOptions
        What is painted.
    ranks : Ranks
        The processes that paint together.
    warn : function
        Called with warnings before the first tile, on rank 0.

    Returns
    -------
    Path
        The store.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    # A network fed by noise alone needs no low-res volume; a study that is named must be there.
    sufficient = options.low_res or (given.output and given.source == DEFAULT_STUDY)
    alone = options.checkpoint and sufficient and not Path(given.source).exists()
    study = None if alone else study_for("infer", given.source, given.settings, given.output)
    store = paint_study(study, given, options, ranks, warn, live=True)
    if study is not None and ranks.rank == 0:
        save_study(study, "infer")
    return store


def paint_study(
    study: Study | None,
    given: Given,
    options: PaintOptions,
    ranks: Ranks,
    warn: Warn | None = None,
    *,
    live: bool = False,
) -> Path:
    """Paint the volume of a study that is loaded, or of none; otherwise like `paint`, and no study is saved.

    With `live` a terminal shows a bar in place of lines to the logger.
    """
    job = open_job(
        study,
        JobOptions(
            checkpoint=options.checkpoint,
            low_res=options.low_res,
            output=given.output,
            tiles=options.tiles,
            seed=options.seed,
            device=options.device,
            command=given.command,
            inference={} if options.ensemble is None else {"ensemble": options.ensemble},
        ),
    )
    if warn is not None and ranks.rank == 0:
        warn(absent_chunks(*job.conditions.volumes))
    return infer(job, ranks, overwrite=given.overwrite, live=live).store


def convert_given(given: Given, phases: Mapping[int, str] | None, warn: Warn) -> tuple[Path, list[str]]:
    """Convert the low-res volume of a study, or a bare volume; progress is shown on stderr.

    Parameters
    ----------
    given : Given
        Source, and the folder of a study's results, or the store that a bare volume is written to.
    phases : mapping, optional
        Of a bare volume: label → name; the labels of the store are 0, 1, 2, … in this order.
    warn : function
        Called with warnings before the conversion.

    Returns
    -------
    store : Path
        The store.
    notes : list of str
        Lines for the user, on voxel sizes.

    Raises
    ------
    InputError, Stopped
    """
    volume, target, names, edges, notes = _to_convert(given, phases)
    warn(absent_chunks(volume))
    with progress_display("convert") as show:
        convert(
            volume,
            target,
            phases=names,
            voxel_size=edges,
            overwrite=given.overwrite,
            progress=lambda done, total: show(done, total=total),
        )
    return target, notes


def _to_convert(
    given: Given, phases: Mapping[int, str] | None
) -> tuple[Volume, Path, Mapping[int, str] | None, VoxelEdges, list[str]]:
    """Return a volume, the store it is converted to, the names of its labels, its voxel edges, and notes on them."""
    source = given.source
    if is_study(source):
        if phases or given.voxel_size:
            raise InputError(f"{source}: a study has its own phases and voxel size; drop `phases` and `voxel_size`")
        study = load_study(source, given.settings, given.output)
        low_res = study.low_res
        if low_res is None:
            raise InputError(f"{source}: has no low_res to convert; name a volume")
        if low_res.channels:
            raise InputError(f"{source}: low_res.channels are probabilities, and a store holds labels; name one volume")
        groups = zip(low_res.phases, low_res.groups, strict=True)
        unknown = {label: f"unknown {label}" for label in low_res.unknown}
        names = {label: "+".join(group) for label, group in groups} | unknown
        volume = open_low_res(low_res)
        notes = compare_sizes(study, low_res=volume)
        return volume, study.folder / "low_res.zarr", names, cubic(study.low_res_voxel_size), notes
    if given.output is None:
        raise InputError(f"{source}: no place to write to; give `output` NAME.zarr")
    refuse_settings(source, given.settings)
    volume = open_volume(source)
    return volume, Path(given.output), phases, *voxel_edges_of(volume, given.voxel_size)
