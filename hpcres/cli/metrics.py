"""The command `hpcres metrics`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from hpcres.cli.console import command_line, echo, echo_notes, warn
from hpcres.cli.inputs import is_study, painted_volume, refuse_settings, refuse_voxel_size, study_for, voxel_edges_of
from hpcres.cli.options import (
    Stage,
    axis_choice,
    overwrite_option,
    scheduler_option,
    study_options,
    volume_argument,
    voxel_size_option,
    worker_wait_option,
)
from hpcres.outputs import METRICS, refuse_output
from hpcres.signals import end_if_signalled
from hpcres.study import Metrics, SubVolumes
from hpcres.study_file import save_study

_STATISTIC = click.Choice(("correlations", "chords", "connectivity", "spectrum", "representative", "geodesic"))


@click.command(cls=Stage)
@volume_argument
@study_options
@scheduler_option
@worker_wait_option
@voxel_size_option
@click.option(
    "--periodic", type=axis_choice, multiple=True, help="The volume's two sides meet along this axis; repeatable."
)
@click.option("--with", "added", type=_STATISTIC, multiple=True, help="Measure this too; repeatable.")
@click.option("--without", "left_out", type=_STATISTIC, multiple=True, help="Do not measure this; repeatable.")
@click.option("--lags", type=click.IntRange(1), help="Largest distance of correlations, in voxels.  [default: 64]")
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of a table.")
def metrics(
    source: str,
    settings: tuple[str, ...],
    output: str | None,
    scheduler: str | None,
    worker_wait: float,
    voxel_size: str | None,
    periodic: tuple[str, ...],
    added: tuple[str, ...],
    left_out: tuple[str, ...],
    lags: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure volume fractions, surface and interphase areas, TPB and more, with the standard error of each number.

    Measured besides are their spread over sub-volumes, correlations, chords, connected shares and spectra.

    \b
    hpcres metrics                                  the study's labels.zarr, its reference and its images
    hpcres metrics electrode.tiff                   any volume: .tif, .npy, .h5:/dataset, .zarr
    hpcres metrics scan.zarr --voxel-size 65nm --output metrics.json
    hpcres metrics --periodic z --periodic y        what was painted so: the sides' faces and edges count too
    hpcres metrics --with geodesic                  the shortest paths too: 8 bytes a voxel of scratch space
    hpcres metrics --scheduler tcp://node1:8786     on a running Dask cluster

    Writes <output>/metrics.json; for a bare volume only where --output names a file, which may hold earlier metrics of
    the same volume, or with --overwrite those of another.
    """
    from hpcres.metrics.measure import header, is_of, measure, measure_study
    from hpcres.metrics.schedule import connect
    from hpcres.metrics.table import metrics_text
    from hpcres.volumes.absent import absent_chunks, absent_chunks_of_study
    from hpcres.volumes.files import write_json
    from hpcres.volumes.formats import open_volume

    command, (z, y, x) = command_line(), (axis in periodic for axis in "zyx")
    if is_study(source):
        refuse_voxel_size(source, voxel_size)
        study = study_for("metrics", source, settings, output)
        study = study.model_copy(update={"metrics": _chosen(study.metrics, added, left_out, lags)})
        volume = painted_volume(study)
        target: Path | None = study.metrics_path
        refuse_output(study.metrics_path, METRICS, inputs=[*study.inputs, volume.path], renewed=True)
        warn(absent := absent_chunks_of_study(study, volume))
        with connect(scheduler, worker_wait=worker_wait) as client:
            result = measure_study(study, volume, client=client, periodic=(z, y, x), command=command)
        notes = result.get("notes", [])
        end_if_signalled()
        save_study(study, "metrics")
    else:
        refuse_settings(source, settings)
        volume, target = open_volume(source), Path(output) if output else None
        edges, notes = voxel_edges_of(volume, voxel_size)
        if target is not None:
            refuse_output(target, METRICS, inputs=[source], overwrite=overwrite, renewed=is_of(target, volume))
            target.absolute().parent.mkdir(parents=True, exist_ok=True)  # the scratch folder of geodesic paths is there
        warn(absent := absent_chunks(volume))
        with connect(scheduler, worker_wait=worker_wait) as client:
            measured = measure(
                volume,
                client=client,
                voxel_size=edges,
                settings=SubVolumes(count=0),
                periodic=(z, y, x),
                statistics=_chosen(Metrics(), added, left_out, lags),
                scratch=target and target.absolute().parent,
            )
        result = {**header(command), "volume": measured}
    result["absent_chunks"] = [one.as_json() for one in absent]
    end_if_signalled()
    if target is not None:
        write_json(target, result)
    echo_notes(notes)
    echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else metrics_text(result))
    if target is not None:
        echo(f"written to {target}", err=as_json)


def _chosen(own: Metrics, added: Sequence[str], left_out: Sequence[str], lags: int | None) -> Metrics:
    """Return the metrics settings `own` with the changes of --with, --without and --lags."""
    which = [name for name in dict.fromkeys([*own.statistics, *added]) if name not in left_out]
    return own.model_copy(update={"statistics": tuple(which), "lags": lags or own.lags})
