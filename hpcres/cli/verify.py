"""The command `hpcres verify`."""

from __future__ import annotations

from typing import Any

import click

from hpcres.cli.console import echo
from hpcres.cli.options import Stage, given, study_options


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
def verify(repair: bool, audited: int | None, **options: Any) -> None:
    """Check every shard of a painted store: there, undamaged, labels valid. Exit 3 where some are not.

    \b
    hpcres verify
    hpcres verify labels.zarr --repair
    mpirun -n 16 hpcres verify --audit 32

    An audit that finds more labels to differ than rounding explains, 4 in a million, also ends with exit 3.
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.label_stores import check_store

    source = given(options)
    with join_ranks() as ranks:
        check_store(source, repair=repair, audited=audited, ranks=ranks, show=echo)
