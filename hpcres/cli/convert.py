"""The command `hpcres convert`."""

from __future__ import annotations

from pathlib import Path

import click

from hpcres.cli.console import echo, echo_notes, progress_of, warn
from hpcres.cli.options import Stage, overwrite_option, parse_phases, study_options, volume_argument, voxel_size_option
from hpcres.errors import InputError
from hpcres.inputs import is_study, refuse_settings, voxel_edges_of
from hpcres.lengths import cubic
from hpcres.study.file import load_study


@click.command(cls=Stage)
@volume_argument
@study_options
@click.option("--phases", metavar="LABEL=NAME,…", help="Labels of the volume in the order of the output's 0, 1, 2, …")
@voxel_size_option
@overwrite_option
def convert(
    source: str,
    settings: tuple[str, ...],
    output: str | None,
    phases: str | None,
    voxel_size: str | None,
    overwrite: bool,
) -> None:
    """Write a volume (.tif, .npy, .h5:/dataset, .zarr) as a sharded OME-Zarr label store.

    \b
    hpcres convert study.yaml                                       its low_res volume, to <output>/low_res.zarr
    hpcres convert scan.tif --output scan.zarr --voxel-size "65 nm" --phases "0=pore,128=active"

    With phases, the labels of the store are 0, 1, 2, … in their order; without, the values are kept.
    """
    from hpcres.volumes.absent import absent_chunks
    from hpcres.volumes.convert import convert as convert_volume
    from hpcres.volumes.formats import open_volume
    from hpcres.volumes.phases import open_low_res
    from hpcres.volumes.sizes import compare_sizes

    if is_study(source):
        if phases or voxel_size:
            raise InputError(f"{source}: a study has its own phases and voxel size; drop --phases and --voxel-size")
        study = load_study(source, settings, output)
        if study.low_res is None:
            raise InputError(f"{source}: has no low_res to convert; name a volume")
        if study.low_res.channels:
            raise InputError(f"{source}: low_res.channels are probabilities, and a store holds labels; name one volume")
        groups = zip(study.low_res.phases, study.low_res.groups, strict=True)
        unknown = {label: f"unknown {label}" for label in study.low_res.unknown}
        names: dict[int, str] | None = {label: "+".join(group) for label, group in groups} | unknown
        target = study.folder / "low_res.zarr"
        volume = open_low_res(study.low_res)
        edges, notes = cubic(study.low_res_voxel_size), compare_sizes(study, low_res=volume)
    else:
        if output is None:
            raise InputError(f"{source}: no place to write to; give --output NAME.zarr")
        refuse_settings(source, settings)
        names, target = parse_phases(phases), Path(output)
        volume = open_volume(source)
        edges, notes = voxel_edges_of(volume, voxel_size)
    warn(absent_chunks(volume))
    with progress_of("convert") as progress:
        convert_volume(volume, target, phases=names, voxel_size=edges, overwrite=overwrite, progress=progress)
    echo_notes(notes)
    echo(target)
