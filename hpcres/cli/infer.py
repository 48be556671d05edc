"""The command `hpcres infer`."""

from __future__ import annotations

from pathlib import Path

import click

from hpcres.cli.console import command_line, echo, warn
from hpcres.cli.options import DEFAULT_STUDY, Stage, overwrite_option, study_argument, study_options, tiles_option
from hpcres.inputs import study_for
from hpcres.study.file import save_study


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
def infer(
    study: str,
    settings: tuple[str, ...],
    output: str | None,
    tiles: str | None,
    checkpoint: str | None,
    low_res: tuple[str, ...],
    seed: int | None,
    ensemble: int | None,
    device: str | None,
    overwrite: bool,
) -> None:
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
    from hpcres.inference.run import infer as run
    from hpcres.inference.run import open_job
    from hpcres.volumes.absent import absent_chunks

    # A network fed by noise alone needs no low-res volume; a study that is named must be there.
    alone = checkpoint and (low_res or (output and study == DEFAULT_STUDY)) and not Path(study).exists()
    with join_ranks() as ranks:
        loaded = None if alone else study_for("infer", study, settings, output)
        job = open_job(
            loaded,
            checkpoint=checkpoint,
            low_res=low_res,
            output=output,
            tiles=tiles,
            seed=seed,
            device=device,
            command=command_line(),
            inference={} if ensemble is None else {"ensemble": ensemble},
        )
        if ranks.rank == 0:
            warn(absent_chunks(*job.conditions.volumes))
        painted = run(job, ranks, overwrite=overwrite)
        if ranks.rank == 0:
            if loaded is not None:
                save_study(loaded, "infer")
            echo(painted.store)
