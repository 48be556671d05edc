"""The command `hpcres metrics`."""

from __future__ import annotations

from typing import Any, get_args

import click

from hpcres.cli.console import echo_notes, echo_result, warn
from hpcres.cli.options import (
    Stage,
    axis_choice,
    given,
    overwrite_option,
    scheduler_option,
    study_options,
    volume_argument,
    voxel_size_option,
    worker_wait_option,
)
from hpcres.study import Statistic

_STATISTIC = click.Choice(get_args(Statistic))


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
def metrics(scheduler: str | None, worker_wait: float, as_json: bool, **options: Any) -> None:
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
    from hpcres.metrics.table import metrics_text
    from hpcres.result_files import MetricsOptions, Workers, write_metrics

    found = write_metrics(given(options), MetricsOptions(**options), Workers(scheduler, worker_wait), warn)
    echo_notes(found.notes)
    echo_result(found.result, found.path, "" if as_json else metrics_text(found.result), as_json)
