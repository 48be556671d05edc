"""The command `hpcres convert`."""

from __future__ import annotations

from typing import Any

import click

from hpcres.cli.console import echo, echo_notes, warn
from hpcres.cli.options import (
    Stage,
    given,
    overwrite_option,
    parse_phases,
    study_options,
    volume_argument,
    voxel_size_option,
)


@click.command(cls=Stage)
@volume_argument
@study_options
@click.option("--phases", metavar="LABEL=NAME,…", help="Labels of the volume in the order of the output's 0, 1, 2, …")
@voxel_size_option
@overwrite_option
def convert(phases: str | None, **options: Any) -> None:
    """Write a volume (.tif, .npy, .h5:/dataset, .zarr) as a sharded OME-Zarr label store.

    \b
    hpcres convert study.yaml                                       its low_res volume, to <output>/low_res.zarr
    hpcres convert scan.tif --output scan.zarr --voxel-size "65 nm" --phases "0=pore,128=active"

    With phases, the labels of the store are 0, 1, 2, … in their order; without, the values are kept.
    """
    from hpcres.label_stores import convert_given

    store, notes = convert_given(given(options), parse_phases(phases), warn)
    echo_notes(notes)
    echo(store)
