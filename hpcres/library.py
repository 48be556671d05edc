"""The functions of `import hpcres`: the stages as calls, on files and on arrays.

A volume is a path (`x.tif`, `x.npy`, `x.h5:/dataset`, `x.zarr`), what `open` returns, or any array (z, y, x) of whole
numbers: of NumPy, Dask, Zarr or h5py. It is read box by box. Messages for the user go to the logger `hpcres`, progress
to `hpcres.train` and `hpcres.infer`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from hpcres.arguments import AnyVolume, VoxelSize, edges_of, log_warnings, study_of, volume_of, warn_of_absent_chunks
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import AXES, meeting_sides
from hpcres.inputs import Given
from hpcres.results import Measurement, Tortuosity
from hpcres.study import Metrics, Statistic, Study, SubVolumes
from hpcres.study.file import files_of
from hpcres.volumes.formats import open_volume
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

    from hpcres.training.loop import TrainingResult


def open(path: str | os.PathLike[str]) -> Volume:
    """Open a label volume of any format; no voxel is read before it is asked for.

    Parameters
    ----------
    path : path
        `x.tif`, `x.npy`, `x.h5:/dataset`, `x.zarr`, or an array in a Zarr group, `x.zarr/0`.

    Returns
    -------
    Volume
        With `shape`, `dtype`, `phases`, `edges` (of a voxel), and slices like an array.

    Raises
    ------
    InputError
        The file is missing, damaged, or holds no labels.
    """
    return open_volume(os.fspath(path))


def measure(
    volume: AnyVolume,
    *,
    phases: Sequence[str] | Mapping[int, str] | None = None,
    voxel_size: VoxelSize = None,
    periodic: Iterable[str] = (),
    statistics: Iterable[Statistic] = (),
    subvolumes: SubVolumes | None = None,
    seed: int = 0,
    client: Client | None = None,
    progress: bool = False,
) -> Measurement:
    """Measure volume fractions, surface and interphase areas and TPB of a label volume (docs/metrics.md).

    Parameters
    ----------
    volume : path, Volume or array
        Labels (z, y, x).
    phases : sequence of str or mapping, optional
        Names of the labels 0, 1, 2, …, or label → name. By default those that the file has, else the labels.
    voxel_size : str or three of them, optional
        `50 nm`, or lengths along z, y and x. By default the voxel size that the file states. If it states none, lengths
        are in voxels.
    periodic : axes
        Any of z, y, x: axes along which the volume's two sides meet.
    statistics : names
        What else to measure: correlations, chords, connectivity, spectrum, representative (the standard error of each
        number), geodesic.
    subvolumes : SubVolumes, optional
        How many random cubes to measure one by one, and their edge.
    seed : int
        Seed of the random places.
    client : distributed.Client, optional
        Where to compute. By default on the cores of this machine.
    progress : bool
        Show progress on stderr.

    Returns
    -------
    Measurement

    Raises
    ------
    InputError
        A label has no phase, or the voxel size is known along some axes only.
    Unfinished
        Some blocks could not be read.

    Examples
    --------
    >>> labels = np.zeros((8, 8, 8), np.int64)
    >>> labels[:4] = 1
    >>> found = measure(labels, phases=["pore", "solid"], voxel_size="2 um")
    >>> found.volume_fraction["solid"], found.specific_surface_area.faces["solid"], found.length_unit
    (0.5, 0.0625, 'micrometer')
    """
    from hpcres.metrics.measure import Sampling, Work
    from hpcres.metrics.measure import measure as measured
    from hpcres.metrics.schedule import local_client

    chosen = tuple(statistics)
    if unknown := [name for name in chosen if name not in get_args(Statistic)]:
        raise InputError(f"statistics: {unknown[0]!r} is none; choose from {', '.join(get_args(Statistic))}")
    source = volume_of(volume, phases)
    names = tuple(phases.values()) if isinstance(phases, Mapping) else phases
    warn_of_absent_chunks(source)
    with local_client() if client is None else nullcontext(client) as connected:
        return Measurement.of(
            measured(
                source,
                Work(connected, progress=progress),
                phases=names,
                voxel_size=edges_of(source, voxel_size),
                periodic=meeting_sides(periodic),
                sampling=Sampling(subvolumes, seed),
                statistics=Metrics().model_copy(update={"statistics": chosen}) if chosen else None,
            )
        )


def tortuosity(
    volume: AnyVolume,
    phase: str | int | None = None,
    *,
    direction: Literal["z", "y", "x"] = "z",
    conductivity: Mapping[str, float] | None = None,
    phases: Sequence[str] | Mapping[int, str] | None = None,
    voxel_size: VoxelSize = None,
    periodic: Iterable[str] = (),
    rtol: float = 1e-3,
    threads: int | None = None,
    check: Literal["taufactor"] | None = None,
) -> Tortuosity:
    """Solve for relative diffusivity and tortuosity factor of a phase along one direction (docs/transport.md).

    The error of the relative diffusivity is estimated.

    Parameters
    ----------
    volume : path, Volume or array
        Labels (z, y, x), held in memory during the solution. In an array of booleans True conducts.
    phase : str or int, optional
        Name or label of the phase that conducts. Not needed for booleans, nor with `conductivity`.
    direction : str
        z, y or x.
    conductivity : mapping, optional
        Phase → conductivity, for several phases that conduct together.
    phases, voxel_size, periodic
        As in `measure`. Sides that do not meet are insulated.
    rtol : float
        The solver stops when the estimated error of D_rel is below this share of it.
    threads : int, optional
        Threads of the solver; all cores by default. The result does not depend on it.
    check : str, optional
        `taufactor` solves with TauFactor too; cubic voxels and one phase only.

    Returns
    -------
    Tortuosity

    Raises
    ------
    InputError
        There is no such phase, or too little memory.
    Unfinished
        The solver did not reach `rtol`.

    Examples
    --------
    >>> tortuosity(np.ones((8, 8, 8), bool)).tau
    1.0
    """
    from hpcres.transport import Conducting, Means, SolveSettings
    from hpcres.transport import tortuosity as solved
    from hpcres.transport.second_opinion import by_taufactor, refuse_check

    if direction not in AXES:
        raise InputError(f"direction {direction!r} is none; choose from {', '.join(AXES)}")
    source = volume_of(volume, phases)
    names = tuple(phases.values()) if isinstance(phases, Mapping) else phases or source.phases
    if conductivity is not None and phase is not None:
        raise InputError(f"phase {phase!r}: conductivity already names the phases; drop one of them")
    if conductivity is None and phase is None:
        if getattr(volume, "dtype", None) != np.bool_:
            raise InputError(f"{source.path}: phase is missing; name the one that conducts, or give conductivity")
        phase = 1
    if isinstance(phase, int):
        label = int(phase)
        by_label = phases if isinstance(phases, Mapping) else dict(enumerate(names or ()))
        phase = by_label.get(label, str(label))
    edges, sides = edges_of(source, voxel_size).lengths(source.path)[0], meeting_sides(periodic)
    if check is not None:
        refuse_check(check, [source], edges, asked={"conductivity": conductivity, "periodic": any(sides)})
    warn_of_absent_chunks(source)
    found = solved(
        source,
        Conducting(names, () if phase is None else (str(phase),), conductivity),
        SolveSettings((direction,), edges, sides, rtol),
        Means(threads),
    )["results"][0]
    if found["state"] == "not converged":
        raise Unfinished(
            f"{source.path}: {found['phase']} along {direction} is not solved to rtol={rtol:g}, so no number is given; "
            "try a larger rtol, conductivities less far apart, or a part of the volume"
        )
    return Tortuosity.of(found, None if check is None else by_taufactor(source, found))


def train(
    study: Study | Mapping[str, Any] | str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> TrainingResult:
    """Train the generator of a study, or resume where an earlier call stopped.

    Parameters
    ----------
    study : Study, mapping or path
        A study, its content, or its file.
    settings : sequence of str
        `section.key=value`; these take precedence over the study file.
    output : path, optional
        Folder of results, in place of the study's own.
    overwrite : bool
        Train anew if there is a checkpoint.

    Returns
    -------
    TrainingResult
        `checkpoint`, `step` and `seconds`.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    from hpcres.training.loop import train as trained

    return trained(study_of(study, settings, output), overwrite=overwrite)


