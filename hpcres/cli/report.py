"""The command `hpcres report`."""

from __future__ import annotations

from typing import Any

import click

from hpcres.cli.console import echo, echo_notes, warn
from hpcres.cli.options import (
    Stage,
    given,
    scheduler_option,
    study_options,
    volume_argument,
    voxel_size_option,
    worker_wait_option,
)


@click.command(cls=Stage)
@volume_argument
@study_options
@scheduler_option
@worker_wait_option
@voxel_size_option
@click.option("--metrics", metavar="FILE", help="Of a bare volume; metrics.json beside the page.")
@click.option("--transport", metavar="FILE", help="Of a bare volume; transport.json beside the page.")
def report(scheduler: str | None, worker_wait: float, **options: Any) -> None:
    """One HTML page: slices, metrics beside their references, distributions, training, provenance.

    \b
    hpcres report                                   from what the other stages wrote, to <output>/report.html
    hpcres report electrode.tiff --output electrode.html

    The page of a bare volume is report.html in the working directory, or the file that --output names. It shows the
    results of `hpcres metrics VOLUME --output metrics.json` and `hpcres tortuosity VOLUME --output transport.json`,
    read from the folder of the page, or from --metrics and --transport. Without a metrics file the volume is measured
    first.
    """
    from hpcres.result_files import Workers, write_report

    path, notes = write_report(given(options), Workers(scheduler, worker_wait), **options, warn=warn)
    echo_notes(notes)
    echo(path)
