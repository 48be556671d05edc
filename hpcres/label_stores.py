"""The label stores that stages make: labels.zarr, which is painted, and volumes that are converted.

Each function opens its inputs, refuses what does not fit, works, and returns the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcres.errors import InputError, Unfinished
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.journal import StoreLock
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import Fault, audit, find_faults, remove_faulty, repair_job
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


def check_store(given: Given, *, repair: bool, audited: int | None, ranks: Ranks, show: Callable[[str], None]) -> None:
    """Check every shard of a painted store; paint faulty ones again, and audit some tiles, if asked to.

    Every rank calls this function. Progress is shown on stderr.

    Parameters
    ----------
    given : Given
        A study, whose labels.zarr is checked, or a store.
    repair : bool
        Paint again what is missing or damaged.
    audited : int, optional
        Number of tiles to paint again elsewhere, and to compare.
    ranks : Ranks
        The processes that repair and audit together.
    show : function
        Called with each line of the outcome, on rank 0.

    Raises
    ------
    InputError, Stopped
    Unfinished
        Shards are missing or damaged and `repair` is not set, or an audit finds seams.
    """
    if is_study(given.source):
        path = load_study(given.source, given.settings, given.output).labels_path
    else:
        refuse_settings(given.source, given.settings)
        path = Path(given.source)
    show = show if ranks.rank == 0 else lambda line: None
    with StoreLock(path) as store_lock:

        def faults_found() -> list[Fault]:
            with progress_display("verify") as shown:
                held = store_lock if repair else None
                return find_faults(path, lambda done, total: shown(done, total=total), held)

        faults = ranks.from_first(faults_found)
        for fault in faults:
            show(str(fault))
        if not faults:
            show(f"{path}: every shard is there and whole")
        elif not repair:
            raise Unfinished(f"{path}: {len(faults)} shards are missing or damaged; run hpcres verify --repair")
        else:
            job = repair_job(path, given.command)
            tiles = ranks.from_first(lambda: remove_faulty(path, faults))
            infer(job, ranks, store_lock=store_lock, live=True)
            show(f"{path}: {tiles} tiles painted again")
        if audited:
            with progress_display("audit", shown=ranks.rank == 0) as shown:
                job = repair_job(path)
                outcome = audit(job, audited, ranks, lambda done, total: shown(done, total=total))
            show(f"{path}: {outcome}")
            outcome.refuse_seams(path)


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