def infer(
    study: Study | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    settings: Sequence[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    low_res: str | Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    tiles: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    ensemble: int | None = None,
    overwrite: bool = False,
) -> Volume:
    """Paint the high-res volume; what an earlier call has painted is kept.

    Under mpirun every rank calls this function.

    Parameters
    ----------
    study : Study, mapping or path, optional
        Not needed with `checkpoint`, `low_res` and `output`, which is then the store.
    settings, output
        As in `train`.
    checkpoint, low_res : path, optional
        In place of the study's own.
    tiles : str, optional
        `4x4x4`: tiles along z, y and x.
    seed : int, optional
        Seed of the noise.
    device : str, optional
        auto, cpu or cuda.
    ensemble : int, optional
        Number of seeds to paint.
    overwrite : bool
        Paint anew.

    Returns
    -------
    Volume
        The store labels.zarr.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.label_stores import PaintOptions, paint_study

    loaded = None if study is None else study_of(study, settings, output)
    where, weights = (None if path is None else os.fspath(path) for path in (output, checkpoint))
    given = Given("", "hpcres.infer", output=where, overwrite=overwrite)
    with join_ranks() as ranks:
        return open_volume(
            paint_study(loaded, given, PaintOptions(weights, low_res, tiles, seed, ensemble, device), ranks)
        )


def phantom(
    study: Study | Mapping[str, Any] | str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Make the ground truth, the low-res volume and the slices that a study's section `phantom` describes.

    Parameters
    ----------
    study, settings, output
        As in `train`.
    overwrite : bool
        Make them anew.

    Returns
    -------
    list of Path
        The files, in `<output>/phantom`.

    Raises
    ------
    InputError
    """
    from hpcres.phantoms.files import make_phantom

    return make_phantom(study_of(study, settings, output), overwrite)


def convert(
    volume: AnyVolume,
    output: str | os.PathLike[str],
    *,
    phases: Mapping[int, str] | None = None,
    voxel_size: VoxelSize = None,
    overwrite: bool = False,
) -> Volume:
    """Write a volume as a sharded OME-Zarr label store.

    Parameters
    ----------
    volume : path, Volume or array
        Labels (z, y, x).
    output : path
        The store, `x.zarr`. It appears when it is complete.
    phases : mapping, optional
        Label → name; the labels of the store are 0, 1, 2, … in this order. By default the values are kept.
    voxel_size
        As in `measure`.
    overwrite : bool
        Replace a store that hpcres wrote.

    Returns
    -------
    Volume
        The store.

    Raises
    ------
    InputError
    """
    from hpcres.volumes.convert import convert as converted

    source = volume_of(volume, None)
    edges = edges_of(source, voxel_size)
    converted(source, os.fspath(output), phases=phases, voxel_size=edges, overwrite=overwrite)
    return open_volume(os.fspath(output))


def report(
    study: Study | Mapping[str, Any] | str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the HTML page of a study from what the other stages wrote.

    Parameters
    ----------
    study, settings, output
        As in `train`.

    Returns
    -------
    Path
        report.html in the study's folder.

    Raises
    ------
    InputError
    """
    from hpcres.result_files import write_study_report

    files = files_of(os.fspath(study)) if isinstance(study, str | os.PathLike) else ()
    return write_study_report(study_of(study, settings, output), files=files, warn=log_warnings)
