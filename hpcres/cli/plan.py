"""The command `hpcres plan`."""

from __future__ import annotations

import shlex

import click

from hpcres.cli.console import echo, echo_notes
from hpcres.cli.options import Stage, study_argument, study_options, tiles_option
from hpcres.study.file import load_study


@click.command(cls=Stage)
@study_argument
@study_options
@tiles_option
@click.option("--ranks", type=click.IntRange(1), help="MPI ranks; the study's cluster by default.")
def plan(study: str, settings: tuple[str, ...], output: str | None, tiles: str | None, ranks: int | None) -> None:
    """Tell what infer would cost: tiles, memory, bytes, hours from a trial of seconds, and the sbatch lines.

    \b
    hpcres plan --tiles 8x8x8
    hpcres plan study.yaml --tiles 16x16x16 --ranks 1024

    Works before training too: the cost does not depend on the weights.
    """
    from hpcres.checkpoint import build_generator, load_checkpoint
    from hpcres.conditions import conditions_of
    from hpcres.inference.plan import describe, estimate
    from hpcres.training.recipes import choices
    from hpcres.volumes.sizes import compare_sizes

    given = [study, *(f"--set={setting}" for setting in settings), *([f"--output={output}"] if output else [])]
    if tiles is not None:
        settings = (*settings, f"inference.tiles={tiles}")
    loaded = load_study(study, settings, output)
    notes = []
    if loaded.checkpoint_path.exists():
        generator = load_checkpoint(loaded.checkpoint_path).generator
    else:
        if loaded.recipe is not None:
            likely = choices(loaded)[0]
            loaded = likely.applied(loaded)
            notes.append(f"recipe auto: {likely.name} is assumed; with too few minutes for it, train takes fast")
        generator = build_generator(loaded).eval()
    conditions = conditions_of(loaded)
    notes += compare_sizes(loaded, low_res=conditions.volume, images=True, reference=True)
    count = ranks or loaded.cluster.infer_nodes * loaded.cluster.ranks_per_node
    echo_notes(notes)
    echo(describe(loaded, *estimate(loaded, generator, conditions.shape, count), shlex.join(given)))
