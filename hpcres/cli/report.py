"""The command `hpcres report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpcres.cli.console import command_line, echo, echo_notes, warn
from hpcres.cli.inputs import is_study, painted_volume, refuse_settings, refuse_voxel_size, voxel_edges_of
from hpcres.cli.options import (
    Stage,
    scheduler_option,
    study_options,
    volume_argument,
    voxel_size_option,
    worker_wait_option,
)
from hpcres.errors import InputError
from hpcres.lengths import VoxelEdges
from hpcres.outputs import PAGE, refuse_output
from hpcres.signals import end_if_signalled
from hpcres.study import Metrics, SubVolumes
from hpcres.study_file import files_of, load_study


@click.command(cls=Stage)
@volume_argument
@study_options
@scheduler_option
@worker_wait_option
@voxel_size_option
@click.option("--metrics", "measured_file", metavar="FILE", help="Of a bare volume; metrics.json beside the page.")
@click.option("--transport", "solved_file", metavar="FILE", help="Of a bare volume; transport.json beside the page.")
def report(
    source: str,
    settings: tuple[str, ...],
    output: str | None,
    scheduler: str | None,
    worker_wait: float,
    voxel_size: str | None,
    measured_file: str | None,
    solved_file: str | None,
) -> None:
    """One HTML page: slices, metrics beside their references, distributions, training, provenance.

    \b
    hpcres report                                   from what the other stages wrote, to <output>/report.html
    hpcres report electrode.tiff --output electrode.html

    The page of a bare volume is report.html in the working directory, or the file that --output names. It shows the
    results of `hpcres metrics VOLUME --output metrics.json` and `hpcres tortuosity VOLUME --output transport.json`,
    read from the folder of the page, or from --metrics and --transport. Without a metrics file the volume is measured
    first.
    """
    end_if_signalled()
    if is_study(source):
        refuse_voxel_size(source, voxel_size)
        if file := measured_file or solved_file:
            raise InputError(f"{file}: a study has its own results; drop --metrics and --transport")
        path, notes = _page_of_study(source, settings, output), list[str]()
    else:
        refuse_settings(source, settings)
        path, notes = _page_of_volume(
            source, Path(output or "report.html"), voxel_size, measured_file, solved_file, scheduler, worker_wait
        )
    echo_notes(notes)
    echo(path)


def _page_of_study(source: str, settings: tuple[str, ...], output: str | None) -> Path:
    from hpcres.reports.write import report_study
    from hpcres.volumes.absent import absent_chunks_of_study

    study = load_study(source, settings, output)
    made: list[str | Path] = [study.labels_path, study.metrics_path, study.transport_path, *files_of(source)]
    refuse_output(study.report_path, PAGE, inputs=[*study.inputs, *made], renewed=True)
    volume = painted_volume(study)
    warn(absent_chunks_of_study(study, volume))
    return report_study(study, volume)


def _page_of_volume(
    source: str,
    target: Path,
    voxel_size: str | None,
    measured_file: str | None,
    solved_file: str | None,
    scheduler: str | None,
    worker_wait: float,
) -> tuple[Path, list[str]]:
    """Write the page of a bare volume, and return its path and notes on the voxel size.

    The volume is measured if no metrics.json is found.
    """
    from hpcres.metrics.measure import header, measure
    from hpcres.metrics.schedule import connect
    from hpcres.reports.write import find_result, report_volume
    from hpcres.volumes.absent import absent_chunks
    from hpcres.volumes.formats import open_volume

    volume = open_volume(source)
    given, notes = voxel_edges_of(volume, voxel_size) if voxel_size else (None, [])
    refuse_output(target, PAGE, inputs=[source, measured_file, solved_file], renewed=True)
    warn(absent_chunks(volume))

    def found(stage: str, named: str | None, edges: VoxelEdges | None) -> dict[str, Any] | None:
        file = Path(named) if named else target.parent / f"{stage}.json"
        result = find_result(volume, stage, file, named is not None, edges)
        if result is not None:
            echo(f"{stage} from {file}", err=True)
        return result

    result, solved = found("metrics", measured_file, given), found("transport", solved_file, None)
    if result is None:
        edges, notes = (given, notes) if given else voxel_edges_of(volume, None)
        with connect(scheduler, worker_wait=worker_wait) as client:
            measured = measure(volume, client=client, voxel_size=edges, settings=SubVolumes(), statistics=Metrics())
        result = {**header(command_line()), "volume": measured}
    return report_volume(volume, result, target, solved), notes
