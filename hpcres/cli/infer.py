"""The command `hpcres infer`."""

from __future__ import annotations

from typing import Any

import click

from hpcres.cli.console import echo, warn
from hpcres.cli.options import Stage, given, overwrite_option, study_argument, study_options, tiles_option


@click.command(cls=Stage)
@study_argument
@study_options
@tiles_option
@click.option("--checkpoint", metavar="PATH", help="The study's by default.")
@click.option(
    "--low-res", metavar="PATH", multiple=True, help="The study's by default; of probabilities once for each channel."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the noise; the study's by default.")
@click.option("--ensemble", metavar="K", type=click.IntRange(1, 255), help="Paint K seeds; see below.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), help="The study's by default.")
@overwrite_option
def infer(**options: Any) -> None:
    """Paint the high-res volume, tile by tile over MPI ranks; a stopped run goes on where it was.

    \b
    hpcres infer --tiles 8x8x8
    mpirun -n 16 hpcres infer --tiles 8x8x8
    hpcres infer --checkpoint checkpoint.pt --low-res tomogram.tif --output labels.zarr

    Writes <output>/labels.zarr, OME-Zarr 0.5 with a pyramid; the bytes do not depend on the number of ranks.
    Without a study file, the checkpoint and the coarse volume are all it needs. With --ensemble K the labels are those
    of the first of K seeds, labels-agreement.zarr holds the share of seeds that agree with them, and the attributes of
    labels.zarr how every metric varies with the seed.
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.label_stores import PaintOptions, paint

    source = given(options)
    with join_ranks() as ranks:
        store = paint(source, PaintOptions(**options), ranks, warn)
        if ranks.rank == 0:
            echo(store)
