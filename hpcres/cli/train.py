"""The command `hpcres train`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from hpcres.cli.console import echo, warn
from hpcres.cli.options import Stage, overwrite_option, study_argument, study_options
from hpcres.cores import limit_spinning
from hpcres.inputs import study_for
from hpcres.signals import is_first_rank


@click.command(cls=Stage)
@study_argument
@study_options
@click.option(
    "--init-from", metavar="PATH", help="Begin from the weights of another material's checkpoint.pt or best.pt."
)
@overwrite_option
def train(study: str, settings: tuple[str, ...], output: str | None, init_from: str | None, overwrite: bool) -> None:
    """Learn the generator, on one process or under torchrun; a stopped run goes on where it was.

    \b
    hpcres train
    hpcres train configs/case3-sofc-small.yaml --set training.minutes=10
    torchrun --nproc-per-node 4 -m hpcres train study.yaml
    hpcres train new.yaml --init-from other/checkpoint.pt

    Writes <output>/checkpoint.pt (all that infer needs besides the coarse volume), training.csv and training.html; with
    training.quality_steps also quality.csv and best.pt, the generator with the best score; tensorboard/ has all curves
    where TensorBoard is installed (hpcres[tensorboard]).
    """
    limit_spinning(os.environ)
    from hpcres.training.loop import train as run
    from hpcres.volumes.absent import absent_chunks_of_study

    if init_from is not None:
        settings = (*settings, f"training.init_from={json.dumps(str(Path(init_from).resolve()), ensure_ascii=False)}")
    loaded = study_for("train", study, settings, output)
    warn(absent_chunks_of_study(loaded))
    result = run(loaded, overwrite=overwrite, live=True)
    if is_first_rank():
        if result.already_finished:
            echo(f"already trained to step {result.step}; --overwrite trains anew", err=True)
        echo(result.checkpoint)
