"""The command `hpcres verify`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from hpcres.cli.console import command_line, echo, progress_of
from hpcres.cli.options import Stage, study_options
from hpcres.errors import Unfinished
from hpcres.inputs import is_study, refuse_settings
from hpcres.study.file import load_study


@click.command(cls=Stage)
@click.argument("source", metavar="[STUDY|STORE]", default="study.yaml", type=click.Path())
@study_options
@click.option("--repair", is_flag=True, help="Paint again what is missing or damaged, and nothing else.")
@click.option(
    "--audit",
    "audited",
    metavar="K",
    type=click.IntRange(1),
    help="Then paint K tiles again, half a tile later, and compare: a seam would show at the store's tile faces.",
)
def verify(source: str, settings: tuple[str, ...], output: str | None, repair: bool, audited: int | None) -> None:
    """Check every shard of a painted store: there, undamaged, labels valid. Exit 3 where some are not.

    \b
    hpcres verify
    hpcres verify labels.zarr --repair
    mpirun -n 16 hpcres verify --audit 32

    An audit that finds more labels to differ than rounding explains, 4 in a million, also ends with exit 3.
    """
    from hpcres.inference.journal import StoreLock
    from hpcres.inference.ranks import join_ranks
    from hpcres.inference.run import infer as run
    from hpcres.inference.verify import audit, find_faults, remove_faulty, repair_job

    if is_study(source):
        path = load_study(source, settings, output).labels_path
    else:
        refuse_settings(source, settings)
        path = Path(source)
    with join_ranks() as ranks, StoreLock(path) as store_lock:

        def show(line: str) -> None:
            if ranks.rank == 0:
                echo(line)

        def check() -> Any:
            with progress_of("verify") as progress:
                return find_faults(path, progress, store_lock if repair else None)

        faults = ranks.from_first(check)
        for fault in faults:
            show(str(fault))
        if not faults:
            show(f"{path}: every shard is there and whole")
        elif not repair:
            raise Unfinished(f"{path}: {len(faults)} shards are missing or damaged; run hpcres verify --repair")
        else:
            job = repair_job(path, command_line())
            tiles = ranks.from_first(lambda: remove_faulty(path, faults))
            run(job, ranks, store_lock=store_lock, live=True)
            show(f"{path}: {tiles} tiles painted again")
        if audited:
            with progress_of("audit") if ranks.rank == 0 else nullcontext() as progress:
                outcome = audit(repair_job(path), audited, ranks, progress)
            show(f"{path}: {outcome}")
            outcome.refuse_seams(path)
